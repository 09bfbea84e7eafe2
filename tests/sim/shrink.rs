//! Makes a failing plan smaller: what can be left out while it still fails is left out.

use crate::plan::{NodeFault, Phase, Plan, Tuning};
use crate::run::run;

/// So many runs are tried.
const TRIES: usize = 400;

/// The smallest plan found that fails.
pub fn shrink(plan: &Plan) -> Plan {
    let mut best = plan.clone();
    let mut left = TRIES;
    loop {
        let smaller = candidates(&best)
            .into_iter()
            .take_while(|_| {
                left = left.saturating_sub(1);
                left > 0
            })
            .find(|candidate| run(candidate, false).failure.is_some());
        match smaller {
            Some(smaller) => best = smaller,
            None => return best,
        }
    }
}

/// Plans that are a little smaller, the boldest cuts first.
fn candidates(plan: &Plan) -> Vec<Plan> {
    let mut found = vec![];
    let mut with = |change: &dyn Fn(&mut Plan)| {
        let mut smaller = plan.clone();
        change(&mut smaller);
        found.push(smaller);
    };
    for phase in 0..plan.phases.len() {
        if plan.phases.len() > 1 {
            with(&|plan| {
                plan.phases.remove(phase);
            });
        }
    }
    if plan.operations > 1 {
        with(&|plan| plan.operations /= 2);
        with(&|plan| plan.operations = plan.operations * 3 / 4);
        with(&|plan| plan.operations -= 1);
    }
    if plan.clients > 1 {
        with(&|plan| plan.clients -= 1);
    }
    if plan.ids > 1 {
        with(&|plan| plan.ids = 1);
        with(&|plan| plan.ids -= 1);
    }
    if plan.names > 1 {
        with(&|plan| plan.names -= 1);
    }
    if plan.namespace > 0 {
        with(&|plan| plan.namespace = 0);
    }
    // Where requests land after canaries, nodes may differ until then.
    let outlasted = |phase: &Phase| {
        phase
            .nodes
            .iter()
            .flatten()
            .any(|(fault, _)| *fault == NodeFault::Outlasts)
    };
    if plan.patient && !plan.phases.iter().any(outlasted) {
        with(&|plan| plan.patient = false);
    }
    if plan.watchers > 0 {
        with(&|plan| plan.watchers = 0);
        with(&|plan| plan.watchers = 1);
    }
    if plan.tuning != Tuning::USUAL {
        with(&|plan| plan.tuning = Tuning::USUAL);
    }
    if plan.alert {
        with(&|plan| (plan.alert, plan.pace) = (false, 1));
    }
    if plan.pace > 1 {
        with(&|plan| plan.pace = 1);
    }
    if plan.hushed {
        with(&|plan| plan.hushed = false);
    }
    for at in 0..plan.phases.len() {
        let phase = &plan.phases[at];
        let mut cut = |change: &dyn Fn(&mut Phase)| with(&|plan| change(&mut plan.phases[at]));
        for event in 0..phase.events.len() {
            cut(&|phase| {
                phase.events.remove(event);
            });
        }
        for node in 0..2 {
            if !phase.nodes[node].is_empty() {
                cut(&|phase| phase.nodes[node].clear());
            }
            for fault in 0..phase.nodes[node].len() {
                cut(&|phase| {
                    phase.nodes[node].remove(fault);
                });
            }
        }
        if !phase.journal.is_empty() {
            cut(&|phase| phase.journal.clear());
        }
        for fault in 0..phase.journal.len() {
            cut(&|phase| {
                phase.journal.remove(fault);
            });
        }
    }
    found
}
