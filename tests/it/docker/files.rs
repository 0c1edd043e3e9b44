//! Files that a job injects into its containers.

use serde_json::{Value, json};

use test_support::docker::{container, docker_prints, file, job, job_in, leftovers_of};
use test_support::{Finished, World};

/// Runs a job, and asserts that nothing of it is left.
fn run(job: &Value) -> Finished {
    let finished = World::new().run(&job.to_string());
    assert_eq!(leftovers_of(job), [""; 0]);
    finished
}

/// Returns output and exit code of the step that injects files.
fn injected(finished: &Finished) -> (String, i32) {
    let steps = finished.steps();
    let step = steps.iter().find(|(title, ..)| title == "Injecting Files");
    let (_, output, exit_code) = step.unwrap_or_else(|| panic!("nothing injected: {steps:?}"));
    (output.clone(), *exit_code)
}

/// Returns all byte values, repeated up to this length.
fn all_bytes(length: usize) -> Vec<u8> {
    (0..=255).cycle().take(length).collect()
}

fn digest(content: &[u8]) -> String {
    let digest = openssl::hash::hash(openssl::hash::MessageDigest::sha256(), content).unwrap();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn contents_arrive_byte_for_byte() {
    let contents =
        [Vec::new(), vec![0], all_bytes(256), b"no end of line".to_vec(), all_bytes(200_000)];
    let files =
        contents.iter().enumerate().map(|(i, content)| file(&i.to_string(), content, "0600"));
    let mut job = job("bash", &["cat 0 1 2 3 4 | wc -c", "sha256sum 0 1 2 3 4"]);
    job["files"] = files.collect();
    let finished = run(&job);
    let sums =
        contents.iter().enumerate().map(|(i, content)| format!("{}  {i}\n", digest(content)));
    let length: usize = contents.iter().map(Vec::len).sum();
    assert_eq!(finished.commands(), [(format!("{length}\n"), 0), (sums.collect(), 0)]);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn paths_are_below_the_home_directory_or_absolute_and_belong_to_the_containers_user() {
    let files = [
        ("plain", "0600", "/home/dev/plain", "600"),
        ("a/new directory/it's \"$x\"", "644", "/home/dev/a/new directory/it's \"$x\"", "644"),
        ("~/.ssh/id_rsa", "0400", "/home/dev/.ssh/id_rsa", "400"),
        ("/tmp/deep/er/file", "0751", "/tmp/deep/er/file", "751"),
        ("-n", "u+x", "/home/dev/-n", "700"),
        ("symbolic", "u=rwx,g+r,o=", "/home/dev/symbolic", "740"),
        ("Grüße", "1644", "/home/dev/Grüße", "1644"),
    ];
    let mut job = job("bash:dev", &["cd /", "umask"]);
    let commands = job["commands"].as_array_mut().unwrap();
    for (_, _, path, _) in files {
        let quoted = format!("'{}'", path.replace('\'', r"'\''"));
        commands.push(json!({ "directive": format!("stat -c '%U:%G %a' {quoted}; cat {quoted}") }));
    }
    commands.push(json!({ "directive": "touch ~/a/new\\ directory/more && ls ~/a/new*" }));
    job["files"] = files.iter().map(|(path, mode, ..)| file(path, b"content\n", mode)).collect();
    let finished = run(&job);
    assert_eq!(finished.result(), "passed", "{:#?}", finished.steps());
    let announced =
        files.map(|(path, mode, ..)| format!("Injecting {path} with file mode {mode}\n"));
    assert_eq!(injected(&finished), (announced.concat(), 0));
    let commands = finished.commands();
    for ((path, _, _, mode), command) in files.iter().zip(&commands[2..]) {
        assert_eq!(command.0, format!("dev:dev {mode}\ncontent\n"), "{path}");
    }
    // The user's shell is as in the image, not as on the agent's machine.
    assert_eq!(commands[1].0, "0022\n");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn an_existing_file_is_replaced() {
    let mut job = job("bash", &["cat /etc/group; stat -c %a /etc/group"]);
    job["files"] = json!([file("/etc/group", b"root:x:0:\n", "0640")]);
    assert_eq!(run(&job).commands(), [("root:x:0:\n640\n".into(), 0)]);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_mode_that_chmod_refuses_fails_the_job() {
    for mode in ["wrong", "0999", "u+", "'; touch /tmp/x; '"] {
        let mut job = job("bash", &["echo not reached"]);
        job["files"] = json!([file("f", b"x", mode), file("g", b"x", "0600")]);
        job["epilogue_always_commands"] = json!([{ "directive": "echo epilogue; ls /tmp" }]);
        let finished = run(&job);
        let (output, exit_code) = injected(&finished);
        if mode == "u+" && exit_code == 0 {
            // Some versions of chmod accept this mode.
            continue;
        }
        let expected =
            format!("Injecting f with file mode {mode}\nFailed to set file mode to {mode}\n");
        assert!(output.starts_with(&expected), "{output}");
        assert_eq!(exit_code, 1);
        assert_eq!(finished.commands(), [("epilogue\n".into(), 0)]);
        assert_eq!(finished.result(), "failed");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_file_that_can_not_be_written_fails_the_job_with_the_reason() {
    for (path, reason) in [
        ("/etc/passwd/f", "Not a directory"),
        ("/root/f", "Permission denied"),
        ("/new/f", "Permission denied"),
        ("/tmp", "Is a directory"),
    ] {
        let mut job = job("bash:dev", &["echo not reached"]);
        job["files"] = json!([file(path, b"x", "0600")]);
        let finished = run(&job);
        let (output, exit_code) = injected(&finished);
        let expected = format!("Injecting {path} with file mode 0600\n");
        assert!(output.starts_with(&expected) && exit_code == 1, "{output}");
        let rest = output.strip_prefix(&expected).unwrap();
        assert!(rest.contains(path), "{rest}");
        let taken_for_one = path == "/etc/passwd/f" && rest.contains("File exists");
        assert!(rest.contains(reason) || taken_for_one, "{rest}");
        assert!(!rest.contains("__agent"), "{rest}");
        assert_eq!((finished.result(), finished.commands().len()), ("failed", 0));
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn containers_have_their_own_files_before_they_start() {
    let mut containers = json!([container("main", "bash:dev"), container("web", "service")]);
    containers[0]["files"] = json!([file("of-main", b"main\n", "u+x")]);
    let script = "cd; stat -c '%U:%G %a' f .x/y >/tmp/index.html; touch .x/more; cat f .x/y >>/tmp/index.html; \
                  cp f /tmp/f; exec httpd -f -p 8080 -h /tmp";
    containers[1]["command"] = format!("sh -c \"{script}\"").into();
    containers[1]["user"] = "dev".into();
    let content = all_bytes(100_000);
    containers[1]["files"] = json!([
        file("f", b"one\n", "0640"),
        file("~/.x/y", b"two\n", "u+x,g=r"),
        file("/tmp/big", &content, "0644"),
    ]);
    let job = job_in(
        containers,
        &[
            "stat -c '%U %a' ~/of-main; cat ~/of-main; ls ~",
            "wget -q -O - http://web:8080/",
            "wget -q -O - http://web:8080/big | sha256sum",
            "wget -q -O - http://web:8080/.x/more || true",
        ],
    );
    let finished = run(&job);
    let commands = finished.commands();
    assert_eq!(commands[0], ("dev 700\nmain\nof-main\n".into(), 0));
    assert_eq!(commands[1], ("dev:dev 640\ndev:dev 740\none\ntwo\n".into(), 0));
    assert_eq!(commands[2], (format!("{}  -\n", digest(&content)), 0));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_container_whose_file_can_not_be_written_does_not_start() {
    let mut containers = json!([container("main", "bash"), container("web", "service")]);
    for (path, mode, reason) in [
        ("/etc/passwd/f", "0600", "/etc/passwd"),
        ("f", "wrong", "Failed to set file mode to wrong\n"),
    ] {
        containers[1]["files"] = json!([file(path, b"x", mode)]);
        let finished = run(&job_in(containers.clone(), &["echo not reached"]));
        let steps = finished.steps();
        let (title, output, exit_code) = steps.last().unwrap();
        assert_eq!((title.as_str(), *exit_code), ("Starting the docker image...", 1));
        assert!(output.contains("Failed to start the docker image\n"), "{output}");
        assert!(output.contains(reason) && output.contains("web"), "{output}");
        assert_eq!(finished.result(), "failed");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn no_process_argument_contains_a_file_of_a_job() {
    let secret = "canary-of-a-file";
    let mut job =
        job("bash", &["cat f", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '", "ls -la /dev/shm"]);
    job["files"] = json!([file("f", secret.as_bytes(), "0600")]);
    let finished = run(&job);
    let commands = finished.commands();
    assert_eq!(commands[0].0, secret);
    assert!(!commands[1].0.contains(secret), "{commands:?}");
    let scripts = commands[2].0.lines().filter(|line| line.contains(".agent-"));
    for line in scripts {
        assert!(line.starts_with("-rw-------"), "{line}");
    }
    let label = format!("label=semaphore-agent.job={}", job["job_id"].as_str().unwrap());
    assert_eq!(docker_prints(&["ps", "-aq", "--filter", &label]), "");
}
