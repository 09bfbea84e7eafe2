//! The catalog: clients see one UUID per collection, every node has its own.
//!
//! It is a memory image of the journal's tables, so that a read finds its way without a round trip. Whoever changes it
//! commits to the journal first. A collection's *generation* is one life of a name: deleting and creating a name again
//! makes a new generation with a new UUID, and nothing of the old one is ever applied to it (design.md 8, R4).

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use chrono::{DateTime, Utc};
use parking_lot::RwLock;
use uuid::Uuid;

use crate::chroma::Generation;
use crate::cluster::NodeIndex;
use crate::journal::{CollectionRecord, DatabaseRecord};
use crate::lane::{Lane, Pair, Shared};
use crate::mirror::QueuedWrite;

/// The id of a database that nobody has been shown yet: that of the node that is asked first will be it.
pub const UNSETTLED: Uuid = Uuid::max();

/// Of so many deleted collections that no row speaks of the UUIDs stay known. Some applications make collections for a
/// moment, and as many as they like.
const MOST_FORGOTTEN: usize = 10_000;

/// What can change about a collection while it lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    pub tenant: String,
    pub database: String,
    pub name: String,
    pub deleted: bool,
    /// Each node's own UUID, by node index.
    pub node_ids: Vec<Option<Uuid>>,
    pub updated_at: DateTime<Utc>,
}

/// One life of a collection.
#[derive(Debug)]
pub struct Collection {
    pub generation: Generation,
    /// The UUID that clients see.
    pub client_id: Uuid,
    pub created_at: DateTime<Utc>,
    facts: ArcSwap<Facts>,
    /// A write with embeddings has succeeded, or a node has told its dimension. Until then a refused write may still
    /// set the dimension on the node that refused it (chroma-facts.md 18.1).
    dimension_known: AtomicBool,
    /// The node whose order of records pages follow, plus one; 0: the nodes have one order.
    pinned: AtomicUsize,
    pub pairs: Vec<Pair>,
    pub lane: Lane<QueuedWrite>,
}

impl Collection {
    pub fn facts(&self) -> Arc<Facts> {
        self.facts.load_full()
    }

    pub fn node_id(&self, node: NodeIndex) -> Option<Uuid> {
        self.facts.load().node_ids.get(node).copied().flatten()
    }

    /// Whether the node holds all of it, alone or together with its log.
    pub(crate) fn is_whole_on(&self, node: NodeIndex) -> bool {
        self.node_id(node).is_some() && self.pairs[node].completes_by_drain()
    }

    pub fn is_deleted(&self) -> bool {
        self.facts.load().deleted
    }

    /// Whether the node can serve this collection, if it is up.
    pub fn in_sync(&self, node: NodeIndex) -> bool {
        self.pairs[node].in_sync() && self.node_id(node).is_some()
    }

    pub fn dimension_known(&self) -> bool {
        self.dimension_known.load(Ordering::SeqCst)
    }

    pub fn set_dimension_known(&self) {
        self.dimension_known.store(true, Ordering::SeqCst);
    }

    /// The node that pages are read from, where the nodes may differ in the order of records (schedule S28).
    pub fn pinned(&self) -> Option<NodeIndex> {
        self.pinned.load(Ordering::SeqCst).checked_sub(1)
    }

    pub fn pin(&self, node: NodeIndex) {
        self.pinned.store(node + 1, Ordering::SeqCst);
    }

    pub fn unpin(&self) {
        self.pinned.store(0, Ordering::SeqCst);
    }

    /// The record as it stands in the journal, without node ids.
    pub fn record(&self) -> CollectionRecord {
        let facts = self.facts();
        CollectionRecord {
            generation: self.generation,
            client_id: self.client_id,
            tenant: facts.tenant.clone(),
            database: facts.database.clone(),
            name: facts.name.clone(),
            deleted: facts.deleted,
            node_ids: BTreeMap::new(),
            created_at: self.created_at,
            updated_at: facts.updated_at,
        }
    }
}

#[derive(Debug, Default)]
struct Index {
    by_generation: BTreeMap<Generation, Arc<Collection>>,
    /// Living collections by tenant, database and name.
    by_name: BTreeMap<(String, String), BTreeMap<String, Arc<Collection>>>,
    /// Deleted ones that are only found by their UUIDs, oldest first.
    forgotten: VecDeque<Arc<Collection>>,
    databases: BTreeMap<(String, String), Uuid>,
    tenants: BTreeSet<String>,
}

/// Collections by every UUID they have: the clients' and each node's. Every read of records looks here, so it takes no
/// lock. A change copies the shard it is in.
#[derive(Debug)]
struct ById(Vec<ArcSwap<HashMap<Uuid, Arc<Collection>>>>);

impl ById {
    fn new() -> Self {
        Self((0..=u8::MAX).map(|_| ArcSwap::default()).collect())
    }

    /// The last byte of a UUID is random in all versions that servers make.
    fn shard(&self, id: &Uuid) -> &ArcSwap<HashMap<Uuid, Arc<Collection>>> {
        &self.0[usize::from(id.as_bytes()[15])]
    }

    fn get(&self, id: &Uuid) -> Option<Arc<Collection>> {
        self.shard(id).load().get(id).cloned()
    }

    fn insert(&self, id: Uuid, collection: &Arc<Collection>) {
        self.shard(&id).rcu(|shard| {
            let mut shard = HashMap::clone(shard);
            shard.insert(id, collection.clone());
            shard
        });
    }

    fn remove(&self, id: &Uuid) {
        self.shard(id).rcu(|shard| {
            let mut shard = HashMap::clone(shard);
            shard.remove(id);
            shard
        });
    }
}

/// All collections and databases that Diptych knows.
#[derive(Debug)]
pub struct Catalog {
    index: RwLock<Index>,
    /// Changed under the lock of `index` only.
    by_id: ById,
    nodes: Vec<String>,
    lanes: Arc<Shared>,
}

impl Catalog {
    /// `nodes` are the nodes' names in configured order; `lanes` bounds what waits.
    pub fn new(nodes: Vec<String>, lanes: Arc<Shared>) -> Self {
        Self {
            index: RwLock::default(),
            by_id: ById::new(),
            nodes,
            lanes,
        }
    }

    /// By any UUID: the one clients see, or any node's own.
    pub fn by_id(&self, id: Uuid) -> Option<Arc<Collection>> {
        self.by_id.get(&id)
    }

    pub fn by_name(&self, tenant: &str, database: &str, name: &str) -> Option<Arc<Collection>> {
        let key = (tenant.to_owned(), database.to_owned());
        self.index
            .read()
            .by_name
            .get(&key)
            .and_then(|names| names.get(name))
            .cloned()
    }

    pub fn by_generation(&self, generation: Generation) -> Option<Arc<Collection>> {
        self.index.read().by_generation.get(&generation).cloned()
    }

    /// Living collections of a database, by name.
    pub fn in_database(&self, tenant: &str, database: &str) -> Vec<Arc<Collection>> {
        let key = (tenant.to_owned(), database.to_owned());
        self.index
            .read()
            .by_name
            .get(&key)
            .map(|names| names.values().cloned().collect())
            .unwrap_or_default()
    }

    /// All that are known, also deleted ones that rows still speak of; by generation.
    pub fn all(&self) -> Vec<Arc<Collection>> {
        self.index.read().by_generation.values().cloned().collect()
    }

    /// The id that clients see, once one of them has seen it.
    pub fn database_id(&self, tenant: &str, name: &str) -> Option<Uuid> {
        self.index
            .read()
            .databases
            .get(&(tenant.to_owned(), name.to_owned()))
            .copied()
            .filter(|&id| id != UNSETTLED)
    }

    /// Whether a database is recorded: somebody was told of it.
    pub fn has_database(&self, tenant: &str, name: &str) -> bool {
        let key = (tenant.to_owned(), name.to_owned());
        self.index.read().databases.contains_key(&key)
    }

    /// Tenants and databases that Diptych has seen.
    pub fn known_databases(&self) -> Vec<(String, String)> {
        let index = self.index.read();
        let mut known: Vec<_> = index.by_name.keys().chain(index.databases.keys()).cloned().collect();
        known.sort();
        known.dedup();
        known
    }

    /// Tenants that somebody was told of, with databases or without.
    pub fn tenants(&self) -> BTreeSet<String> {
        self.index.read().tenants.clone()
    }

    pub fn put_tenant(&self, name: &str) {
        self.index.write().tenants.insert(name.to_owned());
    }

    pub fn put_database(&self, record: DatabaseRecord) {
        self.index
            .write()
            .databases
            .insert((record.tenant, record.name), record.client_id);
    }

    pub fn remove_database(&self, tenant: &str, name: &str) {
        self.index
            .write()
            .databases
            .remove(&(tenant.to_owned(), name.to_owned()));
    }

    /// Makes a collection known; the journal has it already.
    pub fn insert(&self, record: CollectionRecord) -> Arc<Collection> {
        let node_ids = self
            .nodes
            .iter()
            .map(|node| record.node_ids.get(node).copied())
            .collect();
        let facts = Facts {
            tenant: record.tenant,
            database: record.database,
            name: record.name,
            deleted: record.deleted,
            node_ids,
            updated_at: record.updated_at,
        };
        let collection = Arc::new(Collection {
            generation: record.generation,
            client_id: record.client_id,
            created_at: record.created_at,
            facts: ArcSwap::from_pointee(facts.clone()),
            dimension_known: AtomicBool::new(false),
            pinned: AtomicUsize::new(0),
            pairs: self.nodes.iter().map(|_| Pair::default()).collect(),
            lane: Lane::new(self.lanes.clone()),
        });
        let mut index = self.index.write();
        index.by_generation.insert(record.generation, collection.clone());
        self.by_id.insert(record.client_id, &collection);
        for id in facts.node_ids.iter().flatten() {
            self.by_id.insert(*id, &collection);
        }
        if !facts.deleted {
            index
                .by_name
                .entry((facts.tenant, facts.database))
                .or_default()
                .insert(facts.name, collection.clone());
        }
        collection
    }

    /// Sets one node's UUID of a collection; the journal has it already.
    pub fn set_node_id(&self, collection: &Arc<Collection>, node: NodeIndex, id: Uuid) {
        let _index = self.index.write();
        let mut facts = Facts::clone(&collection.facts.load());
        facts.node_ids[node] = Some(id);
        collection.facts.store(Arc::new(facts));
        self.by_id.insert(id, collection);
    }

    /// The node is not the server that had these UUIDs; the journal has forgotten them already.
    pub fn forget_node_ids(&self, node: NodeIndex) {
        let index = self.index.write();
        let collections = index.by_generation.values();
        for collection in collections {
            let mut facts = Facts::clone(&collection.facts.load());
            if let Some(id) = facts.node_ids[node].take() {
                if id != collection.client_id {
                    self.by_id.remove(&id);
                }
                collection.facts.store(Arc::new(facts));
            }
        }
    }

    pub fn rename(&self, collection: &Arc<Collection>, name: &str, at: DateTime<Utc>) {
        let mut index = self.index.write();
        let mut facts = Facts::clone(&collection.facts.load());
        let names = index
            .by_name
            .entry((facts.tenant.clone(), facts.database.clone()))
            .or_default();
        if names
            .get(&facts.name)
            .is_some_and(|other| other.generation == collection.generation)
        {
            names.remove(&facts.name);
        }
        names.insert(name.to_owned(), collection.clone());
        facts.name = name.to_owned();
        facts.updated_at = at;
        collection.facts.store(Arc::new(facts));
    }

    /// The collection is gone; its UUIDs stay known as those of a deleted one.
    pub fn set_deleted(&self, collection: &Arc<Collection>, at: DateTime<Utc>) {
        let mut index = self.index.write();
        let mut facts = Facts::clone(&collection.facts.load());
        if let Some(names) = index.by_name.get_mut(&(facts.tenant.clone(), facts.database.clone()))
            && names
                .get(&facts.name)
                .is_some_and(|other| other.generation == collection.generation)
        {
            names.remove(&facts.name);
        }
        facts.deleted = true;
        facts.updated_at = at;
        collection.facts.store(Arc::new(facts));
        for pair in &collection.pairs {
            pair.clear_rows();
        }
    }

    /// No row speaks of this deleted collection any more. Its UUIDs stay known as those of a deleted one, until very many
    /// others were deleted: the journal has them too, until the next start.
    pub fn forget(&self, collection: &Arc<Collection>) {
        let mut index = self.index.write();
        if index.by_generation.remove(&collection.generation).is_none() {
            return;
        }
        index.forgotten.push_back(collection.clone());
        if index.forgotten.len() > MOST_FORGOTTEN
            && let Some(oldest) = index.forgotten.pop_front()
        {
            let node_ids = oldest.facts().node_ids.clone();
            for id in node_ids.into_iter().flatten().chain([oldest.client_id]) {
                let is_its = |known: &Arc<Collection>| known.generation == oldest.generation;
                if self.by_id.get(&id).as_ref().is_some_and(is_its) {
                    self.by_id.remove(&id);
                }
            }
        }
    }

    /// Everything is gone (`reset`); the UUIDs stay known as those of deleted collections.
    pub fn clear(&self, at: DateTime<Utc>) {
        for collection in self.all() {
            self.set_deleted(&collection, at);
        }
        let mut index = self.index.write();
        index.by_name.clear();
        index.databases.clear();
        index.tenants.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lane::Limits;

    #[test]
    fn of_very_many_deleted_collections_the_last_stay_known() {
        let catalog = Catalog::new(vec!["a".to_owned(), "b".to_owned()], Shared::new(Limits::default()));
        let id = |generation: usize, node: u128| Uuid::from_u128(node << 64 | generation as u128);
        let deleted = MOST_FORGOTTEN + 5;
        for generation in 0..=deleted {
            let record = CollectionRecord {
                generation: generation as Generation,
                client_id: id(generation, 1),
                tenant: "t".to_owned(),
                database: "d".to_owned(),
                name: "c".to_owned(),
                deleted: false,
                node_ids: [("a", 1), ("b", 2)]
                    .map(|(node, number)| (node.to_owned(), id(generation, number)))
                    .into(),
                created_at: DateTime::UNIX_EPOCH,
                updated_at: DateTime::UNIX_EPOCH,
            };
            let collection = catalog.insert(record);
            if generation < deleted {
                catalog.set_deleted(&collection, DateTime::UNIX_EPOCH);
                catalog.forget(&collection);
                catalog.forget(&collection);
            }
        }
        let known = |generation, node| catalog.by_id(id(generation, node)).map(|found| found.is_deleted());
        for node in [1, 2] {
            assert_eq!((known(0, node), known(4, node)), (None, None));
            assert_eq!((known(5, node), known(deleted - 1, node)), (Some(true), Some(true)));
            assert_eq!(known(deleted, node), Some(false), "it lives");
        }
        let ids: usize = catalog.by_id.0.iter().map(|shard| shard.load().len()).sum();
        assert_eq!(ids, 2 * (MOST_FORGOTTEN + 1));
    }
}
