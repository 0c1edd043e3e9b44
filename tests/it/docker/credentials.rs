//! Credentials for each kind of registry, errors in them, and metrics of pulls.

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use test_support::docker::{container, file, job, job_in, leftovers_of, variables};
use test_support::registry::Registry;
use test_support::serve::ServeAgent;
use test_support::{Finished, World};

const CREDENTIALS: &str = "Setting up image pull credentials";

/// Returns a job with these credentials.
#[expect(clippy::needless_pass_by_value, reason = "written where it is passed")]
fn with(credentials: Value) -> Value {
    let mut job = job("bash", &["echo hi"]);
    job["compose"]["image_pull_credentials"] = json!([credentials]);
    job
}

/// Returns output and exit code of the step that sets up credentials.
fn set_up(finished: &Finished) -> (String, i32) {
    let (title, output, exit_code) = finished.steps().swap_remove(0);
    assert_eq!(title, CREDENTIALS);
    (output, exit_code)
}

#[test]
#[cfg_attr(
    not(all(has_docker, has_registry)),
    ignore = "needs a Docker Engine and docker-registry"
)]
fn a_google_registry_gets_the_key_unchanged() {
    let key = r#"{"type": "service_account", "private_key": "-----BEGIN\nabc\n"}"#;
    let mut registry = Registry::for_users(&[("_json_key", key)]);
    let image = registry.push("agent-test/bash", "project/app");
    let mut credentials = json!({
        "env_vars": variables(&[
            ("DOCKER_CREDENTIAL_TYPE", b"GCR"),
            ("GCR_HOSTNAME", registry.address().as_bytes()),
        ]),
        "files": [file("/tmp/gcr/keyfile.json", key.as_bytes(), "0600")],
    });
    let mut job = with(credentials.clone());
    job["compose"]["containers"][0]["image"] = image.into();
    let finished = World::new().run(&job.to_string());
    assert_eq!(set_up(&finished), ("Setting up credentials for GCR\n".into(), 0));
    assert_eq!(finished.commands(), [("hi\n".into(), 0)]);

    credentials["files"][0]["content"] = test_support::base64(b"{\"canary\": 1}").into();
    let finished = World::new().run(&with(credentials).to_string());
    let (output, exit_code) = set_up(&finished);
    assert!(exit_code == 1 && output.contains("401 Unauthorized"), "{output}");
    assert!(!format!("{finished:?}").contains("canary"), "{finished:?}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn the_aws_program_gets_the_key_in_its_environment_and_decides() {
    let credentials = json!({ "env_vars": variables(&[
        ("DOCKER_CREDENTIAL_TYPE", b"AWS_ECR"),
        ("AWS_REGION", b"eu-west-9"),
        ("AWS_ACCESS_KEY_ID", b"canary-id"),
        ("AWS_SECRET_ACCESS_KEY", b"canary-secret"),
    ]) });
    let world = World::new();
    let programs = world.home().join("bin");
    fs::create_dir(&programs).unwrap();
    let aws = programs.join("aws");
    let script = "#!/bin/sh\necho \"$@\" >>~/asked\nenv | grep ^AWS_ | sort >>~/asked\n\
                  [ \"$1\" = sts ] && echo 123 && exit\necho 'ExpiredToken: the key is too old' >&2\nexit 255\n";
    fs::write(&aws, script).unwrap();
    fs::set_permissions(&aws, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    let start = |path: &str| {
        let file = world.file("job.json", with(credentials.clone()).to_string());
        let running = world.start_file_with(&file, |command| {
            command.env("PATH", path).env("AWS_PROFILE", "of the user");
        });
        running.finish()
    };
    let finished = start(&path);
    let (output, exit_code) = set_up(&finished);
    let expected = "Setting up credentials for ECR\n`aws`: ExpiredToken: the key is too old\n";
    assert_eq!((output.as_str(), exit_code, finished.result()), (expected, 1, "failed"));
    assert!(!format!("{finished:?}").contains("canary"), "{finished:?}");
    let recorded = fs::read_to_string(world.home().join("asked")).unwrap();
    let variables = "AWS_ACCESS_KEY_ID=canary-id\nAWS_DEFAULT_REGION=eu-west-9\n\
                     AWS_REGION=eu-west-9\nAWS_SECRET_ACCESS_KEY=canary-secret\n";
    let expected = format!(
        "sts get-caller-identity --query Account --output text\n{variables}\
         ecr get-login-password\n{variables}"
    );
    assert_eq!(recorded, expected);

    fs::remove_file(aws).unwrap();
    let (output, exit_code) = set_up(&start(&programs.display().to_string()));
    assert!(
        exit_code == 1 && output.contains("`aws`") && output.contains("not installed"),
        "{output}"
    );
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_job_can_be_stopped_while_a_registry_checks_a_password() {
    let registry = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = registry.local_addr().unwrap().to_string();
    let job = with(json!({ "env_vars": variables(&[
        ("DOCKER_CREDENTIAL_TYPE", b"GenericDocker"),
        ("DOCKER_URL", url.as_bytes()),
        ("DOCKER_USERNAME", b"me"),
        ("DOCKER_PASSWORD", b"canary"),
    ]) }));
    let running = World::new().start(&job.to_string());
    let _asked = registry.accept().unwrap();
    running.signal(Signal::SIGTERM);
    let finished = running.finish();
    assert_eq!((finished.result(), finished.exit_code), ("stopped", Some(130)));
    assert_eq!(set_up(&finished).1, 1);
    assert_eq!(leftovers_of(&job), [""; 0]);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn every_image_is_measured() {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let port = socket.local_addr().unwrap().port().to_string();
    let agent = ServeAgent::start_with(&World::new(), |command| {
        command.args(["--statsd-host", "127.0.0.1", "--statsd-port", &port]);
    });
    let receive = || {
        let mut bytes = [0; 2000];
        let length = socket.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    };
    let pull = "agent.prod.compose_ci.docker_pull";
    let containers = json!([container("main", "bash"), container("web", "service")]);
    let missing = json!([{ "name": "main", "image": "Not:An:Image" }]);
    for (containers, images, result) in [
        (containers, &["agent-test/bash", "agent-test/service"][..], "success"),
        (missing, &["Not:An:Image"], "failure"),
    ] {
        agent.run_to_end(&job_in(containers, &["true"]));
        let mut received: Vec<_> = (0..=2 * images.len()).map(|_| receive()).collect();
        for image in images {
            let mut take = |begin: &str, end: &str| {
                let is_expected =
                    |datagram: &String| datagram.starts_with(begin) && datagram.ends_with(end);
                let index = received.iter().position(is_expected);
                received.remove(index.unwrap_or_else(|| panic!("{begin} {end}: {received:?}")));
            };
            take(&format!("{pull}.duration:"), &format!("|ms|#image:{image}"));
            take(&format!("{pull}.{result}.rate:1|c|"), &format!("#image:{image}"));
        }
        // The rest are the metrics of the job itself.
        assert!(received[0].starts_with("agent.prod.job.duration:"), "{received:?}");
    }
}
