//! Makes a fetched job fit for this agent.

use crate::delivery::push::target_of;
use crate::job::{EnvVar, Job, JobId};
use crate::ports::HubError;

/// Returns the job with the operator's variables added; fails if the job can't be run here.
pub(super) fn fitted(mut job: Job, id: &JobId, variables: &[EnvVar]) -> Result<Job, HubError> {
    let unusable = |why: &str| Err(HubError::Permanent(why.into()));
    if job.id != *id {
        return unusable("the control plane sent another job than the one requested");
    }
    if target_of(&job).is_none_or(|target| target.url.is_empty()) {
        return unusable("logger: a self-hosted agent needs method `push` and a `url`");
    }
    if let Ok(environment) = &mut job.environment {
        environment.retain(|its| variables.iter().all(|ours| ours.name != its.name));
        environment.extend(variables.iter().cloned());
        environment.sort_by(|a, b| a.name.cmp(&b.name));
    }
    Ok(job)
}
