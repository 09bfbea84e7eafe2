//! Who is up: Pingora's load balancer probes, this file draws the conclusions.
//!
//! | what happens | effect |
//! |---|---|
//! | `unhealthy_after` probes in a row fail | down |
//! | a request cannot connect | down at once |
//! | `healthy_after` probes in a row pass, then a canary write returns | up |
//! | the last node that is up fails its probes | kept: it may still serve, nothing else can |
//!
//! A probe is a heartbeat and then a read that goes through SQLite, because heartbeats pass on a node that can serve
//! nothing (chroma-facts.md 8.1).

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
use super::client::NodeRequest;
use super::node::{Node, NodeIndex};
use crate::env::{SharedEnv, within};

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

struct Probe {
    shared: Arc<Prober>,
}

impl Prober {
    async fn probe(&self, node: &Node) -> Result<(), String> {
        if within(&self.env, self.thresholds.timeout, resolve(node))
            .await
            .is_none()
        {
            return Err("no address in time".to_owned());
        }
        for path in ["/api/v2/heartbeat", "/api/v2/tenants/default_tenant"] {
            let answer = within(
                &self.env,
                self.thresholds.timeout,
                node.client.send(NodeRequest::get(path)),
            )
            .await;
            match answer {
                None => return Err(format!("{path}: no answer in {:?}", self.thresholds.timeout)),
                Some(Err(error)) => return Err(format!("{path}: {error}")),
                Some(Ok(answer)) if answer.status >= 500 => return Err(format!("{path}: status {}", answer.status)),
                Some(Ok(_)) => {}
            }
        }
        Ok(())
    }

    /// Runs on the core's runtime, where the node's client keeps its connections.
    async fn run(self: Arc<Self>, index: NodeIndex) -> Result<(), String> {
        let node = self.cluster.node(index).clone();
        let outcome = self.probe(&node).await;
        let wants_canary = node.observe_probe(&outcome, self.thresholds.healthy_after);
        self.cluster.conclude();
        if wants_canary {
            let this = self.clone();
            self.env.spawn(Box::pin(async move { this.run_canary(&node).await }));
        }
        outcome
    }

    async fn run_canary(&self, node: &Node) {
        let outcome = within(&self.env, self.thresholds.canary_timeout, node.canary())
            .await
            .unwrap_or_else(|| Err("canary: no answer in time".to_owned()));
        if let Err(reason) = &outcome {
            tracing::warn!(node = node.name, reason, "The canary write failed.");
        }
        node.observe_canary(outcome);
        self.cluster.conclude();
    }
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
/// the first that accepts a connection.
async fn resolve(node: &Node) {
    if node.address().is_some() && node.last_error().is_none() {
        return;
    }
    let addresses: Vec<SocketAddr> = match tokio::net::lookup_host(&node.authority).await {
        Ok(addresses) => addresses.collect(),
        Err(error) => {
            tracing::warn!(node = node.name, %error, "Could not resolve the node's name.");
            return;
        }
    };
    if let [only] = addresses.as_slice() {
        return node.set_address(*only);
    }
    for address in addresses {
        if tokio::net::TcpStream::connect(address).await.is_ok() {
            return node.set_address(address);
        }
    }
}

impl Node {
    /// Returns whether a canary write has to be sent before the node is up.
    fn observe_probe(&self, outcome: &Result<(), String>, healthy_after: usize) -> bool {
        let mut observed = self.observed.lock();
        match outcome {
            Ok(()) => {
                observed.passed_since_failure += 1;
                if observed.failed_passively && observed.passed_since_failure >= healthy_after {
                    observed.failed_passively = false;
                }
                observed.last_error = None;
                let start = observed.healthy
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
    /// A request could not connect to this node, or its connection broke: it is down until probes pass again.
    pub fn report_connect_failure(&self, index: NodeIndex, reason: &str) {
        {
            let mut observed = self.node(index).observed.lock();
            observed.failed_passively = true;
            observed.failures += 1;
            observed.canary_passed = false;
            observed.passed_since_failure = 0;
            observed.last_error = Some(reason.to_owned());
        }
        self.conclude();
    }

    /// What someone else's health checks say of a node: for those who embed the core without [`health_service`], and for
    /// tests. Healthy means here what it means there: probes pass, and a canary write has returned since they did.
    pub fn observe(&self, index: NodeIndex, healthy: bool) {
        {
            let mut observed = self.node(index).observed.lock();
            observed.healthy = healthy;
            observed.failed_passively &= !healthy;
            observed.canary_passed = healthy;
            observed.settled = true;
        }
        self.conclude();
    }

    /// Whether every node was looked at since the start.
    pub fn is_settled(&self) -> bool {
        self.nodes().iter().all(|node| node.observed.lock().settled)
    }

    /// Draws the conclusions from what was observed; the only place where a node goes up or down.
    pub(super) fn conclude(&self) {
        let _one_at_a_time = self.concluding.lock();
        let healthy: Vec<bool> = self
            .nodes()
            .iter()
            .map(|node| node.observed.lock().is_healthy())
            .collect();
        let any = healthy.contains(&true);
        let last = if any {
            None
        } else {
            self.nodes().iter().position(|node| node.is_up())
        };
        let mut changed = false;
        for (node, healthy) in self.nodes().iter().zip(healthy) {
            let up = healthy || last == Some(node.index);
            if node.set_up(up) {
                changed = true;
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
