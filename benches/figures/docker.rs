//! Jobs in containers, compared with the engine's own client and the same image.

use std::io::Read as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use test_support::docker::make_images;
use tokio::time::Instant;

use crate::place::Place;
use crate::serve::Platform;
use crate::table::{Figure, Target};
use crate::{LINES, OUTPUT, Result, ms};

/// A small image with bash.
const IMAGE: &str = "agent-test/bash";

const RUNS: usize = 11;

/// Number of commands in a job of many short commands.
const SHORT_COMMANDS: usize = 100;

/// Time limit for everything.
const PATIENCE: Duration = Duration::from_mins(1);

/// Returns a job with this number of containers.
fn request(containers: usize, commands: &[&str]) -> Value {
    let sleep =
        |number| json!({"name": format!("side{number}"), "image": IMAGE, "command": "sleep 1000"});
    let mut all = vec![json!({"name": "main", "image": IMAGE})];
    all.extend((1..containers).map(sleep));
    let commands: Vec<_> = commands.iter().map(|text| json!({"directive": text})).collect();
    json!({
        "job_id": "1",
        "executor": "dockercompose",
        "compose": {"containers": all},
        "commands": commands,
    })
}

/// Runs `true` in this number of containers at once, with the engine's own client.
fn bare_runs(containers: usize) -> Result<Duration> {
    let begun = Instant::now();
    let start = || Command::new("docker").args(["run", "--rm", IMAGE, "true"]).spawn();
    let running: Vec<_> = (0..containers).map(|_| start()).collect::<std::io::Result<_>>()?;
    for mut run in running {
        if !run.wait()?.success() {
            return Err("docker run failed".into());
        }
    }
    Ok(begun.elapsed())
}

/// Measures the time from the job's arrival to its first command.
pub(crate) async fn first_command(
    place: &Place,
    containers: usize,
    target: Target,
) -> Result<Figure> {
    make_images();
    let (mut floor, mut runs) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        floor.push(bare_runs(containers)?.as_secs_f64());
        let log = place.run_request(request(containers, &["true"])).await?;
        runs.push((log.start_of("true")? - log.arrived).as_secs_f64());
    }
    Ok(Figure { floor, runs, target })
}

pub(crate) async fn short_commands(place: &Place) -> Result<Figure> {
    make_images();
    let request = request(1, &vec!["true"; SHORT_COMMANDS]);
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        let log = place.run_request(request.clone()).await?;
        runs.push(log.span_of("true")?.as_secs_f64());
    }
    Ok(Figure::without_floor(runs, 0.08))
}

/// Measures the time from the log's last event until all containers of the job are removed.
pub(crate) async fn clean_up(place: &Place) -> Result<Figure> {
    make_images();
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        let log = place.run_request(request(1, &["true"])).await?;
        runs.push((log.gone - log.finish()?).as_secs_f64());
    }
    Ok(Figure::without_floor(runs, 0.5))
}

/// Measures the time from the stop request to the `finished` callback, in ms; or, with `until_gone`, until
/// the engine has no container of the job any more, in s.
pub(crate) fn stop(place: &Place, until_gone: bool) -> Result<Figure> {
    make_images();
    let mut platform = Platform::start(place)?;
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        platform.post_job(request(1, &["sleep 1000"]))?;
        platform.wait_for_log(r#""directive":"sleep 1000""#)?;
        let begun = Instant::now();
        platform.post("/stop", &json!({}))?;
        platform.wait_for_callback("/finished")?;
        let finished = begun.elapsed();
        while until_gone && containers_are_there()? {
            if begun.elapsed() > PATIENCE {
                return Err("the container stays".into());
            }
        }
        runs.push(if until_gone { begun.elapsed().as_secs_f64() } else { ms(finished) });
        platform.tear_down()?;
    }
    Ok(Figure::without_floor(runs, if until_gone { 0.5 } else { 20.0 }))
}

fn containers_are_there() -> Result<bool> {
    let ours = ["ps", "-aq", "--filter", "label=semaphore-agent.job"];
    Ok(!Command::new("docker").args(ours).output()?.stdout.is_empty())
}

/// Measures the output of a large file by `cat` in a container, in MB/s: with the engine's client from the
/// first byte on, in a job from the start of the command to its end.
pub(crate) async fn large_output(place: &Place) -> Result<Figure> {
    make_images();
    let megabytes = f64::from(OUTPUT) / 1e6;
    let (mut floor, mut runs) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        floor.push(megabytes / bare_cat(place)?.as_secs_f64());
        let log = place.run_request(request(1, &["cat /lines"])).await?;
        runs.push(megabytes / log.span_of("cat /lines")?.as_secs_f64());
    }
    Ok(Figure { floor, runs, target: Target::OfFloor(0.6) })
}

fn bare_cat(place: &Place) -> Result<Duration> {
    let mount = format!("{}:/lines", place.lines.display());
    let mut run = Command::new("docker")
        .args(["run", "--rm", "-t", "-v", &mount, IMAGE, "cat", "/lines"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut output = run.stdout.take().ok_or("no output")?;
    let mut buffer = vec![0; 64 * 1024];
    let (mut begun, mut received) = (None, 0);
    loop {
        let read = output.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        begun.get_or_insert_with(Instant::now);
        received += read;
    }
    let took = begun.ok_or("no output")?.elapsed();
    run.wait()?;
    if received != usize::try_from(OUTPUT + LINES)? {
        return Err(format!("docker run gave {received} bytes").into());
    }
    Ok(took)
}
