//! The agent's user has reached the limit of processes, which also counts threads.

use std::fs::{self, File};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use test_support::callbacks::CallbackServer;
use test_support::serve::ServeAgent;
use test_support::surroundings::{as_user, bash_as, can_switch_user, in_shell};
use test_support::{RUN_UNTIL_GO, RUNNING, World, job};

/// Users who run nothing else on this machine, one for each test, because their processes are counted.
const NARROW: u32 = 12_361;
const GREEDY: u32 = 12_362;

/// Starts processes up to the limit, and then prints a message.
const TAKE_ALL: &str =
    "perl -e 'while (defined(my $p = fork)) { $p or exec \"sleep\", 1000 } print \"none left\\n\"'";

fn with_callbacks(server: &CallbackServer, mut job: Value) -> Value {
    job["callbacks"] = json!({
        "finished": server.url("/finished"),
        "teardown_finished": server.url("/teardown_finished"),
    });
    job
}

/// Starts an agent of this user, whose standard error goes to a file.
fn start(world: &World, user: u32, first: &str) -> ServeAgent {
    let errors = File::create(world.home().with_file_name("errors")).unwrap();
    ServeAgent::start_with(world, |command| {
        in_shell(command, first);
        as_user(world, user, command);
        command.stderr(errors);
    })
}

/// Asserts that the job ends with all callbacks, and that the agent then ends on request.
fn assert_ends_well(world: &World, agent: &mut ServeAgent, server: &CallbackServer, id: &str) {
    let finished = agent.finish(id);
    assert_eq!(finished.result(), "passed", "{finished:?}");
    assert_eq!(server.next().path, "/finished");
    assert_eq!(server.next().path, "/teardown_finished");
    agent.signal(Signal::SIGTERM);
    let status = agent.wait_for_exit();
    let errors = fs::read_to_string(world.home().with_file_name("errors")).unwrap();
    let own_log = agent.whole_log();
    assert_eq!(status.code(), Some(0), "{errors}{own_log}");
    assert!(!format!("{errors}{own_log}").contains("panic"), "{errors}{own_log}");
}

#[test]
fn an_agent_that_can_not_start_threads_still_ends_its_job_and_itself() {
    if !can_switch_user() {
        return;
    }
    let world = World::new();
    let server = CallbackServer::start();
    let mut agent = start(&world, NARROW, "true");
    agent.post_job(&with_callbacks(&server, job("1", &[RUN_UNTIL_GO]))).of_status(200);
    agent.wait_for_log("1", RUNNING);
    // From now on the agent itself can't start any process or thread.
    bash_as(NARROW, &format!("prlimit --nproc=1:1 --pid {}", agent.pid()));
    fs::write(world.home().join("go"), "").unwrap();
    assert_ends_well(&world, &mut agent, &server, "1");
}

#[test]
fn a_job_that_takes_all_processes_ends_like_any_other() {
    if !can_switch_user() {
        return;
    }
    let world = World::new();
    let server = CallbackServer::start();
    // The limit leaves enough for the agent itself.
    let mut agent = start(&world, GREEDY, "ulimit -u 100");
    agent.post_job(&with_callbacks(&server, job("1", &[TAKE_ALL]))).of_status(200);
    agent.wait_for_log("1", "none left");
    assert_ends_well(&world, &mut agent, &server, "1");
}
