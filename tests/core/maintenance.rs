//! Maintenance: a node that an operator took out is left alone, loses nothing, and comes back like one that was away.

use diptych::journal::{Change, Commit};
use diptych::mirror::StaysIn;
use http::Method;
use serde_json::json;
use std::time::Duration;
use tokio::sync::watch;

use crate::fakes::{A, B, CommitFault, Fault, Gate, Port, Stage, rows, seconds};

const NOW: Duration = Duration::ZERO;

#[tokio::test(start_paused = true)]
async fn a_node_that_is_out_is_sent_nothing_and_is_equal_when_it_is_back() {
    let stage = Stage::new(90).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.probe();
    assert_eq!(stage.core.take_out(B, "alice", NOW).await, Ok(0));
    stage.b().forget_requests();
    assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
    assert_eq!(stage.upsert(&c, "y", 3).await.status, 200);
    let d = stage.create("d").await;
    assert_eq!(stage.upsert(&d, "z", 4).await.status, 200);
    seconds(120).await;
    assert_eq!(stage.b().requests(), 0, "not even a canary or a marker");
    assert_eq!((stage.usable(&c), stage.usable(&d)), (vec![A], vec![A]));
    let missed = [("b", "w2"), ("b", "w3"), ("b", "create_collection"), ("b", "w4")];
    assert_eq!(stage.journal.rows(), rows(&missed));

    assert_eq!(stage.core.take_back(B, "alice").await, Ok(true));
    stage.drained().await;
    stage.assert_converged();
    assert_eq!(stage.core.take_back(B, "alice").await, Ok(false));
}

#[tokio::test(start_paused = true)]
async fn the_last_node_that_serves_something_stays_in_service() {
    let stage = Stage::new(91).await;
    let c = stage.create("c").await;
    stage.create("d").await;
    let needed = |reason: &str| Err(StaysIn::Needed(reason.to_owned()));
    stage.down(B);
    assert_eq!(
        stage.core.take_out(A, "alice", NOW).await,
        needed("no other node is up")
    );
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.pause_drain(true);
    stage.up(B).await;
    assert_eq!(
        stage.core.take_out(A, "alice", NOW).await,
        needed("no other node is in step with the collection c")
    );
    // Of two at once, one stays.
    stage.pause_drain(false);
    stage.drained().await;
    let (first, second) = tokio::join!(stage.core.take_out(A, "alice", NOW), stage.core.take_out(B, "bob", NOW));
    assert_eq!((first, second), (Ok(0), needed("no other node is up")));
    assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
}

#[tokio::test(start_paused = true)]
async fn without_the_log_a_node_stays_as_it_is() {
    let stage = Stage::new(92).await;
    stage.create("c").await;
    stage.journal.set_down(true);
    seconds(2).await;
    assert_eq!(stage.core.take_out(A, "alice", NOW).await, Err(StaysIn::NoLog));
    assert!(stage.core.cluster.node(A).is_up());
    stage.journal.set_down(false);
    seconds(2).await;
    assert_eq!(stage.core.take_out(A, "alice", NOW).await, Ok(0));
    stage.journal.set_down(true);
    assert_eq!(stage.core.take_back(A, "alice").await, Err(StaysIn::NoLog));
    assert!(stage.core.cluster.node(A).is_in_maintenance());
}

#[tokio::test(start_paused = true)]
async fn patience_waits_for_the_other_node() {
    let stage = Stage::new(93).await;
    let c = stage.create("c").await;
    stage.down(B);
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    let asking = tokio::spawn({
        let core = stage.core.clone();
        async move { core.take_out(A, "alice", Duration::from_secs(60)).await }
    });
    seconds(10).await;
    assert!(!asking.is_finished() && !stage.core.cluster.node(A).is_in_maintenance());
    stage.up(B).await;
    assert_eq!(asking.await.expect("an outcome"), Ok(0));
    assert_eq!(stage.usable(&c), [B]);
    // And no longer than it was told.
    let refused = stage.core.take_out(B, "alice", Duration::from_secs(5)).await;
    assert!(matches!(refused, Err(StaysIn::Needed(_))), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn what_is_under_way_at_the_node_is_finished_first() {
    let stage = Stage::with(94, |settings| settings.mirror_grace = Duration::from_secs(3600)).await;
    let c = stage.create("c").await;
    let gate = Gate::new();
    stage.b().fault("\"w1\"", 1, Fault::Held(gate.clone()));
    let write = stage.start_upsert(&c, "x", 1);
    seconds(1).await;
    let asking = tokio::spawn({
        let core = stage.core.clone();
        async move { core.take_out(B, "alice", NOW).await }
    });
    seconds(5).await;
    assert!(!asking.is_finished(), "a write is on its way");
    assert!(stage.core.cluster.node(B).is_in_maintenance(), "and no other starts");
    gate.open();
    assert_eq!(write.await.expect("an answer").status, 200);
    assert_eq!(asking.await.expect("an outcome"), Ok(0));
    assert_eq!(stage.journal.rows(), vec![], "it was applied: nothing is replayed");
    stage.assert_equal();
}

#[tokio::test(start_paused = true)]
async fn it_stays_out_when_the_proxy_starts_anew() {
    let before = Stage::new(95).await;
    let c = before.create("c").await;
    assert_eq!(before.core.take_out(B, "alice", NOW).await, Ok(0));
    assert_eq!(before.upsert(&c, "x", 1).await.status, 200);
    let stage = Stage::over(96, before.nodes.clone(), before.journal.clone(), |_| {}).await;
    stage.heal();
    stage.admit(A).await.expect("admission");
    stage.b().forget_requests();
    stage.probe();
    assert!(stage.core.cluster.is_settled(), "nobody waits for it");
    let c = stage.find("c");
    assert_eq!(stage.upsert(&c, "y", 2).await.status, 200);
    seconds(60).await;
    assert_eq!((stage.b().requests(), stage.usable(&c)), (0, vec![A]));
    let status = Port::of(&stage).get("/status").await;
    assert_eq!(status["instances"][B]["maintenance"]["who"], json!("alice"));
    assert_eq!(stage.core.take_back(B, "bob").await, Ok(true));
    stage.healed().await;
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn a_node_that_was_wiped_while_it_was_out_is_copied_to() {
    let stage = Stage::new(97).await;
    stage.heal();
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    assert_eq!(stage.core.take_out(B, "alice", NOW).await, Ok(0));
    stage.b().wipe();
    assert_eq!(stage.upsert(&c, "y", 2).await.status, 200);
    stage.probe();
    assert_eq!(stage.core.take_back(B, "alice").await, Ok(true));
    stage
        .eventually("it is up", || stage.core.cluster.node(B).is_up())
        .await;
    stage.healed().await;
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn the_verbs_say_who_and_what_and_unknown_nodes_are_none() {
    let stage = Stage::new(98).await;
    stage.create("c").await;
    let port = Port::of(&stage);
    let (status, said) = port.post("/admin/nodes/b/maint").await;
    assert_eq!(
        (status, said),
        (200, json!({"node": "b", "state": "maintenance", "in_flight": 0}))
    );
    let shown = port.get("/status").await;
    let node = &shown["instances"][B];
    assert_eq!(node["maintenance"]["who"], json!("alice (127.0.0.1)"));
    assert_eq!((&node["healthy"], &node["up"]), (&json!(false), &json!(false)));
    assert_eq!(shown["healthy_instances"], json!(1));
    let health = port.get("/health").await;
    assert_eq!(health["status"], json!("degraded"));
    let (status, said) = port.post("/admin/nodes/a/maint?wait=1").await;
    assert_eq!(
        (status, said["message"].as_str()),
        (409, Some("a stays in service: no other node is up."))
    );
    assert_eq!(port.post("/admin/nodes/c/maint").await.0, 404);
    assert_eq!(port.ask(Method::GET, "/admin/nodes/b/ready").await.0, 405);
    let (status, said) = port.post("/admin/nodes/b/ready").await;
    assert_eq!((status, &said["was_in_maintenance"]), (200, &json!(true)));
}

fn takes_out(commit: &Commit) -> bool {
    commit.iter().any(|change| matches!(change, Change::PutMaintenance(_)))
}

fn takes_back(commit: &Commit) -> bool {
    commit
        .iter()
        .any(|change| matches!(change, Change::EndMaintenance { .. }))
}

/// The journal has it that the node is out, and then does not take it back: a start would find it so, and leave alone the
/// only node that serves.
#[tokio::test(start_paused = true)]
async fn a_node_that_turned_out_to_be_needed_is_not_out_after_the_next_start() {
    let stage = Stage::new(270).await;
    stage.create("c").await;
    let (open, opened) = watch::channel(false);
    stage.journal.fault(takes_out, [CommitFault::AnswerHeld(opened)]);
    stage.journal.fault(takes_back, vec![CommitFault::Refused; 5]);
    let its_stage = stage.clone();
    let taking = tokio::spawn(async move { its_stage.core.take_out(B, "alice", NOW).await });
    seconds(1).await;
    stage.down(A);
    open.send_replace(true);
    let needed = StaysIn::Needed("no other node is up".to_owned());
    assert_eq!(taking.await.expect("an answer"), Err(needed));
    assert!(stage.core.cluster.node(B).is_up());
    seconds(60).await;
    let next = Stage::over(271, stage.nodes.clone(), stage.journal.clone(), |_| {}).await;
    assert!(!next.core.cluster.node(B).is_in_maintenance());
}

/// The same, where it was never heard that the journal has it.
#[tokio::test(start_paused = true)]
async fn a_node_whose_taking_out_was_not_heard_of_is_not_out_after_the_next_start() {
    let stage = Stage::new(272).await;
    stage.create("c").await;
    let unheard = [vec![CommitFault::UncertainWritten], vec![CommitFault::Refused; 400]].concat();
    stage.journal.fault(takes_out, unheard);
    assert_eq!(stage.core.take_out(B, "alice", NOW).await, Err(StaysIn::NoLog));
    assert!(stage.core.cluster.node(B).is_up());
    seconds(60).await;
    let next = Stage::over(273, stage.nodes.clone(), stage.journal.clone(), |_| {}).await;
    assert!(!next.core.cluster.node(B).is_in_maintenance());
    // An operator who means it is not overruled.
    assert_eq!(stage.core.cluster.node(B).maintenance(), None);
}
