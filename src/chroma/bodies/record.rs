//! Bodies of add, upsert and update.
//!
//! A node sets a collection's dimension before it checks the rest: an add that it then refuses (counts that do not
//! agree, an empty id, a sparse vector) still changes it, and only the node that saw it. Those checks are therefore
//! made here, in Chroma's words. Mixed dimensions are refused here as well, so that whoever combines writes can rely on
//! one dimension per body.
//!
//! Embeddings come as lists of numbers or as base64 of little-endian float32; their dimension follows from the number
//! of commas or the length of the text.

use std::fmt;

use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use serde::{Deserialize, de};
use serde_json::value::RawValue;

use super::metadata::{Metadatas, Poison};
use super::{ParseProblem, Refusal, read};
use crate::chroma::RecordWrite;

/// What is known of an add, upsert or update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordBody {
    /// In the order of the request; may repeat.
    pub ids: Vec<String>,
    /// Whether the field is there at all (an update may lack it, or have null).
    pub has_embeddings: bool,
    /// Number of embeddings that are not null; the first one sets the dimension of a collection that has none.
    pub embeddings: usize,
    /// Numbers per embedding, where that can be told: not for a base64 text that is cut off.
    pub dimension: Option<usize>,
}

/// Reads and checks the body of an add, upsert or update.
///
/// # Errors
/// See [`ParseProblem`]. `Malformed` for [`RecordWrite::Delete`]: that is [`super::parse_delete`]'s.
pub fn parse_record(kind: RecordWrite, body: &[u8]) -> Result<RecordBody, ParseProblem> {
    let raw: Fields = read(body)?;
    let embeddings = match (kind, &raw.embeddings) {
        (RecordWrite::Delete, _) => return Err(ParseProblem::Malformed),
        (RecordWrite::Update, None) => &Embeddings::default(),
        (RecordWrite::Update, Some(embeddings)) => embeddings,
        (_, Some(embeddings)) if embeddings.nulls == 0 => embeddings,
        _ => return Err(ParseProblem::Malformed),
    };
    if embeddings.is_mixed {
        return Err(Refusal::invalid("Inconsistent dimensions in provided embeddings").into());
    }
    let count = raw.ids.len();
    let agrees = |len: Option<usize>| len.is_none_or(|len| len == count);
    if !agrees(raw.embeddings.as_ref().map(|e| e.some + e.nulls))
        || !agrees(raw.documents.map(|texts| texts.len))
        || !agrees(raw.uris.map(|texts| texts.len))
        || !agrees(raw.metadatas.as_ref().map(|metadatas| metadatas.len))
    {
        let message = "Inconsistent number of IDs, embeddings, documents, URIs and metadatas";
        return Err(Refusal::invalid(message).into());
    }
    if raw.ids.iter().any(String::is_empty) {
        return Err(Refusal::invalid("Empty ID, ID must have at least one character").into());
    }
    match raw.metadatas.and_then(|metadatas| metadatas.poison) {
        Some(Poison::Reserved { record, key }) => {
            let id = &raw.ids[record];
            let message = format!("Metadata key [{key}] of record [{id}] is reserved: it begins with `chroma:`");
            Err(Refusal::invalid(message).into())
        }
        Some(Poison::Sparse { record, key }) => {
            let id = &raw.ids[record];
            let message =
                format!("Unimplemented: Sparse vector is not supported for local chroma: {key} (record [{id}])");
            Err(Refusal::unimplemented(message).into())
        }
        None => Ok(RecordBody {
            has_embeddings: raw.embeddings.is_some(),
            embeddings: embeddings.some,
            dimension: embeddings.dimension,
            ids: raw.ids,
        }),
    }
}

/// The fields that Chroma knows; a repeated one is an error, an unknown one is skipped, as in Chroma.
#[derive(Deserialize)]
struct Fields {
    ids: Vec<String>,
    embeddings: Option<Embeddings>,
    documents: Option<Texts>,
    uris: Option<Texts>,
    metadatas: Option<Metadatas>,
}

/// A list of strings and nulls, skipped over.
struct Texts {
    len: usize,
}

#[derive(Clone, Default)]
struct Embeddings {
    some: usize,
    nulls: usize,
    dimension: Option<usize>,
    is_mixed: bool,
}

/// The two forms; one request has only one of them (Chroma: 422).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Numbers,
    Base64,
}

impl<'de> Deserialize<'de> for Embeddings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;

        impl<'de> Visitor<'de> for List {
            type Value = Embeddings;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a list of embeddings")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Embeddings, A::Error> {
                let mut found = Embeddings::default();
                let mut form = None;
                while let Some(raw) = seq.next_element::<&RawValue>()? {
                    let raw = raw.get();
                    let (this, dimension) = match raw.as_bytes()[0] {
                        b'[' => (Form::Numbers, count_numbers(raw)),
                        b'"' => (Form::Base64, count_base64(raw).map_err(A::Error::custom)?),
                        b'n' => {
                            found.nulls += 1;
                            continue;
                        }
                        _ => return Err(A::Error::custom("not an embedding")),
                    };
                    if *form.get_or_insert(this) != this {
                        return Err(A::Error::custom("numbers beside base64"));
                    }
                    found.some += 1;
                    if let Some(dimension) = dimension {
                        found.is_mixed |= *found.dimension.get_or_insert(dimension) != dimension;
                    }
                }
                Ok(found)
            }
        }

        deserializer.deserialize_seq(List)
    }
}

/// Numbers in an embedding, from its text; `None` if that cannot be told.
pub(super) fn dimension(raw: &str) -> Option<usize> {
    match raw.as_bytes().first()? {
        b'[' => count_numbers(raw),
        b'"' => count_base64(raw).ok()?,
        _ => None,
    }
}

/// Length of a flat list; `None` if it is empty, which Chroma refuses without effect.
fn count_numbers(raw: &str) -> Option<usize> {
    let inner = &raw.as_bytes()[1..raw.len() - 1];
    let is_empty = inner.iter().all(u8::is_ascii_whitespace);
    (!is_empty).then(|| memchr::memchr_iter(b',', inner).count() + 1)
}

/// Number of float32 in a JSON string of padded base64; `None` if the text is no such thing, which Chroma refuses
/// without effect.
fn count_base64(raw: &str) -> Result<Option<usize>, serde_json::Error> {
    let unescaped: String;
    let text = if memchr::memchr(b'\\', raw.as_bytes()).is_some() {
        unescaped = serde_json::from_str(raw)?; // `\/` is how some clients write a slash
        &unescaped
    } else {
        &raw[1..raw.len() - 1]
    };
    if text.is_empty() || !text.len().is_multiple_of(4) {
        return Ok(None);
    }
    let padding = text.bytes().rev().take(2).take_while(|byte| *byte == b'=').count();
    let bytes = text.len() / 4 * 3 - padding;
    Ok(bytes.is_multiple_of(4).then_some(bytes / 4))
}

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;

        impl<'de> Visitor<'de> for List {
            type Value = Texts;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a list of strings and nulls")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Texts, A::Error> {
                let mut len = 0;
                while let Some(raw) = seq.next_element::<&RawValue>()? {
                    if !matches!(raw.get().as_bytes()[0], b'"' | b'n') {
                        return Err(de::Error::custom("not a string"));
                    }
                    len += 1;
                }
                Ok(Texts { len })
            }
        }

        deserializer.deserialize_seq(List)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [RecordWrite; 3] = [RecordWrite::Add, RecordWrite::Upsert, RecordWrite::Update];

    fn parse(kind: RecordWrite, body: &str) -> Result<RecordBody, ParseProblem> {
        parse_record(kind, body.as_bytes())
    }

    fn message(kind: RecordWrite, body: &str) -> (u16, String) {
        match parse(kind, body) {
            Err(ParseProblem::Refused(refusal)) => (refusal.status, refusal.message),
            other => panic!("{body}: {other:?}"),
        }
    }

    #[test]
    fn counts_both_forms_of_embeddings() {
        for (embeddings, dimension) in [
            ("[[1,2],[3.5e0,-4]]", Some(2)),
            ("[ [ 1 ] , [\n2 ] ]", Some(1)),
            (r#"["AACAPwAAAEA=","AACAPwAAAEA="]"#, Some(2)),
            (r#"["AACAPw==","AACA\/w=="]"#, Some(1)),
            (r#"["AACAPwAAAEAAAEBA","AACAPwAAAEAAAEBA"]"#, Some(3)),
            (r#"["AACAPw","x"]"#, None),
            ("[[],[]]", None),
        ] {
            let body = format!(r#"{{"ids":["a","b"],"embeddings":{embeddings},"documents":["x",null],"zz":[[1]]}}"#);
            for kind in ALL {
                let expected = RecordBody {
                    ids: vec!["a".into(), "b".into()],
                    has_embeddings: true,
                    embeddings: 2,
                    dimension,
                };
                assert_eq!(parse(kind, &body), Ok(expected), "{body}");
            }
        }
    }

    #[test]
    fn only_an_update_may_lack_embeddings() {
        for (field, has_embeddings, embeddings) in [
            ("", false, 0),
            (r#","embeddings":null"#, false, 0),
            (r#","embeddings":[null,null]"#, true, 0),
            (r#","embeddings":[null,[1,2]]"#, true, 1),
            (r#","embeddings":["AACAPw==",null]"#, true, 1),
        ] {
            let body = format!(r#"{{"ids":["a","b"]{field}}}"#);
            assert_eq!(parse(RecordWrite::Add, &body), Err(ParseProblem::Malformed), "{body}");
            assert_eq!(
                parse(RecordWrite::Upsert, &body),
                Err(ParseProblem::Malformed),
                "{body}"
            );
            let update = parse(RecordWrite::Update, &body).unwrap();
            assert_eq!(
                (update.has_embeddings, update.embeddings),
                (has_embeddings, embeddings),
                "{body}"
            );
        }
    }

    #[test]
    fn counts_have_to_agree() {
        for body in [
            r#"{"ids":["a"],"embeddings":[[1],[2]]}"#,
            r#"{"ids":[],"embeddings":[[1]]}"#,
            r#"{"ids":["a"],"embeddings":[[1]],"documents":[]}"#,
            r#"{"ids":["a"],"embeddings":[[1]],"uris":["a","b"]}"#,
            r#"{"ids":["a"],"embeddings":[[1]],"metadatas":[null,null]}"#,
        ] {
            for kind in ALL {
                let expected = "Inconsistent number of IDs, embeddings, documents, URIs and metadatas";
                assert_eq!(message(kind, body), (400, expected.to_owned()), "{body}");
            }
        }
        assert!(parse(RecordWrite::Add, r#"{"ids":[],"embeddings":[],"metadatas":null}"#).is_ok());
    }

    #[test]
    fn refuses_what_a_node_refuses_too_late() {
        for (body, status, part) in [
            (r#"{"ids":["a",""],"embeddings":[[1],[2]]}"#, 400, "Empty ID"),
            (
                r#"{"ids":["a","b"],"embeddings":[[1,2],[2]]}"#,
                400,
                "Inconsistent dimensions in provided embeddings",
            ),
            (
                r#"{"ids":["a","b"],"embeddings":["AACAPw==","AACAPwAAAEA="]}"#,
                400,
                "Inconsistent dimensions",
            ),
            (
                r#"{"ids":["r"],"embeddings":[[1]],"metadatas":[{"chroma:uri":1}]}"#,
                400,
                "[chroma:uri] of record [r]",
            ),
            (
                r#"{"ids":["r"],"embeddings":[[1]],"metad\u0061tas":[{"chroma\u003auri":1}]}"#,
                400,
                "[chroma:uri]",
            ),
            (
                r#"{"ids":["r"],"embeddings":[[1]],"metadatas":[{"k":[null,[1],[1],null]}]}"#,
                501,
                "chroma: k (record [r])",
            ),
            (
                r#"[["a"],[[1,2]],null,null,[{"chroma:document":1}]]"#,
                422,
                "not an array",
            ),
        ] {
            for kind in ALL {
                let (found, text) = message(kind, body);
                assert!(found == status && text.contains(part), "{body}: {found} {text}");
            }
        }
        let invalid = parse_record(
            RecordWrite::Add,
            b"{\"ids\":[\"a\"],\"embeddings\":[[1]],\"zz\":\"\xff\"}",
        );
        assert!(matches!(invalid, Err(ParseProblem::Refused(_)))); // Chroma takes it
    }

    #[test]
    fn malformed_is_only_what_chroma_cannot_read() {
        let deep = format!(
            r#"{{"ids":["a"],"embeddings":[[1]],"zz":{}1{}}}"#,
            "[".repeat(300),
            "]".repeat(300)
        );
        for body in [
            r#"{"ids":["a"],"embeddings":[[1]],"zz":1,"zz":1e999,"yy":"\ud800"}"#,
            r#"{"ids":["a"],"embeddings":[[1]],"metadatas":[{"k":1,"k":2}]}"#,
            " {\"ids\":[\"a\"],\"embeddings\":[[1]]}\n",
            &deep,
        ] {
            assert!(parse(RecordWrite::Add, body).is_ok(), "{body}");
        }
        for body in [
            "",
            "null",
            "7",
            "{}",
            "\u{feff}{\"ids\":[],\"embeddings\":[]}",
            r#"{"ids":["a"],"embeddings":[[1]]} x"#,
            r#"{"ids":["a"],"embeddings":[[1]]}{}"#,
            r#"{"ids":["a"],"embeddings":[[NaN]]}"#,
            r#"{"ids":["a",],"embeddings":[[1]]}"#,
            r#"{"ids":["a"],"ids":["a"],"embeddings":[[1]]}"#,
            r#"{"ids":["a"],"embeddings":[[1]],"metadatas":null,"metadatas":[{"chroma:document":1}]}"#,
            r#"{"ids":["a"],"embeddings":[[1]],"metadatas":null,"metad\u0061tas":[{"chroma:document":1}]}"#,
            r#"{"ids":null,"embeddings":[[1]]}"#,
            r#"{"ids":[null],"embeddings":[[1]]}"#,
            r#"{"ids":[1],"embeddings":[[1]]}"#,
            r#"{"ids":["\ud800"],"embeddings":[[1]]}"#,
            r#"{"ids":["a","b"],"embeddings":[[1],"AACAPw=="]}"#,
            r#"{"ids":["a"],"embeddings":[true]}"#,
            r#"{"ids":["a"],"embeddings":{}}"#,
            r#"{"ids":["a"],"embeddings":"AACAPw=="}"#,
            r#"{"ids":["a"],"embeddings":[[1]],"documents":[1]}"#,
            r#"{"ids":["a"],"embeddings":[[1]],"uris":{}}"#,
            r#"{"ids":["a"],"embeddings":[[1]],"metadatas":[[]]}"#,
            r#"{"ids":["a"],"embeddings":[[1]],"metadatas":[{"k":{"a":1}}]}"#,
        ] {
            for kind in ALL {
                assert_eq!(parse(kind, body), Err(ParseProblem::Malformed), "{body}");
            }
        }
        assert_eq!(
            parse(RecordWrite::Delete, r#"{"ids":[]}"#),
            Err(ParseProblem::Malformed)
        );
    }
}
