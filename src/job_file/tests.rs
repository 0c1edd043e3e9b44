use super::*;

const YAML: &str = "\
job_id: '1'
env_vars:
  - name: A
    value: MQ==
  - name: A
    value: Mg==
    valeu: x
file:
  - path: a
    content: ''
    mode: '644'
comands: []
entirely_else: 1
commands:
  - directive: 'true'
";

#[test]
fn merge_keys_are_honoured() {
    let text = "\
job_id: '1'
x-base: &base {directive: make, alias: Base}
x-other: &other {alias: Other, directive: other}
commands:
  - <<: *base
  - <<: *base
    directive: make test
  - <<: [*other, *base]
  - directive: '<<'
";
    let file = tempfile::NamedTempFile::new().unwrap();
    let read_text = |text: &str| {
        std::fs::write(file.path(), text).unwrap();
        read(&Source::File(file.path().to_owned()), UnknownFields::Refused)
    };
    let job = read_text(text).unwrap().job;
    let commands: Vec<_> = job
        .commands
        .iter()
        .map(|command| (command.directive.as_str(), command.alias.as_deref()))
        .collect();
    let base = Some("Base");
    assert_eq!(
        commands,
        [("make", base), ("make test", base), ("other", Some("Other")), ("<<", None)]
    );
    for bad in ["commands:\n  - <<: 3\n", "commands:\n  - <<: [a]\n    directive: b\n"] {
        let error = read_text(bad).unwrap_err().to_string();
        assert!(error.contains("`<<`") && error.contains("line 2"), "{error}");
    }
}

const JSON: &str = r#"{
  "job_id": "1",
  "commands": [
    {"directive": "true"},
    {"directive": "true",
     "alais": "x"}
  ]
}"#;

fn read_str(text: &str) -> Result<JobFile, JobFileError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    read(&Source::File(file.path().to_owned()), UnknownFields::Warned).map_err(
        |error| match error {
            JobFileError::Invalid { what } => {
                JobFileError::Invalid { what: what.iter().map(|line| after_name(line)).collect() }
            }
            other => other,
        },
    )
}

fn after_name(line: &str) -> String {
    line.split_once(':').unwrap().1.to_owned()
}

fn warnings(text: &str) -> Vec<String> {
    read_str(text).unwrap().warnings.iter().map(|warning| after_name(warning)).collect()
}

#[test]
fn warnings_name_the_line_and_the_nearest_field() {
    assert_eq!(
        warnings(YAML),
        [
            "7: unknown field `env_vars[1].valeu`; did you mean `value`?",
            "12: unknown field `comands`; did you mean `commands`?",
            "13: unknown field `entirely_else`",
            "3: variable `A` is set again further down; the last one wins",
        ]
    );
    assert_eq!(warnings(JSON), ["6: unknown field `commands[1].alais`; did you mean `alias`?"]);
}

#[test]
fn unknown_fields_are_refused_except_extensions() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), JSON).unwrap();
    let error = read(&Source::File(file.path().to_owned()), UnknownFields::Refused).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains(":6: unknown field `commands[1].alais`; did you mean `alias`?"),
        "{error}"
    );
    assert!(error.contains("--lenient"), "{error}");
    let with_extension = JSON.replace("alais", "x-mine");
    std::fs::write(file.path(), with_extension).unwrap();
    read(&Source::File(file.path().to_owned()), UnknownFields::Refused).unwrap();
}

#[test]
fn an_unknown_merged_field_is_reported_at_its_own_line() {
    let text = "job_id: '1'\nx-base: &base\n  # directve: no\n  directve: make\ncommands:\n  - alias: a\n  - <<: *base\n    directive: b\n";
    assert_eq!(
        warnings(text.replace("alias: a", "directive: a").as_str()),
        ["4: unknown field `commands[1].directve`; did you mean `directive`?"]
    );
}

#[test]
fn missing_fields_are_reported_with_all_other_problems_and_their_lines() {
    let text = "commands:\n  - alias: a\n  - directive: b\nenv_vars:\n  - name: A\n  - name: B\n    value: '!'\n";
    let error = read_str(text).unwrap_err().to_string();
    let lines: Vec<&str> = error.lines().collect();
    assert_eq!(lines.len(), 4, "{error}");
    assert!(lines[0].starts_with(" job_id: the job has no id"), "{error}");
    assert!(lines[1].starts_with("2: commands[0]: the command has no `directive`"), "{error}");
    assert!(lines[2].starts_with("5: env_vars[0]: `value` is missing"), "{error}");
    assert!(lines[3].starts_with("7: env_vars[1].value"), "{error}");
}

#[test]
fn a_job_without_a_command_is_refused() {
    let error = read_str("job_id: '1'\ncommands: []\n").unwrap_err().to_string();
    assert!(error.contains("has no command"), "{error}");
}

#[test]
fn problems_name_their_line_even_below_an_alternative_name() {
    let error = read_str(&YAML.replace("'644'", "rw")).unwrap_err().to_string();
    assert!(error.starts_with("11: files[0].mode: bad file permission 'rw'"), "{error}");
}

#[test]
fn wrong_types_name_path_line_and_column() {
    let yaml = read_str("job_id: '1'\nenv_vars:\n  - name: [x]\n").unwrap_err().to_string();
    assert!(yaml.contains("env_vars") && yaml.contains("line 3 column"), "{yaml}");
    let json = read_str("{\"job_id\": \"1\",\n \"commands\": [{\"directive\": 7}]}").unwrap_err();
    let json = json.to_string();
    assert!(
        json.contains("commands[0].directive: invalid type: integer, expected a string"),
        "{json}"
    );
    assert!(json.contains("line 2 column"), "{json}");
}

#[test]
fn broken_syntax_names_its_line() {
    for text in ["job_id: [1,\n", "a: b: c\n", "{\"job_id\": \"1\",\n,}", "\tjob_id: 1\n"] {
        let error = read_str(text).unwrap_err().to_string();
        assert!(error.contains("line "), "{text:?}: {error}");
    }
}

#[test]
fn json_escapes_are_decoded_as_json() {
    let job =
        read_str(r#"{"job_id":"\ud83d\ude00","commands":[{"directive":"a\/b"}]}"#).unwrap().job;
    assert_eq!((job.id.as_str(), job.commands[0].directive.as_str()), ("😀", "a/b"));
}

#[test]
fn alias_bombs_and_deep_nesting_are_refused() {
    let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
    for i in 1..12 {
        let previous = format!("*a{}", i - 1);
        let all = vec![previous; 10].join(",");
        bomb.extend([&format!("a{i}: &a{i} [{all}]"), "\n"]);
    }
    bomb.push_str("commands: *a11\n");
    assert!(matches!(read_str(&bomb), Err(JobFileError::Syntax { .. })));
    assert!(read_str(&format!("job_id: {}1{}", "[".repeat(10_000), "]".repeat(10_000))).is_err());
    assert!(read_str(&format!("{}1{}", "[".repeat(10_000), "]".repeat(10_000))).is_err());
    assert!(read_str(&format!("job_id: {}", "[".repeat(200_000))).is_err());
}

#[test]
fn a_job_without_id_is_refused() {
    for text in ["job_id: ''\n", "job_id:\n", "commands: []\n", "{}"] {
        assert!(read_str(text).unwrap_err().to_string().contains("no id"), "{text}");
    }
    assert!(matches!(read_str(" \n"), Err(JobFileError::Empty { .. })));
}
