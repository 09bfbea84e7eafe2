//! What a scenario stands on: the system under test, the names it may use, and what it leaves behind.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use serde_json::{Map, Value};

use super::names::RunId;
use super::notes::Notes;
use super::outage::{Out, Way};
use super::poll::{timed, until};
use super::report::{Part, Verdict};
use super::server::Server;
use super::web::Admin;

/// A deployed Diptych, with its nodes in their order.
pub struct System {
    pub proxy: Server,
    pub admin: Admin,
    pub nodes: Vec<Server>,
    /// What counts the direct reads.
    pub reads: Rc<Cell<u64>>,
    pub notes: Rc<Notes>,
    /// How long one wait may last.
    pub patience: Duration,
    pub max_p99: Duration,
    /// How a node is taken out; `None`: not allowed.
    pub way: Option<Way>,
    /// The node that is out now.
    pub out: Out,
    /// What `wal.url` begins with, where the configuration is known.
    pub scheme: Option<String>,
    /// The proxy port answers `/status` and the like too; not known without the configuration.
    pub listen_status: Option<bool>,
}

/// Why a scenario did not pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    Failed(String),
    /// It could not be shown, and why.
    Skipped(String),
}

impl From<String> for Stop {
    fn from(reason: String) -> Self {
        Self::Failed(reason)
    }
}

impl From<&str> for Stop {
    fn from(reason: &str) -> Self {
        Self::Failed(reason.to_owned())
    }
}

pub type Outcome = Result<(), Stop>;

/// Why scenarios that need a node out are skipped without permission.
pub const NO_FAILOVER: &str = "it takes nodes out: allow that with --failover, or with --stop-node and --start-node";

/// One scenario's run.
pub struct Stage<'a> {
    pub system: &'a System,
    pub run: &'a RunId,
    /// The scenario's short name.
    pub key: &'static str,
    pub parts: RefCell<Vec<Part>>,
    /// Numbers worth reporting.
    pub facts: RefCell<Map<String, Value>>,
}

impl<'a> Stage<'a> {
    pub fn new(system: &'a System, run: &'a RunId, key: &'static str) -> Self {
        Self {
            system,
            run,
            key,
            parts: RefCell::default(),
            facts: RefCell::default(),
        }
    }

    /// A name that is this scenario's.
    pub fn name(&self, what: &str) -> String {
        format!("{}{what}", self.run.prefix(self.key))
    }

    pub fn step(&self, text: &str) {
        self.system.notes.step(&format!("{}: {text}", self.key));
    }

    pub fn fact(&self, name: &str, value: impl Into<Value>) {
        self.facts.borrow_mut().insert(name.to_owned(), value.into());
    }

    /// Polls until it holds.
    pub async fn until<T>(&self, what: &str, check: impl AsyncFn() -> Result<T, String>) -> Result<T, String> {
        self.step(what);
        until(self.system.patience, what, check).await
    }

    /// Runs a part, which has a result of its own.
    pub async fn part(&self, name: &'static str, work: impl Future<Output = Outcome>) {
        self.step(name);
        let (outcome, time) = timed(work).await;
        self.parts.borrow_mut().push(Part {
            name,
            verdict: Verdict::of(outcome),
            time,
        });
    }

    /// Nodes that are not taken out.
    pub fn present(&self) -> Vec<&'a Server> {
        let out = self.system.out.node();
        let nodes = self.system.nodes.iter().enumerate();
        nodes.filter(|(n, _)| Some(*n) != out).map(|(_, node)| node).collect()
    }

    /// Waits until every node is healthy, in step and without pending writes.
    pub async fn in_step(&self) -> Result<(), String> {
        self.until("all nodes are healthy and in sync", async || {
            let status = self.system.admin.status().await?;
            let nodes = status["instances"].as_array().ok_or("no instances in /status")?;
            let behind = nodes.iter().find(|node| {
                node["healthy"] != true || node["in_sync"] != true || node["pending_writes"] != 0 || node["up"] != true
            });
            match behind {
                None => Ok(()),
                Some(node) => Err(format!(
                    "{}: healthy {}, in sync {}, {} pending, {} parked, last error {}",
                    node["name"].as_str().unwrap_or("?"),
                    node["healthy"],
                    node["in_sync"],
                    node["pending_writes"],
                    node["parked"],
                    node["last_error"],
                )),
            }
        })
        .await
    }
}

/// What `/status` says of a node.
pub fn instance<'v>(status: &'v Value, name: &str) -> Result<&'v Value, String> {
    let nodes = status["instances"].as_array().ok_or("no instances in /status")?;
    let found = nodes.iter().find(|node| node["name"] == name);
    found.ok_or_else(|| format!("/status does not know the node {name}"))
}

/// Fails with the text unless it is true.
pub fn ensure(is: bool, text: impl FnOnce() -> String) -> Result<(), String> {
    if is { Ok(()) } else { Err(text()) }
}
