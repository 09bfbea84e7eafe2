//! Schedules (docs/schedules.md) that need a moment which only fakes can hold still.
//!
//! A proxy that is killed is one whose journal was taken over while something was under way: its commits are refused
//! from then on, and the requests it had sent are held by the nodes until the test says what became of them.

use std::time::Duration;

use diptych::chroma::RecordWrite;
use diptych::journal::{Change, Commit, SuspectRow};
use diptych::mirror::{RepairWanted, Scope};
use diptych::repair::jobs;
use serde_json::{Value, json};
use tokio::sync::watch;
use uuid::Uuid;

use crate::fakes::{A, ALWAYS, B, CommitFault, DISK_FULL, Fault, Gate, REFUSED, Stage, rows, seconds, text, value};

/// Of every request the latency is less.
const ARRIVED: Duration = Duration::from_millis(10);
const SHORT: Duration = Duration::from_millis(1);

fn documents(of: &[(&str, &str)]) -> Vec<(String, String)> {
    rows(of)
}

fn assert_both(stage: &Stage, expected: &[(&str, &str)], case: &str) {
    for node in [A, B] {
        assert_eq!(
            stage.documents(node, "c"),
            documents(expected),
            "{case}, on {}",
            ["A", "B"][node]
        );
    }
}

/// Both nodes have got a write, and have done with it what they were told.
async fn under_way(stage: &Stage, document: &str) {
    let has_it = |node: usize| stage.nodes[node].trace().iter().any(|seen| seen == document);
    stage.eventually("both got it", || has_it(A) && has_it(B)).await;
    tokio::time::sleep(ARRIVED).await;
}

/// The proxy is dead; another one has its journal and nodes, and has not looked at them yet.
async fn successor(stage: &Stage) -> Stage {
    Stage::over(99, stage.nodes.clone(), stage.journal.clone(), |_| {}).await
}

/// S6: A applies a write, B refuses it, it is acked; A is wiped before B is repaired from it. B has the write itself in
/// the log.
#[tokio::test(start_paused = true)]
async fn s06_a_write_that_one_node_refused_survives_the_loss_of_the_other() {
    let stage = Stage::new(6).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "kept", 1).await.status, 200);
    stage.pause_drain(true);
    stage.b().fault("\"w2\"", 1, REFUSED);
    assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
    let wanted = stage.journal.repairs();
    assert_eq!((wanted.len(), wanted[0].source.as_deref()), (1, Some("a")));
    assert_eq!(stage.documents(B, "c"), documents(&[("kept", "w1")]));
    stage.a().wipe();
    stage.a().restart();
    seconds(1).await;
    stage.up(A).await;
    stage.heal();
    stage.pause_drain(false);
    stage.healed().await;
    assert_both(&stage, &[("kept", "w1"), ("x", "w2")], "the acked write is there");
    stage.assert_converged();
}

/// S7: A was away while B took an acked write, and B is wiped: A is all there is, with its log. What A refuses of it for a
/// while is not left to a repair from the empty B.
#[tokio::test(start_paused = true)]
async fn s07_what_is_refused_where_the_other_node_was_wiped_stays_in_the_log() {
    let stage = Stage::new(7).await;
    stage.heal();
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.down(A);
    assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
    stage.down(B);
    stage.b().wipe();
    stage.a().fault("\"w2\"", ALWAYS, REFUSED);
    for node in [B, A] {
        stage.up(node).await;
    }
    seconds(60).await;
    assert_eq!(stage.journal.rows(), rows(&[("a", "w2")]), "nobody else has it");
    let wanted = stage.journal.repairs();
    assert!(wanted.iter().all(|row| row.node == "b"), "{wanted:?}");
    stage.a().heal();
    stage.healed().await;
    assert_both(&stage, &[("x", "w2")], "the acked write is there");
    stage.assert_converged();
}

/// S9: the row of an earlier write commits after that of a later one, which has been drained meanwhile. Rows are found by
/// being there, not by a position that others may have passed.
#[tokio::test(start_paused = true)]
async fn s09_a_row_that_commits_after_a_later_one_is_drained_all_the_same() {
    let stage = Stage::new(9).await;
    let (c, d) = (stage.create("c").await, stage.create("d").await);
    for document in ["\"w1\"", "\"w2\""] {
        stage.b().fault(document, 1, DISK_FULL);
    }
    let (open, opened) = watch::channel(false);
    let is_its_row = |commit: &Commit| {
        commit.iter().any(|change| match change {
            Change::InsertPayload(row) => String::from_utf8_lossy(&row.body).contains("\"w1\""),
            _ => false,
        })
    };
    stage.journal.fault(is_its_row, [CommitFault::Held(opened)]);
    let earlier = stage.start_upsert(&c, "x", 1);
    under_way(&stage, "w1").await;
    assert_eq!(stage.upsert(&d, "x", 2).await.status, 200);
    stage
        .eventually("the later one is drained", || stage.usable(&d) == [A, B])
        .await;
    open.send_replace(true);
    assert_eq!(earlier.await.expect("an answer").status, 200);
    stage.drained().await;
    assert_both(&stage, &[("x", "w1")], "it is found");
    stage.assert_converged();
}

/// S9: B misses a write, and the commit of its row is uncertain: 503. B is to be repaired, and x=2 is acked; the row
/// turns up later, in the journal or behind one that came after it. It must not bring x=1 back.
#[tokio::test(start_paused = true)]
async fn s09_a_row_that_turns_up_late_does_not_undo_what_came_after_it() {
    for uncertain in [CommitFault::UncertainWritten, CommitFault::UncertainNotWritten] {
        let case = format!("{uncertain:?}");
        let stage = Stage::new(9).await;
        stage.heal();
        let c = stage.create("c").await;
        let (open, opened) = watch::channel(false);
        let is_its_row = |commit: &Commit| {
            commit.iter().any(|change| match change {
                Change::InsertPayload(row) => String::from_utf8_lossy(&row.body).contains("\"w1\""),
                _ => false,
            })
        };
        let refused = [CommitFault::Refused, CommitFault::Refused, CommitFault::Refused];
        let faults = [uncertain].into_iter().chain(refused);
        stage
            .journal
            .fault(is_its_row, faults.chain([CommitFault::Held(opened)]));
        stage.b().fault("\"w1\"", 1, DISK_FULL);
        stage.b().forget_requests();
        let answer = stage.upsert(&c, "x", 1).await;
        assert_eq!(answer.status, 503, "{case} {}", text(&answer));
        stage
            .eventually("the journal answers again", || stage.core.log.is_available())
            .await;
        let wanted = RepairWanted {
            source: Some(A),
            ..RepairWanted::records(Some(vec!["x".to_owned()]), 1, "a test")
        };
        assert!(jobs::want(&stage.core, &Scope::Collection(c.clone()), B, wanted).await);
        assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
        seconds(60).await;
        assert_eq!(stage.usable(&c), [A], "{case}");
        assert_eq!(stage.b().trace(), ["w1"], "{case}: neither drained nor repaired");
        open.send_replace(true);
        stage.healed().await;
        assert_both(&stage, &[("x", "w2")], &case);
        stage.assert_converged();
    }
}

/// S10: A is drained of [delete c, create c, add]; the proxy is killed before the removal of one of these rows commits,
/// or before it hears that it did. A client changed the record meanwhile: draining again must not take that back.
#[tokio::test(start_paused = true)]
async fn s10_a_drain_whose_removal_never_commits_does_not_undo_a_live_write() {
    for held in 0..3 {
        for committed in [false, true] {
            let case = format!("removal {held}, committed: {committed}");
            let stage = Stage::new(10).await;
            stage.create("c").await;
            stage.down(A);
            assert_eq!(stage.delete("c").await.status, 200);
            let c = stage.create("c").await;
            assert_eq!(stage.upsert(&c, "y", 1).await.status, 200);
            let (open, opened) = watch::channel(false);
            let removes = |commit: &Commit| commit.iter().any(|change| matches!(change, Change::RemovePayloads(_)));
            let last = match committed {
                true => CommitFault::AnswerHeld(opened),
                false => CommitFault::Held(opened),
            };
            let before = std::iter::repeat_n(CommitFault::Slow(SHORT), held);
            stage.journal.fault(removes, before.chain([last]));
            stage.up(A).await;
            // The live write comes before the removal, if anything lets it.
            seconds(1).await;
            assert_eq!(stage.upsert(&c, "y", 9).await.status, 200, "{case}");
            assert_eq!(stage.usable(&c), [B], "{case}: A is behind until the removal is known");
            let after = successor(&stage).await;
            open.send_replace(true);
            for node in [A, B] {
                after.up(node).await;
            }
            after.heal();
            after.healed().await;
            assert_both(&after, &[("y", "w9")], &case);
            after.assert_converged();
        }
    }
}

/// S14: A applies W1 and is killed with the proxy; the next proxy has B only, which acks W2. A comes back with what W1
/// left in the record: B is the source from the moment it served.
#[tokio::test(start_paused = true)]
async fn s14_leftovers_of_a_write_that_nobody_acked_are_taken_off_the_node_that_returns() {
    let stage = Stage::new(14).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 0).await.status, 200);
    let gate = Gate::new();
    stage.a().fault("\"w1\"", 1, Fault::AnswerHeld(gate.clone()));
    stage.b().fault("\"w1\"", 1, Fault::Held(gate.clone()));
    let first = tokio::spawn({
        let (stage, c) = (stage.clone(), c.clone());
        let body = json!({"ids": ["x"], "documents": ["w1"], "metadatas": [{"left": true}]});
        async move { stage.write(&c, RecordWrite::Update, body).await }
    });
    under_way(&stage, "w1").await;
    assert_eq!(stage.contents(A, "c").records[0].metadata["left"], true);
    let after = successor(&stage).await;
    after.a().set_down(true);
    gate.open_to(Fault::ClosedBefore);
    assert!(first.await.expect("an answer").status >= 500, "nobody acks W1");

    after.up(B).await;
    after.heal();
    let c = after.find("c");
    after.eventually("B serves alone", || after.usable(&c) == [B]).await;
    let answer = after.upsert(&c, "x", 2).await;
    assert_eq!(answer.status, 200, "{}", text(&answer));
    after.up(A).await;
    after.healed().await;
    for node in [A, B] {
        let records = after.contents(node, "c").records;
        assert_eq!(Value::Object(records[0].metadata.clone()), json!({"n": 2}), "{node}");
    }
    assert_both(&after, &[("x", "w2")], "W2 is there");
    after.assert_converged();
}

/// S15: the proxy is killed and the nodes break off its requests: what they had committed does not show. A delete by
/// filter right after the recovery means these records, too, and no later write brings one of them to light.
#[tokio::test(start_paused = true)]
async fn s15_what_a_node_committed_and_hides_is_found_by_the_next_delete() {
    for first in [A, B] {
        for on_b in [Fault::Hidden, Fault::ClosedBefore] {
            let case = format!("{} first, B: {on_b:?}", ["A", "B"][first]);
            let stage = Stage::new(15).await;
            let c = stage.create("c").await;
            assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
            let gate = Gate::new();
            stage.a().fault("\"w2\"", 1, Fault::Hidden);
            stage.b().fault("\"w2\"", 1, Fault::Held(gate.clone()));
            let write = stage.start_upsert(&c, "y", 2);
            under_way(&stage, "w2").await;
            let after = successor(&stage).await;
            gate.open_to(on_b.clone());
            assert!(write.await.expect("an answer").status >= 500, "{case}");
            assert_both(&after, &[("x", "w1")], &case);

            after.up(first).await;
            let c = after.find("c");
            after
                .eventually("the first serves", || after.usable(&c) == [first])
                .await;
            let delete = json!({"where": {"n": 2}});
            let answer = after.write(&c, RecordWrite::Delete, delete).await;
            let has_it = first == A || matches!(on_b, Fault::Hidden);
            let deleted = format!(r#"{{"deleted":{}}}"#, u8::from(has_it));
            assert_eq!(
                (answer.status, answer.body.as_ref()),
                (200, deleted.as_bytes()),
                "{case}"
            );
            after.up(1 - first).await;
            after.heal();
            after.healed().await;
            assert_both(&after, &[("x", "w1")], &case);
            assert_eq!(after.upsert(&c, "z", 3).await.status, 200);
            assert_both(&after, &[("x", "w1"), ("z", "w3")], &case);
            after.assert_converged();
        }
    }
}

/// S18: both nodes answer 500: one has nothing of the write, the other applies it with the next one.
#[tokio::test(start_paused = true)]
async fn s18_two_500s_that_mean_different_things_end_in_equal_nodes() {
    for full in [A, B] {
        let case = format!("{} is full", ["A", "B"][full]);
        let stage = Stage::new(18).await;
        stage.heal();
        let c = stage.create("c").await;
        assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
        stage.nodes[full].fault("\"w2\"", 1, DISK_FULL);
        stage.nodes[1 - full].fault("\"w2\"", 1, Fault::Hidden);
        let update = json!({"ids": ["x"], "documents": ["w2"], "metadatas": [{"m": 2}]});
        stage.write(&c, RecordWrite::Update, update).await;
        stage.healed().await;
        assert_both(&stage, &[("x", "w2")], &case);
        stage.assert_converged();
        // What brings hidden entries to light brings none any more.
        assert_eq!(stage.upsert(&c, "y", 3).await.status, 200);
        assert_both(&stage, &[("x", "w2"), ("y", "w3")], &case);
        stage.assert_converged();
    }
}

/// S30: A has applied a write that B has not, and restarts: A is to be compared with B. That is written down, and B is
/// read, only when the write is done: a moment before, the repair would take it off A.
#[tokio::test(start_paused = true)]
async fn s30_a_node_that_restarts_under_a_write_is_compared_after_it() {
    let stage = Stage::with(30, |settings| settings.mirror_grace = Duration::from_secs(600)).await;
    stage.journal.compare_restarts();
    stage.heal();
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    let gate = Gate::new();
    stage.b().fault("\"w2\"", 1, Fault::Held(gate.clone()));
    let write = stage.start_upsert(&c, "x", 2);
    under_way(&stage, "w2").await;
    stage.a().restart();
    stage.probe();
    seconds(30).await;
    gate.open();
    assert_eq!(write.await.expect("an answer").status, 200);
    stage
        .eventually("A is back", || stage.core.cluster.node(A).is_up())
        .await;
    stage.healed().await;
    assert_both(&stage, &[("x", "w2")], "the acked write is there");
    stage.assert_converged();
}

/// S35: the proxy is killed with a write on its way to B; the next one starts at once and would find both nodes equal.
/// A canary has returned before B is asked for anything: by then the write has landed.
#[tokio::test(start_paused = true)]
async fn s35_a_write_on_its_way_at_the_kill_lands_before_the_next_proxy_looks() {
    for first in [A, B] {
        let case = ["A first", "B first"][first];
        let stage = Stage::new(35).await;
        let c = stage.create("c").await;
        assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
        let gate = Gate::new();
        stage.a().fault("\"w2\"", 1, Fault::Held(gate.clone()));
        stage.b().fault("\"w2\"", 1, Fault::LandsLate(Duration::from_secs(20)));
        let write = stage.start_upsert(&c, "x", 2);
        under_way(&stage, "w2").await;
        let after = successor(&stage).await;
        gate.open_to(Fault::ClosedBefore);
        assert!(write.await.expect("an answer").status >= 500, "{case}");
        assert_both(&after, &[("x", "w1")], case);

        after.heal();
        for node in [first, 1 - first] {
            after.up(node).await;
        }
        let c = after.find("c");
        after.eventually("both serve", || after.usable(&c) == [A, B]).await;
        let expected = [[("x", "w1")], [("x", "w2")]][first];
        assert_both(&after, &expected, case);
        seconds(60).await;
        assert_both(&after, &expected, case);
        after.assert_converged();
    }
}

/// A write that waits for a lock of the node's database can land after the canary, also when the drain sent it.
#[tokio::test(start_paused = true)]
async fn s11_what_the_drain_sent_and_what_outlasts_a_canary_is_compared() {
    let stage = Stage::new(11).await;
    stage.heal();
    let c = stage.create("c").await;
    stage.down(B);
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.b().fault("\"w1\"", 1, Fault::ClosedBefore);
    stage.up(B).await;
    stage.drained().await;
    assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
    stage
        .b()
        .with(|chroma| chroma.tamper("c", RecordWrite::Upsert, value("x", 1)));
    seconds(1100).await;
    assert_both(&stage, &[("x", "w2")], "in the end");
    stage.assert_converged();
}

/// The same, and a later write of that record is answered late: that tells nothing of the request that is on its way still.
#[tokio::test(start_paused = true)]
async fn s11_a_late_answer_does_not_speak_for_an_older_request() {
    let stage = Stage::new(12).await;
    stage.heal();
    let c = stage.create("c").await;
    stage.b().fault("\"w1\"", 1, Fault::ClosedBefore);
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.drained().await;
    let gate = Gate::new();
    stage.b().fault("\"w2\"", 1, Fault::Held(gate.clone()));
    assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
    gate.open();
    stage.drained().await;
    assert_both(&stage, &[("x", "w2")], "so far");
    stage
        .b()
        .with(|chroma| chroma.tamper("c", RecordWrite::Upsert, value("x", 1)));
    seconds(1100).await;
    assert_both(&stage, &[("x", "w2")], "in the end");
}

/// What is remembered of an entry that no node answered in time goes with its collection.
#[tokio::test(start_paused = true)]
async fn an_entry_that_nobody_answered_is_forgotten_with_its_collection() {
    let stage = Stage::new(50).await;
    let c = stage.create("c").await;
    stage.a().fault("\"w1\"", 1, DISK_FULL);
    stage.b().fault("\"w1\"", 1, Fault::Hidden);
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 504);
    stage.down(B);
    assert!(stage.core.undecided() > 0);
    stage.delete("c").await;
    assert_eq!(stage.core.undecided(), 0);
}

/// S36: A applies a write and loses the collection, which a rename that it had missed brings to light; only then B refuses
/// the write. B is not to be repaired from A then: A is to be copied from B.
#[tokio::test(start_paused = true)]
async fn s36_a_source_that_lost_the_collection_while_the_other_refused_is_none() {
    let stage = Stage::new(36).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "kept", 1).await.status, 200);
    stage.pause_drain(true);
    stage.down(A);
    assert_eq!(stage.rename(&c, "d").await.status, 200);
    stage.up(A).await;
    assert_eq!(stage.usable(&c), [A, B], "names are another lane");
    let gate = Gate::new();
    stage.b().fault("\"w2\"", 1, Fault::Held(gate.clone()));
    let write = stage.start_upsert(&c, "x", 2);
    under_way(&stage, "w2").await;
    stage.a().with(|chroma| chroma.lose("c"));
    stage.pause_drain(false);
    let wanted = |stage: &Stage| {
        let rows = stage.journal.repairs().into_iter();
        rows.map(|row| (row.node, row.source)).collect::<Vec<_>>()
    };
    let copied = ("a".to_owned(), None);
    stage
        .eventually("it is known that A lost it", || wanted(&stage) == [copied.clone()])
        .await;
    gate.open_to(REFUSED);
    assert_eq!(write.await.expect("an answer").status, 200);
    assert_eq!(wanted(&stage), [copied], "not from A, which is to be copied from B");
    stage.heal();
    stage.healed().await;
    for node in [A, B] {
        assert_eq!(stage.documents(node, "d"), documents(&[("kept", "w1"), ("x", "w2")]));
    }
    stage.assert_converged();
}

/// A request may break while its collection is deleted: what is written down of its records then goes, too.
#[tokio::test(start_paused = true)]
async fn suspects_of_a_collection_that_is_gone_are_forgotten() {
    let stage = Stage::new(51).await;
    stage.heal();
    let c = stage.create("c").await;
    assert_eq!(stage.delete("c").await.status, 200);
    let row = SuspectRow {
        id: Uuid::from_u128(1),
        node: "a".to_owned(),
        generation: c.generation,
        ids: vec!["x".to_owned()],
        step: 0,
        due_at: stage.core.env.wall(),
    };
    stage.core.suspects.lock().insert(row.id, row);
    seconds(5).await;
    assert!(stage.core.suspects.lock().is_empty());
}
