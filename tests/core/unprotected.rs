//! Writes while the journal is away: a flag on every node first, what was written is compared afterwards.

use diptych::cluster::NodeIndex;
use diptych::config::WhenUnavailable;
use diptych::journal::RepairKind;
use diptych::mirror::keep_unprotected;

use crate::fakes::{A, ALWAYS, B, DISK_FULL, Stage, rows, seconds, text};

async fn is_flagged(stage: &Stage, node: NodeIndex) -> bool {
    stage.core.cluster.node(node).has_flag().await.expect("an answer")
}

/// The journal does not answer, and that is known.
async fn lose_journal(stage: &Stage) {
    stage.journal.set_down(true);
    stage
        .eventually("the journal is known to be away", || !stage.core.log.is_available())
        .await;
}

fn keep(stage: &Stage) {
    tokio::spawn(keep_unprotected(stage.core.clone()));
    stage.heal();
}

/// The proxy is killed while the journal is away; a new one finds it back.
async fn killed(stage: &Stage) -> Stage {
    stage.journal.set_down(false);
    let next = Stage::over(191, stage.nodes.clone(), stage.journal.clone(), |_| {}).await;
    keep(&next);
    next
}

async fn mended(stage: &Stage) {
    stage
        .eventually("all is covered again", || {
            !stage.core.unprotected.is_open() && stage.journal.repairs().is_empty()
        })
        .await;
    // The flags go right after.
    seconds(5).await;
    assert!(!is_flagged(stage, A).await && !is_flagged(stage, B).await);
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn every_node_carries_the_flag_before_the_first_write_is_sent() {
    let stage = Stage::new(190).await;
    let (c, d) = (stage.create("c").await, stage.create("d").await);
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    assert!(!is_flagged(&stage, A).await, "not while the journal answers");
    lose_journal(&stage).await;
    // B is gone and nobody knows it yet: it cannot be told, so nothing is sent to anyone.
    stage.nodes[B].set_down(true);
    let answer = stage.upsert(&c, "x", 2).await;
    assert_eq!(answer.status, 503, "{}", text(&answer));
    assert_eq!(stage.documents(A, "c"), [("x".to_owned(), "w1".to_owned())]);
    // Who it is cannot be told without the journal.
    stage.journal.set_down(false);
    stage.up(B).await;
    lose_journal(&stage).await;

    stage.nodes.iter().for_each(|node| node.forget_requests());
    assert_eq!(stage.upsert(&c, "x", 3).await.status, 200);
    assert_eq!(stage.upsert(&d, "y", 4).await.status, 200);
    for node in &stage.nodes {
        let flags = node.trace().iter().filter(|&what| what == "canary").count();
        assert_eq!(flags, 1, "set once: {:?}", node.trace());
        assert_eq!(node.trace()[0], "canary", "and first");
    }
    assert!(is_flagged(&stage, A).await && is_flagged(&stage, B).await);
    assert!(stage.core.unprotected.is_open());
}

#[tokio::test(start_paused = true)]
async fn what_was_written_meanwhile_is_compared_when_the_journal_is_back() {
    let stage = Stage::new(192).await;
    let (c, d) = (stage.create("c").await, stage.create("d").await);
    tokio::spawn(keep_unprotected(stage.core.clone()));
    lose_journal(&stage).await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    assert_eq!(stage.upsert(&c, "y", 2).await.status, 200);
    seconds(30).await;
    stage.journal.set_down(false);
    stage
        .eventually("repair rows", || !stage.journal.repairs().is_empty())
        .await;
    let repairs = stage.journal.repairs();
    assert_eq!(repairs.len(), 1, "{repairs:?}");
    let row = &repairs[0];
    assert_eq!(
        (row.node.as_str(), row.source.as_deref(), row.kind),
        ("b", Some("a"), RepairKind::Records)
    );
    assert_eq!((row.generation, row.reversible), (Some(c.generation), true));
    assert_eq!(row.ids, Some(vec!["x".to_owned(), "y".to_owned()]));
    assert_eq!(stage.usable(&d), [A, B], "what was not written is not concerned");
    seconds(30).await;
    assert!(is_flagged(&stage, A).await, "not before it is compared");
    stage.heal();
    mended(&stage).await;
    let time = stage.core.unprotected.time(stage.core.env.now()).as_secs();
    assert!((60..70).contains(&time), "{time}");
}

/// S19: A took the write, B did not, the row cannot be written; then the proxy is killed.
#[tokio::test(start_paused = true)]
async fn s19_a_difference_that_nobody_could_log_is_mended_after_a_kill() {
    let stage = Stage::new(193).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    lose_journal(&stage).await;
    assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
    stage.b().fault("\"w3\"", ALWAYS, DISK_FULL);
    // A record that no intent speaks of.
    let answer = stage.upsert(&c, "y", 3).await;
    assert_eq!(answer.status, 503, "{}", text(&answer));
    assert_ne!(stage.documents(A, "c"), stage.documents(B, "c"));
    assert_eq!(stage.journal.rows(), rows(&[]), "nothing speaks of it");
    assert_eq!(
        stage.upsert(&c, "x", 4).await.status,
        503,
        "not before it can be covered"
    );

    stage.b().heal();
    let next = killed(&stage).await;
    next.up(A).await;
    next.up(B).await;
    mended(&next).await;
    assert!(next.core.unprotected.time(next.core.env.now()).as_secs() < 60);
}

/// The flag on one node is enough, whichever comes up first.
#[tokio::test(start_paused = true)]
async fn a_flag_of_a_node_that_comes_late_is_found_too() {
    let stage = Stage::new(194).await;
    let c = stage.create("c").await;
    lose_journal(&stage).await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.b().fault("\"w2\"", ALWAYS, DISK_FULL);
    assert_eq!(stage.upsert(&c, "x", 2).await.status, 503);
    stage.core.cluster.node(A).clear_flag().await.expect("cleared");
    stage.b().heal();
    stage.nodes[B].set_down(true);
    let next = killed(&stage).await;
    next.up(A).await;
    seconds(60).await;
    assert_eq!(next.upsert(&next.find("c"), "z", 5).await.status, 200);
    next.up(B).await;
    mended(&next).await;
}

#[tokio::test(start_paused = true)]
async fn a_journal_that_comes_and_goes_leaves_nothing_uncovered() {
    let stage = Stage::new(195).await;
    let c = stage.create("c").await;
    keep(&stage);
    for round in 0..5 {
        lose_journal(&stage).await;
        assert_eq!(stage.upsert(&c, "x", round).await.status, 200);
        stage.journal.set_down(false);
        // Sometimes it is gone again in the middle of the comparison.
        seconds(round % 3).await;
    }
    mended(&stage).await;
}

#[tokio::test(start_paused = true)]
async fn writes_are_refused_without_the_journal_if_that_is_what_was_asked_for() {
    let stage = Stage::with(196, |settings| settings.when_unavailable = WhenUnavailable::Refuse).await;
    let c = stage.create("c").await;
    lose_journal(&stage).await;
    stage.nodes.iter().for_each(|node| node.forget_requests());
    let answer = stage.upsert(&c, "x", 1).await;
    assert_eq!(answer.status, 503);
    assert!(text(&answer).contains("wal.when_unavailable"), "{}", text(&answer));
    for node in &stage.nodes {
        assert_eq!(node.trace(), [""; 0]);
    }
    stage.journal.set_down(false);
    stage
        .eventually("the journal answers again", || stage.core.log.is_available())
        .await;
    assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
    assert!(!is_flagged(&stage, A).await);
}

#[tokio::test(start_paused = true)]
async fn more_records_than_are_remembered_become_a_whole_comparison() {
    let stage = Stage::new(197).await;
    let c = stage.create("c").await;
    tokio::spawn(keep_unprotected(stage.core.clone()));
    lose_journal(&stage).await;
    for part in 0..11 {
        let ids: Vec<String> = (0..1000).map(|n| format!("{part}-{n}")).collect();
        let embeddings: Vec<_> = ids.iter().map(|_| [1, 1]).collect();
        let body = serde_json::json!({"ids": ids, "embeddings": embeddings});
        let kind = diptych::chroma::RecordWrite::Upsert;
        assert_eq!(stage.write(&c, kind, body).await.status, 200);
    }
    stage.journal.set_down(false);
    stage
        .eventually("repair rows", || !stage.journal.repairs().is_empty())
        .await;
    assert_eq!(stage.journal.repairs()[0].kind, RepairKind::Whole);
    stage.heal();
    mended(&stage).await;
}
