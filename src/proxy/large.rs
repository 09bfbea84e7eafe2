//! Reads whose body does not fit Pingora's retry buffer of 64 KiB.
//!
//! A query with a few large embeddings is longer than that. Pingora could stream it, but not send it again when the
//! node dies; so the body is read here, sent by our own client, and the answer streamed on.

use bytes::Bytes;
use http::header;
use http_body_util::BodyExt;
use pingora::http::ResponseHeader;
use pingora::{Error, ErrorType, Result};
use pingora_proxy::Session;

use super::{Ctx, Plan, Proxy, exchange};
use crate::chroma::translate;
use crate::cluster::{NodeIndex, NodeRequest, NodeResponse, SendError, StreamedResponse};
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
            let mut response = match opened {
                Some(Ok(response)) => response,
                Some(Err(_)) | None => continue,
            };
            let is_error = response.status >= 400;
            let Plan::Records { collection, .. } = &ctx.plan else {
                return self.stream(session, node, response, None).await;
            };
            self.core.observe_read(collection, node, response.status);
            if !is_error {
                // The head is passed on with the first piece: until then another node can be asked.
                match self.next_piece(node, &mut response).await {
                    Piece::Lost => continue,
                    first => return self.stream(session, node, response, Some(first)).await,
                }
            }
            if response.status == 404 && !collection.is_deleted() {
                self.core.report_missing(collection, node);
            }
            let alone = !ctx.has_alternative(&self.core, self.settings.consistency);
            if alone || (response.status != 404 && response.status < 500) {
                let StreamedResponse { status, headers, body } = response;
                let collected = crate::env::within(&self.core.env, self.settings.read_timeout, body.collect()).await;
                let Some(Ok(body)) = collected else { continue };
                let whole = NodeResponse {
                    status,
                    headers,
                    body: body.to_bytes(),
                };
                return Ok(Some(self.core.translated(collection, node, &whole)));
            }
        }
    }

    /// The next piece of a body, unless the node goes down or is silent for too long.
    async fn next_piece(&self, node: NodeIndex, response: &mut StreamedResponse) -> Piece {
        loop {
            let frame = tokio::select! {
                biased;
                frame = response.body.frame() => frame,
                () = self.core.cluster.node(node).until_down() => return Piece::Lost,
                () = self.core.env.sleep(self.settings.read_timeout) => return Piece::Lost,
            };
            match frame {
                None => return Piece::End,
                Some(Err(_)) => return Piece::Lost,
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Piece::Data(data);
                    }
                }
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

    async fn stream(
        &self,
        session: &mut Session,
        node: NodeIndex,
        mut response: StreamedResponse,
        first: Option<Piece>,
    ) -> Result<Option<Answer>> {
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
        let mut next = first;
        loop {
            let piece = match next.take() {
                Some(piece) => piece,
                None => self.next_piece(node, &mut response).await,
            };
            let (data, end) = match piece {
                Piece::Data(data) => (Some(data), false),
                Piece::End => (None, true),
                // Cut, never completed falsely: the client sees a body that is too short.
                Piece::Lost => {
                    let error = Error::explain(ErrorType::ReadError, "the node was lost in the middle of its answer");
                    return Err(error.into_up());
                }
            };
            session
                .write_response_body(data, end)
                .await
                .map_err(|error| error.into_down())?;
            if end {
                return Ok(None);
            }
        }
    }
}

/// What comes next of a body.
enum Piece {
    Data(Bytes),
    End,
    /// The node failed, went down or was silent for too long.
    Lost,
}
