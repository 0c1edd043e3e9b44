//! The agent's commands: the only places that start top-level actors.

pub mod cli;
pub mod exit;
pub mod renderer;
pub mod run;
pub mod serve;
pub mod start;
pub mod version;
pub mod wiring;

use std::io::{self, Write as _};
use std::time::{Duration, SystemTime};

use actix::{System, SystemRunner};
use tokio::runtime::Builder;

use self::exit::Exit;
use self::run::tell;

/// Creates the runtime of the actors. A thread for work that may block is there from the beginning, and is kept: a job can
/// use up all the threads that this user may have, and must be brought to its end then too.
pub(crate) fn system() -> io::Result<SystemRunner> {
    let runtime =
        Builder::new_current_thread().enable_all().thread_keep_alive(Duration::MAX).build()?;
    // Dropped at once: the thread stays.
    drop(runtime.spawn_blocking(|| ()));
    Ok(System::with_tokio_rt(move || runtime))
}

/// Shows a configuration, and what the operator may want to know about it.
pub(crate) fn print_config(warnings: &[String], printed: &str) -> Exit {
    for warning in warnings {
        tell(&format!("warning: {warning}"));
    }
    // Nobody is left to be told if that fails.
    let _ = io::stdout().write_all(printed.as_bytes());
    Exit::Success
}

/// Refuses a clock that shows a time before 1970, which certificates, tokens and the dates of HTTP can't do with.
pub(crate) fn check_clock() -> io::Result<()> {
    if SystemTime::now() < SystemTime::UNIX_EPOCH {
        return Err(io::Error::other(
            "this machine's clock shows a time before 1970; it must be set",
        ));
    }
    Ok(())
}
