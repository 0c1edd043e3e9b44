//! Finds and ends the SSH sessions of a job.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{SESSION_VARIABLE, SshAccess};
use crate::os::processes::{
    descendants, kill_processes_with, processes_with, signal_all, start_of,
};

/// The logins to a job, as recorded by the login shells.
pub(super) struct Logins {
    /// Each login shell's process ID and start time.
    shells: Vec<(Pid, String)>,
    /// Environment entries of the session's processes, unless a process has removed them.
    markers: Vec<Vec<u8>>,
}

impl Logins {
    /// Reads the file to which each login shell appends a line.
    pub(super) fn read(access: &SshAccess) -> io::Result<Self> {
        let recorded = match fs::read_to_string(access.used_file()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Self { shells: Vec::new(), markers: Vec::new() });
            }
            recorded => recorded?,
        };
        let job = access.job_directory.as_os_str().as_bytes();
        let mut markers = vec![[SESSION_VARIABLE.as_bytes(), b"=", job, b"\0"].concat()];
        let mut shells = Vec::new();
        for line in recorded.lines() {
            let mut words = line.splitn(3, ' ');
            let (Some(pid), Some(start)) = (words.next(), words.next()) else {
                continue;
            };
            shells.extend(pid.parse().ok().map(|pid| (Pid::from_raw(pid), start.to_owned())));
            if let Some(connection) = words.next().filter(|connection| !connection.is_empty()) {
                markers.push(format!("SSH_CONNECTION={connection}\0").into_bytes());
            }
        }
        Ok(Self { shells, markers })
    }

    fn living_shells(&self) -> impl Iterator<Item = Pid> {
        let lives = |(pid, start): &&(Pid, String)| start_of(*pid).as_ref() == Some(start);
        self.shells.iter().filter(lives).map(|(pid, _)| *pid)
    }

    pub(super) fn is_anybody_there(&self) -> io::Result<bool> {
        if self.living_shells().next().is_some() {
            return Ok(true);
        }
        for marker in &self.markers {
            if !processes_with(marker)?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Kills the processes of all sessions. Returns how many processes it killed.
    pub(super) fn kill(&self) -> io::Result<usize> {
        let mut killed = 0;
        for shell in self.living_shells() {
            let below = descendants(shell).unwrap_or_default();
            signal_all(&below, Signal::SIGKILL);
            killed += below.len() + usize::from(kill(shell, Signal::SIGKILL).is_ok());
        }
        for marker in &self.markers {
            killed += kill_processes_with(marker)?;
        }
        Ok(killed)
    }
}
