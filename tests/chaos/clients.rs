//! Clients of records: all kinds of writes and reads, on collections and ids that they share.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::api::{Answer, Api};
use crate::harness::data::Rng;
use crate::history::{Effect, FOREIGN, Key, Op, Outcome, Recorder, Tag, any_group, group};

pub const COLLECTIONS: [&str; 3] = ["shared-0", "shared-1", "shared-2"];
/// Ids `k..` that are written all the time.
const IDS: usize = 12;
/// Other ids start so. They are written a few times by several clients and then never again: what goes wrong with them is
/// not mended by a later write.
const PASSING: char = 'p';
/// So many tags later there is a new one.
const PASSES_AFTER: u64 = 8;
const PASSING_AT_ONCE: usize = 3;
const DIMENSION: usize = 4;
/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two operations of a client, at most; and after one that could not even be sent.
const PAUSE_MS: usize = 25;
const RETRY: Duration = Duration::from_millis(100);

/// What every client has.
pub struct Client {
    pub name: String,
    pub api: Api,
    pub rng: Rng,
    pub recorder: Arc<Recorder>,
    pub stop: Arc<AtomicBool>,
}

/// A request on its way.
pub struct Call {
    what: &'static str,
    start: u64,
}

impl Client {
    pub fn begin(&self, what: &'static str) -> Call {
        Call {
            what,
            start: self.recorder.now(),
        }
    }

    /// Waits for the answer, for as long as a client would.
    pub async fn answer(&self, answer: impl Future<Output = Result<Answer, String>>) -> Result<Answer, String> {
        match tokio::time::timeout(PATIENCE, answer).await {
            Ok(answer) => answer,
            Err(_) => Err("no answer in time".into()),
        }
    }

    /// Writes down a write.
    pub fn wrote(&self, call: Call, answer: &Result<Answer, String>, effects: Vec<(Key, Effect)>) -> Outcome {
        let outcome = outcome(answer);
        self.push(call, outcome, error(answer), effects, None);
        outcome
    }

    /// Writes down a read; without an answer it has seen nothing.
    pub fn read(
        &self,
        call: Call,
        answer: &Result<Answer, String>,
        effects: Vec<(Key, Effect)>,
        count: Option<(String, u64)>,
    ) {
        self.push(call, outcome(answer), error(answer), effects, count);
    }

    fn push(
        &self,
        call: Call,
        outcome: Outcome,
        error: Option<String>,
        effects: Vec<(Key, Effect)>,
        count: Option<(String, u64)>,
    ) {
        self.recorder.push(Op {
            client: self.name.clone(),
            what: call.what,
            effects,
            count,
            start: call.start,
            end: self.recorder.now(),
            outcome,
            error,
            during: "".into(),
        });
    }

    pub fn stopped(&self) -> bool {
        self.stop.load(SeqCst)
    }

    /// Between two operations: a user thinks, or waits before he tries again.
    pub async fn think(&mut self, unsent: bool) {
        let pause = Duration::from_millis(self.rng.below(PAUSE_MS) as u64);
        tokio::time::sleep(if unsent { RETRY } else { pause }).await;
    }
}

fn outcome(answer: &Result<Answer, String>) -> Outcome {
    match answer {
        Ok(answer) => match answer.status {
            200..=299 => Outcome::Acked,
            400..=499 => Outcome::Refused,
            _ => Outcome::Indefinite,
        },
        Err(e) if unsent(e) => Outcome::Refused,
        Err(e) if e.contains("no answer in time") => Outcome::Abandoned,
        Err(_) => Outcome::Indefinite,
    }
}

/// Nobody listened: not a byte of the request was sent.
fn unsent(error: &str) -> bool {
    error.contains("Connection refused")
}

pub fn was_unsent(answer: &Result<Answer, String>) -> bool {
    answer.as_ref().is_err_and(|e| unsent(e))
}

/// The error in an answer, without what makes each one different.
fn error(answer: &Result<Answer, String>) -> Option<String> {
    let text = match answer {
        Ok(answer) if (200..300).contains(&answer.status) => return None,
        Ok(answer) => {
            let body = answer.json();
            let message = body["message"].as_str().map_or_else(|| answer.text(), str::to_owned);
            format!("{} {}", answer.status, message)
        }
        Err(e) => e
            .rsplit_once("/default_database")
            .map_or(e.as_str(), |(_, e)| e)
            .to_owned(),
    };
    let words = text
        .split_whitespace()
        .map(|word| match word.chars().any(|c| c.is_ascii_digit()) {
            true if word.len() > 3 => "_",
            _ => word,
        });
    Some(words.take(24).collect::<Vec<_>>().join(" "))
}

/// The body of a write; the tag decides all but the id.
pub fn body(records: &[(String, Tag)]) -> Value {
    let tags = || records.iter().map(|(_, tag)| *tag);
    json!({
        "ids": records.iter().map(|(id, _)| id).collect::<Vec<_>>(),
        "embeddings": tags().map(|tag| Rng::new(tag).vector(DIMENSION)).collect::<Vec<_>>(),
        "documents": records.iter().map(|(id, tag)| format!("{id} by {tag}")).collect::<Vec<_>>(),
        "metadatas": records.iter().map(|(id, tag)| metadata(id, *tag)).collect::<Vec<_>>(),
    })
}

fn metadata(id: &str, tag: Tag) -> Value {
    match id.starts_with(PASSING) {
        true => json!({ "tag": tag }),
        false => json!({"tag": tag, "group": group(tag)}),
    }
}

/// The tag in a record's metadata.
pub fn tag_of(metadata: &Value) -> Tag {
    metadata["tag"].as_u64().unwrap_or(FOREIGN)
}

/// What a get or query found. A record without metadata is one that Chroma read while it was being deleted (it reads id,
/// vector and metadata one after the other): it was there or not, and says neither.
#[derive(Default)]
pub struct Found(BTreeMap<String, Option<Tag>>);

impl Found {
    pub fn new(ids: &Value, metadatas: &Value) -> Found {
        let records = ids.as_array().into_iter().flatten().enumerate().map(|(n, id)| {
            let metadata = &metadatas[n];
            let tag = (!metadata.is_null()).then(|| tag_of(metadata));
            (id.as_str().unwrap_or_default().to_owned(), tag)
        });
        Found(records.collect())
    }

    pub fn of(answer: &Result<Answer, String>) -> Found {
        answer.as_ref().map_or_else(
            |_| Found::default(),
            |answer| {
                let json = answer.json();
                Found::new(&json["ids"], &json["metadatas"])
            },
        )
    }

    /// Reads of all `keys`, as `absent` for those that were not found, and of whatever else was found.
    pub fn reads(mut self, place: &str, keys: impl Iterator<Item = Key>, absent: Effect) -> Vec<(Key, Effect)> {
        let mut effects = Vec::new();
        for key in keys {
            match self.0.remove(&key.id) {
                Some(Some(tag)) => effects.push((key, Effect::Read(Some(tag)))),
                Some(None) => {}
                None => effects.push((key, absent)),
            }
        }
        let others = self
            .0
            .into_iter()
            .filter_map(|(id, tag)| Some((Key::new(place, &id), Effect::Read(Some(tag?)))));
        effects.extend(others);
        effects
    }
}

/// What ids are chosen for. No id is added and updated: an update of an absent id and an add right after it leave the
/// embedding of either, which is Chroma's own race (each node may decide it differently).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Read,
    Write,
    Add,
    Update,
}

/// A client of the shared collections, which are (name, id).
pub struct Records {
    pub client: Client,
    pub collections: Vec<(String, String)>,
}

/// The registers of a shared collection that belong to groups: those that are written all the time.
fn grouped_keys(place: &str) -> impl Iterator<Item = Key> {
    (0..IDS).map(move |n| Key::new(place, &format!("k{n}")))
}

impl Records {
    pub async fn run(mut self) {
        while !self.client.stopped() {
            let unsent = self.step().await;
            self.client.think(unsent).await;
        }
    }

    async fn step(&mut self) -> bool {
        let at = self.client.rng.below(self.collections.len());
        let (place, collection) = self.collections[at].clone();
        let dice = self.client.rng.below(100);
        match dice {
            0..25 => self.write(&place, &collection, "upsert", Effect::Set).await,
            25..35 => self.write(&place, &collection, "add", Effect::Add).await,
            35..46 => self.write(&place, &collection, "update", Effect::Update).await,
            46..58 => self.delete_ids(&place, &collection).await,
            58..62 => self.delete_group(&place, &collection).await,
            62..85 => self.get_ids(&place, &collection).await,
            85..92 => self.get_group(&place, &collection).await,
            92..96 => self.query(&place, &collection).await,
            _ => self.count(&place, &collection).await,
        }
    }

    fn pick(&mut self, most: usize, purpose: Purpose) -> Vec<String> {
        let count = 1 + self.client.rng.below(most);
        let mut ids = Vec::new();
        for _ in 0..count {
            let newest = (self.client.recorder.tags() / PASSES_AFTER) as usize;
            let (family, mut number) = match self.client.rng.below(4) {
                0 if purpose == Purpose::Read => (PASSING, self.client.rng.below(newest + 1)),
                0 | 1 => (PASSING, newest.saturating_sub(self.client.rng.below(PASSING_AT_ONCE))),
                _ => ('k', self.client.rng.below(IDS)),
            };
            match purpose {
                Purpose::Add => number &= !1,
                Purpose::Update => number |= 1,
                Purpose::Read | Purpose::Write => {}
            }
            let id = format!("{family}{number}");
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        ids
    }

    async fn send(&self, collection: &str, operation: &str, body: &Value) -> Result<Answer, String> {
        self.client
            .answer(self.client.api.try_op(collection, operation, body))
            .await
    }

    async fn write(&mut self, place: &str, collection: &str, what: &'static str, effect: fn(Tag) -> Effect) -> bool {
        let purpose = match effect(0) {
            Effect::Add(_) => Purpose::Add,
            Effect::Update(_) => Purpose::Update,
            _ => Purpose::Write,
        };
        let records: Vec<_> = self
            .pick(3, purpose)
            .into_iter()
            .map(|id| (id, self.client.recorder.tag()))
            .collect();
        let call = self.client.begin(what);
        let answer = self.send(collection, what, &body(&records)).await;
        let effects = records
            .iter()
            .map(|(id, tag)| (Key::new(place, id), effect(*tag)))
            .collect();
        self.client.wrote(call, &answer, effects);
        was_unsent(&answer)
    }

    async fn delete_ids(&mut self, place: &str, collection: &str) -> bool {
        let ids = self.pick(2, Purpose::Write);
        let call = self.client.begin("delete");
        let answer = self.send(collection, "delete", &json!({ "ids": ids })).await;
        let effects = ids.iter().map(|id| (Key::new(place, id), Effect::Delete)).collect();
        self.client.wrote(call, &answer, effects);
        was_unsent(&answer)
    }

    async fn delete_group(&mut self, place: &str, collection: &str) -> bool {
        let group = any_group(self.client.rng.u64());
        let call = self.client.begin("delete-where");
        let answer = self
            .send(collection, "delete", &json!({"where": {"group": group}}))
            .await;
        let effects = grouped_keys(place)
            .map(|key| (key, Effect::DeleteGroup(group)))
            .collect();
        self.client.wrote(call, &answer, effects);
        was_unsent(&answer)
    }

    async fn get_ids(&mut self, place: &str, collection: &str) -> bool {
        let ids = self.pick(4, Purpose::Read);
        let call = self.client.begin("get");
        let answer = self
            .send(
                collection,
                "get",
                &json!({"ids": ids, "include": ["metadatas", "documents"]}),
            )
            .await;
        let keys = ids.iter().map(|id| Key::new(place, id));
        let effects = Found::of(&answer).reads(place, keys, Effect::Read(None));
        self.client.read(call, &answer, effects, None);
        was_unsent(&answer)
    }

    async fn get_group(&mut self, place: &str, collection: &str) -> bool {
        let group = any_group(self.client.rng.u64());
        let call = self.client.begin("get-where");
        let answer = self
            .send(
                collection,
                "get",
                &json!({"where": {"group": group}, "include": ["metadatas"]}),
            )
            .await;
        let effects = Found::of(&answer).reads(place, grouped_keys(place), Effect::ReadNotGroup(group));
        self.client.read(call, &answer, effects, None);
        was_unsent(&answer)
    }

    /// Approximate: what is found has to be right, what is not found says nothing.
    async fn query(&mut self, place: &str, collection: &str) -> bool {
        let near = self.client.rng.fork().vector(DIMENSION);
        let call = self.client.begin("query");
        let body = json!({"query_embeddings": [near], "n_results": 3, "include": ["metadatas"]});
        let answer = self.send(collection, "query", &body).await;
        let json = answer.as_ref().map(Answer::json).unwrap_or_default();
        let found = Found::new(&json["ids"][0], &json["metadatas"][0]);
        let effects = found.reads(place, std::iter::empty(), Effect::Read(None));
        self.client.read(call, &answer, effects, None);
        was_unsent(&answer)
    }

    async fn count(&mut self, place: &str, collection: &str) -> bool {
        let call = self.client.begin("count");
        let path = self.client.api.records(collection, "count");
        let answer = self.client.answer(self.client.api.try_get(&path)).await;
        let count = answer.as_ref().ok().and_then(|a| a.json().as_u64());
        self.client
            .read(call, &answer, Vec::new(), count.map(|n| (place.to_owned(), n)));
        was_unsent(&answer)
    }
}
