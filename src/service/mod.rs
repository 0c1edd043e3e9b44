//! The agent itself as a service: its own log, and the signals that it gets.

pub mod own_log;
pub mod signals;
