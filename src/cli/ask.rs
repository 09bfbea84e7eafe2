//! Asking a server a question, with a deadline.

use std::time::Duration;

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
