//! `agent start`, with the control plane of the example.

use std::fs;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use test_support::control_plane::Known;
use test_support::job;
use test_support::start::{Hub, StartAgent};

use crate::place::Place;
use crate::table::Figure;
use crate::{OUTPUT, Result, memory_in_mb, ms};

/// Report intervals, in milliseconds: one for measurements that do not depend on it, and a long one that
/// would be visible in the result.
const SHORT_INTERVAL: u64 = 200;
const LONG_INTERVAL: u64 = 5000;

/// Time limit for everything.
const PATIENCE: Duration = Duration::from_mins(2);

/// Number of runs of each short job.
const RUNS: usize = 15;
const SLOW_RUNS: usize = 7;

/// Prints the time, in seconds.
const TELL_TIME: &str = "echo $EPOCHREALTIME";

/// Measures the time from the response that hands out a job to the job's first command.
pub(crate) fn first_command(place: &Place) -> Result<Figure> {
    let setup = Setup::start(place, SHORT_INTERVAL);
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        let job = setup.run_job(&[TELL_TIME])?;
        runs.push(ms(job.first_command.duration_since(job.handed_out)?));
    }
    Ok(Figure::without_floor(runs, 10.0))
}

/// Measures the time from the end of the last command to the report of the result, after the delivery of the
/// log.
pub(crate) fn result_known(place: &Place) -> Result<Figure> {
    let setup = Setup::start(place, SHORT_INTERVAL);
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        let job = setup.run_job(&["seq 1000", TELL_TIME])?;
        runs.push(ms(job.result_known.duration_since(job.last_command)?));
    }
    Ok(Figure::without_floor(runs, 30.0))
}

/// Measures the time from the end of a job's last command to the first command of the next queued job.
pub(crate) fn next_job(place: &Place) -> Result<Figure> {
    let setup = Setup::start(place, LONG_INTERVAL);
    let mut runs = Vec::new();
    for _ in 0..SLOW_RUNS {
        let jobs = [setup.queue(&[TELL_TIME]), setup.queue(&[TELL_TIME])];
        let [first, second] = [setup.times_of(&jobs[0])?, setup.times_of(&jobs[1])?];
        runs.push(ms(second.first_command.duration_since(first.last_command)?));
    }
    Ok(Figure::without_floor(runs, 50.0))
}

/// Measures the time from the start of a command that prints 50 MB until the control plane has the whole log,
/// in seconds.
pub(crate) fn large_log(place: &Place) -> Result<Figure> {
    let setup = Setup::start(place, SHORT_INTERVAL);
    let mut runs = Vec::new();
    for _ in 0..3 {
        runs.push(setup.run_large_job(place)?.as_secs_f64());
    }
    Ok(Figure::without_floor(runs, 40.0))
}

/// Measures the resident memory of the agent in MB, idle or after a large job.
pub(crate) fn memory(place: &Place, after_large_job: bool, target: f64) -> Result<Figure> {
    let mut runs = Vec::new();
    for _ in 0..3 {
        let setup = Setup::start(place, SHORT_INTERVAL);
        if after_large_job {
            setup.run_large_job(place)?;
        } else {
            // The agent has registered and sent its first report.
            setup.wait_for("a report", |known| (!known.reports.is_empty()).then_some(()))?;
        }
        runs.push(memory_in_mb(setup.agent.pid(), "VmRSS:")?.ok_or("the agent has ended")?);
    }
    Ok(Figure::without_floor(runs, target))
}

/// The times in a job whose commands print the time.
struct Times {
    handed_out: SystemTime,
    first_command: SystemTime,
    last_command: SystemTime,
    result_known: SystemTime,
}

/// An agent and its control plane. On drop, both are ended, the agent first.
struct Setup {
    agent: StartAgent,
    hub: Hub,
}

impl Setup {
    fn start(place: &Place, interval: u64) -> Self {
        let hub = Hub::start(interval);
        let agent = StartAgent::start(&place.world, &hub);
        Self { agent, hub }
    }

    fn wait_for<T>(&self, what: &str, look: impl FnMut(&Known) -> Option<T>) -> Result<T> {
        let found = self.hub.wait_for(PATIENCE, look);
        found.ok_or_else(|| format!("{what} did not come").into())
    }

    fn queue(&self, commands: &[&str]) -> String {
        self.hub.queue(job("job", commands))
    }

    /// Runs a job that is handed out in response to the agent's next report.
    fn run_job(&self, commands: &[&str]) -> Result<Times> {
        let id = self.queue(commands);
        self.times_of(&id)
    }

    fn times_of(&self, id: &str) -> Result<Times> {
        let of_job = |report: &Value| report["job_id"] == id;
        let result_known = self.wait_for("a result", |known| {
            let finished = |report: &Value| of_job(report) && report["state"] == "finished-job";
            let index = known.reports.iter().position(finished)?;
            Some(known.answered[index])
        })?;
        self.hub.look(|known| {
            let job = &known.jobs[id];
            if job.result.as_deref() != Some("passed") {
                return Err(format!("a job ended as {:?}", job.result).into());
            }
            // The response to the report before the job's first report handed out the job.
            let first = known.reports.iter().position(of_job).ok_or("no report")?;
            let output = job.output();
            let times: Vec<f64> = output.lines().filter_map(|line| line.parse().ok()).collect();
            let time = |seconds: f64| SystemTime::UNIX_EPOCH + Duration::from_secs_f64(seconds);
            Ok(Times {
                handed_out: known.answered[first - 1],
                first_command: time(*times.first().ok_or("the job output no time")?),
                last_command: time(*times.last().ok_or("the job output no time")?),
                result_known,
            })
        })
    }

    fn run_large_job(&self, place: &Place) -> Result<Duration> {
        let id = self.queue(&[TELL_TIME, &place.cat()]);
        let Times { first_command, result_known, .. } = self.times_of(&id)?;
        let printed = self.hub.look(|known| known.jobs[&id].output());
        if !printed.contains(&fs::read_to_string(&place.lines)?) {
            return Err(format!("{} of {OUTPUT} bytes came", printed.len()).into());
        }
        Ok(result_known.duration_since(first_command)?)
    }
}
