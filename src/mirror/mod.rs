//! The mirror: every write goes to every node, in one order, and what a node misses is logged before the ack.
//!
//! [`Core`] is what the parts share: nodes, catalog, log, settings. A write enters the lane of its collection
//! (`record`), or the namespace lane (`namespace`) if it is about collections, databases or tenants; it is sent to
//! all nodes that can take it (`fan_out`), judged ([`decide()`]), covered by rows where a node missed it (`cover`),
//! and then answered.
//!
//! Everything here runs on the core's own runtime: a client that hangs up changes nothing.

mod admit;
mod answer;
mod checkpoint;
mod cover;
mod decide;
mod discover;
mod fan_out;
mod maintenance;
mod namespace;
mod on_node;
mod record;
mod recover;
mod settle;
mod suspects;
mod unprotected;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;

use crate::catalog::{Catalog, Collection};
use crate::chroma::{DeleteBody, Generation, Op, Piece, Shape};
use crate::cluster::{Cluster, NodeIndex};
use crate::config::{Heal, WhenUnavailable};
use crate::drain::Foreground;
use crate::env::SharedEnv;
use crate::events::{Events, Kind};
use crate::journal::{Change, JournalError, Log, Lsn, RepairRow, SuspectRow};
use crate::lane::{Entry, Exclusive, Lane, Pair, Shared};
use crate::{lane, repair};

pub(crate) use admit::WIPED;
pub use answer::Answer;
pub use checkpoint::{keep_checkpoints, keep_intents};
pub use cover::RepairWanted;
pub use decide::{Circumstances, Cover, Decision, Doubt, Outcome, Payload, Reply, decide};
pub use discover::keep_surveyed;
pub use fan_out::{Ids, NodeAnswer};
pub use maintenance::StaysIn;
pub use namespace::{COLLECTION_PLACEHOLDER, NamespaceWrite};
pub use recover::recover;
pub use suspects::keep_suspects;
pub use unprotected::{Unprotected, keep_unprotected};

/// Events of the past that `/status` begins with.
const SHOWN_EVENTS: usize = 20;

/// What the core is told about how to behave.
#[derive(Debug, Clone)]
pub struct Settings {
    pub write_timeout: Duration,
    pub mirror_grace: Duration,
    pub read_timeout: Duration,
    /// How long a request waits for the only node that has everything to be drained.
    pub behind_wait: Duration,
    /// What may wait in lanes, and what becomes one upstream batch.
    pub lanes: lane::Limits,
    /// Payload rows and bytes that one drain step reads.
    pub drain_rows: usize,
    pub drain_bytes: usize,
    /// Lanes of one node that are drained side by side.
    pub drain_concurrency: usize,
    /// The drain makes way while clients' writes take so many times what they took before; 0: never.
    pub drain_foreground_factor: u32,
    /// Mutating requests of unknown kinds that are taken per second.
    pub unknown_per_second: u32,
    /// Tenants whose databases and collections are looked up at start.
    pub tenants: Vec<String>,
    /// Databases (tenant, name) whose collections are looked up at start.
    pub databases: Vec<(String, String)>,
    /// Every intent is logged with its body.
    pub log_payloads: bool,
    pub when_unavailable: WhenUnavailable,
    /// Bytes of payload rows kept for one node; 0: no limit.
    pub log_bytes: u64,
    /// How long a payload row is kept; zero: no limit.
    pub log_age: Duration,
    pub heal: Heal,
    /// Repairs that run side by side.
    pub repair_concurrency: usize,
    /// Records that a repair reads or writes in one request.
    pub repair_records: usize,
    /// Records that all repairs together compare per second; 0: no limit.
    pub repair_rate: u32,
    /// Records that are followed while a collection is copied, for each copy.
    pub repair_touched: usize,
    /// Time between two comparisons of a collection; zero: only on demand.
    pub verify_interval: Duration,
    /// Percent of a collection's records that one of those looks at.
    pub verify_sample: u32,
}

/// One upstream record write: a client's, or several clients' in one.
#[derive(Debug)]
pub struct RecordEntry {
    pub op: Op,
    pub body: Bytes,
    /// Records it speaks of; for a delete by filter, those are found in the lane.
    pub ids: Vec<String>,
    pub has_embeddings: bool,
    /// A delete by filter, to be resolved to ids on the lead.
    pub filter: Option<DeleteBody>,
    /// Whose write it is: clients take turns.
    pub client: Option<IpAddr>,
}

/// A record write that waits in its collection's lane.
#[derive(Debug)]
pub struct QueuedWrite {
    pub entry: RecordEntry,
    /// What it brings to a batch; `None`: it goes alone.
    pub piece: Option<Piece>,
    pub reply: oneshot::Sender<Answer>,
}

impl lane::Write for QueuedWrite {
    type Kind = (&'static str, Shape);

    fn kind(&self) -> Option<Self::Kind> {
        Some((self.entry.op.label(), self.piece.as_ref()?.shape))
    }

    fn ids(&self) -> Option<&[String]> {
        self.entry.filter.is_none().then_some(&self.entry.ids)
    }

    fn bytes(&self) -> usize {
        self.entry.body.len()
    }

    fn client(&self) -> Option<IpAddr> {
        self.entry.client
    }
}

/// Which lane: a collection's or the namespace's.
#[derive(Debug, Clone)]
pub enum Scope {
    Namespace,
    Collection(Arc<Collection>),
}

impl Scope {
    pub fn pairs<'a>(&'a self, core: &'a Core) -> &'a [Pair] {
        match self {
            Scope::Namespace => &core.namespace.pairs,
            Scope::Collection(collection) => &collection.pairs,
        }
    }

    /// Its collection is deleted.
    pub fn is_gone(&self) -> bool {
        matches!(self, Scope::Collection(collection) if collection.is_deleted())
    }

    pub fn generation(&self) -> Option<Generation> {
        match self {
            Scope::Namespace => None,
            Scope::Collection(collection) => Some(collection.generation),
        }
    }
}

/// The lane of names and where each node stands in it.
#[derive(Debug)]
pub struct Namespace {
    pub lane: Lane<std::convert::Infallible>,
    pub pairs: Vec<Pair>,
}

/// Sums for `/status` and metrics.
#[derive(Debug, Default)]
pub struct Counters {
    pub replayed: AtomicU64,
    pub failed_replays: AtomicU64,
    /// Jobs that run on the core's runtime and that shutdown waits for.
    pub jobs: AtomicU64,
}

/// What the parts of the mirror share.
pub struct Core {
    pub env: SharedEnv,
    pub cluster: Arc<Cluster>,
    pub catalog: Catalog,
    pub log: Arc<Log>,
    pub settings: Settings,
    pub namespace: Namespace,
    pub counters: Counters,
    /// Open repair rows, for people; the pairs count them.
    pub repairs: parking_lot::Mutex<Vec<RepairRow>>,
    /// Records that are compared again when what may be on its way to a node must have landed.
    pub suspects: parking_lot::Mutex<BTreeMap<uuid::Uuid, SuspectRow>>,
    /// Lanes with payload rows, by node: where the drain has work. May name some that have none left.
    pub behind: parking_lot::Mutex<BTreeSet<(NodeIndex, Option<Generation>)>>,
    /// What was written while the journal was away.
    pub unprotected: Unprotected,
    /// Set by an operator: nothing is drained.
    pub drain_paused: std::sync::atomic::AtomicBool,
    /// What clients notice of the drain.
    pub foreground: Foreground,
    /// What the repair services share.
    pub repairing: repair::Repairing,
    /// What was under way when the last writer ended, by lane (design.md 6).
    in_doubt: parking_lot::Mutex<BTreeMap<Option<Generation>, recover::InDoubt>>,
    /// Commits of the catalog whose outcome is not known: while there are any, nothing may be built on what the catalog
    /// says.
    catalog_uncertain: AtomicU64,
    /// Held while a node is taken out or back.
    maintaining: tokio::sync::Mutex<()>,
    /// Held while a node is admitted: of two that are one server, the second is told apart.
    admitting: tokio::sync::Mutex<()>,
    /// Held while a marker or a checkpoint goes to the journal: an older one never overwrites a newer.
    remembering: tokio::sync::Mutex<()>,
    /// Held while the drain makes a collection known that no node had answered for, and while a database's id is
    /// settled: both look first and commit then.
    pub(crate) settling: tokio::sync::Mutex<()>,
    /// Held around a commit that marks rows of other nodes, and for nothing else.
    pub(crate) marking: tokio::sync::Mutex<()>,
    /// Entries that no node had answered when their client was: what the first node made of them, once it is known, and
    /// how many nodes have still to say. Kept in memory: after a restart the rows of the others tell of a refusal.
    undecided: parking_lot::Mutex<BTreeMap<Lsn, Undecided>>,
    unknown_budget: parking_lot::Mutex<(Duration, u32)>,
    missing_checks: parking_lot::Mutex<BTreeSet<(Generation, NodeIndex)>>,
}

/// An entry that no node had answered when its client was.
#[derive(Debug)]
struct Undecided {
    generation: Option<Generation>,
    applied: Option<bool>,
    nodes_left: usize,
}

/// Whether a node did with an entry what it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Agreement {
    /// The lead had accepted the entry.
    Accepted,
    /// No node had said anything before, or those that did said the same.
    Agrees,
    /// Another node did otherwise.
    Disagrees,
}

/// Counts a job for as long as it lives.
pub struct JobGuard(Arc<Core>);

impl Drop for JobGuard {
    fn drop(&mut self) {
        self.0.counters.jobs.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Core {
    /// Loads what the journal holds.
    ///
    /// # Errors
    /// Those of the journal.
    pub async fn load(
        env: SharedEnv,
        cluster: Arc<Cluster>,
        log: Log,
        settings: Settings,
    ) -> Result<Arc<Self>, JournalError> {
        let snapshot = log.journal().load().await?;
        let names = cluster.nodes().iter().map(|node| node.name.clone()).collect();
        let lanes = Shared::new(settings.lanes);
        let core = Arc::new(Self {
            catalog: Catalog::new(names, lanes.clone()),
            namespace: Namespace {
                lane: Lane::new(lanes),
                pairs: cluster.nodes().iter().map(|_| Pair::default()).collect(),
            },
            env,
            cluster,
            log: Arc::new(log),
            foreground: Foreground::new(settings.drain_foreground_factor),
            settings,
            counters: Counters::default(),
            repairs: parking_lot::Mutex::default(),
            suspects: parking_lot::Mutex::default(),
            behind: parking_lot::Mutex::default(),
            unprotected: Unprotected::default(),
            drain_paused: std::sync::atomic::AtomicBool::new(false),
            repairing: repair::Repairing::default(),
            in_doubt: parking_lot::Mutex::default(),
            catalog_uncertain: AtomicU64::new(0),
            maintaining: tokio::sync::Mutex::default(),
            admitting: tokio::sync::Mutex::default(),
            remembering: tokio::sync::Mutex::default(),
            settling: tokio::sync::Mutex::default(),
            marking: tokio::sync::Mutex::default(),
            undecided: parking_lot::Mutex::default(),
            unknown_budget: parking_lot::Mutex::default(),
            missing_checks: parking_lot::Mutex::default(),
        });
        for record in snapshot.collections {
            core.catalog.insert(record);
        }
        for record in snapshot.databases {
            core.catalog.put_database(record);
        }
        for tenant in snapshot.tenants {
            core.catalog.put_tenant(&tenant);
        }
        for backlog in snapshot.backlogs {
            if let Some((scope, node)) = core.find(backlog.generation, &backlog.node) {
                let pair = &scope.pairs(&core)[node];
                pair.add_pending(backlog.rows, backlog.bytes, backlog.oldest.timestamp_micros());
                pair.add_parked(backlog.parked);
                core.behind.lock().insert((node, backlog.generation));
            } else {
                tracing::warn!(
                    node = backlog.node,
                    rows = backlog.rows,
                    "The log has rows for a node that is not configured."
                );
            }
        }
        for row in snapshot.repairs {
            if let Some((scope, node)) = core.find(row.generation, &row.node) {
                scope.pairs(&core)[node].add_repair(row.kind.holds_rows());
                core.repairs.lock().push(row);
            }
        }
        for record in snapshot.nodes {
            if let Some(node) = core.cluster.index_of(&record.node) {
                core.cluster.node(node).remember(&record.marker, record.checkpoint);
            }
        }
        for record in snapshot.maintenance {
            if let Some(node) = core.cluster.index_of(&record.node) {
                core.cluster.set_maintenance(node, Some(record));
            }
        }
        for row in snapshot.suspects {
            core.suspects.lock().insert(row.id, row);
        }
        // Nothing rests on them.
        let last = core
            .log
            .journal()
            .events(i64::MAX, SHOWN_EVENTS)
            .await
            .unwrap_or_default();
        core.events().begin(core.env.clone(), core.log.clone(), last);
        let holder = core.log.holder().unwrap_or("nobody").to_owned();
        let what = format!("the log is written by {holder} (term {})", core.log.term());
        core.events().record(Kind::Leader, None, None, what);
        core.log.found_low_water(snapshot.low_water);
        for (generation, node) in snapshot.pins {
            if let (Some(collection), Some(node)) =
                (core.catalog.by_generation(generation), core.cluster.index_of(&node))
            {
                collection.pin(node);
            }
        }
        core.remember_in_doubt(snapshot.intents);
        core.cluster.set_admission(Arc::new(admit::Gate(Arc::downgrade(&core))));
        Ok(core)
    }

    /// What happened, for people.
    pub fn events(&self) -> &Arc<Events> {
        self.cluster.events()
    }

    pub(crate) fn find(&self, generation: Option<Generation>, node: &str) -> Option<(Scope, NodeIndex)> {
        let node = self.cluster.index_of(node)?;
        let scope = match generation {
            None => Scope::Namespace,
            Some(generation) => Scope::Collection(self.catalog.by_generation(generation)?),
        };
        Some((scope, node))
    }

    /// Runs a job to its end on the core's runtime; shutdown waits for it.
    pub fn spawn_job(self: &Arc<Self>, job: impl Future<Output = ()> + Send + 'static) {
        self.counters.jobs.fetch_add(1, Ordering::SeqCst);
        let guard = JobGuard(self.clone());
        self.env.spawn(Box::pin(async move {
            let _guard = guard;
            job.await;
        }));
    }

    /// Remembers an entry that no node has answered.
    fn remember_undecided(&self, lsn: Lsn, generation: Option<Generation>, nodes: usize) {
        let entry = Undecided {
            generation,
            applied: None,
            nodes_left: nodes,
        };
        self.undecided.lock().insert(lsn, entry);
    }

    /// The collection's rows are gone: no drain will ask what became of its entries.
    fn forget_undecided(&self, which: impl Fn(Generation) -> bool) {
        let gone = |entry: &Undecided| entry.generation.is_some_and(&which);
        self.undecided.lock().retain(|_, entry| !gone(entry));
    }

    /// How many entries are remembered that no node had answered.
    pub fn undecided(&self) -> usize {
        self.undecided.lock().len()
    }

    /// Whether nobody knows yet what became of an entry that no node had answered.
    pub(crate) fn is_undecided(&self, lsn: Lsn) -> bool {
        self.undecided
            .lock()
            .get(&lsn)
            .is_some_and(|entry| entry.applied.is_none())
    }

    /// What [`Core::compare_outcome`] would say.
    pub(crate) fn agreement(&self, lsn: Lsn, applied: bool) -> Agreement {
        match self.undecided.lock().get(&lsn).map(|entry| entry.applied) {
            None => Agreement::Accepted,
            Some(first) if first.is_none_or(|first| first == applied) => Agreement::Agrees,
            Some(_) => Agreement::Disagrees,
        }
    }

    /// What the drain of a node made of an entry, compared with what others made of it.
    pub(crate) fn compare_outcome(&self, lsn: Lsn, applied: bool) -> Agreement {
        let mut undecided = self.undecided.lock();
        let Some(entry) = undecided.get_mut(&lsn) else {
            return Agreement::Accepted;
        };
        let first = *entry.applied.get_or_insert(applied);
        entry.nodes_left = entry.nodes_left.saturating_sub(1);
        if entry.nodes_left == 0 {
            undecided.remove(&lsn);
        }
        if first == applied {
            Agreement::Agrees
        } else {
            Agreement::Disagrees
        }
    }

    /// A node has nothing to say of an entry.
    pub(crate) fn abstain(&self, lsn: Lsn) {
        let mut undecided = self.undecided.lock();
        if let Some(entry) = undecided.get_mut(&lsn) {
            entry.nodes_left = entry.nodes_left.saturating_sub(1);
            if entry.nodes_left == 0 {
                undecided.remove(&lsn);
            }
        }
    }

    /// Whether another node holds, alone or together with its log, what this lane holds: only then may a node be left
    /// to repair (rule R2).
    pub(crate) fn another_has_authority(&self, scope: &Scope, node: NodeIndex) -> bool {
        self.authorities(scope, node).next().is_some()
    }

    /// Another node is said to hold everything, and none that is can be asked. Until one is back, and still what it was,
    /// what this one cannot do stays in its log: it may be the last that can be made whole (rule R2, schedule S6).
    pub(crate) fn authority_is_away(&self, scope: &Scope, node: NodeIndex) -> bool {
        let mut others = self.authorities(scope, node).peekable();
        others.peek().is_some() && !others.any(|other| self.cluster.node(other).is_up())
    }

    /// The one other node that holds everything: who is to be repaired from it is not, once it has lost it.
    pub(crate) fn only_authority(&self, scope: &Scope, node: NodeIndex) -> Option<NodeIndex> {
        let mut others = self.authorities(scope, node);
        others.next().filter(|_| others.next().is_none())
    }

    fn authorities(&self, scope: &Scope, node: NodeIndex) -> impl Iterator<Item = NodeIndex> {
        (0..self.cluster.len()).filter(move |&other| {
            let is_whole = match scope {
                Scope::Namespace => self.namespace.pairs[other].completes_by_drain(),
                Scope::Collection(collection) => collection.is_whole_on(other),
            };
            other != node && is_whole
        })
    }

    /// Whether the catalog can be changed now: the journal answers, and what was committed before is known.
    pub fn catalog_can_change(&self) -> bool {
        self.log.is_available() && self.catalog_uncertain.load(Ordering::SeqCst) == 0
    }

    /// Nodes that can serve the namespace.
    pub fn namespace_nodes(&self) -> Vec<NodeIndex> {
        self.cluster
            .up()
            .filter(|&node| self.namespace.pairs[node].in_sync())
            .collect()
    }

    /// Nodes that can serve this collection; the first is the lead. Of a deleted one, whose rows are gone, those that
    /// have deleted it: another may still show what it held.
    pub fn usable(&self, collection: &Collection) -> Vec<NodeIndex> {
        // A delete is known before its rows are forgotten: what is in sync only because they are shows the delete, too.
        let shows_the_delete = |node: NodeIndex| !collection.is_deleted() || self.namespace.pairs[node].in_sync();
        self.cluster
            .up()
            .filter(|&node| collection.in_sync(node) && shows_the_delete(node))
            .collect()
    }

    /// From now on pages of this collection are read from one node, unless they are already.
    pub(crate) fn pin_reads(&self, collection: &Collection, node: NodeIndex) -> Option<Change> {
        collection.pinned().is_none().then(|| Change::PinReads {
            generation: collection.generation,
            node: self.cluster.node(node).name.clone(),
        })
    }

    /// Of nodes that can serve a page, the one whose order is followed. When it is not among them another one takes its
    /// place, and keeps it.
    pub fn paging_node(self: &Arc<Self>, collection: &Arc<Collection>, nodes: &[NodeIndex]) -> Option<NodeIndex> {
        let pinned = collection.pinned()?;
        let first = *nodes.first()?;
        if nodes.contains(&pinned) {
            return Some(pinned);
        }
        collection.pin(first);
        let (core, collection) = (self.clone(), collection.clone());
        self.spawn_job(async move {
            let change = Change::PinReads {
                generation: collection.generation,
                node: core.cluster.node(first).name.clone(),
            };
            // After a restart it may be the old one again: clients that page over that see it.
            let _ = core.log.commit(&vec![change]).await;
        });
        Some(first)
    }

    /// Nodes that can show this collection's own properties: in step with it and with the namespace. Waits like
    /// [`Core::usable_or_drained`].
    pub async fn showing(&self, collection: &Collection) -> Vec<NodeIndex> {
        let mut nodes = self.usable_or_drained(collection).await;
        nodes.retain(|&node| self.namespace.pairs[node].in_sync());
        nodes
    }

    /// Whether some node will serve this collection soon.
    pub fn drain_would_help(&self, collection: &Collection) -> bool {
        self.cluster
            .up()
            .any(|node| collection.pairs[node].is_nearly_in_sync() && collection.node_id(node).is_some())
    }

    /// The nodes that can serve a collection; when none can but one has everything together with its log, waits for
    /// its drain (design.md 6, schedule S20).
    pub async fn usable_or_drained(&self, collection: &Collection) -> Vec<NodeIndex> {
        let limit = self.env.sleep(self.settings.behind_wait);
        tokio::pin!(limit);
        let mut changes = self.cluster.watch_changes();
        loop {
            changes.mark_unchanged();
            let usable = self.usable(collection);
            if !usable.is_empty() || collection.is_deleted() || !self.drain_would_help(collection) {
                return usable;
            }
            tokio::select! {
                biased;
                _ = changes.changed() => {}
                () = &mut limit => return vec![],
            }
        }
    }

    /// Waits for the turn to be alone in a collection's lane.
    pub async fn exclusive(self: &Arc<Self>, collection: &Arc<Collection>) -> Option<Exclusive> {
        let (turn, start) = collection.lane.push_exclusive();
        if start {
            self.start_worker(collection.clone());
        }
        // A worker that waits for a drained node steps aside for this.
        self.cluster.announce_change();
        turn.await.ok()
    }

    /// Waits for the turn to be alone in the namespace lane.
    pub async fn exclusive_namespace(self: &Arc<Self>) -> Option<Exclusive> {
        let (turn, start) = self.namespace.lane.push_exclusive();
        if start {
            let core = self.clone();
            self.spawn_job(async move {
                while let Some(entry) = core.namespace.lane.next(true) {
                    match entry {
                        Entry::Writes(_) => {}
                        Entry::Exclusive(turn) => Lane::<std::convert::Infallible>::hand_over(turn).await,
                    }
                }
            });
        }
        turn.await.ok()
    }

    fn start_worker(self: &Arc<Self>, collection: Arc<Collection>) {
        let core = self.clone();
        self.spawn_job(async move {
            // While the collection may have no dimension, a write that is refused can still set it.
            while let Some(entry) = collection.lane.next(!collection.dimension_known()) {
                match entry {
                    Entry::Writes(writes) => {
                        let (count, begun) = (writes.len(), core.env.now());
                        core.write_records(&collection, writes).await;
                        core.await_company(&collection, count, core.env.now().saturating_sub(begun))
                            .await;
                    }
                    Entry::Exclusive(turn) => Lane::<QueuedWrite>::hand_over(turn).await,
                }
            }
        });
    }

    /// The exclusive entry of a scope's lane.
    pub async fn exclusive_of(self: &Arc<Self>, scope: &Scope) -> Option<Exclusive> {
        match scope {
            Scope::Namespace => self.exclusive_namespace().await,
            Scope::Collection(collection) => self.exclusive(collection).await,
        }
    }
}
