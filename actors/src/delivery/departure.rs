//! The deadlines of an agent that is to end.

use std::time::Duration;

use tokio::time::Instant;

/// How long leaving may take in all, from the decision to leave on.
pub(crate) const LEAVING: Duration = Duration::from_mins(1);

/// How long after the decision to leave a stopped job is killed, so that there is time to deliver
/// its log.
pub(crate) const CUT_SHORT: Duration = Duration::from_secs(25);

/// The end of [`LEAVING`] that is reserved for disconnecting and for what comes after, whatever the
/// job does.
pub(crate) const FOR_DISCONNECTING: Duration = Duration::from_secs(10);

/// The end of [`LEAVING`] that is reserved for what comes after disconnecting: the shutdown hook.
pub(crate) const FOR_THE_REST: Duration = Duration::from_secs(5);

/// How long delivery may take once the job has ended and the agent was asked to end: service
/// managers kill after 90 s.
const INTERRUPTED_PATIENCE: Duration = Duration::from_mins(1);

/// How long before [`Urgency::leave_by`] delivery is given up: the agent then still has to end the
/// job, report its outcome and disconnect.
const RESERVED_FOR_LEAVING: Duration = Duration::from_secs(15);

/// How soon the agent has to end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Urgency {
    /// The time of the first SIGTERM or SIGINT; the control plane decides when the agent ends.
    pub interrupted_at: Option<Instant>,
    /// The time at which the agent ends, whatever is not done by then.
    pub leave_by: Option<Instant>,
}

impl Urgency {
    /// Returns the time at which the delivery of the log of a job that ended at `job_ended` is given up; `None` if the
    /// agent is not to end.
    pub(crate) fn delivers_until(self, job_ended: Instant) -> Option<Instant> {
        let interrupted = self.interrupted_at.map(|at| at.max(job_ended) + INTERRUPTED_PATIENCE);
        let leaving = self.leave_by.map(|by| by - RESERVED_FOR_LEAVING);
        [interrupted, leaving].into_iter().flatten().min()
    }
}
