//! Replaying record writes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::combine::Batch;
use super::step::finish;
use super::trouble::{Refused, broke, drop_refused, failed, last_resort, needs_repair, others_follow, refused};
use super::{End, Step};
use crate::catalog::Collection;
use crate::chroma::{Op, RecordWrite, node_path, parse_delete, parse_record};
use crate::cluster::{NodeIndex, NodeRequest};
use crate::journal::PayloadRow;
use crate::mirror::{Agreement, Core, Ids, NodeAnswer, Outcome, RepairWanted, Scope};

/// Sends one batch; a refused one is taken apart, so that only the entry at fault is treated as such.
pub(super) async fn apply(
    core: &Arc<Core>,
    node: NodeIndex,
    collection: &Arc<Collection>,
    rows: &[PayloadRow],
    batch: Batch,
) -> Step {
    let (Some(id), Some(first)) = (collection.node_id(node), rows.first()) else {
        return Step::Stop(End::Done);
    };
    let facts = collection.facts();
    let scope = Scope::Collection(collection.clone());
    let path = node_path::record(&facts.tenant, &facts.database, id, first.op.label());
    let ids = Ids {
        node: Some(id),
        client: Some(collection.client_id),
    };
    let answer = core
        .send_judged(node, &first.op, NodeRequest::post(path, batch.body), ids)
        .await;
    match answer.outcome {
        Outcome::Applied => {
            crate::metrics::drained_batch(rows.len());
            let mut repairs = vec![];
            for row in rows {
                let disagrees = core.compare_outcome(row.lsn, true) == Agreement::Disagrees;
                if !row.refused && !disagrees {
                    continue;
                }
                let reason = format!("the node took a {} that another had refused", row.op.label());
                let wanted = RepairWanted::records(ids_of(row), row.lsn, reason);
                if core.another_has_authority(&scope, node) {
                    // Should that one have lost everything when it returns, the row is void: nothing acked hangs on it.
                    let source = core.only_authority(&scope, node);
                    repairs.push(core.repair_row(&scope, node, RepairWanted { source, ..wanted }));
                    continue;
                }
                // Nobody could give it back what was there: the others follow. Nothing that was acked is lost by it.
                repairs.extend(others_follow(core, node, &scope, wanted));
            }
            finish(core, node, &scope, rows, repairs).await
        }
        _ if collection.is_deleted() => finish(core, node, &scope, rows, vec![]).await,
        Outcome::Refused { .. } if rows.len() > 1 => {
            for (position, row) in rows.iter().enumerate() {
                let single = Batch {
                    rows: position..position + 1,
                    records: 1,
                    body: row.body.clone(),
                };
                if let stop @ Step::Stop(_) =
                    Box::pin(apply(core, node, collection, std::slice::from_ref(row), single)).await
                {
                    return stop;
                }
            }
            Step::Applied
        }
        Outcome::Refused { .. } if first.refused => {
            core.compare_outcome(first.lsn, false);
            finish(core, node, &scope, rows, vec![]).await
        }
        Outcome::Refused { .. } => {
            let reason = format!("the node refused a {}: {}", first.op.label(), text(&answer));
            let repairs = match refused(core, node, &scope, first) {
                Refused::WaitForOthers => return Step::Stop(End::Pause),
                Refused::Keep => return last_resort(core, node, &scope, first, reason).await,
                Refused::Drop => {
                    core.compare_outcome(first.lsn, false);
                    return drop_refused(core, node, &scope, first).await;
                }
                Refused::Repair => {
                    let wanted = RepairWanted::records(ids_of(first), first.lsn, reason);
                    vec![core.repair_row(&scope, node, wanted)]
                }
                Refused::OthersFollow => {
                    let wanted = RepairWanted::records(ids_of(first), first.lsn, reason);
                    others_follow(core, node, &scope, wanted)
                }
            };
            core.compare_outcome(first.lsn, false);
            finish(core, node, &scope, rows, repairs).await
        }
        Outcome::Missing => {
            needs_repair(core, node, &scope, first, "the node has lost the collection".to_owned()).await
        }
        // It could not, and said so: nothing is wrong with the entry.
        Outcome::Failed => {
            core.counters.failed_replays.fetch_add(1, Ordering::Relaxed);
            Step::Stop(End::Pause)
        }
        Outcome::Unknown(_) if answer.response.is_none() => broke(core, node, &scope, rows).await,
        // The node's compactor is dead: only a restart helps, and then the entry is there.
        Outcome::Unknown(_) if text(&answer).contains("Error sending message to compactor") => Step::Stop(End::Pause),
        Outcome::Unknown(_) => failed(core, node, &scope, first, &text(&answer)).await,
    }
}

pub(super) fn ids_of(row: &PayloadRow) -> Option<Vec<String>> {
    ids_in(&row.op, &row.body)
}

pub(super) fn ids_in(op: &Op, body: &Bytes) -> Option<Vec<String>> {
    let kind = match op {
        Op::Add => RecordWrite::Add,
        Op::Upsert => RecordWrite::Upsert,
        Op::Update => RecordWrite::Update,
        _ => return parse_delete(body).ok()?.ids,
    };
    parse_record(kind, body).ok().map(|body| body.ids)
}

pub(super) fn text(answer: &NodeAnswer) -> String {
    match &answer.response {
        Some(response) => {
            let body = String::from_utf8_lossy(&response.body[..response.body.len().min(200)]);
            format!("{} {body}", response.status)
        }
        None => "no answer".to_owned(),
    }
}
