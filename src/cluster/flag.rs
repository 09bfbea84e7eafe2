//! A flag on a node: writes went on while the journal was away (design.md 5).
//!
//! It is a record in our own collection, beside the canary's. Whoever finds it at a start knows that writes may be on
//! one node alone, and that nobody remembers which.

use serde::Deserialize;
use uuid::Uuid;

use super::client::{NodeRequest, NodeResponse};
use super::node::Node;
use crate::chroma::{OWN_TENANT, node_path};

const SET: &str = r#"{"ids":["unprotected"],"embeddings":[[1.0]]}"#;
const IDS: &str = r#"{"ids":["unprotected"]}"#;
const READ: &str = r#"{"ids":["unprotected"],"include":[]}"#;

#[derive(Deserialize)]
struct Found {
    ids: Vec<String>,
}

impl Node {
    /// Durable when it returns. The caller sets the deadline.
    pub async fn set_flag(&self) -> Result<(), String> {
        self.own_record("upsert", SET).await.map(drop)
    }

    /// The caller sets the deadline.
    pub async fn clear_flag(&self) -> Result<(), String> {
        self.own_record("delete", IDS).await.map(drop)
    }

    /// The caller sets the deadline.
    pub async fn has_flag(&self) -> Result<bool, String> {
        let answer = self.own_record("get", READ).await?;
        let found: Found = serde_json::from_slice(&answer.body).map_err(|error| error.to_string())?;
        Ok(!found.ids.is_empty())
    }

    async fn own_record(&self, action: &str, body: &'static str) -> Result<NodeResponse, String> {
        let known = *self.canary_collection.lock();
        if let Some(id) = known {
            let answer = self.act(id, action, body).await?;
            // A wiped node or a `reset`: the collection is made anew.
            if answer.status != 404 {
                return successful(action, answer);
            }
        }
        let id = self.prepare_canary().await?;
        successful(action, self.act(id, action, body).await?)
    }

    async fn act(&self, id: Uuid, action: &str, body: &'static str) -> Result<NodeResponse, String> {
        let path = node_path::record(OWN_TENANT, super::canary::DATABASE, id, action);
        let sent = self.client.send(NodeRequest::post(path, body)).await;
        sent.map_err(|error| error.to_string())
    }
}

fn successful(action: &str, answer: NodeResponse) -> Result<NodeResponse, String> {
    if answer.is_success() {
        return Ok(answer);
    }
    let text = String::from_utf8_lossy(&answer.body[..answer.body.len().min(300)]);
    Err(format!(
        "our own record: {action} was answered {}: {text}",
        answer.status
    ))
}
