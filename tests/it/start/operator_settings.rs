//! Settings that look right to who wrote them: logins of proxies, and files from editors that mark them.

use test_support::World;
use test_support::serve::{self, ServeAgent};
use test_support::start::{TOKEN, command, refusal, run};

/// What many editors put before a text.
const MARK: &str = "\u{feff}";

/// What is behind such a character would be taken for a path, and what is before it for the host.
#[test]
fn a_raw_character_in_a_proxys_password_is_refused_with_how_to_write_it() {
    let world = World::new();
    for (variable, proxy, written) in [
        ("HTTPS_PROXY", "http://me:canary#1@proxy.example:3128", "%23"),
        ("HTTPS_PROXY", "http://me:canary/1@proxy.example:3128", "%2F"),
        ("HTTPS_PROXY", "http://me:canary?1@proxy.example:3128", "%3F"),
        ("https_proxy", "me:canary#1@proxy.example", "%23"),
        ("HTTPS_PROXY", "http://me:80/canary@proxy.example/", "%2F"),
    ] {
        let mut agent = command(&world);
        agent.args(["--endpoint", "127.0.0.1:1"]).env("SEMAPHORE_AGENT_TOKEN", TOKEN);
        let message = refusal(agent.env(variable, proxy));
        assert!(message.contains("HTTPS_PROXY"), "{proxy}: {message}");
        assert!(message.to_uppercase().contains(written), "{proxy}: {message}");
    }
}

#[test]
fn a_byte_order_mark_before_a_configuration_changes_nothing() {
    let world = World::new();
    for text in [
        format!("{MARK}endpoint: hub.example.com\ntoken: {TOKEN}\nname: agent-of-a-test\n"),
        format!("{MARK}name: agent-of-a-test\nendpoint: hub.example.com\ntoken: {TOKEN}\n"),
        format!(
            "{MARK}# A comment.\nname: agent-of-a-test\nendpoint: hub.example.com\ntoken: {TOKEN}\n"
        ),
        format!(
            "{MARK}{{\"name\": \"agent-of-a-test\", \"endpoint\": \"hub\", \"token\": \"{TOKEN}\"}}"
        ),
        format!("{MARK}---\nname: agent-of-a-test\nendpoint: hub.example.com\ntoken: {TOKEN}\n"),
    ] {
        let file = world.file("config.yaml", &text);
        let mut agent = command(&world);
        let output = run(agent.arg("--config-file").arg(file).arg("--print-config"));
        let [printed, told] =
            [output.stdout, output.stderr].map(|it| String::from_utf8(it).unwrap());
        assert_eq!(output.status.code(), Some(0), "{text:?}: {told}");
        assert!(printed.contains("name: \"agent-of-a-test\" #"), "{text:?}: {printed}");
        assert_eq!(told, "", "{text:?}");
    }
}

#[test]
fn a_file_of_nothing_but_a_byte_order_mark_sets_nothing() {
    let world = World::new();
    let file = world.file("config.yaml", MARK);
    let agent = ServeAgent::start_with(&world, |command| {
        command.arg("--config-file").arg(file);
    });
    assert_eq!(agent.get("/status").status, 200);
}

#[test]
fn what_is_wrong_behind_a_byte_order_mark_is_named_with_its_line() {
    let world = World::new();
    let file = world.file("config.yaml", format!("{MARK}max-body-sice: 3000\n"));
    let message = serve::refusal(&world, |command| {
        command.arg("--config-file").arg(file);
    });
    for part in ["`max-body-sice`", "`max-body-size`", "line 1"] {
        assert!(message.contains(part), "{part}: {message}");
    }
}
