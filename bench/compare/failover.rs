//! A node goes away under load and comes back: what clients notice, how long the way back takes, and whether the nodes
//! hold the same afterwards. Either node, killed (`kill -9`) and stopped (`SIGSTOP`: its connections stay, and nothing
//! answers).

use std::time::{Duration, Instant};

use super::Plan;
use super::clients::{Clients, PACE, READERS, Request, Seen, Time, WRITERS};
use super::plot::{self, Timeline};
use super::report::{Section, columns_of};
use super::watch::{Sample, Watch};
use super::wire::Target;
use crate::common::{self, DIMENSION, Others};
use crate::harness::Journal;
use crate::harness::cluster::{Cluster, Options, Side};
use crate::harness::compare::{DEFAULT, Dump, compare_nodes};

/// How long the way back may take.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(120);
/// A node has to be away for longer than health takes to notice, which is 4 s at most with the default settings.
const AWAY_AT_LEAST: f64 = 8.0;
/// Nothing but a node that hangs takes a client so long.
const SLOW: f64 = 1000.0;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    Kill,
    Stop,
}

const CASES: [(Side, Fault, &str); 4] = [
    (Side::A, Fault::Kill, "primary, kill -9"),
    (Side::A, Fault::Stop, "primary, SIGSTOP"),
    (Side::B, Fault::Kill, "replica, kill -9"),
    (Side::B, Fault::Stop, "replica, SIGSTOP"),
];

/// The moments of one outage.
struct Clock {
    started: Instant,
    /// The node was killed or stopped.
    away: Instant,
    /// Its first answer after a start, or when it was continued.
    back: Instant,
    ended: Instant,
}

/// What became of it: cells of a column, and what went wrong.
#[derive(Default)]
struct Outcome {
    cells: Vec<(&'static str, String)>,
    faults: Vec<String>,
}

impl Outcome {
    fn cell(&mut self, what: &'static str, value: String) {
        self.cells.push((what, value));
    }
}

async fn outage(cluster: &mut Cluster, plan: &Plan, number: usize) -> (Outcome, Timeline) {
    let (side, fault, title) = CASES[number];
    let name = format!("outage-{number}");
    let collection = cluster.api.collection(&name).await;
    let watch = Watch::start(cluster.diptych.admin());
    let clients = Clients::start(Target::new(cluster.diptych.port, &collection), number as u64);
    let started = Instant::now();
    let (calm, gone) = (plan.seconds * 2.0, (plan.seconds * 3.0).max(AWAY_AT_LEAST));
    let others = Others::start();
    tokio::time::sleep(Duration::from_secs_f64(calm)).await;
    // Until now: what a killed process had used is no longer known.
    let others = others.cores();
    let away = Instant::now();
    match fault {
        Fault::Kill => cluster.node(side).kill9(),
        Fault::Stop => cluster.node(side).sigstop(),
    }
    tokio::time::sleep(Duration::from_secs_f64(gone)).await;
    match fault {
        Fault::Kill => cluster.node(side).restart().await,
        Fault::Stop => cluster.node(side).sigcont(),
    }
    let back = Instant::now();
    // Under load, and once more when there is none.
    let mut outcome = Outcome::default();
    let drained = watch.wait(back, DRAIN_LIMIT, Sample::drained).await;
    tokio::time::sleep(Duration::from_secs_f64(calm)).await;
    let seen = clients.stop().await;
    let clock = Clock {
        started,
        away,
        back,
        ended: Instant::now(),
    };
    for state in [&drained, &watch.wait(clock.ended, DRAIN_LIMIT, Sample::drained).await] {
        if let Err(status) = state {
            let limit = DRAIN_LIMIT.as_secs();
            outcome
                .faults
                .push(format!("{title}: not in sync {limit} s after its return: {status}"));
        }
    }
    let samples = watch.stop();
    report_clients(&mut outcome, title, &seen, &clock);
    report_way(&mut outcome, side, &samples, &clock, drained.as_ref().ok());
    report_data(&mut outcome, title, cluster, &seen, &name).await;
    outcome.cell("other programs before, cores", format!("{others:.2}"));
    cluster.api.drop_collection(&name).await.ok();
    let timeline = timeline(title, side, &seen, &samples, &clock, drained.ok());
    (outcome, timeline)
}

fn report_clients(outcome: &mut Outcome, title: &str, seen: &Seen, clock: &Clock) {
    let of = |write: bool| seen.requests().filter(move |request| request.write == write);
    let (writes, reads) = (of(true).count(), of(false).count());
    outcome.cell("writes, reads", format!("{writes}, {reads}"));
    if writes == 0 || reads == 0 {
        outcome.faults.push(format!("{title}: {writes} writes, {reads} reads"));
    }
    let errors = seen.errors();
    let count: u64 = errors.values().map(|(count, _)| count).sum();
    outcome.cell("**errors that clients saw**", count.to_string());
    for (kind, (count, first)) in errors {
        outcome
            .faults
            .push(format!("{title}: {count} x {kind}; the first: {first}"));
    }
    for (write, names) in [
        (
            true,
            ["write p50 / p99, ms: before", "while it is away", "after its return"],
        ),
        (
            false,
            ["read p50 / p99, ms: before", "while it is away", "after its return"],
        ),
    ] {
        for (name, time) in names.into_iter().zip([Time::Before, Time::Away, Time::After]) {
            outcome.cell(name, seen.latency(write, time, (clock.away, clock.back)));
        }
    }
    // What was under way when it went, or was sent while it was gone.
    let around = |r: &&Request| r.end > clock.away && r.start < clock.back;
    let worst = |write| of(write).filter(around).map(Request::millis).fold(0.0, f64::max);
    outcome.cell(
        "worst write, worst read while it is away, ms",
        format!("{:.0}, {:.0}", worst(true), worst(false)),
    );
    let slow: Vec<_> = seen.requests().filter(around).filter(|r| r.millis() > SLOW).collect();
    let by_client = |client| slow.iter().filter(|r| r.client == client).count();
    let most = (0..WRITERS + READERS).map(by_client).max().unwrap_or(0);
    outcome.cell(
        "requests above 1 s while it is away: all, most of one client",
        format!("{}, {most}", slow.len()),
    );
}

fn report_way(outcome: &mut Outcome, side: Side, samples: &[Sample], clock: &Clock, drained: Option<&Instant>) {
    let seconds = |from: Instant, to: Option<Instant>| match to {
        Some(to) => format!("{:.1}", to.saturating_duration_since(from).as_secs_f64()),
        None => "-".into(),
    };
    outcome.cell(
        "until `/status` says `healthy: false`, s",
        seconds(clock.away, unhealthy(side, samples, clock)),
    );
    let pending = samples.iter().map(Sample::pending).max().unwrap_or(0);
    outcome.cell("most pending writes", pending.to_string());
    outcome.cell(
        "**from its return until it is in sync, under load, s**",
        seconds(clock.back, drained.copied()),
    );
}

/// When health had noticed.
fn unhealthy(side: Side, samples: &[Sample], clock: &Clock) -> Option<Instant> {
    let noticed = |s: &&Sample| s.at > clock.away && s.node(side)["healthy"] == false;
    samples.iter().find(noticed).map(|s| s.at)
}

async fn report_data(outcome: &mut Outcome, title: &str, cluster: &Cluster, seen: &Seen, collection: &str) {
    let (lost, records) = lost(cluster, seen, collection, title, &mut outcome.faults).await;
    outcome.cell("**acknowledged writes missing on a node**", lost.to_string());
    let equal = equal(cluster, title, &mut outcome.faults).await;
    outcome.cell("**nodes equal** (records compared)", format!("{equal} ({records})"));
}

/// How many acknowledged writes a node does not have, and how many records there are.
pub async fn lost(
    cluster: &Cluster,
    seen: &Seen,
    collection: &str,
    title: &str,
    faults: &mut Vec<String>,
) -> (usize, usize) {
    let (mut lost, mut records) = (Vec::new(), 0);
    for node in [&cluster.a, &cluster.b] {
        match Dump::read(node, &[DEFAULT]).await {
            Ok(dump) => {
                lost.extend(seen.lost_on(&dump, collection));
                records = dump.records();
            }
            Err(e) => faults.push(format!("{title}: node {} cannot be read: {e}", node.name)),
        }
    }
    if let Some(first) = lost.first() {
        faults.push(format!("{title}: {} acknowledged writes missing; {first}", lost.len()));
    }
    (lost.len(), records)
}

/// Whether both nodes hold the same: ids in order, documents, metadata, embeddings.
pub async fn equal(cluster: &Cluster, title: &str, faults: &mut Vec<String>) -> &'static str {
    match compare_nodes(&[&cluster.a, &cluster.b], &[DEFAULT]).await {
        Ok(_) => "yes",
        Err(mut difference) => {
            difference.truncate(difference.floor_char_boundary(1000));
            faults.push(format!("{title}: nodes differ: {difference}"));
            "no"
        }
    }
}

fn timeline(
    title: &str,
    side: Side,
    seen: &Seen,
    samples: &[Sample],
    clock: &Clock,
    drained: Option<Instant>,
) -> Timeline {
    let second = |at: Instant| at.saturating_duration_since(clock.started).as_secs_f64();
    let dots = |write: bool, good: bool| {
        let wanted = seen.requests().filter(move |r| r.write == write && r.good == good);
        wanted.map(|r| (second(r.start), r.millis())).collect::<Vec<_>>()
    };
    Timeline {
        title: title.into(),
        length: second(clock.ended),
        away: (second(clock.away), second(clock.back)),
        unhealthy: unhealthy(side, samples, clock).map(second),
        in_sync: drained.map(second),
        reads: dots(false, true),
        writes: dots(true, true),
        errors: [dots(false, false), dots(true, false)].concat(),
        pending: samples.iter().map(|s| (second(s.at), s.pending())).collect(),
    }
}

/// Either node, killed and stopped, over each kind of log.
pub async fn run(plan: &Plan) -> Section {
    let mut section = Section::from(format!(
        "{WRITERS} writers and {READERS} readers of one collection, each with a request every {} ms or as soon as the one \
         before is answered; single records of {DIMENSION} dimensions; adds, upserts and updates; gets by id and queries, \
         whose answers are checked. Default settings: health has noticed a node that hangs after 4 s at most. One run \
         each, {} s before, then the node is away, then as long as before after it is in sync. It is back when it answers, \
         or is continued.\n\n",
        PACE.as_millis(),
        plan.seconds * 2.0,
    ));
    let mut lines = Vec::new();
    for journal in [Journal::Sqlite, Journal::Postgres] {
        let name = format!("failover-{journal:?}").to_lowercase();
        let (mut cluster, dir) = common::start_with(&name, journal, 1, Options::default()).await;
        let mut columns = Vec::new();
        for (number, (side, ..)) in CASES.into_iter().enumerate() {
            let (outcome, timeline) = outage(&mut cluster, plan, number).await;
            if side == Side::A && journal == Journal::Sqlite {
                lines.push(timeline);
            }
            section.faults.extend(outcome.faults);
            columns.push(outcome.cells);
        }
        if !section.faults.is_empty() {
            common::print_complaints(&dir);
        }
        let titles = CASES.map(|(_, _, title)| title);
        section.text += &format!("**Log: {journal:?}**\n\n{}", columns_of(&titles, columns).end());
    }
    plot::write(&plan.pictures.join("outage.svg"), &lines);
    section.text += "![Latency of reads and writes and the backlog over time, through two outages of the primary](outage.svg)\n\n\
                     Log in SQLite; the primary is killed and started again, then stopped and continued.\n";
    section
}
