//! `agent start`: fetches jobs from a control plane, and delivers their logs to it.

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
use crate::commands::wiring::{Jobs, SshAccessConfig, open_state};
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
use crate::state::log_delivery::StateLogFiles;

/// Directory for logs that could not be delivered, in the state directory.
const UNDELIVERED: &str = "undelivered";

/// How often to check whether the killed job has ended.
const JOB_CHECK_PERIOD: Duration = Duration::from_millis(20);

/// Minimum time for the shutdown hook, reserved from the time for leaving.
const MIN_HOOK_TIME: Duration = Duration::from_secs(4);

/// How long killing the job may delay the agent's end.
const KILL_PATIENCE: Duration = Duration::from_secs(15);

/// Runs jobs until the control plane or a signal ends the agent.
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
        log::warn!(error:%; "jobs may be able to read this process's memory");
    }
    for warning in &needs.config.warnings {
        log::warn!("{warning}");
    }
    let exit = match ShellConfig::from_environment(environment)
        .and_then(|shell| system()?.block_on(Agent { needs, state, shell }.run()))
    {
        Ok(exit) => exit,
        Err(error) => {
            log::error!(error:% = WithCauses(&error); "the agent can't continue");
            fail(&error)
        }
    };
    drop(logging);
    exit
}

/// The configuration and the clients made from it, fully checked.
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
        // SIGHUP ends the agent gracefully: a closed terminal must not cost the job's result.
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let mut signals =
            TerminationSignals { signals: Signals::unless_ignored(&kinds)?, count: 0 };
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
        let login =
            Some(SshAccessConfig { script: config.jump_point.clone(), for_every_job: false });
        let mut shell = shell;
        if is_url(&config.name) {
            // A name that is a URL may be pre-signed, that is, a secret: hide it from jobs.
            shell.environment.retain(|(_, value)| value.as_os_str() != config.name.as_str());
        }
        let environment = shell.environment.clone();
        let metrics = Metrics::new(Box::new(DiscardMetrics)).start();
        let docker = DockerConfig {
            files: config.files.clone(),
            fail_on_missing_files: config.fail_on_missing_files,
            socket: config.docker_socket,
            ..DockerConfig::from_shell(&shell)
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

        let Some((left, crashed)) = run_until_left(&poller, &supervisor, &mut signals).await else {
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
                let left = by.saturating_duration_since(Instant::now()).max(MIN_HOOK_TIME);
                run_shutdown_hook(hook, reason, &environment, config.hook_timeout.min(left)).await;
            }
        };
        tokio::select! {
            () = leaving => {}
            () = signals.third() => return Ok(leave_at_once(Exit::Failure)),
        }
        log::info!(reason = reason.as_str(); "ended");
        // Do not wait for threads that are blocked in a name server lookup.
        Ok(leave_at_once(match reason {
            ShutdownReason::UnableToSync => Exit::Failure,
            _ if crashed => Exit::Failure,
            _ => Exit::Success,
        }))
    }
}

/// Counts termination signals; the third one kills.
struct TerminationSignals {
    signals: Signals,
    count: u32,
}

impl TerminationSignals {
    /// Waits for the next signal. Returns the number of signals so far.
    async fn next(&mut self) -> u32 {
        self.signals.next().await;
        self.count += 1;
        self.count
    }

    async fn third(&mut self) {
        while self.next().await < 3 {}
    }
}

/// Waits until the agent has left the control plane, and passes on signals: after the first, the control
/// plane decides when the agent ends; the second stops the job and the agent gracefully; the third kills the
/// job.
///
/// Returns `None` after the third signal, else why the agent left and whether one of its actors has crashed.
async fn run_until_left(
    poller: &Addr<SyncPoller>,
    supervisor: &Addr<JobSupervisor>,
    signals: &mut TerminationSignals,
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
                log::error!("the job supervisor has crashed; taking no more jobs");
                crashed = true;
                poller.do_send(LeaveSoon);
            }
            times = signals.next() => match times {
                1 => {
                    log::info!("asked to end; the control plane decides when");
                    poller.do_send(Interrupt);
                }
                2 => {
                    log::warn!("second signal; stopping the job");
                    poller.do_send(LeaveSoon);
                }
                _ => {
                    log::warn!("third signal; killing the job");
                    kill_job(supervisor, Instant::now() + KILL_PATIENCE).await;
                    return None;
                }
            },
        }
    };
    let left = left.unwrap_or_else(|_| {
        log::error!("the sync poller has crashed");
        crashed = true;
        Left::Because { reason: ShutdownReason::Unknown, by: Instant::now() + KILL_PATIENCE }
    });
    if let Left::Because { by, .. } = left {
        // A job may still run. Kill it, and let it save its undelivered log.
        let end_of_job = async {
            kill_job(supervisor, by).await;
            while matches!(supervisor.send(GetActiveJob).await, Ok(Some(_))) {
                sleep(JOB_CHECK_PERIOD).await;
            }
        };
        let _ = timeout_at(by - MIN_HOOK_TIME, end_of_job).await;
    }
    Some((left, crashed))
}

async fn kill_job(supervisor: &Addr<JobSupervisor>, by: Instant) {
    let kill = supervisor.send(StopJob { id: None, manner: StopManner::AtOnce });
    // If the supervisor has crashed, the job's own task ends the job.
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
        Ok(None) => log::error!(seconds; "the shutdown hook timed out and was killed"),
        Err(error) => log::error!(error:%; "the shutdown hook can't be run"),
    }
}
