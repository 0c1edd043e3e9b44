//! Helpers for tests of Docker jobs, which use the machine's engine.

use std::process::{Command, Stdio};
use std::sync::OnceLock;

use serde_json::{Value, json};

/// Builds the images of `tests/images`, unless they exist.
pub fn make_images() {
    static MADE: OnceLock<()> = OnceLock::new();
    MADE.get_or_init(|| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/images/build");
        assert!(Command::new(script).stdin(Stdio::null()).status().unwrap().success());
    });
}

/// Runs `docker`. Returns its exit code and its output, standard error included.
pub fn docker(arguments: &[&str]) -> (i32, String) {
    let output = Command::new("docker").args(arguments).stdin(Stdio::null()).output().unwrap();
    let printed = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8_lossy(&printed).into_owned())
}

/// Runs `docker`, which must succeed, and returns its output.
pub fn docker_prints(arguments: &[&str]) -> String {
    let (code, printed) = docker(arguments);
    assert_eq!(code, 0, "docker {arguments:?}: {printed}");
    printed.trim().to_owned()
}

/// Returns a job with one container of this test image.
pub fn job(image: &str, commands: &[&str]) -> Value {
    job_in(json!([container("main", image)]), commands)
}

/// Returns a container of a test image.
pub fn container(name: &str, image: &str) -> Value {
    json!({ "name": name, "image": format!("agent-test/{image}") })
}

/// Returns a job with these containers.
#[expect(clippy::needless_pass_by_value, reason = "written where it is passed")]
pub fn job_in(containers: Value, commands: &[&str]) -> Value {
    make_images();
    let mut job: Value = serde_json::from_str(&crate::job_of(commands)).unwrap();
    job["job_id"] = crate::unique().into();
    job["executor"] = "dockercompose".into();
    job["compose"] = json!({ "containers": containers });
    job
}

/// Returns variables in the format of jobs.
pub fn variables(variables: &[(&str, &[u8])]) -> Value {
    let named =
        |(name, value): &(&str, &[u8])| json!({ "name": name, "value": crate::base64(value) });
    variables.iter().map(named).collect()
}

/// Returns a file in the format of jobs.
pub fn file(path: &str, content: &[u8], mode: &str) -> Value {
    json!({ "path": path, "content": crate::base64(content), "mode": mode })
}

/// Returns the containers and networks of a job that still exist.
pub fn leftovers_of(job: &Value) -> Vec<String> {
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

/// An object on the engine that is removed on drop: the `docker` arguments that remove it, and its name.
pub struct Owned(pub &'static [&'static str], pub String);

impl Drop for Owned {
    fn drop(&mut self) {
        // Fails if the object is already gone.
        let _ = docker(&[self.0, &[&self.1]].concat());
    }
}
