//! Bodies of delete, and the read that turns a filter into ids.
//!
//! A delete by `where` hits what a node holds at that moment, in that node's order if it has a limit. It is therefore
//! resolved to ids on one node, and every node is told the ids. `get` takes the same fields and finds the same records
//! only if there is a filter (chroma-facts.md 5), hence [`DeleteBody::has_filter`].

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::{ParseProblem, read};

/// A delete. Filters are kept as they came: the node that resolves them judges them.
#[derive(Debug, Default)]
pub struct DeleteBody {
    /// Absent or null: `None`.
    pub ids: Option<Vec<String>>,
    /// Whether `where` or `where_document` is there and not null.
    pub has_filter: bool,
    /// At most this many, in the resolving node's order; up to `u32::MAX`.
    pub limit: Option<u64>,
    /// `where`, if not null.
    pub where_: Option<Box<RawValue>>,
    /// `where_document`, if not null.
    pub where_document: Option<Box<RawValue>>,
}

/// Reads the body of a delete.
///
/// # Errors
/// See [`ParseProblem`].
pub fn parse_delete(body: &[u8]) -> Result<DeleteBody, ParseProblem> {
    read(body)
}

impl DeleteBody {
    /// The body of a `get` that answers the ids this delete means, and nothing else. Only if it has a filter.
    pub fn as_get_body(&self) -> Bytes {
        #[derive(Serialize)]
        struct Get<'a> {
            ids: &'a Option<Vec<String>>,
            r#where: &'a Option<Box<RawValue>>,
            where_document: &'a Option<Box<RawValue>>,
            limit: Option<u64>,
            include: [(); 0],
        }
        let get = Get {
            ids: &self.ids,
            r#where: &self.where_,
            where_document: &self.where_document,
            limit: self.limit,
            include: [],
        };
        serde_json::to_vec(&get)
            .expect("strings, numbers and checked JSON serialise")
            .into()
    }

    /// The body of a delete of exactly these ids.
    pub fn delete_ids_body(ids: &[String]) -> Bytes {
        #[derive(Serialize)]
        struct Delete<'a> {
            ids: &'a [String],
        }
        serde_json::to_vec(&Delete { ids }).expect("strings serialise").into()
    }
}

impl<'de> Deserialize<'de> for DeleteBody {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = DeleteBody;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a delete")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<DeleteBody, A::Error> {
                let mut body = DeleteBody::default();
                let mut seen = [false; 4];
                while let Some(key) = map.next_key::<Cow<str>>()? {
                    let field = match key.as_ref() {
                        "ids" => 0,
                        "limit" => 1,
                        "where" => 2,
                        "where_document" => 3,
                        _ => {
                            // Unlike in the other bodies, Chroma reads what it does not know, and may fail at it.
                            map.next_value::<Value>()?;
                            continue;
                        }
                    };
                    if std::mem::replace(&mut seen[field], true) {
                        return Err(A::Error::custom("duplicate field"));
                    }
                    match field {
                        0 => body.ids = map.next_value()?,
                        1 => body.limit = map.next_value::<Option<u32>>()?.map(u64::from),
                        2 => body.where_ = map.next_value()?,
                        _ => body.where_document = map.next_value()?,
                    }
                }
                body.has_filter = body.where_.is_some() || body.where_document.is_some();
                Ok(body)
            }
        }

        deserializer.deserialize_map(Fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> Result<DeleteBody, ParseProblem> {
        parse_delete(body.as_bytes())
    }

    #[test]
    fn knows_a_filter_from_none() {
        for (body, has_filter) in [
            ("{}", false),
            (
                r#"{"ids":["a"],"where":null,"where_document":null,"limit":null}"#,
                false,
            ),
            (r#"{"limit":2}"#, false),
            (r#"{"where":{}}"#, true), // 400, but the resolving node says so
            (r#"{"where":5}"#, true),
            (r#"{"where_document":{"$contains":"x"}}"#, true),
            (r#"{"wh\u0065re":{"k":1}}"#, true),
        ] {
            assert_eq!(parse(body).unwrap().has_filter, has_filter, "{body}");
        }
    }

    #[test]
    fn resolves_with_the_filter_as_it_came() {
        let body = parse(r#"{"limit":1,"where":{"k": 1.0,"k":2},"ids":["a\n"],"zz":[1]}"#).unwrap();
        assert_eq!(
            body.as_get_body(),
            r#"{"ids":["a\n"],"where":{"k": 1.0,"k":2},"where_document":null,"limit":1,"include":[]}"#
        );
        assert_eq!(
            DeleteBody::delete_ids_body(&["a".into(), "\"".into()]),
            r#"{"ids":["a","\""]}"#
        );
    }

    #[test]
    fn malformed_is_what_chroma_cannot_read() {
        let deep = format!(r#"{{"ids":["a"],"zz":{}1{}}}"#, "[".repeat(200), "]".repeat(200));
        for body in [
            "",
            "null",
            r#"{"ids":["a"]} x"#,
            r#"{"ids":"a"}"#,
            r#"{"ids":[null]}"#,
            r#"{"ids":["a"],"ids":["b"]}"#,
            r#"{"where":null,"where":{"k":1}}"#,
            r#"{"where":{"k":1},"limit":-1}"#,
            r#"{"where":{"k":1},"limit":1.0}"#,
            r#"{"where":{"k":1},"limit":4294967296}"#,
            r#"{"ids":["a"],"zz":1e999}"#,
            r#"{"ids":["a"],"zz":"\ud800"}"#,
            &deep,
        ] {
            assert_eq!(parse(body).map(|_| ()), Err(ParseProblem::Malformed), "{body}");
        }
        assert!(parse(r#"{"ids":["a"],"zz":1,"zz":2}"#).is_ok());
    }
}
