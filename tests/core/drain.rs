//! A node comes back.

use std::sync::Arc;
use std::time::Duration;

use diptych::catalog::Collection;
use diptych::chroma::RecordWrite;
use diptych::journal::{Change, Commit};
use serde_json::json;

use crate::fakes::{A, ALWAYS, B, CommitFault, Fault, Gate, REFUSED, Stage, rows, seconds, text, value};

fn removes_payloads(commit: &Commit) -> bool {
    commit.iter().any(|change| matches!(change, Change::RemovePayloads(_)))
}

#[tokio::test(start_paused = true)]
async fn a_refused_batch_is_taken_apart_and_only_the_bad_entry_is_left_to_repair() {
    let stage = Stage::new(1).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "first", 0).await.status, 200);
    stage.down(B);
    for n in 1..=5 {
        assert_eq!(
            stage
                .upsert(&c, ["", "p", "q", "r", "s", "t"][n as usize], n)
                .await
                .status,
            200
        );
    }
    stage.b().forget_requests();
    stage.b().fault("\"w3\"", ALWAYS, REFUSED);
    stage.up(B).await;
    stage
        .eventually("the rows are gone", || stage.journal.rows().is_empty())
        .await;
    assert_eq!(
        stage.b().trace(),
        ["canary", "w1+w2+w3+w4+w5", "w1", "w2", "w3", "w4", "w5"]
    );
    let repairs = stage.journal.repairs();
    assert_eq!(repairs.len(), 1, "{repairs:?}");
    assert_eq!(
        (repairs[0].node.as_str(), &repairs[0].ids),
        ("b", &Some(vec!["r".to_owned()]))
    );
    let ids = |node| {
        stage
            .documents(node, "c")
            .into_iter()
            .map(|(id, _)| id)
            .collect::<Vec<_>>()
    };
    assert_eq!(ids(A), ["first", "p", "q", "r", "s", "t"]);
    assert_eq!(
        ids(B),
        ["first", "p", "q", "s", "t"],
        "the others are applied, in order"
    );
    assert_eq!(stage.usable(&c), [A]);
}

/// Documents that are indexed anew: each is deleted and added. The node gets few requests, and ends in the same order.
#[tokio::test(start_paused = true)]
async fn a_backlog_of_deletes_and_adds_takes_few_requests() {
    let stage = Stage::new(7).await;
    let c = stage.create("c").await;
    let ids: [&'static str; 5] = ["p", "q", "r", "s", "t"];
    for (n, id) in (1..).zip(ids) {
        assert_eq!(stage.upsert(&c, id, n).await.status, 200);
    }
    stage.down(B);
    for (n, id) in (11..).zip(["s", "p", "r"]) {
        let delete = json!({"ids": [id]});
        assert_eq!(stage.write(&c, RecordWrite::Delete, delete).await.status, 200);
        let added = stage.write(&c, RecordWrite::Add, value(id, n)).await;
        assert_eq!(added.status, 201, "{}", text(&added));
        let update = json!({"ids": ["q"], "metadatas": [{"n": n}]});
        assert_eq!(stage.write(&c, RecordWrite::Update, update).await.status, 200);
    }
    stage.b().forget_requests();
    stage.up(B).await;
    stage.drained().await;
    assert_eq!(stage.b().trace(), ["canary", "s+p+r", "w11+w12+w13", "q", "q", "q"]);
    assert_eq!(
        stage
            .documents(B, "c")
            .into_iter()
            .map(|(id, _)| id)
            .collect::<Vec<_>>(),
        ["q", "t", "s", "p", "r"]
    );
    stage.assert_converged();
}

/// S13, S32: [update of an absent id, then a write that makes it]. A second pass over both would apply the update.
#[tokio::test(start_paused = true)]
async fn s32_a_batch_whose_removal_failed_is_removed_before_the_next_is_sent() {
    for made_by in [RecordWrite::Add, RecordWrite::Upsert] {
        for fails in ["w1", "w2"] {
            for fault in [
                CommitFault::Refused,
                CommitFault::UncertainNotWritten,
                CommitFault::UncertainWritten,
            ] {
                let stage = Stage::new(32).await;
                let c = stage.create("c").await;
                stage.down(B);
                let update = json!({"ids": ["x"], "documents": ["w1"], "metadatas": [{"stale": true}]});
                assert_eq!(stage.write(&c, RecordWrite::Update, update).await.status, 200);
                assert!(stage.write(&c, made_by, value("x", 2)).await.status < 300);
                assert_eq!(stage.journal.rows(), rows(&[("b", "w1"), ("b", "w2")]));
                stage.b().forget_requests();
                let failing = stage.journal.payloads_of("b")[usize::from(fails == "w2")].id;
                let is_it = move |commit: &Commit| {
                    commit
                        .iter()
                        .any(|change| matches!(change, Change::RemovePayloads(ids) if ids.contains(&failing)))
                };
                stage.journal.fault(is_it, [fault.clone()]);
                stage.up(B).await;
                stage.drained().await;
                let case = format!("{made_by:?} {fails} {fault:?}");
                // The removal is tried until it is known to be done; nothing is sent meanwhile, and nothing twice.
                assert_eq!(stage.b().trace(), ["canary", "w1", "w2"], "{case}");
                assert_eq!(
                    stage.contents(B, "c").records[0].metadata,
                    *json!({"n": 2}).as_object().expect("a map")
                );
                stage.assert_converged();
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_hangs_on_its_last_batch_does_not_hold_up_live_writes() {
    for answer in [Fault::None, Fault::ClosedAfter, Fault::ClosedBefore] {
        let stage = Stage::new(3).await;
        let c = stage.create("c").await;
        stage.down(B);
        assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
        stage.b().forget_requests();
        let gate = Gate::new();
        stage.b().fault("\"w1\"", 1, Fault::Held(gate.clone()));
        stage.up(B).await;
        stage
            .eventually("the last batch is sent", || {
                stage.b().trace().contains(&"w1".to_owned())
            })
            .await;
        let before = stage.core.env.now();
        assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
        let took = stage.core.env.now() - before;
        assert!(took <= stage.core.settings.mirror_grace * 2, "{took:?}");
        assert_eq!(stage.upsert(&c, "x", 3).await.status, 200);
        seconds(120).await;
        assert_eq!(
            stage.b().trace(),
            ["canary", "w1"],
            "nothing else is sent to it before it answered"
        );
        assert_eq!(stage.journal.rows(), rows(&[("b", "w1"), ("b", "w2"), ("b", "w3")]));
        gate.open_to(answer);
        stage.drained().await;
        assert_eq!(stage.documents(B, "c"), [("x".to_owned(), "w3".to_owned())]);
        stage.assert_converged();
    }
}

#[tokio::test(start_paused = true)]
async fn writes_that_keep_coming_meet_the_node_between_two_of_them() {
    let stage = Stage::with(4, |settings| settings.drain_rows = 5).await;
    let c = stage.create("c").await;
    stage.down(B);
    for n in 0..100 {
        assert_eq!(stage.upsert(&c, ["x", "y", "z"][n as usize % 3], n).await.status, 200);
    }
    let (writer, its_c) = (stage.clone(), c.clone());
    let live = tokio::spawn(async move {
        for n in 100..400 {
            assert_eq!(
                writer.upsert(&its_c, ["x", "y", "z"][n as usize % 3], n).await.status,
                200
            );
        }
    });
    stage.up(B).await;
    stage
        .eventually("in step while writes go on", || stage.usable(&c) == [A, B])
        .await;
    assert!(!live.is_finished(), "the node joins under load");
    live.await.expect("every write is acked");
    stage.drained().await;
    stage.assert_converged();
    assert_eq!(stage.documents(B, "c")[0], ("x".to_owned(), "w399".to_owned()));
}

/// S20: the only node that is up lacks what is in the log; the write waits for its drain.
#[tokio::test(start_paused = true)]
async fn s20_the_last_node_is_drained_before_it_takes_a_write() {
    let stage = Stage::new(5).await;
    let c = stage.create("c").await;
    stage.down(B);
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.pause_drain(true);
    stage.up(B).await;
    stage.down(A);
    let write = stage.start_upsert(&c, "x", 2);
    seconds(2).await;
    assert!(!write.is_finished());
    stage.pause_drain(false);
    let answer = write.await.expect("an answer");
    assert_eq!(answer.status, 200, "{}", text(&answer));
    assert_eq!(stage.documents(B, "c"), [("x".to_owned(), "w2".to_owned())]);
    assert_eq!(stage.journal.rows(), rows(&[("a", "w2")]));
    stage.up(A).await;
    stage.drained().await;
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_breaks_during_the_drain_is_tried_again() {
    let stage = Stage::new(6).await;
    let c = stage.create("c").await;
    stage.down(B);
    for n in 1..=3 {
        assert_eq!(stage.upsert(&c, "x", n).await.status, 200);
    }
    stage.b().forget_requests();
    stage.b().fault("\"w1\"", 3, Fault::ClosedAfter);
    stage.b().fault("\"w2\"", 3, Fault::ClosedBefore);
    stage.journal.fault(removes_payloads, [CommitFault::Refused]);
    stage.up(B).await;
    stage.drained().await;
    assert_eq!(stage.documents(B, "c"), [("x".to_owned(), "w3".to_owned())]);
    stage.assert_converged();
}

/// A node that is alive and closes its connection on one request, time and again, cannot bear that request: it must not
/// hold up the lane for ever (chroma-facts.md 8.3).
#[tokio::test(start_paused = true)]
async fn a_request_on_which_a_living_node_always_closes_is_left_to_repair() {
    let stage = Stage::new(6).await;
    stage.heal();
    let c = stage.create("c").await;
    stage.down(B);
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.b().fault("\"w1\"", 5, Fault::ClosedBefore);
    stage.up(B).await;
    stage
        .eventually("a repair row", || !stage.core.repairs.lock().is_empty())
        .await;
    let sent = stage.b().trace().iter().filter(|&what| what == "w1").count();
    assert_eq!(sent, 5);
    stage.eventually("repaired", || stage.usable(&c) == [A, B]).await;
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn a_delete_by_filter_is_resolved_on_the_next_node_when_the_lead_fails() {
    let stage = Stage::new(7).await;
    let c = stage.create("c").await;
    for n in 1..=4 {
        let body = json!({"ids": [format!("r{n}")], "embeddings": [[n, 1]], "metadatas": [{"odd": n % 2}]});
        assert_eq!(stage.write(&c, RecordWrite::Add, body).await.status, 201);
    }
    stage.a().fault("/get", 2, Fault::ClosedBefore);
    stage.nodes.iter().for_each(|node| node.forget_requests());
    let answer = stage.write(&c, RecordWrite::Delete, json!({"where": {"odd": 1}})).await;
    assert_eq!(
        (answer.status, answer.body.as_ref()),
        (200, br#"{"deleted":2}"#.as_slice())
    );
    let sent = ("delete", json!({"ids": ["r1", "r3"]}));
    for node in &stage.nodes {
        assert_eq!(node.record_writes(), std::slice::from_ref(&sent));
    }
    stage.assert_converged();

    stage.nodes.iter().for_each(|node| node.forget_requests());
    let none = stage.write(&c, RecordWrite::Delete, json!({"where": {"odd": 1}})).await;
    assert_eq!((none.status, none.body.as_ref()), (200, br#"{"deleted":0}"#.as_slice()));
    assert!(stage.a().record_writes().is_empty() && stage.b().record_writes().is_empty());

    stage.down(B);
    let answer = stage
        .write(&c, RecordWrite::Delete, json!({"where": {"odd": 0}, "limit": 1}))
        .await;
    assert_eq!(
        (answer.status, answer.body.as_ref()),
        (200, br#"{"deleted":1}"#.as_slice())
    );
    let missed = stage.journal.payloads_of("b");
    assert_eq!(missed.len(), 1);
    let body: serde_json::Value = serde_json::from_slice(&missed[0].body).expect("a body");
    assert_eq!(body, json!({"ids": ["r2"]}), "the ids are logged, not the filter");
    stage.up(B).await;
    stage.drained().await;
    stage.assert_converged();
    assert_eq!(stage.contents(B, "c").records.len(), 1);
}

/// Clients have written to `live`, and B works on a batch of what it missed of `missed`, until the gate opens.
async fn drain_beside_clients(seed: u64) -> (Stage, Arc<Collection>, Gate) {
    let stage = Stage::new(seed).await;
    let (live, missed) = (stage.create("live").await, stage.create("missed").await);
    for n in 0..30 {
        assert_eq!(stage.upsert(&live, "x", n).await.status, 200);
    }
    stage.down(B);
    for (n, id) in (100..).zip(["p", "q", "r"]) {
        assert_eq!(stage.upsert(&missed, id, n).await.status, 200);
    }
    stage.b().forget_requests();
    let gate = Gate::new();
    stage.b().fault("\"w100\"", 1, Fault::Held(gate.clone()));
    stage.up(B).await;
    let is_sent = || stage.b().trace().contains(&"w100+w101+w102".to_owned());
    stage.eventually("the batch is sent", is_sent).await;
    (stage, live, gate)
}

/// A node works on one write at a time: whoever writes elsewhere would wait for the drain's batch.
#[tokio::test(start_paused = true)]
async fn a_write_does_not_wait_for_a_batch_of_the_drain() {
    let (stage, live, gate) = drain_beside_clients(8).await;
    let behind = Gate::new();
    stage.b().fault("\"w200\"", 1, Fault::Held(behind.clone()));
    let before = stage.core.env.now();
    assert_eq!(stage.upsert(&live, "x", 200).await.status, 200);
    let took = stage.core.env.now() - before;
    assert!(took < Duration::from_millis(100), "{took:?}");
    let its_rows: Vec<_> = stage.journal.rows().into_iter().filter(|row| row.1 == "w200").collect();
    assert_eq!(its_rows, rows(&[("b", "w200")]), "durable before the answer");
    assert_eq!(stage.usable(&live), [A]);
    stage.b().forget_requests();
    behind.open();
    stage
        .eventually("it is in step again", || stage.usable(&live) == [A, B])
        .await;
    assert_eq!(stage.b().trace(), Vec::<String>::new(), "its late answer was enough");
    gate.open();
    stage.drained().await;
    stage.assert_converged();

    // Nothing is drained any more: a node that is silent is waited for as always.
    let silent = Gate::new();
    stage.b().fault("\"w201\"", 1, Fault::Held(silent.clone()));
    let before = stage.core.env.now();
    assert_eq!(stage.upsert(&live, "x", 201).await.status, 200);
    assert!(stage.core.env.now() - before >= stage.core.settings.mirror_grace);
    silent.open();
    stage.drained().await;
    stage.assert_converged();
}

/// What is left is sent before the lane is taken, so that the lane's own writers do not wait for it.
#[tokio::test(start_paused = true)]
async fn while_clients_write_a_lane_is_taken_when_nothing_is_left() {
    let (stage, _, gate) = drain_beside_clients(9).await;
    let missed = stage.find("missed");
    let before = stage.core.env.now();
    assert_eq!(stage.upsert(&missed, "s", 103).await.status, 200);
    let took = stage.core.env.now() - before;
    assert!(took < Duration::from_millis(100), "the lane is free: {took:?}");
    gate.open();
    stage.drained().await;
    assert_eq!(stage.usable(&missed), [A, B]);
    stage.assert_converged();
}

/// The last row is removed while a write is under way that the node was not sent: it joins after that.
#[tokio::test(start_paused = true)]
async fn a_node_joins_between_two_writes_however_the_last_row_goes() {
    let (stage, _, gate) = drain_beside_clients(10).await;
    let missed = stage.find("missed");
    let slow = Gate::new();
    stage.a().fault("\"w103\"", 1, Fault::Held(slow.clone()));
    let write = stage.start_upsert(&missed, "s", 103);
    stage
        .eventually("it is sent", || stage.a().trace().contains(&"w103".to_owned()))
        .await;
    gate.open();
    stage
        .eventually("the rows are gone", || stage.journal.rows().is_empty())
        .await;
    seconds(1).await;
    assert_eq!(stage.usable(&missed), [A], "a write is under way without it");
    slow.open();
    assert_eq!(write.await.expect("an answer").status, 200);
    stage.drained().await;
    assert_eq!(stage.usable(&missed), [A, B]);
    stage.assert_converged();
}
