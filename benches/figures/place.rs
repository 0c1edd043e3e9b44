//! Runs jobs in this process and records when each event of their logs became readable.

use std::fs::File;
use std::io::{BufWriter, Read as _, Write as _};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime};

use actix::Actor as _;
use actors::job::Outcome;
use actors::log::buffer::Follow;
use actors::log::event::LogEvent;
use actors::metrics::Metrics;
use actors::ports::DiscardMetrics;
use actors::ports::LogRange;
use actors::request::FileRequest;
use actors::supervisor::finished_once::FinishedOnce;
use actors::supervisor::{Config, GetLog, JobSupervisor, StartJob};
use semaphore_agent::commands::wiring::{Jobs, open_state};
use semaphore_agent::config::FileMount;
use semaphore_agent::executors::Executors;
use semaphore_agent::executors::docker::{DockerConfig, DockerExecutor};
use semaphore_agent::executors::shell::{ShellConfig, ShellExecutor};
use semaphore_agent::service::environment::Environment;
use serde_json::{Value, json};
use test_support::World;
use tokio::time::Instant;

use crate::{LINES, Result};

/// Time limit for a measured agent.
const TIME_LIMIT: Duration = Duration::from_mins(30);

/// The files of all measurements, deleted on drop.
pub(crate) struct Place {
    pub(crate) world: World,
    /// The file with the large output.
    pub(crate) lines: PathBuf,
    /// The environment of jobs.
    pub(crate) shell: ShellConfig,
}

impl Place {
    pub(crate) fn make() -> Result<Self> {
        let world = World::with_time_limit(TIME_LIMIT);
        let lines = world.directory().join("lines");
        let mut file = BufWriter::new(File::create_new(&lines)?);
        for number in 0..LINES {
            writeln!(file, "{number:079}")?;
        }
        file.into_inner()?;
        let home = world.home();
        let environment = vec![
            ("PATH".into(), std::env::var_os("PATH").unwrap_or_default()),
            ("HOME".into(), home.clone().into()),
            ("TERM".into(), "xterm".into()),
        ];
        let shell = ShellConfig { temporary_directory: std::env::temp_dir(), home, environment };
        Ok(Self { world, lines, shell })
    }

    /// Returns a command that runs the shell of a job without the agent.
    pub(crate) fn bare_login(&self, command: &str) -> Command {
        let mut shell = Command::new("bash");
        shell.args(["--login", "-c", command]).env_clear();
        shell.envs(self.shell.environment.clone());
        shell
    }

    pub(crate) fn cat(&self) -> String {
        format!("cat {}", self.lines.display())
    }

    /// Runs a job in this process. Its log is read after its end, so that reading does not slow down the job.
    pub(crate) async fn run_job(&self, commands: &[&str]) -> Result<JobLog> {
        let commands: Vec<_> =
            commands.iter().map(|directive| json!({"directive": directive})).collect();
        self.run_request(json!({"job_id": "1", "commands": commands})).await
    }

    /// Runs a job with all fields of a request. In containers, the large output is `/lines`.
    pub(crate) async fn run_request(&self, request: Value) -> Result<JobLog> {
        let job = serde_json::from_value::<FileRequest>(request)?.decode()?;
        let metrics = Metrics::new(Box::new(DiscardMetrics)).start();
        let docker = DockerConfig {
            files: vec![FileMount { host: self.lines.clone(), container: "/lines".into() }],
            ..DockerConfig::from_shell(&self.shell)
        };
        let executors = Executors {
            shell: ShellExecutor { config: self.shell.clone(), copies_environment: false },
            docker: DockerExecutor { config: docker, metrics: metrics.clone() },
        };
        let (state, home) = (
            open_state(&self.world.state(), &Environment::from_process())?,
            self.shell.home.clone(),
        );
        let jobs = Jobs { state, executors, home, login: None };
        let supervisor = JobSupervisor::new(Box::new(jobs), metrics, Config::default()).start();
        let (finished, end) = FinishedOnce::ask();
        let arrived = Instant::now();
        supervisor.send(StartJob { job, finished }).await??;

        let buffer = supervisor.send(GetLog).await?.ok_or("no log")?.buffer;
        let mut moments = Vec::new();
        let mut line = 0;
        let sealed = loop {
            let range = buffer.send(Follow { line }).await??;
            let readable = Moment::now();
            line = range.next_line;
            moments.resize(usize::try_from(line)?, readable);
            if range.sealed {
                break range;
            }
        };
        let end = end.await?;
        let gone = Instant::now();
        let mut log = Vec::new();
        LogRange { start: 0, ..sealed }.reader().read_to_end(&mut log)?;
        if end.outcome != Outcome::Passed {
            let log = String::from_utf8_lossy(&log);
            return Err(format!("a job {}: {log}", end.outcome).into());
        }
        let lines = log.split_inclusive(|byte| *byte == b'\n');
        let events: std::result::Result<Vec<_>, _> = lines.map(LogEvent::decode).collect();
        Ok(JobLog {
            size: u32::try_from(log.len())?,
            events: events?.into_iter().zip(moments).collect(),
            arrived,
            gone,
        })
    }
}

/// A moment, on both clocks.
#[derive(Clone, Copy)]
pub(crate) struct Moment {
    pub(crate) steady: Instant,
    pub(crate) wall: SystemTime,
}

impl Moment {
    fn now() -> Self {
        Self { steady: Instant::now(), wall: SystemTime::now() }
    }
}

/// The log of a job.
pub(crate) struct JobLog {
    /// Size of the log, in bytes.
    pub(crate) size: u32,
    /// The events, each with the time when it became readable.
    pub(crate) events: Vec<(LogEvent, Moment)>,
    /// When the job was handed over.
    pub(crate) arrived: Instant,
    /// When all of the job's resources were removed.
    pub(crate) gone: Instant,
}

impl JobLog {
    /// Returns when `command` first started.
    pub(crate) fn start_of(&self, command: &str) -> Result<Instant> {
        let started = self.events.iter().find_map(|(event, readable)| match event {
            LogEvent::CmdStarted { directive, .. } if directive == command => Some(readable.steady),
            _ => None,
        });
        started.ok_or_else(|| format!("`{command}` is not in the log").into())
    }

    /// Returns when the log's last event became readable.
    pub(crate) fn finish(&self) -> Result<Instant> {
        self.events.last().map(|(_, readable)| readable.steady).ok_or_else(|| "no log".into())
    }

    /// Returns the time from the first start of `command` to its last end.
    pub(crate) fn span_of(&self, command: &str) -> Result<Duration> {
        let (mut first, mut last) = (None, None);
        for (event, readable) in &self.events {
            match event {
                LogEvent::CmdStarted { directive, .. } if directive == command => {
                    first.get_or_insert(readable.steady);
                }
                LogEvent::CmdFinished { directive, .. } if directive == command => {
                    last = Some(readable.steady);
                }
                _ => {}
            }
        }
        let span = first.zip(last).map(|(first, last)| last - first);
        span.ok_or_else(|| format!("`{command}` is not in the log").into())
    }
}
