//! Chroma's v2 HTTP API, against the proxy or a node.
//!
//! Methods named like an operation return the [`Answer`] whatever its status is, and panic when there is none; the
//! caller says what it expects with [`Answer::ok`] or [`Answer::expect`]. `try_*` return transport errors.

use bytes::Bytes;
use http::{HeaderMap, Method, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};

const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// One name as a path segment.
pub fn segment(name: &str) -> String {
    utf8_percent_encode(name, SEGMENT).to_string()
}

/// A client bound to a tenant and a database.
#[derive(Clone)]
pub struct Api {
    base: String,
    tenant: String,
    database: String,
    client: Client<HttpConnector, Full<Bytes>>,
}

/// A complete HTTP answer.
#[derive(Clone)]
pub struct Answer {
    pub request: String,
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Api {
    /// With a pool of connections, as an application has.
    pub fn pooled(base: &str) -> Api {
        Api::with(base, 64)
    }

    /// With a new connection for each request, for servers that are killed on purpose.
    pub fn direct(base: &str) -> Api {
        Api::with(base, 0)
    }

    fn with(base: &str, idle: usize) -> Api {
        let client = Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(idle)
            .build_http();
        Api {
            base: base.into(),
            tenant: "default_tenant".into(),
            database: "default_database".into(),
            client,
        }
    }

    /// The same server, another tenant and database (plain names).
    pub fn within(&self, tenant: &str, database: &str) -> Api {
        Api {
            tenant: tenant.into(),
            database: database.into(),
            ..self.clone()
        }
    }

    /// `/api/v2/tenants/../databases/..` plus `rest`.
    pub fn path(&self, rest: &str) -> String {
        format!(
            "/api/v2/tenants/{}/databases/{}{rest}",
            segment(&self.tenant),
            segment(&self.database)
        )
    }

    pub async fn try_send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Result<Answer, String> {
        let request = format!("{method} {path}");
        let mut builder = Request::builder().method(method).uri(format!("{}{path}", self.base));
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        let message = builder.body(Full::new(body)).map_err(|e| format!("{request}: {e}"))?;
        let answer = self
            .client
            .request(message)
            .await
            .map_err(|e| format!("{request}: {}", chain(&e)))?;
        let (head, body) = answer.into_parts();
        let body = body
            .collect()
            .await
            .map_err(|e| format!("{request}: body: {}", chain(&e)))?
            .to_bytes();
        Ok(Answer {
            request,
            status: head.status.as_u16(),
            headers: head.headers,
            body,
        })
    }

    pub async fn try_json(&self, method: Method, path: &str, body: &Value) -> Result<Answer, String> {
        let body = Bytes::from(serde_json::to_vec(body).expect("JSON"));
        self.try_send(method, path, &[("content-type", "application/json")], body)
            .await
    }

    pub async fn try_get(&self, path: &str) -> Result<Answer, String> {
        self.try_send(Method::GET, path, &[], Bytes::new()).await
    }

    pub async fn get_path(&self, path: &str) -> Answer {
        self.try_get(path).await.unwrap_or_else(|e| panic!("{e}"))
    }

    pub async fn delete_path(&self, path: &str) -> Answer {
        self.try_send(Method::DELETE, path, &[], Bytes::new())
            .await
            .unwrap_or_else(|e| panic!("{e}"))
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.try_json(Method::POST, path, body)
            .await
            .unwrap_or_else(|e| panic!("{e}"))
    }

    pub async fn post_bytes(&self, path: &str, body: Bytes) -> Answer {
        let headers = [("content-type", "application/json")];
        self.try_send(Method::POST, path, &headers, body)
            .await
            .unwrap_or_else(|e| panic!("{e}"))
    }

    /// Creates a collection; `extra` has more fields of the body (metadata, configuration, get_or_create) or is null.
    pub async fn create_collection(&self, name: &str, extra: Value) -> Answer {
        let mut body = json!({ "name": name });
        if let Value::Object(extra) = extra {
            body.as_object_mut().expect("an object").extend(extra);
        }
        self.post(&self.path("/collections"), &body).await
    }

    /// Creates a collection and returns its id.
    pub async fn collection(&self, name: &str) -> String {
        self.create_collection(name, Value::Null).await.ok().id()
    }

    pub async fn by_name(&self, name: &str) -> Answer {
        self.get_path(&self.path(&format!("/collections/{}", segment(name))))
            .await
    }

    pub async fn by_id(&self, id: &str) -> Answer {
        self.get_path(&self.path(&format!("/collections/by-id/{id}"))).await
    }

    /// `query` is empty or starts with `?`.
    pub async fn list(&self, query: &str) -> Answer {
        self.get_path(&self.path(&format!("/collections{query}"))).await
    }

    pub async fn drop_collection(&self, name: &str) -> Answer {
        self.delete_path(&self.path(&format!("/collections/{}", segment(name))))
            .await
    }

    pub async fn modify(&self, id: &str, body: &Value) -> Answer {
        let path = self.path(&format!("/collections/{id}"));
        self.try_json(Method::PUT, &path, body)
            .await
            .unwrap_or_else(|e| panic!("{e}"))
    }

    /// The path of an operation on records.
    pub fn records(&self, id: &str, operation: &str) -> String {
        self.path(&format!("/collections/{id}/{operation}"))
    }

    /// `add`, `upsert`, `update`, `delete`, `get`, `query`.
    pub async fn op(&self, id: &str, operation: &str, body: &Value) -> Answer {
        self.post(&self.records(id, operation), body).await
    }

    pub async fn try_op(&self, id: &str, operation: &str, body: &Value) -> Result<Answer, String> {
        self.try_json(Method::POST, &self.records(id, operation), body).await
    }

    pub async fn count(&self, id: &str) -> Answer {
        self.get_path(&self.records(id, "count")).await
    }

    pub async fn create_tenant(&self, name: &str) -> Answer {
        self.post("/api/v2/tenants", &json!({ "name": name })).await
    }

    pub async fn get_tenant(&self, name: &str) -> Answer {
        self.get_path(&format!("/api/v2/tenants/{}", segment(name))).await
    }

    /// Creates a database in this client's tenant.
    pub async fn create_database(&self, name: &str) -> Answer {
        self.post(
            &format!("/api/v2/tenants/{}/databases", segment(&self.tenant)),
            &json!({ "name": name }),
        )
        .await
    }

    pub async fn get_database(&self, name: &str) -> Answer {
        self.get_path(&format!(
            "/api/v2/tenants/{}/databases/{}",
            segment(&self.tenant),
            segment(name)
        ))
        .await
    }

    pub async fn list_databases(&self) -> Answer {
        self.get_path(&format!("/api/v2/tenants/{}/databases", segment(&self.tenant)))
            .await
    }

    pub async fn drop_database(&self, name: &str) -> Answer {
        self.delete_path(&format!(
            "/api/v2/tenants/{}/databases/{}",
            segment(&self.tenant),
            segment(name)
        ))
        .await
    }
}

impl Answer {
    /// The answer itself, which must be a 2xx.
    #[track_caller]
    pub fn ok(self) -> Answer {
        assert!((200..300).contains(&self.status), "{self:?}");
        self
    }

    #[track_caller]
    pub fn expect(self, status: u16) -> Answer {
        assert_eq!(self.status, status, "{self:?}");
        self
    }

    /// The body as JSON; null if it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// The field `id` of the body.
    #[track_caller]
    pub fn id(&self) -> String {
        self.json()["id"]
            .as_str()
            .unwrap_or_else(|| panic!("no id in {self:?}"))
            .to_owned()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|v| v.to_str().ok())
    }

    /// Chroma's error form: the name and the message.
    #[track_caller]
    pub fn error(&self) -> (String, String) {
        let body = self.json();
        match (body["error"].as_str(), body["message"].as_str()) {
            (Some(name), Some(message)) => (name.to_owned(), message.to_owned()),
            _ => panic!("not an error in Chroma's form: {self:?}"),
        }
    }
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text: String = self.text().chars().take(2000).collect();
        write!(f, "{} -> {} {text}", self.request, self.status)
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
