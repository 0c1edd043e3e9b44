//! The agent's hand on a shell job's first process: starts it, has it end things, and takes its
//! place if the job manages to kill it.

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

/// How often what a killed first process leaves is swept.
const SWEEP_AGAIN: Duration = Duration::from_millis(20);

/// How long after the last moment for an answer the first process is taken for dead.
const MARGIN: Duration = Duration::from_secs(5);

/// A job's first process.
struct FirstProcess {
    pid: Option<Pid>,
    control: StdUnixStream,
    ended: watch::Receiver<Ended>,
    overdue: Rc<Notify>,
}

/// What became of everything a job started; nothing while it runs.
type Ended = Option<Result<(), LeftBehind>>;

/// A shell job's processes. Clones share them.
#[derive(Clone)]
pub struct ShellContainment {
    shared: Rc<Shared>,
}

struct Shared {
    directory: Rc<JobDir>,
    /// Once there is one.
    first: RefCell<Option<FirstProcess>>,
    /// No process may be started any more.
    closed: Cell<bool>,
    /// The first process was told to release what the shell has detached.
    may_release: Cell<bool>,
}

impl ShellContainment {
    /// Of a job that has not started anything.
    pub fn new(directory: Rc<JobDir>) -> Self {
        let shared = Shared {
            directory,
            first: RefCell::new(None),
            closed: Cell::new(false),
            may_release: Cell::new(false),
        };
        Self { shared: Rc::new(shared) }
    }

    /// Starts the shell of `spec` on `terminal`, with nothing but `environment`.
    pub async fn start(
        &self,
        spec: &Spec,
        terminal: OwnedFd,
        environment: Vec<(OsString, OsString)>,
    ) -> io::Result<()> {
        if self.shared.closed.get() {
            return Err(io::Error::other("the job is over"));
        }
        // If the job kills its first process, its orphans come here.
        prctl::set_child_subreaper(true)?;
        let (ours, theirs) = StdUnixStream::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("agent").args(["job-init", &self.shared.directory.mark()]);
        command.env_clear().envs(environment);
        command.stdin(OwnedFd::from(theirs)).stdout(terminal).stderr(Stdio::null());
        let child = command.spawn()?;
        // It holds this process's copies of the terminal's and the socket's other ends.
        drop(command);

        let mut spec = serde_json::to_vec(spec)?;
        spec.push(b'\n');
        (&ours).write_all(&spec)?;
        ours.set_nonblocking(true)?;
        let (ended, end) = watch::channel(None);
        let (started, answer) = oneshot::channel();
        let first = FirstProcess {
            pid: child.id().and_then(|pid| pid.try_into().ok()).map(Pid::from_raw),
            control: ours.try_clone()?,
            ended: end,
            overdue: Rc::default(),
        };
        let overdue = Rc::clone(&first.overdue);
        self.shared.first.replace(Some(first));
        let answers = BufReader::new(UnixStream::from_std(ours)?);
        let shared = Rc::clone(&self.shared);
        // A task of its own, as this one may be given up at any moment. If it dies, `ended` closes.
        actix::spawn(async move {
            let result = watch_over(child, answers, started, &overdue, &shared).await;
            shared.directory.delete_secrets();
            ended.send_replace(Some(result));
        });
        let answer = answer.await.unwrap_or_default();
        match answer.trim_end().split_once(' ') {
            None if answer.trim_end() == "started" => Ok(()),
            Some(("failed", why)) => Err(io::Error::other(why.to_owned())),
            _ => Err(io::Error::other("the job's first process did not start")),
        }
    }

    fn tell(&self, command: &str) {
        if let Some(first) = self.shared.first.borrow_mut().as_mut() {
            // A first process that is gone is noticed by who watches over it; one that the job has
            // stopped has to go on.
            let _ = writeln!(first.control, "{command}");
            let _ = first.pid.map(|pid| kill(pid, Signal::SIGCONT));
        }
    }

    /// Kills everything, the shell included. Only sends the request.
    pub fn kill_all(&self) {
        self.tell("kill-all");
    }

    /// Has the first process bring the job to its end in the way that `command` names.
    fn end_by(
        &self,
        command: &str,
        grace: Duration,
    ) -> LocalBoxFuture<'static, Result<(), LeftBehind>> {
        self.shared.closed.set(true);
        self.tell(&format!("{command} {}", grace.as_millis()));
        let shared = Rc::clone(&self.shared);
        let first = shared.first.borrow();
        let Some(first) = first.as_ref() else {
            shared.directory.delete_secrets();
            return std::future::ready(Ok(())).boxed_local();
        };
        let (mut ended, overdue) = (first.ended.clone(), Rc::clone(&first.overdue));
        async move {
            let patience = 2 * grace + KILL_PATIENCE + MARGIN;
            if timeout(patience, ended.wait_for(Option::is_some)).await.is_err() {
                overdue.notify_one();
            }
            let nobody = || LeftBehind { what: "nobody watched over it to its end".into() };
            let ended = ended.wait_for(Option::is_some).await.map_err(|_| nobody())?;
            ended.clone().unwrap_or(Ok(()))
        }
        .boxed_local()
    }
}

/// Follows the first process to its end, and sees to it that nothing is left then.
async fn watch_over(
    mut child: Child,
    mut answers: BufReader<UnixStream>,
    started: oneshot::Sender<String>,
    overdue: &Notify,
    shared: &Shared,
) -> Result<(), LeftBehind> {
    let mut next_line = async || {
        let mut line = String::new();
        // An unreadable line is as good as none, and so is one that does not come.
        tokio::select! {
            _ = answers.read_line(&mut line) => {}
            () = overdue.notified() => return String::new(),
        }
        line
    };
    let first = next_line().await;
    let (did_start, did_fail) = (first.starts_with("started"), first.starts_with("failed"));
    // Nobody waits for it if the job was stopped meanwhile.
    let _ = started.send(first);
    let report = match (did_start, did_fail) {
        (true, _) => next_line().await,
        // Nothing was started, and it leaves by itself.
        (_, true) => "empty".to_owned(),
        _ => String::new(),
    };
    let reported = report.trim_end();
    let result = match reported.strip_prefix("left ") {
        Some(what) => Err(LeftBehind { what: what.to_owned() }),
        None if reported == "empty" => Ok(()),
        // It lives on as the parent of what it has released, and is waited for in the background.
        None if reported == "released" && shared.may_release.get() => return Ok(()),
        None => {
            // It may be dead, or so confused that it must not go on.
            let _ = child.start_kill();
            let _ = child.wait().await;
            sweep(&shared.directory.mark()).await
        }
    };
    let _ = child.wait().await;
    // Whatever it said, nothing that is the job's may be left.
    if result.is_ok() && !job_mark::kill_all(&shared.directory.mark()) {
        return sweep(&shared.directory.mark()).await;
    }
    result
}

/// Kills everything below this process, which adopted what the job left.
async fn sweep(mark: &str) -> Result<(), LeftBehind> {
    let group = JobCgroup::find(&job_mark::group_name(mark));
    let give_up = Instant::now() + KILL_PATIENCE;
    loop {
        if let Some(group) = &group {
            group.kill();
        }
        // What can't be seen may be there.
        let seen = descendants(getpid());
        let all_seen = seen.is_ok();
        let below = seen.unwrap_or_default();
        signal_all(&below, Signal::SIGKILL);
        for adopted in below.iter().filter(|process| process.parent == getpid()) {
            // Answers at once; a process that still runs is waited for in the next round.
            let _ = waitpid(adopted.pid, Some(WaitPidFlag::WNOHANG));
        }
        if all_seen && below.is_empty() && group.as_ref().is_none_or(JobCgroup::is_empty) {
            if let Some(group) = &group {
                group.remove();
            }
            return Ok(());
        }
        if Instant::now() >= give_up {
            return Err(LeftBehind { what: names_of(&below) });
        }
        sleep(SWEEP_AGAIN).await;
    }
}

impl Containment for ShellContainment {
    fn kill_shell(&self) {
        self.tell("kill-shell");
    }

    fn kill_foreground(&self) -> bool {
        self.tell("kill-foreground");
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
