//! Configuration: one YAML file, read strictly, judged whole.
//!
//! A proxy that guards data must not run with half of what its operator meant. So reading is strict (an unknown key, a
//! bare number for a duration, a missing variable are errors at their line and column) and judging is separate:
//! [`Config::validate`] looks at what was read and names every contradiction at once, which is what `diptych check`
//! prints. Reading is pure: the text and the variables come in, a [`Config`] or a [`ConfigError`] comes out, and nothing
//! is resolved or connected to.
//!
//! - `sections`: what the keys mean; `conf/diptych.yaml` says it in place, the JSON schema (`schema`) to editors.
//! - `top`, `expanding`, `variables`: Pingora's keys beside ours, `${NAME:-default}`, and places kept.
//! - `units`, `node_url`: `250ms`, `40MiB`, `http://host:port`.
//! - `validate`: what is readable and still wrong.
//!
//! Invariants, each with a test: the defaults are the shipped file; a variable's value never becomes structure; secrets
//! are in no `Debug` output and no error.

mod error;
mod expanding;
mod node_url;
mod schema;
mod sections;
mod suggest;
mod top;
pub mod units;
mod validate;
mod variables;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::Path;

use pingora::server::configuration::ServerConf;
use schemars::JsonSchema;

pub use self::error::ConfigError;
pub use self::node_url::NodeUrl;
pub use self::schema::json_schema;
pub use self::sections::{
    Admin, Consistency, DatabaseName, Drain, Heal, Health, Listen, Log, LogFormat, LogPayload, Namespace, NodeConfig,
    Reads, Repair, Verify, Wal, WhenUnavailable, Writes,
};
pub use self::suggest::nearest;
pub use self::units::parse_duration;
pub use self::validate::{Problem, Severity};
pub use self::variables::Lookup;

/// Everything a Diptych server is told. Nothing in it changes at run time.
#[derive(Debug, PartialEq, Eq, JsonSchema)]
#[schemars(default, deny_unknown_fields, rename = "Diptych")]
pub struct Config {
    /// Addresses that clients connect to.
    pub listen: Vec<Listen>,
    /// The port for operators.
    pub admin: Admin,
    /// The Chroma servers, in order of preference; the first is the primary.
    pub nodes: Vec<NodeConfig>,
    /// The write-ahead log.
    pub wal: Wal,
    /// Active checks of the nodes.
    pub health: Health,
    /// Reads.
    pub reads: Reads,
    /// Writes.
    pub writes: Writes,
    /// Applying to a node what it missed.
    pub drain: Drain,
    /// Who makes a collection anew that a node cannot serve any more.
    pub heal: Heal,
    /// Making a node equal again where it may differ.
    pub repair: Repair,
    /// Comparing the nodes while all is well.
    pub verify: Verify,
    /// Names to look for on the nodes.
    pub namespace: Namespace,
    /// Whether the proxy port answers the read-only status routes itself (`/health`, `/status`, `/wal/status` and those
    /// for existing tools).
    pub listen_status: bool,
    /// The process's own log.
    pub log: Log,
    /// Pingora's keys, which stand at the top level of the file. It is no `Clone`, and Pingora's server takes it by value:
    /// `std::mem::take` it.
    #[schemars(skip)]
    pub server: ServerConf,
}

impl Default for Config {
    fn default() -> Self {
        let node = |name: &str, port: u16| NodeConfig {
            name: name.to_owned(),
            url: NodeUrl::loopback(port),
            read_weight: 1,
        };
        Self {
            listen: vec![Listen {
                address: SocketAddr::from(([0, 0, 0, 0], 8000)),
            }],
            admin: Admin::default(),
            nodes: vec![node("primary", 8001), node("replica", 8002)],
            wal: Wal::default(),
            health: Health::default(),
            reads: Reads::default(),
            writes: Writes::default(),
            drain: Drain::default(),
            heal: Heal::Auto,
            repair: Repair::default(),
            verify: Verify::default(),
            namespace: Namespace::default(),
            listen_status: true,
            log: Log::default(),
            server: top::server_defaults(),
        }
    }
}

impl Config {
    /// Reads a file, with variables from the process environment. What it says is not judged yet: call
    /// [`validate`](Self::validate).
    ///
    /// # Errors
    /// The file cannot be read, or [`parse`](Self::parse) refuses it.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        std::fs::read_to_string(path)
            .map_err(|e| ConfigError::new(format!("cannot be read: {e}")))
            .and_then(|text| Self::parse(&text, &|name| std::env::var(name).ok()))
            .map_err(|e| e.in_file(path))
    }

    /// Reads a text, with variables from `lookup`.
    ///
    /// # Errors
    /// The text is not YAML; a key is unknown or given twice; a value is not of its kind; a variable without a default is
    /// not set. The first of these, with its place.
    pub fn parse(text: &str, lookup: Lookup<'_>) -> Result<Self, ConfigError> {
        let reader = serde_yaml::Deserializer::from_str(text);
        let mut config = top::read(expanding::Expanding::new(reader, lookup))?;
        config.server = config.server.validate().map_err(|e| match &e.context {
            Some(context) => ConfigError::new(context.as_str()),
            None => ConfigError::new(e.to_string()),
        })?;
        Ok(config)
    }

    /// Whether the verbs under `/admin/` may be served: there is an admin port, and a token or a loopback address
    /// protects it.
    pub fn verbs_allowed(&self) -> bool {
        self.admin
            .address
            .is_some_and(|address| self.admin.token.is_some() || address.ip().is_loopback())
    }
}
