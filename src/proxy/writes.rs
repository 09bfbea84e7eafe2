//! Mutating requests: from a route and a body to the mirror.
//!
//! What Chroma would refuse for its form goes to the lead as it is, for Chroma's own words; nothing can come of it. What
//! would harm a node or make nodes differ is refused here (design.md 4.2).

use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::Method;
use uuid::Uuid;

use crate::catalog::Collection;
use crate::chroma::{
    OWN_TENANT, Op, ParseProblem, RecordWrite, Route, Segment, Target, parse_create, parse_delete, parse_modify,
    parse_name, parse_record, translate,
};
use crate::cluster::NodeRequest;
use crate::mirror::{Answer, COLLECTION_PLACEHOLDER, Core, NamespaceWrite, RecordEntry};

/// What a collection's segment in a path stands for.
pub enum Resolved {
    Collection(Arc<Collection>),
    /// A UUID that no node knows.
    Nowhere(Uuid),
    /// Neither a UUID nor a known name: Chroma has its own 400 for that.
    NotAnId,
}

/// Finds the collection that a path means, on the nodes if the catalog does not know it.
pub async fn resolve(core: &Arc<Core>, target: &Target) -> Result<Resolved, Answer> {
    match &target.segment {
        Segment::Id(id) => Ok(match core.find_by_id(&target.tenant, &target.database, *id).await? {
            Some(collection) => Resolved::Collection(collection),
            None => Resolved::Nowhere(*id),
        }),
        Segment::Name(name) => Ok(match core.find_by_name(&target.tenant, &target.database, name).await? {
            Some(collection) => Resolved::Collection(collection),
            None => Resolved::NotAnId,
        }),
    }
}

/// A mutating request, or the part of one that has been understood.
struct Request<'a> {
    method: &'a Method,
    /// With its query.
    raw: &'a str,
    body: Bytes,
    client: Option<IpAddr>,
}

/// Answers a mutating request.
pub async fn answer(
    core: &Arc<Core>,
    route: Route,
    method: &Method,
    raw: &str,
    body: Bytes,
    client: Option<IpAddr>,
) -> Answer {
    let request = Request {
        method,
        raw,
        body,
        client,
    };
    match outcome(core, route, request).await {
        Ok(answer) | Err(answer) => answer,
    }
}

async fn outcome(core: &Arc<Core>, route: Route, request: Request<'_>) -> Result<Answer, Answer> {
    let body = request.body.clone();
    match route {
        Route::RecordWrite { target, write } => record(core, target, write, request).await,
        Route::ModifyCollection { target } => {
            let collection = match resolve(core, &target).await? {
                Resolved::Collection(collection) => collection,
                Resolved::Nowhere(id) => return Err(Answer::no_such_collection(id)),
                Resolved::NotAnId => return pass_to_lead(core, None, request).await,
            };
            let modify = match parse_modify(&body) {
                Ok(modify) => modify,
                Err(problem) => return malformed(core, Some((&collection, &target)), problem, request).await,
            };
            let write = NamespaceWrite::ModifyCollection {
                collection,
                new_name: modify.new_name,
            };
            Ok(core.submit_namespace(write, body).await)
        }
        Route::CreateCollection { tenant, database } => match parse_create(&body) {
            Ok(create) => {
                let (name, get_or_create) = (create.name, create.get_or_create);
                let write = NamespaceWrite::CreateCollection {
                    tenant,
                    database,
                    name,
                    get_or_create,
                };
                Ok(core.submit_namespace(write, body).await)
            }
            Err(problem) => malformed(core, None, problem, request).await,
        },
        Route::DeleteCollection { tenant, database, name } => Ok(core
            .submit_namespace(NamespaceWrite::DeleteCollection { tenant, database, name }, body)
            .await),
        Route::CreateDatabase { tenant } => match parse_name(&body) {
            Ok(name) => Ok(core
                .submit_namespace(NamespaceWrite::CreateDatabase { tenant, name }, body)
                .await),
            Err(problem) => malformed(core, None, problem, request).await,
        },
        Route::DeleteDatabase { tenant, database } => Ok(core
            .submit_namespace(NamespaceWrite::DeleteDatabase { tenant, name: database }, body)
            .await),
        Route::CreateTenant => match parse_name(&body) {
            Ok(name) if name == OWN_TENANT => Err(Answer::error(
                400,
                "InvalidArgumentError",
                format!("The tenant name {OWN_TENANT} is reserved"),
            )),
            Ok(name) => Ok(core.submit_namespace(NamespaceWrite::CreateTenant { name }, body).await),
            Err(problem) => malformed(core, None, problem, request).await,
        },
        Route::ModifyTenant { tenant } => Ok(core
            .submit_namespace(NamespaceWrite::ModifyTenant { name: tenant }, body)
            .await),
        Route::Reset => Ok(core.submit_namespace(NamespaceWrite::Reset, body).await),
        Route::OtherMutating { target, .. } => other(core, target, request).await,
        _ => pass_to_lead(core, None, request).await,
    }
}

async fn record(core: &Arc<Core>, target: Target, write: RecordWrite, request: Request<'_>) -> Result<Answer, Answer> {
    let collection = match resolve(core, &target).await? {
        Resolved::Collection(collection) => collection,
        Resolved::Nowhere(id) => return Err(Answer::no_such_collection(id)),
        Resolved::NotAnId => return pass_to_lead(core, None, request).await,
    };
    let (body, client) = (request.body.clone(), request.client);
    if write == RecordWrite::Delete {
        let delete = match parse_delete(&body) {
            Ok(delete) => delete,
            Err(problem) => return malformed(core, Some((&collection, &target)), problem, request).await,
        };
        let entry = |ids, filter| RecordEntry {
            op: Op::Delete,
            body,
            ids,
            has_embeddings: false,
            filter,
            client,
        };
        if delete.has_filter {
            return Ok(core.submit(&collection, entry(vec![], Some(delete))).await);
        }
        return match delete.ids {
            // Without a filter these are refused or do nothing, and say so in Chroma's words.
            None => pass_to_lead(core, Some((&collection, &target)), request).await,
            Some(_) if delete.limit.is_some() => pass_to_lead(core, Some((&collection, &target)), request).await,
            Some(ids) if ids.is_empty() => pass_to_lead(core, Some((&collection, &target)), request).await,
            Some(ids) => Ok(core.submit(&collection, entry(ids, None)).await),
        };
    }
    let parsed = match parse_record(write, &body) {
        Ok(parsed) => parsed,
        Err(problem) => return malformed(core, Some((&collection, &target)), problem, request).await,
    };
    if parsed.ids.is_empty() {
        return pass_to_lead(core, Some((&collection, &target)), request).await;
    }
    let entry = RecordEntry {
        op: write.into(),
        body,
        ids: parsed.ids,
        has_embeddings: parsed.embeddings > 0,
        filter: None,
        client,
    };
    Ok(core.submit(&collection, entry).await)
}

/// A mutating route that nobody knows: mirrored as it is through the namespace lane (design.md 4.1).
async fn other(core: &Arc<Core>, target: Option<Target>, request: Request<'_>) -> Result<Answer, Answer> {
    let method = request.method.clone();
    let Some(target) = target else {
        let write = NamespaceWrite::Other {
            method,
            path: request.raw.to_owned(),
            collection: None,
        };
        return Ok(core.submit_namespace(write, request.body).await);
    };
    let collection = match resolve(core, &target).await? {
        Resolved::Collection(collection) => collection,
        Resolved::Nowhere(id) => return Err(Answer::no_such_collection(id)),
        Resolved::NotAnId => return pass_to_lead(core, None, request).await,
    };
    let mut path = request.raw.to_owned();
    path.replace_range(target.span, COLLECTION_PLACEHOLDER);
    let write = NamespaceWrite::Other {
        method,
        path,
        collection: Some(collection),
    };
    Ok(core.submit_namespace(write, request.body).await)
}

async fn malformed(
    core: &Arc<Core>,
    collection: Option<(&Arc<Collection>, &Target)>,
    problem: ParseProblem,
    request: Request<'_>,
) -> Result<Answer, Answer> {
    match problem {
        ParseProblem::Malformed => pass_to_lead(core, collection, request).await,
        ParseProblem::Refused(refusal) => Err(refusal.into()),
    }
}

/// Sends a request that cannot change anything to the lead alone, for Chroma's own answer.
async fn pass_to_lead(
    core: &Arc<Core>,
    collection: Option<(&Arc<Collection>, &Target)>,
    request: Request<'_>,
) -> Result<Answer, Answer> {
    let nodes = match collection {
        Some((collection, _)) => core.usable(collection),
        None => core.cluster.up().collect(),
    };
    for node in nodes {
        let path = match collection {
            Some((collection, target)) => match collection.node_id(node) {
                Some(id) => translate(request.raw, target.span.clone(), id),
                None => continue,
            },
            None => request.raw.to_owned(),
        };
        let sent = NodeRequest::new(request.method.clone(), path, Some(request.body.clone()));
        if let Some(response) = core.bounded_read(node, sent).await {
            return Ok(match collection {
                Some((collection, _)) => core.translated(collection, node, &response),
                None => Answer::of_node(&response, response.body.clone()),
            });
        }
    }
    Err(Answer::unavailable("No node can take this at the moment."))
}
