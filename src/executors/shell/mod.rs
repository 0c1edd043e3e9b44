//! Runs a job in a login shell of this machine, on a pseudo-terminal.

pub mod containment;
mod injection;
pub mod job_init;

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use actors::job::{EnvVar, InjectedFile, Job};
use actors::ports::{
    ExecutorBackend, PreparationError, PreparationStep, Prepared, Script, SessionEvent,
    ShellSession, StepError, StepLog,
};
use actors::request::parse_octal_mode;
use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use tokio::time::{Instant, sleep_until};

use crate::executors::estate::Estate;
use crate::executors::session::{Mark, Session};
use crate::executors::shell::containment::ShellContainment;
use crate::executors::shell::injection::inject;
use crate::executors::shell::job_init::Spec;
use crate::executors::{Executor, Place, home_path, job_mark};
use crate::os::open_files;
use crate::os::pty::{self, Pty};
use crate::os::shell_words::{push_quoted, quoted};
use crate::os::sys;
use crate::service::environment::{AGENT_SECRETS, Environment};
use crate::ssh_access::{LeadsTo, SshAccess};
use crate::state::{ENVIRONMENT_COPY, JobDir};

/// How long the user's profile scripts may take before their output is shown in the job's log.
const SLOW_PROFILE: Duration = Duration::from_secs(1);

/// How long the user's profile scripts may take before the job fails.
const PROFILE_PATIENCE: Duration = Duration::from_mins(2);

/// The agent's settings for the shells of all jobs.
#[derive(Clone, Debug)]
pub struct ShellConfig {
    /// The shell's working directory, which relative paths of files are resolved against.
    pub home: PathBuf,
    /// The environment of the shell.
    pub environment: Vec<(OsString, OsString)>,
    /// The directory of the copies of jobs' variables for people who debug on this machine.
    pub temporary_directory: PathBuf,
}

/// Overwrites the agent's secrets in its initial environment, which jobs that run as root could read in
/// `/proc`.
///
/// Must be called while the process has no other thread.
pub(crate) fn wipe_secrets() {
    sys::wipe_environment(&AGENT_SECRETS);
}

impl ShellConfig {
    /// Returns the settings that `environment` implies. The agent's secrets are left out.
    pub fn from_environment(environment: &Environment) -> io::Result<Self> {
        let home = environment.home().ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, "HOME is not the path of a directory")
        })?;
        let (has_home, has_term) =
            (environment.get("HOME").is_some(), environment.get("TERM").is_some());
        let temporary_directory = environment.temporary_directory();
        let mut environment = environment.without_secrets();
        if !has_home {
            environment.push(("HOME".into(), home.clone().into()));
        }
        if !has_term {
            environment.push(("TERM".into(), "xterm".into()));
        }
        Ok(Self { home, environment, temporary_directory })
    }
}

/// Runs jobs in a login shell of this machine.
pub struct ShellExecutor {
    /// The settings of all jobs' shells.
    pub config: ShellConfig,
    /// Whether each job's variables are also written to a file in the temporary directory.
    pub copies_environment: bool,
}

impl ShellExecutor {
    fn backend(
        &self,
        directory: Rc<JobDir>,
        containment: &ShellContainment,
        access: Option<SshAccess>,
    ) -> ShellBackend {
        let mut config = self.config.clone();
        config.environment.push(job_mark::variable(&directory.mark()));
        ShellBackend::new(config, directory, containment.clone(), access)
    }
}

impl Executor for &ShellExecutor {
    fn login_target(&self, _: &Job, directory: &JobDir, shows_environment: bool) -> LeadsTo {
        LeadsTo::Shell { environment: shows_environment.then(|| directory.environment()) }
    }

    fn place(&self, _: &Job, directory: Rc<JobDir>, access: Option<SshAccess>) -> Place {
        let containment = ShellContainment::new(Rc::clone(&directory));
        let backend = Box::new(self.backend(directory, &containment, access));
        Place { backend, containment: Box::new(containment) }
    }

    fn spare_place(&self, job: &Job, directory: Rc<JobDir>) -> Place {
        self.place(job, directory, None)
    }

    fn environment_copy(&self, job: &Job) -> Option<PathBuf> {
        let name = format!("{ENVIRONMENT_COPY}{}", job.id.as_str());
        // There is no copy for an id that can't be part of a file name.
        (self.copies_environment && !name.contains('/'))
            .then(|| self.config.temporary_directory.join(name))
    }
}

/// Prepares the shell of one job, its variables and its files.
pub struct ShellBackend {
    config: ShellConfig,
    directory: Rc<JobDir>,
    containment: ShellContainment,
    /// SSH access to the job, which job-init closes if the agent dies.
    access: Option<SshAccess>,
    /// How often variables were staged.
    staged: u32,
}

impl ShellBackend {
    /// Returns a backend that starts the job's shell through `containment`.
    pub fn new(
        config: ShellConfig,
        directory: Rc<JobDir>,
        containment: ShellContainment,
        access: Option<SshAccess>,
    ) -> Self {
        Self { config, directory, containment, access, staged: 0 }
    }

    async fn open_session(&self, log: &dyn StepLog) -> io::Result<LocalSession> {
        let (pty, shell_end) = pty::open()?;
        let gone = Mark::random().map_err(io::Error::other)?;
        let spec = Spec {
            shell: ["bash", "--login", "--noediting"].map(str::to_owned).into(),
            home: self.config.home.clone(),
            gone: gone.as_str().to_owned(),
            estate: Estate { files: self.directory.files().clone(), access: self.access.clone() },
            open_files: open_files::before(),
        };
        self.containment.start(&spec, shell_end, self.config.environment.clone()).await?;
        let terminal = Some(pty.try_clone()?);
        let mut kill_unless_ready = KillUnlessReady { containment: &self.containment, terminal };
        let mut session = Session::new(pty, gone)?;
        let path = self.directory.scratch().join("session");
        write_private(&path, session.bootstrap().as_bytes())?;
        session.start_bootstrap(&path)?;
        let mut printed = Vec::new();
        let mut is_shown = false;
        let ready = becomes_ready(&mut session, &mut printed, &mut is_shown, log);
        let ready = tokio::time::timeout(PROFILE_PATIENCE, ready).await;
        // The shell has read the file by now. It contains the session's marks.
        let _ = fs::remove_file(&path);
        let problem = match ready {
            Ok(true) => None,
            Ok(false) => Some("ended before it was ready"),
            Err(_) => Some("is still not ready: its profile scripts may be waiting for something"),
        };
        if let Some(problem) = problem {
            if is_shown {
                return Err(io::Error::other(format!("the login shell {problem}")));
            }
            let printed = String::from_utf8_lossy(&printed).replace("\r\n", "\n");
            return Err(io::Error::other(format!(
                "the login shell {problem}; it printed: {}",
                printed.trim()
            )));
        }
        kill_unless_ready.terminal = None;
        let script = self.directory.scratch().join("command");
        Ok(LocalSession { session, script, kills_before: out_of_memory_kills(), end: None })
    }
}

/// Kills everything when dropped before the shell is ready.
///
/// A shell that is not ready is not asked to end: bash would then save what was typed so far in the user's
/// history.
struct KillUnlessReady<'a> {
    containment: &'a ShellContainment,
    /// The shell's terminal; `None` once the shell is ready.
    terminal: Option<OwnedFd>,
}

impl Drop for KillUnlessReady<'_> {
    fn drop(&mut self) {
        if let Some(terminal) = self.terminal.take() {
            self.containment.kill_unready(terminal);
        }
    }
}

/// Waits for the end of the bootstrap. Returns whether the shell became ready.
///
/// The output of profile scripts belongs to no step of the job; only the end of it is kept in `printed`, for
/// an error. But if they take longer than [`SLOW_PROFILE`], all further output goes to `log`, so that users
/// see what the shell is waiting for.
async fn becomes_ready(
    session: &mut Session<Pty>,
    printed: &mut Vec<u8>,
    is_shown: &mut bool,
    log: &dyn StepLog,
) -> bool {
    const KEPT: usize = 2000;
    let shown_from = Instant::now() + SLOW_PROFILE;
    loop {
        let event = tokio::select! {
            event = session.next_event() => event,
            () = sleep_until(shown_from), if !*is_shown && has_more_than_prompts(printed) => {
                SessionEvent::Output(Bytes::new())
            }
        };
        match event {
            SessionEvent::Output(bytes) => {
                printed.extend_from_slice(&bytes);
                printed.drain(..printed.len().saturating_sub(KEPT));
                if Instant::now() >= shown_from && (*is_shown || has_more_than_prompts(printed)) {
                    *is_shown = true;
                    let text = String::from_utf8_lossy(&std::mem::take(printed)).into_owned();
                    // Leave out what the agent types, if something other than the shell echoes it.
                    let is_typed =
                        |line: &&str| line.contains("builtin") && line.contains("/dev/tty");
                    let is_printed = |line: &&str| !is_typed(line) && !is_prompt(line);
                    let text: String = text.split_inclusive('\n').filter(is_printed).collect();
                    // If the log can't be written, the next step fails.
                    let _ = log.print(&text).await;
                }
            }
            SessionEvent::ScriptEnded(_) => return true,
            SessionEvent::ShellEnded(_) => return false,
        }
    }
}

/// Returns whether `printed` has more than empty lines and prompts, which every shell prints before it is
/// ready.
fn has_more_than_prompts(printed: &[u8]) -> bool {
    let text = String::from_utf8_lossy(printed);
    !text.lines().all(|line| line.trim().is_empty() || is_prompt(line))
}

/// Returns whether `line`, without a line end, looks like the prompt of a shell.
fn is_prompt(line: &str) -> bool {
    line.ends_with("# ") || line.ends_with("$ ")
}

impl ExecutorBackend for ShellBackend {
    fn next_step(&self) -> PreparationStep {
        PreparationStep::Hidden
    }

    fn prepare<'a>(
        &'a mut self,
        log: &'a dyn StepLog,
    ) -> LocalBoxFuture<'a, Result<Prepared, PreparationError>> {
        async move {
            let session = self.open_session(log).await;
            let session = session
                .map_err(|error| StepError::of("the job's shell can't be started", error))?;
            Ok(Prepared::Ready(Box::new(session)))
        }
        .boxed_local()
    }

    fn stage_variables<'a>(
        &'a mut self,
        variables: &'a [EnvVar],
    ) -> LocalBoxFuture<'a, Result<Script, StepError>> {
        self.staged += 1;
        let path = self.directory.scratch().join(format!("environment-{}", self.staged));
        // Only the job's own variables are copied; these are staged first.
        if self.staged == 1
            && let Some(copy) = self.directory.environment_copy()
            && let Err(error) = write_private(copy, &plain_export_lines(variables))
        {
            log::warn!(
                path:% = copy.display(), error:%;
                "the copy of the job's variables for debugging can't be written"
            );
        }
        let written = write_to_scratch(&path, &export_lines(variables));
        let script = written
            .map(|()| Script { text: format!("builtin . {}", quoted(&path)), untraced: true })
            .map_err(|error| StepError::of(path.display().to_string(), error));
        std::future::ready(script).boxed_local()
    }

    fn shown_path(&self, file: &InjectedFile) -> String {
        home_path::resolve(&self.config.home, &file.path).display().to_string()
    }

    fn inject<'a>(
        &'a mut self,
        file: &'a InjectedFile,
    ) -> LocalBoxFuture<'a, Result<(), StepError>> {
        let path = home_path::resolve(&self.config.home, &file.path);
        let injected = match parse_octal_mode(&file.mode) {
            Some(mode) => inject(&path, &file.content, mode)
                .map_err(|error| StepError::of(path.display().to_string(), error)),
            None => Err(StepError::of(
                path.display().to_string(),
                format!("bad file permission '{}'", file.mode),
            )),
        };
        std::future::ready(injected).boxed_local()
    }
}

/// Returns a script that sets and exports `variables`. `printf -v` sets them, as `export NAME=VALUE` means
/// something else under `set -k`. The script ends at the first variable that can't be set, with bash's
/// message.
fn export_lines(variables: &[EnvVar]) -> Vec<u8> {
    let mut script = Vec::new();
    for EnvVar { name, value } in variables {
        let name = name.as_str();
        script.extend_from_slice(format!("builtin printf -v {name} %s ").as_bytes());
        push_quoted(&mut script, value);
        let export = format!(" && builtin export {name} || builtin return 1\n");
        script.extend_from_slice(export.as_bytes());
    }
    script
}

/// Returns `export NAME=VALUE` lines for any POSIX shell.
fn plain_export_lines(variables: &[EnvVar]) -> Vec<u8> {
    let mut lines = Vec::new();
    for EnvVar { name, value } in variables {
        lines.extend_from_slice(format!("export {}=", name.as_str()).as_bytes());
        push_quoted(&mut lines, value);
        lines.push(b'\n');
    }
    lines
}

/// Writes a new file that only the agent's user can read. An existing file or link at `path` is removed
/// first, so that a job can't redirect the content with a link.
fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let mut options = File::options();
    let mut file = options.write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(content)
}

/// Like [`write_private`], for a file in the job's scratch directory.
///
/// If the job has damaged that directory, this call fails, but repairs it: later steps of the job, such as
/// epilogues, need it.
fn write_to_scratch(path: &Path, content: &[u8]) -> io::Result<()> {
    write_private(path, content).inspect_err(|_| {
        if let Some(scratch) = path.parent() {
            for directory in [scratch.parent(), Some(scratch)].into_iter().flatten() {
                // A file in place of the directory was made by the job.
                let _ = fs::remove_file(directory);
                let _ = DirBuilder::new().recursive(true).mode(0o700).create(directory);
                let _ = fs::set_permissions(directory, fs::Permissions::from_mode(0o700));
            }
        }
        // The job may have made a directory of this name.
        let _ = fs::remove_dir_all(path);
    })
}

/// The session of a shell job. The shell reads its scripts from files.
struct LocalSession {
    session: Session<Pty>,
    /// The path of the file that each script is written to.
    script: PathBuf,
    /// The kernel's count of out-of-memory kills when it was last read. It is read only after failures, as
    /// reading takes a tenth of the time of a short command.
    kills_before: u64,
    /// The end of the script, held back while a line is added to its output.
    end: Option<SessionEvent>,
}

impl LocalSession {
    /// Returns a last line of output if `end` is a failure, and the kernel has killed a process for want of
    /// memory since the last failure.
    fn out_of_memory_line(&mut self, end: &SessionEvent) -> Option<SessionEvent> {
        let has_failed = match end {
            SessionEvent::Output(_) => false,
            SessionEvent::ScriptEnded(end) => end.exit_code != 0,
            SessionEvent::ShellEnded(_) => true,
        };
        let line = "The machine's memory ran out meanwhile, and the kernel killed a process, probably one of this job.\n";
        if !has_failed {
            return None;
        }
        let kills = out_of_memory_kills();
        (kills > std::mem::replace(&mut self.kills_before, kills))
            .then(|| SessionEvent::Output(Bytes::from_static(line.as_bytes())))
    }
}

/// Returns how many processes the kernel has killed for want of memory since boot, of the whole machine or of
/// a control group.
fn out_of_memory_kills() -> u64 {
    let counters = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let count = counters.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.parse().ok()).unwrap_or(0)
}

impl ShellSession for LocalSession {
    fn start<'a>(&'a mut self, script: &'a Script) -> LocalBoxFuture<'a, io::Result<()>> {
        async {
            let file = self.session.next_file(script)?;
            write_to_scratch(&self.script, file.as_bytes())?;
            self.session.start_script(&self.script)
        }
        .boxed_local()
    }

    fn next_event(&mut self) -> LocalBoxFuture<'_, SessionEvent> {
        async {
            if let Some(end) = self.end.take() {
                return end;
            }
            let event = self.session.next_event().await;
            match self.out_of_memory_line(&event) {
                Some(reason) => {
                    self.end = Some(event);
                    reason
                }
                None => event,
            }
        }
        .boxed_local()
    }
}
