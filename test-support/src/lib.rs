//! Fixtures shared by tests, benches and the example control plane: agents with private directories, and the
//! real or scripted services around them.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "a failed test is a panic"
)]
#![expect(
    missing_docs,
    reason = "only used in this repository, and many names need no explanation"
)]

pub mod callbacks;
pub mod changed_shell;
pub mod control_plane;
pub mod daemon;
pub mod docker;
pub mod finished;
pub mod http;
pub mod jobs;
pub mod registry;
pub mod serve;
pub mod ssh;
pub mod start;
pub mod surroundings;

mod ports;
mod processes;
mod waiting;
mod world;

use std::collections::BTreeSet;

pub use finished::{Finished, Step};
pub use jobs::{RUN_FOR_EVER, RUN_UNTIL_GO, RUNNING, base64, job, job_of, marked, unique};
pub use ports::free_port;
pub use processes::{KilledOnFailure, feed, processes_with};
pub use waiting::{pause, wait_for_end, wait_for_file, wait_until};
pub use world::{Running, World, agent_program};

/// Returns the keys of a configuration file, including those that are commented out.
pub fn config_keys(text: &str) -> BTreeSet<String> {
    let lines = text.lines().map(|line| line.strip_prefix("# ").unwrap_or(line));
    let keys = lines.filter_map(|line| line.split_once(": ").map(|(key, _)| key));
    let is_key = |key: &&str| key.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
    keys.filter(is_key).map(str::to_owned).collect()
}
