//! The shell protocol: runs scripts one after another in one interactive bash behind a stream of
//! bytes, be it a terminal of this machine or of a container.
//!
//! The agent types one constant line for each script. It sources the script's file and then calls
//! a function of ours, which asks for the script's mark, reads it from the terminal, and prints it
//! with the exit code. So the mark exists nowhere before the script is over: not in the shell's
//! history, variables, traces or arguments; and a script's output can't end the script, whatever it
//! prints. When bash gives up the line early (an interrupt throws it back to its prompt), its
//! prompt command calls the same function.
//!
//! What the shell prints between two scripts, such as notices about background jobs, joins the
//! output of the next one.

mod frames;
mod typed;

use std::io;
use std::path::Path;

use actors::ports::{Script, ScriptEnd, SessionEvent};
use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

pub use self::frames::Mark;
use self::frames::{Frames, Piece};
use self::typed::{Typed, parts_of};

/// How much is read at once, in bytes: eight times what a terminal gives, so that no read is cut
/// short, and not more than fits one log event.
const READ: usize = 8 * 4095;

/// A stream of bytes with a terminal at its other end.
pub trait Terminal: AsyncRead + AsyncWrite + Unpin {
    /// Keeps the terminal from echoing what is typed next.
    fn suppress_echo(&self) -> io::Result<()>;
}

/// One shell behind a terminal.
#[derive(Debug)]
pub struct Session<T> {
    terminal: T,
    frames: Frames,
    received: BytesMut,
    /// Typed, but not yet taken by the terminal.
    to_type: BytesMut,
    /// For a shell that can't read this machine's files.
    typed: Typed,
    /// The shell has a line editor, which shows what is typed.
    is_editing: bool,
    /// The tracing options (`set -v`, `set -x`) that the job has turned on.
    tracing: String,
    untraced: bool,
}

/// Among the shell's flags if it has a line editor.
const IS_EDITING: char = '@';

/// Shell options that the session turns off between scripts and on again for the next one, since
/// they would show what the agent types.
const TRACING: [char; 2] = ['v', 'x'];

impl<T: Terminal> Session<T> {
    /// A session on a terminal where bash starts. `gone` is what announces the shell's end.
    pub fn new(terminal: T, gone: Mark) -> io::Result<Self> {
        let random = || Mark::random().map_err(io::Error::other);
        Ok(Self {
            terminal,
            frames: Frames::new(random()?, random()?, gone),
            received: BytesMut::with_capacity(READ),
            to_type: BytesMut::new(),
            typed: Typed::default(),
            is_editing: false,
            tracing: String::new(),
            untraced: true,
        })
    }

    /// The script that must be run first.
    pub fn bootstrap(&self) -> String {
        include_str!("bootstrap.bash").replace("@ASK@", self.frames.ask.as_str())
    }

    /// Has bash source the bootstrap script at `path`. Its end is an event like that of any script.
    pub async fn start_bootstrap(&mut self, path: &Path) -> io::Result<()> {
        let line = format!(" . {}; {END}\n", quoted(path));
        self.type_line(&line).await
    }

    /// Types the bootstrap script, for a shell that can't read this machine's files: it keeps the scripts that
    /// it runs in `file`, and the exit code tells whether it can. It may be typed before the shell is there.
    /// Answers what is typed.
    pub async fn type_bootstrap(&mut self, file: &str) -> io::Result<String> {
        self.typed = Typed::new(file);
        let take = include_str!("take.bash")
            .replace("@TAKE@", self.frames.take.as_str())
            .replace("@FILE@", file);
        let bootstrap = parts_of(format!("{}{take}", self.bootstrap()).as_bytes()).concat();
        let line = format!(
            " set +o emacs +o vi; builtin printf -v __agent_bootstrap %b '{bootstrap}'; builtin eval \"$__agent_bootstrap\"; \
             {END}\n"
        );
        debug_assert!(line.len() < 4095);
        self.type_line(&line).await?;
        Ok(line)
    }

    /// Types a script, after [`Self::type_bootstrap`]. One that calls `__agent_receive FILE`, once, gets
    /// `received` into that file.
    pub async fn type_script(
        &mut self,
        script: &Script,
        received: Option<&[u8]>,
    ) -> io::Result<()> {
        self.untraced = script.untraced;
        let argument = self.typed.begin(self.file_of(script).as_bytes(), received);
        let file = self.typed.file();
        let line = format!(" __agent_take{argument} && [[ 1 ]]; . '{file}'; {END}\n");
        if self.is_editing {
            self.typed.expect_echo(&line);
        }
        self.type_line(&format!("{GO}{line}")).await
    }

    /// `script` as it must stand in its file.
    pub fn file_of(&self, script: &Script) -> String {
        let Script { text, untraced } = script;
        if *untraced || self.tracing.is_empty() {
            return format!("{text}\n");
        }
        // Turns tracing on again without tracing that, and without changing `$?`. For `set -v` on
        // a line of its own, as only whole lines are shown; else on the first, so that line
        // numbers are right.
        let line_end = if self.tracing.contains('v') { '\n' } else { ' ' };
        let tracing = &self.tracing;
        format!("{{ __agent_begin {tracing} && [[ 1 ]]; }} 2>/dev/null;{line_end}{text}\n")
    }

    /// Has bash source the file of `script` at `path`.
    pub async fn start_script(&mut self, script: &Script, path: &Path) -> io::Result<()> {
        self.untraced = script.untraced;
        let line = format!(" __agent_begin && [[ 1 ]]; . {}; {END}\n", quoted(path));
        self.type_line(&line).await
    }

    async fn type_line(&mut self, line: &str) -> io::Result<()> {
        self.frames.script = None;
        self.queue(line)?;
        self.flush().await
    }

    fn queue(&mut self, line: &str) -> io::Result<()> {
        self.terminal.suppress_echo()?;
        self.to_type.extend_from_slice(line.as_bytes());
        Ok(())
    }

    /// Types what is queued. Dropping the future loses nothing.
    async fn flush(&mut self) -> io::Result<()> {
        while !self.to_type.is_empty() {
            if self.terminal.write_buf(&mut self.to_type).await? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        Ok(())
    }

    /// Queues the running script's mark, because the shell asks for it.
    fn answer(&mut self) -> io::Result<()> {
        // One mark only: the shell asks again if an interrupt kept it from reading the first answer.
        let mark = match self.frames.script {
            Some(mark) => mark,
            None => Mark::random().map_err(io::Error::other)?,
        };
        self.frames.script = Some(mark);
        self.queue(&format!("{}\n", mark.as_str()))
    }

    /// Waits for the next event. Dropping the future loses nothing.
    pub async fn next_event(&mut self) -> SessionEvent {
        loop {
            if self.flush().await.is_err() {
                return self.end_of_stream();
            }
            let (piece, taken) = self.frames.next_piece(&self.received);
            match piece {
                Piece::Output(range) => {
                    let mut output = self.received.split_to(taken);
                    output.advance(range.start);
                    if self.typed.holds() {
                        self.typed.hold(&output);
                    } else {
                        return SessionEvent::Output(output.freeze());
                    }
                }
                Piece::Ask => {
                    self.received.advance(taken);
                    if self.answer().is_err() {
                        return self.end_of_stream();
                    }
                }
                Piece::Take => {
                    self.received.advance(taken);
                    let part = self.typed.next_part();
                    if part.is_some_and(|part| self.queue(&format!("{part}\n")).is_err()) {
                        return self.end_of_stream();
                    }
                    if let Some(output) = self.typed.release() {
                        return SessionEvent::Output(output);
                    }
                }
                Piece::End { exit_code, flags, job_result } => {
                    self.received.advance(taken);
                    self.frames.script = None;
                    self.is_editing = flags.contains(IS_EDITING);
                    if !self.untraced {
                        self.tracing = flags.matches(TRACING).collect();
                    }
                    return SessionEvent::ScriptEnded(ScriptEnd { exit_code, job_result });
                }
                Piece::Echo => self.received.advance(taken),
                Piece::Gone => return SessionEvent::ShellEnded,
                Piece::Incomplete => {
                    self.received.reserve(READ);
                    match self.terminal.read_buf(&mut self.received).await {
                        Ok(0) | Err(_) => return self.end_of_stream(),
                        Ok(_) => {}
                    }
                }
            }
        }
    }

    /// The stream is over: what looked like the beginning of a frame, or of an echo, was output.
    fn end_of_stream(&mut self) -> SessionEvent {
        if let Some(output) = self.typed.release() {
            return SessionEvent::Output(output);
        }
        let rest: Bytes = self.received.split().freeze();
        if rest.is_empty() { SessionEvent::ShellEnded } else { SessionEvent::Output(rest) }
    }
}

/// A shell whose scripts are typed waits for this with its echo off, and then reads the line behind it. Before
/// that line it means nothing.
const GO: &str = " ";

/// Ends every typed line. In a group, so that its trace goes nowhere; in a list, so that a failed
/// script's exit code neither trips `set -e` nor the ERR trap again.
const END: &str = "{ __agent_end; } 2>/dev/null && [[ 1 ]]";

/// `path` as one word of the shell.
pub fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}
