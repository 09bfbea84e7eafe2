//! What people and tools ask Diptych about itself: `/health`, `/status`, `/wal/status`, `/ready`, `/metrics`, and the
//! read-only routes of the system that Diptych replaces (design.md 10).

mod serve;
mod status;

use std::sync::Arc;

use http::Method;
use prometheus::{Encoder, Registry, TextEncoder};

use crate::mirror::{Answer, Core};

pub use serve::AdminPort;

/// Answers questions about this process.
pub struct Admin {
    core: Arc<Core>,
    registry: Registry,
}

impl Admin {
    pub fn new(core: Arc<Core>, registry: Registry) -> Self {
        Self { core, registry }
    }

    /// What the proxy port answers too; `None`: not ours.
    pub async fn public(&self, method: &Method, path: &str, _query: Option<&str>) -> Option<Answer> {
        if *method != Method::GET && *method != Method::HEAD {
            return None;
        }
        match path {
            "/health" => Some(status::health(&self.core)),
            "/status" => Some(Answer::json(200, status::status(&self.core).to_string())),
            "/wal/status" => Some(Answer::json(200, status::wal_status(&self.core).to_string())),
            _ => None,
        }
    }

    /// What only the admin port answers.
    pub async fn private(&self, method: &Method, path: &str, query: Option<&str>) -> Answer {
        if let Some(answer) = self.public(method, path, query).await {
            return answer;
        }
        match path {
            "/ready" => status::ready(&self.core),
            "/metrics" => {
                let mut text = Vec::new();
                match TextEncoder::new().encode(&self.registry.gather(), &mut text) {
                    Ok(()) => {
                        let mut answer = Answer::json(200, text);
                        let kind = http::HeaderValue::from_static("text/plain; version=0.0.4");
                        answer.headers.insert(http::header::CONTENT_TYPE, kind);
                        answer
                    }
                    Err(error) => Answer::error(500, "InternalError", error.to_string()),
                }
            }
            _ => Answer::error(404, "NotFoundError", "Not found"),
        }
    }
}
