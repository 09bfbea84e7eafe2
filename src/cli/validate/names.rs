//! What validate makes is known by its name, and by a mark in its metadata. Pure.
//!
//! `diptych-validate-20300131T235959Z-0123abcd-documents-files`: when the run began, its id, the scenario, and what it
//! is. A name that only comes close is somebody's data.

use chrono::{DateTime, NaiveDateTime, Utc};
use uuid::Uuid;

const PREFIX: &str = "diptych-validate-";
const TIME: &str = "%Y%m%dT%H%M%SZ";
/// As long as the time is when it is written.
const TIME_LENGTH: usize = 16;
const ID_LENGTH: usize = 8;

/// The metadata key of what validate makes; the value is the run's id.
pub const MARK: &str = "diptych_validate";

/// The id of a run: when it began, and eight random digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunId(String);

impl RunId {
    pub fn new(now: DateTime<Utc>) -> Self {
        let random = Uuid::new_v4().simple().to_string();
        Self(format!("{}-{}", now.format(TIME), &random[..ID_LENGTH]))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What the names of everything that a scenario makes begin with.
    pub fn prefix(&self, scenario: &str) -> String {
        format!("{PREFIX}{}-{scenario}-", self.0)
    }
}

/// A name that validate gave.
#[derive(Debug, PartialEq, Eq)]
pub struct Ours<'a> {
    pub run: &'a str,
    pub begun: DateTime<Utc>,
}

/// Takes a name apart; `None`: it is not of our making.
pub fn ours(name: &str) -> Option<Ours<'_>> {
    let rest = name.strip_prefix(PREFIX)?;
    let run = rest.get(..TIME_LENGTH + 1 + ID_LENGTH)?;
    let (time, id) = run.split_once('-')?;
    let what = rest[run.len()..].strip_prefix('-')?;
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if time.len() != TIME_LENGTH || !id.bytes().all(hex) || what.is_empty() {
        return None;
    }
    let begun = NaiveDateTime::parse_from_str(time, TIME).ok()?.and_utc();
    // Only as it is written here: `strptime` is more forgiving.
    (begun.format(TIME).to_string() == time).then_some(Ours { run, begun })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_known_again() {
        let now = DateTime::from_timestamp(1_900_000_000, 0).expect("a time");
        let run = RunId::new(now);
        let name = format!("{}files", run.prefix("documents"));
        let found = ours(&name).expect("ours");
        assert_eq!((found.run, found.begun), (run.as_str(), now));
        assert_ne!(RunId::new(now), run);
    }

    #[test]
    fn a_name_that_comes_close_is_somebodys() {
        assert!(ours("diptych-validate-20300131T235959Z-0123abcd-documents-x").is_some());
        for name in [
            "diptych-validate",
            "diptych-validate-",
            "diptych-validate-mine",
            "diptych-validate-20300131T235959Z-0123abcd",
            "diptych-validate-20300131T235959Z-0123abcd-",
            "diptych-validate-20300131T235959Z-0123abcdx-y",
            "diptych-validate-20300131T235959Z-0123abcg-x",
            "diptych-validate-20300131T235959Z-0123ABCD-x",
            "diptych-validate-20301331T235959Z-0123abcd-x",
            "diptych-validate-20300131t235959z-0123abcd-x",
            "diptych-validate-2030-01-31T2359Z-0123abcd-x",
            "diptych_validate-20300131T235959Z-0123abcd-x",
            "Diptych-validate-20300131T235959Z-0123abcd-x",
            "x-diptych-validate-20300131T235959Z-0123abcd-x",
            "diptych-validate-20300131T235959\u{dc}Z-0123abc-x",
            "diptych-validate-\u{dc}\u{dc}\u{dc}\u{dc}\u{dc}\u{dc}\u{dc}\u{dc}\u{dc}\u{dc}\u{dc}\u{dc}-x",
        ] {
            assert_eq!(ours(name), None, "{name}");
        }
    }
}
