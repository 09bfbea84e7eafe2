//! Reads nodes directly and compares everything that they hold.
//!
//! Nothing here goes through the proxy. Collections are found by name, because each node has its own UUIDs. After the
//! first comparison a harmless write is sent to each collection of each node, which makes entries visible that a
//! cancelled request left hidden in Chroma's own log, and everything is compared once more.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::api::Api;
use super::chroma::ChromaNode;

/// A tenant and a database.
pub type Scope<'a> = (&'a str, &'a str);

pub const DEFAULT: Scope<'static> = ("default_tenant", "default_database");

/// Diptych's own tenant, which is nobody's data.
pub const OWN_TENANT: &str = "diptych_system";

/// One collection as a node has it.
#[derive(Clone, Debug, Default)]
pub struct Collection {
    pub id: String,
    pub metadata: Value,
    pub configuration: Value,
    pub dimension: Value,
    pub records: Vec<Record>,
}

/// One record, in the order of `get`.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    pub id: String,
    pub embedding: Option<Vec<f32>>,
    pub document: Value,
    pub metadata: Value,
    pub uri: Value,
}

/// What one node holds in some databases.
#[derive(Clone, Debug, Default)]
pub struct Dump {
    pub node: String,
    /// (tenant, database) -> name -> collection; a database that does not exist is absent.
    pub databases: BTreeMap<(String, String), BTreeMap<String, Collection>>,
    /// Number of HTTP reads that this took.
    pub reads: usize,
}

/// Asserts that the nodes hold the same in `scopes` and returns the number of records compared (on one node).
pub async fn assert_nodes_equal(nodes: &[&ChromaNode], scopes: &[Scope<'_>]) -> usize {
    match compare_nodes(nodes, scopes).await {
        Ok(dump) => dump.records(),
        Err(difference) => panic!("nodes differ: {difference}"),
    }
}

/// The first node's content if all nodes hold the same, else the first difference.
pub async fn compare_nodes(nodes: &[&ChromaNode], scopes: &[Scope<'_>]) -> Result<Dump, String> {
    compare_once(nodes, scopes).await?;
    for node in nodes {
        for scope in scopes {
            flush(&node.api().within(scope.0, scope.1)).await?;
        }
    }
    compare_once(nodes, scopes)
        .await
        .map_err(|e| format!("after a flush of Chroma's own log: {e}"))
}

async fn compare_once(nodes: &[&ChromaNode], scopes: &[Scope<'_>]) -> Result<Dump, String> {
    let mut dumps = Vec::new();
    for node in nodes {
        dumps.push(Dump::read(node, scopes).await?);
    }
    let first = dumps.remove(0);
    for other in &dumps {
        first
            .same_as(other)
            .map_err(|e| format!("{} and {}: {e}", first.node, other.node))?;
    }
    Ok(first)
}

/// `delete` of an id that never exists, in every collection.
pub async fn flush(api: &Api) -> Result<(), String> {
    for collection in list(api, &mut 0).await? {
        let id = collection["id"].as_str().ok_or("a collection without id")?;
        let answer = api.try_op(id, "delete", &json!({"ids": ["\u{1}never"]})).await?;
        if answer.status != 200 {
            return Err(format!("flush: {answer:?}"));
        }
    }
    Ok(())
}

async fn list(api: &Api, reads: &mut usize) -> Result<Vec<Value>, String> {
    *reads += 1;
    let answer = api.try_get(&api.path("/collections")).await?;
    match answer.json() {
        Value::Array(collections) if answer.status == 200 => Ok(collections),
        _ => Err(format!("{answer:?}")),
    }
}

impl Dump {
    pub async fn read(node: &ChromaNode, scopes: &[Scope<'_>]) -> Result<Dump, String> {
        let mut dump = Dump {
            node: node.name.clone(),
            ..Dump::default()
        };
        for (tenant, database) in scopes {
            assert_ne!(*tenant, OWN_TENANT, "not a part of anybody's data");
            let api = node.api().within(tenant, database);
            dump.reads += 1;
            let answer = api.try_get(&api.path("")).await?;
            match answer.status {
                200 => {}
                404 => continue,
                _ => return Err(format!("{}: {answer:?}", node.name)),
            }
            let mut collections = BTreeMap::new();
            for entry in list(&api, &mut dump.reads).await? {
                let name = entry["name"]
                    .as_str()
                    .ok_or_else(|| format!("no name in {entry}"))?
                    .to_owned();
                let collection = Collection::read(&api, &entry, &mut dump.reads).await?;
                if collections.insert(name.clone(), collection).is_some() {
                    return Err(format!("{}: two collections named {name}", node.name));
                }
            }
            dump.databases
                .insert(((*tenant).to_owned(), (*database).to_owned()), collections);
        }
        Ok(dump)
    }

    pub fn records(&self) -> usize {
        self.databases
            .values()
            .flat_map(|d| d.values())
            .map(|c| c.records.len())
            .sum()
    }

    /// A collection of the default database.
    #[track_caller]
    pub fn collection(&self, name: &str) -> &Collection {
        let scope = (DEFAULT.0.to_owned(), DEFAULT.1.to_owned());
        self.databases
            .get(&scope)
            .and_then(|d| d.get(name))
            .unwrap_or_else(|| panic!("{}: no {name}", self.node))
    }

    fn same_as(&self, other: &Dump) -> Result<(), String> {
        same_keys("databases", &self.databases, &other.databases)?;
        for (scope, mine) in &self.databases {
            let theirs = &other.databases[scope];
            same_keys(&format!("collections of {}/{}", scope.0, scope.1), mine, theirs)?;
            for (name, collection) in mine {
                collection
                    .same_as(&theirs[name])
                    .map_err(|e| format!("collection {name}: {e}"))?;
            }
        }
        Ok(())
    }
}

impl Collection {
    async fn read(api: &Api, entry: &Value, reads: &mut usize) -> Result<Collection, String> {
        const PAGE: usize = 1000;
        let id = entry["id"]
            .as_str()
            .ok_or_else(|| format!("no id in {entry}"))?
            .to_owned();
        let mut records = Vec::new();
        loop {
            let include = ["embeddings", "documents", "metadatas", "uris"];
            let body = json!({"limit": PAGE, "offset": records.len(), "include": include});
            *reads += 1;
            let answer = api.try_op(&id, "get", &body).await?;
            if answer.status != 200 {
                return Err(format!("{answer:?}"));
            }
            let page = records_of(&answer.json())?;
            let last = page.len() < PAGE;
            records.extend(page);
            if last {
                break;
            }
        }
        *reads += 1;
        // The dimension in a list can be older than the records; by-id is what clients act on.
        let now = api
            .try_get(&api.path(&format!("/collections/by-id/{id}")))
            .await?
            .json();
        Ok(Collection {
            id,
            metadata: now["metadata"].clone(),
            configuration: now["configuration_json"].clone(),
            dimension: now["dimension"].clone(),
            records,
        })
    }

    pub fn space(&self) -> &str {
        self.configuration["hnsw"]["space"].as_str().unwrap_or("l2")
    }

    fn same_as(&self, other: &Collection) -> Result<(), String> {
        same("metadata", &self.metadata, &other.metadata)?;
        same("configuration", &self.configuration, &other.configuration)?;
        same("dimension", &self.dimension, &other.dimension)?;
        let ids = |c: &Collection| c.records.iter().map(|r| r.id.clone()).collect::<Vec<_>>();
        let (mine, theirs) = (ids(self), ids(other));
        same_sets("records", mine.iter().collect(), theirs.iter().collect())?;
        if let Some(at) = (0..mine.len().max(theirs.len())).find(|at| mine.get(*at) != theirs.get(*at)) {
            return Err(format!(
                "order of get differs at {at}: {:?} and {:?}",
                mine.get(at),
                theirs.get(at)
            ));
        }
        for (a, b) in self.records.iter().zip(&other.records) {
            a.same_as(b, self.space() == "cosine")
                .map_err(|e| format!("record {:?}: {e}", a.id))?;
        }
        Ok(())
    }
}

impl Record {
    pub fn same_as(&self, other: &Record, cosine: bool) -> Result<(), String> {
        same("document", &self.document, &other.document)?;
        same("metadata", &self.metadata, &other.metadata)?;
        same("uri", &self.uri, &other.uri)?;
        let close = |a: &f32, b: &f32| match cosine {
            true => (a - b).abs() <= 1e-6 * a.abs().max(b.abs()),
            false => a.to_bits() == b.to_bits(),
        };
        match (&self.embedding, &other.embedding) {
            (Some(a), Some(b)) if a.len() == b.len() && a.iter().zip(b).all(|(a, b)| close(a, b)) => Ok(()),
            (None, None) => Ok(()),
            (a, b) => Err(format!("embedding: {a:?} and {b:?}")),
        }
    }
}

/// The records in the answer of a `get`.
pub fn records_of(answer: &Value) -> Result<Vec<Record>, String> {
    let ids = answer["ids"].as_array().ok_or_else(|| format!("no ids in {answer}"))?;
    let at = |field: &str, n: usize| answer[field].get(n).cloned().unwrap_or(Value::Null);
    let vector = |value: Value| {
        let numbers = value.as_array()?;
        Some(
            numbers
                .iter()
                .map(|n| n.as_f64().map_or(f32::NAN, |n| n as f32))
                .collect(),
        )
    };
    let record = |(n, id): (usize, &Value)| Record {
        id: id.as_str().unwrap_or_default().to_owned(),
        embedding: vector(at("embeddings", n)),
        document: at("documents", n),
        metadata: at("metadatas", n),
        uri: at("uris", n),
    };
    Ok(ids.iter().enumerate().map(record).collect())
}

fn same(what: &str, a: &Value, b: &Value) -> Result<(), String> {
    if a == b {
        Ok(())
    } else {
        Err(format!("{what}: {a} and {b}"))
    }
}

fn same_keys<K: Ord + std::fmt::Debug, V>(what: &str, a: &BTreeMap<K, V>, b: &BTreeMap<K, V>) -> Result<(), String> {
    same_sets(what, a.keys().collect(), b.keys().collect())
}

fn same_sets<K: Ord + std::fmt::Debug>(what: &str, a: BTreeSet<&K>, b: BTreeSet<&K>) -> Result<(), String> {
    if a == b {
        return Ok(());
    }
    let only = |a: &BTreeSet<&K>, b: &BTreeSet<&K>| {
        let only: Vec<_> = a.difference(b).collect();
        format!("{} ({:?})", only.len(), &only[..only.len().min(10)])
    };
    Err(format!(
        "{what}: only on the first: {}; only on the second: {}",
        only(&a, &b),
        only(&b, &a)
    ))
}
