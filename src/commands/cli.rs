//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

use crate::config::Flags;
use crate::config::run::Run;
use crate::config::serve::Serve;
use crate::config::start::Start;

const EXIT_CODES: &str = "\
Exit codes:
  0    the job passed
  1    the job failed, or the agent could not run it
  2    bad usage, or a job file that can't be run; nothing was executed
  130  the job was stopped";

const SERVE_HELP: &str = "\
Each option can also be set by an environment variable (SEMAPHORE_AGENT_ and the option's name) or by a
key in the configuration file. Flags take precedence over the environment, and the environment over the
file. Lists are separated by commas in a flag, by white space in a variable, and are lists in the file.

SEMAPHORE_AGENT_LOG_LEVEL, SEMAPHORE_AGENT_LOG_FILE_PATH and SEMAPHORE_AGENT_LOG_MAX_SIZE (in bytes)
configure the agent's own log. Defaults: info, agent_log in the directory for temporary files, 10 MiB.

Exit codes:
  0    ended as requested
  1    could not start, or was ended at once by a second signal
  2    bad usage or configuration";

const START_HELP: &str = "\
Each option can also be set by an environment variable (SEMAPHORE_AGENT_ and the option's name) or by a
key in the configuration file. Flags take precedence over the environment, and the environment over the
file. Lists are separated by commas in a flag, by white space in a variable, and are lists in the file.

SEMAPHORE_AGENT_LOG_LEVEL, SEMAPHORE_AGENT_LOG_FILE_PATH and SEMAPHORE_AGENT_LOG_MAX_SIZE (in bytes)
configure the agent's own log. Defaults: info, agent_log in the directory for temporary files, 10 MiB.
The variables HTTPS_PROXY and NO_PROXY are respected.

Exit codes:
  0    ended as requested
  1    could not start, could not reach the control plane for 10 minutes, or was killed
  2    bad usage or configuration";

/// Runs CI jobs in a shell on this machine or in containers, streams their logs, and cleans up after them.
#[derive(Debug, Parser)]
#[command(name = "agent", version, after_help = EXIT_CODES, arg_required_else_help = true)]
pub struct Cli {
    /// The command to run.
    #[command(subcommand)]
    pub command: Command,
}

/// The agent's commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs one job from a file and shows its output
    #[command(after_help = EXIT_CODES)]
    Run(RunArgs),
    /// Accepts jobs from a platform over HTTPS
    #[command(after_help = SERVE_HELP)]
    Serve(Box<Flags<Serve>>),
    /// Fetches jobs from a control plane, and delivers their logs to it
    #[command(after_help = START_HELP)]
    Start(Box<Flags<Start>>),
    /// Prints the agent's version
    Version,
    /// Guards a shell job: starts its shell, and ends its processes if the agent dies; internal
    #[command(hide = true)]
    JobInit {
        /// The job's mark, by which this process can be found
        job: String,
    },
    /// Guards a Docker job: removes its containers if the agent dies; internal
    #[command(hide = true)]
    DockerWatch {
        /// The job's mark, by which this process can be found
        job: String,
    },
}

/// Arguments of `agent run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// The job, in YAML or JSON; - for standard input
    pub file: PathBuf,

    /// How to show the job's log [default: pretty on a terminal, else plain]
    #[arg(long, value_enum)]
    pub output: Option<Output>,

    /// Warns about unknown fields in the job file instead of failing
    #[arg(long)]
    pub lenient: bool,

    /// Options that other commands have, too.
    #[command(flatten)]
    pub options: Flags<Run>,
}

/// How a log is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Headings, durations and colours; plain where there is no terminal
    Pretty,
    /// Like pretty, but without colours or other control sequences
    Plain,
    /// The log's event lines, as control planes receive them
    Json,
}
