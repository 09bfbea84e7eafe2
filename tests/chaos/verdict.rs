//! When all is over: waits until the proxy says so, reads both nodes themselves, and judges.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::checker::{self, FINAL, Violation};
use crate::clients::{COLLECTIONS, tag_of};
use crate::harness::compare::{Collection, DEFAULT, Dump, Record, flush};
use crate::harness::data::Rng;
use crate::history::{Effect, FOREIGN, Key, NAMES, Op, Outcome, Recorder, Tag};
use crate::names::generation;
use crate::world::{World, settled};

/// From the last fault to "all is well".
const SETTLE: Duration = Duration::from_secs(180);

#[derive(Default)]
pub struct Verdict {
    pub ops: Vec<Op>,
    pub violations: Vec<Violation>,
    /// Between the nodes; whatever but the order of records.
    pub differences: Vec<String>,
    /// Collections with the same records in another order.
    pub order: Vec<String>,
    /// Records whose document or embedding is not that of their tag.
    pub mixed: Vec<String>,
    /// Why the proxy never said that all is well, or a node could not be read.
    pub unsettled: Vec<String>,
    pub settle_seconds: f64,
    pub records: usize,
}

impl Verdict {
    pub fn is_good(&self) -> bool {
        let complaints = [&self.differences, &self.mixed, &self.unsettled];
        self.violations.is_empty() && complaints.iter().all(|list| list.is_empty()) && self.records > 0
    }

    /// Registers with such a violation, however often it was seen.
    pub fn count(&self, kind: checker::Kind) -> usize {
        let keys = self.violations.iter().filter(|v| v.kind == kind).map(|v| &v.key);
        keys.collect::<BTreeSet<_>>().len()
    }
}

/// Waits, reads, judges.
pub async fn judge(world: &World) -> Verdict {
    let mut verdict = Verdict::default();
    let start = Instant::now();
    if let Err(e) = world.wait(SETTLE, settled).await {
        verdict.unsettled.push(format!("not settled within {SETTLE:?}: {e}"));
    }
    verdict.settle_seconds = start.elapsed().as_secs_f64();
    examine(world, &mut verdict).await;
    verdict
}

/// Reads both nodes twice: the second time after a write that shows what Chroma's own log still hides.
async fn examine(world: &World, verdict: &mut Verdict) {
    for pass in ["", " after a flush"] {
        let mut dumps = Vec::new();
        for node in &world.nodes {
            match Dump::read(node, &[DEFAULT]).await {
                Ok(dump) => {
                    record_final(&world.recorder, &format!("{FINAL} {}{pass}", node.name), &dump);
                    dumps.push(dump);
                }
                Err(e) => verdict
                    .unsettled
                    .push(format!("{}{pass} cannot be read: {e}", node.name)),
            }
        }
        if let [a, b] = &dumps[..] {
            compare(a, b, pass, verdict);
            verdict.records = a.records().max(b.records());
        }
        if pass.is_empty() {
            dumps.iter().for_each(|dump| find_mixed(dump, &mut verdict.mixed));
            for node in &world.nodes {
                if let Err(e) = flush(&node.api()).await {
                    verdict.unsettled.push(format!("{}: {e}", node.name));
                }
            }
        }
    }
    verdict.ops = world.recorder.ops();
    verdict.violations = checker::check(&verdict.ops);
}

fn collections(dump: &Dump) -> BTreeMap<String, Collection> {
    let scope = (DEFAULT.0.to_owned(), DEFAULT.1.to_owned());
    dump.databases.get(&scope).cloned().unwrap_or_default()
}

/// What a node holds, as reads of every register.
fn record_final(recorder: &Recorder, client: &str, dump: &Dump) {
    let collections = collections(dump);
    let generations = recorder.generations();
    let keys = recorder.keys();
    let keys = |place: &str| keys.get(place).cloned().unwrap_or_default().into_iter();
    let mut effects: Vec<(Key, Effect)> = Vec::new();
    for place in COLLECTIONS {
        let records = collections.get(place).map_or(&[][..], |c| &c.records);
        effects.extend(registers(place, keys(place), records));
    }
    let mut names: BTreeMap<Key, Option<Tag>> = keys(NAMES).map(|key| (key, None)).collect();
    for (name, collection) in collections
        .iter()
        .filter(|(name, _)| !COLLECTIONS.contains(&name.as_str()))
    {
        let tag = generation(&collection.metadata);
        names.insert(Key::new(NAMES, name), Some(tag));
        let nobodys = format!("a collection of unknown id under {name}");
        let place = generations.get(&tag).unwrap_or(&nobodys);
        effects.extend(registers(place, keys(place), &collection.records));
    }
    effects.extend(names.into_iter().map(|(key, tag)| (key, Effect::Read(tag))));
    let now = recorder.now();
    recorder.push(Op {
        client: client.to_owned(),
        what: "final",
        effects,
        count: None,
        start: now,
        end: now + 1,
        outcome: Outcome::Acked,
        error: None,
        during: "".into(),
    });
}

fn registers(place: &str, keys: impl Iterator<Item = Key>, records: &[Record]) -> Vec<(Key, Effect)> {
    let mut there: BTreeMap<&str, Tag> = records.iter().map(|r| (r.id.as_str(), tag_of(&r.metadata))).collect();
    let mut effects: Vec<_> = keys
        .map(|key| (key.clone(), Effect::Read(there.remove(key.id.as_str()))))
        .collect();
    effects.extend(
        there
            .into_keys()
            .map(|id| (Key::new(place, id), Effect::Read(Some(FOREIGN)))),
    );
    effects
}

fn compare(a: &Dump, b: &Dump, pass: &str, verdict: &mut Verdict) {
    let (mine, theirs) = (collections(a), collections(b));
    let mut differences = Vec::new();
    for name in mine
        .keys()
        .chain(theirs.keys().filter(|name| !mine.contains_key(*name)))
    {
        match (mine.get(name), theirs.get(name)) {
            (Some(mine), Some(theirs)) => {
                let ids = |c: &Collection| c.records.iter().map(|r| r.id.clone()).collect::<Vec<_>>();
                let found = compare_collections(mine, theirs);
                if found.is_empty() && ids(mine) != ids(theirs) {
                    verdict
                        .order
                        .push(format!("{name}{pass}: {:?} and {:?}", ids(mine), ids(theirs)));
                }
                differences.extend(found.into_iter().map(|text| format!("{name}{pass}: {text}")));
            }
            (one, _) => differences.push(format!(
                "{name}{pass}: only on the {}",
                if one.is_some() { "primary" } else { "replica" }
            )),
        }
    }
    verdict.differences.extend(differences);
}

fn compare_collections(a: &Collection, b: &Collection) -> Vec<String> {
    let mut differences = Vec::new();
    let mut same = |what: &str, a: &Value, b: &Value| {
        if a != b {
            differences.push(format!("{what}: {a} and {b}"));
        }
    };
    same("metadata", &a.metadata, &b.metadata);
    same("configuration", &a.configuration, &b.configuration);
    same("dimension", &a.dimension, &b.dimension);
    let by_id = |c: &Collection| {
        c.records
            .iter()
            .map(|r| (r.id.clone(), r.clone()))
            .collect::<BTreeMap<_, _>>()
    };
    let (mine, theirs) = (by_id(a), by_id(b));
    for id in mine.keys().chain(theirs.keys().filter(|id| !mine.contains_key(*id))) {
        match (mine.get(id), theirs.get(id)) {
            (Some(mine), Some(theirs)) => {
                if let Err(e) = mine.same_as(theirs, a.space() == "cosine") {
                    differences.push(format!("{id}: {e}"));
                }
            }
            (one, _) => differences.push(format!(
                "{id}: only on the {}",
                if one.is_some() { "primary" } else { "replica" }
            )),
        }
    }
    differences
}

fn find_mixed(dump: &Dump, mixed: &mut Vec<String>) {
    for (name, collection) in collections(dump) {
        for record in &collection.records {
            let tag = tag_of(&record.metadata);
            let vector = record.embedding.as_ref().map(|e| *e == Rng::new(tag).vector(e.len()));
            if record.document != format!("{} by {tag}", record.id) || vector != Some(true) {
                mixed.push(format!("{name} on {}: {record:?}", dump.node));
            }
        }
    }
}
