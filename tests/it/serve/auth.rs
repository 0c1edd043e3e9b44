//! The tokens that the API of `agent serve` accepts.

use std::process::Stdio;

use serde_json::{Value, json};

use test_support::serve::{
    SECRET, ServeAgent, command, good_authorization, token, token_with_header,
};
use test_support::{World, job, wait_for_end};

/// Returns a time relative to now, in seconds since the epoch.
fn from_now(seconds: i64) -> i64 {
    i64::try_from(actors::log::event::unix_time()).unwrap() + seconds
}

fn good_token() -> String {
    token("HS256", SECRET, &json!({}))
}

/// Returns the status of the response, and the reason of a refusal.
fn ask(agent: &ServeAgent, authorization: &str) -> (u16, Option<String>) {
    let answer = agent.request("GET", "/status", &[("Authorization", authorization)], b"");
    let why = (answer.status == 401).then(|| match answer.json() {
        Value::String(why) => why,
        other => panic!("not a JSON string: {other}"),
    });
    (answer.status, why)
}

fn assert_refused(agent: &ServeAgent, authorization: &str) -> String {
    let (status, why) = ask(agent, authorization);
    assert_eq!(status, 401, "{authorization}");
    let why = why.unwrap();
    assert!(!why.is_empty(), "{authorization}");
    why
}

#[test]
fn only_is_alive_works_without_a_token() {
    let world = World::new();
    let agent = ServeAgent::start(&world);
    let requests = [
        ("GET", "/status"),
        ("GET", "/status/"),
        ("POST", "/jobs"),
        ("GET", "/jobs/1/log"),
        ("POST", "/stop"),
        ("POST", "/jobs/terminate"),
        ("GET", "/agent_logs"),
        ("GET", "/nothing-here"),
        ("PUT", "/jobs"),
        ("GET", "/is_alive/../status"),
        ("GET", "/is_alive/x"),
        ("GET", "//is_alive"),
    ];
    for (method, path) in requests {
        let body = job("1", &["touch ~/ran"]).to_string();
        let answer = agent.request(method, path, &[], body.as_bytes());
        assert_eq!(answer.status, 401, "{method} {path}");
        assert!(answer.json().is_string(), "{method} {path}: {}", answer.text());
    }
    assert_eq!(agent.get("/status").json()["state"], "waiting-for-job");
    assert!(!world.home().join("ran").exists());
}

#[test]
fn every_hmac_algorithm_is_accepted() {
    let agent = ServeAgent::start(&World::new());
    for algorithm in ["HS256", "HS384", "HS512"] {
        let authorization = format!("Bearer {}", token(algorithm, SECRET, &json!({})));
        assert_eq!(ask(&agent, &authorization), (200, None), "{algorithm}");
    }
}

#[test]
fn only_time_claims_are_checked() {
    let agent = ServeAgent::start(&World::new());
    let good = [
        json!({}),
        json!({ "aud": "somebody else", "iss": "unknown", "sub": "nobody", "jti": "1" }),
        json!({ "aud": ["a", "b"], "more": { "deep": [1, null] } }),
        json!({ "exp": from_now(60) }),
        json!({ "nbf": from_now(-60), "iat": from_now(-60) }),
        json!({ "exp": from_now(60), "nbf": from_now(0) }),
    ];
    for payload in good {
        let authorization = format!("Bearer {}", token("HS256", SECRET, &payload));
        assert_eq!(ask(&agent, &authorization), (200, None), "{payload}");
    }
    let bad = [
        // Clocks may differ slightly.
        json!({ "exp": from_now(-10) }),
        json!({ "exp": from_now(-1_000_000) }),
        json!({ "exp": 0 }),
        json!({ "nbf": from_now(30) }),
        json!({ "nbf": from_now(1_000_000), "exp": from_now(2_000_000) }),
        json!({ "nbf": from_now(-100), "exp": from_now(-50) }),
    ];
    for payload in bad {
        let authorization = format!("Bearer {}", token("HS256", SECRET, &payload));
        let why = assert_refused(&agent, &authorization);
        assert!(!why.contains("signature is invalid"), "{payload}: {why}");
    }
}

#[test]
fn a_wrong_signature_is_named_in_the_refusal() {
    let agent = ServeAgent::start(&World::new());
    let good = good_token();
    let (signed, signature) = good.rsplit_once('.').unwrap();
    let other = if signature.starts_with('A') { "B" } else { "A" };
    let (header, _) = signed.split_once('.').unwrap();
    let expiring = token("HS256", SECRET, &json!({ "exp": from_now(60) }));
    let expiring: Vec<_> = expiring.split('.').collect();
    let mut wrong = vec![
        format!("{signed}.{other}{}", &signature[1..]),
        format!("{signed}.{}", &signature[..signature.len() - 3]),
        format!("{signed}."),
        format!("{header}.{}.{signature}", expiring[1]),
    ];
    for algorithm in ["HS256", "HS384", "HS512"] {
        wrong.push(token(algorithm, "another secret", &json!({})));
        wrong.push(token(algorithm, &format!("{SECRET} "), &json!({})));
    }
    // Signed with one algorithm, but naming another in the header.
    let longer = token("HS512", SECRET, &json!({}));
    wrong.push(format!("{signed}.{}", longer.rsplit_once('.').unwrap().1));
    for token in wrong {
        let why = assert_refused(&agent, &format!("Bearer {token}"));
        assert!(why.contains("signature is invalid"), "{token}: {why}");
    }
}

#[test]
fn other_algorithms_are_refused() {
    let agent = ServeAgent::start(&World::new());
    let algorithms =
        ["none", "None", "NONE", "nOnE", "", "RS256", "ES256", "PS256", "EdDSA", "HS1", "hs256"];
    for algorithm in algorithms {
        let token = token(algorithm, SECRET, &json!({}));
        assert_refused(&agent, &format!("Bearer {token}"));
        let (signed, _) = token.rsplit_once('.').unwrap();
        assert_refused(&agent, &format!("Bearer {signed}."));
        assert_refused(&agent, &format!("Bearer {signed}"));
    }
    for header in [json!({}), json!({ "alg": null }), json!({ "alg": 256 }), json!([]), json!("")] {
        let token = token_with_header(&header, SECRET, &json!({}));
        assert_refused(&agent, &format!("Bearer {token}"));
    }
}

#[test]
fn other_header_fields_of_a_token_are_ignored() {
    let agent = ServeAgent::start(&World::new());
    let headers =
        [json!({ "alg": "HS256" }), json!({ "typ": "other", "alg": "HS256", "kid": "1", "x": [] })];
    for header in headers {
        let token = token_with_header(&header, SECRET, &json!({}));
        assert_eq!(ask(&agent, &format!("Bearer {token}")), (200, None), "{header}");
    }
}

#[test]
fn anything_but_a_bearer_token_is_refused() {
    let agent = ServeAgent::start(&World::new());
    let good = good_token();
    let (signed, _) = good.rsplit_once('.').unwrap();
    let refused = [
        String::new(),
        "Bearer".into(),
        "Bearer ".into(),
        "Bearer x".into(),
        "Bearer ..".into(),
        "Bearer a.b.c".into(),
        "Bearer e30.e30.".into(),
        format!("Bearer {signed}"),
        format!("Bearer {good}.{good}"),
        format!("Bearer {good} {good}"),
        format!("Bearer{good}"),
        format!("Token {good}"),
        format!("Basic {good}"),
        good.clone(),
        SECRET.into(),
        format!("Bearer {SECRET}"),
        format!("Bearer {}", "a".repeat(8000)),
    ];
    for authorization in refused {
        let why = assert_refused(&agent, &authorization);
        assert!(!why.contains(SECRET) && !why.contains(&good), "{why}");
    }
}

#[test]
fn no_secret_is_in_the_agents_own_log() {
    let agent = ServeAgent::start_with(&World::new(), |command| {
        command.env("SEMAPHORE_AGENT_LOG_LEVEL", "trace");
    });
    let foreign = token("HS256", "another secret", &json!({ "who": "me" }));
    assert_refused(&agent, &format!("Bearer {foreign}"));
    let mut request = job("1", &["echo $PASSWORD"]);
    request["env_vars"] = json!([{ "name": "PASSWORD", "value": "aHVudGVyMg==" }]);
    request["callbacks"] = json!({ "token": "token-of-the-callbacks" });
    agent.run_to_end(&request);
    let own_log = agent.get("/agent_logs").text();
    for secret in [SECRET, good_authorization(), &good_token(), &foreign] {
        assert!(!own_log.contains(secret), "{secret}: {own_log}");
    }
    for secret in ["hunter2", "aHVudGVyMg", "token-of-the-callbacks"] {
        assert!(!own_log.contains(secret), "{secret}: {own_log}");
    }
}

#[test]
fn an_agent_without_a_secret_does_not_start() {
    let world = World::new();
    let empty = world.file("empty", "");
    let lines = world.file("lines", "\n\n");
    let empty = [
        vec![],
        vec!["--auth-token-secret".as_ref(), "".as_ref()],
        vec!["--auth-token-secret-file".as_ref(), empty.as_os_str()],
        vec!["--auth-token-secret-file".as_ref(), lines.as_os_str()],
        vec!["--auth-token-secret-file".as_ref(), "/does/not/exist".as_ref()],
    ];
    for (variable, arguments) in
        [None, Some("")].iter().flat_map(|v| empty.iter().map(move |a| (v, a)))
    {
        let mut agent = command(&world);
        agent.env_remove("SEMAPHORE_AGENT_AUTH_TOKEN_SECRET").args(arguments);
        if let Some(secret) = variable {
            agent.env("SEMAPHORE_AGENT_AUTH_TOKEN_SECRET", secret);
        }
        let child = agent.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let output = wait_for_end(child);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert!(message.contains("secret"), "{arguments:?}: {message}");
    }
}
