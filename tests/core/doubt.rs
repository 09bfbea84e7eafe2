//! Outcomes that are unknown, or that only look so.

use std::time::Duration;

use diptych::chroma::RecordWrite;
use serde_json::json;

use crate::fakes::{A, ALWAYS, B, DISK_FULL, Fault, Gate, LOCKED, REFUSED, Stage, rows, seconds, text, value};

const WEIRD: &str = r#"{"error":"InternalError","message":"something nobody has seen before"}"#;

/// A request that both nodes refuse, but whose first answer was lost: nothing is left to repair, and nobody is out.
#[tokio::test(start_paused = true)]
async fn an_entry_that_nobody_answered_and_every_node_refuses_takes_no_node_out() {
    for b_is_away in [true, false] {
        let stage = Stage::new(1).await;
        let c = stage.create("c").await;
        assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
        if b_is_away {
            stage.down(B);
        }
        stage.a().fault("\"bad\"", 1, Fault::ClosedBefore);
        stage.b().fault("\"bad\"", 1, Fault::ClosedBefore);
        stage.a().fault("/heartbeat", 1, Fault::ClosedBefore);
        let bad = json!({"ids": ["bad"], "embeddings": [[1, 2, 3, 4, 5, 6, 7]], "documents": ["bad"]});
        let answer = stage.write(&c, RecordWrite::Upsert, bad).await;
        assert_eq!(answer.status, 504, "{}", text(&answer));
        stage.up(B).await;
        stage.drained().await;
        assert_eq!(stage.journal.repairs(), vec![], "B away: {b_is_away}");
        assert_eq!(stage.usable(&c), [A, B]);
        stage.assert_converged();
    }
}

/// Nobody had answered a delete; B, which has another record to be repaired, did it when it was drained, and A refused it.
/// No client was told that it was done, and A has the record: B gets it back.
#[tokio::test(start_paused = true)]
async fn what_the_node_that_has_everything_refuses_is_undone_on_the_other() {
    let stage = Stage::new(8).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.a().fault("\"w2\"", 9, REFUSED);
    assert_eq!(stage.upsert(&c, "y", 2).await.status, 400);
    assert_eq!(stage.usable(&c), [A], "B is to be repaired");
    let deletes = r#"{"ids":["x"]}"#;
    stage.a().fault(deletes, 1, Fault::ClosedBefore);
    let late = Fault::Slow(Duration::from_secs(1), Box::new(REFUSED));
    stage.a().fault(deletes, 1, late);
    stage.a().fault("/heartbeat", 1, Fault::ClosedBefore);
    let answer = stage.write(&c, RecordWrite::Delete, json!({"ids": ["x"]})).await;
    assert_eq!(answer.status, 504, "{}", text(&answer));
    stage
        .eventually("drained", || stage.journal.payloads_of("a").is_empty())
        .await;
    assert_eq!(stage.documents(B, "c"), [("y".to_owned(), "w2".to_owned())], "B did it");
    assert_eq!(stage.documents(A, "c"), [("x".to_owned(), "w1".to_owned())]);
    stage.heal();
    stage.healed().await;
    assert_eq!(stage.documents(B, "c"), [("x".to_owned(), "w1".to_owned())]);
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn unknown_on_both_nodes_is_logged_for_both_and_ends_applied_on_both() {
    let stage = Stage::new(1).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.pause_drain(true);
    stage.a().fault("\"w2\"", 1, Fault::ClosedAfter);
    stage.b().fault("\"w2\"", 1, Fault::ClosedBefore);
    stage.b().fault("/heartbeat", 1, Fault::ClosedBefore);
    let answer = stage.upsert(&c, "x", 2).await;
    assert_eq!(answer.status, 504, "{}", text(&answer));
    assert_eq!(stage.journal.rows(), rows(&[("a", "w2"), ("b", "w2")]));
    assert!(stage.journal.payloads_of("a")[0].in_doubt && stage.journal.payloads_of("b")[0].in_doubt);
    assert_eq!(stage.journal.repairs(), vec![]);
    assert!(stage.usable(&c).is_empty(), "neither is known to hold every entry");
    for node in &stage.nodes {
        node.forget_requests();
    }
    stage.pause_drain(false);
    stage.drained().await;
    for node in [A, B] {
        assert_eq!(
            stage.nodes[node].trace(),
            ["canary", "w2"],
            "a canary goes before what is in doubt"
        );
        assert_eq!(stage.documents(node, "c"), [("x".to_owned(), "w2".to_owned())]);
    }
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn a_request_on_which_every_node_closes_while_probes_pass_is_not_queued() {
    let stage = Stage::new(2).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    for node in &stage.nodes {
        node.fault("\"w2\"", 9, Fault::ClosedBefore);
    }
    let answer = stage.upsert(&c, "y", 2).await;
    assert_eq!(answer.status, 502, "{}", text(&answer));
    seconds(60).await;
    assert_eq!(stage.journal.rows(), vec![], "it would fail for ever");
    let repairs = stage.journal.repairs();
    assert_eq!(repairs.len(), 1, "{repairs:?}");
    assert_eq!(
        (repairs[0].node.as_str(), repairs[0].source.as_deref()),
        ("b", Some("a"))
    );
    assert_eq!(repairs[0].ids, Some(vec!["y".to_owned()]));
    assert_eq!(stage.usable(&c), [A]);
    for node in [A, B] {
        assert_eq!(stage.documents(node, "c"), [("x".to_owned(), "w1".to_owned())]);
        let sent = stage.nodes[node].trace();
        assert_eq!(
            sent.iter().filter(|text| *text == "w2").count(),
            1,
            "sent once and never again"
        );
    }
}

/// Every node closes the connection and lives: nothing is replayed, and what each made of the request is made equal to the
/// first. What reaches the first later than it was read would stay there alone.
#[tokio::test(start_paused = true)]
async fn what_every_node_closed_and_carries_out_late_is_compared_after_it_landed() {
    let stage = Stage::new(74).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    for node in &stage.nodes {
        node.fault("\"w2\"", 9, Fault::LandsLate(Duration::from_secs(5)));
    }
    let answer = stage.upsert(&c, "y", 2).await;
    assert_eq!(answer.status, 502, "{}", text(&answer));
    stage.heal();
    stage.healed().await;
    // Before the records are compared again, as suspects.
    seconds(6).await;
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn the_same_unknown_error_from_both_nodes_is_answered_as_it_is() {
    let stage = Stage::new(3).await;
    let c = stage.create("c").await;
    stage.a().fault("\"w1\"", 9, Fault::AppliedBut(500, WEIRD));
    stage.b().fault("\"w1\"", 9, Fault::Answer(500, WEIRD));
    let answer = stage.upsert(&c, "x", 1).await;
    assert_eq!((answer.status, answer.body.as_ref()), (500, WEIRD.as_bytes()));
    seconds(60).await;
    assert_eq!(stage.journal.rows(), vec![]);
    let repairs = stage.journal.repairs();
    assert_eq!(repairs.len(), 1, "{repairs:?}");
    assert_eq!(
        (repairs[0].node.as_str(), repairs[0].source.as_deref()),
        ("b", Some("a"))
    );
    assert_eq!(stage.usable(&c), [A]);
    assert_eq!(stage.documents(A, "c"), [("x".to_owned(), "w1".to_owned())]);
    assert_eq!(stage.documents(B, "c"), []);
    assert_eq!(
        (stage.a().trace(), stage.b().trace()),
        (vec!["canary".into(), "w1".into()], vec!["canary".into(), "w1".into()])
    );
}

#[tokio::test(start_paused = true)]
async fn a_locked_database_is_asked_again_and_the_write_is_applied_once() {
    let stage = Stage::new(4).await;
    let c = stage.create("c").await;
    stage.b().fault("\"w1\"", 3, LOCKED);
    let answer = stage.write(&c, RecordWrite::Add, value("x", 1)).await;
    assert_eq!(answer.status, 201, "{}", text(&answer));
    assert_eq!(stage.b().trace(), ["canary", "w1", "w1", "w1", "w1"]);
    assert_eq!(stage.a().trace(), ["canary", "w1"]);
    assert_eq!(stage.journal.rows(), vec![]);
    stage.assert_converged();

    stage.b().forget_requests();
    stage.b().fault("\"w2\"", 6, LOCKED);
    assert_eq!(
        stage.upsert(&c, "x", 2).await.status,
        200,
        "locked for longer than the grace"
    );
    assert_eq!(stage.journal.rows(), rows(&[("b", "w2")]));
    stage.drained().await;
    assert_eq!(stage.b().trace(), [vec!["w2"; 6], vec!["canary", "w2"]].concat());
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn a_stragglers_late_success_settles_its_own_row_without_a_replay() {
    let stage = Stage::new(5).await;
    let c = stage.create("c").await;
    stage.b().forget_requests();
    let gate = Gate::new();
    stage.b().fault("\"w1\"", 1, Fault::Held(gate.clone()));
    let before = stage.core.env.now();
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    let took = stage.core.env.now() - before;
    assert!(
        took >= stage.core.settings.mirror_grace && took.as_secs() < 3,
        "{took:?}"
    );
    assert_eq!(stage.usable(&c), [A]);
    assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
    assert_eq!(stage.upsert(&c, "y", 3).await.status, 200);
    seconds(120).await;
    assert_eq!(
        stage.b().trace(),
        ["w1"],
        "nothing else is sent to it before it answered"
    );
    assert_eq!(stage.journal.rows(), rows(&[("b", "w1"), ("b", "w2"), ("b", "w3")]));
    assert!(stage.journal.payloads_of("b")[0].in_doubt);
    gate.open();
    stage.drained().await;
    assert_eq!(stage.b().trace(), ["w1", "w2+w3"], "the late answer settles its row");
    stage.assert_converged();
    assert_eq!(stage.documents(B, "c")[0], ("x".to_owned(), "w2".to_owned()));
}

/// B refused meanwhile what A says late to have taken: no client was told that it was done, and it is undone on A.
#[tokio::test(start_paused = true)]
async fn a_stragglers_late_success_is_compared_with_what_the_other_node_made_of_it() {
    let stage = Stage::new(9).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.pause_drain(true);
    stage.down(B);
    assert_eq!(stage.upsert(&c, "y", 2).await.status, 200);
    stage.up(B).await;
    let gate = Gate::new();
    stage.a().fault("\"w3\"", 1, Fault::Held(gate.clone()));
    stage.b().fault("\"w3\"", 2, REFUSED);
    assert_eq!(stage.upsert(&c, "x", 3).await.status, 504);
    assert_eq!(stage.journal.rows(), rows(&[("b", "w2"), ("a", "w3"), ("b", "w3")]));
    stage.pause_drain(false);
    stage
        .eventually("B is drained", || stage.journal.rows() == rows(&[("a", "w3")]))
        .await;
    gate.open();
    stage.heal();
    stage.healed().await;
    for node in [A, B] {
        let expected = [("x", "w1"), ("y", "w2")].map(|(id, document)| (id.to_owned(), document.to_owned()));
        assert_eq!(stage.documents(node, "c"), expected);
    }
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn a_stragglers_late_failure_is_replayed_in_its_place_after_a_canary() {
    let late = [Fault::ClosedBefore, Fault::ClosedAfter, DISK_FULL, Fault::Hidden];
    for (seed, failure) in late.into_iter().enumerate() {
        let stage = Stage::new(60 + seed as u64).await;
        let c = stage.create("c").await;
        stage.b().forget_requests();
        let gate = Gate::new();
        stage.b().fault("\"w1\"", 1, Fault::Held(gate.clone()));
        assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
        assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
        seconds(30).await;
        assert_eq!(stage.b().trace(), ["w1"], "{failure:?}");
        gate.open_to(failure.clone());
        stage.drained().await;
        assert_eq!(stage.b().trace(), ["w1", "canary", "w1", "w2"], "{failure:?}");
        stage.assert_converged();
        assert_eq!(stage.documents(B, "c"), [("x".to_owned(), "w2".to_owned())]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_write_that_a_node_logged_but_does_not_show_is_made_equal() {
    let stage = Stage::new(7).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.a().fault("\"w2\"", 1, Fault::Hidden);
    let update = json!({"ids": ["x"], "documents": ["w2"], "metadatas": [{"n": null, "m": 2}]});
    let answer = stage.write(&c, RecordWrite::Update, update).await;
    assert_eq!(answer.status, 200, "{}", text(&answer));
    stage.drained().await;
    stage.assert_converged();
    assert_eq!(stage.documents(A, "c"), [("x".to_owned(), "w2".to_owned())]);
}

/// S21: neither answers before the deadline; what each does then is awaited, not abandoned.
#[tokio::test(start_paused = true)]
async fn s21_a_write_that_no_node_answers_in_time_ends_as_applied_on_both() {
    let ends = [
        Fault::None,
        Fault::ClosedBefore,
        Fault::ClosedAfter,
        DISK_FULL,
        Fault::Hidden,
    ];
    for (on_a, on_b) in ends
        .iter()
        .flat_map(|a| ends.iter().map(move |b| (a.clone(), b.clone())))
    {
        let stage = Stage::with(8, |settings| settings.write_timeout = Duration::from_secs(30)).await;
        let c = stage.create("c").await;
        assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
        let gates = [Gate::new(), Gate::new()];
        for (node, gate) in stage.nodes.iter().zip(&gates) {
            node.forget_requests();
            node.fault("\"w2\"", 1, Fault::Held(gate.clone()));
        }
        let answer = stage.upsert(&c, "x", 2).await;
        assert_eq!(answer.status, 504, "{}", text(&answer));
        assert_eq!(stage.journal.rows(), rows(&[("a", "w2"), ("b", "w2")]));
        let early = stage.upsert(&c, "x", 3).await;
        assert_eq!(
            early.status,
            503,
            "no node is known to hold everything: {}",
            text(&early)
        );
        for node in [A, B] {
            assert_eq!(
                stage.nodes[node].trace(),
                ["w2"],
                "nothing else is sent before it answered"
            );
        }
        gates[A].open_to(on_a.clone());
        seconds(20).await;
        assert_eq!(stage.usable(&c), [A], "{on_a:?}");
        assert_eq!(stage.upsert(&c, "x", 4).await.status, 200);
        gates[B].open_to(on_b.clone());
        stage.drained().await;
        stage.assert_converged();
        assert_eq!(
            stage.documents(B, "c"),
            [("x".to_owned(), "w4".to_owned())],
            "{on_a:?} {on_b:?}"
        );
    }
}

/// S21: every node takes longer for the batch than a client waits, each time, and the first time its connection breaks
/// before the answer: what is drained has no such deadline.
#[tokio::test(start_paused = true)]
async fn s21_a_batch_that_always_takes_longer_than_the_deadline_gets_through() {
    let stage = Stage::with(21, |settings| settings.write_timeout = Duration::from_secs(30)).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    let slow = |then| Fault::Slow(Duration::from_secs(40), Box::new(then));
    for node in &stage.nodes {
        node.fault("\"w2\"", 1, slow(Fault::ClosedBefore));
        node.fault("\"w2\"", ALWAYS, slow(Fault::None));
    }
    let answer = stage.upsert(&c, "x", 2).await;
    assert_eq!(answer.status, 504, "{}", text(&answer));
    assert_eq!(stage.journal.rows(), rows(&[("a", "w2"), ("b", "w2")]));
    stage.drained().await;
    assert_eq!(stage.documents(A, "c"), [("x".to_owned(), "w2".to_owned())]);
    stage.assert_converged();
}

/// S11: what was broken off is still on its way; replayed too early it would land after its successors.
#[tokio::test(start_paused = true)]
async fn s11_a_write_that_lands_late_lands_before_its_replay() {
    let stage = Stage::new(9).await;
    stage.heal();
    let c = stage.create("c").await;
    stage.b().fault("\"w1\"", 1, Fault::LandsLate(Duration::from_secs(20)));
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
    stage.drained().await;
    seconds(60).await;
    stage.assert_converged();
    assert_eq!(stage.documents(B, "c"), [("x".to_owned(), "w2".to_owned())]);
}
