//! The `agent` program: parse, dispatch, exit code.

use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::Parser as _;
use nix::sys::prctl;
use semaphore_agent::commands;
use semaphore_agent::commands::cli::{Cli, Command};
use semaphore_agent::commands::exit::Exit;
use semaphore_agent::executors::docker::watch;
use semaphore_agent::executors::shell::job_init;
use semaphore_agent::os::open_files;
use semaphore_agent::service::environment::Environment;
use semaphore_agent::service::signals;

fn main() -> ExitCode {
    let environment = Environment::of_process();
    let cli = Cli::parse();
    // It works without, too.
    let _ = signals::survive_file_size_limits();
    // What the agent's parent left open is nothing to a job.
    let _ = open_files::keep_inherited_from_children();
    // Jobs run as the same user: none is to look into this process, or to take it over. A shell makes itself
    // accessible again by being started.
    let hidden = match cli.command {
        // These have something to do before.
        Command::JobInit { .. } | Command::DockerWatch { .. } => Ok(()),
        _ => prctl::set_dumpable(false),
    };
    let exit = match cli.command {
        Command::Run(args) => commands::run::run(&args, &environment),
        Command::Serve(options) => commands::serve::serve(&options, &environment, hidden),
        Command::Start(options) => commands::start::start(&options, &environment, hidden),
        Command::Version => commands::version::version(),
        Command::JobInit { .. } => beside_the_agent(job_init::run()),
        Command::DockerWatch { .. } => beside_the_agent(watch::run()),
    };
    exit.into()
}

/// How a process ended that the agent starts for itself.
fn beside_the_agent(ended: io::Result<()>) -> Exit {
    match ended {
        Ok(()) => Exit::Success,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: a job's helper process failed: {error}");
            Exit::Failure
        }
    }
}
