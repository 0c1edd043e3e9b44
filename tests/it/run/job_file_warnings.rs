//! What is only a warning in a job file.

use test_support::World;

use super::bad_input::{MARK, agent, names_in};

/// Asserts that each job passes after exactly these warnings.
fn all_warned(jobs: &[(&str, &str, &[&str])]) {
    for (case, job, expected) in jobs {
        let world = World::new();
        world.file("job.yaml", job);
        let output = agent(&world, &["run", "--lenient", "job.yaml"]);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{case}: {stderr}");
        let lines: Vec<_> = stderr.lines().collect();
        let expected: Vec<_> =
            expected.iter().map(|line| format!("warning: job.yaml:{line}")).collect();
        assert_eq!(lines, expected, "{case}");
        assert_eq!(names_in(&world.home()), ["executed"], "{case}");
        assert_eq!(names_in(&world.state()), [""; 0], "{case}");
    }
}

#[test]
fn unknown_fields_are_only_a_warning_in_lenient_mode() {
    all_warned(&[
        (
            "misspelt",
            &format!("job_id: x\nexecuter: shell\nenv_var: []\n{MARK}"),
            &[
                "2: unknown field `executer`; did you mean `executor`?",
                "3: unknown field `env_var`; did you mean `env_vars`?",
            ],
        ),
        (
            "like nothing known",
            &format!("job_id: x\nzzzzzzzzzz: {{a: 1}}\n{MARK}"),
            &["2: unknown field `zzzzzzzzzz`"],
        ),
        (
            "deep inside",
            "job_id: x\ncommands:\n- directive: touch ~/executed\n  allias: x\n",
            &["4: unknown field `commands[0].allias`; did you mean `alias`?"],
        ),
        (
            "JSON",
            "{\"job_id\": \"x\",\n \"jobname\": \"y\",\n \"commands\": [{\"directive\": \"touch ~/executed\"}]}",
            &["2: unknown field `jobname`; did you mean `job_name`?"],
        ),
        (
            "with control characters",
            &format!("job_id: x\n\"zzz\\e[31m\\nzzz\": 1\n{MARK}"),
            &["2: unknown field `zzz\\u{1b}[31m\\nzzz`"],
        ),
    ]);
}

/// Fields that are known elsewhere must not be suggested.
#[test]
fn a_suggested_field_is_valid_in_the_same_place() {
    all_warned(&[
        (
            "a job has commands",
            &format!("job_id: x\ncommandz: []\n{MARK}"),
            &["2: unknown field `commandz`; did you mean `commands`?"],
        ),
        (
            "not a command",
            &format!("job_id: x\ncommand: []\n{MARK}"),
            &["2: unknown field `command`; did you mean `commands`?"],
        ),
        (
            "a variable has a name, a job does not",
            &format!("job_id: x\nenv_vars:\n- nam: A\n  name: A\n  value: MQ==\n{MARK}"),
            &["3: unknown field `env_vars[0].nam`; did you mean `name`?"],
        ),
    ]);
}

#[test]
fn variables_that_are_set_again_are_only_a_warning() {
    let job = "\
job_id: x
env_vars:
- {name: TOKEN, value: aHVudGVyMg==}
- {name: B, value: MQ==}
- {name: TOKEN, value: bGFzdA==}
commands:
- directive: test $TOKEN = last && touch ~/executed
";
    let expected = "3: variable `TOKEN` is set again further down; the last one wins";
    all_warned(&[("twice", job, &[expected])]);
}

/// Control planes merge several lists, whose files may repeat many entries.
#[test]
fn many_warnings_are_cheap() {
    let mut job = format!("job_id: x\n{MARK}env_vars:\n");
    for _ in 0..5000 {
        job.push_str("- {name: A, value: MQ==}\n");
    }
    let world = World::new();
    world.file("job.yaml", job);
    // `agent` has a time limit, which a quadratic algorithm would exceed.
    let output = agent(&world, &["run", "job.yaml"]);
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_byte_order_mark_is_accepted() {
    for job in [
        format!("\u{feff}job_id: x\n{MARK}"),
        format!(
            "\u{feff}{}",
            "{\"job_id\": \"x\", \"commands\": [{\"directive\": \"touch ~/executed\"}]}"
        ),
    ] {
        all_warned(&[("a mark", &job, &[])]);
    }
}
