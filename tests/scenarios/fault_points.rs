//! The process dies at each labelled line between two steps that belong together; afterwards nothing is lost and the
//! nodes are equal.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use diptych::fault::POINTS;
use serde_json::json;

use crate::harness::api::Api;
use crate::harness::cluster::{Cluster, Options, Side};
use crate::harness::compare::{DEFAULT, compare_nodes};
use crate::harness::postgres::Postgres;
use crate::harness::writer::{PATIENCE, Writer};
use crate::harness::{Stage, eventually, scenarios};

scenarios! {
    crashes_while_records_are_written: sqlite, postgres;
    crashes_while_names_change: sqlite, postgres;
    crashes_in_a_recovery: sqlite, postgres;
    crashes_in_the_drain: sqlite, postgres;
    crashes_while_a_node_is_copied_to: sqlite, postgres;
    a_crash_at_a_late_answer: sqlite;
    crashes_while_the_log_is_away: postgres;
}

const WRITING: [&str; 4] = ["intent-logged", "nodes-answered", "entry-covered", "checkpoint-written"];
const NAMES: [&str; 3] = ["names-intended", "names-answered", "names-covered"];
/// Reached after a crash at the second.
const RECOVERY: [(&str, &str); 4] = [
    ("recovery-flushed", "nodes-answered"),
    ("recovery-committed", "nodes-answered"),
    ("records-mended", "nodes-answered"),
    ("names-inspected", "names-answered"),
];
const DRAIN: [&str; 3] = ["drain-answered", "drain-committed", "drain-joining"];
const COPY: [&str; 5] = [
    "marker-written",
    "copy-created",
    "copy-under-way",
    "copy-complete",
    "copy-committed",
];
const LATE: &str = "late-answer";
const WITHOUT_LOG: [&str; 3] = ["flag-set", "unprotected-covered", "flag-clearing"];

#[test]
fn every_fault_point_has_a_crash() {
    let tested: BTreeSet<&str> = WRITING
        .into_iter()
        .chain(NAMES)
        .chain(RECOVERY.map(|(label, _)| label))
        .chain(DRAIN)
        .chain(COPY)
        .chain([LATE])
        .chain(WITHOUT_LOG)
        .collect();
    assert_eq!(tested, POINTS.iter().map(|(label, _)| *label).collect());
}

/// Waits until the process has died at `label`, with `work` going on.
async fn dies(cluster: &mut Cluster, label: &str, mut work: impl AsyncFnMut()) {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = cluster.diptych.ended() {
            assert_eq!(status.signal(), Some(libc::SIGKILL), "{label}: {status}");
            let log = std::fs::read_to_string(cluster.diptych.log()).expect("a log");
            let last = log.lines().rev().find(|line| line.starts_with("Fault point "));
            assert_eq!(last, Some(format!("Fault point {label}.").as_str()));
            return;
        }
        assert!(Instant::now() < end, "the process never came to {label}");
        work().await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Starts a process that is going to die at `label`.
async fn arm(cluster: &mut Cluster, label: &str) {
    println!("armed: {label}");
    cluster.diptych.kill9();
    cluster.diptych.arm(label);
    cluster.diptych.restart().await;
}

async fn nothing() {}

async fn crashes_while_records_are_written(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let mut writer = Writer::new(&cluster).await;
    for label in WRITING {
        for b_is_down in [false, true] {
            // A node that misses something writes no checkpoint.
            if b_is_down && label == "checkpoint-written" {
                continue;
            }
            arm(&mut cluster, &format!("{label}:5")).await;
            if b_is_down {
                cluster.down(Side::B).await;
            }
            dies(&mut cluster, label, async || drop(writer.write().await)).await;
            cluster.diptych.restart().await;
            writer.acked(10).await;
            if b_is_down {
                cluster.b.restart().await;
            }
            cluster.diptych.wait_drained().await;
            writer.check(&cluster).await;
        }
    }
}

/// Creates, renames and deletes, and knows which names have to be there.
struct Namer {
    api: Api,
    next: u32,
    kept: Vec<String>,
}

impl Namer {
    async fn round(&mut self) -> Result<(), String> {
        self.next += 1;
        let (first, second) = (format!("n{}", self.next), format!("m{}", self.next));
        let path = self.api.path("/collections");
        let created = self
            .api
            .try_json(http::Method::POST, &path, &json!({"name": first}))
            .await?;
        if created.status != 200 {
            return Ok(());
        }
        let id = created.id();
        let body = json!({"ids": ["x"], "embeddings": [[1, 2]]});
        self.api.try_op(&id, "add", &body).await?;
        let path = self.api.path(&format!("/collections/{id}"));
        let renamed = self
            .api
            .try_json(http::Method::PUT, &path, &json!({"new_name": second}))
            .await?;
        if renamed.status != 200 {
            return Ok(());
        }
        if self.next.is_multiple_of(2) {
            self.kept.push(second);
            return Ok(());
        }
        let path = self.api.path(&format!("/collections/{second}"));
        self.api.try_json(http::Method::DELETE, &path, &json!({})).await?;
        Ok(())
    }

    async fn check(&self, cluster: &Cluster) {
        let dump = compare_nodes(&[&cluster.a, &cluster.b], &[DEFAULT]).await;
        let dump = dump.unwrap_or_else(|difference| panic!("the nodes differ: {difference}"));
        for name in &self.kept {
            assert_eq!(dump.collection(name).records.len(), 1, "{name}");
        }
    }
}

async fn crashes_while_names_change(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let mut namer = Namer {
        api: Api::direct(&cluster.diptych.url()),
        next: 0,
        kept: vec![],
    };
    for label in NAMES {
        // Each of create, rename and delete is the one that dies.
        for count in 4..7 {
            let b_is_down = count == 6;
            arm(&mut cluster, &format!("{label}:{count}")).await;
            if b_is_down {
                cluster.down(Side::B).await;
            }
            dies(&mut cluster, label, async || drop(namer.round().await)).await;
            cluster.diptych.restart().await;
            if b_is_down {
                cluster.b.restart().await;
            }
            cluster.diptych.wait_drained().await;
            let kept = namer.kept.len();
            let end = Instant::now() + PATIENCE;
            while namer.kept.len() < kept + 2 {
                namer.round().await.expect("the proxy is there");
                assert!(Instant::now() < end, "names cannot be changed");
            }
            cluster.diptych.wait_drained().await;
            namer.check(&cluster).await;
        }
    }
}

async fn crashes_in_a_recovery(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let mut writer = Writer::new(&cluster).await;
    let mut namer = Namer {
        api: Api::direct(&cluster.diptych.url()),
        next: 0,
        kept: vec![],
    };
    for (label, before) in RECOVERY {
        arm(&mut cluster, &format!("{before}:3")).await;
        if before.starts_with("names") {
            dies(&mut cluster, before, async || drop(namer.round().await)).await;
        } else {
            dies(&mut cluster, before, async || drop(writer.write().await)).await;
        }
        println!("armed: {label}");
        cluster.diptych.arm(label);
        cluster.diptych.spawn();
        dies(&mut cluster, label, nothing).await;
        cluster.diptych.restart().await;
        writer.acked(10).await;
        cluster.diptych.wait_drained().await;
        writer.check(&cluster).await;
        namer.check(&cluster).await;
    }
}

async fn crashes_in_the_drain(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let mut writer = Writer::new(&cluster).await;
    for label in DRAIN {
        cluster.down(Side::B).await;
        writer.acked(30).await;
        arm(&mut cluster, label).await;
        cluster.b.restart().await;
        dies(&mut cluster, label, nothing).await;
        cluster.diptych.restart().await;
        writer.acked(10).await;
        cluster.diptych.wait_drained().await;
        writer.check(&cluster).await;
    }
}

async fn crashes_while_a_node_is_copied_to(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let mut writer = Writer::new(&cluster).await;
    writer.acked(40).await;
    for label in COPY {
        cluster.down(Side::B).await;
        cluster.b.wipe();
        arm(&mut cluster, label).await;
        cluster.b.restart().await;
        dies(&mut cluster, label, async || drop(writer.write().await)).await;
        cluster.diptych.restart().await;
        writer.acked(10).await;
        cluster.diptych.wait_drained().await;
        writer.check(&cluster).await;
    }
}

async fn a_crash_at_a_late_answer(stage: Stage) {
    let options = Options::faults().extra("writes: { mirror_grace: 200ms }");
    let mut cluster = stage.cluster_with(options).await;
    let mut writer = Writer::new(&cluster).await;
    writer.acked(20).await;
    arm(&mut cluster, LATE).await;
    writer.acked(5).await;
    let gate = cluster
        .fault(Side::B)
        .hold_answers(|seen| seen.is_record_write() && !seen.is_own());
    writer.acked(1).await;
    gate.release();
    dies(&mut cluster, LATE, nothing).await;
    cluster.diptych.restart().await;
    writer.acked(10).await;
    cluster.diptych.wait_drained().await;
    writer.check(&cluster).await;
}

async fn crashes_while_the_log_is_away(stage: Stage) {
    let dir = stage.dir.clone();
    let mut postgres = tokio::task::block_in_place(|| Postgres::dedicated(&dir));
    let journal = Some(tokio::task::block_in_place(|| postgres.create_database("journal")));
    let options = Options {
        journal,
        ..Options::default()
    };
    let mut cluster = stage.cluster_with(options).await;
    let mut writer = Writer::new(&cluster).await;
    writer.acked(20).await;
    for label in WITHOUT_LOG {
        arm(&mut cluster, label).await;
        // Without the log, writes go on only where every node is in step.
        cluster.diptych.wait_drained().await;
        tokio::task::block_in_place(|| postgres.kill9());
        if label == "flag-set" {
            dies(&mut cluster, label, async || drop(writer.write().await)).await;
            tokio::task::block_in_place(|| postgres.start());
        } else {
            writer.acked(10).await;
            tokio::task::block_in_place(|| postgres.start());
            dies(&mut cluster, label, nothing).await;
        }
        cluster.diptych.restart().await;
        writer.acked(10).await;
        let admin = cluster.diptych.admin();
        eventually(PATIENCE, "all is covered again", || async {
            let status = admin.try_get("/status").await?.json();
            let done = status["wal"]["unprotected"] == false && status["total_repairs"] == 0;
            if done { Ok(()) } else { Err(format!("{status:#}")) }
        })
        .await;
        cluster.diptych.wait_drained().await;
        writer.check(&cluster).await;
    }
}
