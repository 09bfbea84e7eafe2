//! Metadata maps, looked through for what a node cannot bear.
//!
//! Record metadata: a key that begins with `chroma:` and carries the wrong type kills a node's compactor for good
//! (chroma-facts.md 8.3); a sparse vector is refused by a node, but the refusal has already set the collection's
//! dimension (18.1). Chroma also takes a sparse vector as a *list* (`[null,[1],[0.5],null]`), so nesting alone is the
//! mark. Collection metadata: a list or an object panics the handler (8.3).
//!
//! A map may have the same key twice, Chroma takes the last; every occurrence is looked at.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, de};
use serde_json::value::RawValue;

/// What was found first, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Poison {
    /// A key that begins with `chroma:`.
    Reserved { record: usize, key: String },
    /// A sparse vector, in any of its spellings.
    Sparse { record: usize, key: String },
}

/// `metadatas` of a record write: a list of maps and nulls.
#[derive(Debug, Default)]
pub(super) struct Metadatas {
    pub len: usize,
    pub poison: Option<Poison>,
}

impl<'de> Deserialize<'de> for Metadatas {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;

        impl<'de> Visitor<'de> for List {
            type Value = Metadatas;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a list of metadata maps")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Metadatas, A::Error> {
                let mut found = Metadatas::default();
                while seq
                    .next_element_seed(RecordMap {
                        record: found.len,
                        poison: &mut found.poison,
                    })?
                    .is_some()
                {
                    found.len += 1;
                }
                Ok(found)
            }
        }

        deserializer.deserialize_seq(List)
    }
}

/// One record's map, or null.
struct RecordMap<'a> {
    record: usize,
    poison: &'a mut Option<Poison>,
}

impl<'de> DeserializeSeed<'de> for RecordMap<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for RecordMap<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a metadata map or null")
    }

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(Key(key)) = map.next_key()? {
            let value: &RawValue = map.next_value()?;
            let record = self.record;
            let poison = if key.starts_with("chroma:") {
                Poison::Reserved {
                    record,
                    key: key.into_owned(),
                }
            } else if is_sparse(value).map_err(A::Error::custom)? {
                Poison::Sparse {
                    record,
                    key: key.into_owned(),
                }
            } else {
                continue;
            };
            self.poison.get_or_insert(poison);
        }
        Ok(())
    }
}

/// Whether Chroma could take this value for a sparse vector. An error is a shape that no release takes.
fn is_sparse(value: &RawValue) -> Result<bool, &'static str> {
    let text = value.get();
    match text.as_bytes()[0] {
        // Also with wrong types inside, where Chroma says 422: the doubt is ours.
        b'{' => match serde_json::from_str::<Indices>(text) {
            Ok(Indices { indices: None }) => Err("objects are no metadata values"),
            _ => Ok(true),
        },
        b'[' if memchr::memchr2(b'[', b'{', &text.as_bytes()[1..]).is_some() => {
            let items: Vec<&RawValue> = serde_json::from_str(text).map_err(|_| "not a list")?;
            Ok(items.iter().any(|item| matches!(item.get().as_bytes()[0], b'[' | b'{')))
        }
        _ => Ok(false),
    }
}

#[derive(Deserialize)]
struct Indices {
    indices: Option<IgnoredAny>,
}

/// `metadata` of a collection: the first key whose value is a list or an object.
#[derive(Debug, Default)]
pub(super) struct CollectionMetadata {
    pub nested: Option<String>,
}

impl<'de> Deserialize<'de> for CollectionMetadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map;

        impl<'de> Visitor<'de> for Map {
            type Value = CollectionMetadata;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a metadata map")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<CollectionMetadata, A::Error> {
                let mut found = CollectionMetadata::default();
                while let Some(Key(key)) = map.next_key()? {
                    let value: &RawValue = map.next_value()?;
                    if matches!(value.get().as_bytes()[0], b'[' | b'{') {
                        found.nested.get_or_insert(key.into_owned());
                    }
                }
                Ok(found)
            }
        }

        deserializer.deserialize_map(Map)
    }
}

/// A key with its escapes decoded, borrowed where there are none.
struct Key<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Key<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        impl<'de> Visitor<'de> for Text {
            type Value = Cow<'de, str>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Cow::Borrowed(text))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Cow::Owned(text.to_owned()))
            }
        }

        deserializer.deserialize_str(Text).map(Key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(text: &str) -> Option<(usize, Option<Poison>)> {
        serde_json::from_str::<Metadatas>(text)
            .ok()
            .map(|found| (found.len, found.poison))
    }

    #[test]
    fn plain_values_pass() {
        let text = r#"[{"a":1,"b":-2.5,"c":"[{","d":true,"e":null,"f":[1,2.5],"g":["[","{"],"h":[]},null,{}]"#;
        assert_eq!(records(text), Some((3, None)));
    }

    #[test]
    fn reserved_keys_are_found_in_every_spelling() {
        for key in ["chroma:document", r"chroma\u003adocument", r"\u0063hroma:x", "chroma:"] {
            let (len, poison) = records(&format!(r#"[null,{{"a":1,"{key}":"x","b":2}}]"#)).unwrap();
            assert!(matches!(poison, Some(Poison::Reserved { record: 1, .. })), "{key}");
            assert_eq!(len, 2);
        }
        for key in [
            "Chroma:document",
            "xchroma:document",
            "chroma",
            r"chroma\\u003a",
            " chroma:",
        ] {
            assert_eq!(records(&format!(r#"[{{"{key}":1}}]"#)), Some((1, None)), "{key}");
        }
    }

    #[test]
    fn sparse_vectors_are_found_as_objects_and_as_lists() {
        for value in [
            r##"{"#type":"sparse_vector","indices":[1],"values":[0.5]}"##,
            r#"{"values":[0.5],"indices":[1]}"#,
            r#"{"\u0069ndices":[1],"values":[0.5]}"#,
            r#"{"indices":[1],"values":[0.5],"indices":[2]}"#,
            r#"[null,[1],[0.5],null]"#,
            r#"["sparse_vector" , [] , [], null]"#,
        ] {
            let (_, poison) = records(&format!(r#"[{{"k":{value}}}]"#)).unwrap();
            assert_eq!(
                poison,
                Some(Poison::Sparse {
                    record: 0,
                    key: "k".to_owned()
                }),
                "{value}"
            );
        }
    }

    #[test]
    fn a_repeated_key_hides_nothing() {
        let (_, poison) = records(r#"[{"chroma:document":1,"chroma:document":"x"}]"#).unwrap();
        assert!(poison.is_some());
    }

    #[test]
    fn other_shapes_are_no_metadata() {
        for text in [
            "{}",
            "[1]",
            "[[]]",
            r#"["a"]"#,
            r#"[{"k":{}}]"#,
            r#"[{"k":{"a":1}}]"#,
            "null",
        ] {
            assert_eq!(records(text), None, "{text}");
        }
    }

    #[test]
    fn nested_values_of_a_collection_are_found() {
        let nested = |text| serde_json::from_str::<CollectionMetadata>(text).unwrap().nested;
        assert_eq!(nested(r#"{"a":1,"b":"[","c":null}"#), None);
        assert_eq!(nested(r#"{"a":1,"b":[],"c":{}}"#).as_deref(), Some("b"));
        assert_eq!(nested(r#"{"\u0061":{"indices":[],"values":[]}}"#).as_deref(), Some("a"));
    }
}
