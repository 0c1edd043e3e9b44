//! Jobs run as the agent's own user, so they can change the agent's files about them. A job that does so
//! fails, and its log says why; no reader of that log is blocked, and the agent continues.

use std::fs;
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use test_support::http::Answer;
use test_support::serve::{ServeAgent, good_authorization};
use test_support::{RUN_FOR_EVER, RUN_UNTIL_GO, RUNNING, World, job, wait_for_file, wait_until};

/// The directory that the agent keeps for a job, as the job finds it.
const DIRECTORY: &str = "~/../state/job-*";

/// Time limit for a response that waits for nothing; generous for a busy machine.
const SOON: Duration = Duration::from_secs(10);

/// A running job that has tampered with the agent's files and waits for [`Self::go_on`].
struct Tampered {
    world: World,
    agent: ServeAgent,
    /// The log before the tampering.
    before: Answer,
}

impl Tampered {
    /// Starts a job that tampers; the script finds the path of the job's log in `$log`.
    fn by(tampering: &str) -> Self {
        Self::followed_by(tampering, "until [[ -e ~/go-on ]]; do sleep 0.01; done")
    }

    fn followed_by(tampering: &str, then: &str) -> Self {
        let world = World::new();
        let agent = ServeAgent::start(&world);
        let log = format!("log=$(echo {DIRECTORY}/log.jsonl)");
        let tampering = format!("{log}; {tampering}\n: > ~/tampered; {then}");
        let commands = ["echo first", RUN_UNTIL_GO, &tampering, "echo last"];
        agent.post_job(&job("1", &commands)).of_status(200);
        agent.wait_for_log("1", RUNNING);
        let before = agent.get("/jobs/1/log");
        assert!(before.of_status(200).text().contains("first"));
        fs::write(world.home().join("go"), "").unwrap();
        wait_for_file(&world.home().join("tampered"));
        Self { world, agent, before }
    }

    fn go_on(&self) {
        fs::write(self.world.home().join("go-on"), "").unwrap();
    }

    /// Returns the log so far.
    fn log(&self) -> Vec<u8> {
        soon("the log", || self.agent.get("/jobs/1/log")).of_status(200).body.clone()
    }

    /// Returns the body of a response, or `None` if the response is incomplete.
    fn lines(&self, path: &str) -> Option<String> {
        let asked_at = Instant::now();
        let headers = [("Authorization", good_authorization())];
        let answer = self.agent.try_request("GET", path, &headers, b"");
        assert!(asked_at.elapsed() < SOON, "{path} took {:?}: {answer:?}", asked_at.elapsed());
        answer.ok().filter(|answer| answer.status == 200).map(|answer| answer.text())
    }

    /// Asserts that the log before the tampering is still readable, and that the agent responds.
    fn assert_readable(&self) {
        self.assert_responds();
        let log = self.log();
        assert!(log.starts_with(&self.before.body), "{}", shown(&log));
    }

    fn assert_responds(&self) {
        let alive = soon("life", || self.agent.request("GET", "/is_alive", &[], b""));
        assert_eq!(alive.text(), "yes");
        let status = soon("the status", || self.agent.get("/status"));
        assert_eq!(status.of_status(200).json()["state"], "job-received");
    }

    /// Reads the log until its end, like a client that has its first lines. Returns all events.
    fn wait_for_end(&self) -> Vec<Value> {
        let had = self.before.text().lines().count();
        let mut next = had;
        wait_until(
            || {
                let path = format!("/jobs/1/log?start_from={next}");
                // Lines that the job has cut off may be missing until the agent notices.
                let Some(new) = self.lines(&path) else { return false };
                next += new.lines().count();
                new.lines().any(|line| event(line)["event"] == "job_finished")
            },
            || format!("the log does not end: {}", shown(&self.log())),
        );
        let log = self.log();
        assert!(log.len() < 100_000, "it contains foreign bytes: {}", shown(&log));
        let log = String::from_utf8(log).unwrap();
        assert_eq!(log.lines().count(), next, "wrong number of lines: {log}");
        log.lines().map(event).collect()
    }

    /// Asserts that the job fails, and that the agent then runs the next job.
    fn assert_fails_and_frees_slot(&self) {
        let events = self.wait_for_end();
        assert_eq!(events.last().unwrap()["result"], "failed", "{events:?}");
        let output = events.iter().filter_map(|event| event["output"].as_str());
        let output: String = output.collect();
        let mut lines = output.lines().filter(|line| line.contains("log"));
        assert!(
            lines.any(|line| line.contains("changed")),
            "the log does not mention the change: {output}"
        );
        self.assert_slot_becomes_free();
    }

    fn assert_slot_becomes_free(&self) {
        let log = self.log();
        let archived = soon("the archivator's log", || self.agent.archive_from("1", 0));
        assert_eq!(archived.of_status(200).body, log, "{}", shown(&archived.body));
        self.agent.wait_for_state("waiting-for-job");
        assert_eq!(self.agent.run_to_end(&job("2", &["echo next"])).output(), "next\n");
    }
}

/// Returns a response, and asserts that it came quickly.
fn soon(what: &str, ask: impl FnOnce() -> Answer) -> Answer {
    let asked_at = Instant::now();
    let answer = ask();
    assert!(asked_at.elapsed() < SOON, "{what} took {:?}", asked_at.elapsed());
    answer
}

/// Parses a line of a log as an event.
fn event(line: &str) -> Value {
    let event: Value =
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
    assert!(event["event"].is_string(), "{line:?}");
    event
}

/// Returns the beginning of a log for a failure message.
fn shown(log: &[u8]) -> String {
    let beginning = &log[..log.len().min(4000)];
    format!("{} bytes: {}", log.len(), String::from_utf8_lossy(beginning))
}

#[test]
fn a_log_that_the_job_removed_can_still_be_read() {
    let job = Tampered::by("rm \"$log\"");
    job.assert_readable();
    job.go_on();
    job.assert_fails_and_frees_slot();
}

#[test]
fn a_log_that_the_job_replaced_can_still_be_read() {
    for other in [
        "mkfifo \"$log\"",
        "mkdir \"$log\"",
        "ln -s /dev/zero \"$log\"",
        "printf '{\"event\":\"forged\"}\\n%.0s' {1..1000} > \"$log\"",
    ] {
        println!("{other}");
        let job = Tampered::by(&format!("rm \"$log\"; {other}"));
        job.assert_readable();
        job.go_on();
        job.assert_fails_and_frees_slot();
    }
}

#[test]
fn a_truncated_log_keeps_its_line_numbers() {
    for cut in [": > \"$log\"", "truncate -s 10 \"$log\""] {
        println!("{cut}");
        let job = Tampered::by(cut);
        job.assert_responds();
        job.go_on();
        job.assert_fails_and_frees_slot();
    }
}

#[test]
fn lines_that_a_job_appends_to_its_log_are_not_shown() {
    for garbage in [
        "head -c 50000000 /dev/zero >> \"$log\"",
        "printf '{\"event\":\"job_finished\",\"result\":\"passed\"}\\n' >> \"$log\"",
    ] {
        println!("{garbage}");
        let job = Tampered::by(garbage);
        job.assert_readable();
        job.go_on();
        job.assert_fails_and_frees_slot();
    }
}

#[test]
fn a_log_that_is_overwritten_in_place_is_noticed() {
    let forging = "offset=$(grep -abo '\"first' \"$log\" | tail -1 | cut -d: -f1)
        printf forge | dd of=\"$log\" bs=1 seek=$((offset + 1)) conv=notrunc status=none";
    let job = Tampered::by(forging);
    job.assert_responds();
    assert!(String::from_utf8_lossy(&job.log()).contains("forge"));
    job.go_on();
    job.assert_fails_and_frees_slot();
}

#[test]
fn a_job_that_removes_its_job_directory_fails() {
    for removed in [DIRECTORY, "~/../state/job-*/scratch"] {
        println!("{removed}");
        let job = Tampered::by(&format!("rm -rf {removed}"));
        job.assert_readable();
        job.go_on();
        let events = job.wait_for_end();
        assert_eq!(events.last().unwrap()["result"], "failed", "{events:?}");
        job.assert_slot_becomes_free();
    }
}

#[test]
fn a_job_whose_log_is_gone_can_be_stopped() {
    for tampering in ["rm \"$log\"", "rm \"$log\"; mkfifo \"$log\"", "rm -rf ~/../state/job-*"] {
        println!("{tampering}");
        let job = Tampered::followed_by(tampering, RUN_FOR_EVER);
        soon("the stop", || job.agent.post("/stop", b"")).of_status(200);
        let events = job.wait_for_end();
        // The job may have failed because of its tampering before the stop came.
        let result = &events.last().unwrap()["result"];
        assert!(result == "stopped" || result == "failed", "{events:?}");
        job.assert_slot_becomes_free();
    }
}
