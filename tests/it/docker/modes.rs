//! File modes that chmod in a container refuses.

use serde_json::json;

use test_support::World;
use test_support::docker::{container, file, job, job_in};

/// Returns output and exit code of the step that injects a file with this mode.
fn injected(mut job: serde_json::Value, mode: &str) -> (String, i32) {
    job["files"] = json!([file("f", b"x", mode)]);
    let finished = World::new().run(&job.to_string());
    assert_eq!(finished.result(), "failed");
    let mut steps = finished.steps().into_iter();
    let step = steps.find(|(title, ..)| title == "Injecting Files").unwrap();
    (step.1, step.2)
}

/// Clients compare this step's output line by line.
#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_refused_mode_is_reported_in_exactly_one_line() {
    for mode in ["wrong", "0999", "'; touch /tmp/x; '"] {
        let expected =
            format!("Injecting f with file mode {mode}\nFailed to set file mode to {mode}\n");
        assert_eq!(injected(job("bash", &["true"]), mode), (expected, 1), "{mode:?}");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_refused_mode_gives_the_same_line_with_side_containers_and_other_users() {
    let containers = json!([container("main", "bash:dev"), container("side", "service")]);
    let expected = "Injecting f with file mode wrong\nFailed to set file mode to wrong\n";
    assert_eq!(injected(job_in(containers, &["true"]), "wrong"), (expected.into(), 1));
}
