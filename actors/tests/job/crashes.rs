//! A panic of each actor that both modes have.

use super::*;

/// The actors that can crash while a command runs.
#[derive(Clone, Copy, Debug)]
enum Crashing {
    Executor,
    JobSupervisor,
    LogBuffer,
}

/// Makes an actor crash while a command runs. Returns the job's outcome and log.
async fn crash(which: Crashing) -> (Outcome, Vec<String>) {
    let world = ScriptedJob::new([Reaction::Hang("so far\r\n")]);
    let supervisor = supervisor(&world);
    let finished = start(&supervisor, job(FULL_JOB)).await;
    world.until_called("run one").await;
    match which {
        Crashing::Executor => world.crash_executor(),
        Crashing::JobSupervisor => assert!(supervisor.send(PanicNow).await.is_err()),
        Crashing::LogBuffer => crash_log_buffer(&supervisor).await,
    }
    let outcome = finished.await.unwrap().outcome;
    assert!(world.calls().contains(&"end everything within 2s".to_owned()), "{which:?}");
    (outcome, summary(&world))
}

#[actix::test]
async fn a_crash_of_the_executor_fails_the_job_and_says_so() {
    let (outcome, log) = crash(Crashing::Executor).await;
    assert_eq!(outcome, Outcome::Failed);
    let line = "The agent had an internal error: the executor has crashed. The job can't go on.\n";
    assert_eq!(log[log.len() - 3..], [line, "- one 1", "job failed"]);
}

#[actix::test]
async fn a_crash_of_the_supervisor_fails_the_job_and_says_so() {
    let (outcome, log) = crash(Crashing::JobSupervisor).await;
    assert_eq!(outcome, Outcome::Failed);
    let line =
        "The agent had an internal error: the job supervisor has crashed. The job can't go on.\n";
    assert_eq!(log[log.len() - 3..], [line, "- one 1", "job failed"]);
}

#[actix::test]
async fn a_crash_of_the_log_buffer_fails_the_job_and_a_second_one_says_so() {
    let (outcome, log) = crash(Crashing::LogBuffer).await;
    assert_eq!(outcome, Outcome::Failed);
    let line =
        "The agent had an internal error: the log buffer has crashed. The job can't go on.\n";
    assert_eq!(log[log.len() - 3..], [line, "- one 1", "job failed"]);
}

async fn crash_log_buffer(supervisor: &Addr<JobSupervisor>) {
    let log = supervisor.send(GetLog).await.unwrap().unwrap();
    assert!(log.buffer.send(PanicNow).await.is_err());
}

#[actix::test]
async fn the_log_of_a_crashed_buffer_is_readable_and_sealed() {
    let world = ScriptedJob::new([Reaction::Hang("")]);
    let supervisor = supervisor(&world);
    let finished = start(&supervisor, job(FULL_JOB)).await;
    crash_log_buffer(&supervisor).await;
    assert_eq!(finished.await.unwrap().outcome, Outcome::Failed);
    let recovered = supervisor.send(GetLog).await.unwrap().unwrap().buffer;
    assert!(recovered.send(ReadFrom { line: 0 }).await.unwrap().unwrap().sealed);
}

#[actix::test]
async fn a_crash_of_the_clean_up_ends_the_wait_for_the_job_and_frees_the_slot() {
    let world = ScriptedJob::default().panicking_at_the_end();
    let supervisor = supervisor(&world);
    let finished = start(&supervisor, job(r#"{"job_id":"1"}"#)).await;
    let log = supervisor.send(GetLog).await.unwrap().unwrap().buffer;
    assert_eq!(finished.await.unwrap().outcome, Outcome::Failed);
    assert!(log.send(Follow { line: u64::MAX }).await.unwrap().unwrap().sealed);
    let next = start(&supervisor, job(r#"{"job_id":"2"}"#)).await;
    assert_eq!(next.await.unwrap().outcome, Outcome::Passed);
}

#[actix::test]
async fn the_agent_lives_on_after_a_crash() {
    let world = ScriptedJob::new([Reaction::Hang("")]);
    let supervisor = supervisor(&world);
    let finished = start(&supervisor, job(FULL_JOB)).await;
    world.until_called("run one").await;
    world.crash_executor();
    assert_eq!(finished.await.unwrap().outcome, Outcome::Failed);
    let next = start(&supervisor, job(r#"{"job_id":"2","commands":[{"directive":"x"}]}"#)).await;
    assert_eq!(next.await.unwrap().outcome, Outcome::Passed);
}

#[actix::test]
async fn metrics_are_lossy_and_their_crash_costs_a_job_nothing() {
    let (sender, mut received) = mpsc::unbounded_channel();
    let metrics = Metrics::new(Box::new(RecordingMetrics(sender))).start();
    let world = ScriptedJob::default();
    let supervisor =
        JobSupervisor::new(Box::new(world.clone()), metrics.clone(), config(Delivery::None))
            .start();
    let passed = start(&supervisor, job(r#"{"job_id":"1"}"#)).await;
    assert_eq!(passed.await.unwrap().outcome, Outcome::Passed);
    assert_eq!(received.recv().await.unwrap(), "job.duration#result:passed");

    assert!(metrics.send(PanicNow).await.is_err());
    let passed = start(&supervisor, job(r#"{"job_id":"2"}"#)).await;
    assert_eq!(passed.await.unwrap().outcome, Outcome::Passed);
}

#[actix::test]
async fn a_crash_of_the_jump_point_costs_the_job_nothing_and_access_is_still_closed() {
    let world = ScriptedJob::new([Reaction::Hang("")]).panicking_in_access();
    let supervisor = supervisor(&world);
    let finished = start(&supervisor, job(FULL_JOB)).await;
    world.until_called("run one").await;
    supervisor.send(StopJob { id: None, manner: StopManner::Grace }).await.unwrap();
    assert_eq!(finished.await.unwrap().outcome, Outcome::Stopped);
    assert_eq!(world.calls().last().unwrap(), "close access");
}
