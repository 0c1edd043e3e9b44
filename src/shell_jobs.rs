//! Makes the parts of shell jobs, and of jobs that this build can't run: those fail with the reason in
//! their log.

use std::io;
use std::path::PathBuf;
use std::rc::Rc;

use actors::job::{EnvVar, ExecutorKind, InjectedFile, Job};
use actors::ports::{
    ExecutorBackend, JobParts, JobPartsFactory, JumpPointFiles, Script, ShellSession, SparePlace,
    StepError,
};
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;

use crate::containment::ShellContainment;
use crate::executors::shell::{ShellBackend, ShellConfig};
use crate::jump_point::SshAccess;
use crate::spool::FileSpool;
use crate::state_dir::StateDir;

/// See the module.
#[derive(Debug)]
pub struct ShellJobs {
    /// Where jobs have their directories.
    pub state: StateDir,
    /// Their surroundings.
    pub shell: ShellConfig,
    /// How people log in; nothing if nobody is to.
    pub jump_point: Option<JumpPointConfig>,
}

/// How people log in to where jobs run.
#[derive(Clone, Debug)]
pub struct JumpPointConfig {
    /// Where the script is put that they start.
    pub script: PathBuf,
    /// Whether they see the job's environment.
    pub shows_environment: bool,
}

impl JobPartsFactory for ShellJobs {
    fn make(&self, job: &Job) -> io::Result<JobParts> {
        let directory = Rc::new(self.state.make_job_dir()?);
        let spool = FileSpool::create(directory.path().join("log.jsonl"))?;
        let containment = ShellContainment::new(Rc::clone(&directory));
        let access = self.jump_point.clone().map(|config| SshAccess {
            home: self.shell.home.clone(),
            script: config.script,
            job_directory: directory.path().to_owned(),
            environment: config.shows_environment.then(|| directory.environment()),
        });
        let backend: Box<dyn ExecutorBackend> = match job.executor {
            Ok(ExecutorKind::DockerCompose) => Box::new(NoContainers),
            _ => Box::new(ShellBackend::new(
                self.shell.clone(),
                directory,
                containment.clone(),
                access.clone(),
            )),
        };
        Ok(JobParts {
            backend,
            containment: Box::new(containment),
            spool: Box::new(spool),
            jump_point: access.map(|access| Rc::new(access) as Rc<dyn JumpPointFiles>),
        })
    }

    fn make_spare_place(&self, _: &Job) -> io::Result<SparePlace> {
        let directory = Rc::new(self.state.make_job_dir()?);
        let containment = ShellContainment::new(Rc::clone(&directory));
        let shell = self.shell.clone();
        let backend = ShellBackend::new(shell, directory, containment.clone(), None);
        Ok(SparePlace { backend: Box::new(backend), containment: Box::new(containment) })
    }
}

/// Stands in for containers, which must not be replaced by this machine itself.
struct NoContainers;

impl NoContainers {
    fn refusal<T>() -> Result<T, StepError> {
        Err(StepError("this build of the agent can't run jobs in containers".to_owned()))
    }
}

impl ExecutorBackend for NoContainers {
    fn prepare(&mut self) -> LocalBoxFuture<'_, Result<Box<dyn ShellSession>, StepError>> {
        std::future::ready(Self::refusal()).boxed_local()
    }

    fn stage_variables<'a>(
        &'a mut self,
        _: &'a [EnvVar],
    ) -> LocalBoxFuture<'a, Result<Script, StepError>> {
        std::future::ready(Self::refusal()).boxed_local()
    }

    fn shown_path(&self, file: &InjectedFile) -> String {
        file.path.clone()
    }

    fn inject<'a>(&'a mut self, _: &'a InjectedFile) -> LocalBoxFuture<'a, Result<(), StepError>> {
        std::future::ready(Self::refusal()).boxed_local()
    }
}
