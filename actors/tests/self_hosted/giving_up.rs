//! What becomes of a log that can't be delivered.

use std::time::Duration;

use actors::intake::poller::Interrupt;
use actors::ports::PushError;
use actors::testing::{Reaction, Reply, ScriptedJob};

use crate::support::{Agent, PATIENCE, away, case, chatter, job, minutes, seconds};

/// When the job of the tests below ends, after the agent began.
const JOB: Duration = seconds(30);

/// Waits for the result, with the whole log put aside before; answers how long after the job's end.
async fn given_up(agent: &Agent, finished: &str) -> Duration {
    agent.until(finished).await;
    assert_eq!(agent.uplink.kept(), Some(agent.world.log()));
    assert!(agent.world.log().contains("job_finished"));
    agent.assert_order(&["keep 1", "upload", "close access", finished]);
    assert_eq!(agent.count("keep 1"), 1);
    let ended = agent.time_of("end everything within 2s");
    assert!(ended < JOB + seconds(1), "the job itself waits for nobody");
    agent.time_of(finished) - ended
}

fn about(time: Duration, expected: Duration) {
    assert!(expected <= time && time < expected + seconds(1), "{time:?}, not {expected:?}");
}

#[actix::test]
async fn two_minutes_without_progress_after_the_end_are_enough() {
    let agent = Agent::with_job_of(JOB);
    agent.uplink.reply(|push| if push.number < 4 { Reply::Taken } else { away() });
    about(given_up(&agent, "report finished-job 1 passed").await, minutes(2));
    assert!(agent.world.log().starts_with(&agent.uplink.log()));
}

#[actix::test]
async fn a_log_server_that_never_answers_does_not_hold_the_agent() {
    let agent = Agent::with_job_of(JOB);
    agent.uplink.take(minutes(600));
    about(given_up(&agent, "report finished-job 1 passed").await, minutes(2));
}

#[actix::test]
async fn before_the_end_of_the_job_nobody_gives_up() {
    let agent = Agent::with_job_of(minutes(30));
    let began = agent.began;
    agent
        .uplink
        .reply(move |push| if push.at - began < minutes(31) { away() } else { Reply::Taken });
    let finished = agent.until_delivered("passed").await;
    assert!(minutes(31) <= finished && finished < minutes(31) + seconds(9), "{finished:?}");
}

#[actix::test]
async fn an_answer_that_is_lost_is_no_progress() {
    let agent = Agent::with_job_of(JOB);
    agent.uplink.reply(|_| Reply::Lost);
    about(given_up(&agent, "report finished-job 1 passed").await, minutes(2));
}

#[actix::test]
async fn with_progress_it_goes_on_but_not_beyond_all_patience() {
    let mut reactions = vec![Reaction::EndAfter(JOB, "so far\n", 0)];
    reactions.extend(chatter(10));
    let agent = Agent::with_job(reactions);
    agent.uplink.reply(|push| match push.lines {
        1 => Reply::Taken,
        _ => Reply::Refused(PushError::TooLarge),
    });
    agent.until("run do 1").await;
    agent.uplink.take(seconds(100));
    about(given_up(&agent, "report finished-job 1 passed").await, PATIENCE);
    let last = agent.uplink.pushes().into_iter().rev().map(|push| push.at - agent.began).take(6);
    assert!(last.min().unwrap() > JOB, "a line every 100 s");
    assert!(agent.world.log().starts_with(&agent.uplink.log()));
}

#[actix::test]
async fn who_is_interrupted_before_the_end_waits_a_minute_after_it() {
    let agent = Agent::with_job_of(JOB);
    agent.uplink.reply(|_| away());
    agent.until("report running-job 1").await;
    agent.poller.send(Interrupt).await.unwrap();
    about(given_up(&agent, "report finished-job 1 passed interrupted").await, minutes(1));
}

#[test]
fn who_is_interrupted_during_the_delivery_waits_a_minute_more_at_most() {
    for (after, expected) in [(seconds(20), seconds(80)), (seconds(90), seconds(120))] {
        case(async move {
            let agent = Agent::with_job_of(JOB);
            agent.uplink.reply(|_| away());
            agent.until("end everything within 2s").await;
            agent.wait(after).await;
            agent.poller.send(Interrupt).await.unwrap();
            about(given_up(&agent, "report finished-job 1 passed interrupted").await, expected);
        });
    }
}

#[actix::test]
async fn nothing_is_put_aside_or_told_before_it_is_given_up() {
    let agent = Agent::with_job_of(JOB);
    agent.uplink.reply(|_| away());
    agent.until("end everything within 2s").await;
    agent.wait(seconds(100)).await;
    assert_eq!(agent.uplink.kept(), None);
    let calls = agent.world.calls();
    assert!(calls.iter().all(|call| !call.contains("finished-job")), "{calls:#?}");
    assert_eq!(agent.count("upload") + agent.count("close access"), 0);
    agent.uplink.reply(|_| Reply::Taken);
    agent.until_delivered("passed").await;
}

#[actix::test]
async fn the_next_job_is_delivered_as_if_nothing_had_been() {
    let agent = Agent::with_job_of(JOB);
    agent.uplink.reply(|_| away());
    agent.hub.queue("2", job("2", 1));
    agent.until("report finished-job 1 passed").await;
    agent.uplink.reply(|_| Reply::Taken);
    agent.until("report finished-job 2 passed").await;
    assert_eq!(agent.uplink.log(), agent.world.log());
    agent.assert_order(&["keep 1", "prepare", "log is whole", "report finished-job 2 passed"]);
    assert_eq!(agent.count("keep 2"), 0);
}

#[actix::test]
async fn an_upload_that_hangs_holds_up_the_result_no_longer_than_a_delivery() {
    let reactions = [Reaction::EndAfter(JOB, "so far\n", 0)];
    let agent = Agent::idle(ScriptedJob::new(reactions).hanging_in_upload());
    agent.hub.queue("1", job("1", 1));
    agent.until("report finished-job 1 passed").await;
    let ended = agent.time_of("end everything within 2s");
    about(agent.time_of("report finished-job 1 passed") - ended, PATIENCE);
    assert_eq!(agent.uplink.log(), agent.world.log());
}

#[actix::test]
async fn an_upload_that_hangs_ends_with_the_patience_of_an_interrupted_agent() {
    let reactions = [Reaction::EndAfter(JOB, "so far\n", 0)];
    let agent = Agent::idle(ScriptedJob::new(reactions).hanging_in_upload());
    agent.hub.queue("1", job("1", 1));
    agent.until("upload").await;
    agent.poller.send(Interrupt).await.unwrap();
    let interrupted = agent.began.elapsed();
    let finished = "report finished-job 1 passed interrupted";
    agent.until(finished).await;
    about(agent.time_of(finished) - interrupted, minutes(1));
}

#[actix::test]
async fn a_log_that_was_put_aside_is_delivered_as_soon_as_it_can_be() {
    let agent = Agent::with_job_of(JOB);
    agent.uplink.reply(|_| away());
    agent.until("report finished-job 1 passed").await;
    agent.wait(minutes(60)).await;
    assert!(agent.uplink.kept().is_some());
    agent.uplink.reply(|_| Reply::Taken);
    agent.until("remove kept").await;
    agent.assert_order(&["keep 1", "report finished-job 1 passed", "log is whole", "remove kept"]);
    assert_eq!(agent.uplink.log(), agent.world.log());
}
