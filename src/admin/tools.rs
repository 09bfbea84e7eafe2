//! Read-only routes for tools made for the system that Diptych replaces (design.md 10).

use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Value, json};
use uuid::Uuid;

use super::state::gather;
use super::status::{repair, time};
use super::verbs::shown;
use crate::catalog::Collection;
use crate::chroma::Refusal;
use crate::journal::RepairRow;
use crate::mirror::{Answer, Core};

/// How many parked entries `/admin/wal_errors` shows.
const SHOWN: usize = 100;

/// A part of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    pub offset: usize,
    pub limit: usize,
}

impl Part {
    /// From `limit` and `offset` in a query; without them, everything.
    pub fn of(query: Option<&str>) -> Result<Self, String> {
        let mut part = Self {
            offset: 0,
            limit: usize::MAX,
        };
        for (key, value) in url::form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
            let field = match key.as_ref() {
                "limit" => &mut part.limit,
                "offset" => &mut part.offset,
                _ => continue,
            };
            let parsed = value.parse();
            *field = parsed.map_err(|_| format!("{key}: `{value}` is not a whole number"))?;
        }
        Ok(part)
    }
}

/// Mappings that are written at once.
const PIECE: usize = 200;

/// Which UUID each collection has on each node, newest first: JSON in pieces, made as they are sent, so that the list of
/// a large catalog is never in memory as a whole.
pub struct Mappings {
    shown: Vec<Arc<Collection>>,
    /// Of `shown`, so many were given.
    given: usize,
    total: usize,
    is_over: bool,
}

impl Mappings {
    /// # Errors
    /// What is answered to a query that makes no sense.
    pub fn of(core: &Core, query: Option<&str>) -> Result<Self, Refusal> {
        let part = Part::of(query).map_err(|message| Refusal {
            status: 400,
            error: "InvalidArgumentError",
            message,
        })?;
        let mut living = core.catalog.all();
        living.retain(|collection| !collection.is_deleted());
        let total = living.len();
        let shown = living.into_iter().rev().skip(part.offset).take(part.limit);
        Ok(Self {
            shown: shown.collect(),
            given: 0,
            total,
            is_over: false,
        })
    }
}

impl Iterator for Mappings {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        if self.is_over {
            return None;
        }
        let mut text = String::new();
        if self.given == 0 {
            text.push_str("{\"collection_mappings\":[");
        }
        let left = &self.shown[self.given..];
        for (n, collection) in left.iter().take(PIECE).enumerate() {
            if self.given + n > 0 {
                text.push(',');
            }
            text.push_str(&mapping(collection).to_string());
        }
        self.given += left.len().min(PIECE);
        if self.given == self.shown.len() {
            text.push_str(&format!("],\"total_mappings\":{}}}", self.total));
            self.is_over = true;
        }
        Some(text.into())
    }
}

fn mapping(collection: &Collection) -> Value {
    let facts = collection.facts();
    let id = |node: usize| -> Option<Uuid> { facts.node_ids.get(node).copied().flatten() };
    let complete = facts.node_ids.iter().all(Option::is_some);
    json!({
        "collection_name": facts.name,
        "primary_collection_id": id(0),
        "replica_collection_id": id(1),
        "primary_uuid": id(0),
        "replica_uuid": id(1),
        "status": if complete { "complete" } else { "partial" },
        "tenant": facts.tenant,
        "database": facts.database,
        "collection_id": collection.client_id,
        "created_at": time(collection.created_at),
        "updated_at": time(facts.updated_at),
    })
}

pub fn wal_count(core: &Core) -> Answer {
    let pending: u64 = gather(core).iter().map(|state| state.rows).sum();
    let body = json!({ "pending_writes": pending, "wal_system_ready": core.log.is_available() });
    Answer::json(200, body.to_string())
}

/// Entries and repairs that were given up on until someone decides.
pub async fn wal_errors(core: &Arc<Core>) -> Answer {
    let (done, rows) = tokio::sync::oneshot::channel();
    let asking = core.clone();
    // On the core's runtime: the journal's connections live there.
    core.env.spawn(Box::pin(async move {
        let _ = done.send(asking.log.journal().parked(SHOWN).await);
    }));
    let Ok(Ok(rows)) = rows.await else {
        return Answer::unavailable("The log does not answer.");
    };
    let total: u64 = gather(core).iter().map(|state| state.parked).sum();
    let mut errors: Vec<Value> = rows.iter().map(|row| shown(core, row)).collect();
    let mut repairs = core.repairs.lock().clone();
    repairs.retain(|row| row.parked.is_some());
    let count = total.max(errors.len() as u64) + repairs.len() as u64;
    errors.extend(repairs.iter().rev().take(SHOWN).map(|row| failed_repair(core, row)));
    let body = json!({ "recent_errors": errors, "error_count": count });
    Answer::json(200, body.to_string())
}

/// A repair that was given up on, in the form of an entry.
fn failed_repair(core: &Core, row: &RepairRow) -> Value {
    let mut value = repair(core, row);
    value["operation"] = json!("repair");
    value["error"] = json!(row.parked);
    value["created_at"] = value["since"].take();
    value
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use chrono::DateTime;

    use super::*;
    use crate::catalog::Catalog;
    use crate::journal::CollectionRecord;
    use crate::lane::{Limits, Shared};

    fn catalog(count: i64) -> Vec<Arc<Collection>> {
        let catalog = Catalog::new(vec!["a".to_owned(), "b".to_owned()], Shared::new(Limits::default()));
        for generation in 0..count {
            catalog.insert(CollectionRecord {
                generation,
                client_id: Uuid::new_v4(),
                tenant: "t".to_owned(),
                database: "d".to_owned(),
                name: format!("c{generation}"),
                deleted: false,
                node_ids: BTreeMap::from([("a".to_owned(), Uuid::new_v4())]),
                created_at: DateTime::UNIX_EPOCH,
                updated_at: DateTime::UNIX_EPOCH,
            });
        }
        catalog.all()
    }

    #[test]
    fn a_large_list_comes_in_pieces() {
        let pieces = |count: usize| {
            let mappings = Mappings {
                shown: catalog(count as i64),
                given: 0,
                total: 7,
                is_over: false,
            };
            mappings.collect::<Vec<_>>()
        };
        for (count, expected) in [(0, 1), (1, 1), (PIECE, 1), (PIECE + 1, 2), (3 * PIECE, 3)] {
            let pieces = pieces(count);
            assert_eq!(pieces.len(), expected, "{count}");
            let whole: Value = serde_json::from_slice(&pieces.concat()).unwrap();
            let names: Vec<_> = (0..count).map(|n| json!(format!("c{n}"))).collect();
            let shown = whole["collection_mappings"].as_array().unwrap();
            let shown: Vec<_> = shown.iter().map(|one| one["collection_name"].clone()).collect();
            assert_eq!(shown, names);
            assert_eq!(whole["total_mappings"], json!(7));
        }
    }

    #[test]
    fn a_part_is_everything_unless_told() {
        let part = |query| Part::of(query).map_err(drop);
        let all = Part {
            offset: 0,
            limit: usize::MAX,
        };
        assert_eq!(part(None), Ok(all));
        assert_eq!(part(Some("")), Ok(all));
        assert_eq!(part(Some("offset=3&limit=2&x=y")), Ok(Part { offset: 3, limit: 2 }));
        assert_eq!(part(Some("limit=-1")), Err(()));
        assert_eq!(part(Some("limit=two")), Err(()));
    }
}
