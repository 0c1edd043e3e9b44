//! One line of a job's log: an event and its JSON.
//!
//! The keys and their order are the protocol's (docs/protocol.md: "Log events"); clients compare key sets.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::job::Outcome;

/// The longest encoded output line of a pulled log, in bytes: readers commonly give up on lines of
/// 64 KiB.
pub const MAX_OUTPUT_LINE: usize = 60 * 1024;

/// The longest encoded output line of a pushed log, in bytes: larger events at a log's beginning
/// use up the log server's budget early (docs/protocol.md: "Log events").
pub const MAX_PUSHED_OUTPUT_LINE: usize = 8000;

/// Returns the current time, in seconds since the epoch.
pub fn unix_time() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |age| age.as_secs())
}

/// One event of a job's log. All times are whole seconds since the epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum LogEvent {
    /// The job began: the first line of a log.
    JobStarted {
        /// The time when the event was logged.
        timestamp: u64,
    },
    /// A step began.
    CmdStarted {
        /// The time when the event was logged.
        timestamp: u64,
        /// The step's title: a command's alias or its whole text.
        directive: String,
    },
    /// A step printed something.
    CmdOutput {
        /// The time when the event was logged.
        timestamp: u64,
        /// A part of the step's output; readers join the parts.
        output: String,
    },
    /// A step ended.
    CmdFinished {
        /// The time when the event was logged.
        timestamp: u64,
        /// The same title as in `cmd_started`.
        directive: String,
        /// The step's exit code; 0 for success.
        exit_code: i32,
        /// The time when the step began.
        started_at: u64,
        /// The time when the step ended.
        finished_at: u64,
    },
    /// The job ended: the last line of a log.
    JobFinished {
        /// The time when the event was logged.
        timestamp: u64,
        /// The job's outcome: `passed`, `failed` or `stopped`.
        result: String,
    },
}

impl LogEvent {
    /// Creates a `job_started` event of now.
    pub fn job_started() -> Self {
        Self::JobStarted { timestamp: unix_time() }
    }

    /// Creates a `cmd_started` event of now.
    pub fn cmd_started(directive: impl Into<String>) -> Self {
        Self::CmdStarted { timestamp: unix_time(), directive: directive.into() }
    }

    /// Creates a `cmd_output` event of now.
    pub fn cmd_output(output: impl Into<String>) -> Self {
        Self::CmdOutput { timestamp: unix_time(), output: output.into() }
    }

    /// Creates a `cmd_finished` event of now, for a step that began at `started_at` (seconds since
    /// the epoch) and took `took`. If the clock was set meanwhile, `finished_at` follows `took`.
    pub fn cmd_finished(
        directive: impl Into<String>,
        exit_code: i32,
        started_at: u64,
        took: Duration,
    ) -> Self {
        let timestamp = unix_time();
        let expected = started_at + took.as_secs();
        let finished_at = if timestamp.abs_diff(expected) <= 1 { timestamp } else { expected };
        Self::CmdFinished {
            timestamp,
            directive: directive.into(),
            exit_code,
            started_at,
            finished_at,
        }
    }

    /// Creates a `job_finished` event of now.
    pub fn job_finished(outcome: Outcome) -> Self {
        Self::JobFinished { timestamp: unix_time(), result: outcome.as_str().into() }
    }

    /// Appends the event's JSON and a newline to `line`.
    pub fn encode(&self, line: &mut Vec<u8>) -> Result<(), serde_json::Error> {
        serde_json::to_writer(&mut *line, self)?;
        line.push(b'\n');
        Ok(())
    }

    /// Decodes one line of a log, with or without its newline.
    pub fn decode(line: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(line)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn line(event: &LogEvent) -> String {
        let mut line = Vec::new();
        event.encode(&mut line).unwrap();
        String::from_utf8(line).unwrap()
    }

    #[test]
    fn events_are_encoded_as_in_the_protocol() {
        let timestamp = 1_700_000_000;
        let cases = [
            (
                LogEvent::JobStarted { timestamp },
                r#"{"event":"job_started","timestamp":1700000000}"#,
            ),
            (
                LogEvent::CmdStarted { timestamp, directive: "echo hi".into() },
                r#"{"event":"cmd_started","timestamp":1700000000,"directive":"echo hi"}"#,
            ),
            (
                LogEvent::CmdOutput { timestamp, output: "hi\n".into() },
                r#"{"event":"cmd_output","timestamp":1700000000,"output":"hi\n"}"#,
            ),
            (
                LogEvent::CmdFinished {
                    timestamp,
                    directive: "echo hi".into(),
                    exit_code: 0,
                    started_at: timestamp,
                    finished_at: timestamp,
                },
                r#"{"event":"cmd_finished","timestamp":1700000000,"directive":"echo hi","exit_code":0,"started_at":1700000000,"finished_at":1700000000}"#,
            ),
            (
                LogEvent::JobFinished { timestamp, result: "passed".into() },
                r#"{"event":"job_finished","timestamp":1700000000,"result":"passed"}"#,
            ),
        ];
        for (event, expected) in cases {
            assert_eq!(line(&event), format!("{expected}\n"));
        }
    }

    proptest! {
        #[test]
        fn any_output_is_one_line_and_decodes_to_itself(output in any::<String>()) {
            let event = LogEvent::cmd_output(output);
            let line = line(&event);
            prop_assert_eq!(line.matches('\n').count(), 1);
            prop_assert_eq!(LogEvent::decode(line.as_bytes()).unwrap(), event);
        }
    }
}
