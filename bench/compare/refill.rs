//! The replica's folder is wiped while it is down; it starts empty and is filled from the primary, under load.

use std::time::{Duration, Instant};

use super::Plan;
use super::clients::{Clients, PACE, READERS, Time, WRITERS};
use super::failover::{DRAIN_LIMIT, equal, lost};
use super::report::{Section, Table, spread};
use super::watch::{Sample, Watch};
use super::wire::{Connection, Target, post};
use super::writers::batch;
use crate::common::{self, DIMENSION, Others};
use crate::harness::Journal;
use crate::harness::cluster::{Cluster, Options, Side};

/// Records that are there before, and how many of them a request brings.
const RECORDS: usize = 10_000;
const BATCH: usize = 500;
/// A round has 10,000 records to write anew: more rounds than these would say the same.
const MOST_ROUNDS: u32 = 2;

/// What the rounds came to.
#[derive(Default)]
struct Rounds {
    seconds: Vec<f64>,
    rates: Vec<f64>,
    latencies: Vec<String>,
    errors: u64,
    lost: usize,
    others: Vec<f64>,
}

async fn round(cluster: &mut Cluster, plan: &Plan, number: u32, rounds: &mut Rounds, faults: &mut Vec<String>) {
    let name = format!("live-{number}");
    let title = format!("round {}", number + 1);
    let live = cluster.api.collection(&name).await;
    let watch = Watch::start(cluster.diptych.admin());
    let clients = Clients::start(Target::new(cluster.diptych.port, &live), number.into());
    let others = Others::start();
    tokio::time::sleep(Duration::from_secs_f64(plan.seconds)).await;
    rounds.others.push(others.cores());
    let killed = Instant::now();
    cluster.node(Side::B).kill9();
    if let Err(status) = watch
        .wait(killed, DRAIN_LIMIT, |s| s.node(Side::B)["healthy"] == false)
        .await
    {
        faults.push(format!("{title}: nobody noticed: {status}"));
    }
    cluster.b.wipe();
    cluster.b.restart().await;
    let back = Instant::now();
    match watch.wait(back, DRAIN_LIMIT, Sample::drained).await {
        Ok(at) => {
            let seconds = at.saturating_duration_since(back).as_secs_f64();
            rounds.seconds.push(seconds);
            rounds.rates.push(RECORDS as f64 / seconds);
        }
        Err(status) => faults.push(format!(
            "{title}: not in sync {DRAIN_LIMIT:?} after its return: {status}"
        )),
    }
    let filled = Instant::now();
    let seen = clients.stop().await;
    let ended = Instant::now();
    if let Err(status) = watch.wait(ended, DRAIN_LIMIT, Sample::drained).await {
        faults.push(format!("{title}: not in sync without load: {status}"));
    }
    rounds.latencies.push(format!(
        "writes {} and {}, reads {} and {}",
        seen.latency(true, Time::Before, (killed, filled)),
        seen.latency(true, Time::Away, (back, filled)),
        seen.latency(false, Time::Before, (killed, filled)),
        seen.latency(false, Time::Away, (back, filled)),
    ));
    for (kind, (count, first)) in seen.errors() {
        rounds.errors += count;
        faults.push(format!("{title}: {count} x {kind}; the first: {first}"));
    }
    rounds.lost += lost(cluster, &seen, &name, &title, faults).await.0;
    cluster.api.drop_collection(&name).await.ok();
}

pub async fn run(plan: &Plan) -> Section {
    let (mut cluster, dir) = common::start_with("refill", Journal::Sqlite, 1, Options::default()).await;
    let id = cluster.api.collection("filled").await;
    let target = Target::new(cluster.diptych.port, &id);
    let mut connection = Connection::open(target.address).await.expect("a connection");
    for first in (0..RECORDS).step_by(BATCH) {
        let request = post(&format!("{}/add", target.collection), &batch("record", first, BATCH));
        connection.send(&request).await.expect("the records are there");
    }
    let (mut rounds, mut faults) = (Rounds::default(), Vec::new());
    for number in 0..plan.rounds.min(MOST_ROUNDS) {
        round(&mut cluster, plan, number, &mut rounds, &mut faults).await;
    }
    let equal_now = equal(&cluster, "at the end", &mut faults).await;
    if !faults.is_empty() {
        common::print_complaints(&dir);
    }
    let mut table = Table::new(&["", ""]);
    for (what, value) in [
        (
            "from its first answer until it is in sync, under load, s",
            spread(&rounds.seconds, 1),
        ),
        ("records per second", spread(&rounds.rates, 0)),
        ("p50 / p99 before and meanwhile, ms", rounds.latencies.join("; ")),
        ("**errors that clients saw**", rounds.errors.to_string()),
        ("**acknowledged writes missing on a node**", rounds.lost.to_string()),
        ("**nodes equal**", equal_now.into()),
        ("other programs before, cores", spread(&rounds.others, 2)),
    ] {
        table.row(&[what.into(), value]);
    }
    let text = format!(
        "{} rounds: the replica is killed, its folder is removed, and it starts empty. The primary has {RECORDS} records of \
         {DIMENSION} dimensions, each with a document and a metadata key; {WRITERS} writers and {READERS} readers of another \
         collection go on all the time, each with a request every {} ms or as soon as the one before is answered. Log: \
         Sqlite.\n\n{}",
        plan.rounds.min(MOST_ROUNDS),
        PACE.as_millis(),
        table.end()
    );
    Section { text, faults }
}
