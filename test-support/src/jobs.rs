//! Jobs for tests, as JSON, and commands that a test can wait for.

use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use crate::{World, wait_for_file};

/// A job of these commands, as JSON, so that nothing in them needs care.
pub fn job_of(commands: &[&str]) -> String {
    let commands: Vec<_> = commands.iter().map(|text| json!({ "directive": text })).collect();
    json!({ "job_id": "test", "commands": commands }).to_string()
}

/// A job of these commands and nothing else.
pub fn job(id: &str, commands: &[&str]) -> Value {
    let mut job: Value = serde_json::from_str(&job_of(commands)).unwrap();
    job["job_id"] = id.into();
    job
}

/// A command that says so when it runs, and does until its home has a file `go`.
pub const RUN_UNTIL_GO: &str = "echo running; until [[ -e ~/go ]]; do sleep 0.01; done";

/// The same without an end.
pub const RUN_FOR_EVER: &str = "echo running; sleep 1000";

/// What the log of such a command holds as soon as it runs.
pub const RUNNING: &str = r#""output":"running\n""#;

/// A name that nothing else on this machine has, and that no other such name begins with.
pub fn unique() -> String {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    format!("test-{}-{:04}", std::process::id(), COUNT.fetch_add(1, Ordering::SeqCst))
}

/// A job all of whose processes have a marker.
pub fn marked(mut job: Value) -> (Value, String) {
    let marker = unique();
    let variable = json!({ "name": "TEST_MARKER", "value": base64(marker.as_bytes()) });
    match job["env_vars"].as_array_mut() {
        Some(variables) => variables.push(variable),
        None => job["env_vars"] = Value::Array(vec![variable]),
    }
    (job, format!("TEST_MARKER={marker}"))
}

/// Encodes a value or a content as job files have it.
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

/// A command of parts, each of which prints and waits then until [`go`] lets it go on.
pub fn in_parts(parts: &[&str]) -> String {
    let part = |(number, part): (usize, &&str)| {
        format!("{part}; touch ~/did-{number}; until [[ -e ~/go-{number} ]]; do sleep 0.01; done; ")
    };
    parts.iter().enumerate().map(part).collect()
}

/// Waits until a part of such a command is done.
pub fn wait_for_part(world: &World, number: usize) {
    wait_for_file(&world.home().join(format!("did-{number}")));
}

/// Lets it go on after this part.
pub fn go(world: &World, number: usize) {
    std::fs::write(world.home().join(format!("go-{number}")), "").unwrap();
}
