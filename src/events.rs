//! What happened, for people: nodes that went down and came back, what operators did, who wrote the log.
//!
//! Recording never waits and never fails: events go through a bounded channel to a task that writes them down. What does
//! not fit is dropped, and counted. Nothing rests on events, and a journal that does not take them is not held to be away.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::env::SharedEnv;
use crate::journal::{Change, EventRecord, JournalError, Log};

/// Events that wait to be written.
const WAITING: usize = 1024;
/// Events of one commit.
const BATCH: usize = 100;
/// Events that memory keeps for `/status`.
const RECENT: usize = 20;
/// Events that the journal keeps, about.
pub const KEPT: usize = 10_000;
/// After so many the older ones are removed.
const TRIM_EVERY: usize = 500;
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// What kinds of events there are, as the journal and people spell them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    NodeUp,
    NodeDown,
    /// It was taken out of service.
    Maintenance,
    /// It was taken back.
    Ready,
    OutOfSync,
    InSync,
    Drained,
    Resynced,
    Verified,
    Leader,
    LogAway,
    LogBack,
    Verb,
    Configuration,
}

impl Kind {
    pub const ALL: [Self; 14] = [
        Self::NodeUp,
        Self::NodeDown,
        Self::Maintenance,
        Self::Ready,
        Self::OutOfSync,
        Self::InSync,
        Self::Drained,
        Self::Resynced,
        Self::Verified,
        Self::Leader,
        Self::LogAway,
        Self::LogBack,
        Self::Verb,
        Self::Configuration,
    ];

    pub fn label(self) -> &'static str {
        match self {
            Self::NodeUp => "node_up",
            Self::NodeDown => "node_down",
            Self::Maintenance => "maintenance",
            Self::Ready => "ready",
            Self::OutOfSync => "out_of_sync",
            Self::InSync => "in_sync",
            Self::Drained => "drained",
            Self::Resynced => "resynced",
            Self::Verified => "verified",
            Self::Leader => "leader",
            Self::LogAway => "log_away",
            Self::LogBack => "log_back",
            Self::Verb => "verb",
            Self::Configuration => "configuration",
        }
    }
}

/// Where and by what name events are written.
struct Place {
    env: SharedEnv,
    log: Arc<Log>,
}

/// Takes events, remembers the last ones, and passes all of them on.
pub struct Events {
    place: OnceLock<Place>,
    sender: mpsc::Sender<EventRecord>,
    receiver: Mutex<Option<mpsc::Receiver<EventRecord>>>,
    recent: Mutex<VecDeque<EventRecord>>,
    next: AtomicI64,
    dropped: AtomicU64,
}

impl Default for Events {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(WAITING);
        Self {
            place: OnceLock::new(),
            sender,
            receiver: Mutex::new(Some(receiver)),
            recent: Mutex::default(),
            next: AtomicI64::new(1),
            dropped: AtomicU64::new(0),
        }
    }
}

impl Events {
    /// From here on events are taken. `last`: what the journal has, newest first.
    pub fn begin(&self, env: SharedEnv, log: Arc<Log>, last: Vec<EventRecord>) {
        self.recent.lock().extend(last.into_iter().take(RECENT).rev());
        let _ = self.place.set(Place { env, log });
    }

    /// Something happened.
    pub fn record(&self, kind: Kind, node: Option<&str>, who: Option<&str>, what: impl Into<String>) {
        let Some(place) = self.place.get() else { return };
        // One at a time: the order of ids is that of events.
        let mut recent = self.recent.lock();
        let event = EventRecord {
            // Terms are in the upper bits, as in positions.
            id: crate::journal::first_lsn(place.log.term()) + self.next.fetch_add(1, Ordering::Relaxed),
            at: place.env.wall(),
            kind: kind.label().to_owned(),
            node: node.map(str::to_owned),
            who: who.map(str::to_owned),
            what: what.into(),
        };
        if self.sender.try_send(event.clone()).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        recent.push_back(event);
        while recent.len() > RECENT {
            recent.pop_front();
        }
    }

    /// The last ones, newest first.
    pub fn recent(&self) -> Vec<EventRecord> {
        self.recent.lock().iter().rev().cloned().collect()
    }

    /// Events that will never be written.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

/// Writes events down for as long as the process lives.
pub async fn keep_events(events: Arc<Events>) {
    let Some(mut receiver) = events.receiver.lock().take() else {
        return;
    };
    let mut until_trim = 0;
    while let Some(first) = receiver.recv().await {
        let Some(Place { env, log }) = events.place.get() else {
            return;
        };
        let mut batch = vec![first];
        while batch.len() < BATCH
            && let Ok(event) = receiver.try_recv()
        {
            batch.push(event);
        }
        let count = batch.len();
        let mut changes = vec![Change::InsertEvents(batch)];
        if until_trim <= count {
            changes.push(Change::TrimEvents { keep: KEPT });
            until_trim = TRIM_EVERY;
        }
        until_trim -= count.min(until_trim);
        loop {
            match log.commit_aside(&changes).await {
                Ok(()) => break,
                Err(JournalError::Conflict(_) | JournalError::Fenced { .. }) => {
                    events.dropped.fetch_add(count as u64, Ordering::Relaxed);
                    break;
                }
                Err(_) => env.sleep(RETRY_PAUSE).await,
            }
        }
    }
}
