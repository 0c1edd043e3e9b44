//! Entrypoints and commands of containers, and the error if an entrypoint does not exist.

use serde_json::{Value, json};

use test_support::docker::{
    Owned, container, docker_prints, job, job_in, leftovers_of, make_images,
};
use test_support::{Finished, World, unique};

/// An entrypoint that only works as process 1, like some init systems. The script reads its process ID from
/// `/proc`, because `$$` would need escaping for Compose.
const FIRST_ONLY: &str = r#"sh -c 'read pid rest </proc/self/stat; [ "$pid" = 1 ] || exit 100; export FIRST=yes; exec "$@"' -"#;

/// Leaves orphans that end at once, and waits until all zombies are reaped.
const ORPHANS: &str = "for i in 1 2 3 4 5; do sh -c 'sleep 0.1 & sleep 0.1 &'; done; sleep 0.3
for i in {1..100}; do
  grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null >/tmp/zombies || break
  sleep 0.1
done
! cat /tmp/zombies | grep .";

/// Runs a job, and asserts that nothing of it is left.
fn run(job: &Value) -> Finished {
    let finished = World::new().run(&job.to_string());
    assert_eq!(leftovers_of(job), [""; 0]);
    finished
}

fn with_entrypoint(entrypoint: &str, commands: &[&str]) -> Value {
    let mut job = job("bash", commands);
    job["compose"]["containers"][0]["entrypoint"] = entrypoint.into();
    job
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn the_jobs_entrypoint_runs_as_process_1() {
    let finished = run(&with_entrypoint(FIRST_ONLY, &["echo $FIRST", ORPHANS, "echo on"]));
    let expected = ["yes\n", "", "on\n"].map(|output| (output.to_owned(), 0));
    assert_eq!(finished.commands(), expected, "{finished:#?}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn an_images_entrypoint_runs_as_process_1() {
    make_images();
    let name = unique();
    let _container = Owned(&["rm", "-f"], name.clone());
    docker_prints(&["create", "--name", &name, "agent-test/bash"]);
    let image = Owned(&["image", "rm"], format!("agent-test/first:{name}"));
    let script = r#"read pid rest </proc/self/stat; [ "$pid" = 1 ] || exit 100; exec "$@""#;
    let entrypoint = format!("ENTRYPOINT {}", json!(["sh", "-c", script, "-"]));
    docker_prints(&["commit", "--change", &entrypoint, &name, &image.1]);
    let mut job = job("bash", &["echo hi"]);
    job["compose"]["containers"][0]["image"] = image.1.clone().into();
    let finished = run(&job);
    assert_eq!(finished.commands(), [("hi\n".into(), 0)], "{finished:#?}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn two_dollar_signs_in_a_command_or_an_entrypoint_become_one() {
    let script = r#"sh -c 'A="of web"; echo "$$A $$HOME, $A," "$$(echo 1)" >/www/index.html; exec httpd -f -p 8080 -h /www'"#;
    for field in ["command", "entrypoint"] {
        let mut web = container("web", "service");
        web[field] = script.into();
        let fetch = "wget -q -O - http://web:8080";
        let finished = run(&job_in(json!([container("main", "bash"), web]), &[fetch]));
        let expected = "of web /root, of web, 1\n";
        assert_eq!(finished.commands(), [(expected.into(), 0)], "{field}: {finished:#?}");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn four_dollar_signs_become_two_for_the_shell_of_a_command() {
    let mut web = container("web", "service");
    web["command"] =
        r#"sh -c 'echo "$$$$" >/www/index.html; exec httpd -f -p 8080 -h /www'"#.into();
    let fetch = "wget -q -O - http://web:8080";
    let finished = run(&job_in(json!([container("main", "bash"), web]), &[fetch]));
    // `$$` is the shell's own process ID: it is process 1 of its container.
    assert_eq!(finished.commands(), [("1\n".into(), 0)], "{finished:#?}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn two_dollar_signs_in_the_main_containers_entrypoint_become_one() {
    let entrypoint = r#"sh -c 'A="$$HOME"; export A; exec "$$@"' -"#;
    let finished = run(&with_entrypoint(entrypoint, &["echo $A $$"]));
    let commands = finished.commands();
    let printed = commands.first().map(|(output, _)| output.as_str()).unwrap_or_default();
    // The text for the job's own shell is not changed.
    let number =
        printed.strip_prefix("/root ").and_then(|number| number.trim().parse::<u32>().ok());
    assert!(number.is_some(), "{finished:#?}");
}

/// Returns the output of the failed start of the containers.
fn why(finished: &Finished) -> String {
    let steps = finished.steps();
    let (title, output, exit_code) = steps.last().unwrap();
    assert_eq!((title.as_str(), *exit_code), ("Starting the docker image...", 1), "{steps:#?}");
    assert_eq!(finished.result(), "failed");
    assert!(!output.contains("__agent"), "{output}");
    let begin = "Starting a new bash session.\nFailed to start the docker image\n";
    output.strip_prefix(begin).unwrap_or_else(|| panic!("{output}")).to_owned()
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_missing_entrypoint_is_named_and_bash_is_not_blamed() {
    for entrypoint in ["/not/there", "not-there --flag", "/etc/passwd"] {
        let why = why(&run(&with_entrypoint(entrypoint, &["echo not reached"])));
        let program = entrypoint.split(' ').next().unwrap();
        assert!(why.contains(program) && !why.contains("no `bash`"), "{why}");
        assert!(why.contains("entrypoint"), "{why}");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_missing_entrypoint_of_the_image_is_named_and_bash_is_not_blamed() {
    make_images();
    let name = unique();
    let _container = Owned(&["rm", "-f"], name.clone());
    docker_prints(&["create", "--name", &name, "agent-test/bash"]);
    let image = Owned(&["image", "rm"], format!("agent-test/broken:{name}"));
    docker_prints(&["commit", "--change", r#"ENTRYPOINT ["/not/there"]"#, &name, &image.1]);
    let mut job = job("bash", &["echo not reached"]);
    job["compose"]["containers"][0]["image"] = image.1.clone().into();
    let why = why(&run(&job));
    assert!(why.contains("/not/there") && why.contains("entrypoint"), "{why}");
    assert!(!why.contains("no `bash`"), "{why}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn an_entrypoint_that_finds_no_bash_in_the_image_says_so() {
    let mut job = with_entrypoint(r#"sh -c 'exec "$$@"' -"#, &["echo not reached"]);
    job["compose"]["containers"][0]["image"] = "agent-test/nobash".into();
    let why = why(&run(&job));
    assert!(why.contains("agent-test/nobash has no `bash`"), "{why}");
}
