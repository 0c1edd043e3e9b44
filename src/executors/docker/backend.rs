//! Runs a job in containers: its shell in the main container, on that container's terminal.

use std::rc::Rc;
use std::time::Duration;

use actix::Addr;
use actors::job::containers::{Compose, Container};
use actors::job::{EnvVar, InjectedFile, JobId, Problem};
use actors::metrics::Metrics;
use actors::ports::{
    ExecutorBackend, PreparationError, PreparationStep, Prepared, Script, SessionEvent, StepError,
    StepLog,
};
use bollard::query_parameters::{
    CreateContainerOptions, InspectContainerOptions, ResizeContainerTTYOptions,
};
use futures_util::FutureExt as _;
use futures_util::future::{LocalBoxFuture, try_join_all};
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::executors::docker::DockerConfig;
use crate::executors::docker::bodies::{Common, SOCKET};
use crate::executors::docker::containers::JobContainers;
use crate::executors::docker::engine::Engine;
use crate::executors::docker::errors::{ContainerError, MainContainerError};
use crate::executors::docker::hijack::ContainerTerminal;
use crate::executors::docker::shell::{
    AgentCommands, DockerSession, SharedSession, export_lines, no_shell, show_to_logins,
};
use crate::executors::docker::side_containers::{SideContainer, wait_for_all};
use crate::executors::docker::upload::ContainerUser;
use crate::executors::registries::Registries;
use crate::executors::session::{Mark, Session};

/// How long the image's entrypoint and the shell's startup files may take until the shell is ready.
const SHELL_PATIENCE: Duration = Duration::from_mins(2);

/// How much of a program's output an error or a line of the agent's own log shows, in bytes.
pub(super) const SHOWN: usize = 2000;

/// How much of the output before the shell is ready is kept, in bytes. More than [`SHOWN`], as the echo of
/// what the agent types may be in it, and is left out later.
const MOST_KEPT: usize = 10_000;

/// The size of the terminal, in characters: the usual default of programs.
const ROWS: i32 = 24;
const COLUMNS: i32 = 80;

/// Prepares the containers of one job.
pub struct DockerBackend {
    pub(super) config: DockerConfig,
    pub(super) compose: Compose,
    pub(super) place: JobContainers,
    pub(super) common: Common,
    pub(super) metrics: Addr<Metrics>,
    /// The path in the container of the file that each script is typed into; also the prefix of others.
    pub(super) script: String,
    /// Only start the main container, without logging (for the post-job hook).
    pub(super) is_spare: bool,
    /// How often variables were staged.
    staged: u32,
    phase: Phase,
}

/// How far the preparation has come.
enum Phase {
    /// Nothing is there yet.
    New,
    /// The engine is known.
    HasEngine(Host),
    /// The engine is known, and so are the job's own credentials.
    HasCredentials(Host),
    /// The images are on the engine, and so is the job's network.
    HasImages(Host),
    /// The shell in the main container is ready.
    Running(SharedSession),
    /// A step of the preparation has begun, and did not succeed.
    Failed,
}

/// Where the containers are to run, and how it gets their images.
pub(super) struct Host {
    pub(super) engine: Engine,
    pub(super) registries: Registries,
}

impl DockerBackend {
    /// Returns a backend that creates the containers of `job` in `place`.
    pub fn new(
        config: DockerConfig,
        job: &JobId,
        compose: Compose,
        place: JobContainers,
        metrics: Addr<Metrics>,
    ) -> Self {
        let id = place.id();
        let common = Common {
            place: id.to_owned(),
            job: job.as_str().to_owned(),
            socket: None,
            files: Vec::new(),
            kvm: false,
            environment: Vec::new(),
        };
        let script = format!("/dev/shm/.agent-{id}");
        Self {
            config,
            compose,
            place,
            common,
            metrics,
            script,
            is_spare: false,
            staged: 0,
            phase: Phase::New,
        }
    }

    /// Returns a backend that only starts the main container, for the post-job hook of a stopped job.
    #[must_use]
    pub fn spare(self) -> Self {
        Self { is_spare: true, ..self }
    }

    fn has_credentials(&self) -> bool {
        self.compose.credentials.as_ref().map_or(true, |all| !all.is_empty())
    }

    fn agent_commands(&self) -> Result<AgentCommands, StepError> {
        match &self.phase {
            Phase::Running(session) => Ok(AgentCommands { session: Rc::clone(session) }),
            _ => Err(no_shell()),
        }
    }

    async fn start_containers(
        &mut self,
        engine: Engine,
        log: &dyn StepLog,
    ) -> Result<Prepared, PreparationError> {
        log.print("Starting a new bash session.\n").await?;
        match self.try_start_containers(&engine, log).await {
            Ok((session, main)) => {
                self.phase = Phase::Running(Rc::clone(&session));
                Ok(Prepared::Ready(Box::new(DockerSession::new(session, engine, main))))
            }
            Err(error) => {
                log.print("Failed to start the docker image\n").await?;
                Err(error.into())
            }
        }
    }

    /// Returns the session in the main container, and the container's id.
    async fn try_start_containers(
        &self,
        engine: &Engine,
        log: &dyn StepLog,
    ) -> Result<(SharedSession, String), StepError> {
        let side_containers: &[Container] =
            if self.is_spare { &[] } else { &self.compose.side_containers };
        let started = try_join_all(
            side_containers.iter().map(|container| self.start_side_container(engine, container)),
        );
        let ((session, main), started) =
            tokio::try_join!(self.start_main_container(engine), started)?;
        let session = Rc::new(Mutex::new(session));
        let mut commands = AgentCommands { session: Rc::clone(&session) };
        let go_home = "__agent_home=$HOME; builtin cd ~ 2>/dev/null; builtin true";
        let went_home = timeout(SHELL_PATIENCE, commands.run(go_home, None)).await;
        went_home.map_err(|_| StepError::new("the shell does not respond"))??;
        for file in self.compose.main.files.clone() {
            commands.inject(&file).await?;
        }
        wait_for_all(engine, started, &mut commands, log).await?;
        Ok((session, main))
    }

    async fn start_side_container(
        &self,
        engine: &Engine,
        container: &Container,
    ) -> Result<SideContainer, StepError> {
        let name = container.name.as_str().to_owned();
        let failed = |error: ContainerError| StepError::of(&name, error);
        let body = self.common.side_container(container);
        let id = self.create(engine, &name, body).await.map_err(&failed)?;
        if !container.files.is_empty() {
            let user = self.user_of(engine, &id, container).await;
            for file in &container.files {
                let with_owner = |error: StepError| {
                    StepError::of(format!("a file of the container `{name}`"), error)
                };
                user.upload(engine, &id, file).await.map_err(with_owner)?;
            }
        }
        self.start(engine, &id).await.map_err(&failed)?;
        Ok(SideContainer { name, id })
    }

    /// Returns the user that a container runs as: the job's choice, else the image's.
    async fn user_of(&self, engine: &Engine, id: &str, container: &Container) -> ContainerUser {
        let user = match &container.user {
            Some(user) => Some(user.clone()),
            None => {
                let found = engine.api.inspect_container(id, None::<InspectContainerOptions>).await;
                found.ok().and_then(|found| found.config?.user)
            }
        };
        ContainerUser::look_up(engine, id, &user.unwrap_or_default()).await
    }

    async fn create(
        &self,
        engine: &Engine,
        name: &str,
        body: bollard::models::ContainerCreateBody,
    ) -> Result<String, ContainerError> {
        let name = Some(self.common.container_name(name));
        let options = CreateContainerOptions { name, ..Default::default() };
        let api = engine.api.clone();
        let created =
            self.place.make(async move { api.create_container(Some(options), body).await }).await;
        Ok(created??.id)
    }

    async fn start(&self, engine: &Engine, id: &str) -> Result<(), ContainerError> {
        let (api, id) = (engine.api.clone(), id.to_owned());
        let start = async move {
            api.start_container(&id, None::<bollard::query_parameters::StartContainerOptions>).await
        };
        Ok(self.place.make(start).await??)
    }

    async fn start_main_container(
        &self,
        engine: &Engine,
    ) -> Result<(Session<ContainerTerminal>, String), StepError> {
        let main = &self.compose.main;
        let body = self.common.main_container(main);
        let created = self.create(engine, main.name.as_str(), body).await;
        let created = match created {
            // The engine's socket is not at the usual path of its machine. The job runs without it.
            Err(ContainerError::Request(error))
                if engine.socket.is_none() && error.is_about(SOCKET) =>
            {
                let without = Common { socket: None, ..self.common.clone() };
                self.create(engine, main.name.as_str(), without.main_container(main)).await
            }
            created => created,
        };
        let id = created.map_err(StepError::new)?;
        self.place.set_main_container(&id);
        let terminal = engine.attach(&id).await.map_err(StepError::new)?;
        // No job-init announces the shell's end with this mark: in a container the stream just ends.
        let gone = Mark::random().map_err(|error| StepError::new(error.to_string()))?;
        let failed = |error: std::io::Error| StepError::of("the terminal failed", error);
        let mut session = Session::new(terminal, gone).map_err(failed)?;
        session.type_bootstrap(&self.script).map_err(failed)?;
        let mut printed = Vec::new();
        let began = async {
            self.start(engine, &id)
                .await
                .map_err(|error| StepError::new(MainContainerError::new(error, &main.image)))?;
            let size = ResizeContainerTTYOptions { h: ROWS, w: COLUMNS };
            // An error is ignored: the terminal then has no size, which programs can deal with.
            let _ = engine.api.resize_container_tty(&id, size).await;
            Ok(())
        };
        let ready = timeout(SHELL_PATIENCE, until_ready(&mut session, &mut printed));
        let (began, ready) = tokio::join!(began, ready);
        began?;
        let problem = match ready {
            Ok(Bootstrap::Done) => return Ok((session, id)),
            Ok(Bootstrap::NoFile) => format!("the shell can't write to {}", self.script),
            Ok(Bootstrap::ShellEnded) => self.missing_shell_problem(engine, &id).await,
            Err(_) => {
                "`bash` was not ready in time: the image's entrypoint may be waiting for something, or \
                 running something else"
                    .to_owned()
            }
        };
        let printed = String::from_utf8_lossy(&printed).replace("\r\n", "\n");
        // Leave out the echo of what the agent typed.
        let lines = printed.lines().filter(|line| !line.contains("__agent_"));
        let printed = lines.collect::<Vec<_>>().join("\n");
        let from = printed.ceil_char_boundary(printed.len().saturating_sub(SHOWN));
        Err(StepError::new(format!("{problem}; it printed: {}", printed[from..].trim())))
    }

    /// Explains why the main container has ended before its shell was ready.
    async fn missing_shell_problem(&self, engine: &Engine, id: &str) -> String {
        let image = &self.compose.main.image;
        let found = engine.api.inspect_image(image).await;
        let made_for = found.ok().and_then(|found| found.architecture).unwrap_or_default();
        if !made_for.is_empty() && made_for != engine.architecture {
            let here = &engine.architecture;
            return format!("the image {image} is for {made_for}, and this engine runs on {here}");
        }
        let found = engine.api.inspect_container(id, None::<InspectContainerOptions>).await;
        let state = found.ok().and_then(|found| found.state).unwrap_or_default();
        let error = state.error.unwrap_or_default();
        let problem = match state.exit_code.unwrap_or_default() {
            127 => format!("the image {image} has no `bash`"),
            code => format!("the container ended with exit code {code} before it was ready"),
        };
        format!("{problem} {error}").trim().to_owned()
    }

    /// Starts only the main container, without a word in the job's log.
    async fn prepare_spare(&mut self) -> Result<Prepared, PreparationError> {
        let host = self.set_up_host().await?;
        self.pull_images(&host, &NoLog).await?;
        self.start_containers(host.engine, &NoLog).await
    }
}

/// Drops all output of steps.
struct NoLog;

impl StepLog for NoLog {
    fn print<'a>(&'a self, _: &'a str) -> LocalBoxFuture<'a, Result<(), StepError>> {
        std::future::ready(Ok(())).boxed_local()
    }
}

pub(super) fn listed(problems: &[Problem]) -> StepError {
    let lines: Vec<_> = problems.iter().map(ToString::to_string).collect();
    StepError::new(lines.join("\n"))
}

/// How a shell's bootstrap ended.
enum Bootstrap {
    Done,
    /// The shell can't write to the file for its scripts.
    NoFile,
    ShellEnded,
}

async fn until_ready(session: &mut Session<ContainerTerminal>, printed: &mut Vec<u8>) -> Bootstrap {
    loop {
        match session.next_event().await {
            SessionEvent::Output(bytes) => {
                printed.extend_from_slice(&bytes);
                printed.drain(..printed.len().saturating_sub(MOST_KEPT));
            }
            SessionEvent::ScriptEnded(end) if end.exit_code == 0 => return Bootstrap::Done,
            SessionEvent::ScriptEnded(_) => return Bootstrap::NoFile,
            SessionEvent::ShellEnded(_) => return Bootstrap::ShellEnded,
        }
    }
}

impl ExecutorBackend for DockerBackend {
    fn next_step(&self) -> PreparationStep {
        match self.phase {
            Phase::HasEngine(_) if self.has_credentials() => {
                PreparationStep::Shown("Setting up image pull credentials")
            }
            Phase::HasEngine(_) | Phase::HasCredentials(_) => {
                PreparationStep::Shown("Pulling docker images...")
            }
            Phase::HasImages(_) => PreparationStep::Shown("Starting the docker image..."),
            Phase::New | Phase::Running(_) | Phase::Failed => PreparationStep::Hidden,
        }
    }

    fn prepare<'a>(
        &'a mut self,
        log: &'a dyn StepLog,
    ) -> LocalBoxFuture<'a, Result<Prepared, PreparationError>> {
        async move {
            self.phase = match std::mem::replace(&mut self.phase, Phase::Failed) {
                Phase::New if self.is_spare => return self.prepare_spare().await,
                Phase::New => Phase::HasEngine(self.set_up_host().await?),
                Phase::HasEngine(mut host) if self.has_credentials() => {
                    self.add_credentials(&mut host, log).await?;
                    Phase::HasCredentials(host)
                }
                Phase::HasEngine(host) | Phase::HasCredentials(host) => {
                    self.pull_images(&host, log).await?;
                    Phase::HasImages(host)
                }
                Phase::HasImages(host) => return self.start_containers(host.engine, log).await,
                Phase::Running(_) | Phase::Failed => return Err(no_shell().into()),
            };
            Ok(Prepared::Next)
        }
        .boxed_local()
    }

    fn stage_variables<'a>(
        &'a mut self,
        variables: &'a [EnvVar],
    ) -> LocalBoxFuture<'a, Result<Script, StepError>> {
        self.staged += 1;
        let path = format!("{}-environment-{}", self.script, self.staged);
        let profile = if self.staged == 1 { show_to_logins(&path) } else { String::new() };
        async move {
            let receive = format!("( builtin umask 077; __agent_receive '{path}' ){profile}");
            let (exit_code, printed) = self
                .agent_commands()?
                .run(&receive, Some(export_lines(variables).as_bytes()))
                .await?;
            if exit_code != 0 {
                return Err(StepError::of(path, printed));
            }
            Ok(Script { text: format!("builtin . '{path}'"), untraced: true })
        }
        .boxed_local()
    }

    fn shown_path(&self, file: &InjectedFile) -> String {
        file.path.clone()
    }

    fn inject<'a>(
        &'a mut self,
        file: &'a InjectedFile,
    ) -> LocalBoxFuture<'a, Result<(), StepError>> {
        async { self.agent_commands()?.inject(file).await }.boxed_local()
    }
}
