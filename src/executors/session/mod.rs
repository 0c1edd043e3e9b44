//! The session: runs scripts one after another in one interactive bash on a terminal, either of this machine
//! or of a container.
//!
//! ```text
//!          READY            BEGIN             ASK              MARK …
//! Starting ─────▶ Typed ──────────▶ Running ────────▶ Asked ─────────▶ Idle
//!                   ▲  └─────────────┴─ PROMPT: the end is typed once more │
//!                   └──────────────────────────────────────────────────────┘
//! ```
//!
//! The agent types one line for each script. The line sources the script's file, whose first words print
//! BEGIN, and then calls the session's function `__agent_end`. That function asks for the script's mark,
//! reads it from the terminal, and prints it with the exit code. So before a script has ended, its mark is
//! nowhere in the shell: not in history, variables, traces or arguments. A script's output can't fake its end.
//!
//! If bash gives up the line early (an interrupt throws it back to its prompt), its prompt prints PROMPT, and
//! the agent types the call of `__agent_end` once more. A script that ended like this has failed.
//!
//! The job's definitions can't change what the agent types and calls: aliases are off between scripts and
//! words are quoted; the session's functions are readonly and call only `builtin`, and each end of a script
//! removes a function of that name; options that would trace, skip or echo are off from the end of a script
//! to the first word of the next one.
//!
//! What the shell prints between two scripts, such as notices about background jobs, joins the output of the
//! second one.

mod bootstrap;
mod frames;
mod job_options;
mod typed;

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::task::{Poll, ready};
use std::time::Duration;

use actors::ports::{Script, ScriptEnd, SessionEvent};
use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::{Instant, timeout_at};

use self::bootstrap::probe;
pub use self::frames::Mark;
use self::frames::{Frames, Piece, ScriptWords};
use self::job_options::JobOptions;
use self::typed::Typed;
use crate::os::shell_words::quoted;

/// The size of one read, in bytes: eight times what a terminal returns at most, so that no read is cut short,
/// and not more than fits into one log event.
const READ: usize = 8 * 4095;

/// How long the shell may take from a typed line, or from the last part that it asked for, to BEGIN.
const BEGIN_PATIENCE: Duration = Duration::from_secs(40);

/// How long the shell may take from ASK to the script's end.
const END_PATIENCE: Duration = Duration::from_secs(20);

/// How long after ASK padding is typed behind the mark. In non-canonical mode, a terminal may hold back input
/// until `VMIN` bytes have arrived.
const PAD_AFTER: Duration = Duration::from_secs(1);

/// The length of the padding, in bytes: the largest `VMIN`.
const PADDING: usize = 255;

/// The first pause before the probe is typed again to a shell that is not ready, and the longest one. Pauses
/// double.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// How many times the shell may print ASK and PROMPT for one script. More means that it is not the shell, or
/// that it does not work.
const MOST_ASKS: u8 = 3;
const MOST_PROMPTS: u8 = 3;

/// A stream of bytes with a terminal at its other end.
pub trait Terminal: AsyncRead + AsyncWrite + Unpin {
    /// Resets the terminal's modes, so that it neither echoes nor changes what is typed next. Does nothing
    /// where only the shell itself can do that.
    fn reset_modes(&self) -> io::Result<()>;
}

/// One shell on a terminal.
#[derive(Debug)]
pub struct Session<T> {
    terminal: T,
    frames: Frames,
    received: BytesMut,
    /// Bytes to type that the terminal has not accepted yet.
    to_type: BytesMut,
    /// The buffer for reads while [`Self::to_type`] is not empty.
    chunk: Box<[u8]>,
    /// The parts of a script that is typed, for a shell that can't read this machine's files.
    typed: Typed,
    phase: Phase,
    /// The job's options that are off until the next script begins.
    options: JobOptions,
    untraced: bool,
    /// The current script is the bootstrap, which does not print BEGIN.
    is_bootstrap: bool,
    /// The current script has printed BEGIN.
    has_begun: bool,
    /// The end of a script, held back while an explanation is added to its output.
    end: Option<ScriptEnd>,
    /// How many times the current script has printed ASK.
    asks: u8,
    /// How many times the current script has printed PROMPT.
    prompts: u8,
    /// How many times the probe was typed.
    probes: u32,
    /// The exit code of the last script, which the next one finds in `$?`.
    status: i32,
}

/// What the shell is doing, according to its frames.
#[derive(Debug)]
enum Phase {
    /// The shell reads its startup files. `line` is typed afterwards.
    Starting { line: String, probe_at: Instant, pause: Duration },
    /// The shell has to read the typed line.
    Typed { until: Instant },
    /// The shell runs the script.
    Running,
    /// The shell has to read the script's mark. At `pad_at`, padding is typed behind it.
    Asked { pad_at: Option<Instant>, until: Instant },
    /// The shell waits for the next line.
    Idle,
    /// The shell has missed a deadline or broken the protocol, and is not used any more.
    Broken,
}

impl<T: Terminal> Session<T> {
    /// Returns a session on a terminal on which bash is being started. `gone` is the mark that announces the
    /// shell's end.
    pub fn new(terminal: T, gone: Mark) -> io::Result<Self> {
        Ok(Self {
            terminal,
            frames: Frames::new(gone).map_err(io::Error::other)?,
            received: BytesMut::with_capacity(READ),
            to_type: BytesMut::new(),
            chunk: vec![0; READ].into(),
            typed: Typed::default(),
            phase: Phase::Idle,
            options: JobOptions::default(),
            untraced: true,
            is_bootstrap: false,
            has_begun: false,
            end: None,
            asks: 0,
            prompts: 0,
            probes: 0,
            status: 0,
        })
    }

    fn start_when_ready(&mut self, boot: &str) -> io::Result<()> {
        self.begin_script()?;
        self.is_bootstrap = true;
        let end = self.end_line("$__agent_options");
        let line = format!(" {boot}; {end}\n");
        let probe_at = Instant::now() + FIRST_PAUSE;
        self.phase = Phase::Starting { line, probe_at, pause: FIRST_PAUSE };
        self.type_probe()
    }

    /// Types the line that makes a shell print READY once it has read its startup files. It is repeated until
    /// READY comes, as startup files may read it away; further READYs are ignored.
    fn type_probe(&mut self) -> io::Result<()> {
        let line = probe(self.frames.ready.as_str(), self.probes);
        self.probes += 1;
        self.queue(&line)
    }

    /// Returns whether the shell is not used any more because it does not follow the protocol.
    pub fn is_broken(&self) -> bool {
        matches!(self.phase, Phase::Broken)
    }

    fn begin_script(&mut self) -> io::Result<()> {
        if self.is_broken() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.frames.script = Some(ScriptWords::random().map_err(io::Error::other)?);
        (self.is_bootstrap, self.has_begun) = (false, false);
        (self.asks, self.prompts) = (0, 0);
        Ok(())
    }

    /// Returns the part of a typed line that ends a script.
    ///
    /// The call is in a group whose standard error is `/dev/null`, which hides its trace, and in a `&&` list,
    /// so that the exit code of a failed script triggers neither `set -e` nor the ERR trap again.
    fn end_line(&self, options: &str) -> String {
        format!("{{ {}; }} 2>/dev/null && [[ 1 ]]", self.end_call(options))
    }

    fn end_call(&self, options: &str) -> String {
        let ask = self.frames.script.as_ref().map_or("", |script| script.ask.as_str());
        format!("\\__agent_end \"$?\" \"$-\" \"$SHELLOPTS\" \"{options}\" {ask}")
    }

    /// Types a script. The session must have begun with [`Self::type_bootstrap`].
    ///
    /// If the script calls `__agent_receive FILE` (once), `received` is written to that file.
    pub fn type_script(&mut self, script: &Script, received: Option<&[u8]>) -> io::Result<()> {
        self.begin_script()?;
        self.untraced = script.untraced;
        let content = self.file_of(script);
        let file = self.typed.file().to_owned();
        let take = match self.typed.begin(content.as_bytes(), received) {
            Some(whole) => format!("\\builtin printf %b '{whole}' >|'{file}'"),
            None => format!("\\__agent_receive '{file}'"),
        };
        let (status, aliases, prompt) = (self.status, self.aliases(), self.prompt());
        let line = format!(
            "{GO} \\__agent_ready 0 '' {prompt}; {take} || \\__agent_unwritten; \
             \\__agent_ready {status} '{aliases}' {prompt} && \\__agent_ok; \\builtin . '{file}'; {}\n",
            self.end_line("$BASHOPTS")
        );
        self.type_line(&line)
    }

    /// Returns the content of the file for `script`, the current script.
    fn file_of(&mut self, script: &Script) -> String {
        let Script { text, untraced } = script;
        let JobOptions { set, other, .. } = &self.options;
        let (set, other) = if *untraced { ("", "") } else { (set.as_str(), other.as_str()) };
        let Some(script) = &mut self.frames.script else {
            return String::new();
        };
        // Keeps `$?`, and does not trigger `set -e` if it is not 0.
        let begin = script.begin.as_str();
        let begin =
            format!("\\__agent_begin \"$?\" {begin} '{other}' '{set}' 2>/dev/null && \\__agent_ok");
        // Turns tracing on again without a trace of doing so. `set -v` shows whole lines, so there it needs a
        // line of its own; otherwise it is on the script's first line, to keep line numbers right.
        let first_words = if set.contains('v') {
            format!("{{ {begin}; }} 2>/dev/null;\n")
        } else if set.contains('x') {
            format!("{{ {begin}; }} 2>/dev/null; ")
        } else {
            format!("{begin}; ")
        };
        script.first_words = first_words.trim_end_matches('\n').into();
        format!("{first_words}{text}\n")
    }

    /// Begins `script`. Returns the content of its file, to be written before [`Self::start_script`].
    pub fn next_file(&mut self, script: &Script) -> io::Result<String> {
        self.begin_script()?;
        self.untraced = script.untraced;
        Ok(self.file_of(script))
    }

    /// Makes bash source the file at `path`, whose content came from [`Self::next_file`].
    pub fn start_script(&mut self, path: &Path) -> io::Result<()> {
        let (aliases, prompt, end) = (self.aliases(), self.prompt(), self.end_line("$BASHOPTS"));
        let path = quoted(path);
        let line = format!(
            " \\__agent_ready \"$?\" '{aliases}' {prompt} && \\__agent_ok; \\builtin . {path}; {end}\n"
        );
        self.type_line(&line)
    }

    fn prompt(&self) -> &str {
        self.frames.script.as_ref().map_or("", |script| script.prompt.as_str())
    }

    fn aliases(&self) -> &'static str {
        if self.options.aliases && !self.untraced { "on" } else { "" }
    }

    fn type_line(&mut self, line: &str) -> io::Result<()> {
        self.phase = Phase::Typed { until: Instant::now() + BEGIN_PATIENCE };
        self.queue(line)
    }

    fn queue(&mut self, line: &str) -> io::Result<()> {
        self.terminal.reset_modes()?;
        self.to_type.extend_from_slice(line.as_bytes());
        Ok(())
    }

    /// Queues the current script's mark in response to ASK.
    fn answer(&mut self) -> io::Result<()> {
        let Some(script) = &mut self.frames.script else {
            return Ok(());
        };
        script.mark_requested = true;
        let line = self.typed.answer(script.mark, self.asks);
        self.asks += 1;
        let now = Instant::now();
        let pad_at = if self.typed.is_used() { None } else { Some(now + PAD_AFTER) };
        self.phase = Phase::Asked { pad_at, until: now + END_PATIENCE };
        self.queue(&line)
    }

    /// Types the call that ends the script once more, because the shell has given up the line with the first
    /// one.
    fn end_again(&mut self) -> io::Result<()> {
        self.prompts += 1;
        // Without a group: aliases may be on, and the job may have one for `{`.
        let line = format!(" {} 2>/dev/null && \\__agent_ok\n", self.end_call("$BASHOPTS"));
        self.queue(&line)
    }

    /// Waits for the next event. Dropping the future loses no event.
    pub async fn next_event(&mut self) -> SessionEvent {
        if let Some(end) = self.end.take() {
            return SessionEvent::ScriptEnded(end);
        }
        loop {
            if self.is_broken() {
                return self.end_of_stream();
            }
            let (piece, taken) = self.frames.next_piece(&self.received);
            let done = match piece {
                Piece::Output(range) => {
                    let mut output = self.received.split_to(taken);
                    output.advance(range.start);
                    return SessionEvent::Output(output.freeze());
                }
                Piece::Incomplete => match self.receive().await {
                    Ok(Received::Some) => Ok(()),
                    Ok(Received::Late(why)) => return self.broken(why),
                    Ok(Received::End) | Err(_) => return self.end_of_stream(),
                },
                Piece::Ready => {
                    self.received.advance(taken);
                    self.ready()
                }
                Piece::Begin => {
                    self.received.advance(taken);
                    self.has_begun = true;
                    self.phase = Phase::Running;
                    if let Some(script) = &mut self.frames.script {
                        script.first_words.clear();
                    }
                    Ok(())
                }
                Piece::Ask if self.asks == MOST_ASKS => return self.broken(BROKEN),
                Piece::Ask => {
                    self.received.advance(taken);
                    self.answer()
                }
                Piece::Prompt if self.prompts == MOST_PROMPTS => return self.broken(BROKEN),
                Piece::Prompt => {
                    self.received.advance(taken);
                    self.end_again()
                }
                Piece::Take => {
                    self.received.advance(taken);
                    if let Phase::Typed { until } = &mut self.phase {
                        *until = Instant::now() + BEGIN_PATIENCE;
                    }
                    let part = self.typed.next_part();
                    part.map_or(Ok(()), |part| self.queue(&format!(".{part}..\n")))
                }
                Piece::End { exit_code, flags, job_result } => {
                    self.received.advance(taken);
                    return self.ended(exit_code, &flags, job_result);
                }
                Piece::Ignored => {
                    self.received.advance(taken);
                    Ok(())
                }
                Piece::Gone(how) => return SessionEvent::ShellEnded(how),
            };
            if done.is_err() {
                return self.end_of_stream();
            }
        }
    }

    fn ready(&mut self) -> io::Result<()> {
        match std::mem::replace(&mut self.phase, Phase::Running) {
            Phase::Starting { line, .. } => self.type_line(&line),
            other => {
                self.phase = other;
                Ok(())
            }
        }
    }

    fn ended(&mut self, exit_code: i32, flags: &str, job_result: String) -> SessionEvent {
        self.frames.script = None;
        self.phase = Phase::Idle;
        if !self.untraced || self.is_bootstrap {
            self.options = JobOptions::from_flags(flags);
        }
        let was_not_run = exit_code == 0 && !self.has_begun && !self.is_bootstrap;
        // A script whose line was given up has failed, whatever its exit code.
        let exit_code = if was_not_run || self.prompts > 0 { 1 } else { exit_code };
        self.status = exit_code;
        let end = ScriptEnd { exit_code, job_result };
        if was_not_run {
            self.end = Some(end);
            return SessionEvent::Output(Bytes::from_static(UNRUN.as_bytes()));
        }
        SessionEvent::ScriptEnded(end)
    }

    /// Types what is queued, and reads, whichever is possible first: a shell that does not read its input may
    /// still print.
    async fn receive(&mut self) -> io::Result<Received> {
        let (until, why) = match &self.phase {
            Phase::Starting { probe_at, .. } => (*probe_at, ""),
            Phase::Asked { pad_at: Some(pad_at), .. } => (*pad_at, ""),
            Phase::Typed { until } | Phase::Asked { pad_at: None, until } => (*until, BROKEN),
            Phase::Running | Phase::Idle | Phase::Broken => return self.exchange().await,
        };
        match timeout_at(until, self.exchange()).await {
            Ok(received) => received,
            Err(_) if why.is_empty() => {
                self.type_more()?;
                Ok(Received::Some)
            }
            Err(_) => Ok(Received::Late(why)),
        }
    }

    fn type_more(&mut self) -> io::Result<()> {
        match &mut self.phase {
            Phase::Starting { probe_at, pause, .. } => {
                *pause = (*pause * 2).min(LONGEST_PAUSE);
                *probe_at = Instant::now() + *pause;
                self.type_probe()
            }
            Phase::Asked { pad_at, .. } => {
                *pad_at = None;
                self.queue(&"\n".repeat(PADDING))
            }
            _ => Ok(()),
        }
    }

    async fn exchange(&mut self) -> io::Result<Received> {
        let read = if self.to_type.is_empty() {
            self.received.reserve(READ);
            self.terminal.read_buf(&mut self.received).await?
        } else {
            let Self { terminal, received, to_type, chunk, .. } = self;
            std::future::poll_fn(|cx| {
                while !to_type.is_empty() {
                    match Pin::new(&mut *terminal).poll_write(cx, to_type)? {
                        Poll::Ready(0) => {
                            return Poll::Ready(Err(io::Error::from(io::ErrorKind::WriteZero)));
                        }
                        Poll::Ready(written) => to_type.advance(written),
                        Poll::Pending => break,
                    }
                }
                let mut buffer = ReadBuf::new(chunk);
                ready!(Pin::new(&mut *terminal).poll_read(cx, &mut buffer))?;
                received.extend_from_slice(buffer.filled());
                Poll::Ready(Ok(buffer.filled().len()))
            })
            .await?
        };
        Ok(if read == 0 { Received::End } else { Received::Some })
    }

    fn broken(&mut self, why: &'static str) -> SessionEvent {
        self.phase = Phase::Broken;
        self.received.clear();
        SessionEvent::Output(Bytes::from_static(why.as_bytes()))
    }

    /// Returns the last events after the end of the stream: an incomplete frame or echo was output after all.
    fn end_of_stream(&mut self) -> SessionEvent {
        let rest: Bytes = self.received.split().freeze();
        if rest.is_empty() {
            SessionEvent::ShellEnded(String::new())
        } else {
            SessionEvent::Output(rest)
        }
    }
}

enum Received {
    Some,
    End,
    /// A deadline was missed. The text explains it in the job's log.
    Late(&'static str),
}

/// Printed to the job's log when the shell does not follow the protocol.
const BROKEN: &str = "The job's shell can't be used any more, and the command counts as failed: the agent needs bash's \
                      builtins `builtin`, `printf`, `read`, `set`, `shopt`, `unset` and `return`, and the terminal's \
                      input for itself.\r\n";

/// Printed to the job's log when a script has ended without BEGIN.
const UNRUN: &str = "The command was not run: its script could not be read.\r\n";

/// The first character of a typed line. A shell whose scripts are typed waits for it with the echo off, so
/// that the rest of the line is not echoed.
const GO: &str = " ";
