//! Settings that look right to the operator: passwords in proxy URLs, and files with a byte order mark.

use test_support::World;
use test_support::serve::{self, ServeAgent};
use test_support::start::{TOKEN, command, refusal, run};

/// The byte order mark that many editors put before a text.
const MARK: &str = "\u{feff}";

/// Without escaping, such a character ends the login, and the rest would be taken for host or path.
#[test]
fn an_unescaped_character_in_a_proxys_password_is_refused_with_its_escape() {
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
fn a_byte_order_mark_before_a_configuration_is_ignored() {
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
        let [printed, warnings] =
            [output.stdout, output.stderr].map(|it| String::from_utf8(it).unwrap());
        assert_eq!(output.status.code(), Some(0), "{text:?}: {warnings}");
        assert!(printed.contains("name: \"agent-of-a-test\" #"), "{text:?}: {printed}");
        assert_eq!(warnings, "", "{text:?}");
    }
}

#[test]
fn a_file_with_only_a_byte_order_mark_is_empty() {
    let world = World::new();
    let file = world.file("config.yaml", MARK);
    let agent = ServeAgent::start_with(&world, |command| {
        command.arg("--config-file").arg(file);
    });
    assert_eq!(agent.get("/status").status, 200);
}

#[test]
fn errors_after_a_byte_order_mark_are_named_with_their_line() {
    let world = World::new();
    let file = world.file("config.yaml", format!("{MARK}max-body-sice: 3000\n"));
    let message = serve::refusal(&world, |command| {
        command.arg("--config-file").arg(file);
    });
    for part in ["`max-body-sice`", "`max-body-size`", "line 1"] {
        assert!(message.contains(part), "{part}: {message}");
    }
}
