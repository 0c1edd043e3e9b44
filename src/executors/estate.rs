//! What a job leaves behind on this machine when its agent dies. Guards get it when they are started.

use std::io;

use serde::{Deserialize, Serialize};

use crate::ssh_access::SshAccess;
use crate::state::JobFiles;

/// See the module.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Estate {
    /// The job's files.
    pub files: JobFiles,
    /// How people log in to where the job runs, if they can.
    pub access: Option<SshAccess>,
}

impl Estate {
    /// Takes back what lets people log in, and ends their sessions.
    pub fn close_access(&self) -> io::Result<()> {
        self.access.as_ref().map_or(Ok(()), SshAccess::close_for_good)
    }
}
