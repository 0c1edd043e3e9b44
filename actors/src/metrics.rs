//! Owns the destination of metrics.
//!
//! Receives [`Count`] and [`Time`], sent without waiting for a reply: metrics are lossy, and
//! neither a slow sink nor a crash of this actor may slow or fail a job.

use std::time::Duration;

use actix::prelude::*;

use crate::ports::MetricsSink;

/// Adds one to a counter.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct Count {
    /// The counter's name, without the namespace.
    pub name: &'static str,
    /// The measurement's one tag, `key:value`.
    pub tag: String,
}

/// Records a duration.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct Time {
    /// The timing's name, without the namespace.
    pub name: &'static str,
    /// The duration to record.
    pub duration: Duration,
    /// The measurement's one tag, `key:value`.
    pub tag: String,
}

/// Passes measurements to a sink.
pub struct Metrics {
    sink: Box<dyn MetricsSink>,
}

impl Metrics {
    /// Creates the actor, which sends to `sink`.
    pub fn new(sink: Box<dyn MetricsSink>) -> Self {
        Self { sink }
    }
}

impl Actor for Metrics {
    type Context = Context<Self>;
}

impl Handler<Count> for Metrics {
    type Result = ();

    fn handle(&mut self, message: Count, _: &mut Self::Context) {
        self.sink.count(message.name, &message.tag);
    }
}

impl Handler<Time> for Metrics {
    type Result = ();

    fn handle(&mut self, message: Time, _: &mut Self::Context) {
        self.sink.time(message.name, message.duration, &message.tag);
    }
}
