//! A lane: the queue that puts the writes of one collection in one order.
//!
//! One upstream write is in flight per lane; what arrives meanwhile waits here, in order of arrival. Each collection
//! has a lane, and so has the namespace. Beside writes a lane takes *exclusive* entries: whoever holds one is alone
//! between two writes. Namespace operations use them as barriers on the collections they touch, the drain for its
//! handover to live (design.md R1, R4, 6).
//!
//! The worker takes entries one at a time. [`Lane::next`] sees the whole queue: it is where adjacent compatible writes
//! become one upstream batch.

mod pair;

use std::collections::VecDeque;

use parking_lot::Mutex;
use tokio::sync::oneshot;

pub use pair::{Pair, Touched};

/// The lane has as many entries waiting as it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the queue is full")]
pub struct Full;

/// Holding it means: no write of this lane is under way, and none starts.
#[derive(Debug)]
pub struct Exclusive {
    _released: oneshot::Sender<()>,
}

/// What waits in a lane.
#[derive(Debug)]
pub enum Entry<W> {
    Write(W),
    Exclusive(oneshot::Sender<Exclusive>),
}

#[derive(Debug)]
struct Queue<W> {
    entries: VecDeque<Entry<W>>,
    working: bool,
}

/// The queue of one collection, or of the namespace.
#[derive(Debug)]
pub struct Lane<W> {
    queue: Mutex<Queue<W>>,
    limit: usize,
}

impl<W> Lane<W> {
    /// At most `limit` writes wait; exclusive entries are bounded by those who make them.
    pub fn new(limit: usize) -> Self {
        Self {
            queue: Mutex::new(Queue {
                entries: VecDeque::new(),
                working: false,
            }),
            limit,
        }
    }

    /// Queues a write. Returns true when the caller has to start a worker.
    ///
    /// # Errors
    /// [`Full`], with nothing queued.
    pub fn push(&self, write: W) -> Result<bool, Full> {
        let mut queue = self.queue.lock();
        if queue.entries.len() >= self.limit {
            return Err(Full);
        }
        queue.entries.push_back(Entry::Write(write));
        Ok(!std::mem::replace(&mut queue.working, true))
    }

    /// Queues an exclusive entry. The receiver gets the lane when its turn comes; the flag says that the caller has to
    /// start a worker.
    pub fn push_exclusive(&self) -> (oneshot::Receiver<Exclusive>, bool) {
        let (turn, acquired) = oneshot::channel();
        let mut queue = self.queue.lock();
        queue.entries.push_back(Entry::Exclusive(turn));
        (acquired, !std::mem::replace(&mut queue.working, true))
    }

    /// The next entry for the worker; `None` ends the worker.
    pub fn next(&self) -> Option<Entry<W>> {
        let mut queue = self.queue.lock();
        let entry = queue.entries.pop_front();
        queue.working = entry.is_some();
        entry
    }

    /// The first exclusive entry, ahead of the writes before it: for a worker whose write waits for what the holder of
    /// the lane is about to do.
    pub fn next_exclusive(&self) -> Option<oneshot::Sender<Exclusive>> {
        let mut queue = self.queue.lock();
        let position = queue
            .entries
            .iter()
            .position(|entry| matches!(entry, Entry::Exclusive(_)))?;
        match queue.entries.remove(position) {
            Some(Entry::Exclusive(turn)) => Some(turn),
            _ => None,
        }
    }

    /// Puts an exclusive entry back to the front.
    pub fn put_back(&self, turn: oneshot::Sender<Exclusive>) {
        self.queue.lock().entries.push_front(Entry::Exclusive(turn));
    }

    /// Entries that wait.
    pub fn waiting(&self) -> usize {
        self.queue.lock().entries.len()
    }

    /// Gives the lane to whoever asked for it and waits until it is given back.
    pub async fn hand_over(turn: oneshot::Sender<Exclusive>) {
        let (released, given_back) = oneshot::channel();
        if turn.send(Exclusive { _released: released }).is_ok() {
            let _ = given_back.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_keep_their_order_and_only_the_first_starts_a_worker() {
        let lane = Lane::new(8);
        assert_eq!(lane.push(1), Ok(true));
        assert_eq!(lane.push(2), Ok(false));
        let (_turn, start) = lane.push_exclusive();
        assert!(!start);
        assert_eq!(lane.push(3), Ok(false));
        assert!(matches!(lane.next(), Some(Entry::Write(1))));
        assert!(matches!(lane.next(), Some(Entry::Write(2))));
        assert!(matches!(lane.next(), Some(Entry::Exclusive(_))));
        assert!(matches!(lane.next(), Some(Entry::Write(3))));
        assert!(lane.next().is_none());
        assert_eq!(lane.push(4), Ok(true), "the worker ended: a new one is needed");
    }

    #[test]
    fn a_full_lane_refuses_writes() {
        let lane = Lane::new(2);
        assert!(lane.push(1).is_ok());
        assert!(lane.push(2).is_ok());
        assert_eq!(lane.push(3), Err(Full));
        lane.next();
        assert!(lane.push(4).is_ok());
    }

    #[tokio::test]
    async fn whoever_holds_the_lane_holds_the_worker() {
        let lane = Lane::<u8>::new(2);
        let (turn, _) = lane.push_exclusive();
        let Some(Entry::Exclusive(sender)) = lane.next() else {
            panic!("an exclusive entry")
        };
        let worker = tokio::spawn(Lane::<u8>::hand_over(sender));
        let held = turn.await.expect("the lane");
        tokio::task::yield_now().await;
        assert!(!worker.is_finished());
        drop(held);
        worker.await.expect("the worker goes on");
    }

    #[tokio::test]
    async fn a_lane_nobody_waits_for_any_more_is_not_held() {
        let lane = Lane::<u8>::new(2);
        let (turn, _) = lane.push_exclusive();
        drop(turn);
        let Some(Entry::Exclusive(sender)) = lane.next() else {
            panic!("an exclusive entry")
        };
        Lane::<u8>::hand_over(sender).await;
    }
}
