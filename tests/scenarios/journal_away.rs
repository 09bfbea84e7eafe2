//! The journal is away, hangs, or is full; the proxy is started without it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::api::Api;
use crate::harness::cluster::{Cluster, Options, Side};
use crate::harness::compare::{DEFAULT, compare_nodes};
use crate::harness::load::Load;
use crate::harness::postgres::Postgres;
use crate::harness::writer::{PATIENCE, Writer};
use crate::harness::{Stage, eventually, scenarios};

scenarios! {
    s8_a_start_without_the_journal_serves_nothing: postgres;
    s19_what_was_written_without_the_log_is_compared: postgres;
    s29_nothing_is_accepted_while_no_node_is_up: sqlite, postgres;
    a_journal_that_hangs_or_dies_acknowledges_nothing_falsely: postgres;
    postgres_is_killed_under_load: postgres;
    the_log_is_dropped_at_its_limit_and_the_node_is_copied: sqlite;
}

const WRITERS: usize = 4;
const READERS: usize = 4;

/// More keys of `wal`, behind its `url`.
fn wal(journal: &str, more: &str) -> Option<String> {
    // What the harness puts between quotes ends here and begins again.
    Some(format!("{journal}\"\n  {more}\n  max_connections: 4 # \""))
}

async fn with_postgres(stage: &Stage) -> (Postgres, Cluster) {
    let dir = stage.dir.clone();
    let postgres = tokio::task::block_in_place(|| Postgres::dedicated(&dir));
    let journal = Some(tokio::task::block_in_place(|| postgres.create_database("journal")));
    let options = Options {
        journal,
        ..Options::default()
    };
    let cluster = stage.cluster_with(options).await;
    (postgres, cluster)
}

async fn is_covered(cluster: &Cluster) {
    let admin = cluster.diptych.admin();
    eventually(PATIENCE, "all is covered again", || async {
        let status = admin.try_get("/status").await?.json();
        let done = status["wal"]["unprotected"] == false && status["wal"]["available"] == true;
        if done { Ok(()) } else { Err(format!("{status:#}")) }
    })
    .await;
    cluster.diptych.wait_drained().await;
}

/// A is behind, which only the journal knows; the proxy restarts while the journal is away. It must not lead with A.
async fn s8_a_start_without_the_journal_serves_nothing(stage: Stage) {
    let (mut postgres, mut cluster) = with_postgres(&stage).await;
    let mut writer = Writer::new(&cluster).await;
    writer.acked(20).await;
    cluster.diptych.wait_drained().await;
    cluster.down(Side::A).await;
    writer.acked(20).await;
    cluster.diptych.kill9();
    tokio::task::block_in_place(|| postgres.kill9());
    cluster.a.restart().await;
    cluster.diptych.spawn();
    let api = Api::direct(&cluster.diptych.url());
    let end = Instant::now() + Duration::from_secs(8);
    while Instant::now() < end {
        let read = api.try_op(&writer.id, "get", &json!({"ids": ["r1"]})).await;
        assert!(read.is_err(), "nobody can know which node has everything: {read:?}");
        assert!(writer.write().await.is_err());
        assert!(cluster.diptych.ended().is_none(), "it waits for the journal");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    tokio::task::block_in_place(|| postgres.start());
    eventually(PATIENCE, "the proxy serves", || async {
        api.try_op(&writer.id, "get", &json!({"ids": ["r1"]})).await.map(drop)
    })
    .await;
    for _ in 0..50 {
        for (record, acked) in &writer.acked {
            let read = api
                .op(&writer.id, "get", &json!({"ids": [record], "include": ["metadatas"]}))
                .await;
            if read.status == 503 {
                continue;
            }
            assert_eq!(read.ok().json()["metadatas"][0]["n"], json!(acked), "{record}");
        }
    }
    cluster.diptych.wait_drained().await;
    writer.acked(10).await;
    writer.check(&cluster).await;
}

/// The proxy and a node are killed while writes go on without the log.
async fn s19_what_was_written_without_the_log_is_compared(stage: Stage) {
    let (mut postgres, mut cluster) = with_postgres(&stage).await;
    let mut writer = Writer::new(&cluster).await;
    for round in 0..3 {
        writer.acked(20).await;
        cluster.diptych.wait_drained().await;
        tokio::task::block_in_place(|| postgres.kill9());
        writer.acked(20).await;
        let status = cluster.diptych.status().await;
        assert_eq!(status["wal"]["unprotected"], true, "{status:#}");
        assert_eq!(
            cluster.diptych.admin().get_path("/health").await.json()["status"],
            "degraded"
        );
        let create = cluster.api.create_collection("not-now", json!({})).await;
        assert_eq!(create.status, 503, "names do not change without the log");
        if round == 1 {
            // One node gets a write and the other does not, and nobody is left who knows.
            cluster.b.sigstop();
            let write = writer.write();
            let _ = tokio::time::timeout(Duration::from_millis(300), write).await;
            cluster.diptych.kill9();
            cluster.b.kill9();
            cluster.b.restart().await;
            tokio::task::block_in_place(|| postgres.start());
            cluster.diptych.restart().await;
        } else {
            tokio::task::block_in_place(|| postgres.start());
        }
        is_covered(&cluster).await;
        writer.acked(10).await;
        cluster.diptych.wait_drained().await;
        writer.check(&cluster).await;
    }
    let metrics = cluster.diptych.admin().get_path("/metrics").await.text();
    let line = metrics
        .lines()
        .find(|line| line.starts_with("diptych_unprotected_seconds_total "));
    let seconds: f64 = line
        .and_then(|line| line.split(' ').nth(1)?.parse().ok())
        .expect("a number");
    assert!(seconds > 0.0, "{line:?}");
}

/// `payload: always` would allow to accept them; we do not.
async fn s29_nothing_is_accepted_while_no_node_is_up(stage: Stage) {
    let options = Options {
        journal: wal(&stage.journal_url(), "payload: always"),
        ..Options::default()
    };
    let mut cluster = stage.cluster_with(options).await;
    let mut writer = Writer::new(&cluster).await;
    writer.acked(20).await;
    cluster.diptych.wait_drained().await;
    cluster.down(Side::B).await;
    cluster.a.kill9();
    // Health keeps the last node up until a request cannot connect.
    let mut refused = BTreeSet::new();
    for _ in 0..20 {
        match writer.write().await.expect("an answer") {
            503 => {
                refused.insert(writer.next);
            }
            // On a connection from before: nobody knows, until both nodes are back.
            504 => {}
            other => panic!("{other}"),
        }
    }
    assert!(refused.len() >= 15, "{refused:?}");
    cluster.a.restart().await;
    cluster.up(Side::B).await;
    let body = json!({"include": ["metadatas"]});
    let read = cluster.api.op(&writer.id, "get", &body).await.ok().json();
    for metadata in read["metadatas"].as_array().expect("a list") {
        let n = metadata["n"].as_u64().expect("a number");
        assert!(!refused.contains(&n), "{n} was refused, and is there");
    }
    writer.acked(10).await;
    writer.check(&cluster).await;
}

async fn a_journal_that_hangs_or_dies_acknowledges_nothing_falsely(stage: Stage) {
    let (mut postgres, mut cluster) = with_postgres(&stage).await;
    let mut writer = Writer::new(&cluster).await;
    for (hangs, b_is_down) in [(true, false), (true, true), (false, true)] {
        writer.acked(20).await;
        cluster.diptych.wait_drained().await;
        if b_is_down {
            cluster.down(Side::B).await;
            writer.acked(10).await;
        }
        tokio::task::block_in_place(|| if hangs { postgres.freeze(true) } else { postgres.kill9() });
        let before = writer.acked.clone();
        let end = Instant::now() + Duration::from_secs(10);
        let mut refused = 0;
        while Instant::now() < end {
            let status = writer.write().await.expect("an answer");
            assert!([200, 503].contains(&status), "{status}");
            refused += usize::from(status == 503);
        }
        if b_is_down {
            assert_eq!(
                writer.acked, before,
                "what B misses cannot be kept, so nothing is acknowledged"
            );
            assert!(refused > 0);
        }
        tokio::task::block_in_place(|| {
            if hangs {
                postgres.freeze(false)
            } else {
                postgres.start()
            }
        });
        if b_is_down {
            // And the proxy forgets what it had in mind to write.
            cluster.diptych.kill9();
            cluster.b.restart().await;
            cluster.diptych.restart().await;
        }
        is_covered(&cluster).await;
        writer.acked(10).await;
        cluster.diptych.wait_drained().await;
        writer.check(&cluster).await;
    }
}

async fn the_log_is_dropped_at_its_limit_and_the_node_is_copied(stage: Stage) {
    let options = Options {
        journal: wal(&stage.journal_url(), "max_bytes: 64KiB"),
        ..Options::default()
    };
    let options = options.extra("writes: { max_body: 64KiB }");
    let mut cluster = stage.cluster_with(options).await;
    let mut writer = Writer::new(&cluster).await;
    writer.acked(20).await;
    let small = cluster.api.collection("small").await;
    cluster.down(Side::B).await;
    let one = json!({"ids": ["s"], "embeddings": [[1, 2]]});
    cluster.api.op(&small, "upsert", &one).await.ok();
    let large = json!({"ids": ["big"], "embeddings": [[1, 2]], "documents": ["d".repeat(20_000)]});
    for _ in 0..4 {
        cluster.api.op(&writer.id, "upsert", &large).await.ok();
    }
    cluster
        .diptych
        .wait_status("the log is dropped", |status| {
            let whole = status["repairs_by_kind"]["whole"] == 1;
            let pending = status["wal"]["pending_bytes"].as_u64().unwrap_or(u64::MAX);
            if whole && pending < 1000 {
                Ok(())
            } else {
                Err(format!("{pending} bytes"))
            }
        })
        .await;
    // The other collection's entry is still in the log.
    assert_eq!(cluster.diptych.status().await["wal"]["pending_writes"], 1);
    let gone = json!({"ids": ["big"]});
    cluster.api.op(&writer.id, "delete", &gone).await.ok();
    writer.acked(10).await;
    cluster.up(Side::B).await;
    writer.check(&cluster).await;
}

/// With both nodes up nobody notices that Postgres is gone. With one node down writes are refused, and say so, until it
/// is back; reads go on.
async fn postgres_is_killed_under_load(stage: Stage) {
    let (mut postgres, mut cluster) = with_postgres(&stage).await;
    for (round, b_is_down) in [false, true, false, true].into_iter().enumerate() {
        let name = format!("under-load-{round}");
        let created = cluster.api.create_collection(&name, json!({})).await.ok().json();
        let id = created["id"].as_str().expect("an id");
        let load = Load::start(
            &cluster.api,
            id,
            WRITERS,
            READERS,
            stage.seed.wrapping_add(round as u64),
        );
        load.wait_writes(40).await;
        if b_is_down {
            cluster.down(Side::B).await;
            load.wait_writes(40).await;
        }
        tokio::task::block_in_place(|| postgres.kill9());
        if b_is_down {
            load.wait_errors(20).await;
            load.wait_reads(100).await;
        } else {
            load.wait_writes(100).await;
        }
        tokio::task::block_in_place(|| postgres.start());
        load.wait_writes(40).await;
        let report = load.stop().await;
        let mut kinds = BTreeMap::<&str, usize>::new();
        for error in &report.errors {
            let kind = ["-> 503", "-> 504"].into_iter().find(|kind| error.contains(kind));
            *kinds.entry(kind.unwrap_or(error)).or_default() += 1;
        }
        println!(
            "one node down: {b_is_down}; {} writes, {} reads, errors {kinds:?}",
            report.writes, report.reads
        );
        if b_is_down {
            let reads_fail = |error: &&String| error.contains(": get ") || error.contains(": query ");
            let failed: Vec<_> = report.errors.iter().filter(reads_fail).collect();
            assert!(failed.is_empty(), "{failed:#?}");
            assert!(kinds.keys().all(|kind| *kind == "-> 503"), "{kinds:#?}");
            cluster.up(Side::B).await;
        } else {
            report.assert_clean();
        }
        is_covered(&cluster).await;
        let dump = compare_nodes(&[&cluster.a, &cluster.b], &[DEFAULT]).await;
        let dump = dump.expect("equal nodes");
        report.assert_present(dump.collection(&name));
    }
}
