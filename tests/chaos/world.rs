//! The processes of a chaos test, and what they say about themselves.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::clients::{COLLECTIONS, Client, Records};
use crate::harness::api::Api;
use crate::harness::chroma::ChromaNode;
use crate::harness::data::Rng;
use crate::harness::diptych::{Config, Diptych, HEALTH};
use crate::harness::postgres::Postgres;
use crate::harness::{Journal, Stage};
use crate::history::Recorder;
use crate::names::Names;
use crate::network::Network;

const RECORD_CLIENTS: usize = 5;
const NAME_CLIENTS: usize = 2;
/// From "answers" to "ready", on the slowest machine.
const READY: Duration = Duration::from_secs(60);

pub struct World {
    /// The proxy first: fields are dropped in order.
    pub diptych: Diptych,
    pub nodes: [ChromaNode; 2],
    pub networks: [Network; 2],
    pub postgres: Option<Postgres>,
    pub recorder: Arc<Recorder>,
    /// How often the proxy ended by itself.
    pub proxy_ended: usize,
}

impl World {
    pub async fn start(stage: &Stage) -> World {
        let dir: &Path = &stage.dir;
        let (a, b) = tokio::join!(Network::with_node(dir, "a"), Network::with_node(dir, "b"));
        let ((network_a, a), (network_b, b)) = (a, b);
        let (postgres, journal) = match stage.journal {
            Journal::Sqlite => (None, stage.journal_url()),
            Journal::Postgres => tokio::task::block_in_place(|| {
                let postgres = Postgres::dedicated(dir);
                let url = postgres.create_database("journal");
                (Some(postgres), url)
            }),
        };
        let nodes = vec![
            ("primary".to_owned(), network_a.url(&a)),
            ("replica".to_owned(), network_b.url(&b)),
        ];
        let config = Config {
            journal,
            nodes,
            health: HEALTH.into(),
            extra: String::new(),
        };
        let diptych = Diptych::start(dir, &config).await;
        let world = World {
            diptych,
            nodes: [a, b],
            networks: [network_a, network_b],
            postgres,
            recorder: Arc::new(Recorder::new()),
            proxy_ended: 0,
        };
        world.diptych.wait_drained().await;
        world
    }

    /// Creates the shared collections and starts the clients.
    pub async fn clients(&self, rng: &mut Rng) -> Clients {
        let api = self.diptych.api();
        let mut collections = Vec::new();
        for name in COLLECTIONS {
            collections.push((name.to_owned(), api.collection(name).await));
        }
        let mut clients = Clients {
            stop: Arc::default(),
            tasks: JoinSet::new(),
        };
        for n in 0..RECORD_CLIENTS {
            let client = self.client(format!("client {n}"), &api, rng, &clients.stop);
            clients.tasks.spawn(
                Records {
                    client,
                    collections: collections.clone(),
                }
                .run(),
            );
        }
        for n in 0..NAME_CLIENTS {
            let client = self.client(format!("namer {n}"), &api, rng, &clients.stop);
            clients.tasks.spawn(
                Names {
                    client,
                    tag: format!("own{n}"),
                }
                .run(),
            );
        }
        clients
    }

    fn client(&self, name: String, api: &Api, rng: &mut Rng, stop: &Arc<AtomicBool>) -> Client {
        Client {
            name,
            api: api.clone(),
            rng: rng.fork(),
            recorder: self.recorder.clone(),
            stop: stop.clone(),
        }
    }

    /// Starts the proxy, again if it ends by itself, until it is ready or could be if a node were.
    pub async fn start_proxy(&mut self) {
        self.diptych.spawn();
        let admin = self.diptych.admin();
        let end = Instant::now() + READY;
        while Instant::now() < end {
            if self.diptych.ended().is_some() {
                self.proxy_ended += 1;
                tokio::time::sleep(Duration::from_millis(500)).await;
                self.diptych.spawn();
            }
            if admin.try_get("/ready").await.is_ok_and(|answer| answer.status == 200) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!("the proxy is not ready {READY:?} after its start");
    }

    pub async fn status(&self) -> Result<Value, String> {
        let asked = tokio::time::timeout(Duration::from_secs(5), async {
            self.diptych.admin().try_get("/status").await
        });
        let answer = asked.await.map_err(|_| "/status does not answer".to_owned())??;
        match answer.status {
            200 => Ok(answer.json()),
            _ => Err(format!("{answer:?}")),
        }
    }

    /// Waits until `good`; the last complaint if that takes longer than `limit`.
    pub async fn wait(&self, limit: Duration, good: impl Fn(&Value) -> Result<(), String>) -> Result<(), String> {
        let end = Instant::now() + limit;
        loop {
            let verdict = self.status().await.and_then(|status| good(&status));
            if verdict.is_ok() || Instant::now() > end {
                return verdict;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// A node is healthy and has everything.
pub fn whole(status: &Value, side: usize) -> Result<(), String> {
    let node = &status["instances"][side];
    let none = |field: &str| node[field].as_u64().unwrap_or(0) == 0;
    let good = node["healthy"] == true
        && node["in_sync"] == true
        && ["pending_writes", "repairs", "parked", "stragglers"]
            .iter()
            .all(|field| none(field));
    if good { Ok(()) } else { Err(brief(status)) }
}

/// Both nodes are, and the log is there.
pub fn settled(status: &Value) -> Result<(), String> {
    whole(status, 0)?;
    whole(status, 1)?;
    let log = &status["write_ahead_log"];
    if log["pending_writes"] == 0 && log["available"] != false {
        return Ok(());
    }
    Err(brief(status))
}

/// What of `/status` tells why it is not over.
fn brief(status: &Value) -> String {
    let parts = json!({
        "instances": status["instances"],
        "write_ahead_log": status["write_ahead_log"],
        "not_in_sync": status["not_in_sync"],
        "repairs": status["repairs"],
    });
    format!("/status: {parts:#}")
}

/// Tasks that run until they are stopped.
pub struct Clients {
    stop: Arc<AtomicBool>,
    tasks: JoinSet<()>,
}

impl Clients {
    /// Lets every client finish its operation.
    pub async fn stop(mut self) {
        self.stop.store(true, SeqCst);
        while let Some(task) = self.tasks.join_next().await {
            task.expect("clients do not panic");
        }
    }
}
