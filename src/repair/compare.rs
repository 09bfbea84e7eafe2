//! What makes two copies of a record different, and which writes make them equal. Pure.
//!
//! Numbers are compared as the node wrote them: one serializer made both texts, so equal texts mean equal values, and
//! `1` stays apart from `1.0`. What one server does not keep (chroma-facts.md 12: `{}` beside null, `-0.0`) cannot
//! differ between two of them. Embeddings are compared by their bits, except in cosine spaces, where what a node reads
//! back is not what it was given (chroma-facts.md 11).

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bytes::Bytes;

/// A record as a node shows it; numbers, lists and embeddings as JSON text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub id: String,
    pub embedding: Option<Box<str>>,
    pub metadata: BTreeMap<String, Box<str>>,
    pub document: Option<String>,
    pub uri: Option<String>,
}

/// How a collection measures distance, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// What was written is read back bit by bit.
    Exact,
    Cosine,
}

/// How far apart two readings of one number in a cosine space may be.
const RELATIVE: f64 = 1e-6;

/// The numbers of an embedding; `None` in it is a number that the node cannot show.
fn numbers(text: &str) -> Option<Vec<Option<f32>>> {
    let inner = text.trim().strip_prefix('[')?.strip_suffix(']')?;
    if inner.trim().is_empty() {
        return Some(vec![]);
    }
    inner
        .split(',')
        .map(|number| match number.trim() {
            "null" => Some(None),
            number => number.parse().ok().map(Some),
        })
        .collect()
}

fn same_embedding(a: Option<&str>, b: Option<&str>, space: Space) -> bool {
    let (a, b) = match (a, b) {
        (None, None) => return true,
        (Some(a), Some(b)) if a == b => return true,
        (Some(a), Some(b)) => (a, b),
        _ => return false,
    };
    let (Some(a), Some(b)) = (numbers(a), numbers(b)) else {
        return false;
    };
    let norm = a.iter().flatten().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    // What normalising makes a denormal loses its digits.
    let floor = norm.max(1.0) * f64::from(f32::MIN_POSITIVE);
    let close = |a: f32, b: f32| {
        let (x, y) = (f64::from(a), f64::from(b));
        (x - y).abs() <= (RELATIVE * x.abs().max(y.abs())).max(floor)
    };
    a.len() == b.len()
        && a.iter().zip(&b).all(|pair| match pair {
            (Some(a), Some(b)) => a.to_bits() == b.to_bits() || (space == Space::Cosine && close(*a, *b)),
            (None, None) => true,
            _ => false,
        })
}

fn same_value(a: &str, b: &str) -> bool {
    // The same text, or the same string escaped in two ways.
    a == b
        || (a.starts_with('"')
            && b.starts_with('"')
            && serde_json::from_str::<String>(a).ok() == serde_json::from_str::<String>(b).ok())
}

/// Whether two copies of a record are equal.
pub fn same(a: &Record, b: &Record, space: Space) -> bool {
    a.document == b.document
        && a.uri == b.uri
        && a.metadata.len() == b.metadata.len()
        && a.metadata
            .iter()
            .all(|(key, value)| b.metadata.get(key).is_some_and(|other| same_value(value, other)))
        && same_embedding(a.embedding.as_deref(), b.embedding.as_deref(), space)
}

/// Whether a record can be written to another node: it has an embedding, and one without numbers that no JSON can hold.
pub fn readable(record: &Record) -> Option<&str> {
    record.embedding.as_deref().filter(|text| !text.contains("null"))
}

/// The writes that make some records of one node equal to another's, in the order in which they are to be sent.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Mend {
    pub delete: Option<Bytes>,
    /// What the target does not have, or not any more then.
    pub append: Option<Bytes>,
    pub upsert: Option<Bytes>,
    /// What is deleted and appended again.
    pub again: Option<Bytes>,
    /// What the writes are about.
    pub ids: BTreeSet<String>,
    /// Records that differ and are left alone: the source cannot show their embedding.
    pub unreadable: BTreeSet<String>,
    /// How many of those the target does not have at all.
    pub absent: usize,
}

/// Compares what two nodes have of the records `ids` and says what to write to the target.
pub fn mend<'a>(ids: impl IntoIterator<Item = &'a str>, source: &[Record], target: &[Record], space: Space) -> Mend {
    let there: HashMap<&str, &Record> = target.iter().map(|record| (record.id.as_str(), record)).collect();
    let wanted: BTreeSet<&str> = source.iter().map(|record| record.id.as_str()).collect();
    let mut delete: Vec<&str> = ids
        .into_iter()
        .filter(|id| there.contains_key(id) && !wanted.contains(id))
        .collect();
    let [mut append, mut again, mut upsert] = [(); 3].map(|()| Columns::default());
    let (mut unreadable, mut absent) = (BTreeSet::new(), 0);
    // In the source's order: what is appended comes to lie in that order.
    for record in source {
        match there.get(record.id.as_str()) {
            Some(old) if same(record, old, space) => {}
            old if readable(record).is_none() => {
                absent += usize::from(old.is_none());
                unreadable.insert(record.id.clone());
            }
            // A document cannot be cleared in place (chroma-facts.md 3.2).
            Some(old) if record.document.is_none() && old.document.is_some() => {
                delete.push(&record.id);
                append.push(record, None);
                again.push(record, None);
            }
            Some(old) => upsert.push(record, Some(old)),
            None => append.push(record, None),
        }
    }
    let mut touched: BTreeSet<String> = delete.iter().map(|id| (*id).to_owned()).collect();
    touched.extend(append.ids.iter().chain(&upsert.ids).map(|id| (*id).to_owned()));
    Mend {
        delete: (!delete.is_empty()).then(|| Bytes::from(format!("{{\"ids\":{}}}", json(&delete)))),
        append: append.body(),
        upsert: upsert.body(),
        again: again.body(),
        ids: touched,
        unreadable,
        absent,
    }
}

fn json<T: serde::Serialize + ?Sized>(value: &T) -> String {
    // Strings and lists of strings always serialize.
    serde_json::to_string(value).unwrap_or_default()
}

#[derive(Default)]
struct Columns<'a> {
    ids: Vec<&'a str>,
    embeddings: Vec<&'a str>,
    metadatas: Vec<String>,
    documents: Vec<&'a Option<String>>,
    uris: Vec<&'a Option<String>>,
}

impl<'a> Columns<'a> {
    /// `old`: what the target has under this id; keys that only it has are taken away by explicit nulls.
    fn push(&mut self, record: &'a Record, old: Option<&Record>) {
        let Some(embedding) = readable(record) else { return };
        self.embeddings.push(embedding);
        self.ids.push(&record.id);
        self.documents.push(&record.document);
        self.uris.push(&record.uri);
        let mut fields: Vec<String> = record
            .metadata
            .iter()
            .map(|(key, value)| format!("{}:{value}", json(key)))
            .collect();
        if let Some(old) = old {
            let surplus = old.metadata.keys().filter(|key| !record.metadata.contains_key(*key));
            fields.extend(surplus.map(|key| format!("{}:null", json(key))));
            if record.uri.is_none() && old.uri.is_some() {
                fields.push("\"chroma:uri\":null".to_owned());
            }
        }
        self.metadatas.push(match fields.is_empty() {
            true => "null".to_owned(),
            false => format!("{{{}}}", fields.join(",")),
        });
    }

    fn body(&self) -> Option<Bytes> {
        if self.ids.is_empty() {
            return None;
        }
        let mut text = format!(
            "{{\"ids\":{},\"embeddings\":[{}]",
            json(&self.ids),
            self.embeddings.join(",")
        );
        // A column of nulls says nothing.
        if self.metadatas.iter().any(|metadata| metadata != "null") {
            text.push_str(&format!(",\"metadatas\":[{}]", self.metadatas.join(",")));
        }
        for (name, column) in [("documents", &self.documents), ("uris", &self.uris)] {
            if column.iter().any(|value| value.is_some()) {
                text.push_str(&format!(",\"{name}\":{}", json(column)));
            }
        }
        text.push('}');
        Some(text.into())
    }
}

/// The `new_metadata` that makes a collection's metadata equal; `None` if it is.
pub fn mend_metadata(source: &BTreeMap<String, Box<str>>, target: &BTreeMap<String, Box<str>>) -> Option<Bytes> {
    let same = source.len() == target.len()
        && source
            .iter()
            .all(|(key, value)| target.get(key).is_some_and(|other| same_value(value, other)));
    if same {
        return None;
    }
    // It replaces the whole map; an empty one is refused, one of nulls is not (chroma-facts.md 3.1).
    let surplus = target.keys().filter(|key| !source.contains_key(*key));
    let fields: Vec<String> = source
        .iter()
        .map(|(key, value)| format!("{}:{value}", json(key)))
        .chain(surplus.map(|key| format!("{}:null", json(key))))
        .collect();
    Some(format!("{{\"new_metadata\":{{{}}}}}", fields.join(",")).into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(id: &str, embedding: &str) -> Record {
        Record {
            id: id.to_owned(),
            embedding: Some(embedding.into()),
            metadata: BTreeMap::new(),
            document: None,
            uri: None,
        }
    }

    fn with(mut record: Record, metadata: &[(&str, &str)], document: Option<&str>, uri: Option<&str>) -> Record {
        record.metadata = metadata
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).into()))
            .collect();
        record.document = document.map(str::to_owned);
        record.uri = uri.map(str::to_owned);
        record
    }

    fn text(body: &Option<Bytes>) -> &str {
        body.as_ref()
            .map_or("", |body| std::str::from_utf8(body).expect("UTF-8"))
    }

    #[test]
    fn what_is_missing_surplus_or_different_is_told_apart() {
        let source = [
            record("same", "[1.0,2.0]"),
            record("new", "[1.0]"),
            with(record("other", "[3.0]"), &[("k", "1")], Some("d"), None),
        ];
        let target = [
            record("same", "[1.0,2.0]"),
            record("gone", "[9.0]"),
            with(
                record("other", "[3.0]"),
                &[("k", "1.0"), ("old", "true")],
                Some("d"),
                Some("u"),
            ),
        ];
        let ids = ["same", "new", "other", "gone", "nowhere"];
        let mend = mend(ids, &source, &target, Space::Exact);
        assert_eq!(text(&mend.delete), r#"{"ids":["gone"]}"#);
        assert_eq!(text(&mend.append), r#"{"ids":["new"],"embeddings":[[1.0]]}"#);
        assert_eq!(
            text(&mend.upsert),
            r#"{"ids":["other"],"embeddings":[[3.0]],"metadatas":[{"k":1,"old":null,"chroma:uri":null}],"documents":["d"]}"#
        );
        assert_eq!(mend.again, None);
        assert_eq!(mend.ids.len(), 3);
    }

    #[test]
    fn a_document_that_has_to_go_takes_its_record_with_it() {
        let source = [record("new", "[2.0]"), with(record("x", "[1.0]"), &[], None, Some("u"))];
        let target = [with(record("x", "[1.0]"), &[("old", "1")], Some("stale"), None)];
        let mend = mend(["x", "new"], &source, &target, Space::Exact);
        assert_eq!(text(&mend.delete), r#"{"ids":["x"]}"#);
        let both = r#"{"ids":["new","x"],"embeddings":[[2.0],[1.0]],"uris":[null,"u"]}"#;
        assert_eq!(text(&mend.append), both);
        assert_eq!(text(&mend.again), r#"{"ids":["x"],"embeddings":[[1.0]],"uris":["u"]}"#);
        assert_eq!(mend.upsert, None);
    }

    #[test]
    fn nothing_is_written_that_could_not_be_read() {
        let mut bare = record("x", "[]");
        bare.embedding = None;
        for source in [bare, record("x", "[1.0,null]")] {
            let found = mend(["x"], std::slice::from_ref(&source), &[], Space::Exact);
            let expected = Mend {
                unreadable: BTreeSet::from(["x".to_owned()]),
                absent: 1,
                ..Mend::default()
            };
            assert_eq!(found, expected);
            // Equal all the same: nothing has to be written.
            let equal = mend(
                ["x"],
                std::slice::from_ref(&source),
                std::slice::from_ref(&source),
                Space::Exact,
            );
            assert_eq!(equal, Mend::default());
        }
    }

    #[test]
    fn embeddings_are_equal_by_their_bits_and_in_cosine_spaces_nearly() {
        let same = |a: &str, b: &str, space| same_embedding(Some(a), Some(b), space);
        assert!(same("[0.1,1e-40]", "[0.1, 1e-40]", Space::Exact));
        assert!(!same("[0.1]", "[0.10000001]", Space::Exact));
        assert!(same("[0.1]", "[0.10000001]", Space::Cosine));
        assert!(!same("[0.1]", "[0.100001]", Space::Cosine));
        assert!(same("[0.1,1e-40]", "[0.1,0.0]", Space::Cosine));
        assert!(!same("[0.1,1e-40]", "[0.1,0.0]", Space::Exact));
        assert!(!same("[0.1]", "[0.1,0.0]", Space::Cosine));
        assert!(!same("[null]", "[0.0]", Space::Cosine));
        assert!(same("[null,1]", "[null,1.0]", Space::Cosine));
        assert!(!same_embedding(Some("[1]"), None, Space::Cosine));
    }

    #[test]
    fn metadata_of_a_collection_is_replaced_as_a_whole() {
        let map = |fields: &[(&str, &str)]| -> BTreeMap<String, Box<str>> {
            fields
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).into()))
                .collect()
        };
        assert_eq!(mend_metadata(&map(&[("a", "1")]), &map(&[("a", "1")])), None);
        let mended = mend_metadata(&map(&[("a", "1")]), &map(&[("a", "2"), ("b", "3")]));
        assert_eq!(text(&mended), r#"{"new_metadata":{"a":1,"b":null}}"#);
        let cleared = mend_metadata(&map(&[]), &map(&[("b", "3")]));
        assert_eq!(text(&cleared), r#"{"new_metadata":{"b":null}}"#);
    }

    fn any_record(id: &'static str) -> impl Strategy<Value = Option<Record>> {
        let metadata = proptest::collection::btree_map("[ab]", prop_oneof![Just("1"), Just("1.0"), Just("true")], 0..3);
        let fields = (
            0..3u8,
            metadata,
            proptest::option::of("[xy]"),
            proptest::option::of("[uv]"),
        );
        proptest::option::of(fields.prop_map(move |(n, metadata, document, uri)| Record {
            id: id.to_owned(),
            embedding: Some(format!("[{n}.0]").into()),
            metadata: metadata.into_iter().map(|(key, value)| (key, value.into())).collect(),
            document,
            uri,
        }))
    }

    /// What Chroma makes of the writes (chroma-facts.md 3.2).
    fn apply(records: &mut Vec<Record>, mend: &Mend) {
        let read = |body: &Option<Bytes>| -> serde_json::Value {
            body.as_ref().map_or(serde_json::json!({"ids": []}), |body| {
                serde_json::from_slice(body).expect("JSON")
            })
        };
        let deleted = read(&mend.delete);
        records.retain(|record| {
            !deleted["ids"]
                .as_array()
                .expect("ids")
                .contains(&record.id.clone().into())
        });
        for (body, add) in [(read(&mend.append), true), (read(&mend.upsert), false)] {
            for (at, id) in body["ids"].as_array().expect("ids").iter().enumerate() {
                let id = id.as_str().expect("an id");
                assert_eq!(records.iter().any(|record| record.id == id), !add, "{id}");
                if add {
                    records.push(record(id, ""));
                }
                let record = records.iter_mut().find(|record| record.id == id).expect("there");
                record.embedding = Some(body["embeddings"][at].to_string().into());
                if let Some(text) = body["documents"][at].as_str() {
                    record.document = Some(text.to_owned());
                }
                if let Some(text) = body["uris"][at].as_str() {
                    record.uri = Some(text.to_owned());
                }
                for (key, value) in body["metadatas"][at].as_object().into_iter().flatten() {
                    match (key.as_str(), value.is_null()) {
                        ("chroma:uri", true) => record.uri = None,
                        (_, true) => drop(record.metadata.remove(key)),
                        (_, false) => drop(record.metadata.insert(key.clone(), value.to_string().into())),
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn mending_makes_equal_and_then_there_is_nothing_to_mend(
            a in any_record("a"), b in any_record("b"), c in any_record("a"), d in any_record("b"),
        ) {
            let source: Vec<Record> = a.into_iter().chain(b).collect();
            let mut target: Vec<Record> = c.into_iter().chain(d).collect();
            let first = mend(["a", "b"], &source, &target, Space::Exact);
            apply(&mut target, &first);
            let mut sorted = target.clone();
            sorted.sort_by(|x, y| x.id.cmp(&y.id));
            prop_assert_eq!(&sorted, &source);
            prop_assert_eq!(mend(["a", "b"], &source, &target, Space::Exact), Mend::default());
        }
    }
}
