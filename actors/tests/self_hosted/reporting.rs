//! Reports that nobody answers for a long time are not given up too early.

use std::time::Duration;

use actors::intake::poller::Interrupt;
use actors::testing::ScriptedJob;

use crate::support::{Agent, job, minutes, seconds};

const FINISHED: &str = "report finished-job 1 passed";

/// An agent whose job ended, and whose control plane was away from so long before until so long after.
async fn away_at_the_end(before: Duration, after: Duration) -> Agent {
    let agent = Agent::with_job_of(minutes(30));
    agent.until("report running-job 1").await;
    agent.wait(minutes(30) - before - agent.began.elapsed()).await;
    agent.hub.refuse("report", u32::MAX);
    agent.until(FINISHED).await;
    let since = agent.began.elapsed() - agent.time_of(FINISHED);
    agent.wait(after - since).await;
    agent.hub.refuse("report", 0);
    agent
}

/// It was told, and the agent goes on.
async fn assert_told(agent: &Agent) {
    agent.wait(minutes(1)).await;
    assert_eq!(agent.count("disconnect"), 0, "{:#?}", agent.world.calls());
    assert_eq!(agent.world.calls().last().unwrap(), "report waiting-for-jobs");
}

#[actix::test]
async fn a_result_is_told_to_a_control_plane_that_was_away_for_a_quarter_of_an_hour() {
    let agent = away_at_the_end(seconds(5), minutes(15) - seconds(10)).await;
    assert_told(&agent).await;
}

#[actix::test]
async fn a_result_has_its_quarter_of_an_hour_though_the_control_plane_was_away_before() {
    let agent = away_at_the_end(minutes(8), minutes(15) - seconds(10)).await;
    assert_told(&agent).await;
}

#[actix::test]
async fn a_result_that_is_never_taken_holds_the_agent_for_a_bounded_time() {
    let agent = away_at_the_end(seconds(5), minutes(5)).await;
    agent.hub.refuse("report", u32::MAX);
    let (left, _) = agent.left().await;
    assert!(left.is_ok());
    let last = agent.world.times_of(FINISHED).last().copied().unwrap();
    let told_for = last - agent.began - agent.time_of(FINISHED);
    assert!(told_for >= minutes(14), "only {told_for:?}");
}

#[actix::test]
async fn a_job_that_comes_with_a_slow_answer_is_run_though_there_is_more_to_tell() {
    let agent = Agent::idle(ScriptedJob::default());
    agent.hub.queue("1", job("1", 1));
    agent.hub.take(seconds(15));
    agent.until("report waiting-for-jobs").await;
    agent.wait(seconds(1)).await;
    agent.poller.send(Interrupt).await.unwrap();
    agent.until("fetch 1").await;
    // Both answers take 15 s: that of the registration, and that of the report.
    agent.assert_time("fetch 1", seconds(30));
    assert_eq!(agent.count("report waiting-for-jobs interrupted"), 0);
    agent.until("report finished-job 1 passed interrupted").await;
}
