//! `agent version`.

use crate::commands::exit::Exit;

/// Prints the agent's version.
pub fn version() -> Exit {
    println!("{}", env!("CARGO_PKG_VERSION"));
    Exit::Success
}
