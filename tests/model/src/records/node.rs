//! What nodes do: carry out requests, answer or not, die, come back.

use super::RecordModel;
use super::lane;
use super::repair;
use super::rules::RecordRule as Rule;
use super::state::{
    Command, Fate, NODE_NAMES, NodeIndex, Outcome, RepairPhase, Request, Sender, Standing, State, peer_of,
};
use crate::search::Steps;
use crate::set::Set;

/// Everything that can happen on a node by itself.
pub fn steps(model: &RecordModel, state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    if state.nodes[node].up {
        for position in 0..state.nodes[node].requests.len() {
            request(model, state, node, position, steps);
        }
        if state.budget.node_kills[node] > 0 && state.budget.total > 0 {
            kill(model, state, node, steps);
        }
    } else if !model.config.dead[node] {
        restart(model, state, node, steps);
    }
}

/// What can become of one request that is on its way to the node or in it.
fn request(model: &RecordModel, state: &State, node: NodeIndex, position: usize, steps: &mut Steps<State>) {
    let request = state.nodes[node].requests[position];
    let Request { command, sender, .. } = request;
    let name = NODE_NAMES[node];
    let taken = || {
        let mut next = state.clone();
        next.nodes[node].requests.remove(position);
        next
    };

    let mut next = taken();
    model.config.execute(&mut next.nodes[node], command);
    if request.connected {
        answer(model, &mut next, node, request, Outcome::Applied, Connection::Done);
        steps.progress(next, || format!("{name} applies {command:?} of {sender:?}, 2xx"));
    } else {
        steps.progress(next, || format!("{name} applies the straggler {command:?}"));
    }
    if !request.connected {
        let mut next = taken();
        next.nodes[node].hidden.push(command);
        steps.progress(next, || format!("{name} commits the straggler {command:?}, hidden"));
        steps.progress(taken(), || format!("{name} never applies the straggler {command:?}"));
        return;
    }
    if state.budget.total == 0 {
        return;
    }
    if state.budget.hidden > 0 {
        let mut next = taken();
        next.budget.hidden -= 1;
        next.budget.total -= 1;
        next.nodes[node].hidden.push(command);
        answer(model, &mut next, node, request, Outcome::Unknown, Connection::Done);
        steps.fault(next, || {
            format!("{name} answers 500 to {command:?} of {sender:?}, committed and hidden")
        });
    }
    if state.budget.network > 0 {
        network_faults(model, state, node, position, steps);
    }
    if state.budget.refusals > 0 && sender == Sender::Lane {
        let mut next = taken();
        next.budget.refusals -= 1;
        next.budget.total -= 1;
        answer(model, &mut next, node, request, Outcome::Refused, Connection::Done);
        steps.fault(next, || format!("{name} answers 4xx to {command:?}"));
    }
}

fn network_faults(model: &RecordModel, state: &State, node: NodeIndex, position: usize, steps: &mut Steps<State>) {
    let request = state.nodes[node].requests[position];
    let Request { command, sender, .. } = request;
    let name = NODE_NAMES[node];
    let spent = || {
        let mut next = state.clone();
        next.budget.network -= 1;
        next.budget.total -= 1;
        next
    };

    if sender != Sender::Abandoned {
        let mut next = spent();
        next.nodes[node].requests.remove(position);
        answer(model, &mut next, node, request, Outcome::Failed, Connection::Done);
        steps.fault(next, || format!("{name}: {command:?} of {sender:?} fails for certain"));
    }
    let mut next = spent();
    next.nodes[node].requests[position].connected = false;
    next.nodes[node].requests[position].sender = Sender::Abandoned;
    if sender != Sender::Abandoned {
        answer(model, &mut next, node, request, Outcome::Unknown, Connection::Pending);
    }
    steps.fault(next, || {
        format!("{name}: the connection of {command:?} of {sender:?} dies, the request is still there")
    });
    // The lane stops waiting for a slow node once another one has applied the write.
    if sender == Sender::Lane
        && let Some(proxy) = &state.proxy
        && proxy.lane.outcomes[peer_of(node)] == Outcome::Applied
    {
        let mut next = spent();
        next.nodes[node].requests[position].sender = Sender::Abandoned;
        answer(model, &mut next, node, request, Outcome::Unknown, Connection::Pending);
        steps.fault(next, || format!("{name} is slow with {command:?}: counts as unknown"));
    }
}

/// kill -9: of the requests under way, any may have been carried out.
fn kill(model: &RecordModel, state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let under_way = state.nodes[node].requests.len();
    for applied in 0..1_u32 << under_way {
        let mut next = state.clone();
        next.budget.node_kills[node] -= 1;
        next.budget.total -= 1;
        let requests = std::mem::take(&mut next.nodes[node].requests);
        for (position, request) in requests.iter().enumerate() {
            if applied >> position & 1 == 1 {
                model.config.execute(&mut next.nodes[node], request.command);
            }
        }
        next.nodes[node].up = false;
        if let Some(proxy) = &mut next.proxy {
            proxy.standing[node] = Standing::Unverified;
            proxy.needs_canary[node] = false;
            proxy.restarted[node] = true;
            proxy.repair[node] = RepairPhase::Idle;
            proxy.lane_held_for = None;
            for &request in &requests {
                if request.connected && matches!(request.sender, Sender::Lane | Sender::Drain) {
                    answer(model, &mut next, node, request, Outcome::Unknown, Connection::Done);
                }
            }
        }
        steps.fault(next, || {
            let applied = applied.count_ones();
            format!(
                "kill -9 {} ({applied} of {under_way} under way applied)",
                NODE_NAMES[node]
            )
        });
    }
}

fn restart(model: &RecordModel, state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let name = NODE_NAMES[node];
    let mut next = state.clone();
    next.nodes[node].up = true;
    model.config.reveal(&mut next.nodes[node]);
    steps.progress(next, || format!("{name} restarts"));

    let emptied = || {
        let mut next = state.clone();
        next.budget.total -= 1;
        next.nodes[node].up = true;
        next.nodes[node].hidden.clear();
        next.nodes[node].records = Default::default();
        next
    };
    if state.budget.snapshots > 0 && state.budget.total > 0 {
        let mut next = emptied();
        next.budget.snapshots -= 1;
        steps.fault(next, || format!("{name} restarts from an old snapshot, same marker"));
    }
    if state.budget.wipes > 0 && state.budget.total > 0 {
        let mut next = emptied();
        next.budget.wipes -= 1;
        next.nodes[node].wiped = true;
        if model.config.budget.refusals > 0 {
            // A refusal that only the wiped node gave: its peer may have applied the write (see `lane::answered`).
            for write in 0..next.fates.len() {
                if next.fates[write] == Fate::Refused && next.intents.has(write) {
                    next.fates[write] = Fate::Indefinite;
                }
            }
        }
        steps.fault(next, || format!("{name} restarts wiped, other marker"));
    }
}

/// Whether the request of an outcome is still with the node.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Connection {
    Done,
    Pending,
}

/// The proxy learns what became of a request.
fn answer(
    model: &RecordModel,
    state: &mut State,
    node: NodeIndex,
    request: Request,
    outcome: Outcome,
    connection: Connection,
) {
    let others_under_way = !state.nodes[node].requests.is_empty();
    let Some(proxy) = &mut state.proxy else { return };
    if connection == Connection::Pending && model.holds(Rule::StragglersAwaited) {
        proxy.needs_canary[node] = true;
    }
    match request.sender {
        Sender::Lane => {
            proxy.lane.outcomes[node] = outcome;
            lane::decide(model, state);
        }
        Sender::Drain => {
            proxy.draining[node] = false;
            if let Command::Write(write) = request.command {
                match outcome {
                    Outcome::Applied => proxy.drained[node] |= Set::one(write),
                    Outcome::Unknown => proxy.drain_interrupted[node] = true,
                    _ => {}
                }
            }
        }
        Sender::Repair => {
            let copying = proxy.repair[node] == RepairPhase::Copying;
            if outcome == Outcome::Applied && copying && state.repairs[node].is_some() {
                repair::copy_next(state, node);
            } else {
                proxy.repair[node] = RepairPhase::Idle;
            }
        }
        Sender::Abandoned => {
            // A late success settles its own row, so that it is not drained again.
            if let (Outcome::Applied, Command::Write(write)) = (outcome, request.command) {
                proxy.drained[node] |= Set::one(write);
            }
            if !others_under_way {
                proxy.needs_canary[node] = false;
            }
        }
    }
}
