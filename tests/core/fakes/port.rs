//! The admin port of a stage.

use diptych::admin::{Admin, Guard, Reply};
use http::{HeaderMap, HeaderValue, Method};
use prometheus::Registry;
use serde_json::Value;

use super::Stage;

/// The admin port of a stage.
pub struct Port(Admin);

impl Port {
    pub fn of(stage: &Stage) -> Self {
        Self(Admin::new(stage.core.clone(), Registry::new(), Guard::Local))
    }

    pub async fn ask(&self, method: Method, path: &str) -> (u16, Value) {
        let (path, query) = path
            .split_once('?')
            .map_or((path, None), |(path, query)| (path, Some(query)));
        let mut headers = HeaderMap::new();
        headers.insert("x-operator", HeaderValue::from_static("alice"));
        let reply = self.0.private(&method, path, query, &headers, Some("127.0.0.1")).await;
        let (status, body) = match reply {
            Reply::Whole(answer) => (answer.status, answer.body),
            Reply::Mappings(mappings) => (200, mappings.collect::<Vec<_>>().concat().into()),
        };
        (status, serde_json::from_slice(&body).expect("JSON"))
    }

    pub async fn get(&self, path: &str) -> Value {
        let (status, value) = self.ask(Method::GET, path).await;
        assert_eq!(status, 200, "{path}: {value}");
        value
    }

    pub async fn post(&self, path: &str) -> (u16, Value) {
        self.ask(Method::POST, path).await
    }
}
