//! Keys of a job are removed when the job has ended and nobody is logged in, and sessions opened with them
//! end with the job's teardown.

use std::fs;
use std::process::Child;
use std::time::Duration;

use serde_json::json;

use crate::serve::login::{Machine, script, text};
use test_support::serve::ServeAgent;
use test_support::ssh::client;
use test_support::{
    KilledOnFailure, RUN_UNTIL_GO, RUNNING, World, base64, job, processes_with, wait_for_end,
    wait_until,
};

const KEY: &str = "ssh-ed25519 AAAA of-the-job";

/// Returns all traces of a job with keys in files of the user.
fn traces_of_access(world: &World) -> Vec<&'static str> {
    let home = world.home();
    let files = [
        ("the keys", home.join(".ssh/authorized_keys")),
        ("the profile", home.join(".bash_profile")),
        ("the script", script(world)),
    ];
    let leads_in = |text: String| text.contains("job-");
    let ways = files.into_iter().filter(|(_, path)| fs::read_to_string(path).is_ok_and(leads_in));
    ways.map(|(what, _)| what).collect()
}

#[test]
fn keys_are_removed_soon_after_the_job_even_if_its_log_is_not_archived() {
    let world = World::new();
    let agent = ServeAgent::start(&world);
    let mut request = job("1", &[RUN_UNTIL_GO]);
    request["ssh_public_keys"] = json!([base64(KEY.as_bytes())]);
    agent.post_job(&request).of_status(200);
    agent.wait_for_log("1", RUNNING);
    assert_eq!(traces_of_access(&world), ["the keys", "the profile", "the script"]);
    fs::write(world.home().join("go"), "").unwrap();
    agent.wait_for_log("1", "job_finished");
    wait_until(
        || traces_of_access(&world).is_empty(),
        || format!("still there: {:?}", traces_of_access(&world)),
    );

    // The job is not torn down yet, and its log still exists.
    assert_ne!(agent.get("/status").of_status(200).json()["state"], "waiting-for-job");
    assert!(agent.get("/jobs/1/log").of_status(200).text().contains("running"));
    assert_eq!(agent.finish("1").result(), "passed");
    assert_eq!(traces_of_access(&world), [""; 0]);
}

/// Logs in, by the script or by a login shell, and runs a command with the marker.
fn log_in(machine: &Machine, by_script: bool, marker: &str, what: &str) -> Child {
    let what = what.replace("MARKED", marker);
    let command = if by_script {
        format!("bash {} bash -c '{what}'", script(&machine.world).display())
    } else {
        format!("bash -lc '{what}'")
    };
    let before = processes_with(marker).len();
    let session = client(machine.port(), &machine.key).args(["127.0.0.1", &command]).spawn();
    wait_until(|| processes_with(marker).len() > before, || format!("{command} does not run"));
    session.unwrap()
}

/// Starts a job and returns a marker for the sessions of people who log in.
fn start(machine: &Machine) -> String {
    machine.agent.post_job(&machine.job(&[RUN_UNTIL_GO])).of_status(200);
    machine.agent.wait_for_log("1", RUNNING);
    format!("MARKER={}", machine.world.home().display())
}

#[test]
#[cfg_attr(not(has_ssh), ignore = "needs sshd, ssh, ssh-keygen and git")]
fn keys_stay_while_somebody_is_logged_in() {
    let machine = Machine::start_with(|_, _| {});
    let marker = start(&machine);
    let _killed = KilledOnFailure(marker.clone());
    let stay = "env MARKED bash -c \"until [[ -e ~/leave ]]; do sleep 0.01; done\"; exit 5";
    let sessions = [true, false].map(|by_script| log_in(&machine, by_script, &marker, stay));
    fs::write(machine.world.home().join("go"), "").unwrap();
    machine.agent.wait_for_log("1", "job_finished");
    // While somebody is logged in, others may log in, too.
    for _ in 0..5 {
        let answer = machine.ssh("echo in");
        assert_eq!(text(&answer), ("in\n".into(), Some(0)), "{answer:?}");
        std::thread::park_timeout(Duration::from_secs(1));
    }
    assert!(!processes_with(&marker).is_empty(), "a session ended before the teardown");
    fs::write(machine.world.home().join("leave"), "").unwrap();
    for session in sessions {
        assert_eq!(wait_for_end(session).status.code(), Some(5));
    }
    let left = || traces_of_access(&machine.world);
    wait_until(|| left().is_empty(), || format!("still there: {:?}", left()));
    assert_eq!(machine.ssh("true").status.code(), Some(255), "a key still opens");
    assert_eq!(machine.agent.finish("1").result(), "passed");
}

#[test]
#[cfg_attr(not(has_ssh), ignore = "needs sshd, ssh, ssh-keygen and git")]
fn a_session_that_clears_its_environment_ends_with_the_job() {
    let machine = Machine::start_with(|_, _| {});
    let marker = start(&machine);
    let _killed = KilledOnFailure(marker.clone());
    let name = "SEMAPHORE_AGENT_SSH_SESSION";
    let hidden = format!("unset {name}; exec env -u {name} MARKED sleep 1000");
    let sessions = [true, false].map(|by_script| log_in(&machine, by_script, &marker, &hidden));
    machine.end_job();
    assert_eq!(processes_with(&marker), [""; 0]);
    for session in sessions {
        assert_ne!(wait_for_end(session).status.code(), Some(0));
    }
}
