//! A canary write: the one probe that shows that a node really writes.
//!
//! Heartbeats pass on a node whose disk is full or whose compactor is dead (chroma-facts.md 8.1). The canary is also
//! the fence after a broken connection: Chroma applies writes through one queue, so when a canary sent later has
//! returned, what was in flight before has landed or never will (design.md 4.7). It lives in a tenant of our own that
//! clients cannot reach.

use bytes::Bytes;
use http::Method;
use uuid::Uuid;

use super::client::{NodeRequest, NodeResponse};
use super::node::Node;
use crate::chroma::{OWN_TENANT, node_path, parse_collection_object};

pub(super) const DATABASE: &str = "health";
const COLLECTION: &str = "canary";

impl Node {
    /// Writes one record into our own collection and waits for the answer. The caller sets the deadline.
    pub async fn canary(&self) -> Result<(), String> {
        let known = *self.canary_collection.lock();
        let id = match known {
            Some(id) => id,
            None => self.prepare_canary().await?,
        };
        let answer = self.write_canary(id).await?;
        if answer.is_success() {
            return Ok(());
        }
        if answer.status == 404 {
            // A wiped node or a `reset`: our tenant is gone with the rest.
            let id = self.prepare_canary().await?;
            let answer = self.write_canary(id).await?;
            if answer.is_success() {
                return Ok(());
            }
            return Err(describe(&answer));
        }
        Err(describe(&answer))
    }

    async fn write_canary(&self, id: Uuid) -> Result<NodeResponse, String> {
        let path = node_path::record(OWN_TENANT, DATABASE, id, "upsert");
        self.ask(NodeRequest::post(
            path,
            Bytes::from_static(br#"{"ids":["canary"],"embeddings":[[1.0]]}"#),
        ))
        .await
    }

    pub(super) async fn prepare_canary(&self) -> Result<Uuid, String> {
        let steps = [
            (node_path::TENANTS.to_owned(), format!(r#"{{"name":"{OWN_TENANT}"}}"#)),
            (node_path::databases(OWN_TENANT), format!(r#"{{"name":"{DATABASE}"}}"#)),
        ];
        for (path, body) in steps {
            let answer = self.ask(NodeRequest::post(path, body)).await?;
            if !answer.is_success() && answer.status != 409 {
                return Err(describe(&answer));
            }
        }
        let body = format!(r#"{{"name":"{COLLECTION}","get_or_create":true}}"#);
        let answer = self
            .ask(NodeRequest::new(
                Method::POST,
                node_path::collections(OWN_TENANT, DATABASE),
                Some(body.into()),
            ))
            .await?;
        let id = parse_collection_object(&answer.body)
            .filter(|_| answer.is_success())
            .ok_or_else(|| describe(&answer))?
            .id;
        *self.canary_collection.lock() = Some(id);
        Ok(id)
    }

    async fn ask(&self, request: NodeRequest) -> Result<NodeResponse, String> {
        self.client.send(request).await.map_err(|error| error.to_string())
    }
}

fn describe(answer: &NodeResponse) -> String {
    let body = String::from_utf8_lossy(&answer.body[..answer.body.len().min(300)]);
    format!("canary answered {}: {body}", answer.status)
}
