//! Reads of the namespace: tenants, databases, collections.
//!
//! Every node has its own UUIDs and its own order, so these answers are put together here: with the ids that clients
//! know, in the order of those ids, whatever node answers. A node serves them while it is in step with the namespace
//! and has every collection that the answer speaks of.

use std::sync::Arc;

use uuid::Uuid;

use crate::catalog::Collection;
use crate::chroma::{Page, Route, node_path, render_list, translate, translate_list, translate_object};
use crate::cluster::{NodeIndex, NodeRequest, NodeResponse};
use crate::mirror::{Answer, Core};

const PAGE: usize = 1000;

/// Answers a read of the namespace; `raw` is the path with its query.
pub async fn answer(core: &Arc<Core>, route: Route, raw: &str) -> Answer {
    core.wait_for_namespace().await;
    let outcome = match route {
        Route::Database { tenant, database } => show_database(core, &tenant, &database, raw).await,
        Route::DatabaseList { tenant } => list_databases(core, &tenant, raw).await,
        Route::CollectionList { tenant, database } => list_collections(core, &tenant, &database, raw).await,
        Route::CollectionCount { tenant, database } => {
            let nodes = complete_nodes(core, &tenant, &database).await;
            from_one(core, nodes, raw).await.map(|(_, response)| as_is(&response))
        }
        Route::CollectionByName { tenant, database, name } => {
            match core.find_by_name(&tenant, &database, &name).await {
                Ok(Some(collection)) => show_collection(core, &collection, |_| raw.to_owned()).await,
                Ok(None) => from_one(core, core.namespace_nodes(), raw)
                    .await
                    .map(|(_, response)| as_is(&response)),
                Err(answer) => Err(answer),
            }
        }
        Route::CollectionById {
            tenant,
            database,
            id: Some(id),
            span,
        } => match core.find_by_id(&tenant, &database, id).await {
            Ok(Some(collection)) => {
                show_collection(core, &collection, |node_id| translate(raw, span.clone(), node_id)).await
            }
            Ok(None) => from_one(core, core.namespace_nodes(), raw)
                .await
                .map(|(_, response)| as_is(&response)),
            Err(answer) => Err(answer),
        },
        _ => from_one(core, core.namespace_nodes(), raw)
            .await
            .map(|(_, response)| as_is(&response)),
    };
    outcome.unwrap_or_else(|answer| answer)
}

fn as_is(response: &NodeResponse) -> Answer {
    Answer::of_node(response, response.body.clone())
}

/// The answer of one of these nodes: the next is asked when one fails, or alone answers with a server error.
async fn from_one(core: &Arc<Core>, nodes: Vec<NodeIndex>, raw: &str) -> Result<(NodeIndex, NodeResponse), Answer> {
    let mut last = None;
    for node in spread(core, nodes) {
        if let Some(response) = core.bounded_read(node, NodeRequest::get(raw)).await {
            if response.status < 500 {
                return Ok((node, response));
            }
            last = Some((node, response));
        }
    }
    last.ok_or_else(|| Answer::unavailable("No node can answer this at the moment."))
}

/// The nodes with the one to ask first in front.
fn spread(core: &Core, mut nodes: Vec<NodeIndex>) -> Vec<NodeIndex> {
    if let Some(first) = core.cluster.choose(&nodes, core.env.random()) {
        nodes.retain(|&node| node != first);
        nodes.insert(0, first);
    }
    nodes
}

/// Nodes in step with the namespace that have every collection of this database that any node has.
async fn complete_nodes(core: &Arc<Core>, tenant: &str, database: &str) -> Vec<NodeIndex> {
    let collections = core.catalog.in_database(tenant, database);
    let mut nodes = core.namespace_nodes();
    nodes.retain(|&node| collections.iter().all(|collection| collection.node_id(node).is_some()));
    nodes
}

async fn show_collection(
    core: &Arc<Core>,
    collection: &Arc<Collection>,
    path: impl Fn(Uuid) -> String,
) -> Result<Answer, Answer> {
    let mut last = None;
    for node in spread(core, core.namespace_nodes()) {
        let Some(id) = collection.node_id(node) else { continue };
        let Some(response) = core.bounded_read(node, NodeRequest::get(path(id))).await else {
            continue;
        };
        if response.is_success() {
            let object = translate_object(&response.body, |seen| (seen == id).then_some(collection.client_id));
            if let Some(body) = object {
                return Ok(Answer::of_node(&response, body));
            }
        }
        if response.status == 404 {
            core.report_missing(collection, node);
        }
        last = Some(core.translated(collection, node, &response));
    }
    last.ok_or_else(|| Answer::unavailable("No node can answer this at the moment."))
}

async fn list_collections(core: &Arc<Core>, tenant: &str, database: &str, raw: &str) -> Result<Answer, Answer> {
    let query = raw.split_once('?').map_or("", |(_, query)| query);
    let page = match Page::parse(query) {
        Ok(page) => page,
        // Chroma's own words for a page that makes no sense.
        Err(_) => {
            let (_, response) = from_one(core, core.namespace_nodes(), raw).await?;
            return Ok(as_is(&response));
        }
    };
    for look_again in [true, false] {
        let nodes = complete_nodes(core, tenant, database).await;
        let mut unknown = false;
        for node in spread(core, nodes) {
            let Some((response, bodies)) = all_pages(core, node, tenant, database).await else {
                continue;
            };
            let mut items = Vec::new();
            for body in &bodies {
                let translated = translate_list(body, |id| {
                    let known = core.catalog.by_id(id).filter(|collection| !collection.is_deleted());
                    unknown |= known.is_none();
                    known.map(|collection| collection.client_id)
                });
                items.extend(translated.unwrap_or_default());
            }
            if unknown && look_again {
                break;
            }
            items.sort_by_key(|(id, _)| *id);
            return Ok(Answer::of_node(&response, render_list(page.cut(items))));
        }
        if look_again {
            core.learn_database(tenant, database).await?;
        }
    }
    Err(Answer::unavailable(
        "No node has all collections of this database at the moment.",
    ))
}

/// All collections of a database on a node, as it gave them.
async fn all_pages(
    core: &Arc<Core>,
    node: NodeIndex,
    tenant: &str,
    database: &str,
) -> Option<(NodeResponse, Vec<bytes::Bytes>)> {
    let mut bodies = Vec::new();
    let mut offset = 0;
    loop {
        let path = format!(
            "{}?limit={PAGE}&offset={offset}",
            node_path::collections(tenant, database)
        );
        let response = core
            .bounded_read(node, NodeRequest::get(path))
            .await
            .filter(NodeResponse::is_success)?;
        let count = translate_list(&response.body, Some)?.len();
        bodies.push(response.body.clone());
        if count < PAGE {
            return Some((response, bodies));
        }
        offset += count;
    }
}

async fn show_database(core: &Arc<Core>, tenant: &str, database: &str, raw: &str) -> Result<Answer, Answer> {
    let (_, response) = from_one(core, core.namespace_nodes(), raw).await?;
    let mut seen = None;
    translate_object(&response.body, |id| {
        seen = Some(id);
        Some(id)
    });
    let Some(seen) = seen.filter(|_| response.is_success()) else {
        return Ok(as_is(&response));
    };
    let id = core.database_id(tenant, database, seen).await;
    match translate_object(&response.body, |_| Some(id)) {
        Some(body) => Ok(Answer::of_node(&response, body)),
        None => Ok(as_is(&response)),
    }
}

async fn list_databases(core: &Arc<Core>, tenant: &str, raw: &str) -> Result<Answer, Answer> {
    let (_, response) = from_one(core, core.namespace_nodes(), raw).await?;
    let items: Option<Vec<(Uuid, String)>> = serde_json::from_slice::<Vec<Named>>(&response.body)
        .ok()
        .filter(|_| response.is_success())
        .map(|items| items.into_iter().map(|item| (item.id, item.name)).collect());
    let Some(items) = items else {
        return Ok(as_is(&response));
    };
    let mut body = response.body.clone();
    for (seen, name) in items {
        let id = core.database_id(tenant, &name, seen).await;
        body = crate::chroma::replace_uuid(body, seen, id);
    }
    Ok(Answer::of_node(&response, body))
}

#[derive(serde::Deserialize)]
struct Named {
    id: Uuid,
    name: String,
}
