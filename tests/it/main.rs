//! The real binary against real things.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a failed test is a panic")]
#![expect(unreachable_pub, reason = "modules of a test are one program")]

mod bad_input;
mod clone_over_ssh;
mod containment;
mod example_jobs;
mod job_bytes;
mod output;
mod shell_session;
mod stopping;
mod support;
