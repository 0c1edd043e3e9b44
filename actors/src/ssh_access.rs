//! Owns SSH access to the place where a job runs.
//!
//! Receives [`OpenAccess`] at the job's start and [`CloseAccess`] at the end of its teardown. A job
//! runs without SSH access, too: an error here never fails it.

use std::io;
use std::rc::Rc;

use actix::prelude::*;
use bytes::Bytes;

use crate::ports::SshAccessFiles;

/// Opens SSH access for the owners of the keys.
#[derive(Clone, Message)]
#[rtype(result = "io::Result<()>")]
pub struct OpenAccess {
    /// The keys, each one line of `authorized_keys`.
    pub keys: Vec<Bytes>,
}

/// Closes SSH access, and removes everything that was added for it. Idempotent.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "io::Result<()>")]
pub struct CloseAccess;

/// Opens and closes SSH access to one job. See the [module](self).
pub struct JumpPoint {
    files: Rc<dyn SshAccessFiles>,
}

impl JumpPoint {
    /// Creates the actor; access is not open yet.
    pub fn new(files: Rc<dyn SshAccessFiles>) -> Self {
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
