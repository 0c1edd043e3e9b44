//! Decides which start and stop requests are accepted, ignored or refused. Pure.
//!
//! ```text
//!            start(id)                      torn_down
//! Idle ────────────────────▶ Active{id} ────────────────▶ Idle{last: id}
//!   stop: ignored              stop(id or none): Stop, then AlreadyStopping
//!   start(last): SameJob       start(id): SameJob   start(other): Busy
//! ```
//!
//! Control planes send the same job twice, and stops for jobs long gone: every case is decided
//! here.

use crate::job::JobId;

/// Why a job is not started.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartRefused {
    /// The job runs already, or was the last to run; it is not run twice.
    #[error("job `{id}` was started already")]
    SameJob {
        /// The id of the job.
        id: JobId,
    },
    /// The agent runs one job at a time.
    #[error("job `{running}` is still running")]
    Busy {
        /// The job that holds the slot.
        running: JobId,
    },
}

/// The effect of a stop request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopDecision {
    /// The job must be stopped now.
    Stop,
    /// A stop of the job was requested before.
    AlreadyStopping,
    /// No job runs, or not the one that the request names.
    Ignored,
}

/// The one job slot of an agent.
#[derive(Debug, Default)]
pub struct JobLifecycle {
    active: Option<Active>,
    last: Option<JobId>,
}

#[derive(Debug)]
struct Active {
    id: JobId,
    stop_requested: bool,
}

impl JobLifecycle {
    /// Takes the slot for `id`.
    pub fn start(&mut self, id: &JobId) -> Result<(), StartRefused> {
        match &self.active {
            Some(active) if active.id == *id => Err(StartRefused::SameJob { id: id.clone() }),
            Some(active) => Err(StartRefused::Busy { running: active.id.clone() }),
            None if self.last.as_ref() == Some(id) => Err(StartRefused::SameJob { id: id.clone() }),
            None => {
                self.active = Some(Active { id: id.clone(), stop_requested: false });
                Ok(())
            }
        }
    }

    /// Frees the slot of a job that could not be started; the same job may be sent again.
    pub fn start_failed(&mut self) {
        self.active = None;
    }

    /// Records a stop of `id`, or with `None` of whichever job runs.
    pub fn stop(&mut self, id: Option<&JobId>) -> StopDecision {
        match &mut self.active {
            Some(active) if id.is_none_or(|id| *id == active.id) => {
                let again = std::mem::replace(&mut active.stop_requested, true);
                if again { StopDecision::AlreadyStopping } else { StopDecision::Stop }
            }
            _ => StopDecision::Ignored,
        }
    }

    /// Frees the slot: nothing of the job is left. The same job can't be started again.
    pub fn torn_down(&mut self) {
        self.last = self.active.take().map(|active| active.id).or(self.last.take());
    }

    /// Returns the id of the job that holds the slot.
    pub fn active(&self) -> Option<&JobId> {
        self.active.as_ref().map(|active| &active.id)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(name: &str) -> JobId {
        JobId::new(name).unwrap()
    }

    #[test]
    fn no_job_runs_twice() {
        let mut lifecycle = JobLifecycle::default();
        assert_eq!(lifecycle.start(&id("a")), Ok(()));
        assert_eq!(lifecycle.start(&id("a")), Err(StartRefused::SameJob { id: id("a") }));
        assert_eq!(lifecycle.start(&id("b")), Err(StartRefused::Busy { running: id("a") }));
        lifecycle.torn_down();
        assert_eq!(lifecycle.start(&id("a")), Err(StartRefused::SameJob { id: id("a") }));
        assert_eq!(lifecycle.start(&id("b")), Ok(()));
    }

    #[test]
    fn a_job_that_could_not_start_may_come_again() {
        let mut lifecycle = JobLifecycle::default();
        lifecycle.start(&id("a")).unwrap();
        lifecycle.start_failed();
        assert_eq!(lifecycle.start(&id("a")), Ok(()));
    }

    #[test]
    fn stops_count_once_and_only_for_the_running_job() {
        let mut lifecycle = JobLifecycle::default();
        assert_eq!(lifecycle.stop(None), StopDecision::Ignored);
        lifecycle.start(&id("a")).unwrap();
        assert_eq!(lifecycle.stop(Some(&id("b"))), StopDecision::Ignored);
        assert_eq!(lifecycle.stop(Some(&id("a"))), StopDecision::Stop);
        assert_eq!(lifecycle.stop(None), StopDecision::AlreadyStopping);
        lifecycle.torn_down();
        assert_eq!(lifecycle.stop(None), StopDecision::Ignored);
    }

    proptest! {
        #[test]
        fn no_sequence_runs_two_jobs_or_one_twice_in_a_row(steps in prop::collection::vec((0..3u8, 0..3u8), 0..60)) {
            let mut lifecycle = JobLifecycle::default();
            let mut running: Option<JobId> = None;
            let mut last: Option<JobId> = None;
            for (action, which) in steps {
                let id = id(["a", "b", "c"][usize::from(which)]);
                match action {
                    0 => if lifecycle.start(&id).is_ok() {
                        prop_assert_eq!(running.replace(id.clone()), None);
                        prop_assert_ne!(Some(id), last.clone());
                    },
                    1 => prop_assert_eq!(
                        lifecycle.stop(Some(&id)) == StopDecision::Ignored,
                        running.as_ref() != Some(&id)
                    ),
                    _ => {
                        lifecycle.torn_down();
                        last = running.take().or(last);
                    }
                }
                prop_assert_eq!(lifecycle.active(), running.as_ref());
            }
        }
    }
}
