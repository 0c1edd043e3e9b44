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

/// Creates the runtime of the actors.
///
/// One thread for blocking work is started at once and kept: a job can use up all threads that this user may
/// have, and the agent must still be able to end that job.
pub(crate) fn system() -> io::Result<SystemRunner> {
    let runtime =
        Builder::new_current_thread().enable_all().thread_keep_alive(Duration::MAX).build()?;
    // Dropping the handle does not end the thread.
    drop(runtime.spawn_blocking(|| ()));
    Ok(System::with_tokio_rt(move || runtime))
}

/// Prints a configuration, and warnings about it to standard error.
pub(crate) fn print_config(warnings: &[String], printed: &str) -> Exit {
    for warning in warnings {
        tell(&format!("warning: {warning}"));
    }
    // A failure of standard output can't be reported anywhere.
    let _ = io::stdout().write_all(printed.as_bytes());
    Exit::Success
}

/// Fails if the clock shows a time before 1970: certificates, tokens and HTTP dates can't express such a
/// time.
pub(crate) fn check_clock() -> io::Result<()> {
    if SystemTime::now() < SystemTime::UNIX_EPOCH {
        return Err(io::Error::other(
            "this machine's clock shows a time before 1970; set the clock first",
        ));
    }
    Ok(())
}
