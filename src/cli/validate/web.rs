//! One server that is asked: the proxy, its admin address or a node. Every request is a line in the log.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::Method;
use serde_json::Value;

use super::super::ask;
use super::super::client::not_allowed;
use super::notes::Notes;
use crate::cluster::{HttpNodeClient, NodeClient, NodeRequest};

/// How long one request may take. A write waits behind others in its lane.
const LIMIT: Duration = Duration::from_secs(60);
/// So much of an answer is shown when it is not what was expected.
const SHOWN: usize = 300;

/// A server at an address.
pub struct Web {
    pub authority: String,
    client: HttpNodeClient,
    notes: Rc<Notes>,
}

/// A whole answer, with what was asked.
pub struct Reply {
    pub status: u16,
    pub body: Bytes,
    pub asked: String,
}

impl Reply {
    /// The body as JSON; null if it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// The body, if this is a success.
    pub fn ok(&self) -> Result<Value, String> {
        if (200..300).contains(&self.status) {
            Ok(self.json())
        } else {
            Err(self.to_string())
        }
    }

    /// The body, if this is the status.
    pub fn expect(&self, status: u16) -> Result<Value, String> {
        if self.status == status {
            Ok(self.json())
        } else {
            Err(format!("{self}; expected {status}"))
        }
    }
}

impl std::fmt::Display for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text: String = String::from_utf8_lossy(&self.body).chars().take(SHOWN).collect();
        write!(f, "{} answered {}: {text}", self.asked, self.status)
    }
}

impl Web {
    /// Only on a runtime. `authority` is `host:port`.
    pub fn new(authority: &str, notes: Rc<Notes>) -> Self {
        Self {
            authority: authority.to_owned(),
            client: HttpNodeClient::new(authority, tokio::runtime::Handle::current()),
            notes,
        }
    }

    /// Asks, and waits for the whole answer, whatever its status is.
    ///
    /// # Errors
    /// Why there is no answer, in words.
    pub async fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Reply, String> {
        let body = body.map(|body| Bytes::from(body.to_string()));
        self.send(method, path, body).await
    }

    /// [`Web::ask`] with a body as it is.
    pub async fn send(&self, method: Method, path: &str, body: Option<Bytes>) -> Result<Reply, String> {
        let asked = format!("{method} http://{}{path}", self.authority);
        let sent = self.client.send(NodeRequest::new(method, path, body));
        let answer = match tokio::time::timeout(LIMIT, sent).await {
            Ok(answer) => answer.map_err(|error| format!("{asked}: {error}")),
            Err(_) => Err(format!("{asked}: no answer within {} s", LIMIT.as_secs())),
        };
        match &answer {
            Ok(answer) => self.notes.line(&format!("{asked}: {}", answer.status)),
            Err(reason) => self.notes.line(reason),
        }
        answer.map(|answer| Reply {
            status: answer.status,
            body: answer.body,
            asked,
        })
    }

    pub async fn get(&self, path: &str) -> Result<Reply, String> {
        self.ask(Method::GET, path, None).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Result<Reply, String> {
        self.ask(Method::POST, path, Some(body)).await
    }
}

/// The admin address, with the token for what is guarded.
pub struct Admin {
    pub web: Web,
    pub token: Option<String>,
}

impl Admin {
    /// Asks for something under `/admin/`.
    ///
    /// # Errors
    /// There is no answer, or it is not a success: in words.
    pub async fn verb(&self, method: Method, path: &str) -> Result<Value, String> {
        let asked = format!("{method} http://{}{path}", self.web.authority);
        let asking = ask::Asking {
            token: self.token.as_deref(),
            operator: "diptych validate".to_owned(),
            limit: LIMIT,
        };
        let call = ask::call(&self.web.authority, method, path, asking);
        let (status, body) = call.await.map_err(|reason| format!("{asked}: {reason}"))?;
        self.web.notes.line(&format!("{asked}: {status}"));
        if status == 401 {
            return Err(not_allowed(&self.web.authority, self.token.is_some()));
        }
        Reply { status, body, asked }.ok()
    }

    /// `GET /status`.
    pub async fn status(&self) -> Result<Value, String> {
        self.web.get("/status").await?.expect(200)
    }
}
