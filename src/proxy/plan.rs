//! Which node serves a read, and which one next if that fails.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use pingora_proxy::Session;
use uuid::Uuid;

use crate::catalog::Collection;
use crate::cluster::{NodeIndex, Ticket};
use crate::config::Consistency;
use crate::metrics::InFlight;
use crate::mirror::Core;

/// The label of the route whose answers have an order.
const PAGED: &str = "get";

/// Where a streamed request may go.
#[derive(Debug, Clone)]
pub enum Plan {
    /// Any node that is up: no state is behind it.
    AnyNode,
    /// The first node that is up.
    Lead,
    /// A node that is in step with the collection; `span` is the collection's segment in the raw path.
    Records {
        collection: Arc<Collection>,
        span: Range<usize>,
    },
}

/// What Pingora carries along with a request.
pub struct Ctx {
    pub started: Duration,
    pub label: &'static str,
    pub plan: Plan,
    pub node: Option<NodeIndex>,
    pub socket: Option<Ticket>,
    /// Exchange this UUID for that one in the answer's body.
    pub rewrite: Option<(Uuid, Uuid)>,
    pub held: BytesMut,
    pub failed_with: u16,
    /// The status for the client if no node is left after a failure.
    pub last_failure: Option<u16>,
    /// The node of the last attempt, and those of the attempts before.
    last: Option<NodeIndex>,
    tried: Vec<NodeIndex>,
    same_node_allowed: bool,
    attempt_started: Duration,
    _in_flight: InFlight,
}

impl Ctx {
    pub fn new(started: Duration, in_flight: InFlight) -> Self {
        Self {
            started,
            label: "other",
            plan: Plan::AnyNode,
            node: None,
            socket: None,
            rewrite: None,
            held: BytesMut::new(),
            failed_with: 0,
            last_failure: None,
            last: None,
            tried: Vec::new(),
            same_node_allowed: true,
            attempt_started: started,
            _in_flight: in_flight,
        }
    }

    /// Nodes that may serve this now and were not tried yet.
    fn candidates(&self, core: &Core, consistency: Consistency) -> Vec<NodeIndex> {
        let mut nodes: Vec<NodeIndex> = match &self.plan {
            Plan::AnyNode => core.cluster.up().collect(),
            Plan::Lead => core.cluster.up().take(1).collect(),
            Plan::Records { collection, .. } => readable(core, collection, consistency),
        };
        nodes.retain(|node| self.last != Some(*node) && !self.tried.contains(node));
        if consistency == Consistency::Lead {
            nodes.truncate(1);
        }
        nodes
    }

    /// Whether another node could be asked if this one's answer is not good enough.
    pub fn has_alternative(&self, core: &Core, consistency: Consistency) -> bool {
        !self.candidates(core, consistency).is_empty()
    }

    /// The node to try next. When none was tried and the only one that has everything is behind, waits for its drain.
    pub async fn choose(&self, core: &Arc<Core>, consistency: Consistency) -> Option<NodeIndex> {
        let mut nodes = self.candidates(core, consistency);
        if nodes.is_empty()
            && let Plan::Records { collection, .. } = &self.plan
        {
            // In a box: it is large, and every read would carry the room for it.
            Box::pin(core.usable_or_drained(collection)).await;
            nodes = self.candidates(core, consistency);
        }
        if let Plan::Records { collection, .. } = &self.plan
            && self.label == PAGED
            && let Some(node) = core.paging_node(collection, &nodes)
        {
            return Some(node);
        }
        core.cluster.choose(&nodes, core.env.random())
    }

    pub fn begin_attempt(&mut self, core: &Core, node: NodeIndex) {
        core.cluster.node(node).read_started();
        self.attempt_started = core.env.now();
        self.node = Some(node);
        // A second attempt is rare: the first one leaves the list empty.
        self.tried.extend(self.last.replace(node));
    }

    pub fn end_attempt(&mut self, core: &Core) {
        if self.node.is_some() {
            self.end_attempt_at(core, core.env.now());
        }
    }

    /// [`Ctx::end_attempt`], for who knows what time it is.
    pub fn end_attempt_at(&mut self, core: &Core, now: Duration) {
        if let Some(node) = self.node.take() {
            let node = core.cluster.node(node);
            node.read_ended();
            let took = now.saturating_sub(self.attempt_started);
            node.metrics.upstream(self.label, took);
            if let Some(socket) = self.socket.take() {
                node.forget_socket(&socket);
            }
        }
        self.rewrite = None;
        self.held.clear();
    }

    /// A pooled connection had died: its node deserves another try, once.
    pub fn allow_same_node_once(&mut self) {
        if std::mem::replace(&mut self.same_node_allowed, false) {
            self.last = None;
        }
    }

    /// Whether sending the request again changes nothing.
    pub fn is_repeatable(&self, session: &Session) -> bool {
        matches!(self.plan, Plan::Records { .. }) || !super::is_mutating(&session.req_header().method)
    }
}

/// Nodes that may serve reads of a collection.
pub fn readable(core: &Core, collection: &Collection, consistency: Consistency) -> Vec<NodeIndex> {
    match consistency {
        Consistency::Any => core
            .cluster
            .up()
            .filter(|&node| collection.node_id(node).is_some())
            .collect(),
        Consistency::Session | Consistency::Lead => core.usable(collection),
    }
}
