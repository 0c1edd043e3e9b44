//! The agent's own log, its signals and its environment.

pub mod environment;
pub mod own_log;
pub mod signals;
