//! Owns the way in for people who log in to where a job runs.
//!
//! Receives [`OpenAccess`] at the job's start and [`CloseAccess`] when its teardown is over. A job
//! without a way in still runs: what goes wrong here is in the agent's own log.

use std::io;
use std::rc::Rc;

use actix::prelude::*;
use bytes::Bytes;

use crate::ports::JumpPointFiles;

/// Lets people in.
#[derive(Clone, Message)]
#[rtype(result = "io::Result<()>")]
pub struct OpenAccess {
    /// Lines of `authorized_keys`.
    pub keys: Vec<Bytes>,
}

/// Lets nobody in any more, and undoes all that was done for it.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "io::Result<()>")]
pub struct CloseAccess;

/// See the module.
pub struct JumpPoint {
    files: Rc<dyn JumpPointFiles>,
}

impl JumpPoint {
    /// A way in that is not open yet.
    pub fn new(files: Rc<dyn JumpPointFiles>) -> Self {
        Self { files }
    }
}

impl Actor for JumpPoint {
    type Context = Context<Self>;
}

impl Handler<OpenAccess> for JumpPoint {
    type Result = ResponseFuture<io::Result<()>>;

    fn handle(&mut self, message: OpenAccess, _: &mut Self::Context) -> Self::Result {
        self.files.open(message.keys)
    }
}

impl Handler<CloseAccess> for JumpPoint {
    type Result = ResponseFuture<io::Result<()>>;

    fn handle(&mut self, _: CloseAccess, _: &mut Self::Context) -> Self::Result {
        self.files.close()
    }
}

/// Makes the actor panic as a bug would.
#[cfg(feature = "testing")]
impl Handler<crate::testing::PanicNow> for JumpPoint {
    type Result = ();

    fn handle(&mut self, _: crate::testing::PanicNow, _: &mut Self::Context) {
        crate::testing::panic_as_asked();
    }
}
