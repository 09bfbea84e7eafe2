//! Concurrent writers and readers against the proxy, with what each of them was told.
//!
//! Each writer owns its ids and counts their values up. It publishes the last value that was acknowledged; a reader
//! notes that value before it asks and must see it or a newer one (promise P4).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::api::{Answer, Api};
use super::compare::Collection;
use super::data::Rng;
use super::eventually;

const KEYS: usize = 8;
const DIMENSION: usize = 8;

#[derive(Default)]
struct Cell {
    sent: AtomicU64,
    acked: AtomicU64,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    writes: AtomicU64,
    reads: AtomicU64,
    cells: Vec<[Cell; KEYS]>,
    /// Ids added once, and whether that was acknowledged.
    added: Mutex<BTreeMap<String, bool>>,
    /// Every request and what came of it.
    log: Mutex<Vec<String>>,
    errors: Mutex<Vec<String>>,
}

/// Tasks that run until they are stopped.
pub struct Load {
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
}

/// What the clients saw.
pub struct Report {
    pub writes: u64,
    pub reads: u64,
    /// Every error that a client saw, stale reads included.
    pub errors: Vec<String>,
    /// Every request and what came of it, in the order of the answers.
    pub log: Vec<String>,
    shared: Arc<Shared>,
}

impl Load {
    /// Starts writers and readers of one collection.
    pub fn start(api: &Api, collection: &str, writers: usize, readers: usize, seed: u64) -> Load {
        let shared = Arc::new(Shared {
            cells: (0..writers).map(|_| Default::default()).collect(),
            ..Shared::default()
        });
        let mut rng = Rng::new(seed);
        let mut tasks = JoinSet::new();
        for n in 0..writers + readers {
            let actor = Actor {
                n,
                name: if n < writers {
                    format!("writer {n}")
                } else {
                    format!("reader {}", n - writers)
                },
                api: api.clone(),
                collection: collection.to_owned(),
                rng: rng.fork(),
                shared: shared.clone(),
            };
            if n < writers {
                tasks.spawn(actor.write());
            } else {
                tasks.spawn(actor.read());
            }
        }
        Load { shared, tasks }
    }

    /// Waits until `count` more writes were acknowledged.
    pub async fn wait_writes(&self, count: u64) {
        self.wait("writes", &self.shared.writes, count).await;
    }

    /// Waits until `count` more reads were answered.
    pub async fn wait_reads(&self, count: u64) {
        self.wait("reads", &self.shared.reads, count).await;
    }

    /// Waits until `count` more requests failed.
    pub async fn wait_errors(&self, count: usize) {
        let errors = || self.shared.errors.lock().expect("no panics inside").len();
        let goal = errors() + count;
        eventually(Duration::from_secs(60), &format!("{count} more errors"), || async {
            let now = errors();
            if now >= goal {
                Ok(())
            } else {
                Err(format!("{now} of {goal}"))
            }
        })
        .await;
    }

    async fn wait(&self, what: &str, counter: &AtomicU64, count: u64) {
        let goal = counter.load(SeqCst) + count;
        eventually(Duration::from_secs(60), &format!("{count} more {what}"), || async {
            let now = counter.load(SeqCst);
            let errors = self.shared.errors.lock().expect("no panics inside").clone();
            if now >= goal {
                Ok(())
            } else {
                Err(format!("{now} of {goal}; errors so far: {errors:#?}"))
            }
        })
        .await;
    }

    /// Lets every task finish its request, and reports.
    pub async fn stop(mut self) -> Report {
        self.shared.stop.store(true, SeqCst);
        while let Some(task) = self.tasks.join_next().await {
            task.expect("load tasks do not panic");
        }
        let shared = self.shared;
        let errors = std::mem::take(&mut *shared.errors.lock().expect("no panics inside"));
        let log = std::mem::take(&mut *shared.log.lock().expect("no panics inside"));
        Report {
            writes: shared.writes.load(SeqCst),
            reads: shared.reads.load(SeqCst),
            errors,
            log,
            shared,
        }
    }
}

impl Report {
    /// Asserts that no client saw an error, and that there were clients.
    #[track_caller]
    pub fn assert_clean(&self) {
        let last: Vec<_> = self.log.iter().rev().take(20).collect();
        assert!(
            self.errors.is_empty(),
            "{} errors: {:#?}; last: {last:#?}",
            self.errors.len(),
            self.errors
        );
        assert!(
            self.writes > 0 && self.reads > 0,
            "{} writes, {} reads",
            self.writes,
            self.reads
        );
    }

    /// Asserts that a node has every acknowledged write and nothing that nobody sent.
    #[track_caller]
    pub fn assert_present(&self, collection: &Collection) {
        let have: BTreeMap<&str, u64> = collection
            .records
            .iter()
            .map(|r| (r.id.as_str(), r.metadata["n"].as_u64().unwrap_or(0)))
            .collect();
        for (writer, cells) in self.shared.cells.iter().enumerate() {
            for (key, cell) in cells.iter().enumerate() {
                let n = have.get(id(writer, key).as_str()).copied().unwrap_or(0);
                let (acked, sent) = (cell.acked.load(SeqCst), cell.sent.load(SeqCst));
                assert!(
                    acked <= n && n <= sent,
                    "{} is {n}, acknowledged {acked}, sent {sent}",
                    id(writer, key)
                );
            }
        }
        for (id, acked) in self.shared.added.lock().expect("no panics inside").iter() {
            assert!(
                !acked || have.contains_key(id.as_str()),
                "{id} was acknowledged and is not there"
            );
        }
    }
}

fn id(writer: usize, key: usize) -> String {
    format!("w{writer}-k{key}")
}

fn embedding(n: u64) -> Vec<f32> {
    Rng::new(n).vector(DIMENSION)
}

struct Actor {
    n: usize,
    name: String,
    api: Api,
    collection: String,
    rng: Rng,
    shared: Arc<Shared>,
}

impl Actor {
    async fn write(mut self) {
        let mut serial = 0;
        while !self.shared.stop.load(SeqCst) {
            if self.rng.below(4) == 0 {
                serial += 1;
                self.add(serial).await;
            } else {
                let key = self.rng.below(KEYS);
                self.upsert(key).await;
            }
        }
    }

    async fn upsert(&mut self, key: usize) {
        let shared = self.shared.clone();
        let cell = &shared.cells[self.n][key];
        let n = cell.sent.fetch_add(1, SeqCst) + 1;
        let id = id(self.n, key);
        let body = json!({"ids": [id], "embeddings": [embedding(n)], "documents": [format!("{id} {n}")], "metadatas": [{"n": n}]});
        // An update is an upsert for an id that exists.
        let operation = if cell.acked.load(SeqCst) > 0 && self.rng.below(3) == 0 {
            "update"
        } else {
            "upsert"
        };
        if self
            .send(operation, &body, format!("{operation} {id}={n}"))
            .await
            .is_some()
        {
            cell.acked.store(n, SeqCst);
            shared.writes.fetch_add(1, SeqCst);
        }
    }

    async fn add(&mut self, serial: u64) {
        let ids: Vec<String> = (0..3).map(|i| format!("w{}-added-{serial}-{i}", self.n)).collect();
        let embeddings: Vec<_> = (0..3).map(|i| embedding(serial * 3 + i)).collect();
        let body = json!({"ids": ids, "embeddings": embeddings, "metadatas": [{"n": 1}, {"n": 2}, null]});
        let acked = self.send("add", &body, format!("add {ids:?}")).await.is_some();
        self.shared
            .added
            .lock()
            .expect("no panics inside")
            .extend(ids.into_iter().map(|id| (id, acked)));
        self.shared.writes.fetch_add(u64::from(acked), SeqCst);
    }

    async fn read(mut self) {
        let shared = self.shared.clone();
        while !shared.stop.load(SeqCst) {
            let (writer, key) = (self.rng.below(shared.cells.len()), self.rng.below(KEYS));
            let cell = &shared.cells[writer][key];
            let acked = cell.acked.load(SeqCst);
            if acked == 0 {
                // Nothing to expect yet; the writers are just starting.
                tokio::task::yield_now().await;
                continue;
            }
            let id = id(writer, key);
            if self.rng.below(4) == 0 {
                let body = json!({"query_embeddings": [embedding(acked)], "n_results": 1, "include": ["metadatas"]});
                if let Some(answer) = self.send("query", &body, format!("query near {id}={acked}")).await {
                    let found = answer.json()["ids"][0].as_array().map_or(0, Vec::len);
                    self.check(found == 1, || format!("query found {found}: {answer:?}"));
                }
            } else {
                let body = json!({"ids": [id], "include": ["metadatas", "documents"]});
                if let Some(answer) = self.send("get", &body, format!("get {id}>={acked}")).await {
                    let n = answer.json()["metadatas"][0]["n"].as_u64().unwrap_or(0);
                    let sent = cell.sent.load(SeqCst);
                    self.check(acked <= n && n <= sent, || {
                        format!("{id}: {acked} <= n <= {sent}, read {answer:?}")
                    });
                }
            }
            shared.reads.fetch_add(1, SeqCst);
        }
    }

    fn check(&self, good: bool, complaint: impl FnOnce() -> String) {
        if !good {
            self.error(complaint());
        }
    }

    fn error(&self, text: String) {
        self.shared
            .errors
            .lock()
            .expect("no panics inside")
            .push(format!("{}: {text}", self.name));
    }

    /// Sends one request and records it; `None` if the client saw an error.
    async fn send(&self, operation: &str, body: &Value, what: String) -> Option<Answer> {
        let answer = self.api.try_op(&self.collection, operation, body).await;
        let outcome = answer.as_ref().map(|a| a.status).map_err(Clone::clone);
        let good = matches!(outcome, Ok(200..=299));
        let line = format!("{}: {what} -> {outcome:?}", self.name);
        if !good {
            self.error(format!("{what}: {answer:?}"));
        }
        self.shared.log.lock().expect("no panics inside").push(line);
        answer.ok().filter(|_| good)
    }
}
