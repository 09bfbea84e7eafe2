//! Bodies of everything that makes or changes a collection, a database or a tenant.
//!
//! A list or an object as a value of collection metadata panics the node's handler (chroma-facts.md 8.3): it is refused
//! here. All else is for the nodes to judge; only names and what decides the handling are taken out.

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::metadata::CollectionMetadata;
use super::{ParseProblem, Refusal, read};

/// A new collection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateBody {
    pub name: String,
    /// Take an existing one of that name as it is, whatever else the request says.
    pub get_or_create: bool,
}

/// A change of a collection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModifyBody {
    /// Present if it renames.
    pub new_name: Option<String>,
    /// Whether it changes the configuration: then `database is locked` is likely under load, and worth a retry.
    pub has_configuration: bool,
}

/// Reads the body of `POST .../collections`.
///
/// # Errors
/// See [`ParseProblem`].
pub fn parse_create(body: &[u8]) -> Result<CreateBody, ParseProblem> {
    // Fields that we do not use stand here because Chroma refuses them if they are repeated.
    #[derive(Deserialize)]
    struct Fields {
        name: String,
        #[serde(default)]
        get_or_create: bool,
        metadata: Option<CollectionMetadata>,
        #[serde(rename = "configuration")]
        _configuration: Option<IgnoredAny>,
        #[serde(rename = "schema")]
        _schema: Option<IgnoredAny>,
    }
    let fields: Fields = read(body)?;
    check(fields.metadata)?;
    Ok(CreateBody {
        name: fields.name,
        get_or_create: fields.get_or_create,
    })
}

/// Reads the body of `PUT .../collections/{id}`.
///
/// # Errors
/// See [`ParseProblem`].
pub fn parse_modify(body: &[u8]) -> Result<ModifyBody, ParseProblem> {
    #[derive(Deserialize)]
    struct Fields {
        new_name: Option<String>,
        new_metadata: Option<CollectionMetadata>,
        new_configuration: Option<IgnoredAny>,
    }
    let fields: Fields = read(body)?;
    check(fields.new_metadata)?;
    Ok(ModifyBody {
        new_name: fields.new_name,
        has_configuration: fields.new_configuration.is_some(),
    })
}

/// Reads the name of a new tenant or database.
///
/// # Errors
/// See [`ParseProblem`].
pub fn parse_name(body: &[u8]) -> Result<String, ParseProblem> {
    #[derive(Deserialize)]
    struct Fields {
        name: String,
    }
    read::<Fields>(body).map(|fields| fields.name)
}

fn check(metadata: Option<CollectionMetadata>) -> Result<(), Refusal> {
    match metadata.and_then(|metadata| metadata.nested) {
        None => Ok(()),
        Some(key) => Err(Refusal::invalid(format!(
            "Collection metadata key [{key}] is a list or an object: only strings, numbers and booleans are supported"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_refused<T: std::fmt::Debug>(found: Result<T, ParseProblem>) -> bool {
        match found {
            Err(ParseProblem::Refused(refusal)) => matches!(refusal.status, 400 | 422),
            _ => false,
        }
    }

    #[test]
    fn reads_creates() {
        let create = |name: &str, get_or_create| {
            Ok(CreateBody {
                name: name.into(),
                get_or_create,
            })
        };
        assert_eq!(parse_create(br#"{"name":"abc"}"#), create("abc", false));
        let full = br#"{"get_or_create":true,"metadata":{"hnsw:space":"l2","chroma:x":1},"configuration":{"hnsw":{}},
            "schema":null,"id":7,"n\u0061me":"a\u0062c"}"#;
        assert_eq!(parse_create(full), create("abc", true));
        for value in ["[]", "[1]", "{}", r#"{"indices":[1],"values":[1]}"#] {
            let body = format!(r#"{{"name":"abc","metadata":{{"k":1,"k":{value}}}}}"#);
            assert!(is_refused(parse_create(body.as_bytes())), "{body}");
        }
        assert!(is_refused(parse_create(br#"["abc",null,null,{"k":[1]},true]"#)));
        for body in [
            "{}",
            r#"{"name":null}"#,
            r#"{"name":"abc","name":"abd"}"#,
            r#"{"name":"abc","get_or_create":null}"#,
            r#"{"name":"abc","get_or_create":1}"#,
            r#"{"name":"abc","metadata":null,"metadata":{"k":[1]}}"#,
            r#"{"name":"abc","metadata":[]}"#,
            r#"{"name":"abc","configuration":null,"configuration":null}"#,
            r#"{"name":"abc"} x"#,
        ] {
            assert_eq!(parse_create(body.as_bytes()), Err(ParseProblem::Malformed), "{body}");
        }
    }

    #[test]
    fn reads_modifications() {
        let modify = |body: &str| parse_modify(body.as_bytes());
        assert_eq!(
            modify("{}"),
            Ok(ModifyBody {
                new_name: None,
                has_configuration: false
            })
        );
        assert_eq!(
            modify(r#"{"new_name":"abc","new_metadata":{"k":null},"new_configuration":null}"#),
            Ok(ModifyBody {
                new_name: Some("abc".into()),
                has_configuration: false
            })
        );
        assert!(
            modify(r#"{"new_configuration":{"hnsw":{}}}"#)
                .unwrap()
                .has_configuration
        );
        assert!(is_refused(modify(r#"{"new_metadata":{"k":[]}}"#)));
        assert!(is_refused(modify(r#"[null,{"k":[1]},null]"#)));
        assert_eq!(
            modify(r#"{"new_metadata":null,"new_metadata":{"k":[]}}"#),
            Err(ParseProblem::Malformed)
        );
        assert_eq!(modify(r#"{"new_name":1}"#), Err(ParseProblem::Malformed));
        assert_eq!(modify("null"), Err(ParseProblem::Malformed));
    }

    #[test]
    fn reads_names() {
        assert_eq!(parse_name(br#"{"name":"t\u00e9n","id":"x"}"#), Ok("tén".to_owned()));
        assert_eq!(parse_name(br#"{"name":"a","name":"b"}"#), Err(ParseProblem::Malformed));
        assert_eq!(parse_name(br#""abc""#), Err(ParseProblem::Malformed));
        assert!(is_refused(parse_name(b"{\"name\":\"abc\",\"zz\":\"\xff\"}"))); // Chroma takes it
    }
}
