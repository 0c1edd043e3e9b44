//! A running `agent start`, and the control plane that it works for.

use std::ops::{Deref, DerefMut};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use actors::log::event::LogEvent;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::control_plane::{Asked, ControlPlane, Fault, Known, Settings};
use crate::daemon::Daemon;
use crate::finished::events;
use crate::{Finished, World, wait_for_end};

/// The token that agents register with. No output may ever show it.
pub const TOKEN: &str = "canary-registration-token";

/// The name of all agents here.
pub const NAME: &str = "agent-of-a-test";

/// How long a test waits for what must happen. It is much shorter than [`FAR_OFF`], so that no test passes only
/// because the agent's next regular report was due.
const PATIENCE: Duration = Duration::from_secs(50);

/// A pause between two reports that is longer than any test, in milliseconds. A test with it queues its jobs before
/// it starts the agent, which asks only once for one.
pub const FAR_OFF: u64 = 200_000;

/// A short pause between two reports, in milliseconds.
pub const SOON: u64 = 100;

/// A control plane on a free port. Each of its waits fails the test if what it waits for does not come true.
pub struct Hub {
    plane: ControlPlane,
}

impl Hub {
    /// `next_sync_after` is how often agents report, in milliseconds.
    pub fn start(next_sync_after: u64) -> Self {
        let settings = Settings { next_sync_after, token: TOKEN.into(), ..Settings::default() };
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

    /// Waits until the job's result is reported. The log must be whole by then, and end with the same result.
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

    /// The reports so far: state, job and result, as words. Equal ones in a row count once.
    pub fn states(&self) -> Vec<String> {
        let mut states: Vec<_> = self.plane.look(|known| known.reports.iter().map(state).collect());
        states.dedup();
        states
    }

    /// From now on every request of a kind meets this fault.
    pub fn fail(&self, fault: Fault, mut which: impl FnMut(&Asked) -> bool + Send + 'static) {
        self.plane.misbehave(Some(Box::new(move |asked, _| which(asked).then_some(fault))));
    }

    /// Calls `look` whenever a report of this state comes, before it is answered, and sends what it returns.
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

/// `agent start` with private places for all that it writes, and nothing else that it needs.
pub fn command(world: &World) -> Command {
    world.daemon("start")
}

/// The output of an agent that soon ends by itself.
pub fn run(command: &mut Command) -> Output {
    wait_for_end(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

/// The error message of an agent that refuses its configuration.
pub fn refusal(command: &mut Command) -> String {
    let output = run(command);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{command:?}: {message}");
    assert!(output.stdout.is_empty(), "{command:?}: {message}");
    assert!(!message.contains("canary"), "{command:?}: {message}");
    message
}

/// An `agent start`. It is killed with this value.
pub struct StartAgent {
    daemon: Daemon,
}

impl StartAgent {
    /// An agent of this control plane, to which it speaks plain HTTP.
    pub fn start(world: &World, hub: &Hub) -> Self {
        Self::start_with(world, hub, |_| {})
    }

    /// `adapt` adds arguments and variables; a flag wins over what is set here.
    pub fn start_with(world: &World, hub: &Hub, adapt: impl FnOnce(&mut Command)) -> Self {
        let mut command = command(world);
        command.env("SEMAPHORE_AGENT_ENDPOINT", hub.endpoint());
        command.env("SEMAPHORE_AGENT_NO_HTTPS", "true").env("SEMAPHORE_AGENT_TOKEN", TOKEN);
        command.env("SEMAPHORE_AGENT_NAME", NAME);
        adapt(&mut command);
        Self::spawn(world, command)
    }

    /// An agent with this command as it is; see [`command`].
    pub fn spawn(world: &World, command: Command) -> Self {
        Self { daemon: Daemon::start(world, command) }
    }

    /// Asks the agent to end, as a service manager does.
    pub fn interrupt(&self) {
        self.signal(Signal::SIGTERM);
    }

    /// Waits for the agent's end.
    pub fn exit_code(&mut self) -> Option<i32> {
        self.wait_for_exit().code()
    }

    /// Waits for the agent's end. Its own log is whole then, and must not hold a secret.
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
