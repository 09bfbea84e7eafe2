//! The brake: the drain makes way for clients.
//!
//! What a node missed is applied in large batches, and a node works on one write at a time: clients' writes to other
//! collections wait for the batch under way. So while clients write, a batch is no larger than what fits into the time that
//! they may lose: with a factor of two, what the slowest hundredth of their writes took before the drain began. While that
//! percentile is above the factor all the same, the drain pauses after each of the smallest batches, for as long as that
//! took and then for twice as long. It never stops: a node that is behind is a risk of its own.
//!
//! And a client's write that another node has applied does not wait for the batch under way: for a node that is being
//! drained it waits no longer than the factor leaves it. That node is a straggler then like any other: what it misses is
//! durable before the answer, and its late answer settles it.

use std::collections::VecDeque;
use std::time::Duration;

use parking_lot::Mutex;

use crate::cluster::NodeIndex;

/// Of what a client's write may take, the share after which it waits no longer for a node that is being drained: the rest is
/// for the commit of what that node misses, and for what is slower while a drain goes on.
const PATIENCE_SHARE: f64 = 0.75;
/// It waits at least so long: what it does not wait for costs a commit.
const LEAST_PATIENCE: Duration = Duration::from_millis(10);

/// So long after a drain has begun, repairs go on beside it, and clients' writes wait for it as for any node.
const LONGEST_DEFERRAL: Duration = Duration::from_secs(30);

/// Writes that are remembered, and how many of them it takes to tell anything.
const MOST: usize = 1024;
const FEWEST: usize = 20;
/// How far back the drain looks while it runs, and before it begins.
const RECENT: Duration = Duration::from_secs(5);
const BEFORE: Duration = Duration::from_secs(60);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Records of a batch while clients write: of the first one, and the fewest. Below that, what a request costs by itself
/// outweighs its records: each write reads its collection's log again (chroma-facts.md 9). With 64 and 32 the drain came to
/// 0.45 of what batches of 64 sent straight to the node come to; clients' writes do not wait for longer ones.
const FIRST_BATCH: usize = 256;
const SMALLEST_BATCH: usize = 128;
/// A pause is no longer than so many batches: small batches and long pauses would take for ever.
const MOST_STRENGTH: u32 = 2;

/// How long clients' writes take, and which nodes are drained meanwhile.
#[derive(Debug)]
pub struct Foreground {
    /// So many times what it took before a drain may a client's write take; 0: clients are not looked at.
    factor: u32,
    inner: Mutex<Inner>,
}

/// What the next step of a drain may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowance {
    pub records: usize,
    /// Batches are small, because somebody writes.
    pub is_watched: bool,
}

#[derive(Debug, Default)]
struct Inner {
    /// When each was answered, and after how long.
    answered: VecDeque<(Duration, Duration)>,
    /// Nodes that are drained now, each once for every lane.
    drains: Vec<NodeIndex>,
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

    /// The first of the drains began less than [`LONGEST_DEFERRAL`] ago.
    fn is_new(&self, now: Duration) -> bool {
        now.saturating_sub(self.began) < LONGEST_DEFERRAL
    }

    fn is_written_to(&self, now: Duration) -> bool {
        let last = self.answered.back();
        last.is_some_and(|(last, _)| now.saturating_sub(*last) < RECENT)
    }

    /// How long a batch may take. `None`: nobody writes, or the brake is turned off.
    fn share(&self, now: Duration, factor: u32) -> Option<Duration> {
        let calm = self.calm.filter(|_| self.is_written_to(now) && factor > 0)?;
        Some(calm * (factor - 1).max(1))
    }
}

/// A lane that is being drained.
pub struct Draining<'a>(&'a Foreground, NodeIndex);

impl Drop for Draining<'_> {
    fn drop(&mut self) {
        let drains = &mut self.0.inner.lock().drains;
        if let Some(position) = drains.iter().position(|node| *node == self.1) {
            drains.swap_remove(position);
        }
    }
}

impl Foreground {
    pub fn new(factor: u32) -> Self {
        Self {
            factor,
            inner: Mutex::default(),
        }
    }

    /// A client's write was answered.
    pub fn answered(&self, now: Duration, took: Duration) {
        let mut inner = self.inner.lock();
        if inner.answered.len() == MOST {
            inner.answered.pop_front();
        }
        inner.answered.push_back((now, took));
    }

    /// A lane of this node is drained for as long as this lives.
    pub fn drain(&self, now: Duration, node: NodeIndex) -> Draining<'_> {
        let mut inner = self.inner.lock();
        if inner.drains.is_empty() {
            inner.calm = inner.percentile(now.saturating_sub(BEFORE));
            inner.began = now;
            inner.strength = 1;
            inner.batch = FIRST_BATCH;
        }
        inner.drains.push(node);
        Draining(self, node)
    }

    /// Whether clients write and are made way for.
    pub fn is_watched(&self, now: Duration) -> bool {
        self.factor > 0 && self.inner.lock().is_written_to(now)
    }

    /// What the next step may be, if `most` records are the most that it may have at all.
    pub fn allows(&self, now: Duration, most: usize) -> Allowance {
        let inner = self.inner.lock();
        let is_watched = inner.share(now, self.factor).is_some();
        Allowance {
            records: if is_watched { inner.batch.min(most) } else { most },
            is_watched,
        }
    }

    /// How long a client's write may wait in all if it waits for nothing but these nodes. `None`: the usual time; nobody
    /// has written before, or one of them is not being drained, or the drain takes long: what does not wait is drained as
    /// well, and busy lanes could keep each other behind for ever.
    pub fn patience(&self, now: Duration, mut nodes: impl Iterator<Item = NodeIndex>) -> Option<Duration> {
        let inner = self.inner.lock();
        let calm = inner.calm.filter(|_| inner.share(now, self.factor).is_some())?;
        let all_drained = inner.is_new(now) && nodes.all(|node| inner.drains.contains(&node));
        let patience = calm.mul_f64(f64::from(self.factor) * PATIENCE_SHARE);
        all_drained.then(|| patience.max(LEAST_PATIENCE))
    }

    /// Whether a lane is taken with nothing left only: other lanes of this node are drained, and a request for what is left
    /// would wait for their batches, with the lane's writers. Not for long: 30 s from when the first began.
    pub fn others_are_drained(&self, now: Duration, node: NodeIndex) -> bool {
        let inner = self.inner.lock();
        let lanes = inner.drains.iter().filter(|drained| **drained == node).count();
        lanes > 1 && inner.is_new(now)
    }

    /// Whether a repair that holds a lane waits until this node is drained: each of its requests would wait for a batch, and
    /// the lane's writers for all of them. Not for long: until then the node is missing there.
    pub fn defers_repairs(&self, now: Duration, node: NodeIndex) -> bool {
        let inner = self.inner.lock();
        inner.is_new(now) && inner.drains.contains(&node) && inner.share(now, self.factor).is_some()
    }

    /// A batch of so many records took so long: the next one is sized by it.
    pub fn applied(&self, now: Duration, records: usize, took: Duration) {
        let mut inner = self.inner.lock();
        let Some(share) = inner.share(now, self.factor) else {
            return;
        };
        // What a small one took says little of a full one, unless it took too long.
        if records * 2 < inner.batch && took <= share {
            return;
        }
        let fitting = (records as f64 * share.as_secs_f64() / took.as_secs_f64().max(1e-6)) as usize;
        inner.batch = fitting.clamp(SMALLEST_BATCH, inner.batch * 2);
    }

    /// How long the drain pauses after a batch that took so long.
    pub fn pause(&self, now: Duration, took: Duration) -> Duration {
        let mut inner = self.inner.lock();
        let since = inner.began.max(now.saturating_sub(RECENT));
        let (Some(calm), Some(p99)) = (inner.calm, inner.percentile(since)) else {
            return Duration::ZERO;
        };
        if self.factor == 0 || p99 <= calm * self.factor || inner.batch > SMALLEST_BATCH {
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
        let foreground = Foreground::new(2);
        write(&foreground, 1000, 10);
        let _draining = foreground.drain(ms(1001), 1);
        write(&foreground, 2000, 19);
        assert_eq!(foreground.pause(ms(2000), ms(50)), ms(0));
        write(&foreground, 3000, 21);
        let pauses = |now| foreground.pause(ms(now), ms(50));
        assert_eq!(pauses(3000), ms(0), "a smaller batch comes first");
        foreground.applied(ms(3000), 64, ms(50));
        assert_eq!([pauses(3000), pauses(3001), pauses(3002)], [ms(50), ms(100), ms(100)]);
        (0..9).for_each(|_| assert!(pauses(3003) <= LONGEST_PAUSE));
        write(&foreground, 9000, 12);
        assert_eq!(pauses(9000), ms(0));
        write(&foreground, 9001, 30);
        assert_eq!(pauses(9001), ms(50), "it begins gently again");
        let off = Foreground::new(0);
        write(&off, 1000, 10);
        let _draining = off.drain(ms(1001), 1);
        write(&off, 2000, 30);
        assert_eq!(off.pause(ms(2000), ms(50)), ms(0), "turned off");
        assert_eq!(off.patience(ms(2000), [1].into_iter()), None);
        let all = Allowance {
            records: 256,
            is_watched: false,
        };
        assert_eq!(off.allows(ms(2000), 256), all);
    }

    #[test]
    fn while_clients_write_a_batch_takes_no_longer_than_they_may_lose() {
        let foreground = Foreground::new(2);
        write(&foreground, 1000, 20);
        let _draining = foreground.drain(ms(1001), 1);
        let next = |at| foreground.allows(ms(at), 1024).records;
        assert_eq!(next(1001), FIRST_BATCH);
        foreground.applied(ms(1010), 256, ms(4));
        assert_eq!(next(1010), 512, "at most twice as many at a time");
        foreground.applied(ms(1050), 512, ms(40));
        assert_eq!(next(1050), 256);
        foreground.applied(ms(1060), 3, ms(10));
        assert_eq!(next(1060), 256, "a small one that was quick says nothing");
        foreground.applied(ms(1090), 3, ms(30));
        assert_eq!(next(1090), SMALLEST_BATCH);
        (0..9).for_each(|_| foreground.applied(ms(1090), 1024, ms(1)));
        assert_eq!(next(1090), 1024, "as many as configured");
        foreground.applied(ms(1090), 1024, ms(128));
        assert_eq!(next(1090), 160);
        assert_eq!(next(7000), 1024, "nobody writes any more");
    }

    #[test]
    fn a_write_waits_for_a_node_that_is_drained_as_long_as_the_factor_leaves_it() {
        let foreground = Foreground::new(2);
        let patience = |nodes: &[NodeIndex]| foreground.patience(ms(1002), nodes.iter().copied());
        write(&foreground, 1000, 20);
        assert_eq!(patience(&[1]), None, "nothing is drained");
        let first = foreground.drain(ms(1001), 1);
        let second = foreground.drain(ms(1001), 1);
        assert_eq!(patience(&[1]), Some(ms(30)));
        assert_eq!(patience(&[1, 2]), None, "node 2 is waited for as always");
        assert!(foreground.others_are_drained(ms(1002), 1) && !foreground.others_are_drained(ms(99_000), 1));
        drop(first);
        assert!(!foreground.others_are_drained(ms(1002), 1));
        assert_eq!(patience(&[1]), Some(ms(30)), "another lane of it is drained");
        assert_eq!(
            foreground.patience(ms(9000), [1].into_iter()),
            None,
            "nobody writes any more"
        );
        assert!(foreground.defers_repairs(ms(1002), 1) && !foreground.defers_repairs(ms(1002), 0));
        write(&foreground, 31_000, 20);
        assert!(!foreground.defers_repairs(ms(31_001), 1), "it takes too long");
        assert_eq!(
            foreground.patience(ms(31_001), [1].into_iter()),
            None,
            "so it is waited for again"
        );
        drop(second);
        assert_eq!(patience(&[1]), None);
    }

    #[test]
    fn what_was_before_is_before_the_first_of_several_drains() {
        let foreground = Foreground::new(2);
        write(&foreground, 1000, 10);
        let first = foreground.drain(ms(1001), 1);
        write(&foreground, 1500, 100);
        let second = foreground.drain(ms(1501), 1);
        foreground.applied(ms(1502), 32, ms(40));
        assert_eq!(foreground.pause(ms(1502), ms(5)), ms(5));
        drop((first, second));
        let _third = foreground.drain(ms(1503), 1);
        write(&foreground, 1600, 100);
        assert_eq!(foreground.pause(ms(1601), ms(5)), ms(0));
    }

    #[test]
    fn a_few_writes_tell_nothing() {
        let foreground = Foreground::new(2);
        let _draining = foreground.drain(ms(10), 1);
        write(&foreground, 20, 100);
        assert_eq!(foreground.pause(ms(21), ms(5)), ms(0), "nobody wrote before");
        let quiet = Foreground::new(2);
        write(&quiet, 1, 1);
        let _draining = quiet.drain(ms(10), 1);
        quiet.answered(ms(11), ms(1000));
        assert_eq!(quiet.pause(ms(12), ms(5)), ms(0));
    }
}
