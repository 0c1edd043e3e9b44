//! Answers of a control plane with fields that are odd.

use std::fs;

use serde_json::{Value, json};

use test_support::start::{Hub, SOON, StartAgent};
use test_support::{RUN_FOR_EVER, RUNNING, World, job};

/// Waits for the end of an agent that is told to end like this; why it ended, in its hook's words.
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
fn an_action_is_done_whatever_the_next_report_is_to_be() {
    for odd in [json!(-5), json!(150.5), json!("150"), json!("soon"), json!(1e300), json!([1])] {
        let answer = json!({
            "action": "shutdown", "shutdown_reason": "requested", "next_sync_after": odd,
        });
        assert_eq!(end(answer), "REQUESTED");
    }
}

#[test]
fn an_action_is_done_though_a_field_that_it_has_no_need_of_is_odd() {
    let unused_job = json!({ "action": "shutdown", "shutdown_reason": "idle", "job_id": 7 });
    assert_eq!(end(unused_job), "IDLE");
    let odd_reason = json!({ "action": "shutdown", "shutdown_reason": { "code": 3 } });
    assert_eq!(end(odd_reason), "UNKNOWN");
}

#[test]
fn a_number_with_a_fraction_or_in_quotes_is_still_a_number_of_milliseconds() {
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
        // A report may have come before the first of these answers. After a failure a pause is longer.
        let pauses: Vec<_> = pauses.skip(1).take(3).collect();
        let shortest = pauses.iter().min().unwrap();
        assert!((600..1000).contains(shortest), "{odd}: {pauses:?}");
    }
}

#[test]
fn a_job_is_stopped_by_an_answer_with_an_odd_field() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let _agent = StartAgent::start(&world, &hub);
    let id = hub.queue(job("1", &[RUN_FOR_EVER]));
    hub.wait_for_log(&id, RUNNING);
    hub.answer_next([json!({ "action": "stop-job", "job_id": id, "next_sync_after": -1 })]);
    assert_eq!(hub.finish(&id).result(), "stopped");
}
