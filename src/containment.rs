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

use actors::ports::{Containment, LeftBehind};
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, getpid};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep};

use crate::cgroup::JobCgroup;
use crate::job_init::Spec;
use crate::process_tree::{descendants, signal_all};
use crate::state_dir::JobDir;

/// How long what a killed first process leaves may take to die.
const SWEEP_PATIENCE: Duration = Duration::from_secs(10);

/// How often it is swept until then.
const SWEEP_AGAIN: Duration = Duration::from_millis(20);

/// What became of everything a job started; nothing while it runs.
type Ended = Option<Result<(), LeftBehind>>;

/// A shell job's processes. Clones share them.
#[derive(Clone)]
pub struct ShellContainment {
    shared: Rc<Shared>,
}

struct Shared {
    directory: Rc<JobDir>,
    /// Where commands for the first process go, once there is one.
    control: RefCell<Option<StdUnixStream>>,
    ended: watch::Sender<Ended>,
    /// No process may be started any more.
    closed: Cell<bool>,
}

impl ShellContainment {
    /// Of a job that has not started anything.
    pub fn new(directory: Rc<JobDir>) -> Self {
        let shared = Shared {
            directory,
            control: RefCell::new(None),
            ended: watch::Sender::new(None),
            closed: Cell::new(false),
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
        command.arg0("agent").arg("job-init").env_clear().envs(environment);
        command.stdin(OwnedFd::from(theirs)).stdout(terminal).stderr(Stdio::inherit());
        let child = command.spawn()?;
        drop(command);

        let mut spec = serde_json::to_vec(spec)?;
        spec.push(b'\n');
        (&ours).write_all(&spec)?;
        ours.set_nonblocking(true)?;
        self.shared.control.replace(Some(ours.try_clone()?));
        let (started, answer) = oneshot::channel();
        // A task of its own, as this one may be given up at any moment.
        let answers = BufReader::new(UnixStream::from_std(ours)?);
        actix::spawn(watch_over(child, answers, started, Rc::clone(&self.shared)));
        let answer = answer.await.unwrap_or_default();
        match answer.trim_end().split_once(' ') {
            None if answer.trim_end() == "started" => Ok(()),
            Some(("failed", why)) => Err(io::Error::other(why.to_owned())),
            _ => Err(io::Error::other("the job's first process did not start")),
        }
    }

    fn tell(&self, command: &str) {
        if let Some(control) = self.shared.control.borrow_mut().as_mut() {
            // A first process that is gone is noticed by who watches over it.
            let _ = writeln!(control, "{command}");
        }
    }
}

/// Follows the first process to its end, and sees to it that nothing is left then.
async fn watch_over(
    mut child: Child,
    mut answers: BufReader<UnixStream>,
    started: oneshot::Sender<String>,
    shared: Rc<Shared>,
) {
    let mut next_line = async || {
        let mut line = String::new();
        // An unreadable line is as good as none.
        let _ = answers.read_line(&mut line).await;
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
        None => {
            // It may be dead, or so confused that it must not go on.
            let _ = child.start_kill();
            let _ = child.wait().await;
            sweep(&shared.directory.group_name()).await
        }
    };
    let _ = child.wait().await;
    shared.directory.remove_scratch();
    shared.ended.send_replace(Some(result));
}

/// Kills everything below this process, which adopted what the job left.
async fn sweep(group: &str) -> Result<(), LeftBehind> {
    let group = JobCgroup::find(group);
    let give_up = Instant::now() + SWEEP_PATIENCE;
    loop {
        if let Some(group) = &group {
            group.kill();
        }
        let below = descendants(getpid()).unwrap_or_default();
        signal_all(&below, Signal::SIGKILL);
        for adopted in below.iter().filter(|process| process.parent == getpid()) {
            // Answers at once; a process that still runs is waited for in the next round.
            let _ = waitpid(adopted.pid, Some(WaitPidFlag::WNOHANG));
        }
        if below.is_empty() && group.as_ref().is_none_or(JobCgroup::is_empty) {
            if let Some(group) = &group {
                group.remove();
            }
            return Ok(());
        }
        if Instant::now() >= give_up {
            let pids: Vec<Pid> = below.iter().map(|process| process.pid).collect();
            return Err(LeftBehind { what: format!("{pids:?}") });
        }
        sleep(SWEEP_AGAIN).await;
    }
}

impl Containment for ShellContainment {
    fn kill_shell(&self) {
        self.tell("kill-shell");
    }

    fn end_everything(&self, grace: Duration) -> LocalBoxFuture<'static, Result<(), LeftBehind>> {
        self.shared.closed.set(true);
        self.tell(&format!("end {}", grace.as_millis()));
        let shared = Rc::clone(&self.shared);
        async move {
            if shared.control.borrow().is_none() {
                // Nothing was started.
                shared.directory.remove_scratch();
                return Ok(());
            }
            let mut ended = shared.ended.subscribe();
            let ended = ended.wait_for(Option::is_some).await;
            ended.map_or(Ok(()), |ended| ended.clone().unwrap_or(Ok(())))
        }
        .boxed_local()
    }
}
