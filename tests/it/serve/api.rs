//! The routes of `agent serve`, and its single job slot.

use std::sync::Barrier;

use serde_json::{Value, json};

use test_support::http::Answer;
use test_support::serve::{ServeAgent, good_authorization};
use test_support::{RUN_FOR_EVER, RUN_UNTIL_GO, RUNNING, World, job};

/// Returns a job whose runs are counted by [`runs`].
fn counted(id: &str) -> Value {
    job(id, &["echo run >>~/runs", RUN_UNTIL_GO])
}

fn runs(world: &World) -> usize {
    std::fs::read_to_string(world.home().join("runs")).map_or(0, |runs| runs.lines().count())
}

fn go(world: &World) {
    std::fs::write(world.home().join("go"), "").unwrap();
}

fn status_and_message(answer: &Answer) -> (u16, String) {
    assert_eq!(answer.json().as_object().unwrap().len(), 1, "{}", answer.text());
    (answer.status, answer.message())
}

fn ok() -> (u16, String) {
    (200, "ok".into())
}

fn same_again() -> (u16, String) {
    (200, "job is already running".into())
}

fn busy() -> (u16, String) {
    (422, "another job is already running".into())
}

#[test]
fn is_alive_needs_no_token() {
    let agent = ServeAgent::start(&World::new());
    for headers in [&[][..], &[("Authorization", "Bearer nonsense")]] {
        for path in ["/is_alive", "/is_alive/", "/is_alive?x=y"] {
            let answer = agent.request("GET", path, headers, b"");
            assert_eq!((answer.status, answer.text()), (200, "yes".into()), "{path}");
        }
    }
}

#[test]
fn the_status_has_two_states_and_the_version() {
    let agent = ServeAgent::start(&World::new());
    let of_state = |state| json!({ "state": state, "version": env!("CARGO_PKG_VERSION") });
    assert_eq!(agent.get("/status").of_status(200).json(), of_state("waiting-for-job"));
    agent.post_job(&job("1", &[RUN_FOR_EVER])).of_status(200);
    let status = agent.get("/status");
    assert_eq!(status.json(), of_state("job-received"));
    assert!(status.header("content-type").unwrap().starts_with("application/json"));
}

#[test]
fn every_path_may_end_in_a_slash() {
    let world = World::new();
    let agent = ServeAgent::start(&world);
    agent.get("/status/").of_status(200);
    agent.get("/agent_logs/").of_status(200);
    agent.post("/stop/", b"").of_status(200);
    agent.post("/jobs/terminate/", b"").of_status(200);
    let answer = agent.post("/jobs/", job("1", &["true"]).to_string().as_bytes());
    assert_eq!(status_and_message(&answer), ok());
    assert!(!agent.get("/jobs/1/log/?start_from=0").of_status(200).text().is_empty());
    agent.finish("1");
}

#[test]
fn unknown_paths_and_methods_are_refused_as_json() {
    let agent = ServeAgent::start(&World::new());
    let authorization = [("Authorization", good_authorization())];
    let cases = [
        ("GET", "/", 404),
        ("GET", "/favicon.ico", 404),
        ("GET", "/jobs/1", 404),
        ("GET", "/jobs/1/2/log", 404),
        ("GET", "/jobs/../../etc/passwd", 404),
        ("GET", "/status/more", 404),
        ("GET", "/%73tatus%00", 404),
        ("POST", "/is_alive", 405),
        ("POST", "/status", 405),
        ("GET", "/jobs", 405),
        ("PUT", "/jobs", 405),
        ("DELETE", "/jobs", 405),
        ("PATCH", "/jobs/", 405),
        ("GET", "/stop", 405),
        ("GET", "/jobs/terminate", 405),
        ("POST", "/jobs/1/log", 405),
        ("POST", "/agent_logs", 405),
        ("BREW", "/status", 405),
    ];
    for (method, path, status) in cases {
        let answer = agent.request(method, path, &authorization, b"");
        assert_eq!(answer.status, status, "{method} {path}");
        assert!(!answer.message().is_empty(), "{method} {path}");
        let kind = answer.header("content-type").unwrap();
        assert!(kind.starts_with("application/json"), "{method} {path}: {kind}");
    }
}

#[test]
fn http_2_is_not_offered() {
    let agent = ServeAgent::start(&World::new());
    let mut connector =
        openssl::ssl::SslConnector::builder(openssl::ssl::SslMethod::tls()).unwrap();
    connector.set_verify(openssl::ssl::SslVerifyMode::NONE);
    connector.set_alpn_protos(b"\x02h2\x08http/1.1").unwrap();
    let connection = std::net::TcpStream::connect(agent.address()).unwrap();
    let connection = connector.build().connect("localhost", connection).unwrap();
    assert_ne!(connection.ssl().selected_alpn_protocol(), Some(&b"h2"[..]));
}

#[test]
fn a_job_runs_from_its_request_to_its_log() {
    let agent = ServeAgent::start(&World::new());
    let finished = agent.run_to_end(&job("1", &["echo hi", "exit 3", "echo never"]));
    assert_eq!(finished.result(), "failed");
    let reason = "The job's shell has ended (exit code 3), so this counts as failed.\n";
    assert_eq!(finished.commands(), [("hi\n".into(), 0), (reason.into(), 1)]);
}

#[test]
fn a_request_needs_no_content_type_and_may_have_a_wrong_one() {
    let agent = ServeAgent::start(&World::new());
    for (number, kind) in ["", "application/x-www-form-urlencoded"].iter().enumerate() {
        let id = number.to_string();
        let headers = [("Authorization", good_authorization()), ("Content-Type", *kind)];
        let headers = if kind.is_empty() { &headers[..1] } else { &headers };
        let body = job(&id, &["true"]).to_string();
        let answer = agent.request("POST", "/jobs", headers, body.as_bytes());
        assert_eq!(status_and_message(&answer), ok());
        assert_eq!(agent.finish(&id).result(), "passed");
    }
}

#[test]
fn null_and_unknown_fields_are_ignored() {
    let agent = ServeAgent::start(&World::new());
    let mut request = json!({
        "job_id": "1", "job_name": null, "executor": null, "compose": null, "commands": null,
        "epilogue_always_commands": null, "epilogue_on_pass_commands": null,
        "epilogue_on_fail_commands": null, "env_vars": null, "files": null,
        "ssh_public_keys": null, "callbacks": null, "logger": null,
    });
    assert_eq!(agent.run_to_end(&request).result(), "passed");
    request = json!({
        "job_id": "2", "executor": "", "compose": {"containers": null, "future": 1},
        "commands": [{"directive": "echo hi", "alias": null, "future": []}],
        "env_vars": [{"name": "A", "value": null, "future": {}}],
        "callbacks": {"finished": null, "teardown_finished": "", "token": null},
        "logger": {"method": "pull", "url": null, "token": null, "max_size_in_bytes": null},
        "future": {"deep": [1, 2]},
    });
    let finished = agent.run_to_end(&request);
    assert_eq!((finished.result(), finished.output().as_str()), ("passed", "hi\n"));
}

#[test]
fn the_same_job_again_is_not_run_again() {
    let world = World::new();
    let agent = ServeAgent::start(&world);
    assert_eq!(status_and_message(&agent.post_job(&counted("1"))), ok());
    assert_eq!(status_and_message(&agent.post_job(&counted("1"))), same_again());
    agent.wait_for_log("1", RUNNING);
    assert_eq!(status_and_message(&agent.post_job(&counted("1"))), same_again());
    go(&world);
    agent.wait_for_log("1", "job_finished");
    assert_eq!(status_and_message(&agent.post_job(&counted("1"))), same_again());
    let finished = agent.finish("1");
    assert_eq!(status_and_message(&agent.post_job(&counted("1"))), same_again());
    assert_eq!(agent.get("/status").json()["state"], "waiting-for-job");
    assert_eq!(agent.log_events("1"), finished.events);
    assert_eq!((runs(&world), finished.result()), (1, "passed"));
}

#[test]
fn another_job_is_refused_until_the_teardown_of_the_previous_one() {
    let world = World::new();
    let agent = ServeAgent::start(&world);
    agent.post_job(&counted("1")).of_status(200);
    assert_eq!(status_and_message(&agent.post_job(&counted("2"))), busy());
    go(&world);
    agent.wait_for_log("1", "job_finished");
    assert_eq!(status_and_message(&agent.post_job(&counted("2"))), busy());
    agent.finish("1");
    assert_eq!(runs(&world), 1);
    assert_eq!(status_and_message(&agent.post_job(&counted("2"))), ok());
    assert_eq!(agent.finish("2").result(), "passed");
    assert_eq!(runs(&world), 2);
    assert_eq!(status_and_message(&agent.post_job(&counted("1"))), ok());
    agent.finish("1");
    assert_eq!(runs(&world), 3);
}

/// Posts these jobs at the same time. Returns the responses.
fn post_at_once(agent: &ServeAgent, jobs: &[Value]) -> Vec<(u16, String)> {
    let barrier = Barrier::new(jobs.len());
    std::thread::scope(|scope| {
        let posts = jobs.iter().map(|job| {
            scope.spawn(|| {
                barrier.wait();
                status_and_message(&agent.post_job(job))
            })
        });
        let posts: Vec<_> = posts.collect();
        posts.into_iter().map(|post| post.join().unwrap()).collect()
    })
}

#[test]
fn of_two_posts_at_the_same_moment_exactly_one_runs() {
    let world = World::new();
    let agent = ServeAgent::start(&world);
    go(&world);
    for round in 1..=10 {
        let same: Vec<_> = (0..4).map(|_| counted(&format!("same-{round}"))).collect();
        let answers = post_at_once(&agent, &same);
        assert_eq!(answers.iter().filter(|answer| **answer == ok()).count(), 1, "{answers:?}");
        assert_eq!(answers.iter().filter(|answer| **answer == same_again()).count(), 3);
        agent.finish(&format!("same-{round}"));

        let others: Vec<_> = (0..4).map(|i| counted(&format!("other-{round}-{i}"))).collect();
        let answers = post_at_once(&agent, &others);
        assert_eq!(answers.iter().filter(|answer| **answer == busy()).count(), 3, "{answers:?}");
        let taken = answers.iter().position(|answer| *answer == ok()).unwrap();
        agent.finish(&format!("other-{round}-{taken}"));
        assert_eq!(runs(&world), 2 * round);
    }
}

#[test]
fn a_log_is_kept_until_the_next_job_starts() {
    let agent = ServeAgent::start(&World::new());
    let no_such_job = |status| (status, "job ID is not running".to_owned());
    let log_of = |id: &str| agent.get(&format!("/jobs/{id}/log"));
    assert_eq!(status_and_message(&log_of("1")), no_such_job(404));
    let first = agent.run_to_end(&job("1", &["echo hi"]));
    assert_eq!(agent.log_events("1"), first.events);
    assert_eq!(status_and_message(&log_of("2")), no_such_job(403));
    agent.post_job(&job("2", &["true"])).of_status(200);
    assert_eq!(status_and_message(&log_of("1")), no_such_job(403));
    log_of("2").of_status(200);
    agent.finish("2");
}

#[test]
fn logs_can_be_read_for_any_job_id() {
    let agent = ServeAgent::start(&World::new());
    let ids = [
        ("a b", "a%20b"),
        ("ü", "%C3%BC"),
        ("100%", "100%25"),
        ("../x", "..%2Fx"),
        ("a?b#c", "a%3Fb%23c"),
        ("terminate", "terminate"),
        (".", "."),
    ];
    for (id, in_path) in ids {
        let request = job(id, &[]);
        assert_eq!(status_and_message(&agent.post_job(&request)), ok(), "{id}");
        agent.wait_for_log(in_path, "job_finished");
        assert!(!agent.archive(in_path).is_empty());
        agent.wait_for_state("waiting-for-job");
    }
}

#[test]
fn the_agents_own_log_can_be_read() {
    let world = World::new();
    let agent = ServeAgent::start(&world);
    agent.run_to_end(&job("job-of-this-test", &["true"]));
    let answer = agent.get("/agent_logs");
    let kind = answer.of_status(200).header("content-type").unwrap();
    assert!(kind.starts_with("text/plain"), "{kind}");
    assert!(answer.text().contains("job-of-this-test"), "{}", answer.text());
    std::fs::remove_file(world.state().with_file_name("agent_log")).unwrap();
    assert!(!agent.get("/agent_logs").of_status(404).message().is_empty());
}
