//! Jobs that change their shell, and the commands after it that must run all the same.

use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

use actors::log::event::LogEvent;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::{Finished, World};

/// A command that runs after the change. Absolute paths and literal words: a job can redefine none of it.
pub const SECOND: &str = "/bin/echo second";

/// As above; a job that goes on after it has not run it.
pub const THIRD: &str = "/bin/sh -c '/bin/echo third; exit 3'";

/// How long a job of short commands takes at most, on a machine that does much else.
pub const SHORT_JOB: Duration = Duration::from_mins(1);

/// As above, with containers that come and go.
pub const DOCKER_JOB: Duration = Duration::from_mins(1);

/// How long the session may wait in vain for a shell that will never answer, and a job around it.
pub const VAIN_WAIT: Duration = Duration::from_secs(100);

/// The commands of a job that makes this change.
pub fn with_change(change: &str) -> [&str; 5] {
    ["/bin/echo before", change, SECOND, THIRD, "/bin/echo not reached"]
}

/// The commands of a job whose shell was changed before it began.
pub fn without_change() -> [&'static str; 4] {
    ["/bin/echo before", SECOND, THIRD, "/bin/echo not reached"]
}

/// Runs a job to its end; nothing if it does not end in time.
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

/// Without what bash says about a readonly `_` at each command.
fn without_complaints(output: &str) -> String {
    output.split_inclusive('\n').filter(|line| !line.ends_with(" _: readonly variable\n")).collect()
}

/// Whether each command ran exactly, and the failing one failed the job.
fn ran(finished: &Finished, has_change: bool) -> bool {
    let mut commands = finished.commands();
    // What a slow profile prints is shown.
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

/// Whether a command failed in place of one that could not run, with the agent's own words about it, and
/// nothing went on.
fn said_so(finished: &Finished) -> bool {
    let Some((output, exit_code)) = finished.commands().pop() else {
        return false;
    };
    let own = output.lines().filter(|line| !line.contains("bash:"));
    let mut about_it = own.filter(|line| line.contains("shell") || line.contains("session"));
    has_failed(finished) && exit_code != 0 && about_it.next().is_some()
}

fn told(finished: Option<&Finished>) -> String {
    let steps = |finished: &Finished| format!("{:?} {}", finished.steps(), finished.stderr);
    finished.map_or_else(|| "hangs".into(), steps)
}

/// What is wrong, unless every command ran as if nothing had been changed.
pub fn harm(finished: Option<&Finished>, has_change: bool) -> Option<String> {
    let is_well = finished.is_some_and(|finished| ran(finished, has_change));
    (!is_well).then(|| told(finished))
}

/// What is wrong, unless every command ran, or one failed with a line that says why.
pub fn silent_harm(finished: Option<&Finished>) -> Option<String> {
    let is_well = finished.is_some_and(|finished| ran(finished, true) || said_so(finished));
    (!is_well).then(|| told(finished))
}

/// Does this with each of `cases`, a few at a time; the cases with something wrong, and what it is.
pub fn harmed<T: Send + ToString>(
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

/// As above, with changes.
pub fn harmed_by<T: Send + ToString + AsRef<str>>(
    changes: impl IntoIterator<Item = T>,
    test: impl Fn(&str) -> Option<String> + Sync,
) -> Vec<String> {
    harmed(changes, |change| test(change.as_ref()))
}

fn shortened(case: &str) -> String {
    let line = case.replace('\n', "; ");
    line.get(..200).map_or(line.clone(), |beginning| format!("{beginning}…"))
}

/// Fails with a line for each of them.
pub fn assert_none(harmed: &[String]) {
    assert!(harmed.is_empty(), "{} cases:\n{}", harmed.len(), harmed.join("\n"));
}

/// A script for `base64 -d`, which wants no end cut short.
fn encoded(script: &str) -> String {
    let ends = script.len().next_multiple_of(3) - script.len();
    crate::base64(format!("{script}{}", "\n".repeat(ends)).as_bytes())
}

/// Below an entrypoint that does this in the container, before it becomes the shell. Its text has no `$`,
/// which Compose would look at.
pub fn set_up_by(job: &mut Value, set_up: &str) {
    let main = &mut job["compose"]["containers"][0];
    main["entrypoint"] =
        r#"/bin/sh -c 'eval "`env | sed -n s/^SET_UP=//p | base64 -d`"' set-up"#.into();
    let set_up = format!("{set_up}\nunset SET_UP; exec \"$@\"");
    main["env_vars"] = crate::docker::variables(&[("SET_UP", encoded(&set_up).as_bytes())]);
}

/// Gives the shell of the job's container this startup file.
pub fn with_startup_file(job: &mut Value, startup: &str) {
    let encoded = encoded(&format!("{startup}\n"));
    set_up_by(job, &format!("echo {encoded} | base64 -d >/root/.bashrc"));
}

/// The words that this bash lists for `compgen -A KIND`.
pub fn words_of_bash(kind: &str) -> Vec<String> {
    let output = Command::new("bash").args(["-c", &format!("compgen -A {kind}")]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}
