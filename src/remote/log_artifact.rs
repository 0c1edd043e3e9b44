//! Uploads a job's whole log as an artifact, with the machine's `artifact` program
//! (docs/protocol.md: "Job logs as an artifact").

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::os::programs::run_for;
use crate::service::environment::Environment;
use crate::state::StateDir;
use actors::errors::{Cause, ErrorOf};
use actors::job::Job;
use actors::log::event::LogEvent;
use actors::ports::LogRange;
use actors::ports::LogUploads;
use clap::ValueEnum;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use serde::{Deserialize, Serialize};

/// Time limit of one upload.
const PATIENCE: Duration = Duration::from_mins(30);

/// Environment variable of the agent that sets the size from which logs are compressed.
const COMPRESSION_SIZE: &str = "SEMAPHORE_AGENT_LOGS_COMPRESSION_SIZE";

/// Logs of at least this size are compressed by default, in bytes.
const DEFAULT_COMPRESSION_SIZE: u64 = 100 << 20;

/// Values allowed in [`COMPRESSION_SIZE`], in bytes.
const COMPRESSION_SIZES: std::ops::RangeInclusive<u64> = 1 << 20..=1 << 30;

/// When a job's log is uploaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum UploadCondition {
    /// Never.
    #[default]
    Never,
    /// Always, even if the platform has kept all of it.
    Always,
    /// Only if the platform has not kept all of it.
    WhenTrimmed,
}

impl UploadCondition {
    /// Reads the condition from the job's environment variables.
    fn for_job(job: &Job) -> Result<Self, Cause> {
        match job.variable("SEMAPHORE_AGENT_UPLOAD_JOB_LOGS") {
            None | Some("" | "never") => Ok(Self::Never),
            Some("always") => Ok(Self::Always),
            Some("when-trimmed") => Ok(Self::WhenTrimmed),
            Some(_) => {
                let known = "never, always, when-trimmed";
                Err(format!("SEMAPHORE_AGENT_UPLOAD_JOB_LOGS must be one of {known}").into())
            }
        }
    }
}

/// Uploads logs with the `artifact` program from the agent's PATH.
#[derive(Clone, Debug)]
pub struct ArtifactUploads {
    /// Environment variables of the program besides those from the job. Free of the agent's secrets.
    pub environment: Vec<(OsString, OsString)>,
    /// Holds the text of a log during its upload.
    pub state: StateDir,
    /// Logs of at least this many bytes are compressed.
    pub compression_size: u64,
    /// The condition for all jobs; with `None` each job's environment variables decide.
    pub condition: Option<UploadCondition>,
}

impl ArtifactUploads {
    /// Reads `SEMAPHORE_AGENT_LOGS_COMPRESSION_SIZE`, in bytes, or returns its default.
    pub fn compression_size(environment: &Environment) -> Result<u64, ErrorOf> {
        let Some(size) = environment.text(COMPRESSION_SIZE) else {
            return Ok(DEFAULT_COMPRESSION_SIZE);
        };
        let in_range = size.parse().ok().filter(|size| COMPRESSION_SIZES.contains(size));
        in_range.ok_or_else(|| {
            let (least, most) = (COMPRESSION_SIZES.start(), COMPRESSION_SIZES.end());
            let why = format!("`{size}` is not a number of bytes from {least} to {most}");
            ErrorOf::new(COMPRESSION_SIZE, why)
        })
    }

    async fn push(&self, job: &Job, log: &LogRange) -> Result<(), Cause> {
        let range = log.clone();
        let directory = self.state.make_job_dir(None)?;
        let path = directory.scratch();
        let compression_size = self.compression_size;
        let written =
            actix_rt::task::spawn_blocking(move || write_text(&range, &path, compression_size));
        let file =
            written.await?.map_err(|error| ErrorOf::new("can't write the log's text", error))?;

        let mut command = Command::new("artifact");
        let compressed = file.extension().is_some_and(|extension| extension == "gz");
        command.args(["push", "job"]).arg(&file).arg("-d").arg(if compressed {
            "agent/job_logs.txt.gz"
        } else {
            "agent/job_logs.txt"
        });
        command.env_clear().envs(self.environment.iter().cloned());
        for name in ["SEMAPHORE_ARTIFACT_TOKEN", "SEMAPHORE_ORGANIZATION_URL"] {
            command.env(name, job.variable(name).unwrap_or_default());
        }
        command.env("SEMAPHORE_JOB_ID", job.id.as_str());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        match run_for(command, PATIENCE).await {
            Ok(Some(status)) if status.success() => Ok(()),
            Ok(Some(status)) => Err(format!("`artifact push` ended with {status}").into()),
            Ok(None) => {
                Err(format!("`artifact push` took longer than {} s", PATIENCE.as_secs()).into())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err("no `artifact` program in the agent's PATH".into())
            }
            Err(error) => Err(ErrorOf::new("`artifact push`", error).into()),
        }
    }
}

impl LogUploads for ArtifactUploads {
    fn upload<'a>(
        &'a self,
        job: &'a Job,
        log: &'a LogRange,
        trimmed: bool,
    ) -> LocalBoxFuture<'a, Result<(), Cause>> {
        async move {
            let wanted = match self.condition.map_or_else(|| UploadCondition::for_job(job), Ok)? {
                UploadCondition::Never => false,
                UploadCondition::Always => true,
                UploadCondition::WhenTrimmed => trimmed,
            };
            if !wanted {
                return Ok(());
            }
            self.push(job, log).await?;
            log::info!(job:% = job.id; "uploaded the job's log as an artifact");
            Ok(())
        }
        .boxed_local()
    }
}

/// Writes the log's directives and outputs to a file in `directory`, compressed if they have at least
/// `compression_size` bytes. Returns the file's path.
fn write_text(log: &LogRange, directory: &Path, compression_size: u64) -> io::Result<PathBuf> {
    let plain = directory.join("job_logs.txt");
    let mut text = BufWriter::new(File::create_new(&plain)?);
    for line in BufReader::new(log.reader()).split(b'\n') {
        match LogEvent::decode(&line?) {
            Ok(LogEvent::CmdStarted { directive, .. }) => writeln!(text, "{directive}")?,
            Ok(LogEvent::CmdOutput { output, .. }) => text.write_all(output.as_bytes())?,
            // Lines that are not events are skipped: a shell job can write to its own log file.
            Ok(_) | Err(_) => {}
        }
    }
    let size = text.into_inner()?.metadata()?.len();
    if size < compression_size {
        return Ok(plain);
    }
    let compressed = directory.join("job_logs.txt.gz");
    let mut encoder = GzEncoder::new(File::create_new(&compressed)?, Compression::default());
    io::copy(&mut File::open(&plain)?, &mut encoder)?;
    encoder.finish()?;
    Ok(compressed)
}
