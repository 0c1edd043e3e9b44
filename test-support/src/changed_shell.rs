//! Jobs that tamper with their own shell, and the commands after that, which must still run.

use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

use actors::log::event::LogEvent;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::{Finished, World};

/// A command that runs after the change. It only uses absolute paths and literal words, which a job can't
/// redefine.
pub const SECOND: &str = "/bin/echo second";

/// A failing command. If the job continues after it, the command did not run.
pub const THIRD: &str = "/bin/sh -c '/bin/echo third; exit 3'";

/// Time limit for a job of short commands on a busy machine.
pub const SHORT_JOB: Duration = Duration::from_mins(1);

/// Time limit for a Docker job of short commands on a busy machine.
pub const DOCKER_JOB: Duration = Duration::from_mins(1);

/// Time limit for a job whose shell never responds, including the session's own time limit.
pub const VAIN_WAIT: Duration = Duration::from_secs(100);

/// Returns the commands of a job that makes this change.
pub fn with_change(change: &str) -> [&str; 5] {
    ["/bin/echo before", change, SECOND, THIRD, "/bin/echo not reached"]
}

/// Returns the commands of a job whose shell was changed before the job began.
pub fn without_change() -> [&'static str; 4] {
    ["/bin/echo before", SECOND, THIRD, "/bin/echo not reached"]
}

/// Runs a job to its end. Returns `None` if it does not end in time.
pub fn run_within(
    world: &World,
    patience: Duration,
    job: &Value,
    adapt: impl FnOnce(&mut Command),
) -> Option<Finished> {
    let path = world.file("job.json", job.to_string());
    let mut command = world.agent();
    command.args(["run", "--output", "json"]).arg(path);
    adapt(&mut command);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = Pid::from_raw(child.id().try_into().unwrap());
    let (sender, ended) = mpsc::channel::<Output>();
    let waiter = std::thread::spawn(move || sender.send(child.wait_with_output().unwrap()));
    let output = ended.recv_timeout(patience);
    if output.is_err() {
        kill(pid, Signal::SIGKILL).unwrap();
    }
    waiter.join().unwrap().unwrap();
    output.ok().map(|output| Finished::of(&output))
}

fn has_failed(finished: &Finished) -> bool {
    matches!(finished.events.last(), Some(LogEvent::JobFinished { result, .. }) if result == "failed")
}

fn line(text: &str, exit_code: i32) -> (String, i32) {
    (format!("{text}\n"), exit_code)
}

/// Removes bash's messages about a readonly `_`, which it prints at each command.
fn without_complaints(output: &str) -> String {
    output.split_inclusive('\n').filter(|line| !line.ends_with(" _: readonly variable\n")).collect()
}

/// Returns whether each command ran exactly once, and the failing one failed the job.
fn ran(finished: &Finished, has_change: bool) -> bool {
    let mut commands = finished.commands();
    // A slow login profile gets a step of its own.
    if matches!(&finished.steps()[..], [(title, _, 0), ..] if title == "Preparing the job") {
        commands.remove(0);
    }
    if has_change && commands.len() > 1 && commands.remove(1).1 != 0 {
        return false;
    }
    for (output, _) in &mut commands {
        *output = without_complaints(output);
    }
    commands == [line("before", 0), line("second", 0), line("third", 3)] && has_failed(finished)
}

/// Returns whether the job failed at the last command, with a message of the agent about the shell.
fn reported_failure(finished: &Finished) -> bool {
    let Some((output, exit_code)) = finished.commands().pop() else {
        return false;
    };
    let own = output.lines().filter(|line| !line.contains("bash:"));
    let mut messages = own.filter(|line| line.contains("shell") || line.contains("session"));
    has_failed(finished) && exit_code != 0 && messages.next().is_some()
}

fn description(finished: Option<&Finished>) -> String {
    let steps = |finished: &Finished| format!("{:?} {}", finished.steps(), finished.stderr);
    finished.map_or_else(|| "hangs".into(), steps)
}

/// Returns a description of the failure, or `None` if every command ran as without the change.
pub fn failure(finished: Option<&Finished>, has_change: bool) -> Option<String> {
    let is_well = finished.is_some_and(|finished| ran(finished, has_change));
    (!is_well).then(|| description(finished))
}

/// Returns a description of the failure, or `None` if every command ran or one failed with a message.
pub fn unexplained_failure(finished: Option<&Finished>) -> Option<String> {
    let is_well =
        finished.is_some_and(|finished| ran(finished, true) || reported_failure(finished));
    (!is_well).then(|| description(finished))
}

/// Runs `test` for each of `cases`, two at a time. Returns the failed cases, each with its description.
pub fn failed_cases<T: Send + ToString>(
    cases: impl IntoIterator<Item = T>,
    test: impl Fn(&T) -> Option<String> + Sync,
) -> Vec<String> {
    let cases: Mutex<Vec<T>> = Mutex::new(cases.into_iter().collect());
    let found = Mutex::new(Vec::new());
    let next = || cases.lock().unwrap().pop();
    let judge = |case: T| {
        if let Some(wrong) = test(&case) {
            found.lock().unwrap().push(format!("{}: {wrong}", shortened(&case.to_string())));
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| std::iter::from_fn(next).for_each(judge));
        }
    });
    found.into_inner().unwrap()
}

/// Runs `test` for each of `changes`; see [`failed_cases`].
pub fn failed_changes<T: Send + ToString + AsRef<str>>(
    changes: impl IntoIterator<Item = T>,
    test: impl Fn(&str) -> Option<String> + Sync,
) -> Vec<String> {
    failed_cases(changes, |change| test(change.as_ref()))
}

fn shortened(case: &str) -> String {
    let line = case.replace('\n', "; ");
    line.get(..200).map_or(line.clone(), |beginning| format!("{beginning}…"))
}

/// Fails unless the list of failed cases is empty.
pub fn assert_none(failed_cases: &[String]) {
    assert!(failed_cases.is_empty(), "{} cases:\n{}", failed_cases.len(), failed_cases.join("\n"));
}

/// Encodes a script for `base64 -d`. Trailing newlines make the length a multiple of three, so that no
/// padding is needed.
fn encoded(script: &str) -> String {
    let ends = script.len().next_multiple_of(3) - script.len();
    crate::base64(format!("{script}{}", "\n".repeat(ends)).as_bytes())
}

/// Gives the main container an entrypoint that runs `set_up` before the shell. The entrypoint contains no `$`
/// that Compose would substitute.
pub fn set_up_by(job: &mut Value, set_up: &str) {
    let main = &mut job["compose"]["containers"][0];
    main["entrypoint"] =
        r#"/bin/sh -c 'eval "`env | sed -n s/^SET_UP=//p | base64 -d`"' set-up"#.into();
    let set_up = format!("{set_up}\nunset SET_UP; exec \"$@\"");
    main["env_vars"] = crate::docker::variables(&[("SET_UP", encoded(&set_up).as_bytes())]);
}

/// Gives the shell in the job's container this startup file.
pub fn with_startup_file(job: &mut Value, startup: &str) {
    let encoded = encoded(&format!("{startup}\n"));
    set_up_by(job, &format!("echo {encoded} | base64 -d >/root/.bashrc"));
}

/// Returns the words that bash lists for `compgen -A KIND`.
pub fn words_of_bash(kind: &str) -> Vec<String> {
    let output = Command::new("bash").args(["-c", &format!("compgen -A {kind}")]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}
