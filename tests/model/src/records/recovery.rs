//! Starts: of the proxy, and of a node as the proxy sees it, up to the moment when the node serves.

use super::RecordModel;
use super::rules::RecordRule as Rule;
use super::state::{
    Fate, LanePhase, NODE_NAMES, NODES, NodeIndex, Proxy, RepairPhase, RepairRow, Sender, Standing, State, peer_of,
};
use crate::search::Steps;
use crate::set::Set;

/// A proxy starts with what the journal holds.
pub fn start_proxy(model: &RecordModel, state: &State, steps: &mut Steps<State>) {
    let mut proxy = Proxy::new(true, Standing::Unverified);
    let open_intents = !open_intents(state).is_empty();
    for node in 0..NODES {
        proxy.drain_interrupted[node] = !state.payload[node].is_empty();
        let clean = !open_intents && !state.has_rows(node);
        proxy.needs_canary[node] = model.holds(Rule::StragglersAwaited)
            && model.holds(Rule::CanaryAtStart)
            && (model.holds(Rule::CanaryEvenIfClean) || !clean);
    }
    let mut next = state.clone();
    next.proxy = Some(proxy);
    steps.progress(next, || "the proxy starts".into());
}

/// kill -9 of the proxy: its connections are gone, the requests are not.
pub fn kill_proxy(state: &State, steps: &mut Steps<State>) {
    if state.budget.proxy_kills == 0 || state.budget.total == 0 {
        return;
    }
    let mut next = state.clone();
    next.budget.proxy_kills -= 1;
    next.budget.total -= 1;
    next.proxy = None;
    for fate in &mut next.fates {
        if *fate == Fate::InFlight {
            *fate = Fate::Indefinite;
        }
    }
    for request in next.nodes.iter_mut().flat_map(|node| &mut node.requests) {
        request.connected = false;
        request.sender = Sender::Abandoned;
    }
    steps.fault(next, || "kill -9 of the proxy".into());
}

/// Intents that the low-water mark has not passed.
fn open_intents(state: &State) -> Set {
    state.intents - Set::below(state.low_water)
}

/// A canary write returns: what was on its way before it has landed, or never will.
pub fn canary(state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    let connected = state.nodes[node].requests.iter().any(|request| request.connected);
    if !state.nodes[node].up || !proxy.needs_canary[node] || connected {
        return;
    }
    let mut next = state.clone();
    next.nodes[node].requests.clear();
    next.proxy_mut().needs_canary[node] = false;
    steps.progress(next, || format!("a canary returns from {}", NODE_NAMES[node]));
}

/// The marker of a node is read; another one than remembered means that it lost everything.
pub fn verify_marker(model: &RecordModel, state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    if !state.nodes[node].up || proxy.standing[node] != Standing::Unverified {
        return;
    }
    let mut next = state.clone();
    next.proxy_mut().standing[node] = Standing::Behind;
    if !state.nodes[node].wiped {
        steps.progress(next, || format!("marker of {} verified", NODE_NAMES[node]));
        return;
    }
    let peer = peer_of(node);
    next.nodes[node].wiped = false;
    if next.repairs[peer].is_some_and(|row| row.source == node) {
        next.repairs[peer] = None;
    }
    next.repairs[node] = Some(RepairRow {
        ids: model.config.ids(),
        source: peer,
        one_way: true,
        begun: false,
    });
    steps.progress(next, || {
        format!("marker of {} changed: repair row for everything", NODE_NAMES[node])
    });
}

/// A node that restarted is compared with its peer before it serves.
pub fn compare_restarted(model: &RecordModel, state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    if !state.nodes[node].up
        || !proxy.behind(node)
        || !proxy.restarted[node]
        || proxy.recovering
        || (model.holds(Rule::RestartRowBetweenWrites) && proxy.lane.phase != LanePhase::Idle)
    {
        return;
    }
    let peer = peer_of(node);
    let name = NODE_NAMES[node];
    let mut next = state.clone();
    next.proxy_mut().restarted[node] = false;
    if !model.holds(Rule::RestartedIsCompared) {
        steps.progress(next, || format!("{name} restarted: not compared"));
    } else if proxy.usable(peer) {
        if !state.intents.is_empty() {
            next.add_repair(node, model.config.ids(), peer);
        }
        steps.progress(next, || {
            format!(
                "{name} restarted: repair row {name}<-{} for the intents",
                NODE_NAMES[peer]
            )
        });
    } else if model.holds(Rule::LastNodeServes) && state.repairs[node].is_none() {
        steps.progress(next, || format!("{name} restarted, no usable peer: taken as it is"));
    }
}

/// The first node that serves after a start of the proxy: what open intents name is made equal to it elsewhere.
pub fn serve_first(model: &RecordModel, state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    if !proxy.recovering
        || !state.nodes[node].up
        || !proxy.behind(node)
        || state.has_rows(node)
        || proxy.needs_canary[node]
        || proxy.draining[node]
        || proxy.repair[node] != RepairPhase::Idle
        || proxy.drain_interrupted[node]
    {
        return;
    }
    let peer = peer_of(node);
    let mut next = state.clone();
    if model.holds(Rule::FlushFirst) {
        model.config.reveal(&mut next.nodes[node]);
    }
    let open = match model.holds(Rule::OpenIntentsReconciled) {
        true => open_intents(state),
        false => Set::EMPTY,
    };
    let ids = model.config.ids_of(open);
    let peer_is_there = state.nodes[peer].up && proxy.behind(peer);
    if !ids.is_empty() && (model.holds(Rule::SourceFixedAtRecovery) || peer_is_there) {
        next.add_repair(peer, ids, node);
    }
    let after = next.proxy_mut();
    after.recovering = false;
    after.standing[node] = Standing::Usable;
    after.settled |= state.intents;
    if proxy.behind(peer) {
        after.restarted[peer] = false;
    }
    steps.progress(next, || {
        let (name, peer) = (NODE_NAMES[node], NODE_NAMES[peer]);
        format!("recovery: {name} flushed, serves; repair row {peer}<-{name} for {ids:?}")
    });
}

/// A node joins: nothing is open between it and the collection.
pub fn join(model: &RecordModel, state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    let rows = match model.holds(Rule::InSyncAfterCommit) {
        true => state.payload[node],
        false => state.payload[node] - proxy.drained[node],
    };
    if !state.nodes[node].up
        || !proxy.behind(node)
        || proxy.recovering
        || !rows.is_empty()
        || !proxy.uncertain[node].is_empty()
        || state.repairs[node].is_some()
        || proxy.needs_canary[node]
        || proxy.draining[node]
        || proxy.repair[node] != RepairPhase::Idle
        || proxy.drain_interrupted[node]
        || proxy.restarted[node]
        || !proxy.lane_is_free()
    {
        return;
    }
    let mut next = state.clone();
    next.proxy_mut().standing[node] = Standing::Usable;
    steps.progress(next, || format!("{} joins", NODE_NAMES[node]));
}
