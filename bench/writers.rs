//! One writer of single records: what mirroring costs.
//!
//! Three arms share two nodes and one run: (a) straight to one node, (b) the same to both nodes at once by this program,
//! which is the limit of a synchronous mirror, (c) through Diptych. Each has its own collection; rounds visit the arms in
//! changing order, and ratios are taken within a round, so that what else the machine does meets all arms alike.
#![allow(clippy::disallowed_methods, reason = "measures real servers in real time")]

#[allow(dead_code, reason = "each of the benches uses a part of it")]
mod common;
#[allow(dead_code, unused_imports, unused_macros, reason = "the scenarios use more of it")]
#[path = "../tests/scenarios/harness/mod.rs"]
mod harness;

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

use common::{Client, DIMENSION, Others, cores, parse_journal, path, percentile, print_complaints, publish, record};
use harness::Journal;
use harness::api::Api;
use harness::cluster::Cluster;

/// One writer of single records: one node, two nodes at once, Diptych before two nodes.
#[derive(Parser)]
struct Args {
    /// Rounds; each visits every arm.
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Writes per arm and round.
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    writes: u32,
    /// Writes per arm that come first and do not count.
    #[arg(long, default_value_t = 20)]
    warmup: u32,
    /// Where the proxy keeps its log: sqlite or postgres.
    #[arg(long, default_value = "sqlite", value_parser = parse_journal)]
    journal: Journal,
    /// Writes the report into this file too.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Arm {
    Direct,
    Both,
    Diptych,
}

const ARMS: [(Arm, &str); 3] = [
    (Arm::Direct, "direct to one node"),
    (Arm::Both, "to two nodes at once"),
    (Arm::Diptych, "through Diptych"),
];

const ORDERS: [[Arm; 3]; 6] = {
    use Arm::{Both, Diptych, Direct};
    [
        [Direct, Both, Diptych],
        [Both, Diptych, Direct],
        [Diptych, Direct, Both],
        [Diptych, Both, Direct],
        [Direct, Diptych, Both],
        [Both, Direct, Diptych],
    ]
};

/// A round is quiet when other programs kept fewer cores busy than this.
const QUIET: f64 = 0.25;

/// Where each arm writes to.
struct Writer {
    direct: (Client, String),
    both: [(Client, String); 2],
    diptych: (Client, String),
    serial: u64,
}

impl Writer {
    async fn new(cluster: &Cluster) -> Writer {
        let target = async |url: String, api: Api, name: &str| {
            let id = api.collection(name).await;
            (Client::new(&url), path(&id, "upsert"))
        };
        Writer {
            diptych: target(cluster.diptych.url(), cluster.api.clone(), "through-diptych").await,
            // Behind the proxy's back: it has listed what the nodes hold, and does not know these.
            direct: target(cluster.a.url(), cluster.a.api(), "direct").await,
            both: [
                target(cluster.a.url(), cluster.a.api(), "both").await,
                target(cluster.b.url(), cluster.b.api(), "both").await,
            ],
            serial: 0,
        }
    }

    /// Writes one new record and returns how many milliseconds that took.
    async fn write(&mut self, arm: Arm) -> f64 {
        self.serial += 1;
        let body = record(&format!("record-{}", self.serial), self.serial);
        let send = async |to: &(Client, String)| {
            let answer = to.0.post(&to.1, body.clone()).await.and_then(|reply| reply.ok());
            answer.unwrap_or_else(|e| panic!("{}: {e}", to.1));
        };
        let start = Instant::now();
        match arm {
            Arm::Direct => send(&self.direct).await,
            Arm::Both => {
                tokio::join!(send(&self.both[0]), send(&self.both[1]));
            }
            Arm::Diptych => send(&self.diptych).await,
        }
        start.elapsed().as_secs_f64() * 1000.0
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    let (cluster, dir) = common::start("writers", args.journal, 1).await;
    let mut writer = Writer::new(&cluster).await;
    for (arm, _) in ARMS {
        for _ in 0..args.warmup {
            writer.write(arm).await;
        }
    }
    let (start, mut others) = (Instant::now(), Vec::new());
    let mut times: [Vec<Vec<f64>>; 3] = Default::default();
    for round in 0..args.rounds as usize {
        let elsewhere = Others::start();
        for arm in ORDERS[round % ORDERS.len()] {
            let mut took = Vec::with_capacity(args.writes as usize);
            for _ in 0..args.writes {
                took.push(writer.write(arm).await);
            }
            times[arm as usize].push(took);
        }
        others.push(elsewhere.cores());
    }
    let seconds = start.elapsed().as_secs_f64();
    let mut report = format!(
        "## One writer\n\n{} rounds of {} writes per arm, one record of {DIMENSION} dimensions each (base64, one document, \
         one metadata key); journal: {:?}; {seconds:.0} s; {} cores.\n\n",
        args.rounds,
        args.writes,
        args.journal,
        cores()
    );
    tables(&mut report, &times, &others);
    let fault = mirrored(&cluster, u64::from(args.warmup + args.rounds * args.writes)).await;
    if let Err(fault) = &fault {
        let _ = writeln!(report, "\n**Not a valid run:** {fault}");
    }
    publish(&report, args.out.as_deref());
    if fault.is_err() {
        print_complaints(&dir);
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn tables(report: &mut String, times: &[Vec<Vec<f64>>; 3], others: &[f64]) {
    let medians = |arm: Arm| -> Vec<f64> { times[arm as usize].iter().map(|t| percentile(t, 50.0)).collect() };
    let [a, b, c] = [medians(Arm::Direct), medians(Arm::Both), medians(Arm::Diptych)];
    let ratios = |over: &[f64], under: &[f64]| -> Vec<f64> { over.iter().zip(under).map(|(x, y)| x / y).collect() };
    let (c_b, b_a, c_a) = (ratios(&c, &b), ratios(&b, &a), ratios(&c, &a));
    *report += "| p50 of round | (a) direct, ms | (b) two at once, ms | (c) Diptych, ms | c / b | b / a | \
                other programs, cores |\n|---|---|---|---|---|---|---|\n";
    for n in 0..a.len() {
        let _ = writeln!(
            report,
            "| {} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} |",
            n + 1,
            a[n],
            b[n],
            c[n],
            c_b[n],
            b_a[n],
            others[n]
        );
    }
    *report += "\n| all writes | p50, ms | p99, ms |\n|---|---|---|\n";
    for (arm, name) in ARMS {
        let all = times[arm as usize].concat();
        let (p50, p99) = (percentile(&all, 50.0), percentile(&all, 99.0));
        let _ = writeln!(report, "| {name} | {p50:.2} | {p99:.2} |");
    }
    let quiet: Vec<usize> = (0..others.len()).filter(|n| others[*n] < QUIET).collect();
    let _ = writeln!(
        report,
        "\n| ratio of p50 | all {} rounds: median | min..max | {} quiet rounds: median | min..max |\n|---|---|---|---|---|",
        a.len(),
        quiet.len()
    );
    let spread = |ratios: &[f64]| match [0.0, 50.0, 100.0].map(|p| percentile(ratios, p)) {
        [low, median, high] if median.is_finite() => format!("{median:.2} | {low:.2}..{high:.2}"),
        _ => "- | -".into(),
    };
    for (name, ratios) in [
        ("c / b: Diptych over the limit of a mirror", &c_b),
        ("b / a: that limit over one node", &b_a),
        ("c / a: Diptych over one node", &c_a),
    ] {
        let calm: Vec<f64> = quiet.iter().map(|n| ratios[*n]).collect();
        let _ = writeln!(report, "| {name} | {} | {} |", spread(ratios), spread(&calm));
    }
    let absurd = b_a.iter().filter(|ratio| **ratio < 1.0).count();
    let _ = writeln!(
        report,
        "\nQuiet: other programs kept less than {QUIET} cores busy. Rounds in which two nodes were faster than one, which \
         only a disturbed machine shows: {absurd}."
    );
    if quiet.len() * 2 < others.len() {
        *report += "**The machine was too busy for these ratios to mean much; run it again.**\n";
    }
}

/// Whether Diptych wrote to both nodes all the time: nothing is pending, and both hold every record.
async fn mirrored(cluster: &Cluster, records: u64) -> Result<(), String> {
    let status = cluster.diptych.status().await;
    for node in status["instances"].as_array().into_iter().flatten() {
        if node["in_sync"] != true || node["ejections"].as_u64() != Some(0) {
            return Err(format!("the mirror did not work all the time: {node}"));
        }
    }
    if status["wal"]["total_replayed"].as_u64() != Some(0) {
        return Err(format!("a node missed writes: {}", status["wal"]));
    }
    for node in [&cluster.a, &cluster.b] {
        let api = node.api();
        let count = api.count(&api.by_name("through-diptych").await.ok().id()).await.json();
        if count.as_u64() != Some(records) {
            return Err(format!("node {} holds {count} records, not {records}", node.name));
        }
    }
    Ok(())
}
