//! No container, network or volume of a job outlives the job.

use std::net::TcpListener;
use std::time::{Duration, SystemTime};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use test_support::docker::{
    Owned, container, docker, docker_prints, job, job_in, leftovers_of, make_images,
};
use test_support::{Finished, Running, World, unique};

/// Builds an image whose containers have an anonymous volume at `/data`.
fn with_volume() -> Owned {
    make_images();
    let name = unique();
    let _container = Owned(&["rm", "-f"], name.clone());
    docker_prints(&["create", "--name", &name, "agent-test/bash"]);
    let image = format!("agent-test/volume:{name}");
    docker_prints(&["commit", "--change", "VOLUME /data", &name, &image]);
    Owned(&["image", "rm"], image)
}

/// Waits until the job's containers and networks on the engine satisfy a condition.
fn wait_for(job: &Value, there: impl Fn(&[String]) -> bool) {
    let deadline = SystemTime::now() + Duration::from_secs(30);
    loop {
        let left = leftovers_of(job);
        if there(&left) {
            return;
        }
        assert!(SystemTime::now() < deadline, "{left:?}");
    }
}

fn stopped(job: &Value, running: Running) -> Finished {
    let finished = running.finish();
    assert_eq!((finished.result(), finished.exit_code), ("stopped", Some(130)), "{finished:#?}");
    assert_eq!(leftovers_of(job), [""; 0]);
    finished
}

/// Returns a job with side containers that runs until it is stopped.
fn endless(command: &str) -> Value {
    let stubborn = "sh -c \"trap : TERM INT; while :; do sleep 1; done\"";
    let mut side = container("stubborn", "bash");
    side["command"] = stubborn.into();
    let containers = json!([container("main", "bash"), container("web", "service"), side]);
    let mut job = job_in(containers, &[command, "echo next"]);
    job["epilogue_always_commands"] = json!([{ "directive": "echo epilogue" }]);
    job
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn anonymous_volumes_are_removed_with_a_job_that_passes_or_fails() {
    let image = with_volume();
    for (last, result) in [("true", "passed"), ("false", "failed"), ("exit 1", "failed")] {
        let mut job = endless("true");
        for container in job["compose"]["containers"].as_array_mut().unwrap() {
            if container["name"] != "web" {
                container["image"] = image.1.clone().into();
            }
        }
        let volume = "grep -o '/volumes/[0-9a-f]*/_data /data' /proc/self/mountinfo; touch /data/x";
        job["commands"] = json!([{ "directive": volume }, { "directive": last }]);
        let finished = World::new().run(&job.to_string());
        assert_eq!(finished.result(), result, "{finished:#?}");
        assert_eq!(leftovers_of(&job), [""; 0]);
        let (printed, exit_code) = &finished.commands()[0];
        assert_eq!(*exit_code, 0, "{printed}");
        let id = printed.split('/').nth(2).unwrap();
        assert_eq!(id.len(), 64, "{printed}");
        let (code, printed) = docker(&["volume", "inspect", id]);
        assert!(code == 1 && printed.contains("no such volume"), "{printed}");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn nothing_is_left_of_a_job_whose_start_fails() {
    let mut job = endless("true");
    job["compose"]["containers"][0]["image"] = "agent-test/nobash".into();
    let finished = World::new().run(&job.to_string());
    assert_eq!(finished.result(), "failed");
    assert_eq!(leftovers_of(&job), [""; 0]);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_job_can_be_stopped_while_a_registry_does_not_respond() {
    let registry = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut job = endless("true");
    let image = format!("{}/x", registry.local_addr().unwrap());
    job["compose"]["containers"][1]["image"] = image.into();
    let running = World::new().start(&job.to_string());
    let _asked = registry.accept().unwrap();
    running.signal(Signal::SIGTERM);
    let finished = stopped(&job, running);
    let steps = finished.steps();
    let (title, _, exit_code) = steps.last().unwrap();
    assert_eq!((title.as_str(), *exit_code), ("Pulling docker images...", 1));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_job_can_be_stopped_while_its_entrypoint_hangs() {
    let mut job = endless("true");
    job["compose"]["containers"][0]["entrypoint"] = "sleep 1000".into();
    let running = World::new().start(&job.to_string());
    wait_for(&job, |there| there.iter().any(|line| line.contains("-main Up")));
    running.signal(Signal::SIGTERM);
    let finished = stopped(&job, running);
    let steps = finished.steps();
    let (title, _, exit_code) = steps.last().unwrap();
    assert_eq!((title.as_str(), *exit_code), ("Starting the docker image...", 1));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_job_can_be_stopped_while_it_waits_for_a_side_container() {
    let mut job = endless("true");
    job["compose"]["containers"][1]["command"] = "sleep 1000".into();
    let running = World::new().start(&job.to_string());
    wait_for(&job, |there| there.iter().any(|line| line.contains("-main Up")));
    running.signal(Signal::SIGTERM);
    stopped(&job, running);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_stopped_command_finishes_with_1_and_no_command_follows() {
    for command in [
        "echo running; sleep 1000",
        "trap '' TERM INT HUP; echo running; while :; do sleep 1; done",
        "echo running; yes",
        "(setsid sleep 1000 &); echo running; kill -STOP $$",
        "echo running; read -r line </dev/tty",
    ] {
        let job = endless(command);
        let mut running = World::new().start(&job.to_string());
        running.wait_for_output("running\n");
        assert_eq!(leftovers_of(&job).len(), 4);
        running.signal(Signal::SIGTERM);
        let finished = stopped(&job, running);
        let steps = finished.steps();
        let (title, _, exit_code) = steps.last().unwrap();
        assert_eq!((title.as_str(), *exit_code), (command, 1));
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_second_signal_leaves_nothing() {
    let job = endless("echo running; sleep 1000");
    let mut running = World::new().start(&job.to_string());
    running.wait_for_output("running\n");
    running.signal(Signal::SIGINT);
    running.signal(Signal::SIGINT);
    stopped(&job, running);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_stop_in_the_first_moments_leaves_nothing() {
    for delay in [0, 5, 20, 40, 60, 90, 130, 200, 300, 450, 650, 900, 1200] {
        let job = endless("sleep 1000");
        let world = World::new();
        let running = world.start(&job.to_string());
        // The delays need not hit a specific moment: all are tried, and each must be handled.
        std::thread::park_timeout(Duration::from_millis(delay));
        running.signal(Signal::SIGTERM);
        let output = running.child.wait_with_output().unwrap();
        match output.status.code() {
            // The agent was killed before it handled signals, and had started nothing.
            None => assert!(output.stdout.is_empty()),
            code => {
                assert_eq!(code, Some(130), "after {delay} ms");
                assert_eq!(Finished::of(&output).result(), "stopped");
            }
        }
        assert_eq!(leftovers_of(&job), [""; 0], "after {delay} ms");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_container_that_the_job_started_stays_and_its_network_is_removed() {
    let name = unique();
    let _stranger = Owned(&["rm", "-f"], name.clone());
    let network = "docker inspect -f '{{range $name, $_ := .NetworkSettings.Networks}}{{$name}}{{end}}' $(hostname)";
    let start = format!(
        "docker run -d --name {name} --network $(cat /tmp/network) agent-test/service >/tmp/id"
    );
    let fetch = format!("until wget -q -O - http://{name}:8080; do sleep 0.1; done");
    let job = job("docker", &[&format!("{network} | tee /tmp/network"), &start, &fetch]);
    let finished = World::new().run(&job.to_string());
    assert_eq!(finished.result(), "passed", "{finished:#?}");
    assert!(finished.output().ends_with("\nservice\n"), "{finished:#?}");
    assert_eq!(leftovers_of(&job), [""; 0]);
    assert_eq!(docker_prints(&["inspect", "-f", "{{.State.Running}}", &name]), "true");
    let network = finished.commands()[0].0.trim().to_owned();
    let (code, printed) = docker(&["network", "inspect", &network]);
    assert!(code == 1 && printed.contains(&network), "{printed}");
}
