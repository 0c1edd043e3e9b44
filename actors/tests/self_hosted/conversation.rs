//! Registration, jobs, and answers that make sense or none.

use actors::intake::poller::{AwaitLeave, Interrupt, Left};
use actors::intake::protocol::{Answer, ShutdownReason};
use actors::testing::{Reaction, ScriptedJob};

use crate::support::{Agent, case, chatter, job, job_with_logger, minutes, seconds, shutdown};

#[actix::test]
async fn who_is_registered_at_the_last_try_runs_jobs() {
    let agent = Agent::with_job(chatter(1));
    agent.hub.refuse("register", 29);
    agent.until_delivered("passed").await;
    assert_eq!(agent.count("register"), 30);
    agent.assert_time("report waiting-for-jobs", seconds(29));
}

#[actix::test]
async fn who_is_never_registered_does_not_stay() {
    let agent = Agent::with_job(chatter(1));
    agent.hub.refuse("register", 30);
    let (left, after) = agent.left().await;
    assert_eq!(left, Ok(Left::NotRegistered("503".to_owned())));
    assert_eq!(after.as_secs(), 29);
    agent.wait(minutes(1)).await;
    assert_eq!(agent.world.calls(), vec!["register"; 30]);
}

#[actix::test]
async fn a_job_is_finished_when_its_log_is_delivered_and_the_next_one_starts_without_pause() {
    let agent = Agent::with_job(chatter(3));
    agent.hub.queue("2", job("2", 1));
    agent.until("report finished-job 2 passed").await;
    agent.assert_delivered();
    agent.assert_order(&[
        "register",
        "report waiting-for-jobs",
        "report starting-job 1",
        "report running-job 1",
        "log is whole",
        "upload",
        "report finished-job 1 passed",
        "report waiting-for-jobs",
        "fetch 2",
        "report running-job 2",
        "log is whole",
        "report finished-job 2 passed",
    ]);
    assert_eq!(agent.time_of("fetch 2"), agent.time_of("report finished-job 1 passed"));
    agent.assert_time("prepare", seconds(0));
}

#[test]
fn while_the_log_is_delivered_the_job_is_running() {
    for (action, state, result) in
        [("continue", "running-job", "passed"), ("stop-job", "stopping-job", "stopped")]
    {
        case(async {
            let agent = Agent::with_job_of(seconds(30));
            agent.uplink.take(seconds(20));
            agent.until("report running-job 1").await;
            agent.hub.say(action, "1");
            agent.until_delivered(result).await;
            agent.assert_order(&["end everything within 2s", "log is whole", "close access"]);
            let calls = agent.world.calls();
            let delivery = calls
                .split(|call| ["end everything within 2s", "log is whole"].contains(&&**call))
                .nth(1)
                .unwrap();
            assert!(delivery.len() > 2, "{calls:#?}");
            assert_eq!(delivery, vec![format!("report {state} 1"); delivery.len()]);
        });
    }
}

#[actix::test]
async fn the_end_of_a_job_and_an_interruption_are_told_at_once() {
    let agent = Agent::with_job_of(seconds(100));
    agent.hub.answer(Answer::default());
    agent.until("report waiting-for-jobs").await;
    agent.poller.send(Interrupt).await.unwrap();
    agent.assert_time("report waiting-for-jobs interrupted", seconds(0));
    agent.poller.send(Interrupt).await.unwrap();
    assert_eq!(agent.count("report waiting-for-jobs interrupted"), 1);
    agent.until("report finished-job 1 passed interrupted").await;
    let ended = agent.time_of("run do 0") + seconds(100);
    agent.assert_time("report finished-job 1 passed interrupted", ended);
}

#[actix::test]
async fn what_changes_during_a_report_is_told_right_after_it() {
    let agent = Agent::with_job_of(seconds(3));
    agent.hub.take(seconds(2));
    agent.until("report running-job 1").await;
    let running = agent.time_of("report running-job 1");
    agent.poller.send(Interrupt).await.unwrap();
    assert_eq!(agent.count("report running-job 1 interrupted"), 0, "one report at a time");
    agent.until("report running-job 1 interrupted").await;
    agent.assert_time("report running-job 1 interrupted", running + seconds(2));
    agent.until("report finished-job 1 passed interrupted").await;
    // It ended while the second report was on its way.
    agent.assert_time("report finished-job 1 passed interrupted", running + seconds(4));
}

#[actix::test]
async fn an_agent_that_could_not_start_a_job_asks_for_none() {
    let world = ScriptedJob::default();
    world.set_not_ready(true);
    let agent = Agent::idle(world.clone());
    agent.until("register").await;
    tokio::time::sleep(seconds(3600)).await;
    assert_eq!(agent.count("report waiting-for-jobs"), 0);
    world.set_not_ready(false);
    agent.until("report waiting-for-jobs").await;
    // One that is to end says so all the same.
    world.set_not_ready(true);
    agent.poller.send(Interrupt).await.unwrap();
    agent.until("report waiting-for-jobs interrupted").await;
}

#[test]
fn the_control_plane_says_when_it_wants_to_hear_again() {
    let cases = [
        (0, 3000..=6000),
        (700, 700..=701),
        (20_000, 20_000..=20_001),
        (1, 100..=101),
        (u64::MAX, 300_000..=300_001),
    ];
    for (next_sync_after, pauses) in cases {
        case(async move {
            let agent = Agent::idle(ScriptedJob::default());
            for _ in 0..20 {
                agent.hub.answer(Answer { next_sync_after, ..Answer::default() });
            }
            agent.hub.answer(shutdown("idle"));
            agent.left_because(ShutdownReason::Idle).await;
            let times = agent.world.times_of("report waiting-for-jobs");
            assert_eq!(times.len(), 21);
            for two in times.windows(2) {
                let pause = (two[1] - two[0]).as_millis();
                assert!(pauses.contains(&pause), "{pause} for {next_sync_after}");
            }
        });
    }
}

#[actix::test]
async fn a_job_that_comes_again_is_not_run_again_but_reported_again() {
    let agent = Agent::with_job_of(seconds(30));
    agent.until("report running-job 1").await;
    agent.hub.say("run-job", "1");
    agent.hub.say("run-job", "other");
    agent.until_delivered("passed").await;
    agent.hub.say("wait-for-jobs", "");
    agent.hub.say("run-job", "1");
    agent.wait(minutes(1)).await;
    assert_eq!(agent.count("report finished-job 1 passed"), 2);
    assert_eq!((agent.count("fetch 1"), agent.count("prepare")), (1, 1));
    assert_eq!(agent.count("fetch other"), 0);
    assert_eq!(agent.world.calls().last().unwrap(), "report waiting-for-jobs");
}

#[actix::test]
async fn answers_that_make_no_sense_change_nothing() {
    let agent = Agent::with_job_of(minutes(2));
    for (action, job) in [("dance", "1"), ("", ""), ("stop-job", "1"), ("run-job", "")] {
        agent.hub.say(action, job);
    }
    agent.until("report running-job 1").await;
    for (action, job) in
        [("stop-job", "2"), ("wait-for-jobs", ""), ("run-job", "2"), ("dance", "1"), ("", "")]
    {
        agent.hub.say(action, job);
    }
    agent.until_delivered("passed").await;
    assert_eq!(agent.count("report stopping-job 1"), 0);
    assert_eq!(agent.count("fetch 2"), 0);
    agent.hub.say("stop-job", "1");
    agent.wait(minutes(1)).await;
    assert_eq!(agent.count("report finished-job 1 stopped"), 0, "that was too late");
}

#[actix::test]
async fn a_job_is_stopped_when_the_control_plane_says_so() {
    let agent = Agent::with_job(vec![Reaction::Hang("so far\n")]);
    agent.until("report running-job 1").await;
    agent.hub.say("stop-job", "1");
    agent.until_delivered("stopped").await;
    agent.assert_order(&["report stopping-job 1", "report finished-job 1 stopped"]);
    assert!(agent.world.log().contains("so far"));
}

#[actix::test]
async fn a_job_that_is_fetched_at_the_last_try_runs() {
    let agent = Agent::with_job(chatter(1));
    agent.hub.refuse("fetch", 9);
    agent.until_delivered("passed").await;
    agent.assert_time("prepare", seconds(27));
}

#[actix::test]
async fn a_job_that_can_not_be_fetched_has_failed() {
    let agent = Agent::with_job(chatter(1));
    agent.hub.refuse("fetch", 10);
    agent.until("report finished-job 1 failed").await;
    agent.assert_time("report finished-job 1 failed", seconds(27));
    agent.wait(minutes(1)).await;
    assert_eq!((agent.count("fetch 1"), agent.count("prepare")), (10, 0));
    assert_eq!(agent.world.calls().last().unwrap(), "report waiting-for-jobs");
}

#[test]
fn a_job_that_can_not_be_run_here_has_failed() {
    let push_nowhere = r#"{"method":"push"}"#;
    let unusable = [
        job("2", 1),
        job_with_logger("1", 1, r#"{"method":"pull"}"#),
        job_with_logger("1", 1, "null"),
        job_with_logger("1", 1, push_nowhere),
        job_with_logger("1", 1, r#"{"method":"carrier pigeon"}"#),
    ];
    for job in unusable {
        case(async {
            let agent = Agent::idle(ScriptedJob::default());
            agent.hub.queue("1", job);
            agent.until("report finished-job 1 failed").await;
            agent.assert_time("report finished-job 1 failed", seconds(0));
            assert_eq!((agent.count("fetch 1"), agent.count("prepare")), (1, 0));
        });
    }
}

#[actix::test]
async fn a_stop_ends_the_fetching_of_a_job() {
    let agent = Agent::with_job(chatter(1));
    agent.hub.refuse("fetch", 5);
    agent.until("report starting-job 1").await;
    agent.hub.say("stop-job", "1");
    agent.until("report finished-job 1 stopped").await;
    assert!(agent.time_of("report finished-job 1 stopped") <= seconds(6));
    agent.wait(minutes(1)).await;
    assert_eq!(agent.count("prepare"), 0);
    assert!(agent.count("fetch 1") <= 3);
}

#[actix::test]
async fn reports_that_are_not_taken_are_repeated_soon_and_nothing_is_lost() {
    let agent = Agent::with_job_of(minutes(1));
    agent.until("report running-job 1").await;
    agent.hub.refuse("report", 60);
    agent.until_delivered("passed").await;
    agent.until("report finished-job 1 passed").await;
    agent.wait(minutes(3)).await;
    assert!(agent.count("report finished-job 1 passed") > 2, "until it is taken");
    assert_eq!(agent.world.calls().last().unwrap(), "report waiting-for-jobs");
    let left = agent.poller.send(AwaitLeave);
    assert!(tokio::time::timeout(minutes(1), left).await.is_err(), "it stays");
}

#[actix::test]
async fn what_is_new_does_not_wait_for_the_answer_to_what_is_old() {
    let agent = Agent::with_job_of(seconds(30));
    agent.until("report running-job 1").await;
    // The next report is answered when nobody cares any more.
    agent.hub.take(minutes(5));
    agent.until("end everything within 2s").await;
    agent.until("report finished-job 1 passed").await;
    let late = agent.time_of("report finished-job 1 passed") - agent.time_of("log is whole");
    assert!(late <= seconds(5), "{late:?}");
}
