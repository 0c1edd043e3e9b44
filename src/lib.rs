//! A CI job agent: wires the actors of the `actors` crate to this machine.

pub mod api;
pub mod commands;
pub mod config;
pub mod executors;
pub mod job_file;
pub mod metrics;
pub mod os;
pub mod remote;
mod serde_words;
pub mod service;
pub mod ssh_access;
pub mod state;
