//! The operator's pre-job hook.

use std::fs;
use std::path::Path;

use serde_json::json;

use test_support::serve::ServeAgent;
use test_support::{Finished, World, job};

const TITLE: &str = "Running the pre-job hook configured in the agent";

/// Runs a job with a variable, two commands and an epilogue on an agent with this hook.
fn run_with(world: &World, hook: &Path) -> Finished {
    let agent = ServeAgent::start_with(world, |command| {
        command.arg("--pre-job-hook-path").arg(hook);
    });
    let mut request = job("1", &["echo \"$HOOK $- $PWD\"", "echo second"]);
    request["env_vars"] = json!([{ "name": "JOBS", "value": "b3du" }]);
    request["epilogue_always_commands"] = json!([{ "directive": "echo epilogue" }]);
    agent.run_to_end(&request)
}

/// Returns output and exit code of the hook, and the titles of all steps.
fn hook_of(finished: &Finished) -> (String, i32, Vec<String>) {
    let steps = finished.steps();
    let (_, output, exit_code) = steps.iter().find(|(title, ..)| title == TITLE).unwrap().clone();
    (output, exit_code, steps.into_iter().map(|(title, ..)| title).collect())
}

#[test]
fn a_hook_runs_in_the_jobs_shell_before_its_commands() {
    let world = World::new();
    let script = "echo \"sees $JOBS\"; HOOK=mine; set -f; mkdir -p ~/sub; cd ~/sub; true\n";
    let hook = world.file("it's a hook.sh", script);
    let finished = run_with(&world, &hook);
    assert_eq!(finished.result(), "passed");
    let (output, exit_code, titles) = hook_of(&finished);
    assert!(output.starts_with("Running: source '") && output.ends_with("sees own\n"), "{output}");
    assert_eq!((exit_code, titles[1].as_str(), titles[2].as_str()), (0, "Injecting Files", TITLE));
    let (printed, _) = &finished.commands()[1];
    let words: Vec<_> = printed.split_whitespace().collect();
    assert!(words[0] == "mine" && words[1].contains('f'), "{printed}");
    assert_eq!(Path::new(words[2]), world.home().join("sub"));
}

#[test]
fn a_hook_that_fails_fails_the_job() {
    for (script, code) in [("echo why; return 3\n", 3), ("echo why; exit 3\n", 1)] {
        let world = World::new();
        let finished = run_with(&world, &world.file("hook", script));
        assert_eq!(finished.result(), "failed", "{script}");
        let (output, exit_code, titles) = hook_of(&finished);
        assert!(output.contains("\nwhy\n"), "{script}: {output}");
        assert_eq!(exit_code, code, "{script}");
        assert!(!titles.iter().any(|title| title == "echo second"), "{titles:?}");
        assert!(titles.iter().any(|title| title == "echo epilogue"), "{titles:?}");
    }
}

#[test]
fn a_missing_hook_fails_the_job() {
    let world = World::new();
    let missing = world.home().join("missing");
    let directory = world.home().join("directory");
    fs::create_dir(&directory).unwrap();
    for (hook, why) in [(missing, "No such file"), (directory, "is a directory")] {
        let finished = run_with(&world, &hook);
        assert_eq!(finished.result(), "failed");
        let (output, exit_code, _) = hook_of(&finished);
        assert!(output.contains(hook.to_str().unwrap()) && output.contains(why), "{output}");
        assert_ne!(exit_code, 0);
    }
}

#[test]
fn a_relative_hook_path_starts_in_the_agents_working_directory() {
    let world = World::new();
    let working = world.home().with_file_name("working");
    fs::create_dir(&working).unwrap();
    fs::write(working.join("hook.sh"), "HOOK=mine\n").unwrap();
    let finished = run_with(&world, Path::new("hook.sh"));
    assert_eq!((finished.result(), hook_of(&finished).1), ("passed", 0));
}
