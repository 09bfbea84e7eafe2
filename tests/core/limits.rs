//! The log has a limit per node (rule R2).

use std::time::Duration;

use diptych::chroma::RecordWrite;
use diptych::drain::keep_limits;
use diptych::journal::RepairKind;
use diptych::mirror::Settings;
use serde_json::json;

use crate::fakes::{A, ALWAYS, B, Fault, Stage, rows, seconds, text};

const BROKEN: Fault = Fault::Answer(500, r#"{"error":"InternalError","message":"Error loading hnsw index"}"#);

async fn limited(seed: u64, change: impl FnOnce(&mut Settings)) -> Stage {
    let stage = Stage::with(seed, change).await;
    tokio::spawn(keep_limits(stage.core.clone()));
    stage
}

/// A record of about so many bytes.
async fn write_big(stage: &Stage, name: &str, id: &str, bytes: usize) -> u16 {
    let body = json!({"ids": [id], "embeddings": [[1, 2]], "documents": ["d".repeat(bytes)]});
    stage.write(&stage.find(name), RecordWrite::Upsert, body).await.status
}

fn dropped(stage: &Stage, name: &str) -> bool {
    let generation = Some(stage.find(name).generation);
    let copy = |row: &diptych::journal::RepairRow| row.generation == generation && row.kind == RepairKind::Whole;
    stage.journal.repairs().iter().any(copy)
        && stage
            .journal
            .payloads_of("b")
            .iter()
            .all(|row| row.generation != generation)
}

#[tokio::test(start_paused = true)]
async fn the_largest_collection_is_left_to_a_copy() {
    let stage = limited(301, |settings| settings.log_bytes = 10_000).await;
    for name in ["large", "small"] {
        stage.create(name).await;
    }
    stage.down(B);
    assert_eq!(write_big(&stage, "small", "x", 2000).await, 200);
    for id in ["p", "q", "r"] {
        assert_eq!(write_big(&stage, "large", id, 2000).await, 200);
    }
    seconds(10).await;
    assert_eq!(stage.journal.repairs(), vec![], "it fits");
    assert_eq!(write_big(&stage, "large", "s", 2000).await, 200);
    stage.eventually("it is dropped", || dropped(&stage, "large")).await;
    assert!(!dropped(&stage, "small"));
    assert_eq!(stage.journal.payloads_of("b").len(), 1);
    assert_eq!(stage.usable(&stage.find("large")), [A]);
    // What is written from here on is kept again.
    assert_eq!(write_big(&stage, "large", "t", 2000).await, 200);
    assert_eq!(stage.journal.payloads_of("b").len(), 2);
    stage.heal();
    stage.up(B).await;
    stage
        .eventually("all is equal", || stage.journal.repairs().is_empty())
        .await;
    stage.drained().await;
    stage.assert_converged();
}

/// R2: what only the log has is never dropped.
#[tokio::test(start_paused = true)]
async fn what_no_other_node_can_give_stays_and_new_writes_are_refused() {
    let stage = limited(302, |settings| settings.log_bytes = 10_000).await;
    for name in ["large", "small"] {
        stage.create(name).await;
    }
    stage.down(B);
    // A takes writes and cannot read them back.
    stage.a().fault("embeddings\",\"metadatas", ALWAYS, BROKEN);
    for n in 0..6 {
        assert_eq!(write_big(&stage, "large", &n.to_string(), 2000).await, 200);
    }
    let large = stage.find("large");
    stage
        .eventually("it is over its limit", || large.pairs[B].is_over_limit())
        .await;
    let answer = stage.upsert(&large, "x", 1).await;
    assert_eq!(answer.status, 503);
    assert!(text(&answer).contains("wal.max_bytes"), "{}", text(&answer));
    assert_eq!(
        stage.upsert(&stage.find("small"), "y", 2).await.status,
        200,
        "others are not concerned"
    );
    seconds(300).await;
    assert_eq!(stage.journal.payloads_of("b").len(), 7, "every row is still there");
    assert_eq!(stage.journal.repairs(), vec![]);

    stage.a().heal();
    stage.eventually("it is dropped", || dropped(&stage, "large")).await;
    assert_eq!(stage.upsert(&large, "x", 3).await.status, 200);
    stage.heal();
    stage.up(B).await;
    stage
        .eventually("all is equal", || stage.journal.repairs().is_empty())
        .await;
    stage.drained().await;
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn a_node_that_returns_makes_room() {
    let stage = limited(303, |settings| settings.log_bytes = 5000).await;
    let c = stage.create("c").await;
    stage.down(B);
    stage.a().fault("embeddings\",\"metadatas", ALWAYS, BROKEN);
    for n in 0..4 {
        assert_eq!(write_big(&stage, "c", &n.to_string(), 2000).await, 200);
    }
    stage
        .eventually("it is over its limit", || c.pairs[B].is_over_limit())
        .await;
    stage.up(B).await;
    stage.drained().await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn what_is_too_old_is_left_to_a_copy_but_names_never() {
    let stage = limited(304, |settings| settings.log_age = Duration::from_secs(3600)).await;
    let c = stage.create("c").await;
    stage.down(B);
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    let d = stage.create("d").await;
    seconds(3500).await;
    assert_eq!(stage.upsert(&d, "y", 2).await.status, 200);
    seconds(200).await;
    assert!(dropped(&stage, "c"));
    let missed = [("b", "create_collection"), ("b", "w2")];
    assert_eq!(stage.journal.rows(), rows(&missed));
    stage.heal();
    stage.up(B).await;
    stage
        .eventually("all is equal", || stage.journal.repairs().is_empty())
        .await;
    stage.drained().await;
    stage.assert_converged();
}
