//! The event log: what it shows, and the events that are seen only by looking (design.md 10).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::state::{NodeState, gather};
use super::status::time;
use crate::chroma::Generation;
use crate::env::within;
use crate::events::Kind;
use crate::journal::{EventRecord, RepairKind};
use crate::mirror::Core;

/// Changes within this time are one.
const PAUSE: Duration = Duration::from_secs(1);
/// A look at least this often: not everything is announced.
const TICK: Duration = Duration::from_secs(5);

/// An event as JSON; its id is a string, because not every reader has numbers of 64 bits.
pub fn shown(event: &EventRecord) -> Value {
    json!({
        "id": event.id.to_string(),
        "at": time(event.at),
        "kind": event.kind,
        "node": event.node,
        "who": event.who,
        "what": event.what,
    })
}

/// The last events, newest first.
pub fn recent(core: &Core) -> Value {
    core.events().recent().iter().map(shown).collect()
}

/// What is compared from look to look.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Seen {
    in_sync: bool,
    rows: u64,
    repairs: u64,
    /// Lanes that are being copied.
    copies: BTreeSet<Option<Generation>>,
}

impl Seen {
    fn of(core: &Core, node: &str, state: &NodeState) -> Self {
        let repairs = core.repairs.lock();
        let copies = repairs
            .iter()
            .filter(|row| row.node == node && matches!(row.kind, RepairKind::Whole | RepairKind::Rebuild))
            .map(|row| row.generation);
        Self {
            in_sync: state.in_sync(),
            rows: state.rows,
            repairs: state.repairs,
            copies: copies.collect(),
        }
    }
}

/// Records that nodes fell behind, were drained or copied, and that the log went away, for as long as the process lives.
pub async fn keep_watch(core: Arc<Core>) {
    let look = |core: &Core| -> Vec<Seen> {
        let states = gather(core);
        let nodes = core.cluster.nodes().iter().zip(&states);
        nodes.map(|(node, state)| Seen::of(core, &node.name, state)).collect()
    };
    let mut changes = core.cluster.watch_changes();
    let mut before = look(&core);
    let mut most = vec![0; before.len()];
    let (mut available, mut fenced) = (true, false);
    loop {
        changes.mark_unchanged();
        let now = look(&core);
        for (index, (was, is)) in before.iter().zip(&now).enumerate() {
            let name = &core.cluster.node(index).name;
            most[index] = most[index].max(is.rows);
            let record = |kind: Kind, what: String| core.events().record(kind, Some(name), None, what);
            if was.in_sync && !is.in_sync {
                record(
                    Kind::OutOfSync,
                    format!("it is out of step: {} entries, {} repairs", is.rows, is.repairs),
                );
            }
            if was.rows > 0 && is.rows == 0 {
                record(
                    Kind::Drained,
                    format!("its backlog is gone; it was {} entries at most", most[index]),
                );
                most[index] = 0;
            }
            for lane in was.copies.difference(&is.copies) {
                record(Kind::Resynced, format!("{} was copied to it", name_of(&core, *lane)));
            }
            if !was.in_sync && is.in_sync {
                record(Kind::InSync, "it is in step with everything".to_owned());
            }
        }
        before = now;
        let record = |kind: Kind, what: &str| core.events().record(kind, None, None, what);
        let is_fenced = core.log.is_fenced();
        if is_fenced && !std::mem::replace(&mut fenced, is_fenced) {
            record(Kind::Leader, "another proxy has taken over the log");
        }
        let is_available = core.log.is_available() || is_fenced;
        if std::mem::replace(&mut available, is_available) != is_available {
            match is_available {
                true => record(Kind::LogBack, "the log answers again"),
                false => record(Kind::LogAway, "the log does not answer"),
            }
        }
        core.env.sleep(PAUSE).await;
        let _ = within(&core.env, TICK, changes.changed()).await;
    }
}

fn name_of(core: &Core, lane: Option<Generation>) -> String {
    match lane.map(|generation| core.catalog.by_generation(generation)) {
        None => "the list of names".to_owned(),
        Some(None) => "a collection that is gone".to_owned(),
        Some(Some(collection)) => format!("the collection {}", collection.facts().name),
    }
}
