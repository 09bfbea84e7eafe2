//! What has to be true of every state: no acknowledged write is lost (I1), reads are never older than the last ack
//! (I4), the nodes are equal when nothing is left to do (I2), work does not get stuck, and a node that holds every
//! acknowledged write can serve (I12, I35).

use std::collections::{HashMap, HashSet};

use super::RecordModel;
use super::script::{MAX_WRITES, RECORDS, Record, show};
use super::state::{Fate, LanePhase, NODE_NAMES, NODES, NodeIndex, Proxy, State};
use crate::set::Set;

/// Values that a record may have, by what the client knows; computed once.
#[derive(Default)]
pub struct Memory {
    allowed: HashMap<([Fate; MAX_WRITES], usize, Set), HashSet<Record>>,
}

impl Memory {
    fn allows(&mut self, model: &RecordModel, state: &State, id: usize, value: Record) -> bool {
        self.allowed
            .entry((state.fates, id, state.read))
            .or_insert_with(|| allowed(model, &state.fates, id, state.read))
            .contains(&value)
    }
}

/// The values that a record may have: every acknowledged write is in it, in order. One that is in flight or indefinite
/// may be missing, unless a client has read it, and may take effect at its place or later.
pub fn allowed(model: &RecordModel, fates: &[Fate; MAX_WRITES], id: usize, read: Set) -> HashSet<Record> {
    let with_fate = |wanted: &[Fate]| -> Vec<usize> {
        let script = model.config.script.iter().enumerate();
        script
            .filter(|(write, of)| of.id == id && wanted.contains(&fates[*write]))
            .map(|(write, _)| write)
            .collect()
    };
    let mut orders = Orders {
        model,
        acked: with_fate(&[Fate::Acked]),
        optional: with_fate(&[Fate::InFlight, Fate::Indefinite]),
        read,
        values: HashSet::new(),
    };
    orders.extend(0, Set::EMPTY, None);
    orders.values
}

/// Goes through all orders of writes that a correct system may show.
struct Orders<'a> {
    model: &'a RecordModel,
    acked: Vec<usize>,
    optional: Vec<usize>,
    read: Set,
    values: HashSet<Record>,
}

impl Orders<'_> {
    /// `acked` of the acknowledged writes and the optional ones in `used` have made `value`.
    fn extend(&mut self, acked: usize, used: Set, value: Record) {
        let missing = self
            .optional
            .iter()
            .any(|&write| self.read.has(write) && !used.has(write));
        if acked == self.acked.len() && !missing {
            self.values.insert(value);
        }
        if let Some(&write) = self.acked.get(acked) {
            self.extend(acked + 1, used, self.model.config.kind(write).apply(value));
        }
        for position in 0..self.optional.len() {
            let write = self.optional[position];
            let not_before_its_place = self.acked[acked..].iter().all(|&later| later > write);
            if !used.has(write) && not_before_its_place {
                let value = self.model.config.kind(write).apply(value);
                self.extend(acked, used | Set::one(write), value);
            }
        }
    }
}

/// What is wrong with a state.
pub fn violation(model: &RecordModel, memory: &mut Memory, state: &State, quiescent: bool) -> Option<String> {
    if state.repairs.iter().all(Option::is_some) {
        return Some("NO AUTHORITY: each node is to be repaired from the other".into());
    }
    if let Some(proxy) = state.proxy.as_ref().filter(|proxy| !proxy.recovering) {
        for node in (0..NODES).filter(|&node| proxy.usable(node) && state.nodes[node].up) {
            for id in 0..RECORDS {
                let value = state.nodes[node].records[id];
                if !memory.allows(model, state, id, value) {
                    let name = NODE_NAMES[node];
                    return Some(format!("STALE OR LOST: {name}, usable, shows {}", show(value)));
                }
            }
        }
    }
    match quiescent {
        true => wrong_at_rest(model, memory, state),
        false => None,
    }
}

/// What is wrong with a state after which nothing happens by itself.
fn wrong_at_rest(model: &RecordModel, memory: &mut Memory, state: &State) -> Option<String> {
    let Some(proxy) = &state.proxy else {
        return Some("STUCK: no proxy".into());
    };
    let up: Vec<NodeIndex> = (0..NODES).filter(|&node| state.nodes[node].up).collect();
    if up.is_empty() {
        return None;
    }
    if !up.iter().any(|&node| proxy.usable(node)) {
        return Some(format!("UNAVAILABLE: no usable node, {}", open_work(state, proxy)));
    }
    if state.taken < model.config.script.len() || !proxy.lane_is_free() {
        return Some(format!("STUCK: the lane, {}", open_work(state, proxy)));
    }
    if up.len() == NODES {
        for (node, name) in NODE_NAMES.iter().enumerate() {
            if !proxy.usable(node) || state.has_rows(node) {
                return Some(format!(
                    "STUCK: {name} does not get in sync, {}",
                    open_work(state, proxy)
                ));
            }
        }
        let [a, b] = [0, 1].map(|node| state.nodes[node].records);
        if a != b {
            let [a, b] = [a, b].map(|records| records.map(show).join(" "));
            return Some(format!("DIVERGED: A {a}, B {b}"));
        }
        if flushed(model, state, 0) != flushed(model, state, 1) {
            return Some("DIVERGED: by a hidden write".into());
        }
    }
    for node in up.into_iter().filter(|&node| proxy.usable(node)) {
        for (id, value) in flushed(model, state, node).into_iter().enumerate() {
            if !memory.allows(model, state, id, value) {
                return Some(format!("LOST: {} ends with {}", NODE_NAMES[node], show(value)));
            }
        }
    }
    None
}

/// What a node will hold once everything hidden is visible.
fn flushed(model: &RecordModel, state: &State, node: NodeIndex) -> [Record; RECORDS] {
    let mut node = state.nodes[node].clone();
    model.config.reveal(&mut node);
    node.records
}

fn open_work(state: &State, proxy: &Proxy) -> String {
    let mut work = vec![];
    for (node, name) in NODE_NAMES.iter().enumerate() {
        if !state.payload[node].is_empty() {
            work.push(format!("payload rows {:?} of {name}", state.payload[node]));
        }
        if state.repairs[node].is_some() {
            work.push(format!("a repair row of {name}"));
        }
    }
    if proxy.lane.phase != LanePhase::Idle {
        work.push("a write in the lane".into());
    }
    match work.is_empty() {
        true => "nothing open".into(),
        false => work.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::super::script::Fields;
    use super::*;
    use crate::search::Model;

    fn values(script: &str, fates: [Fate; MAX_WRITES]) -> HashSet<Record> {
        let model = RecordModel::new(super::super::Config::parse(&format!("script={script}")).unwrap());
        allowed(&model, &fates, 0, Set::EMPTY)
    }

    fn record(first: u8, second: u8) -> Record {
        Some(Fields { first, second })
    }

    const NONE: Fate = Fate::NotSent;

    #[test]
    fn acknowledged_writes_are_there() {
        let seen = values("u1,v2", [Fate::Acked, Fate::Acked, NONE, NONE]);
        assert_eq!(seen, HashSet::from([record(1, 2)]));
    }

    #[test]
    fn refused_writes_are_not() {
        let seen = values("u1,v2", [Fate::Acked, Fate::Refused, NONE, NONE]);
        assert_eq!(seen, HashSet::from([record(1, 0)]));
    }

    #[test]
    fn an_indefinite_write_is_there_or_not_and_may_come_late() {
        let seen = values("u1,u2", [Fate::Indefinite, Fate::Acked, NONE, NONE]);
        assert_eq!(seen, HashSet::from([record(2, 0), record(1, 0)]));
        let seen = values("u1,u2", [Fate::Acked, Fate::Indefinite, NONE, NONE]);
        assert_eq!(seen, HashSet::from([record(1, 0), record(2, 0)]));
    }

    #[test]
    fn what_was_read_stays() {
        let model = RecordModel::new(super::super::Config::parse("script=u1").unwrap());
        let fates = [Fate::Indefinite, NONE, NONE, NONE];
        assert_eq!(allowed(&model, &fates, 0, Set::one(0)), HashSet::from([record(1, 0)]));
    }

    #[test]
    fn a_lost_acknowledged_write_is_a_violation() {
        let model = RecordModel::new(super::super::Config::parse("script=u1").unwrap());
        let mut state = model.initial();
        assert_eq!(violation(&model, &mut Memory::default(), &state, false), None);
        state.taken = 1;
        state.fates[0] = Fate::Acked;
        state.nodes[0].records[0] = record(1, 0);
        let found = violation(&model, &mut Memory::default(), &state, false).unwrap();
        assert!(found.contains("B, usable, shows -"), "{found}");
    }
}
