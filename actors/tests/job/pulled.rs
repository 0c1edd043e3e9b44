//! Jobs whose logs are pulled, from the intake to the teardown.

use super::*;

/// A supervisor whose jobs are pulled, and its intake.
fn hosted(world: &ScriptedJob, attempts: u32, single_job: bool) -> Hosted {
    let metrics = Metrics::new(Box::new(DiscardMetrics)).start();
    let asked_to_end = watch::channel(None);
    let delivery = PullDelivery {
        callbacks: Box::new(world.clone()),
        attempts,
        uploads: Box::new(world.clone()),
        archive_timeout: ARCHIVE_TIMEOUT,
        asked_to_end: asked_to_end.1,
    };
    let jobs = Box::new(world.clone());
    let supervisor =
        JobSupervisor::new(jobs, metrics, config(Delivery::Pull(Rc::new(delivery)))).start();
    let intake = HttpIntake::new(supervisor.clone(), single_job).start();
    Hosted { supervisor, intake, asked_to_end: asked_to_end.0 }
}

struct Hosted {
    supervisor: Addr<JobSupervisor>,
    intake: Addr<HttpIntake>,
    asked_to_end: watch::Sender<Option<Instant>>,
}

impl Hosted {
    async fn submit(&self, id: &str) -> Result<Submission, String> {
        let job = job(&HOSTED_JOB.replace("ID", id));
        let submitted = self.intake.send(SubmitJob { job }).await.unwrap();
        submitted.map_err(|refused| refused.to_string())
    }

    async fn report(&self, id: &str, transfers: &[Transfer]) {
        for transfer in transfers {
            let id = JobId::new(id).unwrap();
            self.supervisor.send(ReportTransfer { id, transfer: *transfer }).await.unwrap();
        }
    }

    async fn state(&self) -> State {
        self.intake.send(GetStatus).await.unwrap().state
    }

    /// Waits for the end of the log.
    async fn until_sealed(&self) {
        let log = self.supervisor.send(GetLog).await.unwrap().unwrap().buffer;
        assert!(log.send(Follow { line: u64::MAX }).await.unwrap().unwrap().sealed);
    }
}

const HOSTED_JOB: &str = r#"{"job_id":"ID","commands":[{"directive":"one"}],
    "callbacks":{"finished":"f","teardown_finished":"t","token":"x"}}"#;

#[actix::test]
async fn an_archivator_that_never_comes_is_waited_for_within_a_limit() {
    for (asked, limit) in [(false, ARCHIVE_TIMEOUT), (true, Duration::from_mins(1))] {
        let world = ScriptedJob::default();
        let agent = hosted(&world, 1, false);
        agent.submit("1").await.unwrap();
        agent.until_sealed().await;
        if !asked {
            tokio::time::pause();
        }
        let begun = Instant::now();
        if asked {
            agent.asked_to_end.send_replace(Some(begun));
        }
        while agent.intake.send(GetStatus).await.unwrap().waits_for != Some(WaitsFor::Archivator) {
            tokio::task::yield_now().await;
        }
        world.until_called("call t with {}").await;
        assert_eq!(begun.elapsed().as_secs(), limit.as_secs());
        assert_eq!(agent.intake.send(GetStatus).await.unwrap().waits_for, None);
    }
}

#[actix::test]
async fn an_agent_whose_supervisor_is_gone_is_not_alive() {
    let agent = hosted(&ScriptedJob::default(), 1, false);
    assert!(agent.intake.send(GetStatus).await.unwrap().is_alive);
    let _ = agent.supervisor.send(PanicNow).await;
    assert!(!agent.intake.send(GetStatus).await.unwrap().is_alive);
}

#[actix::test]
async fn a_pulled_job_is_torn_down_when_its_log_is_archived() {
    let world = ScriptedJob::default();
    let agent = hosted(&world, 3, false);
    assert_eq!(agent.submit("1").await, Ok(Submission::Started));
    world.until_called(r#"call f with {"result":"passed"}"#).await;
    agent.until_sealed().await;
    agent.report("other", &[Transfer::Began, Transfer::Completed]).await;
    agent.report("1", &[Transfer::Began, Transfer::Broken, Transfer::Began]).await;
    assert_eq!(agent.state().await, State::JobReceived);
    assert!(!world.calls().contains(&"upload".to_owned()));
    agent.report("1", &[Transfer::Completed]).await;
    world.until_called("call t with {}").await;
    let calls = world.calls();
    assert_eq!(calls[calls.len() - 3..], ["upload", "close access", "call t with {}"]);
    agent.intake.send(Close).await.unwrap();
    agent.intake.send(UntilDrained).await.unwrap();
    assert_eq!(agent.state().await, State::WaitingForJob);
}

#[actix::test]
async fn the_end_is_logged_after_the_finished_callback_even_if_nobody_takes_it() {
    tokio::time::pause();
    let world = ScriptedJob::default().refusing_callbacks(u32::MAX);
    let agent = hosted(&world, 3, false);
    agent.submit("1").await.unwrap();
    agent.until_sealed().await;
    let finished = r#"call f with {"result":"passed"}"#;
    assert_eq!(world.calls().iter().filter(|call| *call == finished).count(), 3);
    assert_eq!(summary(&world).last().unwrap(), "job passed");
}

#[actix::test]
async fn an_agent_that_is_asked_to_end_waits_a_minute_for_its_callbacks_together() {
    tokio::time::pause();
    for latency in [Duration::ZERO, Duration::from_secs(30)] {
        let world =
            ScriptedJob::default().refusing_callbacks(u32::MAX).answering_callbacks_after(latency);
        let agent = hosted(&world, u32::MAX, false);
        let begun = Instant::now();
        agent.asked_to_end.send_replace(Some(begun));
        agent.submit("1").await.unwrap();
        world.until_called(r#"call f with {"result":"passed"}"#).await;
        assert_eq!(agent.intake.send(GetStatus).await.unwrap().waits_for, Some(WaitsFor::Callback));
        world.until_called("call t with {}").await;
        agent.intake.send(Close).await.unwrap();
        agent.intake.send(UntilDrained).await.unwrap();
        // The last callback has a few seconds whatever the time.
        let held = begun.elapsed().as_secs();
        assert!((60..70).contains(&held), "{held} s with an answer after {latency:?}");
    }
}

#[actix::test]
async fn an_agent_that_is_asked_to_end_does_not_wait_for_an_upload_that_hangs() {
    tokio::time::pause();
    let world = ScriptedJob::default().hanging_in_upload();
    let agent = hosted(&world, 1, false);
    agent.submit("1").await.unwrap();
    agent.until_sealed().await;
    agent.report("1", &[Transfer::Began, Transfer::Completed]).await;
    world.until_called("upload").await;
    let begun = Instant::now();
    agent.asked_to_end.send_replace(Some(begun));
    assert_eq!(agent.intake.send(GetStatus).await.unwrap().waits_for, Some(WaitsFor::Upload));
    world.until_called("call t with {}").await;
    assert_eq!(begun.elapsed().as_secs(), 60);
}

#[actix::test]
async fn callbacks_that_are_never_answered_hold_the_job_for_a_bounded_time() {
    tokio::time::pause();
    let latency = Duration::from_secs(30);
    let world =
        ScriptedJob::default().refusing_callbacks(u32::MAX).answering_callbacks_after(latency);
    let agent = hosted(&world, 300, false);
    let begun = tokio::time::Instant::now();
    agent.submit("1").await.unwrap();
    agent.until_sealed().await;
    assert!(begun.elapsed() < Duration::from_mins(16), "{:?}", begun.elapsed());
    let finished = r#"call f with {"result":"passed"}"#;
    let tries = world.calls().iter().filter(|call| *call == finished).count();
    assert!((20..31).contains(&tries), "{tries} tries");
}

#[actix::test]
async fn an_archivator_that_failed_is_not_waited_for_without_end() {
    tokio::time::pause();
    let world = ScriptedJob::default();
    let agent = hosted(&world, 3, false);
    agent.submit("1").await.unwrap();
    agent.until_sealed().await;
    agent.report("1", &[Transfer::Began, Transfer::Broken]).await;
    world.until_called("call t with {}").await;
}

#[actix::test]
async fn the_intake_answers_by_what_the_agent_is_doing() {
    let world = ScriptedJob::new([Reaction::Hang("")]);
    let agent = hosted(&world, 1, false);
    let read = |id: &str| agent.intake.send(ReadJobLog { id: JobId::new(id).unwrap(), line: 0 });
    assert!(matches!(read("1").await.unwrap(), Err(ReadRefused::NoJob)));
    assert_eq!(agent.state().await, State::WaitingForJob);

    let both = tokio::join!(agent.submit("1"), agent.submit("2"));
    assert_eq!(both, (Ok(Submission::Started), Err(SubmitRefused::Busy.to_string())));
    assert_eq!(agent.submit("1").await, Ok(Submission::AlreadyRunning));
    assert_eq!(agent.state().await, State::JobReceived);
    assert!(matches!(read("2").await.unwrap(), Err(ReadRefused::OtherJob)));
    assert!(read("1").await.unwrap().is_ok());

    agent.intake.send(RequestStop { id: JobId::new("2") }).await.unwrap();
    agent.intake.send(RequestStop { id: None }).await.unwrap();
    world.until_called(r#"call f with {"result":"stopped"}"#).await;
    agent.until_sealed().await;
    agent.intake.send(Close).await.unwrap();
    assert_eq!(agent.submit("3").await, Err(SubmitRefused::Closed.to_string()));
    assert_eq!(agent.submit("1").await, Ok(Submission::AlreadyRunning));
    agent.report("1", &[Transfer::Began, Transfer::Completed]).await;
    agent.intake.send(UntilDrained).await.unwrap();
}

#[actix::test]
async fn an_agent_for_a_single_job_takes_no_second_one() {
    let world = ScriptedJob::default();
    let agent = hosted(&world, 1, true);
    agent.submit("1").await.unwrap();
    assert_eq!(agent.submit("2").await, Err(SubmitRefused::Busy.to_string()));
    assert_eq!(agent.submit("1").await, Ok(Submission::AlreadyRunning));
    agent.until_sealed().await;
    agent.report("1", &[Transfer::Began, Transfer::Completed]).await;
    agent.intake.send(UntilDrained).await.unwrap();
    assert_eq!(agent.submit("2").await, Err(SubmitRefused::Closed.to_string()));
}

#[actix::test]
async fn logs_that_can_not_be_pulled_are_refused() {
    let agent = hosted(&ScriptedJob::default(), 1, false);
    for method in ["push", "carrier pigeon"] {
        let json = format!(r#"{{"job_id":"1","logger":{{"method":"{method}"}}}}"#);
        let refused = agent.intake.send(SubmitJob { job: job(&json) }).await.unwrap();
        let Err(SubmitRefused::Unfit(problems)) = refused else { panic!("{refused:?}") };
        assert_eq!(problems[0].path, "logger.method");
    }
    assert_eq!(agent.state().await, State::WaitingForJob);
}

#[actix::test]
async fn who_waits_for_an_intake_notices_that_it_crashed() {
    let agent = hosted(&ScriptedJob::default(), 1, false);
    let drained = agent.intake.send(UntilDrained);
    agent.intake.do_send(PanicNow);
    assert!(drained.await.is_err(), "a crashed intake is not a drained one");
}
