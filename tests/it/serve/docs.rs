//! The documentation of `agent serve` matches its behaviour.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use actors::request::known_fields;
use clap::CommandFactory as _;
use nix::sys::signal::Signal;
use semaphore_agent::api::ROUTES;
use semaphore_agent::commands::cli::Cli;
use serde_json::{Value, json};

use test_support::http::Answer;
use test_support::serve::{SECRET, ServeAgent, good_authorization, token};
use test_support::{RUN_FOR_EVER, World, config_keys, free_port, job, wait_for_end};

/// Documented responses that these tests do not provoke: a broken or slow body, a body that is incomplete
/// when the agent ends, and bugs. Other tests cover them.
const NOT_PROVOKED: [u16; 4] = [400, 408, 500, 503];

fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(project(path)).unwrap()
}

/// The content of `docs/openapi.yaml`.
struct Document(Value);

impl Document {
    fn read() -> Self {
        Self(serde_yaml::from_str(&read("docs/openapi.yaml")).unwrap())
    }

    /// Follows the reference of a part, if it has one.
    fn resolve<'a>(&'a self, part: &'a Value) -> &'a Value {
        let Some(reference) = part["$ref"].as_str() else { return part };
        let found = self.0.pointer(reference.trim_start_matches('#'));
        found.unwrap_or_else(|| panic!("nothing is at {reference}"))
    }

    fn operations(&self) -> BTreeSet<(String, String)> {
        let paths = self.0["paths"].as_object().unwrap();
        let operations = paths.iter().flat_map(|(path, item)| {
            let methods = item.as_object().unwrap().keys();
            methods.map(|method| (method.clone(), path.clone()))
        });
        operations.collect()
    }

    fn statuses(&self, method: &str, path: &str) -> BTreeSet<u16> {
        let responses = self.0["paths"][path][method]["responses"].as_object().unwrap();
        responses.keys().map(|status| status.parse().unwrap()).collect()
    }

    /// Asserts that the response is as documented: its status, its type, and its body if there are examples.
    fn assert_describes(&self, method: &str, path: &str, answer: &Answer) {
        let what = format!("{method} {path}: {} {:?}", answer.status, answer.text());
        let responses = &self.0["paths"][path][method]["responses"];
        let response = &responses[answer.status.to_string()];
        assert!(!response.is_null(), "{what}: the status is not documented");
        let content = self.resolve(response)["content"].as_object().unwrap();
        let kind = answer.header("content-type").unwrap();
        let kind = kind.split(';').next().unwrap();
        let content = content.get(kind).unwrap_or_else(|| panic!("{what}: not as {kind}"));
        let body = if kind == "text/plain" { answer.text().into() } else { answer.json() };
        if let Some(examples) = content["examples"].as_object() {
            let found = examples.values().any(|example| example["value"] == body);
            assert!(found, "{what}: not among {examples:?}");
        } else {
            let schema = self.resolve(&content["schema"]);
            let required = schema["required"].as_array().into_iter().flatten();
            let missing: Vec<_> =
                required.filter(|name| body.get(name.as_str().unwrap()).is_none()).collect();
            assert!(missing.is_empty(), "{what}: without {missing:?}");
        }
    }

    /// Returns the names of an object's fields, including those from referenced schemas.
    fn fields(&self, pointer: &str) -> BTreeSet<String> {
        let schema = self.resolve(self.0.pointer(pointer).unwrap());
        let schema = schema.get("items").map_or(schema, |items| self.resolve(items));
        schema["properties"].as_object().unwrap().keys().cloned().collect()
    }
}

#[test]
fn every_route_is_documented_and_nothing_else() {
    let routes = ROUTES.map(|(method, path)| (method.to_owned(), path.to_owned()));
    assert_eq!(Document::read().operations(), BTreeSet::from(routes));
}

#[test]
fn every_response_is_as_documented() {
    let document = Document::read();
    let world = World::new();
    let own_log = world.home().with_file_name("agent_log");
    let agent = ServeAgent::start_with(&world, |command| {
        command.args(["--max-body-size", "1000"]);
    });
    let mut provoked = BTreeSet::new();
    let mut see = |method: &'static str, path: &'static str, status: u16, answer: &Answer| {
        assert_eq!(answer.status, status, "{method} {path}: {:?}", answer.text());
        document.assert_describes(method, path, answer);
        provoked.insert((method, path, status));
    };
    let log = "/jobs/{id}/log";
    see("get", "/status", 200, &agent.get("/status"));
    see("get", log, 404, &agent.get("/jobs/1/log"));
    see("post", "/jobs", 200, &agent.post_job(&job("1", &[RUN_FOR_EVER])));
    see("post", "/jobs", 200, &agent.post_job(&job("1", &[RUN_FOR_EVER])));
    see("post", "/jobs", 422, &agent.post_job(&job("2", &["true"])));
    see("post", "/jobs", 422, &agent.post("/jobs", b"{}"));
    let mut pushed = job("2", &["true"]);
    pushed["logger"] = json!({ "method": "push" });
    see("post", "/jobs", 422, &agent.post_job(&pushed));
    see("get", log, 200, &agent.get("/jobs/1/log"));
    see("get", log, 403, &agent.get("/jobs/2/log"));
    see("get", "/agent_logs", 200, &agent.get("/agent_logs"));
    fs::remove_file(own_log).unwrap();
    see("get", "/agent_logs", 404, &agent.get("/agent_logs"));
    for path in ["/jobs", "/stop", "/jobs/terminate"] {
        see("post", path, 413, &agent.post(path, &[b' '; 1001]));
    }
    for (method, path) in ROUTES {
        let plain = path.replace("{id}", "1");
        let other = if method == "get" { "DELETE" } else { "GET" };
        let good = ("Authorization", good_authorization());
        see(method, path, 405, &agent.request(other, &plain, &[good], b""));
        let method_name = method.to_uppercase();
        if path == "/is_alive" {
            see(method, path, 200, &agent.request(&method_name, &plain, &[], b""));
            continue;
        }
        see(method, path, 401, &agent.request(&method_name, &plain, &[], b""));
        for (algorithm, secret, claims) in [
            ("HS256", "another", json!({})),
            ("HS256", SECRET, json!({ "exp": 1 })),
            ("HS256", SECRET, json!({ "nbf": 9_999_999_999_u64 })),
            ("none", SECRET, json!({})),
        ] {
            let bad = format!("Bearer {}", token(algorithm, secret, &claims));
            let bad = [("Authorization", bad.as_str())];
            see(method, path, 401, &agent.request(&method_name, &plain, &bad, b""));
        }
    }
    agent.signal(Signal::SIGTERM);
    agent.wait_for_log("1", "job_finished");
    see("post", "/jobs", 503, &agent.post_job(&job("2", &["true"])));
    for path in ["/stop", "/jobs/terminate"] {
        see("post", path, 200, &agent.post(path, b""));
    }
    for (method, path) in ROUTES {
        for status in document.statuses(method, path) {
            let known =
                NOT_PROVOKED.contains(&status) || provoked.contains(&(method, path, status));
            assert!(known, "{method} {path} never responded with {status}");
        }
    }
}

#[test]
fn every_field_of_a_job_is_documented_and_nothing_else() {
    let document = Document::read();
    // Only job files have these fields; the last two are for agents that push their logs.
    let elsewhere = ["id", "file", "epilogue_commands", "url", "token"];
    let job = "/components/schemas/Job";
    let compose = format!("{job}/properties/compose");
    for (part, pointer) in [
        (None, job.to_owned()),
        (Some("compose"), compose.clone()),
        (Some("containers"), format!("{compose}/properties/containers")),
        (Some("image_pull_credentials"), format!("{compose}/properties/image_pull_credentials")),
        (Some("host_setup_commands"), format!("{compose}/properties/host_setup_commands")),
        (Some("commands"), format!("{job}/properties/commands")),
        (Some("env_vars"), format!("{job}/properties/env_vars")),
        (Some("files"), format!("{job}/properties/files")),
        (Some("callbacks"), format!("{job}/properties/callbacks")),
        (Some("logger"), format!("{job}/properties/logger")),
    ] {
        let elsewhere = if part == Some("callbacks") { &[][..] } else { &elsewhere };
        let known = known_fields(part).iter().filter(|field| !elsewhere.contains(*field));
        let known: BTreeSet<_> = known.map(|field| (*field).to_owned()).collect();
        assert_eq!(document.fields(&pointer), known, "{part:?}");
    }
}

#[test]
fn the_example_configuration_has_every_option_with_its_default() {
    let example = read("config/serve.example.yaml");
    let cli = Cli::command();
    let serve = cli.find_subcommand("serve").unwrap();
    let options = serve.get_arguments().filter_map(|option| Some((option.get_long()?, option)));
    let options: Vec<_> =
        options.filter(|(name, _)| !["config-file", "print-config"].contains(name)).collect();
    let names: BTreeSet<_> = options.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(config_keys(&example), names);

    let set: serde_json::Map<String, Value> = serde_yaml::from_str(&example).unwrap();
    for (name, option) in options {
        let help = option.get_help().unwrap().to_string();
        let default = help.split_once("[default: ").map(|(_, rest)| rest.trim_end_matches(']'));
        let default = default.map(|default| default.trim_matches('`'));
        match (default, set.get(name)) {
            (Some(default), Some(Value::String(value))) => assert_eq!(value, default, "{name}"),
            (Some(default), Some(value)) => assert_eq!(value.to_string(), default, "{name}"),
            // A default path that depends on the machine is only described in a comment.
            (Some(default), None) => assert!(default.contains(' '), "{name} is {default}"),
            (None, Some(value)) => {
                let is_example = name == "auth-token-secret-file" || *value == json!([]);
                assert!(is_example, "{name} has no default, but is set to {value}");
            }
            (None, None) => {}
        }
    }

    let world = World::new();
    let secret = world.file("secret", SECRET);
    let usable = example.replace("/etc/semaphore-agent/secret", secret.to_str().unwrap());
    let file = world.file("config.yaml", usable);
    let agent = ServeAgent::start_with(&world, |command| {
        command.env_remove("SEMAPHORE_AGENT_AUTH_TOKEN_SECRET").arg("--config-file").arg(file);
    });
    assert_eq!(agent.run_to_end(&job("1", &["echo hi"])).output(), "hi\n");
}

#[test]
#[cfg_attr(not(has_curl), ignore = "needs curl and perl")]
fn the_commands_in_the_readme_work() {
    let readme = read("README.md");
    let block = readme.split_once("```sh\n# try it\n").unwrap().1.split_once("```").unwrap().0;
    let port = free_port();
    let block = block.replace(":8000", &format!(":{port}"));
    let world = World::new();
    let agent = test_support::agent_program().parent().unwrap();
    let path = format!("{}:{}", agent.display(), std::env::var("PATH").unwrap());
    let beside = |name| world.home().with_file_name(name);
    let mut bash = Command::new("bash");
    bash.args(["-euc", &block]).current_dir(world.home()).env_clear();
    bash.env("PATH", path).env("HOME", world.home()).env("SEMAPHORE_AGENT_PORT", port.to_string());
    bash.env("SEMAPHORE_AGENT_LOG_FILE_PATH", beside("agent_log"));
    bash.env("SEMAPHORE_AGENT_SSH_JUMP_POINT_PATH", beside("ssh_jump_point"));
    bash.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = wait_for_end(bash.spawn().unwrap());
    let printed = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{printed}\n{errors}");
    for expected in [
        "yes",
        r#""state":"waiting-for-job""#,
        r#"{"message":"ok"}"#,
        r#""output":"hello\n""#,
        r#""result":"passed""#,
        "job torn down job=1",
    ] {
        assert!(printed.contains(expected), "{expected} is missing: {printed}\n{errors}");
    }
    let log = fs::read_to_string(world.home().join("serve.log")).unwrap();
    assert!(log.lines().last().is_some_and(|line| line.contains("ended")), "{log}");
}
