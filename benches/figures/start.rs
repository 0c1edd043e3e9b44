//! `agent start`, and the control plane that the example has, too.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::place::Place;
use crate::table::Figure;
use crate::{OUTPUT, Result, memory_in_mb, ms};
use test_support::agent_program;
use test_support::control_plane::{ControlPlane, Known, Settings};

/// How often agents are to report, in milliseconds: where it is of no importance, and where a wait for it
/// would show.
const SHORT_INTERVAL: u64 = 200;
const LONG_INTERVAL: u64 = 5000;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_mins(2);

/// How often each short job runs.
const RUNS: usize = 15;
const SLOW_RUNS: usize = 7;

/// Prints the time, in seconds.
const TELL_TIME: &str = "echo $EPOCHREALTIME";

/// From the answer that hands out a job to its first command.
pub(crate) fn first_command(place: &Place) -> Result<Figure> {
    let hub = Hub::start(place, SHORT_INTERVAL)?;
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        let job = hub.run_job(&[TELL_TIME])?;
        runs.push(ms(job.first_command.duration_since(job.handed_out)?));
    }
    Ok(Figure::without_floor(runs, 10.0))
}

/// From the end of the last command to the report of the result, the whole log being delivered.
pub(crate) fn result_known(place: &Place) -> Result<Figure> {
    let hub = Hub::start(place, SHORT_INTERVAL)?;
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        let job = hub.run_job(&["seq 1000", TELL_TIME])?;
        runs.push(ms(job.result_known.duration_since(job.last_command)?));
    }
    Ok(Figure::without_floor(runs, 30.0))
}

/// From the end of a job's last command to the first command of the job that waits.
pub(crate) fn next_job(place: &Place) -> Result<Figure> {
    let hub = Hub::start(place, LONG_INTERVAL)?;
    let mut runs = Vec::new();
    for _ in 0..SLOW_RUNS {
        let jobs = [hub.queue(&[TELL_TIME]), hub.queue(&[TELL_TIME])];
        let [first, second] = [hub.times_of(&jobs[0])?, hub.times_of(&jobs[1])?];
        runs.push(ms(second.first_command.duration_since(first.last_command)?));
    }
    Ok(Figure::without_floor(runs, 50.0))
}

/// From the start of the command that prints 50 MB to the moment when the control plane has all of them,
/// in seconds.
pub(crate) fn large_log(place: &Place) -> Result<Figure> {
    let hub = Hub::start(place, SHORT_INTERVAL)?;
    let mut runs = Vec::new();
    for _ in 0..3 {
        runs.push(hub.run_large_job(place)?.as_secs_f64());
    }
    Ok(Figure::without_floor(runs, 40.0))
}

/// Resident memory of the agent in MB, idle or after a large job.
pub(crate) fn memory(place: &Place, after_large_job: bool, target: f64) -> Result<Figure> {
    let mut runs = Vec::new();
    for _ in 0..3 {
        let hub = Hub::start(place, SHORT_INTERVAL)?;
        if after_large_job {
            hub.run_large_job(place)?;
        } else {
            // Registered, and has reported once.
            hub.wait_for("a report", |known| (!known.reports.is_empty()).then_some(()))?;
        }
        runs.push(memory_in_mb(hub.agent.id(), "VmRSS:")?.ok_or("the agent has ended")?);
    }
    Ok(Figure::without_floor(runs, target))
}

/// When things happened in a job that told the time.
struct Times {
    handed_out: SystemTime,
    first_command: SystemTime,
    last_command: SystemTime,
    result_known: SystemTime,
}

/// A control plane and its agent. End with this value.
struct Hub {
    control_plane: ControlPlane,
    agent: Child,
}

impl Hub {
    fn start(place: &Place, interval: u64) -> Result<Self> {
        let settings = Settings { next_sync_after: interval, ..Settings::default() };
        let control_plane = ControlPlane::start("127.0.0.1:0", settings, Box::new(|_| {}))?;
        let directory = place.directory.path();
        let agent = Command::new(agent_program())
            .args(["start", "--no-https", "--endpoint", &control_plane.endpoint()])
            .env_clear()
            .envs(place.shell.environment.clone())
            .env("SEMAPHORE_AGENT_TOKEN", "dev")
            .env("SEMAPHORE_AGENT_STATE_DIR", place.state())
            .env("SEMAPHORE_AGENT_LOG_FILE_PATH", directory.join("agent_log"))
            .env("SEMAPHORE_AGENT_SSH_JUMP_POINT_PATH", directory.join("ssh_jump_point"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Self { control_plane, agent })
    }

    fn wait_for<T>(&self, what: &str, look: impl FnMut(&Known) -> Option<T>) -> Result<T> {
        let found = self.control_plane.wait_for(PATIENCE, look);
        found.ok_or_else(|| format!("{what} did not come").into())
    }

    fn queue(&self, commands: &[&str]) -> String {
        let commands: Vec<_> =
            commands.iter().map(|directive| json!({ "directive": directive })).collect();
        self.control_plane.queue(json!({ "job_id": "job", "commands": commands }))
    }

    /// A job that is handed out as the answer to the agent's very next report.
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
        self.control_plane.look(|known| {
            let job = &known.jobs[id];
            if job.result.as_deref() != Some("passed") {
                return Err(format!("a job ended as {:?}", job.result).into());
            }
            // The report before the first of the job is the one whose answer handed it out.
            let first = known.reports.iter().position(of_job).ok_or("no report")?;
            let told = job.output();
            let times: Vec<f64> = told.lines().filter_map(|line| line.parse().ok()).collect();
            let time = |seconds: f64| SystemTime::UNIX_EPOCH + Duration::from_secs_f64(seconds);
            Ok(Times {
                handed_out: known.answered[first - 1],
                first_command: time(*times.first().ok_or("the job told no time")?),
                last_command: time(*times.last().ok_or("the job told no time")?),
                result_known,
            })
        })
    }

    fn run_large_job(&self, place: &Place) -> Result<Duration> {
        let id = self.queue(&[TELL_TIME, &place.cat()]);
        let Times { first_command, result_known, .. } = self.times_of(&id)?;
        let printed = self.control_plane.look(|known| known.jobs[&id].output());
        if !printed.contains(&fs::read_to_string(&place.lines)?) {
            return Err(format!("{} of {OUTPUT} bytes came", printed.len()).into());
        }
        Ok(result_known.duration_since(first_command)?)
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}
