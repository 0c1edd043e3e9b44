//! Names and passwords for registries as they come from files and `echo
//! base64`.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use serde_json::{Value, json};

use test_support::docker::{file, job, variables};
use test_support::registry::answering;
use test_support::{Finished, World, base64};

/// Line ends that may follow a value and are not part of it.
const LINE_ENDS: [&str; 4] = ["", "\n", "\r\n", "\n\n"];

/// Starts a registry that only checks the credentials. Returns its address.
fn registry(user: &str, password: &str) -> String {
    let wanted = format!("Basic {}", base64(format!("{user}:{password}").as_bytes()));
    answering(move |request| {
        // The tests' own encoder adds no padding.
        let is_wanted = |value: &str| value.trim_end_matches('=') == wanted;
        let mut headers = request.headers.iter();
        let is_known = headers.any(|(name, value)| name == "authorization" && is_wanted(value));
        let status = if is_known { "200 OK" } else { "401 Unauthorized" };
        (status, "WWW-Authenticate: Basic realm=\"tests\"", "")
    })
}

/// Runs a job with these credentials.
#[expect(clippy::needless_pass_by_value, reason = "written where it is passed")]
fn run_with(world: &World, credentials: Value, path: &str) -> Finished {
    let mut job = job("bash", &["echo hi"]);
    job["compose"]["image_pull_credentials"] = json!([credentials]);
    let job = world.file("job.json", job.to_string());
    let running = world.start_file_with(&job, |command| {
        command.env("PATH", path);
    });
    running.finish()
}

fn path() -> String {
    std::env::var("PATH").unwrap()
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn line_ends_after_a_name_or_password_are_not_sent() {
    let registry = registry("me", " two words ");
    for end in LINE_ENDS {
        let given = |value: &str| format!("{value}{end}").into_bytes();
        let credentials = json!({ "env_vars": variables(&[
            ("DOCKER_CREDENTIAL_TYPE", b"GenericDocker".as_ref()),
            ("DOCKER_URL", &given(&registry)),
            ("DOCKER_USERNAME", &given("me")),
            ("DOCKER_PASSWORD", &given(" two words ")),
        ]) });
        let finished = run_with(&World::new(), credentials, &path());
        assert_eq!(finished.commands(), [("hi\n".into(), 0)], "{end:?}: {finished:#?}");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn line_ends_after_a_google_key_are_not_sent_and_those_within_are() {
    let key = "{\n\"private_key\": \"a\\n\"\n}";
    let registry = registry("_json_key", key);
    for end in LINE_ENDS {
        let credentials = json!({
            "env_vars": variables(&[
                ("DOCKER_CREDENTIAL_TYPE", format!("GCR{end}").as_bytes()),
                ("GCR_HOSTNAME", format!("{registry}{end}").as_bytes()),
            ]),
            "files": [file("/tmp/gcr/keyfile.json", format!("{key}{end}").as_bytes(), "0600")],
        });
        let finished = run_with(&World::new(), credentials, &path());
        assert_eq!(finished.commands(), [("hi\n".into(), 0)], "{end:?}: {finished:#?}");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn the_aws_program_gets_a_key_without_line_ends() {
    for end in LINE_ENDS {
        let world = World::new();
        let aws = world.home().join("aws");
        let script = "#!/bin/sh\nfor each in \"$AWS_REGION\" \"$AWS_ACCESS_KEY_ID\" \
                      \"$AWS_SECRET_ACCESS_KEY\"; do printf '<%s>' \"$each\" >>~/asked; done\nexit 255\n";
        fs::write(&aws, script).unwrap();
        fs::set_permissions(&aws, fs::Permissions::from_mode(0o755)).unwrap();
        let given = |value: &str| format!("{value}{end}").into_bytes();
        let credentials = json!({ "env_vars": variables(&[
            ("DOCKER_CREDENTIAL_TYPE", &given("AWS_ECR")),
            ("AWS_REGION", &given("eu-west-9")),
            ("AWS_ACCESS_KEY_ID", &given("id")),
            ("AWS_SECRET_ACCESS_KEY", &given("key")),
            ("AWS_ACCOUNT_ID", &given("123")),
        ]) });
        let path = format!("{}:{}", world.home().display(), path());
        let finished = run_with(&world, credentials, &path);
        let recorded = fs::read_to_string(world.home().join("asked"));
        let recorded = recorded.unwrap_or_else(|error| panic!("{error}: {finished:#?}"));
        assert_eq!(recorded, "<eu-west-9><id><key>", "{end:?}");
    }
}
