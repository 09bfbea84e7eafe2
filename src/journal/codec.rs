//! How the journal's structs lie in columns, the same in both databases.
//!
//! Bodies are compressed, an [`Op`] and a list of ids are JSON text (where a NUL character is `\u0000`, which any text
//! column takes), and all other strings that come from outside go through [`text`], because Postgres refuses NUL in
//! text while Chroma's names and ids may contain it. Times keep microseconds: what is finer is lost.

use std::borrow::Cow;
use std::collections::BTreeMap;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{
    Backlog, CollectionRecord, DatabaseRecord, EventRecord, Intent, JournalError, MaintenanceRecord, NodeRecord,
    Outline, PayloadRow, RepairKind, RepairRow, Snapshot, SuspectRow,
};
use crate::chroma::{Generation, Op};

/// Fast, and within a few percent of higher levels on JSON full of floats.
const COMPRESSION: i32 = 1;

/// Reads columns by position; the two databases differ in how they spell ids and times.
pub trait Columns {
    fn int(&self, column: usize) -> sqlx::Result<i64>;
    fn opt_int(&self, column: usize) -> sqlx::Result<Option<i64>>;
    fn flag(&self, column: usize) -> sqlx::Result<bool>;
    fn str(&self, column: usize) -> sqlx::Result<String>;
    fn opt_str(&self, column: usize) -> sqlx::Result<Option<String>>;
    fn id(&self, column: usize) -> sqlx::Result<Uuid>;
    fn time(&self, column: usize) -> sqlx::Result<DateTime<Utc>>;
    fn bytes(&self, column: usize) -> sqlx::Result<Vec<u8>>;
    fn opt_bytes(&self, column: usize) -> sqlx::Result<Option<Vec<u8>>>;
}

/// Why a row could not be written or read; never carries what is in it.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    #[error(transparent)]
    Database(#[from] sqlx::Error),
    #[error("not the JSON that belongs here, at column {}", .0.column())]
    Json(#[from] serde_json::Error),
    #[error("body: {0}")]
    Body(#[from] std::io::Error),
    #[error("a number is out of range")]
    Range(#[from] std::num::TryFromIntError),
    #[error("body has {found} bytes, not {stored}")]
    Length { found: usize, stored: usize },
    #[error("a repair row of a kind that this version does not know")]
    Kind,
}

impl From<CodecError> for JournalError {
    fn from(error: CodecError) -> Self {
        JournalError::Refused(error.to_string())
    }
}

/// A string as a text column takes it: NUL becomes `\0` and a backslash two; nearly all strings stay as they are.
pub fn text(string: &str) -> Cow<'_, str> {
    if string.contains(['\0', '\\']) {
        Cow::Owned(string.replace('\\', "\\\\").replace('\0', "\\0"))
    } else {
        Cow::Borrowed(string)
    }
}

/// The string that [`text`] made `stored` of.
pub fn untext(stored: String) -> String {
    if !stored.contains('\\') {
        return stored;
    }
    let mut string = String::with_capacity(stored.len());
    let mut chars = stored.chars();
    while let Some(char) = chars.next() {
        match char {
            '\\' => string.push(if chars.next() == Some('0') { '\0' } else { '\\' }),
            _ => string.push(char),
        }
    }
    string
}

/// A payload row with its body compressed and its op as text.
#[derive(Debug)]
pub struct StoredPayload {
    pub id: Uuid,
    pub node: String,
    pub generation: Option<Generation>,
    pub subject: Option<Generation>,
    pub lsn: i64,
    pub op: String,
    pub refused: bool,
    pub in_doubt: bool,
    pub attempts: i64,
    pub parked: Option<String>,
    pub created_at: DateTime<Utc>,
    pub body_bytes: i64,
    pub body: Vec<u8>,
}

impl StoredPayload {
    pub fn pack(row: &PayloadRow) -> Result<Self, CodecError> {
        Ok(Self {
            id: row.id,
            node: text(&row.node).into_owned(),
            generation: row.generation,
            subject: subject(&row.op),
            lsn: row.lsn,
            op: serde_json::to_string(&row.op)?,
            refused: row.refused,
            in_doubt: row.in_doubt,
            attempts: i64::from(row.attempts),
            parked: row.parked.as_deref().map(|reason| text(reason).into_owned()),
            created_at: row.created_at,
            body_bytes: i64::try_from(row.body.len())?,
            body: zstd::bulk::compress(&row.body, COMPRESSION)?,
        })
    }

    pub fn unpack(self) -> Result<PayloadRow, CodecError> {
        let body = decompress(&self.body, self.body_bytes)?;
        Ok(PayloadRow {
            body,
            ..self.unpack_outline()?.row
        })
    }

    pub fn unpack_outline(self) -> Result<Outline, CodecError> {
        let row = PayloadRow {
            id: self.id,
            node: untext(self.node),
            generation: self.generation,
            lsn: self.lsn,
            op: serde_json::from_str(&self.op)?,
            body: Bytes::new(),
            refused: self.refused,
            in_doubt: self.in_doubt,
            attempts: i32::try_from(self.attempts)?,
            parked: self.parked.map(untext),
            created_at: self.created_at,
        };
        Ok(Outline {
            row,
            bytes: u64::try_from(self.body_bytes)?,
        })
    }

    /// In the order in which every statement of `sql` names the columns.
    pub fn read(row: &impl Columns) -> sqlx::Result<Self> {
        Ok(Self {
            body: row.bytes(12)?,
            ..Self::read_outline(row)?
        })
    }

    /// All but the body, which the statement did not ask for.
    pub fn read_outline(row: &impl Columns) -> sqlx::Result<Self> {
        Ok(Self {
            id: row.id(0)?,
            node: row.str(1)?,
            generation: row.opt_int(2)?,
            subject: row.opt_int(3)?,
            lsn: row.int(4)?,
            op: row.str(5)?,
            refused: row.flag(6)?,
            in_doubt: row.flag(7)?,
            attempts: row.int(8)?,
            parked: row.opt_str(9)?,
            created_at: row.time(10)?,
            body_bytes: row.int(11)?,
            body: vec![],
        })
    }
}

/// An intent with its body compressed, its ids and its op as text.
#[derive(Debug)]
pub struct StoredIntent {
    pub lsn: i64,
    pub generation: Option<Generation>,
    pub op: String,
    pub ids: Option<String>,
    pub body_bytes: Option<i64>,
    pub body: Option<Vec<u8>>,
}

impl StoredIntent {
    pub fn pack(intent: &Intent) -> Result<Self, CodecError> {
        let body = intent.body.as_ref();
        Ok(Self {
            lsn: intent.lsn,
            generation: intent.generation,
            op: serde_json::to_string(&intent.op)?,
            ids: intent.ids.as_ref().map(serde_json::to_string).transpose()?,
            body_bytes: body.map(|body| i64::try_from(body.len())).transpose()?,
            body: body.map(|body| zstd::bulk::compress(body, COMPRESSION)).transpose()?,
        })
    }

    /// Bytes that go to the database.
    pub fn size(&self) -> usize {
        self.ids.as_ref().map_or(0, String::len) + self.body.as_ref().map_or(0, Vec::len)
    }
}

/// In the order in which every statement of `sql` names the columns.
fn intent(row: &impl Columns) -> Result<Intent, CodecError> {
    let (ids, body_bytes) = (row.opt_str(3)?, row.opt_int(4)?);
    let body = match (row.opt_bytes(5)?, body_bytes) {
        (Some(body), Some(length)) => Some(decompress(&body, length)?),
        _ => None,
    };
    Ok(Intent {
        lsn: row.int(0)?,
        generation: row.opt_int(1)?,
        op: serde_json::from_str(&row.str(2)?)?,
        ids: ids.as_deref().map(serde_json::from_str).transpose()?,
        body,
    })
}

/// Intents of rows that are sorted by LSN. One whose commit was tried twice while the sides were changed lies on both.
pub fn intents<R: Columns>(rows: &[R]) -> Result<Vec<Intent>, CodecError> {
    let mut intents = rows.iter().map(intent).collect::<Result<Vec<_>, _>>()?;
    intents.dedup_by_key(|intent| intent.lsn);
    Ok(intents)
}

fn decompress(body: &[u8], length: i64) -> Result<Bytes, CodecError> {
    let stored = usize::try_from(length)?;
    let body = zstd::bulk::decompress(body, stored)?;
    if body.len() != stored {
        return Err(CodecError::Length {
            found: body.len(),
            stored,
        });
    }
    Ok(body.into())
}

/// The collection that an entry of the namespace lane is about: its catalog record is needed until the entry is gone.
fn subject(op: &Op) -> Option<Generation> {
    match op {
        Op::CreateCollection { generation, .. }
        | Op::ModifyCollection { generation, .. }
        | Op::DeleteCollection { generation, .. } => Some(*generation),
        Op::Other { generation, .. } => *generation,
        Op::Add
        | Op::Upsert
        | Op::Update
        | Op::Delete
        | Op::CreateDatabase { .. }
        | Op::DeleteDatabase { .. }
        | Op::CreateTenant { .. }
        | Op::ModifyTenant { .. }
        | Op::Reset => None,
    }
}

/// What [`super::Journal::load`] read, table by table.
pub struct SnapshotRows<R> {
    pub collections: Vec<R>,
    pub node_ids: Vec<R>,
    pub databases: Vec<R>,
    pub tenants: Vec<R>,
    pub repairs: Vec<R>,
    pub backlogs: Vec<R>,
    pub nodes: Vec<R>,
    pub maintenance: Vec<R>,
    pub suspects: Vec<R>,
    pub pins: Vec<R>,
    pub low_water: i64,
    pub intents: Vec<Intent>,
}

impl<R: Columns> SnapshotRows<R> {
    pub fn unpack(self) -> Result<Snapshot, CodecError> {
        let mut collections = BTreeMap::new();
        for row in &self.collections {
            let collection = collection(row)?;
            collections.insert(collection.generation, collection);
        }
        for row in &self.node_ids {
            if let Some(collection) = collections.get_mut(&row.int(0)?) {
                collection.node_ids.insert(untext(row.str(1)?), row.id(2)?);
            }
        }
        Ok(Snapshot {
            collections: collections.into_values().collect(),
            databases: self.databases.iter().map(database).collect::<Result<_, _>>()?,
            tenants: self
                .tenants
                .iter()
                .map(|row| Ok(untext(row.str(0)?)))
                .collect::<Result<_, CodecError>>()?,
            repairs: self.repairs.iter().map(repair).collect::<Result<_, _>>()?,
            backlogs: self.backlogs.iter().map(backlog).collect::<Result<_, _>>()?,
            nodes: self.nodes.iter().map(node).collect::<Result<_, _>>()?,
            maintenance: self.maintenance.iter().map(maintenance).collect::<Result<_, _>>()?,
            suspects: self.suspects.iter().map(suspect).collect::<Result<_, _>>()?,
            pins: self.pins.iter().map(pin).collect::<Result<_, _>>()?,
            low_water: self.low_water,
            intents: self.intents,
        })
    }
}

fn collection(row: &impl Columns) -> Result<CollectionRecord, CodecError> {
    Ok(CollectionRecord {
        generation: row.int(0)?,
        client_id: row.id(1)?,
        tenant: untext(row.str(2)?),
        database: untext(row.str(3)?),
        name: untext(row.str(4)?),
        deleted: row.flag(5)?,
        node_ids: BTreeMap::new(),
        created_at: row.time(6)?,
        updated_at: row.time(7)?,
    })
}

fn database(row: &impl Columns) -> Result<DatabaseRecord, CodecError> {
    Ok(DatabaseRecord {
        tenant: untext(row.str(0)?),
        name: untext(row.str(1)?),
        client_id: row.id(2)?,
    })
}

fn repair(row: &impl Columns) -> Result<RepairRow, CodecError> {
    let (ids, label) = (row.opt_str(3)?, row.str(9)?);
    let kind = RepairKind::ALL.into_iter().find(|kind| kind.label() == label);
    Ok(RepairRow {
        id: row.id(0)?,
        node: untext(row.str(1)?),
        generation: row.opt_int(2)?,
        ids: ids.as_deref().map(serde_json::from_str).transpose()?,
        source: row.opt_str(4)?.map(untext),
        source_marker: row.opt_str(5)?.map(untext),
        lsn: row.int(6)?,
        reason: untext(row.str(7)?),
        created_at: row.time(8)?,
        kind: kind.ok_or(CodecError::Kind)?,
        reversible: row.flag(10)?,
        parked: row.opt_str(11)?.map(untext),
    })
}

fn node(row: &impl Columns) -> Result<NodeRecord, CodecError> {
    Ok(NodeRecord {
        node: untext(row.str(0)?),
        marker: untext(row.str(1)?),
        checkpoint: row.int(2)?,
    })
}

fn maintenance(row: &impl Columns) -> Result<MaintenanceRecord, CodecError> {
    Ok(MaintenanceRecord {
        node: untext(row.str(0)?),
        since: row.time(1)?,
        who: untext(row.str(2)?),
    })
}

pub fn event(row: &impl Columns) -> Result<EventRecord, CodecError> {
    Ok(EventRecord {
        id: row.int(0)?,
        at: row.time(1)?,
        kind: untext(row.str(2)?),
        node: row.opt_str(3)?.map(untext),
        who: row.opt_str(4)?.map(untext),
        what: untext(row.str(5)?),
    })
}

fn suspect(row: &impl Columns) -> Result<SuspectRow, CodecError> {
    Ok(SuspectRow {
        id: row.id(0)?,
        node: untext(row.str(1)?),
        generation: row.int(2)?,
        ids: serde_json::from_str(&row.str(3)?)?,
        step: i32::try_from(row.int(4)?)?,
        due_at: row.time(5)?,
    })
}

fn pin(row: &impl Columns) -> Result<(Generation, String), CodecError> {
    Ok((row.int(0)?, untext(row.str(1)?)))
}

fn backlog(row: &impl Columns) -> Result<Backlog, CodecError> {
    Ok(Backlog {
        node: untext(row.str(0)?),
        generation: row.opt_int(1)?,
        rows: u64::try_from(row.int(2)?)?,
        bytes: u64::try_from(row.int(3)?)?,
        parked: u64::try_from(row.int(4)?)?,
        oldest: row.time(5)?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_string_comes_back_and_never_holds_a_nul(string in "[a\\\\0\\x00é]{0,12}|\\PC*") {
            let stored = text(&string).into_owned();
            prop_assert!(!stored.contains('\0'));
            prop_assert_eq!(untext(stored), string);
        }
    }
}
