//! A log server whose store crashes while it is away, and one at the end of a slow line.

use std::time::Duration;

use actors::ports::PushError;
use actors::testing::{Push, Reaction, Reply};

use crate::support::{Agent, away, case, chatter, minutes, seconds, text, unless};

/// What a job prints in [`JOB`].
fn slow_chatter() -> Vec<Reaction> {
    vec![Reaction::EndAfter(seconds(30), "so far\n", 0); 10]
}

const JOB: Duration = minutes(5);

/// From so long after the agent's beginning on the log server replies like this, until it is back
/// without all that it had.
async fn lose_store(agent: &Agent, from: Duration, reply: fn() -> Reply, until: Duration) {
    agent.wait(from).await;
    assert!(!agent.uplink.pushes().is_empty());
    agent.uplink.reply(move |_| reply());
    agent.wait(until - from).await;
    agent.uplink.forget();
    agent.uplink.reply(|_| Reply::Taken);
}

/// What came after that.
fn pushes_after(agent: &Agent, time: Duration) -> Vec<Push> {
    let pushes = agent.uplink.pushes().into_iter();
    pushes.filter(|push| push.at - agent.began >= time).collect()
}

#[test]
fn after_an_outage_the_log_is_sent_from_its_beginning_once() {
    for outage in [away, || Reply::Refused(PushError::TimedOut)] {
        case(async {
            let agent = Agent::with_job(slow_chatter());
            lose_store(&agent, minutes(1), outage, minutes(2)).await;
            agent.until_delivered("passed").await;
            let pushes = pushes_after(&agent, minutes(2));
            assert_eq!(pushes[0].first_line, 0, "{pushes:#?}");
            assert!(pushes[1..].iter().all(|push| push.first_line > 0), "{pushes:#?}");
        });
    }
}

#[actix::test]
async fn each_outage_has_the_log_sent_from_its_beginning() {
    let agent = Agent::with_job(slow_chatter());
    lose_store(&agent, minutes(1), away, minutes(2)).await;
    lose_store(&agent, minutes(1), away, minutes(2)).await;
    agent.until_delivered("passed").await;
}

#[actix::test]
async fn an_outage_at_the_end_of_the_job_has_the_log_sent_from_its_beginning() {
    let agent = Agent::with_job(slow_chatter());
    let (from, until) = (JOB - seconds(20), JOB + minutes(1));
    lose_store(&agent, from, away, until).await;
    agent.until_delivered("passed").await;
}

#[actix::test]
async fn a_crash_of_the_log_shipper_does_not_forget_the_outage() {
    let agent = Agent::with_job(slow_chatter());
    agent.wait(minutes(1)).await;
    agent.uplink.reply(|_| away());
    agent.wait(minutes(1)).await;
    agent.uplink.crash_shipper();
    agent.uplink.forget();
    agent.uplink.reply(|_| Reply::Taken);
    agent.until_delivered("passed").await;
}

#[actix::test]
async fn a_short_failure_does_not_have_the_log_sent_again() {
    let agent = Agent::with_job(slow_chatter());
    agent.uplink.reply(|push| if push.number == 5 { away() } else { Reply::Taken });
    agent.until_delivered("passed").await;
    let pushes = agent.uplink.pushes();
    assert!(pushes[1..].iter().all(|push| push.first_line > 0), "{pushes:#?}");
}

#[actix::test]
async fn a_slow_line_is_used_for_what_fits_nearly_all_the_time() {
    const BYTES_PER_SECOND: u32 = 60_000;
    let agent = Agent::with_job(vec![Reaction::End(text(4 << 20), 0)]);
    agent.uplink.slow_down(BYTES_PER_SECOND);
    let finished = agent.until_delivered("passed").await.as_secs_f64();
    let bytes = u32::try_from(agent.uplink.log().len()).unwrap();
    let least = f64::from(bytes) / f64::from(BYTES_PER_SECOND);
    let pushes = agent.uplink.pushes();
    let sizes: Vec<_> = pushes.iter().map(|push| push.bytes).collect();
    assert!(finished < 1.75 * least, "{finished} s, of which {least} are needed: {sizes:?}");
    // What is cut off for its size is no outage.
    let taken = pushes.iter().skip_while(|push| push.first_line == 0);
    assert!(taken.clone().all(|push| push.first_line > 0), "{pushes:#?}");
}

#[actix::test]
async fn a_very_slow_line_gets_the_log_in_very_small_batches() {
    let agent = Agent::with_job(chatter(500));
    let cut_off = || PushError::Failed("connection reset".into());
    agent.uplink.reply(unless(cut_off, |push| push.bytes <= 8 << 10));
    agent.until_delivered("passed").await;
}
