//! Wrong clocks, and clocks that are set while a job runs.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use actors::log::event::LogEvent;

use test_support::{Finished, World, job_of, wait_for_end};

/// A library that shifts the clock for programs, by the number of seconds in a file.
const CLOCK: &str = r#"
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    const char *path = getenv("TEST_CLOCK");
    FILE *file = !failed && clock == CLOCK_REALTIME && path ? fopen(path, "re") : NULL;
    long long off = 0;
    if (file) {
        if (fscanf(file, "%lld", &off) == 1) now->tv_sec += off;
        fclose(file);
    }
    return failed;
}
"#;

/// Returns a world, the library, and the file with the clock's offset.
fn world_with_clock(off: i64) -> (World, PathBuf, PathBuf) {
    let world = World::new();
    let source = world.file("clock.c", CLOCK);
    let library = source.with_extension("so");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source);
    assert!(compiler.status().unwrap().success());
    let clock = world.file("clock", off.to_string());
    (world, library, clock)
}

fn adapt(command: &mut Command, library: &Path, clock: &Path) {
    command.env("LD_PRELOAD", library).env("TEST_CLOCK", clock);
}

/// An offset that leads to 1969.
const BEFORE_1970: i64 = -100 * 365 * 86400;

const HOUR: i64 = 3600;

/// Certificates and HTTP dates can't express such a time.
#[test]
fn agents_with_http_refuse_a_clock_before_1970() {
    let (world, library, clock) = world_with_clock(BEFORE_1970);
    let modes: [&[&str]; 2] = [
        &["serve", "--auth-token-secret", "a-secret-of-a-test", "--port", "0"],
        &["start", "--endpoint", "127.0.0.1:1", "--token", "a-token-of-a-test"],
    ];
    for mode in modes {
        let mut agent = world.agent();
        adapt(agent.args(mode), &library, &clock);
        let child = agent.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let ended = wait_for_end(child);
        let message = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(1), "{message}");
        assert!(message.contains("clock") && !message.contains("panicked"), "{message}");
    }
}

#[test]
fn a_clock_before_1970_stops_no_job() {
    for output in ["json", "plain"] {
        let (world, library, clock) = world_with_clock(BEFORE_1970);
        let path = world.file("job.json", job_of(&["echo hi"]));
        let mut agent = world.agent();
        agent.args(["run", "--output", output]).arg(path);
        adapt(&mut agent, &library, &clock);
        let child = agent.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let ended = wait_for_end(child);
        let message = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!((ended.status.code(), message.as_str()), (Some(0), ""));
    }
}

/// Runs a job during which the clock is set by `jump` seconds.
fn run_over_a_jump(jump: i64) -> Finished {
    let (world, library, clock) = world_with_clock(0);
    let jump = format!("echo {jump} >{0}.new; mv {0}.new {0}", clock.display());
    let path = world.file("job.json", job_of(&[&jump, "true"]));
    let running = world.start_file_with(&path, |command| adapt(command, &library, &clock));
    let finished = running.finish();
    assert_eq!(finished.result(), "passed", "{finished:?}");
    finished
}

/// Clients compute durations from two timestamps.
#[test]
fn a_clock_that_is_set_changes_no_duration() {
    for jump in [-HOUR, HOUR] {
        let finished = run_over_a_jump(jump);
        let mut steps = 0;
        for event in &finished.events {
            if let LogEvent::CmdFinished { directive, started_at, finished_at, .. } = event {
                let took = i128::from(*finished_at) - i128::from(*started_at);
                assert!((0..120).contains(&took), "{directive} took {took} s after {jump} s");
                steps += 1;
            }
        }
        assert_eq!(steps, 5, "{finished:?}");
    }
}
