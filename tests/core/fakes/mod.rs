//! The core between two fake nodes and a fake journal.

pub mod chroma;
pub mod env;
mod journal;
mod node;
mod port;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use diptych::catalog::Collection;
use diptych::chroma::{Op, parse_delete, parse_record};
use diptych::chroma::{RecordWrite, parse_create};
use diptych::cluster::{Cluster, Node, NodeIndex};
use diptych::config::{Heal, WhenUnavailable};
use diptych::drain::drain_node;
use diptych::env::SharedEnv;
use diptych::journal::{Holder, Log};
use diptych::lane::Limits;
use diptych::mirror::{Answer, Core, NamespaceWrite, RecordEntry, Settings, keep_suspects, recover};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

pub use chroma::Contents;
pub use env::Rng;
pub use journal::{CommitFault, FakeJournal};
pub use node::{DISK_FULL, FakeNode, Fault, Gate, LOCKED, REFUSED};
pub use port::Port;

pub const A: NodeIndex = 0;
pub const B: NodeIndex = 1;
pub const ALWAYS: usize = usize::MAX;
pub const TENANT: &str = "default_tenant";
pub const DATABASE: &str = "default_database";

const JOURNAL_CHECK: Duration = Duration::from_secs(1);
const LOW_WATER: Duration = Duration::from_millis(100);
const CANARY: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(3600);

#[derive(Clone)]
pub struct Stage {
    pub core: Arc<Core>,
    pub env: Arc<env::VirtualEnv>,
    pub nodes: [Arc<FakeNode>; 2],
    pub journal: Arc<FakeJournal>,
}

pub async fn seconds(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

/// One record whose document is `w{n}`.
pub fn value(id: &str, n: u64) -> Value {
    json!({"ids": [id], "embeddings": [[n, 1]], "documents": [format!("w{n}")], "metadatas": [{"n": n}]})
}

/// Status and, where there is one, the error message.
pub fn text(answer: &Answer) -> String {
    format!("{} {}", answer.status, String::from_utf8_lossy(&answer.body))
}

/// No client waits for ever.
async fn answered(request: impl Future<Output = Answer>) -> Answer {
    tokio::time::timeout(PATIENCE, request).await.expect("an answer")
}

/// A record write of a client with this address, as the proxy understands it.
pub fn entry_of(client: Option<IpAddr>, kind: RecordWrite, body: Value) -> RecordEntry {
    let body = Bytes::from(body.to_string());
    let (ids, has_embeddings, filter) = match kind {
        RecordWrite::Delete => {
            let delete = parse_delete(&body).expect("a delete");
            let ids = delete.ids.clone().unwrap_or_default();
            (ids, false, delete.has_filter.then_some(delete))
        }
        _ => {
            let record = parse_record(kind, &body).expect("a record write");
            (record.ids, record.has_embeddings, None)
        }
    };
    RecordEntry {
        op: kind.into(),
        body,
        ids,
        has_embeddings,
        filter,
        client,
    }
}

impl Stage {
    pub async fn new(seed: u64) -> Self {
        Self::with(seed, |_| {}).await
    }

    /// Both nodes are up; the drain and the journal's checks run.
    pub async fn with(seed: u64, change: impl FnOnce(&mut Settings)) -> Self {
        let nodes = [1, 2].map(|number| Arc::new(FakeNode::new(seed.wrapping_mul(31) + number)));
        let stage = Self::over(seed, nodes, Arc::default(), change).await;
        for node in [A, B] {
            stage.up(node).await;
        }
        stage
    }

    /// A new proxy over nodes and a journal that may have a past. Nobody has looked at the nodes yet.
    pub async fn over(
        seed: u64,
        nodes: [Arc<FakeNode>; 2],
        journal: Arc<FakeJournal>,
        change: impl FnOnce(&mut Settings),
    ) -> Self {
        let own = Arc::new(env::VirtualEnv::new(seed));
        let env: SharedEnv = own.clone();
        let members = ["a", "b"].into_iter().zip(&nodes).enumerate();
        let members = members.map(|(index, (name, node))| Node::new(index, name, "fake:0", 1, node.clone()));
        let cluster = Arc::new(Cluster::new(members.collect()));
        let mut settings = Settings {
            write_timeout: Duration::from_secs(600),
            mirror_grace: Duration::from_secs(2),
            read_timeout: Duration::from_secs(30),
            behind_wait: Duration::from_secs(10),
            lanes: Limits {
                writes: 64,
                ..Limits::default()
            },
            drain_rows: 1000,
            drain_bytes: 8 << 20,
            drain_concurrency: 8,
            drain_foreground_factor: 2,
            unknown_per_second: 10,
            tenants: vec![TENANT.to_owned()],
            databases: vec![],
            log_payloads: false,
            when_unavailable: WhenUnavailable::Mirror,
            log_bytes: 0,
            log_age: Duration::ZERO,
            heal: Heal::Auto,
            repair_concurrency: 2,
            repair_records: 1000,
            repair_rate: 0,
            repair_touched: 200_000,
            verify_interval: Duration::ZERO,
            verify_sample: 100,
        };
        change(&mut settings);
        let log = Log::take(journal.clone(), env.clone(), Holder::named("test").into())
            .await
            .expect("the journal is ours");
        let core = Core::load(env, cluster, log, settings)
            .await
            .expect("what the journal holds");
        let stage = Self {
            core,
            env: own,
            nodes,
            journal,
        };
        for node in [A, B] {
            stage.core.env.spawn(Box::pin(drain_node(stage.core.clone(), node)));
        }
        tokio::spawn(recover(stage.core.clone()));
        tokio::spawn(keep_suspects(stage.core.clone()));
        let core = stage.core.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOW_WATER).await;
                core.log.store_low_water().await;
            }
        });
        let core = stage.core.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(JOURNAL_CHECK).await;
                core.log.check().await;
            }
        });
        stage
    }

    /// From here on open repair rows are carried out.
    pub fn heal(&self) {
        for node in [A, B] {
            let repairs = diptych::repair::repair_node(self.core.clone(), node);
            self.core.env.spawn(Box::pin(repairs));
        }
    }

    pub fn a(&self) -> &FakeNode {
        &self.nodes[A]
    }

    pub fn b(&self) -> &FakeNode {
        &self.nodes[B]
    }

    /// The node's process dies, and health sees it.
    pub fn down(&self, node: NodeIndex) {
        self.nodes[node].set_down(true);
        self.core.cluster.observe(node, false);
    }

    /// The node's process is back: its canary returns, and health sees it.
    pub async fn up(&self, node: NodeIndex) {
        self.nodes[node].set_down(false);
        self.admit(node).await.expect("admission");
    }

    /// What health does when a node's probes pass.
    pub async fn admit(&self, node: NodeIndex) -> Result<(), String> {
        let cluster = &self.core.cluster;
        cluster.verify(&self.core.env, node, CANARY).await?;
        cluster.observe(node, true);
        Ok(())
    }

    /// Brings a node that is not up back as soon as its canary returns, for as long as the test runs.
    pub fn probe(&self) {
        let stage = self.clone();
        tokio::spawn(async move {
            loop {
                seconds(1).await;
                for node in [A, B] {
                    let member = stage.core.cluster.node(node);
                    if !member.is_up() && !stage.nodes[node].is_down() {
                        let _ = stage.admit(node).await;
                    }
                }
            }
        });
    }

    pub fn pause_drain(&self, paused: bool) {
        self.core.drain_paused.store(paused, Ordering::SeqCst);
        self.core.cluster.announce_change();
    }

    pub async fn namespace(&self, write: NamespaceWrite, body: Value) -> Answer {
        let body = if body.is_null() {
            Bytes::new()
        } else {
            Bytes::from(body.to_string())
        };
        answered(self.core.submit_namespace(write, body)).await
    }

    pub async fn try_create(&self, body: Value) -> Answer {
        let create = parse_create(body.to_string().as_bytes()).expect("a body that can be created from");
        let write = NamespaceWrite::CreateCollection {
            tenant: TENANT.to_owned(),
            database: DATABASE.to_owned(),
            name: create.name,
            get_or_create: create.get_or_create,
        };
        self.namespace(write, body).await
    }

    pub async fn create(&self, name: &str) -> Arc<Collection> {
        let answer = self.try_create(json!({"name": name})).await;
        assert_eq!(answer.status, 200, "{}", text(&answer));
        self.find(name)
    }

    pub fn find(&self, name: &str) -> Arc<Collection> {
        self.core
            .catalog
            .by_name(TENANT, DATABASE, name)
            .expect("a collection of this name")
    }

    pub async fn delete(&self, name: &str) -> Answer {
        let write = NamespaceWrite::DeleteCollection {
            tenant: TENANT.to_owned(),
            database: DATABASE.to_owned(),
            name: name.to_owned(),
        };
        self.namespace(write, Value::Null).await
    }

    pub async fn rename(&self, collection: &Arc<Collection>, name: &str) -> Answer {
        let write = NamespaceWrite::ModifyCollection {
            collection: collection.clone(),
            new_name: Some(name.to_owned()),
        };
        self.namespace(write, json!({"new_name": name})).await
    }

    /// A record write as a client sends it.
    pub async fn write(&self, collection: &Arc<Collection>, kind: RecordWrite, body: Value) -> Answer {
        self.write_of(None, collection, kind, body).await
    }

    /// The same of a client with this address.
    pub async fn write_of(
        &self,
        client: Option<IpAddr>,
        collection: &Arc<Collection>,
        kind: RecordWrite,
        body: Value,
    ) -> Answer {
        let entry = entry_of(client, kind, body);
        answered(self.core.submit(collection, entry)).await
    }

    pub async fn upsert(&self, collection: &Arc<Collection>, id: &str, n: u64) -> Answer {
        self.write(collection, RecordWrite::Upsert, value(id, n)).await
    }

    pub fn start_upsert(&self, collection: &Arc<Collection>, id: &'static str, n: u64) -> JoinHandle<Answer> {
        let (stage, collection) = (self.clone(), collection.clone());
        tokio::spawn(async move { stage.upsert(&collection, id, n).await })
    }

    /// Waits, in virtual time, for what has to come.
    pub async fn eventually(&self, what: &str, mut reached: impl FnMut() -> bool) {
        let waited = tokio::time::timeout(PATIENCE, async {
            while !reached() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        if waited.await.is_err() {
            let (rows, repairs) = (self.journal.rows(), self.journal.repairs());
            panic!("never: {what}; payload rows {rows:?}, repair rows {repairs:?}");
        }
    }

    /// Waits until no node misses anything that the log can give it.
    pub async fn drained(&self) {
        self.eventually("drained", || {
            let collections = self.core.catalog.all();
            let lanes = collections
                .iter()
                .filter(|one| !one.is_deleted())
                .flat_map(|one| &one.pairs);
            let quiet =
                |pair: &diptych::lane::Pair| pair.pending() == 0 && pair.stragglers() == 0 && pair.uncertain() == 0;
            self.journal.rows().is_empty() && lanes.chain(&self.core.namespace.pairs).all(quiet)
        })
        .await;
    }

    /// Waits until no node misses anything that the log or repair can give it.
    pub async fn healed(&self) {
        self.drained().await;
        self.eventually("repaired", || {
            self.journal.repairs().is_empty() && self.core.repairs.lock().is_empty()
        })
        .await;
    }

    pub fn usable(&self, collection: &Collection) -> Vec<NodeIndex> {
        self.core.usable(collection)
    }

    pub fn contents(&self, node: NodeIndex, name: &str) -> Contents {
        let mut state = self.nodes[node].state();
        let database = state
            .get_mut(&(TENANT.to_owned(), DATABASE.to_owned()))
            .expect("the database");
        database.remove(name).expect("a collection of this name")
    }

    /// Ids and documents of a collection on a node, in the order of `get`.
    pub fn documents(&self, node: NodeIndex, name: &str) -> Vec<(String, String)> {
        let records = self.contents(node, name).records.into_iter();
        let text = |document: Value| document.as_str().unwrap_or_default().to_owned();
        records.map(|record| (record.id, text(record.document))).collect()
    }

    /// Both nodes hold the same, also when what they have not applied yet comes to light; every collection is mapped
    /// to what each node has; and nothing is open.
    pub fn assert_converged(&self) {
        assert_eq!(self.journal.rows(), vec![], "payload rows are left");
        assert_eq!(self.journal.repairs(), vec![], "repair rows are left");
        self.assert_equal();
        for record in self.journal.living() {
            for (node, name) in [(A, "a"), (B, "b")] {
                let there = self.nodes[node].with(|chroma| chroma.id_of(&record.name));
                assert_eq!(record.node_ids.get(name), there.as_ref(), "{} on {name}", record.name);
            }
            let collection = self
                .core
                .catalog
                .by_generation(record.generation)
                .expect("in the catalog");
            assert_eq!(self.usable(&collection), vec![A, B], "{}", record.name);
        }
    }

    pub fn assert_equal(&self) {
        assert_eq!(self.a().state(), self.b().state());
        self.nodes.iter().for_each(|node| node.with(chroma::Chroma::reveal));
        assert_eq!(
            self.a().state(),
            self.b().state(),
            "after what was hidden came to light"
        );
    }
}

/// Rows as [`FakeJournal::rows`] gives them.
pub fn rows(of: &[(&str, &str)]) -> Vec<(String, String)> {
    of.iter()
        .map(|(node, text)| ((*node).to_owned(), (*text).to_owned()))
        .collect()
}
