//! A decoded job, as plain data.
//!
//! A part that is not valid (base64, names, modes) becomes a [`Problems`] value instead of a
//! decoding error: a job that comes over the wire is accepted and fails in the step concerned, with
//! the reason in its log. A job file with problems is refused before anything runs.

pub mod containers;
pub mod hooks;
pub mod lifecycle;
mod values;

use std::fmt;

use bytes::Bytes;

use crate::job::containers::Compose;
pub use crate::job::values::{Command, EnvVar, InjectedFile, Problem, Problems, VariableName};

/// The id of a job; never empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct JobId(String);

impl JobId {
    /// Returns `None` if `id` is empty.
    pub fn new(id: impl Into<String>) -> Option<Self> {
        Some(id.into()).filter(|id| !id.is_empty()).map(Self)
    }

    /// Returns the id as it was received.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every main command succeeded.
    Passed,
    /// A main command, an earlier step or the agent itself failed.
    Failed,
    /// The job was stopped from outside, or stopped itself with exit code 130.
    Stopped,
}

impl Outcome {
    /// Returns the word for logs, callbacks, reports and `SEMAPHORE_JOB_RESULT`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Where a job's commands run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecutorKind {
    /// In a login shell of this machine.
    Shell,
    /// In a shell in the main container, with side containers beside it.
    DockerCompose(Box<Compose>),
}

/// The callbacks at the end of a job whose log is pulled.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Callbacks {
    /// The URL that is called with the outcome.
    pub finished: Option<String>,
    /// The URL that is called when nothing of the job is left.
    pub teardown_finished: Option<String>,
    /// The bearer token for both.
    pub token: Option<String>,
}

/// Shows nothing: URLs may be pre-signed.
impl fmt::Debug for Callbacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// How a job's log gets to the platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logger {
    /// Whether the log is pulled or pushed.
    pub method: LogMethod,
    /// The size up to which the platform keeps a pulled log, in bytes.
    pub max_size: u64,
}

/// Whether a job's log is pulled or pushed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogMethod {
    /// The platform reads it from the agent.
    Pull,
    /// The agent sends it to the platform.
    Push(PushTarget),
}

/// Where a log is pushed.
#[derive(Clone, PartialEq, Eq)]
pub struct PushTarget {
    /// The URL of the log as received: it may be empty or not valid.
    pub url: String,
    /// The bearer token; replaced when it expires.
    pub token: String,
}

/// Shows nothing: the URL may be pre-signed.
impl fmt::Debug for PushTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// A decoded job.
#[derive(Clone, Debug)]
pub struct Job {
    /// The job's id.
    pub id: JobId,
    /// The job's name, shown to people.
    pub name: Option<String>,
    /// Where the commands run.
    pub executor: Result<ExecutorKind, Problems>,
    /// The variables, sorted by name. Each name occurs once: the last of its values won.
    pub environment: Result<Vec<EnvVar>, Problems>,
    /// One line of the job's log for each variable that no shell can be given, saying why.
    pub skipped_variables: Vec<String>,
    /// The files to inject, in the order of the request.
    pub files: Result<Vec<InjectedFile>, Problems>,
    /// The main commands.
    pub commands: Vec<Command>,
    /// Commands that run after the main ones, whatever their result.
    pub epilogue_always: Vec<Command>,
    /// Commands that run after `epilogue_always` if the job passed.
    pub epilogue_on_pass: Vec<Command>,
    /// Commands that run after `epilogue_always` if the job failed.
    pub epilogue_on_fail: Vec<Command>,
    /// Keys for SSH access while the job runs, each one line of `authorized_keys`.
    pub ssh_keys: Result<Vec<Bytes>, Problems>,
    /// The callbacks at the job's end.
    pub callbacks: Callbacks,
    /// How the log gets to the platform.
    pub logger: Result<Logger, Problems>,
}

impl Job {
    /// Whether the job has any command, epilogues included.
    pub fn has_commands(&self) -> bool {
        let Self { commands, epilogue_always, epilogue_on_pass, epilogue_on_fail, .. } = self;
        [commands, epilogue_always, epilogue_on_pass, epilogue_on_fail]
            .into_iter()
            .any(|list| !list.is_empty())
    }

    /// Returns all errors in the job's request.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        let executor = self.executor.as_ref().err();
        let environment = self.environment.as_ref().err();
        let files = self.files.as_ref().err();
        let ssh_keys = self.ssh_keys.as_ref().err();
        let logger = self.logger.as_ref().err();
        let credentials = match &self.executor {
            Ok(ExecutorKind::DockerCompose(compose)) => compose.credentials.as_ref().err(),
            _ => None,
        };
        [executor, credentials, environment, files, ssh_keys, logger]
            .into_iter()
            .flatten()
            .flatten()
    }

    /// Returns the value of an environment variable; `None` if it is not set or not UTF-8.
    pub fn variable(&self, name: &str) -> Option<&str> {
        let environment = self.environment.as_ref().ok()?;
        let variable = environment.iter().find(|variable| variable.name.as_str() == name)?;
        std::str::from_utf8(&variable.value).ok()
    }
}
