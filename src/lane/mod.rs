//! A lane: the queue that puts the writes of one collection in one order.
//!
//! One upstream write is in flight per lane; what arrives meanwhile waits here. Each collection has a lane, and so has the
//! namespace. Beside writes a lane takes *exclusive* entries: whoever holds one is alone between two writes. Namespace
//! operations use them as barriers on the collections they touch, the drain for its handover to live (design.md R1, R4, 6).
//!
//! The worker takes the write whose turn it is: clients take turns, and the writes of each go in order of arrival.
//! Compatible writes come along and become one upstream batch (`choose`). Chroma's cost of a write is per request, so this
//! is where many writers get their speed from.
//!
//! What may wait is bounded: writes and bytes per lane, bytes over all lanes, and time. Nobody takes all of it: a lane
//! holds no more of what all may hold than it leaves free, and of a full lane there is some more for a client of which
//! nothing waits.

mod choose;
mod pair;

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

pub use choose::Write;
pub use pair::{MOST_TOUCHED, Pair, Touched};

use crate::chroma::BatchLimits;
use choose::choose;

/// So many clients are remembered of which nothing waits.
const MOST_CLIENTS: usize = 4096;
/// What a full lane has left for clients of which nothing waits there, as a part of its limits.
const SPARE: usize = 8;

/// What may wait in lanes, and what becomes one batch.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Writes in one lane.
    pub writes: usize,
    /// Bytes in one lane; a write that comes to an empty queue is taken whatever it weighs.
    pub bytes: usize,
    /// Bytes in all lanes together; where something waits already, a lane gets no more of them than it leaves free.
    pub all_bytes: usize,
    /// How long a write waits; zero: for ever.
    pub time: Duration,
    /// One upstream batch.
    pub batch: BatchLimits,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            writes: 1024,
            bytes: 64 << 20,
            all_bytes: 512 << 20,
            time: Duration::from_secs(120),
            batch: BatchLimits {
                records: 256,
                bytes: 8 << 20,
            },
        }
    }
}

/// What lanes share.
#[derive(Debug)]
pub struct Shared {
    limits: Limits,
    /// Bytes that wait in all of them.
    bytes: AtomicUsize,
}

impl Shared {
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            bytes: AtomicUsize::new(0),
        })
    }
}

/// As much waits as may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    #[error("the queue is full")]
    Lane,
    #[error("the queues hold too many bytes")]
    Everything,
}

/// Holding it means: no write of this lane is under way, and none starts.
#[derive(Debug)]
pub struct Exclusive {
    _released: oneshot::Sender<()>,
}

/// What the worker is given.
#[derive(Debug)]
pub enum Entry<W> {
    /// At least one; of more, every two are of one kind and about different records.
    Writes(Vec<W>),
    Exclusive(oneshot::Sender<Exclusive>),
}

/// What waits in a lane.
#[derive(Debug)]
enum Waiting<W> {
    Write { ticket: u64, write: W },
    Exclusive(oneshot::Sender<Exclusive>),
}

/// A write's place in the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    ticket: u64,
    /// The caller has to start a worker.
    pub starts_worker: bool,
}

#[derive(Debug)]
struct Queue<W> {
    entries: VecDeque<Waiting<W>>,
    working: bool,
    bytes: usize,
    tickets: u64,
    /// The worker sleeps until so many wait.
    wanted: usize,
    /// Batches so far.
    turn: u64,
    /// Forgotten when nothing waits.
    clients: HashMap<Option<IpAddr>, Client>,
}

/// What a lane knows of a client.
#[derive(Debug, Clone, Copy, Default)]
struct Client {
    waiting: usize,
    /// The last batch with a write of it.
    served: u64,
}

/// The queue of one collection, or of the namespace.
#[derive(Debug)]
pub struct Lane<W> {
    queue: Mutex<Queue<W>>,
    arrived: Notify,
    shared: Arc<Shared>,
}

impl<W: Write> Lane<W> {
    /// Exclusive entries are bounded by those who make them.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self {
            queue: Mutex::new(Queue {
                entries: VecDeque::new(),
                working: false,
                bytes: 0,
                tickets: 0,
                wanted: usize::MAX,
                turn: 0,
                clients: HashMap::new(),
            }),
            arrived: Notify::new(),
            shared,
        }
    }

    /// Queues a write.
    ///
    /// # Errors
    /// [`Full`], with nothing queued.
    pub fn push(&self, write: W) -> Result<Place, Full> {
        let bytes = write.bytes();
        let limits = &self.shared.limits;
        let mut queue = self.queue.lock();
        let client = write.client();
        let is_only_one = queue.clients.get(&client).is_none_or(|client| client.waiting == 0);
        let spare = |limit: usize| limit + if is_only_one { limit / SPARE } else { 0 };
        let has_room = queue.bytes == 0 || queue.bytes + bytes <= spare(limits.bytes);
        if queue.entries.len() >= spare(limits.writes) || !has_room {
            return Err(Full::Lane);
        }
        let all = self.shared.bytes.fetch_add(bytes, Ordering::Relaxed);
        let is_greedy = queue.bytes > limits.all_bytes.saturating_sub(all);
        if all > 0 && (is_greedy || all + bytes > limits.all_bytes) {
            self.shared.bytes.fetch_sub(bytes, Ordering::Relaxed);
            return Err(Full::Everything);
        }
        queue.bytes += bytes;
        queue.tickets += 1;
        // Who comes anew has no claim to have waited for long.
        let served = queue.turn.saturating_sub(1);
        let new = Client { waiting: 0, served };
        queue.clients.entry(client).or_insert(new).waiting += 1;
        let ticket = queue.tickets;
        queue.entries.push_back(Waiting::Write { ticket, write });
        if queue.entries.len() >= queue.wanted {
            self.arrived.notify_one();
        }
        Ok(Place {
            ticket,
            starts_worker: !std::mem::replace(&mut queue.working, true),
        })
    }

    /// Takes a write back that the worker has not taken yet. True: nothing will come of it.
    pub fn withdraw(&self, place: Place) -> bool {
        let mut queue = self.queue.lock();
        let is_it = |entry: &Waiting<W>| matches!(entry, Waiting::Write { ticket, .. } if *ticket == place.ticket);
        let Some(position) = queue.entries.iter().position(is_it) else {
            return false;
        };
        if let Some(Waiting::Write { write, .. }) = queue.entries.remove(position) {
            self.forget(&mut queue, &write);
        }
        true
    }

    /// A write waits no longer.
    fn forget(&self, queue: &mut Queue<W>, write: &W) {
        queue.bytes -= write.bytes();
        self.shared.bytes.fetch_sub(write.bytes(), Ordering::Relaxed);
        if let Some(client) = queue.clients.get_mut(&write.client()) {
            client.waiting -= 1;
        }
    }

    /// Queues an exclusive entry. The receiver gets the lane when its turn comes; the flag says that the caller has to
    /// start a worker.
    pub fn push_exclusive(&self) -> (oneshot::Receiver<Exclusive>, bool) {
        let (turn, acquired) = oneshot::channel();
        let mut queue = self.queue.lock();
        queue.entries.push_back(Waiting::Exclusive(turn));
        self.arrived.notify_one();
        (acquired, !std::mem::replace(&mut queue.working, true))
    }

    /// The next entry for the worker; `None` ends the worker. With `alone`, one write at a time.
    pub fn next(&self, alone: bool) -> Option<Entry<W>> {
        let mut queue = self.queue.lock();
        let batch = self.shared.limits.batch;
        let records = if alone { 1 } else { batch.records };
        let served = |client| queue.clients.get(&client).map_or(0, |client| client.served);
        let chosen = choose(&queue.entries, BatchLimits { records, ..batch }, served);
        let Some(&last) = chosen.last() else {
            let first = queue.entries.pop_front();
            queue.working = first.is_some();
            if !queue.working {
                queue.clients.clear();
            }
            return match first? {
                Waiting::Exclusive(turn) => Some(Entry::Exclusive(turn)),
                Waiting::Write { .. } => unreachable!("the first write is always chosen"),
            };
        };
        let mut writes = Vec::with_capacity(chosen.len());
        let mut passed = Vec::new();
        let mut chosen = chosen.into_iter().peekable();
        for (position, entry) in queue.entries.drain(..=last).enumerate() {
            match entry {
                Waiting::Write { write, .. } if chosen.next_if_eq(&position).is_some() => writes.push(write),
                entry => passed.push(entry),
            }
        }
        for entry in passed.into_iter().rev() {
            queue.entries.push_front(entry);
        }
        queue.turn += 1;
        let turn = queue.turn;
        for write in &writes {
            self.forget(&mut queue, write);
            if let Some(client) = queue.clients.get_mut(&write.client()) {
                client.served = turn;
            }
        }
        if queue.clients.len() > MOST_CLIENTS {
            queue.clients.retain(|_, client| client.waiting > 0);
        }
        Some(Entry::Writes(writes))
    }

    /// Waits until so many wait, or someone wants the lane for himself.
    pub async fn until_waiting(&self, wanted: usize) {
        loop {
            {
                let mut queue = self.queue.lock();
                let is_wanted = queue.entries.iter().any(|entry| matches!(entry, Waiting::Exclusive(_)));
                if is_wanted || queue.entries.len() >= wanted.min(self.shared.limits.writes) {
                    queue.wanted = usize::MAX;
                    return;
                }
                queue.wanted = wanted;
            }
            self.arrived.notified().await;
        }
    }

    /// The first exclusive entry, ahead of the writes before it: for a worker whose write waits for what the holder of
    /// the lane is about to do.
    pub fn next_exclusive(&self) -> Option<oneshot::Sender<Exclusive>> {
        let mut queue = self.queue.lock();
        let position = queue
            .entries
            .iter()
            .position(|entry| matches!(entry, Waiting::Exclusive(_)))?;
        match queue.entries.remove(position) {
            Some(Waiting::Exclusive(turn)) => Some(turn),
            _ => None,
        }
    }

    /// Puts an exclusive entry back to the front.
    pub fn put_back(&self, turn: oneshot::Sender<Exclusive>) {
        self.queue.lock().entries.push_front(Waiting::Exclusive(turn));
    }

    /// Entries that wait.
    pub fn waiting(&self) -> usize {
        self.queue.lock().entries.len()
    }

    /// Whether a write that comes now has to wait.
    pub fn is_busy(&self) -> bool {
        self.queue.lock().working
    }

    /// Gives the lane to whoever asked for it and waits until it is given back.
    pub async fn hand_over(turn: oneshot::Sender<Exclusive>) {
        let (released, given_back) = oneshot::channel();
        if turn.send(Exclusive { _released: released }).is_ok() {
            let _ = given_back.await;
        }
    }
}

/// The namespace lane has exclusive entries only.
impl Write for std::convert::Infallible {
    type Kind = ();

    fn kind(&self) -> Option<()> {
        match *self {}
    }

    fn ids(&self) -> Option<&[String]> {
        match *self {}
    }

    fn bytes(&self) -> usize {
        match *self {}
    }

    fn client(&self) -> Option<IpAddr> {
        match *self {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A write about its own record that weighs ten bytes; even ones and odd ones combine.
    #[derive(Debug, PartialEq, Eq)]
    struct Number(usize, Vec<String>);

    impl Write for Number {
        type Kind = usize;

        fn kind(&self) -> Option<usize> {
            Some(self.0 % 2)
        }

        fn ids(&self) -> Option<&[String]> {
            Some(&self.1)
        }

        fn bytes(&self) -> usize {
            10
        }

        /// Each hundred is one.
        fn client(&self) -> Option<IpAddr> {
            Some(IpAddr::from([
                10,
                0,
                0,
                u8::try_from(self.0 / 100).expect("few clients"),
            ]))
        }
    }

    fn number(n: usize) -> Number {
        Number(n, vec![n.to_string()])
    }

    fn lane(limits: Limits) -> Lane<Number> {
        Lane::new(Shared::new(limits))
    }

    fn push(lane: &Lane<Number>, n: usize) -> Result<bool, Full> {
        lane.push(number(n)).map(|place| place.starts_worker)
    }

    fn next(lane: &Lane<Number>, alone: bool) -> Vec<usize> {
        match lane.next(alone) {
            Some(Entry::Writes(writes)) => writes.iter().map(|write| write.0).collect(),
            Some(Entry::Exclusive(_)) => vec![usize::MAX],
            None => vec![],
        }
    }

    #[test]
    fn entries_keep_their_order_and_only_the_first_starts_a_worker() {
        let lane = lane(Limits::default());
        assert_eq!(push(&lane, 1), Ok(true));
        assert_eq!(push(&lane, 2), Ok(false));
        let (_turn, start) = lane.push_exclusive();
        assert!(!start);
        assert_eq!(push(&lane, 3), Ok(false));
        assert_eq!(next(&lane, true), [1]);
        assert_eq!(next(&lane, true), [2]);
        assert_eq!(next(&lane, true), [usize::MAX]);
        assert_eq!(next(&lane, true), [3]);
        assert!(lane.is_busy());
        assert!(lane.next(true).is_none());
        assert!(!lane.is_busy());
        assert_eq!(push(&lane, 4), Ok(true), "the worker ended: a new one is needed");
    }

    #[test]
    fn those_that_were_passed_keep_their_place() {
        let lane = lane(Limits::default());
        for n in [1, 2, 3, 4, 6, 5] {
            assert!(push(&lane, n).is_ok());
        }
        assert_eq!(next(&lane, false), [1, 3, 5]);
        assert!(push(&lane, 8).is_ok());
        assert_eq!(next(&lane, true), [2]);
        assert_eq!(next(&lane, false), [4, 6, 8]);
    }

    #[test]
    fn a_full_lane_refuses_writes() {
        let by_count = lane(Limits {
            writes: 2,
            ..Limits::default()
        });
        let by_bytes = lane(Limits {
            bytes: 29,
            ..Limits::default()
        });
        for lane in [by_count, by_bytes] {
            assert!(push(&lane, 1).is_ok());
            assert!(push(&lane, 2).is_ok());
            assert_eq!(push(&lane, 3), Err(Full::Lane));
            next(&lane, true);
            assert!(push(&lane, 4).is_ok());
        }
    }

    #[test]
    fn a_full_lane_has_room_for_another_client() {
        let limits = Limits {
            writes: 16,
            ..Limits::default()
        };
        let lane = lane(limits);
        (0..16).for_each(|n| assert!(push(&lane, n).is_ok()));
        assert_eq!(push(&lane, 16), Err(Full::Lane));
        assert!(push(&lane, 100).is_ok());
        assert_eq!(push(&lane, 101), Err(Full::Lane), "one of it waits");
        assert!(push(&lane, 200).is_ok());
        assert_eq!(push(&lane, 300), Err(Full::Lane), "there is an end");
        let served: Vec<_> = (0..3).map(|_| next(&lane, true)).collect();
        assert_eq!(served, [[0], [100], [200]]);
        assert!(push(&lane, 101).is_ok());
        assert_eq!(push(&lane, 17), Err(Full::Lane));
    }

    #[test]
    fn all_lanes_together_are_bounded_and_what_left_counts_no_more() {
        let shared = Shared::new(Limits {
            bytes: 5,
            all_bytes: 20,
            ..Limits::default()
        });
        let lanes: Vec<Lane<Number>> = (0..3).map(|_| Lane::new(shared.clone())).collect();
        let place = lanes[0]
            .push(number(1))
            .expect("one write may wait, whatever it weighs");
        assert_eq!(push(&lanes[0], 2), Err(Full::Lane));
        assert!(push(&lanes[1], 1).is_ok());
        assert_eq!(push(&lanes[2], 1), Err(Full::Everything));
        assert!(lanes[0].withdraw(place));
        assert!(push(&lanes[2], 1).is_ok());
        next(&lanes[1], false);
        assert!(push(&lanes[0], 1).is_ok());
    }

    #[test]
    fn a_lane_that_floods_leaves_as_much_as_it_takes() {
        let shared = Shared::new(Limits {
            all_bytes: 100,
            ..Limits::default()
        });
        let lanes: Vec<Lane<Number>> = (0..4).map(|_| Lane::new(shared.clone())).collect();
        let flood = |lane: &Lane<Number>| (0..99).take_while(|&n| push(lane, n).is_ok()).count();
        assert_eq!(flood(&lanes[0]), 6, "60 bytes, while 50 were free");
        assert_eq!(push(&lanes[0], 7), Err(Full::Everything));
        assert_eq!(flood(&lanes[1]), 3, "30, while 20 were free");
        assert_eq!(flood(&lanes[2]), 1);
        assert_eq!(push(&lanes[3], 1), Err(Full::Everything), "there is an end");
        next(&lanes[0], true);
        assert_eq!(push(&lanes[0], 8), Err(Full::Everything), "it holds the most");
        assert!(push(&lanes[3], 1).is_ok(), "it holds nothing");
    }

    #[test]
    fn a_client_with_few_writes_does_not_wait_for_all_of_another() {
        let lane = lane(Limits::default());
        // Two kinds, so that they do not combine.
        (1..20).for_each(|n| assert!(push(&lane, n).is_ok()));
        assert_eq!(next(&lane, true), [1]);
        assert!(push(&lane, 102).is_ok() && push(&lane, 201).is_ok());
        assert_eq!(next(&lane, true), [102]);
        assert!(push(&lane, 104).is_ok());
        assert_eq!(next(&lane, true), [201]);
        assert_eq!(next(&lane, true), [2], "the many have their turn, too");
        assert_eq!(next(&lane, true), [104]);
        assert_eq!(next(&lane, false), [3, 5, 7, 9, 11, 13, 15, 17, 19]);
    }

    #[test]
    fn new_clients_do_not_come_before_one_that_has_waited() {
        let lane = lane(Limits::default());
        assert!(push(&lane, 1).is_ok() && push(&lane, 102).is_ok());
        assert_eq!(next(&lane, true), [1]);
        assert!(push(&lane, 3).is_ok());
        assert_eq!(next(&lane, true), [102]);
        for new in [202, 304, 406] {
            assert!(push(&lane, new).is_ok());
        }
        assert_eq!(next(&lane, true), [3]);
        assert_eq!(next(&lane, true), [202]);
    }

    #[test]
    fn only_what_the_worker_has_not_taken_is_withdrawn() {
        let lane = lane(Limits::default());
        let first = lane.push(number(1)).unwrap();
        let second = lane.push(number(2)).unwrap();
        assert_eq!(next(&lane, true), [1]);
        assert!(!lane.withdraw(first));
        assert!(lane.withdraw(second) && !lane.withdraw(second));
        assert!(lane.next(true).is_none());
    }

    #[tokio::test]
    async fn the_worker_wakes_when_enough_wait_or_someone_wants_the_lane() {
        for exclusive in [false, true] {
            let lane = Arc::new(lane(Limits::default()));
            assert!(push(&lane, 1).is_ok());
            let waiting = lane.clone();
            let worker = tokio::spawn(async move { waiting.until_waiting(3).await });
            tokio::task::yield_now().await;
            assert!(push(&lane, 2).is_ok());
            tokio::task::yield_now().await;
            assert!(!worker.is_finished());
            let _turn = if exclusive {
                Some(lane.push_exclusive())
            } else {
                assert!(push(&lane, 3).is_ok());
                None
            };
            worker.await.expect("it wakes");
        }
    }

    #[tokio::test]
    async fn whoever_holds_the_lane_holds_the_worker() {
        let lane = lane(Limits::default());
        let (turn, _) = lane.push_exclusive();
        let Some(Entry::Exclusive(sender)) = lane.next(false) else {
            panic!("an exclusive entry")
        };
        let worker = tokio::spawn(Lane::<Number>::hand_over(sender));
        let held = turn.await.expect("the lane");
        tokio::task::yield_now().await;
        assert!(!worker.is_finished());
        drop(held);
        worker.await.expect("the worker goes on");
    }

    #[tokio::test]
    async fn a_lane_nobody_waits_for_any_more_is_not_held() {
        let lane = lane(Limits::default());
        let (turn, _) = lane.push_exclusive();
        drop(turn);
        let Some(Entry::Exclusive(sender)) = lane.next(false) else {
            panic!("an exclusive entry")
        };
        Lane::<Number>::hand_over(sender).await;
    }
}
