//! Variables of containers with any name, and variables of jobs that must not affect the agent's own
//! operations in the container.

use serde_json::{Value, json};

use test_support::docker::{container, file, job, job_in, leftovers_of, variables};
use test_support::{Finished, World};

/// Names that no shell accepts, but `docker run -e` does.
const STRANGE: [(&str, &[u8]); 6] = [
    ("discovery.type", b"single-node"),
    ("my-var", b"1"),
    ("1st", b"first"),
    ("two words", b"a=b"),
    ("Gr\u{fc}\u{df}e", b"x"),
    ("%s$(id)'\"", b"\""),
];

/// Runs a job, and asserts that nothing of it is left.
fn run(job: &Value) -> Finished {
    let finished = World::new().run(&job.to_string());
    assert_eq!(leftovers_of(job), [""; 0]);
    finished
}

/// Asserts that each of these is a line of this environment.
fn assert_has_strange_ones(environment: &str) {
    for (name, value) in STRANGE {
        let expected = format!("{name}={}", String::from_utf8_lossy(value));
        let mut lines = environment.lines();
        assert!(lines.any(|line| line == expected), "no {expected} in {environment}");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_service_has_variables_of_any_name_that_docker_run_takes() {
    let mut web = container("web", "service");
    // Not `env`: busybox's shell drops variables with names that it does not accept.
    let script = "tr '\\\\000' '\\\\n' </proc/1/environ >/www/index.html; \
                  exec httpd -f -p 8080 -h /www";
    web["command"] = format!("sh -c \"{script}\"").into();
    web["env_vars"] = variables(&STRANGE);
    let job = job_in(json!([container("main", "bash"), web]), &["wget -q -O - http://web:8080"]);
    let finished = run(&job);
    assert_eq!(finished.result(), "passed", "{finished:#?}");
    assert_has_strange_ones(&finished.output());
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn the_main_container_has_variables_of_any_name_that_docker_run_takes() {
    let mut job = job("bash", &["tr '\\000' '\\n' </proc/$$/environ"]);
    job["compose"]["containers"][0]["env_vars"] = variables(&STRANGE);
    let finished = run(&job);
    assert_eq!(finished.result(), "passed", "{finished:#?}");
    assert_has_strange_ones(&finished.output());
}

/// Returns a job with a file in a new directory; the job reads the file without any program.
fn with_file(variables: Value) -> Value {
    let read = "builtin cd ~; [[ -x new/place/f ]] && builtin echo \"$(<new/place/f)\"";
    let mut job = job("bash:dev", &[read]);
    job["files"] = json!([file("new/place/f", b"content", "0700")]);
    job["env_vars"] = variables;
    job
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn files_arrive_whatever_the_jobs_path_is() {
    for path in ["/nowhere", "", ".", "/proc/self"] {
        let finished = run(&with_file(variables(&[("PATH", path.as_bytes())])));
        assert_eq!(finished.commands(), [("content\n".into(), 0)], "{path:?}: {finished:#?}");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn files_arrive_although_the_environment_is_too_large_to_start_a_program() {
    let one_too_long = vec![b'x'; 200_000];
    let finished = run(&with_file(variables(&[("LONG", &one_too_long)])));
    assert_eq!(finished.commands(), [("content\n".into(), 0)], "one long value");

    let many = vec![b'x'; 100_000];
    let names: Vec<String> = (0..25).map(|i| format!("MANY_{i}")).collect();
    let many: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &many[..])).collect();
    let finished = run(&with_file(variables(&many)));
    assert_eq!(finished.commands(), [("content\n".into(), 0)], "many values");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn programs_of_the_image_are_not_used_for_the_injection_of_files() {
    let mut job = with_file(json!([]));
    // A directory at the beginning of the image's PATH.
    let plant = "for each in mkdir chmod chown cat mv touch tar dd base64; do \
                 printf '#!/bin/sh\\nexit 9\\n' >/tmp/$each; busybox chmod 755 /tmp/$each; done; \
                 PATH=/tmp:$PATH; export PATH; exec \"$@\"";
    job["compose"]["containers"][0]["entrypoint"] =
        format!("sh -c '{}' -", plant.replace('\'', "'\\''")).into();
    let finished = run(&job);
    assert_eq!(finished.commands(), [("content\n".into(), 0)], "{finished:#?}");
}
