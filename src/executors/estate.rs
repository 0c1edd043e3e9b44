//! What a guard must clean up on this machine when the agent dies. Guards get it at their start.

use std::io;

use serde::{Deserialize, Serialize};

use crate::ssh_access::SshAccess;
use crate::state::JobFiles;

/// A job's files and SSH access.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Estate {
    /// The job's files.
    pub files: JobFiles,
    /// SSH access to the job; `None` where it is not offered.
    pub access: Option<SshAccess>,
}

impl Estate {
    /// Closes SSH access, and ends the sessions of people who are logged in.
    pub fn close_access(&self) -> io::Result<()> {
        self.access.as_ref().map_or(Ok(()), SshAccess::close_for_good)
    }
}
