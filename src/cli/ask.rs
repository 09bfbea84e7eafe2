//! Asking a server a question, with a deadline.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, header};
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;

use crate::admin::OPERATOR;
use crate::cluster::{HttpNodeClient, NodeClient, NodeRequest, NodeResponse};

const LIMIT: Duration = Duration::from_secs(5);

/// A runtime for the few questions of a command.
pub fn runtime() -> Result<tokio::runtime::Runtime, String> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start a runtime: {error}"))
}

/// `GET`s a path; `authority` is `host:port`. Only on a runtime.
///
/// # Errors
/// Why there is no answer, in words.
pub async fn get(authority: &str, path: &str) -> Result<NodeResponse, String> {
    let client = HttpNodeClient::new(authority, tokio::runtime::Handle::current());
    match tokio::time::timeout(LIMIT, client.send(NodeRequest::get(path))).await {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no answer within {} s", LIMIT.as_secs())),
    }
}

/// How something is asked for.
pub struct Asking<'a> {
    pub token: Option<&'a str>,
    /// Who asks.
    pub operator: String,
    /// There is no other deadline: what is asked for may take its time.
    pub limit: Duration,
}

/// Asks for something that has to be allowed. Only on a runtime.
///
/// # Errors
/// Why there is no answer, in words.
pub async fn call(authority: &str, method: Method, path: &str, asking: Asking<'_>) -> Result<(u16, Bytes), String> {
    let Asking { token, operator, limit } = asking;
    let mut request = Request::builder()
        .method(method)
        .uri(format!("http://{authority}{path}"));
    if let Some(token) = token {
        request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
    }
    if let Ok(operator) = HeaderValue::try_from(operator) {
        request = request.header(OPERATOR, operator);
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(|error| error.to_string())?;
    let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let answer = async {
        let answer = client.request(request).await.map_err(|error| cause(&error))?;
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await.map_err(|error| error.to_string())?;
        Ok((status, body.to_bytes()))
    };
    match tokio::time::timeout(limit, answer).await {
        Ok(answer) => answer,
        Err(_) => Err(format!("no answer within {} s", limit.as_secs())),
    }
}

/// Why there is no answer: the client's own words say no more than that it failed, what it rests on says why.
fn cause(error: &dyn std::error::Error) -> String {
    let mut words = vec![];
    let mut inner = error.source();
    while let Some(error) = inner {
        words.push(error.to_string());
        inner = error.source();
    }
    if words.is_empty() {
        return error.to_string();
    }
    words.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_is_not_there_is_told_with_the_reason() {
        let asking = Asking {
            token: None,
            operator: String::new(),
            limit: LIMIT,
        };
        // Port 1 is nobody's.
        let answer = call("127.0.0.1:1", Method::GET, "/status", asking).await;
        let reason = answer.expect_err("nobody answers");
        assert!(reason.starts_with("tcp connect error: Connection refused"), "{reason}");
    }
}
