//! The agent's exit codes.

use std::process::ExitCode;

use actors::job::Outcome;

/// How a command of the agent ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// 0: the job passed, or the command succeeded.
    Success,
    /// 1: the job failed, or the agent could not continue.
    Failure,
    /// 2: bad usage, or a job file that can't be run.
    Usage,
    /// 130: the job was stopped.
    Stopped,
}

impl Exit {
    /// Returns the number that the shell sees.
    pub const fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failure => 1,
            Self::Usage => 2,
            Self::Stopped => 130,
        }
    }
}

impl From<Outcome> for Exit {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Passed => Self::Success,
            Outcome::Failed => Self::Failure,
            Outcome::Stopped => Self::Stopped,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}
