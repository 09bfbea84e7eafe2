//! What the parts share: the stage, a record, numbers.
//!
//! Servers, journal and proxy are those of the scenarios (`tests/scenarios/harness`), with the proxy's default settings.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use bytes::Bytes;
use serde_json::json;

use crate::harness::cluster::{Cluster, Options};
use crate::harness::data::{Rng, base64_embedding};
use crate::harness::{Journal, Stage, process};

pub const DIMENSION: usize = 384;

const RECORDS: &str = "/api/v2/tenants/default_tenant/databases/default_database/collections";

/// The path of an operation on the records of a collection.
pub fn path(collection: &str, operation: &str) -> String {
    format!("{RECORDS}/{collection}/{operation}")
}

/// The body of a write of one record, as the Python client sends it; value `n` decides everything but the id.
pub fn record(id: &str, n: u64) -> Bytes {
    let embedding = base64_embedding(&Rng::new(n).vector(DIMENSION));
    let document = format!("{id} holds {n}: a document of a few words, as long as a sentence or two would be.");
    let body = json!({"ids": [id], "embeddings": [embedding], "documents": [document], "metadatas": [{"n": n}]});
    Bytes::from(body.to_string())
}

/// A temporary folder, two new nodes and a proxy before them.
pub async fn start(name: &str, journal: Journal, seed: u64) -> (Cluster, PathBuf) {
    start_with(name, journal, seed, Options::default()).await
}

/// The same with more settings; health checks are as they are by default.
pub async fn start_with(name: &str, journal: Journal, seed: u64, options: Options) -> (Cluster, PathBuf) {
    let dir = process::root().join(name);
    std::fs::create_dir_all(&dir).expect("the temp folder");
    process::open_to_all(&dir);
    let stage = Stage {
        name: name.into(),
        dir: dir.clone(),
        seed,
        journal,
    };
    let options = Options {
        health: "{}".into(),
        ..options
    };
    let cluster = stage.cluster_with(options).await;
    // The proxy is ready as soon as one node can serve; what is measured needs both.
    cluster.diptych.wait_drained().await;
    (cluster, dir)
}

/// What `/metrics` says of a series, with its labels as they are printed there.
pub async fn counter(cluster: &Cluster, name: &str) -> f64 {
    let metrics = cluster.diptych.admin().get_path("/metrics").await.text();
    let value = metrics
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.and_then(|value| value.parse().ok()).unwrap_or(f64::NAN)
}

/// The given percentile of numbers in any order, between neighbours where it falls there; NaN of none.
pub fn percentile(numbers: &[f64], percent: f64) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else {
        return f64::NAN;
    };
    let place = percent / 100.0 * last as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    low + (high - low) * place.fract()
}

/// How many cores programs other than this one and its children keep busy.
///
/// On a shared machine that decides what the numbers are worth: a write is a chain of hand-overs between threads, each
/// of which may have to queue for a core, so other programs distort even ratios, and not all arms alike.
pub struct Others {
    since: Instant,
    ticks: f64,
}

impl Others {
    pub fn start() -> Others {
        Others {
            since: Instant::now(),
            ticks: other_ticks(),
        }
    }

    pub fn cores(&self) -> f64 {
        // SAFETY: sysconf has no preconditions.
        let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
        ((other_ticks() - self.ticks) / per_second / self.since.elapsed().as_secs_f64()).max(0.0)
    }
}

/// Clock ticks that the machine was busy, without those of this process and its descendants.
fn other_ticks() -> f64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let all = numbers(stat.lines().next().unwrap_or_default());
    // user, nice, system, (idle, iowait), irq, softirq, steal
    let busy: f64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|n| all.get(*n)).sum();
    let mut processes = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // The name before it, in parentheses, may hold anything; then: state, parent, ... user and system time.
        let Some((pid, rest)) = stat.split_once(' ').zip(stat.rsplit_once(')')).map(|(a, b)| (a.0, b.1)) else {
            continue;
        };
        let fields = numbers(rest);
        if let (Ok(pid), [parent, ..]) = (pid.parse::<u32>(), fields.as_slice()) {
            let ticks: f64 = fields.get(10..12).into_iter().flatten().sum();
            processes.push((pid, *parent as u32, ticks));
        }
    }
    let mut ours = BTreeSet::from([std::process::id()]);
    while processes
        .iter()
        .any(|(pid, parent, _)| ours.contains(parent) && ours.insert(*pid))
    {}
    let own: f64 = processes.iter().filter(|p| ours.contains(&p.0)).map(|p| p.2).sum();
    busy - own
}

fn numbers(text: &str) -> Vec<f64> {
    text.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(0, usize::from)
}

/// Prints what the proxy complained about.
pub fn print_complaints(dir: &Path) {
    const MOST: usize = 40;
    let log = std::fs::read_to_string(dir.join("diptych.log")).unwrap_or_default();
    let lines: Vec<&str> = log
        .lines()
        .filter(|l| l.contains("WARN") || l.contains("ERROR"))
        .collect();
    eprintln!("--- the last {MOST} of {} warnings of the proxy", lines.len());
    for line in &lines[lines.len().saturating_sub(MOST)..] {
        eprintln!("{line}");
    }
}
