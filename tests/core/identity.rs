//! Who a node is: wiped, restored, swapped and restarted nodes are noticed before they serve or get anything.

use std::sync::Arc;

use diptych::chroma::RecordWrite;
use diptych::journal::{Change, Commit, Lsn, RepairKind, RepairRow};
use diptych::mirror::{NamespaceWrite, keep_checkpoints, keep_intents};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::fakes::{A, B, CommitFault, FakeJournal, FakeNode, REFUSED, Stage, rows, seconds};

/// With checkpoints, and with restarted nodes compared by what was written since.
async fn stage(seed: u64) -> Stage {
    let stage = quiet_stage(seed).await;
    keep(&stage);
    stage
}

/// The same, where the last checkpoint was made at the first meeting.
async fn quiet_stage(seed: u64) -> Stage {
    let stage = Stage::new(seed).await;
    stage.journal.compare_restarts();
    stage
}

fn keep(stage: &Stage) {
    for node in [A, B] {
        tokio::spawn(keep_checkpoints(stage.core.clone(), node));
    }
    tokio::spawn(keep_intents(stage.core.clone()));
}

/// A new proxy over the same journal and nodes.
async fn restarted(stage: &Stage, seed: u64) -> Stage {
    Stage::over(seed, stage.nodes.clone(), stage.journal.clone(), |_| {}).await
}

async fn ok(stage: &Stage, id: &str, n: u64) {
    let c = stage.find("c");
    assert_eq!(stage.upsert(&c, id, n).await.status, 200);
}

fn checkpoint(journal: &FakeJournal, node: &str) -> Lsn {
    journal.node(node).expect("it is remembered").checkpoint
}

/// Node, kind, ids and source.
type Row = (String, RepairKind, Option<Vec<String>>, Option<String>);

/// All repair rows but those of the namespace.
fn repairs(stage: &Stage) -> Vec<Row> {
    let rows = stage.journal.repairs().into_iter();
    let rows = rows.filter(|row| row.generation.is_some());
    rows.map(|row| (row.node, row.kind, row.ids, row.source)).collect()
}

fn names(stage: &Stage) -> Vec<String> {
    let rows = stage.journal.repairs().into_iter();
    rows.filter(|row| row.generation.is_none())
        .map(|row| row.node)
        .collect()
}

fn whole(node: &str) -> Row {
    (node.to_owned(), RepairKind::Whole, None, None)
}

fn records(node: &str, ids: &[&str], source: &str) -> Row {
    let ids = ids.iter().map(|id| (*id).to_owned()).collect();
    (node.to_owned(), RepairKind::Records, Some(ids), Some(source.to_owned()))
}

/// What memory counts is what the journal has.
fn assert_counted(stage: &Stage) {
    let mut counted: Vec<RepairRow> = stage.core.repairs.lock().clone();
    let mut there = stage.journal.repairs();
    counted.sort_by_key(|row| row.id);
    there.sort_by_key(|row| row.id);
    assert_eq!(counted, there);
}

#[tokio::test(start_paused = true)]
async fn s04_a_node_that_restarts_wiped_between_two_probes_serves_nothing_and_repairs_nobody() {
    let stage = stage(60).await;
    let c = stage.create("c").await;
    ok(&stage, "x", 1).await;
    stage.a().wipe();
    stage.a().restart();
    // No probe has failed, no connection was refused.
    ok(&stage, "x", 2).await;
    assert!(!stage.core.cluster.node(A).is_up());
    assert!(!stage.core.marker_is_unchanged(A).await);
    stage.a().forget_requests();
    stage.admit(A).await.expect("it can be repaired");
    seconds(60).await;
    assert_eq!(
        (repairs(&stage), names(&stage)),
        (vec![whole("a")], vec!["a".to_owned()])
    );
    assert_eq!(stage.journal.rows(), rows(&[("a", "w2")]), "kept, and not drained");
    assert_eq!(stage.a().mutations(), Vec::<String>::new());
    assert_eq!((stage.usable(&c), c.node_id(A)), (vec![B], None));
    assert_eq!(stage.documents(B, "c"), [("x".to_owned(), "w2".to_owned())]);
    assert_counted(&stage);
}

/// Its connections live on, and lead to an empty server: its 404 is nobody's answer, and B is not repaired from it.
#[tokio::test(start_paused = true)]
async fn s04_a_404_of_a_node_that_is_not_what_it_was_takes_it_out() {
    let stage = stage(68).await;
    let c = stage.create("c").await;
    ok(&stage, "x", 1).await;
    stage.a().wipe();
    ok(&stage, "x", 2).await;
    assert!(!stage.core.cluster.node(A).is_up());
    assert_eq!(stage.usable(&c), [B]);
    assert_eq!(stage.journal.rows(), rows(&[("a", "w2")]));
    assert_eq!(repairs(&stage), [], "who it is comes first");
    assert_eq!(stage.documents(B, "c"), [("x".to_owned(), "w2".to_owned())]);
}

#[tokio::test(start_paused = true)]
async fn s05_a_node_restored_to_a_moment_after_its_checkpoint_is_compared_by_what_was_written_since() {
    let stage = quiet_stage(61).await;
    let c = stage.create("c").await;
    let d = stage.create("d").await;
    ok(&stage, "before", 1).await;
    let backup = stage.a().snapshot();
    ok(&stage, "x", 2).await;
    ok(&stage, "y", 3).await;
    stage.down(A);
    ok(&stage, "z", 4).await;
    stage.a().restore(backup);
    stage.up(A).await;
    stage.drained().await;
    assert_eq!(
        repairs(&stage),
        [records("a", &["before", "x", "y"], "b")],
        "z was drained"
    );
    assert_eq!((stage.usable(&c), stage.usable(&d)), (vec![B], vec![A, B]));
    assert_eq!(names(&stage), ["a"], "collections were created since, too");
    // Again: one row says it all, and it is a new one.
    let first = stage.journal.repairs()[0].id;
    stage.down(A);
    stage.up(A).await;
    assert_eq!(repairs(&stage), [records("a", &["before", "x", "y", "z"], "b")]);
    assert!(stage.journal.repairs().iter().all(|row| row.id != first));
    assert_counted(&stage);
}

#[tokio::test(start_paused = true)]
async fn a_node_whose_checkpoint_is_current_comes_back_without_a_row() {
    let stage = stage(62).await;
    let c = stage.create("c").await;
    ok(&stage, "x", 1).await;
    seconds(3).await;
    stage.b().restart();
    seconds(1).await;
    assert_eq!(stage.usable(&c), [A]);
    stage.up(B).await;
    assert_eq!(stage.journal.repairs(), vec![]);
    assert_eq!(stage.usable(&c), [A, B]);
}

#[tokio::test(start_paused = true)]
async fn s36_what_was_to_be_repaired_from_a_node_that_is_wiped_is_not() {
    let stage = quiet_stage(63).await;
    let c = stage.create("c").await;
    stage.b().fault("\"w1\"", 1, REFUSED);
    ok(&stage, "x", 1).await;
    assert_eq!(repairs(&stage), [records("b", &["x"], "a")]);
    stage.drained().await;
    stage.a().wipe();
    stage.a().restart();
    seconds(1).await;
    stage.up(A).await;
    assert_eq!(repairs(&stage), [whole("a")]);
    assert_eq!(stage.usable(&c), [B], "it holds what there is");
    assert_eq!(stage.documents(B, "c"), [("x".to_owned(), "w1".to_owned())]);
    assert_counted(&stage);
}

#[tokio::test(start_paused = true)]
async fn s37_two_nodes_that_restart_do_not_wait_for_each_other() {
    let stage = quiet_stage(64).await;
    let c = stage.create("c").await;
    ok(&stage, "x", 1).await;
    stage.down(A);
    stage.down(B);
    stage.up(A).await;
    assert_eq!(stage.journal.repairs(), vec![]);
    assert_eq!(stage.usable(&c), [A]);
    stage.up(B).await;
    assert_eq!(repairs(&stage), [records("b", &["x"], "a")]);
    assert_eq!(stage.usable(&c), [A]);
}

#[tokio::test(start_paused = true)]
async fn s37_alone_a_node_serves_also_while_the_log_is_away() {
    let stage = quiet_stage(65).await;
    let c = stage.create("c").await;
    ok(&stage, "x", 1).await;
    stage.down(A);
    stage.down(B);
    stage.journal.set_down(true);
    stage.up(A).await;
    assert_eq!(stage.usable(&c), [A]);
    stage.b().set_down(false);
    let reason = stage.admit(B).await.expect_err("nobody knows what it lacks");
    assert!(reason.contains("log"), "{reason}");
    assert_eq!(stage.core.cluster.node(B).last_error(), Some(reason));
    stage.journal.set_down(false);
    stage.up(B).await;
    assert_eq!(repairs(&stage), [records("b", &["x"], "a")]);
}

#[tokio::test(start_paused = true)]
async fn s38_a_node_restored_around_a_restart_of_the_proxy_leads_nothing() {
    let stage = stage(66).await;
    stage.create("c").await;
    ok(&stage, "x", 1).await;
    seconds(3).await;
    let backup = stage.a().snapshot();
    ok(&stage, "x", 2).await;
    seconds(3).await;
    let after = {
        stage.down(A);
        stage.down(B);
        stage.a().restore(backup);
        restarted(&stage, 67).await
    };
    after.nodes[A].set_down(false);
    let reason = after.admit(A).await.expect_err("alone");
    assert!(
        reason.contains("restored") && reason.contains("diptych node accept a"),
        "{reason}"
    );
    assert!(!after.core.cluster.node(A).is_up());
    assert_eq!(after.journal.repairs(), vec![]);
    after.up(B).await;
    after.up(A).await;
    let c = after.find("c");
    assert_eq!(
        (repairs(&after), names(&after)),
        (vec![whole("a")], vec!["a".to_owned()])
    );
    assert_eq!(after.usable(&c), [B]);
    assert_eq!(after.documents(B, "c"), [("x".to_owned(), "w2".to_owned())]);
    // What it says from now on counts: it is not taken for older still.
    after.down(A);
    after.up(A).await;
    assert_eq!(repairs(&after), [whole("a")]);
    assert_counted(&after);
}

#[tokio::test(start_paused = true)]
async fn an_operator_accepts_a_node_that_was_restored_and_is_alone() {
    let stage = stage(68).await;
    let c = stage.create("c").await;
    seconds(3).await;
    let backup = stage.a().snapshot();
    ok(&stage, "x", 1).await;
    seconds(3).await;
    stage.down(B);
    stage.down(A);
    stage.a().restore(backup);
    stage.a().set_down(false);
    assert!(stage.admit(A).await.is_err());
    stage.core.accept(A).await.expect("accepted");
    stage.up(A).await;
    assert_eq!(stage.usable(&c), [A]);
    ok(&stage, "x", 2).await;
    assert_eq!(stage.documents(A, "c"), [("x".to_owned(), "w2".to_owned())]);
    // An empty one is none that could be accepted.
    stage.down(A);
    stage.a().wipe();
    stage.a().set_down(false);
    let reason = stage.core.accept(A).await.expect_err("empty");
    assert!(reason.contains("nothing to accept"), "{reason}");
}

#[tokio::test(start_paused = true)]
async fn two_names_for_one_server_are_refused() {
    let one = Arc::new(FakeNode::new(1));
    let stage = Stage::over(69, [one.clone(), one], Arc::default(), |_| {}).await;
    stage.up(A).await;
    let reason = stage.admit(B).await.expect_err("it is A");
    assert!(reason.contains("the marker of the node a"), "{reason}");
    assert!(!stage.core.cluster.node(B).is_up());
    assert_eq!(stage.core.cluster.node(B).last_error(), Some(reason));
    assert!(stage.journal.node("b").is_none());
}

#[tokio::test(start_paused = true)]
async fn two_nodes_that_were_swapped_are_refused() {
    let stage = stage(70).await;
    stage.create("c").await;
    seconds(3).await;
    let [a, b] = stage.nodes.clone();
    let swapped = Stage::over(71, [b, a], stage.journal.clone(), |_| {}).await;
    for node in [A, B] {
        let reason = swapped.admit(node).await.expect_err("swapped");
        assert!(reason.contains("swapped"), "{reason}");
    }
    assert_eq!(swapped.journal.repairs(), vec![]);
}

#[tokio::test(start_paused = true)]
async fn a_journal_older_than_the_nodes_is_noticed() {
    let stage = stage(72).await;
    stage.create("c").await;
    ok(&stage, "x", 1).await;
    seconds(3).await;
    let restore = stage.journal.backup();
    ok(&stage, "x", 2).await;
    seconds(3).await;
    let seen = checkpoint(&stage.journal, "a");
    restore(&stage.journal);
    let after = restarted(&stage, 73).await;
    for node in [A, B] {
        after.up(node).await;
    }
    let verify = ("b".to_owned(), RepairKind::Verify, None, Some("a".to_owned()));
    assert_eq!(repairs(&after), [verify]);
    let c = after.find("c");
    assert_eq!(after.usable(&c), [A]);
    assert!(after.core.log.next_lsn() > seen);
    ok(&after, "x", 3).await;
    assert!(after.journal.payloads_of("b").iter().all(|row| row.lsn > seen));
    assert_counted(&after);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_restarts_while_it_is_asked_who_it_is_is_asked_again() {
    let stage = stage(74).await;
    stage.create("c").await;
    ok(&stage, "x", 1).await;
    stage.down(B);
    stage.b().wipe();
    stage.b().set_down(false);
    let (open, opened) = watch::channel(false);
    let admits = |commit: &Commit| {
        commit
            .iter()
            .any(|change| matches!(change, Change::ForgetNodeIds { .. }))
    };
    stage.journal.fault(admits, [CommitFault::Held(opened)]);
    let admission = tokio::spawn({
        let stage = stage.clone();
        async move { stage.admit(B).await }
    });
    seconds(1).await;
    let first = stage.b().snapshot();
    stage.b().wipe();
    stage.b().restart();
    open.send_replace(true);
    let _ = admission.await.expect("it ends");
    assert!(
        !stage.core.cluster.node(B).is_up(),
        "what was read was said by another process"
    );
    stage.up(B).await;
    let known = stage.journal.node("b").expect("remembered").marker;
    let says = |folder| {
        let node = FakeNode::new(9);
        node.restore(folder);
        node.marker()
    };
    assert_eq!(says(stage.b().snapshot()), Some(known.clone()));
    assert_ne!(says(first), Some(known));
    assert_eq!(repairs(&stage), [whole("b")]);
    assert_counted(&stage);
}

#[tokio::test(start_paused = true)]
async fn a_node_whose_rows_cannot_be_written_stays_out() {
    let stage = stage(75).await;
    let c = stage.create("c").await;
    ok(&stage, "x", 1).await;
    stage.down(B);
    stage.b().wipe();
    stage.b().set_down(false);
    let repairs_b = |commit: &Commit| commit.iter().any(|change| matches!(change, Change::InsertRepair(_)));
    stage.journal.fault(repairs_b, [CommitFault::Refused]);
    assert!(stage.admit(B).await.is_err());
    assert!(!stage.core.cluster.node(B).is_up());
    // The row that was tried is tried until it is there; then the node is admitted.
    seconds(2).await;
    stage.up(B).await;
    assert_eq!(repairs(&stage), [whole("b")]);
    assert_eq!(stage.usable(&c), [A]);
    assert_counted(&stage);
}

#[tokio::test(start_paused = true)]
async fn the_last_node_is_kept_while_it_is_slow_and_not_when_it_may_be_another() {
    let stage = stage(76).await;
    let c = stage.create("c").await;
    stage.down(B);
    stage.core.cluster.observe(A, false);
    assert_eq!(stage.usable(&c), [A], "its probes fail, but it is the same process");
    stage.a().restart();
    seconds(1).await;
    assert_eq!(stage.usable(&c), Vec::<usize>::new());
    stage.core.cluster.observe(A, true);
    assert_eq!(stage.usable(&c), Vec::<usize>::new(), "probes do not tell who it is");
    stage.up(A).await;
    assert_eq!(stage.usable(&c), [A]);
}

#[tokio::test(start_paused = true)]
async fn a_checkpoint_covers_what_the_node_has_and_nothing_else() {
    let stage = stage(77).await;
    stage.create("c").await;
    ok(&stage, "x", 1).await;
    seconds(3).await;
    let lsn = stage.core.log.next_lsn();
    let both = ["a", "b"].map(|node| checkpoint(&stage.journal, node));
    assert!(both.iter().all(|&at| at < lsn && at >= lsn - 5), "{both:?} at {lsn}");
    stage.down(B);
    ok(&stage, "x", 2).await;
    seconds(90).await;
    assert!(checkpoint(&stage.journal, "a") > lsn);
    assert_eq!(checkpoint(&stage.journal, "b"), both[B], "it lacks something");
    let intents = stage.core.log.journal().intents(0, 10).await.expect("the fake journal");
    assert_eq!(intents.len(), 1, "what both have is dropped: {intents:?}");
    stage.pause_drain(true);
    stage.up(B).await;
    seconds(90).await;
    assert_eq!(checkpoint(&stage.journal, "b"), both[B], "it is up, and still lacks it");
    stage.pause_drain(false);
    stage.drained().await;
    seconds(90).await;
    let both = ["a", "b"].map(|node| checkpoint(&stage.journal, node));
    assert!(both.iter().all(|&at| at > lsn), "{both:?} at {lsn}");
    let intents = stage.core.log.journal().intents(0, 10).await.expect("the fake journal");
    assert_eq!(intents, vec![]);
    // Nothing moves, nothing is written.
    stage.nodes.iter().for_each(|node| node.forget_requests());
    seconds(60).await;
    assert!(stage.nodes.iter().all(|node| node.requests() == 0));
}

#[tokio::test(start_paused = true)]
async fn a_reset_takes_the_markers_and_they_are_renewed() {
    let stage = stage(78).await;
    stage.create("c").await;
    let before = ["a", "b"].map(|node| stage.journal.node(node).expect("remembered").marker);
    seconds(3).await;
    stage.down(B);
    let answer = stage.namespace(NamespaceWrite::Reset, Value::Null).await;
    assert_eq!(answer.status, 200);
    stage.create("d").await;
    stage.up(B).await;
    stage.drained().await;
    let after = ["a", "b"].map(|node| stage.journal.node(node).expect("remembered").marker);
    assert!(before[A] != after[A] && before[B] != after[B]);
    seconds(3).await;
    for node in [A, B] {
        assert!(stage.core.marker_is_unchanged(node).await);
        stage.nodes[node].restart();
        seconds(1).await;
        stage.up(node).await;
    }
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn two_empty_nodes_and_an_empty_log_are_ready_at_once() {
    let stage = Stage::new(79).await;
    assert_eq!(stage.core.cluster.up().collect::<Vec<_>>(), [A, B]);
    assert_eq!(stage.journal.repairs(), vec![]);
    let markers = ["a", "b"].map(|node| stage.journal.node(node).expect("remembered").marker);
    assert_ne!(markers[A], markers[B]);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_new_beside_a_catalog_gets_everything() {
    let stage = stage(80).await;
    let c = stage.create("c").await;
    seconds(3).await;
    stage.journal.forget_node("b");
    stage.down(A);
    stage.down(B);
    stage.b().wipe();
    let after = restarted(&stage, 81).await;
    after.up(A).await;
    after.up(B).await;
    assert_eq!(
        (repairs(&after), names(&after)),
        (vec![whole("b")], vec!["b".to_owned()])
    );
    assert_eq!(after.find("c").generation, c.generation);
    assert_eq!(after.usable(&after.find("c")), [A]);
}

/// S34: a bulk load, a restart of B before its next checkpoint, the death of A. B is to be compared record by record, and
/// that can be turned around; a copy of everything could not, and B would not serve what it has.
#[tokio::test(start_paused = true)]
async fn s34_a_node_that_restarts_after_a_bulk_load_serves_when_the_other_dies() {
    let stage = quiet_stage(80).await;
    stage.heal();
    let c = stage.create("c").await;
    for part in 0..3 {
        let ids: Vec<String> = (0..3500).map(|n| format!("{part}-{n}")).collect();
        let body = json!({"ids": ids, "embeddings": vec![[1, 2]; ids.len()]});
        assert_eq!(stage.write(&c, RecordWrite::Upsert, body).await.status, 200);
    }
    stage.down(B);
    stage.pause_drain(true);
    stage.up(B).await;
    assert_eq!(stage.usable(&c), [A], "it is to be compared");
    stage.down(A);
    stage.pause_drain(false);
    stage.eventually("it serves", || stage.usable(&c) == [B]).await;
    assert_eq!(stage.contents(B, "c").records.len(), 10_500);
    stage.up(A).await;
    stage.healed().await;
    stage.assert_converged();
}
