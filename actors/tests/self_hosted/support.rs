//! An agent in its scripted world.

use std::rc::Rc;
use std::time::Duration;

use actix::{Actor as _, Addr, MailboxError};
use actors::delivery::Delivery;
use actors::delivery::push::{PushDelivery, PushPlatform};
use actors::intake::poller::{AwaitLeave, Left, SyncPoller};
use actors::intake::protocol::{Answer, ShutdownReason};
use actors::job::Job;
use actors::metrics::Metrics;
use actors::ports::{DiscardMetrics, PushError};
use actors::request::FileRequest;
use actors::supervisor::{Config, GetLog, JobSupervisor};
use actors::testing::{PanicNow, Push, Reaction, Reply, ScriptedHub, ScriptedJob, ScriptedUplink};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

/// How long after the job's end delivery may take in all.
pub(crate) const PATIENCE: Duration = Duration::from_mins(10);

pub(crate) const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

pub(crate) const fn minutes(minutes: u64) -> Duration {
    Duration::from_mins(minutes)
}

pub(crate) struct Agent {
    pub(crate) world: ScriptedJob,
    pub(crate) hub: ScriptedHub,
    pub(crate) uplink: ScriptedUplink,
    pub(crate) supervisor: Addr<JobSupervisor>,
    pub(crate) poller: Addr<SyncPoller>,
    pub(crate) began: Instant,
}

impl Agent {
    /// An agent on paused time that begins with the next `await`. Its control plane has nothing for it to do.
    pub(crate) fn idle(world: ScriptedJob) -> Self {
        tokio::time::pause();
        fastrand::seed(1);
        let (hub, uplink) = (ScriptedHub::new(&world), ScriptedUplink::new(&world));
        let urgency = watch::Sender::default();
        let delivery = PushDelivery {
            platform: PushPlatform {
                files: Rc::new(uplink.clone()),
                server: Rc::new(uplink.clone()),
                hub: Rc::new(hub.clone()),
            },
            uploads: Box::new(world.clone()),
            patience: PATIENCE,
            urgency: urgency.subscribe(),
            in_background: Rc::default(),
        };
        let config = Config {
            grace: seconds(2),
            delivery: Delivery::Push(Rc::new(delivery)),
            ..Config::default()
        };
        let metrics = Metrics::new(Box::new(DiscardMetrics)).start();
        let supervisor = JobSupervisor::new(Box::new(world.clone()), metrics, config).start();
        let poller =
            SyncPoller::new(Rc::new(hub.clone()), supervisor.clone(), Vec::new(), urgency).start();
        Self { world, hub, uplink, supervisor, poller, began: Instant::now() }
    }

    /// An agent whose control plane has job `1` for it, with a command for each reaction.
    pub(crate) fn with_job(reactions: Vec<Reaction>) -> Self {
        let job = job("1", reactions.len());
        let agent = Self::idle(ScriptedJob::new(reactions));
        agent.hub.queue("1", job);
        agent
    }

    /// The same; its one command prints a bit, and takes so long.
    pub(crate) fn with_job_of(time: Duration) -> Self {
        Self::with_job(vec![Reaction::EndAfter(time, "so far\n", 0)])
    }

    /// Waits until `call` was made, in hours at most.
    pub(crate) async fn until(&self, call: &str) {
        let called = timeout(minutes(120), self.world.until_called(call)).await;
        assert!(called.is_ok(), "never: {call}; but: {:#?}", self.world.calls());
    }

    /// How long after the agent began `call` was made first.
    pub(crate) fn time_of(&self, call: &str) -> Duration {
        let times = self.world.times_of(call);
        *times.first().unwrap_or_else(|| panic!("never: {call}")) - self.began
    }

    /// `call` was made first so long after the agent began.
    #[track_caller]
    pub(crate) fn assert_time(&self, call: &str, expected: Duration) {
        let (time, slack) = (self.time_of(call), Duration::from_millis(100));
        assert!(expected <= time && time < expected + slack, "{call}: {time:?}, not {expected:?}");
    }

    /// How often `call` was made.
    pub(crate) fn count(&self, call: &str) -> usize {
        self.world.times_of(call).len()
    }

    /// How the conversation ended, and how long after the agent began.
    pub(crate) async fn left(&self) -> (Result<Left, MailboxError>, Duration) {
        let left = timeout(minutes(120), self.poller.send(AwaitLeave)).await.unwrap();
        (left, self.began.elapsed())
    }

    /// Waits until the agent has left for this reason; answers how long after it began.
    pub(crate) async fn left_because(&self, expected: ShutdownReason) -> Duration {
        let (left, after) = self.left().await;
        match left.unwrap() {
            Left::Because { reason, by } => {
                assert_eq!(reason, expected);
                assert!(self.began + after <= by, "too late");
            }
            Left::NotRegistered(why) => panic!("not registered: {why}"),
        }
        after
    }

    /// These calls were made in this order, whatever was between them.
    #[track_caller]
    pub(crate) fn assert_order(&self, expected: &[&str]) {
        let calls = self.world.calls();
        let mut rest = calls.iter();
        for call in expected {
            assert!(rest.any(|made| made == call), "{call} is not there in order: {calls:#?}");
        }
    }

    /// The log server has the whole log, byte for byte, and nobody put it aside.
    #[track_caller]
    pub(crate) fn assert_delivered(&self) {
        let log = self.world.log();
        assert!(log.lines().last().is_some_and(|line| line.contains("job_finished")), "{log}");
        assert_eq!(self.uplink.log(), log);
        assert_eq!(self.uplink.kept(), None);
    }

    /// The whole log was put aside, before the result was told.
    #[track_caller]
    pub(crate) fn assert_kept(&self, result: &str) {
        let log = self.world.log();
        assert!(log.lines().last().is_some_and(|line| line.contains("job_finished")), "{log}");
        assert_eq!(self.uplink.kept(), Some(log));
        assert_eq!(self.count("keep 1"), 1);
        self.assert_order(&["keep 1", &format!("report finished-job 1 {result}")]);
    }

    /// Waits until the first job is reported as finished like this, with all of its log delivered
    /// before; answers how long after the agent began.
    pub(crate) async fn until_delivered(&self, result: &str) -> Duration {
        let finished = format!("report finished-job 1 {result}");
        self.until(&finished).await;
        self.assert_delivered();
        self.assert_order(&["log is whole", &finished]);
        self.time_of(&finished)
    }

    pub(crate) async fn crash_supervisor(&self) {
        assert!(self.supervisor.send(PanicNow).await.is_err());
    }

    pub(crate) async fn crash_log_buffer(&self) {
        let log = self.supervisor.send(GetLog).await.unwrap().unwrap();
        assert!(log.buffer.send(PanicNow).await.is_err());
    }

    pub(crate) async fn wait(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }
}

/// Runs one case of several: each has a clock of its own.
pub(crate) fn case(test: impl Future<Output = ()>) {
    actix::System::new().block_on(test);
}

/// A job of so many commands whose log is pushed.
pub(crate) fn job(id: &str, commands: usize) -> Job {
    job_with_logger(id, commands, r#"{"method":"push","url":"https://logs","token":"stale"}"#)
}

pub(crate) fn job_with_logger(id: &str, commands: usize, logger: &str) -> Job {
    let commands: Vec<_> =
        (0..commands).map(|number| format!(r#"{{"directive":"do {number}"}}"#)).collect();
    let json =
        format!(r#"{{"job_id":"{id}","commands":[{}],"logger":{logger}}}"#, commands.join(","));
    serde_json::from_str::<FileRequest>(&json).unwrap().decode().unwrap()
}

pub(crate) fn shutdown(reason: &str) -> Answer {
    let (action, shutdown_reason) = ("shutdown".to_owned(), reason.to_owned());
    Answer { action, shutdown_reason, ..Answer::default() }
}

/// The log server is away.
pub(crate) fn away() -> Reply {
    Reply::Refused(PushError::Unavailable("connection refused".into()))
}

/// The log server takes what `fits`, and refuses the rest for this reason.
pub(crate) fn unless(
    error: impl Fn() -> PushError,
    mut fits: impl FnMut(&Push) -> bool,
) -> impl FnMut(&Push) -> Reply {
    move |push| if fits(push) { Reply::Taken } else { Reply::Refused(error()) }
}

/// So many commands that print a little and succeed.
pub(crate) fn chatter(commands: usize) -> Vec<Reaction> {
    vec![Reaction::End("words\n", 0); commands]
}

/// Text of so many bytes.
pub(crate) fn text(bytes: usize) -> &'static str {
    Box::leak("0123456789abcde\n".repeat(bytes / 16).into_boxed_str())
}

/// The lines that the pushes had, one number for each push.
pub(crate) fn lines_of(pushes: &[Push]) -> Vec<u64> {
    pushes.iter().map(|push| push.lines).collect()
}
