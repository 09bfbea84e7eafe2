//! Reads of the namespace: tenants, databases, collections.
//!
//! Every node has its own UUIDs and its own order, so these answers are put together here: with the ids that clients
//! know, in the order of those ids, whatever node answers. A node serves them while it is in step with the namespace
//! and has every collection that the answer speaks of.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::catalog::Collection;
use crate::chroma::{Page, Route, render_list, translate, translate_list, translate_object};
use crate::cluster::{NodeIndex, NodeRequest, NodeResponse};
use crate::mirror::{Answer, Core};

/// While a node is up, what nobody can show yet is looked for again after this pause, and for this long: nodes come into
/// step one after the other when the proxy starts. A look that takes longer itself, since it waits for a drain or for a
/// node that does not answer, is not taken twice.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
const LOOKING: Duration = Duration::from_secs(2);

/// Answers a read of the namespace; `raw` is the path with its query.
pub async fn answer(core: &Arc<Core>, route: Route, raw: &str) -> Answer {
    let until = core.env.now() + LOOKING;
    loop {
        let answer = look(core, route.clone(), raw).await;
        if answer.status != 503 || core.env.now() >= until || core.cluster.up().next().is_none() {
            return answer;
        }
        core.env.sleep(LOOK_AGAIN).await;
    }
}

async fn look(core: &Arc<Core>, route: Route, raw: &str) -> Answer {
    core.wait_for_namespace().await;
    let outcome = match route {
        Route::Database { tenant, database } => show_database(core, &tenant, &database, raw).await,
        Route::DatabaseList { tenant } => list_databases(core, &tenant, raw).await,
        Route::CollectionList { tenant, database } => list_collections(core, &tenant, &database, raw).await,
        Route::CollectionCount { tenant, database } => count_collections(core, &tenant, &database).await,
        Route::CollectionByName { tenant, database, name } => {
            match core.find_by_name(&tenant, &database, &name).await {
                Ok(Some(collection)) => show_collection(core, &collection, |_| raw.to_owned()).await,
                Ok(None) => not_there(core, raw).await,
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
            Ok(None) => not_there(core, raw).await,
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

/// Chroma's own words for a collection that nobody has.
async fn not_there(core: &Arc<Core>, raw: &str) -> Result<Answer, Answer> {
    let (_, response) = from_one(core, core.namespace_nodes(), raw).await?;
    match response.is_success() {
        // Somebody has created it meanwhile: as the node shows it, it has an id that clients do not know.
        true => Err(Answer::unavailable("The collection is being created.")),
        false => Ok(as_is(&response)),
    }
}

/// The nodes with the one to ask first in front.
fn spread(core: &Core, mut nodes: Vec<NodeIndex>) -> Vec<NodeIndex> {
    if let Some(first) = core.cluster.choose(&nodes, core.env.random()) {
        nodes.retain(|&node| node != first);
        nodes.insert(0, first);
    }
    nodes
}

async fn show_collection(
    core: &Arc<Core>,
    collection: &Arc<Collection>,
    path: impl Fn(Uuid) -> String,
) -> Result<Answer, Answer> {
    let mut last = None;
    for node in spread(core, core.showing(collection).await) {
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
    let Ok(page) = Page::parse(query) else {
        // Chroma's own words for a page that makes no sense.
        let (_, response) = from_one(core, core.namespace_nodes(), raw).await?;
        return Ok(as_is(&response));
    };
    let (response, items) = all_collections(core, tenant, database).await?;
    Ok(Answer::of_node(&response, render_list(page.cut(items))))
}

async fn count_collections(core: &Arc<Core>, tenant: &str, database: &str) -> Result<Answer, Answer> {
    let (response, items) = all_collections(core, tenant, database).await?;
    Ok(Answer::of_node(&response, items.len().to_string().into()))
}

/// Every collection of a database, by the id that clients see, each as a node shows it that has no repair open for it.
async fn all_collections(
    core: &Arc<Core>,
    tenant: &str,
    database: &str,
) -> Result<(NodeResponse, Vec<(Uuid, String)>), Answer> {
    for look_again in [true, false] {
        // What is created meanwhile may be missing, what is deleted meanwhile may.
        let expected = core.catalog.in_database(tenant, database);
        let mut items = BTreeMap::new();
        let mut unknown = false;
        let mut answered = None;
        for node in spread(core, surveyed_nodes(core)) {
            let Some(pages) = core.collection_pages(node, tenant, database).await else {
                tracing::info!(
                    node = core.cluster.node(node).name,
                    database,
                    "The node did not list its collections."
                );
                continue;
            };
            for (page, _) in &pages {
                let shown = translate_list(&page.body, |id| {
                    let known = core.catalog.by_id(id).filter(|collection| !collection.is_deleted());
                    unknown |= known.is_none();
                    known
                        .filter(|known| known.pairs[node].repairs() == 0)
                        .map(|known| known.client_id)
                });
                for (id, item) in shown.unwrap_or_default() {
                    items.entry(id).or_insert(item);
                }
            }
            answered = pages.into_iter().next().map(|(page, _)| page).or(answered);
            if !unknown && is_complete(&expected, &items) {
                break;
            }
        }
        let Some(response) = answered else { break };
        if is_complete(&expected, &items) && !(unknown && look_again) {
            return Ok((response, items.into_iter().collect()));
        }
        if unknown && look_again {
            core.learn_database(tenant, database).await?;
        }
    }
    Err(Answer::unavailable(
        "Not all collections of this database can be shown at the moment.",
    ))
}

/// Nodes in step with the namespace whose collections are all known, unless there are none such yet.
fn surveyed_nodes(core: &Core) -> Vec<NodeIndex> {
    let nodes = core.namespace_nodes();
    let surveyed: Vec<_> = nodes
        .iter()
        .copied()
        .filter(|&node| core.cluster.node(node).is_surveyed())
        .collect();
    if surveyed.is_empty() { nodes } else { surveyed }
}

fn is_complete(expected: &[Arc<Collection>], items: &BTreeMap<Uuid, String>) -> bool {
    expected
        .iter()
        .all(|collection| items.contains_key(&collection.client_id) || collection.is_deleted())
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
