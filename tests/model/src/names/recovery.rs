//! Starts of the proxy and of nodes, the drain, and repair of the namespace.

use super::NameModel;
use super::config::Op;
use super::lane;
use super::rules::NameRule as Rule;
use super::state::{
    Collection, Command, Fate, LanePhase, NODE_NAMES, NODES, NodeIndex, Outcome, Proxy, Request, Sender, Standing,
    State,
};
use crate::search::Steps;
use crate::set::Set;

pub fn start_proxy(model: &NameModel, state: &State, steps: &mut Steps<State>) {
    let mut next = state.clone();
    let mut proxy = Proxy::new(true, Standing::Unverified, state.completed);
    proxy.needs_canary = [model.holds(Rule::NameStragglersAwaited); NODES];
    next.proxy = Some(proxy);
    if !model.holds(Rule::InspectedNotReplayed) {
        // What a naive mirror does: every open intent about names is replayed on both nodes.
        let open = state.intents - state.completed;
        let replayed = open.iter().filter(|&op| model.config.script[op] != Op::Add);
        let rows = replayed.fold(Set::EMPTY, |rows, op| rows | Set::one(op));
        for payload in &mut next.payload {
            *payload |= rows;
        }
        next.completed |= open;
    }
    steps.progress(next, || "the proxy starts".into());
}

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

/// What the proxy can do with one node.
pub fn steps(model: &NameModel, state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    let name = NODE_NAMES[node];
    let up = state.nodes[node].up;
    let peer = 1 - node;
    let connected = state.nodes[node].requests.iter().any(|request| request.connected);
    if up && proxy.needs_canary[node] && !connected {
        let mut next = state.clone();
        next.nodes[node].requests.clear();
        next.proxy_mut().needs_canary[node] = false;
        steps.progress(next, || format!("a canary returns from {name}"));
    }
    if up && proxy.standing[node] == Standing::Unverified {
        let mut next = state.clone();
        next.proxy_mut().standing[node] = Standing::Behind;
        steps.progress(next, || format!("marker of {name} verified"));
    }
    let free = up
        && proxy.standing[node] == Standing::Behind
        && !proxy.needs_canary[node]
        && !proxy.draining[node]
        && !proxy.repairing[node]
        && proxy.drained[node].is_none();
    if free && !state.has_rows(node) {
        inspect(model, state, node, steps);
    }
    if free && state.repair[node] && !state.nodes[peer].up && !model.holds(Rule::NamespaceRowStays) {
        let mut next = state.clone();
        next.repair[node] = false;
        next.repair[peer] = true;
        steps.progress(next, || format!("repair row of {name} reversed"));
    }
    if free && !state.repair[node] {
        drain(model, state, node, steps);
    }
    if let Some((op, uuid)) = proxy.drained[node] {
        let mut next = state.clone();
        if uuid != 0 {
            next.catalog[model.config.generation(op)][node] = uuid;
        }
        next.payload[node] -= Set::one(op);
        next.proxy_mut().drained[node] = None;
        steps.progress(next, || format!("row {} of {name} removed", op + 1));
    }
    let source_is_ready = proxy.usable(peer) && state.nodes[peer].up && !proxy.needs_canary[peer];
    if free && state.repair[node] && source_is_ready && proxy.phase == LanePhase::Idle {
        repair(state, node, steps);
    }
    if free && !proxy.recovering && !state.has_rows(node) && proxy.phase == LanePhase::Idle {
        let mut next = state.clone();
        next.proxy_mut().standing[node] = Standing::Usable;
        steps.progress(next, || format!("{name} joins"));
    }
}

/// A collection that a create left behind, and that nobody knows, is entered in the catalog.
fn register(model: &NameModel, state: &mut State, node: NodeIndex, op: usize) {
    if model.config.script[op] == Op::Create
        && let Some(Collection { uuid, .. }) = state.nodes[node].collection
        && state.generation_of(node, uuid).is_none()
    {
        state.catalog[model.config.generation(op)][node] = uuid;
    }
}

/// The first node that serves, after a start or when an operation is unknown on both: what it has is what counts.
fn inspect(model: &NameModel, state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    let (name, peer) = (NODE_NAMES[node], 1 - node);
    if proxy.recovering {
        let mut next = state.clone();
        let open = state.intents - state.completed;
        for op in open.iter() {
            register(model, &mut next, node, op);
        }
        next.completed |= open;
        if !open.is_empty() {
            next.repair[peer] = true;
        }
        let after = next.proxy_mut();
        after.recovering = false;
        after.standing[node] = Standing::Usable;
        steps.progress(next, || {
            format!("recovery: {name} inspected, serves; open intents {open:?}")
        });
    }
    if proxy.phase == LanePhase::UnknownOnBoth {
        let op = proxy.op;
        let mut next = state.clone();
        register(model, &mut next, node, op);
        next.completed |= Set::one(op);
        next.repair[peer] = true;
        next.fates[op] = Fate::Indefinite;
        let after = next.proxy_mut();
        after.phase = LanePhase::Idle;
        after.standing[node] = Standing::Usable;
        steps.progress(next, || {
            format!("{} unknown on both: {name} inspected, authority, 504", op + 1)
        });
    }
}

fn drain(model: &NameModel, state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let Some(op) = state.payload[node].first() else { return };
    let mut next = state.clone();
    match lane::send(model, &mut next, node, op, Sender::Drain) {
        None => next.proxy_mut().draining[node] = true,
        Some(Outcome::Applied) => next.proxy_mut().drained[node] = Some((op, 0)),
        Some(_) => {
            next.payload[node] -= Set::one(op);
            next.repair[node] = true;
        }
    }
    steps.progress(next, || format!("drain of {} on {}", op + 1, NODE_NAMES[node]));
}

/// One step of making a node's namespace that of its peer.
fn repair(state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let peer = 1 - node;
    let source = state.nodes[peer].collection;
    let target = state.nodes[node].collection;
    let wanted = source.and_then(|collection| state.generation_of(peer, collection.uuid));
    let found = target.and_then(|collection| state.generation_of(node, collection.uuid));
    if source.is_some() && wanted.is_none() {
        return;
    }
    let mut next = state.clone();
    let command = match (source, target) {
        (None, None) => None,
        (None, Some(_)) => Some(Command::DeleteName),
        (Some(_), None) => Some(Command::CreateName),
        (Some(source), Some(target)) => {
            if found.is_none() {
                next.catalog[wanted.unwrap_or(0)][node] = target.uuid;
                steps.progress(next, || format!("repair of {}: its UUID is mapped", NODE_NAMES[node]));
                return;
            } else if found != wanted {
                Some(Command::DeleteName)
            } else if source.records != target.records {
                Some(Command::CopyRecords(target.uuid, source.records))
            } else {
                None
            }
        }
    };
    match command {
        Some(command) => {
            next.nodes[node].requests.push(Request {
                command,
                connected: true,
                sender: Sender::Repair,
                op: 0,
            });
            next.proxy_mut().repairing[node] = true;
        }
        None => {
            next.repair[node] = false;
            next.payload[node] = Set::EMPTY;
        }
    }
    steps.progress(next, || match command {
        Some(command) => format!("repair of {}: {command:?}", NODE_NAMES[node]),
        None => format!("repair of {}: equal, rows removed", NODE_NAMES[node]),
    });
}
