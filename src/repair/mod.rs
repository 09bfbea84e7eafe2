//! Repair: making a node equal to another where the log alone cannot.
//!
//! One service per node carries out that node's open repair rows, lane by lane. What is read of a source is read between
//! two writes of the lane, after both nodes were flushed, and the commit that ends a repair removes only rows that were
//! there before that read (rule R5, schedules S17, S30). Only a node in step with the lane is a source (rule R2).
//!
//! `records` mends some records in the lane; `whole` copies a collection while it is written to; `verify` compares
//! and overwrites nothing; `names` makes the namespace equal. A repair that fails is followed by a stronger one, and at
//! the end by a parked row that waits for a person.

mod breaker;
mod compare;
pub mod jobs;
mod names;
mod props;
mod read;
mod records;
mod reverse;
mod state;
mod verify;
mod whole;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;

use crate::catalog::Collection;
use crate::cluster::NodeIndex;
use crate::config::Heal;
use crate::journal::{Change, Commit, RepairKind, RepairRow};
use crate::mirror::{Core, RepairWanted, Scope};

pub(crate) use names::level_databases;
use records::Job;
pub(crate) use records::MOST_IN_LANE;
pub use state::{Claim, Key, Progress, Repairing};

/// So often a kind of repair is tried before a stronger one takes its place.
const TRIES: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_secs(1);
/// The drain goes first as long as there is more than this; the rest is drained while the lane's writers wait.
const LEFT_TO_DRAIN: u64 = 500;
const WATCHED_LEFT_TO_DRAIN: u64 = 16;

/// Why a repair did not come to its end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Trouble {
    /// Nobody's fault: something has to change first, or somebody interrupted.
    #[error("{0}")]
    Wait(String),
    /// The source cannot give what is needed; nothing was done to the target because of it.
    #[error("the source: {0}")]
    Source(String),
    #[error("the node: {0}")]
    Target(String),
    /// The target does not have the collection.
    #[error("the node does not have the collection")]
    Absent,
    #[error("too many records to be compared while their lane waits")]
    TooMany,
    /// Nobody's fault: writers are faster than a copy.
    #[error("more was written meanwhile than could be followed")]
    Overtaken,
    /// The target's collection can be made equal only by making it anew.
    #[error("the node's collection has to be made anew: {0}")]
    Incurable(String),
}

/// Reads every record of a collection from a node, vectors too: it could give all of it to another.
///
/// # Errors
/// Why it could not.
pub(crate) async fn read_everything(
    core: &Arc<Core>,
    collection: &Arc<Collection>,
    node: NodeIndex,
) -> Result<(), String> {
    let job = Job {
        core: core.clone(),
        collection: collection.clone(),
        source: node,
        target: node,
    };
    whole::read_through(&job, whole::Strict::Yes)
        .await
        .map_err(|trouble| trouble.to_string())
}

/// Whether all repair rests.
fn is_paused(core: &Core) -> bool {
    core.drain_paused.load(Ordering::SeqCst) || !core.log.is_available()
}

/// Of `rows`, those that are still open. To be asked while holding the lane, before the source is read (S30).
fn still_open(core: &Core, rows: &[RepairRow]) -> Vec<RepairRow> {
    let open = core.repairs.lock();
    rows.iter()
        .filter(|row| open.iter().any(|known| known.id == row.id && known.parked.is_none()))
        .cloned()
        .collect()
}

/// One lane's work.
struct Work {
    key: Key,
    scope: Scope,
    rows: Vec<RepairRow>,
    how: How,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Records(NodeIndex),
    Verify(NodeIndex),
    /// Also `Rebuild`.
    Whole(NodeIndex),
    Namespace(NodeIndex),
    Reverse,
}

/// Repairs one node for as long as the process lives.
pub async fn repair_node(core: Arc<Core>, node: NodeIndex) {
    // A comparison gives its claim back for a while and is under way all the same.
    let running: Arc<Mutex<BTreeSet<Key>>> = Arc::default();
    let pauses: Arc<Mutex<BTreeMap<Key, (Duration, Duration)>>> = Arc::default();
    let mut changes = core.cluster.watch_changes();
    let mut were_up: Vec<NodeIndex> = vec![];
    loop {
        changes.mark_unchanged();
        let up: Vec<NodeIndex> = core.cluster.up().collect();
        if up.iter().any(|node| !were_up.contains(node)) {
            pauses.lock().clear();
        }
        were_up = up;
        drop_moot(&core, node).await;
        let work = match core.cluster.node(node).is_up() && !is_paused(&core) {
            true => work(&core, node),
            false => vec![],
        };
        core.repairing
            .keep_turns(node, &work.iter().map(|work| work.key).collect());
        for work in work {
            if running.lock().len() >= core.settings.repair_concurrency {
                break;
            }
            let now = core.env.now();
            let waits = pauses.lock().get(&work.key).is_some_and(|(until, _)| now < *until);
            if waits || running.lock().contains(&work.key) {
                continue;
            }
            let Some(claim) = core.repairing.claim(&core, node, work.key) else {
                continue;
            };
            running.lock().insert(work.key);
            let (core, pauses, running) = (core.clone(), pauses.clone(), running.clone());
            core.env.clone().spawn(Box::pin(async move {
                let mut claim = Some(claim);
                let outcome = carry_out(&core, node, &work, &mut claim).await;
                core.repairing.end(node, work.key);
                let ended = conclude(&core, node, &work, outcome).await;
                if ended {
                    pauses.lock().remove(&work.key);
                } else {
                    let mut pauses = pauses.lock();
                    let pause = pauses
                        .get(&work.key)
                        .map_or(FIRST_PAUSE, |(_, last)| (*last * 2).min(LONGEST_PAUSE));
                    pauses.insert(work.key, (core.env.now() + pause, pause));
                }
                running.lock().remove(&work.key);
                drop(claim);
                core.cluster.announce_change();
            }));
        }
        tokio::select! {
            biased;
            _ = changes.changed() => {}
            () = core.env.sleep(TICK) => {}
        }
    }
}

/// Rows of collections that are gone: one that was written while its collection was deleted has nobody to take it away.
async fn drop_moot(core: &Arc<Core>, node: NodeIndex) {
    let name = &core.cluster.node(node).name;
    let is_gone = |generation| {
        core.catalog
            .by_generation(generation)
            .is_none_or(|one| one.is_deleted())
    };
    let rows = core
        .repairs
        .lock()
        .iter()
        .filter(|row| row.node == *name && row.generation.is_some_and(is_gone))
        .map(|row| row.id)
        .collect::<Vec<_>>();
    if !rows.is_empty() && core.log.is_available() {
        let changes = vec![Change::RemoveRepairs(rows)];
        // What fails is tried again at the next turn.
        if core.log.commit(&changes).await.is_ok() {
            core.apply(&changes);
        }
    }
}

/// Why a repair is not under way, for people; `None`: nothing is known to be in its way.
pub fn waits_for(core: &Core, row: &RepairRow) -> Option<String> {
    let (scope, node) = core.find(row.generation, &row.node)?;
    let pair = &scope.pairs(core)[node];
    let sources = match &scope {
        Scope::Namespace => core.namespace_nodes(),
        Scope::Collection(collection) => core.usable(collection),
    };
    let names_first = row.generation.is_some() && row.kind.holds_rows() && !core.namespace.pairs[node].in_sync();
    let reason = if row.parked.is_some() || core.repairing.progress_of(node, row.generation).is_some() {
        return None;
    } else if !core.cluster.node(node).is_up() {
        "the node is down"
    } else if is_paused(core) {
        "repairs are paused, or the log does not answer"
    } else if pair.stragglers() > 0 || pair.uncertain() > 0 {
        "something is still on its way to the node, or to the log"
    } else if choose(core, node, &sources, std::slice::from_ref(row)).is_none() {
        "no node that it may be copied from is in step"
    } else if names_first {
        "the node is not in step with the namespace"
    } else if pair.copies() == 0 && pair.pending() > left_to_drain(core) {
        "what the node missed is drained first"
    } else if pair.copies() == 0 && core.foreground.defers_repairs(core.env.now(), node) {
        "the node is drained, and writers of this collection would wait for both"
    } else {
        return core
            .repairing
            .failure_of(node, row.generation)
            .map(|failure| failure.last);
    };
    Some(reason.to_owned())
}

/// What can be repaired on this node now, names first.
fn work(core: &Core, node: NodeIndex) -> Vec<Work> {
    let name = &core.cluster.node(node).name;
    let mut lanes: BTreeMap<Key, Vec<RepairRow>> = BTreeMap::new();
    for row in core.repairs.lock().iter().filter(|row| row.node == *name) {
        lanes.entry(row.generation).or_default().push(row.clone());
    }
    lanes
        .into_iter()
        .filter_map(|(key, rows)| lane_work(core, node, key, rows))
        .collect()
}

fn lane_work(core: &Core, node: NodeIndex, key: Key, rows: Vec<RepairRow>) -> Option<Work> {
    let (scope, _) = core.find(key, &core.cluster.node(node).name)?;
    let pair = &scope.pairs(core)[node];
    if pair.stragglers() > 0 || pair.uncertain() > 0 {
        return None;
    }
    let (how, rows) = match &scope {
        _ if reverse::possible(core, &scope, node, &rows) => (How::Reverse, rows),
        Scope::Namespace => {
            let rows: Vec<_> = rows.into_iter().filter(|row| row.parked.is_none()).collect();
            if pair.copies() == 0 && pair.pending() > LEFT_TO_DRAIN {
                return None;
            }
            let (source, rows) = choose(core, node, &core.namespace_nodes(), &rows)?;
            (How::Namespace(source), rows)
        }
        Scope::Collection(collection) => {
            if collection.is_deleted() {
                return None;
            }
            collection_work(core, node, collection, rows)?
        }
    };
    Some(Work { key, scope, rows, how })
}

fn collection_work(
    core: &Core,
    node: NodeIndex,
    collection: &Collection,
    rows: Vec<RepairRow>,
) -> Option<(How, Vec<RepairRow>)> {
    let pair = &collection.pairs[node];
    let open: Vec<_> = rows.into_iter().filter(|row| row.parked.is_none()).collect();
    let usable = core.usable(collection);
    if open.iter().any(|row| row.kind.holds_rows()) {
        // What it replaces has been replaced with it.
        let (source, rows) = choose(core, node, &usable, &open)?;
        let replaces = rows.iter().any(|row| row.kind.holds_rows());
        return (replaces && core.namespace.pairs[node].in_sync()).then_some((How::Whole(source), rows));
    }
    let now = core.env.now();
    if pair.pending() > left_to_drain(core) || core.foreground.defers_repairs(now, node) {
        return None;
    }
    let of_kind = |kind| open.iter().filter(|row| row.kind == kind).cloned().collect::<Vec<_>>();
    if let Some((source, rows)) = choose(core, node, &usable, &of_kind(RepairKind::Records)) {
        return Some((How::Records(source), rows));
    }
    let (source, rows) = choose(core, node, &usable, &of_kind(RepairKind::Verify))?;
    Some((How::Verify(source), rows))
}

fn left_to_drain(core: &Core) -> u64 {
    match core.foreground.is_watched(core.env.now()) {
        true => WATCHED_LEFT_TO_DRAIN,
        false => LEFT_TO_DRAIN,
    }
}

/// The first usable node that some of the rows take as their source, and those rows.
fn choose(
    core: &Core,
    node: NodeIndex,
    usable: &[NodeIndex],
    rows: &[RepairRow],
) -> Option<(NodeIndex, Vec<RepairRow>)> {
    usable.iter().filter(|&&source| source != node).find_map(|&source| {
        let rows: Vec<_> = rows.iter().filter(|row| takes(core, row, source)).cloned().collect();
        (!rows.is_empty()).then_some((source, rows))
    })
}

/// A row that names a source takes no other, unless that one has become another server (schedule S36).
fn takes(core: &Core, row: &RepairRow, source: NodeIndex) -> bool {
    match row.source.as_ref().map(|name| core.cluster.index_of(name)) {
        None | Some(None) => true,
        Some(Some(named)) => named == source || is_void(core, row, named),
    }
}

/// The source that a row names is not the server any more that it was then.
fn is_void(core: &Core, row: &RepairRow, named: NodeIndex) -> bool {
    row.source_marker.is_some() && row.source_marker != core.cluster.node(named).marker()
}

async fn carry_out(core: &Arc<Core>, node: NodeIndex, work: &Work, claim: &mut Option<Claim>) -> Result<(), Trouble> {
    let collection = match (&work.scope, work.how) {
        (scope, How::Reverse) => return reverse::run(core, scope, node).await,
        (Scope::Namespace, How::Namespace(source)) => return names::run(core, source, node, &work.rows).await,
        (Scope::Namespace, _) => return Ok(()),
        (Scope::Collection(collection), _) => collection,
    };
    let job = |source| Job {
        core: core.clone(),
        collection: collection.clone(),
        source,
        target: node,
    };
    match work.how {
        How::Records(source) => {
            let ids: usize = work.rows.iter().flat_map(|row| &row.ids).map(Vec::len).sum();
            if ids > records::MOST_IN_LANE {
                return Err(Trouble::TooMany);
            }
            records::run(&job(source), &work.rows).await
        }
        How::Verify(source) => verify::run(&job(source), &work.rows, claim).await,
        How::Whole(source) => whole::run(&job(source), &work.rows).await,
        How::Reverse | How::Namespace(_) => Ok(()),
    }
}

/// Draws the conclusions. True: this lane is done, or has another repair now.
async fn conclude(core: &Arc<Core>, node: NodeIndex, work: &Work, outcome: Result<(), Trouble>) -> bool {
    let name = &core.cluster.node(node).name;
    let Err(trouble) = outcome else {
        core.repairing.succeeded(node, work.key);
        return true;
    };
    let kind = match work.how {
        How::Records(_) => RepairKind::Records,
        How::Verify(_) => RepairKind::Verify,
        How::Namespace(_) | How::Whole(_) | How::Reverse => {
            let rebuilds = work.rows.iter().any(|row| row.kind == RepairKind::Rebuild);
            if rebuilds {
                RepairKind::Rebuild
            } else {
                RepairKind::Whole
            }
        }
    };
    if matches!(trouble, Trouble::Wait(_) | Trouble::Overtaken) {
        core.repairing.note(node, work.key, kind, &trouble.to_string());
        tracing::debug!(node = name, generation = work.key, why = %trouble, "A repair waits.");
        return false;
    }
    tracing::warn!(node = name, generation = work.key, how = ?work.how, why = %trouble, "A repair failed.");
    let next = match (&trouble, kind) {
        (Trouble::Absent | Trouble::TooMany, RepairKind::Records | RepairKind::Verify) => Some(RepairKind::Whole),
        (Trouble::Incurable(_), RepairKind::Records | RepairKind::Whole) => Some(RepairKind::Rebuild),
        (Trouble::Source(_), _) => {
            core.repairing.note(node, work.key, kind, &trouble.to_string());
            if let (Scope::Collection(collection), How::Records(source)) = (&work.scope, work.how) {
                core.suspect_collection(collection, source);
            }
            return false;
        }
        _ if core.repairing.failed(node, work.key, kind, &trouble.to_string()) < TRIES => return false,
        (_, RepairKind::Records) => Some(RepairKind::Whole),
        (_, RepairKind::Whole) if work.key.is_some() => Some(RepairKind::Rebuild),
        _ => None,
    };
    let done = match next {
        Some(kind) => replace(core, node, work, kind, &trouble).await,
        None => park(core, work, &trouble).await,
    };
    if done {
        core.repairing.succeeded(node, work.key);
    }
    done
}

/// Puts a stronger repair in the place of what failed.
async fn replace(core: &Arc<Core>, node: NodeIndex, work: &Work, kind: RepairKind, trouble: &Trouble) -> bool {
    let _alone = core.exclusive_of(&work.scope).await;
    let open = still_open(core, &work.rows);
    if open.is_empty() {
        return true;
    }
    if !core.another_has_authority(&work.scope, node) {
        tracing::error!(why = %trouble, "No other node could repair this one.");
        return false;
    }
    let wanted = RepairWanted {
        kind,
        ..RepairWanted::whole(core.log.next_lsn(), format!("a repair did not do: {trouble}"))
    };
    let mut row = core.new_repair(node, work.key, wanted);
    if kind == RepairKind::Rebuild && core.settings.heal == Heal::Manual {
        row.parked = Some("heal is manual".to_owned());
    }
    let changes: Commit = vec![
        Change::InsertRepair(row),
        Change::RemoveRepairs(open.iter().map(|row| row.id).collect()),
    ];
    core.commit_or_retry(&work.scope, vec![node], changes).await
}

/// Leaves it to a person.
async fn park(core: &Arc<Core>, work: &Work, trouble: &Trouble) -> bool {
    let reason = trouble.to_string();
    let park = |row: &RepairRow| Change::ParkRepair {
        id: row.id,
        reason: reason.clone(),
    };
    let changes: Commit = still_open(core, &work.rows).iter().map(park).collect();
    tracing::error!(generation = work.key, reason, "A repair waits for a person.");
    core.commit_or_retry(&work.scope, vec![], changes).await
}

/// Lanes that `node` is to be repaired in.
pub(crate) type Keys = BTreeSet<Key>;
