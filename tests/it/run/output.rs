//! The output of `agent run`: the job's log in each format, exit codes, broken readers.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Output, Stdio};

use actors::log::event::LogEvent;
use nix::pty::{OpenptyResult, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use test_support::{World, job_of, processes_with, wait_for_end, wait_for_file};

const COLOURFUL: &str = r"printf '\033[31mred\033[0m and \033[2Kcleared\n'";

/// Returns a command for `agent run` with a job of these commands.
fn agent_run(world: &World, commands: &[&str], arguments: &[&str]) -> Command {
    let path = world.file("job.json", job_of(commands));
    let mut command = world.agent();
    command.arg("run").args(arguments).arg(path);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn finished(mut command: Command) -> Output {
    wait_for_end(command.spawn().unwrap())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_owned()).unwrap()
}

/// Replaces all durations by `TIME`.
fn timeless(output: &str) -> String {
    let is_unit = |word: &str| matches!(word.trim_end_matches(','), "ms" | "s" | "min");
    let mut lines = Vec::new();
    for line in output.lines() {
        let mut words: Vec<&str> = Vec::new();
        for word in line.split(' ') {
            let is_number = |last: &&str| last.parse::<f64>().is_ok();
            if is_unit(word) && words.last().is_some_and(is_number) {
                words.pop();
                words.push(if word.ends_with(',') { "TIME," } else { "TIME" });
            } else {
                words.push(word);
            }
        }
        lines.push(words.join(" "));
    }
    lines.join("\n")
}

/// Runs the agent with a terminal as its standard output. Returns the text on the terminal.
fn on_a_terminal(mut command: Command) -> (String, Output) {
    let OpenptyResult { master, slave } = openpty(None, None).unwrap();
    let child = command.stdout(slave).spawn().unwrap();
    // `command` still holds the slave end: without it, the output ends with the agent.
    drop(command);
    let mut master = File::from(master);
    let reader = std::thread::spawn(move || {
        let mut shown = Vec::new();
        // Reading from a terminal whose slave end is closed fails.
        let _ = master.read_to_end(&mut shown);
        shown
    });
    let output = wait_for_end(child);
    let shown = text(&reader.join().unwrap());
    assert_eq!(text(&output.stderr), "");
    (shown.replace("\r\n", "\n"), output)
}

fn assert_nothing_left(world: &World) {
    let marker = format!("HOME={}", world.home().display());
    assert_eq!(processes_with(&marker), [""; 0]);
    assert_eq!(std::fs::read_dir(world.state()).unwrap().count(), 0);
}

#[test]
fn plain_has_headings_output_and_exit_codes() {
    let world = World::new();
    let commands = ["echo hi", "printf 'no newline'", "echo a\necho b\n(exit 3)"];
    let output = finished(agent_run(&world, &commands, &["--output", "plain"]));
    let shown = timeless(&text(&output.stdout));
    let steps = "\
▶ echo hi
hi
✓ exit code 0, TIME

▶ printf 'no newline'
no newline
✓ exit code 0, TIME

▶ echo a … (2 more lines)
a
b
✗ exit code 3, TIME

";
    assert!(shown.starts_with(steps), "{shown}");
    assert!(shown.contains("\nJob failed in TIME, 3 steps"), "{shown}");
    assert_eq!(text(&output.stderr), "");
    assert_nothing_left(&world);
}

#[test]
fn without_a_terminal_every_format_but_json_is_plain() {
    let world = World::new();
    let show = |arguments: &[&str]| {
        let output = finished(agent_run(&world, &[COLOURFUL], arguments));
        assert_eq!(output.status.code(), Some(0));
        let shown = timeless(&text(&output.stdout));
        // The order of the slowest steps may vary.
        shown.split_once("\nJob passed").unwrap().0.to_owned()
    };
    let plain = show(&["--output", "plain"]);
    assert!(plain.contains("\nred and cleared\n"), "{plain:?}");
    assert!(!plain.contains('\x1b'), "{plain:?}");
    assert_eq!(show(&["--output", "pretty"]), plain);
    assert_eq!(show(&[]), plain);
}

#[test]
fn json_is_event_lines_and_nothing_else() {
    for broken in [false, true] {
        let world = World::new();
        let last = if broken { "(exit 7)" } else { "true" };
        let commands = [COLOURFUL, last];
        let output = finished(agent_run(&world, &commands, &["--output", "json"]));
        let events: Vec<_> = output
            .stdout
            .split_inclusive(|byte| *byte == b'\n')
            .map(|line| LogEvent::decode(line).unwrap())
            .collect();
        assert!(matches!(events.first(), Some(LogEvent::JobStarted { .. })));
        let expected = if broken { "failed" } else { "passed" };
        assert!(
            matches!(events.last(), Some(LogEvent::JobFinished { result, .. }) if result == expected),
            "{events:?}"
        );
        let is_red = |event: &LogEvent| matches!(event, LogEvent::CmdOutput { output, .. } if output.contains("\x1b[31mred\x1b[0m"));
        assert!(events.iter().any(is_red), "{events:?}");
        assert_eq!(text(&output.stderr), "");
    }
}

#[test]
fn a_terminal_gets_colours() {
    for arguments in [&[][..], &["--output", "pretty"]] {
        let world = World::new();
        let (shown, output) = on_a_terminal(agent_run(&world, &[COLOURFUL], arguments));
        assert_eq!(output.status.code(), Some(0));
        for expected in [
            "\x1b[1;36m▶\x1b[0m \x1b[1mprintf",
            "\x1b[31mred\x1b[0m and",
            "\x1b[32m✓ exit code 0, ",
            "\x1b[1;32mJob passed\x1b[0m in ",
        ] {
            assert!(shown.contains(expected), "{expected:?} in {shown:?}");
        }
    }
}

#[test]
fn a_terminal_gets_the_requested_format() {
    let world = World::new();
    let (shown, _) = on_a_terminal(agent_run(&world, &[COLOURFUL], &["--output", "plain"]));
    assert!(shown.contains("red and cleared\n"), "{shown:?}");
    assert!(!shown.contains('\x1b'), "{shown:?}");
    let (shown, _) = on_a_terminal(agent_run(&world, &[COLOURFUL], &["--output", "json"]));
    for line in shown.lines() {
        LogEvent::decode(format!("{line}\n").as_bytes()).unwrap();
    }
}
#[test]
fn no_color_is_honoured_on_a_terminal() {
    let world = World::new();
    let run = |value: &str| {
        let mut command = agent_run(&world, &["echo hi", "(exit 1)"], &[]);
        command.env("NO_COLOR", value);
        on_a_terminal(command).0
    };
    let shown = run("1");
    assert!(shown.contains("▶ echo hi\nhi\n✓ exit code 0, "), "{shown:?}");
    assert!(!shown.contains('\x1b'), "{shown:?}");
    // An empty value counts as unset: https://no-color.org
    assert!(run("").contains("\x1b[1;36m▶"));
}

#[test]
fn no_color_leaves_the_jobs_own_colours_alone() {
    let world = World::new();
    let mut command = agent_run(&world, &[COLOURFUL], &[]);
    command.env("NO_COLOR", "1");
    let (shown, _) = on_a_terminal(command);
    assert!(shown.contains("\x1b[31mred\x1b[0m and"), "{shown:?}");
}

#[test]
fn colours_that_a_job_leaves_on_end_with_its_step() {
    let world = World::new();
    let (shown, _) = on_a_terminal(agent_run(&world, &[r"printf '\033[41mred\n'"], &[]));
    let (_, after) = shown.split_once("\x1b[41mred\n").unwrap();
    assert!(after.starts_with("\x1b[0m"), "{shown:?}");
}

#[test]
fn exit_codes_are_results() {
    for (commands, code, result) in [
        (&["true"][..], 0, "passed"),
        (&["false"], 1, "failed"),
        (&["(exit 2)"], 1, "failed"),
        (&["exit 0"], 1, "failed"),
        (&["(exit 130)", "touch ~/next"], 130, "stopped"),
        (&["return 130", "touch ~/next"], 130, "stopped"),
        (&["export SEMAPHORE_JOB_RESULT=passed; (exit 130)", "touch ~/next"], 0, "passed"),
        (&["SEMAPHORE_JOB_RESULT=failed", "(exit 130)", "touch ~/next"], 1, "failed"),
        (&["SEMAPHORE_JOB_RESULT=splendid", "(exit 130)", "touch ~/next"], 130, "stopped"),
    ] {
        let world = World::new();
        let output = finished(agent_run(&world, commands, &[]));
        let shown = text(&output.stdout);
        assert_eq!(output.status.code(), Some(code), "{commands:?}: {shown}");
        assert!(shown.contains(&format!("Job {result} in ")), "{shown}");
        assert_eq!(text(&output.stderr), "");
        assert!(!world.home().join("next").exists(), "{shown}");
        assert_nothing_left(&world);
    }
}

#[test]
fn a_job_that_cannot_start_fails_with_a_reason() {
    let world = World::new();
    let path = world.file("job.yaml", job_of(&["touch ~/executed"]));
    let mut command = world.agent();
    // A file at the path of the state directory.
    command.arg("run").arg("--state-dir").arg(path.join("state")).arg(&path);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = finished(command);
    assert_eq!(output.status.code(), Some(1));
    let stderr = text(&output.stderr);
    assert!(stderr.contains("job.yaml/state can't be used: "), "{stderr}");
    assert!(!world.home().join("executed").exists());
}

#[test]
fn the_summary_names_the_slowest_steps() {
    let world = World::new();
    let commands = ["sleep 0.3", "true", "sleep 0.9", "false"];
    let output = finished(agent_run(&world, &commands, &["--output", "plain"]));
    let shown = text(&output.stdout);
    let (_, summary) = shown.split_once("\nJob failed in ").unwrap();
    let lines: Vec<&str> = summary.lines().collect();
    assert!(lines[0].ends_with(" s, 4 steps"), "{summary}");
    assert!(lines[1].ends_with(" ms  sleep 0.9") || lines[1].ends_with(" s  sleep 0.9"));
    assert!(lines[2].ends_with(" ms  sleep 0.3"), "{summary}");
    assert!(lines.len() <= 4, "{summary}");
}
#[test]
fn a_job_without_epilogues_shows_its_own_steps_only() {
    let world = World::new();
    let output = finished(agent_run(&world, &["echo hi"], &["--output", "plain"]));
    let shown = text(&output.stdout);
    assert!(!shown.contains("SEMAPHORE_JOB_RESULT"), "{shown}");
    assert_eq!(shown.matches("✓ exit code").count(), 1, "{shown}");
}

/// Reads up to the line `last`. Dropping the result closes the pipe.
fn read_up_to(child: &mut Child, last: &str) -> BufReader<std::process::ChildStdout> {
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while line.trim_end() != last {
        line.clear();
        assert_ne!(lines.read_line(&mut line).unwrap(), 0, "no {last:?}");
    }
    lines
}

#[test]
fn a_reader_that_leaves_stops_a_job_that_goes_on_printing() {
    for form in ["plain", "pretty"] {
        let world = World::new();
        let mut command =
            agent_run(&world, &["echo first; yes", "touch ~/next"], &["--output", form]);
        let mut child = command.spawn().unwrap();
        drop(read_up_to(&mut child, "first"));
        let output = wait_for_end(child);
        assert_eq!(output.status.code(), Some(130));
        assert_eq!(text(&output.stderr), "");
        assert!(!world.home().join("next").exists());
        assert_nothing_left(&world);
    }
}

/// One failed write is enough to notice the closed pipe.
#[test]
fn a_reader_that_leaves_stops_a_job_that_prints_once_more() {
    let world = World::new();
    let wait = "echo first; until test -e ~/go; do sleep 0.01; done; echo second; sleep 1000";
    let mut child = agent_run(&world, &[wait, "touch ~/next"], &[]).spawn().unwrap();
    drop(read_up_to(&mut child, "first"));
    File::create(world.home().join("go")).unwrap();
    let output = wait_for_end(child);
    assert_eq!(output.status.code(), Some(130));
    assert!(!world.home().join("next").exists());
    assert_nothing_left(&world);
}

#[test]
fn a_full_disk_below_standard_output_ends_the_job_with_a_message() {
    let world = World::new();
    let mut command = agent_run(&world, &["echo first; yes", "touch ~/next"], &[]);
    command.stdout(File::options().write(true).open("/dev/full").unwrap());
    let output = finished(command);
    assert_eq!(output.status.code(), Some(1));
    let stderr = text(&output.stderr);
    assert!(stderr.contains("No space left on device"), "{stderr}");
    assert!(!world.home().join("next").exists());
    assert_nothing_left(&world);
}

/// More output than fits into a pipe.
const MUCH: &str = "seq 200000";

#[test]
fn a_slow_reader_gets_everything_and_does_not_delay_the_job() {
    let world = World::new();
    let commands = [MUCH, "touch ~/done"];
    let mut child = agent_run(&world, &commands, &["--output", "plain"]).spawn().unwrap();
    // The job has ended before anything is read.
    wait_for_file(&world.home().join("done"));
    let mut stdout = child.stdout.take().unwrap();
    let mut shown = Vec::new();
    let mut some = [0; 1000];
    loop {
        match stdout.read(&mut some).unwrap() {
            0 => break,
            read => shown.extend_from_slice(&some[..read]),
        }
        test_support::pause();
    }
    assert_eq!(wait_for_end(child).status.code(), Some(0));
    let shown = text(&shown);
    let numbers = shown.lines().filter_map(|line| line.parse::<u32>().ok());
    assert!(numbers.eq(1..=200_000), "{} bytes", shown.len());
    assert!(shown.contains("\nJob passed in "));
}

/// The shown durations are those of the job, not of the reader.
#[test]
fn a_slow_reader_changes_no_duration() {
    let world = World::new();
    let commands = [MUCH, "sleep 1.2", "touch ~/done"];
    let child = agent_run(&world, &commands, &["--output", "plain"]).spawn().unwrap();
    wait_for_file(&world.home().join("done"));
    let shown = text(&wait_for_end(child).stdout);
    let (_, step) = shown.split_once("▶ sleep 1.2\n").unwrap();
    assert!(step.starts_with("✓ exit code 0, 1."), "{}", &step[..200]);
}
#[test]
fn a_third_signal_ends_an_agent_whose_reader_is_stuck() {
    let world = World::new();
    let child = agent_run(&world, &[MUCH, "touch ~/done"], &[]).spawn().unwrap();
    wait_for_file(&world.home().join("done"));
    let pid = Pid::from_raw(child.id().try_into().unwrap());
    let mut child = child;
    // Kept open, but never read.
    let stuck = child.stdout.take().unwrap();
    // Three different signals: identical ones may be merged.
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        kill(pid, signal).unwrap();
    }
    let output = wait_for_end(child);
    assert_eq!(output.status.code(), Some(130));
    drop(stuck);
}

#[test]
fn a_job_takes_no_longer_than_its_commands() {
    let world = World::new();
    let start = std::time::SystemTime::now();
    for _ in 0..10 {
        let output = finished(agent_run(&world, &["true"], &[]));
        assert_eq!(output.status.code(), Some(0));
    }
    // Ten times the grace period, which these jobs do not need.
    let took = start.elapsed().unwrap();
    assert!(took.as_secs() < 15, "{took:?} for 10 empty jobs");
}

#[test]
fn the_version_is_printed() {
    let world = World::new();
    for arguments in [["version"], ["--version"], ["-V"]] {
        let mut command = world.agent();
        command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = finished(command);
        assert_eq!(output.status.code(), Some(0));
        let version = text(&output.stdout);
        let version = version.trim_end().trim_start_matches("agent ");
        assert_eq!(version, env!("CARGO_PKG_VERSION"));
        assert_eq!(text(&output.stderr), "");
    }
    assert!(!world.state().exists());
}

#[test]
fn the_help_lists_exit_codes_and_commands() {
    let world = World::new();
    for arguments in [&["--help"][..], &["-h"], &["help"], &["run", "--help"], &["run", "-h"]] {
        let mut command = world.agent();
        command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = finished(command);
        assert_eq!(output.status.code(), Some(0));
        let help = text(&output.stdout);
        let (_, codes) = help.split_once("Exit codes:\n").unwrap();
        let codes: Vec<_> =
            codes.lines().filter_map(|line| line.split_whitespace().next()).collect();
        assert_eq!(codes, ["0", "1", "2", "130"], "{help}");
        let expected: &[&str] = match arguments {
            ["run", _] => &[
                "--output",
                "plain",
                "json",
                "pretty",
                "--state-dir",
                "SEMAPHORE_AGENT_STATE_DIR",
                "standard input",
            ],
            _ => &["run", "version"],
        };
        for part in expected {
            assert!(help.contains(part), "no {part} in {help}");
        }
        assert!(!help.contains("job-init"), "{help}");
    }
}
