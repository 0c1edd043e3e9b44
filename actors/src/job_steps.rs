//! The steps of a job, in the order of the protocol (PROTOCOL: "The sequence of a job").
//!
//! One linear script: it decides what runs next and puts the step's events into the log; the
//! executor does the work. Every wait in it races the stop request.

use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use actix::prelude::*;
use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use crate::executor::{
    Abort, Executor, ExecutorError, Export, Inject, Prepare, RunCommand, ShownPath,
};
use crate::job::{Command, EnvVar, ExecutorKind, Job, Outcome, Problem, VariableName};
use crate::job_log::JobLog;
use crate::log_buffer::LogError;
use crate::log_event::{LogEvent, unix_time};
use crate::ports::{Containment, Script, ScriptEnd, StepError};

/// A main command that exits with this code stops the job from inside.
const STOP_FROM_INSIDE: i32 = 130;

/// How long an executor may take to give up its work after an abort.
const ABORT_PATIENCE: Duration = Duration::from_secs(5);

/// Signals from outside that end the steps early.
#[derive(Clone, Debug, Default)]
pub(crate) struct Interrupts {
    /// Somebody wants the job stopped.
    pub(crate) stop: CancellationToken,
    /// The supervisor is gone.
    pub(crate) orphaned: CancellationToken,
}

/// Why the steps can't go on.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Interrupted {
    Stopped,
    /// A part of the agent crashed; the text says which.
    Crashed(String),
}

impl From<LogError> for Interrupted {
    fn from(error: LogError) -> Self {
        Self::Crashed(error.to_string())
    }
}

/// How the main part of a job ended.
enum MainEnd {
    Passed,
    Failed,
    StoppedFromInside(Outcome),
}

/// How one step ended, and what the shell's `SEMAPHORE_JOB_RESULT` was then.
type StepEnd = Result<ScriptEnd, Interrupted>;

/// A job on its way through its steps.
pub(crate) struct JobSteps {
    pub(crate) job: Rc<Job>,
    pub(crate) executor: Addr<Executor>,
    pub(crate) log: Rc<JobLog>,
    pub(crate) containment: Rc<dyn Containment>,
    pub(crate) interrupts: Interrupts,
}

impl JobSteps {
    /// Runs all steps up to the outcome; `job_finished` is logged by whoever tears the job down.
    pub(crate) async fn run(self) -> Outcome {
        match self.steps().await {
            Ok(outcome) => outcome,
            Err(Interrupted::Stopped) => Outcome::Stopped,
            Err(Interrupted::Crashed(what)) => {
                self.containment.kill_shell();
                self.log.tell_crash(&what).await;
                Outcome::Failed
            }
        }
    }

    async fn steps(&self) -> Result<Outcome, Interrupted> {
        self.log.append(LogEvent::job_started()).await?;
        if !self.prepared().await? {
            return Ok(Outcome::Failed);
        }
        let result = match self.main_part().await? {
            MainEnd::Passed => Outcome::Passed,
            MainEnd::Failed => Outcome::Failed,
            MainEnd::StoppedFromInside(outcome) => return Ok(outcome),
        };
        self.export(&Ok(job_result_variable(result))).await?;
        self.commands_until_failure(&self.job.epilogue_always).await?;
        self.commands_until_failure(match result {
            Outcome::Passed => &self.job.epilogue_on_pass,
            _ => &self.job.epilogue_on_fail,
        })
        .await?;
        Ok(result)
    }

    /// Brings up the executor. Only a failure shows in the log.
    async fn prepared(&self) -> Result<bool, Interrupted> {
        let prepared = match &self.job.executor {
            Err(problems) => Err(StepError(listed(problems))),
            Ok(ExecutorKind::Shell | ExecutorKind::DockerCompose) => match self.ask(Prepare).await?
            {
                Ok(()) => Ok(()),
                Err(error) => Err(StepError(format!("{error}\n"))),
            },
        };
        let Err(StepError(why)) = prepared else {
            return Ok(true);
        };
        self.step("Preparing the job", async {
            self.log.append_output(why).await?;
            Ok(failed())
        })
        .await?;
        Ok(false)
    }

    async fn main_part(&self) -> Result<MainEnd, Interrupted> {
        if !succeeded(&self.export(&self.job.environment).await?) {
            return Ok(MainEnd::Failed);
        }
        if !succeeded(&self.inject_files().await?) {
            return Ok(MainEnd::Failed);
        }
        let end = self.commands_until_failure(&self.job.commands).await?;
        Ok(match end.exit_code {
            0 => MainEnd::Passed,
            STOP_FROM_INSIDE => MainEnd::StoppedFromInside(self.check_job_result(&end).await?),
            _ => MainEnd::Failed,
        })
    }

    async fn export(&self, variables: &Result<Vec<EnvVar>, Vec<Problem>>) -> StepEnd {
        self.step("Exporting environment variables", async {
            let variables = match variables {
                Ok(variables) => variables,
                Err(problems) => return self.failed_because(listed(problems)).await,
            };
            for variable in variables {
                self.log.append_output(format!("Exporting {}\n", variable.name.as_str())).await?;
            }
            if variables.is_empty() {
                return Ok(ScriptEnd::default());
            }
            self.scripted(Export { variables: variables.clone() }).await
        })
        .await
    }

    async fn inject_files(&self) -> StepEnd {
        self.step("Injecting Files", async {
            let files = match &self.job.files {
                Ok(files) => files,
                Err(problems) => return self.failed_because(listed(problems)).await,
            };
            for file in files {
                let path = match self.ask(ShownPath { file: file.clone() }).await? {
                    Ok(path) => path,
                    Err(error) => return self.failed_because(format!("{error}\n")).await,
                };
                let line = format!("Injecting {path} with file mode {}\n", file.mode);
                self.log.append_output(line).await?;
                if let Err(error) = self.ask(Inject { file: file.clone() }).await? {
                    return self.failed_because(format!("{error}\n")).await;
                }
            }
            Ok(ScriptEnd::default())
        })
        .await
    }

    /// Runs the commands up to the first that fails; answers how the last one ended.
    async fn commands_until_failure(&self, commands: &[Command]) -> StepEnd {
        let mut end = ScriptEnd::default();
        for command in commands {
            end = self.command(command).await?;
            if !succeeded(&end) {
                break;
            }
        }
        Ok(end)
    }

    async fn command(&self, command: &Command) -> StepEnd {
        self.step(command.title(), async {
            if command.alias.is_some() {
                self.log.append_output(format!("Running: {}\n", command.directive)).await?;
            }
            let script = Script { text: command.directive.clone(), untraced: false };
            self.scripted(RunCommand { script }).await
        })
        .await
    }

    /// What a job that stopped itself wants to be taken for.
    async fn check_job_result(&self, end: &ScriptEnd) -> Result<Outcome, Interrupted> {
        let (outcome, line) = match end.job_result.as_str() {
            "passed" => (Outcome::Passed, "SEMAPHORE_JOB_RESULT=passed".to_owned()),
            "failed" => (Outcome::Failed, "SEMAPHORE_JOB_RESULT=failed".to_owned()),
            other => (Outcome::Stopped, format!("SEMAPHORE_JOB_RESULT is set to '{other}'")),
        };
        self.step("Checking job result", async {
            let line = format!("{line} - stopping job and marking it as {outcome}\n");
            self.log.append_output(line).await?;
            Ok(ScriptEnd::default())
        })
        .await?;
        Ok(outcome)
    }

    /// Does `work` between its `cmd_started` and its `cmd_finished`, whatever happens in it.
    async fn step(&self, title: &str, work: impl Future<Output = StepEnd>) -> StepEnd {
        let started_at = unix_time();
        self.check_interrupts()?;
        self.log.append(LogEvent::cmd_started(title)).await?;
        let end = work.await;
        if let Err(Interrupted::Crashed(what)) = &end {
            self.log.tell_crash(what).await;
        }
        let exit_code = end.as_ref().map_or(1, |end| end.exit_code);
        self.log.append(LogEvent::cmd_finished(title, exit_code, started_at)).await?;
        end
    }

    async fn failed_because(&self, why: String) -> StepEnd {
        self.log.append_output(why).await?;
        Ok(failed())
    }

    /// Has the executor run something in the shell.
    async fn scripted<M>(&self, message: M) -> StepEnd
    where
        M: Message<Result = Result<ScriptEnd, ExecutorError>> + Send + 'static,
        Executor: Handler<M>,
    {
        match self.ask(message).await? {
            Ok(end) => Ok(end),
            Err(ExecutorError::ShellEnded) => Ok(failed()),
            Err(error) => self.failed_because(format!("{error}\n")).await,
        }
    }

    /// Sends `message` to the executor and waits for the reply or a reason to stop.
    async fn ask<M, T>(&self, message: M) -> Result<Result<T, ExecutorError>, Interrupted>
    where
        M: Message<Result = Result<T, ExecutorError>> + Send + 'static,
        T: Send + 'static,
        Executor: Handler<M>,
    {
        self.check_interrupts()?;
        let mut reply = std::pin::pin!(self.executor.send(message));
        let answer = tokio::select! {
            biased;
            interrupted = self.interrupted() => {
                self.abort();
                // Its reply comes when what was printed up to now is in the log.
                let _ = tokio::time::timeout(ABORT_PATIENCE, &mut reply).await;
                return Err(interrupted);
            }
            answer = &mut reply => answer,
        };
        match answer {
            Ok(Err(ExecutorError::Log(why))) => Err(Interrupted::Crashed(why)),
            Ok(Err(ExecutorError::Aborted)) => Err(Interrupted::Stopped),
            Ok(answer) => Ok(answer),
            Err(_) => Err(Interrupted::Crashed("the executor has crashed".into())),
        }
    }

    fn abort(&self) {
        // The shell first: nothing that comes after the running command may start.
        self.containment.kill_shell();
        self.executor.do_send(Abort);
    }

    async fn interrupted(&self) -> Interrupted {
        tokio::select! {
            biased;
            () = self.interrupts.stop.cancelled() => Interrupted::Stopped,
            () = self.interrupts.orphaned.cancelled() => orphaned(),
            () = self.log.crashed() => LogError::Crashed.into(),
        }
    }

    fn check_interrupts(&self) -> Result<(), Interrupted> {
        if self.interrupts.stop.is_cancelled() {
            Err(Interrupted::Stopped)
        } else if self.interrupts.orphaned.is_cancelled() {
            Err(orphaned())
        } else {
            Ok(())
        }
    }
}

fn orphaned() -> Interrupted {
    Interrupted::Crashed("the job supervisor has crashed".into())
}

fn failed() -> ScriptEnd {
    ScriptEnd { exit_code: 1, ..ScriptEnd::default() }
}

fn succeeded(end: &ScriptEnd) -> bool {
    end.exit_code == 0
}

fn listed(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("{problem}\n")).collect()
}

fn job_result_variable(result: Outcome) -> Vec<EnvVar> {
    let value = Bytes::from_static(result.as_str().as_bytes());
    VariableName::new("SEMAPHORE_JOB_RESULT")
        .map(|name| EnvVar { name, value })
        .into_iter()
        .collect()
}
