//! The images and the registry of the Docker tests have the properties that the tests rely on.

use test_support::docker::{docker, make_images};
use test_support::registry::Registry;

/// Runs a command in a container of this test image.
fn run(image: &str, command: &[&str]) -> (i32, String) {
    make_images();
    let image = format!("agent-test/{image}");
    let socket = "/var/run/docker.sock:/var/run/docker.sock";
    let options = ["run", "--rm", "--network", "none", "-v", socket, &image];
    docker(&[&options, command].concat())
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn the_bash_image_has_its_users_and_path() {
    let script = "id -un; echo ~dev; echo $PATH; stat -c '%U %a' /home/dev /tmp";
    assert_eq!(
        run("bash", &["bash", "-c", script]),
        (
            0,
            "root\n/home/dev\n/opt/tools/bin:/usr/local/bin:/usr/bin:/bin\ndev 755\nroot 1777\n"
                .into()
        )
    );
    assert_eq!(
        run("bash:dev", &["bash", "-c", "id -un; pwd; echo ~"]),
        (0, "dev\n/home/dev\n/home/dev\n".into())
    );
    assert_eq!(
        run("bash:entrypoint", &["bash", "-c", "echo $ENTRYPOINT_RAN"]),
        (0, "yes\n".into())
    );
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn the_reduced_images_lack_their_programs() {
    assert_eq!(run("nobash", &["sh", "-c", "echo here"]), (0, "here\n".into()));
    for (image, shell) in [("nobash", "bash"), ("empty", "sh")] {
        let (code, printed) = run(image, &[shell]);
        assert_eq!(code, 127, "{printed}");
        assert!(printed.contains("executable file not found in $PATH"), "{printed}");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn the_client_in_the_docker_image_reaches_the_engine() {
    let script =
        "docker image inspect -f '{{.Config.User}}' agent-test/bash:dev && git --version && ssh -V";
    let (code, printed) = run("docker", &["bash", "-c", script]);
    assert_eq!(code, 0, "{printed}");
    assert!(printed.starts_with("dev\ngit version"), "{printed}");
}

#[test]
#[cfg_attr(
    not(all(has_docker, has_registry)),
    ignore = "needs a Docker Engine and docker-registry"
)]
fn the_registry_requires_a_login() {
    make_images();
    let mut registry = Registry::start();
    let image = registry.push("agent-test/nobash", "some/where");
    assert!(image.starts_with(&format!("{}/some/where", registry.address())));
    let (code, printed) = docker(&["pull", "-q", &image]);
    assert_eq!(code, 1, "{printed}");
    assert!(printed.contains("no basic auth credentials"), "{printed}");
}
