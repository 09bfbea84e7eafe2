//! Writers: one node asked directly, the same to two nodes at once, and Diptych before two nodes.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use serde_json::json;

use super::report::{Table, ratios, spread};
use super::wire::{Connection, Job, Load, Sample, Source, Target, post};
use super::{Plan, stage};
use crate::common::{self, DIMENSION, Others, percentile, record};
use crate::harness::Journal;
use crate::harness::chroma::ChromaNode;
use crate::harness::cluster::{Cluster, Options};
use crate::harness::data::{Rng, base64_embedding};
use crate::harness::diptych::{Config, Diptych};

/// Records that are there before a mixed load begins.
const PREPARED: usize = 200;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// To one node.
    Direct,
    /// To two nodes at once, by the load generator: the limit of a synchronous mirror.
    Both,
    /// One batch of what all writers have after another, to two nodes at once, by the load generator: the limit of a
    /// synchronous mirror that combines.
    Combined,
    Diptych,
    /// Diptych with `wal.payload: always`.
    Always,
    /// Another build of Diptych.
    Other,
}

impl Way {
    /// As the report calls it; `other` is the name of the other build.
    fn name(self, other: &str) -> String {
        match self {
            Way::Direct => "direct to one node".into(),
            Way::Both => "to two nodes at once".into(),
            Way::Combined => "batches of all, to two nodes at once".into(),
            Way::Diptych => "Diptych, two nodes".into(),
            Way::Always => "Diptych, `wal.payload: always`".into(),
            Way::Other => format!("Diptych, {other}"),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Single,
    /// Of so many records.
    Batch(usize),
    /// Nine gets by id for each upsert.
    Mixed,
}

struct Shape {
    title: &'static str,
    clients: usize,
    collections: usize,
    kind: Kind,
}

const fn shape(title: &'static str, clients: usize, collections: usize, kind: Kind) -> Shape {
    Shape {
        title,
        clients,
        collections,
        kind,
    }
}

const ONE: Shape = shape("1 writer", 1, 1, Kind::Single);

const SHAPES: [Shape; 6] = [
    shape("8 writers, one collection", 8, 1, Kind::Single),
    shape("64 writers, one collection", 64, 1, Kind::Single),
    shape("8 writers, 8 collections", 8, 8, Kind::Single),
    shape("64 writers, 8 collections", 64, 8, Kind::Single),
    shape("1 writer of batches of 100", 1, 1, Kind::Batch(100)),
    shape(
        "8 clients, 90 % get by id, 10 % upsert, one collection",
        8,
        1,
        Kind::Mixed,
    ),
];

/// A Diptych with two nodes of its own.
struct Pair {
    diptych: Diptych,
    _nodes: [ChromaNode; 2],
}

impl Pair {
    /// `wal` is a further setting of the log.
    async fn start(name: &str, journal: Journal, wal: &str, binary: Option<&Path>) -> Pair {
        let stage = stage(name, journal);
        let (a, b) = tokio::join!(ChromaNode::start(&stage.dir, "a"), ChromaNode::start(&stage.dir, "b"));
        let config = Config {
            // What the harness puts between quotes ends here and begins again.
            journal: format!("{}\"\n  {wal}\n  max_connections: 4 # \"", stage.journal_url()),
            nodes: vec![("primary".into(), a.url()), ("replica".into(), b.url())],
            health: "{}".into(),
            extra: String::new(),
        };
        let mut diptych = Diptych::prepare(&stage.dir, &config);
        diptych.binary = binary.map(Path::to_path_buf);
        diptych.restart().await;
        diptych.wait_drained().await;
        Pair {
            diptych,
            _nodes: [a, b],
        }
    }
}

struct Cast {
    cluster: Cluster,
    always: Option<Pair>,
    other: Option<Pair>,
}

impl Cast {
    fn ways(&self, shape: &Shape) -> Vec<Way> {
        let mut ways = vec![Way::Direct, Way::Diptych];
        if shape.title == ONE.title {
            ways.insert(1, Way::Both);
            ways.extend(self.always.as_ref().map(|_| Way::Always));
            ways.extend(self.other.as_ref().map(|_| Way::Other));
        } else if shape.kind == Kind::Single && shape.collections == 1 {
            ways.insert(1, Way::Combined);
        }
        ways
    }

    /// A new collection, as each server that is written to knows it.
    async fn collection(&self, way: Way, name: &str) -> Vec<Target> {
        let through = async |diptych: &Diptych| vec![Target::new(diptych.port, &diptych.api().collection(name).await)];
        // Behind the proxy's back: it has listed what the nodes hold, and does not know these.
        let on = async |node: &ChromaNode| Target::new(node.port, &node.api().collection(name).await);
        let mut targets = match way {
            Way::Direct => vec![on(&self.cluster.a).await],
            Way::Both | Way::Combined => vec![on(&self.cluster.a).await, on(&self.cluster.b).await],
            Way::Diptych => through(&self.cluster.diptych).await,
            Way::Always => through(&self.always.as_ref().expect("it was started").diptych).await,
            Way::Other => through(&self.other.as_ref().expect("it was started").diptych).await,
        };
        // The first write sets the dimension, and the mixed load has something to read.
        for target in &mut targets {
            let mut connection = Connection::open(target.address).await.expect("a connection");
            let request = post(&format!("{}/upsert", target.collection), &batch("record", 0, PREPARED));
            connection.send(&request).await.expect("the first records");
        }
        targets
    }
}

/// The body of a write of several records `prefix-n`.
pub fn batch(prefix: &str, first: usize, count: usize) -> Bytes {
    let numbers = first..first + count;
    let mut rng = Rng::new(first as u64);
    let ids: Vec<String> = numbers.clone().map(|n| format!("{prefix}-{n}")).collect();
    let embeddings: Vec<String> = numbers
        .clone()
        .map(|_| base64_embedding(&rng.vector(DIMENSION)))
        .collect();
    let documents: Vec<String> = ids
        .iter()
        .map(|id| format!("{id} holds a document of a few words"))
        .collect();
    let metadatas: Vec<_> = numbers.map(|n| json!({"n": n})).collect();
    json!({"ids": ids, "embeddings": embeddings, "documents": documents, "metadatas": metadatas})
        .to_string()
        .into()
}

fn source(kind: Kind) -> Source {
    Arc::new(move |client, serial| {
        let number = (client as u64) << 32 | serial;
        match kind {
            Kind::Mixed if serial % 10 != 0 => {
                let id = format!("record-{}", Rng::new(number).below(PREPARED));
                Job {
                    operation: "get",
                    body: json!({"ids": [id], "include": ["metadatas", "documents"]})
                        .to_string()
                        .into(),
                    records: 0,
                }
            }
            Kind::Batch(records) => Job {
                operation: "upsert",
                body: batch(&format!("c{client}"), serial as usize * records, records),
                records,
            },
            Kind::Single | Kind::Mixed => Job {
                operation: "upsert",
                body: record(&format!("c{client}-{serial}"), number),
                records: 1,
            },
        }
    })
}

/// What one way came to, round by round.
#[derive(Default)]
struct Rounds {
    rate: Vec<f64>,
    p50: Vec<f64>,
    p99: Vec<f64>,
    read_p50: Vec<f64>,
}

impl Rounds {
    fn push(&mut self, shape: &Shape, sample: &Sample) {
        let done = match shape.kind {
            Kind::Mixed => sample.all().len(),
            _ => sample.records,
        };
        self.rate.push(done as f64 / sample.seconds);
        self.p50.push(percentile(&sample.writes, 50.0));
        self.p99.push(percentile(&sample.writes, 99.0));
        self.read_p50.push(percentile(&sample.reads, 50.0));
    }
}

/// Writes of clients that were sent on so far, and the requests that they became.
async fn combined(cluster: &Cluster) -> [f64; 2] {
    let of = async |what| {
        let name = format!("diptych_combined_batch_entries_{what}{{path=\"live\"}}");
        common::counter(cluster, &name).await
    };
    [of("sum").await, of("count").await]
}

async fn measure(plan: &Plan, cast: &Cast, shape: &Shape) -> String {
    let ways = cast.ways(shape);
    let mut rounds: Vec<Rounds> = ways.iter().map(|_| Rounds::default()).collect();
    let mut together = Vec::new();
    for round in 0..plan.rounds {
        for n in plan.order(round, ways.len()) {
            let mut collections = Vec::new();
            for k in 0..shape.collections {
                let slug = format!("{}-{}-{}", shape.clients, shape.collections, shape.title.len());
                let name = format!("w{}-{slug}-{round}-{k}", ways[n] as u8);
                collections.push(cast.collection(ways[n], &name).await);
            }
            let (clients, kind) = match ways[n] {
                Way::Combined => (1, Kind::Batch(shape.clients)),
                _ => (shape.clients, shape.kind),
            };
            let targets = (0..clients).map(|c| collections[c % collections.len()].clone());
            let load = Load::new(targets.collect(), source(kind), plan.seconds);
            let before = combined(&cast.cluster).await;
            rounds[n].push(shape, &load.run(|| ()).await);
            if ways[n] == Way::Diptych {
                let after = combined(&cast.cluster).await;
                together.push((after[0] - before[0]) / (after[1] - before[1]));
            }
        }
    }
    let mixed = shape.kind == Kind::Mixed;
    let mut columns = vec![
        "arm",
        if mixed { "requests/s" } else { "records/s" },
        "p50 of a write, ms",
        "p99, ms",
    ];
    columns.extend(mixed.then_some("p50 of a read, ms"));
    let mut table = Table::new(&columns);
    let other_name = plan.other.as_ref().map_or("", |(_, name)| name);
    for (way, rounds) in ways.iter().zip(&rounds) {
        let mut row = vec![
            way.name(other_name),
            spread(
                &rounds.rate,
                if rounds.rate.iter().all(|rate| *rate > 100.0) {
                    0
                } else {
                    1
                },
            ),
            spread(&rounds.p50, 1),
            spread(&rounds.p99, 1),
        ];
        row.extend(mixed.then(|| spread(&rounds.read_p50, 1)));
        table.row(&row);
    }
    let of = |way: Way| ways.iter().position(|other| *other == way).map(|n| &rounds[n]);
    let mut text = format!("**{}**\n\n{}", shape.title, table.end());
    let (Some(direct), Some(diptych)) = (of(Way::Direct), of(Way::Diptych)) else {
        return text;
    };
    text += &format!(
        "Diptych / direct: {} {}, p50 {}",
        columns[1],
        spread(&ratios(&diptych.rate, &direct.rate), 2),
        spread(&ratios(&diptych.p50, &direct.p50), 2)
    );
    if let Some(limit) = of(Way::Combined) {
        let of_limit = spread(&ratios(&diptych.rate, &limit.rate), 2);
        let limit = spread(&ratios(&limit.rate, &direct.rate), 2);
        text += &format!("; batches of all / direct: {limit}; Diptych / batches of all: {of_limit}");
    }
    if shape.clients > 1 {
        text += &format!("; writes in one request to a node: {}", spread(&together, 1));
    }
    if let Some(both) = of(Way::Both) {
        for (what, over, under) in [
            ("Diptych / two nodes at once", Some(diptych), both),
            ("`always` / two nodes at once", of(Way::Always), both),
            ("two nodes at once / direct", Some(both), direct),
            ("`always` / direct", of(Way::Always), direct),
        ] {
            if let Some(over) = over {
                text += &format!("; p50 {what}: {}", spread(&ratios(&over.p50, &under.p50), 2));
            }
        }
    }
    if let Some(other) = of(Way::Other) {
        let added: Vec<f64> = diptych
            .p50
            .iter()
            .zip(&other.p50)
            .map(|(with, without)| with - without)
            .collect();
        text += &format!(
            "; p50 Diptych / Diptych with {other_name}: {}, the difference {} ms",
            spread(&ratios(&diptych.p50, &other.p50), 2),
            spread(&added, 2)
        );
    }
    text + ".\n\n"
}

/// Shapes of load, over one kind of log.
async fn run_shapes(plan: &Plan, cast: &Cast, shapes: &[Shape], journal: Journal) -> String {
    let mut text = format!(
        "{} rounds of {} s; records of {DIMENSION} dimensions (base64), one document and one metadata key; every arm writes \
         to new collections in every round; log: {journal:?}.\n\n",
        plan.rounds, plan.seconds
    );
    let others = Others::start();
    for shape in shapes {
        text += &measure(plan, cast, shape).await;
    }
    text += &format!("Other programs: {:.2} cores.\n", others.cores());
    let status = cast.cluster.diptych.status().await;
    for node in status["instances"].as_array().into_iter().flatten() {
        if node["in_sync"] != true || node["ejections"].as_u64() != Some(0) {
            text += &format!("\n**Not a valid run:** the mirror did not work all the time: {node}\n");
        }
    }
    text
}

/// One writer, with what a mirror costs at least beside it, and with what each setting of the log costs.
pub async fn run_one(plan: &Plan, journal: Journal) -> String {
    let name = format!("writer-{journal:?}").to_lowercase();
    let (cluster, _) = common::start_with(&name, journal, 1, Options::default()).await;
    let cast = Cast {
        cluster,
        always: Some(Pair::start(&format!("{name}-always"), journal, "payload: always", None).await),
        other: match &plan.other {
            Some((binary, _)) => {
                Some(Pair::start(&format!("{name}-other"), journal, "payload: missed", Some(binary)).await)
            }
            None => None,
        },
    };
    run_shapes(plan, &cast, &[ONE], journal).await
}

/// Many writers.
pub async fn run(plan: &Plan, journal: Journal) -> String {
    let name = format!("writers-{journal:?}").to_lowercase();
    let (cluster, _) = common::start_with(&name, journal, 1, Options::default()).await;
    let cast = Cast {
        cluster,
        always: None,
        other: None,
    };
    run_shapes(plan, &cast, &SHAPES, journal).await
}
