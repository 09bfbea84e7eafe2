//! The lane: one write at a time, to all usable nodes, decided by a table, covered by rows before the answer.

use super::RecordModel;
use super::rules::RecordRule as Rule;
use super::state::{
    Command, Fate, Lane, LanePhase, NODE_NAMES, NODES, NodeIndex, Outcome, RepairPhase, Request, Sender, Standing,
    State, peer_of,
};
use crate::search::Steps;
use crate::set::Set;

/// The next write of the script: its intent is committed, it is sent.
pub fn take(model: &RecordModel, state: &State, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    let some_usable = (0..NODES).any(|node| proxy.usable(node));
    if !proxy.lane_is_free() || proxy.recovering || state.taken == model.config.script.len() || !some_usable {
        return;
    }
    let write = state.taken;
    let mut next = state.clone();
    next.taken += 1;
    next.fates[write] = Fate::InFlight;
    next.intents |= Set::one(write);
    let mut lane = Lane::idle();
    lane.phase = LanePhase::Sent;
    lane.write = write;
    for node in (0..NODES).filter(|&node| proxy.usable(node)) {
        lane.outcomes[node] = Outcome::Awaited;
        next.nodes[node].requests.push(Request {
            command: Command::Write(write),
            connected: true,
            sender: Sender::Lane,
        });
    }
    next.proxy_mut().lane = lane;
    steps.progress(next, || {
        let to: String = (0..NODES)
            .filter(|&node| proxy.usable(node))
            .map(|node| NODE_NAMES[node])
            .collect();
        format!("W{} {:?}: intent, sent to {to}", write + 1, model.config.kind(write))
    });

    if state.budget.journal > 0 && state.budget.total > 0 {
        for committed in [true, false] {
            let mut next = state.clone();
            next.budget.journal -= 1;
            next.budget.total -= 1;
            next.taken += 1;
            next.fates[write] = Fate::Refused;
            if committed {
                next.intents |= Set::one(write);
            }
            next.proxy_mut().settled |= Set::one(write);
            steps.fault(next, || {
                let n = write + 1;
                format!("W{n}: uncertain commit of the intent (committed: {committed}), 503, not sent")
            });
        }
    }
}

/// The decision table, once every node that was sent the write has an outcome (I16).
pub fn decide(model: &RecordModel, state: &mut State) {
    let proxy = state.proxy_mut();
    let lane = &mut proxy.lane;
    if lane.phase != LanePhase::Sent || lane.outcomes.contains(&Outcome::Awaited) {
        return;
    }
    let first = (0..NODES).find(|&node| lane.outcomes[node] != Outcome::Skipped);
    let lead = first.unwrap_or(1);
    let other = peer_of(lead);
    let outcomes = lane.outcomes.map(|outcome| match outcome {
        Outcome::Skipped => Outcome::Failed,
        sent => sent,
    });
    lane.needs_payload = [false; NODES];
    lane.needs_repair = [false; NODES];
    let mut unknown_on_both = false;
    if outcomes.contains(&Outcome::Refused) {
        match (outcomes[lead], outcomes[other]) {
            (Outcome::Applied, Outcome::Refused) => {
                lane.needs_payload[other] = model.holds(Rule::PayloadBesideRepair);
                lane.needs_repair[other] = true;
                lane.answer = Fate::Acked;
            }
            (Outcome::Refused, Outcome::Applied | Outcome::Unknown) => {
                lane.needs_repair[other] = true;
                lane.answer = Fate::Refused;
            }
            (Outcome::Unknown, Outcome::Refused) => {
                lane.needs_repair[lead] = true;
                lane.answer = Fate::Refused;
            }
            _ => lane.answer = Fate::Refused,
        }
    } else if outcomes.contains(&Outcome::Applied) {
        lane.needs_payload = outcomes.map(|outcome| outcome != Outcome::Applied);
        lane.answer = Fate::Acked;
    } else if outcomes == [Outcome::Failed; NODES] {
        lane.answer = Fate::Refused;
    } else if outcomes == [Outcome::Unknown; NODES] {
        unknown_on_both = true;
        lane.answer = Fate::Indefinite;
    } else {
        lane.needs_payload = [true; NODES];
        lane.answer = Fate::Indefinite;
    }

    for node in 0..NODES {
        let leaves = lane.needs_payload[node] || lane.needs_repair[node] || unknown_on_both;
        if leaves && proxy.standing[node] == Standing::Usable {
            proxy.standing[node] = Standing::Behind;
        }
    }
    let (write, answer) = (lane.write, lane.answer);
    if unknown_on_both {
        lane.phase = LanePhase::UnknownOnBoth;
    } else if lane.needs_payload == [false; NODES] && lane.needs_repair == [false; NODES] {
        proxy.settled |= Set::one(write);
        proxy.lane = Lane::idle();
        state.fates[write] = answer;
    } else {
        lane.phase = LanePhase::Covering;
        if !model.holds(Rule::RowBeforeAck) {
            state.fates[write] = answer;
        }
    }
}

/// The rows of the decided write are committed, and the client is answered.
pub fn cover(model: &RecordModel, state: &State, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    if proxy.lane.phase != LanePhase::Covering {
        return;
    }
    let lane = &proxy.lane;
    let write = lane.write;

    let mut next = state.clone();
    write_payload(lane, &mut next);
    write_repairs(model, lane, &mut next);
    next.fates[write] = answered(model, state, lane.answer);
    let after = next.proxy_mut();
    after.settled |= Set::one(write);
    after.lane = Lane::idle();
    steps.progress(next, || {
        let Lane {
            needs_payload,
            needs_repair,
            answer,
            ..
        } = lane;
        format!(
            "W{} is {answer:?}; payload rows {needs_payload:?}, repair rows {needs_repair:?}",
            write + 1
        )
    });

    if state.budget.journal > 0 && state.budget.total > 0 {
        for committed in [true, false] {
            let next = cover_uncertain(model, state, lane, committed);
            steps.fault(next, || {
                format!(
                    "uncertain commit of the rows of W{} (committed: {committed}), 503",
                    write + 1
                )
            });
        }
    }
}

/// The commit of the rows timed out: 503, and the rows are written again until it is known that they are there.
fn cover_uncertain(model: &RecordModel, state: &State, lane: &Lane, committed: bool) -> State {
    let write = lane.write;
    let mut next = state.clone();
    next.budget.journal -= 1;
    next.budget.total -= 1;
    if committed {
        write_payload(lane, &mut next);
    }
    if model.holds(Rule::RowBeforeAck) {
        next.fates[write] = match lane.answer {
            Fate::Acked => Fate::Indefinite,
            answer => answer,
        };
    }
    // Simplified: repair rows are there at once, also where the commit did not happen.
    write_repairs(model, lane, &mut next);
    let proxy = next.proxy_mut();
    for node in 0..NODES {
        if lane.needs_payload[node] {
            proxy.uncertain[node] |= Set::one(write);
        }
    }
    if !model.holds(Rule::LowWaterNeedsCover) || proxy.uncertain == [Set::EMPTY; NODES] {
        proxy.settled |= Set::one(write);
    }
    proxy.lane = Lane::idle();
    if !model.holds(Rule::UncertainIsRetried) {
        // What a naive mirror does instead: it takes the row for not written, and repairs the node.
        proxy.uncertain = [Set::EMPTY; NODES];
        proxy.settled |= Set::one(write);
        for node in 0..NODES {
            if lane.needs_payload[node] && !lane.needs_payload[peer_of(node)] {
                next.add_repair(node, Set::one(model.config.script[write].id), peer_of(node));
            }
        }
    }
    next
}

fn write_payload(lane: &Lane, state: &mut State) {
    for node in 0..NODES {
        if lane.needs_payload[node] {
            state.payload[node] |= Set::one(lane.write);
        }
    }
}

fn write_repairs(model: &RecordModel, lane: &Lane, state: &mut State) {
    for node in 0..NODES {
        let sound = !model.holds(Rule::SourceIsSound) || state.repairs[peer_of(node)].is_none();
        if lane.needs_repair[node] && sound {
            let id = model.config.script[lane.write].id;
            state.add_repair(node, Set::one(id), peer_of(node));
            if let Some(row) = &mut state.repairs[node] {
                row.one_way = true;
            }
        }
    }
}

/// A lead that was wiped before its 4xx was passed on may not stand for what its peer did: with wipes and refusals
/// together, such a 4xx promises nothing.
fn answered(model: &RecordModel, state: &State, answer: Fate) -> Fate {
    let configured = &model.config.budget;
    let wiped = configured.wipes > 0 && state.budget.wipes == 0;
    match answer {
        Fate::Refused if configured.refusals > 0 && wiped => Fate::Indefinite,
        answer => answer,
    }
}

/// Rows whose commit was uncertain are written again, under the same ids.
pub fn retry_uncertain(state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    let rows = proxy.uncertain[node];
    if rows.is_empty() {
        return;
    }
    let mut next = state.clone();
    next.payload[node] |= rows;
    let proxy = next.proxy_mut();
    proxy.uncertain[node] = Set::EMPTY;
    if (proxy.uncertain[peer_of(node)] & rows).is_empty() {
        proxy.settled |= rows;
    }
    steps.progress(next, || {
        format!("uncertain rows {rows:?} of {} are written again", NODE_NAMES[node])
    });
}

/// A write unknown on both nodes: the first that answers a flush and held everything before is the authority; 504.
pub fn unknown_on_both(model: &RecordModel, state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    if proxy.lane.phase != LanePhase::UnknownOnBoth
        || !state.nodes[node].up
        || !proxy.behind(node)
        || state.has_rows(node)
        || proxy.repair[node] != RepairPhase::Idle
        || proxy.needs_canary[node]
    {
        return;
    }
    let mut next = state.clone();
    if model.holds(Rule::FlushFirst) {
        model.config.reveal(&mut next.nodes[node]);
    }
    let write = proxy.lane.write;
    next.add_repair(peer_of(node), Set::one(model.config.script[write].id), node);
    next.fates[write] = Fate::Indefinite;
    let after = next.proxy_mut();
    after.standing[node] = Standing::Usable;
    after.restarted[node] = false;
    after.settled |= Set::one(write);
    after.lane = Lane::idle();
    steps.progress(next, || {
        let (name, peer) = (NODE_NAMES[node], NODE_NAMES[peer_of(node)]);
        format!(
            "W{} unknown on both: {name} flushed, authority; repair row {peer}<-{name}, 504",
            write + 1
        )
    });
}

/// The mark below which recovery need not look (I13).
pub fn raise_low_water(model: &RecordModel, state: &State, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    if state.low_water < model.config.script.len() && proxy.settled.has(state.low_water) {
        let mut next = state.clone();
        next.low_water += 1;
        steps.progress(next, || format!("low-water mark at {}", state.low_water + 1));
    }
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::*;
    use crate::search::Model;

    /// What is written for A and for B, and what the client is told.
    fn decided(a: Outcome, b: Outcome) -> (&'static str, &'static str, Fate) {
        let model = RecordModel::new(Config::parse("script=u1").unwrap());
        let mut state = model.initial();
        state.fates[0] = Fate::InFlight;
        let lane = &mut state.proxy_mut().lane;
        lane.phase = LanePhase::Sent;
        lane.outcomes = [a, b];
        decide(&model, &mut state);
        let fate = state.fates[0];
        let lane = &state.proxy_mut().lane;
        let rows = |node: NodeIndex| match (lane.needs_payload[node], lane.needs_repair[node]) {
            (false, false) => "-",
            (true, false) => "payload",
            (false, true) => "repair",
            (true, true) => "both",
        };
        match lane.phase {
            LanePhase::Idle => ("-", "-", fate),
            LanePhase::Covering => (rows(0), rows(1), lane.answer),
            LanePhase::UnknownOnBoth => ("flush", "flush", lane.answer),
            LanePhase::Sent => panic!("not decided"),
        }
    }

    /// The table of docs/protocol.md (I16). Where it logs payload rows for two unknown outcomes, the model asks the
    /// nodes instead.
    #[test]
    fn every_cell_of_the_table() {
        use Fate::{Acked, Indefinite, Refused as NotDone};
        use Outcome::{Applied, Failed, Refused, Unknown};
        let table = [
            (Applied, Applied, ("-", "-", Acked)),
            (Applied, Refused, ("-", "both", Acked)),
            (Applied, Failed, ("-", "payload", Acked)),
            (Applied, Unknown, ("-", "payload", Acked)),
            (Refused, Applied, ("-", "repair", NotDone)),
            (Refused, Refused, ("-", "-", NotDone)),
            (Refused, Failed, ("-", "-", NotDone)),
            (Refused, Unknown, ("-", "repair", NotDone)),
            (Failed, Applied, ("payload", "-", Acked)),
            (Failed, Refused, ("-", "-", NotDone)),
            (Failed, Failed, ("-", "-", NotDone)),
            (Failed, Unknown, ("payload", "payload", Indefinite)),
            (Unknown, Applied, ("payload", "-", Acked)),
            (Unknown, Refused, ("repair", "-", NotDone)),
            (Unknown, Failed, ("payload", "payload", Indefinite)),
            (Unknown, Unknown, ("flush", "flush", Indefinite)),
        ];
        for (a, b, expected) in table {
            assert_eq!(decided(a, b), expected, "{a:?} / {b:?}");
        }
    }

    #[test]
    fn a_node_that_was_skipped_counts_as_failed() {
        assert_eq!(
            decided(Outcome::Skipped, Outcome::Applied),
            ("payload", "-", Fate::Acked)
        );
        assert_eq!(
            decided(Outcome::Unknown, Outcome::Skipped),
            ("payload", "payload", Fate::Indefinite)
        );
    }
}
