//! The process dies at each labelled line between two steps that belong together; afterwards nothing is lost and the
//! nodes are equal.
//!
//! `docs/schedules.md` lists, for every label, the rule that has to be off for its crash to leave something behind. Where
//! that needs more than the crash, it is staged here: a node that dies with the process, a node that was away before, an
//! update that must not be applied a second time.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use diptych::fault::POINTS;
use serde_json::json;

use crate::harness::api::Api;
use crate::harness::chroma::ChromaNode;
use crate::harness::cluster::{CHECKPOINT, Cluster, Options, Side};
use crate::harness::compare::{DEFAULT, OWN_TENANT, compare_nodes};
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
    a_panic_ends_the_process_and_the_next_one_recovers: sqlite;
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

/// Whether this label is to be tried: `DIPTYCH_TEST_POINT` names one.
fn is_wanted(label: &str) -> bool {
    std::env::var("DIPTYCH_TEST_POINT").map_or(true, |one| one == label)
}

/// Waits until the process has died at `label`, with `work` going on.
async fn dies(cluster: &mut Cluster, label: &str, work: impl AsyncFnMut()) {
    dies_by(libc::SIGKILL, cluster, label, work).await;
}

async fn dies_by(signal: i32, cluster: &mut Cluster, label: &str, mut work: impl AsyncFnMut()) {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = cluster.diptych.ended() {
            assert_eq!(status.signal(), Some(signal), "{label}: {status}");
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

/// [`arm`] for a label that may be reached before the process is ready.
fn arm_start(cluster: &mut Cluster, label: &str) {
    println!("armed: {label}");
    cluster.diptych.arm(label);
    cluster.diptych.spawn();
}

async fn nothing() {}

/// Which nodes are away when the process dies, and which when the next one starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Away {
    Nobody,
    /// A dies with the process; B goes on alone.
    First,
    /// B was away before.
    Second,
    /// B was away before, A dies with the process: what was acknowledged is on B and in its log.
    Turns,
}

impl Away {
    async fn before(self, cluster: &mut Cluster) {
        if matches!(self, Away::Second | Away::Turns) {
            cluster.down(Side::B).await;
        }
    }

    /// The process has died: starts the next one.
    async fn restart(self, cluster: &mut Cluster) {
        if matches!(self, Away::First | Away::Turns) {
            cluster.a.kill9();
        }
        if self == Away::Turns {
            cluster.b.restart().await;
        }
        cluster.diptych.restart().await;
    }

    async fn after(self, cluster: &mut Cluster) {
        match self {
            Away::Nobody => {}
            Away::First | Away::Turns => cluster.a.restart().await,
            Away::Second => cluster.b.restart().await,
        }
        cluster.diptych.wait_drained().await;
    }
}

async fn crashes_while_records_are_written(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let mut writer = Writer::new(&cluster).await;
    writer.acked(25).await;
    for label in WRITING.into_iter().filter(|label| is_wanted(label)) {
        for away in [Away::Nobody, Away::Second, Away::First, Away::Turns] {
            // A node that misses something writes no checkpoint: with B away it is A that has written one, and that has to
            // serve alone then.
            if label == "checkpoint-written" && matches!(away, Away::First | Away::Turns) {
                continue;
            }
            println!("{away:?}");
            let count = if label == "checkpoint-written" { 3 } else { 5 };
            arm(&mut cluster, &format!("{label}:{count}")).await;
            away.before(&mut cluster).await;
            dies(&mut cluster, label, async || drop(writer.write_new().await)).await;
            away.restart(&mut cluster).await;
            writer.acked(10).await;
            away.after(&mut cluster).await;
            writer.check(&cluster).await;
        }
    }
}

/// Creates, renames and deletes, and knows which names have to be there.
struct Namer {
    api: Api,
    next: u32,
    kept: Vec<String>,
    /// The record in the collection that is made anew all the time, if that was acknowledged.
    again: Option<String>,
}

const AGAIN: &str = "again";

impl Namer {
    fn new(cluster: &Cluster) -> Namer {
        Namer {
            api: Api::direct(&cluster.diptych.url()),
            next: 0,
            kept: vec![],
            again: None,
        }
    }

    async fn create(&self, name: &str, record: &str) -> Result<Option<String>, String> {
        let path = self.api.path("/collections");
        let created = self
            .api
            .try_json(http::Method::POST, &path, &json!({"name": name}))
            .await?;
        if created.status != 200 {
            return Ok(None);
        }
        let id = created.id();
        let body = json!({"ids": [record], "embeddings": [[1, 2]]});
        let added = self.api.try_op(&id, "add", &body).await?;
        Ok((added.status == 201).then_some(id))
    }

    async fn delete(&self, name: &str) -> Result<(), String> {
        let path = self.api.path(&format!("/collections/{name}"));
        self.api.try_json(http::Method::DELETE, &path, &json!({})).await?;
        Ok(())
    }

    async fn round(&mut self) -> Result<(), String> {
        self.next += 1;
        // What was deleted and made again must not be deleted again (schedule S1).
        self.again = None;
        self.delete(AGAIN).await?;
        let record = format!("x{}", self.next);
        if self.create(AGAIN, &record).await?.is_some() {
            self.again = Some(record);
        }
        let (first, second) = (format!("n{}", self.next), format!("m{}", self.next));
        let Some(id) = self.create(&first, "x").await? else {
            return Ok(());
        };
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
        self.delete(&second).await
    }

    async fn check(&self, cluster: &Cluster) {
        let dump = compare_nodes(&[&cluster.a, &cluster.b], &[DEFAULT]).await;
        let dump = dump.unwrap_or_else(|difference| panic!("the nodes differ: {difference}"));
        for name in &self.kept {
            assert_eq!(dump.collection(name).records.len(), 1, "{name}");
        }
        if let Some(record) = &self.again {
            let records = &dump.collection(AGAIN).records;
            assert_eq!(records.len(), 1, "what was made again");
            assert_eq!(records[0].id, *record);
        }
    }
}

async fn crashes_while_names_change(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let mut namer = Namer::new(&cluster);
    namer.round().await.expect("the proxy is there");
    // Delete, create, create and rename are counted.
    let deaths = [
        (4, Away::Nobody),
        (5, Away::First),
        (6, Away::Second),
        (4, Away::Second),
        (4, Away::Turns),
    ];
    for label in NAMES.into_iter().filter(|label| is_wanted(label)) {
        for (count, away) in deaths {
            println!("{away:?}");
            arm(&mut cluster, &format!("{label}:{count}")).await;
            away.before(&mut cluster).await;
            dies(&mut cluster, label, async || drop(namer.round().await)).await;
            away.restart(&mut cluster).await;
            away.after(&mut cluster).await;
            namer.check(&cluster).await;
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
    writer.acked(25).await;
    let mut namer = Namer::new(&cluster);
    namer.round().await.expect("the proxy is there");
    for (label, before) in RECOVERY.into_iter().filter(|(label, _)| is_wanted(label)) {
        // A alone has what is in doubt, and nothing else is: what is compared for another reason would hide it.
        tokio::time::sleep(CHECKPOINT).await;
        arm(&mut cluster, &format!("{before}:4")).await;
        cluster.down(Side::B).await;
        if before.starts_with("names") {
            dies(&mut cluster, before, async || drop(namer.round().await)).await;
        } else {
            dies(&mut cluster, before, async || drop(writer.write_new().await)).await;
        }
        // With A alone, which the others are made equal to then.
        arm_start(&mut cluster, label);
        if label == "records-mended" {
            cluster.b.restart().await;
        }
        dies(&mut cluster, label, nothing).await;
        let b_is_mended = label == "records-mended";
        if b_is_mended {
            // B has all of it, and a row that says it has not: it serves all the same when the row's source is gone.
            cluster.a.kill9();
        }
        cluster.diptych.restart().await;
        writer.acked(10).await;
        let returns = if b_is_mended { Side::A } else { Side::B };
        cluster.node(returns).restart().await;
        cluster.diptych.wait_drained().await;
        writer.check(&cluster).await;
        namer.check(&cluster).await;
    }
}

async fn crashes_in_the_drain(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let mut writer = Writer::new(&cluster).await;
    writer.acked(25).await;
    for label in DRAIN.into_iter().filter(|label| is_wanted(label)) {
        tokio::time::sleep(CHECKPOINT).await;
        cluster.down(Side::B).await;
        writer.acked_once_only(label).await;
        writer.acked(30).await;
        // The second request is the upsert of what the first, applied again, would update.
        let armed = match label {
            "drain-joining" => label.to_owned(),
            _ => format!("{label}:2"),
        };
        arm(&mut cluster, &armed).await;
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
    writer.acked(25).await;
    // More than a copy takes in one step.
    writer.fill(300).await;
    for label in COPY.into_iter().filter(|label| is_wanted(label)) {
        cluster.down(Side::B).await;
        // What is copied is not drained on top of it.
        writer.acked_once_only(label).await;
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
    writer.acked(25).await;
    arm(&mut cluster, LATE).await;
    writer.acked(5).await;
    let gate = cluster
        .fault(Side::B)
        .hold_answers(|seen| seen.is_record_write() && !seen.is_own());
    // The first is on its way, the others wait in the log.
    writer.acked(6).await;
    gate.release();
    dies(&mut cluster, LATE, nothing).await;
    cluster.diptych.restart().await;
    writer.acked(1).await;
    cluster.diptych.wait_drained().await;
    writer.check(&cluster).await;
}

/// Whether a node says that it was written to without the log.
async fn has_flag(node: &ChromaNode) -> Result<bool, String> {
    let own = node.api().within(OWN_TENANT, "health");
    let id = own.by_name("canary").await.ok().id();
    let answer = own.try_op(&id, "get", &json!({"ids": ["unprotected"]})).await?;
    Ok(answer.json()["ids"] == json!(["unprotected"]))
}

async fn crashes_while_the_log_is_away(stage: Stage) {
    let dir = stage.dir.clone();
    let mut postgres = tokio::task::block_in_place(|| Postgres::dedicated(&dir));
    let journal = Some(tokio::task::block_in_place(|| postgres.create_database("journal")));
    let options = Options {
        journal,
        ..Options::faults()
    };
    let mut cluster = stage.cluster_with(options).await;
    let mut writer = Writer::new(&cluster).await;
    writer.acked(25).await;
    for label in WITHOUT_LOG.into_iter().filter(|label| is_wanted(label)) {
        if label == "unprotected-covered" {
            cluster.diptych.wait_drained().await;
        } else {
            arm(&mut cluster, label).await;
            // Without the log, writes go on only where every node is in step.
            cluster.diptych.wait_drained().await;
        }
        tokio::task::block_in_place(|| postgres.kill9());
        match label {
            "flag-set" => {
                dies(&mut cluster, label, async || drop(writer.write().await)).await;
                tokio::task::block_in_place(|| postgres.start());
            }
            "unprotected-covered" => {
                writer.acked(10).await;
                // One node gets a write and the other does not, and nobody is left who knows (schedule S19).
                cluster
                    .fault(Side::B)
                    .close_unsent(1, |seen| seen.is_record_write() && !seen.is_own());
                assert_ne!(writer.write().await, Ok(200));
                cluster.diptych.kill9();
                tokio::task::block_in_place(|| postgres.start());
                arm_start(&mut cluster, label);
                dies(&mut cluster, label, nothing).await;
            }
            _ => {
                writer.acked(10).await;
                tokio::task::block_in_place(|| postgres.start());
                dies(&mut cluster, label, nothing).await;
            }
        }
        cluster.diptych.restart().await;
        writer.acked(1).await;
        let admin = cluster.diptych.admin();
        let nodes = [&cluster.a, &cluster.b];
        eventually(PATIENCE, "all is covered again", || async {
            for node in nodes {
                if has_flag(node).await? {
                    return Err(format!("{} carries the flag", node.name));
                }
            }
            let status = admin.try_get("/status").await?.json();
            let done = status["wal"]["unprotected"] == false && status["total_repairs"] == 0;
            if done { Ok(()) } else { Err(format!("{status:#}")) }
        })
        .await;
        cluster.diptych.wait_drained().await;
        writer.check(&cluster).await;
    }
}

/// A lane whose task is gone would stand for ever, with one node ahead of the other.
async fn a_panic_ends_the_process_and_the_next_one_recovers(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let mut writer = Writer::new(&cluster).await;
    writer.acked(25).await;
    for label in ["nodes-answered", "drain-answered"] {
        arm(&mut cluster, &format!("{label}:3!")).await;
        cluster.down(Side::B).await;
        if label == "nodes-answered" {
            dies_by(libc::SIGABRT, &mut cluster, label, async || {
                // A client whose write is lost gets no answer while the process lives.
                drop(tokio::time::timeout(Duration::from_secs(5), writer.write_new()).await);
            })
            .await;
        } else {
            writer.acked(60).await;
            cluster.b.restart().await;
            dies_by(libc::SIGABRT, &mut cluster, label, nothing).await;
        }
        cluster.diptych.restart().await;
        writer.acked(10).await;
        if label == "nodes-answered" {
            cluster.b.restart().await;
        }
        cluster.diptych.wait_drained().await;
        writer.check(&cluster).await;
    }
}
