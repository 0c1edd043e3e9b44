//! A running `agent start`, and its control plane.

use std::ops::{Deref, DerefMut};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use actors::log::event::LogEvent;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::control_plane::{ControlPlane, Fault, Known, ReceivedRequest, Settings};
use crate::daemon::Daemon;
use crate::finished::events;
use crate::{Finished, World, wait_for_end};

/// The registration token. It must not appear in any output.
pub const TOKEN: &str = "canary-registration-token";

/// The name with which the agents register.
pub const NAME: &str = "agent-of-a-test";

/// Time limit for an expected event. It is much shorter than [`FAR_OFF`], so that no test passes only because
/// the agent's next regular report was due.
const PATIENCE: Duration = Duration::from_secs(50);

/// A report interval that is longer than any test, in milliseconds. A test that uses it must queue its jobs
/// before it starts the agent, because the agent asks only once for a job.
pub const FAR_OFF: u64 = 200_000;

/// A short report interval, in milliseconds.
pub const SOON: u64 = 100;

/// A control plane on a free port. Each wait has a time limit, after which the test fails.
pub struct Hub {
    plane: ControlPlane,
}

impl Hub {
    /// Starts a control plane; `next_sync_after` is the agents' report interval in milliseconds.
    pub fn start(next_sync_after: u64) -> Self {
        let settings = Settings { next_sync_after, token: TOKEN.into(), ..Settings::default() };
        let plane = ControlPlane::start("127.0.0.1:0", settings, Box::new(|_| {})).unwrap();
        Self { plane }
    }

    /// Waits until `look` returns a value. `what` describes it in the failure message.
    pub fn find<T>(&self, what: &str, look: impl FnMut(&Known) -> Option<T>) -> T {
        self.plane.wait_for(PATIENCE, look).unwrap_or_else(|| {
            let states = self.states().join("\n");
            panic!("{what}: timed out. Reports so far:\n{states}")
        })
    }

    pub fn wait_until(&self, what: &str, mut condition: impl FnMut(&Known) -> bool) {
        self.find(what, |known| condition(known).then_some(()));
    }

    /// Waits until the last report has this state.
    pub fn wait_for_state(&self, state: &str) {
        self.wait_until(state, |known| {
            known.reports.last().is_some_and(|last| last["state"] == state)
        });
    }

    /// Waits until the log of the job contains `text`.
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

    /// Waits until the job's result is reported. By then the log must be complete, with the same result.
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

    /// Queues a job and waits for its end.
    pub fn run(&self, job: &Value) -> Finished {
        let id = self.plane.queue(job.clone());
        self.finish(&id)
    }

    /// Returns the reports so far, each as `STATE JOB RESULT`, without repetitions.
    pub fn states(&self) -> Vec<String> {
        let mut states: Vec<_> = self.plane.look(|known| known.reports.iter().map(state).collect());
        states.dedup();
        states
    }

    /// From now on, this fault hits every request for which `which` returns `true`.
    pub fn fail(
        &self,
        fault: Fault,
        mut which: impl FnMut(&ReceivedRequest) -> bool + Send + 'static,
    ) {
        self.plane.misbehave(Some(Box::new(move |received, _| which(received).then_some(fault))));
    }

    /// Calls `look` for each report with this state, before the response, and sends the returned values.
    pub fn watch<T: Send + 'static>(
        &self,
        state: &'static str,
        look: impl Fn() -> T + Send + 'static,
    ) -> std::sync::mpsc::Receiver<T> {
        let (sender, seen) = std::sync::mpsc::channel();
        self.plane.misbehave(Some(Box::new(move |received, _| {
            if received.body["state"] == state {
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

/// Returns a command for `agent start`; see [`World::daemon`].
pub fn command(world: &World) -> Command {
    world.daemon("start")
}

/// Runs an agent that soon ends by itself, and returns its output.
pub fn run(command: &mut Command) -> Output {
    wait_for_end(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

/// Runs an agent that must refuse its configuration, and returns its error message.
pub fn refusal(command: &mut Command) -> String {
    let output = run(command);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{command:?}: {message}");
    assert!(output.stdout.is_empty(), "{command:?}: {message}");
    assert!(!message.contains("canary"), "{command:?}: {message}");
    message
}

/// An `agent start`, killed on drop.
pub struct StartAgent {
    daemon: Daemon,
}

impl StartAgent {
    /// Starts an agent that connects to this control plane with plain HTTP.
    pub fn start(world: &World, hub: &Hub) -> Self {
        Self::start_with(world, hub, |_| {})
    }

    /// Starts an agent after `adapt` has changed the command. Flags override the variables that are set here.
    pub fn start_with(world: &World, hub: &Hub, adapt: impl FnOnce(&mut Command)) -> Self {
        let mut command = command(world);
        command.env("SEMAPHORE_AGENT_ENDPOINT", hub.endpoint());
        command.env("SEMAPHORE_AGENT_NO_HTTPS", "true").env("SEMAPHORE_AGENT_TOKEN", TOKEN);
        command.env("SEMAPHORE_AGENT_NAME", NAME);
        adapt(&mut command);
        Self::spawn(world, command)
    }

    /// Starts an agent with this unchanged command; see [`command`].
    pub fn spawn(world: &World, command: Command) -> Self {
        Self { daemon: Daemon::start(world, command) }
    }

    /// Sends SIGTERM, like a service manager.
    pub fn interrupt(&self) {
        self.signal(Signal::SIGTERM);
    }

    /// Waits for the agent's end.
    pub fn exit_code(&mut self) -> Option<i32> {
        self.wait_for_exit().code()
    }

    /// Waits for the agent's end. Returns its exit code and its own log, which must not contain a secret.
    pub fn exit_code_and_log(&mut self) -> (Option<i32>, String) {
        let code = self.exit_code();
        let own_log = self.whole_log();
        assert!(!own_log.contains("canary"), "{own_log}");
        (code, own_log)
    }
}

impl Deref for StartAgent {
    type Target = Daemon;

    fn deref(&self) -> &Daemon {
        &self.daemon
    }
}

impl DerefMut for StartAgent {
    fn deref_mut(&mut self) -> &mut Daemon {
        &mut self.daemon
    }
}
