//! Where the agent's metrics go.

pub mod statsd;
