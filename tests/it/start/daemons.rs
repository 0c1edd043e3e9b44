//! Daemons that a job may leave behind on purpose.

use std::fs;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use test_support::start::{Hub, SOON, StartAgent};
use test_support::{RUN_FOR_EVER, RUNNING, World, job, marked, processes_with, wait_until};

/// Starts a background job, and a daemon in a session of its own, and waits until the daemon runs.
const START_BOTH: &str = "rm -f ~/up; sleep 2000 & \
    setsid -f bash -c 'touch ~/up; exec sleep 1000' >/dev/null 2>&1 </dev/null; \
    until [[ -e ~/up ]]; do :; done";

#[test]
fn a_daemon_outlives_its_job_and_agent_if_configured() {
    let (world, hub) = (World::new(), Hub::start(SOON));
    let mut agent = StartAgent::start_with(&world, &hub, |command| {
        command.arg("--keep-daemons");
    });
    let (request, marker) = marked(job("kept", &[START_BOTH, "false"]));
    assert_eq!(hub.run(&request).result(), "failed");
    // The background job gets SIGHUP, and may take a moment to end.
    wait_until(|| daemons(&marker).len() == 1, || format!("{:?}", daemons(&marker)));
    let left = daemons(&marker);

    let (request, stopped) = marked(job("stopped", &[START_BOTH, RUN_FOR_EVER]));
    let id = hub.queue(request);
    hub.wait_for_log(&id, RUNNING);
    hub.stop_job(&id);
    assert_eq!(hub.finish(&id).result(), "stopped");
    assert_eq!(processes_with(&stopped), [""; 0]);

    hub.shut_down("requested");
    assert_eq!(agent.exit_code(), Some(0));
    assert_eq!(daemons(&marker), left);
    // Its parent has reaped it, and has ended with it.
    let parent = Path::new("/proc").join(left[0].parent.to_string()).join("exe");
    kill(left[0].pid, Signal::SIGKILL).unwrap();
    wait_until(|| parent.read_link().is_err(), || format!("{} stays", parent.display()));
    assert_eq!(processes_with(&marker), [""; 0]);
}

#[derive(Debug, PartialEq)]
struct Daemon {
    pid: Pid,
    parent: i32,
}

fn daemons(marker: &str) -> Vec<Daemon> {
    let parse = |found: String| {
        let path = Path::new(found.split(' ').next().unwrap());
        let pid = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        let status = fs::read_to_string(path.join("status")).unwrap();
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap();
        Daemon { pid: Pid::from_raw(pid), parent: parent.trim().parse().unwrap() }
    };
    processes_with(marker).into_iter().map(parse).collect()
}
