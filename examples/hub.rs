//! A control plane to try `agent start` with, on the loopback interface:
//!
//! ```sh
//! cargo run --example hub config/jobs/hello.yaml
//! agent start --endpoint 127.0.0.1:4567 --token dev --no-https
//! ```
//!
//! Hands out the jobs of its arguments, shows their logs as they come, and takes commands.

use std::io::{self, Write as _};
use std::time::Duration;

use test_support::control_plane::{ControlPlane, Fault, Settings, read_job};

const ADDRESS: &str = "127.0.0.1:4567";

const COMMANDS: &str = "\
  job FILE          hand out a job
  stop ID           stop a job
  shutdown          end the agents
  expire            make all log tokens expire
  quota BYTES       accept at most BYTES of each job's log
  lines NUMBER      accept at most NUMBER lines per batch
  gzip on|off       ask for compressed logs
  sync MILLISECONDS set the interval between reports
  status CODE [N]   refuse the next N requests (default 1) with this status
  delay SECONDS [N] delay the next N responses
  drop [N]          ignore the next N requests and close their connections
  cut [N]           send only half of the next N responses
  nonsense [N]      send malformed JSON in the next N responses
  page [N]          send an HTML page in the next N responses, like a captive portal
  lost [N]          handle the next N requests, but close the connection without a response
  once on|off       overwrite a job's secrets after the first download
  lose              forget all logs
  memory BYTES      limit each job's log to BYTES as the log store estimates them
  away SECONDS      stop listening for SECONDS
  quit";

fn main() -> io::Result<()> {
    let show = Box::new(|text: &str| {
        let mut out = io::stdout().lock();
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    });
    let mut hub = ControlPlane::start(ADDRESS, Settings::default(), show)?;
    println!("listening on {ADDRESS}; the token is `dev`. Commands:\n{COMMANDS}");
    for path in std::env::args().skip(1) {
        hand_out(&hub, &path);
    }
    for line in io::stdin().lines() {
        let line = line?;
        let words: Vec<_> = line.split_whitespace().collect();
        if words == ["quit"] {
            return Ok(());
        }
        if let Err(why) = execute(&mut hub, &words) {
            println!("{why}");
        }
    }
    // Standard input is closed, as in the background: keep serving.
    loop {
        std::thread::park();
    }
}

fn hand_out(hub: &ControlPlane, path: &str) {
    let job = std::fs::read_to_string(path).map_err(|error| error.to_string());
    match job.and_then(|text| read_job(&text)) {
        Ok(job) => println!("── job {} is queued", hub.queue(job)),
        Err(why) => println!("{path}: {why}"),
    }
}

fn execute(hub: &mut ControlPlane, words: &[&str]) -> Result<(), String> {
    let number = |index: usize| match words.get(index) {
        Some(word) => word.parse::<u64>().map_err(|_| format!("`{word}` is not a number")),
        None => Err("missing number".to_owned()),
    };
    let size = |index| number(index).map(|size| usize::try_from(size).unwrap_or(usize::MAX));
    let times = |index: usize| if words.len() > index { size(index) } else { Ok(1) };
    match words {
        [] => {}
        ["job", path] => hand_out(hub, path),
        ["stop", id] => hub.stop_job(id),
        ["shutdown"] => hub.shut_down("requested"),
        ["expire"] => hub.expire_log_tokens(),
        ["quota", _] => {
            let quota = size(1)?;
            hub.set(|settings| settings.log_quota = quota);
        }
        ["lines", _] => {
            let lines = size(1)?;
            hub.set(|settings| settings.most_lines = lines);
        }
        ["gzip", on] => hub.set(|settings| settings.compression = *on == "on"),
        ["sync", _] => {
            let pause = number(1)?;
            hub.set(|settings| settings.next_sync_after = pause);
        }
        ["status", ..] => {
            let status = u16::try_from(number(1)?).map_err(|error| error.to_string())?;
            misbehave(hub, Fault::Status(status), times(2)?);
        }
        ["delay", ..] => misbehave(hub, Fault::Delay(Duration::from_secs(number(1)?)), times(2)?),
        ["drop", ..] => misbehave(hub, Fault::Drop, times(1)?),
        ["cut", ..] => misbehave(hub, Fault::Cut, times(1)?),
        ["nonsense", ..] => misbehave(hub, Fault::Nonsense, times(1)?),
        ["page", ..] => misbehave(hub, Fault::Page, times(1)?),
        ["lost", ..] => misbehave(hub, Fault::Lost, times(1)?),
        ["once", on] => hub.set(|settings| settings.once = *on == "on"),
        ["lose"] => hub.lose_logs(),
        ["memory", _] => {
            let memory = size(1)?;
            hub.set(|settings| settings.memory = memory);
        }
        ["away", _] => {
            let away = Duration::from_secs(number(1)?);
            hub.pause();
            std::thread::park_timeout(away);
            hub.resume().map_err(|error| error.to_string())?;
        }
        _ => return Err(format!("unknown command; commands:\n{COMMANDS}")),
    }
    Ok(())
}

fn misbehave(hub: &ControlPlane, fault: Fault, mut times: usize) {
    hub.misbehave(Some(Box::new(move |_, _| {
        let is_left = times > 0;
        times = times.saturating_sub(1);
        is_left.then_some(fault)
    })));
}
