//! Aliases of configuration options, and names that no control plane accepts.

use std::process::Command;

use test_support::World;
use test_support::start::{TOKEN, command, run};

fn printed(command: &mut Command) -> (Option<i32>, String) {
    let output = run(command.arg("--print-config"));
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

#[test]
fn config_is_an_alias_of_config_file() {
    let world = World::new();
    let text = format!("endpoint: hub.example.com\ntoken: {TOKEN}\n");
    let file = world.file("config.yaml", text);
    let (code, output) = printed(command(&world).arg("--config").arg(&file));
    assert_eq!(code, Some(0), "{output}");
    assert!(output.contains("endpoint: \"hub.example.com\""), "{output}");
    assert!(output.contains(&format!("config-file: {file:?} # flag\n")), "{output}");
}

#[test]
fn a_name_that_every_control_plane_refuses_is_refused_at_the_start() {
    let world = World::new();
    let agent = || {
        let mut agent = command(&world);
        agent.args(["--endpoint", "hub"]).env("SEMAPHORE_AGENT_TOKEN", TOKEN);
        agent
    };
    for name in ["build.example.com", "with spaces", "umlaut-ü-in-it"] {
        let (_, output) = printed(agent().args(["--name", name]));
        let warning =
            output.lines().find(|line| !line.starts_with("name: ") && line.contains(name));
        assert!(warning.is_some(), "{name}");
    }
    for name in ["build_example/com+1-a", "https://example.com/?a.b"] {
        let (code, output) = printed(agent().args(["--name", name]));
        assert_eq!(code, Some(0), "{output}");
        assert!(!output.contains("warning"), "{output}");
    }
}
