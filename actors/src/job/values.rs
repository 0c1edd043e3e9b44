//! What both a job and its containers consist of: variables, files, commands, and the errors in them.

use std::fmt;

use bytes::Bytes;

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
