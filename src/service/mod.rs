//! The agent itself as a service: its own log, and the signals that it gets.

pub mod environment;
pub mod own_log;
pub mod signals;
