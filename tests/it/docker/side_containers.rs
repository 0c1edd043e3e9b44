//! The side containers of a job: found by name, awaited, and explained if they fail.

use serde_json::{Value, json};

use test_support::docker::{container, docker_prints, job_in, leftovers_of, variables};
use test_support::{Finished, World};

const START: &str = "Starting the docker image...";

const FETCH: &str = "wget -q -O - http://web:8080";

/// Runs a job, and asserts that nothing of it is left on the engine.
fn run(job: &Value) -> Finished {
    let finished = World::new().run(&job.to_string());
    assert_eq!(leftovers_of(job), [""; 0]);
    finished
}

/// Returns a job that fetches a page from this container, called `web`.
#[expect(clippy::needless_pass_by_value, reason = "written where it is passed")]
fn job_with(web: Value) -> Value {
    job_in(json!([container("main", "bash"), web]), &[FETCH])
}

/// Returns a container of this image that runs a script.
fn scripted(image: &str, script: &str) -> Value {
    let mut web = container("web", image);
    web["command"] = format!("sh -c \"{script}\"").into();
    web
}

/// Returns the output of the start of the containers, without its first line.
fn shown_at_start(finished: &Finished) -> String {
    let steps = finished.steps();
    let (_, output, exit_code) = steps.iter().find(|(title, ..)| title == START).unwrap();
    assert_eq!(*exit_code, 0, "{output}");
    output.strip_prefix("Starting a new bash session.\n").unwrap().to_owned()
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn commands_start_when_exposed_ports_accept_connections() {
    let late = "sleep 2; echo late >/www/index.html; exec httpd -f -p 8080 -h /www";
    let finished = run(&job_with(scripted("service", late)));
    assert_eq!(finished.commands(), [("late\n".into(), 0)]);
    assert_eq!(shown_at_start(&finished), "");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn commands_start_when_health_checks_succeed() {
    let finished = run(&job_with(container("web", "service:healthy-later")));
    assert_eq!(finished.commands(), [("service\n".into(), 0)]);
    assert_eq!(shown_at_start(&finished), "");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn an_unhealthy_container_gives_a_warning_with_its_last_lines_and_the_job_continues() {
    let script = "exec >&2; seq 30; echo 'out of memory'; exec httpd -f -p 8080 -h /www";
    let finished = run(&job_with(scripted("service:sick", script)));
    let shown = shown_at_start(&finished);
    let expected = "Warning: web is unhealthy according to its health check; its last output:\n";
    assert!(shown.starts_with(expected), "{shown}");
    assert!(shown.contains("  30\n") && shown.contains("  out of memory\n"), "{shown}");
    assert_eq!(shown.lines().count(), 21, "{shown}");
    assert_eq!(finished.commands(), [("service\n".into(), 0)]);
    assert_eq!(finished.result(), "passed");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_container_that_ends_at_once_gives_a_warning_with_its_output_and_the_job_continues() {
    let finished = run(&job_with(scripted("service", "echo no license; exit 3")));
    let expected = "Warning: web has ended with exit code 3; its last output:\n  no license\n";
    assert_eq!(shown_at_start(&finished), expected);
    let (output, exit_code) = &finished.commands()[0];
    assert!(output.contains("web") && *exit_code != 0, "{output}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_port_without_a_listener_gives_a_warning_and_the_job_continues() {
    let mut job = job_with(scripted("service", "echo thinking; exec sleep 1000"));
    job["commands"][0]["directive"] = "echo on".into();
    let finished = run(&job);
    let expected = "Warning: web accepts no connection after 10 s; its last output:\n  thinking\n";
    assert_eq!(shown_at_start(&finished), expected);
    assert_eq!(finished.commands(), [("on\n".into(), 0)]);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_container_that_can_not_start_fails_the_job_with_its_name() {
    for (field, value) in [("user", "stranger"), ("entrypoint", "/not/there")] {
        let mut web = container("web", "service");
        web[field] = value.into();
        let finished = run(&job_with(web));
        let steps = finished.steps();
        let (title, output, exit_code) = steps.last().unwrap();
        assert_eq!((title.as_str(), *exit_code, finished.result()), (START, 1, "failed"));
        let expected = "Starting a new bash session.\nFailed to start the docker image\nweb: ";
        assert!(output.starts_with(expected) && output.contains(value), "{output}");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn command_entrypoint_user_and_variables_work_as_in_compose() {
    let script = "(id -un; echo \\\"$0,$1,$2,$A,$ENTRYPOINT_RAN\\\"; echo \\\"$B\\\" | xxd -p) \
                  >/tmp/index.html; exec httpd -f -p 8080 -h /tmp";
    let script = format!("sh -c \"{script}\"");
    // With an entrypoint and a command, both are the job's.
    let mut both = container("web", "service");
    both["entrypoint"] = script.clone().into();
    both["command"] = "zero 'one word' \"two \\\"words\\\"\"".into();
    // With only a command, the image's entrypoint stays.
    let mut command = container("web", "bash:entrypoint");
    command["command"] = format!("{script} zero").into();
    // With only an entrypoint, the image's command is dropped; otherwise it would be in `$0`.
    let mut entrypoint = container("web", "service");
    entrypoint["entrypoint"] = script.into();
    for (mut web, expected) in [
        (both, "zero,one word,two \"words\",a=b c,"),
        (command, "zero,,,a=b c,yes"),
        (entrypoint, "sh,,,a=b c,"),
    ] {
        web["user"] = "dev".into();
        web["env_vars"] = variables(&[("A", b"a=b c"), ("B", b"'\"$x\n\\n")]);
        let mut job = job_with(web);
        // The agent does not wait for ports that the image does not expose.
        let fetch = format!("until {FETCH} 2>/tmp/x; do sleep 0.1; done");
        job["commands"][0]["directive"] = fetch.into();
        let expected = format!("dev\n{expected}\n272224780a5c6e0a\n");
        assert_eq!(run(&job).commands(), [(expected, 0)]);
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn side_containers_have_neither_the_engine_nor_the_jobs_variables() {
    let tell = "(ls /var/run /run; env) >/www/index.html 2>&1; exec httpd -f -p 8080 -h /www";
    let mut job = job_with(scripted("service", tell));
    job["env_vars"] = variables(&[("CANARY", b"of the job")]);
    let finished = run(&job);
    let (environment, exit_code) = &finished.commands()[0];
    assert!(*exit_code == 0 && environment.contains("PATH="), "{environment}");
    assert!(
        !environment.contains("docker.sock") && !environment.contains("CANARY"),
        "{environment}"
    );
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn side_containers_reach_the_main_one_and_each_other() {
    let relay = "wget -q -O /www/index.html http://first:8080; exec httpd -f -p 8080 -h /www";
    let mut second = scripted("service", &format!("sleep 1; {relay}"));
    second["name"] = "second".into();
    let containers = json!([container("main", "bash"), container("first", "service"), second]);
    let ping = "ping -c 1 -W 5 main >/dev/null && echo myself";
    let job = job_in(containers, &["wget -q -O - http://second:8080", ping]);
    let expected = [("service\n".into(), 0), ("myself\n".into(), 0)];
    assert_eq!(run(&job).commands(), expected);
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn two_jobs_at_once_do_not_see_each_other() {
    let job = |text: &str, other: &str| {
        let serve = format!("echo {text} >/www/index.html; exec httpd -f -p 8080 -h /www");
        let mut job = job_with(scripted("service", &serve));
        let only_here = container(&format!("only-{text}"), "service");
        job["compose"]["containers"].as_array_mut().unwrap().push(only_here);
        let commands = [
            "echo running; until [[ -e /tmp/go ]]; do sleep 0.05; done".to_owned(),
            FETCH.to_owned(),
            format!("wget -q -O - http://only-{text}:8080"),
            format!("! nslookup only-{other} >/dev/null 2>&1"),
        ];
        job["commands"] = commands.iter().map(|text| json!({ "directive": text })).collect();
        job
    };
    let (world, other_world) = (World::new(), World::new());
    let (one, two) = (job("one", "two"), job("two", "one"));
    let (mut first, mut second) =
        (world.start(&one.to_string()), other_world.start(&two.to_string()));
    first.wait_for_output("running\n");
    second.wait_for_output("running\n");
    for job in [&one, &two] {
        let main = leftovers_of(job).into_iter().find_map(|line| {
            let name = line.split(' ').nth(1)?;
            name.ends_with("-main").then(|| name.to_owned())
        });
        let touch = ["exec", &main.unwrap(), "touch", "/tmp/go"];
        docker_prints(&touch);
    }
    for (running, text, job) in [(first, "one", &one), (second, "two", &two)] {
        let finished = running.finish();
        assert_eq!(finished.result(), "passed", "{finished:#?}");
        assert_eq!(finished.output(), format!("{text}\nservice\n"));
        assert_eq!(leftovers_of(job), [""; 0]);
    }
}
