//! Schedules of docs/schedules.md that end with another proxy on the same journal and nodes.
//!
//! The first proxy is not killed here: it has lost its term, so it can neither commit nor answer well any more, and what it
//! has sent is on its way as after a kill.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use diptych::chroma::RecordWrite;
use diptych::journal::{Change, Commit};
use diptych::mirror::{NamespaceWrite, keep_unprotected};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::fakes::{A, ALWAYS, B, CommitFault, DISK_FULL, Fault, Gate, REFUSED, Stage, rows, seconds, value};

/// A proxy that heals, over what another one left behind; nobody has looked at the nodes yet.
async fn successor(stage: &Stage, seed: u64) -> Stage {
    let next = Stage::over(seed, stage.nodes.clone(), stage.journal.clone(), |_| {}).await;
    next.heal();
    tokio::spawn(keep_unprotected(next.core.clone()));
    next
}

async fn both_up(stage: &Stage) {
    for node in [A, B] {
        stage.up(node).await;
    }
}

/// Everything is found out, drained and repaired.
async fn healed(stage: &Stage) {
    stage
        .eventually("healed", || {
            stage.core.recovering() == 0 && stage.journal.rows().is_empty() && stage.journal.repairs().is_empty()
        })
        .await;
    stage.drained().await;
    seconds(5).await;
    stage.assert_converged();
}

fn removes_rows(commit: &Commit) -> bool {
    commit.iter().any(|change| matches!(change, Change::RemovePayloads(_)))
}

/// A commit that never ends.
fn never() -> CommitFault {
    let (sender, receiver) = watch::channel(false);
    std::mem::forget(sender);
    CommitFault::Held(receiver)
}

fn w(n: u64) -> Vec<(String, String)> {
    vec![("x".to_owned(), format!("w{n}"))]
}

#[tokio::test(start_paused = true)]
async fn s01_a_delete_and_a_create_that_were_acked_are_not_replayed_after_a_kill() {
    for by_reset in [false, true] {
        let stage = Stage::new(101).await;
        let old = stage.create("c").await;
        assert_eq!(stage.upsert(&old, "x", 1).await.status, 200);
        // Not long enough for the low-water mark: all of it is in the log as under way.
        let gone = match by_reset {
            true => stage.namespace(NamespaceWrite::Reset, Value::Null).await,
            false => stage.delete("c").await,
        };
        assert_eq!(gone.status, 200);
        let new = stage.create("c").await;
        assert_eq!(stage.upsert(&new, "x", 2).await.status, 200);
        let next = successor(&stage, 102).await;
        assert!(next.core.recovering() > 0, "it was under way");
        both_up(&next).await;
        seconds(5).await;
        for node in [A, B] {
            assert_eq!(next.documents(node, "c"), w(2), "nothing was sent again");
        }
        healed(&next).await;
        assert_eq!(next.find("c").client_id, new.client_id);
        assert_eq!(next.documents(A, "c"), w(2), "by a reset: {by_reset}");
    }
}

/// Nobody else holds everything: what one node has deleted when the proxy is killed, nothing could bring back.
#[tokio::test(start_paused = true)]
async fn a_delete_that_the_last_whole_node_has_done_is_completed_after_a_kill() {
    let stage = Stage::new(109).await;
    let c = stage.create("c").await;
    stage.down(A);
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.a().fault("\"w1\"", 1, REFUSED);
    stage.up(A).await;
    stage
        .eventually("A is to be repaired", || !stage.journal.repairs().is_empty())
        .await;
    assert_eq!(stage.usable(&c), [B]);
    stage.a().fault("DELETE", 1, REFUSED);
    let deletes = |change: &Change| matches!(change, Change::PutCollection(record) if record.deleted);
    stage.journal.fault(move |commit| commit.iter().any(deletes), [never()]);
    let dying = stage.clone();
    let delete = tokio::spawn(async move { dying.delete("c").await });
    let has = |node: usize| stage.nodes[node].with(|chroma| chroma.id_of("c").is_some());
    stage.eventually("B has done it", || has(A) && !has(B)).await;
    let next = successor(&stage, 110).await;
    both_up(&next).await;
    healed(&next).await;
    assert_eq!(next.journal.living(), vec![]);
    assert!(!has(A));
    delete.abort();
}

/// A node that fails on what recovery asks of it is not asked without a pause.
#[tokio::test(start_paused = true)]
async fn recovery_does_not_ask_without_end() {
    let stage = Stage::new(111).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    for node in [A, B] {
        stage.nodes[node].fault("/delete", ALWAYS, DISK_FULL);
    }
    let next = successor(&stage, 112).await;
    both_up(&next).await;
    stage.nodes.iter().for_each(|node| node.forget_requests());
    seconds(10).await;
    assert!(next.core.recovering() > 0);
    let asked = stage.nodes.iter().map(|node| node.trace().len()).sum::<usize>();
    assert!((5..=400).contains(&asked), "{asked} requests in 10 s");
}

/// The refusal of one node outlives the proxy that heard it: the other node's row tells of it.
#[tokio::test(start_paused = true)]
async fn a_refusal_of_what_nobody_had_answered_is_known_after_a_kill() {
    for b_refuses_too in [false, true] {
        let stage = Stage::new(107).await;
        let c = stage.create("c").await;
        assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
        stage.down(B);
        stage.a().fault("\"w2\"", 1, Fault::ClosedBefore);
        stage.a().fault("\"w2\"", 1, REFUSED);
        stage.a().fault("/heartbeat", 1, Fault::ClosedBefore);
        assert_eq!(stage.upsert(&c, "x", 2).await.status, 504);
        assert_eq!(stage.journal.rows(), rows(&[("a", "w2"), ("b", "w2")]));
        let a_refused = || stage.journal.rows() == rows(&[("b", "w2")]);
        stage.eventually("A refused it", a_refused).await;
        // Long enough for the low-water mark: all of it is settled.
        seconds(5).await;
        if b_refuses_too {
            stage.b().fault("\"w2\"", 1, REFUSED);
        }
        let repairs = |commit: &Commit| commit.iter().any(|change| matches!(change, Change::InsertRepair(_)));
        let repaired = Arc::new(AtomicBool::new(false));
        let seen = repaired.clone();
        let notes = move |commit: &Commit| repairs(commit) && seen.swap(true, Ordering::SeqCst);
        stage.journal.fault(notes, [CommitFault::Refused]);
        let next = successor(&stage, 108).await;
        assert_eq!(next.core.recovering(), 0, "nothing was under way");
        both_up(&next).await;
        healed(&next).await;
        assert_eq!(next.documents(B, "c"), w(1), "B refuses it too: {b_refuses_too}");
        let repaired = repaired.load(Ordering::SeqCst);
        assert_eq!(repaired, !b_refuses_too, "who agrees is not repaired");
    }
}

#[tokio::test(start_paused = true)]
async fn s06_what_the_lead_took_and_the_other_refused_outlives_the_lead() {
    let stage = Stage::new(106).await;
    stage.heal();
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.b().fault("\"w2\"", 1, REFUSED);
    stage.pause_drain(true);
    assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
    assert_eq!(stage.journal.rows(), rows(&[("b", "w2")]), "beside the repair row");
    stage.down(A);
    stage.a().wipe();
    stage.up(A).await;
    stage.pause_drain(false);
    healed(&stage).await;
    assert_eq!(stage.documents(A, "c"), w(2));
}

#[tokio::test(start_paused = true)]
async fn s09_a_row_whose_commit_timed_out_is_never_drained_over_a_later_write() {
    for fault in [CommitFault::UncertainWritten, CommitFault::UncertainNotWritten] {
        let stage = Stage::new(109).await;
        let c = stage.create("c").await;
        stage.b().fault("\"w1\"", 1, Fault::NotSent);
        let has_row = |commit: &Commit| commit.iter().any(|change| matches!(change, Change::InsertPayload(_)));
        stage.journal.fault(has_row, vec![fault; 40]);
        assert_eq!(stage.upsert(&c, "x", 1).await.status, 503);
        stage.up(B).await;
        assert_eq!(stage.usable(&c), [A], "B is out as long as its row is not known");
        stage
            .eventually("the row's commit is known", || c.pairs[B].uncertain() == 0)
            .await;
        assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
        stage.drained().await;
        stage.assert_converged();
        assert_eq!(stage.documents(A, "c"), w(2));
    }
}

#[tokio::test(start_paused = true)]
async fn s10_a_node_takes_live_writes_only_after_the_commit_that_removes_its_rows() {
    let stage = Stage::new(110).await;
    let old = stage.create("c").await;
    assert_eq!(stage.upsert(&old, "x", 1).await.status, 200);
    stage.down(A);
    assert_eq!(stage.delete("c").await.status, 200);
    let new = stage.create("c").await;
    assert_eq!(stage.upsert(&new, "x", 2).await.status, 200);
    // The last removal never ends: A has everything and is not in step.
    let generation = new.generation;
    let of_new: Vec<_> = stage.journal.payloads_of("a").into_iter().collect();
    let last = of_new.iter().find(|row| row.generation == Some(generation));
    let last = last.expect("a row").id;
    let is_last = move |commit: &Commit| {
        commit
            .iter()
            .any(|change| matches!(change, Change::RemovePayloads(ids) if ids.contains(&last)))
    };
    stage.journal.fault(is_last, [never()]);
    stage.up(A).await;
    stage
        .eventually("A has it", || stage.a().trace().contains(&"w2".to_owned()))
        .await;
    seconds(3).await;
    assert_eq!(stage.usable(&new), [B], "not before the commit");
    let live = stage.upsert(&new, "x", 9).await;
    assert_eq!(live.status, 200);
    assert!(!stage.a().trace().contains(&"w9".to_owned()), "it is logged for A");
    let next = successor(&stage, 111).await;
    both_up(&next).await;
    healed(&next).await;
    assert_eq!(next.documents(A, "c"), w(9));
}

#[tokio::test(start_paused = true)]
async fn s13_an_update_that_is_drained_twice_finds_nothing_to_change() {
    let stage = Stage::new(113).await;
    let c = stage.create("c").await;
    stage.down(B);
    let update = json!({"ids": ["x"], "documents": ["w1"], "metadatas": [{"stale": true}]});
    assert_eq!(stage.write(&c, RecordWrite::Update, update).await.status, 200);
    assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
    stage.journal.fault(removes_rows, [never()]);
    stage.up(B).await;
    stage
        .eventually("the update is drained", || stage.b().trace().contains(&"w1".to_owned()))
        .await;
    seconds(5).await;
    assert!(
        !stage.b().trace().contains(&"w2".to_owned()),
        "its removal is not committed yet"
    );
    let next = successor(&stage, 114).await;
    both_up(&next).await;
    healed(&next).await;
    let metadata = &next.contents(B, "c").records[0].metadata;
    assert_eq!(metadata, json!({"n": 2}).as_object().expect("a map"));
}

#[tokio::test(start_paused = true)]
async fn s14_the_node_that_serves_first_after_a_kill_is_what_the_other_is_made_equal_to() {
    let stage = Stage::new(115).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    seconds(1).await;
    // A has the second write, with a key that no other write has; B never sees it, and nobody is told.
    let gate = Gate::new();
    stage.b().fault("\"w2\"", 1, Fault::Held(gate.clone()));
    stage.a().fault("\"w2\"", 1, Fault::AnswerHeld(gate.clone()));
    let second = json!({"ids": ["x"], "embeddings": [[2, 1]], "documents": ["w2"], "metadatas": [{"leftover": 2}]});
    let (writer, held) = (stage.clone(), c.clone());
    let pending = tokio::spawn(async move { writer.write(&held, RecordWrite::Upsert, second).await });
    stage.eventually("A has it", || stage.documents(A, "c") == w(2)).await;
    stage.nodes[A].set_down(true);
    let next = successor(&stage, 116).await;
    gate.open_to(Fault::ClosedBefore);
    next.up(B).await;
    next.eventually("recovered from B alone", || next.core.recovering() == 0)
        .await;
    let c = next.find("c");
    assert_eq!(next.usable(&c), [B]);
    assert_eq!(next.upsert(&c, "x", 3).await.status, 200);
    next.up(A).await;
    healed(&next).await;
    let metadata = &next.contents(A, "c").records[0].metadata;
    assert_eq!(metadata, json!({"n": 3}).as_object().expect("a map"));
    assert_ne!(pending.await.expect("an answer").status, 200);
}

#[tokio::test(start_paused = true)]
async fn s15_what_a_killed_proxy_left_hidden_on_a_node_comes_to_light_before_it_is_compared() {
    for hiding in [A, B] {
        let stage = Stage::new(117).await;
        let c = stage.create("c").await;
        assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
        seconds(1).await;
        // Logged on one node and not shown; the other one never sees it; the proxy dies over it.
        let gate = Gate::new();
        stage.nodes[hiding].fault("\"w2\"", 1, Fault::Hidden);
        stage.nodes[1 - hiding].fault("\"w2\"", 1, Fault::Held(gate.clone()));
        let _pending = stage.start_upsert(&c, "x", 2);
        stage
            .eventually("it is sent", || stage.nodes[hiding].trace().contains(&"w2".to_owned()))
            .await;
        seconds(1).await;
        let next = successor(&stage, 118).await;
        gate.open_to(Fault::ClosedBefore);
        both_up(&next).await;
        healed(&next).await;
        let c = next.find("c");
        assert_eq!(next.upsert(&c, "y", 3).await.status, 200);
        next.assert_converged();
    }
}

#[tokio::test(start_paused = true)]
async fn s18_two_errors_of_which_one_was_applied_leave_no_difference() {
    for full in [A, B] {
        let stage = Stage::new(119).await;
        stage.heal();
        let c = stage.create("c").await;
        assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
        stage.nodes[full].fault("\"w2\"", 1, DISK_FULL);
        stage.nodes[1 - full].fault("\"w2\"", 1, Fault::Hidden);
        let answer = stage.upsert(&c, "x", 2).await;
        assert_eq!(answer.status, 504, "it may be applied");
        healed(&stage).await;
        assert_eq!(stage.documents(A, "c"), w(2));
    }
}

#[tokio::test(start_paused = true)]
async fn s24_a_collection_that_was_acked_outlives_the_proxy_and_the_node_that_gave_its_id() {
    let stage = Stage::new(124).await;
    let c = stage.create("c").await;
    assert_eq!(Some(c.client_id), c.node_id(A));
    stage.nodes[A].set_down(true);
    let next = successor(&stage, 125).await;
    next.up(B).await;
    next.eventually("recovered", || next.core.recovering() == 0).await;
    let found = next
        .core
        .find_by_id("default_tenant", "default_database", c.client_id)
        .await;
    let found = found.ok().flatten().expect("the client's id is known");
    assert_eq!(next.upsert(&found, "x", 1).await.status, 200);
    next.up(A).await;
    healed(&next).await;
    assert_eq!(next.documents(A, "c"), w(1));
}

#[tokio::test(start_paused = true)]
async fn s25_a_lead_that_hangs_holds_a_lane_up_for_the_grace_period_only() {
    let stage = Stage::new(126).await;
    let c = stage.create("c").await;
    let gate = Gate::new();
    stage.a().fault("\"w1\"", 1, Fault::Held(gate.clone()));
    let before = stage.core.env.now();
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    let took = stage.core.env.now() - before;
    assert!(
        took <= stage.core.settings.mirror_grace + Duration::from_secs(1),
        "counted from the first that applied it: {took:?}"
    );
    let before = stage.core.env.now();
    assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
    assert!(stage.core.env.now() - before < Duration::from_secs(1));
    gate.open();
    stage.drained().await;
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn s35_what_a_killed_proxy_has_on_its_way_lands_before_its_successor_compares() {
    for (late, other) in [(A, B), (B, A)] {
        let stage = Stage::new(127).await;
        let c = stage.create("c").await;
        assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
        seconds(1).await;
        let gate = Gate::new();
        stage.nodes[late].fault("\"w2\"", 1, Fault::LandsLate(Duration::from_secs(600)));
        stage.nodes[other].fault("\"w2\"", 1, Fault::Held(gate.clone()));
        let _pending = stage.start_upsert(&c, "x", 2);
        stage
            .eventually("it is sent", || stage.nodes[late].trace().contains(&"w2".to_owned()))
            .await;
        // At once, on the same host, while nothing has gone wrong as far as it can see.
        let next = successor(&stage, 128).await;
        gate.open_to(Fault::ClosedBefore);
        both_up(&next).await;
        healed(&next).await;
        let c = next.find("c");
        assert_eq!(next.write(&c, RecordWrite::Upsert, value("x", 3)).await.status, 200);
        seconds(1200).await;
        assert_eq!(next.documents(A, "c"), w(3));
        next.assert_converged();
    }
}
