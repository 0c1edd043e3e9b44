//! Owns the delivery of one job's log to the platform: batch after batch, each sent until it is
//! acknowledged.
//!
//! Receives [`AwaitShipped`], whose reply is the end of its work. Follows the job's log for ranges
//! of new lines, and has them read and sent: the job never waits for the platform.
//!
//! A crash loses nothing: [`Acknowledged`] survives it, and the next shipper goes on from there.

use std::rc::Rc;
use std::time::Duration;

use actix::prelude::*;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::errors::WithCauses;
use crate::job::PushTarget;
use crate::log::job_log::JobLog;
use crate::ports::{HubApi, LogFiles, LogServer, PushError};

/// The most lines of one batch (docs/protocol.md: "Pushing logs").
const MOST_LINES: u64 = 2000;

/// The most bytes of one batch: the log server cuts off a request that takes longer than 5 s.
const MOST_BYTES: u64 = 1 << 20;

/// The fewest bytes that batches are halved to after timeouts; a single longer line is sent whole.
const FEWEST_BYTES: u64 = 8 << 10;

/// How many successes in a row double the bytes of a batch: because a batch that is too large costs 5 s.
const SEVERAL_SUCCESSES: u32 = 4;

/// The outage after which the log server may have lost lines that it had acknowledged.
const OUTAGE: Duration = Duration::from_secs(1);

/// How many successes in a row double the lines of a batch: because a batch with too many lines costs a request.
const MANY_SUCCESSES: u32 = 32;

/// The pause between two batches while the job runs, in milliseconds.
const USUAL_PAUSE: std::ops::Range<u64> = 1500..3000;
/// The pause between two batches while lines are waiting, in milliseconds.
const SHORT_PAUSE: std::ops::Range<u64> = 250..500;

/// The longest pause after the first failure, in milliseconds. It doubles with each further one.
const FIRST_BACK_OFF: u64 = 250;
/// The longest pause after any failure, in milliseconds.
const LONGEST_BACK_OFF: u64 = 8000;

/// Everything that log shippers need of the outside world.
#[derive(Clone)]
pub struct PushPlatform {
    /// Reads the lines.
    pub files: Rc<dyn LogFiles>,
    /// Stores the lines.
    pub server: Rc<dyn LogServer>,
    /// Gives out tokens for the server.
    pub hub: Rc<dyn HubApi>,
}

/// How many lines the platform has acknowledged; back to 0 after an outage.
pub(crate) type Acknowledged = Rc<watch::Sender<u64>>;

/// How the shipping of a log ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shipped {
    /// The platform has the whole log.
    Whole,
    /// The log server's space for this job is used up.
    Trimmed,
}

/// Ships the log. Returns how that ended; `None` if the shipping was called off.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Option<Shipped>")]
pub(crate) struct AwaitShipped;

/// Ships one job's log. See the [module](self).
#[derive(Clone)]
pub(crate) struct LogShipper {
    pub(crate) log: Rc<JobLog>,
    pub(crate) platform: PushPlatform,
    pub(crate) target: PushTarget,
    pub(crate) acknowledged: Acknowledged,
    pub(crate) unwanted: CancellationToken,
}

/// The limits of the next batch. Pure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limits {
    lines: u64,
    bytes: u64,
    /// How many batches in a row were acknowledged.
    successes: u32,
}

impl Limits {
    const LARGEST: Self = Self { lines: MOST_LINES, bytes: MOST_BYTES, successes: 0 };

    /// Returns the limits after a batch of `lines` lines was refused as too large.
    fn halved(self, lines: u64) -> Self {
        Self { lines: (lines / 2).max(1), successes: 0, ..self }
    }

    fn after_time_out(self) -> Self {
        Self { bytes: (self.bytes / 2).max(FEWEST_BYTES), successes: 0, ..self }
    }

    fn after_success(self) -> Self {
        let successes = self.successes + 1;
        let is_proven = successes.is_multiple_of(MANY_SUCCESSES);
        let lines = if is_proven { (self.lines * 2).min(MOST_LINES) } else { self.lines };
        let is_steady = successes.is_multiple_of(SEVERAL_SUCCESSES);
        let bytes = if is_steady { (self.bytes * 2).min(MOST_BYTES) } else { self.bytes };
        Self { lines, bytes, successes }
    }
}

/// Pauses that grow while nothing succeeds. Pure.
#[derive(Clone, Copy, Debug, Default)]
struct BackOff {
    failures: u32,
}

impl BackOff {
    /// Returns the longest next pause, in milliseconds. The pause is a random one, at least half as
    /// long.
    fn longest_next(&mut self) -> u64 {
        let longest = FIRST_BACK_OFF << self.failures.min(16);
        self.failures += 1;
        longest.min(LONGEST_BACK_OFF)
    }
}

/// An outage of the log server, over with the next acknowledged batch. Pure, but for the clock.
#[derive(Clone, Copy, Debug, Default)]
struct Outage {
    since: Option<Instant>,
    /// The log is already sent again from line 0 because of this outage.
    begun_anew: bool,
}

impl Outage {
    /// Returns `true` once for an outage, when it has become a long one.
    fn is_long_now(&mut self) -> bool {
        let is_long = self.since.is_some_and(|since| since.elapsed() >= OUTAGE);
        is_long && !std::mem::replace(&mut self.begun_anew, true)
    }
}

fn random(milliseconds: std::ops::Range<u64>) -> Duration {
    Duration::from_millis(fastrand::u64(milliseconds))
}

impl LogShipper {
    async fn ship(self) -> Shipped {
        let Self { log, platform, mut target, acknowledged, .. } = self;
        let PushPlatform { files, server, hub } = platform;
        let mut limits = Limits::LARGEST;
        let mut back_off = BackOff::default();
        let mut fresh_token = false;
        let mut outage = Outage::default();
        // Created once and reused in every pause, because each call registers a new follower with the log buffer.
        let sealed = log.sealed();
        tokio::pin!(sealed);
        loop {
            // The log server may have lost its store. Sending from line 0 replaces the whole log.
            if outage.is_long_now() {
                acknowledged.send_if_modified(|line| std::mem::take(line) > 0);
            }
            let line = *acknowledged.borrow();
            let sent = match log.follow(line).await {
                Ok(range) if range.start == range.end => {
                    debug_assert!(range.sealed);
                    return Shipped::Whole;
                }
                Ok(range) => match files.read(&range, limits.lines, limits.bytes).await {
                    Ok(batch) => {
                        let lines = batch.lines;
                        let pushed = server.push(&target, line, batch).await;
                        pushed.map(|()| (range, lines)).map_err(|error| (error, lines))
                    }
                    Err(error) => Err((PushError::Failed(error.into()), 0)),
                },
                Err(error) => Err((PushError::Failed(error.into()), 0)),
            };
            let (error, lines) = match sent {
                Ok((range, lines)) => {
                    let line = line + lines;
                    acknowledged.send_replace(line);
                    limits = limits.after_success();
                    (back_off, fresh_token, outage) =
                        (BackOff::default(), false, Outage::default());
                    let more = line < range.next_line;
                    if !range.sealed {
                        let pause = if more { SHORT_PAUSE } else { USUAL_PAUSE };
                        tokio::select! {
                            () = sleep(random(pause)) => {}
                            () = &mut sealed => {}
                        }
                    }
                    continue;
                }
                Err(failed) => failed,
            };
            if matches!(error, PushError::QuotaUsedUp) {
                return Shipped::Trimmed;
            }
            // Warn on the first failure only.
            let level = if back_off.failures == 0 { log::Level::Warn } else { log::Level::Debug };
            log::log!(level, error:% = WithCauses(&error), line; "the log server did not accept a batch; retrying");
            match error {
                PushError::Unauthorized if !fresh_token => {
                    fresh_token = refresh_token(&*hub, &mut target).await;
                    if fresh_token {
                        continue;
                    }
                }
                PushError::TooLarge if lines > 1 => {
                    limits = limits.halved(lines);
                    continue;
                }
                // The log server cuts off a request that takes longer than it waits, which looks
                // like any failure.
                PushError::TimedOut | PushError::Failed(_)
                    if limits.bytes > FEWEST_BYTES && lines > 1 =>
                {
                    limits = limits.after_time_out();
                }
                PushError::TimedOut | PushError::Failed(_) | PushError::Unavailable(_) => {
                    outage.since.get_or_insert_with(Instant::now);
                }
                PushError::Unauthorized => fresh_token = false,
                PushError::TooLarge | PushError::QuotaUsedUp => {}
            }
            let longest = back_off.longest_next();
            sleep(random(longest / 2..longest)).await;
        }
    }
}

/// Gets a new token for the log server. Returns whether that succeeded.
async fn refresh_token(hub: &dyn HubApi, target: &mut PushTarget) -> bool {
    match hub.refresh_log_token().await {
        Ok(token) => {
            target.token = token;
            true
        }
        Err(error) => {
            log::warn!(error:% = WithCauses(&error); "can't refresh the log token");
            false
        }
    }
}

impl Actor for LogShipper {
    type Context = Context<Self>;
}

impl Handler<AwaitShipped> for LogShipper {
    // As a future of this actor, so that the reply fails when the actor crashes.
    type Result = ResponseActFuture<Self, Option<Shipped>>;

    fn handle(&mut self, _: AwaitShipped, _: &mut Self::Context) -> Self::Result {
        let this = self.clone();
        let unwanted = this.unwanted.clone();
        Box::pin(unwanted.run_until_cancelled_owned(this.ship()).into_actor(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_shrink_and_grow_within_bounds() {
        let mut limits = Limits::LARGEST;
        for _ in 0..20 {
            limits = limits.after_time_out();
        }
        assert_eq!(limits, Limits { bytes: FEWEST_BYTES, ..Limits::LARGEST });
        for _ in 0..40 {
            limits = limits.after_success();
        }
        assert_eq!((limits.lines, limits.bytes), (MOST_LINES, MOST_BYTES));
        assert_eq!(limits.halved(2000).lines, 1000);
        assert_eq!(limits.halved(1).lines, 1);
        let mut limits = limits.halved(2000);
        for lines in [1000, 2000, 2000] {
            assert_eq!(limits.lines, lines);
            for _ in 0..MANY_SUCCESSES {
                limits = limits.after_success();
            }
        }
    }

    #[test]
    fn pauses_after_failures_double_up_to_a_bound() {
        let mut back_off = BackOff::default();
        let pauses: Vec<_> = (0..8).map(|_| back_off.longest_next()).collect();
        assert_eq!(pauses, [250, 500, 1000, 2000, 4000, 8000, 8000, 8000]);
        assert!((0..100).all(|_| back_off.longest_next() == LONGEST_BACK_OFF));
    }
}
