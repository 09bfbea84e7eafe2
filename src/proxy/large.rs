//! Reads whose body does not fit Pingora's retry buffer of 64 KiB.
//!
//! A query with a few large embeddings is longer than that. Pingora could stream it, but not send it again when the
//! node dies; so the body is read here, sent by our own client, and the answer streamed on.

use http::header;
use http_body_util::BodyExt;
use pingora::Result;
use pingora::http::ResponseHeader;
use pingora_proxy::Session;

use super::{Ctx, Plan, Proxy, exchange};
use crate::chroma::translate;
use crate::cluster::{NodeRequest, NodeResponse, SendError, StreamedResponse};
use crate::mirror::Answer;

impl Proxy {
    /// Serves such a read; an answer means that nothing was written yet.
    pub(super) async fn serve_large(&self, session: &mut Session, ctx: &mut Ctx, raw: &str) -> Result<Option<Answer>> {
        let body = match exchange::read_body(session, self.settings.max_body, &self.bytes).await? {
            Ok(body) => body,
            Err(answer) => return Ok(Some(answer)),
        };
        let method = session.req_header().method.clone();
        loop {
            ctx.end_attempt(&self.core);
            let Some(node) = ctx.choose(&self.core, self.settings.consistency).await else {
                return Ok(Some(Answer::unavailable("No node can serve this at the moment.")));
            };
            ctx.begin_attempt(&self.core, node);
            let path = match &ctx.plan {
                Plan::Records { collection, span } => match collection.node_id(node) {
                    Some(id) => translate(raw, span.clone(), id),
                    None => continue,
                },
                _ => raw.to_owned(),
            };
            let request = NodeRequest::new(method.clone(), path, Some(body.bytes.clone()));
            let opened = self.open(node, request).await?;
            let response = match opened {
                Some(Ok(response)) => response,
                Some(Err(_)) | None => continue,
            };
            let Plan::Records { collection, .. } = &ctx.plan else {
                return self.stream(session, response).await;
            };
            if response.status < 400 {
                return self.stream(session, response).await;
            }
            if response.status == 404 && !collection.is_deleted() {
                self.core.report_missing(collection, node);
            }
            let alone = !ctx.has_alternative(&self.core, self.settings.consistency);
            if alone || (response.status != 404 && response.status < 500) {
                let StreamedResponse { status, headers, body } = response;
                let Ok(body) = body.collect().await else { continue };
                let whole = NodeResponse {
                    status,
                    headers,
                    body: body.to_bytes(),
                };
                return Ok(Some(self.core.translated(collection, node, &whole)));
            }
        }
    }

    /// Sends on the core's runtime; `None` when the node goes down or takes too long.
    async fn open(
        &self,
        node: usize,
        request: NodeRequest,
    ) -> Result<Option<std::result::Result<StreamedResponse, SendError>>> {
        let (core, limit) = (self.core.clone(), self.settings.read_timeout);
        self.on_core(async move {
            let client = core.cluster.node(node).client.clone();
            let outcome = tokio::select! {
                biased;
                opened = client.open(request) => Some(opened),
                () = core.cluster.node(node).until_down() => None,
                () = core.env.sleep(limit) => None,
            };
            if let Some(Err(SendError::NotSent(reason))) = &outcome {
                core.cluster.report_connect_failure(node, reason);
            }
            outcome
        })
        .await
    }

    async fn stream(&self, session: &mut Session, mut response: StreamedResponse) -> Result<Option<Answer>> {
        let mut header = ResponseHeader::build(response.status, Some(response.headers.len()))?;
        for (name, value) in &response.headers {
            if *name != header::CONNECTION && *name != header::TRANSFER_ENCODING {
                header.append_header(name.clone(), value.clone())?;
            }
        }
        if !response.headers.contains_key(header::CONTENT_LENGTH) {
            header.insert_header(header::TRANSFER_ENCODING, "chunked")?;
        }
        session
            .write_response_header(Box::new(header), false)
            .await
            .map_err(|error| error.into_down())?;
        while let Some(frame) = response.body.frame().await {
            let piece = frame
                .map_err(|error| pingora::Error::explain(pingora::ErrorType::ReadError, error.to_string()).into_up())?;
            if let Ok(piece) = piece.into_data() {
                session
                    .write_response_body(Some(piece), false)
                    .await
                    .map_err(|error| error.into_down())?;
            }
        }
        session
            .write_response_body(None, true)
            .await
            .map_err(|error| error.into_down())?;
        Ok(None)
    }
}
