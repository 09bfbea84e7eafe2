//! The journal: intents per second, against pgbench doing equal inserts on the same Postgres.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use diptych::chroma::Op;
use diptych::env::TokioEnv;
use diptych::journal::{self, Intent, Log, Presence};
use sqlx::{Connection, PgConnection};

use super::report::{Table, ratios, spread};
use super::{Plan, stage};
use crate::common::Others;
use crate::harness::Journal;
use crate::harness::postgres::{shared_database, tool};

/// Lanes that log at the same time; pgbench's clients.
const CLIENTS: [usize; 3] = [1, 8, 64];

/// The columns of an intent, one row in a transaction of its own.
const INSERT: &str = "INSERT INTO bench_intents (lsn, generation, op, ids) \
                      VALUES (nextval('bench_lsn'), 1099511627777, 'upsert', '[\"record-123456\"]');\n";

/// The log, and its database.
async fn open(name: &str, kind: Journal) -> (Arc<Log>, String) {
    let stage = stage(name, kind);
    let url = stage.journal_url();
    let journal = journal::open(&url, 4).await.expect("the journal opens");
    let env = Arc::new(TokioEnv::new(tokio::runtime::Handle::current()));
    let log = Log::take(journal, env, Presence::here(&stage.dir))
        .await
        .expect("the log is ours");
    (Arc::new(log), url)
}

/// Intents per second that so many lanes get written; each logs one after the other, as a lane does.
async fn append(log: &Arc<Log>, lanes: usize, seconds: f64) -> f64 {
    log.check().await;
    let (end, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut tasks = tokio::task::JoinSet::new();
    for lane in 0..lanes {
        let (log, end, done) = (log.clone(), end.clone(), done.clone());
        tasks.spawn(async move {
            while !end.load(Ordering::Relaxed) {
                let lsn = log.begin();
                let intent = Intent {
                    lsn,
                    generation: Some(lane as i64 + 1),
                    op: Op::Upsert,
                    ids: Some(vec!["record-123456".into()]),
                    body: None,
                };
                assert!(log.intend(intent).await, "the journal takes it");
                log.settle(lsn);
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let started = Instant::now();
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
    let rate = done.load(Ordering::Relaxed) as f64 / started.elapsed().as_secs_f64();
    end.store(true, Ordering::Relaxed);
    tasks.join_all().await;
    rate
}

/// Transactions per second of pgbench.
async fn pgbench(url: &str, script: &std::path::Path, clients: usize, seconds: f64) -> f64 {
    let mut command = tool("pgbench");
    command.args(["-n", "-M", "prepared", "-j", "1", "-c", &clients.to_string()]);
    command
        .args(["-T", &format!("{:.0}", seconds.max(1.0)), "-f"])
        .arg(script)
        .arg(url);
    let output = tokio::task::spawn_blocking(move || run(command))
        .await
        .expect("pgbench runs");
    let tps = output
        .lines()
        .find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
    tps.unwrap_or_else(|| panic!("pgbench says {output}"))
}

fn run(mut command: Command) -> String {
    let output = command.output().expect("pgbench can be started");
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

/// A transaction that keeps its snapshot until it is dropped.
async fn snapshot(url: &str) -> PgConnection {
    let mut connection = PgConnection::connect(url).await.expect("a connection");
    for sql in ["BEGIN ISOLATION LEVEL REPEATABLE READ", "SELECT count(*) FROM pg_class"] {
        sqlx::query(sql).execute(&mut connection).await.expect("a snapshot");
    }
    connection
}

pub async fn run_all(plan: &Plan) -> String {
    let (embedded, _) = open("journal-sqlite", Journal::Sqlite).await;
    let (log, log_url) = open("journal-postgres", Journal::Postgres).await;
    let url = shared_database("pgbench");
    let mut connection = PgConnection::connect(&url).await.expect("a connection");
    for sql in [
        "CREATE TABLE bench_intents (lsn BIGINT PRIMARY KEY, generation BIGINT, op TEXT NOT NULL, ids TEXT, \
         body_bytes BIGINT, body BYTEA)",
        "CREATE SEQUENCE bench_lsn CACHE 1000",
    ] {
        sqlx::query(sql).execute(&mut connection).await.expect("a table");
    }
    let script = stage("journal-postgres", Journal::Postgres).dir.join("insert.sql");
    std::fs::write(&script, INSERT).expect("the script");
    let mut table = Table::new(&[
        "lanes or clients",
        "Diptych, Postgres",
        "the same, snapshot held",
        "pgbench",
        "pgbench, snapshot held",
        "Diptych, SQLite",
        "Diptych / pgbench",
        "held / free",
    ]);
    let others = Others::start();
    for clients in CLIENTS {
        let mut rates: [Vec<f64>; 5] = Default::default();
        for round in 0..plan.rounds {
            for arm in plan.order(round, rates.len()) {
                let held = match arm {
                    1 => Some(snapshot(&log_url).await),
                    3 => Some(snapshot(&url).await),
                    _ => None,
                };
                let rate = match arm {
                    0 | 1 => append(&log, clients, plan.seconds).await,
                    2 | 3 => pgbench(&url, &script, clients, plan.seconds).await,
                    _ => append(&embedded, clients, plan.seconds).await,
                };
                drop(held);
                rates[arm].push(rate);
            }
        }
        let [free, held, bench, bench_held, sqlite] = &rates;
        table.row(&[
            clients.to_string(),
            spread(free, 0),
            spread(held, 0),
            spread(bench, 0),
            spread(bench_held, 0),
            spread(sqlite, 0),
            spread(&ratios(free, bench), 2),
            spread(&ratios(held, free), 2),
        ]);
    }
    log.release().await;
    embedded.release().await;
    format!(
        "{} rounds of {} s; appended intents per second, each durable before the next of its lane; pgbench inserts the same \
         row, one a transaction, prepared. Snapshot held: a REPEATABLE READ transaction is open meanwhile.\n\n{}\
         Other programs: {:.2} cores.\n",
        plan.rounds,
        plan.seconds,
        table.end(),
        others.cores()
    )
}
