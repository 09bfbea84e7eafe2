//! After a crash: what became of the entries that were under way when the last writer ended?
//!
//! Their intents are in the log, above the low-water mark. Nothing is replayed (rule R4, schedule S1). For records, the
//! first node that can serve the collection again is flushed (Chroma hides what it committed for a client that hung up,
//! schedule S15), and one commit makes it the source: the records in question are made equal to it on every other node
//! (schedule S14). Until then nobody serves that collection; all others are served. For names, the first node that can
//! serve the namespace says what there is: the catalog follows it, and so do the other nodes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::cover::RepairWanted;
use super::{Core, Scope};
use bytes::Bytes;

use crate::catalog::Collection;
use crate::chroma::{DeleteBody, Generation, Op, node_path, parse_collection_object};
use crate::cluster::{NodeIndex, NodeRequest};
use crate::fault;
use crate::journal::{Change, Commit, Intent, Lsn, PayloadRow, RepairKind};

const TICK: Duration = Duration::from_secs(1);
/// Between two tries that came to nothing.
const PAUSE: Duration = Duration::from_millis(100);
/// The names wait so long for a node that may have done a delete and is not up yet.
const PATIENCE: Duration = Duration::from_secs(30);
/// More records than these of one collection are not listed: all of it is made equal.
const MOST_IDS: usize = 100_000;

/// Entries of one lane whose outcome is not known.
#[derive(Debug, Default)]
pub(super) struct InDoubt {
    lsns: Vec<Lsn>,
    ids: BTreeSet<String>,
    /// Too many to list, or nobody knows which.
    all: bool,
    /// Of the namespace lane, in order.
    ops: Vec<Op>,
    /// When this process learned of them.
    since: Duration,
}

/// What came of asking a node what became of names.
enum Told {
    Committed,
    /// It did not say.
    Nothing,
    /// The journal did not take it, as far as is known.
    NotCommitted,
}

impl InDoubt {
    fn add(&mut self, ids: &[String]) {
        if self.ids.len() + ids.len() > MOST_IDS {
            self.all = true;
            self.ids.clear();
        }
        if !self.all {
            self.ids.extend(ids.iter().cloned());
        }
    }
}

/// What a node has under a collection's UUID.
enum Found {
    Name(String),
    Nothing,
    /// It did not say.
    Silence,
}

impl Core {
    /// Keeps what was under way from being served, and the low-water mark below it.
    pub(super) fn remember_in_doubt(&self, intents: Vec<Intent>) {
        let mut in_doubt = self.in_doubt.lock();
        for intent in intents {
            let scope = match intent.generation {
                None => Scope::Namespace,
                Some(generation) => match self.catalog.by_generation(generation) {
                    Some(collection) if !collection.is_deleted() => Scope::Collection(collection),
                    _ => continue,
                },
            };
            self.log.reopen(intent.lsn);
            scope.pairs(self).iter().for_each(|pair| pair.set_recovering(true));
            let lane = in_doubt.entry(intent.generation).or_default();
            lane.since = self.env.now();
            lane.lsns.push(intent.lsn);
            lane.add(intent.ids.as_deref().unwrap_or_default());
            if intent.generation.is_none() {
                lane.ops.push(intent.op);
            }
        }
    }

    /// Has the recovery of a collection compare these records as well; `None`: all. False: it is not being recovered.
    pub(super) fn recover_too(&self, generation: Generation, ids: Option<&BTreeSet<String>>) -> bool {
        let mut in_doubt = self.in_doubt.lock();
        let Some(lane) = in_doubt.get_mut(&Some(generation)) else {
            return false;
        };
        match ids {
            Some(ids) => lane.add(&ids.iter().cloned().collect::<Vec<_>>()),
            None => lane.all = true,
        }
        true
    }

    /// Lanes that nobody serves until it is known what became of their last entries.
    pub fn recovering(&self) -> usize {
        self.in_doubt.lock().len()
    }

    /// The first node that could serve the lane.
    fn recovery_source(&self, scope: &Scope) -> Vec<NodeIndex> {
        let mapped = |node: NodeIndex| match scope {
            Scope::Namespace => true,
            Scope::Collection(collection) => collection.node_id(node).is_some(),
        };
        self.cluster
            .up()
            .filter(|&node| scope.pairs(self)[node].settled() && mapped(node))
            .collect()
    }

    fn recovered(&self, scope: &Scope) {
        let Some(lane) = self.in_doubt.lock().remove(&scope.generation()) else {
            return;
        };
        scope.pairs(self).iter().for_each(|pair| pair.set_recovering(false));
        lane.lsns.into_iter().for_each(|lsn| self.log.settle(lsn));
        tracing::info!(generation = scope.generation(), "Recovered a lane after the last stop.");
        self.cluster.announce_change();
    }

    /// False: it was tried, and came to nothing.
    async fn recover_lane(self: &Arc<Self>, generation: Option<Generation>) -> bool {
        match generation.map(|generation| self.catalog.by_generation(generation)) {
            None => self.recover_namespace().await,
            Some(Some(collection)) if !collection.is_deleted() => self.recover_collection(&collection).await,
            Some(_) => {
                if let Some(lane) = self.in_doubt.lock().remove(&generation) {
                    lane.lsns.into_iter().for_each(|lsn| self.log.settle(lsn));
                }
                true
            }
        }
    }

    async fn recover_collection(self: &Arc<Self>, collection: &Arc<Collection>) -> bool {
        let scope = Scope::Collection(collection.clone());
        if self.recovery_source(&scope).is_empty() {
            self.settle_if_covered(&scope);
            return true;
        }
        let _alone = self.exclusive(collection).await;
        let Some(ids) = self
            .in_doubt
            .lock()
            .get(&scope.generation())
            .map(|lane| (!lane.all).then(|| lane.ids.iter().cloned().collect::<Vec<_>>()))
        else {
            return true;
        };
        let sources = self.recovery_source(&scope);
        for &source in &sources {
            if !self.flush(collection, source).await {
                self.suspect_collection(collection, source);
                continue;
            }
            fault::point("recovery-flushed");
            let others = (0..self.cluster.len()).filter(|&node| node != source);
            let rows: Commit = others
                .map(|node| {
                    let wanted = RepairWanted {
                        source: Some(source),
                        reversible: ids.is_some(),
                        ..RepairWanted::records(ids.clone(), self.log.next_lsn(), "under way at the last stop")
                    };
                    Change::InsertRepair(self.new_repair(node, scope.generation(), wanted))
                })
                .collect();
            if self.log.commit_until_known(&rows).await {
                fault::point("recovery-committed");
                self.apply(&rows);
                self.recovered(&scope);
                return true;
            }
            return false;
        }
        sources.is_empty()
    }

    /// The only node that could say what became of the entries is away, and every other one is to be copied from it:
    /// whatever it has then is what all get, so the low-water mark need not wait for it (rule R3).
    fn settle_if_covered(&self, scope: &Scope) {
        if scope.pairs(self).iter().filter(|pair| pair.copies() == 0).count() > 1 {
            return;
        }
        let lsns = self
            .in_doubt
            .lock()
            .get_mut(&scope.generation())
            .map(|lane| std::mem::take(&mut lane.lsns));
        lsns.into_iter().flatten().for_each(|lsn| self.log.settle(lsn));
    }

    /// Makes visible what a node has committed and hides: a harmless write does (chroma-facts.md 3.4).
    pub(crate) async fn flush(self: &Arc<Self>, collection: &Collection, node: NodeIndex) -> bool {
        let Some(id) = collection.node_id(node) else {
            return false;
        };
        let facts = collection.facts();
        self.reveal(node, &facts.tenant, &facts.database, id).await
    }

    /// [`Core::flush`] by the node's own UUID, for a collection that is not known to be its copy.
    pub(super) async fn reveal(self: &Arc<Self>, node: NodeIndex, tenant: &str, database: &str, id: Uuid) -> bool {
        let path = node_path::record(tenant, database, id, "delete");
        let body = DeleteBody::delete_ids_body(&[self.env.new_id().to_string()]);
        self.bounded_read(node, NodeRequest::post(path, body))
            .await
            .is_some_and(|answer| answer.is_success())
    }

    async fn recover_namespace(self: &Arc<Self>) -> bool {
        let Some(_alone) = self.exclusive_namespace().await else {
            return true;
        };
        let lane = self
            .in_doubt
            .lock()
            .get(&None)
            .map(|lane| (lane.ops.clone(), lane.since));
        let Some((ops, since)) = lane else {
            return true;
        };
        if self.recovery_source(&Scope::Namespace).is_empty() {
            return true;
        }
        // Who holds all of what was being changed is asked first: what it has lost nobody could give back.
        let changed = self.changed_by(&ops);
        // What is found of them is decided on between two of their writes, like everything else that asks for repairs.
        let mut barriers = Vec::with_capacity(changed.len());
        for collection in &changed {
            barriers.push(self.exclusive(collection).await);
        }
        let mut sources = self.recovery_source(&Scope::Namespace);
        sources.sort_by_key(|&node| changed.iter().filter(|one| !one.is_whole_on(node)).count());
        for (position, &source) in sources.iter().enumerate() {
            let is_patient = self.env.now().saturating_sub(since) < PATIENCE;
            if is_patient && !self.all_are_told(&sources[position..], &ops) {
                return false;
            }
            match self.recover_namespace_from(source, &ops).await {
                Told::Committed => return true,
                Told::Nothing => {}
                // It may have been written all the same: what another node says would contradict it.
                Told::NotCommitted => return false,
            }
        }
        false
    }

    /// Whether of each collection that was being deleted a node is there that holds all of it, if there is one at all.
    fn all_are_told(&self, ready: &[NodeIndex], ops: &[Op]) -> bool {
        let deleted = ops.iter().filter(|op| !matches!(op, Op::ModifyCollection { .. }));
        let deleted = deleted.flat_map(|op| self.changed_by(std::slice::from_ref(op)));
        deleted.into_iter().all(|collection| {
            let mut whole = (0..self.cluster.len())
                .filter(|&node| collection.is_whole_on(node))
                .peekable();
            whole.peek().is_none() || whole.any(|node| ready.contains(&node))
        })
    }

    async fn recover_namespace_from(self: &Arc<Self>, source: NodeIndex, ops: &[Op]) -> Told {
        let mut changes: Commit = vec![];
        for op in ops {
            match self.inspect(source, op).await {
                Some(found) => changes.extend(found),
                None => return Told::Nothing,
            }
        }
        for node in (0..self.cluster.len()).filter(|&node| node != source) {
            let wanted = RepairWanted {
                source: Some(source),
                ..RepairWanted::records(Some(vec![]), self.log.next_lsn(), "names were changed at the last stop")
            };
            changes.push(Change::InsertRepair(self.new_repair(node, None, wanted)));
        }
        fault::point("names-inspected");
        if !self.log.commit_until_known(&changes).await {
            return Told::NotCommitted;
        }
        self.apply(&changes);
        self.count_payloads(&changes);
        for pair in &self.namespace.pairs {
            pair.set_recovering(false);
        }
        for op in ops {
            if let Op::CreateCollection {
                tenant,
                database,
                name,
                generation,
            } = op
                && self.catalog.by_generation(*generation).is_none()
                && self.register_name(tenant, database, name).await.is_err()
            {
                // It is looked up when someone asks for it, and by the survey.
                tracing::warn!(name, "Could not look for a collection whose creation was under way.");
            }
        }
        self.recovered(&Scope::Namespace);
        Told::Committed
    }

    /// What the catalog and the other nodes have to follow, by what `source` shows of one entry. `None`: it did not say.
    async fn inspect(self: &Arc<Self>, source: NodeIndex, op: &Op) -> Option<Commit> {
        let mut changes = vec![];
        match op {
            Op::DeleteCollection { generation, .. } => {
                if let Some(collection) = self.living(*generation) {
                    changes.extend(self.gone(source, &collection).await?);
                }
            }
            Op::ModifyCollection { generation, .. } => {
                // A node that does not have it gets it as it is then: a repair row says so.
                if let Some(collection) = self.living(*generation).filter(|one| one.node_id(source).is_some()) {
                    match self.found(source, &collection).await {
                        Found::Name(name) => changes.extend(self.modified(source, &collection, name)),
                        Found::Nothing => {}
                        Found::Silence => return None,
                    }
                }
            }
            Op::DeleteDatabase { tenant, name } => {
                let mut is_gone = true;
                for collection in self.catalog.in_database(tenant, name) {
                    let gone = self.gone(source, &collection).await?;
                    is_gone &= !gone.is_empty();
                    changes.extend(gone);
                }
                let path = NodeRequest::get(node_path::database(tenant, name));
                // With a collection that another node may have, its database stays.
                if is_gone && self.bounded_read(source, path).await?.status == 404 {
                    changes.push(Change::RemoveDatabase {
                        tenant: tenant.clone(),
                        name: name.clone(),
                    });
                    changes.extend(self.rows_for_others(source, op.clone(), Bytes::new()));
                }
            }
            Op::CreateDatabase { tenant, name } => {
                let path = NodeRequest::get(node_path::database(tenant, name));
                if self.bounded_read(source, path).await?.is_success() {
                    changes.extend(self.rows_for_others(source, op.clone(), named(name)));
                }
            }
            Op::Reset => {
                for collection in self.catalog.all().into_iter().filter(|one| !one.is_deleted()) {
                    // After a reset a node is another one (its marker went, too), and none has the collection.
                    if collection.facts().node_ids.iter().all(Option::is_none) {
                        changes.extend(self.deletion(&collection));
                    }
                    changes.extend(self.gone(source, &collection).await?);
                }
            }
            // A tenant cannot be listed and is never deleted: the others get it by its own entry.
            Op::CreateTenant { name } | Op::ModifyTenant { name } => {
                let there = self
                    .bounded_read(source, NodeRequest::get(node_path::tenant(name)))
                    .await?;
                if there.is_success() {
                    changes.push(Change::PutTenant(name.clone()));
                    let op = Op::CreateTenant { name: name.clone() };
                    changes.extend(self.rows_for_others(source, op, named(name)));
                }
            }
            _ => {}
        }
        Some(changes)
    }

    fn living(&self, generation: Generation) -> Option<Arc<Collection>> {
        self.catalog
            .by_generation(generation)
            .filter(|collection| !collection.is_deleted())
    }

    async fn found(self: &Arc<Self>, node: NodeIndex, collection: &Collection) -> Found {
        let Some(id) = collection.node_id(node) else {
            return Found::Silence;
        };
        let facts = collection.facts();
        let by_id = NodeRequest::get(node_path::by_id(&facts.tenant, &facts.database, id));
        match self.bounded_read(node, by_id).await {
            Some(answer) if answer.is_success() => match parse_collection_object(&answer.body) {
                Some(object) => Found::Name(object.name),
                None => Found::Silence,
            },
            Some(answer) if answer.status == 404 => Found::Nothing,
            _ => Found::Silence,
        }
    }

    /// A delete that reached the source is completed: the other nodes get it for the same generation. So is one that
    /// another node has done, if that one alone held everything: nobody could give it back.
    async fn gone(self: &Arc<Self>, source: NodeIndex, collection: &Arc<Collection>) -> Option<Commit> {
        if collection.node_id(source).is_some() {
            // One that is being copied to has nothing to show for a while, and tells nothing by that.
            let mut others = (0..self.cluster.len()).filter(|&node| node != source);
            let counts = collection.pairs[source].copies() == 0 || !others.any(|node| collection.is_whole_on(node));
            match self.found(source, collection).await {
                Found::Nothing if counts => return Some(self.deletion(collection)),
                Found::Silence => return None,
                _ => {}
            }
        }
        if collection.is_whole_on(source) {
            return Some(vec![]);
        }
        for other in self.recovery_source(&Scope::Namespace) {
            let may_have_done_it = other != source && collection.is_whole_on(other);
            if may_have_done_it && matches!(self.found(other, collection).await, Found::Nothing) {
                let facts = collection.facts();
                let op = Op::DeleteCollection {
                    tenant: facts.tenant.clone(),
                    database: facts.database.clone(),
                    name: facts.name.clone(),
                    generation: collection.generation,
                };
                let mut changes = self.deletion(collection);
                changes.extend(self.rows_for_others(other, op, Bytes::new()));
                return Some(changes);
            }
        }
        Some(vec![])
    }

    /// Collections whose names or lives were being changed, by generation.
    fn changed_by(&self, ops: &[Op]) -> Vec<Arc<Collection>> {
        let of = |op: &Op| match op {
            Op::DeleteCollection { generation, .. } | Op::ModifyCollection { generation, .. } => {
                self.living(*generation).into_iter().collect()
            }
            Op::DeleteDatabase { tenant, name } => self.catalog.in_database(tenant, name),
            _ => vec![],
        };
        let mut changed: Vec<_> = ops.iter().flat_map(of).collect();
        // Several lanes are always taken in this order.
        changed.sort_by_key(|collection| collection.generation);
        changed.dedup_by_key(|collection| collection.generation);
        changed
    }

    fn modified(&self, source: NodeIndex, collection: &Arc<Collection>, name: String) -> Commit {
        let mut changes = vec![];
        if collection.facts().name != name {
            let mut record = collection.record();
            record.name = name;
            record.updated_at = self.env.wall();
            changes.push(Change::PutCollection(record));
        }
        // One that is to be repaired itself is no source: the comparison of the names makes the collection's own equal.
        let is_source = collection.pairs[source].repairs() == 0;
        for node in (0..self.cluster.len()).filter(|&node| node != source && is_source) {
            let wanted = RepairWanted {
                kind: RepairKind::Records,
                source: Some(source),
                reversible: true,
                ..RepairWanted::records(Some(vec![]), self.log.next_lsn(), "it was modified at the last stop")
            };
            let row = self.new_repair(node, Some(collection.generation), wanted);
            changes.push(Change::InsertRepair(row));
        }
        changes
    }

    /// An entry that the source shows to be done, and that can be repeated without harm, for the other nodes.
    fn rows_for_others(&self, source: NodeIndex, op: Op, body: Bytes) -> Commit {
        let others = (0..self.cluster.len()).filter(|&node| node != source);
        let row = |node| PayloadRow {
            id: self.env.new_id(),
            node: self.cluster.node(node).name.clone(),
            generation: None,
            lsn: self.log.next_lsn(),
            op: op.clone(),
            body: body.clone(),
            refused: false,
            in_doubt: true,
            attempts: 0,
            parked: None,
            created_at: self.env.wall(),
        };
        others.map(|node| Change::InsertPayload(row(node))).collect()
    }

    /// Nobody serves the lane yet, so its rows may be counted after they were written.
    fn count_payloads(&self, changes: &Commit) {
        for change in changes {
            if let Change::InsertPayload(row) = change
                && let Some(node) = self.cluster.index_of(&row.node)
            {
                self.behind.lock().insert((node, row.generation));
                let at = row.created_at.timestamp_micros();
                self.namespace.pairs[node].add_pending(1, row.body.len() as u64, at);
            }
        }
    }
}

fn named(name: &str) -> Bytes {
    serde_json::json!({ "name": name }).to_string().into()
}

/// Finds out what became of the last writer's entries, until all is known.
pub async fn recover(core: Arc<Core>) {
    let mut changes = core.cluster.watch_changes();
    loop {
        changes.mark_unchanged();
        let lanes: Vec<_> = core.in_doubt.lock().keys().copied().collect();
        if lanes.is_empty() || core.log.is_fenced() {
            return;
        }
        let mut failed = false;
        for lane in lanes {
            failed |= !core.recover_lane(lane).await;
        }
        if failed {
            // Taking a lane is a change as well: what fails is not tried again at once.
            core.env.sleep(PAUSE).await;
        }
        tokio::select! {
            biased;
            _ = changes.changed() => {}
            () = core.env.sleep(TICK) => {}
        }
    }
}
