//! Rows of one kind become one upstream batch, so that a backlog of single records drains many times faster than it was
//! written. Rows change places for it only where nobody can tell afterwards: those of one record keep their order, and so
//! do adds and upserts, because what is drained later would stand later in what `get` answers than on the node that took
//! it live. What stands alone, and what may concern any record, is passed by nothing.

use std::collections::HashSet;
use std::ops::Range;

use bytes::Bytes;

use crate::chroma::{BatchLimits, Op, Piece, splice};
use crate::journal::PayloadRow;

/// When so many records were passed, no more rows are looked for that might join: the work on a page is bounded.
const MOST_PASSED: usize = 4096;

/// Some rows, by position, and the request body that stands for all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    pub rows: Range<usize>,
    /// How many its body is known to speak of.
    pub records: usize,
    pub body: Bytes,
}

/// Rows of a lane, each parsed once, in an order that is as good as theirs.
pub struct Page {
    rows: Vec<PayloadRow>,
    /// What a row brings that may be combined.
    pieces: Vec<Option<Piece>>,
}

impl Page {
    pub fn new(rows: Vec<PayloadRow>) -> Self {
        let pieces: Vec<_> = rows.iter().map(piece).collect();
        let order = arrange(&rows, &pieces);
        let mut parsed: Vec<_> = rows.into_iter().zip(pieces).map(Some).collect();
        let (rows, pieces) = order.into_iter().filter_map(|place| parsed[place].take()).unzip();
        Self { rows, pieces }
    }

    pub fn rows(&self) -> &[PayloadRow] {
        &self.rows
    }

    /// The request that begins with the row at `start`: as many rows as can stand in one. `None` at the end.
    pub fn batch(&self, start: usize, limits: BatchLimits) -> Option<Batch> {
        let (end, records) = self.group(start, limits)?;
        let (rows, pieces) = (&self.rows[start..end], &self.pieces[start..end]);
        let body = match rows {
            [row] => row.body.clone(),
            rows => {
                let members = pieces.iter().zip(rows);
                let members = members.filter_map(|(piece, row)| Some((piece.as_ref()?, row.body.as_ref())));
                splice(&members.collect::<Vec<_>>())
            }
        };
        Some(Batch {
            rows: start..end,
            records,
            body,
        })
    }

    /// How many requests it takes.
    pub fn batches(&self, limits: BatchLimits) -> usize {
        std::iter::successors(Some(0), |&start| Some(self.group(start, limits)?.0)).count() - 1
    }

    /// Where the request that begins with the row at `start` ends, and how many records it has.
    fn group(&self, start: usize, limits: BatchLimits) -> Option<(usize, usize)> {
        let first = self.rows.get(start)?;
        let Some(piece) = &self.pieces[start] else {
            return Some((start + 1, 1));
        };
        let mut ids: HashSet<&str> = piece.ids.iter().map(String::as_str).collect();
        let (shape, mut bytes, mut end) = (piece.shape, first.body.len(), start + 1);
        for (row, piece) in self.rows.iter().zip(&self.pieces).skip(end) {
            let Some(piece) = piece else { break };
            let joins = row.op == first.op
                && piece.shape == shape
                && limits.admit((ids.len(), bytes), (piece.ids.len(), row.body.len()))
                && piece.ids.iter().all(|id| !ids.contains(id.as_str()));
            if !joins {
                break;
            }
            ids.extend(piece.ids.iter().map(String::as_str));
            bytes += row.body.len();
            end += 1;
        }
        Some((end, ids.len()))
    }
}

/// Places of the rows in the order in which they are sent: those that can stand in one request come together.
fn arrange(rows: &[PayloadRow], pieces: &[Option<Piece>]) -> Vec<usize> {
    let creates = |place: usize| matches!(rows[place].op, Op::Add | Op::Upsert);
    let mut order = Vec::with_capacity(rows.len());
    let mut left: Vec<usize> = (0..rows.len()).collect();
    while let Some(&first) = left.first() {
        let Some(shape) = pieces[first].as_ref().map(|piece| piece.shape) else {
            order.push(first);
            left.remove(0);
            continue;
        };
        let mut passed = Vec::new();
        let mut records: HashSet<&str> = HashSet::new();
        let mut end = left.len();
        for (position, &place) in left.iter().enumerate() {
            let Some(piece) = &pieces[place] else {
                end = position;
                break;
            };
            let is_alike = rows[place].op == rows[first].op && piece.shape == shape;
            if is_alike && !piece.ids.iter().any(|id| records.contains(id.as_str())) {
                order.push(place);
                continue;
            }
            passed.push(place);
            records.extend(piece.ids.iter().map(String::as_str));
            if creates(first) && creates(place) || records.len() >= MOST_PASSED {
                end = position + 1;
                break;
            }
        }
        passed.extend_from_slice(&left[end..]);
        left = passed;
    }
    order
}

/// What a row that may be combined brings.
fn piece(row: &PayloadRow) -> Option<Piece> {
    if !row.op.is_record() || row.refused || row.in_doubt {
        return None;
    }
    Piece::of(&row.body)
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use uuid::Uuid;

    use super::*;
    use crate::chroma::Op;

    const LIMITS: BatchLimits = BatchLimits {
        records: 100,
        bytes: 10_000,
    };

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

    fn plan(rows: &[PayloadRow], limits: BatchLimits) -> Vec<Batch> {
        let page = Page::new(rows.to_vec());
        let next = |start: usize| page.batch(start, limits);
        let batches: Vec<Batch> = std::iter::successors(next(0), |batch| next(batch.rows.end)).collect();
        assert_eq!(page.batches(limits), batches.len());
        batches
    }

    fn plan_text(rows: &[PayloadRow]) -> Vec<(Range<usize>, String)> {
        plan(rows, LIMITS)
            .into_iter()
            .map(|batch| (batch.rows, String::from_utf8_lossy(&batch.body).into_owned()))
            .collect()
    }

    #[test]
    fn a_batch_has_an_end() {
        let rows: Vec<_> = ["a", "b", "c", "d", "e"]
            .map(|id| row(Op::Delete, &format!(r#"{{"ids":["{id}"]}}"#)))
            .into();
        let ranges = |records, bytes| -> Vec<Range<usize>> {
            let batches = plan(&rows, BatchLimits { records, bytes });
            batches.into_iter().map(|batch| batch.rows).collect()
        };
        assert_eq!(ranges(2, 1000), vec![0..2, 2..4, 4..5]);
        assert_eq!(ranges(9, 13 * 3), vec![0..3, 3..5]);
        assert_eq!(ranges(9, 1), vec![0..1, 1..2, 2..3, 3..4, 4..5]);
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
        let ranges: Vec<_> = plan(&rows, LIMITS).into_iter().map(|batch| batch.rows).collect();
        assert_eq!(ranges, vec![0..1, 1..3, 3..4, 4..5, 5..6]);
    }

    fn order(rows: &[PayloadRow]) -> Vec<usize> {
        let pieces: Vec<_> = rows.iter().map(piece).collect();
        arrange(rows, &pieces)
    }

    fn of(op: Op, id: &str) -> PayloadRow {
        let embeddings = if op == Op::Delete { "" } else { r#","embeddings":[[1]]"# };
        row(op, &format!(r#"{{"ids":["{id}"]{embeddings}}}"#))
    }

    #[test]
    fn rows_of_one_kind_come_together_over_others_of_other_records() {
        use Op::{Add, Delete, Update, Upsert};
        let reindexed = [
            of(Delete, "a"),
            of(Add, "a"),
            of(Delete, "b"),
            of(Add, "b"),
            of(Delete, "c"),
        ];
        assert_eq!(order(&reindexed), [0, 2, 4, 1, 3]);
        assert_eq!(plan(&reindexed, LIMITS).len(), 2);
        let one_record = [of(Delete, "a"), of(Add, "a"), of(Delete, "a"), of(Add, "a")];
        assert_eq!(order(&one_record), [0, 1, 2, 3]);
        let creating = [
            of(Add, "a"),
            of(Update, "x"),
            of(Upsert, "b"),
            of(Add, "c"),
            of(Update, "y"),
        ];
        assert_eq!(order(&creating), [0, 1, 4, 2, 3], "what is made first stands first");
    }

    #[test]
    fn nothing_passes_a_row_that_stands_alone_or_may_concern_any_record() {
        use Op::{Add, Delete, Update};
        let by_filter = row(Delete, r#"{"where":{"n":1}}"#);
        let rows = [
            of(Add, "a"),
            of(Update, "x"),
            by_filter,
            of(Add, "b"),
            of(Update, "y"),
            of(Add, "c"),
        ];
        assert_eq!(order(&rows), [0, 1, 2, 3, 5, 4]);
        let mut doubtful = of(Update, "y");
        doubtful.in_doubt = true;
        let rows = [of(Update, "x"), of(Add, "a"), doubtful, of(Update, "z")];
        assert_eq!(order(&rows), [0, 1, 2, 3]);
    }

    proptest::proptest! {
        /// Each record sees its writes in their order, creating writes keep theirs, and all rows are there.
        #[test]
        fn an_order_is_as_good_as_that_of_the_rows(kinds in proptest::collection::vec((0_u8..5, 0_u8..6), 0..60)) {
            let rows: Vec<_> = kinds
                .iter()
                .map(|&(kind, id)| match kind {
                    0 => of(Op::Add, &id.to_string()),
                    1 => of(Op::Upsert, &id.to_string()),
                    2 => of(Op::Update, &id.to_string()),
                    3 => of(Op::Delete, &id.to_string()),
                    _ => row(Op::Delete, r#"{"where":{"n":1}}"#),
                })
                .collect();
            let order = order(&rows);
            let among = |keep: &dyn Fn(usize) -> bool| order.iter().copied().filter(|&place| keep(place)).collect::<Vec<_>>();
            let is_filter = |place: usize| kinds[place].0 == 4;
            let mut all = order.clone();
            all.sort_unstable();
            assert_eq!(all, (0..rows.len()).collect::<Vec<_>>());
            assert!(among(&|place| kinds[place].0 < 2 || is_filter(place)).is_sorted());
            for id in 0..6 {
                assert!(among(&|place| kinds[place].1 == id || is_filter(place)).is_sorted());
            }
        }
    }

    #[test]
    fn escaped_ids_are_compared_by_what_they_mean() {
        let rows = [
            row(Op::Delete, r#"{"ids":["a"]}"#),
            row(Op::Delete, r#"{"ids":["\u0061"]}"#),
        ];
        assert_eq!(plan(&rows, LIMITS).len(), 2);
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
