//! The places where a job's commands can run.

pub mod docker;
mod injection;
pub mod shell;
