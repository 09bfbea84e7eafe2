//! Clients that check what they see, while something is killed or away.
//!
//! Writers own their ids and count their values up; a reader notes the last acknowledged value of an id before it asks,
//! and must see that or a newer one. Nothing is retried: an error that a client sees is an error.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::task::{JoinHandle, JoinSet};

use super::wire::{Connection, Target, post};
use crate::common::{DIMENSION, percentile, record};
use crate::harness::compare::Dump;
use crate::harness::data::Rng;

/// How many of each there are.
pub const WRITERS: usize = 4;
pub const READERS: usize = 4;
/// A client begins a request so long after the one before at the earliest: readers would otherwise take all that the
/// machine has from the writers.
pub const PACE: Duration = Duration::from_millis(20);
/// Ids that a writer writes again and again; besides it adds others, once each.
const SLOTS: usize = 32;
/// No client waits longer than this.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Slot {
    sent: AtomicU64,
    acked: AtomicU64,
}

struct Shared {
    target: Target,
    stopped: AtomicBool,
    slots: Vec<[Slot; SLOTS]>,
    /// By kind: how many, and the first.
    errors: Mutex<BTreeMap<String, (u64, String)>>,
}

/// One request that ended, well or not.
#[derive(Clone, Copy)]
pub struct Request {
    pub client: usize,
    pub write: bool,
    pub start: Instant,
    pub end: Instant,
    pub good: bool,
}

impl Request {
    pub fn millis(&self) -> f64 {
        (self.end - self.start).as_secs_f64() * 1000.0
    }
}

/// By the moment at which something went away, and that of its return.
#[derive(Clone, Copy)]
pub enum Time {
    Before,
    Away,
    After,
}

/// One client and what it did.
struct Client {
    shared: Arc<Shared>,
    number: usize,
    rng: Rng,
    connection: Option<Connection>,
    requests: Vec<Request>,
    /// Ids written once, and acknowledged.
    added: Vec<String>,
}

/// Clients at work, on a thread of their own.
pub struct Clients {
    shared: Arc<Shared>,
    work: JoinHandle<Vec<Client>>,
}

/// What they did and saw.
pub struct Seen {
    shared: Arc<Shared>,
    clients: Vec<Client>,
}

impl Clients {
    /// Some writers and readers of a collection.
    pub fn start(target: Target, seed: u64) -> Clients {
        let shared = Arc::new(Shared {
            target,
            stopped: AtomicBool::new(false),
            slots: (0..WRITERS).map(|_| Default::default()).collect(),
            errors: Mutex::default(),
        });
        let (working, mut rng) = (shared.clone(), Rng::new(seed));
        let work = tokio::task::spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            let mut tasks = JoinSet::new();
            for number in 0..WRITERS + READERS {
                let client = Client {
                    shared: working.clone(),
                    number,
                    rng: rng.fork(),
                    connection: None,
                    requests: Vec::new(),
                    added: Vec::new(),
                };
                tasks.spawn_on(client.run(), runtime.handle());
            }
            runtime.block_on(tasks.join_all())
        });
        Clients { shared, work }
    }

    /// Ends when every client has its last answer.
    pub async fn stop(self) -> Seen {
        self.shared.stopped.store(true, SeqCst);
        let clients = self.work.await.expect("the clients end");
        Seen {
            shared: self.shared,
            clients,
        }
    }
}

impl Client {
    async fn run(mut self) -> Client {
        for serial in 1.. {
            let start = Instant::now();
            if self.shared.stopped.load(SeqCst) {
                break;
            }
            if self.number < WRITERS {
                self.write(serial).await;
            } else {
                self.read().await;
            }
            tokio::time::sleep_until((start + PACE).into()).await;
        }
        self
    }

    async fn write(&mut self, serial: u64) {
        let shared = self.shared.clone();
        if self.rng.below(2) == 0 {
            let id = format!("w{}-added-{serial}", self.number);
            if self.send("add", record(&id, serial)).await.is_some() {
                self.added.push(id);
            }
            return;
        }
        let place = self.rng.below(SLOTS);
        let slot = &shared.slots[self.number][place];
        let n = slot.sent.fetch_add(1, SeqCst) + 1;
        let update = slot.acked.load(SeqCst) > 0 && self.rng.below(2) == 0;
        let operation = if update { "update" } else { "upsert" };
        let body = record(&slot_id(self.number, place), n);
        if self.send(operation, body).await.is_some() {
            slot.acked.store(n, SeqCst);
        }
    }

    async fn read(&mut self) {
        let shared = self.shared.clone();
        let (writer, place) = (self.rng.below(shared.slots.len()), self.rng.below(SLOTS));
        let slot = &shared.slots[writer][place];
        let acked = slot.acked.load(SeqCst);
        if acked == 0 {
            return;
        }
        let id = slot_id(writer, place);
        if self.rng.below(4) == 0 {
            let near = Rng::new(acked).vector(DIMENSION);
            let body = json!({"query_embeddings": [near], "n_results": 10, "include": ["metadatas", "distances"]});
            if let Some(answer) = self.send("query", body.to_string().into()).await
                && answer["ids"][0].as_array().is_none_or(Vec::is_empty)
            {
                self.error("query found nothing".into(), format!("near {id}: {answer}"));
            }
            return;
        }
        let body = json!({"ids": [id], "include": ["metadatas", "documents"]});
        if let Some(answer) = self.send("get", body.to_string().into()).await {
            let (n, sent) = (answer["metadatas"][0]["n"].as_u64(), slot.sent.load(SeqCst));
            if !n.is_some_and(|n| acked <= n && n <= sent) {
                self.error("stale read".into(), format!("{id} is {acked} to {sent}: {answer}"));
            }
        }
    }

    fn error(&self, kind: String, detail: String) {
        let mut errors = self.shared.errors.lock().expect("no panics inside");
        errors.entry(kind).or_insert((0, detail)).0 += 1;
    }

    /// Sends one request; `None` if the client saw an error.
    async fn send(&mut self, operation: &str, body: Bytes) -> Option<Value> {
        let write = !matches!(operation, "get" | "query");
        let start = Instant::now();
        let answer = tokio::time::timeout(PATIENCE, self.answer(operation, &body)).await;
        let answer = answer.unwrap_or_else(|_| Err(format!("no answer within {PATIENCE:?}")));
        let end = Instant::now();
        self.requests.push(Request {
            client: self.number,
            write,
            start,
            end,
            good: answer.is_ok(),
        });
        let kind = match answer {
            Ok(answer) => return Some(answer),
            Err(kind) => kind,
        };
        self.error(
            format!("{}: {kind}", if write { "write" } else { "read" }),
            format!("{operation} after {:.3} s", (end - start).as_secs_f64()),
        );
        None
    }

    async fn answer(&mut self, operation: &str, body: &[u8]) -> Result<Value, String> {
        let target = &self.shared.target;
        // It is put back when it carried its answer, and not when that broke off or was given up.
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => Connection::open(target.address)
                .await
                .map_err(|e| format!("no connection: {e}"))?,
        };
        let request = post(&format!("{}/{operation}", target.collection), body);
        let (status, body) = connection
            .ask(&request)
            .await
            .map_err(|e| format!("connection lost: {e}"))?;
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        self.connection = Some(connection);
        if (200..300).contains(&status) {
            return Ok(body);
        }
        let text = |key: &str| body[key].as_str().unwrap_or("?");
        Err(format!("{status} {}: {}", text("error"), text("message")))
    }
}

fn slot_id(writer: usize, place: usize) -> String {
    format!("w{writer}-slot-{place}")
}

impl Seen {
    pub fn requests(&self) -> impl Iterator<Item = &Request> {
        self.clients.iter().flat_map(|client| &client.requests)
    }

    /// By kind, with how many there were and the first.
    pub fn errors(&self) -> BTreeMap<String, (u64, String)> {
        self.shared.errors.lock().expect("no panics inside").clone()
    }

    /// `p50 / p99` in milliseconds of the good writes or reads of a time: before `away`, until `back`, after it. What was
    /// under way when one of them came belongs to the time that followed `away` and went before `back`.
    pub fn latency(&self, write: bool, time: Time, (away, back): (Instant, Instant)) -> String {
        let within = |r: &&Request| match time {
            Time::Before => r.end <= away,
            Time::Away => r.end > away && r.start < back,
            Time::After => r.start >= back,
        };
        let good = self.requests().filter(|r| r.good && r.write == write);
        let times: Vec<f64> = good.filter(within).map(Request::millis).collect();
        match times.is_empty() {
            true => "-".into(),
            false => format!("{:.1} / {:.1}", percentile(&times, 50.0), percentile(&times, 99.0)),
        }
    }

    /// Acknowledged writes that a node does not have, and values that nobody sent.
    pub fn lost_on(&self, dump: &Dump, collection: &str) -> Vec<String> {
        let records = &dump.collection(collection).records;
        let have: BTreeMap<&str, u64> = records
            .iter()
            .map(|r| (r.id.as_str(), r.metadata["n"].as_u64().unwrap_or(0)))
            .collect();
        let mut lost = Vec::new();
        for (writer, slots) in self.shared.slots.iter().enumerate() {
            for (place, slot) in slots.iter().enumerate() {
                let (id, acked, sent) = (slot_id(writer, place), slot.acked.load(SeqCst), slot.sent.load(SeqCst));
                let n = have.get(id.as_str()).copied().unwrap_or(0);
                if n < acked || n > sent {
                    let node = &dump.node;
                    lost.push(format!("{id} on {node} is {n}, acknowledged {acked}, sent {sent}"));
                }
            }
        }
        let added = self.clients.iter().flat_map(|client| &client.added);
        let missing = added.filter(|id| !have.contains_key(id.as_str()));
        lost.extend(missing.map(|id| format!("{id} on {}", dump.node)));
        lost
    }
}
