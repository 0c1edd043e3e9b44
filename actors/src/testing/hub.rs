//! A scripted control plane.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use tokio::time::sleep;

use super::ScriptedJob;
use crate::intake::protocol::{AgentState, Answer, Report};
use crate::job::{Job, JobId};
use crate::ports::{HubApi, HubError};

/// A control plane that assigns its queued jobs one after another, unless an answer is scripted.
/// Clones share the state.
///
/// Its calls are recorded in [`ScriptedJob::calls`]: `register`,
/// `report STATE [ID [RESULT]] [interrupted]`, `fetch ID`, `refresh`, `disconnect`.
#[derive(Clone)]
pub struct ScriptedHub(Rc<HubState>);

struct HubState {
    world: ScriptedJob,
    jobs: RefCell<VecDeque<(String, Job)>>,
    answers: RefCell<VecDeque<Answer>>,
    refusals: RefCell<BTreeMap<&'static str, u32>>,
    latency: Cell<Duration>,
    denials: Cell<u32>,
}

impl ScriptedHub {
    /// Creates a control plane without jobs, which records its calls in `world`.
    pub fn new(world: &ScriptedJob) -> Self {
        Self(Rc::new(HubState {
            world: world.clone(),
            jobs: RefCell::default(),
            answers: RefCell::default(),
            refusals: RefCell::default(),
            latency: Cell::default(),
            denials: Cell::default(),
        }))
    }

    /// Queues a job, to be fetched by `id`.
    pub fn queue(&self, id: &str, job: Job) {
        self.0.jobs.borrow_mut().push_back((id.to_owned(), job));
    }

    /// Queues an answer to a report; each is used once.
    pub fn answer(&self, answer: Answer) {
        self.0.answers.borrow_mut().push_back(answer);
    }

    /// Queues an answer with only an action and a job id.
    pub fn say(&self, action: &str, job_id: &str) {
        let (action, job_id) = (action.to_owned(), job_id.to_owned());
        self.answer(Answer { action, job_id, ..Answer::default() });
    }

    /// Lets the next `times` calls of `kind` (`register`, `report`, `fetch`, `refresh`, `disconnect`) fail.
    pub fn refuse(&self, kind: &'static str, times: u32) {
        self.0.refusals.borrow_mut().insert(kind, times);
    }

    /// Answers the next `times` reports as a control plane that has deleted the agent.
    pub fn deny(&self, times: u32) {
        self.0.denials.set(times);
    }

    /// Delays every answer from now on.
    pub fn take(&self, latency: Duration) {
        self.0.latency.set(latency);
    }

    /// Records a call at once, and returns its answer after the latency.
    fn called<T: 'static>(
        &self,
        kind: &'static str,
        call: String,
        answer: impl FnOnce() -> Result<T, HubError>,
    ) -> LocalBoxFuture<'static, Result<T, HubError>> {
        self.0.world.call(call);
        let answer = match self.0.refusals.borrow_mut().get_mut(kind) {
            Some(left) if *left > 0 => {
                *left -= 1;
                Err(HubError::Transient("503".into()))
            }
            _ => answer(),
        };
        let latency = self.0.latency.get();
        async move {
            if latency > Duration::ZERO {
                sleep(latency).await;
            }
            answer
        }
        .boxed_local()
    }

    fn answer_to(&self, report: &Report) -> Answer {
        if let Some(answer) = self.0.answers.borrow_mut().pop_front() {
            return answer;
        }
        let mut jobs = self.0.jobs.borrow_mut();
        let (action, job_id) = match report.state {
            AgentState::WaitingForJobs => match jobs.front() {
                Some((id, _)) => ("run-job", id.clone()),
                None => ("continue", String::new()),
            },
            AgentState::FinishedJob => {
                jobs.retain(|(id, _)| *id != report.job_id);
                ("wait-for-jobs", String::new())
            }
            _ => ("continue", String::new()),
        };
        Answer { action: action.to_owned(), job_id, ..Answer::default() }
    }
}

/// Formats a report for [`ScriptedJob::calls`].
fn words(report: &Report) -> String {
    let state = serde_json::to_value(report.state).unwrap_or_default();
    let interrupted = if report.interrupted_at == 0 { "" } else { "interrupted" };
    let words = [
        "report",
        state.as_str().unwrap_or_default(),
        &report.job_id,
        report.job_result,
        interrupted,
    ];
    words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

impl HubApi for ScriptedHub {
    fn register(&self) -> LocalBoxFuture<'static, Result<(), HubError>> {
        self.called("register", "register".to_owned(), || Ok(()))
    }

    fn sync(&self, report: &Report) -> LocalBoxFuture<'static, Result<Answer, HubError>> {
        self.called("report", words(report), || match self.0.denials.get() {
            0 => Ok(self.answer_to(report)),
            left => {
                self.0.denials.set(left - 1);
                Err(HubError::NotFound("404".into()))
            }
        })
    }

    fn fetch_job(&self, id: &JobId) -> LocalBoxFuture<'static, Result<Job, HubError>> {
        self.called("fetch", format!("fetch {id}"), || {
            let jobs = self.0.jobs.borrow();
            let wanted = jobs.iter().find(|(queued, _)| queued == id.as_str());
            match wanted {
                Some((_, job)) => Ok(job.clone()),
                None => Err(HubError::Transient("404".into())),
            }
        })
    }

    /// Returns the token `fresh`.
    fn refresh_log_token(&self) -> LocalBoxFuture<'static, Result<String, HubError>> {
        self.called("refresh", "refresh".to_owned(), || Ok("fresh".to_owned()))
    }

    fn disconnect(&self) -> LocalBoxFuture<'static, Result<(), HubError>> {
        self.called("disconnect", "disconnect".to_owned(), || Ok(()))
    }
}
