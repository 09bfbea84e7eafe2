//! Everything that the model of names distinguishes.

use super::config::{Budget, MAX_OPS};
use crate::set::Set;

pub const NODES: usize = 2;
pub const NODE_NAMES: [&str; NODES] = ["A", "B"];

pub type NodeIndex = usize;

/// The one from the start, and one for each create.
pub const GENERATIONS: usize = MAX_OPS + 1;

/// A node's own name for a collection; every create makes another. Equal numbers on two nodes mean nothing.
pub type Uuid = u8;

/// What was in the collection from the start, as a record beside those that the script adds.
pub const OLD_RECORD: usize = 7;

/// The collection that has the name on a node.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Collection {
    pub uuid: Uuid,
    /// Records, by the operation that added them.
    pub records: Set,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Command {
    /// Chroma deletes by name only.
    DeleteName,
    CreateName,
    Add(Uuid, usize),
    /// A repair makes the records those of the source.
    CopyRecords(Uuid, Set),
}

/// Who waits for the answer of a request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Sender {
    Lane,
    Drain,
    Repair,
    Abandoned,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Request {
    pub command: Command,
    pub connected: bool,
    pub sender: Sender,
    /// The operation it is for; 0 in a repair.
    pub op: usize,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Node {
    pub up: bool,
    pub collection: Option<Collection>,
    pub next_uuid: Uuid,
    pub requests: Vec<Request>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Outcome {
    Skipped,
    Awaited,
    Applied,
    Failed,
    Unknown,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Fate {
    NotSent,
    InFlight,
    Acked,
    Indefinite,
    Refused,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Standing {
    Unverified,
    Behind,
    Usable,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum LanePhase {
    Idle,
    Sent,
    /// Decided; rows, catalog and completion are to be committed.
    Completing,
    UnknownOnBoth,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Proxy {
    pub recovering: bool,
    pub standing: [Standing; NODES],
    pub needs_canary: [bool; NODES],
    pub phase: LanePhase,
    /// The operation in the lane.
    pub op: usize,
    pub outcomes: [Outcome; NODES],
    /// UUIDs that the nodes answered; 0 if none.
    pub learned: [Uuid; NODES],
    pub answer: Fate,
    pub needs_payload: [bool; NODES],
    pub draining: [bool; NODES],
    /// A drained operation and the UUID that was answered, before the commit that removes its row.
    pub drained: [Option<(usize, Uuid)>; NODES],
    pub repairing: [bool; NODES],
    /// Operations that were answered; where their completion is not durable by then, it becomes so later.
    pub answered: Set,
}

impl Proxy {
    pub fn new(recovering: bool, standing: Standing, answered: Set) -> Self {
        Self {
            recovering,
            standing: [standing; NODES],
            needs_canary: [false; NODES],
            phase: LanePhase::Idle,
            op: 0,
            outcomes: [Outcome::Skipped; NODES],
            learned: [0; NODES],
            answer: Fate::NotSent,
            needs_payload: [false; NODES],
            draining: [false; NODES],
            drained: [None; NODES],
            repairing: [false; NODES],
            answered,
        }
    }

    pub fn usable(&self, node: NodeIndex) -> bool {
        self.standing[node] == Standing::Usable
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct State {
    /// Operations that were taken from the client.
    pub taken: usize,
    pub fates: [Fate; MAX_OPS],
    pub nodes: [Node; NODES],

    // The journal: durable.
    pub intents: Set,
    pub completed: Set,
    /// The catalog: a generation's UUID on each node; 0 if it is not known.
    pub catalog: [[Uuid; NODES]; GENERATIONS],
    pub payload: [Set; NODES],
    pub repair: [bool; NODES],

    pub proxy: Option<Proxy>,
    pub budget: Budget,
}

impl State {
    /// Both nodes hold generation 0, with a record in it.
    pub fn initial(budget: Budget) -> Self {
        let node = Node {
            up: true,
            collection: Some(Collection {
                uuid: 1,
                records: Set::one(OLD_RECORD),
            }),
            next_uuid: 2,
            requests: vec![],
        };
        let mut catalog = [[0; NODES]; GENERATIONS];
        catalog[0] = [1; NODES];
        Self {
            taken: 0,
            fates: [Fate::NotSent; MAX_OPS],
            nodes: [node.clone(), node],
            intents: Set::EMPTY,
            completed: Set::EMPTY,
            catalog,
            payload: [Set::EMPTY; NODES],
            repair: [false; NODES],
            proxy: Some(Proxy::new(false, Standing::Usable, Set::EMPTY)),
            budget,
        }
    }

    /// The proxy, where there must be one.
    pub fn proxy_mut(&mut self) -> &mut Proxy {
        self.proxy.as_mut().expect("only a proxy takes this step")
    }

    /// The generation that a node's UUID belongs to, if the catalog knows.
    pub fn generation_of(&self, node: NodeIndex, uuid: Uuid) -> Option<usize> {
        (0..GENERATIONS).find(|&generation| uuid != 0 && self.catalog[generation][node] == uuid)
    }

    pub fn has_rows(&self, node: NodeIndex) -> bool {
        !self.payload[node].is_empty() || self.repair[node]
    }
}
