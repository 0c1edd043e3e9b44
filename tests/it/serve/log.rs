//! The log of a job, read over the API.

use std::io::{BufReader, Read as _, Write as _};

use serde_json::Value;

use test_support::http::{Answer, encode_request};
use test_support::serve::{ServeAgent, events, good_authorization};
use test_support::{RUN_FOR_EVER, RUNNING, World, job};

/// Number of lines that takes many reads.
const LINES: &str = "for i in {1..50}; do echo line $i; sleep 0.002; done";

/// Returns a command that prints `bytes` of text in lines.
fn flood(bytes: usize) -> String {
    format!("head -c {bytes} /dev/zero | tr '\\0' x | fold -w 1000")
}

/// Runs a job to its end. Returns the agent and the log, which can still be read.
fn with_log(commands: &[&str]) -> (ServeAgent, Vec<u8>) {
    let agent = ServeAgent::start(&World::new());
    agent.run_to_end(&job("1", commands));
    let log = agent.get("/jobs/1/log").body;
    (agent, log)
}

fn get_with(agent: &ServeAgent, path: &str, header: (&str, &str)) -> Answer {
    let headers = [("Authorization", good_authorization()), header];
    let answer = agent.request("GET", path, &headers, b"");
    answer.of_status(200);
    answer
}

fn decompressed(answer: &Answer) -> Vec<u8> {
    assert_eq!(answer.header("content-encoding"), Some("gzip"));
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(&answer.body[..]).read_to_end(&mut bytes).unwrap();
    bytes
}

/// Not `assert_eq`: a failure would print both.
fn assert_same(found: &[u8], expected: &[u8]) {
    assert!(found == expected, "{} bytes, not those {}", found.len(), expected.len());
}

#[test]
fn a_log_has_one_event_per_line() {
    let (agent, log) = with_log(&["echo hi"]);
    let answer = agent.get("/jobs/1/log");
    let kind = answer.header("content-type").unwrap();
    assert!(kind.starts_with("text/plain"), "{kind}");
    let text = String::from_utf8(log).unwrap();
    assert!(text.ends_with("}\n"));
    let keys = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        let keys: Vec<_> = line.as_object().unwrap().keys().cloned().collect();
        (line["event"].as_str().unwrap().to_owned(), keys)
    };
    for line in text.lines() {
        let (event, keys) = keys(line);
        let expected: &[&str] = match event.as_str() {
            "job_started" => &["event", "timestamp"],
            "cmd_started" => &["directive", "event", "timestamp"],
            "cmd_output" => &["event", "output", "timestamp"],
            "cmd_finished" => {
                &["directive", "event", "exit_code", "finished_at", "started_at", "timestamp"]
            }
            "job_finished" => &["event", "result", "timestamp"],
            other => panic!("{other}"),
        };
        assert_eq!(keys, expected);
    }
}

#[test]
fn a_reader_can_start_at_any_line() {
    let (agent, log) = with_log(&["true", LINES]);
    let lines: Vec<_> = log.split_inclusive(|byte| *byte == b'\n').collect();
    for from in 0..=lines.len() {
        let answer = agent.get(&format!("/jobs/1/log?start_from={from}"));
        assert_same(&answer.of_status(200).body, &lines[from..].concat());
    }
}

#[test]
fn beyond_the_end_a_log_is_empty() {
    let (agent, log) = with_log(&["true"]);
    let lines = line_count(&log);
    let beyond = [lines as u64 + 1, 1_000_000, u64::from(u32::MAX) + 1, u64::MAX];
    let beyond = beyond.map(|line| line.to_string());
    for from in beyond.into_iter().chain([lines.to_string(), "9".repeat(30)]) {
        let answer = agent.get(&format!("/jobs/1/log?start_from={from}"));
        assert_eq!((answer.status, answer.text()), (200, String::new()), "{from}");
    }
}

#[test]
fn a_start_that_is_not_a_number_is_the_beginning() {
    let (agent, log) = with_log(&["true"]);
    let queries = [
        "",
        "?",
        "?start_from",
        "?start_from=",
        "?start_from=abc",
        "?start_from=-1",
        "?start_from=+2",
        "?start_from=1.5",
        "?start_from=0x2",
        "?start_from=2%20",
        "?start_from=%F0",
        "?other=2",
        "?start_from=NaN",
        "?&&=&start_from=0&",
    ];
    for query in queries {
        assert_same(&agent.get(&format!("/jobs/1/log{query}")).of_status(200).body, &log);
    }
    let expected = agent.get("/jobs/1/log?start_from=2").body;
    assert_same(&agent.get("/jobs/1/log?a=1&start_from=2&b=3").body, &expected);
}

#[test]
fn a_growing_log_is_read_to_its_current_end_and_never_changes() {
    let agent = ServeAgent::start(&World::new());
    agent.post_job(&job("1", &["true", LINES, "echo last"])).of_status(200);
    let mut log = Vec::new();
    while !String::from_utf8_lossy(&log).contains("job_finished") {
        let from = line_count(&log);
        let answer = agent.get(&format!("/jobs/1/log?start_from={from}"));
        let new = &answer.of_status(200).body;
        assert!(new.is_empty() || new.ends_with(b"}\n"), "{}", answer.text());
        log.extend_from_slice(new);
    }
    agent.finish("1");
    assert_same(&agent.get("/jobs/1/log").body, &log);
}

#[test]
fn a_read_does_not_wait_for_the_running_job() {
    let agent = ServeAgent::start(&World::new());
    agent.post_job(&job("1", &[RUN_FOR_EVER])).of_status(200);
    agent.wait_for_log("1", RUNNING);
    assert!(!agent.log_events("1").is_empty());
}

#[test]
fn a_log_is_compressed_if_the_client_accepts_it() {
    for size in [10, 5_000_000] {
        let (agent, log) = with_log(&[&flood(size)]);
        for accepted in ["gzip", "gzip, deflate, br", "br;q=1.0, gzip;q=0.8, *;q=0.1"] {
            let answer = get_with(&agent, "/jobs/1/log", ("Accept-Encoding", accepted));
            // A small log may be sent uncompressed.
            if size > 1000 || answer.header("content-encoding").is_some() {
                assert_same(&decompressed(&answer), &log);
                assert!(answer.body.len() < log.len());
            } else {
                assert_same(&answer.body, &log);
            }
        }
        for accepted in ["", "identity", "gzip;q=0", "gzip;q=0.0, identity", "br", "x-unknown"] {
            let answer = get_with(&agent, "/jobs/1/log", ("Accept-Encoding", accepted));
            assert_eq!(answer.header("content-encoding"), None, "{accepted}");
            assert_same(&answer.body, &log);
        }
        assert_eq!(agent.get("/jobs/1/log").header("content-encoding"), None);
    }
}

#[test]
fn a_part_of_a_log_can_be_compressed() {
    let (agent, log) = with_log(&["true", &flood(100_000)]);
    let lines: Vec<_> = log.split_inclusive(|byte| *byte == b'\n').collect();
    let answer = get_with(&agent, "/jobs/1/log?start_from=3", ("Accept-Encoding", "gzip"));
    assert_same(&decompressed(&answer), &lines[3..].concat());
}

#[test]
fn one_connection_serves_many_requests() {
    let (agent, log) = with_log(&[LINES]);
    let mut reader = BufReader::new(agent.connect());
    let headers = [("Authorization", good_authorization())];
    for _ in 0..20 {
        for (path, status) in [
            ("/is_alive", 200),
            ("/jobs/1/log", 200),
            ("/jobs/1/log?start_from=99999", 200),
            ("/nothing", 404),
        ] {
            reader.get_mut().write_all(&encode_request("GET", path, &headers, b"")).unwrap();
            let answer = Answer::read_from(&mut reader, "GET").unwrap();
            assert_eq!(answer.status, status, "{path}");
            if path == "/jobs/1/log" {
                assert_same(&answer.body, &log);
            }
        }
        reader.get_mut().write_all(&encode_request("GET", "/status", &[], b"")).unwrap();
        assert_eq!(Answer::read_from(&mut reader, "GET").unwrap().status, 401);
        let stop = encode_request("POST", "/stop", &headers, br#"{"job_hash_id": "1"}"#);
        reader.get_mut().write_all(&stop).unwrap();
        assert_eq!(Answer::read_from(&mut reader, "POST").unwrap().status, 200);
    }
}

#[test]
fn requests_that_come_all_at_once_are_answered_in_order() {
    let (agent, log) = with_log(&[LINES]);
    let mut reader = BufReader::new(agent.connect());
    let headers = [("Authorization", good_authorization())];
    let requests = ["/status", "/jobs/1/log", "/nothing", "/jobs/1/log", "/is_alive"];
    let bytes = requests.map(|path| encode_request("GET", path, &headers, b"")).concat();
    reader.get_mut().write_all(&bytes).unwrap();
    let answers = requests.map(|_| Answer::read_from(&mut reader, "GET").unwrap());
    assert_eq!(answers.each_ref().map(|answer| answer.status), [200, 200, 404, 200, 200]);
    assert_same(&answers[1].body, &log);
    assert_same(&answers[3].body, &log);
}

#[test]
fn a_slow_reader_gets_everything_and_blocks_nobody() {
    let agent = ServeAgent::start(&World::new());
    agent.post_job(&job("1", &[&flood(20_000_000), RUN_FOR_EVER])).of_status(200);
    agent.wait_for_log("1", RUNNING);
    let mut slow = agent.connect();
    let headers = [("Authorization", good_authorization()), ("Connection", "close")];
    slow.write_all(&encode_request("GET", "/jobs/1/log", &headers, b"")).unwrap();
    let mut received = vec![0; 64 * 1024];
    for round in 0..20 {
        slow.read_exact(&mut received[round * 100..][..100]).unwrap();
        assert_eq!(agent.request("GET", "/is_alive", &[], b"").status, 200);
        assert_eq!(agent.get("/status").json()["state"], "job-received");
    }
    received.truncate(20 * 100);
    let log = agent.get("/jobs/1/log").body;
    agent.post("/stop", b"").of_status(200);
    agent.finish("1");
    // By now, the job is torn down; the slow reader still gets the rest of its log.
    let mut reader = BufReader::new(std::io::Cursor::new(received).chain(slow));
    let answer = Answer::read_from(&mut reader, "GET").unwrap();
    assert_same(&answer.of_status(200).body, &log);
}

#[test]
fn a_reader_of_a_replaced_log_gets_all_of_it() {
    let agent = ServeAgent::start(&World::new());
    agent.run_to_end(&job("1", &[&flood(20_000_000)]));
    let log = agent.get("/jobs/1/log").body;
    let mut slow = agent.connect();
    let headers = [("Authorization", good_authorization())];
    slow.write_all(&encode_request("GET", "/jobs/1/log", &headers, b"")).unwrap();
    let mut first = [0; 100];
    slow.read_exact(&mut first).unwrap();
    assert_eq!(agent.run_to_end(&job("2", &["echo hi"])).result(), "passed");
    let mut reader = BufReader::new(first.chain(slow));
    assert_same(&Answer::read_from(&mut reader, "GET").unwrap().body, &log);
}

#[test]
fn many_readers_get_the_same_log() {
    let (agent, log) = with_log(&[&flood(2_000_000)]);
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| assert_same(&agent.get("/jobs/1/log").body, &log));
        }
    });
    assert_eq!(events(&agent.get("/jobs/1/log")).len(), agent.log_events("1").len());
}

fn line_count(log: &[u8]) -> usize {
    log.split_inclusive(|byte| *byte == b'\n').count()
}
