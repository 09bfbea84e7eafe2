//! What the client of a write gets, and the errors that are our own.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};

use crate::chroma::Refusal;
use crate::cluster::NodeResponse;

/// An answer to a client, whole.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    /// Without those that belong to one connection.
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// Headers that are about one connection or one message, not about the answer.
const NOT_PASSED_ON: [header::HeaderName; 6] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::TRANSFER_ENCODING,
    header::TE,
    header::TRAILER,
    header::UPGRADE,
];

impl Answer {
    /// JSON with this status.
    pub fn json(status: u16, body: impl Into<Bytes>) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Self {
            status,
            headers,
            body: body.into(),
        }
    }

    /// An error in Chroma's form.
    pub fn error(status: u16, error: &'static str, message: impl Into<String>) -> Self {
        Refusal {
            status,
            error,
            message: message.into(),
        }
        .into()
    }

    /// A node's answer with another body.
    pub fn of_node(response: &NodeResponse, body: Bytes) -> Self {
        let mut headers = response.headers.clone();
        for name in &NOT_PASSED_ON {
            headers.remove(name);
        }
        Self {
            status: response.status,
            headers,
            body,
        }
    }

    /// 503: nothing was done, trying again later may help.
    pub fn unavailable(reason: impl Into<String>) -> Self {
        Self::error(503, "ServiceUnavailable", reason).retry_after(1)
    }

    /// 503: nothing was done here; the proxy that writes now may do it.
    pub fn replaced() -> Self {
        Self::unavailable("Another proxy has taken over the log: this one no longer writes.")
    }

    /// 504: the nodes answered, but by now another proxy may have written in between.
    pub fn replaced_meanwhile() -> Self {
        Self::error(
            504,
            "GatewayTimeout",
            "Another proxy may have taken over the log during this write. It may or may not be applied; it will be the \
             same on all nodes.",
        )
    }

    /// 504: it may or may not have been done; all nodes will agree on which.
    pub fn indefinite() -> Self {
        Self::error(
            504,
            "GatewayTimeout",
            "No node confirmed this write in time. It may or may not be applied; it will be the same on all nodes.",
        )
    }

    /// 502: every node closed the connection, as Chroma does when a handler panics.
    pub fn closed() -> Self {
        Self::error(502, "BadGateway", "Every node closed the connection on this request.")
    }

    /// 404 in Chroma's words for a UUID route.
    pub fn no_such_collection(id: impl std::fmt::Display) -> Self {
        Self::error(404, "NotFoundError", format!("Collection [{id}] does not exist."))
    }

    /// 404 in Chroma's words for a name route, which have no final period.
    pub fn no_such_name(name: &str) -> Self {
        Self::error(404, "NotFoundError", format!("Collection [{name}] does not exist"))
    }

    fn retry_after(mut self, seconds: u32) -> Self {
        self.headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        self
    }

    /// 429 with a hint when to come back.
    pub fn too_many(message: &'static str) -> Self {
        Self::error(429, "RateLimitError", message).retry_after(1)
    }
}

/// Chroma's errors carry one, and clients look for it.
static TRACE_ID: header::HeaderName = header::HeaderName::from_static("chroma-trace-id");
const NO_TRACE: HeaderValue = HeaderValue::from_static("00000000000000000000000000000000");

impl From<Refusal> for Answer {
    fn from(refusal: Refusal) -> Self {
        let mut answer = Self::json(refusal.status, refusal.body());
        answer.headers.insert(TRACE_ID.clone(), NO_TRACE);
        answer
    }
}
