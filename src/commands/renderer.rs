//! Renders a job's log for a person, or prints its event lines unchanged.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write};
use std::time::Duration;

use actors::log::event::LogEvent;
use actors::ports::LogRange;
use anstream::adapter::StripBytes;
use tokio::time::Instant;

/// Size of one read from the log, in bytes.
const READ: u64 = 256 * 1024;

/// How many of the slowest steps the summary names.
const SLOWEST: usize = 3;

/// Titles of the agent's own steps.
const OWN_STEPS: [&str; 2] = ["Exporting environment variables", "Injecting Files"];

/// Outputs of the agent's own steps that say nothing about the job; a successful step with such an output is
/// not shown.
const IDLE_OUTPUTS: [&str; 2] = ["", "Exporting SEMAPHORE_JOB_RESULT\n"];

/// How a log is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Headings, durations and a summary; the job's own control sequences are kept.
    Pretty {
        /// Whether the lines that the agent adds are coloured.
        colour: bool,
    },
    /// Like `Pretty`, but without control sequences, including those of the job.
    Plain,
    /// The event lines, unchanged.
    Json,
}

/// Writes a log to `output` as it grows.
pub struct Renderer<W> {
    output: W,
    style: Style,
    strip: StripBytes,
    step: Option<Step>,
    started: Option<Instant>,
    at_line_start: bool,
    timings: BTreeMap<Duration, String>,
    commands: usize,
}

/// The running step.
struct Step {
    title: String,
    since: Instant,
    /// Output of one of the agent's own steps, held back until the step's end shows whether the step is worth
    /// showing.
    held_back: Option<String>,
}

impl<W: Write> Renderer<W> {
    /// Creates a renderer at the beginning of a log.
    pub fn new(output: W, style: Style) -> Self {
        Self {
            output,
            style,
            strip: StripBytes::new(),
            step: None,
            started: None,
            at_line_start: true,
            timings: BTreeMap::new(),
            commands: 0,
        }
    }

    /// Shows the lines of `range`, which became readable at the time `at`.
    pub fn show(&mut self, range: &LogRange, at: Instant) -> io::Result<()> {
        let mut reader = range.reader();
        let mut buffer = Vec::new();
        while reader.by_ref().take(READ).read_to_end(&mut buffer)? > 0 {
            let whole = memchr::memrchr(b'\n', &buffer).map_or(0, |newline| newline + 1);
            self.show_lines(&buffer[..whole], at)?;
            buffer.drain(..whole);
        }
        self.output.flush()
    }

    fn show_lines(&mut self, lines: &[u8], at: Instant) -> io::Result<()> {
        if self.style == Style::Json {
            return self.output.write_all(lines);
        }
        for line in lines.split_inclusive(|byte| *byte == b'\n') {
            // A job can write to its own log; lines that are not events are not from the agent.
            if let Ok(event) = LogEvent::decode(line) {
                self.show_event(event, at)?;
            }
        }
        Ok(())
    }

    fn show_event(&mut self, event: LogEvent, at: Instant) -> io::Result<()> {
        match event {
            LogEvent::JobStarted { .. } => self.started = Some(at),
            LogEvent::CmdStarted { directive, .. } => {
                let own = OWN_STEPS.contains(&directive.as_str());
                let held_back = own.then(String::new);
                if !own {
                    self.commands += 1;
                    self.heading(&directive)?;
                }
                self.step = Some(Step { title: directive, since: at, held_back });
            }
            LogEvent::CmdOutput { output, .. } => match &mut self.step {
                Some(Step { held_back: Some(held_back), .. }) => held_back.push_str(&output),
                _ => self.text(output.as_bytes())?,
            },
            LogEvent::CmdFinished { exit_code, .. } => {
                let Some(step) = self.step.take() else { return Ok(()) };
                if let Some(output) = step.held_back {
                    if exit_code == 0 && IDLE_OUTPUTS.contains(&output.as_str()) {
                        return Ok(());
                    }
                    self.heading(&step.title)?;
                    self.text(output.as_bytes())?;
                }
                let took = at.saturating_duration_since(step.since);
                self.footer(exit_code, took)?;
                self.timings.insert(took, first_line(&step.title));
                if self.timings.len() > SLOWEST {
                    self.timings.pop_first();
                }
            }
            LogEvent::JobFinished { result, .. } => self.summary(&result, at)?,
        }
        Ok(())
    }

    fn heading(&mut self, title: &str) -> io::Result<()> {
        let arrow = self.painted("\x1b[1;36m", "▶");
        let title = self.painted("\x1b[1m", &first_line(title));
        writeln!(self.output, "{arrow} {title}")
    }

    fn text(&mut self, text: &[u8]) -> io::Result<()> {
        if self.style == Style::Plain {
            for part in self.strip.strip_next(text) {
                self.output.write_all(part)?;
            }
        } else {
            self.output.write_all(text)?;
        }
        self.at_line_start = text.ends_with(b"\n");
        Ok(())
    }

    fn footer(&mut self, exit_code: i32, took: Duration) -> io::Result<()> {
        self.line_start()?;
        let took = duration(took);
        let line = match exit_code {
            0 => self.painted("\x1b[32m", &format!("✓ exit code 0, {took}")),
            code => self.painted("\x1b[31m", &format!("✗ exit code {code}, {took}")),
        };
        writeln!(self.output, "{line}\n")
    }

    fn summary(&mut self, result: &str, at: Instant) -> io::Result<()> {
        self.line_start()?;
        let took =
            self.started.map_or(Duration::ZERO, |started| at.saturating_duration_since(started));
        let colour = match result {
            "passed" => "\x1b[1;32m",
            "failed" => "\x1b[1;31m",
            _ => "\x1b[1;33m",
        };
        let steps = if self.commands == 1 { "step" } else { "steps" };
        let result = self.painted(colour, &format!("Job {result}"));
        writeln!(self.output, "{result} in {}, {} {steps}", duration(took), self.commands)?;
        let timings = std::mem::take(&mut self.timings);
        for (took, title) in timings.iter().rev().filter(|(took, _)| took.as_millis() > 0) {
            let took = self.painted("\x1b[2m", &format!("{:>10}", duration(*took)));
            writeln!(self.output, "{took}  {title}")?;
        }
        Ok(())
    }

    /// Ends an unfinished line, and resets a colour that the job left on.
    fn line_start(&mut self) -> io::Result<()> {
        if matches!(self.style, Style::Pretty { colour: true }) {
            self.output.write_all(b"\x1b[0m")?;
        }
        if !self.at_line_start {
            self.at_line_start = true;
            self.output.write_all(b"\n")?;
        }
        Ok(())
    }

    fn painted(&self, colour: &str, text: &str) -> String {
        match self.style {
            Style::Pretty { colour: true } => format!("{colour}{text}\x1b[0m"),
            _ => text.to_owned(),
        }
    }
}

/// Returns a step's title as one line, without control characters.
fn first_line(title: &str) -> String {
    let mut lines = title.trim_end().lines();
    let first: String =
        lines.next().unwrap_or_default().chars().filter(|c| !c.is_control()).collect();
    match lines.count() {
        0 => first,
        1 => format!("{first} … (1 more line)"),
        more => format!("{first} … ({more} more lines)"),
    }
}

/// Formats a duration for people: `1 min 01 s`.
fn duration(took: Duration) -> String {
    let seconds = took.as_secs();
    match seconds {
        0 => format!("{} ms", took.as_millis()),
        1..60 => format!("{:.1} s", took.as_secs_f64()),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use actors::ports::LogSpool as _;

    use super::*;
    use crate::state::log_file::FileSpool;

    fn rendered(style: Style, events: &[LogEvent]) -> String {
        let directory = tempfile::tempdir().unwrap();
        let mut spool = FileSpool::create(directory.path().join("log")).unwrap();
        let mut lines = Vec::new();
        for event in events {
            event.encode(&mut lines).unwrap();
        }
        spool.append(&lines).unwrap();
        let mut output = Vec::new();
        let range = LogRange {
            source: spool.source(),
            start: 0,
            end: lines.len() as u64,
            next_line: events.len() as u64,
            sealed: true,
        };
        Renderer::new(&mut output, style).show(&range, Instant::now()).unwrap();
        String::from_utf8(output).unwrap()
    }

    fn events() -> Vec<LogEvent> {
        vec![
            LogEvent::job_started(),
            LogEvent::cmd_started(OWN_STEPS[0]),
            LogEvent::cmd_finished(OWN_STEPS[0], 0, 0, Duration::ZERO),
            LogEvent::cmd_started("make\nmake test"),
            LogEvent::cmd_output("\x1b[31mred\x1b[0m\nno newline"),
            LogEvent::cmd_finished("make\nmake test", 2, 0, Duration::ZERO),
            LogEvent::job_finished(actors::job::Outcome::Failed),
        ]
    }

    #[test]
    fn plain_has_no_control_sequences_and_ends_lines() {
        assert_eq!(
            rendered(Style::Plain, &events()),
            "▶ make … (1 more line)\nred\nno newline\n✗ exit code 2, 0 ms\n\nJob failed in 0 ms, 1 step\n"
        );
    }

    #[test]
    fn pretty_keeps_the_jobs_colours_and_adds_its_own_only_if_asked() {
        let bare = rendered(Style::Pretty { colour: false }, &events());
        assert!(bare.contains("\x1b[31mred\x1b[0m\n") && bare.contains("▶ make …"), "{bare:?}");
        let coloured = rendered(Style::Pretty { colour: true }, &events());
        assert!(coloured.contains("\x1b[1;36m▶\x1b[0m"), "{coloured:?}");
    }

    #[test]
    fn json_is_the_log_itself() {
        let lines = rendered(Style::Json, &events());
        let decoded: Vec<_> =
            lines.lines().map(|l| LogEvent::decode(l.as_bytes()).unwrap()).collect();
        assert_eq!(decoded, events());
    }

    #[test]
    fn durations_are_readable() {
        let shown = [999, 1_500, 61_000, 3_723_000].map(Duration::from_millis).map(duration);
        assert_eq!(shown, ["999 ms", "1.5 s", "1 min 01 s", "1 h 02 min"]);
    }
}
