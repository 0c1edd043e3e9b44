//! Owns the conversation with the control plane, from the registration until the agent leaves.
//!
//! Receives [`Interrupt`] and [`LeaveSoon`] from the signal handling, and [`JobFinished`] from the
//! supervisor; sends the supervisor [`CheckReadiness`], [`StartJob`] and [`StopJob`]. The reply to
//! [`AwaitLeave`] comes at the end.
//!
//! [`SyncProtocol`] decides what to report and to do; this actor adds clocks, retries and time
//! limits. At most one report is under way: a change meanwhile is reported right after its answer.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use actix::prelude::*;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use crate::delivery::departure::{CUT_SHORT, FOR_DISCONNECTING, FOR_THE_REST, LEAVING, Urgency};
use crate::errors::WithCauses;
use crate::intake::attempts::{
    AFTER_FAILURE, DISCONNECT, FETCH, LONGEST_PAUSE, NotFoundStreak, SHORTEST_PAUSE, USUAL_PAUSE,
    register, retried,
};
use crate::intake::fetched::fitted;
use crate::intake::protocol::{
    AgentState, Answer, Decision, Effect, Report, ShutdownReason, SyncProtocol,
};
use crate::job::{EnvVar, Job, JobId};
use crate::log::event::unix_time;
use crate::ports::{HubApi, HubError};
use crate::retry::Retry;
use crate::supervisor::{
    CheckReadiness, JobFinished, JobSupervisor, StartJob, StopJob, StopManner,
};

/// How long a job's result is reported, at least, if no report succeeds.
const RESULT_PATIENCE: Duration = Duration::from_mins(15);

/// How long after the last successful report the agent shuts down.
const UNABLE_TO_SYNC: Duration = Duration::from_mins(10);

/// How long the answer to a report is waited for if there is something new to report.
const STALE_REPORT: Duration = Duration::from_secs(5);

/// Tells the control plane that the agent was asked to end (SIGTERM, SIGINT); the control plane
/// decides when. A registration that is not complete yet is given up.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct Interrupt;

/// Ends the agent in order, without waiting for the control plane's decision: stops the job,
/// reports its result, disconnects.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct LeaveSoon;

/// Returns how the conversation ended, once it has.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Left")]
pub struct AwaitLeave;

/// How the conversation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Left {
    /// The agent could not be registered, for this reason.
    NotRegistered(String),
    /// The agent has left.
    Because {
        /// Why the agent shuts down.
        reason: ShutdownReason,
        /// The time by which the rest, such as the shutdown hook, must be done.
        by: Instant,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Registration {
    Pending,
    Valid,
    /// The agent has begun to leave, or has left.
    Over,
}

/// A report that is under way.
struct Reporting {
    answer: SpawnHandle,
    sent: Instant,
    /// The answer can be lost: it neither assigns a job nor acknowledges a result.
    is_replaceable: bool,
}

/// Talks to the control plane. See the [module](self).
pub struct SyncPoller {
    hub: Rc<dyn HubApi>,
    supervisor: Addr<JobSupervisor>,
    /// The operator's variables, which win over a job's own.
    variables: Vec<EnvVar>,
    urgency: watch::Sender<Urgency>,
    protocol: SyncProtocol,
    registration: Registration,
    /// The report that is under way.
    reporting: Option<Reporting>,
    /// The state has changed since `reporting` was sent: report again after its answer.
    more_to_tell: bool,
    /// The timer for the next report.
    next_report: Option<SpawnHandle>,
    /// The time of the last successful report.
    last_taken: Instant,
    /// The number of 404s in a row, and the time of the first one.
    not_found: NotFoundStreak,
    /// The control plane has deleted the agent, which registers again when its job has ended.
    is_forgotten: bool,
    /// The agent serves a single job (`--job-id`), and leaves if that job is gone.
    is_for_one_job: bool,
    /// The time since when no job could be started here.
    unready_since: Option<Instant>,
    /// The time when the last job finished.
    result_since: Option<Instant>,
    /// The job that is being fetched.
    fetching: Option<SpawnHandle>,
    left: watch::Sender<Option<Left>>,
}

/// Why a report has no answer.
enum NotTaken {
    /// The report was not sent, because a job could not be started now, for this reason.
    NotReady(io::Error),
    /// Sending the report failed.
    Failed(HubError),
}

impl SyncPoller {
    /// Creates a poller, which registers the agent when it is started. `variables` are added to
    /// every job's environment.
    pub fn new(
        hub: Rc<dyn HubApi>,
        supervisor: Addr<JobSupervisor>,
        variables: Vec<EnvVar>,
        urgency: watch::Sender<Urgency>,
    ) -> Self {
        Self {
            hub,
            supervisor,
            variables,
            urgency,
            protocol: SyncProtocol::default(),
            registration: Registration::Pending,
            reporting: None,
            more_to_tell: false,
            next_report: None,
            last_taken: Instant::now(),
            not_found: NotFoundStreak::default(),
            is_forgotten: false,
            is_for_one_job: false,
            unready_since: None,
            result_since: None,
            fetching: None,
            left: watch::Sender::default(),
        }
    }

    /// Sets whether the agent serves a single job, so that it leaves if that job is gone.
    #[must_use]
    pub fn for_one_job(self, is_for_one_job: bool) -> Self {
        Self { is_for_one_job, ..self }
    }

    fn register(&mut self, ctx: &mut Context<Self>) {
        let hub = Rc::clone(&self.hub);
        let registered = async move { register(&*hub).await };
        ctx.spawn(registered.into_actor(self).map(|registered, this, ctx| match registered {
            Ok(()) if this.registration == Registration::Pending => {
                log::info!("registered");
                this.registration = Registration::Valid;
                this.last_taken = Instant::now();
                this.report(ctx);
            }
            Err(error) if this.registration == Registration::Pending => {
                this.left.send_replace(Some(Left::NotRegistered(WithCauses(&error).to_string())));
            }
            // The agent has left meanwhile.
            Ok(()) | Err(_) => {}
        }));
    }

    fn report(&mut self, ctx: &mut Context<Self>) {
        if self.registration != Registration::Valid {
            return;
        }
        if let Some(Reporting { sent, .. }) = self.reporting {
            self.more_to_tell = true;
            let stale = (sent + STALE_REPORT).saturating_duration_since(Instant::now());
            ctx.run_later(stale, move |this, ctx| this.give_up_report(sent, ctx));
            return;
        }
        if let Some(timer) = self.next_report.take() {
            ctx.cancel_future(timer);
        }
        let report = self.protocol.report();
        let is_replaceable =
            !matches!(report.state, AgentState::WaitingForJobs | AgentState::FinishedJob);
        // A report that the agent waits for jobs is a request for one.
        let is_asking = report.state == AgentState::WaitingForJobs && report.interrupted_at == 0;
        let readiness = is_asking.then(|| self.supervisor.send(CheckReadiness));
        let hub = Rc::clone(&self.hub);
        let told = report.clone();
        let answer = async move {
            if let Some(readiness) = readiness
                && let Ok(Err(error)) = readiness.await
            {
                return Err(NotTaken::NotReady(error));
            }
            hub.sync(&told).await.map_err(NotTaken::Failed)
        };
        let answered = answer.into_actor(self);
        let answered = answered.map(move |answer, this, ctx| this.reported(&report, answer, ctx));
        let (answer, sent) = (ctx.spawn(answered), Instant::now());
        self.reporting = Some(Reporting { answer, sent, is_replaceable });
    }

    /// Drops the report sent at `sent`, if it still has no answer, for a newer one.
    fn give_up_report(&mut self, sent: Instant, ctx: &mut Context<Self>) {
        if self.more_to_tell
            && let Some(Reporting { answer, .. }) =
                self.reporting.take_if(|its| its.sent == sent && its.is_replaceable)
        {
            log::warn!("no answer to a report; sending a newer one");
            ctx.cancel_future(answer);
            self.more_to_tell = false;
            self.report(ctx);
        }
    }

    fn reported(
        &mut self,
        sent: &Report,
        answer: Result<Answer, NotTaken>,
        ctx: &mut Context<Self>,
    ) {
        self.reporting = None;
        let unready_since = self.unready_since.take();
        let (decision, pause) = match answer {
            Err(NotTaken::NotReady(error)) => {
                if unready_since.is_none() {
                    log::error!(error:% = WithCauses(&error); "no job can be started here now; not asking for one");
                }
                self.unready_since = unready_since.or_else(|| Some(Instant::now()));
                self.last_taken = Instant::now();
                (Decision::default(), fastrand::u64(USUAL_PAUSE))
            }
            Ok(answer) => {
                log::debug!(state:? = sent.state, action = answer.action.as_str(); "reported");
                self.last_taken = Instant::now();
                self.not_found = NotFoundStreak::default();
                let pause = match answer.next_sync_after {
                    0 => fastrand::u64(USUAL_PAUSE),
                    asked => asked.clamp(SHORTEST_PAUSE, LONGEST_PAUSE),
                };
                (self.protocol.answered(sent, &answer), pause)
            }
            Err(NotTaken::Failed(error)) => {
                log::warn!(error:% = WithCauses(&error), state:? = sent.state; "the report to the control plane failed");
                if self.not_found.note(&error) && self.protocol.leaving().is_none() {
                    return self.forgotten(ctx);
                }
                let is_result = sent.state == AgentState::FinishedJob;
                let told_for = self.result_since.map(|since| since.elapsed());
                let is_due = is_result
                    && self.protocol.leaving().is_none()
                    && told_for.is_some_and(|told| told < RESULT_PATIENCE);
                let decision = if is_due || self.last_taken.elapsed() < UNABLE_TO_SYNC {
                    Decision::default()
                } else if self.protocol.leaving().is_some() {
                    self.protocol.sync_failed()
                } else {
                    log::error!("unable to sync for too long");
                    self.protocol.leave_soon(ShutdownReason::UnableToSync)
                };
                (decision, fastrand::u64(AFTER_FAILURE))
            }
        };
        let more_to_tell = std::mem::take(&mut self.more_to_tell);
        self.act(decision, ctx);
        if self.reporting.is_some() {
            // `act` has begun a new report, with everything that has changed.
        } else if more_to_tell {
            self.report(ctx);
        } else {
            let pause = Duration::from_millis(pause);
            self.next_report = Some(ctx.run_later(pause, Self::report));
        }
    }

    /// Registers again, once no job runs: the control plane has deleted the agent and failed its
    /// job.
    fn forgotten(&mut self, ctx: &mut Context<Self>) {
        log::warn!("the control plane has deleted this agent; registering again");
        (self.not_found, self.more_to_tell) = (NotFoundStreak::default(), false);
        self.registration = Registration::Pending;
        if let Some(fetching) = self.fetching.take() {
            ctx.cancel_future(fetching);
        }
        if let Some(Effect::Stop(id)) = self.protocol.forgotten() {
            self.stop(id, ctx);
        }
        if self.protocol.is_running() {
            self.is_forgotten = true;
        } else {
            self.protocol.begin_anew();
            self.register(ctx);
        }
    }

    fn act(&mut self, decision: Decision, ctx: &mut Context<Self>) {
        if let Some(reason) = self.protocol.leaving()
            && self.urgency.borrow().leave_by.is_none()
        {
            self.urgency.send_modify(|urgency| urgency.leave_by = Some(Instant::now() + LEAVING));
            ctx.run_later(CUT_SHORT, |this, _| {
                this.supervisor.do_send(StopJob { id: None, manner: StopManner::AtOnce });
            });
            let latest = LEAVING.saturating_sub(FOR_DISCONNECTING);
            ctx.run_later(latest, move |this, ctx| this.leave(reason, ctx));
        }
        match decision.effect {
            Some(Effect::Fetch(id)) => self.fetch(id, ctx),
            Some(Effect::Stop(id)) => self.stop(id, ctx),
            Some(Effect::Leave(reason)) => self.leave(reason, ctx),
            None => {}
        }
        if decision.sync_now {
            self.report(ctx);
        }
    }

    fn fetch(&mut self, id: JobId, ctx: &mut Context<Self>) {
        log::info!(job:% = id; "asked to run a job");
        let (hub, wanted) = (Rc::clone(&self.hub), id.clone());
        let job = async move { retried(FETCH, "job", async || hub.fetch_job(&wanted).await).await };
        let fetched = job.into_actor(self).map(move |job, this, ctx| {
            this.fetching = None;
            match job.and_then(|job| fitted(job, &id, &this.variables)) {
                Ok(job) => this.start(job, ctx),
                Err(HubError::JobGone) => {
                    log::info!(job:% = id; "the job is not available any more");
                    let mut decision = this.protocol.job_gone(&id);
                    if this.is_for_one_job {
                        decision = this.protocol.leave_soon(ShutdownReason::JobFinished);
                    }
                    this.act(decision, ctx);
                }
                Err(error) => this.give_up(&id, &WithCauses(&error).to_string(), ctx),
            }
        });
        self.fetching = Some(ctx.spawn(fetched));
    }

    fn start(&mut self, job: Job, ctx: &mut Context<Self>) {
        let id = job.id.clone();
        let started = self.supervisor.send(StartJob { job, finished: ctx.address().recipient() });
        ctx.spawn(started.into_actor(self).map(move |started, this, ctx| match started {
            Ok(Ok(())) => {
                log::info!(job:% = id; "job started");
                let decision = this.protocol.job_started(&id);
                this.act(decision, ctx);
            }
            Ok(Err(error)) => this.give_up(&id, &WithCauses(&error).to_string(), ctx),
            Err(_) => this.give_up(&id, "the job supervisor has crashed", ctx),
        }));
    }

    fn give_up(&mut self, id: &JobId, why: &str, ctx: &mut Context<Self>) {
        log::error!(job:% = id, why; "the job can't be run");
        let decision = self.protocol.job_not_run(id);
        self.act(decision, ctx);
    }

    fn stop(&mut self, id: JobId, ctx: &mut Context<Self>) {
        log::info!(job:% = id; "asked to stop the job");
        if let Some(fetching) = self.fetching.take() {
            ctx.cancel_future(fetching);
            let decision = self.protocol.job_not_run(&id);
            self.act(decision, ctx);
        } else {
            self.supervisor.do_send(StopJob { id: Some(id), manner: StopManner::Grace });
        }
    }

    fn leave(&mut self, reason: ShutdownReason, ctx: &mut Context<Self>) {
        let by = self.urgency.borrow().leave_by.unwrap_or_else(|| Instant::now() + LEAVING);
        match std::mem::replace(&mut self.registration, Registration::Over) {
            Registration::Valid => {}
            Registration::Pending => {
                self.left.send_replace(Some(Left::Because { reason, by }));
                return;
            }
            Registration::Over => return,
        }
        let retry = if reason == ShutdownReason::UnableToSync {
            Retry { most: 1, ..DISCONNECT }
        } else {
            DISCONNECT
        };
        let hub = Rc::clone(&self.hub);
        let disconnected = async move {
            let disconnected = retried(retry, "disconnect", async || hub.disconnect().await);
            match timeout_at(by - FOR_THE_REST, disconnected).await {
                Ok(Ok(())) => log::info!("disconnected"),
                Ok(Err(error)) => log::error!(error:%; "not disconnected"),
                Err(_) => log::error!("not disconnected in time"),
            }
        };
        ctx.spawn(disconnected.into_actor(self).map(move |(), this, _| {
            this.left.send_replace(Some(Left::Because { reason, by }));
        }));
    }
}

impl Actor for SyncPoller {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.register(ctx);
    }
}

impl Handler<JobFinished> for SyncPoller {
    type Result = ();

    fn handle(&mut self, message: JobFinished, ctx: &mut Self::Context) {
        let JobFinished { id, outcome } = message;
        log::info!(job:% = id, outcome:%; "job finished");
        if std::mem::take(&mut self.is_forgotten) {
            return match self.protocol.leaving() {
                Some(reason) => self.leave(reason, ctx),
                None => {
                    self.protocol.begin_anew();
                    self.register(ctx);
                }
            };
        }
        self.result_since = Some(Instant::now());
        let decision = self.protocol.job_over(&id, outcome);
        self.act(decision, ctx);
    }
}

impl Handler<Interrupt> for SyncPoller {
    type Result = ();

    fn handle(&mut self, _: Interrupt, ctx: &mut Self::Context) {
        self.urgency.send_modify(|urgency| {
            urgency.interrupted_at.get_or_insert_with(Instant::now);
        });
        let decision = if self.registration != Registration::Pending {
            self.protocol.interrupted(unix_time())
        } else if self.is_forgotten {
            // There is nobody to decide, and a job to bring to its end.
            self.protocol.leave_soon(ShutdownReason::Interrupted)
        } else {
            return self.leave(ShutdownReason::Interrupted, ctx);
        };
        self.act(decision, ctx);
    }
}

impl Handler<LeaveSoon> for SyncPoller {
    type Result = ();

    fn handle(&mut self, _: LeaveSoon, ctx: &mut Self::Context) {
        let decision = self.protocol.leave_soon(ShutdownReason::Interrupted);
        self.act(decision, ctx);
    }
}

impl Handler<AwaitLeave> for SyncPoller {
    // As a future of this actor, so that the reply fails when the actor crashes.
    type Result = ResponseActFuture<Self, Left>;

    fn handle(&mut self, _: AwaitLeave, _: &mut Self::Context) -> Self::Result {
        let mut left = self.left.subscribe();
        let left = async move {
            match left.wait_for(Option::is_some).await.ok().and_then(|left| left.clone()) {
                Some(left) => left,
                // Fails only when this actor is dropped, and then there is no reply.
                None => std::future::pending().await,
            }
        };
        Box::pin(left.into_actor(self))
    }
}
