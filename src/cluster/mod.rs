//! The nodes: who they are, who is up, and who gets a request.

mod canary;
mod client;
mod flag;
mod gate;
mod health;
mod identity;
mod node;

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::events::Events;

pub use client::{Held, HttpNodeClient, NodeClient, NodeRequest, NodeResponse, SendError, StreamedResponse};
pub use health::{HealthService, Thresholds, health_service};
pub use identity::{Identity, read_identity};
pub use node::{Node, NodeIndex, Ticket};

/// Decides whether a node is the one it should be, and sees to it that what it may lack is known before it is up.
#[async_trait]
pub trait Admission: Send + Sync + 'static {
    /// Asked while a connection to the node is held. An error is why the node stays out; it is asked again.
    async fn admit(&self, node: NodeIndex) -> Result<(), String>;
}

/// All nodes, in the configured order of preference.
pub struct Cluster {
    nodes: Vec<Arc<Node>>,
    /// Bumped whenever something changed that a waiting request may care about: a node went up or down, a collection
    /// came back in sync.
    changes: watch::Sender<u64>,
    concluding: parking_lot::Mutex<()>,
    admission: parking_lot::Mutex<Option<Arc<dyn Admission>>>,
    announced_settled: std::sync::atomic::AtomicBool,
    events: Arc<Events>,
}

impl Cluster {
    pub fn new(nodes: Vec<Node>) -> Self {
        Self {
            nodes: nodes.into_iter().map(Arc::new).collect(),
            changes: watch::Sender::new(0),
            concluding: parking_lot::Mutex::new(()),
            admission: parking_lot::Mutex::new(None),
            announced_settled: std::sync::atomic::AtomicBool::new(false),
            events: Arc::default(),
        }
    }

    /// From now on a node has to be admitted before it is up.
    pub fn set_admission(&self, admission: Arc<dyn Admission>) {
        *self.admission.lock() = Some(admission);
    }

    pub(super) fn admission(&self) -> Option<Arc<dyn Admission>> {
        self.admission.lock().clone()
    }

    /// What happened, for people.
    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }

    pub fn nodes(&self) -> &[Arc<Node>] {
        &self.nodes
    }

    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    pub fn node(&self, index: NodeIndex) -> &Arc<Node> {
        &self.nodes[index]
    }

    /// Position of the node with this name.
    pub fn index_of(&self, name: &str) -> Option<NodeIndex> {
        self.nodes.iter().position(|node| node.name == name)
    }

    /// Tells everyone who waits for a better state to look again.
    pub fn announce_change(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    pub fn watch_changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Positions of all nodes that are up.
    pub fn up(&self) -> impl Iterator<Item = NodeIndex> + '_ {
        self.nodes.iter().filter(|node| node.is_up()).map(|node| node.index)
    }

    /// Of `candidates`, the one that serves the next read: the lower load per weight of two drawn at random, as in
    /// Mitzenmacher, "The Power of Two Choices".
    pub fn choose(&self, candidates: &[NodeIndex], random: u64) -> Option<NodeIndex> {
        match candidates {
            [] => None,
            [only] => Some(*only),
            many => {
                let count = many.len() as u64;
                let first = many[(random % count) as usize];
                let step = 1 + (random >> 32) % (count - 1);
                let second = many[((random % count + step) % count) as usize];
                let load = |index: NodeIndex| {
                    let node = &self.nodes[index];
                    (node.reads_in_flight() as u64 + 1) * u64::from(u16::MAX) / u64::from(node.read_weight.max(1))
                };
                Some(if load(second) < load(first) { second } else { first })
            }
        }
    }
}
