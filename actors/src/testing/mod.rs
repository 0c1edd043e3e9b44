//! Scripted ports, and ways to make actors crash. For tests only (feature `testing`).

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, sleep_until};

use crate::errors::Cause;
use crate::job::{EnvVar, InjectedFile, Job};
use crate::ports::LogRange;
use crate::ports::{
    Callback, CallbackError, CallbackSender, Containment, End, ExecutorBackend, JobParts,
    JobPartsFactory, LeftBehind, LogUploads, MetricsSink, Place, PreparationError, PreparationStep,
    Prepared, Script, ScriptEnd, SessionEvent, ShellSession, SshAccessFiles, StepError, StepLog,
};

mod crashes;
mod hub;
mod spool;
mod uplink;

pub use crashes::{PanicNow, panic_as_asked};
pub use hub::ScriptedHub;
pub use spool::MemorySpool;
pub use uplink::{Push, Reply, ScriptedUplink};

/// How a scripted shell runs a script. The texts are its output.
#[derive(Clone, Debug)]
pub enum Reaction {
    /// Prints a text, and ends with an exit code.
    End(&'static str, i32),
    /// Prints a text, and ends after a time with an exit code.
    EndAfter(Duration, &'static str, i32),
    /// Prints a text, and ends with exit code 130 and a value of `SEMAPHORE_JOB_RESULT`.
    StopFromInside(&'static str, &'static str),
    /// Prints a text, and the shell ends.
    EndShell(&'static str),
    /// Prints a text, and never ends by itself (see [`ScriptedJob::crash_executor`]).
    Hang(&'static str),
}

/// All ports of one job, scripted, and a record of their calls. Clones share the state.
#[derive(Clone, Default)]
pub struct ScriptedJob(Rc<ScriptedState>);

#[derive(Default)]
struct ScriptedState {
    reactions: RefCell<VecDeque<Reaction>>,
    calls: RefCell<Vec<(Instant, String)>>,
    called: Notify,
    /// The shell that waits for the end of a hanging script panics.
    executor_crash: Notify,
    panic_in_access: Cell<bool>,
    hang_in_prepare: Cell<bool>,
    fail_prepare: Cell<bool>,
    panic_at_the_end: Cell<bool>,
    hang_at_the_end: Cell<bool>,
    hang_in_upload: Cell<bool>,
    refused_callbacks: Cell<u32>,
    /// How long a refused callback takes.
    callback_latency: Cell<Duration>,
    /// The spool of the last job.
    spool: RefCell<MemorySpool>,
    is_not_ready: Cell<bool>,
}

impl ScriptedJob {
    /// Creates a job whose shell runs each script by the next of `reactions`, and succeeds when
    /// there is none left. Scripts that export variables always succeed, and use up no reaction.
    pub fn new(reactions: impl IntoIterator<Item = Reaction>) -> Self {
        let job = Self::default();
        job.0.reactions.borrow_mut().extend(reactions);
        job
    }

    /// Makes the preparation hang.
    #[must_use]
    pub fn hanging_in_prepare(self) -> Self {
        self.0.hang_in_prepare.set(true);
        self
    }

    /// Makes the preparation fail.
    #[must_use]
    pub fn failing_in_prepare(self) -> Self {
        self.0.fail_prepare.set(true);
        self
    }

    /// Makes the first end of everything panic.
    #[must_use]
    pub fn panicking_at_the_end(self) -> Self {
        self.0.panic_at_the_end.set(true);
        self
    }

    /// Makes the end of everything hang.
    #[must_use]
    pub fn hanging_at_the_end(self) -> Self {
        self.0.hang_at_the_end.set(true);
        self
    }

    /// Makes the opening of SSH access panic.
    #[must_use]
    pub fn panicking_in_access(self) -> Self {
        self.0.panic_in_access.set(true);
        self
    }

    /// Makes uploads of artifacts hang.
    #[must_use]
    pub fn hanging_in_upload(self) -> Self {
        self.0.hang_in_upload.set(true);
        self
    }

    /// Makes the next `number` callbacks fail.
    #[must_use]
    pub fn refusing_callbacks(self, number: u32) -> Self {
        self.0.refused_callbacks.set(number);
        self
    }

    /// Delays the failure of each refused callback.
    #[must_use]
    pub fn answering_callbacks_after(self, latency: Duration) -> Self {
        self.0.callback_latency.set(latency);
        self
    }

    /// Returns all calls of the ports so far, in order.
    pub fn calls(&self) -> Vec<String> {
        self.0.calls.borrow().iter().map(|(_, call)| call.clone()).collect()
    }

    /// Returns the times when `call` was made.
    pub fn times_of(&self, call: &str) -> Vec<Instant> {
        let calls = self.0.calls.borrow();
        calls.iter().filter(|(_, made)| made == call).map(|(at, _)| *at).collect()
    }

    /// Waits until `call` has been made at least once.
    pub async fn until_called(&self, call: &str) {
        loop {
            let called = self.0.called.notified();
            if self.0.calls.borrow().iter().any(|(_, made)| made == call) {
                return;
            }
            called.await;
        }
    }

    /// Makes the executor crash that runs, or will run, a script with [`Reaction::Hang`].
    pub fn crash_executor(&self) {
        self.0.executor_crash.notify_one();
    }

    /// Sets whether [`JobPartsFactory::check`] fails.
    pub fn set_not_ready(&self, is_not_ready: bool) {
        self.0.is_not_ready.set(is_not_ready);
    }

    /// Returns the spool of the last job that was started.
    pub fn spool(&self) -> MemorySpool {
        self.0.spool.borrow().clone()
    }

    /// Returns the log of the last job that was started, as text.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&self.0.spool.borrow().contents()).into_owned()
    }

    fn call(&self, call: impl Into<String>) {
        self.0.calls.borrow_mut().push((Instant::now(), call.into()));
        self.0.called.notify_waiters();
    }
}

impl JobPartsFactory for ScriptedJob {
    fn make(&self, _: &Job) -> io::Result<JobParts> {
        let spool = MemorySpool::default();
        self.0.spool.replace(spool.clone());
        Ok(JobParts {
            backend: Box::new(self.clone()),
            containment: Box::new(self.clone()),
            spool: Box::new(spool),
            jump_point: Some(Rc::new(self.clone())),
        })
    }

    fn check(&self) -> io::Result<()> {
        if self.0.is_not_ready.get() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn make_spare_place(&self, _: &Job) -> io::Result<Place> {
        Ok(Place { backend: Box::new(self.clone()), containment: Box::new(self.clone()) })
    }
}

impl SshAccessFiles for ScriptedJob {
    fn open(&self, keys: Vec<Bytes>) -> LocalBoxFuture<'static, io::Result<()>> {
        self.call(format!("open access for {} keys", keys.len()));
        if self.0.panic_in_access.get() {
            panic_as_asked();
        }
        std::future::ready(Ok(())).boxed_local()
    }

    fn close(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        self.call("close access");
        std::future::ready(Ok(())).boxed_local()
    }

    /// Reports that somebody is logged in, always.
    fn close_if_unused(&self) -> LocalBoxFuture<'static, io::Result<bool>> {
        std::future::ready(Ok(false)).boxed_local()
    }
}

impl CallbackSender for ScriptedJob {
    fn send(&self, callback: &Callback) -> LocalBoxFuture<'static, Result<(), CallbackError>> {
        self.call(format!("call {} with {}", callback.url, callback.body));
        let taken = match self.0.refused_callbacks.get() {
            0 => Ok(()),
            left => {
                self.0.refused_callbacks.set(left - 1);
                Err(CallbackError::Transient("500".into()))
            }
        };
        let latency = self.0.callback_latency.get();
        async move {
            if taken.is_err() && !latency.is_zero() {
                sleep(latency).await;
            }
            taken
        }
        .boxed_local()
    }
}

impl LogUploads for ScriptedJob {
    fn upload<'a>(
        &'a self,
        _: &'a Job,
        _: &'a LogRange,
        trimmed: bool,
    ) -> LocalBoxFuture<'a, Result<(), Cause>> {
        self.call(if trimmed { "upload trimmed" } else { "upload" });
        if self.0.hang_in_upload.get() {
            return std::future::pending().boxed_local();
        }
        std::future::ready(Ok(())).boxed_local()
    }
}

impl ExecutorBackend for ScriptedJob {
    fn next_step(&self) -> PreparationStep {
        PreparationStep::Hidden
    }

    fn prepare<'a>(
        &'a mut self,
        _: &'a dyn StepLog,
    ) -> LocalBoxFuture<'a, Result<Prepared, PreparationError>> {
        async {
            self.call("prepare");
            if self.0.hang_in_prepare.get() {
                std::future::pending::<()>().await;
            }
            if self.0.fail_prepare.get() {
                return Err(StepError::new("there is no shell").into());
            }
            let session = ScriptedSession { job: self.clone(), events: VecDeque::new() };
            Ok(Prepared::Ready(Box::new(session)))
        }
        .boxed_local()
    }

    fn stage_variables<'a>(
        &'a mut self,
        variables: &'a [EnvVar],
    ) -> LocalBoxFuture<'a, Result<Script, StepError>> {
        let names: Vec<_> = variables.iter().map(|v| v.name.as_str()).collect();
        let text = format!("export {}", names.join(" "));
        async move { Ok(Script { text, untraced: true }) }.boxed_local()
    }

    fn shown_path(&self, file: &InjectedFile) -> String {
        file.path.clone()
    }

    fn inject<'a>(
        &'a mut self,
        file: &'a InjectedFile,
    ) -> LocalBoxFuture<'a, Result<(), StepError>> {
        self.call(format!("inject {}", file.path));
        async move {
            match file.path.as_str() {
                "/refused" => Err(StepError::new("/refused: permission denied")),
                _ => Ok(()),
            }
        }
        .boxed_local()
    }
}

struct ScriptedSession {
    job: ScriptedJob,
    /// Events to come, each with its time.
    events: VecDeque<(Instant, SessionEvent)>,
}

impl ShellSession for ScriptedSession {
    fn start<'a>(&'a mut self, script: &'a Script) -> LocalBoxFuture<'a, io::Result<()>> {
        let exports = script.untraced;
        let scripted = || self.job.0.reactions.borrow_mut().pop_front();
        let reaction = if exports { None } else { scripted() };
        let end = |exit_code, job_result: &str| {
            SessionEvent::ScriptEnded(ScriptEnd { exit_code, job_result: job_result.into() })
        };
        let now = Instant::now();
        let (text, last) = match reaction.unwrap_or(Reaction::End("", 0)) {
            Reaction::End(text, exit_code) => (text, Some((now, end(exit_code, "")))),
            Reaction::EndAfter(time, text, exit_code) => {
                (text, Some((now + time, end(exit_code, ""))))
            }
            Reaction::StopFromInside(text, result) => (text, Some((now, end(130, result)))),
            Reaction::EndShell(text) => {
                (text, Some((now, SessionEvent::ShellEnded(String::new()))))
            }
            Reaction::Hang(text) => (text, None),
        };
        if !text.is_empty() {
            let output = SessionEvent::Output(Bytes::from_static(text.as_bytes()));
            self.events.push_back((now, output));
        }
        self.events.extend(last);
        self.job.call(format!("run {}", script.text));
        async { Ok(()) }.boxed_local()
    }

    fn next_event(&mut self) -> LocalBoxFuture<'_, SessionEvent> {
        async {
            // Even a sleep of zero would yield to the other tasks.
            if let Some((at, _)) = self.events.front()
                && *at > Instant::now()
            {
                sleep_until(*at).await;
            }
            match self.events.pop_front() {
                Some((_, event)) => event,
                None => {
                    self.job.0.executor_crash.notified().await;
                    panic_as_asked();
                    std::future::pending().await
                }
            }
        }
        .boxed_local()
    }
}

impl Containment for ScriptedJob {
    fn kill_shell(&self) {
        self.call("kill shell");
    }

    fn kill_foreground(&self) -> bool {
        self.call("kill foreground");
        true
    }

    fn end(&self, what: End, grace: Duration) -> LocalBoxFuture<'static, Result<(), LeftBehind>> {
        if what == End::AllButDaemons {
            self.call(format!("end all but daemons within {grace:?}"));
            return std::future::ready(Ok(())).boxed_local();
        }
        self.call(format!("end everything within {grace:?}"));
        if self.0.panic_at_the_end.replace(false) {
            panic_as_asked();
        }
        if self.0.hang_at_the_end.get() {
            return std::future::pending().boxed_local();
        }
        std::future::ready(Ok(())).boxed_local()
    }
}

/// A sink that sends each measurement to a channel, as `NAME#TAG`.
#[derive(Clone, Debug)]
pub struct RecordingMetrics(pub mpsc::UnboundedSender<String>);

impl MetricsSink for RecordingMetrics {
    fn count(&mut self, name: &str, tag: &str) {
        // The receiver may have been dropped.
        let _ = self.0.send(format!("{name}#{tag}"));
    }

    fn time(&mut self, name: &str, _: Duration, tag: &str) {
        let _ = self.0.send(format!("{name}#{tag}"));
    }
}
