//! The typical job, in a container: clone a repository with a key from the job, and run its tests.

use std::fs;

use serde_json::json;

use test_support::docker::{container, file, job_in, leftovers_of, variables};
use test_support::ssh::{assert_hidden, key};
use test_support::{Finished, World};

/// Runs a job that clones the repository of a side container with an injected key of this mode, and runs its
/// tests. Asserts that the agent's output contains no part of the key.
fn run_with_key_of(mode: &str) -> Finished {
    let directory = tempfile::tempdir().unwrap();
    let kind = ["-t", "ed25519"];
    let client = key(directory.path(), "client_key", &kind);
    let host = key(directory.path(), "host_key", &kind);
    let private_key = fs::read_to_string(&client).unwrap();
    let host_key = fs::read_to_string(host.with_extension("pub")).unwrap();

    let mut forge = container("forge", "forge");
    forge["files"] = json!([
        file("host_key", &fs::read(&host).unwrap(), "0600"),
        file(".ssh/authorized_keys", &fs::read(client.with_extension("pub")).unwrap(), "0600"),
    ]);
    let mut job = job_in(
        json!([container("main", "docker"), forge]),
        &[
            "export GIT_SSH_COMMAND='ssh -i ~/.ssh/deploy_key -o BatchMode=yes'",
            "git clone ssh://dev@forge:2222/home/dev/project.git",
            "cd project",
            "bash test.sh",
        ],
    );
    job["env_vars"] = variables(&[("DEPLOY_KEY", private_key.as_bytes())]);
    job["files"] = json!([
        file(".ssh/deploy_key", private_key.as_bytes(), mode),
        file(".ssh/known_hosts", format!("[forge]:2222 {host_key}").as_bytes(), "0644"),
    ]);
    let finished = World::new().run(&job.to_string());
    assert_eq!(leftovers_of(&job), [""; 0]);
    assert_hidden(&private_key, &format!("{finished:?}"));
    finished
}

#[test]
#[cfg_attr(not(all(has_docker, has_ssh)), ignore = "needs a Docker Engine, sshd, ssh and git")]
fn a_job_in_a_container_clones_with_its_key_and_runs_the_tests() {
    let finished = run_with_key_of("0600");
    assert_eq!(finished.result(), "passed", "{:#?}", finished.steps());
    let commands = finished.commands();
    assert_eq!(commands[3], ("42 tests passed\n".into(), 0), "{commands:?}");
}

/// ssh checks the modes of keys, which shows that an injected file has the requested mode.
#[test]
#[cfg_attr(not(all(has_docker, has_ssh)), ignore = "needs a Docker Engine, sshd, ssh and git")]
fn a_key_that_others_can_read_is_refused_by_ssh_in_a_container() {
    let finished = run_with_key_of("0644");
    assert_eq!(finished.result(), "failed", "{:#?}", finished.steps());
    let commands = finished.commands();
    assert_eq!(commands.len(), 2, "{commands:?}");
    let (clone, exit_code) = &commands[1];
    assert!(clone.contains("UNPROTECTED PRIVATE KEY FILE"), "{clone}");
    assert_eq!(*exit_code, 128);
}
