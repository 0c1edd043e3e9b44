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
use crate::commands::wiring::{Jobs, SshAccessConfig, open_state};
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

/// The usual limit of open files, assumed if the actual one is unknown.
const USUAL_OPEN_FILES: u64 = 1024;

/// How often to check whether the self-signed certificate must be renewed.
const CERTIFICATE_CHECK_PERIOD: Duration = Duration::from_hours(12);

/// How long to wait for the end of the job after a crash of the supervisor.
const ORPHANED_JOB_PATIENCE: Duration = Duration::from_mins(2);

/// Time for the actors and threads to finish before the process exits.
const EXIT_DELAY: Duration = Duration::from_secs(1);

/// Serves jobs until a signal asks the agent to end.
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
        return refuse("the secret for signing tokens is empty");
    };
    let logging = match log.start() {
        Ok(logging) => logging,
        Err(error) => return fail(&error),
    };
    if let Err(error) = hidden {
        log::warn!(error:%; "jobs may be able to read this process's memory");
    }
    let open_files = open_files::raise().unwrap_or_else(|error| {
        log::warn!(error:%; "the limit of open files can't be raised");
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
            log::error!(error:% = WithCauses(&error); "the agent can't continue");
            fail(&error)
        }
    };
    drop(logging);
    exit
}

pub(crate) fn fail(error: &io::Error) -> Exit {
    tell(&format!("error: {}", WithCauses(error)));
    Exit::Failure
}

/// The parts of this machine that jobs need.
struct Surroundings {
    state: StateDir,
    shell: ShellConfig,
    compression_size: u64,
    /// The reserved path of the SSH access script, kept until the agent ends.
    claimed: Option<ClaimedScript>,
}

fn prepare(
    state: StateDir,
    config: &ServeConfig,
    environment: &Environment,
    compression_size: u64,
) -> io::Result<Surroundings> {
    let shell = ShellConfig::from_environment(environment)?;
    let claimed = claim_script(&shell, &config.jump_point);
    Ok(Surroundings { state, shell, compression_size, claimed })
}

/// Reserves the path of the SSH access script, before another user can.
pub(crate) fn claim_script(shell: &ShellConfig, script: &Path) -> Option<ClaimedScript> {
    SshAccess::claim(&shell.home, script)
        .inspect_err(|error| {
            let path = script.display();
            log::warn!(path:%, error:%; "SSH access may not work, or that of an earlier job may still be open");
        })
        .ok()
}

struct Agent {
    config: ServeConfig,
    surroundings: Surroundings,
    api: ApiNeeds,
}

/// The parts of the API that are ready before the actors.
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
        let mut signals =
            Signals::unless_ignored(&[SignalKind::interrupt(), SignalKind::terminate()])?;
        // SIGHUP reloads the certificate, even under `nohup`.
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
        let login =
            Some(SshAccessConfig { script: config.jump_point.clone(), for_every_job: true });
        let docker = DockerConfig {
            files: config.files.clone(),
            expose_kvm: config.expose_kvm,
            socket: config.docker_socket,
            ..DockerConfig::from_shell(&shell)
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

        let ending =
            run_until_drained(&supervisor, &intake, &mut signals, config.interruption_grace, &end)
                .await;
        match ending {
            Ending::Drained(exit) => tokio::select! {
                // A graceful stop: responses in progress are completed.
                () = handle.stop(true) => {
                    let _ = serving.await;
                    log::info!("ended");
                    Ok(exit)
                }
                () = signals.next() => Ok(leave_at_once(exit)),
            },
            Ending::CutShort => {
                log::warn!("second signal; killing the job");
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

/// Why the agent ends.
enum Ending {
    /// No job is left.
    Drained(Exit),
    /// A second signal asked the agent to end at once.
    CutShort,
}

/// Waits until the agent must end, and then for the end of its job.
async fn run_until_drained(
    supervisor: &Addr<JobSupervisor>,
    intake: &Addr<HttpIntake>,
    signals: &mut Signals,
    grace: Duration,
    end: &watch::Sender<Option<Instant>>,
) -> Ending {
    let drained = intake.send(UntilDrained);
    tokio::pin!(drained);
    tokio::select! {
        ended = &mut drained => {
            if ended.is_ok() {
                return Ending::Drained(Exit::Success);
            }
            log::error!("the intake has crashed; killing the job");
            let kill = StopJob { id: None, manner: StopManner::AtOnce };
            let _ = supervisor.send(kill).await;
            Ending::Drained(Exit::Failure)
        }
        _ = supervisor.send(AwaitDeath) => {
            log::error!("the job supervisor has crashed; taking no more jobs");
            // The job's own task ends the job and notifies the intake, unless the task has crashed as well.
            let _ = intake.send(Close).await;
            tokio::select! {
                _ = timeout(ORPHANED_JOB_PATIENCE, drained) => Ending::Drained(Exit::Failure),
                () = signals.next() => Ending::CutShort,
            }
        }
        () = signals.next() => {
            log::info!("asked to end; taking no more jobs");
            end.send_replace(Some(Instant::now()));
            let _ = intake.send(Close).await;
            tokio::select! {
                () = end_job(supervisor, intake, grace) => Ending::Drained(Exit::Success),
                () = signals.next() => Ending::CutShort,
            }
        }
    }
}

/// Ends the process soon, without waiting for log readers, callbacks and blocked threads.
pub(crate) fn leave_at_once(exit: Exit) -> Exit {
    let code = i32::from(exit.code());
    let ending = std::thread::Builder::new().spawn(move || {
        wait_before_exit();
        std::process::exit(code);
    });
    if ending.is_err() {
        std::process::exit(code);
    }
    exit
}

#[expect(clippy::disallowed_methods, reason = "on a thread of its own")]
fn wait_before_exit() {
    std::thread::sleep(EXIT_DELAY);
}

/// Waits up to `grace` for the end of the job, and then stops the job.
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
            () = sleep(CERTIFICATE_CHECK_PERIOD) => tls.renew(),
        };
        match reloaded {
            None => {}
            Some(Ok(fingerprint)) => log::info!(fingerprint; "certificate reloaded"),
            Some(Err(error)) => {
                log::error!(error:% = WithCauses(&error); "certificate not reloaded; the previous one stays in use");
            }
        }
    }
}
