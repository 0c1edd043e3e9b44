//! Makes the parts of shell jobs.

use std::io;
use std::rc::Rc;

use actors::job::{ExecutorKind, Job};
use actors::ports::{JobParts, JobPartsFactory};

use crate::containment::ShellContainment;
use crate::executors::shell::{ShellBackend, ShellConfig};
use crate::spool::FileSpool;
use crate::state_dir::StateDir;

/// See the module.
#[derive(Debug)]
pub struct ShellJobs {
    /// Where jobs have their directories.
    pub state: StateDir,
    /// Their surroundings.
    pub shell: ShellConfig,
}

impl JobPartsFactory for ShellJobs {
    fn make(&self, job: &Job) -> io::Result<JobParts> {
        if job.executor == Ok(ExecutorKind::DockerCompose) {
            let why = "a job for containers must not run on this machine itself";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        let directory = Rc::new(self.state.make_job_dir()?);
        let spool = FileSpool::create(directory.path().join("log.jsonl"))?;
        let containment = ShellContainment::new(Rc::clone(&directory));
        let backend = ShellBackend::new(self.shell.clone(), directory, containment.clone());
        Ok(JobParts {
            backend: Box::new(backend),
            containment: Box::new(containment),
            spool: Box::new(spool),
        })
    }
}
