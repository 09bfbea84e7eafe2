//! A collection itself on a node: that it is there, its name, its metadata, its configuration.
//!
//! All of this is done while holding the namespace lane and the collection's (rule R4).

use bytes::Bytes;
use http::Method;
use serde_json::{Map, Value, json};

use super::Trouble;
use super::compare::mend_metadata;
use super::names;
use super::read::{self, Object, Place, describe};
use super::records::Job;
use crate::chroma::node_path;
use crate::cluster::NodeRequest;
use crate::fault;
use crate::mirror::Scope;

/// What of a configuration can be changed later (chroma-facts.md 3.1).
const MUTABLE: [&str; 5] = [
    "ef_search",
    "num_threads",
    "resize_factor",
    "sync_threshold",
    "batch_size",
];

/// Makes name, metadata and configuration of the target equal.
pub(super) async fn equalise(job: &Job, source: &Object, target: &Object) -> Result<(), Trouble> {
    if source.name != target.name {
        let body = json!({"new_name": source.name});
        job.modify(Bytes::from(body.to_string())).await?;
    }
    if let Some(body) = mend_metadata(&source.metadata, &target.metadata) {
        job.modify(body).await?;
    }
    if source.configuration != target.configuration {
        let wanted: Map<String, Value> = MUTABLE
            .iter()
            .filter_map(|key| Some(((*key).to_owned(), source.configuration["hnsw"].get(key)?.clone())))
            .collect();
        let body = json!({"new_configuration": {"hnsw": wanted}});
        job.modify(Bytes::from(body.to_string())).await?;
        let (source, target) = job.objects().await?;
        if source.configuration != target.configuration {
            return Err(Trouble::Incurable("its configuration cannot be made equal".to_owned()));
        }
    }
    Ok(())
}

/// Sees to it that the target has the collection, and that we know its UUID there. `anew`: what it has is deleted first.
pub(super) async fn ensure(job: &Job, anew: bool) -> Result<(), Trouble> {
    let core = &job.core;
    let facts = job.collection.facts();
    let Some(source) = read::object(core, &job.collection, job.from()?).await? else {
        core.report_missing(&job.collection, job.source);
        return Err(Trouble::Source("it does not have the collection".to_owned()));
    };
    names::ensure_database(core, job.target, &facts.tenant, &facts.database).await?;
    let known = job.collection.node_id(job.target);
    let nowhere = Place {
        node: job.target,
        id: known.unwrap_or_default(),
        is_source: false,
    };
    let mut found = match known {
        Some(_) => read::object(core, &job.collection, nowhere).await?,
        None => None,
    };
    if found.is_none() {
        found = read::named(core, &job.collection, nowhere, &source.name).await?;
        if let Some(object) = &found
            && let Some(owner) = core.catalog.by_id(object.id)
            && owner.generation != job.collection.generation
        {
            if !owner.is_deleted() {
                return Err(Trouble::Wait(format!("{} is another collection there", source.name)));
            }
            delete(job, object).await?;
            found = None;
        }
    }
    if let Some(object) = &found
        && known != Some(object.id)
    {
        let place = (facts.tenant.as_str(), facts.database.as_str());
        let adopted = core
            .adoption(job.collection.generation, place, job.target, object.id)
            .await;
        let adopted = adopted.ok_or_else(|| Trouble::Wait("the node does not tell what it has".to_owned()))?;
        if adopted.compared {
            core.commit_or_retry(&job.scope(), vec![job.target], adopted.changes)
                .await;
            return Err(Trouble::Wait(format!(
                "{} was there already: it is compared",
                source.name
            )));
        }
    }
    if let Some(object) = found.take_if(|_| anew) {
        delete(job, &object).await?;
    }
    let object = match found {
        Some(object) => object,
        None => create(job, &source).await?,
    };
    if known != Some(object.id) {
        fault::point("copy-created");
        let change = core.node_id_change(job.collection.generation, job.target, object.id);
        if !core.commit_or_retry(&Scope::Namespace, vec![], vec![change]).await {
            return Err(Trouble::Wait("the log does not answer".to_owned()));
        }
    }
    equalise(job, &source, &object).await
}

/// DELETE takes only names: this one was read right before (R4).
async fn delete(job: &Job, object: &Object) -> Result<(), Trouble> {
    let facts = job.collection.facts();
    let path = node_path::by_name(&facts.tenant, &facts.database, &object.name);
    names::change(&job.core, job.target, NodeRequest::new(Method::DELETE, path, None), 404).await?;
    Ok(())
}

async fn create(job: &Job, source: &Object) -> Result<Object, Trouble> {
    let facts = job.collection.facts();
    // A configuration leaves out what a schema says; old keys in metadata count as configuration and are set afterwards.
    let mut fields = vec![format!("\"name\":{}", Value::from(source.name.clone()))];
    match &source.schema {
        Some(schema) => fields.push(format!("\"schema\":{schema}")),
        None if source.configuration.is_object() => fields.push(format!("\"configuration\":{}", source.configuration)),
        None => {}
    }
    let body = Bytes::from(format!("{{{}}}", fields.join(",")));
    let path = node_path::collections(&facts.tenant, &facts.database);
    let answer = names::change(&job.core, job.target, NodeRequest::post(path, body), 0).await?;
    Object::parse(&answer.body).ok_or_else(|| Trouble::Target(describe(&answer)))
}
