//! A decoded job, as plain data.
//!
//! A part that is not valid (base64, names, modes) becomes a [`Problems`] value instead of a
//! decoding error: a job that comes over the wire is accepted and fails in the step concerned, with
//! the reason in its log. A job file with problems is refused before anything runs.

pub mod containers;
pub mod hooks;
pub mod lifecycle;

use std::fmt;

use bytes::Bytes;

use crate::job::containers::Compose;

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

/// The name of an environment variable. One made by [`Self::new`] can stand unquoted in a script.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VariableName(String);

impl VariableName {
    /// Returns `None` unless `name` is that of a shell variable, `[A-Za-z_][A-Za-z0-9_]*`.
    pub fn new(name: &str) -> Option<Self> {
        let starts_well = name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
        let goes_on_well = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        (starts_well && goes_on_well).then(|| Self(name.to_owned()))
    }

    /// Creates the name of a container's variable; it must not stand in a script. Returns `None` if
    /// `name` is empty or contains `=` or NUL, as no environment can hold it.
    pub fn for_container(name: &str) -> Option<Self> {
        (!name.is_empty() && !name.contains(['=', '\0'])).then(|| Self(name.to_owned()))
    }

    /// Whether bash makes this variable readonly in every shell.
    pub fn is_the_shells_own(&self) -> bool {
        SHELLS_OWN.contains(&self.as_str())
    }

    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The variables that bash makes readonly in every shell.
const SHELLS_OWN: [&str; 6] = ["BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"];

/// An environment variable of a job or a container.
#[derive(Clone, PartialEq, Eq)]
pub struct EnvVar {
    /// The name; in a job's environment always that of a shell variable.
    pub name: VariableName,
    /// The value: any bytes but NUL, not necessarily UTF-8.
    pub value: Bytes,
}

/// Shows the name only: values are often secrets.
impl fmt::Debug for EnvVar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=…", self.name.as_str())
    }
}

/// A file to write before the first command runs.
#[derive(Clone, PartialEq, Eq)]
pub struct InjectedFile {
    /// The path as received: absolute, `~/…`, or relative to the home directory.
    pub path: String,
    /// The decoded content.
    pub content: Bytes,
    /// The mode as received: an octal string in shell jobs, whatever `chmod` accepts in containers.
    pub mode: String,
}

/// Leaves out the content: it is often a key.
impl fmt::Debug for InjectedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bytes, mode {})", self.path, self.content.len(), self.mode)
    }
}

/// One command of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// The command, as bash source.
    pub directive: String,
    /// The title in the job's log, in place of the directive; never empty.
    pub alias: Option<String>,
}

impl Command {
    /// Returns the title of the command's step: the `directive` of its log events.
    pub fn title(&self) -> &str {
        self.alias.as_deref().unwrap_or(&self.directive)
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

/// One error in a job request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The path of the field, such as `env_vars[2].name`.
    pub path: String,
    /// What is wrong and what would be right. Contains no value that could be a secret.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}

/// All errors in one part of a job request; not empty where it is an `Err`.
pub type Problems = Vec<Problem>;

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
    /// Commands that run then if the job passed.
    pub epilogue_on_pass: Vec<Command>,
    /// Commands that run then if the job failed.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variable_names_are_valid_in_the_shell() {
        for good in ["A", "_", "a1", "SEMAPHORE_JOB_RESULT", "_9"] {
            assert!(VariableName::new(good).is_some(), "{good}");
        }
        for bad in ["", "1A", "A B", "A=1; touch x; B", "A-B", "Ä", "A\n", "$A"] {
            assert!(VariableName::new(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn debug_output_contains_no_value_and_no_content() {
        let variable = EnvVar {
            name: VariableName::new("TOKEN").unwrap(),
            value: Bytes::from_static(b"hunter2"),
        };
        let file = InjectedFile {
            path: "key".into(),
            content: Bytes::from_static(b"hunter2"),
            mode: "0600".into(),
        };
        assert!(!format!("{variable:?} {file:?}").contains("hunter2"));
    }
}
