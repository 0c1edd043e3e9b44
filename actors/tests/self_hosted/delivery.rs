//! Logs on their way to a log server that is away, slow, full, or hard to please.

use actors::ports::PushError;
use actors::testing::{Reaction, Reply};

use crate::support::{Agent, away, case, chatter, lines_of, minutes, seconds, text, unless};

#[actix::test]
async fn a_log_is_sent_while_the_job_runs_and_the_rest_at_once() {
    let agent = Agent::with_job(vec![Reaction::EndAfter(seconds(10), "so far\n", 0); 3]);
    agent.until_delivered("passed").await;
    let pushes = agent.uplink.pushes();
    assert!((4..=20).contains(&pushes.len()), "{pushes:#?}");
    let pauses: Vec<_> = pushes.windows(2).map(|two| two[1].at - two[0].at).collect();
    let paced = &pauses[..pauses.len() - 1];
    assert!(paced.iter().all(|pause| *pause >= seconds(1)), "{paced:?}");
    let ended = agent.time_of("end everything within 2s");
    agent.assert_time("report finished-job 1 passed", ended);
    agent.assert_time("log is whole", ended);
}

#[actix::test]
async fn a_long_log_goes_in_full_batches() {
    let agent = Agent::with_job(chatter(1500));
    agent.until_delivered("passed").await;
    let lines = lines_of(&agent.uplink.pushes());
    assert_eq!(lines.iter().max(), Some(&2000));
    assert!(lines.len() <= 4, "{lines:?}");
}

#[actix::test]
async fn a_full_batch_that_waits_is_sent_soon() {
    let mut reactions = chatter(3000);
    reactions.push(Reaction::EndAfter(minutes(1), "", 0));
    let agent = Agent::with_job(reactions);
    agent.uplink.take(seconds(1));
    agent.until_delivered("passed").await;
    let pushes = agent.uplink.pushes();
    let full = pushes.iter().position(|push| push.lines == 2000).unwrap();
    let pause = (pushes[full + 1].at - pushes[full].at - seconds(1)).as_millis();
    assert!((250..=501).contains(&pause), "{pause}");
}

#[actix::test]
async fn a_log_server_that_was_away_gets_everything_when_it_is_back() {
    let agent = Agent::with_job(vec![Reaction::EndAfter(seconds(30), "so far\n", 0); 10]);
    let began = agent.began;
    agent.uplink.reply(move |push| match (push.at - began).as_secs() {
        60..180 => away(),
        _ => Reply::Taken,
    });
    agent.until_delivered("passed").await;
    let refused = agent
        .uplink
        .pushes()
        .into_iter()
        .filter(|push| (60..180).contains(&(push.at - began).as_secs()));
    let refused = refused.count();
    assert!((15..40).contains(&refused), "pauses grow up to 8 s: {refused}");
    agent.assert_time("report finished-job 1 passed", agent.time_of("end everything within 2s"));
}

#[test]
fn pushes_that_fail_or_whose_answers_are_lost_are_sent_again() {
    for failure in [|| Reply::Lost, away, || Reply::Refused(PushError::TimedOut)] {
        case(async {
            let agent = Agent::with_job(vec![Reaction::EndAfter(seconds(1), "so far\n", 0); 60]);
            agent.uplink.reply(move |push| match push.number % 3 {
                0 => failure(),
                _ => Reply::Taken,
            });
            agent.until_delivered("passed").await;
            assert!(agent.uplink.pushes().len() > 10);
        });
    }
}

#[actix::test]
async fn a_refused_token_is_replaced() {
    let agent = Agent::with_job_of(seconds(30));
    agent.uplink.reply(unless(|| PushError::Unauthorized, |push| push.token == "fresh"));
    agent.until_delivered("passed").await;
    assert_eq!(agent.count("refresh"), 1);
    let pushes = agent.uplink.pushes();
    assert_eq!((&*pushes[0].token, &*pushes[1].token), ("stale", "fresh"));
    assert_eq!(pushes[0].at, pushes[1].at);
}

#[actix::test]
async fn a_token_that_can_not_be_had_is_asked_for_again() {
    let agent = Agent::with_job_of(seconds(60));
    agent.hub.refuse("refresh", 3);
    agent.uplink.reply(unless(|| PushError::Unauthorized, |push| push.token == "fresh"));
    agent.until_delivered("passed").await;
    assert_eq!(agent.count("refresh"), 4);
}

#[actix::test]
async fn a_fresh_token_that_is_refused_too_is_not_replaced_in_a_rush() {
    let agent = Agent::with_job_of(seconds(60));
    let began = agent.began;
    agent
        .uplink
        .reply(unless(|| PushError::Unauthorized, move |push| (push.at - began).as_secs() >= 40));
    agent.until_delivered("passed").await;
    let refreshes = agent.count("refresh");
    assert!((3..=20).contains(&refreshes), "{refreshes}");
}

#[actix::test]
async fn batches_with_too_many_lines_are_halved_until_they_fit() {
    let agent = Agent::with_job(chatter(500));
    agent.uplink.reply(unless(|| PushError::TooLarge, |push| push.lines <= 400));
    agent.until_delivered("passed").await;
    let lines = lines_of(&agent.uplink.pushes());
    let largest = *lines.iter().max().unwrap();
    let at = lines.iter().position(|lines| *lines == largest).unwrap();
    assert!(largest > 1000, "{lines:?}");
    assert_eq!(lines[at + 1..at + 3], [largest / 2, largest / 4], "{lines:?}");
    assert_eq!(lines.iter().filter(|lines| **lines > 400).count(), 2);
}

#[actix::test]
async fn who_has_no_space_left_gets_nothing_more_and_the_outcome_stands() {
    let agent = Agent::with_job(vec![
        Reaction::EndAfter(seconds(30), "so far\n", 0),
        Reaction::EndAfter(seconds(30), "", 7),
    ]);
    agent.uplink.reply(unless(|| PushError::QuotaUsedUp, |push| push.number < 3));
    agent.until("report finished-job 1 failed").await;
    assert_eq!(agent.uplink.pushes().len(), 3);
    assert_eq!(agent.uplink.kept(), None);
    let (there, log) = (agent.uplink.log(), agent.world.log());
    assert!(!there.is_empty() && there.len() < log.len() && log.starts_with(&there));
    agent.assert_order(&["upload trimmed", "report finished-job 1 failed"]);
    agent.assert_time("report finished-job 1 failed", agent.time_of("end everything within 2s"));
}

#[actix::test]
async fn what_has_all_been_delivered_is_not_trimmed() {
    let agent = Agent::with_job(chatter(1));
    agent.until_delivered("passed").await;
    assert_eq!((agent.count("upload"), agent.count("upload trimmed")), (1, 0));
}

#[actix::test]
async fn batches_that_time_out_shrink_and_grow_again() {
    let agent = Agent::with_job(vec![Reaction::End(text(8 << 20), 0)]);
    let mut large = 0;
    agent.uplink.reply(unless(
        || PushError::TimedOut,
        move |push| {
            large += u32::from(push.bytes > 200_000);
            push.bytes <= 200_000 || large > 3
        },
    ));
    agent.until_delivered("passed").await;
    let bytes: Vec<_> = agent.uplink.pushes().iter().map(|push| push.bytes).collect();
    let largest = bytes.iter().position(|bytes| *bytes > 900_000).unwrap();
    assert!(bytes[largest..largest + 4].is_sorted_by(|a, b| a > b), "{bytes:?}");
    assert!(bytes[largest + 3] < 200_000, "{bytes:?}");
    assert!(bytes[largest + 4..].iter().any(|bytes| *bytes > 900_000), "{bytes:?}");
    assert!(bytes.iter().all(|bytes| *bytes <= 1 << 20), "{bytes:?}");
}

#[actix::test]
async fn pushes_that_take_long_delay_nothing_but_the_end() {
    let agent = Agent::with_job(vec![Reaction::EndAfter(seconds(10), "so far\n", 0); 12]);
    agent.uplink.take(seconds(20));
    let finished = agent.until_delivered("passed").await;
    let ended = agent.time_of("end everything within 2s");
    agent.assert_time("end everything within 2s", agent.time_of("run do 0") + minutes(2));
    assert!(finished - ended <= seconds(41), "one on its way, and one with the rest");
}
