//! The file system of the agent's state directory is full before a job comes, or fills up while it runs.

use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::path::PathBuf;
use std::process::Command;

use actors::log::event::LogEvent;
use nix::unistd::geteuid;
use serde_json::json;

use test_support::serve::ServeAgent;
use test_support::start::{Hub, SOON, StartAgent};
use test_support::{Finished, World, job, wait_for_file, wait_until};

/// The system's message for ENOSPC.
const FULL: &str = "No space left";

/// Mount options: size and mode of the file system.
const SIZE: &str = "size=4m,mode=700";

/// A small file system for the state directory, unmounted on drop.
struct SmallDisk {
    mounted_at: PathBuf,
}

impl SmallDisk {
    /// Mounts the file system. If that is not possible, prints so and returns `None`.
    fn mount(world: &World) -> Option<Self> {
        let mounted_at = world.state();
        fs::create_dir(&mounted_at).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", SIZE, "none"]).arg(&mounted_at);
        if !geteuid().is_root() || !mount.status().is_ok_and(|status| status.success()) {
            eprintln!("skipped: no file system can be mounted here");
            return None;
        }
        Some(Self { mounted_at })
    }

    fn filler(&self) -> PathBuf {
        self.mounted_at.join("filler")
    }

    /// Fills the file system to the last byte.
    fn fill(&self) {
        let mut filler = File::create(self.filler()).unwrap();
        for size in [1 << 16, 1 << 12, 1] {
            let end = loop {
                if let Err(end) = filler.write_all(&vec![0; size]) {
                    break end;
                }
            };
            assert_eq!(end.kind(), ErrorKind::StorageFull);
        }
    }

    /// Returns a command that silently fills the file system.
    fn filling(&self) -> String {
        let dd =
            |size| format!("dd if=/dev/zero bs={size} >>'{}' 2>/dev/null", self.filler().display());
        format!("{}; {}; true", dd("64k"), dd("1"))
    }

    fn free(&self) {
        fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // If the test failed, a process may still use the file system.
        let _ = Command::new("umount").arg("--lazy").arg(&self.mounted_at).status();
    }
}

/// Prints more than fits into a log on this file system.
const MUCH: &str = "head -c 5000000 /dev/zero | tr '\\0' x | fold -w 100";

/// Asserts that the job's log is complete and names the reason in plain words.
fn assert_failed_for_lack_of_space(finished: &Finished) {
    assert_eq!(finished.result(), "failed");
    let texts: Vec<_> = finished
        .events
        .iter()
        .filter_map(|event| match event {
            LogEvent::CmdOutput { output, .. } => Some(output.as_str()),
            LogEvent::CmdStarted { directive, .. } | LogEvent::CmdFinished { directive, .. } => {
                Some(directive)
            }
            _ => None,
        })
        .filter(|text| !text.starts_with("xxx"))
        .collect();
    assert!(texts.iter().any(|text| text.contains(FULL)), "{texts:?}");
    assert!(!texts.concat().to_lowercase().contains("internal error"), "{texts:?}");
}

#[test]
fn agent_serve_takes_no_job_while_its_disk_is_full() {
    let world = World::new();
    let Some(disk) = SmallDisk::mount(&world) else { return };
    let agent = ServeAgent::start(&world);
    disk.fill();
    let request = job("1", &["touch ~/ran"]);
    for _ in 0..2 {
        let answer = agent.post_job(&request);
        let message = answer.of_status(503).message();
        assert!(message.contains(FULL), "{message}");
        assert_eq!(agent.get("/status").json()["state"], "waiting-for-job");
    }
    assert!(!world.home().join("ran").exists());
    disk.free();
    assert_eq!(agent.run_to_end(&request).result(), "passed");
    assert!(world.home().join("ran").exists());
}

#[test]
fn a_job_that_fills_the_disk_fails_with_the_reason_and_the_agent_continues() {
    let world = World::new();
    let Some(disk) = SmallDisk::mount(&world) else { return };
    let agent = ServeAgent::start(&world);
    // A command whose output does not fit.
    let mut filling = job("1", &[&disk.filling(), MUCH, "touch ~/went-on"]);
    filling["epilogue_always_commands"] = json!([{ "directive": "touch ~/epilogue-1" }]);
    agent.post_job(&filling).of_status(200);
    let finished = agent.finish("1");
    assert_failed_for_lack_of_space(&finished);
    assert!(world.home().join("epilogue-1").exists(), "{finished:?}");
    assert!(!world.home().join("went-on").exists());
    disk.free();
    assert_eq!(agent.run_to_end(&job("2", &["true"])).result(), "passed");
    // A command whose script does not fit, so that the command prints nothing.
    let mut filling = job("3", &[&disk.filling(), "touch ~/second"]);
    let epilogue = json!([{ "directive": "touch ~/epilogue-3" }]);
    filling["epilogue_always_commands"] = epilogue;
    agent.post_job(&filling).of_status(200);
    let finished = agent.finish("3");
    if finished.result() == "passed" {
        // The script fitted, so the command ran.
        assert!(world.home().join("second").exists(), "{finished:?}");
    } else {
        assert_failed_for_lack_of_space(&finished);
    }
    assert!(world.home().join("epilogue-3").exists(), "{finished:?}");
    disk.free();
    assert_eq!(agent.run_to_end(&job("4", &["true"])).result(), "passed");
}

/// Returns whether the agent has asked for a job.
fn has_asked(hub: &Hub) -> bool {
    hub.states().iter().any(|state| state.starts_with("waiting-for-jobs"))
}

#[test]
fn an_agent_of_a_control_plane_asks_for_no_job_while_its_disk_is_full() {
    let world = World::new();
    let Some(disk) = SmallDisk::mount(&world) else { return };
    disk.fill();
    let hub = Hub::start(SOON);
    let id = hub.queue(job("1", &["touch ~/ran"]));
    let agent = StartAgent::start(&world, &hub);
    agent.wait_for_own_log(FULL);
    assert!(!has_asked(&hub), "{:?}", hub.states());
    assert_eq!(hub.look(|known| known.jobs[&id].fetched), 0);
    disk.free();
    assert_eq!(hub.finish(&id).result(), "passed");
    wait_for_file(&world.home().join("ran"));
}

#[test]
fn after_a_job_filled_the_disk_no_job_is_fetched_until_there_is_space() {
    let world = World::new();
    let Some(disk) = SmallDisk::mount(&world) else { return };
    let hub = Hub::start(SOON);
    let agent = StartAgent::start(&world, &hub);
    let first = hub.queue(job("1", &[&disk.filling()]));
    let next = hub.queue(job("2", &["true"]));
    hub.result(&first);
    agent.wait_for_own_log(FULL);
    assert_eq!(hub.look(|known| known.jobs[&next].fetched), 0, "{:?}", hub.states());
    disk.free();
    assert_eq!(hub.finish(&next).result(), "passed");
}

#[test]
fn a_log_that_filled_the_disk_is_dropped_for_the_next_job() {
    let world = World::new();
    let Some(_disk) = SmallDisk::mount(&world) else {
        return;
    };
    let agent = ServeAgent::start(&world);
    let loud = agent.run_to_end(&job("loud", &["yes | head -c 20000000"]));
    assert_failed_for_lack_of_space(&loud);
    // Refused at first: a log reader still holds the old log for a moment.
    let next = job("next", &["echo next"]);
    wait_until(|| agent.post_job(&next).status == 200, || "no job is taken any more".into());
    assert_eq!(agent.finish("next").output(), "next\n");
}
