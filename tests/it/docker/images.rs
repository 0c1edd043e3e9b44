//! Properties of images, and how they get to the engine.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use test_support::docker::{
    Owned, container, docker, docker_prints, job, job_in, leftovers_of, make_images, variables,
};
use test_support::registry::{PASSWORD, Registry, USER};
use test_support::serve::ServeAgent;
use test_support::{Finished, Step, World, base64, unique};

const CREDENTIALS: &str = "Setting up image pull credentials";
const PULL: &str = "Pulling docker images...";
const START: &str = "Starting the docker image...";

fn run(job: &Value) -> Finished {
    run_in(&World::new(), job)
}

/// Runs a job, and asserts that nothing of it is left on the engine.
fn run_in(world: &World, job: &Value) -> Finished {
    let finished = world.run(&job.to_string());
    assert_eq!(leftovers_of(job), [""; 0]);
    finished
}

/// Runs a job with `agent serve`.
fn served(job: &Value) -> Finished {
    let finished = ServeAgent::start(&World::new()).run_to_end(job);
    assert_eq!(leftovers_of(job), [""; 0]);
    finished
}

/// Returns the only failed step, which must be the last step.
fn failed_step(finished: &Finished) -> Step {
    assert_eq!(finished.result(), "failed", "{finished:#?}");
    assert!(finished.exit_code.is_none_or(|code| code == 1), "{finished:#?}");
    let mut steps = finished.steps();
    let last = steps.pop().unwrap();
    assert!(steps.iter().all(|(_, _, exit_code)| *exit_code == 0), "{steps:#?}");
    assert_eq!(last.2, 1, "{last:?}");
    last
}

fn with_image(image: &str) -> Value {
    let mut job = job("bash", &["echo hi"]);
    job["compose"]["containers"][0]["image"] = image.into();
    job["epilogue_always_commands"] = json!([{ "directive": "echo not reached" }]);
    job
}

fn generic(url: &str, user: &str, password: &str) -> Value {
    json!({ "env_vars": variables(&[
        ("DOCKER_CREDENTIAL_TYPE", b"GenericDocker"),
        ("DOCKER_URL", url.as_bytes()),
        ("DOCKER_USERNAME", user.as_bytes()),
        ("DOCKER_PASSWORD", password.as_bytes()),
    ]) })
}

/// Builds an image that exists only on this engine until it is pushed.
fn with_a_layer_of_its_own() -> Owned {
    make_images();
    let name = unique();
    let _container = Owned(&["rm", "-f"], name.clone());
    let options = ["run", "--network", "none", "--name", &name, "agent-test/bash"];
    docker_prints(&[&options[..], &["bash", "-c", "echo $RANDOM >/new"]].concat());
    let image = format!("agent-test/made:{name}");
    docker_prints(&["commit", &name, &image]);
    Owned(&["image", "rm", "-f"], image)
}

/// Removes an image from the engine, so that it must be pulled again.
fn forget(image: &str) {
    docker(&["image", "rm", image]);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn an_image_without_bash_fails_the_start_with_the_reason() {
    for image in ["nobash", "empty"] {
        let (title, output, _) = failed_step(&run(&with_image(&format!("agent-test/{image}"))));
        assert_eq!(title, START);
        let expected = "Starting a new bash session.\nFailed to start the docker image\n";
        assert!(output.starts_with(expected), "{output}");
        assert!(output.contains(&format!("agent-test/{image} has no `bash`")), "{output}");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn an_image_for_another_architecture_fails_the_start_with_the_reason() {
    let image = "agent-test/bash:foreign";
    let (title, output, _) = failed_step(&run(&with_image(image)));
    assert_eq!(title, START);
    let expected = format!("the image {image} is for riscv64, and this engine runs on ");
    assert!(output.contains(&expected), "{output}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn an_unknown_user_fails_the_start_with_the_reason() {
    let mut job = with_image("agent-test/bash");
    job["compose"]["containers"][0]["user"] = "stranger".into();
    let (title, output, _) = failed_step(&run(&job));
    assert_eq!(title, START);
    assert!(output.contains("Failed to start the docker image\n"), "{output}");
    assert!(output.contains("stranger") && output.contains("passwd"), "{output}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn an_entrypoint_that_ends_before_bash_fails_the_start_and_shows_its_output() {
    let mut job = with_image("agent-test/bash");
    job["compose"]["containers"][0]["entrypoint"] = "sh -c 'echo no disk; exit 3'".into();
    let (title, output, _) = failed_step(&run(&job));
    assert_eq!(title, START);
    assert!(output.contains("Failed to start the docker image\n"), "{output}");
    assert!(output.contains("exit code 3") && output.contains("no disk"), "{output}");
    job["compose"]["containers"][0]["entrypoint"] = "/not/there".into();
    let (_, output, _) = failed_step(&run(&job));
    assert!(output.contains("/not/there"), "{output}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn an_invalid_image_name_fails_the_pull_with_the_engines_message() {
    for name in ["Agent-Test/Bash", "a:b:c", "agent-test/bash latest", "../x", "a?b#c", "ä"] {
        let (title, output, _) = failed_step(&run(&with_image(name)));
        assert_eq!(title, PULL);
        assert!(output.contains(name) && output.contains("invalid reference format"), "{output}");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn invalid_containers_fail_the_job_with_the_reason() {
    for (containers, reason) in [
        (json!([]), "needs at least one container"),
        (json!(null), "needs at least one container"),
        (json!([container("main db", "bash")]), "invalid container name `main db`"),
        (json!([container("", "bash")]), "invalid container name ``"),
        (json!([container("a", "bash"), container("a", "service")]), "`a` is the name of another"),
        (json!([container("a", "bash"), { "name": "b", "image": " " }]), "an image is needed"),
    ] {
        let job = job_in(containers, &["echo not reached"]);
        let (_, output, _) = failed_step(&served(&job));
        assert!(output.contains(reason), "{output}");
        // A container with files reports the error earlier.
        let finished = run(&job);
        assert!(finished.events.is_empty() && finished.stderr.contains(reason), "{finished:?}");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn container_names_may_have_upper_case_letters_and_punctuation() {
    let containers = json!([container("Main_1", "bash"), container("Web-2.Local_x", "service")]);
    let job = job_in(containers, &["wget -q -O - http://Web-2.Local_x:8080"]);
    assert_eq!(run(&job).commands(), [("service\n".into(), 0)]);
}

#[test]
#[cfg_attr(
    not(all(has_docker, has_registry)),
    ignore = "needs a Docker Engine and docker-registry"
)]
fn a_private_image_is_pulled_whatever_characters_the_password_has() {
    let users = [
        (USER, PASSWORD),
        ("dev ops", "it's \"a\" pass \\ wörd $HOME `id` %41+/="),
        ("robot$ci+x", "🦀?>~\u{ff}"),
    ];
    let mut registry = Registry::for_users(&users[1..]);
    let image = registry.push(&with_a_layer_of_its_own().1, "team/app");
    let urls = [registry.address().to_owned(), format!("http://{}/v2/", registry.address())];
    for ((user, password), url) in users.into_iter().zip(urls.iter().cycle()) {
        let mut job = with_image(&image);
        job["epilogue_always_commands"] = Value::Null;
        job["compose"]["image_pull_credentials"] = json!([generic(url, user, password)]);
        let finished = run(&job);
        let steps = finished.steps();
        let expected = "Setting up credentials for Docker\n".to_owned();
        assert_eq!(steps[0], (CREDENTIALS.to_owned(), expected, 0), "{user}");
        let (title, output, exit_code) = &steps[1];
        assert_eq!((title.as_str(), *exit_code), (PULL, 0), "{output}");
        assert!(output.starts_with(&format!("{image}: pulling\n")), "{output}");
        assert!(output.contains(&format!("{image}: pulled, 2 of 2 layers")), "{output}");
        assert_eq!(finished.commands(), [("hi\n".into(), 0)]);
        forget(&image);
    }
}

#[test]
#[cfg_attr(
    not(all(has_docker, has_registry)),
    ignore = "needs a Docker Engine and docker-registry"
)]
fn a_refused_password_fails_the_job_with_the_registrys_message() {
    let mut registry = Registry::start();
    let image = registry.push("agent-test/bash", "app");
    let mut job = with_image(&image);
    job["compose"]["image_pull_credentials"] =
        json!([generic(registry.address(), USER, "canary-wrong")]);
    let finished = run(&job);
    let (title, output, _) = failed_step(&finished);
    assert_eq!((title.as_str(), finished.steps().len()), (CREDENTIALS, 1));
    assert!(output.starts_with("Setting up credentials for Docker\n"), "{output}");
    assert!(output.contains("401 Unauthorized"), "{output}");
    assert!(!format!("{finished:?}").contains("canary"), "{finished:?}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn incomplete_credentials_fail_the_job_and_name_the_missing_variable() {
    let credentials = json!({ "env_vars": variables(&[
        ("DOCKER_CREDENTIAL_TYPE", b"GenericDocker"),
        ("DOCKER_PASSWORD", b"canary"),
    ]) });
    let unknown = json!({ "env_vars": variables(&[("DOCKER_CREDENTIAL_TYPE", b"Quay")]) });
    for (credentials, reason) in [(credentials, "DOCKER_URL is missing"), (unknown, "`Quay`")] {
        let mut job = with_image("agent-test/bash");
        job["compose"]["image_pull_credentials"] = json!([credentials]);
        let finished = served(&job);
        let (title, output, _) = failed_step(&finished);
        assert_eq!(title, CREDENTIALS);
        assert!(output.contains(reason) && !output.contains("canary"), "{output}");
    }
}

#[test]
#[cfg_attr(
    not(all(has_docker, has_registry)),
    ignore = "needs a Docker Engine and docker-registry"
)]
fn a_missing_or_private_image_fails_the_pull_with_the_registrys_message() {
    let mut registry = Registry::start();
    let private = registry.push("agent-test/bash", "app");
    let missing = format!("{}/missing:3", registry.address());
    let (title, output, _) = failed_step(&run(&with_image(&private)));
    assert_eq!(title, PULL);
    assert!(output.contains("no basic auth credentials"), "{output}");
    let mut job = with_image(&missing);
    job["compose"]["image_pull_credentials"] = json!([generic(registry.address(), USER, PASSWORD)]);
    let (title, output, _) = failed_step(&run(&job));
    assert_eq!(title, PULL);
    assert!(output.contains(&missing) && output.contains("manifest unknown"), "{output}");
}

#[test]
#[cfg_attr(
    not(all(has_docker, has_registry)),
    ignore = "needs a Docker Engine and docker-registry"
)]
fn images_without_credentials_of_the_job_are_pulled_with_those_of_the_agents_user() {
    let mut registry = Registry::for_users(&[("own", "of the user")]);
    let mut other = Registry::for_users(&[("job", "of the job")]);
    let image = registry.push("agent-test/bash", "app");
    let side = other.push("agent-test/service", "web");
    let world = World::new();
    let path = world.home().join(".docker/config.json");
    fs::create_dir(path.parent().unwrap()).unwrap();
    let auth = base64(b"own:of the user");
    let config = json!({ "auths": { registry.address(): { "auth": auth } }, "x": [] }).to_string();
    fs::write(&path, &config).unwrap();

    let mut job = with_image(&image);
    let containers = job["compose"]["containers"].as_array_mut().unwrap();
    containers.push(json!({ "name": "web", "image": side }));
    job["commands"] = json!([{ "directive": "wget -q -O - http://web:8080" }]);
    job["epilogue_always_commands"] = Value::Null;
    job["compose"]["image_pull_credentials"] =
        json!([generic(other.address(), "job", "of the job")]);
    assert_eq!(run_in(&world, &job).commands(), [("service\n".into(), 0)]);
    assert_eq!(fs::read_to_string(&path).unwrap(), config);
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
}

#[test]
#[cfg_attr(
    not(all(has_docker, has_registry)),
    ignore = "needs a Docker Engine and docker-registry"
)]
fn a_job_logs_in_builds_runs_pushes_and_pulls_by_itself() {
    let registry = Registry::start();
    let address = registry.address();
    let built = format!("{address}/built:{}", unique());
    let _built = Owned(&["image", "rm", "-f"], built.clone());
    let from =
        "FROM agent-test/nobash\\nRUN echo by the job >/built\\nCMD [\"cat\", \"/built\"]\\n";
    let mut job = job(
        "docker",
        &[
            &format!("printf %s \"$PASSWORD\" | docker login -u {USER} --password-stdin {address}"),
            &format!(
                "printf '{from}' | DOCKER_BUILDKIT=0 docker build --network none -q -t {built} - >/tmp/built"
            ),
            &format!("docker run --rm --network none {built}"),
            &format!("docker push -q {built}; docker image rm {built} >/tmp/removed"),
            &format!("docker pull -q {built}"),
            "docker ps -q --filter id=$(hostname) | wc -l",
        ],
    );
    job["env_vars"] = variables(&[("PASSWORD", PASSWORD.as_bytes())]);
    let commands = run(&job).commands();
    assert!(commands[0].0.contains("Login Succeeded"), "{commands:?}");
    assert_eq!(commands[2], ("by the job\n".into(), 0), "{commands:?}");
    assert_eq!(commands[4..], [(format!("{built}\n"), 0), ("1\n".into(), 0)], "{commands:?}");
}

/// Returns the files below `path` that contain one of `secrets`.
fn files_with(path: &Path, secrets: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path).unwrap().flatten() {
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            found.extend(files_with(&path, secrets));
        } else if let Ok(content) = fs::read(&path)
            && secrets.iter().any(|s| memchr::memmem::find(&content, s.as_bytes()).is_some())
        {
            found.push(path.display().to_string());
        }
    }
    found
}

/// Returns the processes that have one of `secrets` among their arguments.
fn processes_with(secrets: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if secrets.iter().any(|s| memchr::memmem::find(&arguments, s.as_bytes()).is_some()) {
            found.push(String::from_utf8_lossy(&arguments).replace('\0', " "));
        }
    }
    found
}

#[test]
#[cfg_attr(
    not(all(has_docker, has_registry)),
    ignore = "needs a Docker Engine and docker-registry"
)]
fn passwords_are_in_no_log_no_argument_and_no_remaining_file() {
    let password = format!("canary-{}", unique());
    let value = format!("value-{}", unique());
    let mut registry = Registry::for_users(&[("secretive", &password)]);
    let image = registry.push("agent-test/docker", "app");
    let mut job = with_image(&image);
    job["epilogue_always_commands"] = Value::Null;
    let login = format!(
        "printf %s \"$VALUE\" | docker login -u x --password-stdin {} 2>&1 | wc -l",
        registry.address()
    );
    job["commands"] = json!([{ "directive": login }]);
    job["env_vars"] = variables(&[("VALUE", value.as_bytes())]);
    job["files"] = json!([{ "path": "key", "content": base64(value.as_bytes()), "mode": "0600" }]);
    let credentials = generic(registry.address(), "secretive", &password);
    job["compose"]["image_pull_credentials"] = json!([credentials]);
    let basic = base64(format!("secretive:{password}").as_bytes());
    let plain = [&password, &value].map(String::clone);
    let encoded =
        plain.iter().map(|secret| base64(secret.as_bytes()).trim_end_matches('=').to_owned());
    let secrets: Vec<_> = plain.iter().cloned().chain(encoded).chain([basic]).collect();

    let world = World::new();
    let agent = ServeAgent::start_with(&world, |command| {
        command.env("SEMAPHORE_AGENT_LOG_LEVEL", "trace");
    });
    let (done, mut seen) = (AtomicBool::new(false), Vec::new());
    let finished = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut seen = Vec::new();
            while !done.load(Ordering::SeqCst) && seen.is_empty() {
                seen = processes_with(&secrets);
                test_support::pause();
            }
            seen
        });
        let finished = agent.run_to_end(&job);
        done.store(true, Ordering::SeqCst);
        seen = watch.join().unwrap();
        finished
    });
    assert_eq!(finished.result(), "passed", "{finished:#?}");
    assert_eq!(seen, [""; 0]);
    let home = world.home();
    assert_eq!(files_with(home.parent().unwrap(), &secrets), [""; 0]);
    for secret in &secrets {
        assert!(!format!("{finished:?}").contains(secret), "{finished:?}");
        assert!(!agent.own_log().contains(secret), "{secret} is in the agent's own log");
    }
    assert_eq!(leftovers_of(&job), [""; 0]);
}
