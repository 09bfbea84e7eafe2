//! The usual cast: two nodes A and B, optionally behind fault hops, and the proxy before them.

use std::time::Duration;

use super::api::Api;
use super::chroma::ChromaNode;
use super::compare::{DEFAULT, Scope, assert_nodes_equal};
use super::diptych::{Config, Diptych, HEALTH};
use super::fault::FaultNode;
use super::{Journal, Stage, postgres};

/// Longer than a checkpoint takes to follow what was written: a node that is away afterwards is not compared for it when
/// it returns.
pub const CHECKPOINT: Duration = Duration::from_millis(2500);

/// How a [`Cluster`] is set up.
pub struct Options {
    pub fault_a: bool,
    pub fault_b: bool,
    pub health: String,
    /// More top-level YAML for the proxy.
    pub extra: String,
    /// `wal.url`, if not made from the test's journal kind.
    pub journal: Option<String>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            fault_a: false,
            fault_b: false,
            health: HEALTH.into(),
            extra: String::new(),
            journal: None,
        }
    }
}

impl Options {
    /// Fault hops before both nodes.
    pub fn faults() -> Options {
        Options {
            fault_a: true,
            fault_b: true,
            ..Options::default()
        }
    }

    pub fn extra(self, yaml: &str) -> Options {
        Options {
            extra: yaml.into(),
            ..self
        }
    }
}

pub struct Cluster {
    /// The proxy, before the nodes: fields are dropped in order.
    pub diptych: Diptych,
    pub a: ChromaNode,
    pub b: ChromaNode,
    fault_a: Option<FaultNode>,
    fault_b: Option<FaultNode>,
    /// A client of the proxy.
    pub api: Api,
}

/// Which node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    A = 0,
    B = 1,
}

impl Stage {
    /// Two nodes and a proxy, all started.
    pub async fn cluster(&self) -> Cluster {
        self.cluster_with(Options::default()).await
    }

    pub async fn cluster_with(&self, options: Options) -> Cluster {
        let (a, b) = tokio::join!(ChromaNode::start(&self.dir, "a"), ChromaNode::start(&self.dir, "b"));
        self.proxy_before(a, b, options).await
    }

    /// A proxy before nodes that run already.
    pub async fn proxy_before(&self, a: ChromaNode, b: ChromaNode, options: Options) -> Cluster {
        let mut hops = [None, None];
        let mut nodes = Vec::new();
        for (n, (node, fault)) in [(&a, options.fault_a), (&b, options.fault_b)].into_iter().enumerate() {
            let mut url = node.url();
            if fault {
                let hop = FaultNode::start(node.port).await;
                url = hop.url();
                hops[n] = Some(hop);
            }
            nodes.push((["primary", "replica"][n].to_owned(), url));
        }
        let journal = options.journal.unwrap_or_else(|| self.journal_url());
        let config = Config {
            journal,
            nodes,
            health: options.health,
            extra: options.extra,
        };
        let diptych = Diptych::start(&self.dir, &config).await;
        let api = diptych.api();
        let [fault_a, fault_b] = hops;
        Cluster {
            diptych,
            a,
            b,
            fault_a,
            fault_b,
            api,
        }
    }

    /// A fresh journal of this test's kind.
    pub fn journal_url(&self) -> String {
        match self.journal {
            Journal::Sqlite => format!("sqlite://{}", self.dir.join("diptych.db").display()),
            Journal::Postgres => postgres::shared_database(&self.name),
        }
    }
}

impl Cluster {
    pub fn node(&mut self, side: Side) -> &mut ChromaNode {
        match side {
            Side::A => &mut self.a,
            Side::B => &mut self.b,
        }
    }

    #[track_caller]
    pub fn fault(&self, side: Side) -> &FaultNode {
        let hop = if side == Side::A { &self.fault_a } else { &self.fault_b };
        hop.as_ref().expect("asked for in Options")
    }

    /// Kills a node and waits until the proxy has noticed.
    pub async fn down(&mut self, side: Side) {
        self.node(side).kill9();
        self.diptych.wait_unhealthy(side as usize).await;
    }

    /// Starts a node again and waits until everything is drained.
    pub async fn up(&mut self, side: Side) {
        self.node(side).restart().await;
        self.diptych.wait_drained().await;
    }

    /// Asserts equality of the default database on both nodes; returns the number of records compared.
    pub async fn assert_equal(&self) -> usize {
        self.assert_equal_in(&[DEFAULT]).await
    }

    pub async fn assert_equal_in(&self, scopes: &[Scope<'_>]) -> usize {
        assert_nodes_equal(&[&self.a, &self.b], scopes).await
    }
}
