//! Responses of the control plane with unusual fields.

use std::fs;

use serde_json::{Value, json};

use test_support::start::{Hub, SOON, StartAgent};
use test_support::{RUN_FOR_EVER, RUNNING, World, job};

/// Sends this response to an agent and waits for the agent's end. Returns the shutdown reason, as passed to
/// its hook.
fn end(answer: Value) -> String {
    let hub = Hub::start(SOON);
    let world = World::new();
    let hook = world.file("hook", "echo $SEMAPHORE_AGENT_SHUTDOWN_REASON >>~/reason\n");
    let mut agent = StartAgent::start_with(&world, &hub, |command| {
        command.arg("--shutdown-hook-path").arg(hook);
    });
    hub.wait_for_state("waiting-for-jobs");
    let shown = answer.to_string();
    let reports = hub.look(|known| known.reports.len());
    hub.answer_next([answer]);
    hub.wait_until("some more reports, or the end", |known| {
        known.disconnected > 0 || known.reports.len() > reports + 5
    });
    assert_eq!(hub.look(|known| known.disconnected), 1, "not obeyed: {shown}");
    assert_eq!(agent.exit_code(), Some(0));
    fs::read_to_string(world.home().join("reason")).unwrap().trim().to_owned()
}

#[test]
fn an_action_is_done_whatever_the_time_of_the_next_report() {
    for odd in [json!(-5), json!(150.5), json!("150"), json!("soon"), json!(1e300), json!([1])] {
        let answer = json!({
            "action": "shutdown", "shutdown_reason": "requested", "next_sync_after": odd,
        });
        assert_eq!(end(answer), "REQUESTED");
    }
}

#[test]
fn an_action_is_done_although_an_unneeded_field_is_malformed() {
    let unused_job = json!({ "action": "shutdown", "shutdown_reason": "idle", "job_id": 7 });
    assert_eq!(end(unused_job), "IDLE");
    let odd_reason = json!({ "action": "shutdown", "shutdown_reason": { "code": 3 } });
    assert_eq!(end(odd_reason), "UNKNOWN");
}

#[test]
fn milliseconds_may_have_a_fraction_or_quotes() {
    for odd in [json!(700.5), json!("700")] {
        let hub = Hub::start(SOON);
        let world = World::new();
        let _agent = StartAgent::start(&world, &hub);
        hub.wait_for_state("waiting-for-jobs");
        let reports = hub.look(|known| known.reports.len());
        hub.answer_next(vec![json!({ "action": "continue", "next_sync_after": odd }); 4]);
        hub.wait_until("these reports", |known| known.reports.len() > reports + 5);
        let times = hub.look(|known| known.answered[reports..].to_vec());
        let pauses = times.windows(2).map(|two| two[1].duration_since(two[0]).unwrap().as_millis());
        // The first report may have preceded these responses. After an error, the pause would be longer.
        let pauses: Vec<_> = pauses.skip(1).take(3).collect();
        let shortest = pauses.iter().min().unwrap();
        assert!((600..1000).contains(shortest), "{odd}: {pauses:?}");
    }
}

#[test]
fn a_response_with_a_malformed_field_still_stops_the_job() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let id = hub.queue(job("1", &[RUN_FOR_EVER]));
    hub.wait_for_log(&id, RUNNING);
    hub.answer_next([json!({ "action": "stop-job", "job_id": id, "next_sync_after": -1 })]);
    assert_eq!(hub.finish(&id).result(), "stopped");
}
