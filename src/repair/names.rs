//! Making the namespace of one node equal: tenants, databases, collections and their names.
//!
//! Done while holding the namespace lane. What a node lacks is created there, or gets a repair row of its own; what
//! belongs to a deleted generation is deleted; what nobody knows is made known, never deleted. One commit ends it: the
//! rows found at the beginning and the payload rows of the lane go, the rows of the collections come.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use http::Method;
use serde_json::json;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::compare::mend_metadata;
use super::read::{Object, describe};
use super::{Trouble, still_open};
use crate::catalog::Collection;
use crate::chroma::{CollectionObject, Generation, OWN_TENANT, Op, node_path, parse_names};
use crate::cluster::{NodeIndex, NodeRequest, NodeResponse};
use crate::drain::drain_rest;
use crate::journal::{Change, Commit, Hold, RepairKind, RepairRow};
use crate::mirror::{Core, RepairWanted, Scope, WIPED};

type Place = (String, String);

/// Collections that the drain has asked a node to create, by place and name: the answer is missing.
type Created = BTreeMap<(String, String, String), Generation>;

/// Between whom, and how, names are made equal.
struct Level<'a> {
    core: &'a Arc<Core>,
    source: NodeIndex,
    target: NodeIndex,
    /// The target was only away: what either has and the other lacks is made there.
    in_place: bool,
    created: Created,
}

/// Payload rows of the namespace that are looked through for tenants before they are dropped.
const ROWS: usize = 10_000;

/// A request that changes names on the target: done, or "already" by the status that says so. It runs on when nobody
/// waits for it any more, as a straggler's: a connection that is closed would stop the node half-way.
pub(super) async fn change(
    core: &Arc<Core>,
    node: NodeIndex,
    request: NodeRequest,
    already: u16,
) -> Result<NodeResponse, Trouble> {
    if core.log.hold().await != Hold::Ours {
        return Err(Trouble::Wait(
            "it is not certain that this proxy still writes".to_owned(),
        ));
    }
    let (done, mut answered) = oneshot::channel();
    let its_core = core.clone();
    core.spawn_job(async move {
        let _ = done.send(its_core.cluster.node(node).client.send(request).await);
    });
    let answer = tokio::select! {
        biased;
        answer = &mut answered => answer.ok(),
        () = core.cluster.node(node).until_down() => None,
        () = core.env.sleep(core.settings.read_timeout) => None,
    };
    let Some(answer) = answer else {
        let straggler = core.straggler(&Scope::Namespace, node);
        core.env.spawn(Box::pin(async move {
            let _ = answered.await;
            drop(straggler);
        }));
        return Err(Trouble::Wait("the node does not answer".to_owned()));
    };
    match answer {
        Ok(answer) if answer.is_success() || answer.status == already => Ok(answer),
        Ok(answer) => Err(Trouble::Target(describe(&answer))),
        Err(error) => Err(Trouble::Wait(error.to_string())),
    }
}

async fn exists(core: &Arc<Core>, node: NodeIndex, path: String) -> Result<bool, Trouble> {
    match core.bounded_read(node, NodeRequest::get(path)).await {
        Some(answer) if answer.is_success() => Ok(true),
        Some(answer) if answer.status == 404 => Ok(false),
        Some(answer) => Err(Trouble::Target(describe(&answer))),
        None => Err(Trouble::Wait("a node does not answer".to_owned())),
    }
}

async fn ensure_tenant(core: &Arc<Core>, node: NodeIndex, tenant: &str) -> Result<(), Trouble> {
    if exists(core, node, node_path::tenant(tenant)).await? {
        return Ok(());
    }
    let body = Bytes::from(json!({ "name": tenant }).to_string());
    change(core, node, NodeRequest::post(node_path::TENANTS, body), 409).await?;
    Ok(())
}

pub(super) async fn ensure_database(
    core: &Arc<Core>,
    node: NodeIndex,
    tenant: &str,
    database: &str,
) -> Result<(), Trouble> {
    if exists(core, node, node_path::database(tenant, database)).await? {
        return Ok(());
    }
    ensure_tenant(core, node, tenant).await?;
    let body = Bytes::from(json!({ "name": database }).to_string());
    change(core, node, NodeRequest::post(node_path::databases(tenant), body), 409).await?;
    Ok(())
}

async fn databases(core: &Arc<Core>, node: NodeIndex, tenant: &str) -> Result<Vec<String>, Trouble> {
    match core
        .bounded_read(node, NodeRequest::get(node_path::databases(tenant)))
        .await
    {
        Some(answer) if answer.is_success() => Ok(parse_names(&answer.body).unwrap_or_default()),
        Some(answer) if answer.status == 404 => Ok(vec![]),
        Some(answer) => Err(Trouble::Target(describe(&answer))),
        None => Err(Trouble::Wait("a node does not answer".to_owned())),
    }
}

/// A database that only some nodes have is made on the others. The caller holds the namespace lane, and has found all of
/// `nodes` in step with it: none has merely missed a delete.
pub(crate) async fn level_databases(core: &Arc<Core>, nodes: &[NodeIndex], tenant: &str, database: &str) {
    let mut lacking = vec![];
    for &node in nodes {
        match exists(core, node, node_path::database(tenant, database)).await {
            Ok(true) => {}
            Ok(false) => lacking.push(node),
            Err(_) => return,
        }
    }
    if lacking.len() == nodes.len() {
        return;
    }
    for node in lacking {
        match ensure_database(core, node, tenant, database).await {
            Ok(()) => tracing::info!(
                node = core.cluster.node(node).name,
                tenant,
                database,
                "Created a database that another node has."
            ),
            Err(why) => tracing::warn!(tenant, database, %why, "Could not create a database that another node has."),
        }
    }
}

/// Carries out rows about the namespace.
pub(super) async fn run(
    core: &Arc<Core>,
    source: NodeIndex,
    target: NodeIndex,
    rows: &[RepairRow],
) -> Result<(), Trouble> {
    let _names = core.exclusive_namespace().await;
    let pair = &core.namespace.pairs[target];
    let still = core.cluster.node(target).is_up()
        && pair.stragglers() == 0
        && pair.uncertain() == 0
        && core.namespace_nodes().contains(&source)
        && !super::is_paused(core);
    if !still || !core.catalog_can_change() {
        return Err(Trouble::Wait("something has changed".to_owned()));
    }
    let open = still_open(core, rows);
    if !core.fence(pair, target, core.settings.read_timeout).await {
        return Err(Trouble::Wait("no canary write returns".to_owned()));
    }
    // What the node missed is applied first, unless it is another server now, or cannot apply it.
    let in_place = open.iter().all(|row| !row.kind.holds_rows());
    if in_place && !drain_rest(core, target, &Scope::Namespace).await {
        return Err(Trouble::Wait("what the node missed is not drained".to_owned()));
    }
    let mut changes: Commit = vec![Change::RemoveRepairs(open.iter().map(|row| row.id).collect())];
    let (places, mut created) = places(core, source, target, in_place).await?;
    if open.iter().any(|row| row.reason == WIPED) {
        // It is not the server that was asked.
        created.clear();
    }
    let level = Level {
        core,
        source,
        target,
        in_place,
        created,
    };
    for (tenant, database) in places {
        changes.extend(level_database(&level, &tenant, &database).await?);
    }
    if !in_place {
        changes.push(Change::RemoveBacklog {
            node: core.cluster.node(target).name.clone(),
            generation: None,
            upto: core.log.next_lsn(),
        });
        pair.remove_parked(pair.parked());
        pair.drained();
        core.behind.lock().remove(&(target, None));
    }
    core.commit_or_retry(&Scope::Namespace, vec![target], changes).await;
    tracing::info!(node = core.cluster.node(target).name, "The namespace was made equal.");
    Ok(())
}

/// Tenants and databases that either node may have.
async fn places(
    core: &Arc<Core>,
    source: NodeIndex,
    target: NodeIndex,
    in_place: bool,
) -> Result<(BTreeSet<Place>, Created), Trouble> {
    let mut created = Created::new();
    let mut places: BTreeSet<Place> = core.catalog.known_databases().into_iter().collect();
    places.extend(core.settings.databases.iter().cloned());
    let mut tenants: BTreeSet<String> = core.settings.tenants.iter().cloned().collect();
    tenants.extend(places.iter().map(|(tenant, _)| tenant.clone()));
    // Tenants cannot be listed: the catalog has them, and those that the node missed are in its rows.
    let recorded = core.catalog.tenants();
    tenants.extend(recorded.iter().cloned());
    let name = &core.cluster.node(target).name;
    let missed = core.log.journal().payloads(name, None, ROWS, usize::MAX).await;
    let missed = missed.map_err(|_| Trouble::Wait("the log does not answer".to_owned()))?;
    for row in missed {
        match row.op {
            Op::CreateTenant { name } | Op::ModifyTenant { name } => drop(tenants.insert(name)),
            Op::CreateDatabase { tenant, name } | Op::DeleteDatabase { tenant, name } => {
                tenants.insert(tenant.clone());
                places.insert((tenant, name));
            }
            Op::CreateCollection {
                tenant,
                database,
                name,
                generation,
            } if row.in_doubt => drop(created.insert((tenant, database, name), generation)),
            Op::Other { method, path, .. } => {
                tracing::warn!(
                    node = name,
                    method,
                    path,
                    "An entry of an unknown kind cannot be repaired."
                );
            }
            _ => {}
        }
    }
    tenants.remove(OWN_TENANT);
    for tenant in &tenants {
        if exists(core, source, node_path::tenant(tenant)).await? {
            ensure_tenant(core, target, tenant).await?;
        } else if recorded.contains(tenant) {
            // Somebody was told of it (S5).
            ensure_tenant(core, source, tenant).await?;
            ensure_tenant(core, target, tenant).await?;
        } else if in_place && exists(core, target, node_path::tenant(tenant)).await? {
            ensure_tenant(core, source, tenant).await?;
        }
        for node in [source, target] {
            let found = databases(core, node, tenant).await?;
            places.extend(found.into_iter().map(|database| (tenant.clone(), database)));
        }
    }
    places.retain(|(tenant, _)| tenant != OWN_TENANT);
    Ok((places, created))
}

async fn list(core: &Arc<Core>, node: NodeIndex, tenant: &str, database: &str) -> Result<Vec<Object>, Trouble> {
    let pages = core
        .collection_pages(node, tenant, database)
        .await
        .ok_or_else(|| Trouble::Wait("a node does not list its collections".to_owned()))?;
    let mut all = vec![];
    for (page, _) in pages {
        let items: Vec<&serde_json::value::RawValue> =
            serde_json::from_slice(&page.body).map_err(|error| Trouble::Target(error.to_string()))?;
        all.extend(
            items
                .into_iter()
                .filter_map(|item| Object::parse(item.get().as_bytes())),
        );
    }
    Ok(all)
}

/// What a database of the target needs: done at once, or as changes for the commit.
async fn level_database(level: &Level<'_>, tenant: &str, database: &str) -> Result<Commit, Trouble> {
    let &Level {
        core,
        source,
        target,
        in_place,
        ref created,
    } = level;
    let path = || node_path::database(tenant, database);
    let on_source = exists(core, source, path()).await?;
    let on_target = exists(core, target, path()).await?;
    if on_source && !on_target {
        ensure_database(core, target, tenant, database).await?;
    }
    let mut there = match on_target {
        true => list(core, target, tenant, database).await?,
        false => vec![],
    };
    // What belongs to a deleted generation goes, also when the node's answer to its creation is missing.
    let mut kept = vec![];
    for object in there.drain(..) {
        let owner = core.catalog.by_id(object.id).or_else(|| {
            let key = (tenant.to_owned(), database.to_owned(), object.name.clone());
            core.catalog.by_generation(*created.get(&key)?)
        });
        match owner {
            Some(owner) if owner.is_deleted() => {
                let path = node_path::by_name(tenant, database, &object.name);
                change(core, target, NodeRequest::new(Method::DELETE, path, None), 404).await?;
            }
            _ => kept.push(object),
        }
    }
    if !on_source {
        // One that was only away may have what its source lacks: only a copy deletes, and nothing that was acked.
        if on_target && kept.is_empty() && !in_place && !is_known(core, tenant, database) {
            change(core, target, NodeRequest::new(Method::DELETE, path(), None), 404).await?;
            return Ok(vec![]);
        }
        if on_target {
            // Data that nobody knows is kept, and so is a database that somebody was told of.
            ensure_database(core, source, tenant, database).await?;
        }
    }
    rename(core, target, tenant, database, &mut kept).await?;
    let originals = match on_source {
        true => list(core, source, tenant, database).await?,
        false => vec![],
    };
    collections(core, source, target, tenant, database, &kept, &originals).await
}

fn is_known(core: &Core, tenant: &str, database: &str) -> bool {
    core.catalog.has_database(tenant, database) || !core.catalog.in_database(tenant, database).is_empty()
}

/// Gives the target's collections the names that the catalog has. Names may be swapped: those that are wrong are put
/// aside first.
async fn rename(
    core: &Arc<Core>,
    target: NodeIndex,
    tenant: &str,
    database: &str,
    kept: &mut [Object],
) -> Result<(), Trouble> {
    let mut wrong: Vec<(&mut Object, String)> = vec![];
    for object in kept {
        if let Some(owner) = core.catalog.by_id(object.id) {
            let facts = owner.facts();
            if facts.name != object.name && (facts.tenant.as_str(), facts.database.as_str()) == (tenant, database) {
                wrong.push((object, facts.name.clone()));
            }
        }
    }
    let put = |id: Uuid, name: &str| {
        let body = Bytes::from(json!({ "new_name": name }).to_string());
        NodeRequest::new(Method::PUT, node_path::collection(tenant, database, id), Some(body))
    };
    if wrong.len() > 1 {
        for (object, _) in &wrong {
            let aside = format!("diptych-{}", core.env.new_id());
            change(core, target, put(object.id, &aside), 0).await?;
        }
    }
    for (object, name) in wrong {
        change(core, target, put(object.id, &name), 0).await?;
        object.name = name;
    }
    Ok(())
}

/// Rows for the collections of a database, by what the target has and what it should have.
async fn collections(
    core: &Arc<Core>,
    source: NodeIndex,
    target: NodeIndex,
    tenant: &str,
    database: &str,
    kept: &[Object],
    originals: &[Object],
) -> Result<Commit, Trouble> {
    let mut changes: Commit = vec![];
    let by_name: BTreeMap<&str, &Object> = kept.iter().map(|object| (object.name.as_str(), object)).collect();
    let ids: BTreeSet<Uuid> = kept.iter().map(|object| object.id).collect();
    let mut adopted: BTreeSet<Uuid> = BTreeSet::new();
    for collection in core.catalog.in_database(tenant, database) {
        let facts = collection.facts();
        if let Some(id) = collection.node_id(target).filter(|id| ids.contains(id)) {
            let there = kept.iter().find(|object| object.id == id);
            let original = originals
                .iter()
                .find(|object| Some(object.id) == collection.node_id(source));
            if let (Some(there), Some(original)) = (there, original)
                && (mend_metadata(&original.metadata, &there.metadata).is_some()
                    || original.configuration != there.configuration)
            {
                changes.extend(row(core, &collection, target, RepairKind::Records, source));
            }
            continue;
        }
        if let Some(object) = by_name.get(facts.name.as_str())
            && core.catalog.by_id(object.id).is_none()
        {
            let found = core
                .adoption(collection.generation, (tenant, database), target, object.id)
                .await
                .ok_or_else(|| Trouble::Wait("the node does not tell what a collection holds".to_owned()))?;
            adopted.insert(object.id);
            changes.extend(found.changes);
            if found.compared {
                continue;
            }
        }
        changes.extend(row(core, &collection, target, RepairKind::Whole, source));
    }
    for object in kept {
        if core.catalog.by_id(object.id).is_none() && !adopted.contains(&object.id) {
            let found = CollectionObject {
                id: object.id,
                name: object.name.clone(),
                tenant: tenant.to_owned(),
                database: database.to_owned(),
                dimension: object.dimension,
            };
            core.register_found(target, tenant, database, found)
                .await
                .map_err(|_| Trouble::Wait("the log does not answer".to_owned()))?;
        }
    }
    Ok(changes)
}

/// A row for a collection on the target, unless one that does as much is open, or nobody could give it what it lacks.
fn row(
    core: &Core,
    collection: &Arc<Collection>,
    target: NodeIndex,
    kind: RepairKind,
    source: NodeIndex,
) -> Option<Change> {
    let name = &core.cluster.node(target).name;
    let open = core
        .repairs
        .lock()
        .iter()
        .any(|row| row.node == *name && row.generation == Some(collection.generation) && row.kind.holds_rows());
    if open || !core.another_has_authority(&Scope::Collection(collection.clone()), target) {
        return None;
    }
    let wanted = RepairWanted {
        kind,
        ids: (kind == RepairKind::Records).then(Vec::new),
        source: (kind == RepairKind::Records).then_some(source),
        ..RepairWanted::whole(core.log.next_lsn(), "its names were repaired")
    };
    Some(Change::InsertRepair(core.new_repair(
        target,
        Some(collection.generation),
        wanted,
    )))
}
