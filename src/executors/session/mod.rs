//! The shell protocol: runs scripts one after another in one interactive bash behind a stream of
//! bytes, be it a terminal of this machine or of a container.
//!
//! ```text
//!          READY            BEGIN             ASK              MARK …
//! Starting ─────▶ Typed ──────────▶ Running ────────▶ Asked ─────────▶ Idle
//!                   ▲  └─────────────┴─ PROMPT: the end is typed once more │
//!                   └──────────────────────────────────────────────────────┘
//! ```
//!
//! The agent types one line for each script. It sources the script's file, whose first words tell that it runs,
//! and then calls a function of ours, which asks for the script's mark, reads it from the terminal, and prints
//! it with the exit code. So the mark exists nowhere before the script is over: not in the shell's history,
//! variables, traces or arguments; and a script's output can't end the script, whatever it prints. When bash
//! gives up the line early (an interrupt throws it back to its prompt), its prompt says so, and the end is
//! typed once more; what ended like that has never passed.
//!
//! Nothing that a job defines changes what is typed and called: aliases are off between scripts and words are
//! quoted, the functions are readonly and call nothing but `builtin`, a function of that name is removed by
//! each end, and options that would trace, skip or echo are off from one end to the next script's first word.
//!
//! What the shell prints between two scripts, such as notices about background jobs, joins the
//! output of the next one.

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

/// How much is read at once, in bytes: eight times what a terminal gives, so that no read is cut
/// short, and not more than fits one log event.
const READ: usize = 8 * 4095;

/// How long the shell may take from a typed line to the script's first word, if nothing is received.
const BEGIN_PATIENCE: Duration = Duration::from_secs(40);

/// How long the shell may take from asking for the mark to telling the end.
const END_PATIENCE: Duration = Duration::from_secs(20);

/// How long the shell may take for that until it is typed what no terminal waits for longer than: as many bytes as
/// its modes can ask for at most.
const PAD_AFTER: Duration = Duration::from_secs(1);
const MOST_AWAITED: usize = 255;

/// The first pause before a shell that does not get ready is typed to once more; pauses double.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// How often one script's end may be asked for, and typed. More is no shell's.
const MOST_ASKS: u8 = 3;
const MOST_PROMPTS: u8 = 3;

/// A stream of bytes with a terminal at its other end.
pub trait Terminal: AsyncRead + AsyncWrite + Unpin {
    /// Keeps the terminal from echoing what is typed next, and from changing it, whatever modes were left
    /// behind. Does nothing where only the shell itself can do that.
    fn reset_modes(&self) -> io::Result<()>;
}

/// One shell behind a terminal.
#[derive(Debug)]
pub struct Session<T> {
    terminal: T,
    frames: Frames,
    received: BytesMut,
    /// Typed, but not yet taken by the terminal.
    to_type: BytesMut,
    /// Where bytes are read to while some are still to be typed.
    chunk: Box<[u8]>,
    /// For a shell that can't read this machine's files.
    typed: Typed,
    phase: Phase,
    /// What the job has turned on and the session has turned off.
    options: JobOptions,
    untraced: bool,
    /// The script is the session's own first one, which does not tell that it runs.
    is_bootstrap: bool,
    /// The script's first word has been run.
    has_begun: bool,
    /// The script's end, once what is wrong with it is told.
    end: Option<ScriptEnd>,
    asks: u8,
    prompts: u8,
    /// How often the shell was asked whether it is ready.
    probes: u32,
    /// The exit code of the last script, which the next one sees.
    status: i32,
}

/// What the shell is doing, as far as it has told.
#[derive(Debug)]
enum Phase {
    /// It reads its startup files. `line` is what comes then.
    Starting { line: String, probe_at: Instant, pause: Duration },
    /// It is to read a line.
    Typed { until: Instant },
    /// It runs the script.
    Running,
    /// It is to read the script's mark. Some modes of a terminal let it wait for more than that, so from `pad_at` on
    /// it gets more.
    Asked { pad_at: Option<Instant>, until: Instant },
    /// It waits for the next line.
    Idle,
    /// It does not do what it must.
    Broken,
}

impl<T: Terminal> Session<T> {
    /// A session on a terminal where bash starts. `gone` is what announces the shell's end.
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

    /// What a shell whose startup files are read answers with READY. Typed until it does: startup files may read
    /// it away. Only the first one that is run counts.
    fn type_probe(&mut self) -> io::Result<()> {
        let line = probe(self.frames.ready.as_str(), self.probes);
        self.probes += 1;
        self.queue(&line)
    }

    /// Whether the shell has been given up.
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

    /// What ends a script. In a group, so that its trace goes nowhere; in a list, so that a failed script's exit
    /// code neither trips `set -e` nor the ERR trap again.
    fn end_line(&self, options: &str) -> String {
        format!("{{ {}; }} 2>/dev/null && [[ 1 ]]", self.end_call(options))
    }

    fn end_call(&self, options: &str) -> String {
        let ask = self.frames.script.as_ref().map_or("", |script| script.ask.as_str());
        format!("\\__agent_end \"$?\" \"$-\" \"$SHELLOPTS\" \"{options}\" {ask}")
    }

    /// Types a script, after [`Self::type_bootstrap`]. One that calls `__agent_receive FILE`, once, gets
    /// `received` into that file.
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

    /// `script`, whose turn it is, as it must stand in its file.
    fn file_of(&mut self, script: &Script) -> String {
        let Script { text, untraced } = script;
        let JobOptions { set, other, .. } = &self.options;
        let (set, other) = if *untraced { ("", "") } else { (set.as_str(), other.as_str()) };
        let Some(script) = &mut self.frames.script else {
            return String::new();
        };
        // Without changing `$?`, or tripping over it.
        let begin = script.begin.as_str();
        let begin =
            format!("\\__agent_begin \"$?\" {begin} '{other}' '{set}' 2>/dev/null && \\__agent_ok");
        // Turns tracing on again without tracing that. For `set -v` on a line of its own, as only whole lines
        // are shown; else on the first, so that line numbers are right.
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

    /// Makes the next script that of `script`: what must stand in its file before [`Self::start_script`].
    pub fn next_file(&mut self, script: &Script) -> io::Result<String> {
        self.begin_script()?;
        self.untraced = script.untraced;
        Ok(self.file_of(script))
    }

    /// Has bash source the file at `path`, which is of [`Self::next_file`].
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

    /// Queues the running script's mark, because the shell asks for it.
    fn answer(&mut self) -> io::Result<()> {
        let Some(script) = &mut self.frames.script else {
            return Ok(());
        };
        script.is_asked = true;
        let line = self.typed.answer(script.mark, self.asks);
        self.asks += 1;
        let now = Instant::now();
        let pad_at = if self.typed.is_used() { None } else { Some(now + PAD_AFTER) };
        self.phase = Phase::Asked { pad_at, until: now + END_PATIENCE };
        self.queue(&line)
    }

    /// Types the end of a script whose line the shell has given up.
    fn end_again(&mut self) -> io::Result<()> {
        self.prompts += 1;
        // Not in a group: the job's aliases may be on, also for reserved words.
        let line = format!(" {} 2>/dev/null && \\__agent_ok\n", self.end_call("$BASHOPTS"));
        self.queue(&line)
    }

    /// Waits for the next event. Dropping the future loses nothing.
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
                Piece::Nothing => {
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
            self.options = JobOptions::of(flags);
        }
        let is_unrun = exit_code == 0 && !self.has_begun && !self.is_bootstrap;
        // A line that was given up has failed, whatever is said of it.
        let exit_code = if is_unrun || self.prompts > 0 { 1 } else { exit_code };
        self.status = exit_code;
        let end = ScriptEnd { exit_code, job_result };
        if is_unrun {
            self.end = Some(end);
            return SessionEvent::Output(Bytes::from_static(UNRUN.as_bytes()));
        }
        SessionEvent::ScriptEnded(end)
    }

    /// Types what is queued and reads, whichever is possible: a shell that takes nothing may print all the same.
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
                self.queue(&"\n".repeat(MOST_AWAITED))
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

    /// The stream is over: what looked like the beginning of a frame, or of an echo, was output.
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
    /// For this reason it is too late.
    Late(&'static str),
}

/// Told when the shell does not do what the session needs.
const BROKEN: &str = "The job's shell can't be used any more, and the command counts as failed: the agent needs bash's \
                      builtins `builtin`, `printf`, `read`, `set`, `shopt`, `unset` and `return`, and the terminal's \
                      input for itself.\r\n";

/// Told when the shell has come to a script's end without a word of it.
const UNRUN: &str = "The command was not run: its script could not be read.\r\n";

/// A shell whose scripts are typed waits for this with its echo off, and then reads the line behind it.
const GO: &str = " ";
