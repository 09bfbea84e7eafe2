//! The admin port.

use async_trait::async_trait;
use http::Response;
use pingora::apps::http_app::ServeHttp;
use pingora::protocols::http::ServerSession;

use super::Admin;

/// Serves [`Admin`] on a port of its own.
pub struct AdminPort(pub std::sync::Arc<Admin>);

#[async_trait]
impl ServeHttp for AdminPort {
    async fn response(&self, session: &mut ServerSession) -> Response<Vec<u8>> {
        let header = session.req_header();
        let method = header.method.clone();
        let raw = String::from_utf8_lossy(header.raw_path()).into_owned();
        let (path, query) = match raw.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (raw.as_str(), None),
        };
        let headers = header.headers.clone();
        let from = session.client_addr().and_then(|address| address.as_inet());
        let from = from.map(|address| address.ip().to_string());
        let answer = self.0.private(&method, path, query, &headers, from.as_deref());
        let answer = answer.await;
        let length = http::HeaderValue::from(answer.body.len());
        let body = if method == http::Method::HEAD {
            Vec::new()
        } else {
            answer.body.to_vec()
        };
        let mut response = Response::new(body);
        *response.status_mut() = http::StatusCode::from_u16(answer.status).unwrap_or(http::StatusCode::OK);
        *response.headers_mut() = answer.headers;
        response.headers_mut().insert(http::header::CONTENT_LENGTH, length);
        response
    }
}
