//! A journal in memory that fails as it is told to.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use async_trait::async_trait;
use diptych::chroma::Generation;
use diptych::journal::{
    Backlog, Change, CollectionRecord, Commit, DatabaseRecord, EventRecord, Holder, Intent, Journal, JournalError,
    Lease, Lsn, MaintenanceRecord, NodeRecord, Outline, PayloadRow, RepairRow, Snapshot, SuspectRow,
};
use parking_lot::Mutex;
use tokio::sync::watch;
use uuid::Uuid;

/// What happens to a commit.
#[derive(Debug, Clone)]
pub enum CommitFault {
    Refused,
    UncertainWritten,
    UncertainNotWritten,
    Slow(Duration),
    /// Waits until the sender says true, then is carried out.
    Held(watch::Receiver<bool>),
    /// Is carried out; the answer waits until the sender says true.
    AnswerHeld(watch::Receiver<bool>),
}

#[derive(Debug, Clone, Default)]
struct Tables {
    term: i64,
    payloads: Vec<PayloadRow>,
    repairs: Vec<RepairRow>,
    collections: BTreeMap<Generation, CollectionRecord>,
    databases: BTreeMap<(String, String), DatabaseRecord>,
    tenants: BTreeSet<String>,
    nodes: BTreeMap<String, NodeRecord>,
    events: BTreeMap<i64, EventRecord>,
    maintenance: BTreeMap<String, MaintenanceRecord>,
    suspects: BTreeMap<Uuid, SuspectRow>,
    pins: BTreeMap<Generation, String>,
    intents: BTreeMap<Lsn, Intent>,
    low_water: Lsn,
}

type Matches = Box<dyn Fn(&Commit) -> bool + Send>;

#[derive(Default)]
pub struct FakeJournal {
    tables: Mutex<Tables>,
    rules: Mutex<Vec<(Matches, VecDeque<CommitFault>)>>,
    down: Mutex<bool>,
    other: Mutex<Option<Lease>>,
    /// The next term that is raised is, but nobody hears of it, and nothing is heard after that.
    loses_raise: Mutex<bool>,
    released: Mutex<bool>,
    /// Nodes that come back are compared by what was written since their checkpoints.
    compare_restarts: Mutex<bool>,
}

impl FakeJournal {
    /// The next commits that match meet these faults, one each.
    pub fn fault(
        &self,
        matches: impl Fn(&Commit) -> bool + Send + 'static,
        faults: impl IntoIterator<Item = CommitFault>,
    ) {
        let faults = faults.into_iter().collect();
        self.rules.lock().push((Box::new(matches), faults));
    }

    /// Lets admission see intents: in most tests nobody carries the repair out that would follow.
    pub fn compare_restarts(&self) {
        *self.compare_restarts.lock() = true;
    }

    /// What is remembered of a node.
    pub fn node(&self, name: &str) -> Option<NodeRecord> {
        self.tables.lock().nodes.get(name).cloned()
    }

    /// As if a node had never been configured.
    pub fn forget_node(&self, name: &str) {
        let mut tables = self.tables.lock();
        tables.nodes.remove(name);
        for record in tables.collections.values_mut() {
            record.node_ids.remove(name);
        }
    }

    /// Forgets what was committed after `tables` were copied.
    pub fn backup(&self) -> impl FnOnce(&Self) + use<> {
        let copy = self.tables.lock().clone();
        |journal| *journal.tables.lock() = copy
    }

    /// Answers nothing.
    pub fn set_down(&self, down: bool) {
        *self.down.lock() = down;
    }

    /// The answer to the next raise of the term is lost, and the journal is down from then on.
    pub fn lose_raise(&self) {
        *self.loses_raise.lock() = true;
    }

    /// Another proxy holds the lease, or none does any more.
    pub fn set_held(&self, other: Option<Lease>) {
        *self.other.lock() = other;
    }

    pub fn is_released(&self) -> bool {
        *self.released.lock()
    }

    /// Another proxy becomes the writer.
    pub fn steal(&self) {
        self.tables.lock().term += 1;
    }

    /// Payload rows for a node, in order.
    pub fn payloads_of(&self, node: &str) -> Vec<PayloadRow> {
        let mut rows = self.tables.lock().payloads.clone();
        rows.retain(|row| row.node == node);
        rows.sort_by_key(|row| row.lsn);
        rows
    }

    pub fn pins(&self) -> BTreeMap<Generation, String> {
        self.tables.lock().pins.clone()
    }

    pub fn repairs(&self) -> Vec<RepairRow> {
        self.tables.lock().repairs.clone()
    }

    /// Of all payload rows: node and the first document or id of the body.
    pub fn rows(&self) -> Vec<(String, String)> {
        let mut rows = self.tables.lock().payloads.clone();
        rows.sort_by_key(|row| (row.lsn, row.node.clone()));
        let text = |row: &PayloadRow| {
            let body: serde_json::Value = serde_json::from_slice(&row.body).unwrap_or_default();
            let value = if body["documents"].is_array() {
                &body["documents"][0]
            } else {
                &body["ids"][0]
            };
            value.as_str().unwrap_or(row.op.label()).to_owned()
        };
        rows.iter().map(|row| (row.node.clone(), text(row))).collect()
    }

    /// Collections that are not deleted.
    pub fn living(&self) -> Vec<CollectionRecord> {
        let tables = self.tables.lock();
        tables
            .collections
            .values()
            .filter(|one| !one.deleted)
            .cloned()
            .collect()
    }

    fn check(&self) -> Result<(), JournalError> {
        match *self.down.lock() {
            true => Err(JournalError::Refused("the journal is down".to_owned())),
            false => Ok(()),
        }
    }

    fn take_fault(&self, commit: &Commit) -> Option<CommitFault> {
        let mut rules = self.rules.lock();
        let rule = rules
            .iter_mut()
            .find(|(matches, faults)| !faults.is_empty() && matches(commit));
        rule.and_then(|(_, faults)| faults.pop_front())
    }

    /// Carries a commit out at once, without the faults.
    pub fn write(&self, term: i64, commit: &Commit) -> Result<(), JournalError> {
        self.check()?;
        let mut tables = self.tables.lock();
        if tables.term != term {
            return Err(JournalError::Fenced {
                found: tables.term,
                ours: term,
            });
        }
        let mut copy = tables.clone();
        for change in commit {
            match change {
                Change::ReleaseLease => *self.released.lock() = true,
                Change::RenewLease => *self.released.lock() = false,
                _ => {}
            }
            copy.apply(change)?;
        }
        *tables = copy;
        Ok(())
    }
}

impl Tables {
    fn row(&mut self, id: Uuid) -> Option<&mut PayloadRow> {
        self.payloads.iter_mut().find(|row| row.id == id)
    }

    fn park_repair(&mut self, id: Uuid, reason: Option<String>) {
        if let Some(row) = self.repairs.iter_mut().find(|row| row.id == id) {
            row.parked = reason;
        }
    }

    fn apply(&mut self, change: &Change) -> Result<(), JournalError> {
        match change {
            Change::InsertPayload(row) => {
                if self.row(row.id).is_none() {
                    self.payloads.push(row.clone());
                }
            }
            Change::RemovePayloads(ids) => self.payloads.retain(|row| !ids.contains(&row.id)),
            Change::RemovePayloadsOf(generation) => self.payloads.retain(|row| row.generation != Some(*generation)),
            Change::CountAttempt(id) => {
                if let Some(row) = self.row(*id) {
                    row.attempts += 1;
                }
            }
            Change::MarkInDoubt(id) => {
                if let Some(row) = self.row(*id) {
                    row.in_doubt = true;
                }
            }
            Change::MarkRefused { node, lsn } => {
                let is_it = |row: &&mut PayloadRow| row.node == *node && row.lsn == *lsn;
                self.payloads
                    .iter_mut()
                    .filter(is_it)
                    .for_each(|row| row.refused = true);
            }
            Change::Park { id, reason } => {
                if let Some(row) = self.row(*id) {
                    row.parked = Some(reason.clone());
                }
            }
            Change::InsertRepair(row) => {
                if self.repairs.iter().all(|known| known.id != row.id) {
                    self.repairs.push(row.clone());
                }
            }
            Change::RemoveRepairs(ids) => self.repairs.retain(|row| !ids.contains(&row.id)),
            Change::RemoveRepairsOf(generation) => {
                self.repairs.retain(|row| row.generation != Some(*generation));
                self.suspects.retain(|_, row| row.generation != *generation);
                self.pins.remove(generation);
            }
            Change::Unpark(id) => {
                if let Some(row) = self.row(*id) {
                    row.parked = None;
                    row.attempts = 0;
                }
            }
            Change::RemoveBacklog { node, generation, upto } => self
                .payloads
                .retain(|row| row.node != *node || row.generation != *generation || row.lsn > *upto),
            Change::ParkRepair { id, reason } => self.park_repair(*id, Some(reason.clone())),
            Change::UnparkRepair(id) => self.park_repair(*id, None),
            Change::Intend(intent) => {
                self.intents.entry(intent.lsn).or_insert_with(|| intent.clone());
            }
            Change::RenewLease | Change::ReleaseLease => {}
            Change::SetLowWater(lsn) => self.low_water = self.low_water.max(*lsn),
            Change::PutNode(record) => {
                self.nodes.insert(record.node.clone(), record.clone());
            }
            Change::PutMaintenance(record) => {
                self.maintenance.insert(record.node.clone(), record.clone());
            }
            Change::EndMaintenance { node } => {
                self.maintenance.remove(node);
            }
            Change::InsertEvents(events) => {
                for event in events {
                    self.events.entry(event.id).or_insert_with(|| event.clone());
                }
            }
            Change::TrimEvents { keep } => {
                while self.events.len() > *keep {
                    self.events.pop_first();
                }
            }
            Change::ForgetNodeIds { node } => {
                for record in self.collections.values_mut() {
                    record.node_ids.remove(node);
                }
            }
            Change::PinReads { generation, node } => {
                self.pins.insert(*generation, node.clone());
            }
            Change::UnpinReads(generation) => {
                self.pins.remove(generation);
            }
            Change::PutSuspect(row) => {
                self.suspects.insert(row.id, row.clone());
            }
            Change::RemoveSuspects(ids) => self.suspects.retain(|id, _| !ids.contains(id)),
            Change::PutCollection(record) => {
                let mut record = record.clone();
                if let Some(known) = self.collections.get(&record.generation) {
                    record.node_ids = known.node_ids.clone();
                }
                self.collections.insert(record.generation, record);
            }
            Change::PutNodeId { generation, node, id } => match self.collections.get_mut(generation) {
                Some(record) => {
                    record.node_ids.insert(node.clone(), *id);
                }
                None => return Err(JournalError::Refused("there is no such collection".to_owned())),
            },
            Change::PutDatabase(record) => {
                let key = (record.tenant.clone(), record.name.clone());
                self.databases.insert(key, record.clone());
            }
            Change::RemoveDatabase { tenant, name } => {
                self.databases.remove(&(tenant.clone(), name.clone()));
            }
            Change::PutTenant(name) => {
                self.tenants.insert(name.clone());
            }
            Change::RemoveEverything => {
                self.payloads.clear();
                self.repairs.clear();
                self.collections.clear();
                self.databases.clear();
                self.tenants.clear();
                self.suspects.clear();
                self.pins.clear();
            }
        }
        Ok(())
    }
}

#[async_trait]
impl Journal for FakeJournal {
    /// Nobody holds the lease, unless the test says so: a test's proxy that ends is dead for all to see.
    async fn take_term(&self, _holder: &Holder, dead: Option<i64>) -> Result<i64, JournalError> {
        self.check()?;
        let other = self.other.lock().clone();
        if let Some(lease) = other.filter(|lease| dead != Some(lease.term)) {
            return Err(JournalError::Held(Box::new(lease)));
        }
        let mut tables = self.tables.lock();
        tables.term += 1;
        Ok(tables.term)
    }

    fn keeps_others_out(&self) -> bool {
        false
    }

    async fn raise_term(&self, _holder: &Holder, term: i64, to: i64) -> Result<i64, JournalError> {
        self.check()?;
        let mut tables = self.tables.lock();
        // One proxy in these tests: what is there already is ours.
        if tables.term != term && !(tables.term == to && to > term) {
            return Err(JournalError::Fenced {
                found: tables.term,
                ours: term,
            });
        }
        tables.term = tables.term.max(to);
        if std::mem::take(&mut *self.loses_raise.lock()) {
            *self.down.lock() = true;
            return Err(JournalError::Uncertain("the answer was lost".to_owned()));
        }
        Ok(tables.term)
    }

    async fn intents(&self, above: Lsn, limit: usize) -> Result<Vec<Intent>, JournalError> {
        self.check()?;
        if !*self.compare_restarts.lock() {
            return Ok(vec![]);
        }
        let tables = self.tables.lock();
        Ok(tables
            .intents
            .range(above + 1..)
            .take(limit)
            .map(|(_, intent)| intent.clone())
            .collect())
    }

    async fn rotate_intents(&self, _term: i64, covered: Lsn) -> Result<(), JournalError> {
        self.check()?;
        self.tables.lock().intents.retain(|lsn, _| *lsn > covered);
        Ok(())
    }

    async fn payload(&self, id: Uuid) -> Result<Option<PayloadRow>, JournalError> {
        self.check()?;
        Ok(self.tables.lock().row(id).cloned())
    }

    async fn load(&self) -> Result<Snapshot, JournalError> {
        self.check()?;
        let tables = self.tables.lock().clone();
        let mut backlogs: BTreeMap<(String, Option<Generation>), Backlog> = BTreeMap::new();
        for row in &tables.payloads {
            let key = (row.node.clone(), row.generation);
            let backlog = backlogs.entry(key).or_insert_with(|| Backlog {
                node: row.node.clone(),
                generation: row.generation,
                rows: 0,
                bytes: 0,
                parked: 0,
                oldest: row.created_at,
            });
            backlog.rows += 1;
            backlog.bytes += row.body.len() as u64;
            backlog.parked += u64::from(row.parked.is_some());
        }
        Ok(Snapshot {
            collections: tables.collections.into_values().collect(),
            databases: tables.databases.into_values().collect(),
            tenants: tables.tenants.into_iter().collect(),
            repairs: tables.repairs,
            backlogs: backlogs.into_values().collect(),
            nodes: tables.nodes.into_values().collect(),
            maintenance: tables.maintenance.into_values().collect(),
            suspects: tables.suspects.into_values().collect(),
            pins: tables.pins.into_iter().collect(),
            low_water: tables.low_water,
            intents: tables
                .intents
                .range(tables.low_water + 1..)
                .map(|(_, intent)| intent.clone())
                .collect(),
        })
    }

    async fn commit(&self, term: i64, commit: &Commit) -> Result<(), JournalError> {
        let uncertain = || JournalError::Uncertain("the connection broke at COMMIT".to_owned());
        match self.take_fault(commit) {
            None => {}
            Some(CommitFault::Refused) => return Err(JournalError::Refused("as the test said".to_owned())),
            Some(CommitFault::UncertainWritten) => {
                self.write(term, commit)?;
                return Err(uncertain());
            }
            Some(CommitFault::UncertainNotWritten) => return Err(uncertain()),
            Some(CommitFault::AnswerHeld(mut opened)) => {
                self.write(term, commit)?;
                let _ = opened.wait_for(|opened| *opened).await;
                return Ok(());
            }
            Some(CommitFault::Slow(pause)) => tokio::time::sleep(pause).await,
            Some(CommitFault::Held(mut opened)) => {
                let _ = opened.wait_for(|opened| *opened).await;
            }
        }
        // A commit is a round trip: others get their turn.
        tokio::time::sleep(Duration::from_micros(300)).await;
        self.write(term, commit)
    }

    async fn payloads(
        &self,
        node: &str,
        generation: Option<Generation>,
        max_rows: usize,
        max_bytes: usize,
    ) -> Result<Vec<PayloadRow>, JournalError> {
        self.check()?;
        let mut rows = self.payloads_of(node);
        rows.retain(|row| row.generation == generation);
        let mut bytes = 0;
        let mut page = vec![];
        for row in rows {
            bytes += row.body.len();
            if page.len() >= max_rows.max(1) || (!page.is_empty() && bytes > max_bytes) {
                break;
            }
            page.push(row);
        }
        Ok(page)
    }

    async fn outlines(
        &self,
        node: &str,
        generation: Option<Generation>,
        offset: usize,
        limit: usize,
    ) -> Result<Vec<Outline>, JournalError> {
        self.check()?;
        let mut rows = self.payloads_of(node);
        rows.retain(|row| row.generation == generation);
        Ok(rows.iter().skip(offset).take(limit).map(Outline::of).collect())
    }

    async fn parked(&self, limit: usize) -> Result<Vec<Outline>, JournalError> {
        self.check()?;
        let tables = self.tables.lock();
        let parked = tables.payloads.iter().rev().filter(|row| row.parked.is_some());
        Ok(parked.take(limit).map(Outline::of).collect())
    }

    async fn events(&self, before: i64, limit: usize) -> Result<Vec<EventRecord>, JournalError> {
        self.check()?;
        let tables = self.tables.lock();
        Ok(tables
            .events
            .range(..before)
            .rev()
            .take(limit)
            .map(|(_, event)| event.clone())
            .collect())
    }

    async fn ping(&self) -> Result<(), JournalError> {
        self.check()
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}
