//! The journal: the durable half of Diptych.
//!
//! It holds what memory must not lose: the catalog (which collection has which UUID on which node), the payload rows
//! (entries that a node missed, with their bodies) and the repair rows (what has to be made equal, and to whom).
//! Everything that belongs together is one [`Commit`]: one transaction, all or nothing.
//!
//! Rules that every implementation keeps:
//! - A row has an id made by us and inserting it twice is inserting it once: after an uncertain commit the same commit
//!   is simply tried again (design.md R1).
//! - Every commit carries the term of its writer and is refused when the term has moved on (design.md 5).
//! - A commit that returned `Ok` survives a kill and a power failure (`synchronous=FULL`, `synchronous_commit=on`).

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::chroma::{Generation, Op};

mod codec;
mod log;
pub mod postgres;
mod sql;
pub mod sqlite;
mod store;

pub use log::Log;

/// Position of an entry in the log. The term that made it is in the upper bits, so positions grow across restarts
/// without a round trip: see [`first_lsn`].
pub type Lsn = i64;

/// The first position that a writer of `term` may use.
pub fn first_lsn(term: i64) -> Lsn {
    term << 40
}

/// An entry that one node missed, with what is needed to apply it later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PayloadRow {
    pub id: Uuid,
    /// Name of the node that missed it.
    pub node: String,
    /// The collection whose lane it belongs to; `None`: the namespace lane.
    pub generation: Option<Generation>,
    pub lsn: Lsn,
    pub op: Op,
    /// The client's body as it came, UUIDs not translated; compressed in the database.
    pub body: Bytes,
    /// The lead refused this entry; it is here because a refused add can still set a collection's dimension.
    pub refused: bool,
    /// The node may have applied it already.
    pub in_doubt: bool,
    pub attempts: i32,
    /// Why it is parked; parked entries block their lane on their node until someone decides.
    pub parked: Option<String>,
    pub created_at: DateTime<Utc>,
}

/// "Make these records of this collection on this node equal to the source."
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepairRow {
    pub id: Uuid,
    /// Name of the node that is to be repaired.
    pub node: String,
    /// `None`: the namespace.
    pub generation: Option<Generation>,
    /// `None`: all.
    pub ids: Option<Vec<String>>,
    /// Name of the node to copy from, where one was fixed.
    pub source: Option<String>,
    /// The source's marker when the row was written (rule srcmark).
    pub source_marker: Option<String>,
    pub lsn: Lsn,
    pub reason: String,
    pub created_at: DateTime<Utc>,
}

/// One life of a collection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CollectionRecord {
    pub generation: Generation,
    /// The UUID that clients see.
    pub client_id: Uuid,
    pub tenant: String,
    pub database: String,
    pub name: String,
    pub deleted: bool,
    /// Each node's own UUID, by node name; a node without one does not have the collection yet.
    pub node_ids: BTreeMap<String, Uuid>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}

/// A database and the id that clients see for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatabaseRecord {
    pub tenant: String,
    pub name: String,
    pub client_id: Uuid,
}

/// Everything a starting proxy has to know.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// All collections that are not deleted, and those deleted ones that rows still speak of; by generation.
    pub collections: Vec<CollectionRecord>,
    pub databases: Vec<DatabaseRecord>,
    pub repairs: Vec<RepairRow>,
    pub backlogs: Vec<Backlog>,
}

/// What waits for one node in one lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backlog {
    pub node: String,
    pub generation: Option<Generation>,
    pub rows: u64,
    /// Uncompressed body bytes.
    pub bytes: u64,
    pub parked: u64,
    pub oldest: DateTime<Utc>,
}

/// One change; a [`Commit`] applies a list of them in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Nothing when a row with this id exists.
    InsertPayload(PayloadRow),
    /// Nothing for ids that are gone.
    RemovePayloads(Vec<Uuid>),
    /// All payload rows of a collection's lane, on every node (the collection was deleted).
    RemovePayloadsOf(Generation),
    /// Adds one to a row's attempts.
    CountAttempt(Uuid),
    /// The node may have applied this row now.
    MarkInDoubt(Uuid),
    Park {
        id: Uuid,
        reason: String,
    },
    /// Nothing when a row with this id exists.
    InsertRepair(RepairRow),
    RemoveRepairs(Vec<Uuid>),
    /// All repair rows of a collection (it was deleted).
    RemoveRepairsOf(Generation),
    /// Inserts or replaces a collection, without its node ids.
    PutCollection(CollectionRecord),
    /// Sets one node's UUID of a collection; the commit is refused when there is no such collection.
    PutNodeId {
        generation: Generation,
        node: String,
        id: Uuid,
    },
    /// Inserts or replaces.
    PutDatabase(DatabaseRecord),
    RemoveDatabase {
        tenant: String,
        name: String,
    },
    /// Forgets collections, databases, payload rows and repair rows (reset).
    RemoveEverything,
}

impl Change {
    /// Whether it is about the catalog: collections, their ids, databases.
    pub fn is_of_catalog(&self) -> bool {
        use Change::{PutCollection, PutDatabase, PutNodeId, RemoveDatabase, RemoveEverything};
        matches!(
            self,
            PutCollection(_) | PutNodeId { .. } | PutDatabase(_) | RemoveDatabase { .. } | RemoveEverything
        )
    }
}

/// Changes that become durable together or not at all.
pub type Commit = Vec<Change>;

/// Why the journal did not do it.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Certain: nothing was written.
    #[error("journal refused: {0}")]
    Refused(String),
    /// Certain: nothing was written, and trying the same again is no use: it contradicts what is there.
    #[error("journal conflict: {0}")]
    Conflict(String),
    /// The answer to a commit was lost: it may have been written. Try the same commit again until it is known: until
    /// `Ok`, because a later `Refused` speaks of that attempt only.
    #[error("journal outcome unknown: {0}")]
    Uncertain(String),
    /// Another writer has taken over; certain: nothing was written.
    #[error("another proxy took over the journal (term {found}, ours {ours})")]
    Fenced { found: i64, ours: i64 },
}

/// The durable log, the same for Postgres and SQLite.
#[async_trait]
pub trait Journal: Send + Sync + 'static {
    /// Becomes the writer: moves the term on and returns it. Commits of earlier terms are refused from here on.
    /// `holder` is for people: host, process id, address.
    async fn take_term(&self, holder: &str) -> Result<i64, JournalError>;
    /// What a starting writer needs.
    async fn load(&self) -> Result<Snapshot, JournalError>;
    /// All changes, in order, in one transaction, under `term`.
    async fn commit(&self, term: i64, commit: &Commit) -> Result<(), JournalError>;
    /// The first payload rows of a lane on a node, by LSN; at least one if there is any, then at most `max_rows` and
    /// about `max_bytes` of bodies. `generation: None` is the namespace lane.
    async fn payloads(
        &self,
        node: &str,
        generation: Option<Generation>,
        max_rows: usize,
        max_bytes: usize,
    ) -> Result<Vec<PayloadRow>, JournalError>;
    /// Parked rows, newest first.
    async fn parked(&self, limit: usize) -> Result<Vec<PayloadRow>, JournalError>;
    /// A read round trip: is it there?
    async fn ping(&self) -> Result<(), JournalError>;
    /// For people: backend and place, without credentials.
    fn describe(&self) -> String;
}

/// Opens the journal that `url` names: `postgres://` and `postgresql://`, or `sqlite://` and a file.
/// `max_connections` bounds what is open at once (SQLite: for reading; it writes on one more).
pub async fn open(url: &str, max_connections: u32) -> Result<Arc<dyn Journal>, JournalError> {
    match url.split_once(':') {
        Some(("postgres" | "postgresql", _)) => Ok(Arc::new(
            postgres::PostgresJournal::connect(url, max_connections).await?,
        )),
        Some(("sqlite", _)) => Ok(Arc::new(sqlite::SqliteJournal::open(url, max_connections).await?)),
        _ => Err(JournalError::Refused(
            "the URL begins neither with postgres:// nor with sqlite://".to_owned(),
        )),
    }
}
