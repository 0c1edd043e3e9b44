//! Docker credential helpers of the agent's user: which ones are allowed, and how they end.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use test_support::docker::{job, leftovers_of, variables};
use test_support::registry::answering;
use test_support::{
    KilledOnFailure, Running, World, processes_with, unique, wait_for_file, wait_until,
};

/// Returns the address of a registry without any images.
fn registry() -> &'static str {
    static REGISTRY: LazyLock<String> = LazyLock::new(|| {
        answering(|request| match request.path.as_str() {
            "/v2/" => ("200 OK", "Server: tests", "{}"),
            _ => (
                "404 Not Found",
                "Server: tests",
                r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#,
            ),
        })
    });
    &REGISTRY
}

/// Writes an executable script.
fn program(path: &Path, script: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Writes the `docker` configuration of the agent's user.
#[expect(clippy::needless_pass_by_value, reason = "written where it is passed")]
fn configure(world: &World, config: Value) {
    let directory = world.home().join(".docker");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("config.json"), config.to_string()).unwrap();
}

/// Returns a job whose image must be pulled.
fn pulling() -> Value {
    let mut job = job("bash", &["echo not reached"]);
    job["compose"]["containers"][0]["image"] = format!("{}/x", registry()).into();
    job
}

/// Starts a job with `~/bin` in the PATH; all processes have a marker.
fn start(world: &World, job: &Value) -> (Running, String) {
    let value = unique();
    let path = format!("{}:{}", bin(world).display(), std::env::var("PATH").unwrap());
    let file = world.file("job.json", job.to_string());
    let running = world.start_file_with(&file, |command| {
        command.current_dir(world.home()).env("PATH", path).env("TEST_MARKER", &value);
    });
    (running, format!("TEST_MARKER={value}"))
}

fn bin(world: &World) -> PathBuf {
    world.home().join("bin")
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_helper_whose_name_is_a_path_is_not_run() {
    for name in ["x/../evil", "x/evil", "../evil", "/evil", "evil\n", "e vil", "", "Grüße"] {
        for key in ["credsStore", "credHelpers"] {
            let world = World::new();
            let touch = format!("touch {}", world.home().join("ran").display());
            for path in [
                world.home().join("evil"),
                world.home().join("docker-credential-x/evil"),
                bin(&world).join("docker-credential-evil\n"),
                bin(&world).join("docker-credential-e vil"),
                bin(&world).join("docker-credential-Grüße"),
            ] {
                program(&path, &touch);
            }
            fs::create_dir_all(world.home().join("docker-credential-..")).unwrap();
            program(&world.home().join("docker-credential-../evil"), &touch);
            configure(
                &world,
                match key {
                    "credsStore" => json!({ "credsStore": name }),
                    _ => json!({ "credHelpers": { registry(): name } }),
                },
            );
            let job = pulling();
            let (running, _) = start(&world, &job);
            let finished = running.finish();
            assert_eq!(finished.result(), "failed", "{finished:#?}");
            assert!(!world.home().join("ran").exists(), "{key} {name:?} was run");
        }
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_helper_with_a_valid_name_is_run() {
    for name in ["test", "ecr-login", "desktop.exe", "a_b.C-9"] {
        let world = World::new();
        let touch = format!("touch {}; exit 1", world.home().join("ran").display());
        program(&bin(&world).join(format!("docker-credential-{name}")), &touch);
        configure(&world, json!({ "credsStore": name }));
        start(&world, &pulling()).0.finish();
        assert!(world.home().join("ran").exists(), "{name} was not run");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn processes_of_a_helper_end_with_it() {
    let world = World::new();
    let leave =
        "sleep 1000 </dev/null >/dev/null 2>&1 &\necho '{\"Username\":\"me\",\"Secret\":\"x\"}'";
    program(&bin(&world).join("docker-credential-test"), leave);
    configure(&world, json!({ "credsStore": "test" }));
    let (running, marker) = start(&world, &pulling());
    let _clean = KilledOnFailure(marker.clone());
    running.finish();
    // A killed process takes a moment to vanish.
    let sleeping = || -> Vec<String> {
        processes_with(&marker).into_iter().filter(|found| found.contains("sleep")).collect()
    };
    wait_until(|| sleeping().is_empty(), || format!("{:?} live on", sleeping()));
}

/// Returns a script that notes its start, and then hangs together with its children.
fn hanging(world: &World) -> String {
    format!("sleep 1000 & touch {}; sleep 1000; wait", world.home().join("up").display())
}

/// Returns jobs that wait for a hanging program, each with the program's path.
fn waiting(world: &World) -> [(Value, PathBuf); 2] {
    configure(world, json!({ "credsStore": "test" }));
    let mut amazon = job("bash", &["echo not reached"]);
    amazon["compose"]["image_pull_credentials"] = json!([{ "env_vars": variables(&[
        ("DOCKER_CREDENTIAL_TYPE", b"AWS_ECR"),
        ("AWS_REGION", b"eu-west-9"),
        ("AWS_ACCESS_KEY_ID", b"id"),
        ("AWS_SECRET_ACCESS_KEY", b"key"),
    ]) }]);
    let helper = bin(world).join("docker-credential-test");
    [(pulling(), helper), (amazon, bin(world).join("aws"))]
}

/// Asserts that such a program does not outlive an agent that gets this signal.
fn end_while_waiting(signal: Signal) {
    for kind in 0..2 {
        let world = World::new();
        let (job, path) = waiting(&world).into_iter().nth(kind).unwrap();
        program(&path, &hanging(&world));
        let (running, marker) = start(&world, &job);
        let _clean = KilledOnFailure(marker.clone());
        wait_for_file(&world.home().join("up"));
        running.signal(signal);
        running.finish();
        let living = || processes_with(&marker);
        wait_until(|| living().is_empty(), || format!("{}: {:?}", path.display(), living()));
        assert_eq!(leftovers_of(&job), [""; 0]);
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_stop_ends_a_helper_with_all_that_it_started() {
    end_while_waiting(Signal::SIGTERM);
}
