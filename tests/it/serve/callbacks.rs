//! The callbacks to the platform, and their order.

use std::io::{BufReader, Read as _, Write as _};
use std::sync::mpsc;

use serde_json::{Value, json};

use test_support::callbacks::{Callback, CallbackServer};
use test_support::http::{Answer, encode_request};
use test_support::serve::{ServeAgent, events, good_authorization};
use test_support::{RUN_FOR_EVER, RUNNING, World, job, wait_until};

/// More than an unread connection can buffer.
const LARGE: &str = "head -c 40000000 /dev/zero | tr '\\0' x | fold -w 1000";

fn with_callbacks(server: &CallbackServer, mut job: Value) -> Value {
    job["callbacks"] = json!({
        "finished": server.url("/finished"),
        "teardown_finished": server.url("/teardown_finished"),
        "token": "a token",
    });
    job
}

fn assert_callback(callback: &Callback, path: &str, body: &Value) {
    assert_eq!((callback.path.as_str(), &callback.body), (path, body));
    assert_eq!(callback.header("authorization"), Some("Bearer a token"));
}

fn assert_finished(server: &CallbackServer, result: &str) {
    assert_callback(&server.next(), "/finished", &json!({ "result": result }));
}

fn assert_torn_down(server: &CallbackServer) {
    assert_callback(&server.next(), "/teardown_finished", &json!({}));
}

/// Starts an agent whose job has ended with a large log and waits for the archivator.
fn with_large_log(server: &CallbackServer) -> ServeAgent {
    let agent = ServeAgent::start(&World::new());
    agent.post_job(&with_callbacks(server, job("1", &[LARGE]))).of_status(200);
    agent.wait_for_log("1", "job_finished");
    assert_finished(server, "passed");
    agent
}

/// Starts to read as the archivator, and closes the connection after `bytes`.
fn break_off(agent: &ServeAgent, bytes: usize, more: &[(&str, &str)]) {
    let mut headers =
        vec![("Authorization", good_authorization()), ("X-Client-Name", "archivator")];
    headers.extend(more);
    let mut stream = agent.connect();
    stream.write_all(&encode_request("GET", "/jobs/1/log", &headers, b"")).unwrap();
    stream.read_exact(&mut vec![0; bytes]).unwrap();
}

#[test]
fn the_finished_callback_comes_before_the_end_of_the_log() {
    let (open, gate) = mpsc::channel();
    let server = CallbackServer::answering(move |number| {
        if number == 0 {
            gate.recv().unwrap();
        }
        200
    });
    let agent = ServeAgent::start(&World::new());
    agent.post_job(&with_callbacks(&server, job("1", &["echo hi"]))).of_status(200);
    assert_finished(&server, "passed");
    let early = agent.archive("1");
    assert!(matches!(early.last(), Some(actors::log::event::LogEvent::CmdFinished { .. })));
    assert_eq!(agent.get("/status").json()["state"], "job-received");
    open.send(()).unwrap();
    agent.wait_for_log("1", "job_finished");
    server.assert_silent();
    assert_eq!(agent.archive("1")[..early.len()], early);
    assert_torn_down(&server);
    agent.wait_for_state("waiting-for-job");
    assert_eq!(server.count(), 2);
}

#[test]
fn the_next_job_may_come_in_response_to_the_last_callback() {
    let (open, gate) = mpsc::channel();
    let server = CallbackServer::answering(move |number| {
        if number == 1 {
            gate.recv().unwrap();
        }
        200
    });
    let agent = ServeAgent::start(&World::new());
    agent.post_job(&with_callbacks(&server, job("1", &["true"]))).of_status(200);
    assert_finished(&server, "passed");
    agent.wait_for_log("1", "job_finished");
    agent.archive("1");
    assert_torn_down(&server);
    assert_eq!(agent.post_job(&with_callbacks(&server, job("2", &["true"]))).message(), "ok");
    open.send(()).unwrap();
    assert_finished(&server, "passed");
    assert_eq!(agent.finish("2").result(), "passed");
    assert_torn_down(&server);
    assert_eq!(server.count(), 4);
}

#[test]
fn the_finished_callback_has_the_jobs_result() {
    let server = CallbackServer::start();
    let agent = ServeAgent::start(&World::new());
    let cases = [("passed", "true"), ("failed", "false"), ("stopped", RUN_FOR_EVER)];
    for (result, command) in cases {
        agent.post_job(&with_callbacks(&server, job(result, &[command]))).of_status(200);
        if result == "stopped" {
            agent.wait_for_log(result, RUNNING);
            agent.post("/stop", b"").of_status(200);
        }
        assert_finished(&server, result);
        assert_eq!(agent.finish(result).result(), result);
        assert_torn_down(&server);
    }
    assert_eq!(server.count(), 6);
}

#[test]
fn callbacks_without_a_token_have_no_authorization_header() {
    let server = CallbackServer::start();
    let agent = ServeAgent::start(&World::new());
    for (id, token) in [("a", json!(null)), ("b", json!(""))] {
        let mut request = with_callbacks(&server, job(id, &["true"]));
        request["callbacks"]["token"] = token;
        agent.run_to_end(&request);
        for path in ["/finished", "/teardown_finished"] {
            let callback = server.next();
            assert_eq!((callback.path.as_str(), callback.header("authorization")), (path, None));
        }
    }
}

#[test]
fn a_job_that_fails_at_once_sends_its_callbacks() {
    let server = CallbackServer::start();
    let agent = ServeAgent::start(&World::new());
    let mut request = with_callbacks(&server, job("1", &["true"]));
    request["executor"] = json!("unheard of");
    agent.run_to_end(&request);
    assert_finished(&server, "failed");
    assert_torn_down(&server);
}

#[test]
fn an_empty_url_is_no_callback() {
    let server = CallbackServer::start();
    let agent = ServeAgent::start(&World::new());
    let urls = [("", ""), (server.url("/a").as_str(), ""), ("", server.url("/b").as_str())]
        .map(|(finished, torn_down)| (finished.to_owned(), torn_down.to_owned()));
    for (number, (finished, torn_down)) in urls.into_iter().enumerate() {
        let mut request = job(&number.to_string(), &["true"]);
        request["callbacks"] = json!({ "finished": finished, "teardown_finished": torn_down });
        assert_eq!(agent.run_to_end(&request).result(), "passed");
    }
    assert_eq!((server.next().path, server.next().path), ("/a".into(), "/b".into()));
    server.assert_silent();
}

#[test]
fn without_an_archivator_the_teardown_waits() {
    let server = CallbackServer::start();
    let agent = ServeAgent::start(&World::new());
    agent.post_job(&with_callbacks(&server, job("1", &["true"]))).of_status(200);
    agent.wait_for_log("1", "job_finished");
    assert_finished(&server, "passed");
    agent.log_events("1");
    let headers = [("Authorization", good_authorization()), ("X-Client-Name", "browser")];
    agent.request("GET", "/jobs/1/log", &headers, b"").of_status(200);
    let headers = [("X-Client-Name", "archivator")];
    agent.request("GET", "/jobs/1/log", &headers, b"").of_status(401);
    let headers = [("Authorization", good_authorization()), ("X-Client-Name", "archivator")];
    agent.request("GET", "/jobs/2/log", &headers, b"").of_status(403);
    agent.request("GET", "/status", &headers, b"").of_status(200);
    server.assert_silent();
    assert_eq!(agent.get("/status").json()["state"], "job-received");
    agent.archive("1");
    assert_torn_down(&server);
}

#[test]
fn an_archivator_before_the_end_of_the_log_does_not_count() {
    let server = CallbackServer::start();
    let agent = ServeAgent::start(&World::new());
    agent.post_job(&with_callbacks(&server, job("1", &[RUN_FOR_EVER]))).of_status(200);
    agent.wait_for_log("1", RUNNING);
    let early = agent.archive("1");
    let beyond = agent.archive_from("1", 1000);
    assert_eq!((beyond.status, beyond.text()), (200, String::new()));
    agent.post("/stop", b"").of_status(200);
    agent.wait_for_log("1", "job_finished");
    assert_finished(&server, "stopped");
    server.assert_silent();
    let rest = agent.archive_from("1", early.len());
    assert_torn_down(&server);
    assert_eq!([early, events(&rest)].concat(), agent.log_events("1"));
}

#[test]
fn an_archivator_may_start_at_the_sealed_end() {
    let server = CallbackServer::start();
    let agent = ServeAgent::start(&World::new());
    agent.post_job(&with_callbacks(&server, job("1", &["true"]))).of_status(200);
    agent.wait_for_log("1", "job_finished");
    let log = agent.log_events("1");
    assert_finished(&server, "passed");
    server.assert_silent();
    assert_eq!(agent.archive_from("1", log.len()).of_status(200).text(), "");
    assert_torn_down(&server);
}

#[test]
fn an_archivator_that_breaks_off_does_not_count() {
    let server = CallbackServer::start();
    let agent = with_large_log(&server);
    for bytes in [1, 100, 1_000_000, 20_000_000] {
        break_off(&agent, bytes, &[]);
        server.assert_silent();
    }
    assert_eq!(agent.get("/status").json()["state"], "job-received");
    let archived = agent.archive_from("1", 0);
    assert_torn_down(&server);
    assert!(archived.of_status(200).body == agent.get("/jobs/1/log").body);
}

#[test]
fn an_archivator_that_reads_one_half_and_later_the_other_counts() {
    let server = CallbackServer::start();
    let agent = with_large_log(&server);
    break_off(&agent, 20_000_000, &[("Connection", "close")]);
    let lines = agent.log_events("1").len();
    server.assert_silent();
    agent.archive_from("1", lines / 2).of_status(200);
    assert_torn_down(&server);
}

#[test]
fn an_archivator_that_is_slow_counts_when_it_has_everything() {
    let server = CallbackServer::start();
    let agent = with_large_log(&server);
    let mut stream = agent.connect();
    let headers = [("Authorization", good_authorization()), ("X-Client-Name", "archivator")];
    stream.write_all(&encode_request("GET", "/jobs/1/log", &headers, b"")).unwrap();
    let mut first = [0; 1000];
    stream.read_exact(&mut first).unwrap();
    server.assert_silent();
    let mut reader = BufReader::new(first.chain(stream));
    let archived = Answer::read_from(&mut reader, "GET").unwrap();
    // The connection stays open: the complete response counts.
    assert_torn_down(&server);
    assert!(archived.of_status(200).body == agent.get("/jobs/1/log").body);
}

#[test]
fn an_archivator_may_read_a_compressed_log() {
    let server = CallbackServer::start();
    let agent = with_large_log(&server);
    // A compressed log of this size would be buffered completely, so the transfer is not interrupted here.
    let headers = [
        ("Authorization", good_authorization()),
        ("X-Client-Name", "archivator"),
        ("Accept-Encoding", "gzip"),
    ];
    let answer = agent.request("GET", "/jobs/1/log", &headers, b"");
    assert_eq!(answer.header("content-encoding"), Some("gzip"));
    assert_torn_down(&server);
}

#[test]
fn a_compressed_transfer_that_breaks_off_does_not_count() {
    let server = CallbackServer::start();
    let agent = ServeAgent::start(&World::new());
    let random = "head -c 30000000 /dev/urandom | base64";
    agent.post_job(&with_callbacks(&server, job("1", &[random]))).of_status(200);
    agent.wait_for_log("1", "job_finished");
    assert_finished(&server, "passed");
    break_off(&agent, 1000, &[("Accept-Encoding", "gzip")]);
    server.assert_silent();
    agent.archive("1");
    assert_torn_down(&server);
}

#[test]
fn a_callback_is_repeated_until_it_is_accepted() {
    let statuses = [500, 404, 204, 503, 302, 201];
    let server = CallbackServer::answering(move |number| statuses[number]);
    let agent = ServeAgent::start(&World::new());
    agent.post_job(&with_callbacks(&server, job("1", &["true"]))).of_status(200);
    for number in 0..3 {
        assert_finished(&server, "passed");
        if number < 2 {
            assert!(!agent.get("/jobs/1/log").text().contains("job_finished"));
        }
    }
    agent.wait_for_log("1", "job_finished");
    agent.archive("1");
    for _ in 0..3 {
        assert_torn_down(&server);
    }
    agent.wait_for_state("waiting-for-job");
    server.assert_silent();
}

/// Waits until the agent's own log has so many errors about callbacks. The slot is free, and the next job may have
/// started, before the last callback of a job is given up.
fn wait_for_callback_problems(agent: &ServeAgent, expected: usize) {
    let is_problem = |line: &&str| line.contains("ERROR") && line.contains("callback");
    wait_until(
        || agent.own_log().lines().filter(is_problem).count() == expected,
        || format!("not {expected} problems: {}", agent.own_log()),
    );
}

#[test]
fn a_job_is_finished_when_its_callbacks_fail_for_good() {
    let server = CallbackServer::answering(|_| 500);
    let agent = ServeAgent::start_with(&World::new(), |command| {
        command.args(["--callback-retry-attempts", "2"]);
    });
    agent.post_job(&with_callbacks(&server, job("1", &["echo hi"]))).of_status(200);
    let finished = agent.finish("1");
    assert_eq!((finished.result(), finished.output().as_str()), ("passed", "hi\n"));
    for path in ["/finished", "/finished", "/teardown_finished", "/teardown_finished"] {
        assert_eq!(server.next().path, path);
    }
    server.assert_silent();
    wait_for_callback_problems(&agent, 2);
    assert_eq!(agent.run_to_end(&job("2", &["true"])).result(), "passed");
}

#[test]
fn unreachable_or_invalid_callback_urls_do_not_block_the_job() {
    let server = CallbackServer::start();
    let gone = server.url("/gone");
    drop(server);
    let agent = ServeAgent::start_with(&World::new(), |command| {
        command.env("SEMAPHORE_AGENT_CALLBACK_RETRY_ATTEMPTS", "1");
    });
    let urls = [
        &gone,
        "nonsense",
        "http://",
        "ftp://127.0.0.1/x",
        "http://a b",
        "https://127.0.0.1:1/",
        "/path",
    ];
    for (number, url) in urls.iter().enumerate() {
        let mut request = job(&number.to_string(), &["true"]);
        request["callbacks"] = json!({ "finished": url, "teardown_finished": url });
        assert_eq!(agent.run_to_end(&request).result(), "passed", "{url}");
        wait_for_callback_problems(&agent, 2 * (number + 1));
    }
}

#[test]
fn a_read_beyond_the_end_of_the_log_does_not_archive_it() {
    let server = CallbackServer::start();
    let agent = ServeAgent::start(&World::new());
    agent.post_job(&with_callbacks(&server, job("1", &["true"]))).of_status(200);
    assert_finished(&server, "passed");
    agent.wait_for_log("1", "job_finished");
    assert_eq!(agent.archive_from("1", 1000).of_status(200).text(), "");
    server.assert_silent();
    let lines = agent.log_events("1").len();
    assert_eq!(agent.archive_from("1", lines).of_status(200).text(), "");
    assert_torn_down(&server);
}
