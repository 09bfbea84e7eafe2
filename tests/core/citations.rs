//! What docs/invariants.md and docs/schedules.md cite is there: tests, functions, files, rules of the model.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A name with so many underscores is a sentence: a test.
const SENTENCE: usize = 3;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources(folder: &Path, found: &mut Vec<(PathBuf, String)>) {
    for entry in fs::read_dir(folder).expect("a folder of the repository") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("a source file");
            found.push((path, text));
        }
    }
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// Whether `name` is what `cited` stands for, in which `*` and `...` stand for anything.
fn is_cited(cited: &str, name: &str) -> bool {
    let cited = cited.replace("...", "*");
    let mut rest = name;
    let mut parts = cited.split('*');
    let Some(after) = parts.next().and_then(|first| rest.strip_prefix(first)) else {
        return false;
    };
    rest = after;
    let parts: Vec<_> = parts.collect();
    let Some((last, between)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in between {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// What stands between backticks.
fn citations(text: &str) -> BTreeSet<String> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted
        .map(|one| one.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect()
}

#[test]
fn what_is_cited_is_there() {
    let mut files = vec![];
    for folder in ["src", "tests"] {
        sources(&root().join(folder), &mut files);
    }
    let names_in = |text: &str| -> BTreeSet<String> { text.split(|c| !is_name(c)).map(str::to_owned).collect() };
    let functions: Vec<(&Path, Vec<&str>)> = files
        .iter()
        .map(|(path, text)| {
            let after = text.split("fn ").skip(1);
            let names = after.map(|rest| rest.split(|c| !is_name(c)).next().unwrap_or_default());
            (path.as_path(), names.collect())
        })
        .collect();
    let is_function = |cited: &str, within: &dyn Fn(&Path) -> bool| {
        let mut there = functions
            .iter()
            .filter(|(path, _)| within(path))
            .flat_map(|(_, names)| names);
        there.any(|name| is_cited(cited, name))
    };
    let words: BTreeSet<String> = files.iter().flat_map(|(_, text)| names_in(text)).collect();
    let stems: BTreeSet<&str> = files
        .iter()
        .filter_map(|(path, _)| path.file_stem()?.to_str())
        .collect();
    let is_there = |cited: &str| -> bool {
        let (suite, name) = cited.split_once(": ").unwrap_or(("", cited));
        let is_path = name.contains('/') && !name.starts_with('/');
        if is_path {
            let places = ["src", "tests", "tests/scenarios", "tests/model/src", ""];
            return places.iter().any(|place| root().join(place).join(name).exists());
        }
        if name.contains('-') && name.chars().all(|c| c.is_ascii_lowercase() || c == '-') {
            return files.iter().any(|(_, text)| text.contains(&format!("\"{name}\"")));
        }
        if !name.chars().all(|c| is_name(c) || c == '*' || c == '.') || name.ends_with(".rs") {
            return true;
        }
        let sentence = name.matches('_').count() >= SENTENCE || name.contains("...") || name.contains('*');
        match (suite, sentence) {
            ("", true) => is_function(name, &|_| true),
            // A key of the configuration is two names.
            ("", false) => name.split('.').all(|part| words.contains(part)),
            (suite, _) => {
                let within = |path: &Path| {
                    let is_file = path.file_stem().is_some_and(|stem| stem == suite);
                    is_file || path.iter().any(|folder| folder == suite)
                };
                stems.contains(name) || is_function(name, &within)
            }
        }
    };
    for document in ["docs/invariants.md", "docs/schedules.md"] {
        let text = fs::read_to_string(root().join(document)).expect("a document");
        let missing: Vec<_> = citations(&text).into_iter().filter(|one| !is_there(one)).collect();
        assert_eq!(
            missing,
            Vec::<String>::new(),
            "cited in {document}, and nowhere to be found"
        );
    }
}

#[test]
fn names_may_be_cited_in_part() {
    assert!(is_cited("s01_...", "s01_a_delete"));
    assert!(is_cited("..._cut_off_...", "s17_a_repair_that_was_cut_off_is"));
    assert!(is_cited("s31_*_and_not_written", "s31_nothing_and_not_written"));
    assert!(!is_cited("s31_*_and_not_written", "s31_nothing_and_written"));
    assert!(!is_cited("s01", "s01_a_delete"));
}
