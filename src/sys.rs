//! The only unsafe code: what the kernel offers and no safe interface covers.
#![expect(unsafe_code, reason = "each block says why it is sound")]

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::libc;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, sigprocmask};
use tokio::io::unix::AsyncFd;

/// Has `command` start as the leader of a new session whose terminal is its standard input, and,
/// if there is a cgroup, as a member of it. `cgroup_procs` is the group's open `cgroup.procs`.
pub(crate) fn lead_terminal_session(command: &mut Command, cgroup_procs: Option<File>) {
    let enter = move || {
        start_with_default_signals()?;
        nix::unistd::setsid()?;
        // SAFETY: TIOCSCTTY takes an integer, and descriptor 0 is open: it was set up just now.
        if unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } == -1 {
            return Err(io::Error::last_os_error());
        }
        if let Some(mut procs) = cgroup_procs.as_ref() {
            // "0" is the writing process itself. A group that can't be entered is not needed: the
            // descendants are found without it.
            let _ = procs.write(b"0");
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed, and these are plain
    // system calls: no allocation, no lock.
    unsafe { command.pre_exec(enter) };
}

/// Undoes what this process and its parents block or ignore: a job that inherits it can't be asked
/// to end.
fn start_with_default_signals() -> io::Result<()> {
    for signal in Signal::iterator().filter(|s| !matches!(s, Signal::SIGKILL | Signal::SIGSTOP)) {
        // SAFETY: sets the default action, so no handler can run.
        unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) }?;
    }
    Ok(sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?)
}

/// Watches a file, such as a terminal, for being readable or writable.
pub(crate) fn watch(file: File) -> io::Result<AsyncFd<File>> {
    // SAFETY: a `File` owns its descriptor and answers the same one as long as it lives, and the
    // result keeps it alive.
    unsafe { AsyncFd::register(file) }.map_err(io::Error::from)
}
