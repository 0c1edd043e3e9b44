//! Shutdowns, interruptions, and a control plane that is gone.

use std::time::Duration;

use actors::intake::poller::{Interrupt, LeaveSoon, Left};
use actors::intake::protocol::ShutdownReason;
use actors::testing::{Reaction, Reply, ScriptedJob};

use crate::support::{Agent, away, case, chatter, job, minutes, seconds, shutdown};

const DEADLINE: Duration = seconds(60);

/// What the agent does when it is asked to end.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Doing {
    Waiting,
    Fetching,
    Running,
    Delivering,
}

impl Doing {
    const ALL: [Self; 4] = [Self::Waiting, Self::Fetching, Self::Running, Self::Delivering];

    /// An agent that has come so far.
    async fn agent(self) -> Agent {
        let agent = match self {
            Self::Waiting => Agent::idle(ScriptedJob::default()),
            Self::Fetching | Self::Delivering => Agent::with_job(chatter(1)),
            Self::Running => Agent::with_job(vec![Reaction::Hang("so far\n")]),
        };
        match self {
            Self::Waiting => agent.until("report waiting-for-jobs").await,
            Self::Fetching => {
                agent.hub.refuse("fetch", u32::MAX);
                agent.until("report starting-job 1").await;
            }
            Self::Running => {
                agent.until("report running-job 1").await;
                agent.until("run do 0").await;
            }
            Self::Delivering => {
                agent.uplink.take(seconds(5));
                agent.until("end everything within 2s").await;
                agent.until("report running-job 1").await;
            }
        }
        agent
    }

    /// What is reported of the job when it was stopped now.
    fn result(self) -> Option<&'static str> {
        match self {
            Self::Waiting => None,
            Self::Fetching | Self::Running => Some("stopped"),
            Self::Delivering => Some("passed"),
        }
    }

    fn state(self) -> &'static str {
        match self {
            Self::Waiting => "waiting-for-jobs",
            Self::Fetching => "starting-job 1",
            Self::Running | Self::Delivering => "running-job 1",
        }
    }
}

/// The agent left after its job's log was delivered, if it had a log, and its result told.
fn assert_left_in_order(agent: &Agent, doing: Doing, finished: &str) {
    match doing {
        Doing::Waiting => assert_eq!(agent.count("prepare"), 0),
        Doing::Fetching => {
            assert_eq!(agent.count("prepare"), 0);
            agent.assert_order(&[finished, "disconnect"]);
        }
        Doing::Running | Doing::Delivering => {
            agent.assert_delivered();
            agent.assert_order(&["log is whole", "close access", finished, "disconnect"]);
        }
    }
    assert_eq!(agent.count("disconnect"), 1);
    assert_eq!(agent.world.calls().last().unwrap(), "disconnect");
}

#[test]
fn a_shutdown_stops_the_job_tells_its_result_disconnects_and_leaves() {
    for doing in Doing::ALL {
        case(async move {
            let agent = doing.agent().await;
            agent.hub.answer(shutdown("requested"));
            let after = agent.left_because(ShutdownReason::Requested).await;
            let finished = doing.result().map(|result| format!("report finished-job 1 {result}"));
            assert_left_in_order(&agent, doing, &finished.unwrap_or_default());
            assert!(after < seconds(20), "{doing:?}: {after:?}");
            agent.wait(minutes(5)).await;
            assert_eq!(agent.world.calls().last().unwrap(), "disconnect", "{doing:?}");
        });
    }
}

#[test]
fn an_interruption_is_told_at_once_and_the_control_plane_decides() {
    for doing in Doing::ALL {
        case(async move {
            let agent = doing.agent().await;
            let now = agent.began.elapsed();
            agent.poller.send(Interrupt).await.unwrap();
            let told = format!("report {} interrupted", doing.state());
            agent.assert_time(&told, now);
            agent.wait(seconds(20)).await;
            assert_eq!(agent.count("disconnect"), 0, "{doing:?}");
            agent.hub.answer(shutdown("INTERRUPTED"));
            agent.left_because(ShutdownReason::Interrupted).await;
            let finished =
                doing.result().map(|result| format!("report finished-job 1 {result} interrupted"));
            assert_left_in_order(&agent, doing, &finished.unwrap_or_default());
        });
    }
}

#[test]
fn who_is_to_leave_soon_stops_the_job_and_asks_nobody() {
    for doing in Doing::ALL {
        case(async move {
            let agent = doing.agent().await;
            let now = agent.began.elapsed();
            agent.poller.send(LeaveSoon).await.unwrap();
            agent.poller.send(LeaveSoon).await.unwrap();
            let after = agent.left_because(ShutdownReason::Interrupted).await;
            let finished = doing.result().map(|result| format!("report finished-job 1 {result}"));
            assert_left_in_order(&agent, doing, &finished.unwrap_or_default());
            assert!(after - now < seconds(12), "{doing:?}: {after:?}");
        });
    }
}

#[test]
fn who_is_not_registered_yet_leaves_at_once() {
    for leave_soon in [false, true] {
        case(async move {
            let agent = Agent::idle(ScriptedJob::default());
            agent.hub.refuse("register", u32::MAX);
            agent.wait(seconds(5)).await;
            if leave_soon {
                agent.poller.send(LeaveSoon).await.unwrap();
            } else {
                agent.poller.send(Interrupt).await.unwrap();
            }
            let after = agent.left_because(ShutdownReason::Interrupted).await;
            assert_eq!(after.as_secs(), 5);
            // The registration, which fails for good meanwhile, changes nothing any more.
            agent.wait(minutes(2)).await;
            agent.poller.send(Interrupt).await.unwrap();
            let (left, _) = agent.left().await;
            assert!(matches!(left, Ok(Left::Because { .. })), "{left:?}");
            assert_eq!(agent.count("report waiting-for-jobs") + agent.count("disconnect"), 0);
        });
    }
}

#[actix::test]
async fn who_leaves_takes_no_job_any_more() {
    let agent = Agent::with_job_of(minutes(5));
    agent.hub.queue("2", job("2", 1));
    agent.until("report running-job 1").await;
    agent.hub.answer(shutdown("idle"));
    agent.left_because(ShutdownReason::Idle).await;
    agent.wait(minutes(5)).await;
    assert_eq!(agent.count("fetch 2"), 0);
}

#[actix::test]
async fn the_first_reason_to_leave_counts() {
    let agent = Agent::with_job_of(minutes(5));
    agent.uplink.take(seconds(10));
    agent.until("report running-job 1").await;
    agent.hub.answer(shutdown("job-finished"));
    agent.hub.answer(shutdown("idle"));
    agent.left_because(ShutdownReason::JobFinished).await;
}

/// Stops the agent in mid-job; answers how long after that it left.
async fn shut_down(agent: &Agent) -> Duration {
    agent.until("run do 0").await;
    agent.hub.answer(shutdown("requested"));
    agent.until("report stopping-job 1").await;
    let told = agent.time_of("report stopping-job 1");
    agent.left_because(ShutdownReason::Requested).await - told
}

#[actix::test]
async fn a_dead_log_server_does_not_keep_the_result_from_being_told_in_time() {
    let agent = Agent::with_job(vec![Reaction::Hang("so far\n")]);
    agent.uplink.reply(|_| away());
    let after = shut_down(&agent).await;
    agent.assert_kept("stopped");
    agent.assert_order(&["report finished-job 1 stopped", "disconnect"]);
    assert!(after < DEADLINE - seconds(5), "there is time for the shutdown hook: {after:?}");
}

#[actix::test]
async fn an_end_of_a_job_that_hangs_does_not_keep_the_agent_from_leaving_in_time() {
    let job_that_stays = ScriptedJob::new([Reaction::Hang("so far\n")]).hanging_at_the_end();
    let agent = Agent::idle(job_that_stays);
    agent.hub.queue("1", job("1", 1));
    agent.hub.take(seconds(1));
    let after = shut_down(&agent).await;
    assert_eq!(agent.count("disconnect"), 1);
    assert!(after < DEADLINE - seconds(3), "there is time for the shutdown hook: {after:?}");
    agent.wait(minutes(5)).await;
    assert_eq!(agent.world.calls().last().unwrap(), "disconnect");
}

#[actix::test]
async fn a_control_plane_that_takes_no_disconnect_does_not_keep_the_agent() {
    let agent = Agent::with_job(vec![Reaction::Hang("so far\n")]);
    agent.hub.refuse("disconnect", u32::MAX);
    let after = shut_down(&agent).await;
    agent.assert_delivered();
    assert!(agent.count("disconnect") > 40);
    assert!(after < DEADLINE - seconds(3), "there is time for the shutdown hook: {after:?}");
}

#[actix::test]
async fn a_disconnect_is_tried_again() {
    let agent = Agent::idle(ScriptedJob::default());
    agent.hub.refuse("disconnect", 20);
    agent.hub.answer(shutdown(""));
    let after = agent.left_because(ShutdownReason::Unknown).await;
    assert_eq!((after.as_secs(), agent.count("disconnect")), (20, 21));
}

#[actix::test]
async fn a_result_that_is_not_taken_is_told_again_before_the_agent_leaves() {
    let agent = Agent::with_job(vec![Reaction::Hang("so far\n")]);
    agent.uplink.take(seconds(1));
    agent.until("run do 0").await;
    agent.hub.answer(shutdown("requested"));
    agent.until("report stopping-job 1").await;
    agent.hub.refuse("report", 5);
    agent.left_because(ShutdownReason::Requested).await;
    assert_eq!(agent.count("report finished-job 1 stopped"), 6);
}

/// How long the agent heard nothing when it left, at least; a bit more for the last try.
fn assert_ten_minutes(after: Duration) {
    assert!(minutes(10) <= after && after < minutes(10) + seconds(4), "{after:?}");
}

#[actix::test]
async fn ten_minutes_without_a_control_plane_are_enough() {
    let agent = Agent::idle(ScriptedJob::default());
    agent.until("report waiting-for-jobs").await;
    agent.hub.refuse("report", u32::MAX);
    agent.hub.refuse("disconnect", u32::MAX);
    assert_ten_minutes(agent.left_because(ShutdownReason::UnableToSync).await);
    assert_eq!(agent.count("disconnect"), 1, "there is nobody to hear it");
}

#[actix::test]
async fn who_lost_its_control_plane_stops_its_job_and_delivers_its_log() {
    let agent = Agent::with_job(vec![Reaction::Hang("so far\n")]);
    agent.until("report running-job 1").await;
    agent.hub.refuse("report", u32::MAX);
    assert_ten_minutes(agent.left_because(ShutdownReason::UnableToSync).await);
    agent.assert_delivered();
    assert!(agent.world.log().contains(r#""result":"stopped""#));
    agent.assert_order(&["log is whole", "report finished-job 1 stopped", "disconnect"]);
}

#[actix::test]
async fn a_report_that_is_taken_in_time_starts_the_ten_minutes_anew() {
    let agent = Agent::with_job_of(minutes(25));
    agent.until("report running-job 1").await;
    for _ in 0..2 {
        agent.hub.refuse("report", u32::MAX);
        agent.wait(minutes(9)).await;
        agent.hub.refuse("report", 0);
        agent.wait(seconds(10)).await;
    }
    agent.until_delivered("passed").await;
    assert_eq!(agent.count("report stopping-job 1"), 0);
}

#[actix::test]
async fn who_lost_everybody_still_leaves_in_time() {
    let agent = Agent::with_job(vec![Reaction::Hang("so far\n")]);
    agent.uplink.reply(|_| Reply::Lost);
    agent.until("report running-job 1").await;
    agent.hub.refuse("report", u32::MAX);
    let after = agent.left_because(ShutdownReason::UnableToSync).await;
    assert!(after < minutes(11), "{after:?}");
    agent.assert_kept("stopped");
}

#[test]
fn a_deleted_agent_that_is_asked_to_end_brings_its_job_to_an_end_and_does_not_register_again() {
    for asks_twice in [false, true] {
        case(async move {
            let agent = Doing::Running.agent().await;
            agent.uplink.take(seconds(5));
            agent.hub.deny(4);
            agent.until("end everything within 2s").await;
            if asks_twice {
                agent.poller.do_send(LeaveSoon);
            } else {
                agent.poller.do_send(Interrupt);
            }
            agent.left_because(ShutdownReason::Interrupted).await;
            assert_eq!(agent.count("register"), 1, "{:#?}", agent.world.calls());
            assert_eq!(agent.uplink.kept(), None);
            agent.assert_order(&["end everything within 2s", "log is whole"]);
        });
    }
}
