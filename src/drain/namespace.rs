//! Replaying namespace entries: one at a time, by generation and UUID, looking before leaping where a bare repeat
//! could hit another generation (design.md R4).

use std::sync::Arc;

use uuid::Uuid;

use super::record::text;
use super::{End, Step, failed, finish, needs_repair};
use crate::chroma::{Generation, Op, node_path, parse_collection_object};
use crate::cluster::{NodeIndex, NodeRequest, NodeResponse};
use crate::journal::{Change, CollectionRecord, PayloadRow};
use crate::mirror::{Core, NodeAnswer, Outcome, Scope};

pub(super) async fn apply(core: &Arc<Core>, node: NodeIndex, row: &PayloadRow) -> Step {
    let rows = std::slice::from_ref(row);
    let done = |changes| finish(core, node, &Scope::Namespace, rows, changes);
    match &row.op {
        Op::CreateCollection { generation, .. } => {
            let known = core.catalog.by_generation(*generation);
            if known.is_some_and(|collection| collection.is_deleted()) && !row.in_doubt {
                // Born and gone while the node was away; what follows finds no UUID and is moot as well.
                return done(vec![]).await;
            }
            create(core, node, row, *generation).await
        }
        Op::ModifyCollection { generation, .. } | Op::DeleteCollection { generation, .. }
            if core
                .catalog
                .by_generation(*generation)
                .is_none_or(|found| found.node_id(node).is_none()) =>
        {
            done(vec![]).await
        }
        op => {
            let answer = core.namespace_job(node, op, &row.body).await;
            match answer.outcome {
                Outcome::Applied => done(vec![]).await,
                Outcome::Missing => match core
                    .catalog
                    .all()
                    .into_iter()
                    .find(|found| speaks_of(op, found.generation))
                {
                    Some(collection) if !collection.is_deleted() => {
                        let scope = Scope::Collection(collection);
                        let reason = "the node has lost the collection".to_owned();
                        let repair = core.repair_row(&scope, node, None, None, row.lsn, reason);
                        done(vec![repair]).await
                    }
                    _ => done(vec![]).await,
                },
                _ => stopped(core, node, row, &answer).await,
            }
        }
    }
}

fn speaks_of(op: &Op, generation: Generation) -> bool {
    match op {
        Op::ModifyCollection { generation: of, .. } | Op::DeleteCollection { generation: of, .. } => *of == generation,
        Op::Other { generation: of, .. } => *of == Some(generation),
        _ => false,
    }
}

/// What is not a success: waits, counts, or leaves the namespace to repair.
async fn stopped(core: &Arc<Core>, node: NodeIndex, row: &PayloadRow, answer: &NodeAnswer) -> Step {
    match (&answer.outcome, &answer.response) {
        (Outcome::Refused { .. }, _) => {
            let reason = format!("the node refused a {}: {}", row.op.label(), text(answer));
            needs_repair(core, node, &Scope::Namespace, None, row.lsn, reason).await
        }
        (Outcome::Unknown(_), None) => {
            let _ = core.log.commit(&vec![Change::MarkInDoubt(row.id)]).await;
            Step::Stop(End::Pause)
        }
        (_, None) => Step::Stop(End::Pause),
        (_, Some(_)) => failed(core, node, &Scope::Namespace, row, &text(answer)).await,
    }
}

/// Creates a collection, or finds that the node has it already, and learns its UUID.
async fn create(core: &Arc<Core>, node: NodeIndex, row: &PayloadRow, generation: Generation) -> Step {
    let Op::CreateCollection {
        tenant, database, name, ..
    } = &row.op
    else {
        return Step::Stop(End::Done);
    };
    let path = node_path::by_name(tenant, database, name);
    let existing = match core.send(node, NodeRequest::get(path)).await {
        Ok(response) if response.is_success() => parse_collection_object(&response.body).map(|object| object.id),
        Ok(NodeResponse { status: 404, .. }) => None,
        _ => return Step::Stop(End::Pause),
    };
    let id = match existing {
        Some(id) => id,
        None => {
            let answer = core.namespace_job(node, &row.op, &row.body).await;
            let created = answer
                .response
                .as_ref()
                .and_then(|response| parse_collection_object(&response.body));
            match (&answer.outcome, created) {
                (Outcome::Applied, Some(object)) => object.id,
                _ => return stopped(core, node, row, &answer).await,
            }
        }
    };
    if core
        .catalog
        .by_id(id)
        .is_some_and(|other| other.generation != generation)
    {
        let reason = format!("the name {name} belongs to another generation on this node");
        return needs_repair(core, node, &Scope::Namespace, None, row.lsn, reason).await;
    }
    adopt(core, node, row, generation, id, existing.is_some()).await
}

/// Makes the node's UUID known, and with it the collection if no node had answered when it was created.
async fn adopt(
    core: &Arc<Core>,
    node: NodeIndex,
    row: &PayloadRow,
    generation: Generation,
    id: Uuid,
    existed: bool,
) -> Step {
    let Op::CreateCollection {
        tenant, database, name, ..
    } = &row.op
    else {
        return Step::Stop(End::Done);
    };
    let mut changes = vec![];
    if core.catalog.by_generation(generation).is_none() {
        let at = core.env.wall();
        changes.push(Change::PutCollection(CollectionRecord {
            generation,
            client_id: id,
            tenant: tenant.clone(),
            database: database.clone(),
            name: name.clone(),
            deleted: false,
            node_ids: std::collections::BTreeMap::new(),
            created_at: at,
            updated_at: at,
        }));
    }
    if existed && !is_empty(core, node, tenant, database, id).await {
        // A leftover with this name: it is adopted, but what is in it is not ours.
        if let Some(collection) = core.catalog.by_generation(generation) {
            let reason = "a collection of this name was there already".to_owned();
            changes.push(core.repair_row(&Scope::Collection(collection), node, None, None, row.lsn, reason));
        }
    }
    changes.push(Change::PutNodeId {
        generation,
        node: row.node.clone(),
        id,
    });
    finish(core, node, &Scope::Namespace, std::slice::from_ref(row), changes).await
}

async fn is_empty(core: &Arc<Core>, node: NodeIndex, tenant: &str, database: &str, id: Uuid) -> bool {
    let path = node_path::record(tenant, database, id, "count");
    match core.bounded_read(node, NodeRequest::get(path)).await {
        Some(response) => response.is_success() && response.body.as_ref() == b"0",
        None => false,
    }
}
