//! Jobs in containers: their log, their shell, their environment.

use actors::log::event::LogEvent;
use serde_json::{Value, json};

use test_support::docker::{container, job, job_in, leftovers_of, variables};
use test_support::{Finished, World, base64};

/// Runs a job, and asserts that nothing of it is left on the engine.
fn run(job: &Value) -> Finished {
    let finished = World::new().run(&job.to_string());
    assert_eq!(leftovers_of(job), [""; 0]);
    finished
}

/// Runs commands with `bash` of a test image. Returns output and exit code of each.
fn run_in(image: &str, commands: &[&str]) -> Vec<(String, i32)> {
    let finished = run(&job(image, commands));
    assert_eq!(finished.stderr, "");
    finished.commands()
}

fn ok(output: &str) -> (String, i32) {
    (output.into(), 0)
}

/// Summarises a log; consecutive outputs are joined.
fn shown(events: &[LogEvent]) -> Vec<String> {
    let mut shown: Vec<String> = Vec::new();
    let mut was_output = false;
    for event in events {
        let is_output = matches!(event, LogEvent::CmdOutput { .. });
        match event {
            LogEvent::JobStarted { .. } => shown.push("job started".into()),
            LogEvent::CmdStarted { directive, .. } => shown.push(format!("started {directive}")),
            LogEvent::CmdOutput { output, .. } if was_output => {
                shown.last_mut().unwrap().push_str(output);
            }
            LogEvent::CmdOutput { output, .. } => shown.push(output.clone()),
            LogEvent::CmdFinished { directive, exit_code, .. } => {
                shown.push(format!("finished {directive} {exit_code}"));
            }
            LogEvent::JobFinished { result, .. } => shown.push(format!("job finished {result}")),
        }
        was_output = is_output;
    }
    shown
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn the_log_of_a_job_with_a_side_container_is_that_of_the_protocol() {
    let mut job = job_in(
        json!([container("main", "bash"), container("web", "service")]),
        &["echo hi", "wget -q -O - http://web:8080/"],
    );
    job["env_vars"] = variables(&[("B", b"two"), ("A", b"one")]);
    job["files"] = json!([{ "path": "f.txt", "content": base64(b"text"), "mode": "0640" }]);
    job["commands"][1]["alias"] = "Fetch".into();
    job["epilogue_always_commands"] = json!([{ "directive": "echo always" }]);
    job["epilogue_on_pass_commands"] = json!([{ "directive": "echo $SEMAPHORE_JOB_RESULT" }]);
    job["epilogue_on_fail_commands"] = json!([{ "directive": "echo never" }]);
    let finished = run(&job);
    let mut shown = shown(&finished.events);
    // The order may vary, because images are inspected concurrently.
    let mut pulled: Vec<_> = shown[2].lines().collect();
    pulled.sort_unstable();
    shown[2] = pulled.join("\n");
    assert_eq!(
        shown,
        [
            "job started",
            "started Pulling docker images...",
            "agent-test/bash: already present\nagent-test/service: already present",
            "finished Pulling docker images... 0",
            "started Starting the docker image...",
            "Starting a new bash session.\n",
            "finished Starting the docker image... 0",
            "started Exporting environment variables",
            "Exporting A\nExporting B\n",
            "finished Exporting environment variables 0",
            "started Injecting Files",
            "Injecting f.txt with file mode 0640\n",
            "finished Injecting Files 0",
            "started echo hi",
            "hi\n",
            "finished echo hi 0",
            "started Fetch",
            "Running: wget -q -O - http://web:8080/\nservice\n",
            "finished Fetch 0",
            "started Exporting environment variables",
            "Exporting SEMAPHORE_JOB_RESULT\n",
            "finished Exporting environment variables 0",
            "started echo always",
            "always\n",
            "finished echo always 0",
            "started echo $SEMAPHORE_JOB_RESULT",
            "passed\n",
            "finished echo $SEMAPHORE_JOB_RESULT 0",
            "job finished passed",
        ]
    );
    assert_eq!(finished.exit_code, Some(0));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn values_of_variables_arrive_byte_for_byte() {
    let all: Vec<u8> = (1..=255).collect();
    let long = vec![b'x'; 90_000];
    let values: [(&str, &[u8]); 7] = [
        ("BYTES", &all),
        ("EMPTY", b""),
        ("LONG", &long),
        ("NEWLINES", b"\n a\n\nb\r\n"),
        ("QUOTES", b"'\"`'\\' $HOME $(id) \\n !! %s"),
        ("TWICE", b"last"),
        ("UTF8", "Grüße 🦀".as_bytes()),
    ];
    let print = values.map(|(name, _)| format!("printf %s \"${name}\" | xxd -p | tr -d '\\n'"));
    let print: Vec<_> = print.iter().map(String::as_str).collect();
    let mut job = job("bash", &print);
    job["env_vars"] = variables(&values);
    let twice = json!({ "name": "TWICE", "value": base64(b"first") });
    job["env_vars"].as_array_mut().unwrap().insert(0, twice);
    let finished = run(&job);
    let expected = values.map(|(_, value)| {
        let digits = value.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        (digits, 0)
    });
    assert!(finished.commands() == expected, "{finished:#?}");
    let exported = &finished.steps()[2];
    let names = values.map(|(name, _)| format!("Exporting {name}\n")).concat();
    assert_eq!((exported.1.as_str(), exported.2), (names.as_str(), 0));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn all_commands_run_in_one_shell_session_on_a_terminal() {
    let steps = run_in(
        "bash",
        &[
            "pwd; test -t 0 && test -t 1 && test -t 2 && stty size",
            "x=1; f() { echo from f; }; cd /tmp; shopt -s extglob; alias hi='echo aliased'",
            "echo $x; f; pwd; shopt -q extglob && echo extglob; hi",
            "case $- in *i*) echo interactive;; esac; shopt -q login_shell || echo no login",
            "set -o pipefail; trap 'echo trapped' USR1",
            "shopt -qo pipefail && echo pipefail; kill -USR1 $$",
            "sleep 1000 &",
            "jobs -r",
            "! false | false; echo $?",
            "(exit 7) || echo was $?; (exit 0)",
            "echo $?",
        ],
    );
    assert_eq!(steps[0], ok("/root\n24 80\n"));
    assert_eq!(steps[2], ok("1\nfrom f\n/tmp\nextglob\naliased\n"));
    assert_eq!(steps[3], ok("interactive\nno login\n"));
    assert_eq!(steps[5], ok("pipefail\ntrapped\n"));
    assert!(steps[7].0.contains("Running") && steps[7].0.contains("sleep 1000"), "{steps:?}");
    assert_eq!(steps[8..], [ok("0\n"), ok("was 7\n"), ok("0\n")]);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn the_exit_code_of_a_command_is_visible_to_the_next() {
    let mut job = job("bash", &["(exit 7)", "echo not reached"]);
    // The export of the result comes between the two commands.
    job["epilogue_always_commands"] =
        json!([{ "directive": "echo $?; (exit 3)" }, { "directive": "echo not reached" }]);
    job["epilogue_on_fail_commands"] = json!([{ "directive": "echo $? $SEMAPHORE_JOB_RESULT" }]);
    job["epilogue_on_pass_commands"] = json!([{ "directive": "echo not reached" }]);
    let finished = run(&job);
    let expected = [(String::new(), 7), ("0\n".into(), 3), ok("3 failed\n")];
    assert_eq!(finished.commands(), expected);
    assert_eq!((finished.result(), finished.exit_code), ("failed", Some(1)));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn images_determine_user_directory_and_path() {
    let who = "id -un; pwd; echo $HOME; echo $PATH";
    let path = "/opt/tools/bin:/usr/local/bin:/usr/bin:/bin\n";
    let root = format!("root\n/root\n/root\n{path}");
    assert_eq!(run_in("bash", &[who]), [ok(&root)]);
    let dev = format!("dev\n/home/dev\n/home/dev\n{path}");
    assert_eq!(run_in("bash:dev", &[who]), [ok(&dev)]);
    let entrypoint = [ok(&root), ok("yes\n")];
    assert_eq!(run_in("bash:entrypoint", &[who, "echo $ENTRYPOINT_RAN"]), entrypoint);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_jobs_settings_override_those_of_the_main_image() {
    let mut job =
        job("bash:entrypoint", &["id -un; pwd", "echo $0; echo \"$ENTRYPOINT_RAN,$A,$B\""]);
    let main = &mut job["compose"]["containers"][0];
    main["user"] = "dev".into();
    main["entrypoint"] = "env 'A=a b'".into();
    main["command"] = "is ignored".into();
    main["env_vars"] = variables(&[("B", b"it's $x\n\"b\"")]);
    let finished = run(&job);
    assert_eq!(finished.commands(), [ok("dev\n/home/dev\n"), ok("bash\n,a b,it's $x\n\"b\"\n")]);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn the_agents_input_is_never_echoed_whatever_the_terminal_modes() {
    let steps = run_in(
        "bash",
        &[
            "stty echo",
            "echo one",
            "stty sane; stty echo echoctl",
            "echo two; sleep 0",
            "case $(stty -a) in *\" echo \"*) echo is on;; esac",
        ],
    );
    assert_eq!(steps, [ok(""), ok("one\n"), ok(""), ok("two\n"), ok("is on\n")]);
    let long = format!("# {}\necho three", "long ".repeat(5000));
    assert_eq!(
        run_in("bash", &["stty echo", &long, "echo four"])[1..],
        [ok("three\n"), ok("four\n")]
    );
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn tracing_shows_only_the_jobs_own_commands() {
    let steps = run_in(
        "bash",
        &[
            "set -x",
            "echo hi",
            "echo $?; false || true",
            "set +x",
            "echo quiet",
            "set -v",
            "echo one\necho two",
            "set +v",
            "echo quiet",
        ],
    );
    let expected = [
        ok(""),
        ok("++ echo hi\nhi\n"),
        ok("++ echo 0\n0\n++ false\n++ true\n"),
        ok("++ set +x\n"),
        ok("quiet\n"),
        ok(""),
        ok("echo one\none\necho two\ntwo\n"),
        ok("set +v\n"),
        ok("quiet\n"),
    ];
    assert_eq!(steps, expected);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn long_commands_and_strange_bytes_arrive_unchanged() {
    let long =
        format!("x='{}'; echo ${{#x}} $(printf %s \"$x\" | md5sum)", "0123456789".repeat(10_000));
    let strange = "printf %s 'a\u{1}\u{3}\u{4}\u{7f}\u{1b}[0m\u{11}\u{13}\u{15}\u{16}\u{1a}\u{1c}\tb\rc' | xxd -p";
    let utf8 = "echo 'Grüße, 🦀, 日本' | tee /tmp/x | wc -c; cat /tmp/x";
    let quotes = "cat <<'END'\n\"'`$x\\\n!!\n\nEND\n";
    let steps = run_in("bash", &[&long, strange, utf8, quotes]);
    let digest = openssl::hash::hash(
        openssl::hash::MessageDigest::md5(),
        "0123456789".repeat(10_000).as_bytes(),
    );
    let digest: String = digest.unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(steps[0], ok(&format!("100000 {digest} -\n")));
    assert_eq!(steps[1], ok("610103047f1b5b306d1113151 61a1c09620d63\n".replace(' ', "").as_str()));
    assert_eq!(steps[2], ok("22\nGrüße, 🦀, 日本\n"));
    assert_eq!(steps[3], ok("\"'`$x\\\n!!\n\n"));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn five_megabytes_of_output_arrive_byte_for_byte() {
    let steps = run_in("bash", &["seq 750000", "echo next"]);
    let expected: String = (1..=750_000).map(|i| format!("{i}\n")).collect();
    assert!(expected.len() > 5_000_000 && steps[0] == (expected, 0), "{} bytes", steps[0].0.len());
    assert_eq!(steps[1], ok("next\n"));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_shell_that_ends_fails_its_command_and_all_later_ones_at_once() {
    for end in [
        "exit 1",
        "exit 0",
        "set -e\nfalse",
        "kill -9 $$",
        "exec echo instead",
        "seq 10000; exit 5",
        "trap 'echo bye' EXIT; exit 3",
    ] {
        let mut job = job("bash", &[end, "echo not reached"]);
        job["epilogue_always_commands"] = json!([{ "directive": "echo epilogue" }]);
        let finished = run(&job);
        let commands = finished.commands();
        let printed: String = match end {
            _ if end.contains("instead") => "instead\n".into(),
            _ if end.contains("bye") => "bye\n".into(),
            _ if end.contains("seq") => (1..=10_000).map(|i| format!("{i}\n")).collect(),
            _ => String::new(),
        };
        let message = commands[0].0.replace("exit\n", "");
        let message = message.strip_prefix(&printed).unwrap_or_default();
        assert!(
            commands[0].1 == 1
                && message.starts_with("The job's shell has ended (")
                && message.lines().count() == 1,
            "{end}: {commands:?}"
        );
        let refused = ("the job's shell has ended, so this can't run\n".into(), 1);
        assert_eq!(commands[1..], [refused], "{end}");
        assert_eq!((finished.result(), finished.exit_code), ("failed", Some(1)), "{end}");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_failure_under_set_e_ends_the_job_and_success_does_not() {
    let steps = run_in("bash", &["set -e", "true; false || echo saved", "false", "echo no"]);
    assert_eq!(steps[..2], [ok(""), ok("saved\n")]);
    assert_eq!((steps[2].1, steps.len()), (1, 3), "{steps:?}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_command_that_exits_with_130_stops_the_job_from_inside() {
    for (value, line, outcome) in [
        (
            "passed",
            "SEMAPHORE_JOB_RESULT=passed - stopping job and marking it as passed\n",
            "passed",
        ),
        (
            "failed",
            "SEMAPHORE_JOB_RESULT=failed - stopping job and marking it as failed\n",
            "failed",
        ),
        (
            "not so sure",
            "SEMAPHORE_JOB_RESULT is set to 'not so sure' - stopping job and marking it as stopped\n",
            "stopped",
        ),
    ] {
        let command = format!("SEMAPHORE_JOB_RESULT='{value}'; (exit 130)");
        let mut job = job("bash", &[&command, "echo not reached"]);
        job["epilogue_always_commands"] = json!([{ "directive": "echo not reached" }]);
        let finished = run(&job);
        assert_eq!(finished.commands(), [(String::new(), 130), ok(line)], "{value}");
        assert_eq!(finished.steps().last().unwrap().0, "Checking job result");
        assert_eq!(finished.result(), outcome);
    }
}
