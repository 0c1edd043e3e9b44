//! Owns the decision whether this agent accepts jobs, and passes on the requests of API clients.
//!
//! Receives [`SubmitJob`], [`ReadJobLog`], [`RequestStop`], [`GetStatus`] and [`ReportTransfer`]
//! from the HTTP routes, [`Close`] and [`UntilDrained`] from the command that ends the agent, and
//! [`JobFinished`] from the supervisor.
//!
//! ```text
//!         Close, or with `single_job` the first job's end         no job left
//! Open ─────────────────────────────────────────────────▶ Closed ─────────────▶ drained
//! ```

use std::time::Duration;

use actix::prelude::*;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::delivery::pull::WaitsFor;
use crate::job::lifecycle::StartRefused;
use crate::job::{Job, JobId, LogMethod, Problem, Problems};
use crate::log::buffer::{LogError, ReadFrom};
use crate::ports::LogRange;
use crate::supervisor::{
    GetActiveJob, GetLog, GetWaitsFor, JobFinished, JobSupervisor, ReportTransfer, StartError,
    StartJob, StopJob, StopManner,
};

/// How often a log is requested again after a crash of its buffer.
const CRASHED_LOG_TRIES: u32 = 100;
/// The pause between two such requests.
const CRASHED_LOG_PAUSE: Duration = Duration::from_millis(10);

/// Submits a job to be run.
#[derive(Message)]
#[rtype(result = "Result<Submission, SubmitRefused>")]
pub struct SubmitJob {
    /// The job to run.
    pub job: Job,
}

/// The result of a submission that is not refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Submission {
    /// The job was started.
    Started,
    /// The job runs already, or was the last to run; it is not run twice.
    AlreadyRunning,
}

/// Why a submitted job is not run.
#[derive(Debug, thiserror::Error)]
pub enum SubmitRefused {
    /// The request's `logger` is not valid, or asks for a log that is pushed.
    #[error("{}", listed(.0))]
    Unfit(Problems),
    /// Another job holds the slot. Clients match the text (docs/protocol.md: "The hosted API").
    #[error("another job is already running")]
    Busy,
    /// The agent is about to end.
    #[error("the agent is shutting down and takes no more jobs")]
    Closed,
    /// The job's parts could not be made.
    #[error("the agent can't start the job")]
    Failed(#[source] StartError),
    /// The agent can run no job any more.
    #[error("the agent can't start the job: the job supervisor has crashed")]
    Crashed,
}

fn listed(problems: &Problems) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Returns the range of a job's log from a line on.
#[derive(Clone, Debug, Message)]
#[rtype(result = "Result<LogRange, ReadRefused>")]
pub struct ReadJobLog {
    /// The job whose log is wanted: the running one or the last one.
    pub id: JobId,
    /// The first line wanted, 0 based.
    pub line: u64,
}

/// Why a log can't be read. Clients match `job ID is not running` (docs/protocol.md: "The hosted API").
#[derive(Debug, thiserror::Error)]
pub enum ReadRefused {
    /// No job has run yet.
    #[error("job ID is not running")]
    NoJob,
    /// The running job, or the last one, is another job.
    #[error("job ID is not running")]
    OtherJob,
    /// The log buffer has crashed, or the log's file can't be read.
    #[error("the log can't be read")]
    Broken(#[from] LogError),
}

/// Requests that a job be stopped. The reply comes when the stop is recorded; a stop of any job but
/// the running one is ignored.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct RequestStop {
    /// The job to stop; `None` for whichever runs.
    pub id: Option<JobId>,
}

/// Returns what the agent is doing.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Status")]
pub struct GetStatus;

/// What the agent is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// The agent's state.
    pub state: State,
    /// What a job whose outcome is known still waits for.
    pub waits_for: Option<WaitsFor>,
    /// Whether the supervisor is alive; without it no job can run any more.
    pub is_alive: bool,
}

/// The state of an agent that serves the HTTPS API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The agent has no job.
    WaitingForJob,
    /// The agent has a job, from its start to the end of its teardown; or its supervisor has
    /// crashed.
    JobReceived,
}

impl State {
    /// Returns the protocol's word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::WaitingForJob => "waiting-for-job",
            Self::JobReceived => "job-received",
        }
    }
}

/// Refuses all further jobs.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct Close;

/// Waits until the intake is closed and the last job torn down.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct UntilDrained;

/// Accepts jobs from API clients. See the [module](self).
pub struct HttpIntake {
    supervisor: Addr<JobSupervisor>,
    single_job: bool,
    /// With `single_job`, the job that was accepted.
    only: Option<JobId>,
    /// The last job that was started.
    last: Option<JobId>,
    progress: watch::Sender<Progress>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    closed: bool,
    /// The number of jobs sent to the supervisor that have neither finished nor been refused.
    active: u32,
}

impl HttpIntake {
    /// Creates an open intake. With `single_job` it closes at the end of the first job.
    pub fn new(supervisor: Addr<JobSupervisor>, single_job: bool) -> Self {
        Self { supervisor, single_job, only: None, last: None, progress: watch::Sender::default() }
    }

    fn admit(&mut self, job: &Job) -> Result<(), SubmitRefused> {
        match &job.logger {
            Err(problems) => return Err(SubmitRefused::Unfit(problems.clone())),
            Ok(logger) if matches!(logger.method, LogMethod::Push(_)) => {
                let message = "`push` can't be served here; this agent's logs are pulled".into();
                let problem = Problem { path: "logger.method".into(), message };
                return Err(SubmitRefused::Unfit(vec![problem]));
            }
            Ok(_) => {}
        }
        let now = *self.progress.borrow();
        match &self.only {
            // The supervisor replies to a job that comes again.
            _ if self.last.as_ref() == Some(&job.id) => Ok(()),
            _ if now.closed => Err(SubmitRefused::Closed),
            Some(only) if *only != job.id && now.active > 0 => Err(SubmitRefused::Busy),
            Some(only) if *only != job.id => Err(SubmitRefused::Closed),
            _ => Ok(()),
        }
    }

    fn one_less(&mut self, close: bool) {
        self.progress.send_modify(|progress| {
            progress.active = progress.active.saturating_sub(1);
            progress.closed |= close;
        });
    }
}

impl Actor for HttpIntake {
    type Context = Context<Self>;
}

impl Handler<SubmitJob> for HttpIntake {
    type Result = ResponseActFuture<Self, Result<Submission, SubmitRefused>>;

    fn handle(&mut self, message: SubmitJob, ctx: &mut Self::Context) -> Self::Result {
        let SubmitJob { job } = message;
        if let Err(refused) = self.admit(&job) {
            return Box::pin(std::future::ready(Err(refused)).into_actor(self));
        }
        let id = job.id.clone();
        if self.single_job {
            self.only = Some(id.clone());
        }
        self.progress.send_modify(|progress| progress.active += 1);
        let finished = ctx.address().recipient();
        let started = self.supervisor.send(StartJob { job, finished });
        Box::pin(started.into_actor(self).map(move |started, intake, _| {
            let answer = match started {
                Ok(Ok(())) => {
                    log::info!(job:% = id; "job started");
                    intake.last = Some(id);
                    return Ok(Submission::Started);
                }
                Ok(Err(StartError::Refused(StartRefused::SameJob { .. }))) => {
                    Ok(Submission::AlreadyRunning)
                }
                Ok(Err(StartError::Refused(StartRefused::Busy { .. }))) => Err(SubmitRefused::Busy),
                Ok(Err(error @ StartError::NoParts(_))) => {
                    intake.only = None;
                    Err(SubmitRefused::Failed(error))
                }
                Err(_) => Err(SubmitRefused::Crashed),
            };
            intake.one_less(false);
            answer
        }))
    }
}

impl Handler<JobFinished> for HttpIntake {
    type Result = ();

    fn handle(&mut self, message: JobFinished, _: &mut Self::Context) {
        let JobFinished { id, outcome } = message;
        log::info!(job:% = id, outcome:%; "job torn down");
        self.one_less(self.single_job);
    }
}

impl Handler<ReadJobLog> for HttpIntake {
    type Result = ResponseFuture<Result<LogRange, ReadRefused>>;

    fn handle(&mut self, message: ReadJobLog, _: &mut Self::Context) -> Self::Result {
        let ReadJobLog { id, line } = message;
        let supervisor = self.supervisor.clone();
        Box::pin(async move {
            for _ in 0..CRASHED_LOG_TRIES {
                let log = supervisor.send(GetLog).await.map_err(|_| LogError::Crashed)?;
                let log = log.ok_or(ReadRefused::NoJob)?;
                if log.id != id {
                    return Err(ReadRefused::OtherJob);
                }
                if let Ok(range) = log.buffer.send(ReadFrom { line }).await {
                    return Ok(range?);
                }
                // The job replaces a crashed buffer when it notices the crash.
                sleep(CRASHED_LOG_PAUSE).await;
            }
            Err(LogError::Crashed.into())
        })
    }
}

impl Handler<RequestStop> for HttpIntake {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, message: RequestStop, _: &mut Self::Context) -> Self::Result {
        let stop = self.supervisor.send(StopJob { id: message.id, manner: StopManner::Grace });
        Box::pin(async move {
            // Without a supervisor there is nothing to stop.
            let _ = stop.await;
        })
    }
}

impl Handler<ReportTransfer> for HttpIntake {
    type Result = ();

    fn handle(&mut self, message: ReportTransfer, _: &mut Self::Context) {
        self.supervisor.do_send(message);
    }
}

impl Handler<GetStatus> for HttpIntake {
    type Result = ResponseFuture<Status>;

    fn handle(&mut self, _: GetStatus, _: &mut Self::Context) -> Self::Result {
        let (job, wait) = (self.supervisor.send(GetActiveJob), self.supervisor.send(GetWaitsFor));
        Box::pin(async move {
            let job = job.await;
            let is_alive = job.is_ok();
            let state = match job {
                Ok(None) => State::WaitingForJob,
                // Without a supervisor the agent can't run a job.
                Ok(Some(_)) | Err(_) => State::JobReceived,
            };
            Status { state, waits_for: wait.await.unwrap_or_default(), is_alive }
        })
    }
}

impl Handler<Close> for HttpIntake {
    type Result = ();

    fn handle(&mut self, _: Close, _: &mut Self::Context) {
        self.progress.send_modify(|progress| progress.closed = true);
    }
}

impl Handler<UntilDrained> for HttpIntake {
    // As a future of this actor, so that the reply fails when the actor crashes.
    type Result = ResponseActFuture<Self, ()>;

    fn handle(&mut self, _: UntilDrained, _: &mut Self::Context) -> Self::Result {
        let mut progress = self.progress.subscribe();
        let drained = async move {
            // Fails only when this actor is dropped, and then there is no reply.
            let _ = progress.wait_for(|now| now.closed && now.active == 0).await;
        };
        Box::pin(drained.into_actor(self))
    }
}
