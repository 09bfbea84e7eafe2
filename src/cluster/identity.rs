//! Who a node is, by what it holds itself.
//!
//! In a tenant of our own that clients cannot reach, every node carries a *marker*, a database whose random id nobody
//! can choose, and a *checkpoint*, a record that says up to where the node has everything. A wiped or swapped node has
//! another marker, a restored one an older checkpoint (design.md 9). Both are read and written over the connection
//! that is held: what it says is said by the process that accepted it, and by no successor.

use std::sync::Arc;

use http::Method;
use serde::Deserialize;
use serde_json::json;
use uuid::Uuid;

use super::client::{Held, NodeRequest, NodeResponse};
use super::node::Node;
use crate::chroma::{OWN_TENANT, node_path, parse_collection_object};
use crate::journal::Lsn;

const DATABASE: &str = "marker";
const COLLECTION: &str = "checkpoint";
const RECORD: &str = "checkpoint";

/// What a node says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Identity {
    pub marker: Option<String>,
    pub checkpoint: Option<Lsn>,
}

#[derive(Deserialize)]
struct DatabaseObject {
    id: Uuid,
}

#[derive(Deserialize)]
struct Records {
    metadatas: Vec<Option<Metadata>>,
}

#[derive(Deserialize)]
struct Metadata {
    lsn: Lsn,
}

impl Node {
    /// The marker of the process that is held. The caller sets the deadline.
    pub async fn read_marker(&self) -> Result<Option<String>, String> {
        read_marker(&*self.connection()?).await
    }

    /// Marker and checkpoint of the process that is held. The caller sets the deadline.
    pub async fn read_identity(&self) -> Result<Identity, String> {
        read_identity(&*self.connection()?).await
    }

    /// Gives the process that is held a marker, unless it has one.
    pub async fn write_marker(&self) -> Result<String, String> {
        write_marker(&*self.connection()?).await
    }

    /// Has the process that is held say that it has everything up to `lsn`. The marker is there.
    pub async fn write_checkpoint(&self, lsn: Lsn) -> Result<(), String> {
        self.write_checkpoint_over(&*self.connection()?, lsn).await
    }

    /// [`Node::write_checkpoint`], on the process at the other end of this connection and on no other.
    pub async fn write_checkpoint_over(&self, held: &dyn Held, lsn: Lsn) -> Result<(), String> {
        let known = *self.checkpoint_collection.lock();
        let answer = match known {
            Some(id) => Some(upsert_checkpoint(held, id, lsn).await?).filter(|answer| answer.status != 404),
            None => None,
        };
        let answer = match answer {
            Some(answer) => answer,
            None => {
                let id = prepare_checkpoint(held).await?;
                *self.checkpoint_collection.lock() = Some(id);
                upsert_checkpoint(held, id, lsn).await?
            }
        };
        if answer.is_success() {
            Ok(())
        } else {
            Err(describe("the checkpoint could not be written", &answer))
        }
    }

    fn connection(&self) -> Result<Arc<dyn Held>, String> {
        self.held().ok_or_else(|| "no connection is held".to_owned())
    }
}

async fn read_marker(held: &dyn Held) -> Result<Option<String>, String> {
    let answer = ask(held, NodeRequest::get(marker_path())).await?;
    if answer.status == 404 {
        return Ok(None);
    }
    match parse_marker(&answer) {
        Some(marker) => Ok(Some(marker)),
        None => Err(describe("the marker could not be read", &answer)),
    }
}

/// Where the marker is read.
pub(super) fn marker_path() -> String {
    node_path::database(OWN_TENANT, DATABASE)
}

pub(super) fn parse_marker(answer: &NodeResponse) -> Option<String> {
    let object: Option<DatabaseObject> = serde_json::from_slice(&answer.body).ok();
    object
        .filter(|_| answer.is_success())
        .map(|object| object.id.to_string())
}

/// Marker and checkpoint. The caller sets the deadline.
pub async fn read_identity(held: &dyn Held) -> Result<Identity, String> {
    let Some(marker) = read_marker(held).await? else {
        return Ok(Identity::default());
    };
    let path = node_path::by_name(OWN_TENANT, DATABASE, COLLECTION);
    let answer = ask(held, NodeRequest::get(path)).await?;
    let checkpoint = match parse_collection_object(&answer.body).filter(|_| answer.is_success()) {
        Some(object) => read_checkpoint(held, object.id).await?,
        None if answer.status == 404 => None,
        None => return Err(describe("the checkpoint could not be read", &answer)),
    };
    Ok(Identity {
        marker: Some(marker),
        checkpoint,
    })
}

async fn read_checkpoint(held: &dyn Held, id: Uuid) -> Result<Option<Lsn>, String> {
    let path = node_path::record(OWN_TENANT, DATABASE, id, "get");
    let body = json!({"ids": [RECORD], "include": ["metadatas"]}).to_string();
    let answer = ask(held, NodeRequest::post(path, body)).await?;
    let records: Option<Records> = serde_json::from_slice(&answer.body).ok();
    match records.filter(|_| answer.is_success()) {
        Some(records) => Ok(records.metadatas.into_iter().flatten().next().map(|found| found.lsn)),
        None => Err(describe("the checkpoint could not be read", &answer)),
    }
}

async fn write_marker(held: &dyn Held) -> Result<String, String> {
    let steps = [
        (node_path::TENANTS.to_owned(), json!({ "name": OWN_TENANT })),
        (node_path::databases(OWN_TENANT), json!({ "name": DATABASE })),
    ];
    for (path, body) in steps {
        let answer = ask(held, NodeRequest::post(path, body.to_string())).await?;
        if !answer.is_success() && answer.status != 409 {
            return Err(describe("the marker could not be written", &answer));
        }
    }
    let missing = || "the marker is not there after it was written".to_owned();
    read_marker(held).await?.ok_or_else(missing)
}

async fn prepare_checkpoint(held: &dyn Held) -> Result<Uuid, String> {
    let path = node_path::collections(OWN_TENANT, DATABASE);
    let body = json!({"name": COLLECTION, "get_or_create": true}).to_string();
    let answer = ask(held, NodeRequest::new(Method::POST, path, Some(body.into()))).await?;
    match parse_collection_object(&answer.body).filter(|_| answer.is_success()) {
        Some(object) => Ok(object.id),
        None => Err(describe("the checkpoint has no place", &answer)),
    }
}

async fn upsert_checkpoint(held: &dyn Held, id: Uuid, lsn: Lsn) -> Result<NodeResponse, String> {
    let path = node_path::record(OWN_TENANT, DATABASE, id, "upsert");
    let body = json!({"ids": [RECORD], "embeddings": [[1.0]], "metadatas": [{ "lsn": lsn }]}).to_string();
    ask(held, NodeRequest::post(path, body)).await
}

async fn ask(held: &dyn Held, request: NodeRequest) -> Result<NodeResponse, String> {
    held.send(request).await.map_err(|error| error.to_string())
}

fn describe(what: &str, answer: &NodeResponse) -> String {
    let body = String::from_utf8_lossy(&answer.body[..answer.body.len().min(300)]);
    format!("{what}: status {}: {body}", answer.status)
}
