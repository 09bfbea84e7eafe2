//! Asking a running Diptych over its admin address, like everybody else.

use std::time::{Duration, Instant};

use http::Method;
use serde_json::Value;

use super::status::{DEFAULT, reachable};
use super::{Where, ask, run};
use crate::config::NodeUrl;

/// A verb waits for its turn in the lane: behind a large write that can take a while.
const LIMIT: Duration = Duration::from_secs(120);
pub const POLL: Duration = Duration::from_millis(500);
pub const TOKEN: &str = "DIPTYCH_ADMIN_TOKEN";

/// What was not done, and why.
#[derive(Debug)]
pub struct Refused {
    /// `None`: there was no answer.
    pub status: Option<u16>,
    pub message: String,
}

impl From<Refused> for String {
    fn from(refused: Refused) -> Self {
        refused.message
    }
}

/// How long somebody waits.
pub struct Patience(Instant);

impl Patience {
    pub fn of(time: Duration) -> Self {
        Self(now() + time)
    }

    pub fn left(&self) -> Duration {
        self.0.saturating_duration_since(now())
    }

    pub fn is_over(&self) -> bool {
        self.left().is_zero()
    }
}

#[allow(clippy::disallowed_methods)] // a command waits in real time
fn now() -> Instant {
    Instant::now()
}

/// Nobody answers there: what to do about it.
pub fn unreachable(authority: &str, reason: &str) -> String {
    format!(
        "No Diptych can be reached at {authority}: {reason}\n\
         Is it running? Another one is named by --url (its admin.address) or by --config (its configuration file)."
    )
}

/// The admin token is not the right one, or missing: what to do about it.
pub fn not_allowed(authority: &str, has_token: bool) -> String {
    if has_token {
        format!("{authority} does not take this admin token: {TOKEN}, or admin.token of the --config, is another.")
    } else {
        format!("{authority} wants the admin token: set {TOKEN}, or name the configuration with --config.")
    }
}

/// Who asks, for the event log.
fn operator() -> String {
    let user = ["USER", "LOGNAME"].iter().find_map(|name| std::env::var(name).ok());
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match (user.unwrap_or_default(), host.trim()) {
        (user, "") => user,
        (user, host) if user.is_empty() => host.to_owned(),
        (user, host) => format!("{user}@{host}"),
    }
}

/// One running Diptych.
pub struct Diptych {
    authority: String,
    token: Option<String>,
    runtime: tokio::runtime::Runtime,
    json: bool,
}

impl Diptych {
    pub fn at(place: &Where) -> Result<Self, String> {
        let mut token = std::env::var(TOKEN).ok().filter(|token| !token.is_empty());
        let authority = match (&place.url, &place.config) {
            (Some(url), _) => NodeUrl::parse(url)?.authority(),
            (None, Some(path)) => {
                let config = run::load(Some(path)).map_err(|error| error.to_string())?;
                token = config.admin.token.or(token);
                let address = config
                    .admin
                    .address
                    .ok_or("admin.address is null in this configuration: no verbs.")?;
                reachable(address).to_string()
            }
            (None, None) => NodeUrl::parse(DEFAULT)?.authority(),
        };
        Ok(Self {
            authority,
            token,
            runtime: ask::runtime()?,
            json: place.json,
        })
    }

    fn ask(&self, method: Method, path: &str) -> Result<Value, Refused> {
        let authority = &self.authority;
        let asking = ask::Asking {
            token: self.token.as_deref(),
            operator: operator(),
            limit: LIMIT,
        };
        let call = ask::call(authority, method, path, asking);
        let (status, body) = self.runtime.block_on(call).map_err(|reason| Refused {
            status: None,
            message: unreachable(authority, &reason),
        })?;
        let value: Value = serde_json::from_slice(&body).unwrap_or_default();
        let message = match status {
            200..300 => return Ok(value),
            401 => not_allowed(authority, self.token.is_some()),
            _ => match value["message"].as_str() {
                Some(message) => message.to_owned(),
                None => format!("{authority} answered {status}: is it the admin address of a Diptych?"),
            },
        };
        Err(Refused {
            status: Some(status),
            message,
        })
    }

    pub fn try_post(&self, path: &str) -> Result<Value, Refused> {
        self.ask(Method::POST, path)
    }

    pub fn get(&self, path: &str) -> Result<Value, String> {
        self.ask(Method::GET, path).map_err(Into::into)
    }

    pub fn post(&self, path: &str) -> Result<Value, String> {
        self.try_post(path).map_err(Into::into)
    }

    pub fn print(&self, value: &Value, page: impl FnOnce(&Value) -> String) {
        if self.json {
            println!("{value}");
        } else {
            print!("{}", page(value));
        }
    }
}

/// As a segment of a path.
pub fn segment(text: &str) -> String {
    url::form_urlencoded::byte_serialize(text.as_bytes()).collect()
}
