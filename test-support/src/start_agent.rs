//! A running `agent start`, and a control plane for it.

use std::process::{Command, Output, Stdio};

use actors::log::event::LogEvent;
use nix::sys::signal::Signal;

use crate::control_plane::{ControlPlane, HubJob, Known, Settings};
use crate::daemon::Daemon;
use crate::waiting::PATIENCE;
use crate::{Finished, World, wait_for_end};

/// What agents register with; no output may ever show it.
pub const TOKEN: &str = "canary-registration-token";

/// `agent start` with private places for all that it writes, and nothing else that it needs.
pub fn command(world: &World) -> Command {
    world.daemon("start")
}

/// What an agent prints that soon ends by itself.
pub fn run(command: &mut Command) -> Output {
    wait_for_end(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

/// What an agent says that is set up in a wrong way and does not start.
pub fn refusal(command: &mut Command) -> String {
    let output = run(command);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{command:?}: {message}");
    assert!(output.stdout.is_empty(), "{command:?}: {message}");
    assert!(!message.contains("canary"), "{command:?}: {message}");
    message
}

/// A control plane on a free port that wants reports often.
pub fn hub() -> ControlPlane {
    let settings = Settings { next_sync_after: 100, token: TOKEN.into(), ..Settings::default() };
    ControlPlane::start("127.0.0.1:0", settings, Box::new(|_| {})).unwrap()
}

/// Waits for what the control plane must get to know.
pub fn wait_for<T>(hub: &ControlPlane, look: impl FnMut(&Known) -> Option<T>) -> Option<T> {
    hub.wait_for(PATIENCE, look)
}

/// What the control plane has of a job that it was told the result of.
pub fn finished(hub: &ControlPlane, id: &str) -> (String, Finished) {
    let job = wait_for(hub, |known| known.jobs.get(id).filter(|job| job.result.is_some()).cloned());
    let job: HubJob = job.unwrap_or_else(|| panic!("{id} is not finished"));
    let events = job.log.iter().map(|line| LogEvent::decode(line).unwrap()).collect();
    (job.result.unwrap(), Finished { exit_code: None, events, stderr: String::new() })
}

/// Waits until the log of a job, as far as it was delivered, has `text`.
pub fn wait_for_log(hub: &ControlPlane, id: &str, text: &str) {
    let found = wait_for(hub, |known| {
        let log = known.jobs[id].log_bytes();
        String::from_utf8_lossy(&log).contains(text).then_some(())
    });
    assert!(found.is_some(), "{text:?} is not in the log of {id}");
}

/// An agent of a control plane.
pub struct StartAgent {
    daemon: Daemon,
}

impl StartAgent {
    /// An agent of a control plane that speaks plain HTTP; `adapt` adds arguments and variables.
    pub fn start(world: &World, hub: &ControlPlane, adapt: impl FnOnce(&mut Command)) -> Self {
        let mut command = command(world);
        command.args(["--no-https", "--endpoint", &hub.endpoint()]);
        command.env("SEMAPHORE_AGENT_TOKEN", TOKEN);
        adapt(&mut command);
        Self::spawn(world, command)
    }

    pub fn spawn(world: &World, command: Command) -> Self {
        Self { daemon: Daemon::start(world, command) }
    }

    pub fn interrupt(&self) {
        self.daemon.signal(Signal::SIGTERM);
    }

    /// Its exit code, and all of its own log.
    pub fn wait_for_exit(&mut self) -> (Option<i32>, String) {
        let status = self.daemon.wait_for_exit();
        let own_log = self.daemon.whole_log();
        assert!(!own_log.contains("canary"), "{own_log}");
        (status.code(), own_log)
    }

    pub fn wait_for_own_log(&self, text: &str) -> String {
        self.daemon.wait_for_own_log(text)
    }
}
