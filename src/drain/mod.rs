//! The drain: brings a node that missed entries back in step.
//!
//! One service per node. Rows are applied in order within a lane; lanes side by side. A step's rows are removed by a
//! commit before the next step is sent (schedule S32), so a crash repeats at most one step, and a step is one upstream
//! request of one kind, which is idempotent on its own (chroma-facts.md 3.1). The last rows are applied while holding
//! the lane, so that the node joins it exactly between two writes (design.md R1).
//!
//! Record rows of a collection wait until the node has the collection, which the namespace's own rows see to; they are
//! addressed by the node's UUID, so a rename does not concern them and a delete makes them moot. Beyond that the
//! namespace needs no barrier here.
//!
//! A connection error ends the work on that node without blame: it goes on when the node is up again. An answer that a
//! node had failed counts an attempt; after some, the lane gets a repair row.

mod brake;
mod combine;
mod limits;
mod namespace;
mod record;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::chroma::{BatchLimits, Generation, Op};
use crate::cluster::NodeIndex;
use crate::fault;
use crate::journal::{Change, PayloadRow};
use crate::mirror::{Agreement, Core, RepairWanted, Scope};

pub use brake::Foreground;
pub use limits::keep_limits;

/// After so many answers that the node failed, an entry is left to repair.
pub(crate) const ATTEMPTS: i32 = 5;
/// The last node that could hold everything is asked this often, with growing pauses: that takes about ten minutes.
/// Then the entry is parked.
pub(crate) const LAST_ATTEMPTS: i32 = 25;
/// A lane is handed over to live writes when what is left takes at most so many requests: its writers wait meanwhile. While
/// clients write, batches are small and come to little, and each counts.
const HANDOVER_STEPS: usize = 8;
const WATCHED_HANDOVER_STEPS: usize = 1;
/// After so many rounds it is looked whether the backlog still shrinks; if not, writers are faster and the lane is taken.
const PATIENCE: usize = 20;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
const FENCE_LIMIT: Duration = Duration::from_secs(60);
const TICK: Duration = Duration::from_secs(1);

/// How work on a lane ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The node is in step with the lane, or nothing more can be done for it here.
    Done,
    /// Something failed that may pass.
    Pause,
}

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Applied,
    Stop(End),
}

type Key = Option<Generation>;

/// Drains one node for as long as the process lives.
pub async fn drain_node(core: Arc<Core>, node: NodeIndex) {
    let active: Arc<Mutex<BTreeSet<Key>>> = Arc::default();
    let pauses: Arc<Mutex<BTreeMap<Key, (Duration, Duration)>>> = Arc::default();
    let mut changes = core.cluster.watch_changes();
    let mut was_up = false;
    loop {
        changes.mark_unchanged();
        let up = core.cluster.node(node).is_up();
        if up && !was_up {
            pauses.lock().clear();
        }
        was_up = up;
        if up && !core.drain_paused.load(Ordering::SeqCst) && !core.log.is_fenced() {
            for (key, scope) in work(&core, node) {
                if active.lock().len() >= core.settings.drain_concurrency {
                    break;
                }
                let now = core.env.now();
                let waits = pauses.lock().get(&key).is_some_and(|(until, _)| now < *until);
                if waits || active.lock().contains(&key) {
                    continue;
                }
                // One at a time: a repair of this lane on this node applies rows as well.
                let Some(claim) = core.repairing.claim_for_drain(&core, node, key) else {
                    continue;
                };
                active.lock().insert(key);
                let (core, active, pauses) = (core.clone(), active.clone(), pauses.clone());
                core.env.clone().spawn(Box::pin(async move {
                    let _claim = claim;
                    let end = drain_lane(&core, node, &scope).await;
                    match end {
                        End::Done => pauses.lock().remove(&key),
                        End::Pause => {
                            let mut pauses = pauses.lock();
                            let pause = pauses
                                .get(&key)
                                .map_or(FIRST_PAUSE, |(_, last)| (*last * 2).min(LONGEST_PAUSE));
                            pauses.insert(key, (core.env.now() + pause, pause))
                        }
                    };
                    active.lock().remove(&key);
                    core.cluster.announce_change();
                }));
            }
        }
        tokio::select! {
            biased;
            _ = changes.changed() => {}
            () = core.env.sleep(TICK) => {}
        }
    }
}

/// Lanes of this node that can be drained now, the namespace first.
fn work(core: &Core, node: NodeIndex) -> Vec<(Key, Scope)> {
    let keys: Vec<_> = core
        .behind
        .lock()
        .range((node, None)..(node + 1, None))
        .map(|(_, key)| *key)
        .collect();
    let mut found = Vec::new();
    for key in keys {
        let scope = match key {
            None => Scope::Namespace,
            Some(generation) => match core.catalog.by_generation(generation) {
                Some(collection) => Scope::Collection(collection),
                None => continue,
            },
        };
        let pair = &scope.pairs(core)[node];
        {
            // Whoever adds a row counts it first and names the lane here then.
            let mut behind = core.behind.lock();
            if pair.pending() == 0 {
                behind.remove(&(node, key));
                continue;
            }
        }
        let reachable = match &scope {
            Scope::Namespace => true,
            Scope::Collection(collection) => collection.node_id(node).is_some(),
        };
        if pair.drainable() && reachable {
            found.push((key, scope));
        }
    }
    found
}

fn goes_on(core: &Core, node: NodeIndex) -> bool {
    core.cluster.node(node).is_up() && !core.drain_paused.load(Ordering::SeqCst)
}

/// Applies a lane's rows to the node until it is in step or something stops it.
async fn drain_lane(core: &Arc<Core>, node: NodeIndex, scope: &Scope) -> End {
    let mut fenced = false;
    let mut rounds = 0;
    let mut pending_then = u64::MAX;
    let _draining = core.foreground.drain(core.env.now());
    while goes_on(core, node) {
        let pair = &scope.pairs(core)[node];
        if !pair.drainable() {
            return End::Done;
        }
        let Ok(rows) = read(core, node, scope).await else {
            return End::Pause;
        };
        if pair.needs_fence() || (!fenced && rows.iter().any(|row| row.in_doubt)) {
            // What may still be on its way has landed when a canary sent after it has returned.
            let canary = crate::env::within(&core.env, FENCE_LIMIT, core.cluster.node(node).canary()).await;
            match canary {
                Some(Ok(())) => {
                    fenced = true;
                    pair.fenced();
                }
                _ => return End::Pause,
            }
        }
        rounds += 1;
        let steps = combine::plan(&rows, limits(core)).len();
        let is_rest = rows.len() as u64 >= pair.pending() && steps <= handover_steps(core);
        let losing = rounds % PATIENCE == 0 && std::mem::replace(&mut pending_then, pair.pending()) <= pair.pending();
        if is_rest || losing {
            match hand_over(core, node, scope).await {
                Some(end) => return end,
                None => continue,
            }
        }
        if let Step::Stop(end) = apply_rows(core, node, scope, &rows, Pace::Braked).await {
            return end;
        }
    }
    End::Pause
}

/// Applies what is left while nothing is added, and lets the node join.
///
/// Live writes wait meanwhile, so the lane is given back (`None`: not the end yet) when the grace period is over or the
/// node goes down; a request that is under way then becomes a straggler like any other.
async fn hand_over(core: &Arc<Core>, node: NodeIndex, scope: &Scope) -> Option<End> {
    let Some(alone) = core.exclusive_of(scope).await else {
        return Some(End::Pause);
    };
    let grace = core.env.sleep(core.settings.mirror_grace);
    tokio::pin!(grace);
    loop {
        let pair = &scope.pairs(core)[node];
        if pair.pending() > 0 && !pair.drainable() {
            return Some(End::Done);
        }
        let Ok(rows) = read(core, node, scope).await else {
            return Some(End::Pause);
        };
        if rows.is_empty() {
            nothing_left(core, node, scope);
            tracing::info!(
                node = core.cluster.node(node).name,
                generation = scope.generation(),
                "The node is in step with the lane."
            );
            core.cluster.announce_change();
            return Some(End::Done);
        }
        match apply_in_time(core, node, scope, rows, &mut grace).await {
            Ok(Some(Step::Applied)) => {}
            Ok(Some(Step::Stop(end))) => return Some(end),
            Ok(None) => return Some(End::Pause),
            Err(late) => {
                pair.straggler_started();
                core.cluster.node(node).straggler_started();
                drop(alone);
                let step = late.await;
                pair.straggler_ended();
                core.cluster.node(node).straggler_ended();
                return match step {
                    Ok(Step::Applied) => None,
                    Ok(Step::Stop(end)) => Some(end),
                    Err(_) => Some(End::Pause),
                };
            }
        }
    }
}

/// Nothing is added while the lane is held: that there are no rows is the truth, whatever was counted.
fn nothing_left(core: &Core, node: NodeIndex, scope: &Scope) {
    fault::point("drain-joining");
    scope.pairs(core)[node].drained();
    core.behind.lock().remove(&(node, scope.generation()));
}

/// Applies rows by a job that runs on when the limit is over or the node goes down: then this gives its receiver.
async fn apply_in_time(
    core: &Arc<Core>,
    node: NodeIndex,
    scope: &Scope,
    rows: Vec<PayloadRow>,
    limit: &mut (impl Future<Output = ()> + Unpin),
) -> Result<Option<Step>, oneshot::Receiver<Step>> {
    let (done, mut applied) = oneshot::channel();
    let (job, its_scope) = (core.clone(), scope.clone());
    core.spawn_job(async move {
        let _ = done.send(apply_rows(&job, node, &its_scope, &rows, Pace::Unbraked).await);
    });
    tokio::select! {
        biased;
        step = &mut applied => Ok(step.ok()),
        () = core.cluster.node(node).until_down() => Err(applied),
        () = limit => Err(applied),
    }
}

/// Applies everything that is left, for a repair that holds the lane and has claimed it from the drain. True: the node
/// misses nothing but what the repair is about.
pub(crate) async fn drain_rest(core: &Arc<Core>, node: NodeIndex, scope: &Scope) -> bool {
    let pair = &scope.pairs(core)[node];
    let mut limit = core.env.sleep(core.settings.mirror_grace);
    loop {
        let Ok(rows) = read(core, node, scope).await else {
            return false;
        };
        if rows.is_empty() {
            nothing_left(core, node, scope);
            return true;
        }
        if !pair.drainable() {
            return false;
        }
        match apply_in_time(core, node, scope, rows, &mut limit).await {
            Ok(Some(Step::Applied)) => {}
            Ok(_) => return false,
            Err(late) => {
                let straggler = core.straggler(scope, node);
                core.env.spawn(Box::pin(async move {
                    let _ = late.await;
                    drop(straggler);
                }));
                return false;
            }
        }
    }
}

async fn read(core: &Core, node: NodeIndex, scope: &Scope) -> Result<Vec<PayloadRow>, crate::journal::JournalError> {
    let name = &core.cluster.node(node).name;
    let settings = &core.settings;
    core.log
        .journal()
        .payloads(name, scope.generation(), settings.drain_rows, settings.drain_bytes)
        .await
}

fn handover_steps(core: &Core) -> usize {
    let factor = core.settings.drain_foreground_factor;
    match core.foreground.is_watched(core.env.now(), factor) {
        true => WATCHED_HANDOVER_STEPS,
        false => HANDOVER_STEPS,
    }
}

/// What one request may hold now: while clients write, it is small.
fn limits(core: &Core) -> BatchLimits {
    let settings = &core.settings;
    let factor = settings.drain_foreground_factor;
    BatchLimits {
        records: core.foreground.batch(core.env.now(), factor, settings.drain_rows),
        bytes: settings.drain_bytes,
    }
}

/// Whether there are pauses between steps. Whoever holds the lane makes none: its writers wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pace {
    Braked,
    Unbraked,
}

impl Pace {
    /// A step with so many records is over.
    async fn stepped(self, core: &Core, records: usize, begun: Duration) {
        let (now, factor) = (core.env.now(), core.settings.drain_foreground_factor);
        let took = now.saturating_sub(begun);
        core.foreground.applied(now, records, took, factor);
        if self == Self::Braked {
            let pause = core.foreground.pause(now, took, factor);
            if !pause.is_zero() {
                core.env.sleep(pause).await;
            }
        }
    }
}

async fn apply_rows(core: &Arc<Core>, node: NodeIndex, scope: &Scope, rows: &[PayloadRow], pace: Pace) -> Step {
    if let Some(parked) = rows.iter().find(|row| row.parked.is_some()) {
        tracing::debug!(id = %parked.id, "A parked entry blocks this lane.");
        let pair = &scope.pairs(core)[node];
        if pair.parked() == 0 {
            // The answer to the commit that parked it was lost.
            pair.add_parked(1);
        }
        return Step::Stop(End::Done);
    }
    match scope {
        Scope::Namespace => {
            for row in rows {
                if let stop @ Step::Stop(_) = namespace::apply(core, node, row).await {
                    return stop;
                }
            }
        }
        Scope::Collection(collection) => {
            let mut rest = rows;
            while let Some(step) = combine::first(rest, limits(core)) {
                let (rows, later) = rest.split_at(step.rows.end);
                let (records, begun) = (step.records, core.env.now());
                if let stop @ Step::Stop(_) = record::apply(core, node, collection, rows, step).await {
                    return stop;
                }
                pace.stepped(core, records, begun).await;
                rest = later;
                if pace == Pace::Braked && !goes_on(core, node) {
                    return Step::Stop(End::Pause);
                }
            }
        }
    }
    Step::Applied
}

/// Removes rows that are done, with what else has to be durable at the same moment.
pub(crate) async fn finish(
    core: &Arc<Core>,
    node: NodeIndex,
    scope: &Scope,
    rows: &[PayloadRow],
    mut changes: Vec<Change>,
) -> Step {
    fault::point("drain-answered");
    changes.push(Change::RemovePayloads(rows.iter().map(|row| row.id).collect()));
    if !core.commit_or_retry(scope, vec![node], changes).await {
        return Step::Stop(End::Pause);
    }
    fault::point("drain-committed");
    let bytes = rows.iter().map(|row| row.body.len() as u64).sum();
    let last = rows.last().map(|row| row.created_at.timestamp_micros());
    scope.pairs(core)[node].remove_pending(rows.len() as u64, bytes, last);
    core.counters.replayed.fetch_add(rows.len() as u64, Ordering::Relaxed);
    Step::Applied
}

/// A request broke. Its rows are in doubt, and nothing is sent before a canary has returned; its records are suspect, as
/// after any other request of unknown outcome (schedule S11). If the node is alive all the same, it may be the request that
/// it cannot bear, and that counts as an attempt.
pub(crate) async fn broke(core: &Arc<Core>, node: NodeIndex, scope: &Scope, rows: &[PayloadRow]) -> Step {
    scope.pairs(core)[node].require_fence();
    let doubt: Vec<_> = rows.iter().map(|row| Change::MarkInDoubt(row.id)).collect();
    match scope.generation() {
        Some(generation) => {
            let ids = rows.iter().filter_map(record::ids_of).flatten().collect();
            core.put_suspects(node, generation, ids, doubt).await;
        }
        None => drop(core.log.commit(&doubt).await),
    }
    match rows.first() {
        Some(row) if core.is_alive(node).await => failed(core, node, scope, row, "the connection was closed").await,
        _ => Step::Stop(End::Pause),
    }
}

/// The node said that it failed: counts that, and after some attempts leaves the lane to repair.
pub(crate) async fn failed(core: &Arc<Core>, node: NodeIndex, scope: &Scope, row: &PayloadRow, why: &str) -> Step {
    core.counters.failed_replays.fetch_add(1, Ordering::Relaxed);
    tracing::warn!(
        node = core.cluster.node(node).name,
        lsn = row.lsn,
        attempts = row.attempts,
        why,
        "A replay failed."
    );
    if row.attempts + 1 < ATTEMPTS {
        let _ = core.log.commit(&vec![Change::CountAttempt(row.id)]).await;
        return Step::Stop(End::Pause);
    }
    let reason = format!("an entry could not be replayed: {why}");
    if let Scope::Collection(collection) = scope
        && core.is_undecided(row.lsn)
    {
        // No node had taken it and its client was told so: whatever this one has of it now is what the others get
        // (schedule S21).
        if !core.flush(collection, node).await {
            core.suspect_collection(collection, node);
            return Step::Stop(End::Pause);
        }
        core.compare_outcome(row.lsn, false);
        let others = (0..core.cluster.len()).filter(|&other| other != node);
        let changes = others
            .map(|other| {
                let ids = record::ids_of(row);
                let wanted = RepairWanted {
                    source: Some(node),
                    reversible: ids.is_some(),
                    ..RepairWanted::records(ids, row.lsn, reason.clone())
                };
                core.repair_row(scope, other, wanted)
            })
            .collect();
        return finish(core, node, scope, std::slice::from_ref(row), changes).await;
    }
    if core.authority_is_away(scope, node) {
        return Step::Stop(End::Pause);
    }
    if scope.generation().is_some() && core.another_has_authority(scope, node) {
        core.compare_outcome(row.lsn, false);
        let wanted = RepairWanted::records(record::ids_of(row), row.lsn, reason);
        let repair = core.repair_row(scope, node, wanted);
        return finish(core, node, scope, std::slice::from_ref(row), vec![repair]).await;
    }
    needs_repair(core, node, scope, row, reason).await
}

/// What to do with an entry that the node refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Who took it is away, and may come back without it.
    WaitForOthers,
    /// It was acked, and nobody else has it.
    Keep,
    /// It has no effect anywhere, or none that a client was told of.
    Drop,
    /// Another node has it.
    Repair,
}

pub(crate) fn refused(core: &Core, node: NodeIndex, scope: &Scope, row: &PayloadRow) -> Refused {
    match core.agreement(row.lsn, false) {
        Agreement::Agrees => Refused::Drop,
        _ if core.authority_is_away(scope, node) => Refused::WaitForOthers,
        _ if core.another_has_authority(scope, node) => Refused::Repair,
        Agreement::Accepted if !others_had_it_to_do(core, node, scope, row) => Refused::Keep,
        _ => Refused::Drop,
    }
}

/// Whether each other node is repaired because of this very entry: nobody had taken it then, so no client was told that
/// it was done.
fn others_had_it_to_do(core: &Core, node: NodeIndex, scope: &Scope, row: &PayloadRow) -> bool {
    let repairs = core.repairs.lock();
    core.cluster
        .nodes()
        .iter()
        .filter(|other| other.index != node)
        .all(|other| {
            let mut its = repairs.iter().filter(|repair| repair.node == other.name);
            its.any(|repair| repair.generation == scope.generation() && repair.lsn == row.lsn)
        })
}

/// Writes a repair row: this node is out of this lane until the repair is done.
pub(crate) async fn needs_repair(
    core: &Arc<Core>,
    node: NodeIndex,
    scope: &Scope,
    row: &PayloadRow,
    reason: String,
) -> Step {
    if core.authority_is_away(scope, node) {
        return Step::Stop(End::Pause);
    }
    if !core.another_has_authority(scope, node) {
        return last_resort(core, node, scope, row, reason).await;
    }
    let repair = core.repair_row(scope, node, RepairWanted::whole(row.lsn, reason));
    core.commit_or_retry(scope, vec![node], vec![repair]).await;
    Step::Stop(End::Done)
}

/// No other node could repair this one: the last that holds everything is never given up (R2). It goes on trying,
/// visibly behind, and parks the entry in the end: someone has to decide.
pub(crate) async fn last_resort(
    core: &Arc<Core>,
    node: NodeIndex,
    scope: &Scope,
    row: &PayloadRow,
    reason: String,
) -> Step {
    tracing::error!(
        node = core.cluster.node(node).name,
        reason,
        attempts = row.attempts,
        "No other node could repair this one."
    );
    if let Scope::Collection(collection) = scope {
        core.suspect_collection(collection, node);
    }
    if row.attempts + 1 < LAST_ATTEMPTS {
        let _ = core.log.commit(&vec![Change::CountAttempt(row.id)]).await;
        return Step::Stop(End::Pause);
    }
    let park = Change::Park {
        id: row.id,
        reason: format!("{reason} (and no other node has everything)"),
    };
    if core.log.commit(&vec![park]).await.is_err() {
        return Step::Stop(End::Pause);
    }
    scope.pairs(core)[node].add_parked(1);
    Step::Stop(End::Done)
}

/// Records that a row speaks of; `None`: not records, or it cannot be told.
pub(crate) fn records_of(row: &PayloadRow) -> Option<Vec<String>> {
    record::ids_of(row)
}

/// Records that a request speaks of.
pub(crate) fn records_in(op: &Op, body: &Bytes) -> Option<Vec<String>> {
    record::ids_in(op, body)
}
