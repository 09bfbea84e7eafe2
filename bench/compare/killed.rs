//! Postgres, where the log is, is killed under load: with both nodes up, and with one down.

use std::time::{Duration, Instant};

use super::clients::{Clients, READERS, Time, WRITERS};
use super::failover::{DRAIN_LIMIT, equal, lost};
use super::report::{Section, columns_of};
use super::watch::{Sample, Watch};
use super::wire::Target;
use super::{Plan, stage};
use crate::common;
use crate::harness::Journal;
use crate::harness::cluster::{Cluster, Options, Side};
use crate::harness::postgres::Postgres;

const CASES: [(bool, &str); 2] = [(false, "both nodes up"), (true, "the replica is down")];

/// What one case came to.
#[derive(Default)]
struct Outcome {
    cells: Vec<(&'static str, String)>,
    /// What clients were told, by kind.
    words: String,
    faults: Vec<String>,
}

async fn case(cluster: &mut Cluster, postgres: &mut Postgres, plan: &Plan, number: usize) -> Outcome {
    const UNPROTECTED: &str = "diptych_unprotected_seconds_total";
    let (replica_down, title) = CASES[number];
    let mut outcome = Outcome::default();
    let name = format!("killed-{number}");
    let collection = cluster.api.collection(&name).await;
    let before = common::counter(cluster, UNPROTECTED).await;
    let watch = Watch::start(cluster.diptych.admin());
    let (calm, gone) = (plan.seconds, plan.seconds * 3.0);
    if replica_down {
        cluster.down(Side::B).await;
    }
    let clients = Clients::start(Target::new(cluster.diptych.port, &collection), number as u64);
    tokio::time::sleep(Duration::from_secs_f64(calm)).await;
    let killed = Instant::now();
    tokio::task::block_in_place(|| postgres.kill9());
    tokio::time::sleep(Duration::from_secs_f64(gone)).await;
    tokio::task::block_in_place(|| postgres.start());
    let back = Instant::now();
    let covered = watch.wait(back, DRAIN_LIMIT, Sample::covered).await;
    tokio::time::sleep(Duration::from_secs_f64(calm)).await;
    let seen = clients.stop().await;
    let ended = Instant::now();
    if replica_down {
        cluster.b.restart().await;
    }
    if let Err(status) = &covered {
        outcome.faults.push(format!(
            "{title}: not covered again {DRAIN_LIMIT:?} after the return of Postgres: {status}"
        ));
    }
    if let Err(status) = watch.wait(ended, DRAIN_LIMIT, |s| s.covered() && s.drained()).await {
        outcome.faults.push(format!("{title}: not in sync: {status}"));
    }
    let count = |write: bool, good: bool| {
        let wanted = seen.requests().filter(|r| r.write == write && r.good == good);
        wanted.count().to_string()
    };
    let seconds = |to: Instant| format!("{:.1}", to.saturating_duration_since(back).as_secs_f64());
    outcome.cells = vec![
        ("writes acknowledged", count(true, true)),
        ("writes refused", count(true, false)),
        ("reads answered", count(false, true)),
        ("**reads that failed**", count(false, false)),
        (
            "write p50 / p99, ms: before",
            seen.latency(true, Time::Before, (killed, back)),
        ),
        ("while Postgres is away", seen.latency(true, Time::Away, (killed, back))),
        (
            "read p50 / p99, ms: before",
            seen.latency(false, Time::Before, (killed, back)),
        ),
        (
            "while Postgres is away",
            seen.latency(false, Time::Away, (killed, back)),
        ),
        ("Postgres away, s", format!("{:.1}", (back - killed).as_secs_f64())),
        (
            "from its return until all is covered, s",
            covered.map_or("-".into(), seconds),
        ),
        (
            "seconds without the log's protection",
            format!("{:.1}", common::counter(cluster, UNPROTECTED).await - before),
        ),
    ];
    for (kind, (count, _)) in seen.errors() {
        outcome.words += &format!("- {title}: {count} x `{kind}`\n");
        // With one node down what it misses could not be kept: those writes are refused before anything is sent.
        if !(replica_down && kind.starts_with("write: 503 ")) {
            outcome.faults.push(format!("{title}: {count} x {kind}"));
        }
    }
    let (lost, records) = lost(cluster, &seen, &name, title, &mut outcome.faults).await;
    outcome
        .cells
        .push(("**acknowledged writes missing on a node**", lost.to_string()));
    let equal = equal(cluster, title, &mut outcome.faults).await;
    outcome
        .cells
        .push(("**nodes equal** (records compared)", format!("{equal} ({records})")));
    cluster.api.drop_collection(&name).await.ok();
    outcome
}

pub async fn run(plan: &Plan) -> Section {
    let stage = stage("postgres-killed", Journal::Postgres);
    let mut postgres = tokio::task::block_in_place(|| Postgres::dedicated(&stage.dir));
    let options = Options {
        health: "{}".into(),
        journal: Some(tokio::task::block_in_place(|| postgres.create_database("journal"))),
        ..Options::default()
    };
    let mut cluster = stage.cluster_with(options).await;
    cluster.diptych.wait_drained().await;
    let (mut columns, mut words, mut faults) = (Vec::new(), String::new(), Vec::new());
    for number in 0..CASES.len() {
        let outcome = case(&mut cluster, &mut postgres, plan, number).await;
        words += &outcome.words;
        faults.extend(outcome.faults);
        columns.push(outcome.cells);
    }
    if !faults.is_empty() {
        common::print_complaints(&stage.dir);
    }
    let words = match words.is_empty() {
        true => String::new(),
        false => format!("What clients were told:\n\n{words}"),
    };
    let text = format!(
        "kill -9 of Postgres under {WRITERS} writers and {READERS} readers (as in the section on nodes that go away); it is \
         started again {} s later. `wal.when_unavailable: mirror`, the default: writes go on while every node takes them, \
         and are compared when Postgres is back; with a node down they are refused. One run each.\n\n{}{words}",
        plan.seconds * 3.0,
        columns_of(&CASES.map(|(_, title)| title), columns).end(),
    );
    Section { text, faults }
}
