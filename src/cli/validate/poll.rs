//! Waiting for the very thing that is asserted: until it holds, or with its last complaint when time is up.
#![allow(
    clippy::disallowed_methods,
    reason = "this waits for a real system and measures it; there is nothing to steer"
)]

use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_millis(50);

/// Polls `check` until it says `Ok`. It is asked once at least, and a check that hangs ends with the time too.
///
/// # Errors
/// The last complaint.
pub async fn until<T>(patience: Duration, what: &str, check: impl AsyncFn() -> Result<T, String>) -> Result<T, String> {
    let end = Instant::now() + patience;
    let mut complaint = "no answer".to_owned();
    loop {
        let left = end.saturating_duration_since(Instant::now()).max(PAUSE);
        match tokio::time::timeout(left, check()).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(found)) => complaint = found,
            Err(_) => {}
        }
        if Instant::now() >= end {
            return Err(format!("not within {} s: {what}: {complaint}", patience.as_secs_f64()));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Runs something and says how long it took.
pub async fn timed<T>(work: impl Future<Output = T>) -> (T, Duration) {
    let begun = Instant::now();
    let done = work.await;
    (done, begun.elapsed())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_waits_for_what_comes_true() {
        let asked = Cell::new(0);
        let found = until(Duration::from_secs(60), "three", async || {
            asked.set(asked.get() + 1);
            if asked.get() == 3 {
                Ok(7)
            } else {
                Err("not yet".to_owned())
            }
        });
        assert_eq!((found.await, asked.get()), (Ok(7), 3));
    }

    #[tokio::test]
    async fn it_ends_with_the_last_complaint() {
        let found: Result<(), _> = until(Duration::ZERO, "peace", async || Err("war".to_owned())).await;
        assert_eq!(found, Err("not within 0 s: peace: war".to_owned()));
    }

    #[tokio::test(start_paused = true)]
    async fn what_hangs_ends_too() {
        let found: Result<(), _> = until(Duration::ZERO, "an answer", async || std::future::pending().await).await;
        assert_eq!(found, Err("not within 0 s: an answer: no answer".to_owned()));
    }
}
