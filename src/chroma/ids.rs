//! One id per collection, on nodes that each made up their own.
//!
//! Clients see one UUID per collection; every node has another. Answers are translated as text, so that all else in
//! them, number formats and key order included, stays what the node said. UUIDs of the same text length replace each
//! other in place; in lists only the `id` of each item is touched, never a UUID that somebody keeps in metadata.

use std::borrow::Cow;

use bytes::{Bytes, BytesMut};
use memchr::memmem;
use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::Uuid;

/// What an answer tells about a collection.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct CollectionObject {
    pub id: Uuid,
    pub name: String,
    pub tenant: String,
    pub database: String,
    /// Absent until the first embedding came.
    pub dimension: Option<i64>,
}

/// Reads the answer to create, get by name or get by id; `None` if it is something else.
pub fn parse_collection_object(body: &[u8]) -> Option<CollectionObject> {
    serde_json::from_slice(body).ok()
}

/// The ids in an answer to `get`.
pub fn parse_ids_answer(body: &[u8]) -> Option<Vec<String>> {
    #[derive(Deserialize)]
    struct Records {
        ids: Vec<String>,
    }
    serde_json::from_slice::<Records>(body).ok().map(|records| records.ids)
}

/// The collections in an answer to a list of collections.
pub fn parse_collection_list(body: &[u8]) -> Option<Vec<CollectionObject>> {
    serde_json::from_slice(body).ok()
}

/// The names in an answer to a list of databases.
pub fn parse_names(body: &[u8]) -> Option<Vec<String>> {
    #[derive(Deserialize)]
    struct Named {
        name: String,
    }
    let items: Vec<Named> = serde_json::from_slice(body).ok()?;
    Some(items.into_iter().map(|item| item.name).collect())
}

/// A single object with its `id` exchanged, as [`translate_list`] does for many.
pub fn translate_object(body: &[u8], f: impl FnMut(Uuid) -> Option<Uuid>) -> Option<Bytes> {
    let list = [b"[", body, b"]"].concat();
    let (_, object) = translate_list(&list, f)?.into_iter().next()?;
    Some(object.into())
}

/// `body` with every `from` replaced by `to`, both as Chroma writes them. Without one it is the same buffer.
pub fn replace_uuid(body: Bytes, from: Uuid, to: Uuid) -> Bytes {
    let mut buffer = Uuid::encode_buffer();
    let finder = memmem::Finder::new(from.hyphenated().encode_lower(&mut buffer).as_bytes());
    if from == to || finder.find(&body).is_none() {
        return body;
    }
    let mut buffer = Uuid::encode_buffer();
    let to = to.hyphenated().encode_lower(&mut buffer).as_bytes();
    let mut copy = BytesMut::from(body); // in place where we are the only owner
    let mut at = 0;
    while let Some(found) = finder.find(&copy[at..]) {
        copy[at + found..at + found + to.len()].copy_from_slice(to);
        at += found + to.len();
    }
    copy.freeze()
}

/// The items of a list of collections, each with the id that clients see, in the order of those ids.
///
/// `f` gets a node's UUID and gives the clients'; an item for which it gives none is left out. `None` if the body is no
/// list of objects with ids.
pub fn translate_list(body: &[u8], mut f: impl FnMut(Uuid) -> Option<Uuid>) -> Option<Vec<(Uuid, String)>> {
    let items: Vec<&RawValue> = serde_json::from_slice(body).ok()?;
    let mut translated = Vec::with_capacity(items.len());
    for item in items {
        let (id, item) = split_at_id(item)?;
        if let Some(new) = f(id) {
            translated.push((new, item.with(new)));
        }
    }
    translated.sort_by_key(|(id, _)| *id);
    Some(translated)
}

/// A list out of what [`translate_list`] gave, or a page of it.
pub fn render_list<T: AsRef<str>>(items: impl IntoIterator<Item = (Uuid, T)>) -> Bytes {
    let mut list = vec![b'['];
    for (at, (_, item)) in items.into_iter().enumerate() {
        if at > 0 {
            list.push(b',');
        }
        list.extend_from_slice(item.as_ref().as_bytes());
    }
    list.push(b']');
    list.into()
}

/// A refusal in the form in which two nodes' refusals compare equal: the node's UUID as the clients', or as nil if
/// clients have none yet.
pub fn canonical_refusal(body: &[u8], node_id: Option<Uuid>, client_id: Option<Uuid>) -> Bytes {
    let body = Bytes::copy_from_slice(body);
    let body = match node_id {
        Some(node_id) => replace_uuid(body, node_id, client_id.unwrap_or(Uuid::nil())),
        None => body,
    };
    // Some of Chroma's messages print a hash map: the same words in an order of chance.
    let mut words: Vec<&[u8]> = body
        .split(|byte| b" ,{}[]()".contains(byte))
        .filter(|word| !word.is_empty())
        .collect();
    words.sort_unstable();
    words.join(&b' ').into()
}

/// Chroma's answer to a delete that was resolved by us.
pub fn deleted_body(n: usize) -> Bytes {
    format!(r#"{{"deleted":{n}}}"#).into()
}

/// An object around its id.
struct Around<'a> {
    before: &'a str,
    after: &'a str,
}

impl Around<'_> {
    fn with(&self, id: Uuid) -> String {
        format!("{}\"{}\"{}", self.before, id.hyphenated(), self.after)
    }
}

fn split_at_id(item: &RawValue) -> Option<(Uuid, Around<'_>)> {
    #[derive(Deserialize)]
    struct Row<'a> {
        #[serde(borrow)]
        id: &'a RawValue,
    }
    let text = item.get();
    let row: Row = serde_json::from_str(text).ok()?;
    let id: Cow<str> = serde_json::from_str(row.id.get()).ok()?;
    let start = row.id.get().as_ptr() as usize - text.as_ptr() as usize;
    let end = start + row.id.get().len();
    Some((
        Uuid::parse_str(&id).ok()?,
        Around {
            before: &text[..start],
            after: &text[end..],
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Uuid = Uuid::from_u128(0xa);
    const B: Uuid = Uuid::from_u128(0xb);
    const C: Uuid = Uuid::from_u128(0xc);

    #[test]
    fn reads_a_collection() {
        let body = r#"{"id":"45bc6510-e6f3-4641-9b2a-e56088985426","name":"c","configuration_json":{},"schema":null,
            "metadata":null,"dimension":null,"tenant":"t","database":"d","log_position":0,"version":0}"#;
        let found = parse_collection_object(body.as_bytes()).unwrap();
        assert_eq!((found.name.as_str(), found.dimension), ("c", None));
        assert_eq!(found.id.to_string(), "45bc6510-e6f3-4641-9b2a-e56088985426");
        assert_eq!(
            parse_collection_object(br#"{"error":"NotFoundError","message":"x"}"#),
            None
        );
    }

    #[test]
    fn replaces_every_occurrence_and_nothing_else() {
        let body = Bytes::from(format!("Collection [{A}] is {A}, not {C}."));
        assert_eq!(replace_uuid(body, A, B), format!("Collection [{B}] is {B}, not {C}."));
        let untouched = Bytes::from("no id here");
        let pointer = untouched.as_ptr();
        assert_eq!(replace_uuid(untouched, A, B).as_ptr(), pointer);
    }

    #[test]
    fn a_shared_buffer_is_copied_not_changed() {
        let body = Bytes::from(A.to_string());
        assert_eq!(replace_uuid(body.clone(), A, B), B.to_string());
        assert_eq!(body, A.to_string());
    }

    #[test]
    fn lists_are_ordered_by_the_ids_that_clients_see() {
        let body =
            format!(r#"[{{"id":"{A}","m":{{"id":"{A}"}}, "x":1.0}},{{"name":"b","id" : "{B}"}},{{"id":"{C}"}}]"#);
        let (d, e) = (Uuid::from_u128(0xd), Uuid::from_u128(0xe));
        let list = translate_list(body.as_bytes(), |id| match id {
            A => Some(e),
            B => Some(d),
            _ => None,
        });
        assert_eq!(
            render_list(list.unwrap()),
            format!(r#"[{{"name":"b","id" : "{d}"}},{{"id":"{e}","m":{{"id":"{A}"}}, "x":1.0}}]"#)
        );
        assert_eq!(render_list(translate_list(b"[]", Some).unwrap()), "[]");
        for body in ["{}", "[1]", r#"[{"id":1}]"#, r#"[{"name":"x"}]"#, r#"[{"id":"x"}]"#] {
            assert_eq!(translate_list(body.as_bytes(), Some), None, "{body}");
        }
    }

    #[test]
    fn the_same_refusal_of_two_nodes_compares_equal() {
        let body = |id: Uuid| format!(r#"{{"error":"NotFoundError","message":"Collection [{id}] does not exist."}}"#);
        let canonical = |id, client| canonical_refusal(body(id).as_bytes(), Some(id), client);
        assert_eq!(canonical(A, Some(C)), canonical(B, Some(C)));
        assert_eq!(canonical(A, None), canonical(B, None));
        let length = |fields: &str| canonical_refusal(format!("length [{{{fields}}}]").as_bytes(), None, None);
        assert_eq!(
            length(r#""min": Number(3), "value": String("x")"#),
            length(r#""value": String("x"), "min": Number(3)"#)
        );
        assert_ne!(length(r#""min": Number(3)"#), length(r#""min": Number(4)"#));
        assert_eq!(canonical_refusal(b"x", None, Some(C)), "x");
    }

    #[test]
    fn answers_a_delete() {
        assert_eq!(deleted_body(3), r#"{"deleted":3}"#);
    }
}
