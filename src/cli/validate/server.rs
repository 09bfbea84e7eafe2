//! Chroma's API at one address: a node itself, or the proxy.
//!
//! Collections are asked for by name and their records by the UUID that this very server gave: a node's UUID means
//! nothing to another node. Reads of a node are counted, since a scenario that made none has proved nothing.

use std::cell::Cell;
use std::rc::Rc;

use http::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use super::records::{Record, parse};
use super::web::{Reply, Web};
use crate::chroma::{OWN_TENANT, node_path};

/// Records in one answer, and collections in one list.
const PAGE: usize = 1000;
/// Our own database on a node: its id is the node's marker.
const MARKER: &str = "marker";

/// A server that speaks Chroma's API, and the database in it that validate works in.
pub struct Server {
    /// The node's name; `the proxy`.
    pub name: String,
    pub web: Web,
    pub tenant: String,
    pub database: String,
    /// Counts reads; shared by all nodes, and nobody's at the proxy.
    pub reads: Rc<Cell<u64>>,
}

/// A collection as a server has it.
#[derive(Debug, Clone)]
pub struct Collection {
    pub id: Uuid,
    pub name: String,
    pub metadata: Value,
    pub configuration: Value,
    pub dimension: Value,
}

impl Collection {
    fn of(value: &Value) -> Result<Self, String> {
        let text = |field: &str| value[field].as_str().ok_or_else(|| format!("no {field} in {value}"));
        Ok(Self {
            id: Uuid::parse_str(text("id")?).map_err(|error| format!("{error} in {value}"))?,
            name: text("name")?.to_owned(),
            metadata: value["metadata"].clone(),
            configuration: value["configuration_json"].clone(),
            dimension: value["dimension"].clone(),
        })
    }
}

impl Server {
    async fn read(&self, path: &str) -> Result<Reply, String> {
        let reply = self.web.get(path).await;
        self.count_read(reply)
    }

    /// Only what was answered is a read.
    fn count_read(&self, reply: Result<Reply, String>) -> Result<Reply, String> {
        if reply.is_ok() {
            self.reads.set(self.reads.get() + 1);
        }
        reply.map_err(|reason| format!("{}: {reason}", self.name))
    }

    /// The version, which a Chroma server tells as a JSON string.
    pub async fn version(&self) -> Result<String, String> {
        let reply = self.read("/api/v2/version").await?;
        match reply.expect(200)?.as_str() {
            Some(version) => Ok(version.to_owned()),
            None => Err(format!("{}: not a version: {reply}", self.name)),
        }
    }

    pub async fn heartbeat(&self) -> Result<(), String> {
        let reply = self.read("/api/v2/heartbeat").await?;
        match reply.expect(200)?["nanosecond heartbeat"].as_u64() {
            Some(_) => Ok(()),
            None => Err(format!("{}: not a heartbeat: {reply}", self.name)),
        }
    }

    /// The random id by which Diptych knows a node. `None`: it has none.
    pub async fn marker(&self) -> Result<Option<String>, String> {
        let reply = self.read(&node_path::database(OWN_TENANT, MARKER)).await?;
        match reply.status {
            404 => Ok(None),
            _ => Ok(reply.expect(200)?["id"].as_str().map(str::to_owned)),
        }
    }

    /// The collection of this name. `None`: there is none.
    pub async fn by_name(&self, name: &str) -> Result<Option<Collection>, String> {
        let reply = self
            .read(&node_path::by_name(&self.tenant, &self.database, name))
            .await?;
        match reply.status {
            404 => Ok(None),
            _ => Collection::of(&reply.expect(200)?).map(Some),
        }
    }

    /// The collection of this name, which has to be there.
    pub async fn found(&self, name: &str) -> Result<Collection, String> {
        let found = self.by_name(name).await?;
        found.ok_or_else(|| format!("{} has no collection {name}", self.name))
    }

    /// The collection with this id. `None`: there is none.
    pub async fn by_id(&self, id: Uuid) -> Result<Option<Collection>, String> {
        let reply = self.read(&node_path::by_id(&self.tenant, &self.database, id)).await?;
        match reply.status {
            404 => Ok(None),
            _ => Collection::of(&reply.expect(200)?).map(Some),
        }
    }

    /// All collections of the database.
    pub async fn collections(&self) -> Result<Vec<Collection>, String> {
        let mut found = vec![];
        loop {
            let path = node_path::collections(&self.tenant, &self.database);
            let page = format!("{path}?limit={PAGE}&offset={}", found.len());
            let page = self.read(&page).await?.expect(200)?;
            let page = page
                .as_array()
                .ok_or_else(|| format!("{}: not a list: {page}", self.name))?;
            for value in page {
                found.push(Collection::of(value)?);
            }
            if page.len() < PAGE {
                return Ok(found);
            }
        }
    }

    /// A request about the records of a collection, by this server's own UUID of it.
    pub async fn op(&self, id: Uuid, op: &str, body: &Value) -> Result<Reply, String> {
        let path = node_path::record(&self.tenant, &self.database, id, op);
        let reply = self.web.post(&path, body).await;
        if op == "get" || op == "query" {
            self.count_read(reply)
        } else {
            reply
        }
    }

    /// All records, in the order of `get`.
    pub async fn records(&self, id: Uuid) -> Result<Vec<Record>, String> {
        let mut records = vec![];
        loop {
            let include = ["embeddings", "documents", "metadatas", "uris"];
            let body = json!({"limit": PAGE, "offset": records.len(), "include": include});
            let page = parse(&self.op(id, "get", &body).await?.expect(200)?)?;
            let last = page.len() < PAGE;
            records.extend(page);
            if last {
                return Ok(records);
            }
        }
    }

    /// How many records there are, in a collection that has to be there.
    pub async fn count(&self, id: Uuid) -> Result<u64, String> {
        let count = self.counted(id).await?;
        count.ok_or_else(|| format!("{} has no collection {id}", self.name))
    }

    /// How many records there are. `None`: there is no such collection.
    pub async fn counted(&self, id: Uuid) -> Result<Option<u64>, String> {
        let path = node_path::record(&self.tenant, &self.database, id, "count");
        let reply = self.read(&path).await?;
        if reply.status == 404 {
            return Ok(None);
        }
        let count = reply.expect(200)?.as_u64();
        count
            .map(Some)
            .ok_or_else(|| format!("{}: not a number: {reply}", self.name))
    }

    pub async fn create(&self, body: &Value) -> Result<Reply, String> {
        self.web
            .post(&node_path::collections(&self.tenant, &self.database), body)
            .await
    }

    /// Changes name, metadata or configuration.
    pub async fn modify(&self, id: Uuid, body: &Value) -> Result<Value, String> {
        let path = node_path::collection(&self.tenant, &self.database, id);
        self.web.ask(Method::PUT, &path, Some(body)).await?.expect(200)
    }

    /// Deletes the collection of this name.
    pub async fn delete(&self, name: &str) -> Result<Reply, String> {
        let path = node_path::by_name(&self.tenant, &self.database, name);
        self.web.ask(Method::DELETE, &path, None).await
    }

    /// For people: how to look at a collection's records.
    pub fn look(&self, id: Uuid) -> String {
        let path = node_path::record(&self.tenant, &self.database, id, "get");
        format!(
            "curl -s -H 'content-type: application/json' -d '{{\"limit\":10}}' 'http://{}{path}'",
            self.web.authority
        )
    }
}
