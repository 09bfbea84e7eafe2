//! Everything that the model of records distinguishes: nodes, journal, proxy, client.

use super::script::{MAX_WRITES, RECORDS, Record};
use crate::set::Set;

pub const NODES: usize = 2;
pub const NODE_NAMES: [&str; NODES] = ["A", "B"];

/// Index into the nodes.
pub type NodeIndex = usize;

/// The other of two nodes.
pub fn peer_of(node: NodeIndex) -> NodeIndex {
    1 - node
}

/// What the client knows of a write.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Fate {
    NotSent,
    InFlight,
    Acked,
    /// 504, or no answer because the proxy died: applied everywhere or nowhere, in the end.
    Indefinite,
    /// 4xx or 503: not applied.
    Refused,
}

/// A request to a node.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Command {
    /// A write of the script, by its index.
    Write(usize),
    /// A repair makes a record what the source held.
    Copy(usize, Record),
}

/// Who waits for the answer of a request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Sender {
    Lane,
    Drain,
    Repair,
    /// Nobody any more: a straggler.
    Abandoned,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Request {
    pub command: Command,
    /// Whether the answer can still arrive; without a connection the request may also never be carried out.
    pub connected: bool,
    pub sender: Sender,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Node {
    pub up: bool,
    pub records: [Record; RECORDS],
    /// Committed, and invisible until the next write or a restart.
    pub hidden: Vec<Command>,
    pub requests: Vec<Request>,
    /// It lost everything and carries another marker, which the proxy has not read yet.
    pub wiped: bool,
}

impl Node {
    fn new() -> Self {
        Self {
            up: true,
            records: [None; RECORDS],
            hidden: vec![],
            requests: vec![],
            wiped: false,
        }
    }
}

/// A durable order: make these records of a node equal to those of its source.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RepairRow {
    pub ids: Set,
    pub source: NodeIndex,
    /// The target lost data, or refused what the source took: it is never the better of the two. Such a row is not
    /// reversed, and the target is not drained before it is carried out.
    pub one_way: bool,
    /// A copy was sent to the target, which may thus hold neither its own state nor the source's.
    pub begun: bool,
}

/// What the proxy takes a node for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Standing {
    /// Its marker has to be read first.
    Unverified,
    Behind,
    /// In sync: it serves reads and takes writes.
    Usable,
}

/// What a node did with the write in the lane.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Outcome {
    /// Not sent: the node was not usable.
    Skipped,
    Awaited,
    Applied,
    /// Certain: not applied.
    Failed,
    Unknown,
    /// 4xx.
    Refused,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum LanePhase {
    Idle,
    /// The write was sent, some answer is awaited.
    Sent,
    /// Decided; its rows are to be committed.
    Covering,
    /// Unknown on both nodes: the first that answers a flush becomes the authority.
    UnknownOnBoth,
}

/// The write that is under way.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Lane {
    pub phase: LanePhase,
    pub write: usize,
    pub outcomes: [Outcome; NODES],
    /// Nodes that get a payload row, nodes that get a repair row.
    pub needs_payload: [bool; NODES],
    pub needs_repair: [bool; NODES],
    /// What the client will be told.
    pub answer: Fate,
}

impl Lane {
    pub fn idle() -> Self {
        Self {
            phase: LanePhase::Idle,
            write: 0,
            outcomes: [Outcome::Skipped; NODES],
            needs_payload: [false; NODES],
            needs_repair: [false; NODES],
            answer: Fate::NotSent,
        }
    }
}

/// How far the repair of a node is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RepairPhase {
    Idle,
    /// A record is on its way to the target.
    Copying,
    /// Target and source are equal; the row can be removed.
    Equal,
}

/// The proxy's memory; a kill takes all of it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Proxy {
    /// No node has served since the start.
    pub recovering: bool,
    pub standing: [Standing; NODES],
    /// Nothing is sent to the node until a canary write has returned: something may still be on its way there.
    pub needs_canary: [bool; NODES],
    pub lane: Lane,
    /// A request of the drain is under way.
    pub draining: [bool; NODES],
    /// Drained, and the commit that removes the payload rows is outstanding.
    pub drained: [Set; NODES],
    /// A drained row may have been applied twice.
    pub drain_interrupted: [bool; NODES],
    /// The node restarted and has not been compared with its peer yet.
    pub restarted: [bool; NODES],
    pub repair: [RepairPhase; NODES],
    /// What the repair read from the source.
    pub copy: [[Record; RECORDS]; NODES],
    /// Payload rows there were when the source was read; the repair makes them moot.
    pub moot_payload: [Set; NODES],
    /// The repair row was widened after the source was read.
    pub repair_outdated: [bool; NODES],
    /// Writes that the low-water mark may pass.
    pub settled: Set,
    /// Payload rows whose commit may or may not have happened.
    pub uncertain: [Set; NODES],
    /// The lane is held until this node is repaired.
    pub lane_held_for: Option<NodeIndex>,
}

impl Proxy {
    pub fn new(recovering: bool, standing: Standing) -> Self {
        Self {
            recovering,
            standing: [standing; NODES],
            needs_canary: [false; NODES],
            lane: Lane::idle(),
            draining: [false; NODES],
            drained: [Set::EMPTY; NODES],
            drain_interrupted: [false; NODES],
            restarted: [false; NODES],
            repair: [RepairPhase::Idle; NODES],
            copy: [[None; RECORDS]; NODES],
            moot_payload: [Set::EMPTY; NODES],
            repair_outdated: [false; NODES],
            settled: Set::EMPTY,
            uncertain: [Set::EMPTY; NODES],
            lane_held_for: None,
        }
    }

    pub fn usable(&self, node: NodeIndex) -> bool {
        self.standing[node] == Standing::Usable
    }

    pub fn behind(&self, node: NodeIndex) -> bool {
        self.standing[node] == Standing::Behind
    }

    /// Between two writes, and not held for a repair.
    pub fn lane_is_free(&self) -> bool {
        self.lane.phase == LanePhase::Idle && self.lane_held_for.is_none()
    }
}

/// Faults (and client reads) that may still happen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Budget {
    pub node_kills: [u8; NODES],
    pub proxy_kills: u8,
    /// Requests that fail, lose their answer or are slow.
    pub network: u8,
    /// Writes that are answered 500, committed and hidden.
    pub hidden: u8,
    /// Commits that time out and may or may not have happened.
    pub journal: u8,
    pub wipes: u8,
    /// Restores of an empty snapshot that carries the same marker.
    pub snapshots: u8,
    /// 4xx by one node.
    pub refusals: u8,
    /// Reads whose result the client remembers; not a fault, and not counted in `total`.
    pub reads: u8,
    /// All faults together.
    pub total: u8,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct State {
    /// Writes that were taken from the client.
    pub taken: usize,
    pub fates: [Fate; MAX_WRITES],
    /// Unacknowledged writes that a client has read.
    pub read: Set,
    pub nodes: [Node; NODES],

    // The journal: durable.
    pub intents: Set,
    pub low_water: usize,
    pub payload: [Set; NODES],
    pub repairs: [Option<RepairRow>; NODES],

    /// `None`: it was killed.
    pub proxy: Option<Proxy>,
    pub budget: Budget,
}

impl State {
    pub fn initial(budget: Budget) -> Self {
        Self {
            taken: 0,
            fates: [Fate::NotSent; MAX_WRITES],
            read: Set::EMPTY,
            nodes: [Node::new(), Node::new()],
            intents: Set::EMPTY,
            low_water: 0,
            payload: [Set::EMPTY; NODES],
            repairs: [None; NODES],
            proxy: Some(Proxy::new(false, Standing::Usable)),
            budget,
        }
    }

    /// The proxy, where there must be one.
    pub fn proxy_mut(&mut self) -> &mut Proxy {
        self.proxy.as_mut().expect("only a proxy takes this step")
    }

    /// Writes or widens the repair row of a node.
    pub fn add_repair(&mut self, target: NodeIndex, ids: Set, source: NodeIndex) {
        if let Some(proxy) = &mut self.proxy
            && proxy.repair[target] != RepairPhase::Idle
        {
            proxy.repair_outdated[target] = true;
        }
        let older = self.repairs[target];
        self.repairs[target] = Some(RepairRow {
            ids: older.map_or(ids, |row| row.ids | ids),
            source,
            one_way: older.is_some_and(|row| row.one_way),
            begun: older.is_some_and(|row| row.begun),
        });
    }

    /// Whether the node has rows of either kind.
    pub fn has_rows(&self, node: NodeIndex) -> bool {
        !self.payload[node].is_empty() || self.repairs[node].is_some()
    }
}
