//! A running `agent start`, and the control plane that it works for.

use std::ops::{Deref, DerefMut};
use std::process::Command;
use std::time::Duration;

use actors::log::event::LogEvent;
use serde_json::Value;

use crate::control_plane::{Asked, ControlPlane, Fault, Known, Settings};
use crate::daemon::Daemon;
use crate::finished::events;
use crate::{Finished, World};

/// The name of all agents here.
pub const NAME: &str = "agent-of-a-test";

/// How long a test waits for what must happen. Much shorter than [`FAR_OFF`]: what takes so long
/// happened only because the next report was due.
const PATIENCE: Duration = Duration::from_secs(50);

/// A pause between two reports that no test lives to see the end of, in milliseconds. Jobs are queued
/// before the agent starts then: it asks only once for one.
pub const FAR_OFF: u64 = 200_000;

/// A pause for those who wait for answers, in milliseconds.
pub const SOON: u64 = 100;

/// A control plane of which a test asks things that must come true.
pub struct Hub {
    plane: ControlPlane,
}

impl Hub {
    /// Agents report again after so many milliseconds.
    pub fn start(next_sync_after: u64) -> Self {
        let settings = Settings { next_sync_after, ..Settings::default() };
        let plane = ControlPlane::start("127.0.0.1:0", settings, Box::new(|_| {})).unwrap();
        Self { plane }
    }

    /// Waits until `look` finds something.
    pub fn find<T>(&self, what: &str, look: impl FnMut(&Known) -> Option<T>) -> T {
        self.plane.wait_for(PATIENCE, look).unwrap_or_else(|| {
            let states = self.states().join("\n");
            panic!("{what}: that does not come true. What was reported:\n{states}")
        })
    }

    pub fn wait_until(&self, what: &str, mut is_so: impl FnMut(&Known) -> bool) {
        self.find(what, |known| is_so(known).then_some(()));
    }

    /// Waits until the last report has this state.
    pub fn wait_for_state(&self, state: &str) {
        self.wait_until(state, |known| {
            known.reports.last().is_some_and(|last| last["state"] == state)
        });
    }

    /// Waits until the log of the job holds `text`.
    pub fn wait_for_log(&self, id: &str, text: &str) {
        self.wait_until(text, |known| {
            let lines = &known.jobs[id].log;
            lines.iter().any(|line| String::from_utf8_lossy(line).contains(text))
        });
    }

    /// Waits until the job's result is reported.
    pub fn result(&self, id: &str) -> String {
        self.find(id, |known| known.jobs[id].result.clone())
    }

    /// Waits until the job's result is reported; the log as it was by then, which must be whole, and
    /// say the same.
    pub fn finish(&self, id: &str) -> Finished {
        let (result, log) = self
            .find(id, |known| Some((known.jobs[id].result.clone()?, known.jobs[id].log_bytes())));
        let finished = Finished { exit_code: None, events: events(&log), stderr: String::new() };
        assert_eq!(finished.result(), result);
        let is = |event: &LogEvent| {
            (
                matches!(event, LogEvent::JobStarted { .. }),
                matches!(event, LogEvent::JobFinished { .. }),
            )
        };
        let ends = finished.events.iter().map(is);
        assert_eq!(ends.filter(|(first, last)| *first || *last).count(), 2, "{finished:?}");
        assert!(is(&finished.events[0]).0, "{finished:?}");
        finished
    }

    /// Hands out a job and waits for its end.
    pub fn run(&self, job: &Value) -> Finished {
        let id = self.plane.queue(job.clone());
        self.finish(&id)
    }

    /// What was reported: state, job and result, as words; what is told again once.
    pub fn states(&self) -> Vec<String> {
        let mut states: Vec<_> = self.plane.look(|known| known.reports.iter().map(state).collect());
        states.dedup();
        states
    }

    /// From now on the hub meets every request of a kind with a fault.
    pub fn fail(&self, fault: Fault, mut which: impl FnMut(&Asked) -> bool + Send + 'static) {
        self.plane.misbehave(Some(Box::new(move |asked, _| which(asked).then_some(fault))));
    }

    /// Answers what `look` saw whenever a report of this state came, before that was answered.
    pub fn watch<T: Send + 'static>(
        &self,
        state: &'static str,
        look: impl Fn() -> T + Send + 'static,
    ) -> std::sync::mpsc::Receiver<T> {
        let (sender, seen) = std::sync::mpsc::channel();
        self.plane.misbehave(Some(Box::new(move |asked, _| {
            if asked.body["state"] == state {
                let _ = sender.send(look());
            }
            None
        })));
        seen
    }
}

fn state(report: &Value) -> String {
    let words = ["state", "job_id", "job_result"].map(|key| report[key].as_str().unwrap());
    words.join(" ").trim_end().to_owned()
}

impl Deref for Hub {
    type Target = ControlPlane;

    fn deref(&self) -> &ControlPlane {
        &self.plane
    }
}

impl DerefMut for Hub {
    fn deref_mut(&mut self) -> &mut ControlPlane {
        &mut self.plane
    }
}

/// An `agent start` with private places for all that it writes.
pub struct SelfHosted {
    daemon: Daemon,
}

impl SelfHosted {
    pub fn start(world: &World, hub: &Hub) -> Self {
        Self::start_with(world, hub, |_| {})
    }

    /// `adapt` adds arguments and variables; a flag wins over what is set here.
    pub fn start_with(world: &World, hub: &Hub, adapt: impl FnOnce(&mut Command)) -> Self {
        let mut command = world.agent();
        command.arg("start");
        command.env("SEMAPHORE_AGENT_ENDPOINT", hub.endpoint());
        command.env("SEMAPHORE_AGENT_NO_HTTPS", "true").env("SEMAPHORE_AGENT_TOKEN", "dev");
        command.env("SEMAPHORE_AGENT_NAME", NAME);
        command.env("SEMAPHORE_AGENT_SSH_JUMP_POINT_PATH", world.jump_point());
        command.env("SEMAPHORE_AGENT_LOG_FILE_PATH", world.home().with_file_name("agent_log"));
        adapt(&mut command);
        Self { daemon: Daemon::start(world, command) }
    }

    /// Its exit code, as soon as it has ended.
    pub fn exit_code(&mut self) -> Option<i32> {
        self.wait_for_exit().code()
    }
}

impl Deref for SelfHosted {
    type Target = Daemon;

    fn deref(&self) -> &Daemon {
        &self.daemon
    }
}

impl DerefMut for SelfHosted {
    fn deref_mut(&mut self) -> &mut Daemon {
        &mut self.daemon
    }
}
