//! `${NAME}` and `${NAME:-default}` in the text of one scalar.
//!
//! Expansion works on values that YAML has already cut out of the file, never on the file: whatever a variable holds, a
//! quote, a colon, a line break, it stays the one value it was written in, and a comment that mentions a variable asks
//! for nothing. As in a shell, the default also stands in for a variable that is set but empty. `$$` is a dollar; a
//! dollar that opens no brace is itself, so that passwords need no care. Defaults are literal and end at the first `}`.

/// Where variables come from: the process environment, or a map in tests.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Replaces every reference in `text`.
///
/// # Errors
/// Says which variable is missing, or how a reference is malformed; never repeats a variable's value.
pub(super) fn expand(text: &str, lookup: Lookup<'_>) -> Result<String, String> {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            expanded.push('$');
            rest = after;
        } else if let Some(after) = rest.strip_prefix('{') {
            let Some(end) = after.find('}') else {
                return Err("`${` without its `}`; write `$$` for a literal dollar".to_owned());
            };
            expanded.push_str(&value_of(&after[..end], lookup)?);
            rest = &after[end + 1..];
        } else {
            expanded.push('$');
        }
    }
    expanded.push_str(rest);
    Ok(expanded)
}

fn value_of(reference: &str, lookup: Lookup<'_>) -> Result<String, String> {
    let (name, default) = match reference.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (reference, None),
    };
    let mut letters = name.chars();
    let starts_well = letters.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
    if !starts_well || !letters.all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Err(format!(
            "`${{{reference}}}` is not a reference: write `${{NAME}}` or `${{NAME:-default}}`"
        ));
    }
    match (lookup(name), default) {
        (Some(value), None) => Ok(value),
        (Some(value), Some(_)) if !value.is_empty() => Ok(value),
        (_, Some(default)) => Ok(default.to_owned()),
        (None, None) => Err(format!(
            "the environment variable `{name}` is not set; set it, or give a default: `${{{name}:-...}}`"
        )),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn env(name: &str) -> Option<String> {
        match name {
            "HOST" => Some("db".to_owned()),
            "EMPTY" => Some(String::new()),
            "DOLLAR" => Some("${HOST}$$".to_owned()),
            _ => None,
        }
    }

    #[test]
    fn references_defaults_and_dollars() {
        for (text, expanded) in [
            ("", ""),
            ("plain", "plain"),
            ("${HOST}", "db"),
            ("a${HOST}b${HOST}c", "adbbdbc"),
            ("${HOST:-other}", "db"),
            ("${NONE:-other}", "other"),
            ("${NONE:-}", ""),
            ("${NONE:-a:-b}", "a:-b"),
            ("${EMPTY}", ""),
            ("${EMPTY:-other}", "other"),
            ("$$", "$"),
            ("$${HOST}", "${HOST}"),
            ("pa$word$", "pa$word$"),
            ("${NONE:-http://h:1}", "http://h:1"),
        ] {
            assert_eq!(expand(text, &env).as_deref(), Ok(expanded), "{text}");
        }
    }

    #[test]
    fn a_value_is_not_expanded_again() {
        assert_eq!(expand("${DOLLAR}", &env).as_deref(), Ok("${HOST}$$"));
    }

    #[test]
    fn a_missing_variable_is_named() {
        assert!(expand("x${NONE}", &env).unwrap_err().contains("`NONE` is not set"));
    }

    #[test]
    fn malformed_references_are_refused() {
        for text in ["${HOST", "${}", "${:-x}", "${A B}", "${1A}", "${A-x}", "${A:x}"] {
            assert!(expand(text, &env).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn text_without_dollars_is_itself(text in "[^$]*") {
            prop_assert_eq!(expand(&text, &|_| None), Ok(text));
        }

        #[test]
        fn doubled_dollars_keep_any_text(text in ".*") {
            prop_assert_eq!(expand(&text.replace('$', "$$"), &|_| None), Ok(text));
        }

        #[test]
        fn a_value_arrives_as_it_is(value in ".*") {
            prop_assert_eq!(expand("<${V}>", &|_| Some(value.clone())), Ok(format!("<{value}>")));
        }
    }
}
