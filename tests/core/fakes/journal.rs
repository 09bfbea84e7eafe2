//! A journal in memory that fails as it is told to.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use async_trait::async_trait;
use diptych::chroma::Generation;
use diptych::journal::{
    Backlog, Change, CollectionRecord, Commit, DatabaseRecord, Journal, JournalError, PayloadRow, RepairRow, Snapshot,
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
}

#[derive(Debug, Clone, Default)]
struct Tables {
    term: i64,
    payloads: Vec<PayloadRow>,
    repairs: Vec<RepairRow>,
    collections: BTreeMap<Generation, CollectionRecord>,
    databases: BTreeMap<(String, String), DatabaseRecord>,
}

type Matches = Box<dyn Fn(&Commit) -> bool + Send>;

#[derive(Default)]
pub struct FakeJournal {
    tables: Mutex<Tables>,
    rules: Mutex<Vec<(Matches, VecDeque<CommitFault>)>>,
    down: Mutex<bool>,
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

    /// Answers nothing.
    pub fn set_down(&self, down: bool) {
        *self.down.lock() = down;
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

    fn write(&self, term: i64, commit: &Commit) -> Result<(), JournalError> {
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
            Change::RemoveRepairsOf(generation) => self.repairs.retain(|row| row.generation != Some(*generation)),
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
            Change::RemoveEverything => {
                let term = self.term;
                *self = Tables {
                    term,
                    ..Tables::default()
                };
            }
        }
        Ok(())
    }
}

#[async_trait]
impl Journal for FakeJournal {
    async fn take_term(&self, _holder: &str) -> Result<i64, JournalError> {
        self.check()?;
        let mut tables = self.tables.lock();
        tables.term += 1;
        Ok(tables.term)
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
            repairs: tables.repairs,
            backlogs: backlogs.into_values().collect(),
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

    async fn parked(&self, limit: usize) -> Result<Vec<PayloadRow>, JournalError> {
        self.check()?;
        let tables = self.tables.lock();
        let parked = tables.payloads.iter().rev().filter(|row| row.parked.is_some());
        Ok(parked.take(limit).cloned().collect())
    }

    async fn ping(&self) -> Result<(), JournalError> {
        self.check()
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}
