//! The performance figures that this agent promises, measured on this machine: `cargo bench [-- PART OF A
//! NAME]`.
//!
//! Each figure is the median of several runs. Some have a floor, the best that the machine can do; figure and
//! floor are measured alternately, so that load on the machine affects both.
//!
//! Jobs run in this process where the times of their log events matter, else in the agent's binary.

mod docker;
mod place;
mod serve;
mod start;
mod table;

use std::error::Error;
use std::fmt::Display;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use actix::{Actor as _, Arbiter, System};
use actors::log::buffer::{Append, LogBuffer, Published, ReadFrom};
use actors::log::event::LogEvent;
use futures_util::future::LocalBoxFuture;
use nix::libc;
use nix::pty::openpty;
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
use semaphore_agent::executors::docker::watch;
use semaphore_agent::executors::shell::job_init;
use semaphore_agent::state::log_file::FileSpool;
use serde_json::json;
use test_support::agent_program;
use tokio::time::{Instant, sleep};

use crate::place::Place;
use crate::table::{Figure, Target};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Length of a line with its newline, in bytes.
const LINE: u32 = 80;
/// Number of lines in the large output: 50 MB.
const LINES: u32 = 625_000;
const OUTPUT: u32 = LINE * LINES;

/// Number of short commands in a job.
const COMMANDS: u32 = 200;

/// Number of lines that are printed slowly.
const SLOW_LINES: usize = 50;

/// Number of events in a long log, and how many of them a reader reads.
const EVENTS: u64 = 500_000;
const LAST: u64 = 10;

fn main() -> Result<()> {
    let argument = std::env::args().skip(1).find(|given| given != "--bench");
    // The agent starts its guards by executing its own program, which is this one in a benchmark.
    match argument.as_deref() {
        Some("job-init") => return Ok(job_init::run()?),
        Some("docker-watch") => return Ok(watch::run()?),
        _ => {}
    }
    // Made outside of the runtime, as it briefly needs one of its own.
    let place = Place::make()?;
    System::new().block_on(measure_all(&place, &argument.unwrap_or_default()))
}

/// Measures all figures whose names contain `part`.
async fn measure_all(place: &Place, part: &str) -> Result<()> {
    // A measurement only runs when its future is awaited.
    let figures: [(&str, LocalBoxFuture<'_, Result<Figure>>); 31] = [
        ("50 MB of 80-byte lines by cat, MB/s", Box::pin(large_output(place))),
        ("200 x `echo hi`, ms per command", Box::pin(short_commands(place, "echo hi", 1.0))),
        ("200 x `true`, ms per command", Box::pin(short_commands(place, "true", 0.7))),
        ("a line until it is readable, p99, ms", Box::pin(latency(place))),
        ("log bytes per byte of 80-byte lines", Box::pin(log_size(place))),
        ("last 10 of 500,000 events, ms", Box::pin(last_events(place))),
        ("peak memory over the 50 MB job, MB", Box::pin(peak_memory(place))),
        ("`agent version`, ms", Box::pin(async { start_up(place) })),
        ("serve: start to first answer, ms", Box::pin(async { serve::start_up(place) })),
        (
            "serve: job `true` to `finished`, ms",
            Box::pin(async { serve::short_job(place, "true", 10.0) }),
        ),
        (
            "serve: job `echo hi` to `finished`, ms",
            Box::pin(async { serve::short_job(place, "echo hi", 11.0) }),
        ),
        ("serve: archived to `teardown_finished`, ms", Box::pin(async { serve::teardown(place) })),
        ("serve: stop to `finished`, ms", Box::pin(async { serve::stop(place) })),
        (
            "serve: GET last 10 of 30,000 events, ms",
            Box::pin(async { serve::last_events(place, 1, 1.0) }),
        ),
        (
            "serve: the same, 10 readers, p99, ms",
            Box::pin(async { serve::last_events(place, 10, 5.0) }),
        ),
        ("serve: a whole log of 79 MB, MB/s", Box::pin(async { serve::whole_log(place) })),
        ("serve: memory, idle, MB", Box::pin(async { serve::memory(place, 0, 14.0) })),
        ("serve: memory after 100 jobs, MB", Box::pin(async { serve::memory(place, 100, 14.0) })),
        ("start: `run-job` to first command, ms", Box::pin(async { start::first_command(place) })),
        ("start: last command to result known, ms", Box::pin(async { start::result_known(place) })),
        ("start: job's end to next job's command, ms", Box::pin(async { start::next_job(place) })),
        ("start: 50 MB at the control plane, s", Box::pin(async { start::large_log(place) })),
        ("start: memory, idle, MB", Box::pin(async { start::memory(place, false, 12.0) })),
        (
            "start: memory after the 50 MB job, MB",
            Box::pin(async { start::memory(place, true, 24.0) }),
        ),
        (
            "docker: arrival to first command, s",
            Box::pin(docker::first_command(place, 1, Target::AboveFloor(0.15))),
        ),
        (
            "docker: the same, 3 side containers, s",
            Box::pin(docker::first_command(place, 4, Target::TimesFloor(1.2))),
        ),
        ("docker: 100 x `true`, s", Box::pin(docker::short_commands(place))),
        ("docker: end to everything gone, s", Box::pin(docker::clean_up(place))),
        ("docker: stop to `finished`, ms", Box::pin(async { docker::stop(place, false) })),
        ("docker: stop to container gone, s", Box::pin(async { docker::stop(place, true) })),
        ("docker: 50 MB by cat, MB/s", Box::pin(docker::large_output(place))),
    ];
    println!(
        "{:<41} {:>25} {:>25} {:>5}  target",
        "median (min .. max)", "floor", "figure", "ratio"
    );
    for (name, measured) in figures {
        if name.contains(part) {
            println!("{name:<41} {}", measured.await?);
        }
    }
    Ok(())
}

async fn large_output(place: &Place) -> Result<Figure> {
    let megabytes = f64::from(OUTPUT) / 1e6;
    let cat = place.cat();
    let (mut floor, mut runs) = (Vec::new(), Vec::new());
    for _ in 0..9 {
        floor.push(megabytes / bare_cat(&place.lines)?.as_secs_f64());
        let log = place.run_job(&[&cat]).await?;
        runs.push(megabytes / log.span_of(&cat)?.as_secs_f64());
    }
    Ok(Figure { floor, runs, target: Target::OfFloor(0.8) })
}

/// Measures `cat` to a terminal whose output is read and discarded.
fn bare_cat(file: &Path) -> Result<Duration> {
    let pair = openpty(None, None)?;
    let mut modes = tcgetattr(&pair.slave)?;
    modes.local_flags.remove(LocalFlags::ECHO);
    tcsetattr(&pair.slave, SetArg::TCSANOW, &modes)?;
    let mut terminal = File::from(pair.master);
    let mut buffer = vec![0; 64 * 1024];

    let begun = Instant::now();
    // The command holds the terminal's slave end until it is dropped.
    let mut cat = Command::new("cat").arg(file).stdout(pair.slave).stdin(Stdio::null()).spawn()?;
    let mut received = 0;
    loop {
        match terminal.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => received += read,
            // The slave end is closed.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => break,
            Err(error) => return Err(error.into()),
        }
    }
    let took = begun.elapsed();
    cat.wait()?;
    if received != usize::try_from(OUTPUT + LINES)? {
        return Err(format!("the bare terminal gave {received} bytes").into());
    }
    Ok(took)
}

async fn short_commands(place: &Place, command: &str, target: f64) -> Result<Figure> {
    let commands = vec![command; usize::try_from(COMMANDS)?];
    let mut runs = Vec::new();
    for _ in 0..9 {
        let log = place.run_job(&commands).await?;
        runs.push(ms(log.span_of(command)? / COMMANDS));
    }
    Ok(Figure::without_floor(runs, target))
}

async fn latency(place: &Place) -> Result<Figure> {
    let slow_lines =
        format!("for _ in {{1..{SLOW_LINES}}}; do echo $EPOCHREALTIME; sleep 0.2; done");
    let mut runs = Vec::new();
    for _ in 0..3 {
        let log = place.run_job(&[&slow_lines]).await?;
        let mut delays = Vec::new();
        for (event, readable) in &log.events {
            if let LogEvent::CmdOutput { output, .. } = event {
                let readable = readable.wall.duration_since(SystemTime::UNIX_EPOCH)?;
                for printed in output.lines().filter_map(|line| line.parse().ok()) {
                    delays.push(ms(readable.saturating_sub(Duration::from_secs_f64(printed))));
                }
            }
        }
        if delays.len() != SLOW_LINES {
            return Err(format!("{} of {SLOW_LINES} lines came", delays.len()).into());
        }
        delays.sort_by(f64::total_cmp);
        runs.push(delays[(SLOW_LINES * 99).div_ceil(100) - 1]);
    }
    Ok(Figure::without_floor(runs, 20.0))
}

async fn log_size(place: &Place) -> Result<Figure> {
    let mut runs = Vec::new();
    for _ in 0..3 {
        let log = place.run_job(&[&place.cat()]).await?;
        let printed: usize = log.events.iter().map(|(event, _)| printed(event)).sum();
        if printed != usize::try_from(OUTPUT)? + "Exporting SEMAPHORE_JOB_RESULT\n".len() {
            return Err(format!("the log has {printed} bytes of output").into());
        }
        runs.push(f64::from(log.size) / f64::from(OUTPUT));
    }
    Ok(Figure {
        // Only the newline needs an escape.
        floor: vec![f64::from(LINE + 1) / f64::from(LINE)],
        runs,
        target: Target::AtMost(1.05),
    })
}

fn printed(event: &LogEvent) -> usize {
    match event {
        LogEvent::CmdOutput { output, .. } => output.len(),
        _ => 0,
    }
}

async fn last_events(place: &Place) -> Result<Figure> {
    let spool = FileSpool::create(place.world.directory().join("long.jsonl"))?;
    let arbiter = Arbiter::new();
    let buffer = LogBuffer::new(Box::new(spool), Published::default());
    let buffer = LogBuffer::start_in_arbiter(&arbiter.handle(), |_| buffer);
    for number in 0..EVENTS {
        let event = LogEvent::cmd_output(format!("line {number}\n"));
        // Waiting for all of them would only take longer.
        if (number + 1) % 1000 == 0 {
            buffer.send(Append { event }).await??;
        } else {
            buffer.do_send(Append { event });
        }
    }

    let line = EVENTS - LAST;
    let mut runs = Vec::new();
    for _ in 0..100 {
        let begun = Instant::now();
        let range = buffer.send(ReadFrom { line }).await??;
        let mut lines = Vec::with_capacity(usize::try_from(range.end - range.start)?);
        range.reader().read_to_end(&mut lines)?;
        runs.push(ms(begun.elapsed()));
        let first = LogEvent::decode(lines.split(|byte| *byte == b'\n').next().unwrap_or(&[]))?;
        if !matches!(first, LogEvent::CmdOutput { output, .. } if output == format!("line {line}\n"))
        {
            return Err("the last events are not where they should be".into());
        }
    }
    arbiter.stop();
    Ok(Figure::without_floor(runs, 1.0))
}

async fn peak_memory(place: &Place) -> Result<Figure> {
    let job = place.world.directory().join("job.json");
    let request = json!({"job_id": "1", "commands": [{"directive": place.cat()}]});
    fs::write(&job, request.to_string())?;
    let mut runs = Vec::new();
    for _ in 0..5 {
        let mut agent = place.world.agent();
        agent.args(["run", "--output", "json"]).arg(&job);
        let mut agent = agent.stdout(Stdio::null()).spawn()?;
        // The peak only rises, so at most the last moments are missed.
        let mut peak = 0.0;
        let ended = loop {
            peak = memory_in_mb(agent.id(), "VmHWM:")?.unwrap_or(peak);
            match agent.try_wait()? {
                Some(ended) => break ended,
                None => sleep(Duration::from_millis(5)).await,
            }
        };
        if !ended.success() {
            return Err(format!("the agent ended with {ended}").into());
        }
        runs.push(peak);
    }
    Ok(Figure::without_floor(runs, 24.0))
}

/// Returns a process's memory in MB, from this field of its status; `None` if the process has ended.
fn memory_in_mb(process: impl Display, field: &str) -> Result<Option<f64>> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let found = status.lines().find_map(|line| line.strip_prefix(field));
    let kibibytes = found.and_then(|found| found.trim().strip_suffix(" kB"));
    let kibibytes: Option<f64> = kibibytes.map(str::parse).transpose()?;
    Ok(kibibytes.map(|kibibytes| kibibytes * 1024.0 / 1e6))
}

fn start_up(place: &Place) -> Result<Figure> {
    let nothing = compile_empty_program(place.world.directory())?;
    let (mut floor, mut runs) = (Vec::new(), Vec::new());
    for _ in 0..200 {
        floor.push(ms(wall(&mut Command::new(&nothing))?));
        runs.push(ms(wall(Command::new(agent_program()).arg("version"))?));
    }
    Ok(Figure { floor, runs, target: Target::AtMost(3.0) })
}

/// Compiles the smallest possible program, linked statically if this machine can do that.
fn compile_empty_program(directory: &Path) -> Result<PathBuf> {
    let (source, program) = (directory.join("nothing.c"), directory.join("nothing"));
    fs::write(&source, "int main(void) { return 0; }\n")?;
    let compile = |kind: &[&str]| {
        let mut compiler = Command::new("cc");
        compiler.args(kind).arg("-o").arg(&program).arg(&source);
        compiler.output().map(|done| done.status.success())
    };
    if !compile(&["-static"])? {
        println!("(no static C library here: the floor of `agent version` is a dynamic program)");
        if !compile(&[])? {
            return Err("cc can't compile the least program".into());
        }
    }
    Ok(program)
}

fn wall(command: &mut Command) -> Result<Duration> {
    command.stdout(Stdio::null());
    let begun = Instant::now();
    let ended = command.status()?;
    let took = begun.elapsed();
    if ended.success() { Ok(took) } else { Err(format!("{command:?} ended with {ended}").into()) }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
