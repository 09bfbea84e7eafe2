//! Carrying out repair rows: read the source, copy what differs, remove the row.

use super::RecordModel;
use super::rules::RecordRule as Rule;
use super::script::RECORDS;
use super::state::{
    Command, LanePhase, NODE_NAMES, NodeIndex, RepairPhase, RepairRow, Request, Sender, State, peer_of,
};
use crate::search::Steps;
use crate::set::Set;

/// Source and target are flushed, the source is read, the first difference is sent.
pub fn begin(model: &RecordModel, state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    let Some(RepairRow {
        ids, source, one_way, ..
    }) = state.repairs[node]
    else {
        return;
    };
    let target_is_ready = state.nodes[node].up
        && proxy.behind(node)
        && proxy.repair[node] == RepairPhase::Idle
        && !proxy.draining[node]
        && !proxy.needs_canary[node];
    let source_is_ready = proxy.usable(source) && state.nodes[source].up && !proxy.needs_canary[source];
    if !target_is_ready
        || !source_is_ready
        || (model.holds(Rule::UncertainHolds) && !proxy.uncertain[node].is_empty())
        || (model.holds(Rule::RepairReadsBetweenWrites) && proxy.lane.phase != LanePhase::Idle)
        || (model.holds(Rule::DrainBeforeRepair) && !one_way && !state.payload[node].is_empty())
    {
        return;
    }
    let mut next = state.clone();
    if model.holds(Rule::FlushFirst) {
        model.config.reveal(&mut next.nodes[node]);
        model.config.reveal(&mut next.nodes[source]);
    }
    let copy = next.nodes[source].records;
    let after = next.proxy_mut();
    after.copy[node] = copy;
    after.moot_payload[node] = model.config.writes_on(state.payload[node], ids);
    after.repair_outdated[node] = false;
    copy_next(&mut next, node);
    steps.progress(next, || {
        format!(
            "repair {}<-{}: both flushed, source read",
            NODE_NAMES[node], NODE_NAMES[source]
        )
    });
}

/// Sends the first record that still differs from what was read.
pub fn copy_next(state: &mut State, node: NodeIndex) {
    let ids = state.repairs[node].map_or(Set::EMPTY, |row| row.ids);
    let copy = state.proxy_mut().copy[node];
    let different = (0..RECORDS).find(|&id| ids.has(id) && state.nodes[node].records[id] != copy[id]);
    let Some(id) = different else {
        state.proxy_mut().repair[node] = RepairPhase::Equal;
        return;
    };
    state.nodes[node].requests.push(Request {
        command: Command::Copy(id, copy[id]),
        connected: true,
        sender: Sender::Repair,
    });
    state.proxy_mut().repair[node] = RepairPhase::Copying;
    if let Some(row) = &mut state.repairs[node] {
        row.begun = true;
    }
}

/// The commit that removes the row, and the payload rows that the copy made moot.
pub fn finish(model: &RecordModel, state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    if proxy.repair[node] != RepairPhase::Equal {
        return;
    }
    let mut next = state.clone();
    let after = next.proxy_mut();
    after.repair[node] = RepairPhase::Idle;
    after.moot_payload[node] = Set::EMPTY;
    after.copy[node] = Default::default();
    if proxy.repair_outdated[node] {
        after.repair_outdated[node] = false;
        steps.progress(next, || {
            format!("{}: a newer repair row is open, once more", NODE_NAMES[node])
        });
        return;
    }
    let removes_rows = model.holds(Rule::RepairRemovesRows);
    if removes_rows {
        next.payload[node] -= proxy.moot_payload[node];
    }
    next.repairs[node] = None;
    let rows_left = next.payload[node];
    let after = next.proxy_mut();
    if removes_rows {
        after.drained[node] = after.drained[node] & rows_left;
    }
    if after.lane_held_for == Some(node) {
        after.lane_held_for = None;
    }
    let interrupted = !removes_rows || after.drain_interrupted[node];
    after.drain_interrupted[node] = interrupted && !rows_left.is_empty();
    steps.progress(next, || format!("repair row of {} removed", NODE_NAMES[node]));
}

/// The source is down: the row is reversed, so that the target can serve; it holds every acknowledged write.
pub fn reverse(model: &RecordModel, state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    let Some(row) = state.repairs[node] else { return };
    if !model.holds(Rule::LostSourceReversed)
        || !state.nodes[node].up
        || !proxy.behind(node)
        || row.one_way
        || state.nodes[row.source].up
        || proxy.repair[node] != RepairPhase::Idle
        || !proxy.uncertain[node].is_empty()
    {
        return;
    }
    // Half copied over rows that wait, it is neither what it was nor what the source is.
    let mixed = row.begun && !model.config.writes_on(state.payload[node], row.ids).is_empty();
    if mixed && !model.holds(Rule::DrainBeforeRepair) {
        return;
    }
    let mut next = state.clone();
    next.repairs[node] = None;
    next.add_repair(peer_of(node), row.ids, node);
    steps.progress(next, || {
        let (name, source) = (NODE_NAMES[node], NODE_NAMES[row.source]);
        format!("{source} is down: repair row {name}<-{source} reversed")
    });
}
