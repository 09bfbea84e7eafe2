//! The JSON schema of the file, for editors and for checking a deployment without running it.
//!
//! It is made from the structs, so it cannot say other than they do; what schemars cannot know is added here. Pingora's
//! keys have no schema, so their kinds are taken from the defaults. And any value may be a reference, so where a number or
//! a bool is expected, a text with `${` is fine too.

use serde_json::{Map, Value, json};

use super::{Config, top};

/// The JSON schema of a configuration file, as shipped in `conf/diptych.schema.json`.
pub fn json_schema() -> Value {
    let mut schema = schemars::schema_for!(Config).to_value();
    if let Some(Value::Object(properties)) = schema.get_mut("properties") {
        for (key, default) in top::pingora_keys() {
            properties.insert(key.clone(), pingora_key(default));
        }
    }
    allow_references(&mut schema);
    schema
}

fn pingora_key(default: &Value) -> Value {
    let mut schema = Map::from_iter([(
        "description".to_owned(),
        json!("One of Pingora's own keys; see its `ServerConf`."),
    )]);
    let kind = match default {
        Value::Bool(_) => Some("boolean"),
        Value::Number(_) => Some("integer"),
        Value::String(_) => Some("string"),
        Value::Array(_) => Some("array"),
        Value::Null | Value::Object(_) => None,
    };
    if let Some(kind) = kind {
        schema.insert("type".to_owned(), json!(kind));
    }
    schema.insert("default".to_owned(), default.clone());
    Value::Object(schema)
}

fn allow_references(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            let kind = object.get("type").and_then(Value::as_str);
            if matches!(kind, Some("integer" | "number" | "boolean")) {
                let mut plain = Map::new();
                for key in ["type", "format", "minimum", "maximum"] {
                    if let Some(value) = object.remove(key) {
                        plain.insert(key.to_owned(), value);
                    }
                }
                object.insert(
                    "anyOf".to_owned(),
                    json!([plain, {"type": "string", "pattern": "\\$\\{"}]),
                );
            } else if let Some(Value::Array(choices)) = object.get_mut("oneOf") {
                choices.push(json!({"type": "string", "pattern": "\\$\\{"}));
            } else {
                object.values_mut().for_each(allow_references);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(allow_references),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_shipped_schema_is_current() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("conf/diptych.schema.json");
        let current = format!("{:#}\n", json_schema());
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&path, &current).unwrap();
        }
        let shipped = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            shipped == current,
            "{} is out of date: run the tests once with UPDATE=1",
            path.display()
        );
    }

    #[test]
    fn every_key_is_described_and_no_other_allowed() {
        let schema = json_schema();
        assert_eq!(schema["additionalProperties"], json!(false));
        let properties = schema["properties"].as_object().unwrap();
        for key in top::keys() {
            assert!(properties[*key]["description"].is_string(), "{key}");
            assert!(properties[*key].get("default").is_some(), "{key}");
        }
        assert_eq!(properties.len(), top::keys().len());
        for (name, section) in schema["$defs"].as_object().unwrap() {
            for (key, property) in section["properties"].as_object().into_iter().flatten() {
                assert!(property["description"].is_string(), "{name}.{key}");
            }
        }
    }

    #[test]
    fn numbers_may_be_references() {
        let threads = &json_schema()["properties"]["threads"];
        assert_eq!(
            threads["anyOf"],
            json!([{"type": "integer"}, {"type": "string", "pattern": "\\$\\{"}])
        );
        assert_eq!(threads["default"], json!(2));
    }
}
