//! Turning a repair around: its source is gone for now, and the node that was to be repaired holds everything that was
//! ever acked (schedule S34).
//!
//! Such rows are about records whose outcome nobody knows: neither value was acked, so either will do, as long as both
//! nodes end with the same. A value that a client has read already may vanish. The same goes for names that are only
//! compared because the node was away; names or collections that a node lacks are never turned around.

use std::sync::Arc;

use super::{Trouble, is_void};
use crate::catalog::Collection;
use crate::cluster::NodeIndex;
use crate::journal::{Change, Commit, RepairKind, RepairRow};
use crate::mirror::{Core, RepairWanted, Scope};

/// The node that all of these rows name as their source.
fn source(core: &Core, rows: &[RepairRow]) -> Option<NodeIndex> {
    let name = rows.first()?.source.as_ref()?;
    let source = core.cluster.index_of(name)?;
    let fits = |row: &RepairRow| {
        row.kind == RepairKind::Records
            && row.reversible
            && row.parked.is_none()
            && row.source.as_ref() == Some(name)
            && !is_void(core, row, source)
    };
    rows.iter().all(fits).then_some(source)
}

fn rows_of(core: &Core, scope: &Scope, node: NodeIndex) -> Vec<RepairRow> {
    let name = &core.cluster.node(node).name;
    let open = core.repairs.lock();
    open.iter()
        .filter(|row| row.generation == scope.generation() && row.node == *name)
        .cloned()
        .collect()
}

/// A node, and its rows, that nothing but `lost` keeps from serving: it would serve if that one were down.
pub(super) fn heir(core: &Core, collection: &Arc<Collection>, lost: NodeIndex) -> Option<(NodeIndex, Vec<RepairRow>)> {
    let scope = Scope::Collection(collection.clone());
    core.cluster.up().filter(|&node| node != lost).find_map(|node| {
        let rows = rows_of(core, &scope, node);
        let pair = &collection.pairs[node];
        let is_free = pair.parked() == 0 && pair.stragglers() == 0 && pair.uncertain() == 0;
        (is_free && collection.node_id(node).is_some() && source(core, &rows) == Some(lost)).then_some((node, rows))
    })
}

/// Whether the rows of a node, all of them, can be turned around: nobody can serve, and their source is down.
pub(super) fn possible(core: &Core, scope: &Scope, node: NodeIndex, rows: &[RepairRow]) -> bool {
    let pair = &scope.pairs(core)[node];
    let (unserved, mapped) = match scope {
        Scope::Namespace => (core.namespace_nodes().is_empty(), true),
        Scope::Collection(collection) => (
            core.usable(collection).is_empty(),
            collection.node_id(node).is_some() && !collection.is_deleted(),
        ),
    };
    source(core, rows).is_some_and(|source| source != node && !core.cluster.node(source).is_up())
        && core.cluster.node(node).is_up()
        && unserved
        && mapped
        && pair.parked() == 0
        && pair.stragglers() == 0
        && pair.uncertain() == 0
}

pub(super) async fn run(core: &Arc<Core>, scope: &Scope, node: NodeIndex) -> Result<(), Trouble> {
    let _alone = core.exclusive_of(scope).await;
    let name = &core.cluster.node(node).name;
    let rows = rows_of(core, scope, node);
    let (true, Some(source)) = (possible(core, scope, node, &rows), source(core, &rows)) else {
        return Ok(());
    };
    // It is going to serve: what it hides comes to light now (S15).
    if let Scope::Collection(collection) = scope
        && !core.flush(collection, node).await
    {
        return Err(Trouble::Wait("a write that makes everything visible failed".to_owned()));
    }
    if core.cluster.node(source).is_up() {
        return Ok(());
    }
    let mut changes: Commit = vec![Change::RemoveRepairs(rows.iter().map(|row| row.id).collect())];
    for row in rows {
        let wanted = RepairWanted {
            kind: RepairKind::Records,
            ids: row.ids,
            source: Some(node),
            reversible: true,
            lsn: row.lsn,
            reason: format!("turned around: {}", row.reason.trim_start_matches("turned around: ")),
        };
        changes.push(core.repair_row(scope, source, wanted));
    }
    tracing::warn!(
        node = name,
        "The source of a repair is down: the repair is turned around."
    );
    core.commit_or_retry(scope, vec![node, source], changes).await;
    Ok(())
}
