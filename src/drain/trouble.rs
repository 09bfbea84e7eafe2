//! What becomes of entries that a node fails on or refuses.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::step::finish;
use super::{ATTEMPTS, End, LAST_ATTEMPTS, Step, record};
use crate::cluster::NodeIndex;
use crate::journal::{Change, PayloadRow};
use crate::mirror::{Agreement, Core, RepairWanted, Scope};

/// A request broke. Its rows are in doubt, and nothing is sent before a canary has returned; its records are suspect, as
/// after any other request of unknown outcome (schedule S11). If the node is alive all the same, it may be the request that
/// it cannot bear, and that counts as an attempt.
pub(super) async fn broke(core: &Arc<Core>, node: NodeIndex, scope: &Scope, rows: &[PayloadRow]) -> Step {
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
pub(super) async fn failed(core: &Arc<Core>, node: NodeIndex, scope: &Scope, row: &PayloadRow, why: &str) -> Step {
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
    let is_undecided = core.is_undecided(row.lsn);
    let is_whole = scope.pairs(core)[node].repairs() == 0;
    if let Scope::Collection(collection) = scope
        && is_undecided
        && is_whole
    {
        // No node had taken it and its client was told so: whatever this one has of it now is what the others get
        // (schedule S21).
        if !core.flush(collection, node).await {
            core.suspect_collection(collection, node);
            return Step::Stop(End::Pause);
        }
        core.compare_outcome(row.lsn, false);
        let ids = record::ids_of(row);
        let wanted = RepairWanted {
            reversible: ids.is_some(),
            ..RepairWanted::records(ids, row.lsn, reason)
        };
        let changes = others_follow(core, node, scope, wanted);
        return finish(core, node, scope, std::slice::from_ref(row), changes).await;
    }
    if core.authority_is_away(scope, node) {
        return Step::Stop(End::Pause);
    }
    if scope.generation().is_some() && core.another_has_authority(scope, node) {
        if is_undecided {
            // It is for the node that holds everything to say.
            core.abstain(row.lsn);
        } else {
            core.compare_outcome(row.lsn, false);
        }
        let wanted = RepairWanted::records(record::ids_of(row), row.lsn, reason);
        let repair = core.repair_row(scope, node, wanted);
        return finish(core, node, scope, std::slice::from_ref(row), vec![repair]).await;
    }
    needs_repair(core, node, scope, row, reason).await
}

/// Repairs of the other nodes, from this one.
pub(super) fn others_follow(core: &Core, node: NodeIndex, scope: &Scope, wanted: RepairWanted) -> Vec<Change> {
    let wanted = RepairWanted {
        source: Some(node),
        ..wanted
    };
    let others = (0..core.cluster.len()).filter(|&other| other != node);
    others
        .map(|other| core.repair_row(scope, other, wanted.clone()))
        .collect()
}

/// What to do with an entry that the node refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// Who took it is away, and may come back without it.
    WaitForOthers,
    /// It was acked, and nobody else has it.
    Keep,
    /// It has no effect anywhere, or none that a client was told of.
    Drop,
    /// Another node has it.
    Repair,
    /// Another node has it, but not everything, and no client was told that it was done: that one loses it.
    OthersFollow,
}

pub(super) fn refused(core: &Core, node: NodeIndex, scope: &Scope, row: &PayloadRow) -> Refused {
    match core.agreement(row.lsn, false) {
        Agreement::Agrees => Refused::Drop,
        _ if core.authority_is_away(scope, node) => Refused::WaitForOthers,
        _ if core.another_has_authority(scope, node) => Refused::Repair,
        Agreement::Accepted if others_had_it_to_do(core, node, scope, row) => Refused::Drop,
        Agreement::Accepted => Refused::Keep,
        // Neither holds everything: two repairs from each other would wait for ever.
        Agreement::Disagrees if scope.pairs(core)[node].repairs() > 0 => Refused::Repair,
        Agreement::Disagrees => Refused::OthersFollow,
    }
}

/// Takes away the row of an entry that has no effect here. The others, which may have it to do still, are expected to
/// refuse it too: their rows say so, because this process may not live to compare what they make of it.
pub(super) async fn drop_refused(core: &Arc<Core>, node: NodeIndex, scope: &Scope, row: &PayloadRow) -> Step {
    let others = core.cluster.nodes().iter().filter(|other| other.index != node);
    let marks = others.map(|other| Change::MarkRefused {
        node: other.name.clone(),
        lsn: row.lsn,
    });
    // Two that mark each other's row and remove their own would wait for each other in the database.
    let _one_at_a_time = core.marking.lock().await;
    finish(core, node, scope, std::slice::from_ref(row), marks.collect()).await
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
pub(super) async fn needs_repair(
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
pub(super) async fn last_resort(
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
