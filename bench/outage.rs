//! A node is killed under load and comes back: what clients notice, how long the way back takes, and whether the nodes
//! are equal afterwards. First the replica, then the primary.
//!
//! Writers own their ids and count their values up; a reader notes the last acknowledged value of an id before it asks,
//! and must see that or a newer one. Nothing is retried: an error that a client sees is an error.
#![allow(clippy::disallowed_methods, reason = "measures real servers in real time")]

#[allow(dead_code, reason = "each of the benches uses a part of it")]
mod common;
#[allow(dead_code, unused_imports, unused_macros, reason = "the scenarios use more of it")]
#[path = "../tests/scenarios/harness/mod.rs"]
mod harness;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Parser;
use serde_json::{Value, json};
use tokio::task::{JoinHandle, JoinSet};

use common::{Client, DIMENSION, Others, cores, parse_journal, path, percentile, print_complaints, publish, record};
use harness::Journal;
use harness::api::Api;
use harness::cluster::{Cluster, Side};
use harness::compare::{DEFAULT, Dump, compare_nodes};
use harness::data::Rng;

/// kill -9 of either node under load, and its return.
#[derive(Parser)]
struct Args {
    /// Length of the load for each node; the node is down from a quarter of it to three fifths.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(4..=3600))]
    seconds: u32,
    #[arg(long, default_value_t = 4)]
    writers: usize,
    #[arg(long, default_value_t = 4)]
    readers: usize,
    /// Writers upsert only; else half of the writes are adds and the rest upserts and updates. Adjacent writes of one
    /// kind are replayed in batches.
    #[arg(long)]
    upserts: bool,
    /// Where the proxy keeps its log: sqlite or postgres.
    #[arg(long, default_value = "sqlite", value_parser = parse_journal)]
    journal: Journal,
    /// Seed of what the clients choose; from the clock if not given.
    #[arg(long)]
    seed: Option<u64>,
    /// Writes the report into this file too.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Ids that a writer writes again and again; besides it adds others, once each.
const SLOTS: usize = 32;
/// No client waits longer than this.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the way back may take.
const DRAIN_LIMIT: Duration = Duration::from_secs(120);
/// What counts as around the kill.
const AROUND: Duration = Duration::from_secs(5);

#[derive(Default)]
struct Slot {
    sent: AtomicU64,
    acked: AtomicU64,
}

struct Shared {
    client: Client,
    collection: String,
    end: Instant,
    upserts: bool,
    slots: Vec<[Slot; SLOTS]>,
    /// By kind: how many, and the first.
    errors: Mutex<BTreeMap<String, (u64, String)>>,
}

/// One answered request.
struct Op {
    write: bool,
    start: Instant,
    end: Instant,
}

/// One client and what it did.
struct Actor {
    shared: Arc<Shared>,
    n: usize,
    rng: Rng,
    ops: Vec<Op>,
    /// Ids written once, and acknowledged.
    added: Vec<String>,
}

impl Actor {
    async fn write(mut self) -> Actor {
        let shared = self.shared.clone();
        let mut serial = 0;
        while Instant::now() < shared.end {
            if self.rng.below(2) == 0 {
                serial += 1;
                let id = format!("w{}-added-{serial}", self.n);
                let operation = if shared.upserts { "upsert" } else { "add" };
                if self.send(operation, record(&id, serial)).await.is_some() {
                    self.added.push(id);
                }
                continue;
            }
            let place = self.rng.below(SLOTS);
            let slot = &shared.slots[self.n][place];
            let n = slot.sent.fetch_add(1, SeqCst) + 1;
            let update = !shared.upserts && slot.acked.load(SeqCst) > 0 && self.rng.below(2) == 0;
            let operation = if update { "update" } else { "upsert" };
            if self.send(operation, record(&slot_id(self.n, place), n)).await.is_some() {
                slot.acked.store(n, SeqCst);
            }
        }
        self
    }

    async fn read(mut self) -> Actor {
        let shared = self.shared.clone();
        while Instant::now() < shared.end {
            let (writer, place) = (self.rng.below(shared.slots.len()), self.rng.below(SLOTS));
            let slot = &shared.slots[writer][place];
            let acked = slot.acked.load(SeqCst);
            if acked == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
                continue;
            }
            let id = slot_id(writer, place);
            if self.rng.below(4) == 0 {
                let near = Rng::new(acked).vector(DIMENSION);
                let body = json!({"query_embeddings": [near], "n_results": 10, "include": ["metadatas", "distances"]});
                if let Some(answer) = self.send("query", body.to_string().into()).await
                    && answer["ids"][0].as_array().is_none_or(Vec::is_empty)
                {
                    self.error("query found nothing".into(), format!("near {id}: {answer}"));
                }
            } else {
                let body = json!({"ids": [id], "include": ["metadatas", "documents"]});
                if let Some(answer) = self.send("get", body.to_string().into()).await {
                    let (n, sent) = (answer["metadatas"][0]["n"].as_u64(), slot.sent.load(SeqCst));
                    if !n.is_some_and(|n| acked <= n && n <= sent) {
                        self.error("stale read".into(), format!("{id} is {acked} to {sent}: {answer}"));
                    }
                }
            }
        }
        self
    }

    fn error(&self, kind: String, detail: String) {
        let mut errors = self.shared.errors.lock().expect("no panics inside");
        errors.entry(kind).or_insert((0, detail)).0 += 1;
    }

    /// Sends one request; `None` if the client saw an error.
    async fn send(&mut self, operation: &str, body: bytes::Bytes) -> Option<Value> {
        let path = path(&self.shared.collection, operation);
        let start = Instant::now();
        let answer = tokio::time::timeout(PATIENCE, self.shared.client.post(&path, body)).await;
        let end = Instant::now();
        let write = matches!(operation, "add" | "upsert" | "update");
        self.ops.push(Op { write, start, end });
        let answer = answer.map_err(|_| format!("no answer within {PATIENCE:?}"));
        match answer.flatten().and_then(|reply| reply.ok()) {
            Ok(body) => Some(serde_json::from_slice(&body).unwrap_or_default()),
            Err(kind) => {
                let left = shared_left(&self.shared);
                let detail = format!("after {:.3} s, {left:.3} s before the end", (end - start).as_secs_f64());
                self.error(format!("{operation}: {kind}"), detail);
                // A client that is refused does not turn into a busy loop.
                tokio::time::sleep(Duration::from_millis(10)).await;
                None
            }
        }
    }
}

fn shared_left(shared: &Shared) -> f64 {
    shared.end.saturating_duration_since(Instant::now()).as_secs_f64()
}

fn slot_id(writer: usize, place: usize) -> String {
    format!("w{writer}-slot-{place}")
}

/// `/status` at one moment.
struct Sample {
    at: Instant,
    status: Value,
}

impl Sample {
    /// Nothing is pending and every node is in sync.
    fn drained(&self) -> bool {
        let nodes = self.status["instances"].as_array();
        let good = |node: &Value| node["healthy"] == true && node["in_sync"] == true && node["pending_writes"] == 0;
        nodes.is_some_and(|nodes| !nodes.is_empty() && nodes.iter().all(good))
            && self.status["write_ahead_log"]["pending_writes"] == 0
    }
}

/// Reads `/status` of the admin port ten times a second until it is stopped.
struct Watch {
    samples: Arc<Mutex<Vec<Sample>>>,
    task: JoinHandle<()>,
}

impl Watch {
    fn start(admin: Api) -> Watch {
        let samples = Arc::new(Mutex::new(Vec::new()));
        let kept = samples.clone();
        let task = tokio::spawn(async move {
            loop {
                if let Ok(answer) = admin.try_get("/status").await {
                    let (at, status) = (Instant::now(), answer.json());
                    kept.lock().expect("no panics inside").push(Sample { at, status });
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        Watch { samples, task }
    }

    /// Waits until a state later than `since` is a drained one; else says what the last one was.
    async fn drained_since(&self, since: Instant, limit: Duration) -> Result<(), String> {
        let end = Instant::now() + limit;
        loop {
            {
                let samples = self.samples.lock().expect("no panics inside");
                if samples.iter().any(|s| s.at > since && s.drained()) {
                    return Ok(());
                }
                if Instant::now() > end {
                    return Err(samples.last().map_or("no answer".into(), |s| format!("{:#}", s.status)));
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn stop(self) -> Vec<Sample> {
        self.task.abort();
        std::mem::take(&mut *self.samples.lock().expect("no panics inside"))
    }
}

/// What became of one node's outage: lines of the report, and what went wrong.
#[derive(Default)]
struct Outcome {
    rows: Vec<(&'static str, String)>,
    faults: Vec<String>,
}

async fn outage(cluster: &mut Cluster, side: Side, args: &Args, seed: u64) -> Outcome {
    let name = ["primary", "replica"][side as usize];
    let collection = cluster.api.collection(&format!("without-{name}")).await;
    let watch = Watch::start(cluster.diptych.admin());
    let others = Others::start();
    let (started, whole) = (Instant::now(), Duration::from_secs(args.seconds.into()));
    let shared = Arc::new(Shared {
        client: Client::new(&cluster.diptych.url()),
        collection,
        end: started + whole,
        upserts: args.upserts,
        slots: (0..args.writers).map(|_| Default::default()).collect(),
        errors: Mutex::default(),
    });
    let mut rng = Rng::new(seed);
    let mut tasks = JoinSet::new();
    for n in 0..args.writers + args.readers {
        let actor = Actor {
            shared: shared.clone(),
            n,
            rng: rng.fork(),
            ops: Vec::new(),
            added: Vec::new(),
        };
        if n < args.writers {
            tasks.spawn(actor.write());
        } else {
            tasks.spawn(actor.read());
        }
    }
    tokio::time::sleep_until((started + whole / 4).into()).await;
    // Until now: what a killed process had used is no longer known.
    let others = others.cores();
    let killed = Instant::now();
    cluster.node(side).kill9();
    tokio::time::sleep_until((started + whole * 3 / 5).into()).await;
    let restarted = Instant::now();
    cluster.node(side).restart().await;
    let returned = Instant::now();
    let actors = tasks.join_all().await;
    let ended = Instant::now();
    let mut outcome = Outcome::default();
    // Under load it may have been drained before the end; without load it has to be now.
    for since in [returned, ended] {
        if let Err(status) = watch.drained_since(since, DRAIN_LIMIT).await {
            outcome.faults.push(format!(
                "{name}: not drained {} s after its return: {status}",
                (Instant::now() - returned).as_secs()
            ));
        }
    }
    let samples = watch.stop();
    let clock = Clock {
        killed,
        returned,
        ended,
    };
    outcome.row(
        "other programs before the kill, cores",
        format!("{others:.2} of {}", cores()),
    );
    report_clients(&mut outcome, name, &actors, &shared, &clock);
    report_way_back(&mut outcome, side, &samples, &clock, restarted);
    report_data(&mut outcome, name, cluster, &actors, &shared).await;
    outcome
}

struct Clock {
    killed: Instant,
    returned: Instant,
    ended: Instant,
}

impl Outcome {
    fn row(&mut self, what: &'static str, value: String) {
        self.rows.push((what, value));
    }
}

fn report_clients(outcome: &mut Outcome, name: &str, actors: &[Actor], shared: &Shared, clock: &Clock) {
    let ops = |write: bool| actors.iter().flat_map(|a| &a.ops).filter(move |op| op.write == write);
    let millis = |op: &Op| (op.end - op.start).as_secs_f64() * 1000.0;
    let (writes, reads) = (ops(true).count(), ops(false).count());
    outcome.row("writes, reads", format!("{writes}, {reads}"));
    let errors = shared.errors.lock().expect("no panics inside");
    let count: u64 = errors.values().map(|(count, _)| count).sum();
    outcome.row("errors that clients saw", count.to_string());
    for (kind, (count, first)) in errors.iter() {
        outcome
            .faults
            .push(format!("{name}: {count} x {kind}; the first: {first}"));
    }
    if writes == 0 || reads == 0 {
        outcome.faults.push(format!("{name}: {writes} writes, {reads} reads"));
    }
    for (what, write) in [("write", true), ("read", false)] {
        // By the moment of the request's start: before the kill, while the node is away, after its return.
        let part = |from: Option<Instant>, to: Option<Instant>| {
            let within = |op: &&Op| from.is_none_or(|t| op.start >= t) && to.is_none_or(|t| op.start < t);
            let times: Vec<f64> = ops(write).filter(within).map(millis).collect();
            format!("{:.0} / {:.0}", percentile(&times, 50.0), percentile(&times, 99.0))
        };
        let (killed, returned) = (Some(clock.killed), Some(clock.returned));
        let parts = [part(None, killed), part(killed, returned), part(returned, None)];
        let around = ops(write).filter(|op| op.end > clock.killed && op.start < clock.killed + AROUND);
        let worst = around.map(millis).fold(0.0, f64::max);
        let ever = ops(write).map(millis).fold(0.0, f64::max);
        let (quantiles, worsts) = match what {
            "write" => (
                "write p50 / p99, ms: before, without, after",
                "worst write, ms: around the kill, ever",
            ),
            _ => (
                "read p50 / p99, ms: before, without, after",
                "worst read, ms: around the kill, ever",
            ),
        };
        outcome.row(quantiles, parts.join(", "));
        outcome.row(worsts, format!("{worst:.0}, {ever:.0}"));
    }
}

fn report_way_back(outcome: &mut Outcome, side: Side, samples: &[Sample], clock: &Clock, restarted: Instant) {
    let seconds = |from: Instant, to: Option<Instant>| {
        to.map_or("-".into(), |to| {
            format!("{:.1}", to.saturating_duration_since(from).as_secs_f64())
        })
    };
    let node = |sample: &Sample| sample.status["instances"][side as usize].clone();
    let first =
        |since: Instant, good: &dyn Fn(&Sample) -> bool| samples.iter().find(|s| s.at > since && good(s)).map(|s| s.at);
    let noticed = first(clock.killed, &|s| node(s)["healthy"] == false);
    outcome.row(
        "kill to `healthy: false` in `/status`, s",
        seconds(clock.killed, noticed),
    );
    let peak = samples.iter().filter_map(|s| node(s)["pending_writes"].as_u64()).max();
    outcome.row("most pending writes", format!("{}", peak.unwrap_or(0)));
    outcome.row(
        "start of the node to its first answer, s",
        seconds(restarted, Some(clock.returned)),
    );
    let ejections = |sample: Option<&Sample>| -> Vec<u64> {
        let nodes = sample
            .and_then(|s| s.status["instances"].as_array())
            .into_iter()
            .flatten();
        nodes.map(|node| node["ejections"].as_u64().unwrap_or(0)).collect()
    };
    let (then, now) = (ejections(samples.first()), ejections(samples.last()));
    let here: Vec<String> = now
        .iter()
        .zip(&then)
        .map(|(now, then)| (now - then).to_string())
        .collect();
    outcome.row("ejections (primary, replica); 1 is the kill", here.join(", "));
    let pending = [0, 2, 4, 6, 8, 10].map(|s| {
        let at = clock.returned + Duration::from_secs(s);
        let last = samples.iter().rfind(|sample| sample.at <= at);
        last.map_or("-".into(), |s| node(s)["pending_writes"].to_string())
    });
    outcome.row(
        "pending writes 0, 2, 4, 6, 8, 10 s after its first answer",
        pending.join(", "),
    );
    let healthy = first(clock.returned, &|s| node(s)["healthy"] == true);
    outcome.row(
        "its first answer to `healthy: true`, s",
        seconds(clock.returned, healthy),
    );
    let drained = first(clock.returned, &Sample::drained);
    let when = match drained {
        Some(at) if at < clock.ended => "under load",
        _ => "after the load had ended",
    };
    let took = seconds(clock.returned, drained);
    outcome.row("**its first answer to drained, s**", format!("**{took}** ({when})"));
}

async fn report_data(outcome: &mut Outcome, name: &str, cluster: &Cluster, actors: &[Actor], shared: &Shared) {
    let verdict = match compare_nodes(&[&cluster.a, &cluster.b], &[DEFAULT]).await {
        Ok(_) => "yes",
        Err(difference) => {
            let mut difference = difference;
            difference.truncate(difference.floor_char_boundary(2000));
            outcome.faults.push(format!("{name}: nodes differ: {difference}"));
            "**no**"
        }
    };
    let (mut records, mut lost) = (Vec::new(), Vec::new());
    for node in [&cluster.a, &cluster.b] {
        match Dump::read(node, &[DEFAULT]).await {
            Ok(dump) => {
                records.push(dump.collection(&format!("without-{name}")).records.len().to_string());
                lost.extend(lost_on(&dump, &format!("without-{name}"), actors, shared));
            }
            Err(e) => outcome
                .faults
                .push(format!("{name}: node {} cannot be read: {e}", node.name)),
        }
    }
    outcome.row("records compared (primary, replica)", records.join(", "));
    outcome.row("acknowledged writes missing on a node", lost.len().to_string());
    outcome.row(
        "**nodes equal** (ids in order, documents, metadata, embeddings)",
        verdict.into(),
    );
    if let Some(first) = lost.first() {
        outcome
            .faults
            .push(format!("{name}: {} acknowledged writes missing; {first}", lost.len()));
    }
}

/// Acknowledged writes that a node does not have, and values that nobody sent.
fn lost_on(dump: &Dump, collection: &str, actors: &[Actor], shared: &Shared) -> Vec<String> {
    let records = &dump.collection(collection).records;
    let have: BTreeMap<&str, u64> = records
        .iter()
        .map(|r| (r.id.as_str(), r.metadata["n"].as_u64().unwrap_or(0)))
        .collect();
    let mut lost = Vec::new();
    for (writer, slots) in shared.slots.iter().enumerate() {
        for (place, slot) in slots.iter().enumerate() {
            let (id, acked, sent) = (slot_id(writer, place), slot.acked.load(SeqCst), slot.sent.load(SeqCst));
            let n = have.get(id.as_str()).copied().unwrap_or(0);
            if n < acked || n > sent {
                lost.push(format!(
                    "{id} on {} is {n}, acknowledged {acked}, sent {sent}",
                    dump.node
                ));
            }
        }
    }
    let added = actors.iter().flat_map(|a| &a.added);
    lost.extend(
        added
            .filter(|id| !have.contains_key(id.as_str()))
            .map(|id| format!("{id} on {}", dump.node)),
    );
    lost
}

#[tokio::main(flavor = "multi_thread", worker_threads = 1)]
async fn main() -> ExitCode {
    let args = Args::parse();
    let clock = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(1, |t| u64::from(t.subsec_nanos()))
    };
    let seed = args.seed.unwrap_or_else(clock);
    let (mut cluster, dir) = common::start("outage", args.journal, seed).await;
    let replica = outage(&mut cluster, Side::B, &args, seed).await;
    let primary = outage(&mut cluster, Side::A, &args, seed.wrapping_add(1)).await;
    let mut report = format!(
        "## kill -9 under load\n\n{} writers and {} readers, {} s each; records of {DIMENSION} dimensions, \
         one per write, {}; journal: {:?}; seed {seed}.\n\n| | replica killed | primary killed |\n|---|---|---|\n",
        args.writers,
        args.readers,
        args.seconds,
        if args.upserts {
            "upserts"
        } else {
            "adds, upserts and updates"
        },
        args.journal
    );
    for ((what, left), (_, right)) in replica.rows.iter().zip(&primary.rows) {
        let _ = writeln!(report, "| {what} | {left} | {right} |");
    }
    let faults: Vec<&String> = replica.faults.iter().chain(&primary.faults).collect();
    for fault in &faults {
        let _ = writeln!(report, "\n**Fault:** {fault}");
    }
    publish(&report, args.out.as_deref());
    if faults.is_empty() {
        return ExitCode::SUCCESS;
    }
    print_complaints(&dir);
    ExitCode::FAILURE
}
