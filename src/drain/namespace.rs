//! Replaying namespace entries: one at a time, by generation and UUID, looking before leaping where a bare repeat
//! could hit another generation (design.md R4).

use std::sync::Arc;

use http::Method;
use uuid::Uuid;

use super::record::text;
use super::step::finish;
use super::trouble::{Refused, broke, drop_refused, failed, last_resort, needs_repair, others_follow, refused};
use super::{End, Step};
use crate::chroma::{Generation, Op, node_path, parse_collection_object};
use crate::cluster::{NodeIndex, NodeRequest, NodeResponse};
use crate::journal::{Change, Commit, Lsn, PayloadRow};
use crate::lane::Exclusive;
use crate::mirror::{Agreement, Core, NodeAnswer, Outcome, RepairWanted, Scope};

/// More than the namespace's rows of a node ever are.
const ALL_ROWS: usize = 1 << 20;
const ALL_BYTES: usize = 1 << 30;

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
            match delete_unlearned(core, node, &row.op).await {
                true => done(vec![]).await,
                false => Step::Stop(End::Pause),
            }
        }
        op => {
            let answer = core.namespace_job(node, op, &row.body).await;
            match answer.outcome {
                Outcome::Applied => {
                    // It may have been made anew there, under a UUID that nobody knows.
                    if row.in_doubt && !delete_unlearned(core, node, op).await {
                        return Step::Stop(End::Pause);
                    }
                    if *op == Op::Reset {
                        core.renew_marker(node).await;
                    }
                    // Held until the commit: two nodes that are drained side by side must not both complete it.
                    let _one_at_a_time = core.settling.lock().await;
                    let is_refused = row.refused || core.agreement(row.lsn, true) == Agreement::Disagrees;
                    let has_authority = core.another_has_authority(&Scope::Namespace, node);
                    let is_whole = core.namespace.pairs[node].repairs() == 0;
                    let (mut changes, _barriers) = match is_refused && has_authority && !is_whole {
                        // Another one counts, which has it still, and this one is to be made equal to that anyway.
                        true => (vec![], vec![]),
                        false => match completion(core, node, row).await {
                            Some(completed) => completed,
                            None => return Step::Stop(End::Pause),
                        },
                    };
                    core.compare_outcome(row.lsn, true);
                    let reason = format!("the node took a {} that another had refused", op.label());
                    if is_refused && is_whole && matches!(op, Op::DeleteCollection { .. }) {
                        // It is gone (see `completion`): who refused it has it still, and no row any more.
                        let wanted = RepairWanted::records(Some(vec![]), row.lsn, reason);
                        changes.extend(others_follow(core, node, &Scope::Namespace, wanted));
                    } else if is_refused && is_whole && has_authority {
                        changes.push(core.repair_row(&Scope::Namespace, node, RepairWanted::whole(row.lsn, reason)));
                    }
                    done(changes).await
                }
                Outcome::Missing => match op
                    .generation()
                    .and_then(|generation| core.catalog.by_generation(generation))
                {
                    Some(collection) if !collection.is_deleted() => {
                        let scope = Scope::Collection(collection);
                        let wanted = RepairWanted::whole(row.lsn, "the node has lost the collection");
                        let repair = core.repair_row(&scope, node, wanted);
                        done(vec![repair]).await
                    }
                    _ => done(vec![]).await,
                },
                _ => stopped(core, node, row, &answer).await,
            }
        }
    }
}

/// The catalog's part of an entry that nobody had answered when its client was, with the lanes that it touches: the
/// first node that is drained decides it. Every node has its row then, and the others have it still. `None`: it cannot
/// be told now.
async fn completion(core: &Arc<Core>, node: NodeIndex, row: &PayloadRow) -> Option<(Commit, Vec<Exclusive>)> {
    // What has been deleted is known to be: a collection that lives is one whose delete nobody has completed, whoever has
    // the row. Other entries may have been followed by newer ones.
    let is_delete = matches!(row.op, Op::DeleteCollection { .. });
    for other in (0..core.cluster.len()).filter(|&other| other != node && !is_delete) {
        if !has_row(core, other, row.lsn).await? {
            return Some((vec![], vec![]));
        }
    }
    let living = |generation: &Generation| {
        let found = core.catalog.by_generation(*generation).into_iter();
        found.filter(|collection| !collection.is_deleted()).collect()
    };
    let (mut changes, mut barriers) = (vec![], vec![]);
    let mut gone: Vec<_> = match &row.op {
        Op::DeleteCollection { generation, .. } => living(generation),
        Op::DeleteDatabase { tenant, name } => {
            changes.push(Change::RemoveDatabase {
                tenant: tenant.clone(),
                name: name.clone(),
            });
            core.catalog.in_database(tenant, name)
        }
        Op::Reset => {
            let all = core.catalog.all().into_iter();
            all.filter(|collection| !collection.is_deleted()).collect()
        }
        Op::ModifyCollection {
            generation,
            new_name: Some(name),
        } => {
            let renamed: Vec<_> = living(generation);
            changes.extend(renamed.iter().map(|collection| core.renaming(collection, name)));
            vec![]
        }
        _ => vec![],
    };
    // Several lanes are always taken in this order.
    gone.sort_by_key(|collection| collection.generation);
    for collection in gone {
        barriers.push(core.exclusive(&collection).await?);
        changes.extend(core.deletion(&collection));
    }
    Some((changes, barriers))
}

/// Whether the namespace's rows of a node have this entry.
async fn has_row(core: &Arc<Core>, node: NodeIndex, lsn: Lsn) -> Option<bool> {
    let name = &core.cluster.node(node).name;
    let rows = core.log.journal().payloads(name, None, ALL_ROWS, ALL_BYTES).await;
    Some(rows.ok()?.iter().any(|row| row.lsn == lsn))
}

/// What is not a success: waits, counts, or leaves the namespace to repair.
async fn stopped(core: &Arc<Core>, node: NodeIndex, row: &PayloadRow, answer: &NodeAnswer) -> Step {
    match (&answer.outcome, &answer.response) {
        (Outcome::Refused { .. }, _) => {
            let scope = Scope::Namespace;
            let reason = format!("the node refused a {}: {}", row.op.label(), text(answer));
            let is_done = matches!(&row.op, Op::DeleteCollection { generation, .. }
                if core.catalog.by_generation(*generation).is_some_and(|one| one.is_deleted()));
            let what = match row.refused {
                // Another node did it: what is left here would be taken for a collection of its own one day.
                _ if is_done && core.authority_is_away(&scope, node) => Refused::WaitForOthers,
                _ if is_done && core.another_has_authority(&scope, node) => Refused::Repair,
                true => Refused::Drop,
                false => refused(core, node, &scope, row),
            };
            if matches!(what, Refused::Drop | Refused::Repair | Refused::OthersFollow) {
                core.compare_outcome(row.lsn, false);
            }
            match what {
                Refused::WaitForOthers => Step::Stop(End::Pause),
                Refused::Keep => last_resort(core, node, &scope, row, reason).await,
                // A repair of names makes all of them equal: whoever does not have everything is due for one.
                Refused::Drop | Refused::OthersFollow => drop_refused(core, node, &scope, row).await,
                Refused::Repair => needs_repair(core, node, &scope, row, reason).await,
            }
        }
        (Outcome::Unknown(_), None) => broke(core, node, &Scope::Namespace, std::slice::from_ref(row)).await,
        // It could not, and said so: nothing is wrong with the entry.
        (Outcome::Failed, Some(_)) => Step::Stop(End::Pause),
        (_, None) => Step::Stop(End::Pause),
        (_, Some(_)) => failed(core, node, &Scope::Namespace, row, &text(answer)).await,
    }
}

/// A collection that was created on a node whose answer nobody heard, a repair that ended half-way for one, has to go with
/// its generation all the same: what the node has under the deleted name and nobody knows. False: it cannot be told now.
async fn delete_unlearned(core: &Arc<Core>, node: NodeIndex, op: &Op) -> bool {
    let Op::DeleteCollection {
        tenant, database, name, ..
    } = op
    else {
        return true;
    };
    let path = node_path::by_name(tenant, database, name);
    let there = match core.send(node, NodeRequest::get(path.clone())).await {
        Ok(answer) if answer.is_success() => parse_collection_object(&answer.body),
        Ok(NodeResponse { status: 404, .. }) => None,
        _ => return false,
    };
    if there.is_none_or(|there| core.catalog.by_id(there.id).is_some()) {
        return true;
    }
    match core.send(node, NodeRequest::new(Method::DELETE, path, None)).await {
        Ok(answer) => answer.is_success() || answer.status == 404,
        Err(_) => false,
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
            // Nobody had answered, and another node has decided: it refused. A proxy that was started since does not know.
            // Or it did it, and its commit is under way.
            {
                let _one_at_a_time = core.settling.lock().await;
                match decided_otherwise(core, node, row, generation).await {
                    None => return Step::Stop(End::Pause),
                    Some(others) if !others.is_empty() => {
                        core.compare_outcome(row.lsn, false);
                        return finish(core, node, &Scope::Namespace, std::slice::from_ref(row), vec![]).await;
                    }
                    Some(_) => {}
                }
            }
            // Should the commit below be lost and the collection be deleted meanwhile, the row has to say that the node
            // may have it: otherwise create and delete would both be taken as moot.
            if !row.in_doubt && core.log.commit(&vec![Change::MarkInDoubt(row.id)]).await.is_err() {
                return Step::Stop(End::Pause);
            }
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
        return needs_repair(core, node, &Scope::Namespace, row, reason).await;
    }
    adopt(core, node, row, generation, id, existing.is_some()).await
}

/// Nodes that are done with a create that nobody had answered, while nobody made it known: they refused it. `None`: it
/// cannot be told now. The caller holds [`Core::settling`], under which a node that did it makes it known.
async fn decided_otherwise(
    core: &Arc<Core>,
    node: NodeIndex,
    row: &PayloadRow,
    generation: Generation,
) -> Option<Vec<NodeIndex>> {
    let is_known = || core.catalog.by_generation(generation).is_some();
    if is_known() {
        return Some(vec![]);
    }
    if !core.catalog_can_change() {
        return None;
    }
    let mut others = vec![];
    for other in (0..core.cluster.len()).filter(|&other| other != node) {
        if !has_row(core, other, row.lsn).await? {
            others.push(other);
        }
    }
    // It may have been made known meanwhile.
    Some(if is_known() { vec![] } else { others })
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
    let disagrees = core.compare_outcome(row.lsn, true) == Agreement::Disagrees;
    let mut adopted = vec![core.node_id_change(generation, node, id)];
    if existed {
        // A leftover with this name: what is in it is not ours. If the collection is deleted by now, it goes as a whole
        // with the entry that follows.
        match core.adoption(generation, (tenant, database), node, id).await {
            Some(adoption) => adopted = adoption.changes,
            None => return Step::Stop(End::Pause),
        }
    }
    // Two nodes that are drained side by side must not both make it known, each with its own id.
    let _one_at_a_time = core.settling.lock().await;
    let mut changes = vec![];
    if core.catalog.by_generation(generation).is_none() {
        // Those that refused it get a copy: nothing else would bring it to them.
        let Some(mut lacking) = decided_otherwise(core, node, row, generation).await else {
            return Step::Stop(End::Pause);
        };
        if disagrees {
            lacking = (0..core.cluster.len()).filter(|&other| other != node).collect();
        }
        let taken = core.catalog.by_name(tenant, database, name);
        if !lacking.is_empty() && taken.is_some_and(|collection| !collection.is_deleted()) {
            // The name was given away since. What this node has under it is a leftover for the entry that did so.
            return finish(core, node, &Scope::Namespace, std::slice::from_ref(row), vec![]).await;
        }
        changes.push(Change::PutCollection(
            core.new_record(generation, id, tenant, database, name),
        ));
        for other in lacking {
            let wanted = RepairWanted::whole(row.lsn, "the node refused to create the collection");
            changes.push(Change::InsertRepair(core.new_repair(other, Some(generation), wanted)));
        }
    }
    let known = core.catalog.by_generation(generation);
    if known.is_some_and(|collection| collection.is_deleted()) {
        adopted.retain(|change| matches!(change, Change::PutNodeId { .. }));
    }
    changes.extend(adopted);
    finish(core, node, &Scope::Namespace, std::slice::from_ref(row), changes).await
}
