//! Ends what jobs left whose agents died with everything that could clean up.

use std::io;

use super::docker::watch;
use super::job_mark;
use crate::service::environment::Environment;
use crate::state::DeadJobs;

/// Ends everything that the jobs have on this machine, and has a guard end what they may have elsewhere. Their files
/// are deleted when nothing of theirs is left. `environment` tells where the engine is.
pub fn end(mut dead: DeadJobs, environment: &Environment) -> io::Result<()> {
    let environment = environment.without_secrets();
    for files in std::mem::take(&mut dead.jobs) {
        if !job_mark::kill_all_and_guards(&files.mark()) {
            log::warn!(place = files.name(); "processes of a dead job can't be killed");
        }
        files.delete_secrets();
        if files.may_be_elsewhere() {
            watch::end_dead(files, &environment)?;
        } else {
            files.delete();
        }
    }
    job_mark::kill_strays(dead.state(), |name| dead.is_known(name));
    Ok(())
}
