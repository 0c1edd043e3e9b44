//! One shell for the whole job: what persists, what ends it, and jobs that subvert it.

use test_support::World;

/// Runs commands. Returns output and exit code of each.
fn run(commands: &[&str]) -> Vec<(String, i32)> {
    let finished = World::new().run_commands(commands);
    assert_eq!(finished.stderr, "");
    finished.commands()
}

/// Runs `subversion` between two commands that must still work. Returns the outputs from it on.
fn subvert(subversion: &str) -> Vec<(String, i32)> {
    let mut steps =
        run(&["builtin echo before", subversion, "builtin echo after; (builtin exit 0)"]);
    assert_eq!(steps.len(), 3, "after {subversion:?}: {steps:?}");
    assert_eq!(steps.remove(0), ("before\n".into(), 0));
    steps
}

fn ok(output: &str) -> (String, i32) {
    (output.into(), 0)
}

#[test]
fn state_persists_from_command_to_command() {
    let steps = run(&[
        "x=1; f() { echo from f; }; cd /; shopt -s extglob; alias hi='echo aliased'",
        "echo $x; f; pwd; shopt -q extglob && echo extglob; hi",
        "test -t 0 && test -t 1 && test -t 2 && echo terminal",
        "echo $-; shopt -q login_shell && echo login",
        "(exit 7) || echo was $?",
        "echo $?",
    ]);
    assert_eq!(steps[1], ok("1\nfrom f\n/\nextglob\naliased\n"));
    assert_eq!(steps[2], ok("terminal\n"));
    assert!(steps[3].0.contains('i') && steps[3].0.ends_with("login\n"), "{steps:?}");
    assert_eq!(steps[4..], [ok("was 7\n"), ok("0\n")]);
}

#[test]
fn the_exit_code_of_one_command_is_visible_to_the_next() {
    let world = World::new();
    let job = r#"{"job_id":"1","commands":[{"directive":"(exit 7)"}],
        "epilogue_always_commands":[{"directive":"echo always $?"},{"directive":"echo second $?"}]}"#;
    let commands = world.run(job).commands();
    assert_eq!(commands[0], (String::new(), 7));
    // The export of the result comes between the two commands.
    assert_eq!(commands[1..], [ok("always 0\n"), ok("second 0\n")]);
    assert_eq!(run(&["true", "echo $?"])[1], ok("0\n"));
    assert_eq!(run(&["return 0", "echo $?"])[1], ok("0\n"));
}

#[test]
fn the_session_starts_in_the_home_directory() {
    let world = World::new();
    let finished = world.run_commands(&["pwd"]);
    assert_eq!(finished.output(), format!("{}\n", world.home().canonicalize().unwrap().display()));
}

#[test]
fn profile_scripts_are_read_and_their_output_is_not_in_the_log() {
    let world = World::new();
    let profile =
        "export FROM_PROFILE=yes; echo welcome; set -x; PS1='prompt> '; PROMPT_COMMAND='echo pc'\n";
    std::fs::write(world.home().join(".bash_profile"), profile).unwrap();
    let finished = world.run_commands(&["echo $FROM_PROFILE"]);
    assert!(finished.output().ends_with("yes\n"), "{finished:?}");
    assert!(!finished.output().contains("welcome") && !finished.output().contains("prompt>"));
}

#[test]
fn a_shell_that_ends_fails_its_command_and_all_later_ones_at_once() {
    for end in [
        "exit 1",
        "exit 0",
        "set -e\nfalse",
        "kill -9 $$",
        "exec true",
        "trap 'echo bye' EXIT; exit 3",
    ] {
        let world = World::new();
        let job = serde_json::json!({
            "job_id": "1",
            "commands": [{"directive": end}, {"directive": "echo not reached"}],
            "epilogue_always_commands": [{"directive": "echo epilogue"}],
        });
        let finished = world.run(&job.to_string());
        let commands = finished.commands();
        assert_eq!(commands[0].1, 1, "{end}: {commands:?}");
        let message = commands[0].0.strip_prefix("bye\n").unwrap_or(&commands[0].0);
        assert!(
            message.starts_with("The job's shell has ended (") && message.lines().count() == 1,
            "{message}"
        );
        assert_eq!(commands.len(), 2, "{end}: {commands:?}");
        assert_eq!(commands[1], ("the job's shell has ended, so this can't run\n".into(), 1));
        assert_eq!((finished.result(), finished.exit_code), ("failed", Some(1)), "{end}");
    }
}

#[test]
fn everything_printed_before_the_shell_ends_arrives() {
    let steps = run(&["seq 100000; exit 1"]);
    let expected: String = (1..=100_000).map(|i| format!("{i}\n")).collect();
    let (printed, message) = steps[0].0.split_at(expected.len().min(steps[0].0.len()));
    assert!(printed == expected && message.lines().count() == 1, "{} bytes", steps[0].0.len());
}

#[test]
fn background_processes_that_hold_the_terminal_do_not_hide_the_end_of_the_shell() {
    let steps = run(&["setsid sleep 1000 & sleep 1000 & exit 1"]);
    assert_eq!(steps[0].1, 1);
}

#[test]
fn tracing_shows_only_the_jobs_own_commands() {
    let steps = run(&["set -x", "echo hi", "echo $?; false || true", "set +x", "echo quiet"]);
    assert_eq!(steps[1], ok("++ echo hi\nhi\n"));
    assert_eq!(steps[2], ok("++ echo 0\n0\n++ false\n++ true\n"));
    assert_eq!(steps[3], ok("++ set +x\n"));
    assert_eq!(steps[4], ok("quiet\n"));

    let steps = run(&["set -v", "echo one\necho two", "set +v", "echo quiet"]);
    assert_eq!(steps[1], ok("echo one\none\necho two\ntwo\n"));
    assert_eq!(steps[3], ok("quiet\n"));
}

#[test]
fn a_traced_job_does_not_trace_values_of_variables() {
    let world = World::new();
    std::fs::write(world.home().join(".bash_profile"), "set -xv\n").unwrap();
    let job = r#"{"job_id":"1","env_vars":[{"name":"SECRET","value":"aHVudGVyMg=="}],"commands":[{"directive":"set -xv"},{"directive":"test -n x"}]}"#;
    let finished = world.run(job);
    assert_eq!(finished.result(), "passed");
    assert!(!finished.output().contains("hunter2"), "{finished:?}");
    assert!(finished.output().contains("++ test -n x"), "the job's own tracing works");
}

#[test]
fn options_and_traps_of_the_job_do_not_break_the_session() {
    for harmless in [
        "set -u",
        "set -f; set -C; set -o posix",
        "set -o noclobber -o pipefail; set +m",
        "trap 'true' DEBUG; trap - DEBUG",
        "trap ': trapped' EXIT INT TERM HUP",
        "shopt -s extdebug expand_aliases",
        "IFS=/; LANG=xx; LC_ALL=xx",
        "IFS=0123456789himBHs",
        "set -o history; history -c",
        "set -o functrace; set -o errtrace",
        "readonly status mark flags result 2>/dev/null; true",
        "readonly PROMPT_COMMAND",
        "readonly PS1 PS2",
        "set -o posix; trap : USR1; (while kill -USR1 $$; do sleep 0.002; done) 2>/dev/null & true",
        "stty echo; stty -icanon; stty echo",
        "stty raw",
        "exec 3>&1 4</dev/null 5>/dev/null",
        "unset PROMPT_COMMAND PS1",
        "enable -n cd test",
    ] {
        let steps = subvert(harmless);
        assert_eq!(steps[0].1, 0, "{harmless}: {steps:?}");
        assert_eq!(steps[1], ok("after\n"), "{harmless}: {steps:?}");
    }
}

#[test]
fn debug_and_error_traps_print_and_do_not_end_the_session() {
    let steps = subvert("trap 'echo D' DEBUG; echo x");
    assert!(steps[0].0.contains("x\n") && steps[1].0.contains("after\n"), "{steps:?}");
    let steps = run(&[
        "trap 'echo E' ERR",
        "false || true",
        "(exit 3) || echo $?",
        "trap - ERR",
        "echo ok",
    ]);
    assert_eq!(steps[1..], [ok(""), ok("3\n"), ok(""), ok("ok\n")]);
}

#[test]
fn a_shell_without_input_ends_after_its_command() {
    let steps = run(&["exec </dev/null; echo last", "echo not reached"]);
    assert_eq!(steps[0], ok("last\n"));
    assert_eq!(steps[1].1, 1);
    assert!(!steps[1].0.contains("not reached"));
}

#[test]
fn signals_have_their_default_actions() {
    let steps =
        run(&["grep -E 'SigBlk' /proc/self/status; (kill -TERM $BASHPID; echo not reached)"]);
    assert_eq!(steps[0], ("SigBlk:\t0000000000000000\nTerminated\n".into(), 128 + 15));
}

#[test]
fn redefined_commands_and_a_changed_path_do_not_break_the_session() {
    for name in [
        "echo", "source", "printf", "set", "read", "return", "local", "test", "exit", "trap",
        "eval", "cd", "history", "command",
    ] {
        let steps = subvert(&format!("{name}() {{ builtin echo mine; }}"));
        assert_eq!(steps, [ok(""), ok("after\n")], "{name}");
        let steps = subvert(&format!("alias {name}='builtin echo aliased'"));
        assert_eq!(steps, [ok(""), ok("after\n")], "{name}");
    }
    assert_eq!(subvert("PATH="), [ok(""), ok("after\n")]);
    assert_eq!(subvert("PROMPT_COMMAND='PATH=/nowhere'"), [ok(""), ok("after\n")]);
    let steps = subvert("PROMPT_COMMAND='builtin echo prompted'");
    assert_eq!(steps[1].1, 0);
    assert!(steps[1].0.ends_with("after\n"), "{steps:?}");
    assert_eq!(
        subvert("PS1='$(builtin echo prompt)'; PS2=x; PS4='$(builtin echo trace)'"),
        [ok(""), ok("after\n")]
    );
}

#[test]
fn redirected_and_closed_descriptors_do_not_break_the_session() {
    let steps = run(&[
        "exec >redirected 2>&1",
        "echo to file",
        "exec >/dev/tty 2>&1",
        "cat redirected",
        "exec 1>&- 2>&-",
        "echo lost",
    ]);
    assert_eq!(steps[1], ok(""));
    assert_eq!(steps[3], ok("to file\n"));
    assert_eq!(steps[4], ok(""));
    assert_eq!(steps[5], (String::new(), 1), "echo itself fails without an output");
}

#[test]
fn interrupts_of_the_shell_end_the_command_only() {
    for interrupt in [
        "kill -INT $$; echo not reached",
        "sh -c 'kill -INT $$'; echo x",
        "for i in 1 2 3; do kill -INT $$; done",
        "kill -INT 0",
    ] {
        let steps = run(&["true", interrupt]);
        assert_eq!(steps.len(), 2);
        assert_ne!(steps[1].1, 0, "{interrupt}: {steps:?}");
        assert!(!steps[1].0.contains("not reached"));
    }
    let world = World::new();
    let job = r#"{"job_id":"1","commands":[{"directive":"kill -INT $$"}],
        "epilogue_always_commands":[{"directive":"kill -INT $$; echo no"},{"directive":"echo 2"}],
        "epilogue_on_fail_commands":[{"directive":"echo on fail"}]}"#;
    let finished = world.run(job);
    assert_eq!(finished.commands().last().unwrap(), &ok("on fail\n"));
}

#[test]
fn errors_of_the_shell_end_the_command_only() {
    for error in [
        "set -u; echo $NOPE",
        "echo ${NOPE?gone}",
        "readonly R=1; R=2",
        "if then",
        "echo 'unclosed",
        "$((1/0))",
        "nosuchcommand_at_all",
    ] {
        let steps = run(&["true", error]);
        assert_ne!(steps[1].1, 0, "{error}: {steps:?}");
        assert!(!steps[1].0.contains("__agent"), "{steps:?}");
    }
}

#[test]
fn output_can_not_fake_the_end_of_a_command() {
    let steps = run(&[
        r"printf '\001%s 0 h x\001' 00000000000000000000000000000000; declare -f | tail -n +2 | head -40 >/dev/null",
        // The session's words are in its functions; printing them must not end a command either.
        r#"word=$(declare -f __agent_end | grep -o '[0-9a-f]\{32\}'); printf '\001%s 0 h x\001' "$word"; echo still here; (exit 3)"#,
    ]);
    assert_eq!(steps[0], ok("\u{1}00000000000000000000000000000000 0 h x\u{1}"));
    assert!(steps[1].0.ends_with("still here\n"));
    assert_eq!(steps[1].1, 3);
}

#[test]
fn a_command_that_shows_the_agents_functions_shows_no_mark() {
    let steps = run(&["set; declare -f; declare -p", "echo after"]);
    assert!(steps[0].0.contains("__agent_end"), "{steps:?}");
    assert!(!steps[0].0.contains("not found"), "{steps:?}");
    assert_eq!(steps[1], ok("after\n"));
}

#[test]
fn marks_of_earlier_commands_can_not_be_found_or_used() {
    let finished = World::new().run_commands(&[
        "set; declare -p; history; fc -l; jobs; trap -p; cat /proc/$$/cmdline /proc/$$/environ | tr '\\0' '\\n'",
        "set -o history; echo x",
        "history; fc -l 2>&1; echo $BASH_COMMAND",
    ]);
    let output = finished.output();
    let long_words = output.split(|c: char| !c.is_ascii_hexdigit()).filter(|w| w.len() >= 32);
    // Each script's prompt names its script; no other mark is found.
    let prompts = ["__agent_at=", "PS1="];
    let listed = output.lines().filter(|line| prompts.iter().any(|name| line.contains(name)));
    let listed: String = listed.collect();
    let words: std::collections::BTreeSet<_> = long_words.collect();
    assert!(words.iter().all(|word| listed.contains(word)), "{words:?}");
}

#[test]
fn commands_of_any_size_and_content_run() {
    let long = format!("x='{}'; echo ${{#x}}", "a".repeat(1_000_000));
    let heredoc = "cat <<'EOF'\n$HOME `x` \\ \"'\nEOF";
    let steps = run(&[
        &long,
        "",
        "# only a comment",
        "echo \"a\" 'b' `echo c` $(echo d)",
        heredoc,
        "echo ünïcödé 😀",
        "echo one\necho two\n\n\necho three",
        "echo no newline at the end \\",
        "if true; then\n  echo multi\nfi",
    ]);
    let outputs: Vec<_> = steps.iter().map(|(output, _)| output.as_str()).collect();
    assert_eq!(
        outputs,
        [
            "1000000\n",
            "",
            "",
            "a b c d\n",
            "$HOME `x` \\ \"'\n",
            "ünïcödé 😀\n",
            "one\ntwo\nthree\n",
            "no newline at the end\n",
            "multi\n"
        ]
    );
    assert!(steps.iter().all(|(_, exit_code)| *exit_code == 0));
}

#[test]
fn output_between_commands_belongs_to_the_next_command() {
    let steps = run(&["{ read -t 0.2 <> <(:); echo late; } & true", "wait; echo done"]);
    assert!(steps[1].0.contains("late\n") && steps[1].0.contains("done\n"), "{steps:?}");
}

#[test]
fn variables_are_bytes_and_files_have_their_modes() {
    let world = World::new();
    let job = r#"{"job_id":"1",
        "env_vars":[{"name":"BYTES","value":"YSdiIiQoeCkKXP8="},{"name":"EMPTY","value":""}],
        "files":[{"path":"~/a/b/c","content":"aGk=","mode":"0640"},{"path":"d/../e","content":"eA","mode":"700"}],
        "commands":[{"directive":"printf %s \"$BYTES\" | od -An -tx1; echo ${EMPTY-unset}; env | grep -c ^EMPTY="},
                    {"directive":"stat -c '%a %s' ~/a/b/c ~/e; cat a/b/c"}]}"#;
    let finished = world.run(job);
    assert_eq!(finished.commands()[0].0, " 61 27 62 22 24 28 78 29 0a 5c ff\n\n1\n");
    assert_eq!(finished.commands()[1].0, "640 2\n700 1\nhi");
    let shown = finished.steps()[1].1.clone();
    let home = world.home().display().to_string();
    assert_eq!(
        shown,
        format!(
            "Injecting {home}/a/b/c with file mode 0640\nInjecting {home}/e with file mode 700\n"
        )
    );
}

#[test]
fn a_variable_that_the_shell_refuses_fails_its_step_with_the_shells_message() {
    let job = r#"{"job_id":"1","env_vars":[{"name":"FROZEN","value":"MQ=="}],"commands":[{"directive":"echo x"}]}"#;
    let world = World::new();
    std::fs::write(world.home().join(".bash_profile"), "readonly FROZEN=0\n").unwrap();
    let finished = world.run(job);
    let steps = finished.steps();
    assert!(steps[0].1.contains("FROZEN: readonly variable"), "{steps:?}");
    assert_eq!((steps[0].2, finished.result()), (1, "failed"));
    assert!(!finished.output().contains("x\n"));
}

#[test]
fn a_file_that_can_not_be_written_fails_its_step_and_says_why() {
    let job = r#"{"job_id":"1","files":[{"path":"/proc/nope/x","content":"","mode":"644"}],"commands":[{"directive":"echo x"}]}"#;
    let finished = World::new().run(job);
    let steps = finished.steps();
    assert!(steps[1].1.contains("/proc/nope/x: No such file"), "{steps:?}");
    assert_eq!((steps[1].2, finished.result()), (1, "failed"));
}

#[test]
fn a_job_does_not_see_the_agents_secrets() {
    let world = World::new();
    let path = world.file("job.json", test_support::job_of(&["env"]));
    let mut agent = world.agent();
    agent.env("SEMAPHORE_AGENT_TOKEN", "hunter2").env("VISIBLE", "yes");
    let output = agent.args(["run", "--output", "json"]).arg(path).output().unwrap();
    let printed = test_support::Finished::of(&output).output();
    assert!(printed.contains("VISIBLE=yes") && !printed.contains("hunter2"));
}

#[test]
fn a_shell_that_ends_under_a_full_terminal_is_noticed() {
    let steps = run(&["yes & exit 1"]);
    assert_eq!(steps[0].1, 1);
}

#[test]
fn a_job_without_the_sessions_prompt_command_survives_interrupts() {
    let steps = run(&[
        "unset PROMPT_COMMAND",
        "kill -INT $$; echo no",
        "PROMPT_COMMAND='x=1;'",
        "kill -INT $$",
        "echo $x",
    ]);
    assert_eq!(steps.len(), 2, "{steps:?}");
    let world = World::new();
    let job = r#"{"job_id":"1","commands":[{"directive":"PROMPT_COMMAND='x=1;'"}],
        "epilogue_always_commands":[{"directive":"kill -INT $$"}],
        "epilogue_on_pass_commands":[{"directive":"echo $x"}]}"#;
    assert_eq!(world.run(job).commands().last().unwrap(), &ok("1\n"));
}

#[test]
fn prompts_and_traces_of_the_profile_are_not_in_the_log() {
    let world = World::new();
    let profile = "PS0='ps0> '; PROMPT_COMMAND+=('echo one' 'echo two'); MAILCHECK=0\n";
    std::fs::write(world.home().join(".bash_profile"), profile).unwrap();
    let finished = world.run_commands(&["echo a", "echo b"]);
    assert_eq!(finished.commands(), [ok("a\n"), ok("b\n")]);
}

#[test]
fn a_profile_that_ends_the_shell_fails_the_job_and_shows_its_output() {
    let world = World::new();
    let profile = "yes | head -100000; echo no such luck; exit 3\n";
    std::fs::write(world.home().join(".bash_profile"), profile).unwrap();
    let finished = world.run_commands(&["echo a"]);
    let steps = finished.steps();
    assert_eq!((steps.len(), steps[0].0.as_str(), steps[0].2), (1, "Preparing the job", 1));
    assert!(steps[0].1.contains("no such luck") && steps[0].1.len() < 3000, "{steps:?}");
}

#[test]
fn files_replace_those_of_earlier_jobs_and_a_pipe_does_not_block() {
    let world = World::new();
    let job = r#"{"job_id":"1","files":[{"path":"key","content":"aGk=","mode":"0400"}],"commands":[{"directive":"cat key; stat -c %a key"}]}"#;
    for _ in 0..2 {
        assert_eq!(world.run(job).output(), "hi400\n");
    }
    nix::unistd::mkfifo(&world.home().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let finished = world.run(&job.replace("\"key\"", "\"pipe\""));
    assert_eq!(finished.result(), "failed");
    assert!(finished.steps()[1].1.contains("/pipe: "), "{finished:?}");
}

#[test]
fn a_job_that_removes_the_state_directory_harms_only_itself() {
    let world = World::new();
    let remove = format!("rm -rf {}; echo removed", world.state().join("job-*").display());
    let finished = world.run_commands(&[&remove, "echo next"]);
    let (output, exit_code) = &finished.commands()[0];
    assert!(output.contains("the job's log was changed by somebody else"), "{finished:?}");
    assert_eq!((finished.commands().len(), *exit_code), (1, 1), "{finished:?}");
    assert_eq!((finished.result(), finished.exit_code), ("failed", Some(1)));
}
