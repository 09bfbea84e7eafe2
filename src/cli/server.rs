//! The server around the plugin: what `run` and `dev` have in common.

use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use pingora::server::configuration::Opt;
use pingora::server::{RunArgs, Server, ShutdownWatch};
use pingora::services::ServiceReadyNotifier;
use pingora::services::background::{BackgroundService, background_service};
use pingora::services::listening::Service;
use tokio::runtime::Runtime;

use super::shutdown::{AtEnd, Ending, Once, Signals};
use super::status::reachable;
use crate::admin::{self, Admin, AdminPort, Guard};
use crate::chroma::BatchLimits;
use crate::cluster::{Cluster, HttpNodeClient, Node, Thresholds, health_service};
use crate::config::{Config, LogPayload};
use crate::drain::{drain_node, keep_limits};
use crate::env::{SharedEnv, TokioEnv};
use crate::events::{Kind, keep_events};
use crate::journal::{self, Log, Presence};
use crate::mirror::{
    Core, Settings, keep_checkpoints, keep_intents, keep_surveyed, keep_suspects, keep_unprotected, recover,
};
use crate::proxy::{self, Proxy};
use crate::{lane, repair};

/// How long shutdown waits for writes that are under way, beyond Pingora's own grace period.
const LAST_WAIT: Duration = Duration::from_secs(60);
/// How often, and with which pause, we try to connect to our own listeners after the start.
const LISTEN_TRIES: usize = 1000;
const LISTEN_PAUSE: Duration = Duration::from_millis(10);
/// How long clients wait at start for the first look at the nodes.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);
const JOURNAL_CHECK: Duration = Duration::from_secs(1);
/// How often the low-water mark is written, if it has moved.
const LOW_WATER: Duration = Duration::from_millis(100);
/// How often a journal that does not answer at start is tried again, a second apart.
const JOURNAL_TRIES: usize = 30;
/// An old process goes on accepting for so long after it has handed over its sockets; Pingora's constant.
const HAND_OVER: Duration = Duration::from_secs(5);

/// How to serve.
pub struct Serving {
    /// Take the sockets over from a running process.
    pub upgrade: bool,
    /// Done once, before the process ends.
    pub at_end: AtEnd,
}

/// Serves until a signal ends it. Usually it does not return then: the process ends with code 0.
///
/// # Errors
/// What kept the server from starting.
pub fn serve(config: Config, serving: Serving) -> Result<(), String> {
    let at_end = Once::new(serving.at_end);
    let outcome = serve_until_signal(config, serving.upgrade, &at_end);
    at_end.run();
    outcome
}

fn serve_until_signal(mut config: Config, upgrade: bool, at_end: &Once) -> Result<(), String> {
    if !upgrade {
        // Pingora would try for 30 seconds and then live on without a listener.
        let addresses = config.listen.iter().map(|listen| listen.address);
        for address in addresses.chain(config.admin.address) {
            std::net::TcpListener::bind(address).map_err(|error| format!("Cannot listen on {address}: {error}."))?;
        }
    }
    raise_descriptor_limit();
    let conf = std::mem::take(&mut config.server);
    let threads = conf.threads.max(2);
    let patience = HAND_OVER + LAST_WAIT + Duration::from_secs(conf.grace_period_seconds.unwrap_or_default());
    let lock = format!("{}.lock", conf.upgrade_sock);
    let folder = Path::new(&lock).parent().map(Path::to_path_buf).unwrap_or_default();
    let opt = Opt {
        upgrade,
        ..Opt::default()
    };
    let mut server = Server::new_with_opt_and_conf(opt, conf);
    server.bootstrap();
    let _only_one_writes = wait_for_predecessor(Path::new(&lock), upgrade, patience)?;

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .thread_name("diptych-core")
        .enable_all()
        .build()
        .map_err(|error| format!("Cannot start the runtime: {error}."))?;
    let (core, cluster, env) = runtime.block_on(build_core(&config, &folder, &runtime))?;
    let nodes: Vec<String> = (cluster.nodes().iter())
        .map(|node| format!("{} http://{}", node.name, node.authority))
        .collect();
    let what = format!(
        "Diptych {} started with the nodes {} and the log in {}",
        env!("CARGO_PKG_VERSION"),
        nodes.join(", "),
        core.log.journal().describe()
    );
    core.events().record(Kind::Configuration, None, None, what);
    let registry = prometheus::default_registry().clone();
    let metrics = Arc::new(admin::register(&registry, &core).map_err(|error| error.to_string())?);
    let admin = Arc::new(Admin::new(core.clone(), registry, Guard::of(&config.admin)));

    let health = &config.health;
    let thresholds = Thresholds {
        interval: health.interval,
        timeout: health.timeout,
        unhealthy_after: health.unhealthy_after as usize,
        healthy_after: health.healthy_after as usize,
        canary_timeout: config.writes.timeout.min(Duration::from_secs(60)),
    };
    server.add_service(health_service(cluster, env, thresholds));
    let background = Background {
        core: core.clone(),
        admin: admin.clone(),
        listeners: config.listen.iter().map(|listen| reachable(listen.address)).collect(),
    };
    let background = server.add_service(background_service("core", background));

    let settings = proxy::Settings {
        consistency: config.reads.consistency,
        read_timeout: config.reads.timeout,
        max_body: usize::try_from(config.writes.max_body).unwrap_or(usize::MAX),
        bytes_in_flight: usize::try_from(config.writes.bytes_in_flight).unwrap_or(usize::MAX),
        listen_status: config.listen_status,
    };
    server.add_service(background_service(
        "ending",
        Ending {
            core: core.clone(),
            metrics: metrics.clone(),
            at_end: at_end.clone(),
        },
    ));
    let plugin = Proxy::new(core.clone(), admin.clone(), metrics, settings);
    let mut service = pingora_proxy::http_proxy_service(&server.configuration, plugin);
    for listen in &config.listen {
        service.add_tcp(&listen.address.to_string());
    }
    server.add_service(service).add_dependency(&background);
    if let Some(address) = config.admin.address {
        let mut port = Service::new("admin".to_owned(), AdminPort(admin));
        port.threads = Some(1);
        port.add_tcp(&address.to_string());
        server.add_service(port);
    }
    server.run(RunArgs {
        shutdown_signal: Box::new(Signals),
    });
    finish(&core, runtime);
    Ok(())
}

/// Takes all the descriptors that this process may have: a read under way holds three.
fn raise_descriptor_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: both calls only read and write `limit`, which lives here.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 && limit.rlim_cur < limit.rlim_max {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

/// Holds a lock for as long as the process lives. At an upgrade, waits until the old process is gone: two that write at
/// once would not write in one order. Clients wait meanwhile; the sockets are open.
fn wait_for_predecessor(path: &Path, upgrade: bool, patience: Duration) -> Result<Option<File>, String> {
    let opened = File::options().write(true).create(true).truncate(false).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if upgrade => return Err(format!("Cannot open {}: {error}.", path.display())),
        Err(_) => return Ok(None),
    };
    let mut waited = Duration::ZERO;
    while file.try_lock().is_err() {
        if !upgrade {
            // Another Diptych with the same `upgrade_sock`; without upgrades that is its own business.
            return Ok(None);
        }
        if waited >= patience {
            return Err(format!("The old process still holds {}.", path.display()));
        }
        std::thread::sleep(Duration::from_millis(50));
        waited += Duration::from_millis(50);
    }
    Ok(Some(file))
}

/// Waits for the writes that are under way; their answers may be lost, the writes are not.
fn finish(core: &Arc<Core>, runtime: Runtime) {
    let waiting = core.clone();
    runtime.block_on(async move {
        let drained = crate::env::within(&waiting.env, LAST_WAIT, async {
            while waiting.counters.jobs.load(Ordering::SeqCst) > 0 {
                waiting.env.sleep(Duration::from_millis(20)).await;
            }
        });
        if drained.await.is_none() {
            tracing::warn!("Some work did not end in time.");
        }
        waiting.log.store_low_water().await;
        waiting.log.release().await;
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
}

/// `folder` is for the file that shows whether we live.
async fn build_core(
    config: &Config,
    folder: &Path,
    runtime: &Runtime,
) -> Result<(Arc<Core>, Arc<Cluster>, SharedEnv), String> {
    let env: SharedEnv = Arc::new(TokioEnv::new(runtime.handle().clone()));
    let nodes = config.nodes.iter().enumerate().map(|(index, node)| {
        let authority = node.url.authority();
        let client = Arc::new(HttpNodeClient::new(&authority, runtime.handle().clone()));
        Node::new(index, node.name.clone(), authority, node.read_weight, client)
    });
    let cluster = Arc::new(Cluster::new(nodes.collect()));
    let mut tries = 0;
    let journal = loop {
        match journal::open(&config.wal.url, config.wal.max_connections).await {
            Ok(journal) => break journal,
            Err(error) if tries + 1 >= JOURNAL_TRIES => return Err(format!("Cannot open the log: {error}.")),
            Err(error) => tracing::warn!(%error, "Cannot open the log yet."),
        }
        tries += 1;
        env.sleep(Duration::from_secs(1)).await;
    };
    let log = Log::take(journal, env.clone(), Presence::here(folder))
        .await
        .map_err(|error| format!("Cannot take the log: {error}."))?;
    let settings = Settings {
        write_timeout: config.writes.timeout,
        mirror_grace: config.writes.mirror_grace,
        read_timeout: config.reads.timeout,
        behind_wait: config.reads.behind_wait,
        lanes: lane::Limits {
            writes: config.writes.queue,
            bytes: usize::try_from(config.writes.queue_bytes).unwrap_or(usize::MAX),
            all_bytes: usize::try_from(config.writes.bytes_in_flight).unwrap_or(usize::MAX),
            time: config.writes.queue_timeout,
            batch: BatchLimits {
                records: config.writes.combine_records,
                bytes: usize::try_from(config.writes.combine_bytes).unwrap_or(usize::MAX),
            },
        },
        drain_rows: config.drain.batch_records,
        drain_bytes: usize::try_from(config.drain.batch_bytes).unwrap_or(usize::MAX),
        drain_concurrency: config.drain.concurrency,
        drain_foreground_factor: config.drain.foreground_factor,
        unknown_per_second: 10,
        tenants: std::iter::once("default_tenant")
            .chain(config.namespace.tenants.iter().map(String::as_str))
            .map(str::to_owned)
            .collect(),
        databases: (config.namespace.databases.iter())
            .map(|name| (name.tenant.clone(), name.database.clone()))
            .collect(),
        log_payloads: config.wal.payload == LogPayload::Always,
        when_unavailable: config.wal.when_unavailable,
        log_bytes: config.wal.max_bytes,
        log_age: config.wal.max_age,
        heal: config.heal,
        repair_concurrency: config.repair.concurrency,
        repair_records: config.repair.batch_records,
        repair_rate: config.repair.rate,
        repair_touched: crate::lane::MOST_TOUCHED,
        verify_interval: config.verify.interval,
        verify_sample: config.verify.sample,
    };
    let core = Core::load(env.clone(), cluster.clone(), log, settings)
        .await
        .map_err(|error| format!("Cannot read the log: {error}."))?;
    tracing::info!(
        term = core.log.term(),
        journal = core.log.journal().describe(),
        "The log is ours."
    );
    Ok((core, cluster, env))
}

/// Drain, survey and the journal's health: started with the server, run on the core's runtime.
struct Background {
    core: Arc<Core>,
    admin: Arc<Admin>,
    listeners: Vec<SocketAddr>,
}

/// Tells when clients can connect. Pingora does not say, and lives on without a listener when it cannot get one; so we
/// try, and give up as a whole.
async fn announce_listeners(core: Arc<Core>, admin: Arc<Admin>, listeners: Vec<SocketAddr>) {
    for address in listeners {
        let mut tries = 0;
        while tokio::net::TcpStream::connect(address).await.is_err() {
            tries += 1;
            if tries == LISTEN_TRIES {
                tracing::error!(%address, "The listener does not come up.");
                std::process::exit(1);
            }
            core.env.sleep(LISTEN_PAUSE).await;
        }
    }
    admin.set_listening();
}

#[async_trait]
impl BackgroundService for Background {
    async fn start_with_ready_notifier(&self, mut shutdown: ShutdownWatch, ready: ServiceReadyNotifier) {
        for node in 0..self.core.cluster.len() {
            self.core.env.spawn(Box::pin(drain_node(self.core.clone(), node)));
            self.core.env.spawn(Box::pin(keep_checkpoints(self.core.clone(), node)));
            self.core
                .env
                .spawn(Box::pin(repair::repair_node(self.core.clone(), node)));
        }
        self.core.env.spawn(Box::pin(keep_events(self.core.events().clone())));
        self.core.env.spawn(Box::pin(admin::keep_watch(self.core.clone())));
        self.core.env.spawn(Box::pin(keep_intents(self.core.clone())));
        self.core.env.spawn(Box::pin(keep_surveyed(self.core.clone())));
        self.core.env.spawn(Box::pin(recover(self.core.clone())));
        self.core.env.spawn(Box::pin(keep_suspects(self.core.clone())));
        self.core.env.spawn(Box::pin(keep_limits(self.core.clone())));
        self.core.env.spawn(Box::pin(keep_unprotected(self.core.clone())));
        self.core
            .env
            .spawn(Box::pin(repair::jobs::keep_verifying(self.core.clone())));
        let core = self.core.clone();
        self.core.env.spawn(Box::pin(async move {
            loop {
                core.env.sleep(LOW_WATER).await;
                core.log.store_low_water().await;
            }
        }));
        let core = self.core.clone();
        self.core.env.spawn(Box::pin(async move {
            loop {
                core.env.sleep(JOURNAL_CHECK).await;
                core.log.check().await;
            }
        }));
        // Clients are let in when it is known which nodes are there: otherwise the first writes would be logged for a
        // node that is merely not known yet.
        let core = self.core.clone();
        let mut changes = core.cluster.watch_changes();
        let settled = async {
            while !core.cluster.is_settled() {
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(SETTLE_LIMIT, settled).await;
        ready.notify_ready();
        let listeners = announce_listeners(self.core.clone(), self.admin.clone(), self.listeners.clone());
        self.core.env.spawn(Box::pin(listeners));
        let _ = shutdown.changed().await;
    }
}
