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
mod lease;
mod log;
pub mod postgres;
mod sql;
pub mod sqlite;
mod store;

pub use lease::{Holder, LEASE, Lease, Presence, SKEW};
pub use log::{Hold, Log};

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
    /// Another node refused this entry. It is here because a refused add can still set a collection's dimension, or
    /// because no node had answered in time and the drain of that one was first: see [`Change::MarkRefused`].
    pub refused: bool,
    /// The node may have applied it already.
    pub in_doubt: bool,
    pub attempts: i32,
    /// Why it is parked; parked entries block their lane on their node until someone decides.
    pub parked: Option<String>,
    pub created_at: DateTime<Utc>,
}

/// A payload row as lists show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outline {
    /// With an empty body.
    pub row: PayloadRow,
    /// Of the body.
    pub bytes: u64,
}

impl Outline {
    pub fn of(row: &PayloadRow) -> Self {
        Self {
            bytes: row.body.len() as u64,
            row: PayloadRow {
                body: Bytes::new(),
                ..row.clone()
            },
        }
    }
}

/// How a repair row is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RepairKind {
    /// Some records, in place; what the node missed is drained first.
    Records,
    /// Compare the whole collection, in place, and repair nothing that an operator did not ask for.
    Verify,
    /// Make the whole collection (or the namespace) equal; what the node missed waits, and is dropped by the copy.
    Whole,
    /// The node cannot serve its copy: delete it there, create it and copy everything.
    Rebuild,
}

impl RepairKind {
    pub const ALL: [Self; 4] = [Self::Records, Self::Verify, Self::Whole, Self::Rebuild];

    /// As the journal and people spell it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Records => "records",
            Self::Verify => "verify",
            Self::Whole => "whole",
            Self::Rebuild => "rebuild",
        }
    }

    /// Payload rows of the same node and lane are not drained while such a row is open: the copy replaces them.
    pub fn holds_rows(self) -> bool {
        matches!(self, Self::Whole | Self::Rebuild)
    }
}

/// "Make these records of this collection on this node equal to the source."
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepairRow {
    pub id: Uuid,
    /// Name of the node that is to be repaired.
    pub node: String,
    /// `None`: the namespace.
    pub generation: Option<Generation>,
    pub kind: RepairKind,
    /// Of [`RepairKind::Records`]: which; of an empty list, the collection's name, metadata and configuration only.
    pub ids: Option<Vec<String>>,
    /// Name of the node to copy from, where one was fixed.
    pub source: Option<String>,
    /// The source's marker when the row was written: a source that lost it is none (schedule S36).
    pub source_marker: Option<String>,
    /// No refusal caused the row: if its source is gone, the row may be turned around (schedule S34).
    pub reversible: bool,
    pub lsn: Lsn,
    pub reason: String,
    /// Why it is parked: it was tried and failed, and waits for someone to decide.
    pub parked: Option<String>,
    pub created_at: DateTime<Utc>,
}

/// What is logged before any node sees a write: enough to find out later what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intent {
    pub lsn: Lsn,
    /// The collection whose lane it belongs to; `None`: the namespace lane.
    pub generation: Option<Generation>,
    pub op: Op,
    /// Records that it speaks of; `None` for namespace entries.
    pub ids: Option<Vec<String>>,
    /// With `wal.payload: always`, the body.
    pub body: Option<Bytes>,
}

impl Intent {
    /// About how many bytes there are to write.
    fn weight(&self) -> usize {
        let ids: usize = self.ids.iter().flatten().map(String::len).sum();
        ids + self.body.as_ref().map_or(0, Bytes::len)
    }
}

/// What is remembered of a node, to know it again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    pub node: String,
    /// Random id of our own database on it.
    pub marker: String,
    /// The node had everything up to here, and said so itself.
    pub checkpoint: Lsn,
}

/// Something that happened, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRecord {
    /// Grows with the term of the writer, and within it.
    pub id: i64,
    pub at: DateTime<Utc>,
    pub kind: String,
    pub node: Option<String>,
    /// Of what an operator did: who asked.
    pub who: Option<String>,
    pub what: String,
}

/// A node that an operator took out of service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MaintenanceRecord {
    pub node: String,
    pub since: DateTime<Utc>,
    /// Who asked for it, as far as is known.
    pub who: String,
}

/// Records whose outcome on a node was unknown: compared again when whatever was on its way must have landed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SuspectRow {
    pub id: Uuid,
    pub node: String,
    pub generation: Generation,
    pub ids: Vec<String>,
    /// How often they were compared.
    pub step: i32,
    pub due_at: DateTime<Utc>,
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
    pub tenants: Vec<String>,
    pub repairs: Vec<RepairRow>,
    pub backlogs: Vec<Backlog>,
    pub nodes: Vec<NodeRecord>,
    pub maintenance: Vec<MaintenanceRecord>,
    pub suspects: Vec<SuspectRow>,
    /// Collections whose pages come from one node: generation and node.
    pub pins: Vec<(Generation, String)>,
    /// Every entry up to here is applied or covered, on every node.
    pub low_water: Lsn,
    /// Intents above the low-water mark, by LSN: what was under way when the last writer ended.
    pub intents: Vec<Intent>,
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
    /// Another node refused the entry that this node still has to do.
    MarkRefused {
        node: String,
        lsn: Lsn,
    },
    Park {
        id: Uuid,
        reason: String,
    },
    /// Takes a parked payload row up again, with no attempts counted.
    Unpark(Uuid),
    /// Payload rows of one node in one lane with an LSN up to `upto`.
    RemoveBacklog {
        node: String,
        generation: Option<Generation>,
        upto: Lsn,
    },
    /// Nothing when a row with this id exists.
    InsertRepair(RepairRow),
    RemoveRepairs(Vec<Uuid>),
    /// The nodes may hold this collection's records in different orders: pages are read from this one (schedule S28).
    PinReads {
        generation: Generation,
        node: String,
    },
    /// All nodes hold the records in one order again.
    UnpinReads(Generation),
    /// All repair rows and suspects of a collection, and its pin (it was deleted).
    RemoveRepairsOf(Generation),
    ParkRepair {
        id: Uuid,
        reason: String,
    },
    UnparkRepair(Uuid),
    /// Nothing when an intent with this LSN exists.
    Intend(Intent),
    /// Never moves back.
    SetLowWater(Lsn),
    /// The lease runs for [`LEASE`] from now on, by the clock of the journal.
    RenewLease,
    /// The lease is anybody's from now on.
    ReleaseLease,
    /// Inserts or replaces.
    PutNode(NodeRecord),
    /// Inserts or replaces.
    PutMaintenance(MaintenanceRecord),
    /// Nothing when the node is in service.
    EndMaintenance {
        node: String,
    },
    /// Nothing for ids that are there.
    InsertEvents(Vec<EventRecord>),
    /// Removes all but the last ones.
    TrimEvents {
        keep: usize,
    },
    /// Forgets the UUIDs of all collections on a node: it is not the server that had them.
    ForgetNodeIds {
        node: String,
    },
    /// Inserts or replaces, by id.
    PutSuspect(SuspectRow),
    RemoveSuspects(Vec<Uuid>),
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
    /// Nothing when it is there; a tenant is never deleted.
    PutTenant(String),
    /// Forgets collections, databases, tenants, payload rows, repair rows and suspects (reset).
    RemoveEverything,
}

impl Change {
    /// What removes all rows of a collection's lane.
    pub fn rows_of(generation: Generation) -> [Self; 2] {
        [Self::RemovePayloadsOf(generation), Self::RemoveRepairsOf(generation)]
    }

    /// Whether it is about the catalog: collections, their ids, databases.
    pub fn is_of_catalog(&self) -> bool {
        use Change::{
            ForgetNodeIds, PutCollection, PutDatabase, PutNodeId, PutTenant, RemoveDatabase, RemoveEverything,
        };
        matches!(
            self,
            PutCollection(_)
                | PutNodeId { .. }
                | ForgetNodeIds { .. }
                | PutDatabase(_)
                | PutTenant(_)
                | RemoveDatabase { .. }
                | RemoveEverything
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
    /// Another writer holds the lease; certain: the term is not ours.
    #[error("it is {0}")]
    Held(Box<Lease>),
    /// Another writer has taken over; certain: nothing was written.
    #[error("another proxy took over the journal (term {found}, ours {ours})")]
    Fenced { found: i64, ours: i64 },
}

/// The durable log, the same for Postgres and SQLite.
#[async_trait]
pub trait Journal: Send + Sync + 'static {
    /// Becomes the writer: moves the term on, returns it, and renews the lease. Commits of earlier terms are refused
    /// from here on. Refused as [`JournalError::Held`] while another holds the lease, and for [`SKEW`] after its end;
    /// not, if that one's term is `dead`: the caller knows that its process is gone.
    async fn take_term(&self, holder: &Holder, dead: Option<i64>) -> Result<i64, JournalError>;
    /// Whether no other process can have this journal open: then whoever held its lease is dead.
    fn keeps_others_out(&self) -> bool;
    /// The writer of `term` moves its own term on to at least `to`: its journal was restored from a backup, and the
    /// nodes have seen later positions. Done before, and its answer lost, it is done: `holder` tells that it was we.
    async fn raise_term(&self, holder: &Holder, term: i64, to: i64) -> Result<i64, JournalError>;
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
    /// Payload rows of a lane on a node, by LSN, without the first `offset`, at most `limit`; no body is read.
    async fn outlines(
        &self,
        node: &str,
        generation: Option<Generation>,
        offset: usize,
        limit: usize,
    ) -> Result<Vec<Outline>, JournalError>;
    /// Intents above `above`, by LSN, at most `limit`.
    async fn intents(&self, above: Lsn, limit: usize) -> Result<Vec<Intent>, JournalError>;
    /// Drops intents up to `covered`, as far as that can be done without touching single rows: intents lie in tables
    /// that are rotated. Call it now and then; it never waits for long.
    async fn rotate_intents(&self, term: i64, covered: Lsn) -> Result<(), JournalError>;
    /// One payload row.
    async fn payload(&self, id: Uuid) -> Result<Option<PayloadRow>, JournalError>;
    /// Parked rows, newest first.
    async fn parked(&self, limit: usize) -> Result<Vec<Outline>, JournalError>;
    /// Events with an id below `before`, newest first.
    async fn events(&self, before: i64, limit: usize) -> Result<Vec<EventRecord>, JournalError>;
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
