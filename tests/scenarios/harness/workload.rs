//! One client that uses every kind of write, and a model of what its data must then be.
//!
//! After each write the client reads its own data back through the proxy, in order; at the end the nodes are compared
//! with the model, not only with each other. Several workloads with different tags can run at once.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::api::Api;
use super::cluster::Cluster;
use super::compare::{DEFAULT, Dump, Record, compare_nodes, records_of};
use super::data::{Rng, base64_embedding};

const DIMENSION: usize = 4;

/// What a record must be. `extra` is a metadata key that only partial updates set.
#[derive(Clone, Debug, PartialEq)]
struct Expected {
    id: String,
    n: i64,
    extra: Option<i64>,
}

#[derive(Clone, Debug)]
struct Model {
    id: String,
    metadata: Value,
    records: Vec<Expected>,
}

/// (tenant, database)
type Place = (String, String);

pub struct Workload {
    api: Api,
    tag: String,
    rng: Rng,
    serial: i64,
    round: u32,
    live: BTreeMap<(Place, String), Model>,
    places: Vec<Place>,
}

impl Workload {
    /// A client whose names all begin with `tag`.
    pub fn new(api: &Api, tag: &str, seed: u64) -> Workload {
        let rng = Rng::new(seed);
        let places = vec![(DEFAULT.0.to_owned(), DEFAULT.1.to_owned())];
        Workload {
            api: api.clone(),
            tag: tag.into(),
            rng,
            serial: 0,
            round: 0,
            live: BTreeMap::new(),
            places,
        }
    }

    /// The databases that this client has used.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    fn home(&self) -> Place {
        self.places[0].clone()
    }

    fn name(&self, what: &str) -> String {
        format!("{}-{what}", self.tag)
    }

    fn within(&self, place: &Place) -> Api {
        self.api.within(&place.0, &place.1)
    }

    fn model(&mut self, place: &Place, name: &str) -> &mut Model {
        self.live
            .get_mut(&(place.clone(), name.to_owned()))
            .unwrap_or_else(|| panic!("no model of {name}"))
    }

    /// Collections to start with.
    pub async fn prepare(&mut self) {
        let home = self.home();
        for what in ["stable", "doomed-0", "renamed-0"] {
            let name = self.name(what);
            self.create(&home, &name).await;
            self.write(&home, &name, "add", 12).await;
        }
        self.new_database("first").await;
    }

    /// Every kind of write at least once.
    pub async fn round(&mut self) {
        self.round += 1;
        let (home, round) = (self.home(), self.round);
        let stable = self.name("stable");
        self.write(&home, &stable, "add", 6).await;
        self.write(&home, &stable, "upsert", 4).await;
        self.write(&home, &stable, "update", 4).await;
        self.partial_update(&home, &stable).await;
        self.delete_ids(&home, &stable, 2).await;
        self.delete_where(&home, &stable).await;
        self.write(&home, &stable, "upsert", 3).await;
        self.modify_metadata(&home, &stable).await;
        let fresh = self.name(&format!("doomed-{round}"));
        self.create(&home, &fresh).await;
        self.write(&home, &fresh, "upsert", 3).await;
        let (old, new) = (
            self.name(&format!("renamed-{}", round - 1)),
            self.name(&format!("renamed-{round}")),
        );
        self.rename(&home, &old, &new).await;
        self.write(&home, &new, "upsert", 3).await;
        let doomed = self.name(&format!("doomed-{}", round - 1));
        self.drop_collection(&home, &doomed).await;
        self.get_or_create(&home, &stable).await;
        self.new_database(&format!("round-{round}")).await;
        self.drop_oldest_database().await;
    }

    pub async fn create(&mut self, place: &Place, name: &str) {
        let metadata = json!({"owner": self.tag, "round": self.round});
        let id = self
            .within(place)
            .create_collection(name, json!({ "metadata": metadata }))
            .await
            .ok()
            .id();
        self.live.insert(
            (place.clone(), name.to_owned()),
            Model {
                id,
                metadata,
                records: Vec::new(),
            },
        );
        self.read_back(place, name).await;
    }

    async fn get_or_create(&mut self, place: &Place, name: &str) {
        let extra = json!({"get_or_create": true, "metadata": {"ignored": true}});
        let answer = self.within(place).create_collection(name, extra).await.ok();
        let model = self.model(place, name);
        assert_eq!(
            (answer.id(), &answer.json()["metadata"]),
            (model.id.clone(), &model.metadata),
            "{answer:?}"
        );
    }

    /// Adds, upserts or updates records: some ids exist, some do not.
    pub async fn write(&mut self, place: &Place, name: &str, operation: &str, count: usize) {
        let mut rng = self.rng.fork();
        let (mut ids, mut values) = (Vec::new(), Vec::new());
        let known = self.model(place, name).records.clone();
        for n in 0..count {
            self.serial += 1;
            let reuse = !known.is_empty() && (if operation == "add" { n == 0 } else { n % 2 == 0 });
            let id = match reuse {
                true => known[rng.below(known.len())].id.clone(),
                false => format!("{}-{}", self.tag, self.serial),
            };
            if !ids.contains(&id) {
                ids.push(id);
                values.push(self.serial);
            }
        }
        let base64 = rng.below(2) == 0;
        let (api, collection) = (self.within(place), self.model(place, name).id.clone());
        api.op(&collection, operation, &body(&ids, &values, base64)).await.ok();
        let records = &mut self.model(place, name).records;
        for (id, n) in ids.into_iter().zip(values) {
            match (records.iter_mut().find(|r| r.id == id), operation) {
                (Some(_), "add") | (None, "update") => {}
                (Some(record), _) => record.n = n,
                (None, _) => records.push(Expected { id, n, extra: None }),
            }
        }
        self.read_back(place, name).await;
    }

    /// Metadata only, one key only: everything else must stay.
    async fn partial_update(&mut self, place: &Place, name: &str) {
        self.serial += 1;
        let (at, serial) = (self.rng.u64() as usize, self.serial);
        let model = self.model(place, name);
        let at = at % model.records.len();
        model.records[at].extra = Some(serial);
        let (collection, id) = (model.id.clone(), model.records[at].id.clone());
        let body = json!({"ids": [id, "never-existed"], "metadatas": [{"extra": serial}, {"extra": 0}]});
        self.within(place).op(&collection, "update", &body).await.ok();
        self.read_back(place, name).await;
    }

    async fn delete_ids(&mut self, place: &Place, name: &str, count: usize) {
        let mut rng = self.rng.fork();
        let model = self.model(place, name);
        let mut ids = vec!["never-existed".to_owned()];
        for _ in 0..count {
            let at = rng.below(model.records.len());
            ids.push(model.records.remove(at).id);
        }
        let collection = model.id.clone();
        let answer = self
            .within(place)
            .op(&collection, "delete", &json!({ "ids": ids }))
            .await
            .ok();
        assert_eq!(answer.json()["deleted"], ids.len(), "{answer:?}");
        self.read_back(place, name).await;
    }

    async fn delete_where(&mut self, place: &Place, name: &str) {
        let bucket = self.rng.below(4) as i64;
        let model = self.model(place, name);
        let before = model.records.len();
        model.records.retain(|r| r.n % 4 != bucket);
        let (collection, gone) = (model.id.clone(), before - model.records.len());
        let body = json!({"where": {"bucket": bucket}, "ids": null, "where_document": null});
        let answer = self.within(place).op(&collection, "delete", &body).await.ok();
        assert_eq!(answer.json()["deleted"], gone, "{answer:?}");
        self.read_back(place, name).await;
    }

    async fn modify_metadata(&mut self, place: &Place, name: &str) {
        let metadata = json!({"owner": self.tag, "modified": self.serial});
        let model = self.model(place, name);
        model.metadata = metadata.clone();
        let id = model.id.clone();
        self.within(place)
            .modify(&id, &json!({ "new_metadata": metadata }))
            .await
            .ok();
        self.read_back(place, name).await;
    }

    pub async fn rename(&mut self, place: &Place, old: &str, new: &str) {
        let model = self
            .live
            .remove(&(place.clone(), old.to_owned()))
            .expect("a collection to rename");
        self.within(place)
            .modify(&model.id, &json!({ "new_name": new }))
            .await
            .ok();
        self.live.insert((place.clone(), new.to_owned()), model);
        self.within(place).by_name(old).await.expect(404);
        self.read_back(place, new).await;
    }

    pub async fn drop_collection(&mut self, place: &Place, name: &str) {
        self.live
            .remove(&(place.clone(), name.to_owned()))
            .expect("a collection to delete");
        self.within(place).drop_collection(name).await.ok();
        self.within(place).by_name(name).await.expect(404);
    }

    /// A tenant with a database with a collection.
    async fn new_database(&mut self, what: &str) {
        let place = (self.name(&format!("tenant {what} é")), self.name(&format!("db-{what}")));
        let api = self.within(&place);
        api.create_tenant(&place.0).await.ok();
        api.create_database(&place.1).await.ok();
        assert_eq!(api.get_database(&place.1).await.ok().json()["name"], place.1);
        self.places.push(place.clone());
        self.create(&place, "inside").await;
        self.write(&place, "inside", "add", 3).await;
    }

    async fn drop_oldest_database(&mut self) {
        let place = self
            .places
            .iter()
            .skip(1)
            .find(|p| self.live.keys().any(|(q, _)| *p == q))
            .expect("one")
            .clone();
        let api = self.within(&place);
        // Chroma itself answers so while others write; it is certain that nothing happened then.
        let locked = |text: &str| text.contains("database is locked");
        let mut answer = api.drop_database(&place.1).await;
        for _ in 0..20 {
            if answer.status != 500 || !locked(&answer.text()) {
                break;
            }
            answer = api.drop_database(&place.1).await;
        }
        answer.ok();
        api.get_database(&place.1).await.expect(404);
        self.live.retain(|(p, _), _| *p != place);
    }

    /// Reads one collection through the proxy and compares it with the model, order included.
    async fn read_back(&self, place: &Place, name: &str) {
        let model = &self.live[&(place.clone(), name.to_owned())];
        let api = self.within(place);
        let found = api.by_name(name).await.ok();
        assert_eq!(
            (found.id(), &found.json()["metadata"]),
            (model.id.clone(), &model.metadata),
            "{found:?}"
        );
        assert_eq!(api.by_id(&model.id).await.ok().json()["name"], name);
        let include = ["embeddings", "documents", "metadatas"];
        let answer = api.op(&model.id, "get", &json!({ "include": include })).await.ok();
        let records = records_of(&answer.json()).expect("an answer to get");
        matches(model, &records).unwrap_or_else(|e| panic!("{name} through the proxy: {e}"));
        let count = api.count(&model.id).await.ok();
        assert_eq!(count.json(), json!(model.records.len()), "{count:?}");
    }

    /// Reads everything through the proxy.
    pub async fn read_all(&self) {
        for (place, name) in self.live.keys() {
            self.read_back(place, name).await;
        }
    }

    fn check(&self, dump: &Dump) -> Result<(), String> {
        for ((place, name), model) in &self.live {
            let there = dump
                .databases
                .get(place)
                .and_then(|d| d.get(name))
                .ok_or(format!("{name} is missing"))?;
            matches(model, &there.records).map_err(|e| format!("{name} on {}: {e}", dump.node))?;
            if there.metadata != model.metadata {
                return Err(format!("{name} on {}: metadata {}", dump.node, there.metadata));
            }
        }
        for (place, collections) in &dump.databases {
            for name in collections
                .keys()
                .filter(|name| name.starts_with(&format!("{}-", self.tag)))
            {
                if !self.live.contains_key(&(place.clone(), name.clone())) {
                    return Err(format!("{name} on {} should be gone", dump.node));
                }
            }
        }
        Ok(())
    }
}

/// Asserts that both nodes are equal and hold what the workloads' models say; returns the records compared.
pub async fn assert_converged(cluster: &Cluster, workloads: &[Workload]) -> usize {
    let mut places: Vec<Place> = workloads.iter().flat_map(|w| w.places().to_vec()).collect();
    places.sort();
    places.dedup();
    let scopes: Vec<_> = places.iter().map(|(t, d)| (t.as_str(), d.as_str())).collect();
    let dump = compare_nodes(&[&cluster.a, &cluster.b], &scopes)
        .await
        .unwrap_or_else(|e| panic!("nodes differ: {e}"));
    for workload in workloads {
        workload
            .check(&dump)
            .unwrap_or_else(|e| panic!("not what was written: {e}"));
        workload.read_all().await;
    }
    assert!(dump.records() > 0, "nothing was compared");
    dump.records()
}

/// Runs the same step of several workloads at once.
pub async fn rounds(workloads: &mut Vec<Workload>) {
    let mut tasks = tokio::task::JoinSet::new();
    for mut workload in std::mem::take(workloads) {
        tasks.spawn(async move {
            match workload.live.is_empty() {
                true => workload.prepare().await,
                false => workload.round().await,
            }
            workload
        });
    }
    *workloads = tasks.join_all().await;
}

fn vector(n: i64) -> Vec<f32> {
    Rng::new(n as u64).vector(DIMENSION)
}

fn body(ids: &[String], values: &[i64], base64: bool) -> Value {
    let embedding = |n: &i64| {
        if base64 {
            json!(base64_embedding(&vector(*n)))
        } else {
            json!(vector(*n))
        }
    };
    json!({
        "ids": ids,
        "embeddings": values.iter().map(embedding).collect::<Vec<_>>(),
        "documents": ids.iter().zip(values).map(|(id, n)| format!("{id} is {n}")).collect::<Vec<_>>(),
        "metadatas": values.iter().map(|n| json!({"n": n, "bucket": n % 4})).collect::<Vec<_>>(),
        "uris": null,
    })
}

fn matches(model: &Model, records: &[Record]) -> Result<(), String> {
    let ids: Vec<&str> = records.iter().map(|r| r.id.as_str()).collect();
    let expected: Vec<&str> = model.records.iter().map(|r| r.id.as_str()).collect();
    if ids != expected {
        return Err(format!("ids are {ids:?}, not {expected:?}"));
    }
    for (record, expected) in records.iter().zip(&model.records) {
        let mut metadata = json!({"n": expected.n, "bucket": expected.n % 4});
        if let Some(extra) = expected.extra {
            metadata["extra"] = json!(extra);
        }
        let right = record.metadata == metadata
            && record.document == format!("{} is {}", expected.id, expected.n)
            && record.embedding == Some(vector(expected.n));
        if !right {
            return Err(format!("{record:?} is not {expected:?}"));
        }
    }
    Ok(())
}
