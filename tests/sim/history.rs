//! What clients did and saw, and whether a correct Diptych could have given them that.
//!
//! A record is a register: the effects of the writes on it, in some order that respects who was answered before whom
//! asked. Acknowledged writes have their effect once; those of unknown outcome have it at most once, at any time after
//! they were sent. Each read has to be explained by some such order of the writes, and so has what is there at the end.
//! Reads are not ordered among themselves: while a write is under way one node has it and another does not. A delete by
//! filter is a read of all that it did not find: what is read there of a write that nobody was told of may vanish again
//! (schedule S34).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::Hash;

use parking_lot::Mutex;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::fakes::chroma;
use crate::plan::MOST_WRITES;

/// A record as clients can tell it apart: whoever wrote its document, its number, its embedding, and other keys.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Record {
    pub document: Option<u64>,
    pub number: u64,
    pub embedding: u64,
    pub keys: BTreeMap<String, u64>,
}

pub type State = Option<Record>;

/// One write as it concerns one record. All values of one write are its number.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Effect {
    Add(Fields),
    Upsert(Fields),
    Update(Fields),
    Delete,
    /// Delete where `n` is this.
    DeleteNumber(u64),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Fields {
    pub number: u64,
    pub document: bool,
    /// A key that is set, or taken away.
    pub key: Option<(&'static str, bool)>,
}

impl Fields {
    fn merge(&self, record: &mut Record) {
        record.number = self.number;
        record.embedding = self.number;
        if self.document {
            record.document = Some(self.number);
        }
        match self.key {
            Some((key, true)) => {
                record.keys.insert(key.to_owned(), self.number);
            }
            Some((key, false)) => {
                record.keys.remove(key);
            }
            None => {}
        }
    }

    fn fresh(&self) -> Record {
        let mut record = Record {
            document: None,
            number: self.number,
            embedding: self.number,
            keys: BTreeMap::new(),
        };
        self.merge(&mut record);
        record
    }

    /// The body of a write that does this to each of `ids`.
    pub fn body(&self, ids: &[&str]) -> Value {
        let mut metadata = json!({"n": self.number});
        match self.key {
            Some((key, true)) => metadata[key] = json!(self.number),
            Some((key, false)) => metadata[key] = Value::Null,
            None => {}
        }
        let document = match self.document {
            true => json!(format!("w{}", self.number)),
            false => Value::Null,
        };
        let column = |value: Value| Value::Array(vec![value; ids.len()]);
        json!({"ids": ids, "embeddings": column(json!([self.number, 1])), "documents": column(document),
            "metadatas": column(metadata)})
    }
}

impl Effect {
    /// The document that shows that it was done.
    fn document(&self) -> Option<u64> {
        match self {
            Effect::Add(fields) | Effect::Upsert(fields) | Effect::Update(fields) => {
                fields.document.then_some(fields.number)
            }
            Effect::Delete | Effect::DeleteNumber(_) => None,
        }
    }

    fn apply(&self, state: &State) -> State {
        match (self, state) {
            (Effect::Add(fields) | Effect::Upsert(fields), None) => Some(fields.fresh()),
            (Effect::Upsert(fields) | Effect::Update(fields), Some(record)) => {
                let mut record = record.clone();
                fields.merge(&mut record);
                Some(record)
            }
            (Effect::Delete, _) => None,
            (Effect::DeleteNumber(number), Some(record)) if record.number == *number => None,
            (Effect::Add(_), Some(_)) | (Effect::Update(_), None) | (Effect::DeleteNumber(_), _) => state.clone(),
        }
    }
}

/// What a node holds under an id.
pub fn record_of(record: &chroma::Record) -> Record {
    let number = |value: &Value| value.as_u64().unwrap_or(u64::MAX);
    Record {
        document: document_number(&record.document),
        number: record.metadata.get("n").map_or(u64::MAX, number),
        embedding: number(&record.embedding[0]),
        keys: record
            .metadata
            .iter()
            .filter(|(key, _)| *key != "n")
            .map(|(key, value)| (key.clone(), number(value)))
            .collect(),
    }
}

pub fn document_number(document: &Value) -> Option<u64> {
    document.as_str()?.strip_prefix('w')?.parse().ok()
}

/// What the client was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Acked,
    /// It may or may not have been done.
    Unknown,
    /// It was refused: it was not done.
    Refused,
}

#[derive(Debug, Clone)]
pub struct Write<E> {
    pub sent: u64,
    pub answered: u64,
    pub fate: Fate,
    pub effect: E,
}

#[derive(Debug, Clone)]
pub struct Read {
    pub sent: u64,
    pub answered: u64,
    pub seen: Seen,
    /// How often the proxy had been killed before.
    pub life: u64,
}

/// What a read says of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Seen {
    /// The document's number, if the record was there.
    Document(Option<Option<u64>>),
    /// A filter by this number did not find it.
    NotNumber(u64),
}

impl Seen {
    fn fits(self, state: &State) -> bool {
        match self {
            Seen::Document(seen) => state.as_ref().map(|record| record.document) == seen,
            Seen::NotNumber(number) => state.as_ref().is_none_or(|record| record.number != number),
        }
    }
}

/// What one operation did to the names of collections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NameEffect {
    /// Of whom the client knows the id, if it was told.
    Create(String, Option<Uuid>),
    Delete(String),
    Rename(Uuid, String),
}

/// Collections by name; those whose creation nobody was told of by the position of their create.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Who {
    Known(Uuid),
    Created(usize),
}

pub type Names = BTreeMap<String, Who>;

#[derive(Default)]
pub struct Phase {
    pub writes: BTreeMap<(Uuid, String), Vec<Write<Effect>>>,
    pub reads: BTreeMap<(Uuid, String), Vec<Read>>,
    pub names: Vec<Write<NameEffect>>,
}

#[derive(Default)]
pub struct History {
    /// What clients did since the last time everything was at rest.
    pub phase: Mutex<Phase>,
    /// Of how many records each number was written.
    widths: Mutex<BTreeMap<u64, usize>>,
}

impl History {
    pub fn writes(&self, number: u64, ids: &[&str]) {
        self.widths.lock().insert(number, ids.len());
    }

    /// An acknowledged delete of the records of this number found so many.
    pub fn deleted_by_number(&self, collection: Uuid, ids: &[&str], number: u64, write: &Write<Effect>, found: usize) {
        let (sent, answered) = (write.sent, write.answered);
        if found == 0 {
            for id in ids {
                let seen = Seen::NotNumber(number);
                let read = Read {
                    sent,
                    answered,
                    seen,
                    life: u64::MAX,
                };
                self.read(collection, id, read);
            }
            return;
        }
        // Which of them it found nobody says.
        let all = self.widths.lock().get(&number).is_none_or(|width| found >= *width);
        let fate = if all { Fate::Acked } else { Fate::Unknown };
        self.wrote(collection, ids, &Write { fate, ..write.clone() });
    }

    pub fn wrote(&self, collection: Uuid, ids: &[&str], write: &Write<Effect>) {
        let mut phase = self.phase.lock();
        for id in ids {
            let key = (collection, (*id).to_owned());
            phase.writes.entry(key).or_default().push(write.clone());
        }
    }

    pub fn read(&self, collection: Uuid, id: &str, read: Read) {
        let key = (collection, id.to_owned());
        self.phase.lock().reads.entry(key).or_default().push(read);
    }

    pub fn named(&self, write: Write<NameEffect>) {
        self.phase.lock().names.push(write);
    }
}

/// Whether some order of the writes leads from `base` to a state that `accept` takes. With a read: it has to accept the
/// state at some moment while it was under way; else the state at the end, when everything acked has been done.
///
/// The search goes over what was done so far and what came of it. Writes of unknown outcome need not be done, so of two
/// ways to the same state by the same acked writes, one that took fewer of those is as good as any.
fn explained<E, S: Clone + Eq + Hash>(
    base: &S,
    writes: &[Write<E>],
    read: Option<(u64, u64)>,
    apply: &impl Fn(usize, &E, &S) -> Option<S>,
    accept: &impl Fn(&S) -> bool,
) -> bool {
    let until = read.map_or(u64::MAX, |(_, answered)| answered);
    let possible = |(_, write): &(usize, &Write<E>)| write.fate != Fate::Refused && write.sent <= until;
    let writes: Vec<(usize, &Write<E>)> = writes.iter().enumerate().filter(possible).collect();
    assert!(writes.len() <= MOST_WRITES, "a phase has fewer writes");
    let acked = |at: usize| writes[at].1.fate == Fate::Acked;
    // What has to be done before the state is looked at.
    let needed = (0..writes.len()).filter(|&at| acked(at) && read.is_none_or(|(sent, _)| writes[at].1.answered < sent));
    let needed: u128 = needed.map(|at| 1 << at).sum();
    let mut seen: HashMap<(u128, S), Vec<u128>> = HashMap::new();
    // By how many writes of unknown outcome were done.
    let mut queues: Vec<Vec<(u128, u128, S)>> = vec![vec![(0, 0, base.clone())]];
    let mut used = 0;
    while used < queues.len() {
        let Some((done, optional, state)) = queues[used].pop() else {
            used += 1;
            continue;
        };
        let ways = seen.entry((done, state.clone())).or_default();
        if ways.iter().any(|way| way & optional == *way) {
            continue;
        }
        ways.push(optional);
        if done & needed == needed && accept(&state) {
            return true;
        }
        let left = (0..writes.len()).filter(|at| (done | optional) & (1 << at) == 0);
        let left: Vec<usize> = left.collect();
        // Whatever comes next was sent before the first of the others was answered.
        let ends = left.iter().filter(|at| acked(**at)).map(|at| writes[*at].1.answered);
        let first_end = ends.min().unwrap_or(u64::MAX);
        for at in left.into_iter().filter(|at| writes[*at].1.sent <= first_end) {
            let Some(next) = apply(writes[at].0, &writes[at].1.effect, &state) else {
                continue;
            };
            match acked(at) {
                true => queues[used].push((done | 1 << at, optional, next)),
                false if next != state => {
                    if queues.len() == used + 1 {
                        queues.push(vec![]);
                    }
                    queues[used + 1].push((done, optional | 1 << at, next));
                }
                false => {}
            }
        }
    }
    false
}

/// What is known of writes of unknown outcome: one that was read after its client had given up was done, as far as those
/// can tell who come later in the same life of the proxy (I25). A repair that is turned around may undo it (I35).
fn with_what_was_read(writes: &[Write<Effect>], reads: &[Read], before: u64, life: u64) -> Vec<Write<Effect>> {
    let mut writes = writes.to_vec();
    for write in writes.iter_mut().filter(|write| write.fate == Fate::Unknown) {
        let Some(number) = write.effect.document() else {
            continue;
        };
        let shows = |read: &&Read| {
            read.life == life
                && read.sent > write.answered
                && read.answered < before
                && read.seen == Seen::Document(Some(Some(number)))
        };
        if let Some(first) = reads.iter().filter(shows).map(|read| read.answered).min() {
            write.fate = Fate::Acked;
            write.answered = first;
        }
    }
    writes
}

/// What is there of a record in the end.
#[derive(Debug, Clone, Copy)]
pub struct Now<'a> {
    pub state: &'a State,
    /// How often the proxy has been killed.
    pub life: u64,
}

/// Whether what is there now under an id, and what was read of it, can have come from these writes. `turned`: a repair of
/// the collection was turned around.
pub fn check_record(
    base: &State,
    writes: &[Write<Effect>],
    reads: &[Read],
    now: Option<Now>,
    turned: bool,
) -> Result<(), String> {
    let apply = |_, effect: &Effect, state: &State| Some(effect.apply(state));
    let known = |before, life| match turned {
        true => writes.to_vec(),
        false => with_what_was_read(writes, reads, before, life),
    };
    let mut checked = HashSet::new();
    for read in reads {
        let mut writes = known(read.sent, read.life);
        // Reads of the same between the same two events need one answer.
        let sent = writes.iter().filter(|write| write.sent <= read.answered).count();
        let answered = writes.iter().filter(|write| write.answered < read.sent).count();
        let acked = writes.iter().filter(|write| write.fate == Fate::Acked).count();
        if !checked.insert((read.seen, sent, answered, acked, read.life)) {
            continue;
        }
        // What one node takes and the other refuses can be seen as long as the client has no answer.
        let seen = |write: &&mut Write<Effect>| write.sent <= read.answered && write.answered >= read.sent;
        for write in writes.iter_mut().filter(seen) {
            if write.fate == Fate::Refused {
                write.fate = Fate::Unknown;
            }
        }
        let accept = |state: &State| read.seen.fits(state);
        if !explained(base, &writes, Some((read.sent, read.answered)), &apply, &accept) {
            return Err(format!(
                "no order of the writes explains a read\n  {read:?}\n  before: {base:?}\n{}",
                lines(&writes)
            ));
        }
    }
    if let Some(Now { state, life }) = now {
        let writes = known(u64::MAX, life);
        if !explained(base, &writes, None, &apply, &|found| found == state) {
            return Err(format!(
                "no order of the writes leads to what is there\n  {state:?}\n  before: {base:?}\n{}",
                lines(&writes)
            ));
        }
    }
    Ok(())
}

/// Whether the names that are there now can have come from these operations.
pub fn check_names(base: &Names, writes: &[Write<NameEffect>], now: &BTreeMap<String, Uuid>) -> Result<(), String> {
    let told: HashSet<Uuid> = writes
        .iter()
        .filter_map(|write| match write.effect {
            NameEffect::Create(_, id) => id,
            _ => None,
        })
        .chain(base.values().filter_map(|who| match who {
            Who::Known(id) => Some(*id),
            Who::Created(_) => None,
        }))
        .collect();
    let apply = |number: usize, effect: &NameEffect, names: &Names| {
        let mut next = names.clone();
        match effect {
            NameEffect::Create(name, id) => {
                if names.contains_key(name) {
                    return None;
                }
                next.insert(name.clone(), id.map_or(Who::Created(number), Who::Known));
            }
            NameEffect::Delete(name) => {
                next.remove(name)?;
            }
            NameEffect::Rename(id, name) => {
                let by_id = |(_, who): &(&String, &Who)| **who == Who::Known(*id);
                // One whose creation nobody was told of is found by its name, and its id is learned then.
                let unknown = |(_, who): &(&String, &Who)| !told.contains(id) && matches!(who, Who::Created(_));
                let (old, _) = names.iter().find(by_id).or_else(|| names.iter().find(unknown))?;
                if old != name && names.contains_key(name) {
                    return None;
                }
                let who = next.remove(&old.clone())?;
                next.insert(name.clone(), who);
            }
        }
        Some(next)
    };
    let accept = |names: &Names| {
        names.len() == now.len()
            && names.iter().all(|(name, who)| match (who, now.get(name)) {
                (Who::Known(id), Some(there)) => id == there,
                (Who::Created(_), Some(there)) => !told.contains(there),
                (_, None) => false,
            })
    };
    if explained(base, writes, None, &apply, &accept) {
        return Ok(());
    }
    Err(format!(
        "no order of the operations leads to the names that are there\n  {now:?}\n  before: {base:?}\n{}",
        lines(writes)
    ))
}

fn lines<E: std::fmt::Debug>(writes: &[Write<E>]) -> String {
    let lines: Vec<String> = writes
        .iter()
        .map(|write| {
            format!(
                "  {:>5} to {:>5} {:?} {:?}",
                write.sent, write.answered, write.fate, write.effect
            )
        })
        .collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(sent: u64, answered: u64, fate: Fate, effect: Effect) -> Write<Effect> {
        Write {
            sent,
            answered,
            fate,
            effect,
        }
    }

    fn upsert(number: u64) -> Effect {
        Effect::Upsert(Fields {
            number,
            document: true,
            key: None,
        })
    }

    fn state(effects: &[Effect]) -> State {
        effects.iter().fold(None, |state, effect| effect.apply(&state))
    }

    fn check(writes: &[Write<Effect>], reads: &[Read], now: Option<&State>) -> Result<(), String> {
        check_record(&None, writes, reads, now.map(|state| Now { state, life: 0 }), false)
    }

    #[test]
    fn a_write_of_unknown_outcome_that_was_read_stays_for_as_long_as_the_proxy_lives() {
        let writes = [write(1, 2, Fate::Unknown, upsert(1))];
        let read = |sent, answered, seen| Read {
            sent,
            answered,
            seen: Seen::Document(seen),
            life: 0,
        };
        let seen = read(3, 4, Some(Some(1)));
        let there = state(&[upsert(1)]);
        assert!(check(&writes, std::slice::from_ref(&seen), Some(&there)).is_ok());
        assert!(
            check(&writes, std::slice::from_ref(&seen), Some(&None)).is_err(),
            "it has vanished"
        );
        assert!(check(&writes, &[seen.clone(), read(5, 6, None)], Some(&there)).is_err());
        assert!(
            check(&writes, &[read(3, 4, None), seen.clone()], Some(&there)).is_ok(),
            "it came late"
        );
        let now = Now { state: &None, life: 1 };
        let after_a_kill = check_record(&None, &writes, std::slice::from_ref(&seen), Some(now), false);
        assert!(after_a_kill.is_ok(), "another life");
        let now = Now { life: 0, ..now };
        let turned = check_record(&None, &writes, &[seen], Some(now), true);
        assert!(turned.is_ok(), "a repair was turned around");
    }

    #[test]
    fn an_acked_write_that_is_gone_is_noticed() {
        let writes = [write(1, 2, Fate::Acked, upsert(1)), write(3, 4, Fate::Acked, upsert(2))];
        assert!(check(&writes, &[], Some(&state(&[upsert(2)]))).is_ok());
        assert!(check(&writes, &[], Some(&state(&[upsert(1)]))).is_err());
        assert!(check(&writes, &[], Some(&None)).is_err());
    }

    #[test]
    fn a_write_of_unknown_outcome_may_come_late_or_never_and_a_refused_one_never() {
        let writes = [
            write(1, 2, Fate::Unknown, upsert(1)),
            write(3, 4, Fate::Acked, upsert(2)),
        ];
        assert!(check(&writes, &[], Some(&state(&[upsert(1)]))).is_ok());
        assert!(check(&writes, &[], Some(&state(&[upsert(2)]))).is_ok());
        let refused = [write(1, 2, Fate::Refused, upsert(1))];
        assert!(check(&refused, &[], Some(&state(&[upsert(1)]))).is_err());
    }

    #[test]
    fn a_stale_read_is_noticed() {
        let writes = [write(1, 2, Fate::Acked, upsert(1)), write(3, 6, Fate::Acked, upsert(2))];
        let read = |sent, answered, seen| Read {
            sent,
            answered,
            seen: Seen::Document(seen),
            life: 0,
        };
        let check = |read| check(&writes, &[read], None).is_ok();
        assert!(check(read(4, 5, Some(Some(1)))), "under way");
        assert!(check(read(4, 5, Some(Some(2)))), "under way");
        assert!(!check(read(7, 8, Some(Some(1)))), "stale");
        assert!(!check(read(7, 8, None)), "lost");
        assert!(!check(read(1, 2, Some(Some(2)))), "not sent yet");
    }

    #[test]
    fn what_a_filter_did_not_find_was_not_there() {
        let writes = |fate| [write(1, 2, Fate::Acked, upsert(1)), write(3, 4, fate, Effect::Delete)];
        let read = Read {
            sent: 5,
            answered: 6,
            seen: Seen::NotNumber(1),
            life: 0,
        };
        let check = |fate| {
            let there = state(&[upsert(1)]);
            check(&writes(fate), std::slice::from_ref(&read), Some(&there))
        };
        assert!(
            check(Fate::Unknown).is_ok(),
            "the delete may be undone: nobody was told of it"
        );
        assert!(check(Fate::Refused).is_err());
    }

    #[test]
    fn names_that_were_deleted_stay_deleted() {
        let id = Uuid::from_u128(1);
        let writes = [
            Write {
                sent: 1,
                answered: 2,
                fate: Fate::Acked,
                effect: NameEffect::Create("x".to_owned(), Some(id)),
            },
            Write {
                sent: 3,
                answered: 4,
                fate: Fate::Acked,
                effect: NameEffect::Delete("x".to_owned()),
            },
        ];
        assert!(check_names(&Names::new(), &writes, &BTreeMap::new()).is_ok());
        assert!(check_names(&Names::new(), &writes, &BTreeMap::from([("x".to_owned(), id)])).is_err());
    }
}
