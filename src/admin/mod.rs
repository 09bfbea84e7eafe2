//! What people and tools ask Diptych about itself: `/health`, `/status`, `/wal/status`, `/ready`, `/metrics`, and the
//! read-only routes of the system that Diptych replaces (design.md 10).
//!
//! [`Admin::public`] is answered on the proxy port too, where Chroma has no such routes; [`Admin::private`] on the admin
//! port only. Nothing of that changes anything; what does, or shows what clients wrote, is under `/admin/` (`verbs`) and
//! guarded (`guard`).

mod collector;
mod events;
mod guard;
mod serve;
mod state;
mod status;
mod tools;
mod verbs;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use http::{HeaderMap, HeaderValue, Method, header};
use prometheus::{Encoder, Registry, TEXT_FORMAT, TextEncoder};

use crate::chroma::Refusal;
use crate::mirror::{Answer, Core};

pub use collector::register;
pub use events::keep_watch;
pub use guard::Guard;
pub use serve::{AdminPort, head_of_pieces};
pub use tools::Mappings;

/// What is answered.
pub enum Reply {
    Whole(Answer),
    /// JSON that grows with the catalog, with status 200.
    Mappings(Mappings),
}

impl From<Answer> for Reply {
    fn from(answer: Answer) -> Self {
        Self::Whole(answer)
    }
}

/// Answers questions about this process.
pub struct Admin {
    core: Arc<Core>,
    registry: Registry,
    guard: Guard,
    listening: AtomicBool,
}

impl Admin {
    pub fn new(core: Arc<Core>, registry: Registry, guard: Guard) -> Self {
        Self {
            core,
            registry,
            guard,
            listening: AtomicBool::new(false),
        }
    }

    /// The port for clients accepts connections: from now on this process may be ready.
    pub fn set_listening(&self) {
        self.listening.store(true, Ordering::SeqCst);
    }

    /// What the proxy port answers too; `None`: not ours.
    pub async fn public(&self, method: &Method, path: &str, query: Option<&str>) -> Option<Reply> {
        // This is asked for every request to the proxy.
        if path.starts_with("/api/") || !is_read(method) {
            return None;
        }
        Some(match path {
            "/health" => status::health(&self.core).into(),
            "/status" => Answer::json(200, status::status(&self.core).to_string()).into(),
            "/wal/status" => Answer::json(200, status::wal_status(&self.core).to_string()).into(),
            "/admin/collection_mappings" | "/collection/mappings" => match Mappings::of(&self.core, query) {
                Ok(mappings) => Reply::Mappings(mappings),
                Err(refusal) => Answer::from(refusal).into(),
            },
            "/admin/wal_count" => tools::wal_count(&self.core).into(),
            "/admin/wal_errors" => tools::wal_errors(&self.core).await.into(),
            _ => return None,
        })
    }

    /// What the admin port answers.
    /// `from`: the address of whoever asks.
    pub async fn private(
        &self,
        method: &Method,
        path: &str,
        query: Option<&str>,
        headers: &HeaderMap,
        from: Option<&str>,
    ) -> Reply {
        if let Some(verb) = verbs::find(method, path) {
            let answer = match (self.guard.check(headers), verb) {
                (Err(refused), _) => refused_answer(refused),
                (Ok(()), Ok(verb)) => verbs::carry_out(&self.core, verb, query, &who(headers, from)).await,
                (Ok(()), Err(allowed)) => not_allowed(allowed),
            };
            return answer.into();
        }
        if !is_read(method) {
            return not_allowed("GET, HEAD").into();
        }
        if let Some(reply) = self.public(method, path, query).await {
            return reply;
        }
        let answer = match path {
            "/ready" => status::ready(&self.core, self.listening.load(Ordering::SeqCst)),
            "/metrics" => self.metrics(),
            _ => Answer::error(404, "NotFoundError", "Not found"),
        };
        answer.into()
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

/// Header in which whoever asks may say who he is; the command line does.
pub const OPERATOR: &str = "x-operator";

/// Who asks, as far as is known: what he says of himself, and where he is. For people to read, nothing rests on it.
fn who(headers: &HeaderMap, from: Option<&str>) -> String {
    let said = headers.get(OPERATOR).and_then(|value| value.to_str().ok());
    let said: String = said.unwrap_or_default().trim().chars().take(100).collect();
    match (said.as_str(), from) {
        ("", from) => from.unwrap_or("unknown").to_owned(),
        (said, Some(from)) => format!("{said} ({from})"),
        (said, None) => said.to_owned(),
    }
}

fn refused_answer(refused: Refusal) -> Answer {
    let asks_for_token = refused.status == 401;
    let mut answer = Answer::from(refused);
    if asks_for_token {
        let value = HeaderValue::from_static("Bearer");
        answer.headers.insert(header::WWW_AUTHENTICATE, value);
    }
    answer
}

fn not_allowed(allowed: &'static str) -> Answer {
    let mut answer = Answer::error(405, "MethodNotAllowed", format!("This path takes {allowed} only."));
    answer.headers.insert(header::ALLOW, HeaderValue::from_static(allowed));
    answer
}

fn is_read(method: &Method) -> bool {
    *method == Method::GET || *method == Method::HEAD
}
