//! The `agent` program: parses the command line, runs the command, and returns its exit code.

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
    let environment = Environment::from_process();
    let cli = Cli::parse();
    // Both are best effort: the agent works without them.
    let _ = signals::survive_file_size_limits();
    // Jobs must not inherit descriptors that the agent's parent left open.
    let _ = open_files::keep_inherited_from_children();
    // Jobs run as the same user, and must not be able to read or trace this process. Executing another
    // program resets the flag.
    let hidden = match cli.command {
        // The guards set the flag themselves, after their own preparations.
        Command::JobInit { .. } | Command::DockerWatch { .. } => Ok(()),
        _ => prctl::set_dumpable(false),
    };
    let exit = match cli.command {
        Command::Run(args) => commands::run::run(&args, &environment),
        Command::Serve(options) => commands::serve::serve(&options, &environment, hidden),
        Command::Start(options) => commands::start::start(&options, &environment, hidden),
        Command::Version => commands::version::version(),
        Command::JobInit { .. } => guard_exit(job_init::run()),
        Command::DockerWatch { .. } => guard_exit(watch::run()),
    };
    exit.into()
}

/// Reports the error of a guard process, if any.
fn guard_exit(ended: io::Result<()>) -> Exit {
    match ended {
        Ok(()) => Exit::Success,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: a job's guard process failed: {error}");
            Exit::Failure
        }
    }
}
