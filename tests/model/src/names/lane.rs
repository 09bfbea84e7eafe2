//! The namespace lane: one operation at a time, completed durably before its ack.

use super::NameModel;
use super::config::Op;
use super::rules::NameRule as Rule;
use super::state::{Command, Fate, LanePhase, NODES, NodeIndex, Outcome, Request, Sender, Standing, State};
use crate::search::Steps;
use crate::set::Set;

/// Sends an operation to a node; an outcome if there is nothing to send.
pub fn send(model: &NameModel, state: &mut State, node: NodeIndex, op: usize, sender: Sender) -> Option<Outcome> {
    let uuid = state.catalog[model.config.generation(op)][node];
    let command = match model.config.script[op] {
        Op::Delete => {
            let there = state.nodes[node].collection;
            let meant = there.is_some_and(|collection| collection.uuid == uuid);
            if model.holds(Rule::DeletedById) && !meant {
                return Some(Outcome::Applied);
            }
            Command::DeleteName
        }
        Op::Create => Command::CreateName,
        Op::Add if uuid == 0 => return Some(Outcome::Failed),
        Op::Add => Command::Add(uuid, op),
    };
    state.nodes[node].requests.push(Request {
        command,
        connected: true,
        sender,
        op,
    });
    None
}

/// The next operation of the script: its intent is committed, it is sent.
pub fn take(model: &NameModel, state: &State, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    let some_usable = (0..NODES).any(|node| proxy.usable(node));
    if proxy.phase != LanePhase::Idle || proxy.recovering || state.taken == model.config.script.len() || !some_usable {
        return;
    }
    let op = state.taken;
    let mut next = state.clone();
    next.taken += 1;
    next.fates[op] = Fate::InFlight;
    next.intents |= Set::one(op);
    let after = next.proxy_mut();
    after.phase = LanePhase::Sent;
    after.op = op;
    after.outcomes = [Outcome::Skipped; NODES];
    after.learned = [0; NODES];
    for node in (0..NODES).filter(|&node| proxy.usable(node)) {
        let outcome = send(model, &mut next, node, op, Sender::Lane);
        next.proxy_mut().outcomes[node] = outcome.unwrap_or(Outcome::Awaited);
    }
    decide(model, &mut next);
    steps.progress(next, || {
        format!("{} {:?}: intent, sent", op + 1, model.config.script[op])
    });
}

/// The decision table, once every node has an outcome.
pub fn decide(model: &NameModel, state: &mut State) {
    let proxy = state.proxy_mut();
    if proxy.phase != LanePhase::Sent || proxy.outcomes.contains(&Outcome::Awaited) {
        return;
    }
    let outcomes = proxy.outcomes.map(|outcome| match outcome {
        Outcome::Skipped => Outcome::Failed,
        sent => sent,
    });
    proxy.needs_payload = [false; NODES];
    if outcomes.contains(&Outcome::Applied) {
        proxy.answer = Fate::Acked;
        proxy.needs_payload = outcomes.map(|outcome| outcome != Outcome::Applied);
    } else if outcomes == [Outcome::Failed; NODES] {
        proxy.answer = Fate::Refused;
    } else if outcomes == [Outcome::Unknown; NODES] {
        proxy.answer = Fate::Indefinite;
        for standing in &mut proxy.standing {
            if *standing == Standing::Usable {
                *standing = Standing::Behind;
            }
        }
        proxy.phase = LanePhase::UnknownOnBoth;
        return;
    } else {
        proxy.answer = Fate::Indefinite;
        proxy.needs_payload = [true; NODES];
    }
    for node in 0..NODES {
        if proxy.needs_payload[node] && proxy.usable(node) {
            proxy.standing[node] = Standing::Behind;
        }
    }
    proxy.phase = LanePhase::Completing;
    if proxy.answer == Fate::Acked && !model.holds(Rule::CatalogBeforeAck) {
        let op = proxy.op;
        state.fates[op] = Fate::Acked;
    }
}

/// Rows, catalog and completion in one commit; then the client is answered.
pub fn complete(model: &NameModel, state: &State, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    if proxy.phase != LanePhase::Completing {
        return;
    }
    let op = proxy.op;
    let mut next = state.clone();
    for node in 0..NODES {
        if proxy.needs_payload[node] {
            next.payload[node] |= Set::one(op);
        }
        if proxy.learned[node] != 0 {
            next.catalog[model.config.generation(op)][node] = proxy.learned[node];
        }
    }
    next.fates[op] = proxy.answer;
    if model.holds(Rule::CompletedDurably) {
        next.completed |= Set::one(op);
    }
    let after = next.proxy_mut();
    after.answered |= Set::one(op);
    after.phase = LanePhase::Idle;
    steps.progress(next, || {
        format!(
            "{} completed: {:?}, payload rows {:?}",
            op + 1,
            proxy.answer,
            proxy.needs_payload
        )
    });
}

/// Where completions are not durable before the ack, they become so some time later.
pub fn complete_lazily(model: &NameModel, state: &State, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    if model.holds(Rule::CompletedDurably) {
        return;
    }
    if let Some(op) = (proxy.answered - state.completed).first() {
        let mut next = state.clone();
        next.completed |= Set::one(op);
        steps.progress(next, || format!("completion of {} written late", op + 1));
    }
}
