//! What a node misses: how fast it is drained, and what a large backlog costs while it is there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::json;
use sqlx::{Connection, PgConnection, SqliteConnection};

use super::report::{Table, ratios, spread};
use super::wire::{Job, Load, Source, Target};
use super::{Plan, stage};
use crate::common::{self, DIMENSION, Others, percentile, record};
use crate::harness::Journal;
use crate::harness::cluster::{Cluster, Options, Side};
use crate::harness::data::{Rng, base64_embedding};

/// Entries of the large backlog.
const MANY: u64 = 1_000_000;
/// Records of the batches that are sent straight to the node.
const BATCH: usize = 64;

fn singles() -> Source {
    Arc::new(|client, serial| Job {
        operation: "upsert",
        body: record(&format!("c{client}-{serial}"), serial),
        records: 1,
    })
}

fn batches() -> Source {
    Arc::new(|_, serial| {
        let numbers = serial as usize * BATCH..(serial as usize + 1) * BATCH;
        let mut rng = Rng::new(serial);
        let ids: Vec<String> = numbers.clone().map(|n| format!("record-{n}")).collect();
        let embeddings: Vec<String> = ids.iter().map(|_| base64_embedding(&rng.vector(DIMENSION))).collect();
        let documents: Vec<String> = ids
            .iter()
            .map(|id| format!("{id} holds a document of a few words"))
            .collect();
        let metadatas: Vec<_> = numbers.map(|n| json!({"n": n})).collect();
        let body = json!({"ids": ids, "embeddings": embeddings, "documents": documents, "metadatas": metadatas});
        Job {
            operation: "upsert",
            body: Bytes::from(body.to_string()),
            records: BATCH,
        }
    })
}

/// The time from the last moment at which everything was pending until nothing is, and how much that was; `None`: it
/// took too long.
async fn watch_drain(cluster: &Cluster) -> Option<(Instant, Instant, u64)> {
    const LIMIT: Duration = Duration::from_secs(60);
    let (limit, mut first) = (Instant::now() + LIMIT, None);
    while Instant::now() < limit {
        let status = cluster.diptych.status().await;
        let pending = status["instances"][1]["pending_writes"].as_u64().unwrap_or(0);
        let now = Instant::now();
        let (most, since) = *first.get_or_insert((pending, now));
        if pending >= most {
            first = Some((pending, now));
        } else if pending == 0 {
            return Some((since, now, most));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    None
}

/// One writer makes a backlog while a node is down; the node comes back.
pub async fn drain(plan: &Plan) -> String {
    let (mut cluster, _) = common::start_with("drain", Journal::Sqlite, 1, Options::default()).await;
    let (mut made, mut drained, mut straight) = (Vec::new(), Vec::new(), Vec::new());
    let (mut before, mut during) = (Vec::new(), Vec::new());
    // Enough entries that the drain can be timed, and that clients send enough while it lasts.
    // Twenty a second: fifty alone take half of what a node can do on two cores, and the drain could not have the rest.
    let (making, apart) = (plan.seconds * 12.0, Duration::from_millis(50));
    let others = Others::start();
    for round in 0..plan.rounds {
        let id = cluster.api.collection(&format!("missed-{round}")).await;
        let calm = cluster.api.collection(&format!("foreground-{round}")).await;
        let port = cluster.diptych.port;
        let mut foreground = Load::new(vec![vec![Target::new(port, &calm)]], singles(), plan.seconds * 2.0);
        foreground.pace = Some(apart);
        before.push(foreground.run(|| ()).await.writes);

        cluster.down(Side::B).await;
        let load = Load::new(vec![vec![Target::new(port, &id)]], singles(), making);
        made.push(load.run(|| ()).await.records as f64 / making);

        cluster.b.restart().await;
        let mut foreground = Load::new(vec![vec![Target::new(port, &calm)]], singles(), 90.0);
        (foreground.pace, foreground.warmup) = (Some(apart), Duration::ZERO);
        // What the proxy says of the node is watched; the load is as long as the drain and no longer.
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let load = tokio::spawn(foreground.run_until(stopped));
        let drain = watch_drain(&cluster).await;
        let _ = stop.send(());
        let sample = load.await.expect("the load ends");
        // Before the drain a node starts, which is not what is measured.
        during.push(drain.map_or(Vec::new(), |(from, to, _)| sample.writes_within(from, to)));
        drained.push(drain.map_or(f64::NAN, |(from, to, most)| most as f64 / (to - from).as_secs_f64()));
        cluster.diptych.wait_drained().await;

        // Behind the proxy's back, as its drain could at best.
        let own = cluster.b.api().collection(&format!("straight-{round}")).await;
        let load = Load::new(vec![vec![Target::new(cluster.b.port, &own)]], batches(), plan.seconds);
        straight.push(load.run(|| ()).await.records as f64 / plan.seconds);
        cluster.b.api().drop_collection(&format!("straight-{round}")).await.ok();
    }
    let mut table = Table::new(&["", "records/s"]);
    for (what, rates) in [
        ("one writer makes the backlog, a node is down", &made),
        ("drain, while one client upserts 20 records/s elsewhere", &drained),
        ("batches of 64 sent straight to that node", &straight),
    ] {
        table.row(&[what.into(), spread(rates, 0)]);
    }
    let mut latency = Table::new(&[
        "that client's upserts",
        "how many",
        "p50, ms",
        "p99 of all rounds together, ms",
        "slowest of a round, ms",
    ]);
    let percentiles = |rounds: &[Vec<f64>], percent| -> Vec<f64> {
        rounds.iter().map(|writes| percentile(writes, percent)).collect()
    };
    for (what, rounds) in [("before, both nodes up", &before), ("during the drain", &during)] {
        latency.row(&[
            what.into(),
            rounds.iter().map(Vec::len).sum::<usize>().to_string(),
            spread(&percentiles(rounds, 50.0), 1),
            format!("{:.1}", percentile(&rounds.concat(), 99.0)),
            spread(&percentiles(rounds, 100.0), 1),
        ]);
    }
    let p50 = ratios(&percentiles(&during, 50.0), &percentiles(&before, 50.0));
    // A round has fewer than a hundred: its p99 would be the slowest of them.
    let p99 = percentile(&during.concat(), 99.0) / percentile(&before.concat(), 99.0);
    let equal = cluster.assert_equal().await;
    format!(
        "{} rounds; the backlog is made for {making} s. Timed from the last moment at which everything was pending.\n\n{}\
         Drain / making: {}; drain / straight: {}.\n\n{}\
         During / before: p50 {}, p99 {p99:.2}. Records equal on both nodes afterwards: {equal}. Other programs: {:.2} \
         cores.\n",
        plan.rounds,
        table.end(),
        spread(&ratios(&drained, &made), 1),
        spread(&ratios(&drained, &straight), 2),
        latency.end(),
        spread(&p50, 2),
        others.cores()
    )
}

/// Copies the only payload row, under new ids and positions.
fn copies(journal: Journal) -> String {
    let (id, numbers) = match journal {
        Journal::Sqlite => (
            "lower(hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' || substr(hex(randomblob(2)), 2) || '-8' \
             || substr(hex(randomblob(2)), 2) || '-' || hex(randomblob(6)))",
            format!(
                "(WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < {MANY}) SELECT n FROM c)"
            ),
        ),
        Journal::Postgres => (
            "gen_random_uuid()",
            format!("(SELECT n FROM generate_series(1, {MANY}) AS n)"),
        ),
    };
    format!(
        "INSERT INTO diptych_payload_rows (id, node, generation, subject, lsn, op, refused, in_doubt, attempts, parked, \
         created_at, body_bytes, body) SELECT {id}, node, generation, subject, lsn + n, op, refused, in_doubt, attempts, \
         parked, created_at, body_bytes, body FROM diptych_payload_rows CROSS JOIN {numbers} AS numbers"
    )
}

async fn copy(journal: Journal, url: &str) {
    let insert = sqlx::AssertSqlSafe(copies(journal));
    const WHY: &str = "the log's database takes a million rows";
    match journal {
        Journal::Sqlite => {
            let mut connection = SqliteConnection::connect(url).await.expect(WHY);
            sqlx::query(insert).execute(&mut connection).await.expect(WHY);
        }
        Journal::Postgres => {
            let mut connection = PgConnection::connect(url).await.expect(WHY);
            sqlx::query(insert).execute(&mut connection).await.expect(WHY);
        }
    }
}

fn resident(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok())
        .map_or(f64::NAN, |kb| kb / 1024.0)
}

/// A million pending entries, of a node that is away.
pub async fn large(_: &Plan) -> String {
    let mut table = Table::new(&[
        "log",
        "pending",
        "start to ready, s",
        "resident, MB",
        "`/status` p50, ms",
        "p99, ms",
    ]);
    for journal in [Journal::Sqlite, Journal::Postgres] {
        let stage = stage(&format!("backlog-{journal:?}"), journal);
        let url = stage.journal_url();
        let options = Options {
            journal: Some(url.clone()),
            ..Options::default()
        };
        let mut cluster = stage.cluster_with(options).await;
        cluster.diptych.wait_drained().await;
        let id = cluster.api.collection("backlog").await;
        cluster.down(Side::B).await;
        let body = json!({"ids": ["record"], "embeddings": [[1.0, 2.0]], "documents": ["a document"]});
        cluster.api.op(&id, "upsert", &body).await.ok();
        for pending in [1, MANY + 1] {
            cluster.diptych.sigterm().await;
            if pending > 1 {
                copy(journal, &url).await;
            }
            let started = Instant::now();
            cluster.diptych.restart().await;
            let ready = started.elapsed().as_secs_f64();
            let mut times = Vec::new();
            for _ in 0..200 {
                let asked = Instant::now();
                let status = cluster.diptych.status().await;
                times.push(asked.elapsed().as_secs_f64() * 1000.0);
                assert_eq!(
                    status["instances"][1]["pending_writes"].as_u64(),
                    Some(pending),
                    "{status:#}"
                );
            }
            table.row(&[
                format!("{journal:?}"),
                pending.to_string(),
                format!("{ready:.2}"),
                format!("{:.1}", resident(cluster.diptych.pid())),
                format!("{:.2}", percentile(&times, 50.0)),
                format!("{:.2}", percentile(&times, 99.0)),
            ]);
        }
    }
    format!(
        "The rows are copies of one that the product wrote. A `/status` request includes a new connection.\n\n{}",
        table.end()
    )
}
