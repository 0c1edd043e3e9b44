//! What tests of Docker jobs ask of the machine's engine.

use std::process::{Command, Stdio};
use std::sync::OnceLock;

use serde_json::{Value, json};

/// Makes the images of `tests/images` where they are missing.
pub fn make_images() {
    static MADE: OnceLock<()> = OnceLock::new();
    MADE.get_or_init(|| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/images/build");
        assert!(Command::new(script).stdin(Stdio::null()).status().unwrap().success());
    });
}

/// Runs the command line client; answers its exit code and all that it printed.
pub fn docker(arguments: &[&str]) -> (i32, String) {
    let output = Command::new("docker").args(arguments).stdin(Stdio::null()).output().unwrap();
    let printed = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8_lossy(&printed).into_owned())
}

/// What a client prints that must not fail.
pub fn docker_prints(arguments: &[&str]) -> String {
    let (code, printed) = docker(arguments);
    assert_eq!(code, 0, "docker {arguments:?}: {printed}");
    printed.trim().to_owned()
}

/// A job with one container, of this test image.
pub fn job(image: &str, commands: &[&str]) -> Value {
    job_in(json!([container("main", image)]), commands)
}

/// A container of a test image.
pub fn container(name: &str, image: &str) -> Value {
    json!({ "name": name, "image": format!("agent-test/{image}") })
}

/// A job with these containers.
#[expect(clippy::needless_pass_by_value, reason = "written where it is passed")]
pub fn job_in(containers: Value, commands: &[&str]) -> Value {
    make_images();
    let mut job: Value = serde_json::from_str(&crate::job_of(commands)).unwrap();
    job["job_id"] = crate::unique().into();
    job["executor"] = "dockercompose".into();
    job["compose"] = json!({ "containers": containers });
    job
}

/// Variables as jobs have them.
pub fn variables(variables: &[(&str, &[u8])]) -> Value {
    let named =
        |(name, value): &(&str, &[u8])| json!({ "name": name, "value": crate::base64(value) });
    variables.iter().map(named).collect()
}

/// A file as jobs have them.
pub fn file(path: &str, content: &[u8], mode: &str) -> Value {
    json!({ "path": path, "content": crate::base64(content), "mode": mode })
}

/// The containers and networks that a job has on the engine.
pub fn left_of(job: &Value) -> Vec<String> {
    let label = format!("label=semaphore-agent.job={}", job["job_id"].as_str().unwrap());
    let containers = docker_prints(&[
        "ps",
        "-a",
        "--filter",
        &label,
        "--format",
        "container {{.Names}} {{.Status}}",
    ]);
    let networks =
        docker_prints(&["network", "ls", "--filter", &label, "--format", "network {{.Name}}"]);
    containers.lines().chain(networks.lines()).map(str::to_owned).collect()
}

/// Something of a test's own on the engine that goes with this value: the words before its name that remove
/// it, and its name.
pub struct Owned(pub &'static [&'static str], pub String);

impl Drop for Owned {
    fn drop(&mut self) {
        // What is gone already need not be removed.
        let _ = docker(&[self.0, &[&self.1]].concat());
    }
}
