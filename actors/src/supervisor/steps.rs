//! The steps of a job, in the order of the protocol (docs/protocol.md: "The sequence of a job").
//!
//! One linear function decides what runs next and logs the events of each step; the executor does
//! the work. Every wait for the executor races the stop request.

use std::cell::{Cell, RefCell};
use std::error::Error;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use actix::prelude::*;
use bytes::Bytes;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::errors::WithCauses;
use crate::job::hooks::{HookFailure, JobHooks};
use crate::job::{Command, EnvVar, Job, Outcome, Problem, VariableName};
use crate::log::buffer::LogError;
use crate::log::writer::{Crash, LogWriter};
use crate::ports::{Containment, PreparationStep, Script, ScriptEnd};
use crate::ssh_access::{JumpPoint, OpenAccess};
use crate::supervisor::executor::{
    Abort, Executor, ExecutorError, Export, GetNextStep, GoOnWithoutLog, Inject, Preparation,
    Prepare, RunCommand, ShownPath,
};

/// The exit code by which a main command stops its own job.
const STOP_FROM_INSIDE: i32 = 130;

/// The title of a hidden preparation step that has something to show.
const PREPARING: &str = "Preparing the job";

/// How long a script whose output can't be logged may run on after its foreground was killed.
const UNLOGGED_PATIENCE: Duration = Duration::from_mins(1);

/// How long the executor may take to reply after an abort.
const ABORT_PATIENCE: Duration = Duration::from_secs(5);

/// Requests from outside that end the steps early.
#[derive(Clone, Debug, Default)]
pub(crate) struct Interrupts {
    /// A stop was requested.
    pub(crate) stop: CancellationToken,
    /// The supervisor has crashed.
    pub(crate) orphaned: CancellationToken,
}

/// Why the steps can't go on.
#[derive(Debug)]
pub(super) enum Interrupted {
    Stopped,
    Crashed(Crash),
}

impl From<LogError> for Interrupted {
    fn from(error: LogError) -> Self {
        Self::Crashed(error.into())
    }
}

/// How the main part of a job ended.
enum MainEnd {
    Passed,
    Failed,
    StoppedFromInside(Outcome),
}

/// How a step ended; a step without a script has the default `job_result`.
pub(super) type StepEnd = Result<ScriptEnd, Interrupted>;

/// Runs the steps of one job.
pub(crate) struct JobSteps {
    pub(crate) job: Rc<Job>,
    pub(crate) hooks: JobHooks,
    /// The job has had a shell, and its post-job hook has not begun.
    pub(crate) hook_is_due: Rc<Cell<bool>>,
    pub(crate) executor: Addr<Executor>,
    pub(crate) jump_point: Option<Addr<JumpPoint>>,
    pub(crate) log: Rc<LogWriter>,
    pub(crate) containment: Rc<dyn Containment>,
    pub(crate) interrupts: Interrupts,
    /// A line for the job's log if SSH access is not available though the job has keys.
    pub(crate) access_problem: RefCell<Option<String>>,
}

impl JobSteps {
    /// Runs all steps, and returns the outcome. Logging `job_finished` is left to the teardown.
    pub(crate) async fn run(self) -> Outcome {
        match self.steps().await {
            Ok(outcome) => outcome,
            Err(Interrupted::Stopped) => Outcome::Stopped,
            Err(Interrupted::Crashed(what)) => {
                self.containment.kill_shell();
                self.log.note_crash(&what).await;
                Outcome::Failed
            }
        }
    }

    async fn steps(&self) -> Result<Outcome, Interrupted> {
        self.log.start_job().await?;
        if !self.prepared().await? {
            return Ok(Outcome::Failed);
        }
        let mut result = match self.main_part().await? {
            MainEnd::Passed => Outcome::Passed,
            MainEnd::Failed => Outcome::Failed,
            MainEnd::StoppedFromInside(outcome) => {
                self.run_post_job_hook().await?;
                return Ok(outcome);
            }
        };
        if !succeeded(&self.export(&Ok(job_result_variable(result)), &[]).await?) {
            result = Outcome::Failed;
        }
        self.commands_until_failure(&self.job.epilogue_always).await?;
        self.commands_until_failure(match result {
            Outcome::Passed => &self.job.epilogue_on_pass,
            _ => &self.job.epilogue_on_fail,
        })
        .await?;
        self.run_post_job_hook().await?;
        self.log.check().await;
        Ok(if self.log.has_problem() { Outcome::Failed } else { result })
    }

    /// Prepares the place where commands run. Returns whether that succeeded; a failure is in the
    /// log.
    async fn prepared(&self) -> Result<bool, Interrupted> {
        if let (Err(problems), _) | (_, Err(problems)) =
            (self.open_access().await, self.job.executor.as_ref().map(drop))
        {
            return self.preparation_failed(listed(problems)).await;
        }
        loop {
            let step = match self.ask(GetNextStep).await? {
                Ok(step) => step,
                Err(error) => return self.preparation_failed(line_of(&error)).await,
            };
            let preparation = match step {
                PreparationStep::Hidden => self.prepare_hidden().await?,
                PreparationStep::Shown(title) => self.prepare_shown(title).await?,
            };
            match preparation {
                Ok(Preparation::Next) => {}
                Ok(Preparation::Done) => break,
                Err(ExecutorError::NotShown | ExecutorError::Log(_)) => return Ok(false),
                Err(error) => return self.preparation_failed(line_of(&error)).await,
            }
        }
        self.hook_is_due.set(true);
        Ok(true)
    }

    /// Does a hidden step of the preparation: the log shows it only if it has output.
    pub(super) async fn prepare_hidden(
        &self,
    ) -> Result<Result<Preparation, ExecutorError>, Interrupted> {
        self.log.start_step_if_output(PREPARING);
        let prepared = self.ask(Prepare).await;
        let Some(step) = self.log.take_step_of_output() else {
            return prepared;
        };
        let prepared = match prepared {
            Ok(Err(ExecutorError::Step(error))) => {
                self.log.print(&line_of(&error)).await?;
                Ok(Err(ExecutorError::NotShown))
            }
            prepared => prepared,
        };
        let exit_code = i32::from(!matches!(prepared, Ok(Ok(_))));
        self.log.end_step(step, exit_code).await?;
        prepared
    }

    /// Does a step of the preparation that the log shows. Its failure is in the log then.
    async fn prepare_shown(
        &self,
        title: &str,
    ) -> Result<Result<Preparation, ExecutorError>, Interrupted> {
        let prepared = Cell::new(Err(ExecutorError::NotShown));
        self.step(title, async {
            match self.ask(Prepare).await? {
                Ok(preparation) => {
                    prepared.set(Ok(preparation));
                    Ok(ScriptEnd::default())
                }
                Err(error) => self.failed_because(line_of(&error)).await,
            }
        })
        .await?;
        Ok(prepared.into_inner())
    }

    async fn preparation_failed(&self, why: String) -> Result<bool, Interrupted> {
        self.step(PREPARING, self.failed_because(why)).await?;
        Ok(false)
    }

    /// Opens SSH access. Malformed keys fail the job; any other problem is only logged.
    async fn open_access(&self) -> Result<(), &Vec<Problem>> {
        let Some(jump_point) = &self.jump_point else {
            return Ok(());
        };
        let keys = self.job.ssh_keys.as_ref()?.clone();
        let is_expected = !keys.is_empty();
        match jump_point.send(OpenAccess { keys }).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                let error = WithCauses(&error);
                log::warn!(error:%; "SSH access to this job is incomplete");
                if is_expected {
                    let line = format!("SSH access to this job is not available: {error}\n");
                    self.access_problem.replace(Some(line));
                }
            }
            Err(_) => log::error!("no SSH access to this job: the jump point has crashed"),
        }
        Ok(())
    }

    async fn main_part(&self) -> Result<MainEnd, Interrupted> {
        let mut remarks = self.job.skipped_variables.clone();
        remarks.extend(self.access_problem.take());
        if !succeeded(&self.export(&self.job.environment, &remarks).await?) {
            return Ok(MainEnd::Failed);
        }
        if !succeeded(&self.inject_files().await?) {
            return Ok(MainEnd::Failed);
        }
        if let Some(hook) = &self.hooks.pre_job {
            let end = self.hook(hook.run()).await?;
            if !succeeded(&end) && hook.failure != HookFailure::IsIgnoredAsAnnounced {
                return Ok(MainEnd::Failed);
            }
        }
        let end = self.commands_until_failure(&self.job.commands).await?;
        self.log.check().await;
        Ok(match end.exit_code {
            _ if self.log.has_problem() => MainEnd::Failed,
            0 => MainEnd::Passed,
            STOP_FROM_INSIDE => MainEnd::StoppedFromInside(self.check_job_result(&end).await?),
            _ => MainEnd::Failed,
        })
    }

    /// Exports `variables`. `remarks` are further lines for this step's output: variables that were
    /// skipped, SSH access that is not available.
    async fn export(
        &self,
        variables: &Result<Vec<EnvVar>, Vec<Problem>>,
        remarks: &[String],
    ) -> StepEnd {
        self.step("Exporting environment variables", async {
            let variables = match variables {
                Ok(variables) => variables,
                Err(problems) => return self.failed_because(listed(problems)).await,
            };
            for variable in variables {
                self.log.print(&format!("Exporting {}\n", variable.name.as_str())).await?;
            }
            for line in remarks {
                self.log.print(line).await?;
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
                    Err(error) => return self.failed_because(line_of(&error)).await,
                };
                let line = format!("Injecting {path} with file mode {}\n", file.mode);
                self.log.print(&line).await?;
                if let Err(error) = self.ask(Inject { file: file.clone() }).await? {
                    return self.failed_because(line_of(&error)).await;
                }
            }
            Ok(ScriptEnd::default())
        })
        .await
    }

    /// Runs the commands up to the first that fails, and returns how the last one ended. A command
    /// whose output could not be logged counts as failed.
    async fn commands_until_failure(&self, commands: &[Command]) -> StepEnd {
        let mut end = ScriptEnd::default();
        let had_problem = self.log.has_problem();
        for command in commands {
            end = self.command(command).await?;
            if !succeeded(&end) || self.log.has_problem() != had_problem {
                break;
            }
        }
        Ok(end)
    }

    async fn command(&self, command: &Command) -> StepEnd {
        self.step(command.title(), async {
            if command.alias.is_some() {
                self.log.print(&format!("Running: {}\n", command.directive)).await?;
            }
            let script = Script { text: command.directive.clone(), untraced: false };
            self.scripted(RunCommand { script }).await
        })
        .await
    }

    /// Returns the outcome of a job that stopped itself, from its `SEMAPHORE_JOB_RESULT`.
    async fn check_job_result(&self, end: &ScriptEnd) -> Result<Outcome, Interrupted> {
        let (outcome, line) = match end.job_result.as_str() {
            "passed" => (Outcome::Passed, "SEMAPHORE_JOB_RESULT=passed".to_owned()),
            "failed" => (Outcome::Failed, "SEMAPHORE_JOB_RESULT=failed".to_owned()),
            other => (Outcome::Stopped, format!("SEMAPHORE_JOB_RESULT is set to '{other}'")),
        };
        self.step("Checking job result", async {
            let line = format!("{line} - stopping job and marking it as {outcome}\n");
            self.log.print(&line).await?;
            Ok(ScriptEnd::default())
        })
        .await?;
        Ok(outcome)
    }

    /// Does `work` between `cmd_started` and `cmd_finished`; the latter is logged however `work`
    /// ends.
    pub(super) async fn step(&self, title: &str, work: impl Future<Output = StepEnd>) -> StepEnd {
        self.check_interrupts()?;
        let step = self.log.start_step(title).await?;
        let end = work.await;
        if let Err(Interrupted::Crashed(what)) = &end {
            self.log.note_crash(what).await;
        }
        let exit_code = end.as_ref().map_or(1, |end| end.exit_code);
        self.log.end_step(step, exit_code).await?;
        end
    }

    async fn failed_because(&self, why: String) -> StepEnd {
        self.log.print(&why).await?;
        Ok(failed())
    }

    /// Has the executor run a script; its errors become output and a failed step.
    pub(super) async fn scripted<M>(&self, message: M) -> StepEnd
    where
        M: Message<Result = Result<ScriptEnd, ExecutorError>> + Send + 'static,
        Executor: Handler<M>,
    {
        match self.ask(message).await? {
            Ok(end) => Ok(end),
            Err(ExecutorError::ShellEnded(how)) => self.failed_because(shell_ended(&how)).await,
            // `note_problem` has put this into the log.
            Err(ExecutorError::Log(_)) => Ok(failed()),
            Err(error) => self.failed_because(line_of(&error)).await,
        }
    }

    /// Sends `message` to the executor, and waits for its reply or an interruption.
    pub(super) async fn ask<M, T>(
        &self,
        message: M,
    ) -> Result<Result<T, ExecutorError>, Interrupted>
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
                // The reply comes when the output up to now is in the log.
                let _ = timeout(ABORT_PATIENCE, &mut reply).await;
                return Err(interrupted);
            }
            answer = &mut reply => answer,
        };
        match answer {
            Ok(Err(ExecutorError::Log(error))) if error.is_lost_line() => {
                self.go_on_without_log(&error).await?;
                Ok(Err(error.into()))
            }
            Ok(Err(ExecutorError::Log(error))) => Err(error.into()),
            Ok(Err(ExecutorError::Aborted)) => Err(Interrupted::Stopped),
            Ok(answer) => Ok(answer),
            Err(_) => Err(Interrupted::Crashed(Crash::Executor)),
        }
    }

    /// Ends the script that runs while its output can't be logged, so that later steps (epilogues,
    /// hooks) can run.
    async fn go_on_without_log(&self, why: &LogError) -> Result<(), Interrupted> {
        self.log.note_problem(why).await;
        self.containment.kill_foreground();
        let rest = timeout(UNLOGGED_PATIENCE, self.executor.send(GoOnWithoutLog));
        tokio::select! {
            biased;
            interrupted = self.interrupted() => {
                self.abort();
                Err(interrupted)
            }
            ended = rest => match ended {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(_)) => Err(Interrupted::Crashed(Crash::Executor)),
                Err(_) => {
                    self.abort();
                    let why = WithCauses(why).to_string();
                    Err(Interrupted::Crashed(Crash::UnloggedScript(why)))
                }
            },
        }
    }

    fn abort(&self) {
        // The shell first: no command after the running one may start.
        self.containment.kill_shell();
        self.executor.do_send(Abort);
    }

    async fn interrupted(&self) -> Interrupted {
        tokio::select! {
            biased;
            () = self.interrupts.stop.cancelled() => Interrupted::Stopped,
            () = self.interrupts.orphaned.cancelled() => orphaned(),
            () = self.log.log().crashed() => LogError::Crashed.into(),
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

/// The line of the job's log for an error.
fn line_of(error: &dyn Error) -> String {
    format!("{}\n", WithCauses(error))
}

/// The line of the job's log for a step whose shell has ended.
fn shell_ended(how: &str) -> String {
    let how = if how.is_empty() { String::new() } else { format!(" ({how})") };
    format!("The job's shell has ended{how}, so this counts as failed.\n")
}

fn orphaned() -> Interrupted {
    Interrupted::Crashed(Crash::Supervisor)
}

pub(super) fn failed() -> ScriptEnd {
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
