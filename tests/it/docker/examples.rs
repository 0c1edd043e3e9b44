//! The container jobs in `config/jobs`, run with local images.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use test_support::docker::make_images;
use test_support::registry::{PASSWORD, Registry, USER};
use test_support::{Finished, World, base64, wait_for_end};

/// Runs an example in which these texts are replaced.
fn run(name: &str, replaced: &[(&str, &str)]) -> Finished {
    make_images();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/jobs").join(name);
    let mut job = fs::read_to_string(path).unwrap();
    for (from, to) in replaced {
        assert!(job.contains(from), "{name} has no {from}");
        job = job.replace(from, to);
    }
    let world = World::new();
    let path = world.file(name, job);
    let mut command = world.agent();
    command.args(["run", "--output", "json"]).arg(path);
    let agent = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    Finished::of(&wait_for_end(agent))
}

fn assert_passed(finished: &Finished) {
    assert_eq!(finished.result(), "passed", "{:#?}", finished.steps());
    assert_eq!(finished.stderr, "");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
fn a_service_responds() {
    let images = [
        ("image: bash:5", "image: agent-test/bash"),
        ("image: busybox", "image: agent-test/nobash"),
    ];
    let finished = run("docker-service.yaml", &images);
    assert_passed(&finished);
    assert!(finished.output().contains("Hello from the service\n"));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
#[cfg_attr(not(has_registry), ignore = "needs docker-registry and htpasswd")]
fn a_private_image_is_pulled() {
    make_images();
    let mut registry = Registry::start();
    let image = registry.push("agent-test/bash", "tools/bash");
    let finished = run(
        "docker-private-image.yaml",
        &[
            ("registry.example/tools/bash", &image),
            ("cmVnaXN0cnkuZXhhbXBsZQ==", &base64(registry.address().as_bytes())),
            ("value: bWU=", &format!("value: {}", base64(USER.as_bytes()))),
            ("bXkgcGFzc3dvcmQ=", &base64(PASSWORD.as_bytes())),
        ],
    );
    assert_passed(&finished);
    assert!(finished.output().contains("In a private image, as root\n"));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
#[cfg_attr(not(has_registry), ignore = "needs docker-registry and htpasswd")]
fn an_image_is_built_run_and_pushed() {
    make_images();
    let registry = Registry::start();
    let address = base64(registry.address().as_bytes());
    let from = |image: &str| {
        base64(
            format!("FROM {image}\nCOPY greeting /greeting\nCMD [\"cat\", \"/greeting\"]\n")
                .as_bytes(),
        )
    };
    let finished = run(
        "docker-build-and-push.yaml",
        &[
            ("cimg/base:current", "agent-test/docker"),
            ("cmVnaXN0cnkuZXhhbXBsZQ==", &address),
            ("value: bWU=", &format!("value: {}", base64(USER.as_bytes()))),
            ("bXkgcGFzc3dvcmQ=", &base64(PASSWORD.as_bytes())),
            (&(from("busybox") + "="), &from("agent-test/nobash")),
        ],
    );
    assert_passed(&finished);
    assert!(finished.output().contains("Hello from the new image\n"));
}
