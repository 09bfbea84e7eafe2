//! The sections of the file: what each key means, its unit and its default.
//!
//! The doc comments here are what the JSON schema shows in an editor; `conf/diptych.yaml` says the same in place. Every
//! section can be left out, in whole or key by key. No key can change while the process runs: restart, or hand over by a
//! graceful upgrade.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::node_url::NodeUrl;
use super::units;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// One address that clients connect to.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    /// Address and port, as in `0.0.0.0:8000`.
    #[serde(deserialize_with = "address")]
    #[schemars(with = "String")]
    pub address: SocketAddr,
}

/// The port for operators: metrics, status, verbs.
#[derive(Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Admin {
    /// Address and port; null or empty turns the admin port off.
    #[serde(deserialize_with = "optional_address")]
    #[schemars(with = "Option<String>")]
    pub address: Option<SocketAddr>,
    /// Bearer token for the verbs under `/admin/`; empty means none. Without it, verbs work only where the address is
    /// loopback.
    #[serde(deserialize_with = "optional_text", skip_serializing)]
    #[schemars(with = "Option<String>")]
    pub token: Option<String>,
}

/// One Chroma server. The order of nodes is the order of preference; the first is the primary.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Name in status, metrics and the log: `a-z`, `0-9`, `_` and `-`, at most 63.
    #[schemars(regex(pattern = r"^[a-z0-9_-]{1,63}$|\$\{"))]
    pub name: String,
    /// `http://host:port`.
    #[schemars(with = "String", regex(pattern = r"^http://[^/]+:[0-9]+/?$|\$\{"))]
    pub url: NodeUrl,
    /// Share of the reads, relative to the other nodes.
    #[serde(default = "one")]
    pub read_weight: u32,
}

/// Which entries the log keeps with their bodies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogPayload {
    /// Those that a node missed, until it has them.
    Missed,
    /// Every entry, until every node is known to keep it: for audit, at the price of the bodies in the log.
    Always,
}

/// What becomes of record writes while the log does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WhenUnavailable {
    /// They go on while all nodes can take them; what was written then is compared once the log is back.
    Mirror,
    /// They are refused.
    Refuse,
}

/// Who makes a collection anew that a node cannot serve any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Heal {
    /// Diptych, by itself.
    Auto,
    /// An operator, by verb; Diptych only takes out what is broken.
    Manual,
}

/// The write-ahead log.
#[derive(Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Wal {
    /// `postgres://user:password@host/database`, or `sqlite://path` for the embedded log.
    #[schemars(regex(pattern = r"^(postgres|postgresql|sqlite):|\$\{"))]
    pub url: String,
    /// Most connections held to the database.
    pub max_connections: u32,
    /// Which entries are kept with their bodies.
    pub payload: LogPayload,
    /// What becomes of record writes while the log does not answer.
    pub when_unavailable: WhenUnavailable,
    /// Most bytes of entries kept for one node. Beyond it the collections that weigh most are left to a copy from
    /// another node; where none can give one, new writes to them are refused. 0: no limit.
    #[serde(with = "units::size")]
    #[schemars(with = "String", regex(pattern = r"^[0-9]+ ?(B|[KMGT]iB|[kKMGT]B)?$|\$\{"), extend("type" = ["string", "integer"]))]
    pub max_bytes: u64,
    /// How long entries are kept for one node; beyond it as with `max_bytes`. 0s: no limit.
    #[serde(with = "units::duration")]
    #[schemars(with = "String", regex(pattern = r"^[0-9]+ ?(ms|s|m|h|d)$|\$\{"))]
    pub max_age: Duration,
}

/// Active checks of the nodes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Health {
    /// Time between two checks of a node.
    #[serde(with = "units::duration")]
    #[schemars(with = "String", regex(pattern = r"^[0-9]+ ?(ms|s|m|h|d)$|\$\{"))]
    pub interval: Duration,
    /// How long a check waits for its answer.
    #[serde(with = "units::duration")]
    #[schemars(with = "String", regex(pattern = r"^[0-9]+ ?(ms|s|m|h|d)$|\$\{"))]
    pub timeout: Duration,
    /// Failed checks in a row that take a node out.
    pub unhealthy_after: u32,
    /// Good checks in a row that bring a node back.
    pub healthy_after: u32,
}

/// Which nodes a read may be served by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// Nodes that have every acknowledged write of the collection.
    Session,
    /// The lead alone.
    Lead,
    /// Any healthy node, also one that is behind.
    Any,
}

/// Reads.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Reads {
    /// Which nodes may serve a read.
    pub consistency: Consistency,
    /// Time to the first byte of a node's answer.
    #[serde(with = "units::duration")]
    #[schemars(with = "String", regex(pattern = r"^[0-9]+ ?(ms|s|m|h|d)$|\$\{"))]
    pub timeout: Duration,
    /// How long a read or write waits for the drain of the only node that, with its log, has everything.
    #[serde(with = "units::duration")]
    #[schemars(with = "String", regex(pattern = r"^[0-9]+ ?(ms|s|m|h|d)$|\$\{"))]
    pub behind_wait: Duration,
}

/// Writes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Writes {
    /// How long a node's answer is waited for. Long on purpose: large upserts take tens of seconds on healthy nodes, and
    /// what cuts a hung node short is health.
    #[serde(with = "units::duration")]
    #[schemars(with = "String", regex(pattern = r"^[0-9]+ ?(ms|s|m|h|d)$|\$\{"))]
    pub timeout: Duration,
    /// How long the other nodes are waited for after the first has answered.
    #[serde(with = "units::duration")]
    #[schemars(with = "String", regex(pattern = r"^[0-9]+ ?(ms|s|m|h|d)$|\$\{"))]
    pub mirror_grace: Duration,
    /// Largest request body; beyond it, 413.
    #[serde(with = "units::size")]
    #[schemars(with = "String", regex(pattern = r"^[0-9]+ ?(B|[KMGT]iB|[kKMGT]B)?$|\$\{"), extend("type" = ["string", "integer"]))]
    pub max_body: u64,
    /// Most records in one request to a node that stands for the writes of several clients; 1: none are combined.
    pub combine_records: usize,
    /// Most bytes in one such request; a larger write goes alone.
    #[serde(with = "units::size")]
    #[schemars(with = "String", regex(pattern = r"^[0-9]+ ?(B|[KMGT]iB|[kKMGT]B)?$|\$\{"), extend("type" = ["string", "integer"]))]
    pub combine_bytes: u64,
    /// Most writes queued for one collection; beyond it, 429. There is an eighth more, here and of the bytes, for a client
    /// (an address) of which nothing waits for this collection.
    pub queue: usize,
    /// Most bytes of writes queued for one collection; beyond it, 429.
    #[serde(with = "units::size")]
    #[schemars(with = "String", regex(pattern = r"^[0-9]+ ?(B|[KMGT]iB|[kKMGT]B)?$|\$\{"), extend("type" = ["string", "integer"]))]
    pub queue_bytes: u64,
    /// How long a write waits in the queue before it is begun; then 503, and nothing was done. 0s: no limit.
    #[serde(with = "units::duration")]
    #[schemars(with = "String", regex(pattern = r"^[0-9]+ ?(ms|s|m|h|d)$|\$\{"))]
    pub queue_timeout: Duration,
    /// Most bytes of request bodies held at once, and of those queued; beyond it, 503. A collection for which some are
    /// queued gets no more of them than it leaves free.
    #[serde(with = "units::size")]
    #[schemars(with = "String", regex(pattern = r"^[0-9]+ ?(B|[KMGT]iB|[kKMGT]B)?$|\$\{"), extend("type" = ["string", "integer"]))]
    pub bytes_in_flight: u64,
}

/// Applying to a node what it missed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Drain {
    /// Most records in one batch.
    pub batch_records: usize,
    /// Most bytes in one batch; a larger entry goes alone.
    #[serde(with = "units::size")]
    #[schemars(with = "String", regex(pattern = r"^[0-9]+ ?(B|[KMGT]iB|[kKMGT]B)?$|\$\{"), extend("type" = ["string", "integer"]))]
    pub batch_bytes: u64,
    /// Collections drained side by side, per node.
    pub concurrency: usize,
    /// While clients write, the drain's batches are so small, and with pauses between them, that the slowest hundredth of
    /// those writes takes about so many times what it took before; a batch has 128 records at least. A write that another
    /// node has applied is not held up by a node that is drained: beyond that time it goes into the log for that node. 0:
    /// clients are not looked at.
    pub foreground_factor: u32,
}

/// Making a node equal again where it may differ.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Repair {
    /// Collections repaired side by side.
    pub concurrency: usize,
    /// Most records read or written in one request.
    pub batch_records: usize,
    /// Most records compared per second, all repairs together; 0: no limit.
    pub rate: u32,
}

/// Comparing the nodes while all is well.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Verify {
    /// Time between two comparisons of a collection; 0s: never by itself.
    #[serde(with = "units::duration")]
    #[schemars(with = "String", regex(pattern = r"^[0-9]+ ?(ms|s|m|h|d)$|\$\{"))]
    pub interval: Duration,
    /// Share of a collection's records that one comparison looks at, in percent; which ones is drawn anew each time.
    pub sample: u32,
}

/// Names to look for on the nodes: Chroma cannot list tenants, and Diptych knows only those it has seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Namespace {
    /// Tenants whose databases are looked up, besides `default_tenant`.
    pub tenants: Vec<String>,
    /// Databases whose collections are looked up, as `tenant/database`. Those of the tenants above are found without.
    pub databases: Vec<DatabaseName>,
}

/// `tenant/database`. A tenant's name may hold slashes, a database's cannot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatabaseName {
    pub tenant: String,
    pub database: String,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// The process's own log.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter such as `info,diptych::drain=debug`.
    pub level: String,
    /// Text or JSON.
    pub format: LogFormat,
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            address: Some(([127, 0, 0, 1], 8900).into()),
            token: None,
        }
    }
}

impl Default for Wal {
    fn default() -> Self {
        Self {
            url: "sqlite://diptych.db".to_owned(),
            max_connections: 8,
            payload: LogPayload::Missed,
            when_unavailable: WhenUnavailable::Mirror,
            max_bytes: 10 * GIB,
            max_age: Duration::from_secs(72 * 3600),
        }
    }
}

impl Default for Health {
    fn default() -> Self {
        let second = Duration::from_secs(1);
        Self {
            interval: second,
            timeout: second,
            unhealthy_after: 2,
            healthy_after: 2,
        }
    }
}

impl Default for Reads {
    fn default() -> Self {
        Self {
            consistency: Consistency::Session,
            timeout: Duration::from_secs(30),
            behind_wait: Duration::from_secs(10),
        }
    }
}

impl Default for Writes {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(600),
            mirror_grace: Duration::from_secs(2),
            max_body: 40 * MIB,
            combine_records: 256,
            combine_bytes: 8 * MIB,
            queue: 1024,
            queue_bytes: 64 * MIB,
            queue_timeout: Duration::from_secs(120),
            bytes_in_flight: 512 * MIB,
        }
    }
}

impl Default for Drain {
    fn default() -> Self {
        Self {
            batch_records: 256,
            batch_bytes: 8 * MIB,
            concurrency: 4,
            foreground_factor: 2,
        }
    }
}

impl Default for Repair {
    fn default() -> Self {
        Self {
            concurrency: 2,
            batch_records: 1000,
            rate: 0,
        }
    }
}

impl Default for Verify {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(24 * 3600),
            sample: 100,
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
            format: LogFormat::Text,
        }
    }
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let token = self.token.as_ref().map(|_| "(hidden)");
        f.debug_struct("Admin")
            .field("address", &self.address)
            .field("token", &token)
            .finish()
    }
}

impl Wal {
    /// The URL without its password, for people to read.
    pub fn shown_url(&self) -> String {
        match url::Url::parse(&self.url) {
            Ok(url) if url.scheme() == "sqlite" => self.url.clone(),
            Ok(url) if url.cannot_be_a_base() => format!("{}:(hidden)", url.scheme()),
            Ok(mut url) => {
                if url.password().is_some() && url.set_password(Some("hidden")).is_err() {
                    return format!("{}://(hidden)", url.scheme());
                }
                // libpq's spelling, `?password=`, is a password too.
                url.set_query(None);
                url.into()
            }
            Err(_) => "(not a URL)".to_owned(),
        }
    }
}

impl fmt::Debug for Wal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut wal = f.debug_struct("Wal");
        wal.field("url", &self.shown_url())
            .field("max_connections", &self.max_connections)
            .field("payload", &self.payload)
            .field("when_unavailable", &self.when_unavailable)
            .field("max_bytes", &self.max_bytes)
            .field("max_age", &self.max_age)
            .finish()
    }
}

impl DatabaseName {
    /// Reads `tenant/database`.
    ///
    /// # Errors
    /// A sentence with an example of what would be right.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text.rsplit_once('/') {
            Some((tenant, database)) if !tenant.is_empty() && !database.is_empty() => Ok(Self {
                tenant: tenant.to_owned(),
                database: database.to_owned(),
            }),
            _ => Err(format!("`{text}` is not a tenant and a database, as in `acme/docs`")),
        }
    }
}

impl<'de> Deserialize<'de> for DatabaseName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        units::scalar(deserializer, Self::parse)
    }
}

impl Serialize for DatabaseName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}/{}", self.tenant, self.database))
    }
}

impl JsonSchema for DatabaseName {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "DatabaseName".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "pattern": r"^.+/[^/]+$|\$\{"})
    }
}

fn one() -> u32 {
    1
}

fn parse_address(text: &str) -> Result<SocketAddr, String> {
    text.trim()
        .parse()
        .map_err(|_| format!("`{text}` is not an address: write IP:port, as in `0.0.0.0:8000`"))
}

fn address<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    units::scalar(deserializer, parse_address)
}

fn optional_address<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    units::optional(deserializer, parse_address)
}

fn optional_text<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    units::optional(deserializer, |text| Ok(text.to_owned()))
}
