//! Crashes on request, of the actors whose address a test can have. For the others the scripted ports panic.

use actix::prelude::*;

use crate::intake::http::HttpIntake;
use crate::intake::poller::SyncPoller;
use crate::log::buffer::LogBuffer;
use crate::metrics::Metrics;
use crate::supervisor::JobSupervisor;

/// Makes the actor that receives it panic, as a bug would.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct PanicNow;

/// Panics as a bug would.
///
/// # Panics
///
/// Always.
#[expect(clippy::panic, reason = "a crash is what it is for")]
pub fn panic_as_asked() {
    panic!("a test asked for this panic");
}

macro_rules! crashable {
    ($($actor:ty),*) => {$(
        impl Handler<PanicNow> for $actor {
            type Result = ();

            fn handle(&mut self, _: PanicNow, _: &mut Self::Context) {
                panic_as_asked();
            }
        }
    )*};
}

crashable!(HttpIntake, JobSupervisor, LogBuffer, Metrics, SyncPoller);
