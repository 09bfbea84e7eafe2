//! What a mutating request means, apart from its payload: the part of a log entry that decides how it is replayed.

use serde::{Deserialize, Serialize};

use super::routes::RecordWrite;

impl From<RecordWrite> for Op {
    fn from(write: RecordWrite) -> Self {
        match write {
            RecordWrite::Add => Self::Add,
            RecordWrite::Upsert => Self::Upsert,
            RecordWrite::Update => Self::Update,
            RecordWrite::Delete => Self::Delete,
        }
    }
}

/// Number of one life of a collection: a name that is deleted and created again gets a new one.
pub type Generation = i64;

/// Kind and addressee of a mutating request. The payload stays beside it, as the bytes that the client sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Op {
    /// `POST .../add`: keeps records that exist.
    Add,
    /// `POST .../upsert`.
    Upsert,
    /// `POST .../update`: skips records that do not exist.
    Update,
    /// `POST .../delete` by ids; deletes by `where` were resolved to ids before they became an entry.
    Delete,
    /// `POST .../collections`.
    CreateCollection {
        tenant: String,
        database: String,
        name: String,
        generation: Generation,
    },
    /// `PUT .../collections/{id}`: name, metadata or configuration; `new_name` is the name after it, if it renames.
    ModifyCollection {
        generation: Generation,
        new_name: Option<String>,
    },
    /// `DELETE .../collections/{name}`, of this generation only.
    DeleteCollection {
        tenant: String,
        database: String,
        name: String,
        generation: Generation,
    },
    /// `POST .../databases`.
    CreateDatabase { tenant: String, name: String },
    /// `DELETE .../databases/{name}` with every collection in it.
    DeleteDatabase { tenant: String, name: String },
    /// `POST /api/v2/tenants`.
    CreateTenant { name: String },
    /// `PATCH /api/v2/tenants/{name}`.
    ModifyTenant { name: String },
    /// `POST /api/v2/reset`.
    Reset,
    /// A mutating route that this release does not know; `path` is raw and has `{collection}` where the collection's
    /// own UUID on the node belongs.
    Other {
        method: String,
        path: String,
        generation: Option<Generation>,
    },
}

impl Op {
    /// Entries of these kinds belong to their collection's lane; all others to the namespace lane.
    pub fn is_record(&self) -> bool {
        matches!(self, Op::Add | Op::Upsert | Op::Update | Op::Delete)
    }

    /// The existing collection that a namespace entry is about, if it is about one.
    pub fn generation(&self) -> Option<Generation> {
        match self {
            Op::ModifyCollection { generation, .. } | Op::DeleteCollection { generation, .. } => Some(*generation),
            Op::Other { generation, .. } => *generation,
            _ => None,
        }
    }

    /// The closed label set of metrics and logs.
    pub fn label(&self) -> &'static str {
        match self {
            Op::Add => "add",
            Op::Upsert => "upsert",
            Op::Update => "update",
            Op::Delete => "delete",
            Op::CreateCollection { .. } => "create_collection",
            Op::ModifyCollection { .. } => "modify_collection",
            Op::DeleteCollection { .. } => "delete_collection",
            Op::CreateDatabase { .. } => "create_database",
            Op::DeleteDatabase { .. } => "delete_database",
            Op::CreateTenant { .. } => "create_tenant",
            Op::ModifyTenant { .. } => "modify_tenant",
            Op::Reset => "reset",
            Op::Other { .. } => "other",
        }
    }
}
