//! A CI job agent: connects the actors of the `actors` crate to this machine.

pub mod api;
pub mod commands;
pub mod config;
mod decode;
pub mod executors;
pub mod job_file;
pub mod metrics;
pub mod os;
pub mod remote;
pub mod service;
pub mod ssh_access;
pub mod state;
