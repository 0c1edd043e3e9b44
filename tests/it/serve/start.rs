//! The error messages of an `agent serve` that can't start.

use std::ffi::OsStr;
use std::fs;
use std::process::Stdio;

use test_support::serve::{ServeAgent, command};
use test_support::{RUN_UNTIL_GO, RUNNING, World, base64, job, wait_for_end};

/// Returns the exit code of an agent that does not start, whose message must contain `value` and `why`.
fn refusal(world: &World, flag: &str, value: impl AsRef<OsStr>, why: &str) -> Option<i32> {
    let mut agent = command(world);
    let agent = agent.arg(flag).arg(&value).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = wait_for_end(agent.spawn().unwrap());
    let words = String::from_utf8(output.stderr).unwrap();
    let value = value.as_ref().to_str().unwrap();
    assert!(words.starts_with("error: ") && !words.contains("panicked"), "{words}");
    assert!(words.contains(value) && words.contains(why), "{value}, {why}: {words}");
    output.status.code()
}

#[test]
fn an_agent_that_cannot_listen_says_why() {
    for (host, why) in
        [("no-such-host.invalid", "lookup"), ("192.0.2.1", "assign"), ("not a host", "lookup")]
    {
        assert_eq!(refusal(&World::new(), "--host", host, why), Some(1), "{host}");
    }
}

#[test]
fn a_second_agent_on_the_same_port_fails_and_does_not_disturb_the_first() {
    let world = World::new();
    let agent = ServeAgent::start(&world);
    let mut request = job("1", &[RUN_UNTIL_GO, "echo next"]);
    request["ssh_public_keys"] = serde_json::json!([base64(b"ssh-ed25519 AAAA of-the-job")]);
    agent.post_job(&request).of_status(200);
    agent.wait_for_log("1", RUNNING);
    let access = [".ssh/authorized_keys", ".bash_profile", "../ssh_jump_point"]
        .map(|name| world.home().join(name));
    let before = access.each_ref().map(|path| fs::read(path).unwrap());
    let port = agent.address().port().to_string();
    assert_eq!(refusal(&world, "--port", port, "in use"), Some(1));
    assert!(access.map(|path| fs::read(path).unwrap()) == before, "SSH access has changed");
    fs::write(world.home().join("go"), "").unwrap();
    let finished = agent.finish("1");
    assert_eq!((finished.result(), finished.output().as_str()), ("passed", "running\nnext\n"));
}

#[test]
fn an_agent_without_a_usable_state_directory_says_why() {
    let world = World::new();
    let file = world.file("file", "");
    for path in [file.clone(), file.join("state"), "/proc/state".into()] {
        assert_eq!(refusal(&world, "--state-dir", path, "the state directory"), Some(2));
    }
}
