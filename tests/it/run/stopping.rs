//! Stops in every phase of a job.

use nix::sys::signal::Signal;

use test_support::{World, job_of, wait_for_file};

#[test]
fn a_stopped_command_finishes_with_1_and_no_command_follows() {
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
    assert_eq!(
        finished.commands(),
        [(String::new(), 1)],
        "output that was already read is not included"
    );
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
fn a_stop_works_while_the_profile_hangs() {
    let world = World::new();
    let reached = world.home().join("reached");
    let profile = format!("touch {}; sleep 1000\n", reached.display());
    std::fs::write(world.home().join(".bash_profile"), profile).unwrap();
    let running = world.start(&job_of(&["echo x"]));
    while !reached.exists() {
        test_support::pause();
    }
    running.signal(Signal::SIGTERM);
    let finished = running.finish();
    assert_eq!(finished.result(), "stopped");
    assert!(!finished.output().contains('x'));
}

#[test]
fn a_second_signal_kills_a_stubborn_job() {
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
        // The delays need not hit a specific moment: all are tried, and each must be handled.
        std::thread::park_timeout(std::time::Duration::from_millis(delay));
        running.signal(Signal::SIGTERM);
        let output = running.child.wait_with_output().unwrap();
        match output.status.code() {
            // The agent was killed before it handled signals, and had started nothing.
            None => assert!(output.stdout.is_empty()),
            code => {
                assert_eq!(code, Some(130), "after {delay} ms");
                assert_eq!(test_support::Finished::of(&output).result(), "stopped");
            }
        }
    }
}

#[test]
fn a_running_command_gets_sigterm_before_its_terminal_is_closed() {
    let world = World::new();
    let polite = "bash -c 'trap \"echo asked >~/asked; exit\" TERM; echo running; while :; do sleep 0.01; done'";
    let mut running = world.start(&job_of(&[&format!("{polite}; touch ~/deployed")]));
    running.wait_for_output("running\n");
    running.signal(Signal::SIGTERM);
    assert_eq!(running.finish().result(), "stopped");
    assert_eq!(std::fs::read_to_string(world.home().join("asked")).unwrap(), "asked\n");
    assert!(!world.home().join("deployed").exists());
}

#[test]
fn a_full_terminal_does_not_block_a_program_that_prints_while_it_ends() {
    let world = World::new();
    let chatty = "bash -c 'trap \"seq 100000; echo asked >~/asked; exit\" TERM; echo running; while :; do sleep 0.01; done'";
    let mut running = world.start(&job_of(&[chatty]));
    running.wait_for_output("running\n");
    running.signal(Signal::SIGTERM);
    assert_eq!(running.finish().result(), "stopped");
    assert!(world.home().join("asked").exists());
}

#[test]
fn a_job_that_paused_its_job_init_can_be_stopped() {
    let world = World::new();
    let mut running = world.start(&job_of(&["kill -STOP $PPID; echo running; sleep 1000"]));
    running.wait_for_output("running\n");
    running.signal(Signal::SIGTERM);
    assert_eq!(running.finish().result(), "stopped");
    assert_eq!(std::fs::read_dir(world.state()).unwrap().count(), 0);
}

#[test]
fn signals_that_were_ignored_at_the_start_stay_ignored() {
    let world = World::new();
    let path = world
        .file("job.json", job_of(&["touch ~/running; until [[ -e ~/go ]]; do sleep 0.01; done"]));
    let agent = world.agent();
    let mut protected = std::process::Command::new("nohup");
    protected.arg(agent.get_program()).args(["run", "--output", "json"]).arg(path).env_clear();
    protected.envs(agent.get_envs().filter_map(|(name, value)| Some((name, value?))));
    protected.stdin(std::process::Stdio::null());
    let child = protected.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let child = child.spawn().unwrap();
    test_support::wait_for_file(&world.home().join("running"));
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, Signal::SIGHUP).unwrap();
    std::fs::write(world.home().join("go"), "").unwrap();
    let output = test_support::wait_for_end(child);
    assert_eq!(test_support::Finished::of(&output).result(), "passed");
}

#[test]
fn a_shell_that_is_stopped_before_it_is_ready_leaves_no_history() {
    let world = World::new();
    let profile = "history -s remembered; : > ~/there; while :; do sleep 1; done\n";
    std::fs::write(world.home().join(".bash_profile"), profile).unwrap();
    let running = world.start(&job_of(&["true"]));
    wait_for_file(&world.home().join("there"));
    running.signal(Signal::SIGTERM);
    assert_eq!(running.finish().result(), "stopped");
    assert!(!world.home().join(".bash_history").exists());
}
