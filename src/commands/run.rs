//! `agent run`: runs one job from a file and shows its log.

use std::io::{self, IsTerminal as _, Write as _};
use std::process;
use std::time::Duration;

use actix::{Actor, Addr};
use actors::errors::WithCauses;
use actors::job::{Job, Outcome};
use actors::log::buffer::Follow;
use actors::metrics::Metrics;
use actors::ports::DiscardMetrics;
use actors::ports::LogRange;
use actors::supervisor::finished_once::FinishedOnce;
use actors::supervisor::{Config, GetLog, JobSupervisor, StartJob, StopJob, StopManner};
use tokio::signal::unix::SignalKind;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::commands::cli::{Output, RunArgs};
use crate::commands::exit::Exit;
use crate::commands::renderer::{Renderer, Style};
use crate::commands::system;
use crate::commands::wiring::{Jobs, open_state};
use crate::config::run::RunConfig;
use crate::executors::Executors;
use crate::executors::docker::{DockerConfig, DockerExecutor};
use crate::executors::shell::{ShellConfig, ShellExecutor};
use crate::job_file::{self, Source, UnknownFields};
use crate::service::environment::Environment;
use crate::service::signals::Signals;
use crate::state::StateDir;

/// Maximum number of log ranges queued for the output. Behind a full queue, ranges are merged, and the shown
/// durations of steps become imprecise.
const RANGES_AHEAD: usize = 4096;

/// Runs the job. The exit code is the job's result.
pub fn run(args: &RunArgs, environment: &Environment) -> Exit {
    let config = match RunConfig::load(&args.options, environment) {
        Ok(config) => config,
        Err(error) => return refuse(WithCauses(&error)),
    };
    let level = env_logger::Env::new().filter_or("SEMAPHORE_AGENT_LOG_LEVEL", "warn");
    // Detailed messages of these libraries may contain job variables.
    let mut log = env_logger::Builder::from_env(level);
    for library in ["bollard", "hyper"] {
        log.filter_module(library, log::LevelFilter::Warn);
    }
    log.init();
    let source = Source::from(args.file.as_path());
    let unknown_fields = if args.lenient { UnknownFields::Warned } else { UnknownFields::Refused };
    let file = match job_file::read(&source, unknown_fields) {
        Ok(file) => file,
        Err(error) => return refuse(WithCauses(&error)),
    };
    for warning in &file.warnings {
        tell(&format!("warning: {warning}"));
    }
    match start(args, &config, environment, file.job) {
        Ok(outcome) => outcome.into(),
        Err(error) => {
            tell(&format!("error: {}", WithCauses(&error)));
            Exit::Failure
        }
    }
}

/// Reports a usage error.
pub(crate) fn refuse(why: impl std::fmt::Display) -> Exit {
    for line in why.to_string().lines() {
        tell(&format!("error: {line}"));
    }
    Exit::Usage
}

/// Prints a line to standard error. A failure is ignored: it can't be reported anywhere.
pub(crate) fn tell(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

fn start(
    args: &RunArgs,
    config: &RunConfig,
    environment: &Environment,
    job: Job,
) -> io::Result<Outcome> {
    let shell = ShellConfig::from_environment(environment)?;
    let state = open_state(&config.state_dir, environment).map_err(io::Error::other)?;
    let style = style(args.output, environment);
    system()?.block_on(supervise(job, state, shell, config, style))
}

fn style(requested: Option<Output>, environment: &Environment) -> Style {
    let terminal = io::stdout().is_terminal();
    let no_colour = environment.get("NO_COLOR").is_some();
    match requested {
        Some(Output::Json) => Style::Json,
        Some(Output::Pretty) | None if terminal => Style::Pretty { colour: !no_colour },
        _ => Style::Plain,
    }
}

async fn supervise(
    job: Job,
    state: StateDir,
    shell: ShellConfig,
    config: &RunConfig,
    style: Style,
) -> io::Result<Outcome> {
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    let stops = Signals::unless_ignored(&kinds)?;
    let metrics = Metrics::new(Box::new(DiscardMetrics)).start();
    let docker = DockerConfig { socket: config.docker_socket, ..DockerConfig::from_shell(&shell) };
    let config = Config { grace: config.grace, ..Config::default() };
    let home = shell.home.clone();
    let executors = Executors {
        shell: ShellExecutor { config: shell, copies_environment: false },
        docker: DockerExecutor { config: docker, metrics: metrics.clone() },
    };
    let jobs = Jobs { state, executors, home, login: None };
    let supervisor = JobSupervisor::new(Box::new(jobs), metrics, config).start();
    let (finished, outcome) = FinishedOnce::ask();
    supervisor
        .send(StartJob { job, finished })
        .await
        .map_err(io::Error::other)?
        .map_err(io::Error::other)?;

    let stopping = actix::spawn(pass_on(stops, supervisor.clone()));
    let shown = show_log(&supervisor, style).await;
    let outcome = outcome.await.map(|finished| finished.outcome).map_err(io::Error::other);
    stopping.abort();
    shown?;
    outcome
}

/// Shows the log until its end. A thread of its own writes to standard output, because a slow reader must not
/// block the job.
async fn show_log(supervisor: &Addr<JobSupervisor>, style: Style) -> io::Result<()> {
    let (ranges, to_show) = mpsc::channel(RANGES_AHEAD);
    let writer = std::thread::spawn(move || write_log(to_show, style));
    let followed = follow_log(supervisor, ranges).await;
    let written = actix_rt::task::spawn_blocking(|| writer.join()).await;
    match written {
        Ok(Ok(Err(error))) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        Ok(Ok(_)) => followed,
        _ => Err(io::Error::other("the output thread crashed")),
    }
}

/// Sends each new range of the log, with the time at which it became readable, until the log ends.
async fn follow_log(
    supervisor: &Addr<JobSupervisor>,
    ranges: mpsc::Sender<(LogRange, Instant)>,
) -> io::Result<()> {
    let mut line = 0;
    let mut log = supervisor.send(GetLog).await.ok().flatten();
    while let Some(current) = &log {
        let followed = tokio::select! {
            followed = current.buffer.send(Follow { line }) => followed,
            () = ranges.closed() => {
                // Standard output is closed: stop, like any program that gets SIGPIPE.
                supervisor.do_send(StopJob { id: None, manner: StopManner::Grace });
                return Ok(());
            }
        };
        let Ok(range) = followed else {
            // The buffer has crashed; the job replaces it as soon as it notices.
            actix::clock::sleep(Duration::from_millis(10)).await;
            log = supervisor.send(GetLog).await.ok().flatten();
            continue;
        };
        let range = range.map_err(io::Error::other)?;
        line = range.next_line;
        let sealed = range.sealed;
        // If the receiver is gone, the next round notices.
        let _ = ranges.send((range, Instant::now())).await;
        if sealed {
            break;
        }
    }
    Ok(())
}

fn write_log(mut to_show: mpsc::Receiver<(LogRange, Instant)>, style: Style) -> io::Result<()> {
    let mut renderer = Renderer::new(io::BufWriter::new(io::stdout().lock()), style);
    while let Some((range, at)) = to_show.blocking_recv() {
        renderer.show(&range, at)?;
    }
    Ok(())
}

/// Passes on signals: the first stops the job gracefully, the second kills it at once. The third ends an
/// agent that does not react; the guards then end the job.
async fn pass_on(mut stops: Signals, supervisor: Addr<JobSupervisor>) {
    for manner in [StopManner::Grace, StopManner::AtOnce] {
        stops.next().await;
        supervisor.do_send(StopJob { id: None, manner });
    }
    stops.next().await;
    process::exit(Exit::Stopped.code().into());
}
