//! A job as the agent understands it: plain data, decoded once.
//!
//! What a control plane may get wrong (base64, names, modes) is decoded into a [`Problems`] value
//! instead of being refused: over the wire such a job is accepted and fails in the step concerned,
//! with the reason in its log. A job file with problems is refused before anything runs.

pub mod containers;
pub mod hooks;
pub mod lifecycle;

use std::fmt;

use bytes::Bytes;

use crate::job::containers::Compose;

/// The identity of a job; never empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct JobId(String);

impl JobId {
    /// Nothing if `id` is empty.
    pub fn new(id: impl Into<String>) -> Option<Self> {
        Some(id.into()).filter(|id| !id.is_empty()).map(Self)
    }

    /// The id as it came.
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
    /// Every command succeeded.
    Passed,
    /// A command or a preparation failed.
    Failed,
    /// Somebody stopped it, or it stopped itself with exit code 130.
    Stopped,
}

impl Outcome {
    /// The word that logs, callbacks and `SEMAPHORE_JOB_RESULT` use.
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

/// The name of an environment variable: `[A-Za-z_][A-Za-z0-9_]*`, so that it can stand unquoted in
/// a script.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VariableName(String);

impl VariableName {
    /// Nothing if `name` is not a shell variable's name.
    pub fn new(name: &str) -> Option<Self> {
        let starts_well = name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
        let goes_on_well = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        (starts_well && goes_on_well).then(|| Self(name.to_owned()))
    }

    /// A name that a container's variable may have: anything but an empty one and one with `=` or NUL in it, which
    /// no environment can hold. It can't stand in a script.
    pub fn for_container(name: &str) -> Option<Self> {
        (!name.is_empty() && !name.contains(['=', '\0'])).then(|| Self(name.to_owned()))
    }

    /// Whether bash sets it itself and lets nobody else do so.
    pub fn is_the_shells_own(&self) -> bool {
        SHELLS_OWN.contains(&self.as_str())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Variables that every bash makes readonly.
const SHELLS_OWN: [&str; 6] = ["BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"];

/// A variable of the job's environment. Its value is bytes, not text.
#[derive(Clone, PartialEq, Eq)]
pub struct EnvVar {
    /// In a job's environment one that can stand in a script.
    pub name: VariableName,
    /// Without NUL bytes.
    pub value: Bytes,
}

/// Shows the name only: values are often secrets.
impl fmt::Debug for EnvVar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=…", self.name.as_str())
    }
}

/// A file to put in place before the first command.
#[derive(Clone, PartialEq, Eq)]
pub struct InjectedFile {
    /// As given: absolute, `~/…`, or relative to the home directory.
    pub path: String,
    /// The decoded content.
    pub content: Bytes,
    /// As given; an octal string in shell jobs.
    pub mode: String,
}

/// Leaves the content out: it is often a key.
impl fmt::Debug for InjectedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bytes, mode {})", self.path, self.content.len(), self.mode)
    }
}

/// One command of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// The shell text.
    pub directive: String,
    /// What the log calls the command instead of its text; never empty.
    pub alias: Option<String>,
}

impl Command {
    /// The directive of the command's log events.
    pub fn title(&self) -> &str {
        self.alias.as_deref().unwrap_or(&self.directive)
    }
}

/// What runs the commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecutorKind {
    /// A login shell on this machine.
    Shell,
    /// A shell in a container beside side containers.
    DockerCompose(Box<Compose>),
}

/// Whom to tell about the end of a job whose log is pulled.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Callbacks {
    /// The URL that hears of the result.
    pub finished: Option<String>,
    /// The URL that hears that nothing of the job is left.
    pub teardown_finished: Option<String>,
    /// What the agent proves itself with there.
    pub token: Option<String>,
}

/// Shows nothing: URLs may be pre-signed.
impl fmt::Debug for Callbacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// Where a job's log goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logger {
    /// Who moves it.
    pub method: LogMethod,
    /// How much the platform keeps, in bytes.
    pub max_size: u64,
}

/// Who moves a job's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogMethod {
    /// The platform reads it from the agent.
    Pull,
    /// The agent sends it to the platform.
    Push(PushTarget),
}

/// Where a log is sent.
#[derive(Clone, PartialEq, Eq)]
pub struct PushTarget {
    /// Of the log; as it came, so perhaps none.
    pub url: String,
    /// What the agent proves itself with there, at first.
    pub token: String,
}

/// Shows nothing: the URL may be pre-signed.
impl fmt::Debug for PushTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// One thing that is wrong with a job, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The place in the request, for example `env_vars[2].name`.
    pub path: String,
    /// What is wrong and what would be right; never a value that could be a secret.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}

/// Everything that is wrong with one part of a job; never empty.
pub type Problems = Vec<Problem>;

/// A whole job, decoded.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its identity.
    pub id: JobId,
    /// Its name for people.
    pub name: Option<String>,
    /// What is to run it.
    pub executor: Result<ExecutorKind, Problems>,
    /// Sorted by name, each name once: the last of a name's values won.
    pub environment: Result<Vec<EnvVar>, Problems>,
    /// Variables that no shell can be given: for each a line of the log that says why.
    pub skipped_variables: Vec<String>,
    /// In the order of the request.
    pub files: Result<Vec<InjectedFile>, Problems>,
    /// The main commands.
    pub commands: Vec<Command>,
    /// Run whatever the result.
    pub epilogue_always: Vec<Command>,
    /// Run when the job passed.
    pub epilogue_on_pass: Vec<Command>,
    /// Run when the job failed.
    pub epilogue_on_fail: Vec<Command>,
    /// Lines of `authorized_keys`: who may log in while the job runs.
    pub ssh_keys: Result<Vec<Bytes>, Problems>,
    /// Whom to tell about its end.
    pub callbacks: Callbacks,
    /// Where its log goes.
    pub logger: Result<Logger, Problems>,
}

impl Job {
    /// Whether there is anything to run.
    pub fn has_commands(&self) -> bool {
        let Self { commands, epilogue_always, epilogue_on_pass, epilogue_on_fail, .. } = self;
        [commands, epilogue_always, epilogue_on_pass, epilogue_on_fail]
            .into_iter()
            .any(|list| !list.is_empty())
    }

    /// Everything that is wrong with it, in the order of its steps.
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

    /// The value of a variable of its environment, if it is text.
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
    fn variable_names_are_those_of_the_shell() {
        for good in ["A", "_", "a1", "SEMAPHORE_JOB_RESULT", "_9"] {
            assert!(VariableName::new(good).is_some(), "{good}");
        }
        for bad in ["", "1A", "A B", "A=1; touch x; B", "A-B", "Ä", "A\n", "$A"] {
            assert!(VariableName::new(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn debug_output_holds_no_value_and_no_content() {
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
