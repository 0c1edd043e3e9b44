//! The places where a job's commands can run.

pub mod docker;
pub mod job_mark;
pub mod registries;
pub mod session;
pub mod shell;
