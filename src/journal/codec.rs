//! How the journal's structs lie in columns, the same in both databases.
//!
//! Bodies are compressed, an [`Op`] and a list of ids are JSON text (where a NUL character is `\u0000`, which any text
//! column takes), and all other strings that come from outside go through [`text`], because Postgres refuses NUL in
//! text while Chroma's names and ids may contain it. Times keep microseconds: what is finer is lost.

use std::borrow::Cow;
use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{Backlog, CollectionRecord, DatabaseRecord, JournalError, PayloadRow, RepairRow, Snapshot};
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
        let stored = usize::try_from(self.body_bytes)?;
        let body = zstd::bulk::decompress(&self.body, stored)?;
        if body.len() != stored {
            return Err(CodecError::Length {
                found: body.len(),
                stored,
            });
        }
        Ok(PayloadRow {
            id: self.id,
            node: untext(self.node),
            generation: self.generation,
            lsn: self.lsn,
            op: serde_json::from_str(&self.op)?,
            body: body.into(),
            refused: self.refused,
            in_doubt: self.in_doubt,
            attempts: i32::try_from(self.attempts)?,
            parked: self.parked.map(untext),
            created_at: self.created_at,
        })
    }

    /// In the order in which every statement of `sql` names the columns.
    pub fn read(row: &impl Columns) -> sqlx::Result<Self> {
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
            body: row.bytes(12)?,
        })
    }
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
    pub repairs: Vec<R>,
    pub backlogs: Vec<R>,
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
            repairs: self.repairs.iter().map(repair).collect::<Result<_, _>>()?,
            backlogs: self.backlogs.iter().map(backlog).collect::<Result<_, _>>()?,
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
    let ids = row.opt_str(3)?;
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
    })
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
