//! One name in the namespace: it is deleted, created again, and records are added, while nodes and proxy may die.
//!
//! Not modelled: rename, databases and tenants, `reset`, several names at once.

mod check;
mod config;
mod lane;
mod node;
mod recovery;
mod rules;
mod state;

pub use config::Config;
pub use rules::NameRule;
use state::{NODE_NAMES, NODES, State};

use crate::search::{Model, Steps};

#[derive(Debug, Clone)]
pub struct NameModel {
    config: Config,
}

impl NameModel {
    pub fn new(config: Config) -> Self {
        Self { config }
    }

    fn holds(&self, rule: NameRule) -> bool {
        self.config.rules.hold(rule)
    }
}

impl Model for NameModel {
    type State = State;
    type Memory = ();

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
            recovery::steps(self, state, node, steps);
        }
        lane::complete_lazily(self, state, steps);
        lane::take(self, state, steps);
        lane::complete(self, state, steps);
    }

    fn violation(&self, (): &mut (), state: &State, quiescent: bool) -> Option<String> {
        check::violation(self, state, quiescent)
    }

    fn describe(&self, state: &State) -> String {
        let mut line = String::new();
        for (node, name) in NODE_NAMES.iter().enumerate() {
            let it = &state.nodes[node];
            let collection = it.collection.map_or("-".into(), |found| {
                let generation = state.generation_of(node, found.uuid);
                let generation = generation.map_or("?".into(), |generation| generation.to_string());
                format!("generation {generation} {:?}", found.records)
            });
            let down = if it.up { "" } else { " down" };
            let payload = state.payload[node];
            let repair = if state.repair[node] { " repair" } else { "" };
            line += &format!("{name} {collection}{down} {payload:?}{repair}  ");
        }
        line
    }
}
