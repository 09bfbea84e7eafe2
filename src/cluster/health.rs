//! Who is up: Pingora's load balancer probes, this file draws the conclusions.
//!
//! | what happens | effect |
//! |---|---|
//! | `unhealthy_after` probes in a row fail | down |
//! | nobody can connect, or the connection that is held ends | down at once, and not verified |
//! | `healthy_after` probes in a row pass, then a canary write returns, and the node is verified | up |
//! | the last node that is up fails its probes | kept: it may still serve, nothing else can |
//! | an operator takes it out | not up, whatever the probes say; they only read, and what is under way there goes on |
//! | he takes it back | as after a connection that ended: canary and admission come first |
//!
//! *Verified* (design.md 9) is a node that was asked who it is, over a connection that is held from before it was asked:
//! as long as that lives, nobody else can have taken its place. A node whose process may be another one is never kept,
//! not even as the last: it could be empty.
//!
//! A probe is a heartbeat and then a read that goes through SQLite, because heartbeats pass on a node that can serve
//! nothing (chroma-facts.md 8.1). What it reads is the marker: should new connections lead to another server while the
//! one that is held lives on (a name, a balancer or a route was changed), it is noticed here.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use pingora::services::background::{GenBackgroundService, background_service};
use pingora::{Error, ErrorType};
use pingora_load_balancing::health_check::HealthCheck;
use pingora_load_balancing::selection::RoundRobin;
use pingora_load_balancing::{Backend, Backends, LoadBalancer, discovery};
use tokio::sync::oneshot;

use super::Cluster;
use super::client::{Held, NodeRequest, SendError};
use super::identity::{marker_path, parse_marker};
use super::node::{Node, NodeIndex, Observed};
use crate::chroma::node_path;
use crate::env::{SharedEnv, within};
use crate::events::Kind;
use crate::journal::MaintenanceRecord;

/// How long it may take to open the connection that is held.
const HOLD_LIMIT: Duration = Duration::from_secs(5);

/// So many probes in a row have to find another marker.
const STRANGE: usize = 2;

/// How probes are judged.
#[derive(Debug, Clone, Copy)]
pub struct Thresholds {
    pub interval: Duration,
    pub timeout: Duration,
    pub unhealthy_after: usize,
    pub healthy_after: usize,
    /// How long a canary write may take; long, because one large batch holds it up on a healthy node.
    pub canary_timeout: Duration,
}

/// Pingora's load balancer as the background service that probes the nodes.
pub type HealthService = GenBackgroundService<LoadBalancer<RoundRobin>>;

/// The background service that probes every node.
pub fn health_service(cluster: Arc<Cluster>, env: SharedEnv, thresholds: Thresholds) -> HealthService {
    let mut identities = BTreeSet::new();
    for node in cluster.nodes() {
        // The address only tells the backends apart: probes go by name, through the node's own client.
        let mut backend = Backend::new(&format!("0.0.0.0:{}", node.index + 1)).expect("a literal address");
        backend.ext.insert(node.index);
        identities.insert(backend);
    }
    let mut backends = Backends::new(discovery::Static::new(identities));
    backends.set_health_check(Box::new(Probe {
        shared: Arc::new(Prober {
            cluster,
            env,
            thresholds,
        }),
    }));
    let mut balancer = LoadBalancer::<RoundRobin>::from_backends(backends);
    balancer.health_check_frequency = Some(thresholds.interval);
    balancer.parallel_health_check = true;
    background_service("health", balancer)
}

struct Prober {
    cluster: Arc<Cluster>,
    env: SharedEnv,
    thresholds: Thresholds,
}

/// Why a probe failed.
enum Failure {
    /// Nobody answers there: whoever does next may be someone else.
    Connect(String),
    Probe(String),
}

struct Probe {
    shared: Arc<Prober>,
}

impl Prober {
    async fn probe(&self, node: &Node) -> Result<(), Failure> {
        match within(&self.env, self.thresholds.timeout, resolve(node)).await {
            None => return Err(Failure::Probe("no address in time".to_owned())),
            Some(true) => self
                .cluster
                .report_unverified(node.index, "its name leads to another address now"),
            Some(false) => {}
        }
        // A connection of its own: it shows where new ones lead.
        let connection = self.in_time("connecting", node.client.hold()).await?;
        let marker = marker_path();
        for path in [node_path::HEARTBEAT, &marker] {
            let answer = self.in_time(path, connection.send(NodeRequest::get(path))).await?;
            if answer.status >= 500 {
                return Err(Failure::Probe(format!("{path}: status {}", answer.status)));
            }
            if path == marker && node.is_strange(parse_marker(&answer).as_deref()) {
                self.cluster
                    .report_unverified(node.index, "it shows another marker than it was known by");
            }
        }
        Ok(())
    }

    async fn in_time<T>(&self, what: &str, request: impl Future<Output = Result<T, SendError>>) -> Result<T, Failure> {
        match within(&self.env, self.thresholds.timeout, request).await {
            None => Err(Failure::Probe(format!(
                "{what}: no answer in {:?}",
                self.thresholds.timeout
            ))),
            Some(Err(error @ SendError::NotSent(_))) => Err(Failure::Connect(format!("{what}: {error}"))),
            Some(Err(error)) => Err(Failure::Probe(format!("{what}: {error}"))),
            Some(Ok(answer)) => Ok(answer),
        }
    }

    /// Runs on the core's runtime, where the node's client keeps its connections.
    async fn run(self: Arc<Self>, index: NodeIndex) -> Result<(), String> {
        let node = self.cluster.node(index).clone();
        let outcome = match self.probe(&node).await {
            Ok(()) => Ok(()),
            Err(Failure::Connect(reason)) => {
                self.cluster.report_connect_failure(index, &reason);
                Err(reason)
            }
            Err(Failure::Probe(reason)) => Err(reason),
        };
        let wants_canary = node.observe_probe(&outcome, self.thresholds.healthy_after);
        self.cluster.conclude();
        if wants_canary {
            let this = self.clone();
            self.env.spawn(Box::pin(async move { this.run_canary(&node).await }));
        }
        outcome
    }

    async fn run_canary(&self, node: &Node) {
        let limit = self.thresholds.canary_timeout;
        if node.is_verified() {
            let outcome = canary(&self.env, node, limit).await;
            node.observe_canary(outcome);
            self.cluster.conclude();
        } else {
            let _ = self.cluster.verify(&self.env, node.index, limit).await;
        }
    }
}

async fn canary(env: &SharedEnv, node: &Node, limit: Duration) -> Result<(), String> {
    let outcome = within(env, limit, node.canary())
        .await
        .unwrap_or_else(|| Err("canary: no answer in time".to_owned()));
    if let Err(reason) = &outcome {
        tracing::warn!(node = node.name, reason, "The canary write failed.");
    }
    outcome
}

#[async_trait]
impl HealthCheck for Probe {
    async fn check(&self, target: &Backend) -> pingora::Result<()> {
        let Some(&index) = target.ext.get::<NodeIndex>() else {
            return Ok(());
        };
        let (done, outcome) = oneshot::channel();
        let shared = self.shared.clone();
        self.shared.env.spawn(Box::pin(async move {
            let _ = done.send(shared.run(index).await);
        }));
        let outcome = outcome
            .await
            .unwrap_or_else(|_| Err("the probe was dropped".to_owned()));
        outcome.map_err(|reason| Error::explain(ErrorType::ConnectError, reason))
    }

    async fn health_status_change(&self, target: &Backend, healthy: bool) {
        if let Some(&index) = target.ext.get::<NodeIndex>() {
            self.shared.cluster.node(index).observe_verdict(healthy);
            self.shared.cluster.conclude();
        }
    }

    fn backend_summary(&self, target: &Backend) -> String {
        target.ext.get::<NodeIndex>().map_or_else(String::new, |&index| {
            format!("node {}", self.shared.cluster.node(index).name)
        })
    }

    fn health_threshold(&self, success: bool) -> usize {
        if success {
            self.shared.thresholds.healthy_after
        } else {
            self.shared.thresholds.unhealthy_after
        }
    }
}

/// Looks the node's name up when it is not known yet or the last probe failed; reads connect to the address. Of several,
/// the one that is known already, or the first that accepts a connection. Returns whether it is another than before.
async fn resolve(node: &Node) -> bool {
    if node.address().is_some() && node.last_error().is_none() {
        return false;
    }
    let addresses: Vec<SocketAddr> = match tokio::net::lookup_host(&node.authority).await {
        Ok(addresses) => addresses.collect(),
        Err(error) => {
            tracing::warn!(node = node.name, %error, "Could not resolve the node's name.");
            return false;
        }
    };
    if let [only] = addresses.as_slice() {
        return node.set_address(*only);
    }
    let known = node.address().filter(|known| addresses.contains(known));
    for address in known.into_iter().chain(addresses) {
        if tokio::net::TcpStream::connect(address).await.is_ok() {
            return node.set_address(address);
        }
    }
    false
}

impl Observed {
    /// Whoever answers there next may be someone else.
    fn doubt_identity(&mut self, reason: &str) {
        self.failures += 1;
        self.canary_passed = false;
        self.verified = false;
        self.last_error = Some(reason.to_owned());
    }
}

impl Node {
    /// Whether a new connection found another marker than is remembered, for the second time in a row: in the middle of a
    /// `reset` it is not there for a moment.
    fn is_strange(&self, marker: Option<&str>) -> bool {
        let strange = self.marker().is_some_and(|known| marker != Some(known.as_str()));
        let mut observed = self.observed.lock();
        observed.strange_markers = if strange { observed.strange_markers + 1 } else { 0 };
        observed.verified && observed.strange_markers >= STRANGE
    }

    /// Returns whether a canary write has to be sent before the node is up.
    fn observe_probe(&self, outcome: &Result<(), String>, healthy_after: usize) -> bool {
        let out = self.is_in_maintenance();
        let mut observed = self.observed.lock();
        match outcome {
            Ok(()) => {
                observed.passed_since_failure += 1;
                if observed.failed_passively && observed.passed_since_failure >= healthy_after {
                    observed.failed_passively = false;
                }
                observed.last_error = None;
                let start = observed.healthy
                    && !out
                    && !observed.failed_passively
                    && !observed.canary_passed
                    && !observed.canary_running;
                observed.canary_running |= start;
                if start {
                    observed.failures_at_canary = observed.failures;
                }
                start
            }
            Err(reason) => {
                observed.passed_since_failure = 0;
                observed.failures += 1;
                observed.settled = true;
                observed.last_error = Some(reason.clone());
                false
            }
        }
    }

    fn observe_canary(&self, outcome: Result<(), String>) {
        let mut observed = self.observed.lock();
        observed.canary_running = false;
        observed.settled = true;
        match outcome {
            // One that was sent before the last failure says nothing about what was sent since.
            Ok(()) => observed.canary_passed = observed.failures == observed.failures_at_canary,
            Err(reason) => observed.last_error = Some(reason),
        }
    }

    fn observe_verdict(&self, healthy: bool) {
        let mut observed = self.observed.lock();
        observed.healthy = healthy;
        observed.canary_passed &= healthy;
    }
}

impl Cluster {
    /// A request could not connect to this node: it is down until probes pass again and it has said who it is.
    pub fn report_connect_failure(&self, index: NodeIndex, reason: &str) {
        {
            let mut observed = self.node(index).observed.lock();
            observed.failed_passively = true;
            observed.passed_since_failure = 0;
            observed.doubt_identity(reason);
        }
        self.conclude();
    }

    /// It may not be the node that was admitted: it is down until it has said who it is.
    pub fn report_unverified(&self, index: NodeIndex, reason: &str) {
        self.node(index).observed.lock().doubt_identity(reason);
        self.conclude();
    }

    /// Finds out who a node is and lets it in: holds a connection to it, waits for a canary write, has it admitted.
    /// For those who embed the core without [`health_service`], before [`Cluster::observe`]; one at a time per node.
    ///
    /// The connection comes first: what is read later is then said by the process that is held, and should that end
    /// meanwhile, nothing of this counts.
    ///
    /// # Errors
    /// Why it is not verified.
    pub async fn verify(self: &Arc<Self>, env: &SharedEnv, index: NodeIndex, limit: Duration) -> Result<(), String> {
        let node = self.node(index);
        if node.is_in_maintenance() {
            node.observed.lock().canary_running = false;
            return Err("it is in maintenance".to_owned());
        }
        let failures = node.observed.lock().failures;
        let outcome = self.identify(env, index, limit).await;
        let verified = {
            let mut observed = node.observed.lock();
            observed.canary_running = false;
            observed.settled = true;
            observed.verified = outcome.is_ok() && observed.failures == failures;
            observed.canary_passed = observed.verified;
            observed.refusal = outcome.as_ref().err().cloned();
            if let Err(reason) = &outcome {
                observed.last_error = Some(reason.clone());
            }
            observed.verified
        };
        if !verified {
            node.set_held(None);
        }
        self.conclude();
        outcome
    }

    async fn identify(self: &Arc<Self>, env: &SharedEnv, index: NodeIndex, limit: Duration) -> Result<(), String> {
        let node = self.node(index);
        let held = match within(env, HOLD_LIMIT, node.client.hold()).await {
            Some(Ok(held)) => held,
            Some(Err(error)) => return Err(error.to_string()),
            None => return Err("no connection in time".to_owned()),
        };
        node.set_held(Some(held.clone()));
        node.renew();
        self.watch(env, index, held);
        canary(env, node, limit).await?;
        match self.admission() {
            Some(admission) => admission.admit(index).await,
            None => Ok(()),
        }
        .inspect_err(|reason| tracing::warn!(node = node.name, reason, "The node is not admitted."))
    }

    /// Notices the end of a held connection.
    fn watch(self: &Arc<Self>, env: &SharedEnv, index: NodeIndex, held: Arc<dyn Held>) {
        let (cluster, held) = (Arc::downgrade(self), Arc::downgrade(&held));
        env.spawn(Box::pin(async move {
            let Some(ended) = held.upgrade().map(|held| held.until_ended()) else {
                return;
            };
            ended.await;
            if let Some(cluster) = cluster.upgrade()
                && let Some(current) = cluster.node(index).held()
                && std::ptr::addr_eq(Arc::as_ptr(&current), held.as_ptr())
            {
                cluster.node(index).set_held(None);
                cluster.report_unverified(index, "the connection that was held to it has ended");
            }
        }));
    }

    /// Takes a node out of service (`Some`) or back. Back, it has to say who it is again before it is up: what happened
    /// to it meanwhile nobody knows.
    pub(crate) fn set_maintenance(&self, index: NodeIndex, record: Option<MaintenanceRecord>) {
        let node = self.node(index);
        if record.is_none() && node.is_in_maintenance() {
            node.observed.lock().doubt_identity("it was in maintenance");
        }
        node.set_maintenance(record);
        self.conclude();
        self.announce_change();
    }

    /// What someone else's health checks say of a node: for those who embed the core without [`health_service`], and for
    /// tests. Healthy means here what it means there: probes pass, and a canary write has returned since they did. Where
    /// nodes have to be admitted, one that is not verified stays down all the same: [`Cluster::verify`] comes first.
    pub fn observe(&self, index: NodeIndex, healthy: bool) {
        let must_verify = self.admission().is_some();
        {
            let mut observed = self.node(index).observed.lock();
            observed.healthy = healthy;
            observed.failed_passively &= !healthy;
            observed.canary_passed = healthy;
            observed.verified |= healthy && !must_verify;
            observed.settled = true;
        }
        self.conclude();
    }

    /// Whether every node was looked at since the start.
    pub fn is_settled(&self) -> bool {
        let known = |node: &Arc<Node>| node.is_in_maintenance() || node.observed.lock().settled;
        self.nodes().iter().all(known)
    }

    /// Draws the conclusions from what was observed; the only place where a node goes up or down.
    pub(super) fn conclude(&self) {
        let _one_at_a_time = self.concluding.lock();
        let healthy: Vec<bool> = self
            .nodes()
            .iter()
            .map(|node| node.observed.lock().is_healthy())
            .collect();
        let out: Vec<bool> = self.nodes().iter().map(|node| node.is_in_maintenance()).collect();
        let any = healthy.iter().zip(&out).any(|(healthy, out)| *healthy && !out);
        let last = if any {
            None
        } else {
            self.nodes().iter().position(|node| node.is_up() && node.is_verified())
        };
        let mut changed = false;
        for (node, (healthy, out)) in self.nodes().iter().zip(healthy.into_iter().zip(out)) {
            let alive = healthy || last == Some(node.index);
            let up = alive && !out;
            if node.set_up(up, alive) {
                changed = true;
                match up {
                    true => self
                        .events()
                        .record(Kind::NodeUp, Some(&node.name), None, "the node is up"),
                    // Whoever took it out is told of elsewhere.
                    false if out => {}
                    false => {
                        let why = node.last_error().unwrap_or_else(|| "its probes fail".to_owned());
                        self.events().record(Kind::NodeDown, Some(&node.name), None, why);
                    }
                }
                tracing::info!(
                    node = node.name,
                    up,
                    reason = node.last_error(),
                    "The node's state changed."
                );
            }
        }
        if changed || !self.announced_settled.swap(self.is_settled(), Ordering::SeqCst) {
            self.announce_change();
        }
    }
}
