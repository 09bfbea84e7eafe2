//! What people and tools ask Diptych about itself: `/health`, `/status`, `/wal/status`, `/ready`, `/metrics`, and the
//! read-only routes of the system that Diptych replaces (design.md 10).
//!
//! [`Admin::public`] is answered on the proxy port too, where Chroma has no such routes; [`Admin::private`] on the admin
//! port only. Nothing here changes anything.

mod collector;
mod serve;
mod state;
mod status;
mod tools;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use http::{HeaderValue, Method, header};
use prometheus::{Encoder, Registry, TEXT_FORMAT, TextEncoder};

use crate::mirror::{Answer, Core};

pub use collector::register;
pub use serve::AdminPort;

/// Answers questions about this process.
pub struct Admin {
    core: Arc<Core>,
    registry: Registry,
    listening: AtomicBool,
}

impl Admin {
    pub fn new(core: Arc<Core>, registry: Registry) -> Self {
        Self {
            core,
            registry,
            listening: AtomicBool::new(false),
        }
    }

    /// The port for clients accepts connections: from now on this process may be ready.
    pub fn set_listening(&self) {
        self.listening.store(true, Ordering::SeqCst);
    }

    /// What the proxy port answers too; `None`: not ours.
    pub async fn public(&self, method: &Method, path: &str, query: Option<&str>) -> Option<Answer> {
        // This is asked for every request to the proxy.
        if path.starts_with("/api/") || !is_read(method) {
            return None;
        }
        match path {
            "/health" => Some(status::health(&self.core)),
            "/status" => Some(Answer::json(200, status::status(&self.core).to_string())),
            "/wal/status" => Some(Answer::json(200, status::wal_status(&self.core).to_string())),
            "/admin/collection_mappings" | "/collection/mappings" => Some(tools::mappings(&self.core, query)),
            "/admin/wal_count" => Some(tools::wal_count(&self.core)),
            "/admin/wal_errors" => Some(tools::wal_errors(&self.core).await),
            _ => None,
        }
    }

    /// What the admin port answers.
    pub async fn private(&self, method: &Method, path: &str, query: Option<&str>) -> Answer {
        if !is_read(method) {
            let mut answer = Answer::error(405, "MethodNotAllowed", "This port answers GET and HEAD only.");
            answer
                .headers
                .insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return answer;
        }
        if let Some(answer) = self.public(method, path, query).await {
            return answer;
        }
        match path {
            "/ready" => status::ready(&self.core, self.listening.load(Ordering::SeqCst)),
            "/metrics" => self.metrics(),
            _ => Answer::error(404, "NotFoundError", "Not found"),
        }
    }

    fn metrics(&self) -> Answer {
        let mut text = Vec::new();
        match TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            Ok(()) => {
                let mut answer = Answer::json(200, text);
                let kind = HeaderValue::from_static(TEXT_FORMAT);
                answer.headers.insert(header::CONTENT_TYPE, kind);
                answer
            }
            Err(error) => Answer::error(500, "InternalError", error.to_string()),
        }
    }
}

fn is_read(method: &Method) -> bool {
    *method == Method::GET || *method == Method::HEAD
}
