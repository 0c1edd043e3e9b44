//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

const EXIT_CODES: &str = "\
Exit codes:
  0    the job passed
  1    the job failed, or the agent could not run it
  2    bad usage, or a job file that can't be run; nothing was executed
  130  the job was stopped";

/// Runs CI jobs: in a shell on this machine, with live output and nothing left behind.
#[derive(Debug, Parser)]
#[command(name = "agent", version, after_help = EXIT_CODES, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The agent's commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs one job from a file and shows its output
    #[command(after_help = EXIT_CODES)]
    Run(RunArgs),
    /// Prints the agent's version
    Version,
    /// The first process of a shell job; only the agent itself can start it
    #[command(hide = true)]
    JobInit,
}

/// Arguments of `agent run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// The job, in YAML or JSON; - for standard input
    pub file: PathBuf,

    /// How to show the job's log [default: pretty on a terminal, else plain]
    #[arg(long, value_enum)]
    pub output: Option<Output>,

    /// A private directory for what the agent keeps while jobs run [default: below the user's state
    /// directory, usually ~/.local/state/semaphore-agent]
    #[arg(long, env = "SEMAPHORE_AGENT_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// How a log is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Headings, durations and colours; plain where there is no terminal
    Pretty,
    /// The same without colours or other control sequences
    Plain,
    /// The log's event lines, as control planes get them
    Json,
}
