//! What a namespace entry does on one node, live and in drain.
//!
//! The same code for both, so that what is replayed is what was mirrored. "Already there" and "already gone" are
//! successes where the node shows that they speak of the same thing.

use std::sync::Arc;

use bytes::Bytes;
use http::Method;
use uuid::Uuid;

use super::fan_out::Ids;
use super::namespace::COLLECTION_PLACEHOLDER;
use super::{Core, NodeAnswer, Outcome};
use crate::chroma::{Op, node_path, parse_collection_object};
use crate::cluster::{NodeIndex, NodeRequest, NodeResponse};
use crate::env::BoxFuture;

impl Core {
    /// What carries out a namespace entry on one node; live and in drain.
    pub(crate) fn namespace_job(self: &Arc<Self>, node: NodeIndex, op: &Op, body: &Bytes) -> BoxFuture<NodeAnswer> {
        let (core, op, body) = (self.clone(), op.clone(), body.clone());
        let collection = op
            .generation()
            .and_then(|generation| self.catalog.by_generation(generation));
        let ids = Ids {
            node: collection.as_ref().and_then(|collection| collection.node_id(node)),
            client: collection.as_ref().map(|collection| collection.client_id),
        };
        Box::pin(async move {
            let request = match &op {
                Op::CreateCollection { tenant, database, .. } => {
                    NodeRequest::post(node_path::collections(tenant, database), body)
                }
                Op::ModifyCollection { .. } => {
                    let (Some(collection), Some(id)) = (&collection, ids.node) else {
                        return NodeAnswer::skipped();
                    };
                    let facts = collection.facts();
                    let path = node_path::collection(&facts.tenant, &facts.database, id);
                    NodeRequest::new(Method::PUT, path, Some(body))
                }
                Op::DeleteCollection { tenant, database, .. } => {
                    let Some(id) = ids.node else {
                        return NodeAnswer::skipped();
                    };
                    return core.delete_on_node(node, &op, tenant, database, id, ids).await;
                }
                Op::CreateDatabase { tenant, .. } => NodeRequest::post(node_path::databases(tenant), body),
                Op::DeleteDatabase { tenant, name } => {
                    NodeRequest::new(Method::DELETE, node_path::database(tenant, name), None)
                }
                Op::CreateTenant { .. } => NodeRequest::post(node_path::TENANTS, body),
                Op::ModifyTenant { name } => NodeRequest::new(Method::PATCH, node_path::tenant(name), Some(body)),
                Op::Reset => NodeRequest::new(Method::POST, node_path::RESET, None),
                Op::Other { method, path, .. } => {
                    let path = match (path.contains(COLLECTION_PLACEHOLDER), ids.node) {
                        (true, Some(id)) => path.replacen(COLLECTION_PLACEHOLDER, &id.to_string(), 1),
                        (true, None) => return NodeAnswer::skipped(),
                        (false, _) => path.clone(),
                    };
                    let method = Method::from_bytes(method.as_bytes()).unwrap_or(Method::POST);
                    NodeRequest::new(method, path, Some(body).filter(|body| !body.is_empty()))
                }
                Op::Add | Op::Upsert | Op::Update | Op::Delete => return NodeAnswer::skipped(),
            };
            let mut answer = core.send_judged(node, &op, request, ids).await;
            let status = answer.response.as_ref().map_or(0, |response| response.status);
            let already = match op {
                Op::CreateDatabase { .. } | Op::CreateTenant { .. } => status == 409,
                Op::DeleteDatabase { .. } => status == 404,
                _ => false,
            };
            if already {
                answer.outcome = Outcome::Applied;
            }
            answer
        })
    }

    /// Deletes the collection with this UUID on a node, under whatever name it has there.
    async fn delete_on_node(
        self: &Arc<Self>,
        node: NodeIndex,
        op: &Op,
        tenant: &str,
        database: &str,
        id: Uuid,
        ids: Ids,
    ) -> NodeAnswer {
        let gone = || NodeAnswer {
            outcome: Outcome::Applied,
            response: Some(NodeResponse {
                status: 200,
                headers: http::HeaderMap::new(),
                body: Bytes::from_static(b"{}"),
            }),
        };
        let by_id = match self
            .send(node, NodeRequest::get(node_path::by_id(tenant, database, id)))
            .await
        {
            Ok(response) => response,
            Err(_) => return NodeAnswer::skipped(),
        };
        if by_id.status == 404 {
            return gone();
        }
        let Some(object) = parse_collection_object(&by_id.body).filter(|object| by_id.is_success() && object.id == id)
        else {
            return NodeAnswer {
                outcome: Outcome::Failed,
                response: Some(by_id),
            };
        };
        let path = node_path::by_name(tenant, database, &object.name);
        let answer = self
            .send_judged(node, op, NodeRequest::new(Method::DELETE, path, None), ids)
            .await;
        match &answer.response {
            Some(response) if response.status == 404 => gone(),
            _ => answer,
        }
    }
}
