//! Repeats what failed for a reason that may pass.

use std::time::Duration;

use tokio::time::sleep;

/// How often something is attempted, and the pauses between attempts.
#[derive(Clone, Copy, Debug)]
pub struct Retry {
    /// The most attempts; at least one is made.
    pub most: u32,
    /// The first pause.
    pub pause: Duration,
    /// Pauses double up to this one; equal to `pause` for pauses of one length.
    pub longest_pause: Duration,
}

impl Retry {
    /// Attempts a fixed time apart.
    pub const fn every(pause: Duration, most: u32) -> Self {
        Self { most, pause, longest_pause: pause }
    }

    /// Attempts with pauses that double.
    pub const fn doubling(first: Duration, longest: Duration, most: u32) -> Self {
        Self { most, pause: first, longest_pause: longest }
    }

    /// Attempts until success, an error that is not transient, or the last attempt, and returns the last result.
    /// Calls `failed` with the error and the number of attempts so far before each further attempt.
    ///
    /// Dropping the future drops the attempt that is under way.
    pub async fn run<T, E>(
        self,
        is_transient: impl Fn(&E) -> bool,
        mut attempt: impl AsyncFnMut() -> Result<T, E>,
        mut failed: impl FnMut(&E, u32),
    ) -> Result<T, E> {
        let (mut attempts, mut pause) = (0, self.pause);
        loop {
            attempts += 1;
            match attempt().await {
                Err(error) if is_transient(&error) && attempts < self.most => {
                    failed(&error, attempts);
                }
                last => return last,
            }
            sleep(pause).await;
            pause = (pause * 2).min(self.longest_pause);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    async fn attempts(retry: Retry, succeeds_at: u32, fatal_at: u32) -> (Result<(), u32>, u64) {
        let (begun, mut count) = (Instant::now(), 0);
        let attempt = async || {
            count += 1;
            if count == succeeds_at { Ok(()) } else { Err(count) }
        };
        let result = retry.run(|error| *error != fatal_at, attempt, |_, _| {}).await;
        (result, begun.elapsed().as_secs())
    }

    #[actix::test]
    async fn attempts_and_pauses_are_as_asked() {
        tokio::time::pause();
        let second = Duration::from_secs(1);
        let every = Retry::every(second, 4);
        assert_eq!(attempts(every, 3, 0).await, (Ok(()), 2));
        assert_eq!(attempts(every, 9, 0).await, (Err(4), 3));
        assert_eq!(attempts(every, 9, 2).await, (Err(2), 1));
        assert_eq!(attempts(Retry::every(second, 0), 9, 0).await, (Err(1), 0));
        let doubling = Retry::doubling(second, 4 * second, 6);
        assert_eq!(attempts(doubling, 9, 0).await, (Err(6), 1 + 2 + 4 + 4 + 4));
    }
}
