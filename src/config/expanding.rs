//! A deserializer around a deserializer: variables expanded, keys checked, places kept.
//!
//! serde_yaml knows the line and column of everything, but only while it reads: a text expanded beforehand has other
//! columns (and lets a value become structure), a tree expanded afterwards has none. So expansion happens in between.
//! Every call goes on to the YAML reader, and every visitor it calls back is wrapped:
//!
//! - a text scalar is expanded on its way to the visitor;
//! - where a number or a bool is wanted and a text with a reference came, the expansion is parsed as one, so that
//!   `threads: ${THREADS:-2}` works, quoted or not;
//! - the keys of a struct are compared with its fields before they are used: an unknown or repeated one fails at its own
//!   place with the nearest name that exists;
//! - a struct whose keys are all commented out is the struct of defaults.
//!
//! Errors made inside a wrapped visitor get their place from serde_yaml. Keys are not expanded. Messages here quote what
//! stands in the file, never what a variable held.

use std::collections::HashSet;
use std::fmt;

use serde::de::value::MapDeserializer;
use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor,
};

use super::suggest::did_you_mean;
use super::variables::{Lookup, expand};

/// Wraps a deserializer, a seed, or an access.
pub(super) struct Expanding<'e, T> {
    inner: T,
    lookup: Lookup<'e>,
}

impl<'e, T> Expanding<'e, T> {
    pub(super) fn new(inner: T, lookup: Lookup<'e>) -> Self {
        Self { inner, lookup }
    }
}

/// What the caller asked for, which decides how a text with references is read.
#[derive(Clone, Copy)]
enum Wanted {
    Text,
    Bool,
    Number,
    OneOf(&'static [&'static str]),
    Struct(&'static [&'static str]),
}

struct Visit<'e, V> {
    visitor: V,
    wanted: Wanted,
    lookup: Lookup<'e>,
}

macro_rules! ask {
    ($wanted:expr, $via:ident: $($method:ident)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
            self.inner.$via(Visit { visitor, wanted: $wanted, lookup: self.lookup })
        })*
    };
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Expanding<'_, D> {
    type Error = D::Error;

    ask!(Wanted::Bool, deserialize_any: deserialize_bool);
    ask!(Wanted::Number, deserialize_any: deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64);
    ask!(Wanted::Number, deserialize_any: deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64);
    ask!(Wanted::Number, deserialize_any: deserialize_f32 deserialize_f64);
    ask!(Wanted::Text, deserialize_str: deserialize_str deserialize_string deserialize_char deserialize_identifier);
    ask!(Wanted::Text, deserialize_any: deserialize_any deserialize_ignored_any deserialize_unit);
    ask!(Wanted::Text, deserialize_bytes: deserialize_bytes deserialize_byte_buf);
    ask!(Wanted::Text, deserialize_option: deserialize_option);
    ask!(Wanted::Text, deserialize_seq: deserialize_seq);
    ask!(Wanted::Text, deserialize_map: deserialize_map);

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.inner.deserialize_any(Visit {
            visitor,
            wanted: Wanted::Struct(fields),
            lookup: self.lookup,
        })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.inner.deserialize_str(Visit {
            visitor,
            wanted: Wanted::OneOf(variants),
            lookup: self.lookup,
        })
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, name: &'static str, visitor: V) -> Result<V::Value, D::Error> {
        let visitor = Visit {
            visitor,
            wanted: Wanted::Text,
            lookup: self.lookup,
        };
        self.inner.deserialize_newtype_struct(name, visitor)
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, name: &'static str, visitor: V) -> Result<V::Value, D::Error> {
        self.inner.deserialize_unit_struct(name, visitor)
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, length: usize, visitor: V) -> Result<V::Value, D::Error> {
        self.inner.deserialize_tuple(
            length,
            Visit {
                visitor,
                wanted: Wanted::Text,
                lookup: self.lookup,
            },
        )
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        length: usize,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        let visitor = Visit {
            visitor,
            wanted: Wanted::Text,
            lookup: self.lookup,
        };
        self.inner.deserialize_tuple_struct(name, length, visitor)
    }
}

impl<'de, V: Visitor<'de>> Visit<'_, V> {
    /// The visitor for a single value, which a struct is not.
    fn not_a_struct<E: Error>(self, found: Unexpected<'_>) -> Result<V, E> {
        match self.wanted {
            Wanted::Struct(_) => Err(E::invalid_type(found, &self)),
            _ => Ok(self.visitor),
        }
    }

    fn text<E: Error>(self, written: &str) -> Result<V::Value, E> {
        let has_reference = written.contains('$');
        match self.wanted {
            Wanted::Text if has_reference => {
                let expanded = expand(written, self.lookup).map_err(E::custom)?;
                // What refuses a value quotes it whole; the reference is quoted instead.
                self.visitor.visit_str(&expanded).map_err(|error: E| {
                    E::custom(
                        error
                            .to_string()
                            .replacen(&format!("`{expanded}`"), &format!("`{written}`"), 1),
                    )
                })
            }
            Wanted::OneOf(names) => {
                let expanded = expand(written, self.lookup).map_err(E::custom)?;
                if !names.contains(&expanded.as_str()) {
                    let names_listed = names.join("`, `");
                    return Err(E::custom(if has_reference {
                        format!("`{written}` does not expand to one of `{names_listed}`")
                    } else {
                        format!(
                            "`{written}` is not one of `{names_listed}`{}",
                            did_you_mean(written, names)
                        )
                    }));
                }
                self.visitor.visit_enum(expanded.into_deserializer())
            }
            Wanted::Bool if has_reference => match expand(written, self.lookup).map_err(E::custom)?.trim() {
                "true" => self.visitor.visit_bool(true),
                "false" => self.visitor.visit_bool(false),
                _ => Err(E::custom(format!("`{written}` does not expand to true or false"))),
            },
            Wanted::Number if has_reference => {
                let expanded = expand(written, self.lookup).map_err(E::custom)?;
                let number = expanded.trim();
                if let Ok(number) = number.parse() {
                    self.visitor.visit_u64(number)
                } else if let Ok(number) = number.parse() {
                    self.visitor.visit_i64(number)
                } else {
                    Err(E::custom(format!("`{written}` does not expand to a whole number")))
                }
            }
            Wanted::Struct(_) => Err(E::invalid_type(Unexpected::Str(written), &self)),
            Wanted::Text | Wanted::Bool | Wanted::Number => self.visitor.visit_str(written),
        }
    }
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Visit<'_, V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.wanted {
            Wanted::Struct(_) => f.write_str("keys and values"),
            _ => self.visitor.expecting(f),
        }
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<V::Value, E> {
        self.text(text)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<V::Value, E> {
        self.not_a_struct(Unexpected::Bool(value))?.visit_bool(value)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<V::Value, E> {
        self.not_a_struct(Unexpected::Unsigned(value))?.visit_u64(value)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<V::Value, E> {
        self.not_a_struct(Unexpected::Signed(value))?.visit_i64(value)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<V::Value, E> {
        self.not_a_struct(Unexpected::Float(value))?.visit_f64(value)
    }

    fn visit_none<E: Error>(self) -> Result<V::Value, E> {
        match self.wanted {
            Wanted::Struct(_) => self.visit_unit(),
            _ => self.visitor.visit_none(),
        }
    }

    fn visit_unit<E: Error>(self) -> Result<V::Value, E> {
        match self.wanted {
            Wanted::Struct(_) => {
                let nothing: std::iter::Empty<(&str, &str)> = std::iter::empty();
                self.visitor.visit_map(MapDeserializer::new(nothing))
            }
            _ => self.visitor.visit_unit(),
        }
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<V::Value, D::Error> {
        self.visitor.visit_some(Expanding::new(deserializer, self.lookup))
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<V::Value, D::Error> {
        self.visitor
            .visit_newtype_struct(Expanding::new(deserializer, self.lookup))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<V::Value, A::Error> {
        match self.wanted {
            Wanted::Struct(_) => Err(A::Error::invalid_type(Unexpected::Seq, &self)),
            _ => self.visitor.visit_seq(Expanding::new(seq, self.lookup)),
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<V::Value, A::Error> {
        let fields = match self.wanted {
            Wanted::Struct(fields) => Some(fields),
            _ => None,
        };
        self.visitor.visit_map(Keys {
            map: Expanding::new(map, self.lookup),
            fields,
            seen: HashSet::new(),
        })
    }

    fn visit_enum<A: EnumAccess<'de>>(self, _: A) -> Result<V::Value, A::Error> {
        Err(A::Error::custom("YAML tags (`!name`) are not used here"))
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Expanding<'_, S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<S::Value, D::Error> {
        self.inner.deserialize(Expanding::new(deserializer, self.lookup))
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Expanding<'_, A> {
    type Error = A::Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        self.inner.next_element_seed(Expanding::new(seed, self.lookup))
    }
}

/// The entries of a map; of a struct's map, only keys that are among its `fields`, once each.
struct Keys<'e, A> {
    map: Expanding<'e, A>,
    fields: Option<&'static [&'static str]>,
    seen: HashSet<String>,
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Keys<'_, A> {
    type Error = A::Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        match self.fields {
            None => self.map.inner.next_key_seed(seed),
            Some(fields) => self.map.inner.next_key_seed(Key {
                seed,
                fields,
                seen: &mut self.seen,
            }),
        }
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        self.map.inner.next_value_seed(Expanding::new(seed, self.map.lookup))
    }
}

/// Checks a key inside the visitor that receives it: only there does an error take the key's own place.
struct Key<'a, S> {
    seed: S,
    fields: &'static [&'static str],
    seen: &'a mut HashSet<String>,
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Key<'_, S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<S::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de, S: DeserializeSeed<'de>> Visitor<'de> for Key<'_, S> {
    type Value = S::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<S::Value, E> {
        if !self.fields.contains(&key) {
            return Err(E::custom(format!(
                "unknown key `{key}`{}",
                did_you_mean(key, self.fields)
            )));
        }
        if !self.seen.insert(key.to_owned()) {
            return Err(E::custom(format!("the key `{key}` is given twice")));
        }
        self.seed.deserialize(key.into_deserializer())
    }
}
