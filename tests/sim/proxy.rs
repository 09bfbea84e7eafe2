//! The proxy's process: what `cli/server.rs` starts around the core, without Pingora, in a life that can be killed.

use std::sync::Arc;
use std::time::Duration;

use diptych::chroma::node_path;
use diptych::cluster::{Cluster, Node, NodeIndex, NodeRequest, SendError};
use diptych::config::{Heal, WhenUnavailable};
use diptych::drain::drain_node;
use diptych::env::{SharedEnv, within};
use diptych::journal::{Holder, Log};
use diptych::lane::Limits;
use diptych::mirror::{Core, Settings, keep_checkpoints, keep_intents, keep_suspects, keep_unprotected, recover};
use diptych::repair::repair_node;
use tokio::sync::oneshot;

use crate::fakes::TENANT;
use crate::journal::SimJournal;
use crate::node::{Line, PROBE_LIMIT, SimNode};
use crate::plan::{Tuning, milliseconds};
use crate::world::{Life, SimEnv};

const SECOND: Duration = Duration::from_secs(1);
const LOW_WATER: Duration = Duration::from_millis(100);
const CANARY_LIMIT: Duration = Duration::from_secs(60);
const SETTLE_LIMIT: Duration = Duration::from_secs(5);
const UNHEALTHY_AFTER: u64 = 2;
const HEALTHY_AFTER: u64 = 2;

pub struct Proxy {
    pub core: Arc<Core>,
    pub life: Arc<Life>,
}

/// What became of a request to the proxy.
pub enum Called<T> {
    /// Nobody listens.
    Refused,
    /// The connection broke: the proxy died.
    Lost,
    Answered(T),
}

impl Proxy {
    /// Runs a request inside the proxy.
    pub async fn call<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Called<T> {
        if self.life.is_over() {
            return Called::Refused;
        }
        let (done, answer) = oneshot::channel();
        self.life.spawn(Box::pin(async move {
            let _ = done.send(work.await);
        }));
        match answer.await {
            Ok(answer) => Called::Answered(answer),
            Err(_) => Called::Lost,
        }
    }
}

/// Starts the proxy; `None` when its life ends before it listens.
pub async fn start(
    life: &Arc<Life>,
    nodes: &[Arc<SimNode>; 2],
    journal: &Arc<SimJournal>,
    tuning: Tuning,
) -> Option<Arc<Proxy>> {
    let (done, started) = oneshot::channel();
    let (its_life, nodes, journal) = (life.clone(), nodes.clone(), journal.clone());
    life.spawn(Box::pin(async move {
        let core = boot(&its_life, &nodes, &journal, tuning).await;
        let _ = done.send(core);
    }));
    let core = started.await.ok()?;
    Some(Arc::new(Proxy {
        core,
        life: life.clone(),
    }))
}

async fn boot(life: &Arc<Life>, nodes: &[Arc<SimNode>; 2], journal: &Arc<SimJournal>, tuning: Tuning) -> Arc<Core> {
    let core = load(life, nodes, journal, tuning).await;
    for index in 0..nodes.len() {
        core.env.spawn(Box::pin(drain_node(core.clone(), index)));
        core.env.spawn(Box::pin(repair_node(core.clone(), index)));
        core.env.spawn(Box::pin(keep_checkpoints(core.clone(), index)));
        core.env.spawn(Box::pin(watch_node(core.clone(), index)));
    }
    core.env.spawn(Box::pin(keep_intents(core.clone())));
    core.env.spawn(Box::pin(check_journal(core.clone())));
    core.env.spawn(Box::pin(store_low_water(core.clone())));
    core.env.spawn(Box::pin(look_around(core.clone())));
    core.env.spawn(Box::pin(recover(core.clone())));
    core.env.spawn(Box::pin(keep_suspects(core.clone())));
    core.env.spawn(Box::pin(keep_unprotected(core.clone())));
    let mut changes = core.cluster.watch_changes();
    let settled = async {
        while !core.cluster.is_settled() {
            let _ = changes.changed().await;
        }
    };
    let _ = within(&core.env, SETTLE_LIMIT, settled).await;
    core
}

async fn load(life: &Arc<Life>, nodes: &[Arc<SimNode>; 2], journal: &Arc<SimJournal>, tuning: Tuning) -> Arc<Core> {
    let env: SharedEnv = Arc::new(SimEnv(life.clone()));
    let settings = Settings {
        write_timeout: Duration::from_secs(600),
        mirror_grace: milliseconds(tuning.mirror_grace),
        read_timeout: Duration::from_secs(30),
        behind_wait: Duration::from_secs(10),
        lanes: Limits {
            writes: 64,
            ..Limits::default()
        },
        drain_rows: tuning.drain_rows,
        drain_bytes: 8 << 20,
        drain_concurrency: 8,
        drain_foreground_factor: 2,
        unknown_per_second: 10,
        tenants: vec![TENANT.to_owned()],
        databases: vec![],
        log_payloads: false,
        when_unavailable: WhenUnavailable::Mirror,
        log_bytes: 0,
        log_age: Duration::ZERO,
        heal: Heal::Auto,
        repair_concurrency: tuning.repair_concurrency,
        repair_records: tuning.repair_records,
        repair_rate: tuning.repair_rate,
        repair_touched: tuning.repair_touched,
        verify_interval: Duration::ZERO,
        verify_sample: 100,
    };
    loop {
        let members = nodes.iter().enumerate();
        let members =
            members.map(|(index, node)| Node::new(index, node.name, "sim:0", 1, Arc::new(Line(node.clone()))));
        let cluster = Arc::new(Cluster::new(members.collect()));
        if let Ok(log) = Log::take(journal.clone(), env.clone(), Holder::named("sim").into()).await
            && let Ok(core) = Core::load(env.clone(), cluster, log, settings.clone()).await
        {
            return core;
        }
        env.sleep(SECOND).await;
    }
}

/// What `cluster/health.rs` does with Pingora's load balancer.
async fn watch_node(core: Arc<Core>, index: NodeIndex) {
    let member = core.cluster.node(index).clone();
    let (mut passed, mut failed) = (HEALTHY_AFTER, 0);
    loop {
        let probe = member.client.send(NodeRequest::get(node_path::HEARTBEAT));
        let answer = within(&core.env, PROBE_LIMIT, probe).await;
        let well = matches!(&answer, Some(Ok(answer)) if answer.is_success());
        (passed, failed) = if well { (passed + 1, 0) } else { (0, failed + 1) };
        if let Some(Err(SendError::NotSent(reason))) = &answer {
            core.cluster.report_connect_failure(index, reason);
        }
        if failed >= UNHEALTHY_AFTER || (!well && !member.is_up()) {
            core.cluster.observe(index, false);
        }
        if passed >= HEALTHY_AFTER
            && !member.is_up()
            && core.cluster.verify(&core.env, index, CANARY_LIMIT).await.is_ok()
        {
            core.cluster.observe(index, true);
        }
        core.env.sleep(SECOND).await;
    }
}

async fn check_journal(core: Arc<Core>) {
    loop {
        core.env.sleep(SECOND).await;
        core.log.check().await;
    }
}

async fn store_low_water(core: Arc<Core>) {
    loop {
        core.env.sleep(LOW_WATER).await;
        core.log.store_low_water().await;
    }
}

async fn look_around(core: Arc<Core>) {
    let mut changes = core.cluster.watch_changes();
    loop {
        changes.mark_unchanged();
        let new = core.cluster.up().any(|node| !core.cluster.node(node).is_surveyed());
        if core.cluster.is_settled() && new {
            core.survey().await;
            core.env.sleep(SECOND).await;
        } else if changes.changed().await.is_err() {
            return;
        }
    }
}
