//! The agent's side of job-init, the guard of a shell job: starts it, sends it commands, and ends the job's
//! processes itself if the job manages to kill job-init.

use std::cell::{Cell, RefCell};
use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::Stdio;
use std::rc::Rc;
use std::time::Duration;

use actors::ports::{Containment, End, LeftBehind};
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, getpid};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::{Instant, sleep, timeout};

use crate::executors::job_mark;
use crate::executors::shell::job_init::{KILL_PATIENCE, Spec};
use crate::os::cgroup::JobCgroup;
use crate::os::processes::{descendants, names_of, signal_all};
use crate::state::JobDir;

/// The pause between two rounds of killing what a dead job-init has left.
const SWEEP_PAUSE: Duration = Duration::from_millis(20);

/// How much later than its own deadlines allow job-init may report before it is taken for dead.
const MARGIN: Duration = Duration::from_secs(5);

/// The agent's handle of a running job-init.
struct Guard {
    pid: Option<Pid>,
    control: StdUnixStream,
    ended: watch::Receiver<JobEnd>,
    /// Notified when job-init has missed its deadline and is to be killed.
    overdue: Rc<Notify>,
}

/// The result of ending everything that the job started; `None` while it runs.
type JobEnd = Option<Result<(), LeftBehind>>;

/// A shell job's processes. Clones share them.
#[derive(Clone)]
pub struct ShellContainment {
    shared: Rc<Shared>,
}

struct Shared {
    directory: Rc<JobDir>,
    guard: RefCell<Option<Guard>>,
    /// No process may be started any more.
    closed: Cell<bool>,
    /// The command `release` was sent, so job-init may report `released`.
    may_release: Cell<bool>,
    /// The terminal of a shell that is killed before it was ready. Closed when the shell has ended.
    unready_terminal: RefCell<Option<OwnedFd>>,
}

impl ShellContainment {
    /// Returns the containment of a job that has not started anything.
    pub fn new(directory: Rc<JobDir>) -> Self {
        let shared = Shared {
            directory,
            guard: RefCell::new(None),
            closed: Cell::new(false),
            may_release: Cell::new(false),
            unready_terminal: RefCell::default(),
        };
        Self { shared: Rc::new(shared) }
    }

    /// Starts the shell of `spec` on `terminal`. Its environment is `environment`, and nothing else.
    pub async fn start(
        &self,
        spec: &Spec,
        terminal: OwnedFd,
        environment: Vec<(OsString, OsString)>,
    ) -> io::Result<()> {
        if self.shared.closed.get() {
            return Err(io::Error::other("the job is over"));
        }
        // If the job kills its job-init, this process adopts the orphans.
        prctl::set_child_subreaper(true)?;
        let (ours, theirs) = StdUnixStream::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("agent").args(["job-init", &self.shared.directory.mark()]);
        command.env_clear().envs(environment);
        command.stdin(OwnedFd::from(theirs)).stdout(terminal).stderr(Stdio::null());
        let child = command.spawn()?;
        // Closes this process's copies of the child's ends of the terminal and the socket.
        drop(command);

        let mut spec = serde_json::to_vec(spec)?;
        spec.push(b'\n');
        (&ours).write_all(&spec)?;
        ours.set_nonblocking(true)?;
        let (ended, end) = watch::channel(None);
        let (started, answer) = oneshot::channel();
        let guard = Guard {
            pid: child.id().and_then(|pid| pid.try_into().ok()).map(Pid::from_raw),
            control: ours.try_clone()?,
            ended: end,
            overdue: Rc::default(),
        };
        let overdue = Rc::clone(&guard.overdue);
        self.shared.guard.replace(Some(guard));
        let answers = BufReader::new(UnixStream::from_std(ours)?);
        let shared = Rc::clone(&self.shared);
        // In a task of its own, as a stop drops this future. If that task panics, `ended` closes.
        actix::spawn(async move {
            let result = supervise(child, answers, started, &overdue, &shared).await;
            shared.directory.delete_secrets();
            drop(shared.unready_terminal.take());
            ended.send_replace(Some(result));
        });
        let answer = answer.await.unwrap_or_default();
        match answer.trim_end().split_once(' ') {
            None if answer.trim_end() == "started" => Ok(()),
            Some(("failed", why)) => Err(io::Error::other(why.to_owned())),
            _ => Err(io::Error::other("job-init, the job's guard, did not start")),
        }
    }

    fn send(&self, command: &str) {
        if let Some(guard) = self.shared.guard.borrow_mut().as_mut() {
            // An error means that job-init is dead, which `supervise` handles.
            let _ = writeln!(guard.control, "{command}");
            // The job may have stopped job-init with SIGSTOP.
            let _ = guard.pid.map(|pid| kill(pid, Signal::SIGCONT));
        }
    }

    /// Kills everything, the shell included, and keeps its terminal open until it has ended: at a hangup, bash would
    /// save its history first. Only sends the request.
    pub fn kill_unready(&self, terminal: OwnedFd) {
        self.shared.unready_terminal.replace(Some(terminal));
        self.send("kill-all");
    }

    /// Sends `command` (`end` or `release`) with `grace` to job-init, and waits for the result.
    fn end_by(
        &self,
        command: &str,
        grace: Duration,
    ) -> LocalBoxFuture<'static, Result<(), LeftBehind>> {
        self.shared.closed.set(true);
        self.send(&format!("{command} {}", grace.as_millis()));
        let shared = Rc::clone(&self.shared);
        let guard = shared.guard.borrow();
        let Some(guard) = guard.as_ref() else {
            shared.directory.delete_secrets();
            return std::future::ready(Ok(())).boxed_local();
        };
        let (mut ended, overdue) = (guard.ended.clone(), Rc::clone(&guard.overdue));
        async move {
            let patience = 2 * grace + KILL_PATIENCE + MARGIN;
            if timeout(patience, ended.wait_for(Option::is_some)).await.is_err() {
                overdue.notify_one();
            }
            let crashed =
                || LeftBehind { what: "the task that waits for job-init has crashed".into() };
            let ended = ended.wait_for(Option::is_some).await.map_err(|_| crashed())?;
            ended.clone().unwrap_or(Ok(()))
        }
        .boxed_local()
    }
}

/// Waits for job-init's reports and its end, and then kills whatever it has left.
async fn supervise(
    mut child: Child,
    mut answers: BufReader<UnixStream>,
    started: oneshot::Sender<String>,
    overdue: &Notify,
    shared: &Shared,
) -> Result<(), LeftBehind> {
    let mut next_line = async || {
        let mut line = String::new();
        // An empty line stands for an error, for the end of the socket, and for a missed deadline.
        tokio::select! {
            _ = answers.read_line(&mut line) => {}
            () = overdue.notified() => return String::new(),
        }
        line
    };
    let first = next_line().await;
    let (did_start, did_fail) = (first.starts_with("started"), first.starts_with("failed"));
    // Fails if the job was stopped meanwhile.
    let _ = started.send(first);
    let report = match (did_start, did_fail) {
        (true, _) => next_line().await,
        // No shell was started, and job-init exits by itself.
        (_, true) => "empty".to_owned(),
        _ => String::new(),
    };
    let reported = report.trim_end();
    let result = match reported.strip_prefix("left ") {
        Some(what) => Err(LeftBehind { what: what.to_owned() }),
        None if reported == "empty" => Ok(()),
        // The released processes keep job-init as their parent. Dropping `child` lets the runtime reap it.
        None if reported == "released" && shared.may_release.get() => return Ok(()),
        None => {
            // No valid report: job-init is dead, or must be killed because it does not work.
            let _ = child.start_kill();
            let _ = child.wait().await;
            sweep(&shared.directory.mark()).await
        }
    };
    let _ = child.wait().await;
    // Check the report of job-init: no process with the job's mark may be left.
    if result.is_ok() && !job_mark::kill_all(&shared.directory.mark()) {
        return sweep(&shared.directory.mark()).await;
    }
    result
}

/// Kills all descendants of this process, which has adopted what the job left.
async fn sweep(mark: &str) -> Result<(), LeftBehind> {
    let group = JobCgroup::find(&job_mark::group_name(mark));
    let give_up = Instant::now() + KILL_PATIENCE;
    loop {
        if let Some(group) = &group {
            group.kill();
        }
        // If the descendants can't be listed, some may be left.
        let listed = descendants(getpid());
        let is_listed = listed.is_ok();
        let below = listed.unwrap_or_default();
        signal_all(&below, Signal::SIGKILL);
        for adopted in below.iter().filter(|process| process.parent == getpid()) {
            // Does not block. A process that still runs is reaped in a later round.
            let _ = waitpid(adopted.pid, Some(WaitPidFlag::WNOHANG));
        }
        if is_listed && below.is_empty() && group.as_ref().is_none_or(JobCgroup::is_empty) {
            if let Some(group) = &group {
                group.remove();
            }
            return Ok(());
        }
        if Instant::now() >= give_up {
            return Err(LeftBehind { what: names_of(&below) });
        }
        sleep(SWEEP_PAUSE).await;
    }
}

impl Containment for ShellContainment {
    fn kill_shell(&self) {
        self.send("kill-shell");
    }

    fn kill_foreground(&self) -> bool {
        self.send("kill-foreground");
        true
    }

    fn end(&self, what: End, grace: Duration) -> LocalBoxFuture<'static, Result<(), LeftBehind>> {
        match what {
            End::Everything => self.end_by("end", grace),
            End::AllButDaemons => {
                self.shared.may_release.set(true);
                self.end_by("release", grace)
            }
        }
    }
}
