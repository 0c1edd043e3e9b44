//! `agent serve`: takes jobs from a platform over HTTPS.

use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor as _, Addr};
use actors::delivery::Delivery;
use actors::delivery::pull::PullDelivery;
use actors::errors::WithCauses;
use actors::intake::http::{Close, HttpIntake, UntilDrained};
use actors::metrics::Metrics;
use actors::ports::{DiscardMetrics, MetricsSink};
use actors::supervisor::{
    AwaitDeath, Config, HookFailure, JobHooks, JobSupervisor, PreJobHook, StopJob, StopManner,
};
use tokio::signal::unix::SignalKind;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::api::auth::Auth;
use crate::api::tls::{PairSource, Tls};
use crate::api::{Api, Refusals, serve as serve_api};
use crate::commands::exit::Exit;
use crate::commands::run::{refuse, tell};
use crate::commands::wiring::{Jobs, Login, open_state};
use crate::commands::{check_clock, print_config, system};
use crate::config::Flags;
use crate::config::serve::{Serve, ServeConfig};
use crate::executors::Executors;
use crate::executors::docker::{DockerConfig, DockerExecutor};
use crate::executors::shell::{ShellConfig, ShellExecutor, wipe_secrets};
use crate::metrics::statsd::StatsdSink;
use crate::os::open_files;
use crate::remote::callbacks::HttpCallbacks;
use crate::remote::log_artifact::ArtifactUploads;
use crate::service::environment::Environment;
use crate::service::own_log::AgentLogConfig;
use crate::service::signals::Signals;
use crate::ssh_access::{ClaimedScript, SshAccess};
use crate::state::StateDir;

/// How many files a process may usually have open.
const USUAL_OPEN_FILES: u64 = 1024;

/// How often to look whether the agent's own certificate is to be renewed.
const LOOK_AT_CERTIFICATE: Duration = Duration::from_hours(12);

/// How long the job of a supervisor that has crashed may take to its end.
const LAST_JOB: Duration = Duration::from_mins(2);

/// How long what still runs may take when the agent is told to end at once.
const LAST_MOMENTS: Duration = Duration::from_secs(1);

/// Serves jobs until it is asked to end.
pub fn serve(flags: &Flags<Serve>, environment: &Environment, hidden: nix::Result<()>) -> Exit {
    let prepared = ServeConfig::load(flags, environment).and_then(|config| {
        let log = AgentLogConfig::from_env(environment)?;
        Ok((config, log, ArtifactUploads::compression_size(environment)?))
    });
    let (config, log, compression_size) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return refuse(WithCauses(&error)),
    };
    if flags.print_config {
        return print_config(&config.warnings, &config.printed);
    }
    wipe_secrets();
    if let Err(error) = check_clock() {
        return fail(&error);
    }
    let state = match open_state(&config.state_dir, environment) {
        Ok(state) => state,
        Err(error) => return refuse(WithCauses(&error)),
    };
    let (tls, fingerprint) = match Tls::open(config.tls.clone()) {
        Ok(opened) => opened,
        Err(error) => return refuse(WithCauses(&error)),
    };
    let Some(auth) = Auth::new(config.secret.reveal().as_bytes()) else {
        return refuse("the secret that tokens are signed with is empty");
    };
    let logging = match log.start() {
        Ok(logging) => logging,
        Err(error) => return fail(&error),
    };
    if let Err(error) = hidden {
        log::warn!(error:%; "jobs may look into this process");
    }
    let open_files = open_files::raise().unwrap_or_else(|error| {
        log::warn!(error:%; "the limit of open files is not known");
        USUAL_OPEN_FILES
    });
    for warning in &config.warnings {
        log::warn!("{warning}");
    }
    let tls = Arc::new(tls);
    let served = prepare(state, &config, environment, compression_size).and_then(|surroundings| {
        let listener = TcpListener::bind((config.host.as_str(), config.port));
        let listener = listener.map_err(|error| {
            io::Error::other(format!("can't listen on {}:{}: {error}", config.host, config.port))
        })?;
        let own = matches!(config.tls, PairSource::SelfSigned(_));
        let version = env!("CARGO_PKG_VERSION");
        let address = listener.local_addr()?;
        log::info!(address:%, fingerprint, own, version; "serving");
        let api = ApiNeeds { auth, tls, listener, agent_log: logging.path.clone(), open_files };
        system()?.block_on(Agent { config, surroundings, api }.run())
    });
    let exit = match served {
        Ok(exit) => exit,
        Err(error) => {
            log::error!(error:%; "the agent can't go on");
            fail(&error)
        }
    };
    drop(logging);
    exit
}

pub(crate) fn fail(error: &io::Error) -> Exit {
    tell(&format!("error: {error}"));
    Exit::Failure
}

/// What jobs need of this machine.
struct Surroundings {
    state: StateDir,
    shell: ShellConfig,
    compression_size: u64,
    /// Until the agent's end.
    claimed: Option<ClaimedScript>,
}

fn prepare(
    state: StateDir,
    config: &ServeConfig,
    environment: &Environment,
    compression_size: u64,
) -> io::Result<Surroundings> {
    let shell = ShellConfig::of_agent(environment)?;
    let claimed = claim_script(&shell, &config.jump_point);
    Ok(Surroundings { state, shell, compression_size, claimed })
}

/// Takes the place of the script for SSH access, before somebody else does.
pub(crate) fn claim_script(shell: &ShellConfig, script: &Path) -> Option<ClaimedScript> {
    SshAccess::claim(&shell.home, script)
        .inspect_err(|error| {
            let path = script.display();
            log::warn!(path:%, error:%; "SSH access to jobs may not be available, or an earlier one not be closed");
        })
        .ok()
}

struct Agent {
    config: ServeConfig,
    surroundings: Surroundings,
    api: ApiNeeds,
}

/// What the API needs besides the actors.
struct ApiNeeds {
    auth: Auth,
    tls: Arc<Tls>,
    listener: TcpListener,
    agent_log: Option<PathBuf>,
    open_files: u64,
}

impl Agent {
    async fn run(self) -> io::Result<Exit> {
        let Self { config, surroundings, api } = self;
        let Surroundings { state, shell, compression_size, claimed: _claimed } = surroundings;
        let ApiNeeds { auth, tls, listener, agent_log, open_files } = api;
        let mut ends = Signals::heeded(&[SignalKind::interrupt(), SignalKind::terminate()])?;
        // Under `nohup` too: there is a use for it.
        let reloads = Signals::always(SignalKind::hangup())?;

        let sink: Box<dyn MetricsSink> = match config.statsd {
            Some(statsd) => Box::new(StatsdSink::new(statsd)?),
            None => Box::new(DiscardMetrics),
        };
        let (end, asked_to_end) = watch::channel(None);
        let delivery = PullDelivery {
            callbacks: Box::new(HttpCallbacks::default()),
            attempts: config.callback_attempts,
            uploads: Box::new(ArtifactUploads {
                environment: shell.environment.clone(),
                state: state.clone(),
                compression_size,
                condition: None,
            }),
            archive_timeout: config.archive_timeout,
            asked_to_end,
        };
        let job_config = Config {
            grace: config.grace,
            keep_daemons: false,
            hooks: JobHooks { pre_job: config.pre_job_hook.map(sourced), post_job: None },
            delivery: Delivery::Pull(Rc::new(delivery)),
        };
        let metrics = Metrics::new(sink).start();
        let login = Some(Login { script: config.jump_point.clone(), for_every_job: true });
        let docker = DockerConfig {
            files: config.files.clone(),
            expose_kvm: config.expose_kvm,
            socket: config.docker_socket,
            ..DockerConfig::of(&shell)
        };
        let home = shell.home.clone();
        let executors = Executors {
            shell: ShellExecutor { config: shell, copies_environment: false },
            docker: DockerExecutor { config: docker, metrics: metrics.clone() },
        };
        let jobs = Jobs { state, executors, home, login };
        let supervisor = JobSupervisor::new(Box::new(jobs), metrics, job_config).start();
        let intake = HttpIntake::new(supervisor.clone(), config.single_job).start();
        let api = Api {
            intake: intake.clone(),
            auth,
            max_body_size: config.max_body_size,
            agent_log,
            open_files,
            refusals: Refusals::default(),
            connections_per_client: config.connections_per_client,
        };
        let (server, handle) = serve_api(listener, Arc::clone(&tls), api)?;
        let serving = actix::spawn(server);
        actix::spawn(reload_at(reloads, tls));

        let life = live(&supervisor, &intake, &mut ends, config.interruption_grace, &end).await;
        match life {
            Life::Over(exit) => tokio::select! {
                // Answers that are under way are finished.
                () = handle.stop(true) => {
                    let _ = serving.await;
                    log::info!("ended");
                    Ok(exit)
                }
                () = ends.next() => Ok(leave_at_once(exit)),
            },
            Life::CutShort => {
                log::warn!("asked again; killing everything");
                let kill = StopJob { id: None, manner: StopManner::AtOnce };
                let _ = supervisor.send(kill).await;
                Ok(leave_at_once(Exit::Failure))
            }
        }
    }
}

fn sourced(path: String) -> PreJobHook {
    PreJobHook { path, sourced: true, failure: HookFailure::FailsJob, patience: None }
}

/// How the agent's life came to its end.
enum Life {
    /// No job is left.
    Over(Exit),
    /// A second signal came.
    CutShort,
}

/// Waits until the agent is to end, and for the end of its job then.
async fn live(
    supervisor: &Addr<JobSupervisor>,
    intake: &Addr<HttpIntake>,
    ends: &mut Signals,
    grace: Duration,
    end: &watch::Sender<Option<Instant>>,
) -> Life {
    let drained = intake.send(UntilDrained);
    tokio::pin!(drained);
    tokio::select! {
        ended = &mut drained => {
            if ended.is_ok() {
                return Life::Over(Exit::Success);
            }
            log::error!("the intake has crashed; the job is given up");
            let kill = StopJob { id: None, manner: StopManner::AtOnce };
            let _ = supervisor.send(kill).await;
            Life::Over(Exit::Failure)
        }
        _ = supervisor.send(AwaitDeath) => {
            log::error!("the job supervisor has crashed; no more jobs");
            // The job's own task brings the job to its end, and tells the intake. It may have crashed as well.
            let _ = intake.send(Close).await;
            tokio::select! {
                _ = timeout(LAST_JOB, drained) => Life::Over(Exit::Failure),
                () = ends.next() => Life::CutShort,
            }
        }
        () = ends.next() => {
            log::info!("asked to end; no more jobs");
            end.send_replace(Some(Instant::now()));
            let _ = intake.send(Close).await;
            tokio::select! {
                () = end_job(supervisor, intake, grace) => Life::Over(Exit::Success),
                () = ends.next() => Life::CutShort,
            }
        }
    }
}

/// Gives up on readers and callbacks, and on threads that still wait for something.
pub(crate) fn leave_at_once(exit: Exit) -> Exit {
    let code = i32::from(exit.code());
    let ending = std::thread::Builder::new().spawn(move || {
        last_moments();
        std::process::exit(code);
    });
    if ending.is_err() {
        std::process::exit(code);
    }
    exit
}

#[expect(clippy::disallowed_methods, reason = "on a thread of its own")]
fn last_moments() {
    std::thread::sleep(LAST_MOMENTS);
}

/// Waits for the job's end: its own, or when `grace` is over a forced one.
async fn end_job(supervisor: &Addr<JobSupervisor>, intake: &Addr<HttpIntake>, grace: Duration) {
    if !matches!(timeout(grace, intake.send(UntilDrained)).await, Ok(Ok(()))) {
        let _ = supervisor.send(StopJob { id: None, manner: StopManner::Grace }).await;
        let _ = intake.send(UntilDrained).await;
    }
}

async fn reload_at(mut signals: Signals, tls: Arc<Tls>) {
    loop {
        let reloaded = tokio::select! {
            () = signals.next() => Some(tls.reload()),
            () = sleep(LOOK_AT_CERTIFICATE) => tls.renew(),
        };
        match reloaded {
            None => {}
            Some(Ok(fingerprint)) => log::info!(fingerprint; "certificate reloaded"),
            Some(Err(error)) => {
                log::error!(error:% = WithCauses(&error); "certificate not reloaded; the old one stays");
            }
        }
    }
}
