//! Clients: each sends one operation after the other and writes down what it was told.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use diptych::catalog::Collection;
use diptych::chroma::{RecordWrite, node_path, parse_collection_object, parse_create};
use diptych::cluster::NodeRequest;
use diptych::mirror::{Answer, Core, NamespaceWrite};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;
use uuid::Uuid;

use crate::fakes::{DATABASE, Rng, TENANT, entry_of};
use crate::history::{Effect, Fate, Fields, History, NameEffect, Read, Seen, Write, document_number};
use crate::plan::{Plan, milliseconds};
use crate::proxy::{Called, Proxy};
use crate::world::World;

const IDS: [&str; 12] = ["a", "b", "c", "d", "e", "f", "g", "h", "p", "q", "r", "s"];
const NAMES: [&str; 4] = ["red", "green", "blue", "grey"];
const KEYS: [&str; 2] = ["k", "l"];
/// A request that is not answered after so long never will be.
const PATIENCE: Duration = Duration::from_secs(3600);

/// What the clients share.
pub struct Clients {
    pub world: Arc<World>,
    pub proxy: watch::Receiver<Option<Arc<Proxy>>>,
    pub history: History,
    /// Ids of collections as clients were told them, by name.
    pub known: Mutex<BTreeMap<String, Uuid>>,
}

pub struct Client {
    pub shared: Arc<Clients>,
    pub name: String,
    pub rng: Rng,
    pub ids: usize,
    pub names: usize,
    pub namespace: u64,
    pace: u64,
    alert: bool,
    hushed: bool,
}

/// How a client speaks of a collection.
#[derive(Debug, Clone)]
enum Asked {
    Name(String),
    Id(Uuid),
}

impl Client {
    pub fn new(shared: Arc<Clients>, plan: &Plan, number: usize, seed: u64) -> Self {
        Self {
            shared,
            name: format!("client{number}"),
            rng: Rng::new(seed),
            ids: plan.ids.min(IDS.len()),
            names: plan.names.min(NAMES.len()),
            namespace: plan.namespace,
            pace: plan.pace,
            alert: plan.alert,
            hushed: plan.hushed,
        }
    }

    pub async fn run(mut self, operations: usize) {
        let crashes = self.shared.world.crashes.load(Ordering::Relaxed);
        for _ in 0..operations {
            let pause = match self.rng.below(8) {
                0 => self.rng.below(1500),
                1..=3 => self.rng.below(40),
                _ => self.rng.below(3),
            };
            let pause = tokio::time::sleep(milliseconds(pause * self.pace));
            if self.alert {
                tokio::select! {
                    biased;
                    () = self.shared.world.until_return() => {}
                    () = pause => {}
                }
            } else {
                pause.await;
            }
            if self.hushed && self.shared.world.crashes.load(Ordering::Relaxed) > crashes {
                return;
            }
            let Some(proxy) = self.proxy().await else { return };
            let operation = self.operation(proxy);
            if tokio::time::timeout(PATIENCE, operation).await.is_err() {
                self.shared
                    .world
                    .fail(format!("{} was not answered in {PATIENCE:?}", self.name));
                return;
            }
        }
    }

    /// Reads some record of a collection that clients know.
    pub async fn look(&mut self) {
        let known: Vec<Uuid> = self.shared.known.lock().values().copied().collect();
        let proxy = self.shared.proxy.borrow().clone();
        let (Some(proxy), false) = (proxy, known.is_empty()) else {
            return;
        };
        let id = known[self.rng.below(known.len() as u64) as usize];
        if let Some(Some(collection)) = self.find(&proxy, Asked::Id(id)).await {
            let record = IDS[self.rng.below(self.ids as u64) as usize];
            self.read(&proxy, collection, record).await;
        }
    }

    async fn proxy(&self) -> Option<Arc<Proxy>> {
        let mut proxy = self.shared.proxy.clone();
        let found = proxy.wait_for(Option::is_some).await.ok()?;
        found.clone()
    }

    async fn operation(&mut self, proxy: Arc<Proxy>) {
        let name = NAMES[self.rng.below(self.names as u64) as usize].to_owned();
        if self.rng.below(1000) < self.namespace {
            return match self.rng.below(4) {
                0 | 1 => self.create(&proxy, name).await,
                2 => self.delete(&proxy, name).await,
                _ => self.rename(&proxy, name).await,
            };
        }
        let known = self.shared.known.lock().get(&name).copied();
        let asked = match known {
            Some(id) if self.rng.below(2) == 0 => Asked::Id(id),
            _ => Asked::Name(name.clone()),
        };
        let found = self.find(&proxy, asked.clone()).await;
        match found {
            Some(Some(collection)) => self.records(&proxy, collection).await,
            Some(None) if matches!(asked, Asked::Name(_)) => self.create(&proxy, name).await,
            _ => {
                self.shared.known.lock().remove(&name);
            }
        }
    }

    async fn find(&mut self, proxy: &Proxy, asked: Asked) -> Option<Option<Arc<Collection>>> {
        let core = proxy.core.clone();
        let found = proxy.call(async move {
            match asked {
                Asked::Name(name) => core.find_by_name(TENANT, DATABASE, &name).await,
                Asked::Id(id) => core.find_by_id(TENANT, DATABASE, id).await,
            }
        });
        match found.await {
            Called::Answered(Ok(found)) => Some(found),
            _ => None,
        }
    }

    async fn records(&mut self, proxy: &Proxy, collection: Arc<Collection>) {
        let first = self.rng.below(self.ids as u64) as usize;
        let mut ids = vec![IDS[first]];
        if self.ids > 1 {
            match self.rng.below(16) {
                0 => ids = IDS[..self.ids].to_vec(),
                1..=4 => ids.push(IDS[(first + 1) % self.ids]),
                _ => {}
            }
        }
        if self.rng.below(4) == 0 {
            return self.read(proxy, collection, ids[0]).await;
        }
        let sent = self.shared.world.tick();
        let fields = Fields {
            number: sent,
            document: self.rng.below(4) > 0,
            key: match self.rng.below(3) {
                0 => Some((KEYS[self.rng.below(2) as usize], true)),
                1 => Some((KEYS[self.rng.below(2) as usize], false)),
                _ => None,
            },
        };
        let (kind, effect, body) = match self.rng.below(12) {
            0..=4 => (RecordWrite::Upsert, Effect::Upsert(fields.clone()), fields.body(&ids)),
            5 | 6 => (RecordWrite::Update, Effect::Update(fields.clone()), fields.body(&ids)),
            7 | 8 => {
                // Chroma refuses a null in an add.
                let fields = Fields {
                    key: fields.key.filter(|(_, set)| *set),
                    ..fields
                };
                (RecordWrite::Add, Effect::Add(fields.clone()), fields.body(&ids))
            }
            9 | 10 => (RecordWrite::Delete, Effect::Delete, json!({"ids": ids})),
            _ => {
                ids = IDS[..self.ids].to_vec();
                let number = sent.saturating_sub(1 + self.rng.below(12));
                (
                    RecordWrite::Delete,
                    Effect::DeleteNumber(number),
                    json!({"where": {"n": number}}),
                )
            }
        };
        let id = collection.client_id;
        self.shared.world.say(&self.name, || {
            format!("{sent}: {} {} {body}", kind.label(), collection.facts().name)
        });
        let settled = collection.dimension_known();
        if kind != RecordWrite::Delete {
            self.shared.history.writes(sent, &ids);
        }
        let (fate, deleted) = self.send(proxy, &collection, kind, body, settled).await;
        let answered = self.shared.world.tick();
        self.shared
            .world
            .say(&self.name, || format!("{sent}: {fate:?} at {answered}"));
        let write = Write {
            sent,
            answered,
            fate,
            effect,
        };
        let history = &self.shared.history;
        match (&write.effect, deleted) {
            (Effect::DeleteNumber(number), Some(found)) => {
                history.deleted_by_number(id, &ids, *number, &write, found);
            }
            _ => history.wrote(id, &ids, &write),
        }
    }

    async fn send(
        &mut self,
        proxy: &Proxy,
        collection: &Arc<Collection>,
        kind: RecordWrite,
        body: Value,
        settled: bool,
    ) -> (Fate, Option<usize>) {
        let (core, collection) = (proxy.core.clone(), collection.clone());
        let called = proxy.call(async move { core.submit(&collection, entry_of(None, kind, body)).await });
        match called.await {
            Called::Answered(answer) if answer.status == 400 && settled => (Fate::Refused, None),
            called => (fate_of(&called), deleted(&called)),
        }
    }

    async fn read(&mut self, proxy: &Proxy, collection: Arc<Collection>, id: &'static str) {
        let sent = self.shared.world.tick();
        let life = self.shared.world.crashes.load(Ordering::Relaxed);
        let core = proxy.core.clone();
        let read = collection.clone();
        let called = proxy.call(async move { read_record(&core, &read, id).await }).await;
        let answered = self.shared.world.tick();
        if let Called::Answered(Some(seen)) = called {
            self.shared
                .world
                .say(&self.name, || format!("{sent}: read {id}: {seen:?} at {answered}"));
            let read = Read {
                sent,
                answered,
                seen: Seen::Document(seen),
                life,
            };
            self.shared.history.read(collection.client_id, id, read);
        }
    }

    async fn create(&mut self, proxy: &Proxy, name: String) {
        let sent = self.shared.world.tick();
        let body = json!({"name": name});
        let write = {
            let create = parse_create(body.to_string().as_bytes()).expect("a create");
            NamespaceWrite::CreateCollection {
                tenant: TENANT.to_owned(),
                database: DATABASE.to_owned(),
                name: create.name,
                get_or_create: false,
            }
        };
        let called = self.namespace(proxy, write, body.to_string()).await;
        let fate = fate_of(&called);
        let id = match &called {
            Called::Answered(answer) if fate == Fate::Acked => {
                parse_collection_object(&answer.body).map(|object| object.id)
            }
            _ => None,
        };
        if fate == Fate::Acked && id.is_none() {
            self.shared
                .world
                .fail(format!("a create of {name} was acked without an id"));
        }
        if let Some(id) = id {
            self.shared.known.lock().insert(name.clone(), id);
        }
        self.named(sent, &called, NameEffect::Create(name, id));
    }

    async fn delete(&mut self, proxy: &Proxy, name: String) {
        let sent = self.shared.world.tick();
        let write = NamespaceWrite::DeleteCollection {
            tenant: TENANT.to_owned(),
            database: DATABASE.to_owned(),
            name: name.clone(),
        };
        let called = self.namespace(proxy, write, String::new()).await;
        self.named(sent, &called, NameEffect::Delete(name));
    }

    async fn rename(&mut self, proxy: &Proxy, name: String) {
        let Some(Some(collection)) = self.find(proxy, Asked::Name(name)).await else {
            return;
        };
        let new = NAMES[self.rng.below(self.names as u64) as usize].to_owned();
        if new == collection.facts().name {
            return;
        }
        let sent = self.shared.world.tick();
        let id = collection.client_id;
        let write = NamespaceWrite::ModifyCollection {
            collection,
            new_name: Some(new.clone()),
        };
        let called = self.namespace(proxy, write, json!({"new_name": new}).to_string()).await;
        self.named(sent, &called, NameEffect::Rename(id, new));
    }

    async fn namespace(&mut self, proxy: &Proxy, write: NamespaceWrite, body: String) -> Called<Answer> {
        self.shared.world.say(&self.name, || format!("{write:?}"));
        let core = proxy.core.clone();
        let called = proxy.call(async move { core.submit_namespace(write, Bytes::from(body)).await });
        called.await
    }

    fn named(&self, sent: u64, called: &Called<Answer>, effect: NameEffect) {
        let fate = fate_of(called);
        let answered = self.shared.world.tick();
        self.shared
            .world
            .say(&self.name, || format!("{sent}: {effect:?} {fate:?} at {answered}"));
        self.shared.history.named(Write {
            sent,
            answered,
            fate,
            effect,
        });
    }
}

/// How many records an acknowledged delete has deleted.
fn deleted(called: &Called<Answer>) -> Option<usize> {
    let Called::Answered(answer) = called else { return None };
    let body: Value = serde_json::from_slice(&answer.body).ok()?;
    let deleted = body.get("deleted")?.as_u64()?;
    (answer.status < 300).then(|| usize::try_from(deleted).ok())?
}

/// Below 300 it is done, below 500 it is not, beyond that nobody knows. No client sends what a sound node refuses with
/// 400: one node did, and then the other may prevail.
fn fate_of(called: &Called<Answer>) -> Fate {
    match called {
        Called::Refused => Fate::Refused,
        Called::Lost => Fate::Unknown,
        Called::Answered(answer) => match answer.status {
            ..300 => Fate::Acked,
            400 => Fate::Unknown,
            300..500 => Fate::Refused,
            _ => Fate::Unknown,
        },
    }
}

/// A read as the proxy serves it: from a node that is usable, from another one if that fails.
async fn read_record(core: &Arc<Core>, collection: &Arc<Collection>, id: &str) -> Option<Option<Option<u64>>> {
    let mut tried = vec![];
    loop {
        let mut usable = core.usable_or_drained(collection).await;
        usable.retain(|node| !tried.contains(node));
        let node = core.cluster.choose(&usable, core.env.random())?;
        let facts = collection.facts();
        let path = node_path::record(&facts.tenant, &facts.database, collection.node_id(node)?, "get");
        let body = json!({"ids": [id]}).to_string();
        match core.bounded_read(node, NodeRequest::post(path, body)).await {
            Some(answer) if answer.is_success() => {
                let answer: Value = serde_json::from_slice(&answer.body).ok()?;
                let absent = answer["ids"].as_array()?.is_empty();
                return Some((!absent).then(|| document_number(&answer["documents"][0])));
            }
            _ => tried.push(node),
        }
    }
}
