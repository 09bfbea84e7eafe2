//! Making durable what a node missed, before the ack that needs it.
//!
//! Memory follows the journal: counts of open rows rise before the commit is tried (so that no read slips in between)
//! and the catalog changes after it. A commit that failed or whose outcome is unknown is tried again until it is known;
//! meanwhile its nodes are out of the lane and nothing is drained there (rule R1, schedules S9, S31).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use uuid::Uuid;

use super::{Core, Decision, Doubt, Outcome, Reply, Scope};
use crate::chroma::{Generation, Op, node_path};
use crate::cluster::{NodeIndex, NodeRequest};
use crate::journal::{Change, Commit, JournalError, Lsn, PayloadRow, RepairKind, RepairRow, SuspectRow};
use crate::lane::Pair;

const RETRY_PAUSE: Duration = Duration::from_millis(500);
const PROBE_LIMIT: Duration = Duration::from_secs(2);

/// What an entry is, for its rows.
#[derive(Debug, Clone)]
pub struct EntryInfo {
    pub lsn: Lsn,
    pub op: Op,
    pub body: Bytes,
    /// Records that the entry speaks of; `None`: the whole lane.
    pub ids: Option<Vec<String>>,
}

/// A payload row that was written for a node.
#[derive(Debug, Clone, Copy)]
pub struct RowRef {
    pub node: NodeIndex,
    pub id: Uuid,
    pub lsn: Lsn,
    pub bytes: u64,
    /// What the node makes of the entry late is compared later.
    pub suspect: Option<Uuid>,
}

/// A repair row to be written.
#[derive(Debug, Clone)]
pub struct RepairWanted {
    pub kind: RepairKind,
    pub ids: Option<Vec<String>>,
    pub source: Option<NodeIndex>,
    pub reversible: bool,
    pub lsn: Lsn,
    pub reason: String,
}

impl RepairWanted {
    /// All of the lane, from whoever has it.
    pub fn whole(lsn: Lsn, reason: impl Into<String>) -> Self {
        Self {
            kind: RepairKind::Whole,
            ids: None,
            source: None,
            reversible: false,
            lsn,
            reason: reason.into(),
        }
    }

    /// These records, because the node did not do with them what another did.
    pub fn records(ids: Option<Vec<String>>, lsn: Lsn, reason: impl Into<String>) -> Self {
        Self {
            kind: if ids.is_some() {
                RepairKind::Records
            } else {
                RepairKind::Whole
            },
            ids,
            ..Self::whole(lsn, reason)
        }
    }
}

/// What became of the rows of an entry.
#[derive(Debug)]
pub struct Covered {
    pub durable: bool,
    pub rows: Vec<RowRef>,
}

impl Core {
    /// Writes the rows that `decision` asks for, and `changes` before them, in one commit.
    pub(super) async fn cover(
        self: &Arc<Self>,
        scope: &Scope,
        decision: &Decision,
        entry: &EntryInfo,
        mut changes: Commit,
        suspects: Vec<SuspectRow>,
    ) -> Covered {
        if decision.reply == Reply::Indefinite {
            let nodes = decision.covers.iter().filter(|cover| cover.payload.is_some()).count();
            self.remember_undecided(entry.lsn, scope.generation(), nodes);
        }
        let mut rows = Vec::new();
        let mut affected = Vec::new();
        let at = self.env.wall();
        for (node, cover) in decision.covers.iter().enumerate() {
            let pair = &scope.pairs(self)[node];
            let name = &self.cluster.node(node).name;
            if let Some(payload) = cover.payload {
                let row = PayloadRow {
                    id: self.env.new_id(),
                    node: name.clone(),
                    generation: scope.generation(),
                    lsn: entry.lsn,
                    op: entry.op.clone(),
                    body: entry.body.clone(),
                    refused: payload.refused,
                    in_doubt: payload.in_doubt,
                    attempts: 0,
                    parked: None,
                    created_at: at,
                };
                let bytes = row.body.len() as u64;
                pair.add_pending(1, bytes, at.timestamp_micros());
                pair.touch(entry.ids.as_deref());
                self.behind.lock().insert((node, scope.generation()));
                rows.push(RowRef {
                    node,
                    id: row.id,
                    lsn: row.lsn,
                    bytes,
                    suspect: suspects
                        .iter()
                        .find(|suspect| suspect.node == *name)
                        .map(|suspect| suspect.id),
                });
                changes.push(Change::InsertPayload(row));
            }
            // A source that is itself to be repaired by now, because it lost its data in between, is none (S36).
            let source = decision.source;
            let source_is_whole = source.is_none_or(|source| scope.pairs(self)[source].repairs() == 0);
            if cover.repair && source_is_whole {
                let ids = entry.ids.clone().filter(|_| scope.generation().is_some());
                let wanted = RepairWanted {
                    kind: if ids.is_some() {
                        RepairKind::Records
                    } else {
                        RepairKind::Whole
                    },
                    ids,
                    source,
                    reversible: decision.reversible && scope.generation().is_some(),
                    lsn: entry.lsn,
                    reason: format!("the nodes disagreed on a {} at {}", entry.op.label(), entry.lsn),
                };
                changes.push(self.repair_row(scope, node, wanted));
            }
            if cover.payload.is_some() || cover.repair {
                affected.push(node);
            }
        }
        changes.extend(suspects.into_iter().map(Change::PutSuspect));
        let durable = self.commit_entry(scope, affected, changes, Some(entry.lsn)).await;
        Covered { durable, rows }
    }

    /// A repair row, counted from now on.
    pub(crate) fn repair_row(&self, scope: &Scope, node: NodeIndex, wanted: RepairWanted) -> Change {
        let row = self.new_repair(node, scope.generation(), wanted);
        self.count_repair(&row);
        Change::InsertRepair(row)
    }

    /// A repair row that is counted when it is committed: for a lane that becomes known by the same commit.
    pub(crate) fn new_repair(
        &self,
        node: NodeIndex,
        generation: Option<Generation>,
        wanted: RepairWanted,
    ) -> RepairRow {
        let source = wanted.source.map(|source| self.cluster.node(source));
        RepairRow {
            id: self.env.new_id(),
            node: self.cluster.node(node).name.clone(),
            generation,
            kind: wanted.kind,
            ids: wanted.ids,
            source: source.map(|source| source.name.clone()),
            source_marker: source.and_then(|source| source.marker()),
            reversible: wanted.reversible,
            lsn: wanted.lsn,
            reason: wanted.reason,
            parked: None,
            created_at: self.env.wall(),
        }
    }

    /// Takes the row's node out of its lane; once, however often the row is seen.
    pub(crate) fn count_repair(&self, row: &RepairRow) {
        if self.cluster.index_of(&row.node).is_none() {
            return;
        }
        let mut repairs = self.repairs.lock();
        if repairs.iter().any(|known| known.id == row.id) {
            return;
        }
        // Of a collection that was deleted and forgotten meanwhile, the row is remembered to be taken away.
        if let Some((scope, node)) = self.find(row.generation, &row.node) {
            scope.pairs(self)[node].add_repair(row.kind.holds_rows());
        }
        tracing::warn!(
            node = row.node,
            generation = row.generation,
            kind = row.kind.label(),
            reason = row.reason,
            "A repair is needed."
        );
        repairs.push(row.clone());
        drop(repairs);
        self.cluster.announce_change();
    }

    /// The rows are gone from the journal: lets their nodes back in, as far as nothing else is open.
    fn uncount_repairs(&self, gone: impl Fn(&RepairRow) -> bool) {
        let mut removed = vec![];
        self.repairs.lock().retain(|row| {
            let goes = gone(row);
            if goes {
                removed.push(row.clone());
            }
            !goes
        });
        for row in removed {
            if let Some((scope, node)) = self.find(row.generation, &row.node) {
                scope.pairs(self)[node].remove_repair(row.kind.holds_rows());
            }
        }
    }

    /// Commits, and goes on trying in the background if the outcome is not a success; the affected nodes stay out of
    /// the lane until it is one. True: durable now.
    pub(crate) async fn commit_or_retry(
        self: &Arc<Self>,
        scope: &Scope,
        affected: Vec<NodeIndex>,
        changes: Commit,
    ) -> bool {
        self.commit_entry(scope, affected, changes, None).await
    }

    /// [`Core::commit_or_retry`] of what an entry needs: when it is durable, the entry is settled (rule R3).
    async fn commit_entry(
        self: &Arc<Self>,
        scope: &Scope,
        affected: Vec<NodeIndex>,
        mut changes: Commit,
        entry: Option<Lsn>,
    ) -> bool {
        let settle = move |core: &Self| {
            if let Some(lsn) = entry {
                core.log.settle(lsn);
            }
        };
        if changes.is_empty() {
            settle(self);
            return true;
        }
        if self.commit_in(scope, &mut changes).await.is_ok() {
            self.apply_committed(&changes);
            settle(self);
            return true;
        }
        for &node in &affected {
            scope.pairs(self)[node].uncertain_started();
        }
        let of_catalog = changes.iter().any(Change::is_of_catalog);
        if of_catalog {
            self.catalog_uncertain.fetch_add(1, Ordering::SeqCst);
        }
        let (core, scope) = (self.clone(), scope.clone());
        // Shutdown waits for it: what it writes exists nowhere else.
        self.spawn_job(async move {
            let mut contradicted = false;
            loop {
                core.env.sleep(RETRY_PAUSE).await;
                match core.commit_in(&scope, &mut changes).await {
                    Ok(()) => break,
                    // It will never be written. Those who need it are left to repair, but never the last authority.
                    Err(JournalError::Conflict(reason)) if !contradicted => {
                        contradicted = true;
                        let reason = format!("a commit contradicted the log: {reason}");
                        changes.clear();
                        for &node in &affected {
                            if core.another_has_authority(&scope, node) {
                                let wanted = RepairWanted::whole(core.log.next_lsn(), &reason);
                                changes.push(core.repair_row(&scope, node, wanted));
                            }
                        }
                    }
                    // The successor finds out on its own what each node has.
                    Err(JournalError::Fenced { .. }) => return,
                    Err(_) => {}
                }
            }
            core.apply_committed(&changes);
            settle(&core);
            core.catalog_uncertain
                .fetch_sub(u64::from(of_catalog), Ordering::SeqCst);
            for &node in &affected {
                scope.pairs(&core)[node].uncertain_ended();
            }
            core.cluster.announce_change();
        });
        false
    }

    /// Commits what a lane needs. Was its collection deleted meanwhile, its rows were removed before this brought new
    /// ones: those go, too.
    async fn commit_in(&self, scope: &Scope, changes: &mut Commit) -> Result<(), JournalError> {
        self.log.commit(changes).await?;
        if scope.is_gone() {
            changes.extend(scope.generation().into_iter().flat_map(Change::rows_of));
            self.log.commit(changes).await?;
        }
        Ok(())
    }

    /// [`Core::apply`]. A drain or a repair that is under way without its lane may have written a row of a collection
    /// after the commit that deletes it, and before it could see that: those go once more. From here on it sees it.
    fn apply_committed(self: &Arc<Self>, changes: &Commit) {
        let left: Commit = changes
            .iter()
            .filter_map(|change| match change {
                Change::PutCollection(record) if record.deleted => self.catalog.by_generation(record.generation),
                _ => None,
            })
            .filter(|collection| !collection.pairs.iter().all(Pair::in_sync))
            .flat_map(|collection| Change::rows_of(collection.generation))
            .collect();
        self.apply(changes);
        if !left.is_empty() {
            let core = self.clone();
            // What fails is found at the next start.
            self.spawn_job(async move { drop(core.log.commit(&left).await) });
        }
    }

    /// Brings the memory image in step with what was committed.
    pub(crate) fn apply(&self, changes: &Commit) {
        let mut after_reset = false;
        for change in changes {
            match change {
                Change::PutCollection(record) => match self.catalog.by_generation(record.generation) {
                    None => {
                        self.catalog.insert(record.clone());
                    }
                    Some(collection) if record.deleted => {
                        self.catalog.set_deleted(&collection, record.updated_at);
                        if self.namespace.pairs.iter().all(Pair::in_sync) {
                            // No row of any node speaks of it.
                            self.catalog.forget(&collection);
                        }
                    }
                    Some(collection) if collection.is_deleted() => {}
                    Some(collection) => self.catalog.rename(&collection, &record.name, record.updated_at),
                },
                Change::PutNodeId { generation, node, id } => {
                    if let (Some(collection), Some(node)) =
                        (self.catalog.by_generation(*generation), self.cluster.index_of(node))
                    {
                        self.catalog.set_node_id(&collection, node, *id);
                    }
                }
                Change::PutDatabase(record) => self.catalog.put_database(record.clone()),
                Change::PutTenant(name) => self.catalog.put_tenant(name),
                Change::RemoveDatabase { tenant, name } => self.catalog.remove_database(tenant, name),
                Change::RemoveRepairs(ids) => self.uncount_repairs(|row| ids.contains(&row.id)),
                Change::RemovePayloadsOf(generation) => self.forget_undecided(|of| of == *generation),
                Change::RemoveRepairsOf(generation) => {
                    self.uncount_repairs(|row| row.generation == Some(*generation));
                    self.suspects.lock().retain(|_, row| row.generation != *generation);
                }
                Change::PinReads { generation, node } => {
                    if let (Some(collection), Some(node)) =
                        (self.catalog.by_generation(*generation), self.cluster.index_of(node))
                    {
                        collection.pin(node);
                    }
                }
                Change::UnpinReads(generation) => {
                    if let Some(collection) = self.catalog.by_generation(*generation) {
                        collection.unpin();
                    }
                }
                Change::ParkRepair { id, reason } => self.mark_repair(*id, Some(reason.clone())),
                Change::UnparkRepair(id) => self.mark_repair(*id, None),
                Change::ForgetNodeIds { node } => {
                    if let Some(node) = self.cluster.index_of(node) {
                        self.catalog.forget_node_ids(node);
                    }
                }
                Change::PutNode(record) => {
                    if let Some(node) = self.cluster.index_of(&record.node) {
                        self.cluster.node(node).remember(&record.marker, record.checkpoint);
                    }
                }
                Change::PutSuspect(row) => {
                    self.suspects.lock().insert(row.id, row.clone());
                }
                Change::RemoveSuspects(ids) => self.suspects.lock().retain(|id, _| !ids.contains(id)),
                Change::RemoveEverything => {
                    after_reset = true;
                    self.catalog.clear(self.env.wall());
                    self.repairs.lock().clear();
                    self.suspects.lock().clear();
                    self.undecided.lock().clear();
                    self.namespace.pairs.iter().for_each(Pair::clear_rows);
                }
                Change::InsertPayload(row) if after_reset => {
                    if let Some(node) = self.cluster.index_of(&row.node) {
                        self.behind.lock().insert((node, None));
                        let at = row.created_at.timestamp_micros();
                        self.namespace.pairs[node].add_pending(1, row.body.len() as u64, at);
                    }
                }
                Change::InsertRepair(row) => self.count_repair(row),
                _ => {}
            }
        }
        self.cluster.announce_change();
    }

    fn mark_repair(&self, id: Uuid, parked: Option<String>) {
        if let Some(row) = self.repairs.lock().iter_mut().find(|row| row.id == id) {
            row.parked = parked;
        }
    }

    /// Whether every node that closed its connection on a request answers a probe: then it was the request.
    pub(super) async fn closed_nodes_are_alive(&self, outcomes: &[Outcome]) -> bool {
        let closed = outcomes
            .iter()
            .filter(|outcome| **outcome == Outcome::Unknown(Doubt::Closed))
            .count();
        if closed < 2 || closed < outcomes.len() {
            return false;
        }
        for node in 0..self.cluster.len() {
            if !self.is_alive(node).await {
                return false;
            }
        }
        true
    }

    /// Whether whatever was on its way to a node in this lane has landed, or never will: a canary that was sent after it has
    /// returned in time. What breaks meanwhile asks for another one (schedule S11).
    pub(crate) async fn fence(&self, pair: &Pair, node: NodeIndex, limit: Duration) -> bool {
        pair.fenced();
        let canary = self.cluster.node(node).canary();
        let has_landed = matches!(crate::env::within(&self.env, limit, canary).await, Some(Ok(())));
        if !has_landed {
            pair.require_fence();
        }
        has_landed
    }

    /// Whether a node answers a heartbeat right now.
    pub(crate) async fn is_alive(&self, node: NodeIndex) -> bool {
        let probe = self
            .cluster
            .node(node)
            .client
            .send(NodeRequest::get(node_path::HEARTBEAT));
        let answer = crate::env::within(&self.env, PROBE_LIMIT, probe).await;
        matches!(answer, Some(Ok(answer)) if answer.is_success())
    }
}
