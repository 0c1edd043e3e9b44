//! The guard of a shell job: the parent of the job's shell, which adopts every process of the job that loses
//! its parent. It is this program again, as `agent job-init`.
//!
//! As a process beside the agent, job-init can do its work when the agent can't: if the agent dies, it ends
//! the job. No process can leave the tree below job-init, so once it has no child left, none of the job's
//! processes is left.
//!
//! ```text
//!              end GRACE                     only the            no child left
//! Running ───────────────▶ All but the shell ───────────▶ Shell ───────────────▶ done
//!    │                      SIGTERM, after    shell left   SIGHUP (after a stop   ▲
//!    │                      grace SIGKILL                  SIGVTALRM), own grace  │
//!    │ agent dead, or no grace                             │ grace over           │
//!    └───────────────────────────────▶ All killed ◀────────┘                      │
//!                                          └──────────────────────────────────────┘
//! ```
//!
//! Descriptor 0 is the control socket, descriptor 1 the shell's end of the terminal. The first line that the
//! agent sends is a [`Spec`] in JSON; then come `kill-shell`, `kill-foreground`, `kill-all`,
//! `end MILLISECONDS` and `release MILLISECONDS`. The response to the spec is `started` or `failed WHY`, the
//! final report `empty`, `left WHAT` or `released`.
//!
//! A `release` ends the shell only. Processes that survive it (daemons) are no part of the job any more:
//! job-init stays as their parent, and does not end them when the agent ends.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, killpg, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout, getpid, setsid};
use serde::{Deserialize, Serialize};

use crate::executors::estate::Estate;
use crate::executors::job_mark;
use crate::os::cgroup::JobCgroup;
use crate::os::open_files;
use crate::os::processes::{
    Descendant, descendants, foreground_beside, ignores, names_of, signal_all,
};
use crate::os::sys;

/// The shell to run, and what job-init needs to know about the job.
#[derive(Debug, Deserialize, Serialize)]
pub struct Spec {
    /// The shell's program and its arguments.
    pub shell: Vec<String>,
    /// The shell's working directory.
    pub home: PathBuf,
    /// The mark of the frame that job-init prints on the terminal when the shell has ended (see
    /// [`crate::executors::session`]).
    pub gone: String,
    /// The job's files and SSH access, deleted and closed if the agent dies.
    pub estate: Estate,
    /// The job's limit of open files for each process; `None` for the agent's own limit.
    pub open_files: Option<u64>,
}

/// How long killing may take before the remaining processes are reported as left behind.
pub const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// The `oom_score_adj` of the job's processes (0 to 1000): when memory runs out, the kernel is to kill them
/// before the agent.
const OOM_SCORE_ADJUSTMENT: i32 = 500;

/// Ends bash like a hangup, its EXIT trap included. Unlike for SIGHUP, jobs hardly ever have a trap for it.
const EXIT_SIGNAL: Signal = Signal::SIGVTALRM;

/// How long killing the other processes may take before the shell is killed with them.
const OTHERS_PATIENCE: Duration = Duration::from_secs(1);

/// The pause between two checks for processes that are not children of job-init.
const CHECK_INTERVAL: Duration = Duration::from_millis(10);

/// Runs job-init until the job is over.
pub fn run() -> io::Result<()> {
    let control = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut control = BufReader::new(control);
    let mut line = String::new();
    control.read_line(&mut line)?;
    let spec: Spec = serde_json::from_str(&line)?;
    match JobInit::start(spec) {
        Ok(job) => {
            writeln!(control.get_ref(), "started")?;
            job.supervise(control)
        }
        Err(error) => writeln!(control.get_ref(), "failed {error}"),
    }
}

struct JobInit {
    shell: Option<Pid>,
    terminal: PathBuf,
    gone: String,
    estate: Estate,
    group: Option<JobCgroup>,
    children: SignalFd,
    ending: Option<Ending>,
    /// The shell is stopped with SIGSTOP, and must run no further command. It is ended only when nothing else
    /// is left: its death makes the kernel send SIGHUP to the running command, which is to get SIGTERM first.
    shell_condemned: bool,
}

fn spawn(mut command: Command, group: Option<&JobCgroup>) -> io::Result<Pid> {
    if let Some(group) = group {
        if let Ok(directory) = group.open()
            && let Some(spawned) = sys::spawn_in_cgroup(&mut command, &directory)?
        {
            return Ok(spawned);
        }
        if let Ok(procs) = group.open_procs() {
            sys::enter_cgroup(&mut command, procs);
        }
    }
    let pid = command.spawn()?.id();
    i32::try_from(pid).map(Pid::from_raw).map_err(io::Error::other)
}

/// Raises the `oom_score_adj` of this process, which children inherit, until the value is dropped.
struct RaisedOomScore<'a> {
    file: &'a File,
    before: String,
}

impl<'a> RaisedOomScore<'a> {
    /// Raises the value in `file`, this process's `oom_score_adj`. It must have been opened while the process
    /// was dumpable.
    fn raise(mut file: &'a File) -> io::Result<Self> {
        let mut before = String::new();
        file.read_to_string(&mut before)?;
        let usual: i32 = before.trim().parse().map_err(io::Error::other)?;
        if usual < OOM_SCORE_ADJUSTMENT {
            file.write_all(OOM_SCORE_ADJUSTMENT.to_string().as_bytes())?;
        }
        Ok(Self { file, before })
    }
}

impl Drop for RaisedOomScore<'_> {
    fn drop(&mut self) {
        let _ = self.file.write_all(self.before.trim().as_bytes());
    }
}

/// The deadlines of a job that is being ended.
struct Ending {
    /// The shell's own grace, which begins when only the shell is left.
    grace: Duration,
    kill_at: Instant,
    give_up_at: Instant,
    /// The shell was asked to end.
    shell_asked: bool,
    /// Only the shell is ended (`release`).
    spares_the_rest: bool,
}

#[expect(clippy::disallowed_methods, reason = "a process without tokio has no other clock")]
fn now() -> Instant {
    Instant::now()
}

impl JobInit {
    fn start(spec: Spec) -> io::Result<Self> {
        prctl::set_child_subreaper(true)?;
        // Keeps the signals of the agent's terminal away. Fails only if this process leads a group already.
        let _ = setsid();
        // Block all signals instead of ignoring them: ignored ones would stay ignored in the children, while
        // the mask is reset for them.
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?;
        let mut watched = SigSet::empty();
        watched.add(Signal::SIGCHLD);
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let children = SignalFd::with_flags(&watched, flags)?;

        if let Some(limit) = spec.open_files {
            open_files::lower_to(limit)?;
        }

        // Not dumpable, as jobs run as the same user. Afterwards this process can't open the file any more.
        let oom_score = File::options().read(true).write(true).open("/proc/self/oom_score_adj");
        prctl::set_dumpable(false)?;

        let terminal = nix::unistd::ttyname(io::stdout())?;
        let copy =
            || -> io::Result<Stdio> { Ok(io::stdout().as_fd().try_clone_to_owned()?.into()) };
        let Some((program, arguments)) = spec.shell.split_first() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the spec names no shell"));
        };
        let group = JobCgroup::create(&job_mark::group_name(spec.estate.files.name()));
        let mut command = Command::new(program);
        command.args(arguments).current_dir(&spec.home);
        command.stdin(copy()?).stdout(copy()?).stderr(copy()?);
        sys::lead_terminal_session(&mut command);
        // An error is ignored: the job can run with the usual score.
        let raised = oom_score.as_ref().ok().and_then(|file| RaisedOomScore::raise(file).ok());
        let spawned = spawn(command, group.as_ref());
        drop(raised);
        let shell = spawned.map_err(|error| {
            if let Some(group) = &group {
                group.remove();
            }
            let home = spec.home.display();
            io::Error::new(error.kind(), format!("{program} can't be started in {home}: {error}"))
        })?;
        Ok(Self {
            shell: Some(shell),
            terminal,
            gone: spec.gone,
            estate: spec.estate,
            group,
            children,
            ending: None,
            shell_condemned: false,
        })
    }

    fn supervise(mut self, control: BufReader<UnixStream>) -> io::Result<()> {
        let mut commands = control.buffer().to_vec();
        let mut control = control.into_inner();
        let mut agent_lives = true;
        loop {
            while let Some(end) = commands.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = commands.drain(..=end).collect();
                self.handle_command(String::from_utf8_lossy(&line).trim_end());
            }
            let childless = self.reap();
            if let Some(ending) = &self.ending {
                let (kill_at, give_up_at) = (ending.kill_at, ending.give_up_at);
                if childless && self.group.as_ref().is_none_or(JobCgroup::is_empty) {
                    return self.leave(&mut control, agent_lives, "empty");
                }
                // If the report fails, the agent is dead, and the next round kills the job as always.
                if ending.spares_the_rest
                    && self.shell.is_none()
                    && writeln!(control, "released").is_ok()
                {
                    return self.stay_as_parent(control);
                }
                if now() >= give_up_at {
                    let left = names_of(&descendants(getpid()).unwrap_or_default());
                    return self.leave(&mut control, agent_lives, &format!("left {left}"));
                }
                let is_shells_turn = !ending.shell_asked && ending.grace > Duration::ZERO;
                if now() >= kill_at && ending.spares_the_rest {
                    self.signal_shell(Signal::SIGKILL);
                } else if now() >= kill_at && is_shells_turn && now() < kill_at + OTHERS_PATIENCE {
                    signal_all(&self.all_but_the_shell().unwrap_or_default(), Signal::SIGKILL);
                    self.end_shell_if_alone();
                } else if now() >= kill_at {
                    self.kill_everything();
                } else {
                    self.end_shell_if_alone();
                }
            }
            if self.wait(agent_lives.then_some(&control))? {
                let mut buffer = [0; 256];
                match control.read(&mut buffer) {
                    Ok(0) | Err(_) => {
                        agent_lives = false;
                        self.signal_shell(Signal::SIGKILL);
                        self.end_within(Duration::ZERO);
                    }
                    Ok(read) => commands.extend_from_slice(&buffer[..read]),
                }
            }
        }
    }

    /// Waits for a command of the agent, the end of a child, or the next deadline. Returns whether the
    /// control socket is readable.
    fn wait(&self, control: Option<&UnixStream>) -> io::Result<bool> {
        let timeout = match &self.ending {
            None => PollTimeout::NONE,
            Some(ending) => {
                let until_kill = ending.kill_at.saturating_duration_since(now());
                // No signal announces the end of processes that are not children; they must be polled for.
                let due = if ending.shell_asked {
                    until_kill.max(CHECK_INTERVAL)
                } else {
                    CHECK_INTERVAL
                };
                PollTimeout::try_from(due).unwrap_or(PollTimeout::MAX)
            }
        };
        let mut waiting = vec![PollFd::new(self.children.as_fd(), PollFlags::POLLIN)];
        waiting.extend(control.map(|control| PollFd::new(control.as_fd(), PollFlags::POLLIN)));
        match poll(&mut waiting, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let last = waiting.last().and_then(PollFd::any).unwrap_or(false);
        Ok(control.is_some() && last)
    }

    fn handle_command(&mut self, command: &str) {
        let grace = |text: &str| Duration::from_millis(text.parse().unwrap_or(0));
        match command.split_once(' ') {
            None if command == "kill-shell" => {
                self.shell_condemned = true;
                self.signal_shell(Signal::SIGSTOP);
            }
            None if command == "kill-foreground" => self.kill_foreground(),
            None if command == "kill-all" => self.kill_everything(),
            Some(("end", text)) => self.end_within(grace(text)),
            Some(("release", text)) => self.release_within(grace(text)),
            _ => {}
        }
    }

    fn signal_shell(&self, signal: Signal) {
        if let Some(shell) = self.shell {
            // The shell is not reaped yet, so the pid can't belong to another process.
            let _ = kill(shell, signal);
        }
    }

    /// Sends SIGTERM to everything but the shell, to be followed by SIGKILL after `grace`. A second call can
    /// only shorten the grace.
    fn end_within(&mut self, grace: Duration) {
        let kill_at = now() + grace;
        let give_up_at = kill_at + KILL_PATIENCE;
        if let Some(ending) = &mut self.ending {
            ending.grace = ending.grace.min(grace);
            ending.kill_at = ending.kill_at.min(kill_at);
            ending.give_up_at = ending.give_up_at.min(give_up_at);
            ending.spares_the_rest = false;
            return;
        }
        let ending =
            Ending { grace, kill_at, give_up_at, shell_asked: false, spares_the_rest: false };
        self.ending = Some(ending);
        let others = self.all_but_the_shell().unwrap_or_default();
        signal_all(&others, Signal::SIGTERM);
        // Stopped processes handle SIGTERM only once they continue.
        signal_all(&others, Signal::SIGCONT);
    }

    /// Ends the shell, and nothing else.
    fn release_within(&mut self, grace: Duration) {
        if self.ending.is_some() {
            return;
        }
        self.signal_shell(Signal::SIGHUP);
        self.signal_shell(Signal::SIGCONT);
        let kill_at = now() + grace;
        let give_up_at = kill_at + KILL_PATIENCE;
        let ending =
            Ending { grace, kill_at, give_up_at, shell_asked: true, spares_the_rest: true };
        self.ending = Some(ending);
    }

    /// Waits until all released processes have ended, without a limit.
    fn stay_as_parent(mut self, control: UnixStream) -> io::Result<()> {
        drop(control);
        // Close the other copy of the control socket, the terminal, and standard error.
        let null = File::options().read(true).write(true).open("/dev/null")?;
        dup2_stdin(&null)?;
        dup2_stdout(&null)?;
        dup2_stderr(&null)?;
        self.ending = None;
        while !self.reap() {
            self.wait(None)?;
        }
        if let Some(group) = &self.group {
            group.remove();
        }
        Ok(())
    }

    /// Asks the shell to end, once and only if nothing else is left. The grace begins anew for its EXIT trap.
    ///
    /// An interactive bash ignores SIGTERM, but ends on SIGHUP, EXIT trap included. Bash passes the hangup on
    /// to its jobs, so these are given time to handle their SIGTERM first. A condemned shell gets
    /// [`EXIT_SIGNAL`] instead: after a HUP trap of the job, bash would go on with the next command.
    fn end_shell_if_alone(&mut self) {
        let is_alone = || self.all_but_the_shell().is_ok_and(|others| others.is_empty());
        if self.ending.as_ref().is_none_or(|ending| ending.shell_asked) || !is_alone() {
            return;
        }
        let is_ignored_by = |shell| ignores(shell, EXIT_SIGNAL as i32).unwrap_or(false);
        let signal = match self.shell {
            _ if !self.shell_condemned => Signal::SIGHUP,
            Some(shell) if is_ignored_by(shell) => Signal::SIGKILL,
            _ => EXIT_SIGNAL,
        };
        self.signal_shell(signal);
        self.signal_shell(Signal::SIGCONT);
        if let Some(ending) = &mut self.ending {
            ending.shell_asked = true;
            ending.kill_at = now() + ending.grace;
            ending.give_up_at = ending.kill_at + KILL_PATIENCE;
        }
    }

    fn all_but_the_shell(&self) -> io::Result<Vec<Descendant>> {
        let mut others = descendants(getpid())?;
        others.retain(|process| Some(process.pid) != self.shell && !process.zombie);
        Ok(others)
    }

    /// Kills the process group that the shell waits for, if any.
    fn kill_foreground(&self) {
        if let Some(group) = self.shell.and_then(foreground_beside) {
            // Fails if the group has ended by itself.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }

    fn kill_everything(&self) {
        if let Some(group) = &self.group {
            group.kill();
        }
        signal_all(&descendants(getpid()).unwrap_or_default(), Signal::SIGKILL);
    }

    /// Reaps all children that have ended. Returns whether no child is left.
    fn reap(&mut self) -> bool {
        // One SIGCHLD may stand for many children, so its content does not matter.
        while let Ok(Some(_)) = self.children.read_signal() {}
        loop {
            // Nothing else in this process waits for children, so any child may be reaped here.
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => return false,
                Ok(ended) => {
                    if ended.pid().is_some() && ended.pid() == self.shell {
                        self.shell = None;
                        self.announce_end_of_shell(ended);
                    }
                }
                Err(Errno::EINTR) => {}
                Err(_no_children) => return true,
            }
        }
    }

    /// Announces the end of the shell on the terminal itself, so that the announcement comes after all
    /// output.
    ///
    /// It is written on a thread: while the agent does not read, the terminal may be full, and only a
    /// blocking write puts the whole frame in its place.
    fn announce_end_of_shell(&self, ended: WaitStatus) {
        let how = match ended {
            WaitStatus::Exited(_, code) => format!("exit code {code}"),
            WaitStatus::Signaled(_, signal, _) => format!("killed by {signal}"),
            _ => String::new(),
        };
        let frame = format!("\x01{} {how}\x01", self.gone);
        let path = self.terminal.clone();
        let announce = move |flags: OFlag| {
            // Open the terminal anew: the end of the shell, its session leader, hangs up existing
            // descriptors.
            let flags = (OFlag::O_NOCTTY | flags).bits();
            let terminal = File::options().write(true).custom_flags(flags).open(&path);
            // Fails if the agent has closed its end of the terminal.
            let _ = terminal.and_then(|mut terminal| terminal.write_all(frame.as_bytes()));
        };
        let at_once = announce.clone();
        if std::thread::Builder::new().spawn(move || announce(OFlag::empty())).is_err() {
            // The job has used up all threads. If the terminal is full, the announcement is lost, and the
            // agent notices the end of the shell later.
            at_once(OFlag::O_NONBLOCK);
        }
    }

    fn leave(self, control: &mut UnixStream, agent_lives: bool, report: &str) -> io::Result<()> {
        if let Some(group) = &self.group {
            group.remove();
        }
        // If the agent is dead, the rest of its work falls to this process.
        if agent_lives && writeln!(control, "{report}").is_ok() {
            return Ok(());
        }
        let closed = self.estate.close_access();
        self.estate.files.delete_all();
        closed
    }
}
