//! Additions of agents and their machines to jobs in containers: setup commands, files, hooks.

use std::fs;
use std::path::Path;

use actors::log::event::LogEvent;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use test_support::docker::{Owned, container, job, job_in, leftovers_of, make_images, variables};
use test_support::serve::ServeAgent;
use test_support::start::{Hub, SOON, StartAgent};
use test_support::{
    Finished, RUN_FOR_EVER, RUNNING, Running, World, processes_with, unique, wait_for_file,
    wait_until,
};

const PRE_JOB: &str = "Running the pre-job hook configured in the agent";
const POST_JOB: &str = "Running the post-job hook configured in the agent";

/// Returns a job with host setup commands, which run on the agent's machine.
fn after(setup: &[&str], commands: &[&str]) -> Value {
    let mut job = job("bash", commands);
    let setup: Value = setup.iter().map(|text| json!({ "directive": text })).collect();
    job["compose"]["host_setup_commands"] = setup;
    job
}

/// Starts this job with an agent all of whose processes have a marker.
fn start_marked(world: &World, job: &Value) -> (Running, String) {
    let value = unique();
    let path = world.file("job.json", job.to_string());
    let running = world.start_file_with(&path, |command| {
        command.env("TEST_MARKER", &value);
    });
    (running, format!("TEST_MARKER={value}"))
}

fn step(log: &Finished, title: &str) -> (String, i32) {
    let found = log.steps().into_iter().find(|(its, ..)| its == title);
    let (_, output, exit_code) = found.unwrap_or_else(|| panic!("no {title}: {log:#?}"));
    (output, exit_code)
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn host_setup_commands_run_on_the_machine_before_anything_is_pulled() {
    make_images();
    let image = Owned(&["image", "rm"], format!("agent-test/made:{}", unique()));
    let tag = format!("docker tag agent-test/bash {}", image.1);
    let mut job = after(&["pwd >~/where", "cat where", &tag], &["echo hi"]);
    job["compose"]["containers"][0]["image"] = image.1.clone().into();
    job["env_vars"] = variables(&[("HOME", b"/tmp")]);
    let world = World::new();
    let finished = world.run(&job.to_string());
    assert_eq!(finished.result(), "passed", "{finished:#?}");
    // Host setup commands are not in the job's log.
    assert_eq!(finished.steps()[0].0, "Pulling docker images...");
    let home = world.home().canonicalize().unwrap();
    assert_eq!(fs::read_to_string(home.join("where")).unwrap(), format!("{}\n", home.display()));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_host_setup_command_that_fails_fails_the_job_and_its_output_is_in_the_agents_log() {
    let job = after(&["echo out of; echo space >&2; exit 3", "touch ~/next"], &["echo hi"]);
    let world = World::new();
    let agent = ServeAgent::start(&world);
    let finished = agent.run_to_end(&job);
    assert_eq!(finished.result(), "failed");
    let steps = finished.steps();
    let expected = "the host setup command `echo out of; echo space >&2; exit 3` failed: \
                    exit status: 3; its output is in the agent's own log\n";
    assert_eq!(steps, [("Preparing the job".into(), expected.into(), 1)]);
    let log = agent.own_log();
    assert!(log.contains("out of") && log.contains("space"), "{log}");
    assert!(!world.home().join("next").exists());
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_host_setup_command_ends_whatever_it_leaves_running() {
    let job = after(&["sleep 1000 & echo started"], &["echo hi"]);
    let world = World::new();
    let (running, marker) = start_marked(&world, &job);
    let finished = running.finish();
    assert_eq!(finished.commands(), [("hi\n".into(), 0)]);
    assert_eq!(processes_with(&marker), [""; 0]);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_stop_ends_a_host_setup_command_with_all_that_it_started() {
    let job = after(&["touch ~/running; sleep 1000; touch ~/next"], &["echo hi"]);
    let world = World::new();
    let (running, marker) = start_marked(&world, &job);
    wait_for_file(&world.home().join("running"));
    running.signal(Signal::SIGTERM);
    assert_eq!(running.finish().result(), "stopped");
    // A killed process takes a moment to vanish.
    wait_until(|| processes_with(&marker).is_empty(), || format!("{:?}", processes_with(&marker)));
    assert!(!world.home().join("next").exists());
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn the_main_container_has_the_agents_files_and_a_missing_one_is_a_warning() {
    let world = World::new();
    let there = world.file("agent's file", "of the agent\n");
    let missing = world.home().join("missing");
    let serve = "ls -d /opt/* >/www/index.html; exec httpd -f -p 8080 -h /www";
    let mut web = container("web", "service");
    web["command"] = format!("sh -c \"{serve}\"").into();
    let commands = [
        "cat /opt/agents/file; echo changed >/opt/agents/file",
        "! ls /opt/missing 2>/dev/null",
        "wget -q -O - http://web:8080",
    ];
    let job = job_in(json!([container("main", "bash"), web]), &commands);
    let agent = ServeAgent::start_with(&world, |command| {
        let files = [(&there, "/opt/agents/file"), (&missing, "/opt/missing")];
        let files = files.map(|(host, path)| format!("{}:{path}", host.display()));
        command.args(["--files", &files.join(",")]);
    });
    let finished = agent.run_to_end(&job);
    let expected = ["of the agent\n", "", "/opt/tools\n"].map(|output| (output.to_owned(), 0));
    assert_eq!(finished.commands(), expected);
    assert_eq!(fs::read_to_string(there).unwrap(), "changed\n");
    let log = agent.own_log();
    let warned = log.lines().find(|line| line.contains(&missing.display().to_string()));
    assert!(warned.is_some_and(|line| line.contains("missing") && line.contains("WARN")), "{log}");
    assert!(!missing.exists());
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_missing_mandatory_file_fails_the_job_without_further_messages() {
    let world = World::new();
    let missing = world.home().join("missing");
    let control_plane = Hub::start(SOON);
    let hook = world.home().join("set-up");
    let agent = StartAgent::start_with(&world, &control_plane, |command| {
        command.arg("--files").arg(format!("{}:/opt/missing", missing.display()));
        command.arg("--fail-on-missing-files");
    });
    let mut unlucky = after(&[&format!("touch {}", hook.display())], &["echo hi"]);
    unlucky["epilogue_always_commands"] = json!([{ "directive": "echo not reached" }]);
    let id = control_plane.queue(unlucky.clone());
    let log = control_plane.finish(&id);
    assert_eq!((log.result(), log.events.len()), ("failed", 2));
    assert!(matches!(log.events[0], LogEvent::JobStarted { .. }), "{log:?}");
    agent.wait_for_own_log(&missing.display().to_string());
    assert!(!hook.exists());
    assert_eq!(leftovers_of(&unlucky), [""; 0]);
    // The file exists for the next job.
    fs::write(&missing, "now").unwrap();
    let id = control_plane.queue(job("bash", &["cat /opt/missing"]));
    let log = control_plane.finish(&id);
    assert_eq!(log.commands(), [("now".into(), 0)]);
}

/// Writes hooks whose path only exists in the container.
fn with_hooks(world: &World, pre: &str, post: &str) -> String {
    let files = [("pre", pre), ("post", post)].map(|(name, script)| {
        let host = world.file(&format!("hook-{name}"), script);
        format!("{}:/opt/hooks/{name}.sh", host.display())
    });
    files.join(",")
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn the_hook_of_agent_serve_is_sourced_in_the_container() {
    let world = World::new();
    for (script, code, printed) in [
        ("HOOK=mine; cd /tmp; id -un; echo $A", 0, Some("mine /tmp\n")),
        ("echo why; return 3", 3, None),
    ] {
        let files = with_hooks(&world, script, "");
        let agent = ServeAgent::start_with(&world, |command| {
            command.args(["--files", &files, "--pre-job-hook-path", "/opt/hooks/pre.sh"]);
        });
        let mut job = job("bash:dev", &["echo $HOOK $PWD"]);
        job["env_vars"] = variables(&[("A", b"of the job")]);
        let finished = agent.run_to_end(&job);
        let (output, exit_code) = step(&finished, PRE_JOB);
        assert!(output.starts_with("Running: source "), "{output}");
        assert!(output.contains("/opt/hooks/pre.sh"), "{output}");
        assert_eq!(exit_code, code, "{output}");
        assert!(
            output.ends_with(if code == 0 { "dev\nof the job\n" } else { "why\n" }),
            "{output}"
        );
        match printed {
            Some(printed) => assert_eq!(step(&finished, "echo $HOOK $PWD"), (printed.into(), 0)),
            None => assert_eq!(finished.result(), "failed"),
        }
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn hooks_of_agent_start_run_in_the_container_even_after_a_stop() {
    let world = World::new();
    let files = with_hooks(&world, "echo pre $(id -un)", "echo post $(id -un) $A $B; ls ~");
    let control_plane = Hub::start(SOON);
    let _agent = StartAgent::start_with(&world, &control_plane, |command| {
        command.args(["--files", &files]);
        command.args(["--pre-job-hook-path", "/opt/hooks/pre.sh"]);
        command.args(["--post-job-hook-path", "/opt/hooks/post.sh"]);
    });
    let request = |commands: &[&str]| {
        let mut job =
            job_in(json!([container("main", "bash:dev"), container("web", "service")]), commands);
        job["env_vars"] = variables(&[("A", b"of the job")]);
        job
    };
    let post = |log: &Finished| step(log, POST_JOB).0.split_once('\n').unwrap().1.to_owned();

    let job = request(&["export B=too; touch ~/f"]);
    let id = control_plane.queue(job.clone());
    let log = control_plane.finish(&id);
    assert_eq!(log.result(), "passed", "{log:#?}");
    assert!(step(&log, PRE_JOB).0.ends_with("pre dev\n"), "{log:#?}");
    // The hook is a process of its own in the job's shell.
    assert_eq!(post(&log), "post dev of the job too\nf\n");
    assert_eq!(leftovers_of(&job), [""; 0]);

    let job = request(&["export B=too; touch ~/f", RUN_FOR_EVER, "echo never"]);
    let id = control_plane.queue(job.clone());
    control_plane.wait_for_log(&id, RUNNING);
    control_plane.stop_job(&id);
    let log = control_plane.finish(&id);
    assert_eq!(log.result(), "stopped");
    assert_eq!(post(&log), "post dev of the job\n");
    let titles: Vec<_> = log.steps().into_iter().map(|(title, ..)| title).collect();
    assert_eq!(titles[titles.len() - 2..], [RUN_FOR_EVER, POST_JOB]);
    assert_eq!(leftovers_of(&job), [""; 0]);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_job_of_agent_start_is_gone_from_the_engine_before_its_result_is_reported() {
    let world = World::new();
    let control_plane = Hub::start(SOON);
    let _agent = StartAgent::start(&world, &control_plane);
    for commands in [&["true"], &["false"], &["exit 1"]] {
        let job = job_in(json!([container("main", "bash"), container("web", "service")]), commands);
        let id = control_plane.queue(job.clone());
        control_plane.finish(&id);
        assert_eq!(leftovers_of(&job), [""; 0]);
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn jobs_of_agent_serve_have_the_kvm_device_unless_it_is_withheld() {
    let there = Path::new("/dev/kvm").exists();
    for (flag, expected) in [("true", there), ("false", false)] {
        let world = World::new();
        let agent = ServeAgent::start_with(&world, |command| {
            command.arg(format!("--expose-kvm-device={flag}"));
        });
        let finished = agent.run_to_end(&job("bash", &["ls /dev/kvm"]));
        assert_eq!(finished.result() == "passed", expected, "{finished:#?}");
    }
}
