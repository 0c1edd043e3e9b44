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
Each option can also be given as environment variable SEMAPHORE_AGENT_ and its name, and as a key in
the configuration file; a flag wins over the environment, and that over the file. Several values are
separated by commas in a flag, by white space in a variable, and are a list in the file.

SEMAPHORE_AGENT_LOG_LEVEL, SEMAPHORE_AGENT_LOG_FILE_PATH and SEMAPHORE_AGENT_LOG_MAX_SIZE (in bytes)
are for the agent's own log: by default info, agent_log in the directory for temporary files, 10 MiB.

Exit codes:
  0    ended as it was asked to
  1    could not begin, or a second signal ended it at once
  2    bad usage or configuration";

const START_HELP: &str = "\
Each option can also be given as environment variable SEMAPHORE_AGENT_ and its name, and as a key in
the configuration file; a flag wins over the environment, and that over the file. Several values are
separated by commas in a flag, by white space in a variable, and are a list in the file.

SEMAPHORE_AGENT_LOG_LEVEL, SEMAPHORE_AGENT_LOG_FILE_PATH and SEMAPHORE_AGENT_LOG_MAX_SIZE (in bytes)
are for the agent's own log: by default info, agent_log in the directory for temporary files, 10 MiB.
HTTPS_PROXY and NO_PROXY are heeded.

Exit codes:
  0    ended as it was asked to
  1    could not begin, could not reach the control plane for 10 minutes, or was killed
  2    bad usage or configuration";

/// Runs CI jobs: in a shell on this machine or in containers, with live output and nothing left behind.
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
    /// Serves jobs to a platform over HTTPS
    #[command(after_help = SERVE_HELP)]
    Serve(Box<Flags<Serve>>),
    /// Asks a control plane for jobs, and sends it their logs
    #[command(after_help = START_HELP)]
    Start(Box<Flags<Start>>),
    /// Prints the agent's version
    Version,
    /// The first process of a shell job; only the agent itself can start it
    #[command(hide = true)]
    JobInit {
        /// The job's mark, by which this process is found.
        job: String,
    },
    /// Ends what a job has in containers if the agent dies; only the agent itself can start it
    #[command(hide = true)]
    DockerWatch {
        /// The job's mark, by which this process is found.
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

    /// Only warns about fields that no job has, which are errors otherwise
    #[arg(long)]
    pub lenient: bool,

    /// What other commands have, too.
    #[command(flatten)]
    pub options: Flags<Run>,
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
