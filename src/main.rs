//! The `agent` program: parse, dispatch, exit code.

use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::Parser as _;
use semaphore_agent::cli::{Cli, Command};
use semaphore_agent::commands;
use semaphore_agent::exit_code::Exit;
use semaphore_agent::job_init;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let exit = match cli.command {
        Command::Run(args) => commands::run::run(&args),
        Command::Serve(options) => commands::serve::serve(*options),
        Command::Start(options) => commands::start::start(*options),
        Command::Version => commands::version::version(),
        Command::JobInit => match job_init::run() {
            Ok(()) => Exit::Success,
            Err(error) => {
                let _ = writeln!(io::stderr(), "error: the job's first process failed: {error}");
                Exit::Failure
            }
        },
    };
    exit.into()
}
