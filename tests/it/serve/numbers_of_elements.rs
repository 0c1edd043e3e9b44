//! Jobs with very long lists: a small request must not take much memory.

use std::fs;
use std::process::Stdio;
use std::time::SystemTime;

use test_support::serve::ServeAgent;
use test_support::{World, job, wait_for_end};

/// How often the smallest element is repeated: at most 4 MB of text.
const MANY: usize = 1_000_000;

/// Memory limit for a body of that size, in KiB: a few times its size.
const MOST: u64 = 100 * 1024;

/// The lists of a job: the text before the elements, one element, and the text after.
const LISTS: [(&str, &str, &str); 8] = [
    (r#""compose":{"containers":["#, "{}", "]}"),
    (r#""compose":{"containers":[{"env_vars":["#, "{}", "]}]}"),
    (r#""compose":{"image_pull_credentials":["#, "{}", "]}"),
    (r#""compose":{"host_setup_commands":["#, "{}", "]}"),
    (r#""env_vars":["#, "{}", "]"),
    (r#""files":["#, "{}", "]"),
    (r#""epilogue_always_commands":["#, "{}", "]"),
    (r#""ssh_public_keys":["#, "\"\"", "]"),
];

fn request(list: (&str, &str, &str)) -> String {
    let elements = vec![list.1; MANY].join(",");
    format!(
        r#"{{"job_id":"many","executor":"shell","commands":[{{"directive":"true"}}],{}{elements}{}}}"#,
        list.0, list.2
    )
}

/// Returns a figure of the agent's memory, in KiB.
fn memory(agent: &ServeAgent, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn a_list_of_very_many_elements_is_refused_and_takes_little_memory() {
    let mut failed = Vec::new();
    for list in LISTS {
        let world = World::new();
        let agent = ServeAgent::start(&world);
        let before = memory(&agent, "VmRSS");
        let began = SystemTime::now();
        let answer = agent.post("/jobs", request(list).as_bytes());
        let (took, grown) = (began.elapsed().unwrap(), memory(&agent, "VmHWM") - before);
        let text: String = answer.text().chars().take(300).collect();
        let name = list.0.rsplit('"').nth(1).unwrap();
        if answer.status != 422 || grown > MOST || !text.contains(name) {
            let status = answer.status;
            failed.push(format!("{}: after {took:?} and {grown} KiB: {status} {text}", list.0));
            continue;
        }
        assert_eq!(agent.run_to_end(&job("next", &["true"])).result(), "passed");
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn a_file_with_a_list_of_very_many_elements_is_refused() {
    let mut taken = Vec::new();
    for list in [LISTS[0], LISTS[4], LISTS[5]] {
        let world = World::new();
        let path = world.file("job.json", request(list));
        let mut agent = world.agent();
        agent.arg("run").arg(path).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = wait_for_end(agent.spawn().unwrap());
        let message = String::from_utf8_lossy(&output.stderr);
        let message: String = message.chars().take(300).collect();
        let name = list.0.rsplit('"').nth(1).unwrap();
        if output.status.success() || !message.contains(name) {
            taken.push(format!("{name}: {:?}, {message}", output.status));
        }
    }
    assert!(taken.is_empty(), "{taken:#?}");
}

#[test]
fn as_many_elements_as_control_planes_send_are_accepted() {
    let world = World::new();
    let agent = ServeAgent::start(&world);
    let mut request = job("1", &["echo $V299 ${#V0}"; 50]);
    request["env_vars"] =
        (0..300).map(|i| serde_json::json!({ "name": format!("V{i}"), "value": "eA==" })).collect();
    let finished = agent.run_to_end(&request);
    assert_eq!((finished.result(), finished.output()), ("passed", "x 1\n".repeat(50)));
}
