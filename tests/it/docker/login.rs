//! SSH access to jobs in containers.

use std::fs;
use std::process::Stdio;

use serde_json::json;

use crate::serve::login::{Machine, is_placeholder, script, text};
use test_support::docker::make_images;
use test_support::ssh::client;
use test_support::{RUNNING, wait_for_end, wait_until};

/// Like [`test_support::RUN_UNTIL_GO`], but the file `go` is in `/go`, where the container sees the machine's
/// home.
const RUN_UNTIL_GO: &str = "echo running; until [[ -e /go/go ]]; do sleep 0.1; done";

fn start(machine: &Machine, image: &str) {
    make_images();
    let mut job = machine.job(&[RUN_UNTIL_GO]);
    job["executor"] = "dockercompose".into();
    job["compose"] = json!({ "containers": [{ "name": "main", "image": image }] });
    machine.agent.post_job(&job).of_status(200);
}

/// Returns a machine whose home directory is mounted at `/go` in its jobs.
fn machine() -> Machine {
    Machine::start_with(|world, command| {
        command.arg("--files").arg(format!("{}:/go", world.home().display()));
    })
}

#[test]
#[cfg_attr(not(has_ssh), ignore = "needs sshd, ssh, ssh-keygen and git")]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
fn a_command_runs_in_the_container_and_returns_its_exit_code() {
    let machine = machine();
    start(&machine, "agent-test/bash:dev");
    // This login comes before the container exists, so the script waits.
    let jump_point = script(&machine.world);
    let leads_to_job = || fs::read_to_string(&jump_point).unwrap().contains("container=");
    wait_until(leads_to_job, || "the script leads nowhere".to_owned());
    let command = |rest: &str| format!("bash {} {rest}", jump_point.display());
    let first = machine.ssh(&command("id -un"));
    assert_eq!(text(&first), ("dev\n".into(), Some(0)), "{first:?}");
    machine.agent.wait_for_log("1", RUNNING);
    for (rest, printed, code) in [
        (r"printf '<%s>' a 'b  c' '' '*' '$HOME'", "<a><b  c><><*><$HOME>", 0),
        (r#"bash --login -c 'echo "$GREETING"; exit 7'"#, "hello  world\n", 7),
        ("false", "", 1),
    ] {
        let answer = machine.ssh(&command(rest));
        assert_eq!(text(&answer), (printed.into(), Some(code)), "{rest}: {answer:?}");
    }
    machine.end_job();
    assert!(is_placeholder(&machine.world));
}

#[test]
#[cfg_attr(not(has_ssh), ignore = "needs sshd, ssh, ssh-keygen and git")]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
fn a_login_on_a_terminal_is_in_the_container_with_the_jobs_environment() {
    let machine = machine();
    start(&machine, "agent-test/bash");
    machine.agent.wait_for_log("1", RUNNING);
    let jump_point = format!("bash {}", script(&machine.world).display());
    let typed = "tty >/dev/null && echo \"<$GREETING>\"; shopt -q login_shell && echo [login]; \
                 echo ~; exit 3\n";
    let (printed, code) = text(&machine.type_into(&[&jump_point], typed));
    for expected in ["<hello  world>", "\n[login]", "\n/root"] {
        assert!(printed.contains(expected), "{expected:?}: {printed}");
    }
    assert_eq!(code, Some(3));
    machine.end_job();
}

#[test]
#[cfg_attr(not(has_ssh), ignore = "needs sshd, ssh, ssh-keygen and git")]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
fn a_login_while_the_container_is_removed_gets_a_message() {
    let machine = machine();
    start(&machine, "agent-test/bash");
    machine.agent.wait_for_log("1", RUNNING);
    let copy = machine.world.home().join("script");
    fs::copy(script(&machine.world), &copy).unwrap();
    machine.end_job();
    let output = wait_for_end(
        std::process::Command::new("bash")
            .arg(&copy)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("The job is over."), "{message}");
    assert_eq!(output.status.code(), Some(1));
    // A login with the job's key is refused from now on.
    let refused =
        wait_for_end(client(machine.port(), &machine.key).arg("127.0.0.1").spawn().unwrap());
    assert_eq!(refused.status.code(), Some(255));
}
