//! Makes the parts of jobs: what runs their commands, ends them, keeps their logs, and lets people in.

use std::io;
use std::path::PathBuf;
use std::rc::Rc;

use actix::Addr;
use actors::job::containers::Compose;
use actors::job::{ExecutorKind, Job};
use actors::metrics::Metrics;
use actors::ports::{JobParts, JobPartsFactory, JumpPointFiles, SparePlace};

use crate::executors::docker::DockerConfig;
use crate::executors::docker::backend::DockerBackend;
use crate::executors::docker::bodies::main_container_name;
use crate::executors::docker::place::Place;
use crate::executors::job_mark;
use crate::executors::shell::containment::ShellContainment;
use crate::executors::shell::{ShellBackend, ShellConfig};
use crate::ssh_access::{LeadsTo, SshAccess};
use crate::state::log_file::FileSpool;
use crate::state::{ENVIRONMENT_COPY, JobDir, StateDir};

/// See the module.
pub struct Jobs {
    /// Where jobs have their directories.
    pub state: StateDir,
    /// The surroundings of shell jobs.
    pub shell: ShellConfig,
    /// What containers have.
    pub docker: DockerConfig,
    /// Where measurements go.
    pub metrics: Addr<Metrics>,
    /// The variables of shell jobs are also in a file in the directory for temporary files.
    pub copies_environment: bool,
    /// How people log in; nothing if nobody is to.
    pub jump_point: Option<JumpPointConfig>,
}

/// How people log in to where jobs run.
#[derive(Clone, Debug)]
pub struct JumpPointConfig {
    /// Where the script is put that they start.
    pub script: PathBuf,
    /// The script is there for every job, and a shell that it leads to has the job's environment.
    pub for_every_job: bool,
}

impl Jobs {
    fn docker_backend(&self, job: &Job, compose: &Compose, place: &Place) -> DockerBackend {
        let (mut config, metrics) = (self.docker.clone(), self.metrics.clone());
        config.environment.push(job_mark::variable(&place.mark()));
        DockerBackend::new(config, &job.id, compose.clone(), place.clone(), metrics)
    }

    /// The way in to `job`, if there is to be one.
    fn access(&self, job: &Job, directory: &JobDir) -> Option<SshAccess> {
        let JumpPointConfig { script, for_every_job } = self.jump_point.clone()?;
        let leads_to = match &job.executor {
            Ok(ExecutorKind::DockerCompose(compose)) => LeadsTo::Container {
                name: main_container_name(directory.name(), compose),
                engine: self.docker.engine(),
            },
            _ => LeadsTo::Shell { environment: for_every_job.then(|| directory.environment()) },
        };
        Some(SshAccess {
            home: self.shell.home.clone(),
            script,
            job_directory: directory.path().to_owned(),
            without_keys: for_every_job,
            leads_to,
        })
    }

    fn shell_backend(
        &self,
        directory: Rc<JobDir>,
        containment: &ShellContainment,
        access: Option<SshAccess>,
    ) -> ShellBackend {
        let mut config = self.shell.clone();
        config.environment.push(job_mark::variable(&directory.mark()));
        ShellBackend::new(config, directory, containment.clone(), access)
    }
}

impl JobPartsFactory for Jobs {
    fn make(&self, job: &Job) -> io::Result<JobParts> {
        let directory = Rc::new(self.state.make_job_dir()?);
        let spool = Box::new(FileSpool::create(directory.log())?);
        let access = self.access(job, &directory);
        let jump_point = access.clone().map(|access| Rc::new(access) as Rc<dyn JumpPointFiles>);
        if let Ok(ExecutorKind::DockerCompose(compose)) = &job.executor {
            let place = Place::new(directory, access);
            let backend = Box::new(self.docker_backend(job, compose, &place));
            return Ok(JobParts { backend, containment: Box::new(place), spool, jump_point });
        }
        if self.copies_environment {
            let name = format!("{ENVIRONMENT_COPY}{}", job.id.as_str());
            // An identifier that is no file name names no file.
            if !name.contains('/') {
                directory.note_environment_copy(std::env::temp_dir().join(name))?;
            }
        }
        let containment = ShellContainment::new(Rc::clone(&directory));
        let backend = Box::new(self.shell_backend(directory, &containment, access));
        Ok(JobParts { backend, containment: Box::new(containment), spool, jump_point })
    }

    fn check(&self) -> io::Result<()> {
        let directory = self.state.make_job_dir()?;
        FileSpool::create(directory.log()).map(drop)
    }

    fn make_spare_place(&self, job: &Job) -> io::Result<SparePlace> {
        let directory = Rc::new(self.state.make_job_dir()?);
        if let Ok(ExecutorKind::DockerCompose(compose)) = &job.executor {
            let place = Place::new(directory, None);
            let backend = Box::new(self.docker_backend(job, compose, &place).spare());
            return Ok(SparePlace { backend, containment: Box::new(place) });
        }
        let containment = ShellContainment::new(Rc::clone(&directory));
        let backend = Box::new(self.shell_backend(directory, &containment, None));
        Ok(SparePlace { backend, containment: Box::new(containment) })
    }
}
