//! The operator's hooks of `agent start`: before and after every job, and at the agent's end.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use test_support::start::{Hub, SOON, StartAgent, TOKEN};
use test_support::{Finished, RUN_FOR_EVER, RUNNING, World, job, processes_with};

const PRE_JOB: &str = "Running the pre-job hook configured in the agent";
const POST_JOB: &str = "Running the post-job hook configured in the agent";

/// Returns a job with a variable and an epilogue.
fn request(id: &str, commands: &[&str]) -> Value {
    let mut request = job(id, commands);
    request["env_vars"] = json!([{ "name": "JOBS", "value": "b3du" }]);
    request["epilogue_always_commands"] = json!([{ "directive": "echo epilogue" }]);
    request
}

/// Returns output and exit code of a step.
fn step(log: &Finished, title: &str) -> Option<(String, i32)> {
    let steps = log.steps();
    steps.into_iter().find_map(|(its, output, code)| (its == title).then_some((output, code)))
}

fn titles(log: &Finished) -> Vec<String> {
    log.steps().into_iter().map(|(title, ..)| title).collect()
}

fn with_hook(kind: &str, path: &Path) -> impl FnOnce(&mut Command) {
    let flag = format!("--{kind}-hook-path");
    move |command| {
        command.arg(flag).arg(path).args(["--hook-timeout", "1"]);
    }
}

#[test]
fn a_pre_job_hook_is_run_or_sourced_and_fails_the_job_or_not() {
    let world = World::new();
    let hook = world.file("it's a hook.sh", "");
    let script = "echo \"sees $JOBS\"; HOOK=mine; cd /";
    let quoted = format!("'{}'", hook.display().to_string().replace('\'', r"'\''"));
    for (sourced, fails_job) in [(false, false), (false, true), (true, false), (true, true)] {
        let control_plane = Hub::start(SOON);
        let _agent = StartAgent::start_with(&world, &control_plane, |command| {
            with_hook("pre-job", &hook)(command);
            command.arg(format!("--source-pre-job-hook={sourced}"));
            command.arg(format!("--fail-on-pre-job-hook-error={fails_job}"));
        });
        for (id, code) in [("1", 0), ("2", 3)] {
            let case = format!("sourced {sourced}, fails job {fails_job}, code {code}");
            let end = if sourced { "return" } else { "exit" };
            fs::write(&hook, format!("{script}; {end} {code}\n")).unwrap();
            let second = "echo \"${HOOK-none} $PWD\"";
            let log = control_plane.run(&request(id, &[second]));
            let warning = if fails_job {
                "Warning: The agent is configured to fail the job if the pre-job hook fails."
            } else {
                "Warning: The agent is configured to proceed with the job even if the pre-job hook \
                 fails."
            };
            let program = if sourced { "source" } else { "bash" };
            let output = format!("Running: {program} {quoted}\n{warning}\nsees own\n");
            assert_eq!(step(&log, PRE_JOB), Some((output, code)), "{case}");
            let titles = titles(&log);
            assert_eq!(titles[1..3], ["Injecting Files", PRE_JOB], "{case}");
            assert!(titles.iter().any(|title| title == "echo epilogue"), "{case}: {titles:?}");
            let (expected, second_step) = if code != 0 && fails_job {
                ("failed", None)
            } else if sourced {
                ("passed", Some(("mine /\n".to_owned(), 0)))
            } else {
                ("passed", Some((format!("none {}\n", world.home().display()), 0)))
            };
            assert_eq!(log.result(), expected, "{case}");
            assert_eq!(step(&log, second), second_step, "{case}");
        }
    }
}

#[test]
fn a_missing_hook_is_a_failed_step_and_the_agent_continues() {
    let world = World::new();
    let missing = world.home().join("missing");
    let directory = world.home().join("directory");
    fs::create_dir(&directory).unwrap();
    for (sourced, fails_job, hook, why) in [
        (false, false, &missing, "No such file"),
        (false, true, &missing, "No such file"),
        (true, false, &missing, "No such file"),
        (true, true, &directory, "is a directory"),
    ] {
        let control_plane = Hub::start(SOON);
        let mut agent = StartAgent::start_with(&world, &control_plane, |command| {
            for kind in ["pre-job", "shutdown"] {
                command.arg(format!("--{kind}-hook-path")).arg(hook);
            }
            command.arg("--post-job-hook-path").arg(hook);
            command.arg(format!("--source-pre-job-hook={sourced}"));
            command.arg(format!("--fail-on-pre-job-hook-error={fails_job}"));
        });
        for id in ["1", "2"] {
            let log = control_plane.run(&request(id, &["echo second"]));
            assert_eq!(log.result(), if fails_job { "failed" } else { "passed" });
            for title in [PRE_JOB, POST_JOB] {
                let (output, code) = step(&log, title).unwrap();
                assert!(output.contains(hook.to_str().unwrap()), "{output}");
                assert!(title == POST_JOB || output.contains(why), "{output}");
                assert_ne!(code, 0, "{title}");
            }
            assert_eq!(step(&log, "echo second").is_some(), !fails_job);
        }
        agent.interrupt();
        let (code, own_log) = agent.exit_code_and_log();
        assert_eq!(code, Some(0), "{own_log}");
        assert!(own_log.contains("the shutdown hook failed"), "{own_log}");
    }
}

#[test]
fn a_relative_hook_path_starts_in_the_agents_working_directory() {
    let world = World::new();
    let working = world.home().with_file_name("working");
    fs::create_dir(&working).unwrap();
    fs::write(working.join("hook.sh"), "echo hooked; echo hooked >> ~/hooked\n").unwrap();
    let control_plane = Hub::start(SOON);
    let mut agent = StartAgent::start_with(&world, &control_plane, |command| {
        for kind in ["pre-job", "post-job", "shutdown"] {
            command.arg(format!("--{kind}-hook-path=hook.sh"));
        }
    });
    let log = control_plane.run(&request("1", &["cd /"]));
    assert_eq!(log.result(), "passed");
    for title in [PRE_JOB, POST_JOB] {
        let (output, code) = step(&log, title).unwrap();
        assert!(output.ends_with("hooked\n") && code == 0, "{output}");
    }
    agent.interrupt();
    assert_eq!(agent.exit_code_and_log().0, Some(0));
    let hooked = fs::read_to_string(world.home().join("hooked")).unwrap();
    assert_eq!(hooked.lines().count(), 3);
}

#[test]
fn a_hanging_hook_is_ended_and_does_not_block_the_agent() {
    let world = World::new();
    let marker = format!("HANGING={}", world.home().display());
    let script = format!(
        "export '{marker}'; trap '' TERM INT HUP; echo hangs; sleep 1000; sleep 1000; true\n"
    );
    let hook = world.file("hook.sh", script);
    let line = "hangs\nThe hook took longer than 1 s and was ended.\n";
    for (kind, sourced, fails_job, result) in [
        ("pre-job", false, false, "passed"),
        ("pre-job", false, true, "failed"),
        // The hook's shell is ended with it.
        ("pre-job", true, false, "failed"),
        ("pre-job", true, true, "failed"),
        ("post-job", false, false, "passed"),
    ] {
        let case = format!("{kind}, sourced {sourced}, fails job {fails_job}");
        let control_plane = Hub::start(SOON);
        let agent = StartAgent::start_with(&world, &control_plane, |command| {
            with_hook(kind, &hook)(command);
            command.arg(format!("--source-pre-job-hook={sourced}"));
            command.arg(format!("--fail-on-pre-job-hook-error={fails_job}"));
        });
        for id in ["1", "2"] {
            let log = control_plane.run(&request(id, &["echo second"]));
            assert_eq!(log.result(), result, "{case}");
            let title = if kind == "pre-job" { PRE_JOB } else { POST_JOB };
            let (output, code) = step(&log, title).unwrap();
            assert!(output.contains(line) && code == 1, "{case}: {code}, {output}");
            let second = step(&log, "echo second");
            assert_eq!(second.is_some(), !fails_job, "{case}");
            assert_eq!(second.is_some_and(|second| second.1 == 0), result == "passed", "{case}");
            assert_eq!(processes_with(&marker), [""; 0], "{case}");
        }
        let own_log = agent.wait_for_own_log("a hook exceeded its time limit");
        assert!(own_log.contains(" job=1 ") && own_log.contains("seconds=1"), "{own_log}");
    }

    let control_plane = Hub::start(SOON);
    let mut agent = StartAgent::start_with(&world, &control_plane, with_hook("shutdown", &hook));
    control_plane.shut_down("requested");
    let (code, own_log) = agent.exit_code_and_log();
    assert_eq!(code, Some(0), "{own_log}");
    assert!(own_log.contains("the shutdown hook timed out and was killed"), "{own_log}");
    assert_eq!(processes_with(&marker), [""; 0]);
}

#[test]
fn a_hanging_hook_of_builtins_is_ended() {
    let world = World::new();
    let hook = world.file("hook.sh", "echo hangs; while :; do :; done\n");
    for (sourced, result) in [(true, "failed"), (false, "passed")] {
        let control_plane = Hub::start(SOON);
        let _agent = StartAgent::start_with(&world, &control_plane, |command| {
            with_hook("pre-job", &hook)(command);
            command.arg(format!("--source-pre-job-hook={sourced}"));
        });
        let log = control_plane.run(&request("1", &["echo second"]));
        assert_eq!((log.result(), step(&log, PRE_JOB).unwrap().1), (result, 1));
    }
}

#[test]
fn a_hanging_post_job_hook_is_ended_and_the_jobs_daemons_stay() {
    let world = World::new();
    let marker = format!("DAEMON={}", world.home().display());
    let hook = world.file("hook.sh", "sleep 1000\n");
    let control_plane = Hub::start(SOON);
    let _agent = StartAgent::start_with(&world, &control_plane, |command| {
        with_hook("post-job", &hook)(command);
        command.arg("--keep-daemons");
    });
    let daemon = format!("env '{marker}' setsid sleep 60 > /dev/null 2>&1 &");
    let log = control_plane.run(&request("1", &[&daemon]));
    assert_eq!((log.result(), step(&log, POST_JOB).unwrap().1), ("passed", 1));
    let living = processes_with(&marker);
    assert_eq!(living.len(), 1, "{living:?}");
    let pid = living[0].split_whitespace().next().unwrap().trim_start_matches("/proc/");
    kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL).unwrap();
}

#[test]
fn after_a_stop_a_hanging_post_job_hook_is_ended() {
    let world = World::new();
    let hook = world.file("hook.sh", "echo hangs; sleep 1000\n");
    let control_plane = Hub::start(SOON);
    let _agent = StartAgent::start_with(&world, &control_plane, with_hook("post-job", &hook));
    let id = control_plane.queue(request("1", &[RUN_FOR_EVER]));
    control_plane.wait_for_log(&id, RUNNING);
    control_plane.stop_job(&id);
    let log = control_plane.finish(&id);
    assert_eq!(log.result(), "stopped");
    let (output, code) = step(&log, POST_JOB).unwrap();
    assert!(output.contains("hangs\nThe hook took longer than 1 s") && code == 1, "{output}");
}

/// Writes a hook that prints its environment.
fn post_job_hook(world: &World) -> PathBuf {
    let text =
        "echo \"$JOBS ${SEMAPHORE_JOB_RESULT-none} ${SET-unset} ${SEMAPHORE_AGENT_TOKEN-none}\"\n";
    world.file("hook.sh", text)
}

#[test]
fn a_post_job_hook_runs_last_however_the_job_ends() {
    let world = World::new();
    let hook = post_job_hook(&world);
    let control_plane = Hub::start(SOON);
    let _agent = StartAgent::start_with(&world, &control_plane, with_hook("post-job", &hook));
    let running = format!("Running: bash '{}'\n", hook.display());
    let set = "export SET=set";
    for (id, commands, result, seen, epilogue) in [
        ("passes", vec![set], "passed", "own passed set none\n", true),
        ("fails", vec![set, "false"], "failed", "own failed set none\n", true),
        ("stops-itself", vec![set, "(exit 130)"], "stopped", "own none set none\n", false),
        (
            "passes-itself",
            vec![set, "export SEMAPHORE_JOB_RESULT=passed", "(exit 130)"],
            "passed",
            "own passed set none\n",
            false,
        ),
    ] {
        let log = control_plane.run(&request(id, &commands));
        assert_eq!(log.result(), result, "{id}");
        let titles = titles(&log);
        assert_eq!(titles.last().unwrap(), POST_JOB, "{id}: {titles:?}");
        assert_eq!(titles.iter().any(|title| title == "echo epilogue"), epilogue, "{id}");
        assert_eq!(step(&log, POST_JOB), Some((format!("{running}{seen}"), 0)), "{id}");
    }
}

#[test]
fn a_post_job_hook_that_fails_changes_no_result() {
    let world = World::new();
    let hook = world.file("hook.sh", "echo why; exit 3\n");
    let control_plane = Hub::start(SOON);
    let _agent = StartAgent::start_with(&world, &control_plane, with_hook("post-job", &hook));
    let log = control_plane.run(&request("1", &["true"]));
    assert_eq!(log.result(), "passed");
    let (output, code) = step(&log, POST_JOB).unwrap();
    assert!(output.ends_with("why\n") && code == 3, "{output}");
}

#[test]
fn after_a_stop_the_post_job_hook_has_a_fresh_shell_with_the_jobs_environment() {
    let world = World::new();
    let hook = post_job_hook(&world);
    let control_plane = Hub::start(SOON);
    let _agent = StartAgent::start_with(&world, &control_plane, with_hook("post-job", &hook));
    let id = control_plane.queue(request("1", &["export SET=set", RUN_FOR_EVER, "echo never"]));
    control_plane.wait_for_log(&id, RUNNING);
    control_plane.stop_job(&id);
    let log = control_plane.finish(&id);
    assert_eq!(log.result(), "stopped");
    let titles = titles(&log);
    let expected = [
        "Exporting environment variables",
        "Injecting Files",
        "export SET=set",
        RUN_FOR_EVER,
        POST_JOB,
    ];
    assert_eq!(titles, expected);
    assert_eq!(step(&log, RUN_FOR_EVER).unwrap().1, 1);
    let output = format!("Running: bash '{}'\nown none unset none\n", hook.display());
    assert_eq!(step(&log, POST_JOB), Some((output, 0)));
}

#[test]
fn no_hook_runs_for_a_job_that_could_not_be_prepared() {
    let world = World::new();
    let hook = world.file("hook.sh", "touch ~/hooked\n");
    let control_plane = Hub::start(SOON);
    let _agent = StartAgent::start_with(&world, &control_plane, |command| {
        with_hook("post-job", &hook)(command);
        command.arg("--pre-job-hook-path").arg(&hook);
    });
    let mut unprepared = request("1", &["echo never"]);
    unprepared["ssh_public_keys"] = json!(["no base64!"]);
    let log = control_plane.run(&unprepared);
    assert_eq!(log.result(), "failed");
    assert_eq!(titles(&log), ["Preparing the job"]);
    assert!(!world.home().join("hooked").exists());
    let log = control_plane.run(&request("2", &["true"]));
    assert!(log.result() == "passed" && world.home().join("hooked").exists(), "{log:?}");
}

#[test]
fn a_shutdown_hook_gets_the_reason_and_no_token() {
    let world = World::new();
    let seen = world.home().join("seen");
    let hook = world.file("hook.sh", "env > ~/seen\n");
    let end = |adapt: fn(&mut Command), cause: &dyn Fn(&Hub, &StartAgent)| {
        let _ = fs::remove_file(&seen);
        let control_plane = Hub::start(SOON);
        let mut agent = StartAgent::start_with(&world, &control_plane, |command| {
            with_hook("shutdown", &hook)(command);
            command.env("OPERATORS", "own");
            adapt(command);
        });
        agent.wait_for_own_log("registered");
        cause(&control_plane, &agent);
        let (code, own_log) = agent.exit_code_and_log();
        assert_eq!(code, Some(0), "{own_log}");
        assert_eq!(control_plane.look(|known| known.disconnected), 1);
        let seen = fs::read_to_string(&seen).unwrap();
        assert!(!seen.contains(TOKEN) && seen.contains("\nOPERATORS=own\n"), "{seen}");
        let at = own_log.find("disconnected").unwrap();
        assert!(own_log[at..].contains("the shutdown hook succeeded"), "{own_log}");
        let reason =
            seen.lines().find_map(|line| line.strip_prefix("SEMAPHORE_AGENT_SHUTDOWN_REASON="));
        let reason = reason.unwrap().to_owned();
        assert!(own_log.contains(&format!("ended reason={reason}")), "{own_log}");
        reason
    };
    for (word, reason) in [
        ("idle", "IDLE"),
        ("requested", "REQUESTED"),
        ("job-finished", "JOB_FINISHED"),
        ("", "UNKNOWN"),
        ("for a reason that is new", "UNKNOWN"),
    ] {
        assert_eq!(end(|_| {}, &|hub, _| hub.shut_down(word)), reason, "{word:?}");
    }
    let after_job = end(
        |command| {
            command.arg("--disconnect-after-job");
        },
        &|hub, _| assert_eq!(hub.run(&job("1", &["true"])).result(), "passed"),
    );
    assert_eq!(after_job, "JOB_FINISHED");
    assert_eq!(end(|_| {}, &|_, agent| agent.interrupt()), "INTERRUPTED");
    // A response without a reason.
    let silent = end(|_| {}, &|hub, _| hub.answer_next([json!({ "action": "shutdown" })]));
    assert_eq!(silent, "UNKNOWN");
}
