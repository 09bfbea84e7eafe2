//! A node that comes back unable to serve a collection, before the one that has everything.

use std::sync::Arc;

use diptych::catalog::Collection;

use crate::fakes::{A, ALWAYS, B, Fault, Stage, text};

const BROKEN: Fault = Fault::Answer(
    500,
    r#"{"error":"InternalError","message":"Failed to apply logs to the hnsw segment writer"}"#,
);

/// Nothing is read or written in the collection as A has it any more (chroma-facts.md 10.3).
fn break_on_a(stage: &Stage) {
    let id = stage.a().with(|chroma| chroma.id_of("c")).expect("there");
    stage.a().fault(&format!("{id}/"), ALWAYS, BROKEN);
}

/// Both nodes were killed. A is back first, alone, and serves (S37); B is to be compared with it.
async fn broken_and_first(seed: u64) -> (Stage, Arc<Collection>) {
    let stage = Stage::new(seed).await;
    stage.journal.compare_restarts();
    let c = stage.create("c").await;
    for (id, n) in [("x", 1), ("y", 2)] {
        assert_eq!(stage.upsert(&c, id, n).await.status, 200);
    }
    stage.down(A);
    stage.down(B);
    break_on_a(&stage);
    stage.up(A).await;
    stage.up(B).await;
    assert_eq!(stage.usable(&c), [A]);
    (stage, c)
}

fn kept() -> Vec<(String, String)> {
    [("x", "w1"), ("y", "w2")]
        .map(|(id, document)| (id.to_owned(), document.to_owned()))
        .into()
}

#[tokio::test(start_paused = true)]
async fn a_collection_that_its_repairs_source_cannot_serve_is_served_by_the_other_and_rebuilt() {
    let (stage, c) = broken_and_first(260).await;
    stage.heal();
    stage.eventually("B serves", || stage.usable(&c).contains(&B)).await;
    stage.healed().await;
    stage.assert_converged();
    assert_eq!(stage.documents(A, "c"), kept());
}

/// Of the write that only the broken node was sent nobody knows what became.
#[tokio::test(start_paused = true)]
async fn so_it_is_when_nothing_but_a_write_shows_it() {
    let (stage, c) = broken_and_first(261).await;
    let answer = stage.upsert(&c, "z", 3).await;
    assert_eq!(answer.status, 504, "{}", text(&answer));
    assert_eq!(stage.usable(&c), Vec::<usize>::new());
    stage.heal();
    stage.eventually("B serves", || stage.usable(&c).contains(&B)).await;
    stage.healed().await;
    stage.assert_converged();
    assert_eq!(stage.documents(A, "c")[..2], kept());
}

#[tokio::test(start_paused = true)]
async fn so_it_is_when_the_proxy_was_killed_too() {
    let stage = Stage::new(262).await;
    stage.journal.compare_restarts();
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.down(B);
    stage.up(B).await;
    assert_eq!(stage.usable(&c), [A]);
    assert_eq!(stage.upsert(&c, "y", 2).await.status, 200, "kept for B");
    let next = Stage::over(263, stage.nodes.clone(), stage.journal.clone(), |_| {}).await;
    assert!(next.core.recovering() > 0, "it was under way");
    break_on_a(&next);
    next.heal();
    next.up(A).await;
    next.up(B).await;
    next.eventually("recovered", || next.core.recovering() == 0).await;
    next.healed().await;
    next.assert_converged();
    assert_eq!(next.documents(A, "c"), kept());
}
