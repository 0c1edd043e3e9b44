//! Decides what the agent reports to its control plane, and how it acts on the answers
//! (docs/protocol.md: "The self-hosted API"). Pure.
//!
//! ```text
//!           run-job             job_started               job_over
//! Waiting ──────────▶ Starting ────────────▶ Running ────────────────▶ Finished
//!    ▲                   │ job_not_run          │ stop-job: Stopping      │  ▲
//!    │                   └──────────────────────┴─────────────────────────┼──┘
//!    └──────────────── wait-for-jobs, as the answer to this very result ──┘
//! ```
//!
//! An answer belongs to the report that it answers: a decision made before the control plane knew
//! of a job's end must not make the agent forget the result. An answer that does not fit the state
//! changes nothing. A shutdown stops the job first, then its result is reported, then the agent
//! leaves.

use serde::{Deserialize, Serialize};

use crate::job::{JobId, Outcome};

/// The agent's state; the body of `POST /sync`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// What the agent is doing.
    pub state: AgentState,
    /// The id of the agent's job; empty without a job.
    pub job_id: String,
    /// The outcome of a finished job; empty in all other states.
    pub job_result: &'static str,
    /// The time when the agent was first asked to end, in seconds since the epoch; 0 if it was not.
    pub interrupted_at: u64,
}

/// The protocol's words for what an agent is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentState {
    /// The agent has no job.
    WaitingForJobs,
    /// The agent fetches a job.
    StartingJob,
    /// The agent runs a job, or delivers its log.
    RunningJob,
    /// The agent runs a job that was stopped, or delivers its log.
    StoppingJob,
    /// The agent's job is torn down, and its log delivered.
    FinishedJob,
}

/// The control plane's answer to a [`Report`]. A field of the wrong type counts as absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Answer {
    /// What the agent is to do: `continue`, `run-job`, `stop-job`, `wait-for-jobs` or `shutdown`.
    /// Any other word means `continue`.
    #[serde(deserialize_with = "lenient_text")]
    pub action: String,
    /// The id of the job to run or to stop.
    #[serde(deserialize_with = "lenient_text")]
    pub job_id: String,
    /// The reason for a `shutdown` (see [`ShutdownReason`]).
    #[serde(deserialize_with = "lenient_text")]
    pub shutdown_reason: String,
    /// The pause before the next report, in milliseconds; 0 leaves it to the agent.
    #[serde(deserialize_with = "lenient_milliseconds")]
    pub next_sync_after: u64,
}

/// Decodes a string; a value of any other type becomes an empty one.
fn lenient_text<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(match serde_json::Value::deserialize(deserializer)? {
        serde_json::Value::String(text) => text,
        _ => String::new(),
    })
}

/// Decodes a number of milliseconds, also with a fraction or in a string; any other value becomes
/// 0.
fn lenient_milliseconds<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<u64, D::Error> {
    let number = match serde_json::Value::deserialize(deserializer)? {
        serde_json::Value::Number(number) => number.as_f64(),
        serde_json::Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    let number = number.filter(|number: &f64| number.is_finite() && *number > 0.0);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "saturates, and is positive"
    )]
    Ok(number.unwrap_or(0.0) as u64)
}

/// Why an agent shuts down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShutdownReason {
    /// The agent had no job for too long.
    Idle,
    /// The agent was to run one job only.
    JobFinished,
    /// No report succeeded for too long.
    UnableToSync,
    /// A user requested it of the control plane.
    Requested,
    /// The agent got SIGTERM or SIGINT.
    Interrupted,
    /// The control plane gave no reason, or an unknown one.
    Unknown,
}

impl ShutdownReason {
    /// Returns the value of `SEMAPHORE_AGENT_SHUTDOWN_REASON` for shutdown hooks.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "IDLE",
            Self::JobFinished => "JOB_FINISHED",
            Self::UnableToSync => "UNABLE_TO_SYNC",
            Self::Requested => "REQUESTED",
            Self::Interrupted => "INTERRUPTED",
            Self::Unknown => "UNKNOWN",
        }
    }

    /// Parses a control plane's word, such as `job-finished`, `job_finished` or `JOB_FINISHED`.
    fn parse(word: &str) -> Self {
        let word = word.to_ascii_uppercase().replace('-', "_");
        let known =
            [Self::Idle, Self::JobFinished, Self::UnableToSync, Self::Requested, Self::Interrupted];
        known.into_iter().find(|reason| reason.as_str() == word).unwrap_or(Self::Unknown)
    }
}

/// An action that the agent must take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Fetch this job, and run it.
    Fetch(JobId),
    /// Stop this job; give up fetching it if it does not run yet.
    Stop(JobId),
    /// Disconnect and shut down: there is nothing left to do or to report.
    Leave(ShutdownReason),
}

/// The consequence of an event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// The action to take, if any.
    pub effect: Option<Effect>,
    /// Whether to report at once instead of after the usual pause.
    pub sync_now: bool,
}

impl Decision {
    const NOTHING: Self = Self { effect: None, sync_now: false };

    fn sync() -> Self {
        Self { effect: None, sync_now: true }
    }

    fn with(effect: Effect) -> Self {
        Self { effect: Some(effect), sync_now: true }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Waiting,
    Starting { id: JobId, stopping: bool },
    Running { id: JobId, stopping: bool },
    Finished { id: JobId, outcome: Outcome },
}

/// The agent's side of the conversation. See the [module](self).
#[derive(Clone, Debug)]
pub struct SyncProtocol {
    phase: Phase,
    /// The last job whose result the control plane has acknowledged.
    last: Option<(JobId, Outcome)>,
    interrupted_at: u64,
    leaving: Option<ShutdownReason>,
}

impl Default for SyncProtocol {
    fn default() -> Self {
        Self { phase: Phase::Waiting, last: None, interrupted_at: 0, leaving: None }
    }
}

impl SyncProtocol {
    /// Returns the report to send now.
    pub fn report(&self) -> Report {
        let (state, id, job_result) = match &self.phase {
            Phase::Waiting => (AgentState::WaitingForJobs, None, ""),
            Phase::Starting { id, .. } => (AgentState::StartingJob, Some(id), ""),
            Phase::Running { id, stopping: false } => (AgentState::RunningJob, Some(id), ""),
            Phase::Running { id, stopping: true } => (AgentState::StoppingJob, Some(id), ""),
            Phase::Finished { id, outcome } => {
                (AgentState::FinishedJob, Some(id), outcome.as_str())
            }
        };
        let job_id = id.map_or_else(String::new, |id| id.as_str().to_owned());
        Report { state, job_id, job_result, interrupted_at: self.interrupted_at }
    }

    /// Returns why the agent is leaving, once that is decided. A job may still be stopping.
    pub fn leaving(&self) -> Option<ShutdownReason> {
        self.leaving
    }

    /// Handles the answer to the report `sent`.
    pub fn answered(&mut self, sent: &Report, answer: &Answer) -> Decision {
        let result_is_known =
            matches!(self.phase, Phase::Finished { .. }) && *sent == self.report();
        if let Some(reason) = self.leaving
            && result_is_known
        {
            return Decision::with(Effect::Leave(reason));
        }
        match answer.action.as_str() {
            "run-job" => self.asked_to_run(sent, &answer.job_id),
            "stop-job" => self.asked_to_stop(&answer.job_id),
            "wait-for-jobs" if result_is_known => self.forget_job(),
            "shutdown" => {
                self.leave(ShutdownReason::parse(&answer.shutdown_reason), result_is_known)
            }
            _ => Decision::NOTHING,
        }
    }

    fn asked_to_run(&mut self, sent: &Report, id: &str) -> Decision {
        let Some(id) = JobId::new(id) else {
            return Decision::NOTHING;
        };
        if self.phase != Phase::Waiting || sent.state != AgentState::WaitingForJobs {
            return Decision::NOTHING;
        }
        if let Some((last, outcome)) = &self.last
            && *last == id
        {
            // The control plane has lost the result: report it again instead of running the job
            // twice. Not at once: a control plane that repeats itself would get an endless burst.
            self.phase = Phase::Finished { id, outcome: *outcome };
            return Decision::NOTHING;
        }
        self.phase = Phase::Starting { id: id.clone(), stopping: false };
        Decision::with(Effect::Fetch(id))
    }

    fn asked_to_stop(&mut self, named: &str) -> Decision {
        match &mut self.phase {
            Phase::Starting { id, stopping } | Phase::Running { id, stopping }
                if !*stopping && (named.is_empty() || named == id.as_str()) =>
            {
                *stopping = true;
                Decision::with(Effect::Stop(id.clone()))
            }
            _ => Decision::NOTHING,
        }
    }

    fn forget_job(&mut self) -> Decision {
        if let Phase::Finished { id, outcome } = std::mem::replace(&mut self.phase, Phase::Waiting)
        {
            self.last = Some((id, outcome));
        }
        Decision::sync()
    }

    fn leave(&mut self, reason: ShutdownReason, result_is_known: bool) -> Decision {
        let reason = *self.leaving.get_or_insert(reason);
        match self.phase {
            Phase::Waiting => Decision::with(Effect::Leave(reason)),
            Phase::Finished { .. } if result_is_known => Decision::with(Effect::Leave(reason)),
            Phase::Finished { .. } => Decision::sync(),
            Phase::Starting { .. } | Phase::Running { .. } => self.asked_to_stop(""),
        }
    }

    /// The job was started. Returns [`Effect::Stop`] if it is to be stopped already.
    pub fn job_started(&mut self, started: &JobId) -> Decision {
        match &self.phase {
            Phase::Starting { id, stopping } if id == started => {
                let (id, stopping) = (id.clone(), *stopping);
                self.phase = Phase::Running { id: id.clone(), stopping };
                let effect = stopping.then_some(Effect::Stop(id));
                Decision { effect, sync_now: true }
            }
            _ => Decision::NOTHING,
        }
    }

    /// The job can't be fetched any more ([`JobGone`](crate::ports::HubError::JobGone)): no result
    /// is reported.
    pub fn job_gone(&mut self, id: &JobId) -> Decision {
        match &self.phase {
            Phase::Starting { id: starting, .. } if starting == id => {
                self.phase = Phase::Waiting;
                match self.leaving {
                    Some(reason) => Decision::with(Effect::Leave(reason)),
                    None => Decision::sync(),
                }
            }
            _ => Decision::NOTHING,
        }
    }

    /// The control plane has deleted the agent and failed its job. Returns [`Effect::Stop`] if a
    /// job must be stopped before the agent registers again.
    pub fn forgotten(&mut self) -> Option<Effect> {
        match &mut self.phase {
            Phase::Running { id, stopping } => {
                let is_first = !std::mem::replace(stopping, true);
                is_first.then(|| Effect::Stop(id.clone()))
            }
            Phase::Waiting | Phase::Starting { .. } | Phase::Finished { .. } => None,
        }
    }

    /// Whether a job runs.
    pub fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running { .. })
    }

    /// Forgets all jobs, for an agent that registers again: the new registration has none.
    pub fn begin_anew(&mut self) {
        self.phase = Phase::Waiting;
        self.last = None;
    }

    /// The job could not be fetched or started, or was stopped before it ran.
    pub fn job_not_run(&mut self, id: &JobId) -> Decision {
        match &self.phase {
            Phase::Starting { id: starting, stopping } if starting == id => {
                let outcome = if *stopping { Outcome::Stopped } else { Outcome::Failed };
                self.finish(id, outcome)
            }
            _ => Decision::NOTHING,
        }
    }

    /// The job is torn down, and its log delivered.
    pub fn job_over(&mut self, id: &JobId, outcome: Outcome) -> Decision {
        match &self.phase {
            Phase::Starting { id: its, .. } | Phase::Running { id: its, .. } if its == id => {
                self.finish(id, outcome)
            }
            _ => Decision::NOTHING,
        }
    }

    fn finish(&mut self, id: &JobId, outcome: Outcome) -> Decision {
        self.phase = Phase::Finished { id: id.clone(), outcome };
        Decision::sync()
    }

    /// The agent was asked to end (SIGTERM, SIGINT); the control plane decides when. `now` is in
    /// seconds since the epoch. Only the first call counts.
    pub fn interrupted(&mut self, now: u64) -> Decision {
        if self.interrupted_at != 0 {
            return Decision::NOTHING;
        }
        self.interrupted_at = now.max(1);
        Decision::sync()
    }

    /// Decides that the agent leaves as soon as its job is stopped and the result reported.
    pub fn leave_soon(&mut self, reason: ShutdownReason) -> Decision {
        self.leave(reason, false)
    }

    /// A report failed while the agent is leaving. An agent that leaves because its reports fail
    /// does not repeat this one.
    pub fn sync_failed(&mut self) -> Decision {
        match (&self.phase, self.leaving) {
            (Phase::Waiting | Phase::Finished { .. }, Some(ShutdownReason::UnableToSync)) => {
                Decision::with(Effect::Leave(ShutdownReason::UnableToSync))
            }
            _ => Decision::NOTHING,
        }
    }
}

#[cfg(test)]
mod tests;
