//! The admin port.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use http::{Method, Version, header};
use pingora::apps::{HttpPersistentSettings, HttpServerApp, ReusedHttpStream};
use pingora::http::ResponseHeader;
use pingora::protocols::http::ServerSession;
use pingora::server::ShutdownWatch;

use super::{Admin, Reply};
use crate::mirror::Answer;

/// How long a connection may be idle between two requests.
const IDLE_SECONDS: u64 = 60;

/// Serves [`Admin`] on a port of its own.
pub struct AdminPort(pub Arc<Admin>);

#[async_trait]
impl HttpServerApp for AdminPort {
    async fn process_new_http(
        self: &Arc<Self>,
        mut session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        match session.read_request().await {
            Ok(true) => {}
            Ok(false) => return None,
            Err(error) => {
                tracing::info!(%error, "A request on the admin port cannot be read.");
                return None;
            }
        }
        let is_ending = *shutdown.borrow();
        session.set_keepalive((!is_ending).then_some(IDLE_SECONDS));
        let reply = self.reply(&session).await;
        if let Err(error) = write(&mut session, reply).await {
            tracing::info!(%error, "An answer on the admin port was not taken.");
            return None;
        }
        let settings = HttpPersistentSettings::for_session(&session);
        let stream = session.finish().await.ok()??;
        Some(ReusedHttpStream::from_reusable_stream(stream, settings))
    }
}

impl AdminPort {
    async fn reply(&self, session: &ServerSession) -> Reply {
        let header = session.req_header();
        let raw = String::from_utf8_lossy(header.raw_path());
        let (path, query) = match raw.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (&*raw, None),
        };
        let from = session.client_addr().and_then(|address| address.as_inet());
        let from = from.map(|address| address.ip().to_string());
        self.0
            .private(&header.method, path, query, &header.headers, from.as_deref())
            .await
    }
}

async fn write(session: &mut ServerSession, reply: Reply) -> pingora::Result<()> {
    match reply {
        Reply::Whole(answer) => {
            let header = head_of_whole(&answer)?;
            write_pieces(session, header, std::iter::once(answer.body)).await
        }
        Reply::Mappings(mappings) => {
            let version = session.req_header().version;
            if version == Version::HTTP_10 {
                session.set_keepalive(None);
            }
            let header = head_of_pieces(version)?;
            write_pieces(session, header, mappings).await
        }
    }
}

fn head_of_whole(answer: &Answer) -> pingora::Result<ResponseHeader> {
    let mut header = ResponseHeader::build(answer.status, Some(answer.headers.len() + 1))?;
    for (name, value) in &answer.headers {
        header.append_header(name.clone(), value.clone())?;
    }
    header.insert_header(header::CONTENT_LENGTH, answer.body.len().to_string())?;
    Ok(header)
}

/// The head of JSON of which nobody knows yet how long it is.
pub fn head_of_pieces(version: Version) -> pingora::Result<ResponseHeader> {
    let mut header = ResponseHeader::build(200, Some(2))?;
    header.insert_header(header::CONTENT_TYPE, "application/json")?;
    // Before it, the end of the connection is the end of the answer; after it, frames say where it ends.
    if version == Version::HTTP_11 {
        header.insert_header(header::TRANSFER_ENCODING, "chunked")?;
    }
    Ok(header)
}

async fn write_pieces(
    session: &mut ServerSession,
    header: ResponseHeader,
    pieces: impl Iterator<Item = Bytes>,
) -> pingora::Result<()> {
    let is_head = session.req_header().method == Method::HEAD;
    session.write_response_header(Box::new(header)).await?;
    for piece in pieces.filter(|piece| !is_head && !piece.is_empty()) {
        session.write_response_body(piece, false).await?;
    }
    Ok(())
}
