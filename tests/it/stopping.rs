//! Stops at every moment of a job.

use nix::sys::signal::Signal;

use crate::support::{World, job_of};

#[test]
fn a_stopped_command_finishes_with_1_and_nothing_follows() {
    let job = serde_json::json!({
        "job_id": "1",
        "commands": [{"directive": "echo running; sleep 1000"}, {"directive": "echo next"}],
        "epilogue_always_commands": [{"directive": "echo epilogue"}],
    });
    let mut running = World::new().start(&job.to_string());
    running.wait_for_output("running\n");
    running.signal(Signal::SIGTERM);
    let finished = running.finish();
    assert_eq!((finished.result(), finished.exit_code), ("stopped", Some(130)));
    assert_eq!(finished.commands(), [(String::new(), 1)], "what was read before is not in here");
}

#[test]
fn a_stop_during_an_epilogue_makes_the_result_stopped() {
    let job = serde_json::json!({
        "job_id": "1",
        "commands": [{"directive": "true"}],
        "epilogue_always_commands": [{"directive": "echo epilogue; sleep 1000"}, {"directive": "echo next"}],
    });
    let mut running = World::new().start(&job.to_string());
    running.wait_for_output("epilogue\n");
    running.signal(Signal::SIGTERM);
    let finished = running.finish();
    assert_eq!(finished.result(), "stopped");
    assert!(!finished.output().contains("next"));
}

#[test]
fn a_stop_while_the_profile_hangs_is_heeded() {
    let world = World::new();
    let reached = world.home().join("reached");
    let profile = format!("touch {}; sleep 1000\n", reached.display());
    std::fs::write(world.home().join(".bash_profile"), profile).unwrap();
    let running = world.start(&job_of(&["echo x"]));
    while !reached.exists() {
        std::thread::yield_now();
    }
    running.signal(Signal::SIGTERM);
    let finished = running.finish();
    assert_eq!(finished.result(), "stopped");
    assert!(!finished.output().contains('x'));
}

#[test]
fn a_second_signal_kills_what_would_not_go() {
    let stubborn = "trap '' TERM HUP INT; setsid -f bash -c \"trap '' TERM; touch ~/up; while :; do sleep 1000; done\"; echo running; sleep 1000";
    let world = World::new();
    let mut running = world.start(&job_of(&[stubborn]));
    running.wait_for_output("running\n");
    running.signal(Signal::SIGINT);
    running.signal(Signal::SIGINT);
    let finished = running.finish();
    assert_eq!(finished.exit_code, Some(130));
    assert_eq!(finished.result(), "stopped");
}

#[test]
fn a_flood_can_be_stopped() {
    let mut running = World::new().start(&job_of(&["echo running; yes"]));
    running.wait_for_output("running\n");
    running.signal(Signal::SIGTERM);
    let finished = running.finish();
    assert_eq!(finished.result(), "stopped");
}

#[test]
fn a_stop_in_the_first_moments_is_never_lost() {
    for delay in [0, 1, 2, 3, 5, 8, 13, 21] {
        let world = World::new();
        let job = job_of(&["sleep 1000"]);
        let running = world.start(&job);
        // Not to win a race: every moment is to be tried, and each must be right.
        std::thread::park_timeout(std::time::Duration::from_millis(delay));
        running.signal(Signal::SIGTERM);
        let output = running.child.wait_with_output().unwrap();
        match output.status.code() {
            // Before the agent listened: killed like any program, and nothing had started.
            None => assert!(output.stdout.is_empty()),
            code => {
                assert_eq!(code, Some(130), "after {delay} ms");
                assert_eq!(crate::support::Finished::of(&output).result(), "stopped");
            }
        }
    }
}
