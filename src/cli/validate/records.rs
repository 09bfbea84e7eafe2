//! What a collection ought to hold, record by record and in which order, and how that differs from what is found. Pure.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value, json};

/// Differences that are named in a complaint.
const NAMED: usize = 3;

/// One record.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    pub id: String,
    /// `None`: the server shows none, or not all of its numbers.
    pub embedding: Option<Vec<f32>>,
    pub document: Option<String>,
    pub metadata: Map<String, Value>,
    pub uri: Option<String>,
}

/// The records in the answer of a `get`.
///
/// # Errors
/// The answer has not the form of one.
pub fn parse(answer: &Value) -> Result<Vec<Record>, String> {
    let ids = answer["ids"].as_array().ok_or_else(|| format!("no ids in {answer}"))?;
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let numbers = |value: &Value| -> Option<Vec<f32>> {
        let numbers = value.as_array()?.iter();
        // What a server writes are the shortest digits of a 32-bit number: cutting a 64-bit one to it is exact.
        numbers
            .map(|number| number.as_f64().map(|number| number as f32))
            .collect()
    };
    let record = |(n, id): (usize, &Value)| {
        Ok(Record {
            id: text(id).ok_or_else(|| format!("an id that is no text in {answer}"))?,
            embedding: numbers(&answer["embeddings"][n]),
            document: text(&answer["documents"][n]),
            metadata: answer["metadatas"][n].as_object().cloned().unwrap_or_default(),
            uri: text(&answer["uris"][n]),
        })
    };
    ids.iter().enumerate().map(record).collect()
}

/// The body of an add, upsert or update of these.
pub fn body(records: &[Record]) -> Value {
    let column = |of: fn(&Record) -> Value| records.iter().map(of).collect::<Vec<_>>();
    json!({
        "ids": column(|record| json!(record.id)),
        "embeddings": column(|record| json!(record.embedding)),
        "documents": column(|record| json!(record.document)),
        "metadatas": column(|record| json!(record.metadata)),
        "uris": column(|record| json!(record.uri)),
    })
}

/// Writes these over what is there, as a server does: metadata is merged, the place stays.
pub fn upsert(held: &mut Vec<Record>, records: &[Record]) {
    for record in records {
        let Some(old) = held.iter_mut().find(|old| old.id == record.id) else {
            held.push(record.clone());
            continue;
        };
        old.embedding.clone_from(&record.embedding);
        old.metadata.extend(record.metadata.clone());
        // Null means no change.
        old.document = record.document.clone().or(old.document.take());
        old.uri = record.uri.clone().or(old.uri.take());
    }
}

/// `None`: they are equal, in the same order; else what is wrong, for people.
pub fn difference(expected: &[Record], found: &[Record]) -> Option<String> {
    let ids = |records: &[Record]| records.iter().map(|record| record.id.clone()).collect::<HashSet<_>>();
    let (wanted, there) = (ids(expected), ids(found));
    let lacking = expected.iter().filter(|record| !there.contains(&record.id));
    if let Some(text) = named("missing", lacking.map(|record| record.id.as_str())) {
        return Some(text);
    }
    let surplus = found.iter().filter(|record| !wanted.contains(&record.id));
    if let Some(text) = named("there and ought not to be", surplus.map(|record| record.id.as_str())) {
        return Some(text);
    }
    let by_id: HashMap<&str, &Record> = found.iter().map(|record| (record.id.as_str(), record)).collect();
    let mut wrong = expected.iter().filter_map(|record| {
        let other = by_id.get(record.id.as_str())?;
        Some((record.id.as_str(), field(record, other)?))
    });
    if let Some((id, what)) = wrong.next() {
        return Some(format!("{} records differ: {id}: {what}", wrong.count() + 1));
    }
    let mut places = expected.iter().zip(found).enumerate();
    if let Some((n, (a, b))) = places.find(|(_, (a, b))| a.id != b.id) {
        return Some(format!(
            "the order differs from the order of writing: record {n} is {} instead of {}",
            b.id, a.id
        ));
    }
    (expected.len() != found.len()).then(|| format!("{} records instead of {}", found.len(), expected.len()))
}

fn named<'a>(what: &str, ids: impl Iterator<Item = &'a str>) -> Option<String> {
    let ids: Vec<&str> = ids.collect();
    if ids.is_empty() {
        return None;
    }
    let more = if ids.len() > NAMED { ", ..." } else { "" };
    let shown = ids[..ids.len().min(NAMED)].join(", ");
    Some(format!("{} records are {what}: {shown}{more}", ids.len()))
}

/// The first field that differs.
fn field(expected: &Record, found: &Record) -> Option<String> {
    let told = |what: &str, a: Value, b: Value| Some(format!("{what} is {b} instead of {a}"));
    if expected.document != found.document {
        return told("the document", json!(expected.document), json!(found.document));
    }
    if expected.metadata != found.metadata {
        return told("the metadata", json!(expected.metadata), json!(found.metadata));
    }
    if expected.uri != found.uri {
        return told("the uri", json!(expected.uri), json!(found.uri));
    }
    let bits = |embedding: &Option<Vec<f32>>| {
        let numbers = embedding.as_ref()?.iter();
        Some(numbers.map(|number| number.to_bits()).collect::<Vec<_>>())
    };
    if bits(&expected.embedding) != bits(&found.embedding) {
        return told("the embedding", json!(expected.embedding), json!(found.embedding));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str, document: &str) -> Record {
        Record {
            id: id.to_owned(),
            embedding: Some(vec![0.5, 0.1]),
            document: Some(document.to_owned()),
            metadata: json!({"kind": "x", "part": 1}).as_object().cloned().unwrap_or_default(),
            uri: None,
        }
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        let records = [record("a", "one"), record("b", "two")];
        let answer = body(&records);
        assert_eq!(difference(&records, &parse(&answer).expect("records")), None);
        assert!(parse(&json!({"error": "x"})).is_err());
    }

    #[test]
    fn every_difference_is_seen() {
        let whole = [record("a", "one"), record("b", "two"), record("c", "three")];
        let of = |change: fn(&mut Vec<Record>)| {
            let mut found = whole.to_vec();
            change(&mut found);
            difference(&whole, &found).expect("a difference")
        };
        assert_eq!(of(|found| drop(found.remove(1))), "1 records are missing: b");
        assert_eq!(
            of(|found| found.push(record("d", "four"))),
            "1 records are there and ought not to be: d"
        );
        assert!(of(|found| found.push(record("c", "three"))).contains("4 records instead of 3"));
        assert!(of(|found| found.swap(0, 1)).contains("the order differs"));
        assert!(of(|found| found[0].document = None).contains("the document is null instead of \"one\""));
        assert!(of(|found| drop(found[2].metadata.remove("part"))).contains("the metadata"));
        assert!(of(|found| found[2].uri = Some(String::new())).contains("the uri"));
        assert!(of(|found| found[2].embedding = Some(vec![0.5, 0.2])).contains("the embedding"));
        assert!(of(|found| found[2].embedding = None).contains("the embedding"));
    }

    #[test]
    fn an_upsert_merges_and_keeps_the_place() {
        let mut held = vec![record("a", "one"), record("b", "two")];
        let mut new = record("a", "changed");
        new.metadata = json!({"part": 2}).as_object().cloned().unwrap_or_default();
        upsert(&mut held, &[new, record("c", "three")]);
        let ids: Vec<&str> = held.iter().map(|record| record.id.as_str()).collect();
        assert_eq!(ids, ["a", "b", "c"]);
        assert_eq!(json!(held[0].metadata), json!({"kind": "x", "part": 2}));
        assert_eq!(held[0].document.as_deref(), Some("changed"));
    }
}
