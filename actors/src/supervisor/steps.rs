//! The steps of a job, in the order of the protocol (PROTOCOL: "The sequence of a job").
//!
//! One linear script: it decides what runs next and puts the step's events into the log; the
//! executor does the work. Every wait in it races the stop request.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use actix::prelude::*;
use bytes::Bytes;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::job::hooks::{HookFailure, HookPlace, HookRun, JobHooks};
use crate::job::{Command, EnvVar, Job, Outcome, Problem, VariableName};
use crate::log::buffer::LogError;
use crate::log::event::{LogEvent, unix_time};
use crate::log::writer::JobLog;
use crate::ports::{Containment, PreparationStep, Script, ScriptEnd};
use crate::ssh_access::{JumpPoint, OpenAccess};
use crate::supervisor::executor::{
    Abort, BegunStep, Executor, ExecutorError, Export, FlushOutput, GetPreparation, GoOnWithoutLog,
    Inject, Prepare, RunCommand, ShownPath, TakeBegunStep,
};

/// A main command that exits with this code stops the job from inside.
const STOP_FROM_INSIDE: i32 = 130;

/// The step for what is usually not shown.
const PREPARING: &str = "Preparing the job";

/// How long the shell may take to notice that the hook it waits for was killed.
const HOOK_KILL_PATIENCE: Duration = Duration::from_secs(5);

/// How long a script whose output can't be logged may go on after what it waited for was killed.
const UNLOGGED_PATIENCE: Duration = Duration::from_mins(1);

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
    pub(crate) hooks: JobHooks,
    /// The job had a shell, and its post-job hook has not begun.
    pub(crate) hook_is_due: Rc<Cell<bool>>,
    pub(crate) executor: Addr<Executor>,
    pub(crate) jump_point: Option<Addr<JumpPoint>>,
    pub(crate) log: Rc<JobLog>,
    pub(crate) containment: Rc<dyn Containment>,
    pub(crate) interrupts: Interrupts,
    /// Why nobody can log in, for the job's log.
    pub(crate) access_problem: RefCell<Option<String>>,
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

    /// All that is left to do for a job that was stopped, in a shell of its own.
    pub(crate) async fn run_post_job_hook_afresh(self) {
        // The log has no place for these steps.
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
            // Where this fails, the hook fails too, and says why.
            let _ = self.ask(Export { variables: variables.clone() }).await;
        }
        let _ = self.run_post_job_hook().await;
    }

    async fn run_post_job_hook(&self) -> Result<(), Interrupted> {
        if let Some(hook) = &self.hooks.post_job {
            self.hook_is_due.set(false);
            self.hook(hook.run()).await?;
        }
        Ok(())
    }

    async fn hook(&self, hook: HookRun) -> StepEnd {
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
            // A crash of the executor shows in its reply to the hook.
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

    /// Brings up the executor.
    async fn prepared(&self) -> Result<bool, Interrupted> {
        if let (Err(problems), _) | (_, Err(problems)) =
            (self.open_access().await, self.job.executor.as_ref().map(drop))
        {
            return self.preparation_failed(listed(problems)).await;
        }
        let steps = match self.ask(GetPreparation).await? {
            Ok(steps) => steps,
            Err(error) => return self.preparation_failed(format!("{error}\n")).await,
        };
        for (step, kind) in steps.into_iter().enumerate() {
            let done = match kind {
                PreparationStep::Hidden => match self.prepare_quietly(step).await? {
                    Ok(()) => true,
                    Err(ExecutorError::Untold | ExecutorError::LogProblem(_)) => false,
                    Err(error) => self.preparation_failed(format!("{error}\n")).await?,
                },
                PreparationStep::Shown(title) => succeeded(
                    &self
                        .step(title, async {
                            match self.ask(Prepare { step, begins: None }).await? {
                                Ok(()) => Ok(ScriptEnd::default()),
                                Err(error) => self.failed_because(format!("{error}\n")).await,
                            }
                        })
                        .await?,
                ),
            };
            if !done {
                return Ok(false);
            }
        }
        self.hook_is_due.set(true);
        Ok(true)
    }

    /// Does a step of the preparation that is in the log only if it has something to tell.
    async fn prepare_quietly(&self, step: usize) -> Result<Result<(), ExecutorError>, Interrupted> {
        let prepared = self.ask(Prepare { step, begins: Some(PREPARING) }).await;
        let Ok(Some(BegunStep { started_at, begun })) = self.executor.send(TakeBegunStep).await
        else {
            return prepared;
        };
        let (exit_code, answer) = match prepared {
            Ok(Ok(())) => (0, Ok(Ok(()))),
            Ok(Err(ExecutorError::Step(error))) => {
                self.log.append_output(format!("{error}\n")).await?;
                (1, Ok(Err(ExecutorError::Untold)))
            }
            other => (1, other),
        };
        let took = begun.elapsed();
        self.log.append(LogEvent::cmd_finished(PREPARING, exit_code, started_at, took)).await?;
        answer
    }

    async fn preparation_failed(&self, why: String) -> Result<bool, Interrupted> {
        self.step(PREPARING, self.failed_because(why)).await?;
        Ok(false)
    }

    /// Lets people log in. Malformed keys fail the job; any other problem is only logged.
    async fn open_access(&self) -> Result<(), &Vec<Problem>> {
        let Some(jump_point) = &self.jump_point else {
            return Ok(());
        };
        let keys = self.job.ssh_keys.as_ref()?.clone();
        let is_expected = !keys.is_empty();
        match jump_point.send(OpenAccess { keys }).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                log::warn!(error:%; "not everything for SSH access to this job is there");
                if is_expected {
                    let line = format!("SSH access to this job is not available: {error}\n");
                    self.access_problem.replace(Some(line));
                }
            }
            Err(_) => log::error!("nobody can log in to this job: the jump point has crashed"),
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

    /// `remarks` are lines about what the job does not get.
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
                self.log.append_output(format!("Exporting {}\n", variable.name.as_str())).await?;
            }
            for line in remarks {
                self.log.append_output(line.clone()).await?;
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

    /// Runs the commands up to the first that fails; answers how the last one ended. One whose log could not be written
    /// has failed.
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
        let (started_at, begun) = (unix_time(), Instant::now());
        self.check_interrupts()?;
        self.log.append(LogEvent::cmd_started(title)).await?;
        let end = work.await;
        if let Err(Interrupted::Crashed(what)) = &end {
            self.log.tell_crash(what).await;
        }
        let exit_code = end.as_ref().map_or(1, |end| end.exit_code);
        self.log
            .append(LogEvent::cmd_finished(title, exit_code, started_at, begun.elapsed()))
            .await?;
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
            Err(ExecutorError::ShellEnded(how)) => self.failed_because(shell_ended(&how)).await,
            // The log says it already.
            Err(ExecutorError::LogProblem(_)) => Ok(failed()),
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
                let _ = timeout(ABORT_PATIENCE, &mut reply).await;
                return Err(interrupted);
            }
            answer = &mut reply => answer,
        };
        match answer {
            Ok(Err(ExecutorError::LogCrashed(why))) => Err(Interrupted::Crashed(why)),
            Ok(Err(ExecutorError::LogProblem(why))) => {
                self.go_on_without_log(&why).await?;
                Ok(Err(ExecutorError::LogProblem(why)))
            }
            Ok(Err(ExecutorError::Aborted)) => Err(Interrupted::Stopped),
            Ok(answer) => Ok(answer),
            Err(_) => Err(Interrupted::Crashed("the executor has crashed".into())),
        }
    }

    /// Brings the running script to its end, so that what must run in any case still can.
    async fn go_on_without_log(&self, why: &str) -> Result<(), Interrupted> {
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
                Ok(Err(_)) => Err(Interrupted::Crashed("the executor has crashed".into())),
                Err(_) => {
                    self.abort();
                    Err(Interrupted::Crashed(format!("{why}; the script did not end then")))
                }
            },
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

/// The log's line for a step whose shell has ended.
fn shell_ended(how: &str) -> String {
    let how = if how.is_empty() { String::new() } else { format!(" ({how})") };
    format!("The job's shell has ended{how}, so this counts as failed.\n")
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
