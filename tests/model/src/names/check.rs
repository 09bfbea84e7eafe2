//! What has to be true of every state: a usable node shows what the acknowledged operations made of the name, and the
//! nodes show the same when nothing is left to do (I1, I2, I14).

use std::collections::HashSet;

use super::NameModel;
use super::config::{MAX_OPS, Op};
use super::state::{Fate, LanePhase, NODE_NAMES, NODES, NodeIndex, OLD_RECORD, State, Uuid};
use crate::set::Set;

/// What the name stands for: a generation and its records.
type View = Option<(usize, Set)>;

/// A UUID that the catalog does not know.
#[derive(Debug, PartialEq, Eq)]
struct Unknown(Uuid);

fn view(state: &State, node: NodeIndex) -> Result<View, Unknown> {
    match state.nodes[node].collection {
        None => Ok(None),
        Some(collection) => match state.generation_of(node, collection.uuid) {
            Some(generation) => Ok(Some((generation, collection.records))),
            None => Err(Unknown(collection.uuid)),
        },
    }
}

/// What an operation makes of a view.
fn apply(model: &NameModel, before: View, op: usize) -> View {
    let meant = model.config.generation(op);
    match (model.config.script[op], before) {
        (Op::Delete, Some((generation, _))) if generation == meant => None,
        (Op::Create, None) => Some((meant, Set::EMPTY)),
        (Op::Add, Some((generation, records))) if generation == meant => Some((generation, records | Set::one(op))),
        (_, unchanged) => unchanged,
    }
}

/// What a usable node may show: every acknowledged operation is in it, an unknown one may be.
fn allowed(model: &NameModel, fates: &[Fate; MAX_OPS]) -> HashSet<View> {
    let mut views = HashSet::from([Some((0, Set::one(OLD_RECORD)))]);
    for (op, fate) in fates.iter().enumerate().take(model.config.script.len()) {
        let applied = views.iter().map(|&before| apply(model, before, op)).collect();
        match fate {
            Fate::Acked => views = applied,
            Fate::InFlight | Fate::Indefinite => views.extend(applied),
            Fate::NotSent | Fate::Refused => {}
        }
    }
    views
}

pub fn violation(model: &NameModel, state: &State, quiescent: bool) -> Option<String> {
    if state.repair == [true; NODES] {
        return Some("NO AUTHORITY: each node is to be repaired from the other".into());
    }
    if let Some(proxy) = &state.proxy
        && proxy.phase == LanePhase::Idle
        && !proxy.recovering
    {
        let allowed = allowed(model, &state.fates);
        for node in (0..NODES).filter(|&node| proxy.usable(node) && state.nodes[node].up) {
            let shown = view(state, node);
            if !shown.as_ref().is_ok_and(|view| allowed.contains(view)) {
                return Some(format!("STALE OR LOST: {}, usable, shows {shown:?}", NODE_NAMES[node]));
            }
        }
    }
    match quiescent {
        true => wrong_at_rest(model, state),
        false => None,
    }
}

fn wrong_at_rest(model: &NameModel, state: &State) -> Option<String> {
    let Some(proxy) = &state.proxy else {
        return Some("STUCK: no proxy".into());
    };
    let up: Vec<NodeIndex> = (0..NODES).filter(|&node| state.nodes[node].up).collect();
    if up.is_empty() {
        return None;
    }
    let open = || format!("payload {:?}, repairs {:?}", state.payload, state.repair);
    if !up.iter().any(|&node| proxy.usable(node)) {
        return Some(format!("UNAVAILABLE: no usable node, {}", open()));
    }
    if up.len() == NODES {
        let [a, b] = [0, 1].map(|node| view(state, node));
        let in_sync = |node| proxy.usable(node) && !state.has_rows(node);
        if a != b || !(0..NODES).all(in_sync) {
            return Some(format!("DIVERGED OR STUCK: A {a:?} B {b:?}, {}", open()));
        }
    }
    if state.taken < model.config.script.len() || proxy.phase != LanePhase::Idle {
        return Some("STUCK: the lane".into());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::*;

    fn views(script: &str, fates: [Fate; MAX_OPS]) -> HashSet<View> {
        let config = Config::parse(&format!("script={script}")).unwrap();
        allowed(&NameModel::new(config), &fates)
    }

    const NONE: Fate = Fate::NotSent;

    #[test]
    fn delete_and_create_make_another_generation() {
        let seen = views("dcw", [Fate::Acked, Fate::Acked, Fate::Acked, NONE]);
        assert_eq!(seen, HashSet::from([Some((1, Set::one(2)))]));
    }

    #[test]
    fn an_indefinite_delete_leaves_both() {
        let seen = views("d", [Fate::Indefinite, NONE, NONE, NONE]);
        assert_eq!(seen, HashSet::from([None, Some((0, Set::one(OLD_RECORD)))]));
    }

    #[test]
    fn a_create_of_a_name_that_is_taken_changes_nothing() {
        let seen = views("c", [Fate::Acked, NONE, NONE, NONE]);
        assert_eq!(seen, HashSet::from([Some((0, Set::one(OLD_RECORD)))]));
    }
}
