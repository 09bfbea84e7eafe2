//! The brake: the drain makes way for clients.
//!
//! What a node missed is applied in large batches, and a node works on one write at a time: clients' writes to other
//! collections wait for the batch under way. So while clients write, a batch is no larger than what fits into the time that
//! they may lose: with a factor of two, what the slowest hundredth of their writes took before the drain began. While that
//! percentile is above the factor all the same, the drain pauses after each of the smallest batches, for as long as that
//! took and then for twice as long. It never stops: a node that is behind is a risk of its own.

use std::collections::VecDeque;
use std::time::Duration;

use parking_lot::Mutex;

/// Writes that are remembered, and how many of them it takes to tell anything.
const MOST: usize = 1024;
const FEWEST: usize = 20;
/// How far back the drain looks while it runs, and before it begins.
const RECENT: Duration = Duration::from_secs(5);
const BEFORE: Duration = Duration::from_secs(60);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Records of a batch while clients write: of the first one, and the fewest. Below that, what a request costs by itself
/// outweighs its records: each write reads its collection's log again (chroma-facts.md 9). How much was not measured.
const FIRST_BATCH: usize = 64;
const SMALLEST_BATCH: usize = 32;
/// A pause is no longer than so many batches: small batches and long pauses would take for ever.
const MOST_STRENGTH: u32 = 2;

/// How long clients' writes take.
#[derive(Debug, Default)]
pub struct Foreground(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// When each was answered, and after how long.
    answered: VecDeque<(Duration, Duration)>,
    /// Lanes that are drained now.
    drains: usize,
    /// When the first of them began, and the percentile before it.
    began: Duration,
    calm: Option<Duration>,
    /// By how much more than the last batch took the next pause is longer.
    strength: u32,
    /// Records of the next batch, while clients write.
    batch: usize,
}

impl Inner {
    fn percentile(&self, since: Duration) -> Option<Duration> {
        let recent = self.answered.iter().rev().take_while(|(at, _)| *at >= since);
        let mut latencies: Vec<Duration> = recent.map(|(_, took)| *took).collect();
        if latencies.len() < FEWEST {
            return None;
        }
        let position = latencies.len() * 99 / 100;
        Some(*latencies.select_nth_unstable(position).1)
    }

    /// How long a batch may take. `None`: nobody writes, or the brake is turned off.
    fn share(&self, now: Duration, factor: u32) -> Option<Duration> {
        let (last, _) = self.answered.back()?;
        let writes = now.saturating_sub(*last) < RECENT;
        let calm = self.calm.filter(|_| writes && factor > 0)?;
        Some(calm * (factor - 1).max(1))
    }
}

/// A lane that is being drained.
pub struct Draining<'a>(&'a Foreground);

impl Drop for Draining<'_> {
    fn drop(&mut self) {
        self.0.0.lock().drains -= 1;
    }
}

impl Foreground {
    /// A client's write was answered.
    pub fn answered(&self, now: Duration, took: Duration) {
        let mut inner = self.0.lock();
        if inner.answered.len() == MOST {
            inner.answered.pop_front();
        }
        inner.answered.push_back((now, took));
    }

    /// A lane is drained for as long as this lives.
    pub fn drain(&self, now: Duration) -> Draining<'_> {
        let mut inner = self.0.lock();
        if inner.drains == 0 {
            inner.calm = inner.percentile(now.saturating_sub(BEFORE));
            inner.began = now;
            inner.strength = 1;
            inner.batch = FIRST_BATCH;
        }
        inner.drains += 1;
        Draining(self)
    }

    /// How many records the next batch may have, of `most`; `factor` 0: all of them.
    pub fn batch(&self, now: Duration, factor: u32, most: usize) -> usize {
        let inner = self.0.lock();
        match inner.share(now, factor) {
            Some(_) => inner.batch.min(most),
            None => most,
        }
    }

    /// Whether batches are small, because somebody writes.
    pub fn is_watched(&self, now: Duration, factor: u32) -> bool {
        self.0.lock().share(now, factor).is_some()
    }

    /// A batch of so many records took so long: the next one is sized by it.
    pub fn applied(&self, now: Duration, records: usize, took: Duration, factor: u32) {
        let mut inner = self.0.lock();
        let Some(share) = inner.share(now, factor) else { return };
        // What a small one took says little of a full one, unless it took too long.
        if records * 2 < inner.batch && took <= share {
            return;
        }
        let fitting = (records as f64 * share.as_secs_f64() / took.as_secs_f64().max(1e-6)) as usize;
        inner.batch = fitting.clamp(SMALLEST_BATCH, inner.batch * 2);
    }

    /// How long the drain pauses after a batch that took so long; `factor` 0: not at all.
    pub fn pause(&self, now: Duration, took: Duration, factor: u32) -> Duration {
        let mut inner = self.0.lock();
        let since = inner.began.max(now.saturating_sub(RECENT));
        let (Some(calm), Some(p99)) = (inner.calm, inner.percentile(since)) else {
            return Duration::ZERO;
        };
        if factor == 0 || p99 <= calm * factor || inner.batch > SMALLEST_BATCH {
            inner.strength = 1;
            return Duration::ZERO;
        }
        let pause = (took * inner.strength).min(LONGEST_PAUSE);
        inner.strength = (inner.strength * 2).min(MOST_STRENGTH);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    fn write(foreground: &Foreground, at: u64, took: u64) {
        (0..30).for_each(|_| foreground.answered(ms(at), ms(took)));
    }

    #[test]
    fn the_drain_pauses_longer_while_clients_are_slowed_down_and_then_goes_on() {
        let foreground = Foreground::default();
        write(&foreground, 1000, 10);
        let _draining = foreground.drain(ms(1001));
        write(&foreground, 2000, 19);
        assert_eq!(foreground.pause(ms(2000), ms(50), 2), ms(0));
        write(&foreground, 3000, 21);
        let pauses = |now| foreground.pause(ms(now), ms(50), 2);
        assert_eq!(pauses(3000), ms(0), "a smaller batch comes first");
        foreground.applied(ms(3000), 64, ms(50), 2);
        assert_eq!([pauses(3000), pauses(3001), pauses(3002)], [ms(50), ms(100), ms(100)]);
        (0..9).for_each(|_| assert!(pauses(3003) <= LONGEST_PAUSE));
        write(&foreground, 9000, 12);
        assert_eq!(pauses(9000), ms(0));
        write(&foreground, 9001, 30);
        assert_eq!(pauses(9001), ms(50), "it begins gently again");
        assert_eq!(foreground.pause(ms(9001), ms(50), 0), ms(0), "turned off");
    }

    #[test]
    fn while_clients_write_a_batch_takes_no_longer_than_they_may_lose() {
        let foreground = Foreground::default();
        write(&foreground, 1000, 20);
        let _draining = foreground.drain(ms(1001));
        let next = |at, factor| foreground.batch(ms(at), factor, 256);
        assert_eq!((next(1001, 2), next(1001, 0)), (64, 256));
        foreground.applied(ms(1010), 64, ms(4), 2);
        assert_eq!(next(1010, 2), 128, "at most twice as many at a time");
        foreground.applied(ms(1050), 128, ms(40), 2);
        assert_eq!(next(1050, 2), 64);
        foreground.applied(ms(1060), 3, ms(10), 2);
        assert_eq!(next(1060, 2), 64, "a small one that was quick says nothing");
        foreground.applied(ms(1090), 3, ms(30), 2);
        assert_eq!(next(1090, 2), SMALLEST_BATCH);
        (0..9).for_each(|_| foreground.applied(ms(1090), 256, ms(1), 2));
        assert_eq!(next(1090, 2), 256, "as many as configured");
        foreground.applied(ms(1090), 256, ms(128), 2);
        assert_eq!(next(1090, 2), 40);
        assert_eq!(next(7000, 2), 256, "nobody writes any more");
    }

    #[test]
    fn what_was_before_is_before_the_first_of_several_drains() {
        let foreground = Foreground::default();
        write(&foreground, 1000, 10);
        let first = foreground.drain(ms(1001));
        write(&foreground, 1500, 100);
        let second = foreground.drain(ms(1501));
        foreground.applied(ms(1502), 32, ms(40), 2);
        assert_eq!(foreground.pause(ms(1502), ms(5), 2), ms(5));
        drop((first, second));
        let _third = foreground.drain(ms(1503));
        write(&foreground, 1600, 100);
        assert_eq!(foreground.pause(ms(1601), ms(5), 2), ms(0));
    }

    #[test]
    fn a_few_writes_tell_nothing() {
        let foreground = Foreground::default();
        let _draining = foreground.drain(ms(10));
        write(&foreground, 20, 100);
        assert_eq!(foreground.pause(ms(21), ms(5), 2), ms(0), "nobody wrote before");
        let quiet = Foreground::default();
        write(&quiet, 1, 1);
        let _draining = quiet.drain(ms(10));
        quiet.answered(ms(11), ms(1000));
        assert_eq!(quiet.pause(ms(12), ms(5), 2), ms(0));
    }
}
