//! The environment of jobs of a control plane, and the file in which people find it.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use test_support::control_plane::Known;
use test_support::serve::ServeAgent;
use test_support::start::{Hub, SOON, StartAgent};
use test_support::{
    RUN_FOR_EVER, RUN_UNTIL_GO, RUNNING, World, base64, docker, job, job_of, wait_until,
};

const SHOW_PAGERS: &str = r#"echo "$PAGER,$GIT_PAGER""#;

fn with_variables(mut job: Value, variables: &[(&str, &str)]) -> Value {
    let named =
        |(name, value): &(&str, &str)| json!({ "name": name, "value": base64(value.as_bytes()) });
    job["env_vars"] = variables.iter().map(named).collect();
    job
}

#[test]
fn a_variable_that_no_shell_can_hold_is_skipped_and_shown() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let agent = StartAgent::start(&world, &hub);
    let odd = ["my-param", "1ST", "two words", "a.b", "ünï", "", "line\nend", "A;touch ~/never"];
    let variables: Vec<_> = odd.iter().map(|name| (*name, "canary")).collect();
    let variables = [&[("FIRST", "1"), ("ZZ", "2")], &variables[..]].concat();
    let request = with_variables(job("1", &["echo \"$FIRST$ZZ\"; env"]), &variables);
    let finished = hub.run(&request);
    assert_eq!(finished.result(), "passed", "{finished:#?}");
    assert!(finished.output().starts_with("12\n") && !finished.output().contains("canary"));
    let (title, exported, code) = &finished.steps()[0];
    assert_eq!((title.as_str(), *code), ("Exporting environment variables", 0));
    assert!(exported.contains("Exporting FIRST\n") && exported.contains("Exporting ZZ\n"));
    for name in ["my-param", "1ST", "two words", "a.b"] {
        assert!(!exported.contains(&format!("Exporting {name}\n")), "{exported}");
        let line = exported.lines().find(|line| line.contains(name));
        assert!(line.is_some(), "{name} is not mentioned: {exported}");
    }
    assert!(!format!("{finished:?}{}", agent.own_log()).contains("canary"));
    assert!(!world.home().join("never").exists());
}

#[test]
fn a_value_given_as_a_name_is_not_shown() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let finished = hub.run(&with_variables(job("1", &["true"]), &[("KEY=canary", "x")]));
    assert_eq!(finished.result(), "passed", "{finished:#?}");
    assert!(!format!("{finished:?}").contains("canary"), "{finished:#?}");
    assert!(finished.steps()[0].1.contains("KEY"), "{finished:#?}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_variable_that_no_shell_can_hold_is_skipped_in_containers() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let request = docker::job("bash", &["echo \"$FIRST\""]);
    let id = request["job_id"].as_str().unwrap().to_owned();
    hub.queue(with_variables(request, &[("FIRST", "1"), ("my-param", "canary")]));
    let finished = hub.finish(&id);
    assert_eq!((finished.result(), finished.output()), ("passed", "1\n".to_owned()));
}

#[test]
fn no_pager_waits_for_a_key_in_a_job() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let finished = hub.run(&job("1", &[SHOW_PAGERS, "bash -c 'echo $PAGER'"]));
    assert_eq!(finished.output(), "cat,cat\ncat\n");
    // The pager variables are not listed as exported variables.
    assert_eq!(finished.steps()[0].1, "");
    let set = with_variables(job("2", &[SHOW_PAGERS]), &[("PAGER", "most"), ("GIT_PAGER", "more")]);
    assert_eq!(hub.run(&set).output(), "most,more\n");
    fs::write(world.home().join(".bash_profile"), "export PAGER=less GIT_PAGER=less\n").unwrap();
    assert_eq!(hub.run(&job("3", &[SHOW_PAGERS])).output(), "less,less\n");
}

#[test]
fn the_pager_of_the_agents_own_environment_is_kept() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start_with(&world, &hub, |command| {
        command.env("PAGER", "most").env("GIT_PAGER", "more");
    });
    assert_eq!(hub.run(&job("1", &[SHOW_PAGERS])).output(), "most,more\n");
}

#[test]
fn git_shows_a_long_history_to_its_end() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start_with(&world, &hub, |command| {
        command.env("LESS", "");
    });
    let commits = "for i in {1..100}; do git -c user.name=a -c user.email=b commit -q --allow-empty -m $i; done";
    let id = hub.queue(job("1", &["stty rows 24", "git init -q r && cd r", commits, "git log"]));
    let shows = |known: &Known| known.jobs["1"].result.clone();
    let result = hub.wait_for(Duration::from_secs(40), shows);
    assert_eq!(result.as_deref(), Some("passed"), "the pager waits");
    assert_eq!(hub.finish(&id).result(), "passed");
}

#[test]
fn no_pager_waits_in_a_job_from_a_file_or_a_platform() {
    let finished = World::new().run(&job_of(&[SHOW_PAGERS]));
    assert_eq!(finished.output(), "cat,cat\n");
    let agent = ServeAgent::start(&World::new());
    agent.post_job(&job("1", &[SHOW_PAGERS])).of_status(200);
    agent.wait_for_log("1", "job_finished");
    let log = agent.get("/jobs/1/log").text();
    assert!(log.contains(r#""output":"cat,cat\n""#), "{log}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn no_pager_waits_in_a_container() {
    let finished = World::new().run(&docker::job("bash", &[SHOW_PAGERS]).to_string());
    assert_eq!(finished.output(), "cat,cat\n");
}

/// Starts an agent with its own directory for temporary files.
fn with_temporary(world: &World, hub: &Hub) -> (StartAgent, PathBuf) {
    let temporary = world.home().with_file_name("temporary");
    fs::create_dir(&temporary).unwrap();
    let agent = StartAgent::start_with(world, hub, |command| {
        command.env("TMPDIR", &temporary);
    });
    (agent, temporary)
}

/// Returns the files there whose names are those of copies of variables.
fn copies(temporary: &Path) -> Vec<String> {
    let names = fs::read_dir(temporary).unwrap().map(|entry| entry.unwrap().file_name());
    let names = names.map(|name| name.into_string().unwrap());
    names.filter(|name| name.starts_with(".env-")).collect()
}

/// Returns the value of a variable in another shell that has sourced a file.
fn sourced(shell: &str, file: &Path, name: &str) -> String {
    let script = format!(". \"$0\"; printf %s \"${name}\"");
    let mut command = Command::new(shell);
    command.args(["-c", &script]).arg(file).env_clear().current_dir("/");
    let output = command.output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_variables_of_a_running_job_are_in_a_file_for_other_shells() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let (_agent, temporary) = with_temporary(&world, &hub);
    let variables = [
        ("PLAIN", "canary"),
        ("EMPTY", ""),
        ("QUOTED", "it's \"so\" \\ $(touch ~/never) `x`"),
        ("LINES", "one\ntwo\n"),
        ("UMLAUT", "Grüße"),
    ];
    hub.queue(with_variables(job("some-job", &[RUN_UNTIL_GO]), &variables));
    hub.wait_for_log("some-job", RUNNING);
    assert_eq!(copies(&temporary), [".env-some-job"]);
    let file = temporary.join(".env-some-job");
    assert_eq!(fs::symlink_metadata(&file).unwrap().permissions().mode(), 0o100_600);
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.lines().any(|line| line == "export PLAIN='canary'"), "{text}");
    assert!(text.lines().any(|line| line == "export EMPTY=''"), "{text}");
    for (name, value) in variables {
        for shell in ["bash", "sh"] {
            assert_eq!(sourced(shell, &file, name), value, "{name}: {text}");
        }
    }
    assert!(!world.home().join("never").exists());
    fs::write(world.home().join("go"), "").unwrap();
    assert_eq!(hub.finish("some-job").result(), "passed");
    hub.wait_for_state("waiting-for-jobs");
    assert_eq!(copies(&temporary), [""; 0]);
}

#[test]
fn the_file_with_the_variables_does_not_outlive_an_agent_that_is_killed() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let (agent, temporary) = with_temporary(&world, &hub);
    hub.queue(with_variables(job("1", &[RUN_FOR_EVER]), &[("A", "1")]));
    hub.wait_for_log("1", RUNNING);
    assert_eq!(copies(&temporary), [".env-1"]);
    agent.signal(Signal::SIGKILL);
    wait_until(|| copies(&temporary).is_empty(), || "the file stays".to_owned());
}

#[test]
fn a_link_at_the_path_of_the_file_with_the_variables_is_not_followed() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let (_agent, temporary) = with_temporary(&world, &hub);
    let there = world.file("there", "as it was");
    let nowhere = world.home().join("nowhere");
    for (id, target) in [("1", &there), ("2", &nowhere)] {
        symlink(target, temporary.join(format!(".env-{id}"))).unwrap();
        let finished = hub.run(&with_variables(job(id, &["echo \"$A\""]), &[("A", "canary")]));
        assert_eq!((finished.result(), finished.output()), ("passed", "canary\n".to_owned()));
        assert_eq!(fs::read_to_string(&there).unwrap(), "as it was");
        assert!(!nowhere.exists());
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_job_in_containers_has_no_file_with_variables() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let (_agent, temporary) = with_temporary(&world, &hub);
    let request = docker::job("bash", &[RUN_FOR_EVER]);
    let id = hub.queue(with_variables(request, &[("A", "canary")]));
    hub.wait_for_log(&id, RUNNING);
    assert_eq!(copies(&temporary), [""; 0]);
    hub.stop_job(&id);
    assert_eq!(hub.finish(&id).result(), "stopped");
    assert_eq!(copies(&temporary), [""; 0]);
}
