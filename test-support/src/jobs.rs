//! Jobs for tests, as JSON, and commands that a test can wait for.

use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use crate::{World, wait_for_file};

/// Returns a job of these commands as JSON text, which takes care of all quoting.
pub fn job_of(commands: &[&str]) -> String {
    let commands: Vec<_> = commands.iter().map(|text| json!({ "directive": text })).collect();
    json!({ "job_id": "test", "commands": commands }).to_string()
}

/// Returns a job of these commands and nothing else.
pub fn job(id: &str, commands: &[&str]) -> Value {
    let mut job: Value = serde_json::from_str(&job_of(commands)).unwrap();
    job["job_id"] = id.into();
    job
}

/// A command that prints `running`, and ends as soon as its home has a file `go`.
pub const RUN_UNTIL_GO: &str = "echo running; until [[ -e ~/go ]]; do sleep 0.01; done";

/// A command that prints `running` and does not end during a test.
pub const RUN_FOR_EVER: &str = "echo running; sleep 1000";

/// The text in the log that shows that such a command runs.
pub const RUNNING: &str = r#""output":"running\n""#;

/// Returns a name that is unique on this machine, and not a prefix of another such name.
pub fn unique() -> String {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    format!("test-{}-{:04}", std::process::id(), COUNT.fetch_add(1, Ordering::SeqCst))
}

/// Puts a marker into the environment of all processes of a job. Returns the job and the marker.
pub fn marked(mut job: Value) -> (Value, String) {
    let marker = unique();
    let variable = json!({ "name": "TEST_MARKER", "value": base64(marker.as_bytes()) });
    match job["env_vars"].as_array_mut() {
        Some(variables) => variables.push(variable),
        None => job["env_vars"] = Value::Array(vec![variable]),
    }
    (job, format!("TEST_MARKER={marker}"))
}

/// Encodes the value of a variable or the content of a file for a job.
pub fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut encoded = String::new();
    for group in bytes.chunks(3) {
        let bits = [0, 1, 2].map(|i| u32::from(group.get(i).copied().unwrap_or(0)));
        let bits = bits[0] << 16 | bits[1] << 8 | bits[2];
        for i in 0..=group.len() {
            encoded.push(char::from(DIGITS[(bits >> (18 - 6 * i) & 63) as usize]));
        }
    }
    encoded
}

/// Returns a command of parts; after each part, the command waits for [`go`].
pub fn in_parts(parts: &[&str]) -> String {
    let part = |(number, part): (usize, &&str)| {
        format!("{part}; touch ~/did-{number}; until [[ -e ~/go-{number} ]]; do sleep 0.01; done; ")
    };
    parts.iter().enumerate().map(part).collect()
}

/// Waits until a part of a command from [`in_parts`] is done.
pub fn wait_for_part(world: &World, number: usize) {
    wait_for_file(&world.home().join(format!("did-{number}")));
}

/// Lets a command from [`in_parts`] continue after this part.
pub fn go(world: &World, number: usize) {
    std::fs::write(world.home().join(format!("go-{number}")), "").unwrap();
}
