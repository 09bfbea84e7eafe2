//! What came of a run: as text, as JSON, and in the form that CI systems read (JUnit).

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::stage::{Outcome, Stop};

/// How a scenario or a part of one ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Passed,
    Failed(String),
    Skipped(String),
}

impl Verdict {
    pub fn of(outcome: Outcome) -> Self {
        match outcome {
            Ok(()) => Self::Passed,
            Err(Stop::Failed(reason)) => Self::Failed(reason),
            Err(Stop::Skipped(reason)) => Self::Skipped(reason),
        }
    }

    fn word(&self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed(_) => "failed",
            Self::Skipped(_) => "skipped",
        }
    }

    fn reason(&self) -> Option<&str> {
        match self {
            Self::Passed => None,
            Self::Failed(reason) | Self::Skipped(reason) => Some(reason),
        }
    }
}

/// A part of a scenario.
#[derive(Debug, Clone)]
pub struct Part {
    pub name: &'static str,
    pub verdict: Verdict,
    pub time: Duration,
}

/// One scenario's result.
#[derive(Debug, Clone)]
pub struct Judged {
    pub title: &'static str,
    pub key: &'static str,
    pub verdict: Verdict,
    pub time: Duration,
    /// Of the nodes themselves.
    pub reads: u64,
    pub parts: Vec<Part>,
    pub facts: Map<String, Value>,
}

/// A scenario's verdict, from what it returned, its parts, and how much of the nodes it has seen.
pub fn judge(outcome: Outcome, parts: &[Part], reads: u64) -> Verdict {
    let verdict = Verdict::of(outcome);
    if verdict != Verdict::Passed {
        return verdict;
    }
    let failed: Vec<String> = parts
        .iter()
        .filter_map(|part| match &part.verdict {
            Verdict::Failed(reason) => Some(format!("{}: {reason}", part.name)),
            _ => None,
        })
        .collect();
    if !failed.is_empty() {
        return Verdict::Failed(failed.join("\n"));
    }
    if reads == 0 {
        return Verdict::Failed("it read no node directly, so it has proved nothing".to_owned());
    }
    Verdict::Passed
}

/// What was removed and what was kept.
#[derive(Debug, Clone, Default)]
pub struct Cleaned {
    pub scenarios: usize,
    pub preserved: Vec<Kept>,
    pub documents: u64,
    pub collections: usize,
    pub mappings: usize,
    pub entries: u64,
}

/// A collection that is still there, and how to look at it.
#[derive(Debug, Clone)]
pub struct Kept {
    /// The scenario that made it.
    pub scenario: String,
    pub name: String,
    /// Where it is: the server's name, its id there, and a command.
    pub places: Vec<(String, String, String)>,
}

impl Kept {
    fn json(&self) -> Value {
        let places = self.places.iter();
        let places: Vec<Value> = places
            .map(|(at, id, look)| json!({"at": at, "id": id, "look": look}))
            .collect();
        json!({"scenario": self.scenario, "collection": self.name, "places": places})
    }
}

/// A whole run.
#[derive(Debug)]
pub struct Report {
    pub run: String,
    pub proxy: String,
    pub admin: String,
    pub nodes: Vec<(String, String)>,
    pub time: Duration,
    pub judged: Vec<Judged>,
    pub cleaned: Cleaned,
    /// Why it ended before its end.
    pub broken_off: Option<String>,
}

/// How a run ended, as exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Passed = 0,
    Failed = 1,
    CouldNotRun = 2,
}

impl Report {
    fn count(&self, word: &str) -> usize {
        self.judged.iter().filter(|one| one.verdict.word() == word).count()
    }

    fn parts(&self, word: &str) -> usize {
        let parts = self.judged.iter().flat_map(|one| &one.parts);
        parts.filter(|part| part.verdict.word() == word).count()
    }

    pub fn end(&self) -> End {
        match (self.count("failed"), self.count("passed"), &self.broken_off) {
            (1.., _, _) => End::Failed,
            // Nothing was shown.
            (_, _, Some(_)) | (_, 0, _) => End::CouldNotRun,
            _ => End::Passed,
        }
    }

    /// How it ended, in words.
    pub fn verdict(&self) -> String {
        let skipped = match (self.count("skipped"), self.parts("skipped")) {
            (0, 0) => String::new(),
            (0, parts) => format!(" with {parts} parts skipped"),
            (all, 0) => format!(" with {all} skipped"),
            (all, parts) => format!(" with {all} skipped, and {parts} parts of others"),
        };
        match self.end() {
            End::Passed => format!("passed{skipped}"),
            End::Failed => format!("{} of {} failed{skipped}", self.count("failed"), self.judged.len()),
            End::CouldNotRun => "could not run: nothing was shown".to_owned(),
        }
    }

    pub fn json(&self) -> Value {
        let parts = |one: &Judged| -> Vec<Value> {
            let parts = one.parts.iter();
            parts
                .map(|part| {
                    json!({"name": part.name, "outcome": part.verdict.word(), "reason": part.verdict.reason(),
                           "seconds": part.time.as_secs_f64()})
                })
                .collect()
        };
        let scenarios = self.judged.iter().map(|one| {
            json!({"name": one.title, "key": one.key, "outcome": one.verdict.word(), "reason": one.verdict.reason(),
                   "seconds": one.time.as_secs_f64(), "direct_reads": one.reads, "parts": parts(one), "facts": one.facts})
        });
        let cleaned = &self.cleaned;
        let end = match self.end() {
            End::Passed => "passed",
            End::Failed => "failed",
            End::CouldNotRun => "could_not_run",
        };
        let nodes = self.nodes.iter().map(|(name, url)| json!({"name": name, "url": url}));
        json!({
            "run": self.run,
            "version": env!("CARGO_PKG_VERSION"),
            "proxy": self.proxy,
            "admin": self.admin,
            "nodes": nodes.collect::<Vec<_>>(),
            "seconds": self.time.as_secs_f64(),
            "outcome": end,
            "verdict": self.verdict(),
            "broken_off": self.broken_off,
            "passed": self.count("passed"),
            "failed": self.count("failed"),
            "skipped": self.count("skipped"),
            "parts_skipped": self.parts("skipped"),
            "scenarios": scenarios.collect::<Vec<_>>(),
            "clean_up": {
                "scenarios_cleaned": cleaned.scenarios,
                "collections_preserved": cleaned.preserved.len(),
                "documents": cleaned.documents,
                "collections": cleaned.collections,
                "mappings": cleaned.mappings,
                "log_entries": cleaned.entries,
            },
            "preserved": cleaned.preserved.iter().map(Kept::json).collect::<Vec<_>>(),
        })
    }

    /// What stands at the end.
    pub fn summary(&self) -> String {
        let cleaned = &self.cleaned;
        let mut text = format!("\n{}", removed(cleaned));
        text.push_str(&preserved(&cleaned.preserved));
        if let Some(reason) = &self.broken_off {
            let _ = writeln!(text, "Broken off: {reason}");
        }
        let _ = writeln!(text, "{} in {:.1} s", capital(&self.verdict()), self.time.as_secs_f64());
        text
    }

    /// One test suite; scenarios and their parts are its cases.
    pub fn junit(&self) -> String {
        let mut cases = String::new();
        let mut add = |class: &str, name: &str, verdict: &Verdict, time: Duration| {
            let _ = write!(
                cases,
                "  <testcase classname=\"{}\" name=\"{}\" time=\"{:.3}\"",
                escape(class),
                escape(name),
                time.as_secs_f64()
            );
            cases.push_str(&match verdict {
                Verdict::Passed => "/>\n".to_owned(),
                Verdict::Failed(reason) => {
                    let first = reason.lines().next().unwrap_or_default();
                    format!(
                        "><failure message=\"{}\">{}</failure></testcase>\n",
                        escape(first),
                        escape(reason)
                    )
                }
                Verdict::Skipped(reason) => format!("><skipped message=\"{}\"/></testcase>\n", escape(reason)),
            });
        };
        for one in &self.judged {
            add("diptych.validate", one.title, &one.verdict, one.time);
            for part in &one.parts {
                add(
                    &format!("diptych.validate.{}", one.key),
                    part.name,
                    &part.verdict,
                    part.time,
                );
            }
        }
        let of = |word: &str| self.count(word) + self.parts(word);
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
             <testsuite name=\"diptych validate\" tests=\"{}\" failures=\"{}\" skipped=\"{}\" errors=\"0\" time=\"{:.3}\">\n\
             {cases}</testsuite>\n",
            of("passed") + of("failed") + of("skipped"),
            of("failed"),
            of("skipped"),
            self.time.as_secs_f64()
        )
    }
}

/// A line, or a few, for one scenario.
pub fn line(one: &Judged) -> String {
    let mut text = format!(
        "{:8} {:32} {:6.1} s  {:4} direct reads\n",
        one.verdict.word().to_uppercase(),
        one.title,
        one.time.as_secs_f64(),
        one.reads
    );
    if one.parts.is_empty() {
        for line in one.verdict.reason().unwrap_or_default().lines() {
            let _ = writeln!(text, "         {line}");
        }
    } else {
        for part in &one.parts {
            let reason = part
                .verdict
                .reason()
                .map_or_else(String::new, |reason| format!(": {reason}"));
            let _ = writeln!(text, "         {:8} {}{reason}", part.verdict.word(), part.name);
        }
        // What stopped it between its parts, or after them.
        if one.parts.iter().all(|part| !matches!(part.verdict, Verdict::Failed(_))) {
            for line in one.verdict.reason().unwrap_or_default().lines() {
                let _ = writeln!(text, "         {line}");
            }
        }
    }
    let facts: Vec<String> = one
        .facts
        .iter()
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    if !facts.is_empty() {
        let _ = writeln!(text, "         {}", facts.join(", "));
    }
    text
}

/// What was removed, in a sentence.
pub fn removed(cleaned: &Cleaned) -> String {
    format!(
        "Cleaned: {} scenarios; {} documents, {} collections, {} mappings, {} log entries removed.\n",
        cleaned.scenarios, cleaned.documents, cleaned.collections, cleaned.mappings, cleaned.entries
    )
}

/// What is kept, and how to look at it.
pub fn preserved(kept: &[Kept]) -> String {
    if kept.is_empty() {
        return "Preserved: nothing.\n".to_owned();
    }
    let mut text = format!("Preserved: {} collections.\n", kept.len());
    for one in kept {
        let _ = writeln!(text, "  {}: {}", one.scenario, one.name);
        for (at, _, look) in &one.places {
            let _ = writeln!(text, "    at {at}: {look}");
        }
    }
    text.push_str("Remove them with `diptych validate --clean` once you have seen enough.\n");
    text
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars
        .next()
        .map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}

/// For text and attributes of XML, which cannot hold most control characters at all.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' => escaped.push_str("&#10;"),
            '\t' => escaped.push(c),
            c if c.is_control() || c == '\u{fffe}' || c == '\u{ffff}' => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(verdict: Verdict, parts: Vec<Part>) -> Judged {
        Judged {
            title: "Document operations",
            key: "documents",
            verdict,
            time: Duration::from_millis(1500),
            reads: 3,
            parts,
            facts: Map::new(),
        }
    }

    fn part(verdict: Verdict) -> Part {
        Part {
            name: "structure",
            verdict,
            time: Duration::from_millis(10),
        }
    }

    fn report(judged: Vec<Judged>) -> Report {
        Report {
            run: "r".to_owned(),
            proxy: "p".to_owned(),
            admin: "a".to_owned(),
            nodes: vec![],
            time: Duration::from_secs(2),
            judged,
            cleaned: Cleaned::default(),
            broken_off: None,
        }
    }

    #[test]
    fn who_reads_nothing_proves_nothing() {
        assert_eq!(judge(Ok(()), &[], 1), Verdict::Passed);
        assert!(matches!(judge(Ok(()), &[], 0), Verdict::Failed(reason) if reason.contains("proved nothing")));
        let failed = Verdict::Failed("wrong".to_owned());
        assert_eq!(judge(Err("wrong".into()), &[], 9), failed);
        assert_eq!(
            judge(Ok(()), &[part(failed)], 9),
            Verdict::Failed("structure: wrong".to_owned())
        );
        let skipped = Verdict::Skipped("no".to_owned());
        assert_eq!(judge(Ok(()), &[part(skipped.clone())], 9), Verdict::Passed);
        assert_eq!(judge(Err(Stop::Skipped("no".to_owned())), &[], 0), skipped);
    }

    #[test]
    fn skipped_is_never_passed() {
        let passed = || judged(Verdict::Passed, vec![]);
        let skipped = || judged(Verdict::Skipped("no".to_owned()), vec![]);
        let failed = || judged(Verdict::Failed("wrong".to_owned()), vec![]);
        let of = |judged| {
            let report = report(judged);
            (report.end(), report.verdict())
        };
        assert_eq!(of(vec![passed()]), (End::Passed, "passed".to_owned()));
        assert_eq!(
            of(vec![passed(), skipped()]),
            (End::Passed, "passed with 1 skipped".to_owned())
        );
        assert_eq!(of(vec![skipped()]).0, End::CouldNotRun);
        assert_eq!(of(vec![]).0, End::CouldNotRun);
        assert_eq!(
            of(vec![failed(), passed(), skipped()]),
            (End::Failed, "1 of 3 failed with 1 skipped".to_owned())
        );
        let with_part = judged(Verdict::Passed, vec![part(Verdict::Skipped("no".to_owned()))]);
        assert_eq!(of(vec![with_part]).1, "passed with 1 parts skipped");
        let mut broken = report(vec![passed()]);
        broken.broken_off = Some("interrupted".to_owned());
        assert_eq!(broken.end(), End::CouldNotRun);
    }

    #[test]
    fn a_test_report_is_well_formed() {
        let failed = Verdict::Failed("a < b & \"c\"\nsecond\u{1}".to_owned());
        let skipped = part(Verdict::Skipped("no".to_owned()));
        let text = report(vec![judged(failed, vec![skipped])]).junit();
        assert!(text.contains("tests=\"2\" failures=\"1\" skipped=\"1\""), "{text}");
        assert!(text.contains("message=\"a &lt; b &amp; &quot;c&quot;\">"), "{text}");
        assert!(text.contains("second\u{fffd}</failure>"), "{text}");
        assert!(
            text.contains("classname=\"diptych.validate.documents\" name=\"structure\""),
            "{text}"
        );
    }
}
