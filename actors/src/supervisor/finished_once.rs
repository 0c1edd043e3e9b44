//! Owns one question: how did the job end? Passes on the one answer to whoever waits for it.

use actix::prelude::*;
use tokio::sync::oneshot;

use crate::supervisor::JobFinished;

/// See the module.
#[derive(Debug)]
pub struct FinishedOnce(Option<oneshot::Sender<JobFinished>>);

impl FinishedOnce {
    /// A recipient to start a job with, and what it will receive.
    pub fn ask() -> (Recipient<JobFinished>, oneshot::Receiver<JobFinished>) {
        let (sender, receiver) = oneshot::channel();
        (Self(Some(sender)).start().recipient(), receiver)
    }
}

impl Actor for FinishedOnce {
    type Context = Context<Self>;
}

impl Handler<JobFinished> for FinishedOnce {
    type Result = ();

    fn handle(&mut self, message: JobFinished, _: &mut Self::Context) {
        if let Some(sender) = self.0.take() {
            // Who no longer waits needs no answer.
            let _ = sender.send(message);
        }
    }
}
