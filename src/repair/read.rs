//! Reading a collection from a node: what it is, which records it has, and the records.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::Trouble;
use super::compare::{Record, Space};
use crate::catalog::Collection;
use crate::chroma::{node_path, parse_ids_answer};
use crate::cluster::{NodeIndex, NodeRequest, NodeResponse};
use crate::mirror::Core;

/// Ids per page of a list; below what one answer can hold (chroma-facts.md 7).
const LIST_PAGE: usize = 20_000;

/// A collection on one node.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub node: NodeIndex,
    pub id: Uuid,
    /// Whose failure it is when it cannot be read: the source's or the target's.
    pub is_source: bool,
}

impl Place {
    pub(super) fn trouble(&self, why: impl Into<String>) -> Trouble {
        match self.is_source {
            true => Trouble::Source(why.into()),
            false => Trouble::Target(why.into()),
        }
    }
}

/// A collection object with all that a copy has to have.
#[derive(Debug, Clone)]
pub(super) struct Object {
    pub id: Uuid,
    pub name: String,
    pub dimension: Option<i64>,
    pub metadata: BTreeMap<String, Box<str>>,
    pub configuration: serde_json::Value,
    pub schema: Option<Box<str>>,
}

impl Object {
    pub(super) fn parse(body: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Raw<'a> {
            id: Uuid,
            name: String,
            dimension: Option<i64>,
            #[serde(borrow, default)]
            metadata: Option<BTreeMap<String, &'a RawValue>>,
            #[serde(default)]
            configuration_json: serde_json::Value,
            #[serde(borrow, default)]
            schema: Option<&'a RawValue>,
        }
        let raw: Raw = serde_json::from_slice(body).ok()?;
        Some(Self {
            id: raw.id,
            name: raw.name,
            dimension: raw.dimension,
            metadata: texts(raw.metadata),
            configuration: raw.configuration_json,
            schema: raw.schema.map(|schema| schema.get().into()),
        })
    }

    pub(super) fn space(&self) -> Space {
        let index = ["hnsw", "spann"]
            .iter()
            .find_map(|kind| self.configuration[*kind]["space"].as_str());
        match index {
            Some("cosine") => Space::Cosine,
            _ => Space::Exact,
        }
    }
}

fn texts(map: Option<BTreeMap<String, &RawValue>>) -> BTreeMap<String, Box<str>> {
    map.into_iter()
        .flatten()
        .map(|(key, value)| (key, value.get().into()))
        .collect()
}

/// Records as a node's answer to `get` has them, in its order.
fn parse_records(body: &[u8]) -> Option<Vec<Record>> {
    #[derive(Deserialize)]
    struct Raw<'a> {
        ids: Vec<String>,
        #[serde(borrow)]
        embeddings: Option<Vec<Option<&'a RawValue>>>,
        #[serde(borrow)]
        metadatas: Option<Vec<Option<BTreeMap<String, &'a RawValue>>>>,
        documents: Option<Vec<Option<String>>>,
        uris: Option<Vec<Option<String>>>,
    }
    let raw: Raw = serde_json::from_slice(body).ok()?;
    let (mut embeddings, mut metadatas) = (raw.embeddings?.into_iter(), raw.metadatas?.into_iter());
    let (mut documents, mut uris) = (raw.documents?.into_iter(), raw.uris?.into_iter());
    raw.ids
        .into_iter()
        .map(|id| {
            Some(Record {
                id,
                embedding: embeddings.next()?.map(|text| text.get().into()),
                metadata: texts(metadatas.next()?),
                document: documents.next()?,
                uri: uris.next()?,
            })
        })
        .collect()
}

/// A read of one node, judged: an answer that helps, or whose trouble it is that there is none.
async fn ask(core: &Arc<Core>, place: Place, request: NodeRequest) -> Result<NodeResponse, Trouble> {
    match core.bounded_read(place.node, request).await {
        Some(answer) if answer.is_success() => Ok(answer),
        Some(answer) => Err(place.trouble(describe(&answer))),
        // Where the node lives and does not answer this one, it is this one.
        None if core.cluster.node(place.node).is_up() && core.is_alive(place.node).await => {
            Err(place.trouble("a read was not answered"))
        }
        None => Err(Trouble::Wait("a node went away".to_owned())),
    }
}

pub(super) fn describe(answer: &NodeResponse) -> String {
    let body = String::from_utf8_lossy(&answer.body[..answer.body.len().min(200)]);
    format!("it answered {}: {body}", answer.status)
}

/// The collection itself; `None` where the node does not know the UUID.
pub(super) async fn object(core: &Arc<Core>, collection: &Collection, place: Place) -> Result<Option<Object>, Trouble> {
    let facts = collection.facts();
    let path = node_path::by_id(&facts.tenant, &facts.database, place.id);
    optional(core, place, path).await
}

/// What has this name on the node.
pub(super) async fn named(
    core: &Arc<Core>,
    collection: &Collection,
    place: Place,
    name: &str,
) -> Result<Option<Object>, Trouble> {
    let facts = collection.facts();
    let path = node_path::by_name(&facts.tenant, &facts.database, name);
    optional(core, place, path).await
}

async fn optional(core: &Arc<Core>, place: Place, path: String) -> Result<Option<Object>, Trouble> {
    let answer = match core.bounded_read(place.node, NodeRequest::get(path.clone())).await {
        Some(answer) if answer.status == 404 => return Ok(None),
        Some(answer) if answer.is_success() => answer,
        _ => ask(core, place, NodeRequest::get(path)).await?,
    };
    match Object::parse(&answer.body) {
        Some(object) => Ok(Some(object)),
        None => Err(place.trouble("it gave no collection")),
    }
}

async fn get(core: &Arc<Core>, collection: &Collection, place: Place, body: String) -> Result<Bytes, Trouble> {
    let facts = collection.facts();
    let path = node_path::record(&facts.tenant, &facts.database, place.id, "get");
    Ok(ask(core, place, NodeRequest::post(path, body)).await?.body)
}

/// All ids, in the node's order. Complete if nothing is deleted meanwhile.
pub(super) async fn ids(core: &Arc<Core>, collection: &Collection, place: Place) -> Result<Vec<String>, Trouble> {
    let mut all = Vec::new();
    loop {
        let body = format!(r#"{{"include":[],"limit":{LIST_PAGE},"offset":{}}}"#, all.len());
        let body = get(core, collection, place, body).await?;
        let page = parse_ids_answer(&body).ok_or_else(|| place.trouble("it gave no list of ids"))?;
        let last = page.len() < LIST_PAGE;
        all.extend(page);
        if last {
            return Ok(all);
        }
    }
}

/// Some records, in the node's order, and how many bytes they were.
pub(super) async fn records(
    core: &Arc<Core>,
    collection: &Collection,
    place: Place,
    ids: &[String],
) -> Result<(Vec<Record>, usize), Trouble> {
    if ids.is_empty() {
        return Ok((vec![], 0));
    }
    let ids = serde_json::to_string(ids).unwrap_or_default();
    let body = format!(r#"{{"ids":{ids},"include":["embeddings","metadatas","documents","uris"]}}"#);
    let body = get(core, collection, place, body).await?;
    match parse_records(&body) {
        Some(records) => Ok((records, body.len())),
        None => Err(place.trouble("it gave no records")),
    }
}

pub(super) async fn count(core: &Arc<Core>, collection: &Collection, place: Place) -> Result<u64, Trouble> {
    let facts = collection.facts();
    let path = node_path::record(&facts.tenant, &facts.database, place.id, "count");
    let answer = ask(core, place, NodeRequest::get(path)).await?;
    serde_json::from_slice(&answer.body).map_err(|_| place.trouble("it gave no count"))
}
