//! Requests for jobs that are refused, and requests that are accepted but whose job fails with a reason.

use std::io::{BufReader, Write as _};

use serde_json::{Value, json};

use test_support::http::{Answer, encode_request};
use test_support::serve::{ServeAgent, good_authorization};
use test_support::{Finished, World, base64, job};

const SECRET_TEXT: &str = "hunter2-wordlike";
const SECRET_NUMBER: u64 = 481_516_234_200;

/// Asserts that the job is refused with these words in the message, and that the agent's state is unchanged.
fn assert_refused(agent: &ServeAgent, body: &[u8], words: &[&str]) {
    let shown = String::from_utf8_lossy(&body[..body.len().min(300)]).into_owned();
    let answer = agent.post("/jobs", body);
    assert_eq!(answer.status, 422, "{shown}: {}", answer.text());
    let message = answer.message();
    assert!(!message.is_empty());
    for word in words {
        assert!(message.contains(word), "{shown}: {word:?} is not in {message:?}");
    }
    for secret in [SECRET_TEXT, &SECRET_NUMBER.to_string()] {
        assert!(!answer.text().contains(secret), "{shown}: {message}");
        assert!(!agent.own_log().contains(secret), "{shown}");
    }
    assert_eq!(agent.get("/status").json()["state"], "waiting-for-job", "{shown}");
    agent.get("/jobs/1/log").of_status(404);
}

#[test]
fn malformed_requests_are_refused() {
    let agent = ServeAgent::start(&World::new());
    let whole = job("1", &["true"]).to_string();
    let deep = "[".repeat(100_000);
    let bodies: [&[u8]; 15] = [
        b"",
        b" ",
        b"[]",
        b"{}",
        b"null",
        b"1",
        b"\"1\"",
        b"{",
        &whole.as_bytes()[..whole.len() - 1],
        &[whole.as_bytes(), b" x"].concat(),
        b"{\"job_id\": \"\xFF\"}",
        b"job_id: 1",
        b"\x00\x00",
        b"[\"1\"]",
        deep.as_bytes(),
    ];
    for body in bodies {
        assert_refused(&agent, body, &[]);
    }
    assert_eq!(agent.run_to_end(&job("1", &["true"])).result(), "passed");
}

#[test]
fn a_request_without_an_id_is_refused() {
    let agent = ServeAgent::start(&World::new());
    for id in [json!(null), json!(""), json!(1), json!(["1"]), json!({}), json!(true)] {
        let body = json!({ "job_id": id, "commands": [{ "directive": "true" }] }).to_string();
        assert_refused(&agent, body.as_bytes(), &["job_id"]);
    }
    // An alias that only exists in job files.
    assert_refused(&agent, br#"{"id": "1"}"#, &["job_id"]);
}

#[test]
fn a_field_of_a_wrong_type_is_named_without_its_value() {
    let agent = ServeAgent::start(&World::new());
    let secrets = [
        json!(SECRET_NUMBER),
        json!([SECRET_TEXT]),
        json!({ SECRET_TEXT: SECRET_TEXT }),
        json!(-481_516_234_200.5),
    ];
    for secret in &secrets {
        let bad = [
            (json!({ "env_vars": [{ "name": "A", "value": secret }] }), "env_vars[0].value"),
            (
                json!({ "files": [{ "path": "a", "content": "" }, { "path": "b", "content": secret }] }),
                "files[1].content",
            ),
            (json!({ "commands": [{ "directive": secret }] }), "commands[0].directive"),
            (json!({ "callbacks": { "token": secret } }), "callbacks.token"),
            (json!({ "logger": { "token": secret } }), "logger.token"),
            (json!({ "ssh_public_keys": ["", secret] }), "ssh_public_keys[1]"),
            (
                json!({ "compose": { "containers": [{ "name": "main", "env_vars": [{ "name": "A", "value": secret }] }] } }),
                "compose.containers[0].env_vars[0].value",
            ),
            (
                json!({ "compose": { "image_pull_credentials": [{ "env_vars": [{ "value": secret }] }] } }),
                "compose.image_pull_credentials[0].env_vars[0].value",
            ),
            (
                json!({ "epilogue_always_commands": [{ "alias": secret }] }),
                "epilogue_always_commands[0].alias",
            ),
            (json!({ "job_name": secret }), "job_name"),
            (json!({ "executor": secret }), "executor"),
        ];
        for (mut request, field) in bad {
            request["job_id"] = json!("1");
            assert_refused(&agent, request.to_string().as_bytes(), &[field]);
        }
    }
    for (field, value) in [
        ("env_vars", json!(SECRET_TEXT)),
        ("env_vars", json!({ "name": SECRET_TEXT })),
        ("env_vars", json!([SECRET_TEXT])),
        ("files", json!(SECRET_TEXT)),
        ("commands", json!([SECRET_TEXT])),
        ("callbacks", json!(SECRET_TEXT)),
        ("callbacks", json!([[SECRET_TEXT]])),
        ("logger", json!(SECRET_TEXT)),
        ("logger", json!({ "max_size_in_bytes": SECRET_TEXT })),
        ("compose", json!(SECRET_TEXT)),
        ("ssh_public_keys", json!(SECRET_TEXT)),
    ] {
        let request = json!({ "job_id": "1", field: value });
        assert_refused(&agent, request.to_string().as_bytes(), &[field]);
    }
}

#[test]
fn a_log_that_cannot_be_delivered_is_refused() {
    let agent = ServeAgent::start(&World::new());
    for method in ["push", "shout", "PULL", " pull"] {
        let mut request = job("1", &["true"]);
        request["logger"] =
            json!({ "method": method, "url": "http://127.0.0.1:1", "token": SECRET_TEXT });
        assert_refused(&agent, request.to_string().as_bytes(), &["logger.method"]);
    }
    for method in ["", "pull"] {
        let mut request = job(&format!("with{method}"), &["true"]);
        request["logger"] = json!({ "method": method });
        assert_eq!(agent.run_to_end(&request).result(), "passed", "{method}");
    }
}

/// Asserts that the job is accepted, fails in the step with this title, and runs none of its commands.
fn assert_fails(agent: &ServeAgent, mut request: Value, title: &str, words: &[&str]) -> Finished {
    static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let id = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed).to_string();
    request["job_id"] = id.into();
    request["commands"] = json!([{ "directive": "echo ran" }]);
    let finished = agent.run_to_end(&request);
    assert_eq!(finished.result(), "failed", "{request}: {finished:?}");
    let steps = finished.steps();
    let (failed, output, exit_code) =
        steps.iter().find(|(.., exit_code)| *exit_code != 0).unwrap_or_else(|| panic!("{steps:?}"));
    assert_eq!((failed.as_str(), *exit_code), (title, 1), "{request}");
    for word in words {
        assert!(output.contains(word), "{word:?} is not in {output:?}");
    }
    assert!(!output.contains(SECRET_TEXT), "{output}");
    assert!(steps.iter().all(|(_, output, _)| !output.contains("ran\n")), "{steps:?}");
    finished
}

#[test]
fn variables_that_cannot_be_exported_fail_the_export_step() {
    let agent = ServeAgent::start(&World::new());
    let good = base64(b"x");
    for (name, value) in [
        ("A", "***"),
        ("A", "YQ=a"),
        ("A", "hunter2-wordlike!"),
        ("A", "Y"),
        ("A-B", &good),
        ("1A", &good),
        ("", &good),
        ("A=B", &good),
        ("A B", &good),
        ("A;touch ran", &good),
        ("A\nB", &good),
        ("Ä", &good),
    ] {
        let request = json!({ "env_vars": [{ "name": name, "value": value }] });
        let shown = name.split(['=', '\n']).next().unwrap_or_default();
        assert_fails(&agent, request, "Exporting environment variables", &[shown]);
    }
}

#[test]
fn files_that_cannot_be_injected_fail_the_injection_step() {
    let agent = ServeAgent::start(&World::new());
    let good = base64(b"x");
    for mode in ["9z9", "rwx", "0o644", "-644", "888", "0x1", "99999999999", " 0644"] {
        let request = json!({ "files": [{ "path": "a", "content": good, "mode": mode }] });
        let words = [&format!("bad file permission '{mode}'")[..]];
        assert_fails(&agent, request, "Injecting Files", &words);
    }
    for (path, content) in
        [("a", "***"), ("a", "hunter2-wordlike!"), ("/dev/null/x", &good), ("/proc/x/y", &good)]
    {
        let request = json!({ "files": [{ "path": path, "content": content, "mode": "0600" }] });
        assert_fails(&agent, request, "Injecting Files", &[path]);
    }
    for path in ["", "a\0b"] {
        let request = json!({ "files": [{ "path": path, "content": good, "mode": "0600" }] });
        assert_fails(&agent, request, "Injecting Files", &[]);
    }
}

#[test]
fn a_job_that_cannot_be_prepared_fails_and_says_why() {
    let agent = ServeAgent::start(&World::new());
    let cases = [
        (json!({ "executor": "unheard of" }), vec!["unheard of", "shell", "dockercompose"]),
        (json!({ "executor": "dockercompose" }), vec![]),
        (json!({ "executor": "dockercompose", "compose": {} }), vec![]),
        (json!({ "executor": "dockercompose", "compose": { "containers": [] } }), vec![]),
    ];
    for (number, (mut request, words)) in cases.into_iter().enumerate() {
        request["job_id"] = number.to_string().into();
        request["commands"] = json!([{ "directive": "echo ran" }]);
        request["epilogue_always_commands"] = json!([{ "directive": "echo ran" }]);
        let finished = agent.run_to_end(&request);
        assert_eq!(finished.result(), "failed", "{request}");
        let steps = finished.steps();
        assert!(steps.iter().all(|(title, ..)| title != "echo ran"), "{steps:?}");
        let output: String = steps.iter().map(|(_, output, _)| output.as_str()).collect();
        assert!(!output.is_empty(), "{request}: no reason");
        for word in words {
            assert!(output.contains(word), "{request}: {word:?} is not in {output:?}");
        }
    }
}

#[test]
fn a_body_of_the_maximum_size_is_accepted_and_a_longer_one_is_refused() {
    let agent = ServeAgent::start_with(&World::new(), |command| {
        command.args(["--max-body-size", "1000"]);
    });
    let of_length = |id: &str, length: usize| {
        let mut body = job(id, &["true"]).to_string();
        body.extend(std::iter::repeat_n(' ', length - body.len()));
        body.into_bytes()
    };
    let authorization = ("Authorization", good_authorization());
    let chunked = |body: &[u8]| {
        let mut chunks: Vec<u8> = Vec::new();
        for part in body.chunks(100) {
            chunks.extend(format!("{:x}\r\n", part.len()).bytes());
            chunks.extend([part, b"\r\n"].concat());
        }
        chunks.extend(b"0\r\n\r\n");
        let headers = [authorization, ("Transfer-Encoding", "chunked")];
        agent.request("POST", "/jobs", &headers, &chunks)
    };
    for answer in [
        agent.post("/jobs", &of_length("1", 1001)),
        agent.post("/jobs", &of_length("1", 100_000)),
        chunked(&of_length("1", 1001)),
        chunked(&of_length("1", 5000)),
        agent.post("/stop", &of_length("1", 1001)),
    ] {
        assert!(!answer.of_status(413).message().is_empty());
        assert_eq!(agent.get("/status").json()["state"], "waiting-for-job");
    }
    assert_eq!(agent.post("/jobs", &of_length("1", 1000)).of_status(200).message(), "ok");
    agent.finish("1");
    assert_eq!(chunked(&of_length("2", 1000)).of_status(200).message(), "ok");
    agent.finish("2");
}

#[test]
fn an_excessive_content_length_is_refused_before_the_body_comes() {
    let agent = ServeAgent::start(&World::new());
    for length in ["33554433", "1000000000000", "18446744073709551615"] {
        let headers = [("Authorization", good_authorization()), ("Expect", "100-continue")];
        for headers in [&headers[..1], &headers] {
            let request = encode_request("POST", "/jobs", headers, b"");
            let request = String::from_utf8(request).unwrap();
            let request =
                request.replace("Content-Length: 0", &format!("Content-Length: {length}"));
            let mut stream = agent.connect();
            stream.write_all(request.as_bytes()).unwrap();
            let answer = Answer::read_from(&mut BufReader::new(stream), "POST").unwrap();
            answer.of_status(413);
        }
    }
}

#[test]
fn the_default_body_limit_is_32_mib() {
    let agent = ServeAgent::start(&World::new());
    let mut request = job("1", &["wc -c <large"]);
    let content = base64(&vec![b'x'; 24_000_000]);
    request["files"] = json!([{ "path": "large", "content": content, "mode": "0600" }]);
    assert_eq!(agent.run_to_end(&request).output(), "24000000\n");
    let mut body = job("2", &["true"]).to_string().into_bytes();
    body.resize(32 * 1024 * 1024 + 1, b' ');
    agent.post("/jobs", &body).of_status(413);
    body.pop();
    assert_eq!(agent.post("/jobs", &body).of_status(200).message(), "ok");
    agent.finish("2");
}
