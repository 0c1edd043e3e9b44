//! The steps that run the operator's hooks.

use std::time::Duration;

use tokio::time::timeout;

use super::executor::{Export, FlushOutput, GetPreparation, RunCommand};
use super::steps::{Interrupted, JobSteps, StepEnd, failed};
use crate::job::hooks::{HookPlace, HookRun};
use crate::ports::Script;

/// How long the shell may take to go on after its foreground hook was killed.
const HOOK_KILL_PATIENCE: Duration = Duration::from_secs(5);

impl JobSteps {
    /// Runs the post-job hook of a stopped job, in a fresh shell with the job's environment.
    pub(crate) async fn run_post_job_hook_afresh(self) {
        // The protocol has no step for this preparation, so the job's log does not show it.
        let Ok(Ok(steps)) = self.ask(GetPreparation).await else {
            return;
        };
        for step in 0..steps.len() {
            if let Ok(Err(error)) = self.prepare_quietly(step).await {
                return log::error!(job:% = self.job.id, error:%; "no shell for the post-job hook");
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
            self.log.append_output(first).await?;
            let script = Script { text: command.directive.clone(), untraced: false };
            let mut ended = std::pin::pin!(self.scripted(RunCommand { script }));
            let Some(patience) = patience else {
                return ended.await;
            };
            if let Ok(ended) = timeout(patience, &mut ended).await {
                return ended;
            }
            let seconds = patience.as_secs();
            log::error!(job:% = self.job.id, hook = command.title(), seconds; "a hook hangs");
            let line = format!("The hook took longer than {seconds} s, and is ended.\n");
            // If the executor has crashed, `ended` fails below.
            let _ = self.executor.send(FlushOutput).await;
            self.log.append_output(line).await?;
            if place == HookPlace::Process {
                self.containment.kill_foreground();
                if let Ok(ended) = timeout(HOOK_KILL_PATIENCE, &mut ended).await {
                    return ended.map(|_| failed());
                }
            }
            self.containment.kill_all();
            ended.await.map(|_| failed())
        })
        .await
    }
}
