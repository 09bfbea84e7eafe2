//! Reads: against a stub that costs next to nothing, where the proxy is all there is to see, and against real servers.

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;

use super::nginx::{self, Nginx};
use super::report::{Table, ratios, spread};
use super::wire::{Job, Load, Sample, Source, Target};
use super::{Plan, cpu_seconds, stage};
use crate::common::{self, DIMENSION, Others, percentile};
use crate::harness::api::Api;
use crate::harness::chroma::ChromaNode;
use crate::harness::cluster::Cluster;
use crate::harness::data::{Rng, base64_embedding};
use crate::harness::diptych::{Config, Diptych};
use crate::harness::process::{Process, free_port};
use crate::harness::{Journal, Stage, eventually};

/// Records of the collection that is read.
const RECORDS: usize = 2000;

/// What one arm came to, round by round.
#[derive(Default)]
struct Rounds {
    rate: Vec<f64>,
    p50: Vec<f64>,
    p99: Vec<f64>,
    cpu: Vec<f64>,
}

impl Rounds {
    fn push(&mut self, sample: &Sample, cpu: f64) {
        let all = sample.all();
        self.rate.push(all.len() as f64 / sample.seconds);
        self.p50.push(percentile(&all, 50.0));
        self.p99.push(percentile(&all, 99.0));
        self.cpu.push(cpu / all.len() as f64 * 1e6);
    }
}

struct Arm {
    name: String,
    target: Target,
    /// Whose CPU is counted.
    pid: Option<u32>,
}

/// Runs one load on all arms, `plan.rounds` times.
async fn measure(plan: &Plan, arms: &[Arm], clients: usize, source: Source) -> Vec<Rounds> {
    let mut rounds: Vec<Rounds> = arms.iter().map(|_| Rounds::default()).collect();
    for round in 0..plan.rounds {
        for n in plan.order(round, arms.len()) {
            let arm = &arms[n];
            let before = Arc::new(Mutex::new(0.0));
            let (noted, pid) = (before.clone(), arm.pid);
            let load = Load::new(vec![vec![arm.target.clone()]; clients], source.clone(), plan.seconds);
            let sample = load
                .run(move || *noted.lock().expect("no panics inside") = pid.map_or(0.0, cpu_seconds))
                .await;
            let before = *before.lock().expect("no panics inside");
            rounds[n].push(&sample, pid.map_or(0.0, cpu_seconds) - before);
        }
    }
    rounds
}

fn table(arms: &[Arm], rounds: &[Rounds]) -> String {
    let mut table = Table::new(&[
        "arm",
        "requests/s",
        "p50, ms",
        "p99, ms",
        "CPU of the proxy, µs/request",
    ]);
    for (arm, rounds) in arms.iter().zip(rounds) {
        let cpu = arm.pid.map_or("-".into(), |_| spread(&rounds.cpu, 1));
        table.row(&[
            arm.name.clone(),
            spread(&rounds.rate, 0),
            spread(&rounds.p50, 3),
            spread(&rounds.p99, 2),
            cpu,
        ]);
    }
    table.end()
}

fn always(operation: &'static str, body: &serde_json::Value) -> Source {
    let body = Bytes::from(body.to_string());
    Arc::new(move |_, _| Job {
        operation,
        body: body.clone(),
        records: 0,
    })
}

fn get_one(id: &str) -> serde_json::Value {
    json!({"ids": [id], "include": ["metadatas", "documents"]})
}

fn query_ten(seed: u64) -> serde_json::Value {
    json!({"query_embeddings": [Rng::new(seed).vector(DIMENSION)], "n_results": 10, "include": ["metadatas", "distances"]})
}

/// Diptych before two stubs, with real nodes behind them for all that is not a read of records.
struct Mirror {
    diptych: Diptych,
    stub: Nginx,
    _nodes: [ChromaNode; 2],
    collection: String,
}

impl Mirror {
    async fn start(stage: &Stage, binary: Option<&Path>) -> Mirror {
        let (a, b) = tokio::join!(ChromaNode::start(&stage.dir, "a"), ChromaNode::start(&stage.dir, "b"));
        let get = json!({"ids": ["record-1"], "embeddings": null, "uris": null, "metadatas": [{"n": 1}],
                         "documents": ["record-1 holds 1: a document of a few words"],
                         "include": ["metadatas", "documents"]});
        let ids: Vec<String> = (0..10).map(|n| format!("record-{n}")).collect();
        let query = json!({"ids": [ids], "embeddings": null, "documents": null, "uris": null,
                           "metadatas": [vec![json!({"n": 1}); 10]], "distances": [vec![12.34567; 10]],
                           "include": ["metadatas", "distances"]});
        let stub = Nginx::stub(&stage.dir, &[a.port, b.port], &get.to_string(), &query.to_string()).await;
        let url = |port: &u16| format!("http://127.0.0.1:{port}");
        let nodes = ["primary", "replica"].into_iter().zip(stub.ports.iter().map(url));
        let config = Config {
            journal: stage.journal_url(),
            nodes: nodes.map(|(name, url)| (name.to_owned(), url)).collect(),
            health: "{}".into(),
            extra: String::new(),
        };
        let mut diptych = Diptych::prepare(&stage.dir, &config);
        diptych.binary = binary.map(Path::to_path_buf);
        diptych.restart().await;
        diptych.wait_drained().await;
        let collection = diptych.api().collection("stub").await;
        Mirror {
            diptych,
            stub,
            _nodes: [a, b],
            collection,
        }
    }

    fn arm(&self, name: &str) -> Arm {
        Arm {
            name: name.to_owned(),
            target: Target::new(self.diptych.port, &self.collection),
            pid: Some(self.diptych.pid()),
        }
    }
}

/// The stub, and four ways to it.
pub async fn stub(plan: &Plan) -> String {
    if !nginx::is_there() {
        return "Not measured: nginx is missing (`scripts/setup bench`).".into();
    }
    let stage = stage("stub-reads", Journal::Sqlite);
    let mirror = Mirror::start(&stage, None).await;
    let stub = mirror.stub.ports[0];
    let proxy = Nginx::proxy(&stage.dir, stub).await;
    let bare_port = free_port();
    let mut bare = Command::new(std::env::current_exe().expect("our own path"));
    bare.args(["--serve-bare", &bare_port.to_string(), "--upstream", &stub.to_string()]);
    let bare = Process::spawn(bare, &stage.dir.join("bare.log"), libc::SIGKILL).expect("the bare proxy");
    let direct = Api::direct(&format!("http://127.0.0.1:{bare_port}"));
    eventually(Duration::from_secs(20), "the bare proxy answers", || {
        direct.try_get("/api/v2/heartbeat")
    })
    .await;
    let arm = |name: &str, port: u16, pid| Arm {
        name: name.to_owned(),
        target: Target::new(port, &mirror.collection),
        pid,
    };
    let mut arms = vec![
        arm("direct", stub, None),
        arm("nginx, one worker", proxy.ports[0], Some(proxy.process.id())),
        arm("bare Pingora, two threads", bare_port, Some(bare.id())),
        mirror.arm("Diptych, two threads"),
    ];
    let other = match &plan.other {
        Some((binary, _)) => Some(Mirror::start(&super::stage("stub-other", Journal::Sqlite), Some(binary)).await),
        None => None,
    };
    let other_name = plan.other.as_ref().map_or("", |(_, name)| name);
    arms.extend(other.as_ref().map(|other| other.arm(&format!("Diptych, {other_name}"))));
    let mut text = format!(
        "{} rounds of {} s. The stub is nginx and answers fixed JSON.\n\n",
        plan.rounds, plan.seconds
    );
    let others = Others::start();
    for (what, clients, source) in [
        ("Get by id, 32 clients", 32, always("get", &get_one("record-1"))),
        ("Query, 32 clients", 32, always("query", &query_ten(1))),
        ("Get by id, 1 client", 1, always("get", &get_one("record-1"))),
    ] {
        let rounds = measure(plan, &arms, clients, source).await;
        text += &format!("**{what}**\n\n{}", table(&arms, &rounds));
        let (bare, diptych) = (&rounds[2], &rounds[3]);
        let added: Vec<f64> = diptych.p50.iter().zip(&bare.p50).map(|(d, b)| d - b).collect();
        text += &format!(
            "Diptych / bare Pingora: requests/s {}, CPU per request {}; p50 added: {} ms\n\n",
            spread(&ratios(&diptych.rate, &bare.rate), 2),
            spread(&ratios(&diptych.cpu, &bare.cpu), 2),
            spread(&added, 3)
        );
        if let Some(other) = rounds.get(4) {
            text += &format!(
                "Diptych / Diptych with {other_name}: requests/s {}, CPU per request {}\n\n",
                spread(&ratios(&diptych.rate, &other.rate), 2),
                spread(&ratios(&diptych.cpu, &other.cpu), 2)
            );
        }
    }
    text += &format!("Other programs: {:.2} cores.\n", others.cores());
    text
}

/// Fills a collection through the proxy.
async fn fill(cluster: &Cluster, name: &str) -> String {
    let id = cluster.api.collection(name).await;
    let mut rng = Rng::new(7);
    for start in (0..RECORDS).step_by(500) {
        let numbers = start..start + 500;
        let body = json!({
            "ids": numbers.clone().map(|n| format!("record-{n}")).collect::<Vec<_>>(),
            "embeddings": numbers.clone().map(|_| base64_embedding(&rng.vector(DIMENSION))).collect::<Vec<_>>(),
            "documents": numbers.clone().map(|n| format!("record-{n} holds a document of a few words")).collect::<Vec<_>>(),
            "metadatas": numbers.map(|n| json!({"n": n})).collect::<Vec<_>>(),
        });
        cluster.api.op(&id, "add", &body).await.ok();
    }
    id
}

/// Real servers: one node asked directly, and two behind the proxy.
pub async fn real(plan: &Plan) -> String {
    let (cluster, _) = common::start("reads", Journal::Sqlite, 1).await;
    let id = fill(&cluster, "reads").await;
    let own = cluster.a.api().by_name("reads").await.ok().id();
    let arms = [
        Arm {
            name: "direct to one node".into(),
            target: Target::new(cluster.a.port, &own),
            pid: None,
        },
        Arm {
            name: "Diptych, two nodes".into(),
            target: Target::new(cluster.diptych.port, &id),
            pid: Some(cluster.diptych.pid()),
        },
    ];
    let gets: Vec<Bytes> = (0..RECORDS)
        .map(|n| get_one(&format!("record-{n}")).to_string().into())
        .collect();
    let queries: Vec<Bytes> = (0..200).map(|n| query_ten(n).to_string().into()).collect();
    let any = |operation, bodies: Vec<Bytes>| -> Source {
        Arc::new(move |client, serial| {
            let n = Rng::new(serial ^ (client as u64) << 32).below(bodies.len());
            Job {
                operation,
                body: bodies[n].clone(),
                records: 0,
            }
        })
    };
    let (gets, queries) = (any("get", gets), any("query", queries));
    let mut text = format!(
        "{} rounds of {} s; {RECORDS} records of {DIMENSION} dimensions. Nodes, proxy and load share the cores, so the \
         second node adds none.\n\n",
        plan.rounds, plan.seconds
    );
    let others = Others::start();
    for (what, clients, source) in [
        ("Get by id, 1 client", 1, gets.clone()),
        ("Get by id, 8 clients", 8, gets),
        ("Query (10 nearest), 1 client", 1, queries.clone()),
        ("Query (10 nearest), 8 clients", 8, queries),
    ] {
        let rounds = measure(plan, &arms, clients, source).await;
        text += &format!("**{what}**\n\n{}", table(&arms, &rounds));
        let [direct, diptych] = &rounds[..] else {
            unreachable!("two arms")
        };
        text += &format!(
            "Diptych / direct: requests/s {}, p50 {}\n\n",
            spread(&ratios(&diptych.rate, &direct.rate), 2),
            spread(&ratios(&diptych.p50, &direct.p50), 2)
        );
    }
    text += &format!("Other programs: {:.2} cores.\n", others.cores());
    text
}
