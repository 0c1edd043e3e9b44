//! A CI job agent: wires the actors of the `actors` crate to this machine.

pub mod cgroup;
pub mod cli;
pub mod commands;
pub mod containment;
pub mod executors;
pub mod exit_code;
pub mod job_file;
pub mod job_init;
pub mod process_tree;
pub mod pty;
pub mod render;
pub mod session;
pub mod shell_jobs;
pub mod spool;
pub mod state_dir;
mod sys;
