//! Several bodies of one kind as one body.
//!
//! Chroma's cost of a write is per request, not per record (chroma-facts.md 16). Bodies are spliced as text: what stands
//! between the brackets of each field is copied, and embeddings are never read as numbers. Only bodies that mean the
//! same in any grouping have a *shape*, and only those of one shape stand together: the same fields, one form of
//! embeddings with one dimension, no id twice. So nothing is refused together that would not be refused alone for the
//! same reason, except what is about one record's content.

use std::ops::Range;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::record::dimension;

const FIELDS: [&str; 5] = ["ids", "embeddings", "metadatas", "documents", "uris"];

/// Most records in one request: what Chroma names as its `max_batch_size` (chroma-facts.md 7).
pub const MOST_RECORDS: usize = 5461;

/// How much one request may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    pub records: usize,
    /// Of bodies; a larger body goes alone.
    pub bytes: usize,
}

impl BatchLimits {
    /// Whether so much more fits beside what is there.
    pub fn admit(&self, (records, bytes): (usize, usize), (more_records, more_bytes): (usize, usize)) -> bool {
        records + more_records <= self.records && bytes + more_bytes <= self.bytes
    }
}

/// What two bodies of one operation have to have in common to stand in one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    fields: [bool; FIELDS.len()],
    /// First character of each embedding (`[`, `"` or `n`), and numbers in each.
    embeddings: Option<(u8, usize)>,
}

/// A body that can be spliced, taken apart once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    pub shape: Shape,
    /// Each once.
    pub ids: Vec<String>,
    /// Where the elements of each field stand in the body.
    elements: [Option<Range<usize>>; FIELDS.len()],
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

impl Piece {
    /// Takes a record write's body apart; `None` for one that has to go alone.
    pub fn of(body: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(body).ok()?;
        let parsed: Body = serde_json::from_str(text).ok()?;
        let is_whole = parsed.filter.is_none() && parsed.where_document.is_none() && parsed.limit.is_none();
        if !is_whole || parsed.ids.is_empty() {
            return None;
        }
        let ids: Vec<String> = parsed
            .ids
            .iter()
            .map(|id| serde_json::from_str(id.get()).ok())
            .collect::<Option<_>>()?;
        let mut sorted: Vec<&String> = ids.iter().collect();
        sorted.sort_unstable();
        if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
            return None;
        }
        let columns = [
            Some(&parsed.ids),
            parsed.embeddings.as_ref(),
            parsed.metadatas.as_ref(),
            parsed.documents.as_ref(),
            parsed.uris.as_ref(),
        ];
        if columns.iter().flatten().any(|column| column.len() != ids.len()) {
            return None;
        }
        let embeddings = match &parsed.embeddings {
            Some(column) => Some(one_form(column)?),
            None => None,
        };
        Some(Self {
            shape: Shape {
                fields: columns.map(|column| column.is_some()),
                embeddings,
            },
            elements: columns.map(|column| column.and_then(|column| span(text, column))),
            ids,
        })
    }
}

/// The form and dimension that all of them have.
fn one_form(embeddings: &[&RawValue]) -> Option<(u8, usize)> {
    let mut forms = embeddings.iter().map(|raw| {
        let form = raw.get().as_bytes()[0];
        let numbers = if form == b'n' { Some(0) } else { dimension(raw.get()) };
        Some((form, numbers?))
    });
    let first = forms.next()??;
    forms.all(|form| form == Some(first)).then_some(first)
}

/// From the first element to the last, with what is between them.
fn span(text: &str, column: &[&RawValue]) -> Option<Range<usize>> {
    let start = |raw: &RawValue| raw.get().as_ptr() as usize - text.as_ptr() as usize;
    let (first, last) = (column.first()?, column.last()?);
    Some(start(first)..start(last) + last.get().len())
}

/// One body in the place of several of one shape; in their order.
pub fn splice(members: &[(&Piece, &[u8])]) -> Bytes {
    let length: usize = members.iter().map(|(_, body)| body.len()).sum();
    let mut text = Vec::with_capacity(length);
    for (field, name) in FIELDS.iter().enumerate() {
        let elements = members
            .iter()
            .filter_map(|(piece, body)| Some(&body[piece.elements[field].clone()?]));
        for (position, part) in elements.enumerate() {
            if position > 0 {
                text.push(b',');
            } else {
                text.extend_from_slice(if field == 0 { b"{\"" } else { b",\"" });
                text.extend_from_slice(name.as_bytes());
                text.extend_from_slice(b"\":[");
            }
            text.extend_from_slice(part);
        }
        if members.first().is_some_and(|(piece, _)| piece.shape.fields[field]) {
            text.push(b']');
        }
    }
    text.push(b'}');
    Bytes::from(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spliced(bodies: &[&str]) -> String {
        let pieces: Vec<Piece> = bodies
            .iter()
            .map(|body| Piece::of(body.as_bytes()).expect("a piece"))
            .collect();
        for piece in &pieces {
            assert_eq!(piece.shape, pieces[0].shape);
        }
        let members: Vec<_> = pieces
            .iter()
            .zip(bodies)
            .map(|(piece, body)| (piece, body.as_bytes()))
            .collect();
        String::from_utf8(splice(&members).to_vec()).expect("text")
    }

    fn shape(body: &str) -> Option<Shape> {
        Piece::of(body.as_bytes()).map(|piece| piece.shape)
    }

    #[test]
    fn values_are_copied_as_they_came() {
        let one =
            r#" {"documents" : [ "x,]" ], "ids":["\u0061"],"zz":[1],"embeddings":[[0.10, 1e0]],"metadatas":null}"#;
        let two = r#"{"ids":["b", "c"],"embeddings":[[2,3] ,[4,5]],"documents":[null,"z"]}"#;
        assert_eq!(
            spliced(&[one, two]),
            r#"{"ids":["\u0061","b", "c"],"embeddings":[[0.10, 1e0],[2,3] ,[4,5]],"documents":["x,]",null,"z"]}"#
        );
        let all = r#"{"uris":["u"],"ids":["a"],"metadatas":[{"k":[1,2],"l":"}"}],"documents":["d"],"embeddings":["AACAPw=="]}"#;
        assert_eq!(
            spliced(&[all]),
            r#"{"ids":["a"],"embeddings":["AACAPw=="],"metadatas":[{"k":[1,2],"l":"}"}],"documents":["d"],"uris":["u"]}"#
        );
        assert_eq!(
            spliced(&[r#"{"ids":["a"],"limit":null}"#, r#"{"ids":["b"]}"#]),
            r#"{"ids":["a","b"]}"#
        );
    }

    #[test]
    fn what_nodes_judge_together_has_one_shape() {
        let plain = r#"{"ids":["a"],"embeddings":[[1,2]]}"#;
        for same in [
            r#"{"ids":["b","c"],"embeddings":[[1,2],[3e9, -4]]}"#,
            r#"{"embeddings":[[1,2]],"ids":["a"],"uris":null}"#,
        ] {
            assert_eq!(shape(same), shape(plain), "{same}");
        }
        for other in [
            r#"{"ids":["a"]}"#,
            r#"{"ids":["a"],"embeddings":[[1,2,3]]}"#,
            r#"{"ids":["a"],"embeddings":["AACAPwAAAEA="]}"#,
            r#"{"ids":["a"],"embeddings":[null]}"#,
            r#"{"ids":["a"],"embeddings":[[1,2]],"documents":["x"]}"#,
        ] {
            assert!(shape(other).is_some() && shape(other) != shape(plain), "{other}");
        }
    }

    #[test]
    fn what_stands_alone_has_no_shape() {
        for body in [
            "not json",
            r#"{"ids":[]}"#,
            r#"{"ids":["a","a"]}"#,
            r#"{"ids":["a","\u0061"]}"#,
            r#"{"ids":["a"],"limit":1}"#,
            r#"{"ids":["a"],"where":{"k":1}}"#,
            r#"{"ids":["a"],"where_document":{"$contains":"x"}}"#,
            r#"{"ids":["a","b"],"embeddings":[[1]]}"#,
            r#"{"ids":["a","b"],"embeddings":[[1],[1,2]]}"#,
            r#"{"ids":["a","b"],"embeddings":[[1],null]}"#,
            r#"{"ids":["a","b"],"embeddings":[[1],"AACAPw=="]}"#,
            r#"{"ids":["a"],"embeddings":[[]]}"#,
            r#"{"ids":["a"],"embeddings":["AACAPw"]}"#,
            r#"{"ids":["a"],"documents":[]}"#,
        ] {
            assert_eq!(shape(body), None, "{body}");
        }
    }
}
