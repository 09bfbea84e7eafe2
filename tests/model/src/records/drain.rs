//! The drain: payload rows of a node that is behind are applied in order, and removed.

use super::RecordModel;
use super::rules::RecordRule as Rule;
use super::state::{Command, NODE_NAMES, NodeIndex, RepairPhase, Request, Sender, State, peer_of};
use crate::search::Steps;
use crate::set::Set;

/// The next row is sent to the node.
pub fn send(model: &RecordModel, state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    let Some(write) = (state.payload[node] - proxy.drained[node]).first() else {
        return;
    };
    let open_repair = state.repairs[node];
    let before_repair = match open_repair {
        None => true,
        Some(row) => model.holds(Rule::DrainBeforeRepair) && !row.one_way,
    };
    let in_order = before_repair && proxy.repair[node] == RepairPhase::Idle;
    let uncommitted = !(proxy.drained[node] & state.payload[node]).is_empty();
    if !state.nodes[node].up
        || !proxy.behind(node)
        || proxy.needs_canary[node]
        || proxy.draining[node]
        || (model.holds(Rule::UncertainHolds) && !proxy.uncertain[node].is_empty())
        || (model.holds(Rule::RowsWaitForRepair) && !in_order)
        || (model.holds(Rule::CursorPerRequest) && uncommitted)
    {
        return;
    }
    let mut next = state.clone();
    next.nodes[node].requests.push(Request {
        command: Command::Write(write),
        connected: true,
        sender: Sender::Drain,
    });
    next.proxy_mut().draining[node] = true;
    steps.progress(next, || format!("drain sends W{} to {}", write + 1, NODE_NAMES[node]));
}

/// The commit that removes what was drained.
pub fn commit(state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    let drained = proxy.drained[node];
    if (drained & state.payload[node]).is_empty() || proxy.draining[node] {
        return;
    }
    let mut next = state.clone();
    next.payload[node] -= drained;
    next.proxy_mut().drained[node] = Set::EMPTY;
    steps.progress(next, || {
        format!("payload rows {drained:?} of {} removed", NODE_NAMES[node])
    });
}

/// A row may have been applied twice, which can differ from once: the lane is held until the node is repaired.
pub fn reconcile_after_interruption(model: &RecordModel, state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    if !state.nodes[node].up
        || !proxy.behind(node)
        || !proxy.drain_interrupted[node]
        || state.has_rows(node)
        || !proxy.uncertain[node].is_empty()
        || proxy.needs_canary[node]
        || proxy.draining[node]
        || !proxy.lane_is_free()
    {
        return;
    }
    let peer = peer_of(node);
    let (name, source) = (NODE_NAMES[node], NODE_NAMES[peer]);
    let mut next = state.clone();
    next.proxy_mut().drain_interrupted[node] = false;
    if proxy.usable(peer) {
        next.add_repair(node, model.config.ids(), peer);
        next.proxy_mut().lane_held_for = Some(node);
        steps.progress(next, || {
            format!("lane held: repair row {name}<-{source} for what was drained twice")
        });
    } else {
        steps.progress(next, || {
            format!("{name} was drained twice and has no peer to be compared with")
        });
    }
}
