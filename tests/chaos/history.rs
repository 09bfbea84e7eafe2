//! What clients did and what they were told, on one monotonic clock.
//!
//! An operation is a set of effects on registers: a record of a collection, or a name. A register holds the tag of the
//! write that made it what it is, or nothing; no two writes share a tag.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Instant;

pub type Tag = u64;

/// What a record says that is not one of ours.
pub const FOREIGN: Tag = Tag::MAX;

/// The place of names, beside the collections, which are the places of records.
pub const NAMES: &str = "names";

const GROUPS: u64 = 4;

/// The value of the metadata key that a delete or get by filter asks for.
pub fn group(tag: Tag) -> u64 {
    tag % GROUPS
}

pub fn groups() -> impl Iterator<Item = u64> {
    0..GROUPS
}

pub fn any_group(random: u64) -> u64 {
    random % GROUPS
}

/// A register.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub place: String,
    pub id: String,
}

impl Key {
    pub fn new(place: &str, id: &str) -> Key {
        Key {
            place: place.into(),
            id: id.into(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    Set(Tag),
    /// Nothing if the register holds something.
    Add(Tag),
    /// Nothing if the register holds nothing.
    Update(Tag),
    Delete,
    /// Nothing unless the register holds a tag of this group.
    DeleteGroup(u64),
    Read(Option<Tag>),
    /// A read that found no tag of this group here.
    ReadNotGroup(u64),
}

/// What is known about an operation's effects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It happened between invocation and completion.
    Acked,
    /// It did not and will not happen.
    Refused,
    /// It may have happened, or will, or not; an error told so when it completed.
    Indefinite,
    /// The same, and the client gave up waiting: it may still be on its way.
    Abandoned,
}

/// One operation of one client. Times are microseconds since the start of the recording.
#[derive(Clone, Debug)]
pub struct Op {
    pub client: String,
    pub what: &'static str,
    pub effects: Vec<(Key, Effect)>,
    /// A count of a place's records.
    pub count: Option<(String, u64)>,
    pub start: u64,
    pub end: u64,
    pub outcome: Outcome,
    /// What the client was told, unless it was what it had asked for.
    pub error: Option<String>,
    /// The fault at work, or the last one, when it was completed.
    pub during: Arc<str>,
}

impl Op {
    pub fn line(&self, n: usize) -> String {
        let seconds = |micros: u64| micros as f64 / 1e6;
        let effects: Vec<String> = self
            .effects
            .iter()
            .map(|(key, effect)| format!("{}/{} {effect:?}", key.place, key.id))
            .collect();
        format!(
            "#{n} {:.6}..{:.6} {} {} {:?} [{}]{}{} (during {})",
            seconds(self.start),
            seconds(self.end),
            self.client,
            self.what,
            self.outcome,
            effects.join(", "),
            self.count.as_ref().map(|c| format!(" {c:?}")).unwrap_or_default(),
            self.error.as_ref().map(|e| format!(" {e}")).unwrap_or_default(),
            self.during,
        )
    }
}

/// Where clients write down what they do.
pub struct Recorder {
    epoch: Instant,
    tags: AtomicU64,
    acked: AtomicU64,
    ops: Mutex<Vec<Op>>,
    during: Mutex<Arc<str>>,
    /// The client-visible id of the collection that a name's tag stands for.
    generations: Mutex<BTreeMap<Tag, String>>,
}

impl Recorder {
    pub fn new() -> Recorder {
        Recorder {
            epoch: Instant::now(),
            tags: AtomicU64::new(0),
            acked: AtomicU64::new(0),
            ops: Mutex::default(),
            during: Mutex::new("nothing".into()),
            generations: Mutex::default(),
        }
    }

    pub fn now(&self) -> u64 {
        self.epoch.elapsed().as_micros() as u64
    }

    pub fn tag(&self) -> Tag {
        self.tags.fetch_add(1, SeqCst) + 1
    }

    /// How many tags there are so far.
    pub fn tags(&self) -> u64 {
        self.tags.load(SeqCst)
    }

    /// The registers of each place so far.
    pub fn keys(&self) -> BTreeMap<String, BTreeSet<Key>> {
        let mut places: BTreeMap<String, BTreeSet<Key>> = BTreeMap::new();
        for (key, _) in self
            .ops
            .lock()
            .expect("no panics inside")
            .iter()
            .flat_map(|op| &op.effects)
        {
            let keys = places.entry(key.place.clone()).or_default();
            if !keys.contains(key) {
                keys.insert(key.clone());
            }
        }
        places
    }

    pub fn push(&self, mut op: Op) {
        op.during = self.during.lock().expect("no panics inside").clone();
        let writes = op
            .effects
            .iter()
            .any(|(_, effect)| !matches!(effect, Effect::Read(_) | Effect::ReadNotGroup(_)));
        if writes && op.outcome == Outcome::Acked {
            self.acked.fetch_add(1, SeqCst);
        }
        self.ops.lock().expect("no panics inside").push(op);
    }

    /// Acknowledged writes so far.
    pub fn acked(&self) -> u64 {
        self.acked.load(SeqCst)
    }

    pub fn during(&self, fault: &str) {
        *self.during.lock().expect("no panics inside") = fault.into();
    }

    pub fn generation(&self, tag: Tag, id: &str) {
        let mut generations = self.generations.lock().expect("no panics inside");
        generations.insert(tag, id.to_owned());
    }

    pub fn generations(&self) -> BTreeMap<Tag, String> {
        self.generations.lock().expect("no panics inside").clone()
    }

    pub fn ops(&self) -> Vec<Op> {
        self.ops.lock().expect("no panics inside").clone()
    }
}
