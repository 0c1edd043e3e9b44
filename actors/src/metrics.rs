//! Owns the sink that measurements go to.
//!
//! Receives [`Count`] and [`Time`], sent without waiting: metrics are lossy, and neither a slow
//! sink nor the death of this actor may cost a job anything.

use std::time::Duration;

use actix::prelude::*;

use crate::ports::MetricsSink;

/// Adds one to a counter.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct Count {
    /// The counter, without the namespace.
    pub name: &'static str,
    /// One tag, `key:value`.
    pub tag: String,
}

/// Records a duration.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct Time {
    /// The timing, without the namespace.
    pub name: &'static str,
    /// How long it took.
    pub duration: Duration,
    /// One tag, `key:value`.
    pub tag: String,
}

/// See the module.
pub struct Metrics {
    sink: Box<dyn MetricsSink>,
}

impl Metrics {
    /// Metrics that go to `sink`.
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

/// Makes the actor panic as a bug would.
#[cfg(feature = "testing")]
impl Handler<crate::testing::PanicNow> for Metrics {
    type Result = ();

    fn handle(&mut self, _: crate::testing::PanicNow, _: &mut Self::Context) {
        crate::testing::panic_as_asked();
    }
}
