//! A collection that a scenario writes through the proxy, beside what it ought to hold then.

use std::cell::RefCell;
use std::collections::HashMap;

use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::names::MARK;
use super::records::{Record, body, difference, upsert};
use super::server::Server;
use super::stage::{Stage, ensure};

/// Numbers in an embedding.
pub const DIMENSION: usize = 8;

pub struct Shelf<'a> {
    stage: &'a Stage<'a>,
    pub id: Uuid,
    name: RefCell<String>,
    pub metadata: RefCell<Value>,
    pub records: RefCell<Vec<Record>>,
}

/// A record of a document's part; `version` makes all of its content another one.
pub fn chunk(document: &str, part: usize, version: usize) -> Record {
    let seed = document
        .bytes()
        .fold(7_u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(u32::from(byte)));
    let number = |n: usize| {
        let of = seed as usize + part * 131 + version * 17 + n * n * 29;
        // Sixteenths below 8: exact in 32 bits, and in decimal.
        (of % 251) as f32 / 32.0
    };
    let metadata = json!({
        "document_id": document,
        "chunk": part,
        "version": version,
        "even": part.is_multiple_of(2),
    });
    Record {
        id: format!("{document}:{part}"),
        embedding: Some((0..DIMENSION).map(number).collect()),
        document: Some(format!("Part {part} of {document}, as of version {version}.")),
        metadata: metadata.as_object().cloned().unwrap_or_default(),
        uri: Some(format!("file:///{document}#{part}")),
    }
}

impl<'a> Shelf<'a> {
    /// Creates the collection through the proxy.
    pub async fn create(stage: &'a Stage<'a>, what: &str) -> Result<Self, String> {
        Self::create_with(stage, what, json!({}), Value::Null).await
    }

    pub async fn create_with(
        stage: &'a Stage<'a>,
        what: &str,
        metadata: Value,
        configuration: Value,
    ) -> Result<Self, String> {
        let name = stage.name(what);
        stage.step(&format!("create {name}"));
        let metadata = marked(stage, metadata);
        let mut wanted = json!({"name": name, "metadata": metadata});
        if !configuration.is_null() {
            wanted["configuration"] = configuration;
        }
        let made = stage.system.proxy.create(&wanted).await?.expect(200)?;
        let id = made["id"].as_str().and_then(|id| Uuid::parse_str(id).ok());
        Ok(Self {
            stage,
            id: id.ok_or_else(|| format!("no id in the answer to a create: {made}"))?,
            name: RefCell::new(name),
            metadata: RefCell::new(metadata),
            records: RefCell::default(),
        })
    }

    /// What it is called now.
    pub fn name(&self) -> String {
        self.name.borrow().clone()
    }

    fn proxy(&self) -> &'a Server {
        &self.stage.system.proxy
    }

    async fn write(&self, op: &str, status: u16, sent: &Value) -> Result<Value, String> {
        self.proxy().op(self.id, op, sent).await?.expect(status)
    }

    /// Adds records that are not there yet.
    pub async fn add(&self, records: &[Record]) -> Result<(), String> {
        self.write("add", 201, &body(records)).await?;
        self.records.borrow_mut().extend_from_slice(records);
        Ok(())
    }

    pub async fn upsert(&self, records: &[Record]) -> Result<(), String> {
        self.write("upsert", 200, &body(records)).await?;
        upsert(&mut self.records.borrow_mut(), records);
        Ok(())
    }

    /// Updates records that are there: metadata alone, which is merged.
    pub async fn update(&self, id: &str, metadata: &Map<String, Value>) -> Result<(), String> {
        let sent = json!({"ids": [id], "metadatas": [metadata]});
        self.write("update", 200, &sent).await?;
        for record in self.records.borrow_mut().iter_mut().filter(|record| record.id == id) {
            record.metadata.extend(metadata.clone());
        }
        Ok(())
    }

    /// Deletes what `sent` speaks of, which is what `gone` holds for; the server has to say so.
    pub async fn delete(&self, sent: &Value, gone: impl Fn(&Record) -> bool) -> Result<(), String> {
        let expected = self.records.borrow().iter().filter(|record| gone(record)).count();
        let answer = self.write("delete", 200, sent).await?;
        self.records.borrow_mut().retain(|record| !gone(record));
        ensure(answer["deleted"] == expected, || {
            format!("a delete of {sent} answered {answer} instead of {expected} deleted")
        })
    }

    /// Gives it another name and other metadata.
    pub async fn rename(&self, what: &str, metadata: Value) -> Result<(), String> {
        let name = self.stage.name(what);
        let metadata = marked(self.stage, metadata);
        let sent = json!({"new_name": name, "new_metadata": metadata});
        self.proxy().modify(self.id, &sent).await?;
        self.name.replace(name);
        self.metadata.replace(metadata);
        Ok(())
    }

    /// Deletes the collection, and looks whether the nodes that are there agree.
    pub async fn drop_it(&self) -> Result<(), String> {
        let name = self.name();
        self.proxy().delete(&name).await?.expect(200)?;
        self.is_gone(&name).await
    }

    /// Waits until no node that is there has a collection of this name, nor the proxy.
    pub async fn is_gone(&self, name: &str) -> Result<(), String> {
        for server in self.stage.present().into_iter().chain([self.proxy()]) {
            self.stage
                .until(&format!("{name} is gone from {}", server.name), async || {
                    match server.by_name(name).await? {
                        None => Ok(()),
                        Some(found) => Err(format!("{} still has it, as {}", server.name, found.id)),
                    }
                })
                .await?;
        }
        Ok(())
    }

    /// Waits until every node that is there holds exactly what was written, in that order, and the proxy shows it.
    pub async fn is_everywhere(&self) -> Result<(), String> {
        let (name, expected) = (self.name(), self.records.borrow().clone());
        let metadata = self.metadata.borrow().clone();
        let mut ids: HashMap<Uuid, &str> = HashMap::new();
        for node in self.stage.present() {
            let what = format!("{} holds {} records of {name}", node.name, expected.len());
            self.stage
                .until(&what, async || {
                    let found = node.found(&name).await?;
                    ensure(found.metadata == metadata, || {
                        format!("its metadata is {} instead of {metadata}", found.metadata)
                    })?;
                    judged(difference(&expected, &node.records(found.id).await?))
                })
                .await?;
            // Each node gives a collection an id of its own: what one server shows twice proves nothing of two.
            let id = node.found(&name).await?.id;
            if let Some(other) = ids.insert(id, &node.name) {
                return Err(format!(
                    "{other} and {} are one server: {name} has the same id there",
                    node.name
                ));
            }
        }
        self.is_readable().await
    }

    /// What the proxy shows is what was written: at once, whatever node it asks (design.md P4).
    pub async fn is_readable(&self) -> Result<(), String> {
        let name = self.name();
        let told = |reason: String| format!("through the proxy: {reason}");
        let found = self.proxy().found(&name).await?;
        ensure(found.id == self.id, || {
            told(format!("the id of {name} is {} instead of {}", found.id, self.id))
        })?;
        let records = self.proxy().records(self.id).await?;
        judged(difference(&self.records.borrow(), &records)).map_err(told)?;
        let (count, expected) = (self.proxy().count(self.id).await?, self.records.borrow().len());
        ensure(usize::try_from(count) == Ok(expected), || {
            told(format!("count says {count} instead of {expected}"))
        })
    }
}

/// With the mark that makes it ours.
fn marked(stage: &Stage<'_>, mut metadata: Value) -> Value {
    metadata[MARK] = json!(stage.run.as_str());
    metadata
}

fn judged(difference: Option<String>) -> Result<(), String> {
    difference.map_or(Ok(()), Err)
}
