//! Writes to the namespace: collections, databases, tenants, and whatever else is not about records.
//!
//! One at a time, in the namespace lane, holding the lanes of the collections they touch (design.md R4). A collection
//! is addressed by its generation and the node's own UUID, never by a bare name: Chroma's DELETE takes only names, so
//! the node is asked for the current name of the UUID right before. The catalog's change and the rows for nodes that
//! missed it are one commit, and that commit comes before the ack.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Method;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::cover::EntryInfo;
use super::settle::settles_by_itself;
use super::{Answer, Circumstances, Core, Cover, NodeAnswer, Outcome, Payload, RepairWanted, Reply, Scope, decide};
use crate::catalog::{Collection, UNSETTLED};
use crate::chroma::{Generation, Op, node_path, parse_collection_object};
use crate::cluster::{NodeIndex, NodeRequest, NodeResponse};
use crate::env::within;
use crate::fault;
use crate::journal::{Change, Commit, DatabaseRecord};

/// Where a raw path has the collection's own UUID.
pub const COLLECTION_PLACEHOLDER: &str = "{collection}";

/// A mutating request to the namespace.
#[derive(Debug, Clone)]
pub enum NamespaceWrite {
    CreateCollection {
        tenant: String,
        database: String,
        name: String,
        get_or_create: bool,
    },
    ModifyCollection {
        collection: Arc<Collection>,
        new_name: Option<String>,
    },
    DeleteCollection {
        tenant: String,
        database: String,
        name: String,
    },
    CreateDatabase {
        tenant: String,
        name: String,
    },
    DeleteDatabase {
        tenant: String,
        name: String,
    },
    CreateTenant {
        name: String,
    },
    ModifyTenant {
        name: String,
    },
    Reset,
    /// `path` has [`COLLECTION_PLACEHOLDER`] where the collection's UUID belongs.
    Other {
        method: Method,
        path: String,
        collection: Option<Arc<Collection>>,
    },
}

impl Core {
    /// Carries out a namespace write on the core's runtime and waits for its answer.
    pub async fn submit_namespace(self: &Arc<Self>, write: NamespaceWrite, body: Bytes) -> Answer {
        let (reply, answer) = oneshot::channel();
        let core = self.clone();
        self.spawn_job(async move {
            let _ = reply.send(core.write_namespace(write, body).await);
        });
        answer
            .await
            .unwrap_or_else(|_| Answer::error(500, "InternalError", "The write was dropped."))
    }

    async fn write_namespace(self: &Arc<Self>, write: NamespaceWrite, body: Bytes) -> Answer {
        if self.namespace.lane.waiting() >= self.settings.lanes.writes {
            return Answer::too_many("Too many namespace operations wait.");
        }
        if matches!(write, NamespaceWrite::Other { .. }) && !self.take_unknown_budget() {
            return Answer::too_many("Too many requests of a kind this proxy does not know.");
        }
        self.wait_for_namespace().await;
        let turn = self.exclusive_namespace();
        let in_time = match self.settings.lanes.time {
            Duration::ZERO => turn.await,
            limit => match within(&self.env, limit, turn).await {
                Some(turn) => turn,
                None => return Answer::unavailable("The change waited too long for its turn and was not begun."),
            },
        };
        let Some(_alone) = in_time else {
            return Answer::unavailable("Shutting down.");
        };
        match write {
            NamespaceWrite::CreateCollection {
                tenant,
                database,
                name,
                get_or_create,
            } => {
                self.create_collection(tenant, database, name, get_or_create, body)
                    .await
            }
            NamespaceWrite::ModifyCollection { collection, new_name } => {
                let _barrier = self.exclusive(&collection).await;
                if collection.is_deleted() {
                    return Answer::no_such_collection(collection.client_id);
                }
                if let Some(answer) = self.taken_elsewhere(&collection, new_name.as_deref()).await {
                    return answer;
                }
                let op = Op::ModifyCollection {
                    generation: collection.generation,
                    new_name: new_name.clone(),
                };
                let renamed = collection.clone();
                self.mirror(op, body, Some(&collection), move |core, _| {
                    let mut record = renamed.record();
                    record.updated_at = core.env.wall();
                    if let Some(name) = new_name {
                        record.name = name;
                    }
                    vec![Change::PutCollection(record)]
                })
                .await
            }
            NamespaceWrite::DeleteCollection { tenant, database, name } => {
                self.delete_collection(tenant, database, name).await
            }
            NamespaceWrite::CreateDatabase { tenant, name } => {
                // A node that is wiped gets it back, also when nobody looked at it before.
                let record = DatabaseRecord {
                    tenant: tenant.clone(),
                    name: name.clone(),
                    client_id: UNSETTLED,
                };
                let op = Op::CreateDatabase { tenant, name };
                self.mirror(op, body, None, |_, _| vec![Change::PutDatabase(record)])
                    .await
            }
            NamespaceWrite::CreateTenant { name } => {
                // A node that is wiped gets it back: no node can list its tenants.
                let tenant = name.clone();
                self.mirror(Op::CreateTenant { name }, body, None, |_, _| {
                    vec![Change::PutTenant(tenant)]
                })
                .await
            }
            NamespaceWrite::ModifyTenant { name } => {
                self.mirror(Op::ModifyTenant { name }, body, None, |_, _| vec![]).await
            }
            NamespaceWrite::DeleteDatabase { tenant, name } => self.delete_database(tenant, name).await,
            NamespaceWrite::Reset => self.reset(body).await,
            NamespaceWrite::Other {
                method,
                path,
                collection,
            } => {
                let _barrier = match &collection {
                    Some(collection) => self.exclusive(collection).await,
                    None => None,
                };
                let generation = collection.as_ref().map(|collection| collection.generation);
                let op = Op::Other {
                    method: method.to_string(),
                    path,
                    generation,
                };
                self.mirror(op, body, collection.as_ref(), |_, _| vec![]).await
            }
        }
    }

    /// Refuses a rename onto a name that some nodes have and others do not: they would disagree on it. Where all have it,
    /// they refuse it themselves.
    async fn taken_elsewhere(self: &Arc<Self>, collection: &Collection, new_name: Option<&str>) -> Option<Answer> {
        let name = new_name?;
        let facts = collection.facts();
        let holder = match self.register_name(&facts.tenant, &facts.database, name).await {
            Ok(holder) => holder?,
            Err(answer) => return Some(answer),
        };
        // One that waits to be copied may not be there, whatever its UUID was.
        let everywhere =
            (0..self.cluster.len()).all(|node| holder.node_id(node).is_some() && holder.pairs[node].copies() == 0);
        let refused = holder.generation != collection.generation && !everywhere;
        refused.then(|| Answer::error(409, "ChromaError", format!("Collection [{name}] already exists")))
    }

    /// One token per unknown mutating request, so many per second.
    fn take_unknown_budget(&self) -> bool {
        let mut budget = self.unknown_budget.lock();
        let now = self.env.now();
        if now.saturating_sub(budget.0) >= Duration::from_secs(1) {
            *budget = (now, 0);
        }
        budget.1 += 1;
        budget.1 <= self.settings.unknown_per_second
    }

    /// When no node can serve the namespace but one could after its drain, waits for that.
    pub async fn wait_for_namespace(&self) {
        let limit = self.env.sleep(self.settings.behind_wait);
        tokio::pin!(limit);
        let mut changes = self.cluster.watch_changes();
        loop {
            changes.mark_unchanged();
            let helps = self
                .cluster
                .up()
                .any(|node| self.namespace.pairs[node].is_nearly_in_sync());
            if !self.namespace_nodes().is_empty() || !helps {
                return;
            }
            tokio::select! {
                biased;
                _ = changes.changed() => {}
                () = &mut limit => return,
            }
        }
    }

    /// Sends an entry to every node that can take it, covers what the others missed, and answers.
    ///
    /// `changes` are made when the lead applied it.
    async fn mirror(
        self: &Arc<Self>,
        op: Op,
        body: Bytes,
        collection: Option<&Arc<Collection>>,
        changes: impl FnOnce(&Core, &[NodeAnswer]) -> Commit,
    ) -> Answer {
        let lsn = self.log.begin();
        self.mirror_at(lsn, op, body, collection, changes).await
    }

    async fn mirror_at(
        self: &Arc<Self>,
        lsn: i64,
        op: Op,
        body: Bytes,
        collection: Option<&Arc<Collection>>,
        changes: impl FnOnce(&Core, &[NodeAnswer]) -> Commit,
    ) -> Answer {
        let nodes = self.namespace_nodes();
        if nodes.is_empty() {
            self.log.settle(lsn);
            return Answer::unavailable("No node can take this at the moment.");
        }
        if !self.catalog_can_change() || !self.log_intent(&Scope::Namespace, lsn, &op, None, &body).await {
            self.log.settle(lsn);
            return Answer::unavailable("The log does not answer: collections, databases and tenants cannot change.");
        }
        fault::point("names-intended");
        // A node that does not have the collection yet gets it, as it will be then, by its repair.
        let lacks = |node: NodeIndex| {
            collection
                .is_some_and(|collection| collection.node_id(node).is_none() && self.namespace.pairs[node].in_sync())
        };
        let jobs = (0..self.cluster.len())
            .map(|node| (nodes.contains(&node) && !lacks(node)).then(|| self.namespace_job(node, &op, &body)))
            .collect();
        let (mut answers, stragglers) = self.fan_out(&Scope::Namespace, jobs).await;
        self.recheck(&mut answers).await;
        let mut outcomes: Vec<_> = answers.iter().map(|answer| answer.outcome.clone()).collect();
        if matches!(op, Op::DeleteCollection { .. }) && outcomes.contains(&Outcome::Applied) {
            // What one node has deleted cannot be brought back unless another holds everything: it is completed.
            for outcome in outcomes.iter_mut().filter(|one| matches!(one, Outcome::Refused { .. })) {
                *outcome = Outcome::Failed;
            }
        }
        let circumstances = Circumstances {
            refusal_has_effects: false,
            closed_nodes_are_alive: self.closed_nodes_are_alive(&outcomes).await,
        };
        let mut decision = decide(&outcomes, circumstances);
        let is_deleted = matches!(op, Op::DeleteCollection { .. });
        for (node, cover) in decision.covers.iter_mut().enumerate() {
            if lacks(node) && !is_deleted {
                cover.payload = None;
            }
            // A copy may have begun to make it there, or to make it anew, and the answer be lost or still to come: that
            // goes as well, whatever the node said of the UUID that is known.
            let is_copied = collection.is_some_and(|one| one.node_id(node).is_none() || one.pairs[node].copies() > 0);
            if is_deleted && is_copied && (cover.payload.is_some() || outcomes[node] == Outcome::Applied) {
                cover.payload = Some(Payload {
                    in_doubt: true,
                    refused: cover.payload.is_some_and(|payload| payload.refused),
                });
            }
        }
        let lead_applied = matches!(decision.reply, Reply::Of(node) if outcomes[node] == Outcome::Applied);
        let mut changes = if lead_applied { changes(self, &answers) } else { vec![] };
        if let Op::CreateCollection { generation, .. } = &op
            && lead_applied
        {
            // A node that refuses one create, for want of its database for one, is out for that collection alone.
            for node in (0..outcomes.len()).filter(|&node| matches!(outcomes[node], Outcome::Refused { .. })) {
                decision.covers[node] = Cover::default();
                let wanted = RepairWanted {
                    source: decision.source,
                    ..RepairWanted::whole(lsn, "the node refused to create the collection")
                };
                changes.push(Change::InsertRepair(self.new_repair(node, Some(*generation), wanted)));
            }
        }
        if let Some(collection) = collection {
            // A node that lost one collection is out for that one, not for the whole namespace.
            for node in (0..outcomes.len()).filter(|&node| outcomes[node] == Outcome::Missing) {
                if std::mem::take(&mut decision.covers[node]).repair && !collection.is_deleted() {
                    let scope = Scope::Collection(collection.clone());
                    let wanted = RepairWanted::whole(lsn, "the node has lost the collection");
                    changes.push(self.repair_row(&scope, node, wanted));
                }
            }
        }
        let entry = EntryInfo {
            lsn,
            op,
            body,
            ids: None,
        };
        fault::point("names-answered");
        let covered = self.cover(&Scope::Namespace, &decision, &entry, changes, vec![]).await;
        fault::point("names-covered");
        if let Some(stragglers) = stragglers {
            // Of one that nobody has answered yet the drain has to complete the catalog's part.
            let rows = if settles_by_itself(&entry.op) && decision.reply != Reply::Indefinite {
                covered.rows
            } else {
                vec![]
            };
            self.await_stragglers(&Scope::Namespace, stragglers, rows);
        }
        if decision.reply != Reply::Unavailable && !self.may_write(&entry.op).await {
            return Answer::replaced_meanwhile();
        }
        match (covered.durable, decision.reply) {
            (_, Reply::Unavailable) => self.taken_by_none(collection.map(Arc::as_ref), &answers),
            (false, _) => Answer::unavailable("The log does not answer: the change could not be kept."),
            (true, Reply::Indefinite) => Answer::indefinite(),
            (true, Reply::Closed) => Answer::closed(),
            (true, Reply::Of(lead)) => {
                // Where one node says "already" and another did it now, it is done.
                let node = (0..answers.len())
                    .filter(|&node| outcomes[node] == outcomes[lead])
                    .find(|&node| answers[node].response.as_ref().is_some_and(NodeResponse::is_success))
                    .unwrap_or(lead);
                match (&answers[node].response, collection) {
                    (Some(response), Some(collection)) => self.translated(collection, node, response),
                    (Some(response), None) => Answer::of_node(response, response.body.clone()),
                    (None, _) => Answer::error(500, "InternalError", "A node's answer was lost."),
                }
            }
        }
    }

    async fn create_collection(
        self: &Arc<Self>,
        tenant: String,
        database: String,
        name: String,
        get_or_create: bool,
        body: Bytes,
    ) -> Answer {
        let known = match self.catalog.by_name(&tenant, &database, &name) {
            Some(known) => Some(known),
            None => match self.register_name(&tenant, &database, &name).await {
                Ok(found) => found,
                Err(answer) => return answer,
            },
        };
        if let Some(known) = known {
            if !get_or_create {
                return Answer::error(409, "ChromaError", format!("Collection [{name}] already exists"));
            }
            return self.get_existing(&known, body).await;
        }
        let lsn = self.log.begin();
        let generation: Generation = lsn;
        let op = Op::CreateCollection {
            tenant: tenant.clone(),
            database: database.clone(),
            name: name.clone(),
            generation,
        };
        self.mirror_at(lsn, op, body, None, move |core, answers| {
            core.creation(generation, &tenant, &database, &name, answers)
        })
        .await
    }

    /// The catalog's part of a create: the lead's UUID is the client's.
    fn creation(
        &self,
        generation: Generation,
        tenant: &str,
        database: &str,
        name: &str,
        answers: &[NodeAnswer],
    ) -> Commit {
        let created: Vec<(NodeIndex, Uuid)> = answers
            .iter()
            .enumerate()
            .filter(|(_, answer)| answer.outcome == Outcome::Applied)
            .filter_map(|(node, answer)| Some((node, parse_collection_object(&answer.response.as_ref()?.body)?.id)))
            .collect();
        let Some(&(_, client_id)) = created.first() else {
            return vec![];
        };
        let mut changes = vec![Change::PutCollection(
            self.new_record(generation, client_id, tenant, database, name),
        )];
        changes.extend(
            created
                .into_iter()
                .map(|(node, id)| self.node_id_change(generation, node, id)),
        );
        changes
    }

    /// `get_or_create` of a collection that exists: asked of one node that has it, and not logged.
    async fn get_existing(self: &Arc<Self>, collection: &Arc<Collection>, body: Bytes) -> Answer {
        let facts = collection.facts();
        let path = node_path::collections(&facts.tenant, &facts.database);
        for node in self.namespace_nodes() {
            let Some(id) = collection.node_id(node) else { continue };
            // A node that lost it would create it again: it is asked first.
            let by_id = NodeRequest::get(node_path::by_id(&facts.tenant, &facts.database, id));
            match self.bounded_read(node, by_id).await {
                Some(response) if response.is_success() => {}
                Some(response) if response.status == 404 => {
                    self.report_missing(collection, node);
                    continue;
                }
                _ => continue,
            }
            let request = NodeRequest::post(path.clone(), body.clone());
            let Some(response) = self.bounded_read(node, request).await else {
                continue;
            };
            if response.status >= 500 {
                continue;
            }
            return self.translated(collection, node, &response);
        }
        Answer::unavailable("No node could answer.")
    }

    async fn delete_collection(self: &Arc<Self>, tenant: String, database: String, name: String) -> Answer {
        let collection = match self.catalog.by_name(&tenant, &database, &name) {
            Some(collection) => collection,
            None => match self.register_name(&tenant, &database, &name).await {
                Ok(Some(collection)) => collection,
                Ok(None) => return Answer::no_such_name(&name),
                Err(answer) => return answer,
            },
        };
        let _barrier = self.exclusive(&collection).await;
        let op = Op::DeleteCollection {
            tenant,
            database,
            name,
            generation: collection.generation,
        };
        let deleted = collection.clone();
        self.mirror(op, Bytes::new(), Some(&collection), move |core, _| {
            core.deletion(&deleted)
        })
        .await
    }

    /// The catalog's part of a delete; rows of the collection's lane have become moot with it.
    pub(crate) fn deletion(&self, collection: &Collection) -> Commit {
        let mut record = collection.record();
        record.deleted = true;
        record.updated_at = self.env.wall();
        let rows = Change::rows_of(collection.generation);
        rows.into_iter().chain([Change::PutCollection(record)]).collect()
    }

    /// The catalog's part of a rename.
    pub(crate) fn renaming(&self, collection: &Collection, name: &str) -> Change {
        let mut record = collection.record();
        record.name = name.to_owned();
        record.updated_at = self.env.wall();
        Change::PutCollection(record)
    }

    async fn delete_database(self: &Arc<Self>, tenant: String, name: String) -> Answer {
        let mut collections = self.catalog.in_database(&tenant, &name);
        // Several lanes are always taken in this order.
        collections.sort_by_key(|collection| collection.generation);
        let mut barriers = Vec::with_capacity(collections.len());
        for collection in &collections {
            barriers.push(self.exclusive(collection).await);
        }
        let op = Op::DeleteDatabase {
            tenant: tenant.clone(),
            name: name.clone(),
        };
        self.mirror(op, Bytes::new(), None, move |core, _| {
            let mut changes: Commit = collections
                .iter()
                .flat_map(|collection| core.deletion(collection))
                .collect();
            changes.push(Change::RemoveDatabase { tenant, name });
            changes
        })
        .await
    }

    async fn reset(self: &Arc<Self>, body: Bytes) -> Answer {
        let collections = self.catalog.all();
        let mut barriers = Vec::with_capacity(collections.len());
        for collection in collections.iter().filter(|collection| !collection.is_deleted()) {
            barriers.push(self.exclusive(collection).await);
        }
        let answer = self
            .mirror(Op::Reset, body, None, |_, _| vec![Change::RemoveEverything])
            .await;
        if (200..300).contains(&answer.status) {
            for node in self.namespace_nodes() {
                self.renew_marker(node).await;
            }
        }
        answer
    }
}
