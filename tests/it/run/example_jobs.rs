//! The jobs in `config/jobs`: each runs anywhere, ends as it says, and leaves nothing behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use test_support::{Finished, World, processes_with, wait_for_end};

/// Files that bash itself creates in a home directory.
const BASHS_OWN: [&str; 1] = [".bash_history"];

fn examples() -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/jobs");
    let entries = fs::read_dir(directory).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// Returns the examples for a shell. Those for containers need images, and have tests of their own.
fn examples_without_containers() -> impl Iterator<Item = PathBuf> {
    let in_containers =
        |path: &PathBuf| fs::read_to_string(path).unwrap().contains("\nexecutor: dockercompose\n");
    examples().into_iter().filter(move |path| !in_containers(path))
}

/// Returns the result in the first line of an example: `passed`, `failed` or `stopped`.
fn expected_result(job: &str) -> Option<&str> {
    job.lines().next()?.strip_prefix("# Expected result: ")
}

fn run(world: &World, path: &Path, scratch: &Path) -> Finished {
    let mut command = world.agent();
    command.env("TMPDIR", scratch).args(["run", "--output", "json"]);
    command.arg(path).stdout(Stdio::piped()).stderr(Stdio::piped());
    Finished::of(&wait_for_end(command.spawn().unwrap()))
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| !BASHS_OWN.contains(&name.as_str())).collect()
}

#[test]
fn every_example_ends_as_it_says_and_leaves_nothing() {
    for path in examples_without_containers() {
        let shown = path.display();
        let job = fs::read_to_string(&path).unwrap();
        let expected = expected_result(&job);
        let code = match expected {
            Some("passed") => 0,
            Some("failed") => 1,
            Some("stopped") => 130,
            _ => panic!("{shown} does not begin with `# Expected result: passed` or the like"),
        };
        let world = World::new();
        let scratch = world.home().with_file_name("scratch");
        fs::create_dir(&scratch).unwrap();
        let finished = run(&world, &path, &scratch);
        assert_eq!(Some(finished.result()), expected, "{shown}: {:#?}", finished.steps());
        assert_eq!(finished.exit_code, Some(code), "{shown}");
        assert_eq!(finished.stderr, "", "{shown}");
        for directory in [world.home(), world.state(), scratch] {
            assert_eq!(names_in(&directory), [""; 0], "{shown}");
        }
        let marker = format!("HOME={}", world.home().display());
        assert_eq!(processes_with(&marker), [""; 0], "{shown}");
    }
}

/// The commands that an example describes as skipped would print this.
#[test]
fn no_example_runs_commands_that_it_describes_as_skipped() {
    for path in examples_without_containers() {
        let world = World::new();
        let printed = run(&world, &path, &world.home()).output();
        for unwanted in ["does not run", "Nor does this"] {
            assert!(!printed.contains(unwanted), "{}: {printed}", path.display());
        }
    }
}

#[test]
fn every_example_names_its_own_command_line() {
    for path in examples() {
        let job = fs::read_to_string(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        let command = format!("agent run config/jobs/{name}");
        assert!(job.contains(&command), "{name} does not say `{command}`");
    }
}
