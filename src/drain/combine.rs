//! Adjacent rows of one kind become one upstream batch.
//!
//! Chroma's cost of a write is per request, not per record (chroma-facts.md 16), so a backlog of single records drains
//! many times faster in batches. Only rows that mean the same in any grouping are combined: same kind, same fields,
//! same form of embeddings, no id twice. Bodies are spliced as text: embeddings are never parsed.

use std::collections::BTreeSet;
use std::ops::Range;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::chroma::Op;
use crate::journal::PayloadRow;

const MAX_RECORDS: usize = 512;
const MAX_BYTES: usize = 8 << 20;

/// Some rows, by position, and the request body that stands for all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    pub rows: Range<usize>,
    pub body: Bytes,
}

#[derive(Deserialize)]
struct Body<'a> {
    #[serde(borrow)]
    ids: Vec<&'a RawValue>,
    #[serde(borrow, default)]
    embeddings: Option<Vec<&'a RawValue>>,
    #[serde(borrow, default)]
    metadatas: Option<Vec<&'a RawValue>>,
    #[serde(borrow, default)]
    documents: Option<Vec<&'a RawValue>>,
    #[serde(borrow, default)]
    uris: Option<Vec<&'a RawValue>>,
    #[serde(borrow, default, rename = "where")]
    filter: Option<&'a RawValue>,
    #[serde(borrow, default)]
    where_document: Option<&'a RawValue>,
    #[serde(default)]
    limit: Option<u64>,
}

impl<'a> Body<'a> {
    fn columns(&self) -> [(&'static str, Option<&Vec<&'a RawValue>>); 4] {
        [
            ("embeddings", self.embeddings.as_ref()),
            ("metadatas", self.metadatas.as_ref()),
            ("documents", self.documents.as_ref()),
            ("uris", self.uris.as_ref()),
        ]
    }

    /// Bodies of one shape can stand in one request.
    fn shape(&self) -> Option<Vec<u8>> {
        let whole = self.filter.is_none() && self.where_document.is_none() && self.limit.is_none();
        let aligned = self
            .columns()
            .iter()
            .all(|(_, column)| column.is_none_or(|values| values.len() == self.ids.len()));
        if !whole || !aligned || self.ids.is_empty() {
            return None;
        }
        let mut shape: Vec<u8> = self
            .columns()
            .iter()
            .map(|(_, column)| u8::from(column.is_some()))
            .collect();
        let forms = self.embeddings.iter().flatten().map(|value| value.get().as_bytes()[0]);
        let forms: BTreeSet<u8> = forms.collect();
        if forms.len() > 1 {
            return None;
        }
        shape.extend(forms);
        Some(shape)
    }
}

struct Group<'a> {
    start: usize,
    op: &'a Op,
    shape: Vec<u8>,
    ids: BTreeSet<String>,
    bodies: Vec<Body<'a>>,
    bytes: usize,
}

/// Groups rows into the fewest requests that keep their order.
pub fn plan(rows: &[PayloadRow]) -> Vec<Batch> {
    let mut batches = Vec::new();
    let mut group: Option<Group> = None;
    for (position, row) in rows.iter().enumerate() {
        let candidate = candidate(row);
        if let (Some(current), Some((body, shape, ids))) = (&mut group, &candidate) {
            let fits = current.op == &row.op
                && current.shape == *shape
                && current.ids.len() + ids.len() <= MAX_RECORDS
                && current.bytes + row.body.len() <= MAX_BYTES
                && current.ids.is_disjoint(ids);
            if fits {
                let _ = body;
                let Some((body, _, ids)) = candidate else { continue };
                current.ids.extend(ids);
                current.bodies.push(body);
                current.bytes += row.body.len();
                continue;
            }
        }
        close(rows, group.take(), position, &mut batches);
        match candidate {
            Some((body, shape, ids)) => {
                group = Some(Group {
                    start: position,
                    op: &row.op,
                    shape,
                    ids,
                    bodies: vec![body],
                    bytes: row.body.len(),
                });
            }
            None => batches.push(Batch {
                rows: position..position + 1,
                body: row.body.clone(),
            }),
        }
    }
    close(rows, group, rows.len(), &mut batches);
    batches
}

/// A row that may be combined, with its shape and ids.
fn candidate(row: &PayloadRow) -> Option<(Body<'_>, Vec<u8>, BTreeSet<String>)> {
    if !row.op.is_record() || row.refused || row.in_doubt {
        return None;
    }
    let body: Body = serde_json::from_slice(&row.body).ok()?;
    let shape = body.shape()?;
    let mut ids = BTreeSet::new();
    for id in &body.ids {
        if !ids.insert(serde_json::from_str(id.get()).ok()?) {
            return None;
        }
    }
    Some((body, shape, ids))
}

fn close(rows: &[PayloadRow], group: Option<Group>, end: usize, batches: &mut Vec<Batch>) {
    let Some(group) = group else { return };
    let body = match group.bodies.as_slice() {
        [_] => rows[group.start].body.clone(),
        bodies => splice(bodies),
    };
    batches.push(Batch {
        rows: group.start..end,
        body,
    });
}

fn splice(bodies: &[Body]) -> Bytes {
    let mut text = String::from("{\"ids\":[");
    join(&mut text, bodies.iter().flat_map(|body| &body.ids));
    text.push(']');
    for (column, (name, first)) in bodies[0].columns().iter().enumerate() {
        if first.is_some() {
            text.push_str(&format!(",\"{name}\":["));
            join(
                &mut text,
                bodies.iter().filter_map(|body| body.columns()[column].1).flatten(),
            );
            text.push(']');
        }
    }
    text.push('}');
    Bytes::from(text)
}

fn join<'a, 'b: 'a>(text: &mut String, values: impl Iterator<Item = &'a &'b RawValue>) {
    for (position, value) in values.enumerate() {
        if position > 0 {
            text.push(',');
        }
        text.push_str(value.get());
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use uuid::Uuid;

    use super::*;

    fn row(op: Op, body: &str) -> PayloadRow {
        PayloadRow {
            id: Uuid::nil(),
            node: "replica".to_owned(),
            generation: Some(1),
            lsn: 1,
            op,
            body: Bytes::copy_from_slice(body.as_bytes()),
            refused: false,
            in_doubt: false,
            attempts: 0,
            parked: None,
            created_at: DateTime::UNIX_EPOCH,
        }
    }

    fn plan_text(rows: &[PayloadRow]) -> Vec<(Range<usize>, String)> {
        plan(rows)
            .into_iter()
            .map(|batch| (batch.rows, String::from_utf8_lossy(&batch.body).into_owned()))
            .collect()
    }

    #[test]
    fn adjacent_upserts_become_one_batch_with_untouched_embeddings() {
        let rows = [
            row(
                Op::Upsert,
                r#"{"ids":["a"],"embeddings":[[0.10,1e0]],"documents":["x"],"metadatas":null}"#,
            ),
            row(
                Op::Upsert,
                r#"{"ids":["b","c"],"embeddings":[[2,3],[4,5]],"documents":[null,"z"]}"#,
            ),
        ];
        let expected = r#"{"ids":["a","b","c"],"embeddings":[[0.10,1e0],[2,3],[4,5]],"documents":["x",null,"z"]}"#;
        assert_eq!(plan_text(&rows), vec![(0..2, expected.to_owned())]);
    }

    #[test]
    fn an_id_twice_a_change_of_kind_and_a_change_of_fields_start_a_new_batch() {
        let a = r#"{"ids":["a"],"embeddings":[[1]]}"#;
        let b = r#"{"ids":["b"],"embeddings":[[1]]}"#;
        let rows = [
            row(Op::Upsert, a),
            row(Op::Upsert, a),
            row(Op::Upsert, b),
            row(Op::Add, r#"{"ids":["c"],"embeddings":[[1]]}"#),
            row(Op::Add, r#"{"ids":["d"],"embeddings":[[1]],"uris":["u"]}"#),
            row(Op::Add, r#"{"ids":["e"],"embeddings":["AACAPw=="],"uris":["u"]}"#),
        ];
        let ranges: Vec<_> = plan(&rows).into_iter().map(|batch| batch.rows).collect();
        assert_eq!(ranges, vec![0..1, 1..3, 3..4, 4..5, 5..6]);
    }

    #[test]
    fn escaped_ids_are_compared_by_what_they_mean() {
        let rows = [
            row(Op::Delete, r#"{"ids":["a"]}"#),
            row(Op::Delete, r#"{"ids":["\u0061"]}"#),
        ];
        assert_eq!(plan(&rows).len(), 2);
    }

    #[test]
    fn rows_that_stand_alone_are_sent_as_they_came() {
        let odd = r#"{"ids":["a"],"limit":1}"#;
        let mut doubtful = row(Op::Delete, r#"{"ids":["b"]}"#);
        doubtful.in_doubt = true;
        let mut refused = row(Op::Delete, r#"{"ids":["c"]}"#);
        refused.refused = true;
        let rows = [row(Op::Delete, odd), doubtful, refused, row(Op::Delete, "not json")];
        let expected: Vec<_> = rows
            .iter()
            .enumerate()
            .map(|(position, row)| (position..position + 1, String::from_utf8_lossy(&row.body).into_owned()))
            .collect();
        assert_eq!(plan_text(&rows), expected);
    }
}
