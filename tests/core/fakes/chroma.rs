//! What one Chroma server holds and answers, as far as a mirror can tell (chroma-facts.md 1 to 4).

use std::collections::{BTreeMap, BTreeSet};

use diptych::chroma::{OWN_TENANT, RecordRead, RecordWrite, Route, Segment, Target, classify};
use http::Method;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::env::Rng;

/// A status and a body.
pub type Reply = (u16, String);

#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    pub id: String,
    pub embedding: Value,
    pub metadata: Map<String, Value>,
    pub document: Value,
    pub uri: Value,
}

/// A collection without its UUID: what two nodes have to agree on.
#[derive(Debug, Clone, PartialEq)]
pub struct Contents {
    pub metadata: Value,
    pub dimension: Option<usize>,
    /// In the order of `get`.
    pub records: Vec<Record>,
    /// Requests to routes that nobody knows.
    pub calls: Vec<String>,
}

#[derive(Debug, Clone)]
struct Collection {
    tenant: String,
    database: String,
    name: String,
    contents: Contents,
    /// Logged, not applied: the next write of this collection applies it first (chroma-facts.md 0).
    hidden: Vec<(RecordWrite, Value)>,
}

/// Everything on a node but our own tenant, by tenant, database and name; databases without collections too.
pub type State = BTreeMap<(String, String), BTreeMap<String, Contents>>;

#[derive(Debug, Clone)]
pub struct Chroma {
    tenants: BTreeSet<String>,
    databases: BTreeMap<(String, String), Uuid>,
    collections: BTreeMap<Uuid, Collection>,
    rng: Rng,
}

impl Chroma {
    pub fn new(seed: u64) -> Self {
        let mut new = Self {
            tenants: BTreeSet::new(),
            databases: BTreeMap::new(),
            collections: BTreeMap::new(),
            rng: Rng::new(seed),
        };
        new.clear();
        new
    }

    /// UUIDs made from here on are others than those of a copy.
    pub fn reseed(&mut self, seed: u64) {
        self.rng = Rng::new(seed);
    }

    fn clear(&mut self) {
        self.tenants = BTreeSet::from(["default_tenant".to_owned()]);
        self.databases = BTreeMap::from([(place("default_tenant", "default_database"), Uuid::nil())]);
        self.collections.clear();
    }

    pub fn state(&self) -> State {
        let mut state: State = BTreeMap::new();
        for key in self.databases.keys().filter(|(tenant, _)| tenant != OWN_TENANT) {
            state.insert(key.clone(), BTreeMap::new());
        }
        for collection in self.collections.values().filter(|one| one.tenant != OWN_TENANT) {
            let names = state
                .entry(place(&collection.tenant, &collection.database))
                .or_default();
            names.insert(collection.name.clone(), collection.contents.clone());
        }
        state
    }

    /// Applies what is logged and not applied, as a restart does.
    pub fn reveal(&mut self) {
        for collection in self.collections.values_mut() {
            collection.reveal();
        }
    }

    pub fn id_of(&self, name: &str) -> Option<Uuid> {
        let mut found = self
            .collections
            .iter()
            .filter(|(_, collection)| collection.name == name);
        found.next().map(|(id, _)| *id)
    }

    /// Writes to a collection behind everybody's back.
    pub fn tamper(&mut self, name: &str, write: RecordWrite, body: Value) {
        let id = self.id_of(name).expect("a collection of this name");
        let collection = self.collections.get_mut(&id).expect("found");
        let (status, answer) = collection.write(write, body, false);
        assert!(status < 300, "{answer}");
    }

    /// A collection that was deleted is there all the same, under the UUID that it had.
    pub fn bring_back(&mut self, name: &str, id: Uuid) {
        self.create(
            "default_tenant".to_owned(),
            "default_database".to_owned(),
            &json!({ "name": name }),
        );
        let made = self.id_of(name).expect("created");
        let collection = self.collections.remove(&made).expect("created");
        self.collections.insert(id, collection);
    }

    /// Loses a collection behind everybody's back.
    pub fn lose(&mut self, name: &str) {
        self.collections.retain(|_, collection| collection.name != name);
    }

    /// Carries a request out. `hide`: a record write is logged but not applied, and answered as Chroma does then.
    pub fn handle(&mut self, method: &Method, path: &str, body: &[u8], hide: bool) -> Reply {
        let raw = path.split('?').next().unwrap_or_default();
        let value: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
        match classify(method, raw) {
            Route::Server => ok(json!({"nanosecond heartbeat": 1})),
            Route::Tenant { tenant } => match self.tenants.contains(&tenant) {
                true => ok(json!({"name": tenant})),
                false => not_found(format!("Tenant [{tenant}] not found")),
            },
            Route::Database { tenant, database } => match self.databases.get(&place(&tenant, &database)) {
                Some(id) => ok(json!({"id": id, "name": database, "tenant": tenant})),
                None => not_found(format!("Database [{database}] not found")),
            },
            Route::DatabaseList { tenant } => {
                let found = self.databases.iter().filter(|((of, _), _)| *of == tenant);
                ok(found
                    .map(|((_, name), id)| json!({"id": id, "name": name, "tenant": tenant}))
                    .collect())
            }
            Route::CollectionList { tenant, database } => {
                let found = self.collections.iter();
                let found = found.filter(|(_, one)| one.tenant == tenant && one.database == database);
                ok(found.map(|(id, one)| one.object(*id)).collect())
            }
            Route::CollectionByName { tenant, database, name } => match self.find(&tenant, &database, &name) {
                Some(id) => ok(self.collections[&id].object(id)),
                None => not_found(format!("Collection [{name}] does not exist")),
            },
            Route::CollectionById { id: Some(id), .. } => match self.collections.get(&id) {
                Some(collection) => ok(collection.object(id)),
                None => no_collection(id),
            },
            Route::RecordRead { target, read } => self.read(&target, read, &value),
            Route::RecordWrite { target, write } => match self.at(&target) {
                Ok((_, collection)) => collection.write(write, value, hide),
                Err(reply) => reply,
            },
            Route::CreateTenant => match self.tenants.insert(text(&value, "name")) {
                true => ok(json!({})),
                false => conflict("Tenant", &text(&value, "name")),
            },
            Route::ModifyTenant { .. } => ok(json!({})),
            Route::CreateDatabase { tenant } => {
                let key = place(&tenant, &text(&value, "name"));
                if self.databases.contains_key(&key) {
                    return conflict("Database", &key.1);
                }
                let id = self.rng.uuid();
                self.databases.insert(key, id);
                ok(json!({}))
            }
            Route::DeleteDatabase { tenant, database } => {
                if self.databases.remove(&place(&tenant, &database)).is_none() {
                    return not_found(format!("Database [{database}] not found"));
                }
                self.collections
                    .retain(|_, one| one.tenant != tenant || one.database != database);
                ok(json!({}))
            }
            Route::CreateCollection { tenant, database } => self.create(tenant, database, &value),
            Route::DeleteCollection { tenant, database, name } => match self.find(&tenant, &database, &name) {
                Some(id) => {
                    self.collections.remove(&id);
                    ok(json!({}))
                }
                None => not_found(format!("Collection [{name}] does not exist")),
            },
            Route::ModifyCollection { target } => self.modify(&target, &value),
            Route::Reset => {
                self.clear();
                ok(json!(true))
            }
            Route::OtherMutating {
                target: Some(target), ..
            } => match self.at(&target) {
                Ok((_, collection)) => {
                    let word = raw.rsplit('/').next().unwrap_or_default();
                    collection.contents.calls.push(format!("{word} {value}"));
                    ok(json!({}))
                }
                Err(reply) => reply,
            },
            other => (405, format!("{other:?}")),
        }
    }

    fn find(&self, tenant: &str, database: &str, name: &str) -> Option<Uuid> {
        let mut all = self.collections.iter();
        let found = all.find(|(_, one)| one.tenant == tenant && one.database == database && one.name == name);
        found.map(|(id, _)| *id)
    }

    fn at(&mut self, target: &Target) -> Result<(Uuid, &mut Collection), Reply> {
        let Segment::Id(id) = target.segment else {
            return Err(invalid("Collection ID is not a valid UUIDv4"));
        };
        let collection = self.collections.get_mut(&id).ok_or_else(|| no_collection(id))?;
        Ok((id, collection))
    }

    fn create(&mut self, tenant: String, database: String, body: &Value) -> Reply {
        let name = text(body, "name");
        if !self.databases.contains_key(&place(&tenant, &database)) {
            return invalid(format!("Database [{database}] does not exist"));
        }
        if let Some(id) = self.find(&tenant, &database, &name) {
            return match body["get_or_create"] == json!(true) {
                true => ok(self.collections[&id].object(id)),
                false => conflict("Collection", &name),
            };
        }
        let id = self.rng.uuid();
        let collection = Collection {
            tenant,
            database,
            name,
            contents: Contents {
                metadata: body["metadata"].clone(),
                dimension: None,
                records: vec![],
                calls: vec![],
            },
            hidden: vec![],
        };
        let object = collection.object(id);
        self.collections.insert(id, collection);
        ok(object)
    }

    fn modify(&mut self, target: &Target, body: &Value) -> Reply {
        let (tenant, database, id) = match self.at(target) {
            Ok((id, found)) => (found.tenant.clone(), found.database.clone(), id),
            Err(reply) => return reply,
        };
        if let Some(name) = body["new_name"].as_str() {
            if self.find(&tenant, &database, name).is_some_and(|other| other != id) {
                return internal("UNIQUE constraint failed: collections.name");
            }
            self.collections.get_mut(&id).expect("found").name = name.to_owned();
        }
        if let Some(fields) = body["new_metadata"].as_object() {
            let left: Map<String, Value> = fields
                .clone()
                .into_iter()
                .filter(|(_, value)| !value.is_null())
                .collect();
            let metadata = if left.is_empty() {
                Value::Null
            } else {
                Value::Object(left)
            };
            self.collections.get_mut(&id).expect("found").contents.metadata = metadata;
        }
        ok(json!({}))
    }

    fn read(&mut self, target: &Target, read: RecordRead, body: &Value) -> Reply {
        let collection = match self.at(target) {
            Ok((_, collection)) => collection,
            Err(reply) => return reply,
        };
        let records = &collection.contents.records;
        match read {
            RecordRead::Count => ok(json!(records.len())),
            RecordRead::Get => {
                let wanted = |record: &&Record| {
                    let listed = body["ids"].as_array().is_none_or(|ids| ids.contains(&json!(record.id)));
                    let matches = body["where"].as_object().is_none_or(|filter| {
                        filter
                            .iter()
                            .all(|(key, value)| record.metadata.get(key) == Some(value))
                    });
                    listed && matches
                };
                let limit = body["limit"].as_u64().unwrap_or(u64::MAX) as usize;
                let offset = body["offset"].as_u64().unwrap_or(0) as usize;
                let found: Vec<&Record> = records.iter().filter(wanted).skip(offset).take(limit).collect();
                let ids: Vec<&str> = found.iter().map(|record| record.id.as_str()).collect();
                let mut answer = json!({"ids": ids});
                let included = body["include"].as_array();
                for column in ["embeddings", "metadatas", "documents", "uris"] {
                    let by_default = ["metadatas", "documents"].contains(&column);
                    if included.map_or(by_default, |columns| columns.contains(&json!(column))) {
                        answer[column] = found.iter().map(|record| record.column(column)).collect();
                    } else {
                        answer[column] = Value::Null;
                    }
                }
                ok(answer)
            }
            _ => (501, String::new()),
        }
    }
}

impl Collection {
    fn object(&self, id: Uuid) -> Value {
        json!({"id": id, "name": self.name, "tenant": self.tenant, "database": self.database,
            "metadata": self.contents.metadata, "dimension": self.contents.dimension})
    }

    fn reveal(&mut self) {
        for (write, body) in std::mem::take(&mut self.hidden) {
            self.contents.apply(write, &body);
        }
    }

    fn write(&mut self, write: RecordWrite, body: Value, hide: bool) -> Reply {
        let Some(ids) = body["ids"].as_array() else {
            return (
                422,
                r#"{"error":"ChromaError","message":"Failed to deserialize: ids"}"#.to_owned(),
            );
        };
        let count = ids.len();
        if let Err(reply) = self.contents.check(&body, count) {
            return reply;
        }
        self.hidden.push((write, body));
        if hide {
            return internal("Error in compaction: it went wrong");
        }
        self.reveal();
        match write {
            RecordWrite::Add => (201, "{}".to_owned()),
            RecordWrite::Delete => ok(json!({"deleted": count})),
            _ => ok(json!({})),
        }
    }
}

impl Contents {
    /// The dimension comes first: a request that is refused for something else has set it (chroma-facts.md 18.1).
    fn check(&mut self, body: &Value, count: usize) -> Result<(), Reply> {
        if let Some(embeddings) = body["embeddings"].as_array() {
            let lengths: BTreeSet<usize> = embeddings.iter().filter_map(Value::as_array).map(Vec::len).collect();
            if lengths.len() > 1 {
                return Err(invalid("Inconsistent dimensions in provided embeddings"));
            }
            if let Some(&got) = lengths.first() {
                let expected = *self.dimension.get_or_insert(got);
                if expected != got {
                    let text = format!("Collection expecting embedding with dimension of {expected}, got {got}");
                    return Err(invalid(text));
                }
            }
        }
        let columns = ["embeddings", "metadatas", "documents", "uris"];
        if columns
            .iter()
            .any(|name| body[*name].as_array().is_some_and(|column| column.len() != count))
        {
            return Err(invalid(
                "Inconsistent number of IDs, embeddings, documents, URIs and metadatas",
            ));
        }
        Ok(())
    }

    fn apply(&mut self, write: RecordWrite, body: &Value) {
        for (at, id) in body["ids"].as_array().into_iter().flatten().enumerate() {
            let id = id.as_str().unwrap_or_default();
            let position = self.records.iter().position(|record| record.id == id);
            match (write, position) {
                (RecordWrite::Add, None) | (RecordWrite::Upsert, None) => {
                    let mut record = Record {
                        id: id.to_owned(),
                        embedding: Value::Null,
                        metadata: Map::new(),
                        document: Value::Null,
                        uri: Value::Null,
                    };
                    record.merge(body, at);
                    self.records.push(record);
                }
                (RecordWrite::Upsert | RecordWrite::Update, Some(position)) => self.records[position].merge(body, at),
                (RecordWrite::Delete, Some(position)) => {
                    self.records.remove(position);
                }
                _ => {}
            }
        }
    }
}

impl Record {
    fn column(&self, name: &str) -> Value {
        match name {
            "embeddings" => self.embedding.clone(),
            "documents" => self.document.clone(),
            "uris" => self.uri.clone(),
            _ if self.metadata.is_empty() => Value::Null,
            _ => Value::Object(self.metadata.clone()),
        }
    }

    /// chroma-facts.md 3.2: null means no change, metadata is merged key by key.
    fn merge(&mut self, body: &Value, at: usize) {
        for (field, column) in [
            (&mut self.embedding, "embeddings"),
            (&mut self.document, "documents"),
            (&mut self.uri, "uris"),
        ] {
            if !body[column][at].is_null() {
                *field = body[column][at].clone();
            }
        }
        for (key, value) in body["metadatas"][at].as_object().into_iter().flatten() {
            match value.is_null() {
                true if key == "chroma:uri" => self.uri = Value::Null,
                true => drop(self.metadata.remove(key)),
                false => drop(self.metadata.insert(key.clone(), value.clone())),
            };
        }
    }
}

fn place(tenant: &str, database: &str) -> (String, String) {
    (tenant.to_owned(), database.to_owned())
}

fn text(body: &Value, key: &str) -> String {
    body[key].as_str().unwrap_or_default().to_owned()
}

fn ok(body: Value) -> Reply {
    (200, body.to_string())
}

fn error(status: u16, name: &str, message: impl Into<String>) -> Reply {
    (status, json!({"error": name, "message": message.into()}).to_string())
}

fn invalid(message: impl Into<String>) -> Reply {
    error(400, "InvalidArgumentError", message)
}

fn internal(message: impl Into<String>) -> Reply {
    error(500, "InternalError", message)
}

fn not_found(message: impl Into<String>) -> Reply {
    error(404, "NotFoundError", message)
}

fn no_collection(id: Uuid) -> Reply {
    not_found(format!("Collection [{id}] does not exist."))
}

fn conflict(what: &str, name: &str) -> Reply {
    error(409, "ChromaError", format!("{what} [{name}] already exists"))
}
