//! `agent version`.

use crate::commands::exit::Exit;

/// Prints the version.
pub fn version() -> Exit {
    println!("{}", env!("CARGO_PKG_VERSION"));
    Exit::Success
}
