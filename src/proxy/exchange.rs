//! Reading a request's body and writing a whole answer, over a Pingora session.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Method, header};
use pingora::Result;
use pingora::http::ResponseHeader;
use pingora_proxy::Session;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::admin::head_of_pieces;
use crate::mirror::Answer;

/// Bodies up to this size take no share of the memory for bodies; beyond, they take it step by step.
const UNRESERVED: usize = 64 << 10;
const STEP: usize = 1 << 20;
const FIRST_BUFFER: usize = 1 << 20;
/// How long a body may take to arrive.
const BODY_LIMIT: Duration = Duration::from_secs(600);

/// How long a body waits for its share of memory.
const MEMORY_WAIT: Duration = Duration::from_secs(10);

/// How much more than the limit is read of a body that is refused, and for how long.
const UNREAD_LIMIT: usize = 64 << 20;
const UNREAD_WAIT: Duration = Duration::from_secs(10);

/// A body, with its share of the memory for bodies.
pub struct Body {
    pub bytes: Bytes,
    _memory: Vec<OwnedSemaphorePermit>,
}

/// Whether the request's body is, or might be, longer than `limit`.
pub fn body_may_exceed(session: &Session, limit: usize) -> bool {
    match content_length(session) {
        Some(length) => length > limit,
        None => {
            session.req_header().headers.contains_key(header::TRANSFER_ENCODING) || {
                session.req_header().version == http::Version::HTTP_2
                    && super::is_mutating(&session.req_header().method)
            }
        }
    }
}

fn content_length(session: &Session) -> Option<usize> {
    session
        .req_header()
        .headers
        .get(header::CONTENT_LENGTH)?
        .to_str()
        .ok()?
        .trim()
        .parse()
        .ok()
}

fn expects_continue(session: &Session) -> bool {
    let expect = session.req_header().headers.get(header::EXPECT);
    expect.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// Reads a whole body of at most `limit` bytes. The inner error is an answer for the client.
pub async fn read_body(
    session: &mut Session,
    limit: usize,
    memory: &Arc<Semaphore>,
) -> Result<std::result::Result<Body, Answer>> {
    let announced = content_length(session);
    if announced.is_some_and(|length| length > limit) {
        return Ok(Err(too_large(session, limit)));
    }
    if expects_continue(session) {
        session.set_close_on_response_before_downstream_finish(false);
        session
            .write_continue_response()
            .await
            .map_err(|error| error.into_down())?;
    }
    let mut permits = Vec::new();
    let mut reserved = UNRESERVED;
    let mut body = BytesMut::with_capacity(announced.unwrap_or(0).min(FIRST_BUFFER));
    let whole = async {
        // Memory is taken for what has come, not for what was announced.
        while let Some(piece) = session.read_request_body().await.map_err(|error| error.into_down())? {
            if body.len() + piece.len() > limit {
                return Ok(Some(Shortage::Limit));
            }
            while body.len() + piece.len() > reserved {
                match reserve(memory, STEP).await {
                    Some(permit) => permits.push(permit),
                    None => return Ok(Some(Shortage::Memory)),
                }
                reserved += STEP;
            }
            body.extend_from_slice(&piece);
        }
        Ok::<_, Box<pingora::Error>>(None)
    };
    let Ok(outcome) = tokio::time::timeout(BODY_LIMIT, whole).await else {
        session.set_keepalive(None);
        return Ok(Err(Answer::error(
            408,
            "RequestTimeout",
            "The request body did not arrive in time.",
        )));
    };
    match outcome? {
        None => Ok(Ok(Body {
            bytes: body.freeze(),
            _memory: permits,
        })),
        Some(Shortage::Limit) => Ok(Err(too_large(session, limit))),
        Some(Shortage::Memory) => Ok(Err(Answer::unavailable(
            "Too many bytes of request bodies are in flight.",
        ))),
    }
}

/// Why a body is not taken.
enum Shortage {
    Limit,
    Memory,
}

async fn reserve(memory: &Arc<Semaphore>, bytes: usize) -> Option<OwnedSemaphorePermit> {
    let kibibytes = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX);
    let acquire = memory.clone().acquire_many_owned(kibibytes);
    tokio::time::timeout(MEMORY_WAIT, acquire).await.ok()?.ok()
}

/// Reads what is still on its way and forgets it, within bounds, and lets the connection end then: one that is closed on
/// unread bytes is reset, and takes the answer with it.
pub async fn discard_body(session: &mut Session, limit: usize) {
    session.set_keepalive(None);
    if expects_continue(session) && session.response_written().is_none() {
        // The client waits for a word before it sends anything.
        return;
    }
    let rest = async {
        let mut left = limit.saturating_add(UNREAD_LIMIT);
        while let Ok(Some(piece)) = session.read_request_body().await {
            left = left.saturating_sub(piece.len());
            if left == 0 {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(UNREAD_WAIT, rest).await;
}

fn too_large(session: &mut Session, limit: usize) -> Answer {
    session.set_keepalive(None);
    Answer::error(
        413,
        "ChromaError",
        format!("Payload too large: the limit is {limit} bytes"),
    )
}

/// Whether an answer has begun; a `100 Continue` is none.
pub fn is_answered(session: &Session) -> bool {
    session
        .response_written()
        .is_some_and(|header| !header.status.is_informational())
}

/// A target in absolute form (`POST http://host/path`) means its path: Chroma takes it so, and what is not understood
/// here must not reach a node. False: it has no path.
pub fn use_origin_form(session: &mut Session) -> Result<bool> {
    let header = session.req_header_mut();
    if header.raw_path().starts_with(b"/") {
        return Ok(true);
    }
    let path = header.uri.path_and_query().map(|path| path.as_str().to_owned());
    match path.filter(|path| path.starts_with('/')) {
        Some(path) => header.set_raw_path(path.as_bytes()).map(|()| true),
        None => Ok(false),
    }
}

/// Writes a whole answer.
pub async fn write_answer(session: &mut Session, answer: Answer) -> Result<()> {
    let is_head = session.req_header().method == Method::HEAD;
    let mut header = ResponseHeader::build(answer.status, Some(answer.headers.len() + 1))?;
    for (name, value) in &answer.headers {
        header.append_header(name.clone(), value.clone())?;
    }
    header.insert_header(header::CONTENT_LENGTH, answer.body.len().to_string())?;
    let only_header = is_head || answer.body.is_empty();
    session
        .write_response_header(Box::new(header), only_header)
        .await
        .map_err(|error| error.into_down())?;
    if !only_header {
        session
            .write_response_body(Some(answer.body), true)
            .await
            .map_err(|error| error.into_down())?;
    }
    Ok(())
}

/// Writes JSON piece by piece, each made when the one before is on its way.
pub async fn write_pieces(session: &mut Session, mut pieces: impl Iterator<Item = Bytes>) -> Result<()> {
    let is_head = session.req_header().method == Method::HEAD;
    let header = head_of_pieces(session.req_header().version)?;
    session
        .write_response_header(Box::new(header), is_head)
        .await
        .map_err(|error| error.into_down())?;
    let mut next = if is_head { None } else { pieces.next() };
    while let Some(piece) = next {
        next = pieces.next();
        session
            .write_response_body(Some(piece), next.is_none())
            .await
            .map_err(|error| error.into_down())?;
    }
    Ok(())
}
