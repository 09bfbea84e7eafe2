//! Collections that existed before Diptych, and nodes that lost one.
//!
//! What the catalog does not know is looked up on the nodes: by UUID, then by name on the others, and registered under
//! the namespace lane so that no create or delete slips in between. The first node in configured order that has the
//! collection serves it, and its UUID is the one clients see. The others are never assumed to be equal: they get a
//! repair row, to be copied or compared (design.md 5, "fresh journal beside nodes that hold data").

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::admit::{RESTORED, WIPED};
use super::{Answer, Core, RepairWanted, Scope};
use crate::catalog::Collection;
use crate::chroma::{CollectionObject, Generation, node_path, parse_collection_list, parse_collection_object};
use crate::cluster::{NodeIndex, NodeRequest, NodeResponse};
use crate::journal::{Change, CollectionRecord, Commit, DatabaseRecord, RepairKind, RepairRow};
use crate::repair::jobs::ASKED;

/// What one node has under a name: `None` if it was not asked or gave no answer.
type Sighting = Option<Option<CollectionObject>>;

const PAGE: usize = 1000;

/// After a survey that could not look at everything.
const SURVEY_PAUSE: Duration = Duration::from_secs(1);

/// How many collections are registered by one commit.
const PART: usize = 200;

/// In how many databases beside the one in its path an unknown UUID is looked for.
const OTHER_PLACES: usize = 32;

/// What makes a collection that turned up on a node the copy of a known one.
#[derive(Debug)]
pub(crate) struct Adoption {
    pub changes: Commit,
    /// It holds data that nobody knows: it is compared, and not copied over.
    pub compared: bool,
}

/// Whether the row says that what the node holds does not count.
fn may_overwrite(row: &RepairRow) -> bool {
    row.reason == WIPED || row.reason == ASKED || row.reason.starts_with(RESTORED)
}

impl Core {
    /// The collection that a UUID in a path means: the client's id or any node's own.
    ///
    /// # Errors
    /// 503 when it cannot be told at the moment.
    pub async fn find_by_id(
        self: &Arc<Self>,
        tenant: &str,
        database: &str,
        id: Uuid,
    ) -> Result<Option<Arc<Collection>>, Answer> {
        if let Some(collection) = self.catalog.by_id(id) {
            return Ok((!collection.is_deleted()).then_some(collection));
        }
        // Record routes ignore tenant and database (chroma-facts.md 2): one question tells whether a node has it at all,
        // and most that are asked for here are nowhere.
        let (mut answered, mut silent) = (false, false);
        let mut may_have_it = vec![];
        for node in self.namespace_nodes() {
            let request = NodeRequest::get(node_path::record(tenant, database, id, "count"));
            match self.bounded_read(node, request).await {
                Some(response) if response.status == 404 => answered = true,
                Some(_) => may_have_it.push(node),
                None => silent |= self.cluster.node(node).is_up(),
            }
        }
        let mut places = vec![(tenant.to_owned(), database.to_owned())];
        let others = self.catalog.known_databases().into_iter();
        places.extend(
            others
                .filter(|(t, d)| t.as_str() != tenant || d.as_str() != database)
                .take(OTHER_PLACES),
        );
        for (tenant, database) in places {
            for &node in &may_have_it {
                let request = NodeRequest::get(node_path::by_id(&tenant, &database, id));
                let Some(response) = self.bounded_read(node, request).await else {
                    silent |= self.cluster.node(node).is_up();
                    continue;
                };
                answered |= response.status < 500;
                let Some(object) = parse_collection_object(&response.body).filter(|_| response.is_success()) else {
                    continue;
                };
                let _alone = self.exclusive_namespace().await;
                let found = self.register_name(&tenant, &database, &object.name).await?;
                if let Some(found) = found.filter(|found| found.node_id(node).is_none() && self.catalog_can_change()) {
                    // Known, but not that this node has it: it was not asked at the time, and has a repair row.
                    let adopted = self.adoption(found.generation, (&tenant, &database), node, id).await;
                    let Some(Adoption { changes, .. }) = adopted else {
                        return Err(Answer::unavailable("No node could be asked for this collection."));
                    };
                    self.commit_or_retry(&Scope::Namespace, vec![node], changes).await;
                }
                return Ok(self.catalog.by_id(id).filter(|collection| !collection.is_deleted()));
            }
        }
        // One that is up and gave no answer may have it.
        if answered && !silent {
            Ok(None)
        } else {
            Err(Answer::unavailable("No node could be asked for this collection."))
        }
    }

    /// The collection with this name.
    ///
    /// # Errors
    /// 503 when it cannot be told at the moment.
    pub async fn find_by_name(
        self: &Arc<Self>,
        tenant: &str,
        database: &str,
        name: &str,
    ) -> Result<Option<Arc<Collection>>, Answer> {
        if let Some(collection) = self.catalog.by_name(tenant, database, name) {
            return Ok(Some(collection));
        }
        if self.look_up(tenant, database, name).await?.is_none() {
            return Ok(None);
        }
        let _alone = self.exclusive_namespace().await;
        self.register_name(tenant, database, name).await
    }

    /// Looks a name up on the nodes and registers what is there. The caller holds the namespace lane.
    pub(super) async fn register_name(
        self: &Arc<Self>,
        tenant: &str,
        database: &str,
        name: &str,
    ) -> Result<Option<Arc<Collection>>, Answer> {
        if let Some(collection) = self.catalog.by_name(tenant, database, name) {
            return Ok(Some(collection));
        }
        let Some(sightings) = self.look_up(tenant, database, name).await? else {
            return Ok(None);
        };
        let found = BTreeMap::from([(name.to_owned(), sightings)]);
        self.register(tenant, database, found).await?;
        Ok(self.catalog.by_name(tenant, database, name))
    }

    /// What each node has under a name; `None`: it is certain that no node that is up has it.
    async fn look_up(
        self: &Arc<Self>,
        tenant: &str,
        database: &str,
        name: &str,
    ) -> Result<Option<Vec<Sighting>>, Answer> {
        let asked = self.namespace_nodes();
        let mut sightings: Vec<Sighting> = vec![None; self.cluster.len()];
        for &node in &asked {
            let path = node_path::by_name(tenant, database, name);
            let Some(response) = self.bounded_read(node, NodeRequest::get(path)).await else {
                continue;
            };
            if response.is_success() {
                sightings[node] = parse_collection_object(&response.body).map(Some);
            } else if response.status < 500 {
                sightings[node] = Some(None);
            }
        }
        if sightings.iter().all(Option::is_none) {
            return Err(Answer::unavailable("No node could be asked for this collection."));
        }
        if sightings.iter().flatten().all(Option::is_none) {
            // One that gave no answer may have it: then its absence cannot be told. One that is down by now is like one
            // that was down before.
            let told = |&node: &NodeIndex| sightings[node].is_some() || !self.cluster.node(node).is_up();
            return match asked.iter().all(told) {
                true => Ok(None),
                false => Err(Answer::unavailable("A node could not be asked for this collection.")),
            };
        }
        Ok(Some(sightings))
    }

    /// Registers every collection of a database that the catalog does not know. The caller holds the namespace lane.
    pub async fn register_database(self: &Arc<Self>, tenant: &str, database: &str) -> Result<(), Answer> {
        let mut found: BTreeMap<String, Vec<Sighting>> = BTreeMap::new();
        let mut silent = Vec::new();
        let mut asked = Vec::new();
        for node in self.namespace_nodes() {
            match self.list_on_node(node, tenant, database).await {
                Some(objects) => {
                    asked.push(node);
                    for object in objects {
                        let sightings = found
                            .entry(object.name.clone())
                            .or_insert_with(|| vec![None; self.cluster.len()]);
                        sightings[node] = Some(Some(object));
                    }
                }
                None => silent.push(node),
            }
        }
        if asked.is_empty() && !silent.is_empty() {
            return Err(Answer::unavailable("No node could be asked for its collections."));
        }
        self.learn_aliases(tenant, database, &found).await;
        found.retain(|name, _| self.catalog.by_name(tenant, database, name).is_none());
        for sightings in found.values_mut() {
            for &node in &asked {
                sightings[node].get_or_insert(None);
            }
        }
        while !found.is_empty() {
            // One commit for each part: it has a deadline.
            let rest = match found.keys().nth(PART).cloned() {
                Some(key) => found.split_off(&key),
                None => BTreeMap::new(),
            };
            self.register(tenant, database, std::mem::replace(&mut found, rest))
                .await?;
        }
        Ok(())
    }

    /// A node that was not asked when a collection was registered turns out to have one of that name: its UUID becomes an
    /// alias, so that a delete or a rename reaches it. It has a repair row already.
    async fn learn_aliases(self: &Arc<Self>, tenant: &str, database: &str, found: &BTreeMap<String, Vec<Sighting>>) {
        let mut changes: Commit = vec![];
        for (name, sightings) in found {
            let Some(known) = self.catalog.by_name(tenant, database, name) else {
                continue;
            };
            for (node, sighting) in sightings.iter().enumerate() {
                if let Some(Some(object)) = sighting
                    && known.node_id(node).is_none()
                    && known.pairs[node].repairs() > 0
                    && self.catalog.by_id(object.id).is_none()
                {
                    let place = (tenant, database);
                    // What cannot be told now is found again.
                    let adopted = self.adoption(known.generation, place, node, object.id).await;
                    changes.extend(adopted.into_iter().flat_map(|adoption| adoption.changes));
                }
            }
        }
        if self.catalog_can_change() {
            self.commit_or_retry(&Scope::Namespace, vec![], changes).await;
        }
    }

    /// A collection with the name of a known one turned up on a node that nobody had asked, or that gave no answer. What
    /// it holds may have been acked (S8): unless it is empty, or the node is known to have lost what it had, it is
    /// compared, and nothing is copied over it. `None`: it cannot be told now. The caller holds the namespace lane, and
    /// the node had no UUID for the collection: no copy has begun to write.
    pub(crate) async fn adoption(
        self: &Arc<Self>,
        generation: Generation,
        (tenant, database): (&str, &str),
        node: NodeIndex,
        id: Uuid,
    ) -> Option<Adoption> {
        let name = &self.cluster.node(node).name;
        let its_id = self.node_id_change(generation, node, id);
        let mut copies = self.repairs.lock().clone();
        copies.retain(|row| row.generation == Some(generation) && row.node == *name && row.kind.holds_rows());
        if copies.iter().any(may_overwrite) || self.is_empty(node, tenant, database, id).await? {
            let changes = vec![its_id];
            return Some(Adoption {
                changes,
                compared: false,
            });
        }
        let source = copies
            .iter()
            .find_map(|row| self.cluster.index_of(row.source.as_ref()?));
        let wanted = RepairWanted {
            kind: RepairKind::Verify,
            source,
            ..RepairWanted::whole(self.log.next_lsn(), "a collection of this name was there already")
        };
        let changes = vec![
            Change::InsertRepair(self.new_repair(node, Some(generation), wanted)),
            Change::RemoveRepairs(copies.iter().map(|row| row.id).collect()),
            its_id,
        ];
        Some(Adoption {
            changes,
            compared: true,
        })
    }

    /// Whether a node's collection has no record, hidden ones included (S15).
    async fn is_empty(self: &Arc<Self>, node: NodeIndex, tenant: &str, database: &str, id: Uuid) -> Option<bool> {
        if !self.reveal(node, tenant, database, id).await {
            return None;
        }
        let path = node_path::record(tenant, database, id, "count");
        let response = self.bounded_read(node, NodeRequest::get(path)).await?;
        response.is_success().then(|| response.body.as_ref() == b"0")
    }

    /// [`Core::register_database`] for those who do not hold the namespace lane.
    pub async fn learn_database(self: &Arc<Self>, tenant: &str, database: &str) -> Result<(), Answer> {
        let _alone = self.exclusive_namespace().await;
        self.register_database(tenant, database).await
    }

    /// All collections of a database on one node.
    async fn list_on_node(
        self: &Arc<Self>,
        node: NodeIndex,
        tenant: &str,
        database: &str,
    ) -> Option<Vec<CollectionObject>> {
        let pages = self.collection_pages(node, tenant, database).await?;
        Some(pages.into_iter().flat_map(|(_, objects)| objects).collect())
    }

    /// All collections of a database on one node, page by page, as it gave them and as they read.
    pub async fn collection_pages(
        self: &Arc<Self>,
        node: NodeIndex,
        tenant: &str,
        database: &str,
    ) -> Option<Vec<(NodeResponse, Vec<CollectionObject>)>> {
        let mut pages = Vec::new();
        let mut offset = 0;
        loop {
            let path = format!(
                "{}?limit={PAGE}&offset={offset}",
                node_path::collections(tenant, database)
            );
            let response = self.bounded_read(node, NodeRequest::get(path)).await?;
            let objects = parse_collection_list(&response.body).filter(|_| response.is_success())?;
            let count = objects.len();
            pages.push((response, objects));
            if count < PAGE {
                return Some(pages);
            }
            offset += count;
        }
    }

    /// Registers a collection that one node alone has, and that it was not asked about when others were: it was not in
    /// step with the namespace. The caller holds the namespace lane.
    pub(crate) async fn register_found(
        self: &Arc<Self>,
        node: NodeIndex,
        tenant: &str,
        database: &str,
        object: CollectionObject,
    ) -> Result<(), Answer> {
        let name = object.name.clone();
        let mut sightings: Vec<Sighting> = vec![None; self.cluster.len()];
        sightings[node] = Some(Some(object));
        self.register(tenant, database, BTreeMap::from([(name, sightings)]))
            .await
    }

    /// Registers collections by what the nodes have under their names.
    async fn register(
        self: &Arc<Self>,
        tenant: &str,
        database: &str,
        found: BTreeMap<String, Vec<Sighting>>,
    ) -> Result<(), Answer> {
        if !self.catalog_can_change() {
            return Err(Answer::unavailable(
                "The log does not answer: a collection new to this proxy cannot be kept.",
            ));
        }
        let mut changes: Commit = vec![];
        let mut known_dimensions = vec![];
        for (name, sightings) in found {
            let has = |node: NodeIndex| sightings[node].as_ref().and_then(Option::as_ref);
            let Some(lead) = (0..sightings.len()).find(|&node| has(node).is_some()) else {
                continue;
            };
            let Some(object) = has(lead) else { continue };
            // Never two generations for one UUID: a node told us of a collection that the catalog has elsewhere.
            if self.catalog.by_id(object.id).is_some() {
                continue;
            }
            let generation = self.log.next_lsn();
            if object.dimension.is_some() {
                known_dimensions.push(generation);
            }
            changes.push(Change::PutCollection(
                self.new_record(generation, object.id, tenant, database, &name),
            ));
            // Repair rows before node ids: without an id a node serves nothing, so it never seems to be in sync.
            for node in (0..sightings.len()).filter(|&node| node != lead) {
                let (kind, reason) = match has(node) {
                    Some(_) => (RepairKind::Verify, "found on both nodes, not compared yet"),
                    None => (RepairKind::Whole, "found on another node only"),
                };
                let wanted = RepairWanted {
                    kind,
                    source: Some(lead),
                    ..RepairWanted::whole(self.log.next_lsn(), reason)
                };
                changes.push(Change::InsertRepair(self.new_repair(node, Some(generation), wanted)));
            }
            for node in 0..sightings.len() {
                if let Some(object) = has(node) {
                    changes.push(self.node_id_change(generation, node, object.id));
                }
            }
        }
        if !self.commit_or_retry(&Scope::Namespace, vec![], changes).await {
            return Err(Answer::unavailable(
                "The log does not answer: a collection new to this proxy cannot be kept.",
            ));
        }
        for generation in known_dimensions {
            if let Some(collection) = self.catalog.by_generation(generation) {
                collection.set_dimension_known();
            }
        }
        Ok(())
    }

    /// Sets one node's UUID of a collection.
    pub(crate) fn node_id_change(&self, generation: Generation, node: NodeIndex, id: Uuid) -> Change {
        let node = self.cluster.node(node).name.clone();
        Change::PutNodeId { generation, node, id }
    }

    /// A collection's record as it is first written.
    pub(crate) fn new_record(
        &self,
        generation: Generation,
        client_id: Uuid,
        tenant: &str,
        database: &str,
        name: &str,
    ) -> CollectionRecord {
        let at = self.env.wall();
        CollectionRecord {
            generation,
            client_id,
            tenant: tenant.to_owned(),
            database: database.to_owned(),
            name: name.to_owned(),
            deleted: false,
            node_ids: BTreeMap::new(),
            created_at: at,
            updated_at: at,
        }
    }

    /// Looks around when a node is up for the first time since the start: what do the nodes hold that the catalog does
    /// not know?
    pub async fn survey(self: &Arc<Self>) {
        let nodes = self.namespace_nodes();
        let mut whole = true;
        let mut places = self.catalog.known_databases();
        places.extend(self.settings.databases.iter().cloned());
        for tenant in &self.settings.tenants {
            for node in self.namespace_nodes() {
                let Some(response) = self
                    .bounded_read(node, NodeRequest::get(node_path::databases(tenant)))
                    .await
                else {
                    continue;
                };
                let names = crate::chroma::parse_names(&response.body).unwrap_or_default();
                places.extend(names.into_iter().map(|name| (tenant.clone(), name)));
            }
        }
        places.sort();
        places.dedup();
        for (tenant, database) in places {
            let _alone = self.exclusive_namespace().await;
            // A database that one node alone has, full or empty, is nobody's mistake: the others get it.
            crate::repair::level_databases(self, &self.namespace_nodes(), &tenant, &database).await;
            if self.register_database(&tenant, &database).await.is_err() {
                whole = false;
                tracing::warn!(tenant, database, "Could not look at all collections of a database.");
            }
        }
        for node in nodes.into_iter().filter(|_| whole) {
            self.cluster.node(node).set_surveyed();
        }
    }

    /// The id that clients see for a database: that of the node that was asked first.
    pub async fn database_id(self: &Arc<Self>, tenant: &str, name: &str, seen: Uuid) -> Uuid {
        if let Some(id) = self.catalog.database_id(tenant, name) {
            return id;
        }
        let _one_at_a_time = self.settling.lock().await;
        if let Some(id) = self.catalog.database_id(tenant, name) {
            return id;
        }
        let record = DatabaseRecord {
            tenant: tenant.to_owned(),
            name: name.to_owned(),
            client_id: seen,
        };
        if self.catalog_can_change() {
            self.commit_or_retry(&Scope::Namespace, vec![], vec![Change::PutDatabase(record)])
                .await;
        }
        self.catalog.database_id(tenant, name).unwrap_or(seen)
    }

    /// A node answered 404 for a collection that the catalog says it has. Checked between two writes of the lane; if
    /// it is so, the node is out for this collection.
    pub fn report_missing(self: &Arc<Self>, collection: &Arc<Collection>, node: NodeIndex) {
        let key = (collection.generation, node);
        if !self.missing_checks.lock().insert(key) {
            return;
        }
        let (core, collection) = (self.clone(), collection.clone());
        self.spawn_job(async move {
            let _alone = core.exclusive(&collection).await;
            let lost = match collection.node_id(node) {
                Some(id) if !collection.is_deleted() && collection.in_sync(node) => {
                    let facts = collection.facts();
                    let path = node_path::by_id(&facts.tenant, &facts.database, id);
                    core.bounded_read(node, NodeRequest::get(path))
                        .await
                        .is_some_and(|answer| answer.status == 404)
                }
                _ => false,
            };
            let elsewhere =
                (0..core.cluster.len()).any(|other| other != node && collection.pairs[other].completes_by_drain());
            if lost && elsewhere {
                let scope = Scope::Collection(collection.clone());
                let wanted = RepairWanted::whole(core.log.next_lsn(), "the node has lost the collection");
                let row = core.repair_row(&scope, node, wanted);
                core.commit_or_retry(&scope, vec![node], vec![row]).await;
            }
            core.missing_checks.lock().remove(&key);
        });
    }
}

/// Looks around whenever a node can be looked at for the first time since the start, for as long as the process lives.
pub async fn keep_surveyed(core: Arc<Core>) {
    let mut changes = core.cluster.watch_changes();
    loop {
        changes.mark_unchanged();
        // One that is not in step with the names is looked at when it is.
        let nodes = core.namespace_nodes();
        let new = nodes.iter().any(|&node| !core.cluster.node(node).is_surveyed());
        if core.cluster.is_settled() && new {
            core.survey().await;
            core.env.sleep(SURVEY_PAUSE).await;
        } else if changes.changed().await.is_err() {
            return;
        }
    }
}
