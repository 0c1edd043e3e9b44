//! The only unsafe code: kernel features without a safe interface.
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

/// Makes `command` start as the leader of a new session whose terminal is its standard input.
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

/// Makes `command` enter a cgroup when it starts. `procs` is the group's open `cgroup.procs`.
pub(crate) fn enter_cgroup(command: &mut Command, procs: File) {
    let enter = move || {
        // "0" means the writing process. An error is ignored: the job's processes are found without the
        // group, too.
        let _ = (&procs).write(b"0");
        Ok(())
    };
    // SAFETY: the closure only makes a plain system call, which is async-signal-safe.
    unsafe { command.pre_exec(enter) };
}

/// The kernel's value; libc's constant of this name is an `int` and too narrow for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Starts `command` inside a cgroup, whose directory is open. Moving a process into a group stalls all
/// processors for 10 ms and more; starting it there does not.
///
/// Returns `None` if the kernel can't do that, or if this process has several threads.
pub(crate) fn spawn_in_cgroup(command: &mut Command, cgroup: &File) -> io::Result<Option<Pid>> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Ok(None);
    }
    // The child writes the error code to the pipe if it can't execute the program; `exec` closes the pipe.
    let (mut failure_reader, failure_writer) = std::io::pipe()?;
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
    // SAFETY: without CLONE_VM this is a fork: the child continues with a copy of the memory. No other
    // thread exists that could hold a lock in that copy.
    let pid =
        unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of_val(&arguments)) };
    match pid {
        -1 => Ok(None),
        0 => {
            let code = command.exec().raw_os_error().unwrap_or(libc::EINVAL);
            // An error can't be reported anywhere else.
            let _ = (&failure_writer).write_all(&code.to_ne_bytes());
            // SAFETY: ends the child at once, without running the parent's exit handlers.
            unsafe { libc::_exit(127) }
        }
        pid => {
            drop(failure_writer);
            let mut code = [0; size_of::<i32>()];
            let pid = i32::try_from(pid).map(Pid::from_raw).map_err(io::Error::other)?;
            match failure_reader.read_exact(&mut code) {
                Err(_started) => Ok(Some(pid)),
                Ok(()) => {
                    waitpid(pid, None)?;
                    Err(io::Error::from_raw_os_error(i32::from_ne_bytes(code)))
                }
            }
        }
    }
}

/// Makes `command` start with default signal handling and the original limit of open files.
pub(crate) fn start_clean(command: &mut Command) {
    // SAFETY: `reset` only makes plain system calls, which are async-signal-safe.
    unsafe { command.pre_exec(reset) };
}

/// Unblocks all signals and restores their default actions: programs that inherit an ignored SIGTERM
/// can't be ended gracefully. Also restores the original limit of open files.
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

/// Ignores SIGXFSZ, so that a write beyond the file size limit fails instead of killing this process.
pub(crate) fn survive_file_size_limits() -> io::Result<()> {
    // SAFETY: ignores the signal, so no handler can run.
    unsafe { nix::sys::signal::signal(Signal::SIGXFSZ, SigHandler::SigIgn) }?;
    Ok(())
}

/// Overwrites the values of these variables in this process's initial environment, which other processes
/// can read in `/proc` as long as this one lives. The variables are empty from now on.
///
/// Must be called while the process has only one thread.
pub(crate) fn wipe_environment(names: &[&str]) {
    unsafe extern "C" {
        static environ: *const *mut libc::c_char;
    }
    // SAFETY: no other thread reads or changes the environment meanwhile, so `environ` points to a list of
    // C strings that ends with a null pointer; each string belongs to the process and is writable.
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

/// Takes ownership of an inherited descriptor. Fails if no such descriptor is open.
pub(crate) fn take_descriptor(number: i32) -> io::Result<File> {
    close_on_exec(number)?;
    // SAFETY: the descriptor is open, as its flags could be set just now, and as an inherited one it has no
    // other owner in this process.
    Ok(unsafe { File::from_raw_fd(number) })
}

/// Marks a descriptor as close-on-exec. Fails if no such descriptor is open.
pub(crate) fn close_on_exec(number: i32) -> io::Result<()> {
    // SAFETY: sets a flag of a descriptor, and fails if no such descriptor is open.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Registers a file, such as a terminal, for readiness events.
pub(crate) fn watch(file: File) -> io::Result<AsyncFd<File>> {
    // SAFETY: a `File` owns its descriptor and returns the same one as long as it lives; the result keeps
    // the file alive.
    unsafe { AsyncFd::register(file) }.map_err(io::Error::from)
}
