//! Job files that can't be run: the agent says why, exits with code 2, and executes nothing.

use std::fs::File;
use std::process::{Command, Output, Stdio};

use test_support::{World, base64, feed, wait_for_end};

/// A canary: no message may contain the value of a variable or the content of a file.
const SECRET: &str = "hunter2";

/// The end of every job here: a command that proves that the job ran.
pub(super) const MARK: &str = "commands: [{directive: touch ~/executed}]\n";

/// Runs the agent with these arguments in the directory beside HOME.
pub(super) fn agent(world: &World, arguments: &[&str]) -> Output {
    let mut command = world.agent();
    command.current_dir(world.home().join(".."));
    wait_for_end(spawn(command.args(arguments)))
}

pub(super) fn spawn(command: &mut Command) -> std::process::Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Asserts that the agent refused the job and did nothing. Returns the message.
pub(super) fn refusal(world: &World, output: &Output) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert_eq!(output.stdout, b"", "{stderr}");
    assert!(stderr.starts_with("error: "), "{stderr}");
    assert!(!stderr.contains(SECRET), "a secret is shown: {stderr}");
    assert_eq!(names_in(&world.home()), [""; 0], "something ran: {stderr}");
    assert!(!world.state().exists(), "a state directory was created: {stderr}");
    stderr
}

pub(super) fn names_in(directory: &std::path::Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name();
    entries.map(|entry| name(entry).to_string_lossy().into_owned()).collect()
}

/// Asserts that each job is refused with a message that contains all of these parts.
fn all_refused(jobs: &[(&str, &str, &[&str])]) {
    for (case, job, expected) in jobs {
        let world = World::new();
        world.file("job.yaml", job);
        let stderr = refusal(&world, &agent(&world, &["run", "job.yaml"]));
        for part in *expected {
            assert!(stderr.contains(part), "{case}: no {part:?} in {stderr}");
        }
    }
}

#[test]
fn files_that_cannot_be_read() {
    let too_large = |world: &World| {
        let sparse = File::create(world.file("job.yaml", "")).unwrap();
        sparse.set_len(32 * 1024 * 1024 + 1).unwrap();
    };
    let world = World::new();
    too_large(&world);
    world.file("binary", b"job_id: x\n\xff\xfe\x00");
    for (path, expected) in [
        ("nowhere.yaml", "nowhere.yaml: can't be read: No such file"),
        ("home", "home: is a directory"),
        ("home/", "home/: is a directory"),
        ("binary/x", "binary/x: can't be read: Not a directory"),
        // Reading its first byte fails even for root, because that address is not mapped.
        ("/proc/self/mem", "/proc/self/mem: can't be read: "),
        ("binary", "binary: is not text: byte 10 is not UTF-8"),
        ("job.yaml", "job.yaml: is larger than 32 MiB"),
        ("/dev/zero", "/dev/zero: is larger than 32 MiB"),
        ("/dev/null", "/dev/null: is empty"),
    ] {
        let stderr = refusal(&world, &agent(&world, &["run", path]));
        assert!(stderr.contains(expected), "{path}: {stderr}");
    }
}

#[test]
fn a_job_file_of_the_maximum_size_runs_and_a_larger_one_does_not() {
    let world = World::new();
    let mut job = format!("job_id: x\n{MARK}#");
    job.extend(std::iter::repeat_n('x', 32 * 1024 * 1024 - job.len()));
    world.file("job.yaml", &job);
    job.push('x');
    world.file("larger.yaml", &job);
    refusal(&world, &agent(&world, &["run", "larger.yaml"]));
    let output = agent(&world, &["run", "job.yaml"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn broken_syntax_is_shown_with_line_and_column() {
    all_refused(&[
        ("an open list", "job_id: x\nfiles: [\n", &["job.yaml: ", "line 3 column 1"]),
        ("a tab", "job_id: x\ncommands:\n\t- directive: touch ~/executed\n", &["line 3 column 1"]),
        (
            "a colon in a value",
            "job_id: x\ncommands: [{directive: touch ~/executed}]\njob_name: a: b\n",
            &["line 3 column"],
        ),
        (
            "a key beside a list",
            "job_id: x\ncommands:\n- directive: touch ~/executed\nname: x\n- directive: y\n",
            &["line 5 column 1"],
        ),
        ("an unknown anchor", "job_id: x\ncommands: *hunter\n", &["line 2 column 11"]),
        (
            "JSON without its end",
            "{\"job_id\": \"x\",\n \"commands\": [{\"directive\": \"touch ~/executed\"}",
            &["line 2 column"],
        ),
        (
            "more than JSON",
            "{\"job_id\": \"x\",\n \"commands\": [{\"directive\": \"touch ~/executed\"}]}\n}",
            &["line 3 column 1"],
        ),
        (
            "two documents",
            "job_id: x\ncommands: [{directive: touch ~/executed}]\n---\njob_id: y\n",
            &["more than one document"],
        ),
    ]);
}

#[test]
fn wrong_types_are_shown_with_path_line_and_column() {
    all_refused(&[
        (
            "a list of strings",
            "job_id: x\ncommands:\n  - touch ~/executed\n",
            &["commands[0]: ", "line 3 column 5"],
        ),
        (
            "a list for a string",
            "job_id: x\ncommands:\n  - directive: [touch ~/executed]\n",
            &["commands[0].directive: ", "line 3 column 16"],
        ),
        (
            "a number for a list",
            "job_id: x\nepilogue_on_pass_commands: 1\n",
            &["epilogue_on_pass_commands: ", "line 2 column 28"],
        ),
        (
            "variables as a map",
            "job_id: x\nenv_vars:\n  A: hunter2\ncommands: [{directive: touch ~/executed}]\n",
            &["env_vars: ", "line 3 column 3"],
        ),
        (
            "a number in JSON",
            "{\"job_id\": \"x\",\n \"commands\": [{\"directive\": 7}]}",
            &["commands[0].directive: ", "line 2 column"],
        ),
        (
            "a part of the request that shell jobs don't use",
            "job_id: x\nlogger: {max_size_in_bytes: -1}\n",
            &["logger.max_size_in_bytes: ", "line 2 column"],
        ),
        (
            "the same field twice in a command",
            "job_id: x\ncommands:\n- directive: touch ~/executed\n  directive: touch ~/executed\n",
            &["commands[0]: ", "`directive`", "line 3 column"],
        ),
        (
            "the same field twice",
            "job_id: x\njob_id: y\ncommands: [{directive: touch ~/executed}]\n",
            &["duplicate field `job_id`"],
        ),
        (
            "a field and its alias",
            "job_id: x\nid: y\ncommands: [{directive: touch ~/executed}]\n",
            &["duplicate field `job_id`"],
        ),
        ("no map at all", "- job_id: x\n", &["job.yaml: ", "sequence"]),
    ]);
}

/// Messages may quote the job file, but never the value of a variable.
#[test]
fn values_of_variables_are_never_shown() {
    all_refused(&[
        (
            "a value that is no base64",
            "job_id: x\nenv_vars:\n- name: TOKEN\n  value: hunter2!\n",
            &["job.yaml:4: env_vars[0].value: the value of `TOKEN` is not base64"],
        ),
        (
            "a variable in one string",
            "job_id: x\nenv_vars:\n- TOKEN=hunter2\n",
            &["env_vars[0]: ", "line 3 column 3"],
        ),
        (
            "variables in one string",
            "job_id: x\nenv_vars: TOKEN=hunter2\n",
            &["env_vars: ", "line 2 column 11"],
        ),
        (
            "a file in one string",
            "job_id: x\nfiles:\n- hunter2\n",
            &["files[0]: ", "line 3 column 3"],
        ),
        (
            "a content that is no base64",
            "job_id: x\nfiles:\n- path: a\n  content: hunter2!\n  mode: '0600'\n",
            &["job.yaml:4: files[0].content: the content of `a` is not base64"],
        ),
    ]);
}
#[test]
fn values_that_are_numbers_in_json_are_not_shown_either() {
    let world = World::new();
    let job = "{\"job_id\": \"x\", \"env_vars\": [{\"name\": \"PIN\", \"value\": 271828182845}]}";
    world.file("job.yaml", job);
    let stderr = refusal(&world, &agent(&world, &["run", "job.yaml"]));
    assert!(stderr.contains("env_vars[0].value: "), "{stderr}");
    assert!(!stderr.contains("271828182845"), "{stderr}");
}

#[test]
fn alias_bombs_are_refused() {
    let list = |i| vec![format!("*a{i}"); 10].join(", ");
    let line = |i| format!("a{}: &a{} [{}]", i + 1, i + 1, list(i));
    let lines: Vec<_> = (0..11).map(line).collect();
    let aliases = format!("job_id: x\na0: &a0 [x]\n{}\n{MARK}files: *a11\n", lines.join("\n"));
    let deep = format!("job_id: {}x{}\n", "[".repeat(5000), "]".repeat(5000));
    let deep_json = format!("{{\"job_id\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    all_refused(&[
        ("aliases of aliases", &aliases, &["files[0]: ", "line 12 column 6"]),
        ("an alias of itself", "job_id: &a [*a]\n", &["line 1 column"]),
        ("deep YAML", &deep, &["job.yaml: "]),
        ("deep JSON", &deep_json, &["job.yaml: "]),
    ]);
}

/// The file is small, but its strings would not fit into memory if each alias were a copy.
#[test]
fn an_alias_bomb_of_long_strings_is_refused_before_memory_is_full() {
    let world = World::new();
    let long = "y".repeat(500_000);
    let commands = "- directive: *long\n".repeat(20_000);
    let job = format!("job_id: x\njob_name: &long {long}\ncommands:\n{commands}");
    let path = world.file("job.yaml", job);
    let agent = world.agent();
    let mut limited = Command::new("bash");
    limited.arg("-c").arg("ulimit -v 1000000; exec \"$0\" run \"$1\"");
    limited.arg(agent.get_program()).arg(path).env_clear().stdin(Stdio::null());
    limited.envs(agent.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let stderr = refusal(&world, &wait_for_end(spawn(&mut limited)));
    assert!(stderr.contains("job.yaml: "), "{stderr}");
}

/// Deep nesting must not keep the agent busy: `agent` has a time limit.
#[test]
fn deep_nesting_is_refused_quickly() {
    let job = format!("job_id: {}", "[".repeat(200_000));
    all_refused(&[("200 KB of brackets", &job, &["job.yaml: "])]);
}

#[test]
fn jobs_without_id_or_anything() {
    let no_id: &[&str] = &["job_id: the job has no id: `job_id` must be"];
    all_refused(&[
        ("no id", MARK, no_id),
        ("an empty one", &format!("job_id: ''\n{MARK}"), no_id),
        ("null", &format!("job_id:\n{MARK}"), no_id),
        ("the alias, empty", &format!("id: ''\n{MARK}"), no_id),
        ("JSON", "{}", no_id),
        ("comments", "# nothing yet\n", no_id),
        ("nothing", "", &["job.yaml: is empty; a job needs at least a `job_id`"]),
        ("white space", " \n\n", &["job.yaml: is empty"]),
    ]);
}

#[test]
fn unknown_or_incomplete_executors() {
    all_refused(&[
        (
            "an unknown one",
            &format!("job_id: x\nexecutor: vm\n{MARK}"),
            &["job.yaml:2: executor: unknown executor `vm`", "shell", "dockercompose"],
        ),
        (
            "another case",
            &format!("job_id: x\n\nexecutor: Shell\n{MARK}"),
            &["job.yaml:3: executor: unknown executor `Shell`"],
        ),
        (
            "no containers",
            &format!("job_id: x\nexecutor: dockercompose\n{MARK}"),
            &["compose.containers: a job for `dockercompose` needs at least one container"],
        ),
        (
            "containers that can't be",
            &format!(
                "job_id: x\nexecutor: dockercompose\ncompose:\n  containers:\n  - {{name: main, \
                 image: a}}\n  - name: a b\n    image: ''\n    command: \"'\"\n  - {{name: main, \
                 image: a}}\n  image_pull_credentials:\n  - env_vars: []\n{MARK}"
            ),
            &[
                "job.yaml:6: compose.containers[1].name: invalid container name `a b`",
                "job.yaml:7: compose.containers[1].image: an image is needed",
                "job.yaml:8: compose.containers[1].command: has a quote that is not closed",
                "job.yaml:9: compose.containers[2].name: `main` is the name of another container",
            ],
        ),
    ]);
}

#[test]
fn names_values_and_modes_that_are_invalid() {
    for name in [
        "A=1; touch ~/executed; B",
        "A B",
        "1A",
        "A-B",
        "Ä",
        "$(touch ~/executed)",
        "A\\ntouch ~/executed",
        "",
    ] {
        let job =
            format!("job_id: x\nenv_vars:\n- value: aHVudGVyMg==\n  name: \"{name}\"\n{MARK}");
        // The text after a `=` may be a value in the wrong place, and must not be shown.
        let shown = name.split_once('=').map_or(name.to_owned(), |(name, _)| format!("{name}=…"));
        let expected = format!("job.yaml:4: env_vars[0].name: invalid variable name `{shown}`");
        all_refused(&[(name, &job, &[&expected])]);
    }
    for value in ["!", "a", "MQ=", "M===Q", "MTIz-_"] {
        let job = format!("job_id: x\nenv_vars:\n- name: A\n  value: '{value}'\n{MARK}");
        let valid = value == "MQ=";
        if !valid {
            let expected = "job.yaml:4: env_vars[0].value: the value of `A` is not base64";
            all_refused(&[(value, &job, &[expected])]);
        }
    }
    for mode in ["rw", "0888", "u+x", "+644", "-1", "0o644", "77777", " 644", ""] {
        let job = format!("job_id: x\nfiles:\n- path: a\n  content: ''\n  mode: '{mode}'\n{MARK}");
        let expected = format!("job.yaml:5: files[0].mode: bad file permission '{mode}' for a");
        all_refused(&[(mode, &job, &[&expected])]);
    }
    let nul = base64(b"hun\0ter2");
    all_refused(&[
        (
            "a NUL in a value",
            &format!("job_id: x\nenv_vars: [{{name: A, value: {nul}}}]\n{MARK}"),
            &["job.yaml:2: env_vars[0].value: the value of `A` contains a NUL byte"],
        ),
        (
            "a file without path",
            &format!("job_id: x\nfiles: [{{content: '', mode: '644'}}]\n{MARK}"),
            &["job.yaml:2: files[0].path: "],
        ),
    ]);
}

#[test]
fn all_problems_are_named_at_once() {
    let world = World::new();
    let job = format!(
        "job_id: x\nexecutor: vm\nenv_vars:\n- name: 1\n  value: '!'\nfiles:\n- path: a\n  mode: x\n{MARK}"
    );
    world.file("job.yaml", job);
    let stderr = refusal(&world, &agent(&world, &["run", "job.yaml"]));
    let places: Vec<_> = stderr.lines().map(|line| line.split(": ").nth(1).unwrap()).collect();
    let lines = ["job.yaml:2", "job.yaml:4", "job.yaml:5", "job.yaml:7", "job.yaml:8"];
    assert_eq!(places, lines, "{stderr}");
}

#[test]
fn standard_input_is_called_dash() {
    let run = |job: &str| {
        let world = World::new();
        let mut command = world.agent();
        let mut child = spawn(command.args(["run", "-"]).stdin(Stdio::piped()));
        feed(&mut child, job.as_bytes());
        (wait_for_end(child), world)
    };
    let (output, world) = run(&format!("job_id: x\n{MARK}"));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(names_in(&world.home()), ["executed"]);

    let (output, world) = run(&format!("job_id: x\nexecutor: vm\n{MARK}"));
    let stderr = refusal(&world, &output);
    assert!(stderr.contains("standard input:2: executor: "), "{stderr}");
    let (output, world) = run("");
    let stderr = refusal(&world, &output);
    assert!(stderr.contains("standard input: is empty"), "{stderr}");
}
