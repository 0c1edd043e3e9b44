//! Turns the one [`JobFinished`] of a job into a value to await, for callers that are not actors.

use actix::prelude::*;
use tokio::sync::oneshot;

use crate::supervisor::JobFinished;

/// Receives one [`JobFinished`] and passes it on; any further one is dropped.
#[derive(Debug)]
pub struct FinishedOnce(Option<oneshot::Sender<JobFinished>>);

impl FinishedOnce {
    /// Starts the actor. Returns the recipient for [`StartJob`](crate::supervisor::StartJob), and
    /// the receiver of the message; it fails if the actor dies first.
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
            // The receiver may have been dropped.
            let _ = sender.send(message);
        }
    }
}
