//! The first process of a shell job: the parent of its shell, and the adopter of everything that
//! the job leaves without a parent. It is this program again, as `agent job-init`.
//!
//! It lives beside the agent so that it can do its work when the agent can't: if the agent dies,
//! the job dies with it. No process can leave the tree below it, so when it has no child left, none of
//! the job's processes is left.
//!
//! ```text
//!              end GRACE                     nothing but         no child left
//! Running ───────────────▶ All but the shell ───────────▶ Shell ───────────────▶ done
//!    │                      asked to end,     the shell  asked to end, with       ▲
//!    │                      then killed                  a grace of its own       │
//!    │ agent gone, or no grace                             │ grace over           │
//!    └───────────────────────────────▶ All killed ◀────────┘                      │
//!                                          └──────────────────────────────────────┘
//! ```
//!
//! Descriptors: 0 is the control socket, 1 the shell's end of the terminal. The first line on the
//! socket is a [`Spec`] in JSON; then come `kill-shell`, `kill-foreground`, `kill-all`,
//! `end MILLISECONDS` and `release MILLISECONDS`. It answers `started` or `failed WHY`, and at the end `empty`, `left WHAT` or
//! `released`.
//!
//! A release ends the shell only. What is left then is no part of the job any more: this process stays
//! as its parent, and neither the agent's end nor anything else ends it.

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

/// What to run and how to announce its end.
#[derive(Debug, Deserialize, Serialize)]
pub struct Spec {
    /// The shell and its arguments.
    pub shell: Vec<String>,
    /// Where it starts.
    pub home: PathBuf,
    /// Printed on the terminal when the shell has ended: between two bytes 1, with words that say how behind it.
    pub gone: String,
    /// What is deleted and taken back if the agent dies.
    pub estate: Estate,
    /// How many files its processes may have open, if not as many as the agent.
    pub open_files: Option<u64>,
}

/// How long killing may take before what is left is reported.
pub const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// How much sooner than other processes the kernel takes a job's when memory runs out, of 1000.
const OOM_SCORE_ADJUSTMENT: i32 = 500;

/// Ends a bash that has no trap for it as a hangup does, its EXIT trap included.
const EXIT_SIGNAL: Signal = Signal::SIGVTALRM;

/// How long it may take that what ignores the end is killed before the shell has to go with it.
const OTHERS_PATIENCE: Duration = Duration::from_secs(1);

/// How long to wait between two looks at what is left.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Runs until the job is over. Answers only if it could not begin.
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
    /// It is stopped, and killed as soon as nothing else is left: the kernel hangs up on the running
    /// command when the shell dies, which must not come before its SIGTERM.
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

/// This process, and what it starts, is the first to go when memory runs out, as long as this value is there.
struct RaisedOomScore<'a> {
    file: &'a File,
    before: String,
}

impl<'a> RaisedOomScore<'a> {
    /// `file` is this process's own, opened before it was hidden from others.
    fn of(mut file: &'a File) -> io::Result<Self> {
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

/// When the job is to be killed, and when to give up killing it.
struct Ending {
    /// What the shell has once it is alone.
    grace: Duration,
    kill_at: Instant,
    give_up_at: Instant,
    shell_ended: bool,
    /// Only the shell is to end.
    spares_the_rest: bool,
}

#[expect(clippy::disallowed_methods, reason = "a process without tokio has no other clock")]
fn now() -> Instant {
    Instant::now()
}

impl JobInit {
    fn start(spec: Spec) -> io::Result<Self> {
        prctl::set_child_subreaper(true)?;
        // Out of the reach of the terminal that the agent may run on. Fails for a leader only.
        let _ = setsid();
        // Everything but SIGKILL is blocked, not ignored: children start with a clean mask.
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?;
        let mut watched = SigSet::empty();
        watched.add(Signal::SIGCHLD);
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let children = SignalFd::with_flags(&watched, flags)?;

        if let Some(limit) = spec.open_files {
            open_files::lower_to(limit)?;
        }

        // Jobs run as the same user. Some files of this process are only to be had before.
        let oom_score = File::options().read(true).write(true).open("/proc/self/oom_score_adj");
        prctl::set_dumpable(false)?;

        let terminal = nix::unistd::ttyname(io::stdout())?;
        let end = || -> io::Result<Stdio> { Ok(io::stdout().as_fd().try_clone_to_owned()?.into()) };
        let Some((program, arguments)) = spec.shell.split_first() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no shell is named"));
        };
        let group = JobCgroup::create(&job_mark::group_name(spec.estate.files.name()));
        let mut command = Command::new(program);
        command.args(arguments).current_dir(&spec.home);
        command.stdin(end()?).stdout(end()?).stderr(end()?);
        sys::lead_terminal_session(&mut command);
        // When memory runs out, a job goes before the agent and its helpers. A job can do without.
        let raised = oom_score.as_ref().ok().and_then(|file| RaisedOomScore::of(file).ok());
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
                self.obey(String::from_utf8_lossy(&line).trim_end());
            }
            let childless = self.reap();
            if let Some(ending) = &self.ending {
                let (kill_at, give_up_at) = (ending.kill_at, ending.give_up_at);
                if childless && self.group.as_ref().is_none_or(JobCgroup::is_empty) {
                    return self.leave(&mut control, agent_lives, "empty");
                }
                // An agent that is just going has the job killed, as ever.
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
                let is_shells_turn = !ending.shell_ended && ending.grace > Duration::ZERO;
                if now() >= kill_at && ending.spares_the_rest {
                    self.signal_shell(Signal::SIGKILL);
                } else if now() >= kill_at && is_shells_turn && now() < kill_at + OTHERS_PATIENCE {
                    signal_all(&self.all_but_the_shell().unwrap_or_default(), Signal::SIGKILL);
                    self.end_lonely_shell();
                } else if now() >= kill_at {
                    self.kill_everything();
                } else {
                    self.end_lonely_shell();
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

    /// Waits for the agent, a child, or the next moment when something is due;
    /// whether it was the agent.
    fn wait(&self, control: Option<&UnixStream>) -> io::Result<bool> {
        let timeout = match &self.ending {
            None => PollTimeout::NONE,
            Some(ending) => {
                let until_kill = ending.kill_at.saturating_duration_since(now());
                // The end of processes that are not this one's children has to be looked for.
                let due = if ending.shell_ended { until_kill.max(LOOK_AGAIN) } else { LOOK_AGAIN };
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

    fn obey(&mut self, command: &str) {
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
            // Not yet waited for, so the number is still the shell's.
            let _ = kill(shell, signal);
        }
    }

    /// Asks everything to end, and sees to it after `grace`.
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
            Ending { grace, kill_at, give_up_at, shell_ended: false, spares_the_rest: false };
        self.ending = Some(ending);
        let others = self.all_but_the_shell().unwrap_or_default();
        signal_all(&others, Signal::SIGTERM);
        // What is stopped can't heed it otherwise.
        signal_all(&others, Signal::SIGCONT);
    }

    /// Ends the shell, whatever else there is.
    fn release_within(&mut self, grace: Duration) {
        if self.ending.is_some() {
            return;
        }
        self.signal_shell(Signal::SIGHUP);
        self.signal_shell(Signal::SIGCONT);
        let kill_at = now() + grace;
        let give_up_at = kill_at + KILL_PATIENCE;
        let ending =
            Ending { grace, kill_at, give_up_at, shell_ended: true, spares_the_rest: true };
        self.ending = Some(ending);
    }

    /// Waits for what was released, without end.
    fn stay_as_parent(mut self, control: UnixStream) -> io::Result<()> {
        drop(control);
        // The other copy of the control socket, the terminal, and whatever the agent prints to.
        let nothing = File::options().read(true).write(true).open("/dev/null")?;
        dup2_stdin(&nothing)?;
        dup2_stdout(&nothing)?;
        dup2_stderr(&nothing)?;
        self.ending = None;
        while !self.reap() {
            self.wait(None)?;
        }
        if let Some(group) = &self.group {
            group.remove();
        }
        Ok(())
    }

    /// An interactive bash ignores SIGTERM but heeds a hangup, and runs its EXIT trap. It passes the
    /// hangup on to its jobs, so they are given the time to heed their SIGTERM first. One that is to run nothing more
    /// must not have a hangup's trap of the job, which would go on with the next command: it gets a signal for which
    /// hardly a job has a trap. Either way its EXIT trap has the same time as everything else.
    fn end_lonely_shell(&mut self) {
        let lonely = || self.all_but_the_shell().is_ok_and(|others| others.is_empty());
        if self.ending.as_ref().is_none_or(|ending| ending.shell_ended) || !lonely() {
            return;
        }
        let is_deaf = |shell| ignores(shell, EXIT_SIGNAL as i32).unwrap_or(false);
        let asked = match self.shell {
            _ if !self.shell_condemned => Signal::SIGHUP,
            Some(shell) if is_deaf(shell) => Signal::SIGKILL,
            _ => EXIT_SIGNAL,
        };
        self.signal_shell(asked);
        self.signal_shell(Signal::SIGCONT);
        if let Some(ending) = &mut self.ending {
            ending.shell_ended = true;
            ending.kill_at = now() + ending.grace;
            ending.give_up_at = ending.kill_at + KILL_PATIENCE;
        }
    }

    fn all_but_the_shell(&self) -> io::Result<Vec<Descendant>> {
        let mut others = descendants(getpid())?;
        others.retain(|process| Some(process.pid) != self.shell && !process.zombie);
        Ok(others)
    }

    /// Kills what the shell waits for; nothing if it runs something itself.
    fn kill_foreground(&self) {
        if let Some(group) = self.shell.and_then(foreground_beside) {
            // It may have ended by itself.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }

    fn kill_everything(&self) {
        if let Some(group) = &self.group {
            group.kill();
        }
        signal_all(&descendants(getpid()).unwrap_or_default(), Signal::SIGKILL);
    }

    /// Waits for all children that have ended; whether none is left.
    fn reap(&mut self) -> bool {
        // Many signals may have become one; the children are asked, not the signal.
        while let Ok(Some(_)) = self.children.read_signal() {}
        loop {
            // This process is nothing but a parent: every child is its own to wait for.
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

    /// Announces the end of the shell on the terminal itself, so that it comes after everything
    /// that was printed before. On a thread, as the terminal may be full for as long as the agent
    /// does not read: a write that waits comes through whole and in its turn.
    fn announce_end_of_shell(&self, ended: WaitStatus) {
        let how = match ended {
            WaitStatus::Exited(_, code) => format!("exit code {code}"),
            WaitStatus::Signaled(_, signal, _) => format!("killed by {signal}"),
            _ => String::new(),
        };
        let frame = format!("\x01{} {how}\x01", self.gone);
        let path = self.terminal.clone();
        let announce = move |flags: OFlag| {
            // A new descriptor, for the case that the shell's end hung up the old ones.
            let flags = (OFlag::O_NOCTTY | flags).bits();
            let terminal = File::options().write(true).custom_flags(flags).open(&path);
            // If the agent has closed its end, there is nobody to tell.
            let _ = terminal.and_then(|mut terminal| terminal.write_all(frame.as_bytes()));
        };
        let at_once = announce.clone();
        if std::thread::Builder::new().spawn(move || announce(OFlag::empty())).is_err() {
            // The job has used up all threads. A full terminal loses it then, and the end is noticed later.
            at_once(OFlag::O_NONBLOCK);
        }
    }

    fn leave(self, control: &mut UnixStream, agent_lives: bool, report: &str) -> io::Result<()> {
        if let Some(group) = &self.group {
            group.remove();
        }
        // An agent that went meanwhile leaves the rest to this process.
        if agent_lives && writeln!(control, "{report}").is_ok() {
            return Ok(());
        }
        let closed = self.estate.close_access();
        self.estate.files.delete();
        closed
    }
}
