//! Metrics of `agent serve`, and logs of its jobs as artifacts.

use std::fs;
use std::io::Read as _;
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use test_support::callbacks::CallbackServer;
use test_support::serve::{SECRET, ServeAgent};
use test_support::{
    RUN_FOR_EVER, RUNNING, World, base64, docker, job, processes_with, wait_for_file, wait_until,
};

fn metrics_to(host: &str, port: u16) -> impl FnOnce(&mut Command) {
    move |command| {
        command.args(["--statsd-host", host, "--statsd-port", &port.to_string()]);
    }
}

fn server() -> (UdpSocket, u16) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let port = socket.local_addr().unwrap().port();
    (socket, port)
}

fn datagram(socket: &UdpSocket) -> String {
    let mut bytes = [0; 2000];
    let length = socket.recv(&mut bytes).unwrap();
    String::from_utf8(bytes[..length].to_vec()).unwrap()
}

/// Checks a datagram and returns its duration in milliseconds.
fn duration(datagram: &str, name: &str, tag: &str) -> u64 {
    let ms = datagram.strip_prefix(&format!("{name}:"));
    let ms = ms.and_then(|rest| rest.strip_suffix(&format!("|ms|#{tag}")));
    ms.and_then(|ms| ms.parse().ok()).unwrap_or_else(|| panic!("{name} {tag}: {datagram:?}"))
}

#[test]
fn a_jobs_duration_is_measured() {
    let (socket, port) = server();
    let agent = ServeAgent::start_with(&World::new(), metrics_to("127.0.0.1", port));
    for (id, result, command) in
        [("1", "passed", "sleep 0.2"), ("2", "failed", "false"), ("3", "stopped", RUN_FOR_EVER)]
    {
        let began = SystemTime::now();
        agent.post_job(&job(id, &[command])).of_status(200);
        if result == "stopped" {
            agent.wait_for_log(id, RUNNING);
            agent.post("/stop", b"").of_status(200);
        }
        assert_eq!(agent.finish(id).result(), result);
        let tag = format!("result:{result}");
        let ms = duration(&datagram(&socket), "agent.prod.job.duration", &tag);
        assert!(u128::from(ms) <= began.elapsed().unwrap().as_millis(), "{ms}");
        assert!(result != "passed" || ms >= 200, "{ms}");
    }
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
fn every_image_is_measured() {
    let (socket, port) = server();
    let agent = ServeAgent::start_with(&World::new(), metrics_to("127.0.0.1", port));
    // One pull fails because nobody listens, the other because its upper-case name is invalid.
    let images =
        [("passed", "agent-test/bash", "success"), ("failed", "127.0.0.1:1/No", "failure")];
    for (result, image, rate) in images {
        let containers = json!([{ "name": "main", "image": image }]);
        let request = docker::job_in(containers, &["true"]);
        assert_eq!(agent.run_to_end(&request).result(), result);
        let tag = format!("image:{image}");
        duration(&datagram(&socket), "agent.prod.compose_ci.docker_pull.duration", &tag);
        let expected = format!("agent.prod.compose_ci.docker_pull.{rate}.rate:1|c|#{tag}");
        assert_eq!(datagram(&socket), expected);
        let tag = format!("result:{result}");
        duration(&datagram(&socket), "agent.prod.job.duration", &tag);
    }
}

#[test]
fn metrics_have_the_namespace_of_the_operator() {
    let (socket, port) = server();
    let agent = ServeAgent::start_with(&World::new(), |command| {
        command.env("SEMAPHORE_AGENT_STATSD_HOST", "localhost");
        command.env("SEMAPHORE_AGENT_STATSD_PORT", port.to_string());
        command.env("SEMAPHORE_AGENT_STATSD_NAMESPACE", "mine.here");
    });
    agent.run_to_end(&job("1", &["true"]));
    duration(&datagram(&socket), "mine.here.job.duration", "result:passed");
}

#[test]
fn a_missing_metrics_server_does_no_harm() {
    let (_, port) = server();
    let long = "x".repeat(300);
    let hosts = ["127.0.0.1", "no such host", "", "..", "300.1.1.1", "nothing.invalid", &long];
    for host in hosts {
        let agent = ServeAgent::start_with(&World::new(), |command| {
            command.env("SEMAPHORE_AGENT_STATSD_HOST", host);
            command.env("SEMAPHORE_AGENT_STATSD_PORT", port.to_string());
        });
        let began = SystemTime::now();
        for id in ["1", "2", "3"] {
            assert_eq!(agent.run_to_end(&job(id, &["true"])).result(), "passed", "{host}");
        }
        let took = began.elapsed().unwrap();
        assert!(took < Duration::from_secs(20), "{host}: {took:?}");
    }
}

#[test]
fn an_incomplete_address_is_a_warning() {
    let (socket, port) = server();
    for (flag, value) in [("--statsd-host", "127.0.0.1"), ("--statsd-port", &port.to_string())] {
        let agent = ServeAgent::start_with(&World::new(), |command| {
            command.args([flag, value]);
        });
        assert!(agent.own_log().contains("no metrics"), "{}", agent.own_log());
        assert_eq!(agent.run_to_end(&job("1", &["true"])).result(), "passed");
    }
    socket.set_nonblocking(true).unwrap();
    assert!(socket.recv(&mut [0; 100]).is_err());
}

/// A fake `artifact` program, which records its arguments and environment.
struct StandIn {
    directory: PathBuf,
}

impl StandIn {
    /// Makes the program; `rest` is run after the recording.
    fn new(world: &World, rest: &str) -> Self {
        let directory = world.home().with_file_name("stand-in");
        fs::create_dir(&directory).unwrap();
        let script = format!(
            "#!/bin/bash\ncd {0}\nprintf '%s\\n' \"$@\" >> args\nenv > environment\n\
             cp \"$3\" text\nstat -c %a \"${{3%/*/*}}\" > mode\nmv environment env\n{rest}\n",
            directory.display()
        );
        let program = directory.join("artifact");
        fs::write(&program, script).unwrap();
        fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
        Self { directory }
    }

    /// Puts the program on the agent's PATH.
    fn found(&self) -> impl FnOnce(&mut Command) {
        let path = format!("{}:{}", self.directory.display(), std::env::var("PATH").unwrap());
        move |command| {
            command.env("PATH", path);
        }
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.directory.join(name)).unwrap_or_default()
    }

    fn was_used(&self) -> bool {
        self.directory.join("env").exists()
    }
}

fn uploading(mut job: Value, condition: &str) -> Value {
    let variables = [
        ("SEMAPHORE_AGENT_UPLOAD_JOB_LOGS", condition),
        ("SEMAPHORE_ARTIFACT_TOKEN", "the token"),
        ("SEMAPHORE_ORGANIZATION_URL", "https://org.example"),
        ("OTHER", "of no concern"),
    ];
    job["env_vars"] = variables
        .map(|(name, value)| json!({ "name": name, "value": base64(value.as_bytes()) }))
        .into();
    job
}

#[test]
fn a_log_becomes_an_artifact_if_the_job_requests_it() {
    let world = World::new();
    let stand_in = StandIn::new(&world, "");
    let agent = ServeAgent::start_with(&world, stand_in.found());
    for condition in ["never", "", "when-trimmed"] {
        agent.run_to_end(&uploading(job(&format!("not-{condition}"), &["true"]), condition));
        assert!(!stand_in.was_used(), "{condition}");
    }
    let mut request = uploading(job("id-1", &["printf 'a\\nb\\n'; exit 1"]), "always");
    request["commands"][0]["alias"] = "the title".into();
    assert_eq!(agent.run_to_end(&request).result(), "failed");
    let args = stand_in.read("args");
    let args: Vec<_> = args.lines().collect();
    assert_eq!([args[0], args[1]], ["push", "job"]);
    assert_eq!(args[3..], ["-d", "agent/job_logs.txt"]);
    assert!(!PathBuf::from(args[2]).exists(), "{}", args[2]);
    assert_eq!(stand_in.read("mode"), "700\n");
    let text = stand_in.read("text");
    assert!(text.contains("the title\nRunning: printf 'a\\nb\\n'; exit 1\na\nb\n"), "{text}");
    assert!(text.contains("Exporting environment variables\nExporting OTHER\n"), "{text}");
    assert!(!text.contains("of no concern") && !text.contains("\"event\""), "{text}");
    let environment = stand_in.read("env");
    let lines: Vec<_> = environment.lines().collect();
    for variable in [
        "SEMAPHORE_ARTIFACT_TOKEN=the token",
        "SEMAPHORE_ORGANIZATION_URL=https://org.example",
        "SEMAPHORE_JOB_ID=id-1",
    ] {
        assert!(lines.contains(&variable), "{environment}");
    }
    assert!(!environment.contains(SECRET) && !environment.contains("OTHER="), "{environment}");
}

#[test]
fn an_upload_comes_between_the_archivator_and_the_teardown() {
    let world = World::new();
    let stand_in = StandIn::new(&world, "until [[ -e go ]]; do sleep 0.01; done");
    let agent = ServeAgent::start_with(&world, stand_in.found());
    let server = CallbackServer::start();
    let mut request = uploading(job("1", &["true"]), "always");
    request["callbacks"] = json!({ "teardown_finished": server.url("/teardown_finished") });
    agent.post_job(&request).of_status(200);
    agent.wait_for_log("1", "job_finished");
    server.assert_silent();
    assert!(!stand_in.was_used());
    agent.archive("1");
    wait_for_file(&stand_in.directory.join("env"));
    server.assert_silent();
    assert_eq!(agent.get("/status").json()["state"], "job-received");
    fs::write(stand_in.directory.join("go"), "").unwrap();
    assert_eq!(server.next().path, "/teardown_finished");
    agent.wait_for_state("waiting-for-job");
}

#[test]
fn a_log_that_the_platform_truncates_becomes_an_artifact() {
    let world = World::new();
    let stand_in = StandIn::new(&world, "");
    let agent = ServeAgent::start_with(&world, stand_in.found());
    for (id, most, used) in [("1", 1_000_000, false), ("2", 3000, true)] {
        let mut request =
            uploading(job(id, &["head -c 5000 /dev/zero | tr '\\0' x"]), "when-trimmed");
        request["logger"] = json!({ "method": "pull", "max_size_in_bytes": most });
        agent.run_to_end(&request);
        assert_eq!(stand_in.was_used(), used, "{most}");
    }
    assert!(stand_in.read("text").contains(&"x".repeat(5000)));
}

#[test]
fn a_long_log_is_compressed() {
    let world = World::new();
    let stand_in = StandIn::new(&world, "");
    let found = stand_in.found();
    let agent = ServeAgent::start_with(&world, |command| {
        found(command);
        command.env("SEMAPHORE_AGENT_LOGS_COMPRESSION_SIZE", "1048576");
    });
    agent.run_to_end(&uploading(job("1", &["head -c 1048576 /dev/zero | tr '\\0' x"]), "always"));
    assert!(stand_in.read("args").ends_with(".gz\n-d\nagent/job_logs.txt.gz\n"));
    let packed = fs::File::open(stand_in.directory.join("text")).unwrap();
    let mut text = String::new();
    flate2::read::GzDecoder::new(packed).read_to_string(&mut text).unwrap();
    assert!(text.contains(&"x".repeat(1_048_576)));
}

#[test]
fn a_failed_upload_has_no_other_effect() {
    for (rest, condition, why) in [
        ("exit 3", "always", "exit status: 3"),
        ("kill -9 $$", "always", "signal: 9"),
        ("", "sometimes", "never, always, when-trimmed"),
    ] {
        let world = World::new();
        let agent = ServeAgent::start_with(&world, StandIn::new(&world, rest).found());
        let finished = agent.run_to_end(&uploading(job("1", &["true"]), condition));
        assert_eq!(finished.result(), "passed", "{why}");
        agent.wait_for_own_log("not uploaded");
        assert!(agent.own_log().contains(why), "{why}: {}", agent.own_log());
        agent.run_to_end(&job("2", &["true"]));
    }
}

#[test]
fn a_missing_upload_program_is_logged() {
    let agent = ServeAgent::start(&World::new());
    assert_eq!(agent.run_to_end(&uploading(job("1", &["true"]), "always")).result(), "passed");
    agent.wait_for_own_log("no `artifact` program");
}

/// Sends a second signal while the program hangs.
fn end_while_it_hangs(rest: &str) {
    let world = World::new();
    let stand_in = StandIn::new(&world, rest);
    let marker = stand_in.directory.display().to_string();
    let mut agent = ServeAgent::start_with(&world, stand_in.found());
    agent.post_job(&uploading(job("1", &["true"]), "always")).of_status(200);
    agent.wait_for_log("1", "job_finished");
    agent.archive("1");
    wait_for_file(&stand_in.directory.join("env"));
    agent.signal(Signal::SIGTERM);
    agent.wait_for_own_log("asked to end");
    agent.signal(Signal::SIGTERM);
    assert_eq!(agent.wait_for_exit().code(), Some(1));
    let left = || processes_with(&marker);
    wait_until(|| left().is_empty(), || format!("these live on: {:?}", left()));
}

#[test]
fn an_upload_that_hangs_ends_with_the_agent() {
    end_while_it_hangs("exec sleep 60");
}

#[test]
fn processes_of_an_upload_end_with_the_agent() {
    end_while_it_hangs("sleep 60; true");
}
