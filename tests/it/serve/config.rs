//! The configuration of `agent serve`: flags, variables, a file, the secret, the hook.

use std::fs;
use std::net::UdpSocket;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::json;

use test_support::callbacks::CallbackServer;
use test_support::serve::{SECRET, ServeAgent, refusal};
use test_support::{RUN_UNTIL_GO, RUNNING, World, job};

const SECRET_VARIABLE: &str = "SEMAPHORE_AGENT_AUTH_TOKEN_SECRET";

fn with_config(path: &Path) -> impl FnOnce(&mut Command) {
    move |command| {
        command.arg("--config-file").arg(path);
    }
}

/// Asserts that the agent accepts tokens signed with this secret.
fn assert_open(agent: &ServeAgent) {
    assert_eq!(agent.get("/status").of_status(200).json()["state"], "waiting-for-job");
}

fn body_limit(agent: &ServeAgent) -> usize {
    let answer = agent.post("/jobs", &[b' '; 4000]);
    let message = answer.of_status(413).message();
    message.split_whitespace().find_map(|word| word.parse().ok()).unwrap()
}

#[test]
fn flags_override_the_environment_which_overrides_the_file() {
    let world = World::new();
    let file = world.file("config.yaml", "max-body-size: 3000\nport: 1\nsingle-job: true\n");
    let start = |variable: bool, flag: bool| {
        ServeAgent::start_with(&world, |command| {
            command.env("SEMAPHORE_AGENT_CONFIG_FILE", &file);
            if variable {
                command.env("SEMAPHORE_AGENT_MAX_BODY_SIZE", "2000");
            }
            if flag {
                command.args(["--max-body-size", "1000", "--single-job=false"]);
            }
        })
    };
    for (variable, flag, limit) in
        [(false, false, 3000), (true, false, 2000), (false, true, 1000), (true, true, 1000)]
    {
        assert_eq!(body_limit(&start(variable, flag)), limit);
    }
    let agent = start(true, true);
    for id in ["1", "2"] {
        assert_eq!(agent.run_to_end(&job(id, &["true"])).result(), "passed");
    }
}

#[test]
fn the_configured_body_limit_applies() {
    let agent = ServeAgent::start_with(&World::new(), |command| {
        command.args(["--max-body-size", "200"]);
    });
    let mut request = job("1", &["true"]).to_string().into_bytes();
    request.resize(201, b' ');
    agent.post("/jobs", &request).of_status(413);
    request.pop();
    agent.post("/jobs", &request).of_status(200);
    agent.finish("1");
}

#[test]
fn every_key_of_the_file_has_an_effect() {
    let world = World::new();
    drop(ServeAgent::start(&world));
    let made = world.state().join("tls");
    let metrics = UdpSocket::bind("127.0.0.1:0").unwrap();
    metrics.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
    let other_state = world.home().with_file_name("other-state");
    let jump_point = world.home().with_file_name("other_jump_point");
    let hook = world.file("hook", "echo hooked\n");
    let config = json!({
        "auth-token-secret": SECRET,
        "host": "127.0.0.1",
        "port": 0,
        "tls-cert-path": made.join("server.crt"),
        "tls-key-path": made.join("server.key"),
        "statsd-host": "127.0.0.1",
        "statsd-port": metrics.local_addr().unwrap().port(),
        "statsd-namespace": "from.file",
        "callback-retry-attempts": 1,
        "pre-job-hook-path": hook,
        "files": ["/etc/hosts:/tmp/hosts", "/a:/b"],
        "expose-kvm-device": false,
        "max-body-size": 3000,
        "single-job": true,
        "interruption-grace-period": 60,
        "state-dir": other_state,
        "ssh-jump-point-path": jump_point,
    });
    let file = world.file("config.yaml", config.to_string());
    let mut agent = ServeAgent::start_with(&world, |command| {
        with_config(&file)(command);
        for name in ["AUTH_TOKEN_SECRET", "HOST", "PORT", "STATE_DIR", "SSH_JUMP_POINT_PATH"] {
            command.env_remove(format!("SEMAPHORE_AGENT_{name}"));
        }
    });
    assert_eq!(agent.address().ip().to_string(), "127.0.0.1");
    assert!(agent.own_log().contains("own=false"), "{}", agent.own_log());
    assert_eq!(body_limit(&agent), 3000);
    let server = CallbackServer::answering(|_| 500);
    let mut request = job("1", &[RUN_UNTIL_GO]);
    request["callbacks"] = json!({ "finished": server.url("/finished") });
    agent.post_job(&request).of_status(200);
    agent.wait_for_log("1", RUNNING);
    assert!(jump_point.exists());
    assert!(fs::read_dir(&other_state).unwrap().count() > 0);
    agent.signal(Signal::SIGTERM);
    agent.wait_for_own_log("asked to end");
    fs::write(world.home().join("go"), "").unwrap();
    agent.wait_for_log("1", "job_finished");
    let log = agent.get("/jobs/1/log").text();
    assert!(log.contains(r#""output":"hooked\n""#) && log.contains(r#""passed""#), "{log}");
    let mut datagram = [0; 100];
    let length = metrics.recv(&mut datagram).unwrap();
    assert!(datagram[..length].starts_with(b"from.file."));
    agent.archive("1");
    assert_eq!(agent.wait_for_exit().code(), Some(0));
    assert_eq!(server.count(), 1);
}

#[test]
fn errors_in_a_file_are_named() {
    let world = World::new();
    let cases = [
        ("prot: 8000", vec!["prot"]),
        ("config-file: other", vec!["config-file"]),
        ("single_job: true", vec!["single_job"]),
        ("port: many", vec!["port", "many"]),
        ("port: 65536", vec!["port", "65536"]),
        ("port: -1", vec!["port", "-1"]),
        ("max-body-size: [1]", vec!["max-body-size"]),
        ("single-job: perhaps", vec!["single-job", "perhaps"]),
        ("files: /a:/b", vec!["files"]),
        ("host: a\nhost: b", vec!["host"]),
        ("host: [", vec!["line"]),
        ("host: a\n\tport: 1", vec!["line"]),
        ("- host", vec!["sequence"]),
    ];
    for (text, words) in cases {
        let file = world.file("config.yaml", text);
        let message = refusal(&world, with_config(&file));
        for word in [file.to_str().unwrap()].iter().chain(&words) {
            assert!(message.contains(*word), "{text:?}, {word}: {message}");
        }
    }
    let unreadable = [
        (world.home().join("missing"), "No such file"),
        (world.home(), "directory"),
        (world.file("binary", b"\xff\xfe\xfd"), "UTF-8"),
    ];
    for (file, why) in unreadable {
        let message = refusal(&world, with_config(&file));
        assert!(message.contains(file.to_str().unwrap()) && message.contains(why), "{message}");
    }
    assert_open(&ServeAgent::start_with(&world, with_config(&world.file("empty.yaml", "# no\n"))));
}

#[test]
fn two_secrets_are_refused() {
    let world = World::new();
    let secret = world.file("secret", SECRET);
    let both = format!("auth-token-secret: canary\nauth-token-secret-file: {}", secret.display());
    let both = world.file("config.yaml", both);
    let by_variables = refusal(&world, |command| {
        command.env("SEMAPHORE_AGENT_AUTH_TOKEN_SECRET_FILE", &secret);
    });
    let by_file = refusal(&world, |command| {
        with_config(&both)(command.env_remove(SECRET_VARIABLE));
    });
    for message in [by_variables, by_file] {
        assert!(
            message.contains("is set too (only one is allowed)") && !message.contains(SECRET),
            "{message}"
        );
    }
    // A source closer to the command line overrides the other one.
    assert_open(&ServeAgent::start_with(&world, with_config(&both)));
}

#[test]
fn an_unknown_variable_is_a_warning() {
    let agent = ServeAgent::start_with(&World::new(), |command| {
        command.env("SEMAPHORE_AGENT_MAX_BODY_SIZES", "canary").env("SEMAPHORE_AGENT_FILES", "");
    });
    let own_log = agent.own_log();
    let warnings: Vec<_> = own_log.lines().filter(|line| line.contains(" WARN ")).collect();
    assert_eq!(warnings.len(), 1, "{own_log}");
    assert!(warnings[0].contains("unknown variable SEMAPHORE_AGENT_MAX_BODY_SIZES"), "{own_log}");
    assert!(!own_log.contains("canary"), "{own_log}");
}

#[test]
fn files_are_pairs_of_paths() {
    let world = World::new();
    for bad in ["/only-host", "/host:", ":/container", "/a:/b,/c", "/a:/b,"] {
        let message = refusal(&world, |command| {
            command.args(["--files", bad]);
        });
        assert!(
            message.contains("HOST:CONTAINER") && message.contains("files"),
            "{bad}: {message}"
        );
    }
    let message = refusal(&world, |command| {
        command.env("SEMAPHORE_AGENT_FILES", "/a:/b\n/c");
    });
    assert!(message.contains("`/c`"), "{message}");
    assert_open(&ServeAgent::start_with(&world, |command| {
        command.args(["--files", "/a:/b,/c d:/e"]);
    }));
}
