//! The places where a job's commands can run.

pub mod docker;
pub mod shell;
