//! The agent's commands: the only places that start top-level actors.

pub mod run;
pub mod serve;
pub mod start;
pub mod version;

use std::io;
use std::time::SystemTime;

/// Refuses a clock that shows a time before 1970, which certificates, tokens and the dates of HTTP can't do with.
pub(crate) fn check_clock() -> io::Result<()> {
    if SystemTime::now() < SystemTime::UNIX_EPOCH {
        return Err(io::Error::other(
            "this machine's clock shows a time before 1970; it must be set",
        ));
    }
    Ok(())
}
