//! `agent version`.

use crate::exit_code::Exit;

/// Prints the version.
pub fn version() -> Exit {
    println!("{}", env!("CARGO_PKG_VERSION"));
    Exit::Success
}
