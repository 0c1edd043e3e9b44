//! Destinations of the agent's metrics.

pub mod statsd;
