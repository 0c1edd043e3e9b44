//! The operator's scripts that run in every job.

use std::time::Duration;

use crate::job::values::Command;

/// The operator's script that runs before the commands of every job.
#[derive(Clone, Debug)]
pub struct PreJobHook {
    /// The script's path, for the job's shell: in a Docker job, a path in the main container.
    pub path: String,
    /// Whether the job's shell sources the script; else `bash` runs it in a process of its own.
    pub sourced: bool,
    /// How a failure of the hook affects the job.
    pub failure: HookFailure,
    /// The time limit. Exceeding it kills the hook's process, or the job's shell if the hook is
    /// sourced.
    pub patience: Option<Duration>,
}

/// How a failure of the pre-job hook affects the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookFailure {
    /// The job fails, without an announcement (`agent serve`).
    FailsJob,
    /// The job fails; a line before the hook's own output announces that.
    FailsJobAsAnnounced,
    /// The job goes on; a line before the hook's own output announces that.
    IsIgnoredAsAnnounced,
}

impl HookFailure {
    const fn announcement(self) -> &'static str {
        match self {
            Self::FailsJob => "",
            Self::FailsJobAsAnnounced => {
                "Warning: The agent is configured to fail the job if the pre-job hook fails.\n"
            }
            Self::IsIgnoredAsAnnounced => {
                "Warning: The agent is configured to proceed with the job even if the pre-job hook \
                 fails.\n"
            }
        }
    }
}

/// The operator's script that runs after everything else of every job.
#[derive(Clone, Debug)]
pub struct PostJobHook {
    /// The script's path, for the job's shell: in a Docker job, a path in the main container.
    pub path: String,
    /// The time limit. Exceeding it kills the hook's process.
    pub patience: Option<Duration>,
}

/// The operator's hooks for every job.
#[derive(Clone, Debug, Default)]
pub struct JobHooks {
    /// Runs before the job's commands.
    pub pre_job: Option<PreJobHook>,
    /// Runs after the epilogues, and after a stop; never after a failed preparation.
    pub post_job: Option<PostJobHook>,
}

/// Where a hook runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum HookPlace {
    /// In a process of its own, which can be killed without the shell.
    Process,
    /// In the job's shell.
    Shell,
}

/// How to run a hook.
pub(crate) struct HookRun {
    pub(crate) command: Command,
    /// Logged before the hook's own output; may be empty.
    pub(crate) announcement: &'static str,
    pub(crate) patience: Option<Duration>,
    pub(crate) place: HookPlace,
}

impl PreJobHook {
    pub(crate) fn run(&self) -> HookRun {
        let command = Command {
            directive: format!(
                "{} {}",
                if self.sourced { "source" } else { "bash" },
                quoted(&self.path)
            ),
            alias: Some("Running the pre-job hook configured in the agent".to_owned()),
        };
        HookRun {
            command,
            announcement: self.failure.announcement(),
            patience: self.patience,
            place: if self.sourced { HookPlace::Shell } else { HookPlace::Process },
        }
    }
}

impl PostJobHook {
    pub(crate) fn run(&self) -> HookRun {
        let command = Command {
            directive: format!("bash {}", quoted(&self.path)),
            alias: Some("Running the post-job hook configured in the agent".to_owned()),
        };
        HookRun { command, announcement: "", patience: self.patience, place: HookPlace::Process }
    }
}

/// Quotes `path` as one word of the shell.
fn quoted(path: &str) -> String {
    format!("'{}'", path.replace('\'', r"'\''"))
}
