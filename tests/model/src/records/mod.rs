//! Records of one collection: two nodes, one proxy that may be killed, a journal that lasts.
//!
//! Not modelled: two proxies and the lease, loss of the journal, combining, limits, maintenance, deletes by filter, the
//! dimension, batches that are applied in part, more than two nodes.

mod check;
mod config;
mod drain;
mod lane;
mod node;
mod recovery;
mod repair;
mod rules;
mod script;
mod state;

pub use config::Config;
pub use rules::RecordRule;
use state::{Fate, NODE_NAMES, NODES, State};

use crate::search::{Model, Steps};
use crate::set::Set;

#[derive(Debug, Clone)]
pub struct RecordModel {
    config: Config,
}

impl RecordModel {
    pub fn new(config: Config) -> Self {
        Self { config }
    }

    fn holds(&self, rule: RecordRule) -> bool {
        self.config.rules.hold(rule)
    }
}

impl Model for RecordModel {
    type State = State;
    type Memory = check::Memory;

    fn initial(&self) -> State {
        State::initial(self.config.budget)
    }

    fn steps(&self, state: &State, steps: &mut Steps<State>) {
        for node in 0..NODES {
            node::steps(self, state, node, steps);
        }
        if state.proxy.is_none() {
            recovery::start_proxy(self, state, steps);
            return;
        }
        recovery::kill_proxy(state, steps);
        for node in 0..NODES {
            recovery::canary(state, node, steps);
            recovery::verify_marker(self, state, node, steps);
            recovery::compare_restarted(self, state, node, steps);
            recovery::serve_first(self, state, node, steps);
            repair::reverse(self, state, node, steps);
            drain::send(self, state, node, steps);
            drain::commit(state, node, steps);
            repair::begin(self, state, node, steps);
            repair::finish(self, state, node, steps);
            drain::reconcile_after_interruption(self, state, node, steps);
            recovery::join(self, state, node, steps);
            lane::retry_uncertain(state, node, steps);
            lane::unknown_on_both(self, state, node, steps);
        }
        lane::raise_low_water(self, state, steps);
        lane::take(self, state, steps);
        lane::cover(self, state, steps);
        read(self, state, steps);
    }

    fn violation(&self, memory: &mut check::Memory, state: &State, quiescent: bool) -> Option<String> {
        check::violation(self, memory, state, quiescent)
    }

    fn describe(&self, state: &State) -> String {
        let mut line = String::new();
        for (node, name) in NODE_NAMES.iter().enumerate() {
            let it = &state.nodes[node];
            let records = it.records.map(script::show).join(" ");
            let down = if it.up { "" } else { " down" };
            let hidden = if it.hidden.is_empty() { "" } else { " hidden" };
            let payload = state.payload[node];
            let repair = if state.repairs[node].is_some() { " repair" } else { "" };
            line += &format!("{name} {records}{down}{hidden} {payload:?}{repair}  ");
        }
        line + &format!("low {}", state.low_water)
    }
}

/// A client reads from a usable node and remembers which unacknowledged writes it saw.
fn read(model: &RecordModel, state: &State, steps: &mut Steps<State>) {
    let Some(proxy) = &state.proxy else { return };
    if state.budget.reads == 0 || !proxy.lane_is_free() || proxy.recovering {
        return;
    }
    for node in (0..NODES).filter(|&node| proxy.usable(node) && state.nodes[node].up) {
        let mut seen = Set::EMPTY;
        for write in 0..model.config.script.len() {
            if state.fates[write] == Fate::Indefinite && !state.read.has(write) {
                let mut without = state.fates;
                without[write] = Fate::Refused;
                let id = model.config.script[write].id;
                let value = &state.nodes[node].records[id];
                if !check::allowed(model, &without, id, state.read).contains(value) {
                    seen |= Set::one(write);
                }
            }
        }
        if !seen.is_empty() {
            let mut next = state.clone();
            next.budget.reads -= 1;
            next.read |= seen;
            steps.read(next, || {
                format!("a client reads {seen:?} from {}, unacknowledged", NODE_NAMES[node])
            });
        }
    }
}
