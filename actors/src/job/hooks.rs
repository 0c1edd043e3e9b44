//! Scripts of the agent's operator that run in every job.

use std::time::Duration;

use crate::job::Command;

/// A script of the agent's operator that runs before the commands of every job, in their shell.
#[derive(Clone, Debug)]
pub struct PreJobHook {
    /// Where it is for the shell.
    pub path: String,
    /// Part of the shell, or a process of its own.
    pub sourced: bool,
    /// Whether a job goes on without it.
    pub failure: HookFailure,
    /// How long it may take; longer costs the job its shell if it is sourced.
    pub patience: Option<Duration>,
}

/// What becomes of a job whose pre-job hook fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookFailure {
    /// It fails, as the protocol of the hosted mode has it.
    FailsJob,
    /// It fails, and its log has said so before.
    FailsJobAsAnnounced,
    /// It goes on, and its log has said so before.
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

/// A script of the agent's operator that runs after everything else of every job.
#[derive(Clone, Debug)]
pub struct PostJobHook {
    /// Where it is for the shell.
    pub path: String,
    /// How long it may take.
    pub patience: Option<Duration>,
}

/// What the agent's operator adds to every job.
#[derive(Clone, Debug, Default)]
pub struct JobHooks {
    /// Before its commands.
    pub pre_job: Option<PreJobHook>,
    /// After them, and after a stop.
    pub post_job: Option<PostJobHook>,
}

/// Where a hook runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum HookPlace {
    /// In one of its own, which can be ended without the shell.
    Process,
    /// In the job's shell itself.
    Shell,
}

/// How a hook is run.
pub(crate) struct HookRun {
    pub(crate) command: Command,
    /// Comes before its own output.
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

/// As one word of a shell.
fn quoted(path: &str) -> String {
    format!("'{}'", path.replace('\'', r"'\''"))
}
