//! The real binary against real things.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a failed test is a panic")]
#![expect(unreachable_pub, reason = "modules of a test are one program")]

mod docker;
mod run;
mod serve;
mod start;
