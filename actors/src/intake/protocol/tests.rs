use proptest::prelude::*;

use super::*;

const ACTIONS: [&str; 7] =
    ["continue", "run-job", "stop-job", "wait-for-jobs", "shutdown", "", "dance"];

fn id(name: &str) -> JobId {
    JobId::new(name).unwrap()
}

fn answer(action: &str, job: &str) -> Answer {
    Answer { action: action.into(), job_id: job.into(), ..Answer::default() }
}

/// A protocol that was driven into each of its states, with job `a`.
fn in_state(state: AgentState) -> SyncProtocol {
    let mut protocol = SyncProtocol::default();
    if state == AgentState::WaitingForJobs {
        return protocol;
    }
    protocol.answered(&protocol.report(), &answer("run-job", "a"));
    if state == AgentState::StartingJob {
        return protocol;
    }
    protocol.job_started(&id("a"));
    if state == AgentState::StoppingJob {
        protocol.answered(&protocol.report(), &answer("stop-job", "a"));
    }
    if state == AgentState::FinishedJob {
        protocol.job_over(&id("a"), Outcome::Passed);
    }
    protocol
}

#[test]
fn every_state_has_an_answer_to_every_action() {
    use AgentState::{FinishedJob, RunningJob, StartingJob, StoppingJob, WaitingForJobs};
    let stop = || Some(Effect::Stop(id("a")));
    let leave = || Some(Effect::Leave(ShutdownReason::Requested));
    let run_b = || Some(Effect::Fetch(id("b")));
    #[rustfmt::skip]
        let table = [
            // state, action, job: what is done, the state then
            (WaitingForJobs, "continue",      "",  None,    WaitingForJobs),
            (WaitingForJobs, "run-job",       "b", run_b(), StartingJob),
            (WaitingForJobs, "run-job",       "",  None,    WaitingForJobs),
            (WaitingForJobs, "stop-job",      "a", None,    WaitingForJobs),
            (WaitingForJobs, "wait-for-jobs", "",  None,    WaitingForJobs),
            (WaitingForJobs, "shutdown",      "",  leave(), WaitingForJobs),
            (StartingJob,    "continue",      "",  None,    StartingJob),
            (StartingJob,    "run-job",       "a", None,    StartingJob),
            (StartingJob,    "run-job",       "b", None,    StartingJob),
            (StartingJob,    "stop-job",      "a", stop(),  StartingJob),
            (StartingJob,    "stop-job",      "b", None,    StartingJob),
            (StartingJob,    "wait-for-jobs", "",  None,    StartingJob),
            (StartingJob,    "shutdown",      "",  stop(),  StartingJob),
            (RunningJob,     "continue",      "",  None,    RunningJob),
            (RunningJob,     "run-job",       "a", None,    RunningJob),
            (RunningJob,     "run-job",       "b", None,    RunningJob),
            (RunningJob,     "stop-job",      "a", stop(),  StoppingJob),
            (RunningJob,     "stop-job",      "",  stop(),  StoppingJob),
            (RunningJob,     "stop-job",      "b", None,    RunningJob),
            (RunningJob,     "wait-for-jobs", "",  None,    RunningJob),
            (RunningJob,     "shutdown",      "",  stop(),  StoppingJob),
            (StoppingJob,    "continue",      "",  None,    StoppingJob),
            (StoppingJob,    "run-job",       "b", None,    StoppingJob),
            (StoppingJob,    "stop-job",      "a", None,    StoppingJob),
            (StoppingJob,    "wait-for-jobs", "",  None,    StoppingJob),
            (StoppingJob,    "shutdown",      "",  None,    StoppingJob),
            (FinishedJob,    "continue",      "",  None,    FinishedJob),
            (FinishedJob,    "run-job",       "a", None,    FinishedJob),
            (FinishedJob,    "run-job",       "b", None,    FinishedJob),
            (FinishedJob,    "stop-job",      "a", None,    FinishedJob),
            (FinishedJob,    "wait-for-jobs", "",  None,    WaitingForJobs),
            (FinishedJob,    "shutdown",      "",  leave(), FinishedJob),
            (FinishedJob,    "dance",         "a", None,    FinishedJob),
        ];
    for (state, action, job, effect, then) in table {
        let mut protocol = in_state(state);
        let mut answer = answer(action, job);
        answer.shutdown_reason = "requested".into();
        let sent = protocol.report();
        assert_eq!(sent.state, state);
        let decision = protocol.answered(&sent, &answer);
        assert_eq!(decision.effect, effect, "{state:?} {action} {job}");
        assert_eq!(protocol.report().state, then, "{state:?} {action} {job}");
        let changed = protocol.report() != sent || decision.effect.is_some();
        assert_eq!(decision.sync_now, changed, "{state:?} {action} {job}");
    }
}

#[test]
fn an_answer_to_an_older_report_does_not_lose_the_result() {
    for action in ["wait-for-jobs", "shutdown"] {
        let mut protocol = in_state(AgentState::RunningJob);
        let sent = protocol.report();
        protocol.job_over(&id("a"), Outcome::Failed);
        let decision = protocol.answered(&sent, &answer(action, ""));
        assert_eq!(decision.effect, None, "{action}");
        assert_eq!(protocol.report().job_result, "failed");
    }
}

#[test]
fn a_job_that_comes_again_has_the_same_result_and_does_not_run() {
    let mut protocol = in_state(AgentState::FinishedJob);
    protocol.answered(&protocol.report(), &answer("wait-for-jobs", ""));
    let decision = protocol.answered(&protocol.report(), &answer("run-job", "a"));
    assert_eq!(decision, Decision::NOTHING);
    assert_eq!(protocol.report().job_result, "passed");
}

#[test]
fn a_job_stopped_before_it_runs_is_stopped_and_not_failed() {
    for (action, result) in [("stop-job", "stopped"), ("continue", "failed")] {
        let mut protocol = in_state(AgentState::StartingJob);
        protocol.answered(&protocol.report(), &answer(action, "a"));
        protocol.job_not_run(&id("a"));
        assert_eq!(protocol.report().job_result, result);
    }
    let mut protocol = in_state(AgentState::StartingJob);
    protocol.answered(&protocol.report(), &answer("stop-job", "a"));
    assert_eq!(protocol.job_started(&id("a")).effect, Some(Effect::Stop(id("a"))));
    assert_eq!(protocol.report().state, AgentState::StoppingJob);
}

#[test]
fn a_leaving_agent_reports_the_result_first() {
    let mut protocol = in_state(AgentState::RunningJob);
    assert_eq!(
        protocol.leave_soon(ShutdownReason::Interrupted).effect,
        Some(Effect::Stop(id("a")))
    );
    assert_eq!(protocol.job_over(&id("a"), Outcome::Stopped), Decision::sync());
    assert_eq!(protocol.sync_failed(), Decision::NOTHING);
    let decision = protocol.answered(&protocol.report(), &answer("continue", ""));
    assert_eq!(decision.effect, Some(Effect::Leave(ShutdownReason::Interrupted)));

    let mut protocol = in_state(AgentState::FinishedJob);
    assert_eq!(protocol.leave_soon(ShutdownReason::UnableToSync), Decision::sync());
    let decision = protocol.sync_failed();
    assert_eq!(decision.effect, Some(Effect::Leave(ShutdownReason::UnableToSync)));
}

#[test]
fn an_interruption_is_reported_with_its_first_time_only() {
    let mut protocol = in_state(AgentState::RunningJob);
    assert_eq!(protocol.interrupted(1_700_000_000), Decision::sync());
    assert_eq!(protocol.interrupted(1_800_000_000), Decision::NOTHING);
    let told = serde_json::to_value(protocol.report()).unwrap();
    let expected = serde_json::json!({
        "state": "running-job", "job_id": "a", "job_result": "",
        "interrupted_at": 1_700_000_000,
    });
    assert_eq!(told, expected);
}

#[test]
fn shutdown_reasons_are_parsed_in_every_spelling() {
    for (word, reason) in [
        ("job-finished", "JOB_FINISHED"),
        ("JOB_FINISHED", "JOB_FINISHED"),
        ("idle", "IDLE"),
        ("requested", "REQUESTED"),
        ("unable-to-sync", "UNABLE_TO_SYNC"),
        ("interrupted", "INTERRUPTED"),
        ("because", "UNKNOWN"),
        ("", "UNKNOWN"),
    ] {
        assert_eq!(ShutdownReason::parse(word).as_str(), reason, "{word}");
    }
}

#[test]
fn null_and_absent_fields_of_an_answer_are_empty() {
    let answer: Answer =
        serde_json::from_str(r#"{"action":null,"next_sync_after":null,"more":1}"#).unwrap();
    assert_eq!(answer, Answer::default());
}

/// An event of the property test below.
#[derive(Clone, Debug)]
enum Event {
    Sent,
    Answered(usize, usize, bool),
    Started,
    NotRun,
    Over(usize),
    Interrupted,
    LeaveSoon,
    SyncFailed,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => Just(Event::Sent),
        6 => (0..ACTIONS.len(), 0..3_usize, any::<bool>())
            .prop_map(|(action, job, old)| Event::Answered(action, job, old)),
        2 => Just(Event::Started),
        1 => Just(Event::NotRun),
        2 => (0..3_usize).prop_map(Event::Over),
        1 => Just(Event::Interrupted),
        1 => Just(Event::LeaveSoon),
        1 => Just(Event::SyncFailed),
    ]
}

proptest! {
    /// No job is fetched while there is another one, or twice in a row. No result is forgotten
    /// before the control plane has acknowledged it. An agent leaves with an unacknowledged
    /// result only if its reports fail.
    #[test]
    fn no_sequence_runs_twice_or_loses_a_result(events in prop::collection::vec(event(), 0..80)) {
        let names = ["a", "b", "c"];
        let outcomes = [Outcome::Passed, Outcome::Failed, Outcome::Stopped];
        let mut protocol = SyncProtocol::default();
        let mut sent = protocol.report();
        let mut old = sent.clone();
        // The job that is fetched or runs, the unacknowledged result, and the last job.
        let mut current: Option<JobId> = None;
        let mut result: Option<(JobId, Outcome)> = None;
        let mut last: Option<JobId> = None;
        for event in events {
            let mut told = None;
            let decision = match event {
                Event::Sent => {
                    old = std::mem::replace(&mut sent, protocol.report());
                    Decision::NOTHING
                }
                Event::Answered(action, job, late) => {
                    let report = if late { &old } else { &sent };
                    told = Some((report.job_id.clone(), report.job_result));
                    protocol.answered(report, &answer(ACTIONS[action], names[job]))
                }
                Event::Started => match &current {
                    Some(id) => protocol.job_started(&id.clone()),
                    None => Decision::NOTHING,
                },
                Event::NotRun => match &current {
                    Some(id) if protocol.report().state == AgentState::StartingJob => {
                        let id = id.clone();
                        let decision = protocol.job_not_run(&id);
                        let outcome = match protocol.report().job_result {
                            "stopped" => Outcome::Stopped,
                            _ => Outcome::Failed,
                        };
                        result = Some((id, outcome));
                        current = None;
                        decision
                    }
                    _ => Decision::NOTHING,
                },
                Event::Over(outcome) => match current.take() {
                    Some(id) => {
                        result = Some((id.clone(), outcomes[outcome]));
                        protocol.job_over(&id, outcomes[outcome])
                    }
                    None => Decision::NOTHING,
                },
                Event::Interrupted => protocol.interrupted(1),
                Event::LeaveSoon => protocol.leave_soon(ShutdownReason::UnableToSync),
                Event::SyncFailed => protocol.sync_failed(),
            };
            match &decision.effect {
                Some(Effect::Fetch(id)) => {
                    prop_assert_eq!(&current, &None);
                    prop_assert_eq!(&result, &None);
                    prop_assert_ne!(Some(id), last.as_ref());
                    current = Some(id.clone());
                }
                Some(Effect::Stop(id)) => prop_assert_eq!(Some(id), current.as_ref()),
                Some(Effect::Leave(reason)) => {
                    prop_assert_eq!(&current, &None);
                    if let Some((id, outcome)) = &result {
                        let known = (id.as_str().to_owned(), outcome.as_str());
                        prop_assert!(told == Some(known) || *reason == ShutdownReason::UnableToSync);
                    }
                    return Ok(());
                }
                None => {}
            }
            let report = protocol.report();
            match (&result, report.state) {
                (Some((id, outcome)), AgentState::FinishedJob) => {
                    prop_assert_eq!(id.as_str(), &report.job_id);
                    prop_assert_eq!(outcome.as_str(), report.job_result);
                }
                (Some((id, outcome)), state) => {
                    // The result was forgotten, so the answer must be to this very result.
                    prop_assert_eq!(state, AgentState::WaitingForJobs);
                    prop_assert_eq!(told, Some((id.as_str().to_owned(), outcome.as_str())));
                    last = result.take().map(|(id, _)| id);
                }
                (None, AgentState::FinishedJob) => {
                    // The job was assigned again, and its result is reported again.
                    prop_assert_eq!(last.as_ref().map(JobId::as_str), Some(&*report.job_id));
                    let outcome = outcomes.into_iter().find(|o| o.as_str() == report.job_result);
                    result = last.clone().zip(outcome);
                }
                (None, AgentState::WaitingForJobs) => prop_assert_eq!(&current, &None),
                (None, _) => {
                    prop_assert_eq!(current.as_ref().map(JobId::as_str), Some(&*report.job_id));
                }
            }
        }
    }
}
