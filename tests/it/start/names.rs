//! Other words for the configuration, and names that no control plane takes.

use std::process::Command;

use test_support::World;
use test_support::start::{TOKEN, command, run};

fn printed(command: &mut Command) -> (Option<i32>, String) {
    let output = run(command.arg("--print-config"));
    let told = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(told).unwrap())
}

#[test]
fn config_is_another_word_for_config_file() {
    let world = World::new();
    let text = format!("endpoint: hub.example.com\ntoken: {TOKEN}\n");
    let file = world.file("config.yaml", text);
    let (code, told) = printed(command(&world).arg("--config").arg(&file));
    assert_eq!(code, Some(0), "{told}");
    assert!(told.contains("endpoint: \"hub.example.com\""), "{told}");
    assert!(told.contains(&format!("config-file: {file:?} # flag\n")), "{told}");
}

#[test]
fn a_name_that_every_control_plane_refuses_is_told_at_the_start() {
    let world = World::new();
    let agent = || {
        let mut agent = command(&world);
        agent.args(["--endpoint", "hub"]).env("SEMAPHORE_AGENT_TOKEN", TOKEN);
        agent
    };
    for name in ["build.example.com", "with spaces", "umlaut-ü-in-it"] {
        let (_, told) = printed(agent().args(["--name", name]));
        let told = told.lines().find(|line| !line.starts_with("name: ") && line.contains(name));
        assert!(told.is_some(), "{name}");
    }
    for name in ["build_example/com+1-a", "https://example.com/?a.b"] {
        let (code, told) = printed(agent().args(["--name", name]));
        assert_eq!(code, Some(0), "{told}");
        assert!(!told.contains("warning"), "{told}");
    }
}
