//! The plugin: Diptych as a Pingora `ProxyHttp`.
//!
//! Thin on purpose. Reads of records are streamed through Pingora to a node that is in step with the collection, with
//! the collection's UUID exchanged in the path. Everything else is answered in `request_filter`: writes by the mirror,
//! reads of the namespace by `lookups`, and queries too large for Pingora's retry buffer by `large`. Work that must
//! not be cut off runs on the core's runtime, which neither a client nor a shutdown of Pingora's own runtimes cancels.

mod exchange;
mod large;
mod lookups;
mod plan;
mod writes;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::Method;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::modules::http::HttpModules;
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorSource, ErrorType, Result};
use pingora_proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session};
use uuid::Uuid;

use crate::admin::{Admin, Mappings, Reply};
use crate::catalog::Collection;
use crate::chroma::{OWN_TENANT, Route, Segment, Target, classify, plain_read, replace_uuid, translate};
use crate::config::Consistency;
use crate::metrics::Metrics;
use crate::mirror::{Answer, Core};

pub use lookups::answer as look_up;
pub use plan::{Ctx, Plan};

/// Bodies of reads up to this size are streamed; Pingora can send them again to another node.
const RETRYABLE_BODY: usize = 60 << 10;

/// What the proxy is told about how to behave.
#[derive(Debug, Clone)]
pub struct Settings {
    pub consistency: Consistency,
    pub read_timeout: Duration,
    pub max_body: usize,
    /// Bytes of bodies that may be held at a time, all clients together.
    pub bytes_in_flight: usize,
    /// Whether `/health`, `/status` and their kin are answered on the proxy port.
    pub listen_status: bool,
}

/// Diptych as a Pingora proxy.
pub struct Proxy {
    core: Arc<Core>,
    admin: Arc<Admin>,
    metrics: Arc<Metrics>,
    settings: Settings,
    bytes: Arc<tokio::sync::Semaphore>,
}

impl Proxy {
    pub fn new(core: Arc<Core>, admin: Arc<Admin>, metrics: Arc<Metrics>, settings: Settings) -> Self {
        let kibibytes = settings
            .bytes_in_flight
            .div_ceil(1024)
            .min(tokio::sync::Semaphore::MAX_PERMITS);
        Self {
            core,
            admin,
            metrics,
            settings,
            bytes: Arc::new(tokio::sync::Semaphore::new(kibibytes)),
        }
    }

    /// Runs on the core's runtime, to its end, even if the caller goes away.
    async fn on_core<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Result<T> {
        let (done, result) = tokio::sync::oneshot::channel();
        self.core.spawn_job(async move {
            let _ = done.send(work.await);
        });
        result
            .await
            .map_err(|_| Error::explain(ErrorType::InternalError, "a job was dropped"))
    }

    /// Finds the collection of a read that Pingora will stream; an answer means that it will not.
    async fn plan_read(&self, target: &Target) -> Result<std::result::Result<Plan, Answer>> {
        let span = target.span.clone();
        if let Some(collection) = self.known(target) {
            return Ok(Ok(Plan::Records { collection, span }));
        }
        let (core, target) = (self.core.clone(), target.clone());
        let found = self
            .on_core(async move { writes::resolve(&core, &target).await })
            .await?;
        Ok(match found {
            Ok(writes::Resolved::Collection(collection)) => Ok(Plan::Records { collection, span }),
            // Chroma's own 400 for what is neither a UUID nor a known name.
            Ok(writes::Resolved::NotAnId) => Ok(Plan::Lead),
            Ok(writes::Resolved::Nowhere(id)) => Err(Answer::no_such_collection(id)),
            Err(answer) => Err(answer),
        })
    }

    /// Whether this is a read of records of a known collection, small enough to be streamed: by far the most requests
    /// are. Its plan is made then, without a wait; all else is for [`Proxy::route`].
    fn is_plain_read(&self, session: &Session, ctx: &mut Ctx) -> bool {
        let header = session.req_header();
        let Ok(raw) = std::str::from_utf8(header.raw_path()) else {
            return false;
        };
        let path = &raw[..memchr::memchr(b'?', raw.as_bytes()).unwrap_or(raw.len())];
        if !path.starts_with("/api/") || exchange::body_may_exceed(session, RETRYABLE_BODY) {
            return false;
        }
        if let Some(read) = plain_read(&header.method, path)
            && let Some(collection) = self.known_by_id(read.id)
        {
            ctx.label = read.label;
            ctx.plan = Plan::Records {
                collection,
                span: read.span,
            };
            return true;
        }
        let route = classify(&header.method, path);
        let Route::RecordRead { target, .. } = &route else {
            return false;
        };
        if target.tenant == OWN_TENANT {
            return false;
        }
        let Some(collection) = self.known(target) else {
            return false;
        };
        ctx.label = route.label();
        ctx.plan = Plan::Records {
            collection,
            span: target.span.clone(),
        };
        true
    }

    /// The collection, if the catalog has it.
    fn known(&self, target: &Target) -> Option<Arc<Collection>> {
        match &target.segment {
            Segment::Id(id) => self.known_by_id(*id),
            Segment::Name(name) => self.core.catalog.by_name(&target.tenant, &target.database, name),
        }
    }

    fn known_by_id(&self, id: Uuid) -> Option<Arc<Collection>> {
        let collection = self.core.catalog.by_id(id)?;
        (!collection.is_deleted()).then_some(collection)
    }

    /// Decides what to do with a request: stream it or answer it here.
    async fn route(&self, session: &mut Session, ctx: &mut Ctx) -> Result<Next> {
        if !exchange::use_origin_form(session)? {
            return Ok(Next::Answer(Answer::error(
                400,
                "InvalidArgumentError",
                "The request target has no path.",
            )));
        }
        let header = session.req_header();
        let method = header.method.clone();
        let raw = String::from_utf8_lossy(header.raw_path()).into_owned();
        let (path, query) = match raw.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (raw.as_str(), None),
        };
        if self.settings.listen_status
            && let Some(reply) = self.admin.public(&method, path, query).await
        {
            ctx.label = "status";
            return Ok(match reply {
                Reply::Whole(answer) => Next::Answer(answer),
                Reply::Mappings(mappings) => Next::Mappings(mappings),
            });
        }
        let route = classify(&method, path);
        ctx.label = route.label();
        if route.tenant() == Some(OWN_TENANT) {
            return Ok(Next::Answer(Answer::error(404, "NotFoundError", "Not found")));
        }
        match route {
            Route::Server => {
                ctx.plan = Plan::AnyNode;
                Ok(Next::Stream)
            }
            Route::OtherRead { .. } | Route::CrnLookup | Route::Outside { .. } => {
                ctx.plan = Plan::Lead;
                Ok(Next::Stream)
            }
            Route::RecordRead { target, .. } => match self.plan_read(&target).await? {
                Err(answer) => Ok(Next::Answer(answer)),
                Ok(plan) => {
                    ctx.plan = plan;
                    if exchange::body_may_exceed(session, RETRYABLE_BODY) {
                        return Ok(self
                            .serve_large(session, ctx, &raw)
                            .await?
                            .map_or(Next::Answered, Next::Answer));
                    }
                    Ok(Next::Stream)
                }
            },
            Route::Tenant { .. }
            | Route::Database { .. }
            | Route::DatabaseList { .. }
            | Route::CollectionList { .. }
            | Route::CollectionCount { .. }
            | Route::CollectionByName { .. }
            | Route::CollectionById { .. } => {
                let (core, raw) = (self.core.clone(), raw.clone());
                self.on_core(async move { lookups::answer(&core, route, &raw).await })
                    .await
                    .map(Next::Answer)
            }
            write => {
                let body = match exchange::read_body(session, self.settings.max_body, &self.bytes).await? {
                    Ok(body) => body,
                    Err(answer) => return Ok(Next::Answer(answer)),
                };
                let (core, raw) = (self.core.clone(), raw.clone());
                let client = session.client_addr().and_then(|address| Some(address.as_inet()?.ip()));
                let work = async move { writes::answer(&core, write, &method, &raw, body.bytes, client).await };
                self.on_core(work).await.map(Next::Answer)
            }
        }
    }
}

/// How a request goes on.
enum Next {
    /// Through Pingora to a node.
    Stream,
    Answer(Answer),
    /// An answer in pieces.
    Mappings(Mappings),
    /// The answer has been written.
    Answered,
}

#[async_trait]
impl ProxyHttp for Proxy {
    type CTX = Ctx;

    fn new_ctx(&self) -> Ctx {
        Ctx::new(self.core.env.now(), self.metrics.in_flight())
    }

    /// None: the default one compresses answers where it is told to, which nobody tells it, and costs every request.
    fn init_downstream_modules(&self, _modules: &mut HttpModules) {}

    async fn request_filter(&self, session: &mut Session, ctx: &mut Ctx) -> Result<bool> {
        if session.is_process_shutting_down() {
            session.set_keepalive(None);
        }
        if self.is_plain_read(session, ctx) {
            return Ok(false);
        }
        // In a box: it is large, and every read would carry the room for it.
        match Box::pin(self.route(session, ctx)).await? {
            Next::Stream => Ok(false),
            Next::Answered => Ok(true),
            Next::Answer(answer) => {
                if !session.is_body_done() {
                    exchange::discard_body(session, self.settings.max_body).await;
                }
                exchange::write_answer(session, answer).await?;
                Ok(true)
            }
            Next::Mappings(mappings) => {
                if !session.is_body_done() {
                    exchange::discard_body(session, self.settings.max_body).await;
                }
                exchange::write_pieces(session, mappings).await?;
                Ok(true)
            }
        }
    }

    async fn upstream_peer(&self, _session: &mut Session, ctx: &mut Ctx) -> Result<Box<HttpPeer>> {
        let node = loop {
            ctx.end_attempt(&self.core);
            let node = ctx.choose(&self.core, self.settings.consistency).await.ok_or_else(|| {
                let status = ctx.last_failure.unwrap_or(503);
                Error::explain(
                    ErrorType::HTTPStatus(status),
                    "no further node can serve this at the moment",
                )
            })?;
            ctx.begin_attempt(&self.core, node);
            // Whoever takes it out now waits for this read; one that came too late goes elsewhere.
            if !self.core.cluster.node(node).is_closed() {
                break node;
            }
        };
        let Some(address) = self.core.cluster.node(node).address() else {
            self.core
                .cluster
                .report_connect_failure(node, "the node's name has not been resolved");
            let mut error = Error::explain(ErrorType::ConnectError, "the node's name has not been resolved");
            error.set_retry(true);
            return Err(error);
        };
        let mut peer = HttpPeer::new(address, false, String::new());
        peer.group_key = self.core.cluster.node(node).incarnation();
        peer.options.connection_timeout = Some(Duration::from_secs(2));
        peer.options.total_connection_timeout = Some(Duration::from_secs(2));
        peer.options.read_timeout = Some(self.settings.read_timeout);
        peer.options.write_timeout = Some(self.settings.read_timeout);
        peer.options.idle_timeout = Some(Duration::from_secs(60));
        Ok(Box::new(peer))
    }

    async fn connected_to_upstream(
        &self,
        _session: &mut Session,
        _reused: bool,
        _peer: &HttpPeer,
        fd: std::os::fd::RawFd,
        digest: Option<&pingora::protocols::Digest>,
        ctx: &mut Ctx,
    ) -> Result<()> {
        // Pingora asks the kernel for it once for each connection.
        let local = digest.and_then(|digest| digest.socket_digest.as_ref()?.local_addr()?.as_inet());
        if let (Some(node), Some(local)) = (ctx.node, local) {
            ctx.socket = Some(self.core.cluster.node(node).remember_socket(fd, *local));
        }
        Ok(())
    }

    async fn upstream_request_filter(
        &self,
        _session: &mut Session,
        request: &mut RequestHeader,
        ctx: &mut Ctx,
    ) -> Result<()> {
        if let (Plan::Records { collection, span }, Some(node)) = (&ctx.plan, ctx.node)
            && let Some(id) = collection.node_id(node)
        {
            let mut buffer = Uuid::encode_buffer();
            let wanted = id.hyphenated().encode_lower(&mut buffer);
            // Often it is there already: clients know the collection by its UUID on one of the nodes.
            let path = request.raw_path();
            let there = request.raw_path_is_utf8() && path.get(span.clone()) == Some(wanted.as_bytes());
            if !there {
                match path.get(span.clone()) {
                    // Of the same length: nothing else of the path is looked at.
                    Some(other) if other.len() == wanted.len() && request.raw_path_is_utf8() => {
                        let mut translated = path.to_vec();
                        translated[span.clone()].copy_from_slice(wanted.as_bytes());
                        request.set_raw_path(&translated)?;
                    }
                    _ => {
                        let translated = translate(&String::from_utf8_lossy(path), span.clone(), id);
                        request.set_raw_path(translated.as_bytes())?;
                    }
                }
            }
        }
        Ok(())
    }

    async fn upstream_response_filter(
        &self,
        _session: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut Ctx,
    ) -> Result<()> {
        let status = response.status.as_u16();
        let (Plan::Records { collection, .. }, Some(node)) = (&ctx.plan, ctx.node) else {
            return Ok(());
        };
        self.core.observe_read(collection, node, status);
        if status < 400 {
            return Ok(());
        }
        if status == 404 && !collection.is_deleted() {
            self.core.report_missing(collection, node);
        }
        if (status == 404 || status >= 500) && ctx.has_alternative(&self.core, self.settings.consistency) {
            let mut error = Error::explain(ErrorType::HTTPStatus(status), "this node alone may answer so");
            error.set_retry(true);
            return Err(error.into_up());
        }
        if let Some(id) = collection.node_id(node)
            && id != collection.client_id
        {
            ctx.rewrite = Some((id, collection.client_id));
        }
        Ok(())
    }

    fn response_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        ctx: &mut Ctx,
    ) -> Result<Option<Duration>> {
        // Only error messages are rewritten: short, and of the same length afterwards.
        if let Some((from, to)) = ctx.rewrite {
            if let Some(piece) = body.take() {
                ctx.held.extend_from_slice(&piece);
            }
            if end_of_stream {
                *body = Some(replace_uuid(std::mem::take(&mut ctx.held).freeze(), from, to));
            }
        }
        Ok(None)
    }

    fn fail_to_connect(
        &self,
        _session: &mut Session,
        _peer: &HttpPeer,
        ctx: &mut Ctx,
        mut error: Box<Error>,
    ) -> Box<Error> {
        // What is not the node's doing, a lack of descriptors or ports for one, takes no node down.
        let its_fault = matches!(
            error.etype(),
            ErrorType::ConnectRefused | ErrorType::ConnectTimedout | ErrorType::ConnectNoRoute
        );
        if let Some(node) = ctx.node
            && its_fault
        {
            self.core.cluster.report_connect_failure(node, &error.to_string());
        }
        error.set_retry(true);
        error
    }

    fn error_while_proxy(
        &self,
        peer: &HttpPeer,
        session: &mut Session,
        error: Box<Error>,
        ctx: &mut Ctx,
        client_reused: bool,
    ) -> Box<Error> {
        let mut error = error.more_context(format!("Peer: {peer}"));
        let nothing_sent = !exchange::is_answered(session);
        let from_node = *error.esource() == ErrorSource::Upstream;
        let retry = from_node && nothing_sent && !session.retry_buffer_truncated() && ctx.is_repeatable(session);
        let broke = matches!(
            error.etype(),
            ErrorType::ConnectionClosed | ErrorType::ReadError | ErrorType::WriteError
        );
        if retry && client_reused && broke {
            ctx.allow_same_node_once();
        }
        ctx.last_failure = match error.etype() {
            ErrorType::HTTPStatus(_) => None,
            ErrorType::ReadTimedout => Some(504),
            _ => Some(502),
        };
        error.set_retry(retry);
        error
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &Error, ctx: &mut Ctx) -> FailToProxy {
        let gone = *error.esource() == ErrorSource::Downstream
            && matches!(
                error.etype(),
                ErrorType::WriteError | ErrorType::ReadError | ErrorType::ConnectionClosed
            );
        let answer = match error.etype() {
            _ if gone || exchange::is_answered(session) => None,
            ErrorType::HTTPStatus(503)
            | ErrorType::ConnectError
            | ErrorType::ConnectTimedout
            | ErrorType::ConnectRefused => Some(Answer::unavailable("No node can serve this at the moment.")),
            ErrorType::HTTPStatus(502) => Some(Answer::error(502, "BadGateway", "The node closed the connection.")),
            ErrorType::HTTPStatus(504) | ErrorType::ReadTimedout => {
                Some(Answer::error(504, "GatewayTimeout", "No node answered in time."))
            }
            ErrorType::HTTPStatus(status) => Some(Answer::error(*status, "InternalError", "The request failed.")),
            _ if *error.esource() == ErrorSource::Upstream => {
                Some(Answer::error(502, "BadGateway", "The node closed the connection."))
            }
            _ if *error.esource() == ErrorSource::Downstream => Some(Answer::error(
                400,
                "InvalidArgumentError",
                "The request could not be read.",
            )),
            _ => Some(Answer::error(500, "InternalError", "The proxy failed.")),
        };
        let error_code = answer.as_ref().map_or(0, |answer| answer.status);
        ctx.failed_with = error_code;
        if let Some(answer) = answer {
            session.set_keepalive(None);
            let _ = exchange::write_answer(session, answer).await;
        }
        FailToProxy {
            error_code,
            can_reuse_downstream: false,
        }
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, ctx: &mut Ctx) {
        let now = self.core.env.now();
        ctx.end_attempt_at(&self.core, now);
        let status = session
            .response_written()
            .map_or(ctx.failed_with, |header| header.status.as_u16());
        let took = now.saturating_sub(ctx.started);
        self.metrics.request(ctx.label, status, took);
        tracing::debug!(
            method = %session.req_header().method,
            path = %String::from_utf8_lossy(session.req_header().raw_path()),
            status,
            took = ?took,
            error = error.map(ToString::to_string),
            "Answered a request."
        );
    }

    fn suppress_proxy_warn_log(
        &self,
        _session: &Session,
        _ctx: &Ctx,
        error: &Error,
        _about: ProxyWarnLogContext,
    ) -> bool {
        matches!(error.etype(), ErrorType::HTTPStatus(_))
    }

    fn suppress_error_log(&self, _session: &Session, ctx: &Ctx, _error: &Error) -> bool {
        ctx.failed_with == 503 || ctx.failed_with == 0
    }
}

/// Whether a method asks for a state change.
pub(crate) fn is_mutating(method: &Method) -> bool {
    !matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
}
