//! The log of a finished job.

use std::process::Output;

use actors::log::event::LogEvent;

/// The outcome of a job, or of the agent that ran it.
#[derive(Debug)]
pub struct Finished {
    pub exit_code: Option<i32>,
    pub events: Vec<LogEvent>,
    pub stderr: String,
}

/// One step of a log: title, output, exit code.
pub type Step = (String, String, i32);

impl Finished {
    pub fn of(output: &Output) -> Self {
        Self {
            exit_code: output.status.code(),
            events: events(&output.stdout),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    pub fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut printed = String::new();
        for event in &self.events {
            match event {
                LogEvent::CmdOutput { output, .. } => printed.push_str(output),
                LogEvent::CmdFinished { directive, exit_code, .. } => {
                    steps.push((directive.clone(), std::mem::take(&mut printed), *exit_code));
                }
                _ => {}
            }
        }
        steps
    }

    /// Returns output and exit code of each step that is not the agent's own.
    pub fn commands(&self) -> Vec<(String, i32)> {
        let own = [
            "Setting up image pull credentials",
            "Pulling docker images...",
            "Starting the docker image...",
            "Exporting environment variables",
            "Injecting Files",
        ];
        let steps = self.steps().into_iter().filter(|(title, ..)| !own.contains(&title.as_str()));
        steps.map(|(_, output, exit_code)| (output, exit_code)).collect()
    }

    /// Returns the output of all commands.
    pub fn output(&self) -> String {
        self.commands().into_iter().map(|(output, _)| output).collect()
    }

    pub fn result(&self) -> &str {
        match self.events.last() {
            Some(LogEvent::JobFinished { result, .. }) => result,
            other => panic!("the log ends with {other:?}; {}", self.stderr),
        }
    }
}

/// Decodes the events of a log.
pub fn events(log: &[u8]) -> Vec<LogEvent> {
    let lines = log.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| LogEvent::decode(line).unwrap()).collect()
}
