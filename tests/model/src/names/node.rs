//! What nodes do: carry out requests, answer or not, die, come back.

use super::NameModel;
use super::lane;
use super::rules::NameRule as Rule;
use super::state::{Collection, Command, NODE_NAMES, NodeIndex, Outcome, Request, Sender, Standing, State, Uuid};
use crate::search::Steps;

/// Everything that can happen on a node by itself.
pub fn steps(model: &NameModel, state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    if state.nodes[node].up {
        for position in 0..state.nodes[node].requests.len() {
            request(model, state, node, position, steps);
        }
        if state.budget.node_kills[node] > 0 && state.budget.total > 0 {
            kill(model, state, node, steps);
        }
    } else if !model.config.dead[node] {
        let mut next = state.clone();
        next.nodes[node].up = true;
        steps.progress(next, || format!("{} restarts", NODE_NAMES[node]));
    }
}

fn request(model: &NameModel, state: &State, node: NodeIndex, position: usize, steps: &mut Steps<State>) {
    let request = state.nodes[node].requests[position];
    let Request { command, sender, .. } = request;
    let name = NODE_NAMES[node];
    let taken = || {
        let mut next = state.clone();
        next.nodes[node].requests.remove(position);
        next
    };

    let mut next = taken();
    let executed = execute(model, &mut next, node, request);
    if request.connected {
        let (outcome, uuid) = match executed {
            Ok(uuid) => (Outcome::Applied, uuid),
            Err(Refused) => (Outcome::Failed, 0),
        };
        answer(model, &mut next, node, request, outcome, uuid);
    }
    steps.progress(next, || match executed {
        Ok(_) => format!("{name} applies {command:?} of {sender:?}"),
        Err(Refused) => format!("{name} answers 4xx to {command:?} of {sender:?}"),
    });

    if !request.connected {
        steps.progress(taken(), || format!("{name} never applies the straggler {command:?}"));
    } else if state.budget.network > 0 && state.budget.total > 0 && sender != Sender::Abandoned {
        let mut next = taken();
        next.budget.network -= 1;
        next.budget.total -= 1;
        answer(model, &mut next, node, request, Outcome::Failed, 0);
        steps.fault(next, || format!("{name}: {command:?} of {sender:?} fails for certain"));

        let mut next = state.clone();
        next.budget.network -= 1;
        next.budget.total -= 1;
        let pending = &mut next.nodes[node].requests[position];
        pending.connected = false;
        pending.sender = Sender::Abandoned;
        if let (Some(proxy), true) = (&mut next.proxy, model.holds(Rule::NameStragglersAwaited)) {
            proxy.needs_canary[node] = true;
        }
        answer(model, &mut next, node, request, Outcome::Unknown, 0);
        steps.fault(next, || {
            format!("{name}: the connection of {command:?} of {sender:?} dies, the request is still there")
        });
    }
}

fn kill(model: &NameModel, state: &State, node: NodeIndex, steps: &mut Steps<State>) {
    let under_way = state.nodes[node].requests.len();
    for applied in 0..1_u32 << under_way {
        let mut next = state.clone();
        next.budget.node_kills[node] -= 1;
        next.budget.total -= 1;
        let requests = std::mem::take(&mut next.nodes[node].requests);
        for (position, &request) in requests.iter().enumerate() {
            if applied >> position & 1 == 1 {
                let _ = execute(model, &mut next, node, request);
            }
        }
        next.nodes[node].up = false;
        if let Some(proxy) = &mut next.proxy {
            proxy.standing[node] = Standing::Unverified;
            proxy.needs_canary[node] = false;
        }
        for request in requests.into_iter().filter(|request| request.connected) {
            answer(model, &mut next, node, request, Outcome::Unknown, 0);
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

/// 4xx.
struct Refused;

/// Carries out a request; a create gives a UUID, everything else 0.
fn execute(model: &NameModel, state: &mut State, node: NodeIndex, request: Request) -> Result<Uuid, Refused> {
    let there = state.nodes[node].collection;
    match request.command {
        Command::DeleteName => {
            state.nodes[node].collection = None;
            Ok(0)
        }
        Command::CreateName => match there {
            None => {
                let node = &mut state.nodes[node];
                let uuid = node.next_uuid;
                node.next_uuid += 1;
                node.collection = Some(Collection {
                    uuid,
                    records: Default::default(),
                });
                Ok(uuid)
            }
            // 409: the proxy asks for the UUID behind the name.
            Some(Collection { uuid, .. }) => {
                let generation = state.generation_of(node, uuid);
                let ours = generation.is_none() || generation == Some(model.config.generation(request.op));
                match ours || !model.holds(Rule::AlreadyOnlyIfOurs) {
                    true => Ok(uuid),
                    false => Err(Refused),
                }
            }
        },
        Command::Add(uuid, record) => change(state, node, uuid, |collection| {
            collection.records |= crate::set::Set::one(record);
        }),
        Command::CopyRecords(uuid, records) => change(state, node, uuid, |collection| collection.records = records),
    }
}

fn change(
    state: &mut State,
    node: NodeIndex,
    uuid: Uuid,
    change: impl FnOnce(&mut Collection),
) -> Result<Uuid, Refused> {
    match &mut state.nodes[node].collection {
        Some(collection) if collection.uuid == uuid => {
            change(collection);
            Ok(0)
        }
        _ => Err(Refused),
    }
}

/// The proxy learns what became of a request.
fn answer(model: &NameModel, state: &mut State, node: NodeIndex, request: Request, outcome: Outcome, uuid: Uuid) {
    let others_under_way = !state.nodes[node].requests.is_empty();
    let Some(proxy) = &mut state.proxy else { return };
    match request.sender {
        Sender::Lane => {
            proxy.outcomes[node] = outcome;
            proxy.learned[node] = uuid;
            lane::decide(model, state);
        }
        Sender::Drain => {
            proxy.draining[node] = false;
            if outcome == Outcome::Applied {
                proxy.drained[node] = Some((request.op, uuid));
            }
        }
        Sender::Repair => proxy.repairing[node] = false,
        Sender::Abandoned => {
            if !others_under_way {
                proxy.needs_canary[node] = false;
            }
        }
    }
}
