//! Changes of names that the journal did not take at once: what comes later has to come later in the journal too.

use diptych::journal::{Change, Commit};
use serde_json::json;
use tokio::sync::watch;

use crate::fakes::{A, B, CommitFault, DATABASE, Fault, Gate, Stage, TENANT, rows, seconds, text};

/// The next commit that puts a collection is refused, and tried again only when the sender says so.
fn hold_next_change(stage: &Stage) -> watch::Sender<bool> {
    let (open, opened) = watch::channel(false);
    let puts = |commit: &Commit| commit.iter().any(|change| matches!(change, Change::PutCollection(_)));
    stage
        .journal
        .fault(puts, [CommitFault::Refused, CommitFault::Held(opened)]);
    open
}

async fn journal_answers(stage: &Stage) {
    seconds(3).await;
    stage
        .eventually("the journal answers", || stage.core.log.is_available())
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_rename_whose_commit_failed_does_not_undo_a_later_one() {
    let stage = Stage::new(1).await;
    let c = stage.create("c").await;
    let open = hold_next_change(&stage);
    assert_eq!(stage.rename(&c, "first").await.status, 503);
    journal_answers(&stage).await;
    let answer = stage.rename(&c, "second").await;
    let early = answer.status;
    assert!([200, 503].contains(&early), "{}", text(&answer));
    open.send_replace(true);
    seconds(5).await;
    stage.assert_converged();
    assert_eq!(stage.rename(&c, "second").await.status, 200);
    stage.assert_converged();
    assert_eq!(stage.journal.living()[0].name, "second");
}

#[tokio::test(start_paused = true)]
async fn a_rename_whose_commit_failed_does_not_bring_a_deleted_collection_back() {
    let stage = Stage::new(2).await;
    let c = stage.create("c").await;
    let open = hold_next_change(&stage);
    assert_eq!(stage.rename(&c, "first").await.status, 503);
    journal_answers(&stage).await;
    let early = stage.delete("c").await.status;
    open.send_replace(true);
    seconds(5).await;
    if early != 200 {
        assert_eq!(stage.delete("first").await.status, 200);
    }
    assert_eq!(stage.journal.living(), vec![], "deleted on both nodes, acked");
    assert!(stage.core.catalog.by_name(TENANT, DATABASE, "first").is_none());
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn a_create_whose_commit_failed_and_that_is_repeated_is_one_generation() {
    let stage = Stage::new(3).await;
    let open = hold_next_change(&stage);
    assert_eq!(stage.try_create(json!({"name": "c"})).await.status, 503);
    journal_answers(&stage).await;
    stage.try_create(json!({"name": "c", "get_or_create": true})).await;
    let _ = stage.core.find_by_name(TENANT, DATABASE, "c").await;
    open.send_replace(true);
    seconds(5).await;
    assert_eq!(stage.journal.living().len(), 1, "{:?}", stage.journal.living());
    let again = stage.try_create(json!({"name": "c", "get_or_create": true})).await;
    assert_eq!(again.status, 200, "{}", text(&again));
    stage.assert_converged();
}

/// A collection that a node has already is registered when a client first speaks of it.
#[tokio::test(start_paused = true)]
async fn a_collection_found_while_the_journal_was_uncertain_is_one_generation() {
    let stage = Stage::new(4).await;
    let path = format!("/api/v2/tenants/{TENANT}/databases/{DATABASE}/collections");
    stage
        .a()
        .with(|chroma| chroma.handle(&http::Method::POST, &path, br#"{"name":"found"}"#, false));
    let puts = |commit: &Commit| commit.iter().any(|change| matches!(change, Change::PutCollection(_)));
    let refused = vec![CommitFault::Refused; 3];
    stage
        .journal
        .fault(puts, [vec![CommitFault::UncertainWritten], refused].concat());
    assert!(stage.core.find_by_name(TENANT, DATABASE, "found").await.is_err());
    journal_answers(&stage).await;
    let found = stage
        .core
        .find_by_name(TENANT, DATABASE, "found")
        .await
        .ok()
        .flatten()
        .expect("found");
    assert_eq!(stage.journal.living().len(), 1, "{:?}", stage.journal.living());
    assert_eq!(stage.journal.living()[0].generation, found.generation);
    let repairs = stage.journal.repairs();
    assert_eq!(repairs.len(), 1, "{repairs:?}");
    assert_eq!(repairs[0].node, "b");
    assert_eq!(stage.usable(&found), [A]);
}

/// The rows of a drained entry are gone and its effects kept, but the answer to that commit was lost.
#[tokio::test(start_paused = true)]
async fn a_drained_create_whose_commit_is_uncertain_is_still_mapped() {
    let stage = Stage::new(5).await;
    stage.down(B);
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    assert_eq!(stage.journal.rows(), rows(&[("b", "create_collection"), ("b", "w1")]));
    let maps = |commit: &Commit| {
        commit
            .iter()
            .any(|change| matches!(change, Change::PutNodeId { node, .. } if node == "b"))
    };
    let refused = vec![CommitFault::Refused; 3];
    stage
        .journal
        .fault(maps, [vec![CommitFault::UncertainWritten], refused].concat());
    stage.up(B).await;
    stage.drained().await;
    stage.assert_converged();
    assert_eq!(stage.documents(B, "c"), [("x".to_owned(), "w1".to_owned())]);
}

/// The drain finds the collection gone while the commit that says so is under way, and writes a row for it.
#[tokio::test(start_paused = true)]
async fn a_row_that_comes_while_its_collection_is_deleted_goes_with_it() {
    let stage = Stage::new(6).await;
    let c = stage.create("c").await;
    stage.down(B);
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    let gate = Gate::new();
    stage.b().fault("\"w1\"", 1, Fault::Held(gate.clone()));
    stage.up(B).await;
    let (open, opened) = watch::channel(false);
    let deletes = |commit: &Commit| {
        let deletes = |change: &Change| matches!(change, Change::PutCollection(record) if record.deleted);
        commit.iter().any(deletes)
    };
    stage.journal.fault(deletes, [CommitFault::AnswerHeld(opened)]);
    let its_stage = stage.clone();
    let deleting = tokio::spawn(async move { its_stage.delete("c").await });
    seconds(5).await;
    assert_eq!(stage.journal.living(), vec![], "the journal has it");
    gate.open();
    seconds(1).await;
    open.send_replace(true);
    assert_eq!(deleting.await.expect("an answer").status, 200);
    seconds(5).await;
    assert_eq!(stage.journal.repairs(), vec![]);
    stage.assert_converged();
}

/// The rows of a node that is behind go with their collection. Before it is known that they did, that there are none does
/// not mean that the node misses nothing.
#[tokio::test(start_paused = true)]
async fn a_node_does_not_join_because_a_delete_of_unknown_outcome_took_its_rows() {
    let stage = Stage::new(61).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.down(B);
    assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
    let deletes = |change: &Change| matches!(change, Change::PutCollection(record) if record.deleted);
    let lost = vec![CommitFault::UncertainWritten; 40];
    stage.journal.fault(move |commit| commit.iter().any(deletes), lost);
    assert_ne!(stage.delete("c").await.status, 200);
    assert_eq!(stage.journal.payloads_of("b").len(), 1, "the delete itself");
    stage.up(B).await;
    seconds(3).await;
    assert!(!c.is_deleted(), "it is not known yet");
    assert_eq!(stage.usable(&c), [A], "B has x as it was");
    stage.eventually("the outcome is known", || c.is_deleted()).await;
    stage.drained().await;
    stage.assert_converged();
}
