//! What is open between the nodes and their lanes, gathered once per question.
//!
//! Costs as much as there are lanes behind, not as many as there are collections: every lane with something open is in
//! `Core::behind` (payload rows) or has a row in `Core::repairs`, since whatever keeps a node out of a lane is covered
//! by one of the two before it happens (design.md R1).

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use chrono::{DateTime, Utc};

use crate::chroma::Generation;
use crate::cluster::NodeIndex;
use crate::lane::Pair;
use crate::mirror::{Core, Scope};

/// A lane that a node is not in step with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenLane {
    /// `None`: the namespace.
    pub generation: Option<Generation>,
    pub rows: u64,
    pub bytes: u64,
    pub parked: u64,
    pub repairs: u64,
    pub oldest: Option<i64>,
    /// The drain can work on it once the node is up.
    pub drainable: bool,
}

impl OpenLane {
    fn of(generation: Option<Generation>, pair: &Pair) -> Option<Self> {
        (!pair.in_sync()).then(|| Self {
            generation,
            rows: pair.pending(),
            bytes: pair.pending_bytes(),
            parked: pair.parked(),
            repairs: pair.repairs(),
            oldest: pair.oldest(),
            drainable: pair.drainable(),
        })
    }

    /// What keeps the node out of the lane, in one word.
    pub fn reason(&self) -> &'static str {
        match self {
            Self { repairs: 1.., .. } => "repair",
            Self { parked: 1.., .. } => "parked",
            Self { rows: 1.., .. } => "backlog",
            _ => "in doubt",
        }
    }
}

/// What is open between one node and all its lanes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeState {
    pub rows: u64,
    pub bytes: u64,
    pub parked: u64,
    /// Open repair rows.
    pub repairs: u64,
    /// Of those, parked.
    pub parked_repairs: u64,
    /// Writes whose outcome was unknown and that are to be compared again.
    pub suspects: u64,
    /// Requests that the node has not answered though their clients were.
    pub stragglers: u64,
    /// Of the oldest payload row, in Unix microseconds.
    pub oldest: Option<i64>,
    /// The namespace first, then collections in the order of their making.
    pub lanes: Vec<OpenLane>,
}

impl NodeState {
    fn add(&mut self, lane: OpenLane) {
        self.rows += lane.rows;
        self.bytes += lane.bytes;
        self.parked += lane.parked;
        self.oldest = match (self.oldest, lane.oldest) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        self.lanes.push(lane);
    }

    /// The node has everything.
    pub fn in_sync(&self) -> bool {
        self.lanes.is_empty() && self.repairs == 0 && self.stragglers == 0
    }

    /// Lanes with an open repair: the node may differ from its peers there.
    pub fn divergent(&self) -> usize {
        self.lanes.iter().filter(|lane| lane.repairs > 0).count()
    }
}

/// The state of every node, in configured order.
pub fn gather(core: &Core) -> Vec<NodeState> {
    let mut open: Vec<BTreeMap<Option<Generation>, u64>> = vec![BTreeMap::new(); core.cluster.len()];
    for row in core.repairs.lock().iter() {
        if let Some(node) = core.cluster.index_of(&row.node) {
            *open[node].entry(row.generation).or_default() += 1;
        }
    }
    for &(node, generation) in core.behind.lock().iter() {
        open[node].entry(generation).or_default();
    }
    let states = open.into_iter().enumerate();
    let mut states: Vec<NodeState> = states.map(|(node, lanes)| state_of(core, node, &lanes)).collect();
    let parked = core
        .repairs
        .lock()
        .iter()
        .filter(|row| row.parked.is_some())
        .map(|row| row.node.clone())
        .collect::<Vec<_>>();
    for node in parked {
        if let Some(node) = core.cluster.index_of(&node) {
            states[node].parked_repairs += 1;
        }
    }
    for row in core.suspects.lock().values() {
        if let Some(node) = core.cluster.index_of(&row.node) {
            states[node].suspects += 1;
        }
    }
    states
}

/// Since when every living collection was found equal on all nodes at least once; `None`: not all of them were yet.
pub fn verified_at(core: &Core) -> Option<DateTime<Utc>> {
    let mut living = core.catalog.all();
    living.retain(|collection| !collection.is_deleted());
    let verified: Option<Vec<_>> = living
        .iter()
        .map(|collection| core.repairing.verified_at(collection.generation))
        .collect();
    verified?.into_iter().min()
}

fn state_of(core: &Core, node: NodeIndex, lanes: &BTreeMap<Option<Generation>, u64>) -> NodeState {
    let mut state = NodeState {
        repairs: lanes.values().sum(),
        stragglers: core.cluster.node(node).stragglers(),
        ..NodeState::default()
    };
    for &generation in lanes.keys() {
        let scope = match generation {
            None => Scope::Namespace,
            Some(generation) => match core.catalog.by_generation(generation) {
                Some(collection) => Scope::Collection(collection),
                None => continue,
            },
        };
        if let Some(lane) = OpenLane::of(generation, &scope.pairs(core)[node]) {
            state.add(lane);
        }
    }
    state
}

/// Whether the drain is at work on some node.
pub fn is_replaying(core: &Core, states: &[NodeState]) -> bool {
    !core.drain_paused.load(Ordering::SeqCst)
        && !core.log.is_fenced()
        && states
            .iter()
            .zip(core.cluster.nodes())
            .any(|(state, node)| node.is_up() && state.lanes.iter().any(|lane| lane.drainable))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_that_is_in_step_is_not_open() {
        assert_eq!(OpenLane::of(None, &Pair::default()), None);
    }

    #[test]
    fn sums_and_reasons_follow_the_pairs() {
        let (first, second, third) = (Pair::default(), Pair::default(), Pair::default());
        first.add_pending(3, 300, 20);
        second.add_pending(1, 50, 10);
        second.add_repair(true);
        third.straggler_started();
        let mut state = NodeState::default();
        assert!(state.in_sync());
        for (generation, pair) in [(None, &first), (Some(7), &second), (Some(8), &third)] {
            state.add(OpenLane::of(generation, pair).unwrap());
        }
        assert_eq!((state.rows, state.bytes, state.oldest), (4, 350, Some(10)));
        assert_eq!(state.divergent(), 1);
        assert!(!state.in_sync());
        let reasons: Vec<_> = state.lanes.iter().map(OpenLane::reason).collect();
        assert_eq!(reasons, ["backlog", "repair", "in doubt"]);
        assert!(state.lanes[0].drainable && !state.lanes[1].drainable);
    }
}
