//! Whether a history can be explained by registers that keep every promise. Pure.
//!
//! A read must return what some write left that began before the read ended, and that no acknowledged write has
//! certainly replaced: one that began after the first was over and ended before the read began. What is read from a node
//! itself when all is over is checked in the same way; it is a `final` operation.
//!
//! An operation of unknown outcome is over when its client was told so: lanes keep order, so that it may take effect
//! later, but not on top of a write that was asked for after that answer and acknowledged (`Late`). Only where the client
//! itself stopped waiting is it never over.

use std::collections::{BTreeMap, BTreeSet};

use crate::history::{Effect, FOREIGN, Key, Op, Outcome, Tag, group, groups};

/// The client of operations that read a node when all is over starts with this.
pub const FINAL: &str = "final";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// An acknowledged write is not there at the end.
    Lost,
    /// A read did not see an acknowledged write.
    Stale,
    /// What an acknowledged delete removed was there again.
    Resurrected,
    /// A write of unknown outcome undid an acknowledged one that was asked for later.
    Late,
    /// A value that nobody wrote, or that was refused, or that belongs elsewhere.
    Phantom,
}

impl Kind {
    pub const ALL: [Kind; 5] = [Kind::Lost, Kind::Stale, Kind::Resurrected, Kind::Late, Kind::Phantom];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Lost => "lost",
            Kind::Stale => "stale",
            Kind::Resurrected => "resurrected",
            Kind::Late => "late",
            Kind::Phantom => "phantom",
        }
    }
}

#[derive(Clone, Debug)]
pub struct Violation {
    pub kind: Kind,
    pub key: Key,
    /// The operation that saw it.
    pub op: usize,
    pub text: String,
}

pub fn check(ops: &[Op]) -> Vec<Violation> {
    let registers = Registers::new(ops);
    let mut violations = Vec::new();
    for (n, op) in ops.iter().enumerate().filter(|(_, op)| op.outcome == Outcome::Acked) {
        let last = op.client.starts_with(FINAL);
        for (key, effect) in &op.effects {
            let verdict = match effect {
                Effect::Read(value) => registers.read(key, *value, op, last),
                Effect::ReadNotGroup(g) => registers.read_not_group(key, *g, op),
                _ => Ok(()),
            };
            if let Err((kind, text)) = verdict {
                violations.push(Violation {
                    kind,
                    key: key.clone(),
                    op: n,
                    text,
                });
            }
        }
        if let Some((place, count)) = &op.count
            && let Err(text) = registers.count(place, *count, op)
        {
            violations.push(Violation {
                kind: Kind::Stale,
                key: Key::new(place, "*"),
                op: n,
                text,
            });
        }
    }
    violations
}

/// The operations on one register, for people.
pub fn context<'a>(ops: &'a [Op], key: &'a Key) -> impl Iterator<Item = (usize, &'a Op)> {
    let concerns = move |op: &Op| {
        op.effects.iter().any(|(k, _)| k == key)
            || op
                .count
                .as_ref()
                .is_some_and(|(place, _)| key.id == "*" && *place == key.place)
    };
    ops.iter().enumerate().filter(move |(_, op)| concerns(op))
}

/// What a register holds, as far as deletes by group tell values apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Nothing,
    Group(u64),
}

impl State {
    fn of(value: Option<Tag>) -> State {
        value.map_or(State::Nothing, |tag| State::Group(group(tag)))
    }
}

struct Write {
    op: usize,
    effect: Effect,
    start: u64,
    /// When it was over.
    end: u64,
    acked: bool,
}

impl Write {
    fn tag(&self) -> Option<Tag> {
        match self.effect {
            Effect::Set(tag) | Effect::Add(tag) | Effect::Update(tag) => Some(tag),
            _ => None,
        }
    }

    /// Once this was done on a register in `state`, it held something else.
    fn replaces(&self, state: State) -> bool {
        match (self.effect, state) {
            (Effect::Set(_), _) | (Effect::Add(_), State::Nothing) => true,
            (Effect::Delete | Effect::Update(_), State::Group(_)) => true,
            (Effect::DeleteGroup(g), State::Group(held)) => g == held,
            _ => false,
        }
    }
}

#[derive(Default)]
struct Registers<'a> {
    writes: BTreeMap<&'a Key, Vec<Write>>,
    /// Who wrote a tag, applied or not.
    tags: BTreeMap<(&'a Key, Tag), usize>,
    places: BTreeMap<&'a str, BTreeSet<&'a Key>>,
    refused: BTreeSet<usize>,
}

type Verdict = Result<(), (Kind, String)>;

impl<'a> Registers<'a> {
    fn new(ops: &'a [Op]) -> Registers<'a> {
        let mut registers = Registers::default();
        for (n, op) in ops.iter().enumerate() {
            let (end, acked) = match op.outcome {
                Outcome::Acked => (op.end, true),
                Outcome::Indefinite => (op.end, false),
                Outcome::Abandoned => (u64::MAX, false),
                Outcome::Refused => {
                    registers.refused.insert(n);
                    (op.end, false)
                }
            };
            for (key, effect) in &op.effects {
                registers.places.entry(&key.place).or_default().insert(key);
                if matches!(effect, Effect::Read(_) | Effect::ReadNotGroup(_)) {
                    continue;
                }
                let write = Write {
                    op: n,
                    effect: *effect,
                    start: op.start,
                    end,
                    acked,
                };
                if let Some(tag) = write.tag() {
                    registers.tags.insert((key, tag), n);
                }
                if op.outcome != Outcome::Refused {
                    registers.writes.entry(key).or_default().push(write);
                }
            }
        }
        registers
    }

    fn of(&self, key: &Key) -> &[Write] {
        self.writes.get(key).map_or(&[], Vec::as_slice)
    }

    /// Of the acknowledged writes that were over before `before` and leave no register in `state`, the one that began
    /// last: what was over before its beginning is gone.
    fn horizon(&self, key: &Key, state: State, before: u64) -> Option<&Write> {
        let gone = |w: &&Write| w.acked && w.end < before && w.replaces(state);
        self.of(key).iter().filter(gone).max_by_key(|w| w.start)
    }

    /// Writes that can have left the register in `state` for somebody who looked from `start` to `end`.
    fn sources(&self, key: &Key, state: State, start: u64, end: u64, ordered: bool) -> impl Iterator<Item = &Write> {
        let horizon = self.horizon(key, state, start).map(|w| w.start);
        self.of(key).iter().filter(move |w| {
            let makes = match (w.effect, state) {
                (Effect::Delete | Effect::DeleteGroup(_), State::Nothing) => true,
                (Effect::Set(t) | Effect::Add(t) | Effect::Update(t), State::Group(g)) => group(t) == g,
                _ => false,
            };
            let over = if w.acked || ordered { w.end } else { u64::MAX };
            makes && w.start < end && horizon.is_none_or(|h| over >= h)
        })
    }

    /// Whether the register can have been in `state`, whatever its sources needed themselves.
    fn possible(&self, key: &Key, state: State, start: u64, end: u64) -> bool {
        let untouched = state == State::Nothing && self.horizon(key, state, start).is_none();
        untouched || self.sources(key, state, start, end, true).next().is_some()
    }

    /// Whether the register can have held something that `but` did not put there.
    fn held_before(&self, key: &Key, but: &Write, end: u64) -> bool {
        groups().any(|g| {
            let mut sources = self.sources(key, State::Group(g), but.start, end, true);
            sources.any(|w| w.op != but.op)
        })
    }

    fn any_value(&self, key: &Key, start: u64, end: u64, good: impl Fn(u64) -> bool) -> bool {
        groups().any(|g| good(g) && self.possible(key, State::Group(g), start, end))
    }

    /// Whether the register can have been in the state without which a write does nothing.
    fn effective(&self, key: &Key, write: &Write, until: u64) -> bool {
        let end = if write.acked { write.end.min(until) } else { until };
        match write.effect {
            Effect::Add(_) => self.possible(key, State::Nothing, write.start, end),
            Effect::Update(_) => self.held_before(key, write, end),
            Effect::DeleteGroup(g) => self.possible(key, State::Group(g), write.start, end),
            _ => true,
        }
    }

    /// Whether the register can have been empty.
    fn empty(&self, key: &Key, start: u64, end: u64, ordered: bool) -> bool {
        self.horizon(key, State::Nothing, start).is_none()
            || self
                .sources(key, State::Nothing, start, end, ordered)
                .any(|w| self.effective(key, w, end))
    }

    fn read(&self, key: &Key, value: Option<Tag>, op: &Op, last: bool) -> Verdict {
        let (start, end) = (op.start, op.end);
        let missed = if last { Kind::Lost } else { Kind::Stale };
        let Some(tag) = value else {
            if self.empty(key, start, end, true) {
                return Ok(());
            }
            let by = self.horizon(key, State::Nothing, start).map_or(0, |w| w.op);
            let kind = if self.empty(key, start, end, false) {
                Kind::Late
            } else {
                missed
            };
            return Err((
                kind,
                format!("nothing there; #{by} was acknowledged before, and no delete after it"),
            ));
        };
        let Some(&by) = self.tags.get(&(key, tag)).filter(|_| tag != FOREIGN) else {
            return Err((Kind::Phantom, format!("nobody wrote {tag} there")));
        };
        if self.refused.contains(&by) {
            return Err((Kind::Phantom, format!("{tag} was refused (#{by})")));
        }
        let write = self
            .of(key)
            .iter()
            .find(|w| w.tag() == Some(tag))
            .expect("its tag is known");
        if write.start >= end {
            return Err((Kind::Phantom, format!("{tag} was read before it was written (#{by})")));
        }
        if let Some(newer) = self
            .horizon(key, State::of(value), start)
            .filter(|w| write.end < w.start)
        {
            let kind = match newer.effect {
                _ if !write.acked => Kind::Late,
                Effect::Delete | Effect::DeleteGroup(_) => Kind::Resurrected,
                _ => missed,
            };
            return Err((
                kind,
                format!("{tag} (#{by}) was there; #{} was acknowledged after it", newer.op),
            ));
        }
        if !self.effective(key, write, end) {
            return Err((
                Kind::Phantom,
                format!("{tag} (#{by}) was there, but it cannot have had an effect"),
            ));
        }
        Ok(())
    }

    fn read_not_group(&self, key: &Key, g: u64, op: &Op) -> Verdict {
        let other = self.any_value(key, op.start, op.end, |other| other != g);
        if other || self.empty(key, op.start, op.end, true) {
            return Ok(());
        }
        Err((Kind::Stale, format!("not found, but it must have been of group {g}")))
    }

    fn count(&self, place: &str, count: u64, op: &Op) -> Result<(), String> {
        let keys = || self.places.get(place).into_iter().flatten();
        let least = keys().filter(|key| !self.empty(key, op.start, op.end, true)).count() as u64;
        let most = keys()
            .filter(|key| self.any_value(key, op.start, op.end, |_| true))
            .count() as u64;
        if (least..=most).contains(&count) {
            return Ok(());
        }
        Err(format!("counted {count}, between {least} and {most} must be there"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::NAMES;

    /// A handmade history of one register: (client, what it did, from, to, what it was told).
    fn kinds(history: &[(&str, Effect, u64, u64, Outcome)]) -> Vec<Kind> {
        let op = |(client, effect, start, end, outcome): &(&str, Effect, u64, u64, Outcome)| Op {
            client: (*client).into(),
            what: "test",
            effects: vec![(Key::new("c", "x"), *effect)],
            count: None,
            start: *start,
            end: *end,
            outcome: *outcome,
            error: None,
            during: "nothing".into(),
        };
        let ops: Vec<Op> = history.iter().map(op).collect();
        check(&ops).into_iter().map(|v| v.kind).collect()
    }

    use Effect::*;
    use Outcome::*;

    #[test]
    fn what_was_written_and_not_replaced_is_fine() {
        assert_eq!(kinds(&[("a", Read(None), 1, 2, Acked)]), []);
        assert_eq!(
            kinds(&[("a", Set(1), 1, 2, Acked), ("a", Read(Some(1)), 3, 4, Acked)]),
            []
        );
        assert_eq!(
            kinds(&[
                ("a", Set(1), 1, 5, Acked),
                ("b", Set(2), 4, 6, Acked),
                ("final", Read(Some(1)), 7, 8, Acked)
            ]),
            []
        );
        assert_eq!(kinds(&[("a", Set(1), 1, 5, Acked), ("b", Read(None), 4, 6, Acked)]), []);
    }

    #[test]
    fn a_lost_write_is_found() {
        let set = ("a", Set(1), 1, 2, Acked);
        assert_eq!(kinds(&[set, ("final", Read(None), 9, 9, Acked)]), [Kind::Lost]);
        assert_eq!(
            kinds(&[set, ("a", Set(2), 3, 4, Acked), ("final", Read(Some(1)), 9, 9, Acked)]),
            [Kind::Lost]
        );
        assert_eq!(
            kinds(&[
                set,
                ("a", Update(2), 3, 4, Acked),
                ("final", Read(Some(1)), 9, 9, Acked)
            ]),
            [Kind::Lost]
        );
        assert_eq!(
            kinds(&[("a", Add(1), 1, 2, Acked), ("final", Read(None), 9, 9, Acked)]),
            [Kind::Lost]
        );
    }

    #[test]
    fn a_stale_read_is_found() {
        let (first, second) = (("a", Set(1), 1, 2, Acked), ("a", Set(2), 3, 4, Acked));
        assert_eq!(
            kinds(&[first, second, ("b", Read(Some(1)), 5, 6, Acked)]),
            [Kind::Stale]
        );
        assert_eq!(kinds(&[first, second, ("b", Read(None), 5, 6, Acked)]), [Kind::Stale]);
        // Not yet acknowledged when the read began.
        assert_eq!(kinds(&[first, second, ("b", Read(Some(1)), 3, 6, Acked)]), []);
    }

    #[test]
    fn a_resurrected_delete_is_found() {
        let (set, delete) = (("a", Set(1), 1, 2, Acked), ("a", Delete, 3, 4, Acked));
        assert_eq!(
            kinds(&[set, delete, ("b", Read(Some(1)), 5, 6, Acked)]),
            [Kind::Resurrected]
        );
        assert_eq!(
            kinds(&[
                set,
                ("a", DeleteGroup(1), 3, 4, Acked),
                ("final", Read(Some(1)), 5, 6, Acked)
            ]),
            [Kind::Resurrected]
        );
        assert_eq!(
            kinds(&[
                set,
                ("a", DeleteGroup(2), 3, 4, Acked),
                ("final", Read(Some(1)), 5, 6, Acked)
            ]),
            []
        );
        assert_eq!(
            kinds(&[
                set,
                delete,
                ("a", Update(2), 5, 6, Acked),
                ("b", Read(None), 7, 8, Acked)
            ]),
            []
        );
    }

    #[test]
    fn a_phantom_is_found() {
        assert_eq!(kinds(&[("a", Read(Some(7)), 1, 2, Acked)]), [Kind::Phantom]);
        assert_eq!(kinds(&[("a", Read(Some(FOREIGN)), 1, 2, Acked)]), [Kind::Phantom]);
        assert_eq!(
            kinds(&[("a", Set(1), 1, 2, Refused), ("b", Read(Some(1)), 3, 4, Acked)]),
            [Kind::Phantom]
        );
        assert_eq!(
            kinds(&[("b", Read(Some(1)), 1, 2, Acked), ("a", Set(1), 3, 4, Acked)]),
            [Kind::Phantom]
        );
    }

    #[test]
    fn writes_without_an_effect_have_none() {
        let set = ("a", Set(1), 1, 2, Acked);
        assert_eq!(
            kinds(&[set, ("a", Add(2), 3, 4, Acked), ("b", Read(Some(1)), 5, 6, Acked)]),
            []
        );
        assert_eq!(
            kinds(&[set, ("a", Add(2), 3, 4, Acked), ("b", Read(Some(2)), 5, 6, Acked)]),
            [Kind::Phantom]
        );
        assert_eq!(
            kinds(&[("a", Update(2), 3, 4, Acked), ("b", Read(Some(2)), 5, 6, Acked)]),
            [Kind::Phantom]
        );
        // A delete of another group does not explain an absence.
        assert_eq!(
            kinds(&[set, ("a", DeleteGroup(2), 3, 4, Acked), ("b", Read(None), 5, 6, Acked)]),
            [Kind::Stale]
        );
        assert_eq!(
            kinds(&[set, ("a", DeleteGroup(1), 3, 4, Acked), ("b", Read(None), 5, 6, Acked)]),
            []
        );
    }

    #[test]
    fn unknown_outcomes_may_be_either_but_not_undo_what_came_later() {
        let (set, unknown) = (("a", Set(1), 1, 2, Acked), ("a", Set(2), 3, 4, Indefinite));
        for seen in [1, 2] {
            assert_eq!(kinds(&[set, unknown, ("final", Read(Some(seen)), 9, 9, Acked)]), []);
        }
        let later = ("a", Set(3), 5, 6, Acked);
        assert_eq!(
            kinds(&[set, unknown, later, ("final", Read(Some(2)), 9, 9, Acked)]),
            [Kind::Late]
        );
        let delete = ("a", Delete, 3, 4, Indefinite);
        assert_eq!(kinds(&[set, delete, ("final", Read(None), 9, 9, Acked)]), []);
        assert_eq!(
            kinds(&[set, delete, later, ("final", Read(None), 9, 9, Acked)]),
            [Kind::Late]
        );
        let abandoned = ("a", Set(2), 3, 4, Abandoned);
        assert_eq!(
            kinds(&[set, abandoned, later, ("final", Read(Some(2)), 9, 9, Acked)]),
            []
        );
        // An unknown delete before an acknowledged write explains nothing.
        let before = ("a", Delete, 0, 1, Indefinite);
        assert_eq!(
            kinds(&[before, ("a", Set(1), 2, 3, Acked), ("final", Read(None), 9, 9, Acked)]),
            [Kind::Late]
        );
    }

    #[test]
    fn absence_from_a_filtered_read_is_checked() {
        let set = ("a", Set(1), 1, 2, Acked);
        assert_eq!(kinds(&[set, ("b", ReadNotGroup(1), 3, 4, Acked)]), [Kind::Stale]);
        assert_eq!(kinds(&[set, ("b", ReadNotGroup(2), 3, 4, Acked)]), []);
        assert_eq!(
            kinds(&[set, ("a", Delete, 3, 5, Acked), ("b", ReadNotGroup(1), 3, 4, Acked)]),
            []
        );
    }

    #[test]
    fn counts_are_checked() {
        let op = |id: &str, effect, start, end| Op {
            client: "a".into(),
            what: "test",
            effects: vec![(Key::new("c", id), effect)],
            count: None,
            start,
            end,
            outcome: Acked,
            error: None,
            during: "nothing".into(),
        };
        let mut ops = vec![op("x", Set(1), 1, 2), op("y", Set(2), 1, 9)];
        let violations = |ops: &mut Vec<Op>, n| {
            ops.push(Op {
                effects: vec![],
                count: Some(("c".into(), n)),
                ..op("-", Read(None), 3, 4)
            });
            let found = check(ops).len();
            ops.pop();
            found
        };
        assert_eq!([0, 1, 2, 3].map(|n| violations(&mut ops, n)), [1, 0, 0, 1]);
        assert_eq!(violations(&mut ops, 1), 0, "{NAMES} are not counted");
    }
}
