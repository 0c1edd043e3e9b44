//! Owns the way of one job's log to the platform: batch after batch, each sent again until it is
//! acknowledged.
//!
//! Receives [`AwaitShipped`], whose reply is the end of its work. Reads where new lines are from the
//! job's log and has the uplink read and send them: the job never waits for it, however slow the
//! platform is.
//!
//! A crash loses nothing: what was acknowledged is in [`Acknowledged`], and the next shipper goes on
//! from there.

use std::rc::Rc;
use std::time::Duration;

use actix::prelude::*;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::job::PushTarget;
use crate::log::writer::JobLog;
use crate::ports::{LogUplink, PushError};

/// The platform takes no more lines at once.
const MOST_LINES: u64 = 2000;

/// A body that takes longer than 5 s is refused by the platform; in bytes.
const MOST_BYTES: u64 = 1 << 20;

/// Requests that time out shrink to this and no further, in bytes.
const FEWEST_BYTES: u64 = 8 << 10;

/// After so many batches in a row, larger ones are tried: each time one is too large for a slow line, it costs 5 s.
const SEVERAL_SUCCESSES: u32 = 4;

/// After an outage that was longer, the platform may have lost what it had.
const OUTAGE: Duration = Duration::from_secs(1);

/// After so many batches in a row, more lines are tried: each time it is too many costs a request.
const MANY_SUCCESSES: u32 = 32;

/// Between two batches while the job runs, and when a full one is waiting; in milliseconds.
const USUAL_PAUSE: std::ops::Range<u64> = 1500..3000;
const SHORT_PAUSE: std::ops::Range<u64> = 250..500;

/// The pauses after failures double from the first to the second, in milliseconds.
const FIRST_BACK_OFF: u64 = 250;
const LONGEST_BACK_OFF: u64 = 8000;

/// How many lines the platform has for good.
pub(crate) type Acknowledged = Rc<watch::Sender<u64>>;

/// How the way of a log ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shipped {
    /// The platform has all of it.
    Whole,
    /// The platform has as much as it wants.
    Trimmed,
}

/// Waits until all that can be delivered is, or nobody wants it any more.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Option<Shipped>")]
pub(crate) struct AwaitShipped;

/// See the module.
#[derive(Clone)]
pub(crate) struct LogShipper {
    pub(crate) log: Rc<JobLog>,
    pub(crate) uplink: Rc<dyn LogUplink>,
    pub(crate) target: PushTarget,
    pub(crate) acknowledged: Acknowledged,
    pub(crate) unwanted: CancellationToken,
}

/// How large the next batch may be. Pure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limits {
    lines: u64,
    bytes: u64,
    /// How many batches in a row were taken.
    successes: u32,
}

impl Limits {
    const LARGEST: Self = Self { lines: MOST_LINES, bytes: MOST_BYTES, successes: 0 };

    /// Half of the lines that were too many, as long as there are two.
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
    /// The next pause is at most so long, in milliseconds; and at least half of that.
    fn longest_next(&mut self) -> u64 {
        let longest = FIRST_BACK_OFF << self.failures.min(16);
        self.failures += 1;
        longest.min(LONGEST_BACK_OFF)
    }
}

/// Since when the platform has not answered as one that is well, and whether the log begins anew because of that.
#[derive(Clone, Copy, Debug, Default)]
struct Outage {
    since: Option<Instant>,
    begun_anew: bool,
}

impl Outage {
    /// Whether it has just become a long one.
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
        let Self { log, uplink, mut target, acknowledged, .. } = self;
        let mut limits = Limits::LARGEST;
        let mut back_off = BackOff::default();
        let mut fresh_token = false;
        let mut outage = Outage::default();
        // One for all pauses: each is somebody whom the log buffer has to tell.
        let sealed = log.sealed();
        tokio::pin!(sealed);
        loop {
            // The store behind the platform may have crashed. Sending from the first line on sets the whole log anew.
            if outage.is_long_now() {
                acknowledged.send_if_modified(|line| std::mem::take(line) > 0);
            }
            let line = *acknowledged.borrow();
            let sent = match log.follow(line).await {
                Ok(range) if range.start == range.end => {
                    debug_assert!(range.sealed);
                    return Shipped::Whole;
                }
                Ok(range) => match uplink.read(&range, limits.lines, limits.bytes).await {
                    Ok(batch) => {
                        let lines = batch.lines;
                        let pushed = uplink.push(&target, line, batch).await;
                        pushed.map(|()| (range, lines)).map_err(|error| (error, lines))
                    }
                    Err(error) => Err((PushError::Failed(error.to_string()), 0)),
                },
                Err(error) => Err((PushError::Failed(error.to_string()), 0)),
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
            // Once, and not with every try.
            let level = if back_off.failures == 0 { log::Level::Warn } else { log::Level::Debug };
            log::log!(level, error:%, line; "log not taken, trying again");
            match error {
                PushError::QuotaUsedUp => return Shipped::Trimmed,
                PushError::Unauthorized if !fresh_token => match uplink.refresh_token().await {
                    Ok(token) => {
                        (target.token, fresh_token) = (token, true);
                        continue;
                    }
                    Err(error) => log::warn!(error:%; "no new token for logs"),
                },
                PushError::TooLarge if lines > 1 => {
                    limits = limits.halved(lines);
                    continue;
                }
                // The platform cuts what takes longer than it waits, which looks like any failure.
                PushError::TimedOut | PushError::Failed(_)
                    if limits.bytes > FEWEST_BYTES && lines > 1 =>
                {
                    limits = limits.after_time_out();
                }
                PushError::TimedOut | PushError::Failed(_) | PushError::Away(_) => {
                    outage.since.get_or_insert_with(Instant::now);
                }
                PushError::Unauthorized => fresh_token = false,
                PushError::TooLarge => {}
            }
            let longest = back_off.longest_next();
            sleep(random(longest / 2..longest)).await;
        }
    }
}

impl Actor for LogShipper {
    type Context = Context<Self>;
}

impl Handler<AwaitShipped> for LogShipper {
    // In this actor, so that the reply fails with it.
    type Result = ResponseActFuture<Self, Option<Shipped>>;

    fn handle(&mut self, _: AwaitShipped, _: &mut Self::Context) -> Self::Result {
        let this = self.clone();
        let unwanted = this.unwanted.clone();
        Box::pin(unwanted.run_until_cancelled_owned(this.ship()).into_actor(self))
    }
}

/// Makes the actor panic as a bug would.
#[cfg(feature = "testing")]
impl Handler<crate::testing::PanicNow> for LogShipper {
    type Result = ();

    fn handle(&mut self, _: crate::testing::PanicNow, _: &mut Self::Context) {
        crate::testing::panic_as_asked();
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
