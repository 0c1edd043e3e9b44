//! Secrets do not leak into errors, logs or jobs.

use std::fs;
use std::path::PathBuf;

use nix::sys::signal::Signal;
use serde_json::json;

use test_support::callbacks::CallbackServer;
use test_support::serve::{SECRET, ServeAgent, good_authorization, refusal, token};
use test_support::{World, base64, job};

const SECRET_VARIABLE: &str = "SEMAPHORE_AGENT_AUTH_TOKEN_SECRET";

const CANARY: &str = "canary";

#[test]
fn a_secret_is_never_in_an_error() {
    let world = World::new();
    let texts = [
        "auth-token-secret: [canary]",
        "auth-token-secret: {canary: 1}",
        "auth-token-secret: \"canary",
        "auth-token-secret: 123canary\nport: x",
        "auth-token-secret: canary\nauth-token-secret: canary",
        "auth-token-secret: canary: x",
        "auth-token-secret: *canary",
        "auth-token-secret:canary",
        "auth-token-secret=canary",
        "canary",
        "port: 8000\n  auth-token-secret:canary",
        "auth-token-secrets: canary",
        "auth-token-secret: canary\nauth-token-secret-file: /x",
    ];
    let mut shown = Vec::new();
    for text in texts {
        let file = world.file("config.yaml", text);
        let message = refusal(&world, |command| {
            command.env_remove(SECRET_VARIABLE).arg("--config-file").arg(file);
        });
        if message.contains("canary") {
            shown.push((text, message));
        }
    }
    let message = refusal(&world, |command| {
        command.args(["--auth-token-secrett", CANARY]);
    });
    assert!(message.contains("--auth-token-secrett") && !message.contains(CANARY), "{message}");
    assert!(shown.is_empty(), "{shown:#?}");
}

/// Ways to pass the secret to the agent.
fn ways(world: &World) -> [(Option<&'static str>, Vec<PathBuf>); 4] {
    let file = world.file("secret", format!("{SECRET}\n"));
    let inline = world.file("a.yaml", format!("auth-token-secret: {SECRET}"));
    let by_name = world.file("b.yaml", format!("auth-token-secret-file: {}", file.display()));
    let flags = |flag: &str, path: PathBuf| vec![flag.into(), path];
    [
        (Some(SECRET), vec![]),
        (None, flags("--auth-token-secret-file", file)),
        (None, flags("--config-file", inline)),
        (None, flags("--config-file", by_name)),
    ]
}

#[test]
fn jobs_and_process_lists_do_not_see_the_secret() {
    let world = World::new();
    for (number, (variable, arguments)) in ways(&world).into_iter().enumerate() {
        let agent = ServeAgent::start_with(&world, |command| {
            command.env_remove(SECRET_VARIABLE).args(&arguments);
            command.envs(variable.map(|secret| (SECRET_VARIABLE, secret)));
        });
        let look = "env; p=$$; while ((p > 1)) && [[ $(readlink /proc/$p/exe) != '' ]]; do \
            echo \"process $p\"; tr '\\0' '\\n' < /proc/$p/cmdline; \
            [[ $p = AGENT ]] || tr '\\0' '\\n' < /proc/$p/environ; \
            [[ $p = AGENT ]] && break; p=$(awk '/^PPid/ {print $2}' /proc/$p/status); done";
        let look = look.replace("AGENT", &agent.pid().to_string());
        let finished = agent.run_to_end(&job(&number.to_string(), &[&look]));
        let output = finished.output();
        assert!(output.contains("\nHOME=") && output.contains("process "), "{output}");
        assert!(!output.contains(SECRET), "{arguments:?}: {output}");
        let line = fs::read(format!("/proc/{}/cmdline", agent.pid())).unwrap();
        assert!(!String::from_utf8_lossy(&line).contains(SECRET));
        assert!(!agent.own_log().contains(SECRET));
    }
}

#[test]
fn the_agents_own_log_contains_no_secrets() {
    let world = World::new();
    let secret = format!("{SECRET} {CANARY}");
    for level in ["debug", "trace"] {
        let errors = world.file("stderr", "");
        let agent = ServeAgent::start_with(&world, |command| {
            command.env("SEMAPHORE_AGENT_LOG_LEVEL", level);
            command.args(["--callback-retry-attempts", "1"]);
            command.env("SEMAPHORE_AGENT_NO_SUCH_THING", CANARY);
            command.stderr(fs::File::create(&errors).unwrap());
        });
        let server = CallbackServer::answering(|_| 500);
        let encoded = base64(CANARY.as_bytes());
        let mut request = job("1", &["echo canary; canary; export X=canary; exit 1"]);
        request["commands"][0]["alias"] = "a canary".into();
        request["env_vars"] = json!([{ "name": "PASSWORD", "value": encoded }]);
        request["files"] = json!([{ "path": "a-file", "content": encoded, "mode": "0600" }]);
        request["ssh_public_keys"] = json!([base64(b"ssh-ed25519 AAAA canary")]);
        request["callbacks"] = json!({
            "finished": server.url("/finished?token=canary"),
            "teardown_finished": "http://user:canary@127.0.0.1:1/canary",
            "token": CANARY,
        });
        request["logger"] = json!({ "method": "pull", "url": "https://canary/", "token": CANARY });
        agent.run_to_end(&request);
        assert_eq!(server.next().header("authorization"), Some("Bearer canary"));
        request["job_id"] = "2".into();
        request["env_vars"] = json!([{ "name": "A canary", "value": "canary!" }]);
        request["files"] = json!([{ "path": "f", "content": "canary!", "mode": "canary" }]);
        request["executor"] = CANARY.into();
        request["callbacks"]["finished"] = "canary://canary".into();
        request["callbacks"]["teardown_finished"] = "http://canary.invalid/canary".into();
        request["callbacks"]["token"] = "canary\n".into();
        agent.run_to_end(&request);

        for body in [
            r#"{"job_id": {"canary": 1}}"#,
            r#"{"job_id": "3", "env_vars": "canary"}"#,
            r#"{"job_id": "3", "callbacks": {"token": ["canary"]}}"#,
            r#"{"job_id": "3", "logger": {"method": "canary"}}"#,
            r#"{"canary"#,
            "canary",
        ] {
            agent.post("/jobs", body.as_bytes()).of_status(422);
            agent.post("/stop?token=canary", body.as_bytes()).of_status(200);
        }
        let foreign = token("HS256", &secret, &json!({ "sub": "canary" }));
        for wrong in ["canary", &format!("Bearer {foreign}"), "Bearer canary.canary.canary"] {
            agent.request("GET", "/status", &[("Authorization", wrong)], b"").of_status(401);
        }
        let wrong = [("Authorization", good_authorization()), ("X-Secret", CANARY)];
        agent.request("GET", "/status?token=canary", &wrong, b"").of_status(200);
        agent.request("GET", "/is_alive?canary", &[], b"").of_status(200);
        agent.get("/agent_logs").of_status(200);
        agent.signal(Signal::SIGTERM);
        agent.wait_for_own_log("ended");

        let file = fs::read_to_string(world.home().with_file_name("agent_log")).unwrap();
        let errors = fs::read_to_string(&errors).unwrap();
        assert!(file.contains(" DEBUG ") && file.contains("gave up the callback"), "{file}");
        let good = good_authorization().trim_start_matches("Bearer ");
        let encoded = encoded.trim_end_matches('=');
        for (place, text) in [("output", &agent.own_log()), ("file", &file), ("errors", &errors)] {
            for hidden in [CANARY, encoded, SECRET, good, foreign.as_str()] {
                let found = text.lines().find(|line| line.contains(hidden));
                assert_eq!(found, None, "{hidden} at level {level} in the {place}");
            }
        }
    }
}
