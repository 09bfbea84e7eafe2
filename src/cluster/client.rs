//! One request to one node, and what is known when it fails.
//!
//! The only thing a mirror needs from an HTTP client beyond sending is the difference between *not sent* (certain: the
//! node never saw it) and *broken* (the node may have it). The client has no timeouts of its own: dropping a request
//! makes Chroma cancel it half-way (chroma-facts.md 3.4), so callers stop waiting but let it run on.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::TokioTimer;
use tokio::sync::{oneshot, watch};
use tower_service::Service;

use crate::chroma::Refusal;
use crate::env::BoxFuture;

/// A request to a node; the path is raw, with its query.
#[derive(Debug, Clone)]
pub struct NodeRequest {
    pub method: Method,
    pub path: String,
    /// JSON; sent with a content type when present.
    pub body: Option<Bytes>,
}

impl NodeRequest {
    pub fn get(path: impl Into<String>) -> Self {
        Self {
            method: Method::GET,
            path: path.into(),
            body: None,
        }
    }

    pub fn post(path: impl Into<String>, body: impl Into<Bytes>) -> Self {
        Self {
            method: Method::POST,
            path: path.into(),
            body: Some(body.into()),
        }
    }

    pub fn new(method: Method, path: impl Into<String>, body: Option<Bytes>) -> Self {
        Self {
            method,
            path: path.into(),
            body,
        }
    }
}

/// A whole answer of a node.
#[derive(Debug, Clone)]
pub struct NodeResponse {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl NodeResponse {
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// Certain: the node has not seen the request.
    #[error("not sent: {0}")]
    NotSent(String),
    /// Certain: not sent, for a reason that is ours: no descriptors, no ports, no name service.
    #[error("could not send: {0}")]
    Local(String),
    /// The connection ended without a whole answer: the node may have applied the request.
    #[error("connection broken: {0}")]
    Broken(String),
}

/// A body that arrives in pieces.
pub type StreamedBody = UnsyncBoxBody<Bytes, SendError>;

/// The head of an answer, with its body still to come.
pub struct StreamedResponse {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: StreamedBody,
}

/// A connection to a node that is kept: as long as it lives, the node is the process that accepted it.
#[async_trait]
pub trait Held: Send + Sync + 'static {
    /// Sends over this very connection and waits for the whole answer. One request at a time; whoever stops waiting
    /// does not cut it.
    async fn send(&self, request: NodeRequest) -> Result<NodeResponse, SendError>;

    /// Ends when the connection has ended; does not keep it.
    fn until_ended(&self) -> BoxFuture<()>;
}

/// How the core talks to a node.
#[async_trait]
pub trait NodeClient: Send + Sync + 'static {
    /// Opens a connection of its own and keeps it until the last reference to it is dropped.
    async fn hold(&self) -> Result<Arc<dyn Held>, SendError>;

    /// What is sent from now on goes over new connections: those that are open may lead to another process. What is
    /// under way goes on.
    fn renew(&self) {}

    /// Sends and waits for the head of the answer, for as long as the connection lives.
    async fn open(&self, request: NodeRequest) -> Result<StreamedResponse, SendError>;

    /// Sends and waits for the whole answer, for as long as the connection lives.
    async fn send(&self, request: NodeRequest) -> Result<NodeResponse, SendError> {
        let StreamedResponse { status, headers, body } = self.open(request).await?;
        Ok(NodeResponse {
            status,
            headers,
            body: body.collect().await?.to_bytes(),
        })
    }
}

/// [`NodeClient`] over HTTP/1.1 with pooled connections, all of which live on one runtime.
pub struct HttpNodeClient {
    client: ArcSwap<Client<HttpConnector, Full<Bytes>>>,
    connector: HttpConnector,
    runtime: tokio::runtime::Handle,
    authority: String,
}

/// Puts connection tasks on the runtime that shutdown waits for, whoever made the request.
#[derive(Clone)]
struct OnRuntime(tokio::runtime::Handle);

impl<F> hyper::rt::Executor<F> for OnRuntime
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}

impl HttpNodeClient {
    /// `authority` is `host:port`; the name is resolved again for every new connection. Requests have to be made on
    /// `runtime`.
    pub fn new(authority: &str, runtime: tokio::runtime::Handle) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(Duration::from_secs(5)));
        connector.set_keepalive(Some(Duration::from_secs(10)));
        connector.set_keepalive_interval(Some(Duration::from_secs(5)));
        connector.set_keepalive_retries(Some(4));
        #[cfg(target_os = "linux")]
        connector.set_tcp_user_timeout(Some(Duration::from_secs(30)));
        Self {
            client: ArcSwap::from_pointee(pool(&connector, &runtime)),
            connector,
            runtime,
            authority: authority.to_owned(),
        }
    }
}

fn pool(connector: &HttpConnector, runtime: &tokio::runtime::Handle) -> Client<HttpConnector, Full<Bytes>> {
    Client::builder(OnRuntime(runtime.clone()))
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(Duration::from_secs(60))
        .build(connector.clone())
}

/// [`Held`] over HTTP/1.1.
struct HttpHeld {
    sender: Arc<tokio::sync::Mutex<http1::SendRequest<Full<Bytes>>>>,
    runtime: tokio::runtime::Handle,
    authority: String,
    ended: watch::Receiver<bool>,
}

#[async_trait]
impl Held for HttpHeld {
    async fn send(&self, request: NodeRequest) -> Result<NodeResponse, SendError> {
        let path = request.path.clone();
        let request = match build(request, &path, Some(&self.authority)) {
            Ok(request) => request,
            Err(error) => return Err(SendError::Local(error.to_string())),
        };
        let (done, answer) = oneshot::channel();
        let sender = self.sender.clone();
        // On a task of its own: dropping a request under way would close the connection.
        self.runtime.spawn(async move {
            let _ = done.send(send_over(&sender, request).await);
        });
        let ended = || Err(SendError::Broken("the connection ended".to_owned()));
        answer.await.unwrap_or_else(|_| ended())
    }

    fn until_ended(&self) -> BoxFuture<()> {
        let mut ended = self.ended.clone();
        Box::pin(async move {
            let _ = ended.wait_for(|ended| *ended).await.is_ok();
        })
    }
}

async fn send_over(
    sender: &tokio::sync::Mutex<http1::SendRequest<Full<Bytes>>>,
    request: http::Request<Full<Bytes>>,
) -> Result<NodeResponse, SendError> {
    let broken = |error: hyper::Error| SendError::Broken(chain(&error));
    let mut sender = sender.lock().await;
    sender
        .ready()
        .await
        .map_err(|error| SendError::NotSent(chain(&error)))?;
    let (head, body) = sender.send_request(request).await.map_err(broken)?.into_parts();
    Ok(NodeResponse {
        status: head.status.as_u16(),
        headers: head.headers,
        body: body.collect().await.map_err(broken)?.to_bytes(),
    })
}

/// `host` is sent where the connection is not opened from the URI.
fn build(request: NodeRequest, uri: &str, host: Option<&str>) -> Result<http::Request<Full<Bytes>>, http::Error> {
    let mut builder = http::Request::builder().method(request.method).uri(uri);
    if let Some(host) = host {
        builder = builder.header(header::HOST, host);
    }
    if request.body.is_some() {
        builder = builder.header(header::CONTENT_TYPE, "application/json");
    }
    builder.body(Full::new(request.body.unwrap_or_default()))
}

#[async_trait]
impl NodeClient for HttpNodeClient {
    async fn hold(&self) -> Result<Arc<dyn Held>, SendError> {
        let uri = http::Uri::try_from(format!("http://{}/", self.authority))
            .map_err(|error| SendError::Local(error.to_string()))?;
        let stream = self.connector.clone().call(uri).await.map_err(|error| {
            if is_of_node(&error) {
                SendError::NotSent(chain(&error))
            } else {
                SendError::Local(chain(&error))
            }
        })?;
        let (sender, connection) = http1::handshake(stream)
            .await
            .map_err(|error| SendError::Broken(chain(&error)))?;
        let (end, ended) = watch::channel(false);
        self.runtime.spawn(async move {
            let _ = connection.await;
            end.send_replace(true);
        });
        Ok(Arc::new(HttpHeld {
            sender: Arc::new(tokio::sync::Mutex::new(sender)),
            runtime: self.runtime.clone(),
            authority: self.authority.clone(),
            ended,
        }))
    }

    fn renew(&self) {
        self.client.store(Arc::new(pool(&self.connector, &self.runtime)));
    }

    async fn open(&self, request: NodeRequest) -> Result<StreamedResponse, SendError> {
        let uri = format!("http://{}{}", self.authority, request.path);
        let request = match build(request, &uri, None) {
            Ok(request) => request,
            // A name too long for a path, for one: the request's fault, and no node's.
            Err(error) => return Ok(unsendable(&error)),
        };
        let sent = self.client.load().request(request);
        let response = sent.await.map_err(|error| {
            if error.is_connect() {
                if is_of_node(&error) {
                    SendError::NotSent(chain(&error))
                } else {
                    SendError::Local(chain(&error))
                }
            } else {
                SendError::Broken(chain(&error))
            }
        })?;
        let (head, body) = response.into_parts();
        let body = body.map_err(|error| SendError::Broken(chain(&error))).boxed_unsync();
        Ok(StreamedResponse {
            status: head.status.as_u16(),
            headers: head.headers,
            body,
        })
    }
}

/// Whether a failure to connect is the node's: it refused, or was not to be reached.
fn is_of_node(error: &(dyn std::error::Error + 'static)) -> bool {
    use std::io::ErrorKind::{
        ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable, NetworkUnreachable, TimedOut,
    };
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<std::io::Error>() {
            let kind = error.kind();
            return [
                ConnectionRefused,
                ConnectionReset,
                ConnectionAborted,
                HostUnreachable,
                NetworkUnreachable,
                TimedOut,
            ]
            .contains(&kind);
        }
        next = error.source();
    }
    false
}

/// What a node would answer to a request that cannot even be put on the wire.
fn unsendable(error: &http::Error) -> StreamedResponse {
    let refusal = Refusal::invalid(format!("The request cannot be sent to a node: {error}"));
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let body = Full::new(refusal.body()).map_err(|never| match never {}).boxed_unsync();
    StreamedResponse {
        status: refusal.status,
        headers,
        body,
    }
}

/// An error with its causes in one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
