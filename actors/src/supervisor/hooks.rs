//! The steps that run the operator's hooks.

use std::time::Duration;

use tokio::time::timeout;

use super::executor::{Export, Preparation, RunCommand};
use super::steps::{Interrupted, JobSteps, StepEnd, failed};
use crate::errors::WithCauses;
use crate::job::hooks::{HookPlace, HookRun};
use crate::ports::{End, Script};

/// How long the shell may take to go on after its foreground hook was killed.
const HOOK_KILL_PATIENCE: Duration = Duration::from_secs(5);

impl JobSteps {
    /// Runs the post-job hook of a stopped job, in a fresh shell with the job's environment.
    pub(crate) async fn run_post_job_hook_afresh(self) {
        // The protocol has no step for this preparation, so the job's log does not show it.
        loop {
            match self.prepare_hidden().await {
                Ok(Ok(Preparation::Next)) => {}
                Ok(Ok(Preparation::Done)) => break,
                Ok(Err(error)) => {
                    return log::error!(job:% = self.job.id, error:% = WithCauses(&error); "no shell for the post-job hook");
                }
                Err(_interrupted) => return,
            }
        }
        if let Ok(variables) = &self.job.environment
            && !variables.is_empty()
        {
            // A shell that can't export fails the hook, too, which then says why.
            let _ = self.ask(Export { variables: variables.clone() }).await;
        }
        let _ = self.run_post_job_hook().await;
    }

    pub(super) async fn run_post_job_hook(&self) -> Result<(), Interrupted> {
        if let Some(hook) = &self.hooks.post_job {
            self.hook_is_due.set(false);
            self.hook(hook.run()).await?;
        }
        Ok(())
    }

    pub(super) async fn hook(&self, hook: HookRun) -> StepEnd {
        let HookRun { command, announcement, patience, place } = hook;
        self.step(command.title(), async {
            let first = format!("Running: {}\n{announcement}", command.directive);
            self.log.print(&first).await?;
            let script = Script { text: command.directive.clone(), untraced: false };
            let mut ended = std::pin::pin!(self.scripted(RunCommand { script }));
            let Some(patience) = patience else {
                return ended.await;
            };
            if let Ok(ended) = timeout(patience, &mut ended).await {
                return ended;
            }
            let seconds = patience.as_secs();
            log::error!(job:% = self.job.id, hook = command.title(), seconds; "a hook exceeded its time limit; ending it");
            let line = format!("The hook took longer than {seconds} s and was ended.\n");
            self.log.print(&line).await?;
            if place == HookPlace::Process
                && self.containment.kill_foreground()
                && let Ok(ended) = timeout(HOOK_KILL_PATIENCE, &mut ended).await
            {
                return ended.map(|_| failed());
            }
            // The shell ends too, which ends the wait.
            let (_, ended) =
                tokio::join!(self.containment.end(End::Everything, Duration::ZERO), ended);
            ended.map(|_| failed())
        })
        .await
    }
}
