//! The shell in a container, whose scripts are typed into a terminal: jobs, images and users that subvert it.

use std::sync::Mutex;

use serde_json::json;

use test_support::changed_shell::with_startup_file;
use test_support::docker::{file, job, leftovers_of, variables};
use test_support::serve::ServeAgent;
use test_support::{Finished, World};

fn run(job: &serde_json::Value) -> Finished {
    let finished = World::new().run(&job.to_string());
    assert_eq!(leftovers_of(job), [""; 0]);
    finished
}

fn run_commands(commands: &[&str]) -> Vec<(String, i32)> {
    run(&job("bash", commands)).commands()
}

fn ok(output: &str) -> (String, i32) {
    (output.into(), 0)
}

/// Runs `test` for each of `cases`, a few at a time.
fn for_each<T: Send>(cases: impl IntoIterator<Item = T>, test: impl Fn(T) + Sync) {
    let cases: Mutex<Vec<T>> = Mutex::new(cases.into_iter().collect());
    let next = || cases.lock().unwrap().pop();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| std::iter::from_fn(next).for_each(&test));
        }
    });
}

/// Runs `subversion` between commands that must still work. Returns all outputs.
fn subvert(subversion: &str) -> Vec<(String, i32)> {
    let mut long = "builtin echo after; (builtin exit 0) #".to_owned();
    long.push_str(&" long".repeat(2000));
    let short = "builtin echo after; (builtin exit 0)";
    let mut steps = run_commands(&["builtin echo before", subversion, short, &long]);
    assert_eq!(steps.len(), 4, "after {subversion:?}: {steps:?}");
    assert_eq!(steps.remove(0), ok("before\n"));
    assert_eq!(steps[1], steps[2], "after {subversion:?}");
    steps.truncate(2);
    steps
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn options_and_traps_of_the_job_do_not_break_the_session() {
    let harmless = [
        "set -u",
        "set -f; set -C; set -o posix",
        "set -o noclobber -o pipefail; set +m",
        "trap 'true' DEBUG; trap - DEBUG",
        "trap ': trapped' EXIT INT TERM HUP",
        "shopt -s extdebug expand_aliases",
        "IFS=/; LANG=xx",
        "IFS=0123456789himBHs; umask 777",
        "set -o history; history -c",
        "set -o emacs",
        "set -o vi",
        "set -o functrace; set -o errtrace",
        "readonly status mark flags result part 2>/dev/null; true",
        "stty echo; stty -icanon; stty echo",
        "stty raw",
        "stty -opost; stty opost",
        "exec 3>&1 4</dev/null 5>/dev/null",
        "unset PROMPT_COMMAND PS1",
        "readonly PROMPT_COMMAND",
        "readonly PS1 PS2",
        "set -o posix; trap : USR1; (while kill -USR1 $$; do usleep 2000; done) 2>/dev/null & true",
        "enable -n cd test",
        "PATH=",
        "PROMPT_COMMAND='PATH=/nowhere'",
        "PS1='$(builtin echo prompt)'; PS2=x; PS4='$(builtin echo trace)'",
        "cd /tmp; mkdir gone; cd gone; rmdir ../gone",
        "rm -f /dev/shm/.agent-* /dev/shm/*",
        "HOME=/nowhere; unset HOME",
        "shopt -s failglob nullglob dotglob",
    ];
    for_each(harmless, |harmless| {
        assert_eq!(subvert(harmless), [ok(""), ok("after\n")], "{harmless}");
    });
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn redefined_commands_do_not_break_the_session() {
    let names = "echo source printf set read return local test exit trap eval cd history command unset umask";
    let functions = names.split(' ').map(|name| format!("{name}() {{ builtin echo mine; }};"));
    let aliases = names.split(' ').map(|name| format!("alias {name}='builtin echo aliased';"));
    let all = [functions.collect::<String>(), aliases.collect::<String>()];
    for_each(all, |subversion| assert_eq!(subvert(&subversion), [ok(""), ok("after\n")]));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn redirected_and_closed_descriptors_do_not_break_the_session() {
    let steps = run_commands(&[
        "exec >redirected 2>&1",
        "echo to file",
        "exec >/dev/tty 2>&1",
        "cat redirected",
        "exec 1>&- 2>&-",
        "echo lost",
    ]);
    assert_eq!(steps[1], ok(""));
    assert_eq!(steps[3], ok("to file\n"));
    assert_eq!(steps[4], ok(""));
    assert_eq!(steps[5], (String::new(), 1), "echo itself fails without an output");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn interrupts_and_errors_of_the_shell_end_the_command_only() {
    let ends = [
        "kill -INT $$; echo not reached",
        "sh -c 'kill -INT $$'; echo x",
        "for i in 1 2 3; do kill -INT $$; done",
        "kill -INT 0",
        "set -u; echo $NOPE",
        "echo ${NOPE?gone}",
        "readonly R=1; R=2",
        "if then",
        "echo 'unclosed",
        "$((1/0))",
        "nosuchcommand_at_all",
    ];
    for_each(ends, |end| {
        let mut job = job("bash", &["true", end]);
        job["epilogue_always_commands"] = json!([{ "directive": "echo goes on" }]);
        let commands = run(&job).commands();
        let (output, exit_code) = &commands[1];
        assert!(*exit_code != 0 && !output.contains("not reached"), "{end}: {output}");
        assert!(!output.contains("__agent"), "{end}: {output}");
        assert_eq!(commands[2..], [ok("goes on\n")], "{end}");
    });
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn background_jobs_may_print_at_any_time() {
    let steps = run_commands(&[
        "(while :; do echo noise; done) & true",
        "stty echo; echo one",
        &format!("echo two # {}", "long ".repeat(4000)),
        "kill %1; wait; echo over",
        "echo three",
    ]);
    for (step, word) in steps[1..].iter().zip(["one\n", "two\n", "over\n", "three\n"]) {
        assert!(step.0.contains(word) && !step.0.contains("__agent"), "{word}");
        let strange = step.0.lines().find(|line| ![word.trim(), "noise", ""].contains(line));
        assert!(strange.is_none_or(|line| line.contains("Terminated")), "{strange:?}");
    }
    assert_eq!(steps[4], ok("three\n"));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn the_output_of_startup_files_in_the_container_is_not_in_the_log() {
    let startup = [
        "PS0='ps0> '; PS1='prompt> '; PROMPT_COMMAND+=('echo one' 'echo two'); MAILCHECK=0",
        "echo welcome; set -xv",
        "set -u; set -o vi; stty echo; sleep 1",
        "readonly PROMPT_COMMAND=true PS0 MAILCHECK",
        "alias cd=false mkdir=false chmod=false cat=false; trap 'echo debug >/dev/null' DEBUG",
        "cd /tmp; umask 077; FROM_STARTUP=yes; bind 'set bracketed-paste-mode on'",
    ];
    for startup in startup {
        let world = World::new();
        let host = world.file("bashrc", format!("{startup}\n"));
        let agent = ServeAgent::start_with(&world, |command| {
            command.arg("--files").arg(format!("{}:/root/.bashrc", host.display()));
        });
        let mut job = job("bash", &["builtin echo a", "builtin pwd; builtin echo $V"]);
        job["env_vars"] = variables(&[("V", b"canary")]);
        job["files"] = json!([file("f", b"x", "0600")]);
        let finished = agent.run_to_end(&job);
        assert_eq!(finished.result(), "passed", "{startup}: {finished:#?}");
        let steps = finished.steps();
        assert_eq!(steps[1].1, "Starting a new bash session.\n", "{startup}");
        assert_eq!(steps[2].1, "Exporting V\n", "{startup}");
        assert_eq!(steps[3].1, "Injecting f with file mode 0600\n", "{startup}");
        if startup.contains("set -xv") {
            assert!(steps[4].1.ends_with("a\n"), "{startup}: {steps:?}");
        } else {
            assert_eq!(finished.commands(), [ok("a\n"), ok("/root\ncanary\n")], "{startup}");
        }
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_startup_file_that_ends_the_shell_fails_the_start_and_shows_its_output() {
    let world = World::new();
    let host = world.file("bashrc", "yes | head -100000; echo no such luck; exit 3\n");
    let agent = ServeAgent::start_with(&world, |command| {
        command.arg("--files").arg(format!("{}:/root/.bashrc", host.display()));
    });
    let finished = agent.run_to_end(&job("bash", &["echo not reached"]));
    let steps = finished.steps();
    let (title, output, exit_code) = steps.last().unwrap();
    assert_eq!((title.as_str(), *exit_code), ("Starting the docker image...", 1));
    assert!(output.contains("no such luck") && output.len() < 3000, "{output}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_user_id_unknown_to_the_image_has_a_shell_and_files() {
    let mut job = job("bash", &["id -u; id -g; pwd; cat /tmp/f; stat -c %u:%g /tmp/f"]);
    job["compose"]["containers"][0]["user"] = "1234:5678".into();
    job["files"] = json!([file("/tmp/f", b"content\n", "0600")]);
    let finished = run(&job);
    assert_eq!(finished.commands(), [ok("1234\n5678\n/\ncontent\n1234:5678\n")], "{finished:#?}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_variable_that_the_shell_refuses_fails_its_step_with_the_shells_message() {
    let mut job = job("bash", &["echo not reached"]);
    job["env_vars"] = variables(&[("A", b"a"), ("FROZEN", b"1")]);
    with_startup_file(&mut job, "readonly FROZEN=0");
    let finished = run(&job);
    let steps = finished.steps();
    let (_, output, exit_code) = &steps[2];
    assert!(output.contains("FROZEN: readonly variable"), "{output}");
    assert!(!output.contains("__agent"), "{output}");
    assert_eq!((*exit_code, finished.result()), (1, "failed"));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn the_agents_input_can_not_be_found_in_the_shell() {
    let secret = "canary-of-a-variable";
    let mut job = job(
        "bash",
        &[
            "unset V; set; declare -p; history; fc -l; jobs; trap -p",
            "cat /proc/$$/cmdline /proc/$$/environ; ls -A ~",
        ],
    );
    job["env_vars"] = variables(&[("V", secret.as_bytes())]);
    let finished = run(&job);
    assert!(!format!("{finished:?}").contains("canary"), "{finished:#?}");
    assert!(!finished.output().contains("not found"), "{finished:#?}");
}
