//! Several actors together, over scripted ports: the protocol's sequence, stops, and crashes.
#![expect(clippy::unwrap_used, reason = "a failed test is a panic")]

mod crashes;
mod pulled;

use std::rc::Rc;
use std::time::Duration;

use actix::{Actor as _, Addr};
use actors::delivery::Delivery;
use actors::delivery::pull::{PullDelivery, Transfer, WaitsFor};
use actors::intake::http::{
    Close, GetStatus, HttpIntake, ReadJobLog, ReadRefused, RequestStop, State, Submission,
    SubmitJob, SubmitRefused, UntilDrained,
};
use actors::job::lifecycle::StartRefused;
use actors::job::{Job, JobId, Outcome};
use actors::log::buffer::{Follow, ReadFrom};
use actors::log::event::LogEvent;
use actors::metrics::Metrics;
use actors::ports::DiscardMetrics;
use actors::request::FileRequest;
use actors::supervisor::finished_once::FinishedOnce;
use actors::supervisor::{
    Config, GetActiveJob, GetLog, JobFinished, JobSupervisor, ReportTransfer, StartError, StartJob,
    StopJob, StopManner,
};
use actors::testing::{PanicNow, Reaction, RecordingMetrics, ScriptedJob};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

const GRACE: Duration = Duration::from_secs(2);

const ARCHIVE_TIMEOUT: Duration = Duration::from_hours(1);

fn job(json: &str) -> Job {
    serde_json::from_str::<FileRequest>(json).unwrap().decode().unwrap()
}

fn config(delivery: Delivery) -> Config {
    Config { grace: GRACE, delivery, ..Config::default() }
}

fn supervisor(world: &ScriptedJob) -> Addr<JobSupervisor> {
    let metrics = Metrics::new(Box::new(DiscardMetrics)).start();
    JobSupervisor::new(Box::new(world.clone()), metrics, config(Delivery::None)).start()
}

async fn start(supervisor: &Addr<JobSupervisor>, job: Job) -> oneshot::Receiver<JobFinished> {
    let (finished, probe) = FinishedOnce::ask();
    supervisor.send(StartJob { job, finished }).await.unwrap().unwrap();
    probe
}

async fn run(world: &ScriptedJob, json: &str) -> Outcome {
    start(&supervisor(world), job(json)).await.await.unwrap().outcome
}

/// The log without its times: `+ step`, `- step exit code`, output as it is.
fn summary(world: &ScriptedJob) -> Vec<String> {
    let log = world.log();
    let lines = log.lines().map(|line| LogEvent::decode(line.as_bytes()).unwrap());
    lines
        .map(|event| match event {
            LogEvent::JobStarted { .. } => "job started".into(),
            LogEvent::CmdStarted { directive, .. } => format!("+ {directive}"),
            LogEvent::CmdOutput { output, .. } => output,
            LogEvent::CmdFinished { directive, exit_code, .. } => {
                format!("- {directive} {exit_code}")
            }
            LogEvent::JobFinished { result, .. } => format!("job {result}"),
        })
        .collect()
}

const FULL_JOB: &str = r#"{"job_id":"1",
    "env_vars":[{"name":"B","value":"MQ=="},{"name":"A","value":"MQ=="}],
    "files":[{"path":"f","content":"","mode":"0644"}],
    "commands":[{"directive":"one"},{"directive":"two","alias":"Two"}],
    "epilogue_always_commands":[{"directive":"always"}],
    "epilogue_on_pass_commands":[{"directive":"on pass"}],
    "epilogue_on_fail_commands":[{"directive":"on fail"}]}"#;

const PREPARED: [&str; 8] = [
    "job started",
    "+ Exporting environment variables",
    "Exporting A\n",
    "Exporting B\n",
    "- Exporting environment variables 0",
    "+ Injecting Files",
    "Injecting f with file mode 0644\n",
    "- Injecting Files 0",
];
const RESULT_EXPORTED: [&str; 3] = [
    "+ Exporting environment variables",
    "Exporting SEMAPHORE_JOB_RESULT\n",
    "- Exporting environment variables 0",
];

fn assert_log(world: &ScriptedJob, parts: &[&[&str]]) {
    assert_eq!(summary(world), parts.concat());
}

#[actix::test]
async fn a_passing_job_takes_every_step_in_order() {
    let world = ScriptedJob::new([Reaction::End("hi\r\n", 0)]);
    assert_eq!(run(&world, FULL_JOB).await, Outcome::Passed);
    let main = ["+ one", "hi\n", "- one 0", "+ Two", "Running: two\n", "- Two 0"];
    let epilogue = ["+ always", "- always 0", "+ on pass", "- on pass 0", "job passed"];
    assert_log(&world, &[&PREPARED, &main, &RESULT_EXPORTED, &epilogue]);
    let calls = world.calls();
    assert_eq!(calls[..2], ["open access for 0 keys", "prepare"]);
    assert_eq!(calls[calls.len() - 2..], ["end everything within 2s", "close access"]);
}

#[actix::test]
async fn a_failure_skips_to_the_epilogues_which_change_nothing() {
    let world =
        ScriptedJob::new([Reaction::End("", 7), Reaction::End("", 0), Reaction::End("", 3)]);
    assert_eq!(run(&world, FULL_JOB).await, Outcome::Failed);
    let rest = ["+ always", "- always 0", "+ on fail", "- on fail 3", "job failed"];
    assert_log(&world, &[&PREPARED, &["+ one", "- one 7"], &RESULT_EXPORTED, &rest]);
}

#[actix::test]
async fn daemons_of_a_job_that_ended_by_itself_may_stay() {
    for end in [Reaction::End("", 7), Reaction::StopFromInside("", "failed")] {
        let world = ScriptedJob::new([end]);
        start(&daemon_keeper(&world), job(FULL_JOB)).await.await.unwrap();
        assert!(world.calls().contains(&"end all but daemons within 2s".to_owned()));
        assert!(!world.calls().contains(&"end everything within 2s".to_owned()));
    }
    let world = ScriptedJob::new([Reaction::Hang("")]);
    let supervisor = daemon_keeper(&world);
    let finished = start(&supervisor, job(FULL_JOB)).await;
    world.until_called("run one").await;
    supervisor.send(StopJob { id: None, manner: StopManner::Grace }).await.unwrap();
    finished.await.unwrap();
    assert!(!world.calls().contains(&"end all but daemons within 2s".to_owned()));
    assert!(world.calls().contains(&"end everything within 2s".to_owned()));
}

/// A supervisor that is told to leave daemons alone.
fn daemon_keeper(world: &ScriptedJob) -> Addr<JobSupervisor> {
    let metrics = Metrics::new(Box::new(DiscardMetrics)).start();
    let config = Config { keep_daemons: true, ..config(Delivery::None) };
    JobSupervisor::new(Box::new(world.clone()), metrics, config).start()
}

#[actix::test]
async fn a_job_without_anything_passes() {
    let world = ScriptedJob::default();
    assert_eq!(run(&world, r#"{"job_id":"1"}"#).await, Outcome::Passed);
}

#[actix::test]
async fn exit_code_130_stops_the_job_from_inside() {
    let cases = [
        (
            "passed",
            Outcome::Passed,
            "SEMAPHORE_JOB_RESULT=passed - stopping job and marking it as passed\n",
        ),
        (
            "failed",
            Outcome::Failed,
            "SEMAPHORE_JOB_RESULT=failed - stopping job and marking it as failed\n",
        ),
        (
            "",
            Outcome::Stopped,
            "SEMAPHORE_JOB_RESULT is set to '' - stopping job and marking it as stopped\n",
        ),
        (
            "x",
            Outcome::Stopped,
            "SEMAPHORE_JOB_RESULT is set to 'x' - stopping job and marking it as stopped\n",
        ),
    ];
    for (variable, outcome, line) in cases {
        let world = ScriptedJob::new([Reaction::StopFromInside("", variable)]);
        assert_eq!(run(&world, FULL_JOB).await, outcome);
        let end = format!("job {outcome}");
        let rest =
            ["+ one", "- one 130", "+ Checking job result", line, "- Checking job result 0", &end];
        assert_log(&world, &[&PREPARED, &rest]);
    }
}

#[actix::test]
async fn only_a_main_command_stops_the_job_with_130() {
    let ok = || Reaction::End("", 0);
    let world = ScriptedJob::new([ok(), ok(), Reaction::StopFromInside("", "failed")]);
    assert_eq!(run(&world, FULL_JOB).await, Outcome::Passed);
    assert!(!world.log().contains("Checking job result"));
}

#[actix::test]
async fn steps_that_need_an_ended_shell_fail_at_once() {
    let world = ScriptedJob::new([Reaction::EndShell("bye\r\n")]);
    assert_eq!(run(&world, FULL_JOB).await, Outcome::Failed);
    let gone = "the job's shell has ended, so this can't run\n";
    let rest = [
        "+ one",
        "bye\n",
        "The job's shell has ended, so this counts as failed.\n",
        "- one 1",
        "+ Exporting environment variables",
        "Exporting SEMAPHORE_JOB_RESULT\n",
        gone,
        "- Exporting environment variables 1",
        "+ always",
        gone,
        "- always 1",
        "+ on fail",
        gone,
        "- on fail 1",
        "job failed",
    ];
    assert_log(&world, &[&PREPARED, &rest]);
}

#[actix::test]
async fn what_is_wrong_with_a_job_is_in_the_log_of_its_step() {
    let world = ScriptedJob::default();
    let json = r#"{"job_id":"1","env_vars":[{"name":"A=1; touch x; B","value":""}],"commands":[{"directive":"one"}]}"#;
    assert_eq!(run(&world, json).await, Outcome::Failed);
    assert!(world.log().contains("env_vars[0].name: invalid variable name `A=…`"));
    assert!(!world.calls().contains(&"run one".to_owned()));
    assert!(world.log().contains("Exporting SEMAPHORE_JOB_RESULT"), "epilogues still run");

    let world = ScriptedJob::default();
    let json = r#"{"job_id":"1","files":[{"path":"/refused","content":"","mode":"644"}],"commands":[{"directive":"one"}]}"#;
    assert_eq!(run(&world, json).await, Outcome::Failed);
    assert!(world.log().contains("/refused: permission denied"));
    assert!(!world.calls().contains(&"run one".to_owned()));

    let world = ScriptedJob::default();
    assert_eq!(run(&world, r#"{"job_id":"1","executor":"vm"}"#).await, Outcome::Failed);
    assert!(world.log().contains("unknown executor `vm`"));
    assert!(!world.log().contains("Exporting"), "no epilogues without an environment");
    assert!(!world.calls().contains(&"prepare".to_owned()));
}

#[actix::test]
async fn a_failed_preparation_has_no_epilogues() {
    let world = ScriptedJob::default().failing_in_prepare();
    assert_eq!(run(&world, FULL_JOB).await, Outcome::Failed);
    let rest =
        ["+ Preparing the job", "there is no shell\n", "- Preparing the job 1", "job failed"];
    assert_log(&world, &[&["job started"], &rest]);
}

#[actix::test]
async fn a_stop_kills_the_shell_first_and_keeps_what_was_printed() {
    let world = ScriptedJob::new([Reaction::Hang("so far\r\n")]);
    let supervisor = supervisor(&world);
    let finished = start(&supervisor, job(FULL_JOB)).await;
    world.until_called("run one").await;
    supervisor.send(StopJob { id: None, manner: StopManner::Grace }).await.unwrap();
    assert_eq!(finished.await.unwrap().outcome, Outcome::Stopped);
    assert_log(&world, &[&PREPARED, &["+ one", "so far\n", "- one 1", "job stopped"]]);
    let calls = world.calls();
    let end = ["kill shell", "end everything within 2s", "close access"];
    assert_eq!(calls[calls.len() - 3..], end);
}

#[actix::test]
async fn a_stop_counts_from_the_first_moment_on() {
    let world = ScriptedJob::default();
    let supervisor = supervisor(&world);
    let (finished, probe) = FinishedOnce::ask();
    supervisor.do_send(StartJob { job: job(FULL_JOB), finished });
    supervisor.do_send(StopJob { id: JobId::new("1"), manner: StopManner::Grace });
    assert_eq!(probe.await.unwrap().outcome, Outcome::Stopped);
    assert!(!world.calls().contains(&"run one".to_owned()));
}

#[actix::test]
async fn a_stop_ends_a_preparation_that_hangs() {
    let world = ScriptedJob::default().hanging_in_prepare();
    let supervisor = supervisor(&world);
    let finished = start(&supervisor, job(FULL_JOB)).await;
    world.until_called("prepare").await;
    supervisor.send(StopJob { id: None, manner: StopManner::AtOnce }).await.unwrap();
    assert_eq!(finished.await.unwrap().outcome, Outcome::Stopped);
    assert!(world.calls().contains(&"end everything within 0ns".to_owned()));
}

#[actix::test]
async fn a_stop_during_an_epilogue_makes_the_result_stopped() {
    let ok = || Reaction::End("", 0);
    let world = ScriptedJob::new([ok(), ok(), Reaction::Hang("")]);
    let supervisor = supervisor(&world);
    let finished = start(&supervisor, job(FULL_JOB)).await;
    world.until_called("run always").await;
    supervisor.send(StopJob { id: None, manner: StopManner::Grace }).await.unwrap();
    assert_eq!(finished.await.unwrap().outcome, Outcome::Stopped);
    let log = summary(&world);
    assert_eq!(log[log.len() - 3..], ["+ always", "- always 1", "job stopped"]);
}

#[actix::test]
async fn stale_stops_and_second_starts_change_nothing() {
    let world = ScriptedJob::new([Reaction::Hang("")]);
    let supervisor = supervisor(&world);
    let finished = start(&supervisor, job(FULL_JOB)).await;
    world.until_called("run one").await;
    supervisor.send(StopJob { id: JobId::new("2"), manner: StopManner::AtOnce }).await.unwrap();
    let (nobody, _probe) = FinishedOnce::ask();
    let again = |json| supervisor.send(StartJob { job: job(json), finished: nobody.clone() });
    let id = JobId::new("1").unwrap();
    let refused = async |json| match again(json).await.unwrap() {
        Err(StartError::Refused(refused)) => refused,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(FULL_JOB).await, StartRefused::SameJob { id: id.clone() });
    assert_eq!(refused(r#"{"job_id":"2"}"#).await, StartRefused::Busy { running: id.clone() });
    assert_eq!(supervisor.send(GetActiveJob).await.unwrap(), Some(id));
    supervisor.send(StopJob { id: None, manner: StopManner::Grace }).await.unwrap();
    assert_eq!(finished.await.unwrap().outcome, Outcome::Stopped);
    assert_eq!(supervisor.send(GetActiveJob).await.unwrap(), None);
}

#[actix::test]
async fn the_log_stays_readable_until_the_next_job_starts() {
    let world = ScriptedJob::default();
    let supervisor = supervisor(&world);
    start(&supervisor, job(r#"{"job_id":"1"}"#)).await.await.unwrap();
    let log = supervisor.send(GetLog).await.unwrap().unwrap();
    assert_eq!(log.id.as_str(), "1");
    let range = log.buffer.send(Follow { line: 2 }).await.unwrap().unwrap();
    assert!(range.sealed);
    start(&supervisor, job(r#"{"job_id":"2"}"#)).await.await.unwrap();
    assert_eq!(supervisor.send(GetLog).await.unwrap().unwrap().id.as_str(), "2");
}

#[actix::test]
async fn output_is_gathered_but_not_for_long() {
    let world = ScriptedJob::new([Reaction::Hang("lone line\r\n")]);
    let supervisor = supervisor(&world);
    let _finished =
        start(&supervisor, job(r#"{"job_id":"1","commands":[{"directive":"one"}]}"#)).await;
    world.until_called("run one").await;
    let log = supervisor.send(GetLog).await.unwrap().unwrap().buffer;
    let start_of_output = log.send(ReadFrom { line: 0 }).await.unwrap().unwrap().next_line;
    log.send(Follow { line: start_of_output }).await.unwrap().unwrap();
    assert!(world.log().contains("lone line"));
    supervisor.send(StopJob { id: None, manner: StopManner::AtOnce }).await.unwrap();
}

/// Runs a job whose log can't be written from its first command on, until `again`.
async fn with_a_full_disk(reactions: [Reaction; 3], again: bool) -> (Outcome, ScriptedJob) {
    let world = ScriptedJob::new(reactions);
    let supervisor = supervisor(&world);
    let finished = start(&supervisor, job(FULL_JOB)).await;
    let log = supervisor.send(GetLog).await.unwrap().unwrap().buffer;
    log.send(Follow { line: PREPARED.len() as u64 }).await.unwrap().unwrap();
    world.spool().set_full(true);
    if again {
        log.send(Follow { line: PREPARED.len() as u64 + 1 }).await.unwrap().unwrap();
        world.spool().set_full(false);
    }
    (finished.await.unwrap().outcome, world)
}

const FULL: &str = "The job has failed, and lines of its log may be missing: \
                    the job's log could not be written: no storage space.\n";

#[actix::test]
async fn a_job_whose_log_can_not_be_written_fails_and_its_epilogue_still_runs() {
    let second = Duration::from_secs(1);
    let one = Reaction::EndAfter(second, "", 0);
    let reactions = [one, Reaction::End("", 0), Reaction::End("lost", 0)];
    let (outcome, world) = with_a_full_disk(reactions, false).await;
    assert_eq!(outcome, Outcome::Failed);
    assert_log(&world, &[&PREPARED, &["+ one", FULL, "job failed"]]);
    let scripts: Vec<_> =
        world.calls().into_iter().filter(|call| call.starts_with("run ")).collect();
    let result = "run export SEMAPHORE_JOB_RESULT";
    assert_eq!(scripts, ["run export A B", "run one", result, "run always", "run on fail"]);
}

#[actix::test]
async fn a_log_that_can_be_written_again_goes_on() {
    let second = Duration::from_secs(1);
    let [one, always] = [0, 0].map(|code| Reaction::EndAfter(second, "", code));
    let reactions = [one, always, Reaction::End("", 0)];
    let (outcome, world) = with_a_full_disk(reactions, true).await;
    assert_eq!(outcome, Outcome::Failed);
    let epilogue = ["- always 0", "+ on fail", "- on fail 0", "job failed"];
    let log = summary(&world);
    assert_eq!(log[PREPARED.len()..PREPARED.len() + 2], ["+ one", FULL]);
    assert!(log.ends_with(&epilogue.map(str::to_owned)), "{log:?}");
}
