//! Fault points: labelled lines at which a test lets the process die.
//!
//! They stand between two steps that belong together: an answer and the commit that speaks of it, a commit and what
//! memory makes of it. `DIPTYCH_FAULT=entry-logged` kills the process the first time that line is reached,
//! `DIPTYCH_FAULT=entry-logged:3` the third time. It is a real SIGKILL: nothing is flushed, no destructor runs.
//! `DIPTYCH_FAULT=entry-logged:3!` panics there.
//!
//! Only builds with debug assertions have them, which is what the tests run; a release has none.
//! `tests/scenarios/fault_points.rs` crashes at each of [`POINTS`].

/// Every label, and what has happened when it is reached.
pub const POINTS: [(&str, &str); 23] = [
    ("intent-logged", "The intent is durable; no node has seen the write."),
    (
        "nodes-answered",
        "The nodes answered a write; what one of them missed is not logged.",
    ),
    (
        "entry-covered",
        "What a node missed is durable; the client has no answer.",
    ),
    (
        "names-intended",
        "The intent of a change of names is durable; no node has seen it.",
    ),
    (
        "names-answered",
        "The nodes answered a change of names; the catalog does not have it.",
    ),
    (
        "names-covered",
        "The catalog has a change of names; the client has no answer.",
    ),
    (
        "drain-answered",
        "A node took rows from the drain; they are still in the log.",
    ),
    ("drain-committed", "Rows are out of the log; memory still counts them."),
    (
        "drain-joining",
        "A lane has no rows left for a node; it has not joined.",
    ),
    (
        "recovery-flushed",
        "The source of a recovery is flushed; nothing of it is durable.",
    ),
    (
        "recovery-committed",
        "The repairs that a recovery asks for are durable; nobody serves the lane yet.",
    ),
    (
        "names-inspected",
        "A recovery knows what became of changes of names; nothing of it is durable.",
    ),
    (
        "flag-set",
        "The log is away and one node carries the flag that says so; the others do not.",
    ),
    (
        "unprotected-covered",
        "What was written without the log is to be compared, durably; memory does not know it.",
    ),
    (
        "flag-clearing",
        "What was written without the log is compared; the nodes still carry the flag.",
    ),
    (
        "copy-created",
        "A node has got a collection anew; its UUID there is not in the catalog.",
    ),
    ("copy-under-way", "Some records of a collection are copied."),
    (
        "copy-complete",
        "A copy is equal to its source; its repair row is still there.",
    ),
    ("copy-committed", "A copy's repair row is gone; the node serves it."),
    (
        "records-mended",
        "Some records are equal again; their repair row is still there.",
    ),
    (
        "checkpoint-written",
        "A node has a new checkpoint; the journal does not remember it.",
    ),
    (
        "marker-written",
        "A node has its marker; the journal does not remember it.",
    ),
    (
        "late-answer",
        "A straggler took its entry; its row is still in the log.",
    ),
];

/// Dies here if the test said so.
#[cfg(debug_assertions)]
pub fn point(label: &'static str) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static ARMED: LazyLock<Option<(String, AtomicU64, bool)>> = LazyLock::new(|| {
        let text = std::env::var("DIPTYCH_FAULT").ok()?;
        let (text, panics) = text
            .strip_suffix('!')
            .map_or((text.as_str(), false), |text| (text, true));
        let (label, times) = parse(text);
        Some((label.to_owned(), AtomicU64::new(times), panics))
    });
    if let Some((armed, times, panics)) = &*ARMED
        && armed == label
        && times.fetch_sub(1, Ordering::SeqCst) == 1
    {
        eprintln!("Fault point {label}.");
        if *panics {
            std::panic::panic_any(label);
        }
        // SAFETY: neither call touches memory of ours.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        std::process::abort();
    }
}

/// Nothing, in a release.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn point(_: &'static str) {}

#[cfg(debug_assertions)]
fn parse(text: &str) -> (&str, u64) {
    match text.rsplit_once(':') {
        Some((label, times)) => (label, times.parse().unwrap_or(1)),
        None => (text, 1),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;

    fn labels_in(folder: &Path, found: &mut BTreeMap<String, usize>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                labels_in(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("fault.rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                for rest in text.split("fault::point(\"").skip(1) {
                    let label = rest.split('"').next().unwrap();
                    *found.entry(label.to_owned()).or_default() += 1;
                }
            }
        }
    }

    #[test]
    fn every_label_stands_at_one_line_and_every_line_has_a_label() {
        let mut found = BTreeMap::new();
        labels_in(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
        let expected = POINTS.iter().map(|(label, _)| ((*label).to_owned(), 1)).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn an_armed_point_may_count() {
        assert_eq!(parse("drain-answered"), ("drain-answered", 1));
        assert_eq!(parse("drain-answered:3"), ("drain-answered", 3));
    }
}
