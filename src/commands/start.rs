//! `agent start`: asks a control plane for jobs, and sends it their logs.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use actix::{Actor as _, Addr};
use actors::delivery::Delivery;
use actors::delivery::departure::Urgency;
use actors::delivery::push::{PushDelivery, PushPlatform};
use actors::errors::{ErrorOf, WithCauses};
use actors::intake::poller::{AwaitLeave, Interrupt, LeaveSoon, Left, SyncPoller};
use actors::intake::protocol::ShutdownReason;
use actors::metrics::Metrics;
use actors::ports::DiscardMetrics;
use actors::supervisor::{AwaitDeath, Config, GetActiveJob, JobSupervisor, StopJob, StopManner};
use nix::sys::utsname::uname;
use tokio::signal::unix::SignalKind;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

use crate::commands::exit::Exit;
use crate::commands::run::refuse;
use crate::commands::serve::{claim_script, fail, leave_at_once};
use crate::commands::wiring::{Jobs, Login, open_state};
use crate::commands::{check_clock, print_config, system};
use crate::config::Flags;
use crate::config::start::{Start, StartConfig, is_url};
use crate::executors::Executors;
use crate::executors::docker::{DockerConfig, DockerExecutor};
use crate::executors::shell::{ShellConfig, ShellExecutor, wipe_secrets};
use crate::os::programs::run_for;
use crate::remote::http_client::HttpClients;
use crate::remote::hub::{Hub, PATIENCE, Registration};
use crate::remote::log_artifact::ArtifactUploads;
use crate::remote::log_server::HttpLogServer;
use crate::service::environment::Environment;
use crate::service::own_log::AgentLogConfig;
use crate::service::signals::Signals;
use crate::state::StateDir;
use crate::state::log_files::StateLogFiles;

/// Where logs are kept that could not be delivered, in the state directory.
const UNDELIVERED: &str = "undelivered";

/// How often to look whether the job that was killed is over.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// What the shutdown hook has of the time for leaving, however long everything else took.
const LEAST_FOR_HOOK: Duration = Duration::from_secs(4);

/// How long killing what is left may hold up the agent's end.
const LAST_KILL: Duration = Duration::from_secs(15);

/// Runs jobs until the control plane, or this machine, wants no more.
pub fn start(flags: &Flags<Start>, environment: &Environment, hidden: nix::Result<()>) -> Exit {
    let prepared = StartConfig::load(flags, environment).and_then(|config| {
        Ok((AgentLogConfig::from_env(environment)?, Needs::from_config(config, environment)?))
    });
    let (log, needs) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return refuse(WithCauses(&error)),
    };
    if flags.print_config {
        return print_config(&needs.config.warnings, &needs.config.printed);
    }
    wipe_secrets();
    if let Err(error) = check_clock() {
        return fail(&error);
    }
    let state = match open_state(&needs.config.state_dir, environment) {
        Ok(state) => state,
        Err(error) => return refuse(WithCauses(&error)),
    };
    let logging = match log.start() {
        Ok(logging) => logging,
        Err(error) => return fail(&error),
    };
    if let Err(error) = hidden {
        log::warn!(error:%; "jobs may look into this process");
    }
    for warning in &needs.config.warnings {
        log::warn!("{warning}");
    }
    let exit = match ShellConfig::of_agent(environment)
        .and_then(|shell| system()?.block_on(Agent { needs, state, shell }.run()))
    {
        Ok(exit) => exit,
        Err(error) => {
            log::error!(error:%; "the agent can't go on");
            fail(&error)
        }
    };
    drop(logging);
    exit
}

/// What can be wrong with the configuration is not wrong with this.
struct Needs {
    config: StartConfig,
    clients: Rc<HttpClients>,
    hub: Hub,
    compression_size: u64,
}

impl Needs {
    fn from_config(config: StartConfig, environment: &Environment) -> Result<Self, ErrorOf> {
        let mut clients = HttpClients::new(PATIENCE);
        clients.ca_file.clone_from(&config.ca_file);
        clients.proxy = config.proxy.clone().map(Rc::new);
        let clients = Rc::new(clients);
        let hub = Hub::new(
            Rc::clone(&clients),
            config.scheme,
            &config.endpoint,
            config.token.clone(),
            registration(&config),
        )
        .map_err(|error| ErrorOf::new(format!("endpoint: `{}`", config.endpoint), error))?;
        let compression_size = ArtifactUploads::compression_size(environment)?;
        Ok(Self { config, clients, hub, compression_size })
    }
}

fn registration(config: &StartConfig) -> Registration {
    let text = |text: &std::ffi::OsStr| text.to_string_lossy().into_owned();
    let (os, hostname) = uname().map_or_else(
        |_| (std::env::consts::OS.to_owned(), String::new()),
        |system| {
            let os = format!("{} {}", text(system.sysname()), text(system.release()));
            (os, text(system.nodename()))
        },
    );
    Registration {
        name: config.name.clone(),
        version: concat!("v", env!("CARGO_PKG_VERSION")),
        pid: std::process::id(),
        os,
        arch: std::env::consts::ARCH,
        hostname,
        single_job: config.disconnect_after_job,
        idle_timeout: config.idle_timeout,
        interruption_grace_period: config.interruption_grace_period,
        job_id: config.job_id.clone(),
    }
}

struct Agent {
    needs: Needs,
    state: StateDir,
    shell: ShellConfig,
}

impl Agent {
    async fn run(self) -> io::Result<Exit> {
        let Self { needs: Needs { config, clients, hub, compression_size }, state, shell } = self;
        // A terminal that goes away must not take a job's result with it.
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let mut ends = Ends { signals: Signals::heeded(&kinds)?, count: 0 };
        let _claimed = claim_script(&shell, &config.jump_point);
        let (urgency, urgent) = watch::channel(Urgency::default());
        let kept = config.state_dir.join(UNDELIVERED);
        let platform = PushPlatform {
            files: Rc::new(StateLogFiles::new(kept)),
            server: Rc::new(HttpLogServer::new(clients)),
            hub: Rc::new(hub.clone()),
        };
        let delivery = PushDelivery {
            platform,
            uploads: Box::new(ArtifactUploads {
                environment: shell.environment.clone(),
                state: state.clone(),
                compression_size,
                condition: Some(config.upload_job_logs),
            }),
            patience: config.log_delivery_timeout,
            urgency: urgent,
            in_background: Rc::default(),
        };
        let job_config = Config {
            grace: config.grace,
            keep_daemons: config.keep_daemons,
            hooks: config.hooks.clone(),
            delivery: Delivery::Push(Rc::new(delivery)),
        };
        let login = Some(Login { script: config.jump_point.clone(), for_every_job: false });
        let mut shell = shell;
        if is_url(&config.name) {
            // It is a secret then, and not for jobs.
            shell.environment.retain(|(_, value)| value.as_os_str() != config.name.as_str());
        }
        let environment = shell.environment.clone();
        let metrics = Metrics::new(Box::new(DiscardMetrics)).start();
        let docker = DockerConfig {
            files: config.files.clone(),
            fail_on_missing_files: config.fail_on_missing_files,
            socket: config.docker_socket,
            ..DockerConfig::of(&shell)
        };
        let home = shell.home.clone();
        let executors = Executors {
            shell: ShellExecutor { config: shell, copies_environment: true },
            docker: DockerExecutor { config: docker, metrics: metrics.clone() },
        };
        let jobs = Jobs { state, executors, home, login };
        let supervisor = JobSupervisor::new(Box::new(jobs), metrics, job_config).start();
        log::info!(endpoint = config.endpoint.as_str(), version = env!("CARGO_PKG_VERSION"); "starting");
        let poller = SyncPoller::new(Rc::new(hub), supervisor.clone(), config.variables, urgency);
        let poller = poller.for_one_job(!config.job_id.is_empty()).start();

        let Some((left, crashed)) = live(&poller, &supervisor, &mut ends).await else {
            return Ok(leave_at_once(Exit::Failure));
        };
        let (reason, by) = match left {
            Left::NotRegistered(why) => {
                log::error!(why; "not registered");
                return Err(io::Error::other(format!("the agent could not be registered: {why}")));
            }
            Left::Because { reason, by } => (reason, by),
        };
        let leaving = async {
            if let Some(hook) = &config.shutdown_hook {
                let left = by.saturating_duration_since(Instant::now()).max(LEAST_FOR_HOOK);
                run_shutdown_hook(hook, reason, &environment, config.hook_timeout.min(left)).await;
            }
        };
        tokio::select! {
            () = leaving => {}
            () = ends.last() => return Ok(leave_at_once(Exit::Failure)),
        }
        log::info!(reason = reason.as_str(); "ended");
        // Threads may still wait for the answer of a name server.
        Ok(leave_at_once(match reason {
            ShutdownReason::UnableToSync => Exit::Failure,
            _ if crashed => Exit::Failure,
            _ => Exit::Success,
        }))
    }
}

/// What asks the agent to end, counted: the third time it does not ask.
struct Ends {
    signals: Signals,
    count: u32,
}

impl Ends {
    /// How often it was asked, as soon as it is asked again.
    async fn next(&mut self) -> u32 {
        self.signals.next().await;
        self.count += 1;
        self.count
    }

    async fn last(&mut self) {
        while self.next().await < 3 {}
    }
}

/// Waits until the agent has left, and passes on signals: the first lets the control plane decide, the
/// second ends the job and the agent in order, the third kills: nothing then. Answers too whether a
/// part of the agent has crashed.
async fn live(
    poller: &Addr<SyncPoller>,
    supervisor: &Addr<JobSupervisor>,
    ends: &mut Ends,
) -> Option<(Left, bool)> {
    let left = poller.send(AwaitLeave);
    tokio::pin!(left);
    let death = supervisor.send(AwaitDeath);
    tokio::pin!(death);
    let mut crashed = false;
    let left = loop {
        tokio::select! {
            left = &mut left => break left,
            _ = &mut death, if !crashed => {
                log::error!("the job supervisor has crashed; no more jobs");
                crashed = true;
                poller.do_send(LeaveSoon);
            }
            times = ends.next() => match times {
                1 => {
                    log::info!("asked to end; the control plane decides when");
                    poller.do_send(Interrupt);
                }
                2 => {
                    log::warn!("asked again; stopping the job");
                    poller.do_send(LeaveSoon);
                }
                _ => {
                    log::warn!("asked once more; killing everything");
                    kill_job(supervisor, Instant::now() + LAST_KILL).await;
                    return None;
                }
            },
        }
    };
    let left = left.unwrap_or_else(|_| {
        log::error!("the sync poller has crashed");
        crashed = true;
        Left::Because { reason: ShutdownReason::Unknown, by: Instant::now() + LAST_KILL }
    });
    if let Left::Because { by, .. } = left {
        // A job whose end was not waited for. It may still have a log to put aside.
        let end_of_job = async {
            kill_job(supervisor, by).await;
            while matches!(supervisor.send(GetActiveJob).await, Ok(Some(_))) {
                sleep(LOOK_AGAIN).await;
            }
        };
        let _ = timeout_at(by - LEAST_FOR_HOOK, end_of_job).await;
    }
    Some((left, crashed))
}

async fn kill_job(supervisor: &Addr<JobSupervisor>, by: Instant) {
    let kill = supervisor.send(StopJob { id: None, manner: StopManner::AtOnce });
    // An agent without a supervisor has no job either.
    let _ = timeout_at(by, kill).await;
}

async fn run_shutdown_hook(
    hook: &Path,
    reason: ShutdownReason,
    environment: &[(std::ffi::OsString, std::ffi::OsString)],
    patience: Duration,
) {
    let mut command = Command::new("bash");
    command.arg(hook).env_clear().envs(environment.iter().cloned());
    command.env("SEMAPHORE_AGENT_SHUTDOWN_REASON", reason.as_str());
    command.stdin(Stdio::null());
    let seconds = patience.as_secs();
    match run_for(command, patience).await {
        Ok(Some(status)) if status.success() => log::info!("the shutdown hook succeeded"),
        Ok(Some(status)) => log::error!(status:%; "the shutdown hook failed"),
        Ok(None) => log::error!(seconds; "the shutdown hook took too long, and was killed"),
        Err(error) => log::error!(error:%; "the shutdown hook can't be run"),
    }
}
