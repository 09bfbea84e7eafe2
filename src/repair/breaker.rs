//! A circuit breaker per collection and node: one corrupt index takes one collection off one node, not the node.
//!
//! A 5xx that one node alone gives to reads of a collection counts against it; three in a row are checked by reads of
//! our own, on it and on another node, and if only it fails them, its copy is rebuilt from there (design.md 9).
//!
//! It may be the one that the others are to be repaired from: a node that came back first, and alone. One that holds
//! every acked record takes its place then, as if it were down (schedule S34).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::json;

use super::read::Object;
use super::reverse;
use crate::catalog::Collection;
use crate::chroma::{Generation, node_path};
use crate::cluster::{NodeIndex, NodeRequest};
use crate::config::Heal;
use crate::journal::{Change, RepairKind};
use crate::mirror::{Core, RepairWanted, Scope};

/// Failed reads in a row before a node is suspected.
const IN_A_ROW: u32 = 3;
/// After a look into it a collection on a node is left alone for so long: whoever sends what every node fails would keep
/// the lane from its writers otherwise.
const REST: Duration = Duration::from_secs(5);

/// What our own reads of a collection on a node gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Health {
    Serves,
    /// It lives, and answers with a 5xx.
    Fails,
    Unclear,
}

impl Core {
    /// What a node answered to a read of this collection.
    pub fn observe_read(self: &Arc<Self>, collection: &Arc<Collection>, node: NodeIndex, status: u16) {
        match status {
            // Not implemented: by no node.
            501 => {}
            500.. => self.report_read_failure(collection, node),
            _ => self.report_read_success(collection, node),
        }
    }

    /// A node served a read of this collection.
    pub fn report_read_success(&self, collection: &Collection, node: NodeIndex) {
        if self.repairing.any_broken.load(Ordering::Relaxed) {
            let mut broken = self.repairing.broken_reads.lock();
            broken.remove(&(collection.generation, node));
            self.repairing.any_broken.store(!broken.is_empty(), Ordering::Relaxed);
        }
    }

    /// A node answered a read of this collection with a 5xx where another may serve it.
    pub fn report_read_failure(self: &Arc<Self>, collection: &Arc<Collection>, node: NodeIndex) {
        let key = (collection.generation, node);
        {
            let mut broken = self.repairing.broken_reads.lock();
            let count = broken.entry(key).or_default();
            *count += 1;
            let count = *count;
            self.repairing.any_broken.store(true, Ordering::Relaxed);
            if count != IN_A_ROW {
                return;
            }
            if !self.begin_look(key) {
                broken.remove(&key);
                return;
            }
        }
        self.look_into(collection, node);
    }

    /// Something other than a client's read showed that a node may not be able to serve a collection.
    pub(crate) fn suspect_collection(self: &Arc<Self>, collection: &Arc<Collection>, node: NodeIndex) {
        if self.begin_look((collection.generation, node)) {
            self.look_into(collection, node);
        }
    }

    fn look_into(self: &Arc<Self>, collection: &Arc<Collection>, node: NodeIndex) {
        let key = (collection.generation, node);
        let (core, collection) = (self.clone(), collection.clone());
        self.spawn_job(async move {
            core.examine(&collection, node).await;
            core.repairing.examined.lock().insert(key, core.env.now() + REST);
            core.repairing.broken_reads.lock().remove(&key);
        });
    }

    /// False: it was looked into just now.
    fn begin_look(&self, key: (Generation, NodeIndex)) -> bool {
        let now = self.env.now();
        let mut examined = self.repairing.examined.lock();
        examined.retain(|_, until| *until > now);
        let rested = !examined.contains_key(&key);
        if rested {
            examined.insert(key, now + REST);
        }
        rested
    }

    /// Writes a repair row if this node alone cannot serve the collection.
    async fn examine(self: &Arc<Self>, collection: &Arc<Collection>, node: NodeIndex) {
        let _alone = self.exclusive(collection).await;
        let scope = Scope::Collection(collection.clone());
        if collection.is_deleted() || collection.pairs[node].repairs() > 0 {
            return;
        }
        if self.health(collection, node).await != Health::Fails || self.give_way(collection, node).await {
            return;
        }
        if !collection.in_sync(node) {
            return;
        }
        let mut peer_serves = false;
        for peer in self.usable(collection).into_iter().filter(|&peer| peer != node) {
            peer_serves |= self.health(collection, peer).await == Health::Serves;
        }
        if !peer_serves || !self.another_has_authority(&scope, node) {
            tracing::error!(
                node = self.cluster.node(node).name,
                collection = collection.facts().name,
                "A node cannot serve a collection, and no other node could give it back."
            );
            return;
        }
        let changes = vec![self.rebuild(&scope, node)];
        self.commit_or_retry(&scope, vec![node], changes).await;
    }

    fn rebuild(&self, scope: &Scope, node: NodeIndex) -> Change {
        let wanted = RepairWanted {
            kind: RepairKind::Rebuild,
            ..RepairWanted::whole(self.log.next_lsn(), "the node alone cannot serve the collection")
        };
        let mut row = self.new_repair(node, scope.generation(), wanted);
        if self.settings.heal == Heal::Manual {
            row.parked = Some("heal is manual".to_owned());
        }
        self.counted(row)
    }

    /// A node that fails a collection lets another one serve it that was to be repaired from it and holds every acked
    /// record, alone or with its log. True: it did. The caller holds the lane.
    async fn give_way(self: &Arc<Self>, collection: &Arc<Collection>, node: NodeIndex) -> bool {
        let scope = Scope::Collection(collection.clone());
        let Some((heir, _)) = reverse::heir(self, collection, node) else {
            return false;
        };
        // It is going to serve: what it hides comes to light now (S15).
        if !self.flush(collection, heir).await || self.health(collection, heir).await != Health::Serves {
            return false;
        }
        let Some((_, rows)) = reverse::heir(self, collection, node).filter(|(same, _)| *same == heir) else {
            return false;
        };
        tracing::warn!(
            node = self.cluster.node(node).name,
            heir = self.cluster.node(heir).name,
            collection = collection.facts().name,
            "A node cannot serve a collection: one that was to be repaired from it takes its place."
        );
        let gone = Change::RemoveRepairs(rows.iter().map(|row| row.id).collect());
        let changes = vec![gone, self.rebuild(&scope, node)];
        self.commit_or_retry(&scope, vec![node, heir], changes).await;
        true
    }

    async fn health(self: &Arc<Self>, collection: &Collection, node: NodeIndex) -> Health {
        let Some(id) = collection.node_id(node) else {
            return Health::Unclear;
        };
        let facts = collection.facts();
        let by_id = NodeRequest::get(node_path::by_id(&facts.tenant, &facts.database, id));
        let dimension = match self.bounded_read(node, by_id).await {
            Some(answer) if answer.is_success() => Object::parse(&answer.body).and_then(|object| object.dimension),
            _ => return Health::Unclear,
        };
        let mut reads = vec![(
            "get",
            json!({"limit": 1, "include": ["embeddings", "documents", "metadatas"]}),
        )];
        if let Some(dimension) = dimension.and_then(|dimension| usize::try_from(dimension).ok()) {
            reads.push((
                "query",
                json!({"query_embeddings": [vec![1.0; dimension]], "n_results": 1}),
            ));
        }
        for (op, body) in reads {
            let path = node_path::record(&facts.tenant, &facts.database, id, op);
            match self.bounded_read(node, NodeRequest::post(path, body.to_string())).await {
                Some(answer) if answer.status >= 500 && answer.status != 501 => return Health::Fails,
                Some(_) => {}
                None => return Health::Unclear,
            }
        }
        Health::Serves
    }

    /// A repair row that is open from now on.
    fn counted(&self, row: crate::journal::RepairRow) -> Change {
        self.count_repair(&row);
        Change::InsertRepair(row)
    }
}
