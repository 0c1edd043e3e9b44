//! The only unsafe code: what the kernel offers and no safe interface covers.
#![expect(unsafe_code, reason = "each block says why it is sound")]

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::libc;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use tokio::io::unix::AsyncFd;

use crate::os::open_files;

/// Has `command` start as the leader of a new session whose terminal is its standard input.
pub(crate) fn lead_terminal_session(command: &mut Command) {
    let enter = || {
        reset()?;
        nix::unistd::setsid()?;
        // SAFETY: TIOCSCTTY takes an integer, and descriptor 0 is open: it was set up just now.
        if unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed, and these are plain
    // system calls: no allocation, no lock.
    unsafe { command.pre_exec(enter) };
}

/// Has `command` move into a cgroup when it starts. `procs` is the group's open `cgroup.procs`.
pub(crate) fn enter_cgroup(command: &mut Command, procs: File) {
    let enter = move || {
        // "0" is the writing process itself. A group that can't be entered is not needed: the
        // descendants are found without it.
        let _ = (&procs).write(b"0");
        Ok(())
    };
    // SAFETY: as above.
    unsafe { command.pre_exec(enter) };
}

/// As the kernel has it; libc's constant of this name is too narrow.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Starts `command` inside a cgroup, whose directory is open. A process that moves there makes all
/// processors wait, for 10 ms and more; one that is born there does not. Nothing if the kernel
/// can't do it, or if this process has several threads.
pub(crate) fn spawn_in_cgroup(command: &mut Command, cgroup: &File) -> io::Result<Option<Pid>> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Ok(None);
    }
    // Closed by the program's start; what is in it before is why it can't be started.
    let (mut failure, told) = std::io::pipe()?;
    let Ok(cgroup) = u64::try_from(cgroup.as_raw_fd()) else {
        return Ok(None);
    };
    let arguments = libc::clone_args {
        flags: CLONE_INTO_CGROUP,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup,
    };
    // SAFETY: without CLONE_VM this is a fork: the child goes on with a copy of everything. No other
    // thread is there that could hold a lock in that copy.
    let pid =
        unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of_val(&arguments)) };
    match pid {
        -1 => Ok(None),
        0 => {
            let code = command.exec().raw_os_error().unwrap_or(libc::EINVAL);
            // The parent waits for it; there is nobody else to tell.
            let _ = (&told).write_all(&code.to_ne_bytes());
            // SAFETY: ends the child at once; what the parent has registered for its exit is not run.
            unsafe { libc::_exit(127) }
        }
        pid => {
            drop(told);
            let mut code = [0; size_of::<i32>()];
            let pid = i32::try_from(pid).map(Pid::from_raw).map_err(io::Error::other)?;
            match failure.read_exact(&mut code) {
                Err(_started) => Ok(Some(pid)),
                Ok(()) => {
                    waitpid(pid, None)?;
                    Err(io::Error::from_raw_os_error(i32::from_ne_bytes(code)))
                }
            }
        }
    }
}

/// Has `command` start with the signals and limits that a program expects to find.
pub(crate) fn start_clean(command: &mut Command) {
    // SAFETY: as above.
    unsafe { command.pre_exec(reset) };
}

/// Undoes what this process and its parents block or ignore: a job that inherits it can't be asked
/// to end. Undoes the raised limit of open files too.
fn reset() -> io::Result<()> {
    if let Some(limit) = open_files::before() {
        open_files::lower_to(limit)?;
    }
    for signal in Signal::iterator().filter(|s| !matches!(s, Signal::SIGKILL | Signal::SIGSTOP)) {
        // SAFETY: sets the default action, so no handler can run.
        unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) }?;
    }
    Ok(sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?)
}

/// Has a write beyond this process's limit for files fail like any other, instead of ending the process.
pub(crate) fn survive_file_size_limits() -> io::Result<()> {
    // SAFETY: ignores the signal, so no handler can run.
    unsafe { nix::sys::signal::signal(Signal::SIGXFSZ, SigHandler::SigIgn) }?;
    Ok(())
}

/// Overwrites the values that this process found in its environment under these names, which others could read there
/// as long as it lives. The variables are empty from now on.
///
/// Only for a process with one thread.
pub(crate) fn wipe_environment(names: &[&str]) {
    unsafe extern "C" {
        static environ: *const *mut libc::c_char;
    }
    // SAFETY: nobody else reads or changes the environment meanwhile, so `environ` leads to a list of texts that ends
    // with a null pointer; each is the process's own and writable up to its final zero byte.
    unsafe {
        let mut next = environ;
        while !next.is_null() && !(*next).is_null() {
            let length = libc::strlen(*next);
            let entry = std::slice::from_raw_parts_mut((*next).cast::<u8>(), length);
            for name in names {
                let is_named =
                    entry.starts_with(name.as_bytes()) && entry.get(name.len()) == Some(&b'=');
                if is_named {
                    entry[name.len() + 1..].fill(0);
                }
            }
            next = next.add(1);
        }
    }
}

/// Takes over the descriptor of this number, which the process found open; an error if there is none.
pub(crate) fn take_descriptor(number: i32) -> io::Result<File> {
    close_on_exec(number)?;
    // SAFETY: it is open, as its flags could be set just now, and nothing in this process that is open since its start
    // knows it.
    Ok(unsafe { File::from_raw_fd(number) })
}

/// Has the descriptor of this number be closed in programs that are started from now on.
pub(crate) fn close_on_exec(number: i32) -> io::Result<()> {
    // SAFETY: sets a flag of a descriptor; if there is none of this number, that is an error.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Watches a file, such as a terminal, for being readable or writable.
pub(crate) fn watch(file: File) -> io::Result<AsyncFd<File>> {
    // SAFETY: a `File` owns its descriptor and answers the same one as long as it lives, and the
    // result keeps it alive.
    unsafe { AsyncFd::register(file) }.map_err(io::Error::from)
}
