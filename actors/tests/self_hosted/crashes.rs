//! A panic of each actor that only the self-hosted mode has, and of the supervisor in it.

use actors::intake::poller::AwaitLeave;
use actors::ports::PushError;
use actors::supervisor::AwaitDeath;
use actors::testing::{PanicNow, Reaction, Reply, ScriptedJob, panic_as_asked};

use tokio::time::timeout;

use crate::support::{Agent, job, minutes, seconds, unless};

#[actix::test]
async fn a_crash_of_the_log_shipper_loses_nothing() {
    let agent = Agent::with_job(vec![Reaction::EndAfter(seconds(10), "so far\n", 0); 5]);
    agent.uplink.reply(unless(|| PushError::Unauthorized, |push| push.token == "fresh"));
    for _ in 0..3 {
        agent.wait(seconds(10)).await;
        agent.uplink.crash_shipper();
    }
    let finished = agent.until_delivered("passed").await;
    assert_eq!(finished.as_secs(), 50, "it delays nothing");
    assert_eq!(agent.count("refresh"), 4, "each successor begins with the job's token");
    let mut next_line = 0;
    for push in agent.uplink.pushes().iter().filter(|push| push.token == "fresh") {
        assert_eq!(push.first_line, next_line, "each goes on where the last one ended");
        next_line += push.lines;
    }
}

#[actix::test]
async fn a_crash_of_the_log_shipper_in_the_middle_of_a_push_loses_nothing() {
    let agent = Agent::with_job(vec![Reaction::EndAfter(seconds(10), "so far\n", 0); 5]);
    agent.uplink.take(seconds(4));
    agent.uplink.reply(|push| {
        if push.number % 2 == 0 {
            panic_as_asked();
        }
        Reply::Taken
    });
    agent.until_delivered("passed").await;
}

#[actix::test]
async fn a_log_shipper_that_only_crashes_is_given_up() {
    let agent = Agent::with_job(vec![Reaction::EndAfter(seconds(30), "so far\n", 0)]);
    agent.uplink.reply(|_| {
        panic_as_asked();
        Reply::Taken
    });
    agent.until("report finished-job 1 passed").await;
    agent.assert_kept("passed");
    assert_eq!(agent.time_of("report finished-job 1 passed").as_secs(), 30);
    assert_eq!(agent.uplink.pushes().len(), 10);
}

#[actix::test]
async fn a_crash_of_the_executor_is_in_the_log_that_is_delivered() {
    let agent = Agent::with_job(vec![Reaction::Hang("so far\n")]);
    agent.until("run do 0").await;
    agent.world.crash_executor();
    agent.until_delivered("failed").await;
    assert!(agent.uplink.log().contains("the executor has crashed"));
}

#[actix::test]
async fn a_crash_of_the_log_buffer_is_in_the_log_that_is_delivered() {
    let agent = Agent::with_job(vec![Reaction::Hang("so far\n")]);
    agent.until("run do 0").await;
    agent.wait(seconds(10)).await;
    agent.crash_log_buffer().await;
    agent.until_delivered("failed").await;
    assert!(agent.uplink.log().contains("the log buffer has crashed"));
}

#[actix::test]
async fn a_crash_of_the_supervisor_fails_the_job_whose_log_is_delivered_and_all_later_ones() {
    let agent = Agent::with_job(vec![Reaction::Hang("so far\n")]);
    agent.hub.queue("2", job("2", 1));
    agent.until("run do 0").await;
    agent.wait(seconds(10)).await;
    let death = agent.supervisor.send(AwaitDeath);
    agent.crash_supervisor().await;
    assert!(timeout(seconds(1), death).await.unwrap().is_err());
    agent.until_delivered("failed").await;
    assert!(agent.uplink.log().contains("the job supervisor has crashed"));
    agent.until("report finished-job 2 failed").await;
    assert_eq!(agent.count("prepare"), 1);
}

#[actix::test]
async fn a_crash_of_the_supervisor_during_the_delivery_costs_nothing() {
    let agent = Agent::with_job(vec![Reaction::EndAfter(seconds(30), "so far\n", 0)]);
    agent.uplink.take(seconds(20));
    agent.until("end everything within 2s").await;
    agent.crash_supervisor().await;
    agent.until_delivered("passed").await;
}

#[actix::test]
async fn a_crash_of_the_clean_up_still_delivers_the_log() {
    let world = ScriptedJob::new([Reaction::EndAfter(seconds(30), "", 0)]);
    let agent = Agent::idle(world.panicking_at_the_end());
    agent.hub.queue("1", job("1", 1));
    agent.until_delivered("failed").await;
}

#[actix::test]
async fn a_crash_of_the_poller_is_the_failed_reply_of_who_waits_for_it() {
    let agent = Agent::with_job(vec![Reaction::EndAfter(minutes(1), "so far\n", 0)]);
    agent.until("run do 0").await;
    let left = agent.poller.send(AwaitLeave);
    assert!(agent.poller.send(PanicNow).await.is_err());
    assert!(timeout(seconds(1), left).await.unwrap().is_err());
    assert!(agent.left().await.0.is_err());
    agent.until("close access").await;
    agent.assert_delivered();
}

#[actix::test]
async fn a_crash_of_the_log_buffer_after_the_jobs_end_costs_nothing() {
    let agent = Agent::with_job(vec![Reaction::EndAfter(seconds(30), "so far\n", 0)]);
    agent.uplink.take(seconds(20));
    agent.until("end everything within 2s").await;
    agent.wait(seconds(1)).await;
    agent.crash_log_buffer().await;
    agent.until_delivered("passed").await;
}
