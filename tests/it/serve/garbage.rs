//! Arbitrary and slightly wrong requests: the agent responds or closes the connection, and never ends.

use std::io::{BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use serde_json::{Value, json};

use test_support::http::{Answer, encode_request};
use test_support::serve::{ServeAgent, good_authorization};
use test_support::{World, wait_until};

fn for_many<S: Strategy>(
    cases: u32,
    strategy: &S,
    test: impl Fn(S::Value) -> Result<(), TestCaseError>,
) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    if let Err(error) = TestRunner::new(config).run(strategy, test) {
        panic!("{error}");
    }
}

/// Starts an agent on which no mutated request can take a long time.
fn start(world: &World) -> ServeAgent {
    ServeAgent::start_with(world, |command| {
        command.args(["--callback-retry-attempts", "1"]);
    })
}

fn assert_alive(agent: &ServeAgent) {
    assert_eq!(agent.request("GET", "/is_alive", &[], b"").text(), "yes");
}

/// Escapes an ID for use in a path.
fn escaped(id: &str) -> String {
    id.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

/// Posts a body. If it started a job, stops and archives that job.
fn post(agent: &ServeAgent, body: &[u8]) -> Result<(), TestCaseError> {
    let answer = agent.post("/jobs", body);
    prop_assert!(matches!(answer.status, 200 | 400..=499), "{}", answer.status);
    prop_assert!(!answer.message().is_empty());
    if answer.status == 200 {
        // Unused fields may contain bytes that are not UTF-8.
        let shown = String::from_utf8_lossy(body);
        let request: Value = serde_json::from_str(&shown).unwrap();
        prop_assert!(request["job_id"].is_string(), "accepted without an id: {}", shown);
        let id = escaped(request["job_id"].as_str().unwrap());
        agent.post("/stop", b"").of_status(200);
        let finished = agent.finish(&id);
        prop_assert!(["passed", "failed", "stopped"].contains(&finished.result()));
    }
    assert_alive(agent);
    Ok(())
}

/// Returns a request with all fields, and a new ID.
fn good_request() -> Value {
    static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let id = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    json!({
        "job_id": format!("job {id}"),
        "job_name": "a name",
        "executor": "shell",
        "compose": { "containers": [{ "name": "main", "image": "image" }] },
        "commands": [{ "directive": "true", "alias": "nothing" }, { "directive": "test 1" }],
        "epilogue_always_commands": [{ "directive": "true" }],
        "env_vars": [{ "name": "NAME", "value": "dmFsdWU=" }],
        "files": [{ "path": "file", "content": "dmFsdWU=", "mode": "0644" }],
        "ssh_public_keys": ["c3NoLWVkMjU1MTkgQUFBQQ=="],
        "callbacks": { "finished": "", "teardown_finished": "", "token": "" },
        "logger": { "method": "pull", "max_size_in_bytes": 1000 },
    })
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[^/.]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z_]{0,8}", inner, 0..4)
                .prop_map(|map| map.into_iter().collect()),
        ]
    })
}

/// Returns the JSON pointers of all places in a value.
fn places(value: &Value) -> Vec<String> {
    let children: Vec<(String, &Value)> = match value {
        Value::Array(items) => {
            items.iter().enumerate().map(|(index, item)| (index.to_string(), item)).collect()
        }
        Value::Object(fields) => fields.iter().map(|(name, item)| (name.clone(), item)).collect(),
        _ => Vec::new(),
    };
    let below = children.into_iter().flat_map(|(name, child)| {
        places(child).into_iter().map(move |place| format!("/{name}{place}"))
    });
    std::iter::once(String::new()).chain(below).collect()
}

#[test]
fn any_bytes_as_a_job() {
    let agent = start(&World::new());
    let bytes = prop::collection::vec(any::<u8>(), 0..2000);
    for_many(64, &bytes, |bytes| post(&agent, &bytes));
}

#[test]
fn any_json_as_a_job() {
    let agent = start(&World::new());
    for_many(64, &any_json(), |value| post(&agent, value.to_string().as_bytes()));
}

#[test]
fn a_good_request_with_one_other_value() {
    let agent = start(&World::new());
    for_many(64, &(any::<prop::sample::Index>(), any_json()), |(place, value)| {
        let mut request = good_request();
        let places = places(&request);
        *request.pointer_mut(place.get::<String>(&places)).unwrap() = value;
        post(&agent, request.to_string().as_bytes())
    });
}

#[test]
fn a_good_request_with_other_bytes() {
    let agent = start(&World::new());
    let index = any::<prop::sample::Index>;
    // With a slash or a dot, a file could be written outside of the job's home.
    let bytes = prop::collection::vec(any::<u8>().prop_filter("", |it| !b"/.~".contains(it)), 0..4);
    let mutation = (index(), 0..6_usize, bytes);
    let mutations = prop::collection::vec(mutation, 1..4);
    for_many(64, &mutations, |mutations| {
        let mut request = good_request().to_string().into_bytes();
        for (place, length, bytes) in mutations {
            let start = place.index(request.len());
            let end = (start + length).min(request.len());
            request.splice(start..end, bytes);
        }
        post(&agent, &request)
    });
}

#[test]
fn any_path() {
    let agent = start(&World::new());
    let word = prop_oneof![
        "[!-~]{0,20}",
        "(jobs|log|stop|status|is_alive|agent_logs|terminate|%2e%2e|%00|\\.\\.|%2F|%|%FF|;)",
    ];
    let path = prop::collection::vec(word, 0..6).prop_map(|words| format!("/{}", words.join("/")));
    let method = prop_oneof!["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "[A-Z]{1,9}"];
    for_many(128, &(method, path), |(method, path)| {
        let headers = [("Authorization", good_authorization())];
        // The response to CONNECT would be a tunnel.
        prop_assume!(method != "CONNECT");
        let answer = agent.try_request(&method, &path, &headers, b"");
        match answer {
            Ok(answer) => prop_assert!(matches!(answer.status, 200 | 400..=499), "{answer:?}"),
            Err(error) => prop_assert!(false, "{method} {path}: {error}"),
        }
        assert_alive(&agent);
        Ok(())
    });
    assert_eq!(agent.get("/status").json()["state"], "waiting-for-job");
}

#[test]
fn any_query_of_a_log() {
    let agent = start(&World::new());
    agent.run_to_end(&json!({ "job_id": "1", "commands": [{ "directive": "true" }] }));
    let log = agent.get("/jobs/1/log").text();
    let query = prop_oneof!["[!-~]{0,30}", "start_from=[!-~]{0,10}", "start_from=[0-9]{1,25}"];
    for_many(64, &query, |query| {
        let answer = agent.get(&format!("/jobs/1/log?{query}"));
        // Some of these characters are not allowed in a URL.
        let url = !query.contains(['"', '<', '>', '\\', '^', '`', '{', '|', '}']);
        prop_assert!(answer.status == 200 || (answer.status == 400 && !url), "{}", answer.status);
        prop_assert!(answer.status == 400 || log.ends_with(&answer.text()));
        Ok(())
    });
}

#[test]
fn any_value_of_the_headers_that_matter() {
    let agent = start(&World::new());
    let name = prop::sample::select(vec![
        "Authorization",
        "Accept-Encoding",
        "X-Client-Name",
        "Content-Type",
        "Connection",
        "Expect",
        "Range",
        "If-None-Match",
        "Upgrade",
    ]);
    for_many(64, &(name, "[ -~]{0,60}"), |(name, value)| {
        let mut headers = vec![(name, value.as_str())];
        if name != "Authorization" {
            headers.push(("Authorization", good_authorization()));
        }
        let answer = agent.try_request("GET", "/agent_logs", &headers, b"");
        if let Ok(answer) = answer {
            prop_assert!(matches!(answer.status, 200 | 400..=499), "{}", answer.status);
        }
        assert_alive(&agent);
        Ok(())
    });
}

/// Checks that the received bytes are complete responses, or nothing.
fn check_answers(received: &[u8], refused_at_most: u16) -> Result<(), TestCaseError> {
    let mut reader = BufReader::new(received);
    while let Ok(answer) = Answer::read_from(&mut reader, "GET") {
        prop_assert!((200..=refused_at_most).contains(&answer.status), "{answer:?}");
    }
    Ok(())
}

#[test]
fn any_bytes_over_a_connection() {
    let agent = start(&World::new());
    let headers = [("Authorization", good_authorization())];
    let bytes = prop::collection::vec(any::<u8>(), 0..3000);
    let request = (any::<prop::sample::Index>(), prop::collection::vec(any::<u8>(), 0..20));
    let request = request.prop_map(move |(place, bytes)| {
        let mut request = encode_request("GET", "/status", &headers, b"");
        let place = place.index(request.len());
        request.splice(place..place, bytes);
        request
    });
    for_many(96, &prop_oneof![bytes, request], |bytes| {
        let mut stream = agent.connect();
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown();
        let _ = stream.get_ref().shutdown(Shutdown::Write);
        let mut received = Vec::new();
        let _ = stream.read_to_end(&mut received);
        check_answers(&received, 499)?;
        assert_alive(&agent);
        Ok(())
    });
}

#[test]
fn any_bytes_instead_of_tls() {
    let agent = start(&World::new());
    let bytes = prop::collection::vec(any::<u8>(), 0..3000);
    let record =
        bytes.clone().prop_map(|bytes| [b"\x16\x03\x01\x02\x00\x01".as_slice(), &bytes].concat());
    for_many(64, &prop_oneof![bytes, record], |bytes| {
        let mut stream = TcpStream::connect(agent.address()).unwrap();
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let mut received = Vec::new();
        let _ = stream.read_to_end(&mut received);
        assert_alive(&agent);
        Ok(())
    });
    wait_until(|| agent.get("/status").status == 200, || "no status".into());
}
