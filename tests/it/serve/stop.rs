//! Stops over the API, in every phase of a job.

use std::io::{BufReader, Write as _};

use serde_json::{Value, json};

use test_support::http::{Answer, encode_request};
use test_support::serve::{ServeAgent, good_authorization};
use test_support::{
    Finished, RUN_FOR_EVER, RUN_UNTIL_GO, RUNNING, World, job, marked, processes_with,
};

const EXPORTS: &str = "Exporting environment variables";

fn titles(finished: &Finished) -> Vec<String> {
    finished.steps().into_iter().map(|(title, ..)| title).collect()
}

fn job_with_epilogues(main: &str) -> Value {
    let mut job = job("1", &[main, "echo next"]);
    for kind in ["always", "on_pass", "on_fail"] {
        job[format!("epilogue_{kind}_commands")] =
            json!([{ "directive": format!("echo epilogue {kind}") }]);
    }
    job
}

#[test]
fn a_stop_without_a_job_has_no_effect() {
    let agent = ServeAgent::start(&World::new());
    for path in ["/stop", "/jobs/terminate", "/stop/", "/jobs/terminate/"] {
        for body in ["", "{}", r#"{"job_hash_id": "1"}"#, r#"{"job_hash_id": null}"#] {
            agent.post(path, body.as_bytes()).of_status(200);
        }
    }
    assert_eq!(agent.get("/status").json()["state"], "waiting-for-job");
    let finished = agent.run_to_end(&job("1", &["echo hi"]));
    assert_eq!((finished.result(), finished.output().as_str()), ("passed", "hi\n"));
}

#[test]
fn a_stopped_command_finishes_with_1_and_no_command_follows() {
    let bodies =
        ["", "{}", r#"{"job_hash_id": "1"}"#, r#"{"job_hash_id": null}"#, r#"{"more": []}"#];
    for path in ["/stop", "/jobs/terminate"] {
        let agent = ServeAgent::start(&World::new());
        for body in bodies {
            let mut request = job_with_epilogues(RUN_FOR_EVER);
            let id = format!("1{}", body.len());
            request["job_id"] = id.clone().into();
            let body = body.replace(r#""1""#, &format!("{id:?}"));
            agent.post_job(&request).of_status(200);
            agent.wait_for_log(&id, RUNNING);
            agent.post(path, body.as_bytes()).of_status(200);
            let finished = agent.finish(&id);
            assert_eq!(finished.result(), "stopped", "{path} {body}");
            assert_eq!(finished.commands(), [("running\n".into(), 1)], "{path} {body}");
            assert_eq!(titles(&finished), [EXPORTS, "Injecting Files", RUN_FOR_EVER]);
        }
    }
}

#[test]
fn a_stop_with_no_length_or_a_chunked_body_is_accepted() {
    let agent = ServeAgent::start(&World::new());
    let authorization = ("Authorization", good_authorization());
    for (id, chunks) in
        [("a", None), ("b", Some("11\r\n{\"job_hash_id\":\"b\r\n2\r\n\"}\r\n0\r\n\r\n"))]
    {
        agent.post_job(&job(id, &[RUN_FOR_EVER])).of_status(200);
        agent.wait_for_log(id, RUNNING);
        match chunks {
            Some(body) => {
                let headers = [authorization, ("Transfer-Encoding", "chunked")];
                agent.request("POST", "/stop", &headers, body.as_bytes()).of_status(200);
            }
            None => {
                let mut stream = agent.connect();
                let request = encode_request("GET", "/stop", &[authorization], b"");
                stream.write_all(&[b"POST", &request[3..]].concat()).unwrap();
                let answer = Answer::read_from(&mut BufReader::new(stream), "POST").unwrap();
                answer.of_status(200);
            }
        }
        assert_eq!(agent.finish(id).result(), "stopped");
    }
}

#[test]
fn a_second_stop_changes_nothing() {
    let world = World::new();
    let agent = ServeAgent::start(&world);
    let polite = "trap 'sleep 0.2; exit' TERM; echo running; while :; do sleep 0.01; done";
    agent.post_job(&job_with_epilogues(&format!("bash -c {polite:?}"))).of_status(200);
    agent.wait_for_log("1", RUNNING);
    for path in ["/stop", "/stop", "/jobs/terminate", "/stop"] {
        agent.post(path, b"").of_status(200);
    }
    agent.wait_for_log("1", "job_finished");
    agent.post("/stop", b"").of_status(200);
    let finished = agent.finish("1");
    assert_eq!(finished.result(), "stopped");
    assert_eq!(titles(&finished).len(), 3, "{finished:?}");
    let ends = finished
        .events
        .iter()
        .filter(|event| matches!(event, actors::log::event::LogEvent::JobFinished { .. }));
    assert_eq!(ends.count(), 1);
}

#[test]
fn a_stop_after_the_end_changes_nothing() {
    let agent = ServeAgent::start(&World::new());
    agent.post_job(&job("1", &["echo hi"])).of_status(200);
    agent.wait_for_log("1", "job_finished");
    let before = agent.log_events("1");
    agent.post("/stop", b"").of_status(200);
    assert_eq!(agent.get("/status").json()["state"], "job-received");
    assert_eq!(agent.log_events("1"), before);
    let finished = agent.finish("1");
    assert_eq!(finished.result(), "passed");
    agent.post("/stop", b"").of_status(200);
    assert_eq!(agent.log_events("1"), before);
    assert_eq!(agent.run_to_end(&job("2", &["true"])).result(), "passed");
}

#[test]
fn a_stop_for_another_job_is_stale() {
    let world = World::new();
    let agent = ServeAgent::start(&world);
    agent.run_to_end(&job("before", &["true"]));
    agent.post_job(&job("1", &[RUN_UNTIL_GO])).of_status(200);
    agent.wait_for_log("1", RUNNING);
    for id in [json!("before"), json!("after"), json!("11"), json!(" 1"), json!(17), json!([1])] {
        let body = json!({ "job_hash_id": id }).to_string();
        agent.post("/stop", body.as_bytes()).of_status(200);
        agent.post("/jobs/terminate", body.as_bytes()).of_status(200);
    }
    std::fs::write(world.home().join("go"), "").unwrap();
    assert_eq!(agent.finish("1").result(), "passed");
}

#[test]
fn a_stop_during_an_epilogue_makes_the_result_stopped() {
    let agent = ServeAgent::start(&World::new());
    let mut request = job("1", &["true"]);
    request["epilogue_always_commands"] =
        json!([{ "directive": RUN_FOR_EVER }, { "directive": "echo next" }]);
    request["epilogue_on_pass_commands"] = json!([{ "directive": "echo next" }]);
    agent.post_job(&request).of_status(200);
    agent.wait_for_log("1", RUNNING);
    agent.post("/stop", b"").of_status(200);
    let finished = agent.finish("1");
    assert_eq!(finished.result(), "stopped");
    assert_eq!(titles(&finished), [EXPORTS, "Injecting Files", "true", EXPORTS, RUN_FOR_EVER]);
    assert_eq!(finished.commands()[1], ("running\n".into(), 1));
}

#[test]
fn a_stop_in_the_first_moments_is_never_lost() {
    let world = World::new();
    let agent = ServeAgent::start(&world);
    for (id, delay) in [0, 0, 0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 21].into_iter().enumerate() {
        let id = id.to_string();
        let mut request = job(&id, &["sleep 1000; touch ~/deployed", "touch ~/deployed"]);
        request["epilogue_always_commands"] = json!([{ "directive": "touch ~/deployed" }]);
        agent.post_job(&request).of_status(200);
        // The delays need not hit a specific moment: all are tried, and each must be handled.
        std::thread::park_timeout(std::time::Duration::from_millis(delay));
        agent.post("/stop", b"").of_status(200);
        assert_eq!(agent.finish(&id).result(), "stopped", "after {delay} ms");
    }
    assert!(!world.home().join("deployed").exists());
}

#[test]
fn a_stop_right_after_the_job_is_never_lost() {
    let agent = ServeAgent::start(&World::new());
    let headers = [("Authorization", good_authorization())];
    for id in 0..10 {
        let id = id.to_string();
        let request = job(&id, &["sleep 1000"]).to_string();
        let stop = json!({ "job_hash_id": id }).to_string();
        let mut reader = BufReader::new(agent.connect());
        let both = [
            encode_request("POST", "/jobs", &headers, request.as_bytes()),
            encode_request("POST", "/stop", &headers, stop.as_bytes()),
        ];
        reader.get_mut().write_all(&both.concat()).unwrap();
        assert_eq!(Answer::read_from(&mut reader, "POST").unwrap().message(), "ok");
        assert_eq!(Answer::read_from(&mut reader, "POST").unwrap().status, 200);
        assert_eq!(agent.finish(&id).result(), "stopped");
    }
}

#[test]
fn a_stop_at_the_end_of_the_job_leaves_one_result() {
    let agent = ServeAgent::start(&World::new());
    for id in 0..10 {
        let id = id.to_string();
        let request = job(&id, &["echo running; sleep 0.02"]);
        agent.post_job(&request).of_status(200);
        agent.wait_for_log(&id, RUNNING);
        std::thread::park_timeout(std::time::Duration::from_millis(15));
        agent.post("/stop", b"").of_status(200);
        let finished = agent.finish(&id);
        let (_, exit_code) = finished.commands()[0];
        match (finished.result(), exit_code) {
            ("passed", 0) | ("stopped", 0 | 1) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn nothing_survives_a_stop() {
    let agent = ServeAgent::start(&World::new());
    let (request, marker) = marked(job(
        "1",
        &["setsid -f bash -c \"trap '' TERM HUP INT; sleep 1000; sleep 1000\"", RUN_FOR_EVER],
    ));
    agent.post_job(&request).of_status(200);
    agent.wait_for_log("1", RUNNING);
    assert!(!processes_with(&marker).is_empty());
    agent.post("/stop", b"").of_status(200);
    assert_eq!(agent.finish("1").result(), "stopped");
    assert_eq!(processes_with(&marker), [""; 0]);
}

#[test]
fn a_job_after_a_stopped_one_is_not_stopped() {
    let agent = ServeAgent::start(&World::new());
    for id in 0..5 {
        let (stopped, next) = (format!("stopped-{id}"), format!("next-{id}"));
        agent.post_job(&job(&stopped, &[RUN_FOR_EVER])).of_status(200);
        agent.post("/stop", b"").of_status(200);
        agent.post("/stop", b"").of_status(200);
        assert_eq!(agent.finish(&stopped).result(), "stopped");
        assert_eq!(agent.run_to_end(&job(&next, &["true"])).result(), "passed");
    }
}
