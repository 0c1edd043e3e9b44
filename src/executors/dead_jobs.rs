//! Cleans up jobs whose agent and guard are both dead.

use std::io;

use super::docker::watch;
use super::job_mark;
use crate::service::environment::Environment;
use crate::state::DeadJobs;

/// Kills all processes of `dead` jobs on this machine, and starts a guard for each that may have containers.
///
/// A job's files are deleted once nothing of the job is left. `environment` names the engine.
pub fn end(mut dead: DeadJobs, environment: &Environment) -> io::Result<()> {
    let environment = environment.without_secrets();
    for files in std::mem::take(&mut dead.jobs) {
        if !job_mark::kill_all_and_guards(&files.mark()) {
            log::warn!(place = files.name(); "processes of a dead job can't be killed");
        }
        files.delete_secrets();
        if files.may_own_containers() {
            watch::end_dead(files, &environment)?;
        } else {
            files.delete_all();
        }
    }
    job_mark::kill_strays(dead.state(), |name| dead.is_known(name));
    Ok(())
}
