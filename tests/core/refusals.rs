//! Nodes that disagree on whether a request is any good.

use bytes::Bytes;
use diptych::chroma::{Op, RecordWrite};
use diptych::mirror::RecordEntry;
use serde_json::json;

use crate::fakes::{A, B, Fault, Gate, REFUSED, Stage, rows, text, value};

#[tokio::test(start_paused = true)]
async fn a_write_that_only_the_second_node_refuses_is_acked_with_both_rows() {
    let stage = Stage::new(1).await;
    stage.heal();
    let c = stage.create("c").await;
    stage.b().fault("\"w1\"", 2, REFUSED);
    stage.pause_drain(true);
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    assert_eq!(stage.journal.rows(), rows(&[("b", "w1")]));
    let repairs = stage.journal.repairs();
    assert_eq!(repairs.len(), 1, "{repairs:?}");
    assert_eq!(
        (repairs[0].node.as_str(), repairs[0].source.as_deref()),
        ("b", Some("a"))
    );
    assert_eq!(repairs[0].ids, Some(vec!["x".to_owned()]));
    assert_eq!(stage.usable(&c), [A], "reads go to the other");
    assert_eq!(stage.documents(A, "c"), [("x".to_owned(), "w1".to_owned())]);
    assert_eq!(stage.documents(B, "c"), []);
    stage.b().forget_requests();
    assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
    assert_eq!(stage.journal.rows(), rows(&[("b", "w1"), ("b", "w2")]));
    assert_eq!(
        stage.b().trace(),
        Vec::<String>::new(),
        "nothing is sent to a node that has to be repaired"
    );
    stage.pause_drain(false);
    stage.eventually("repaired", || stage.usable(&c) == [A, B]).await;
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn a_write_that_only_the_lead_refuses_is_refused_and_repaired_on_the_other() {
    let stage = Stage::new(2).await;
    let c = stage.create("c").await;
    stage.a().fault("\"w1\"", 9, REFUSED);
    let answer = stage.upsert(&c, "x", 1).await;
    assert_eq!(answer.status, 400, "{}", text(&answer));
    assert_eq!(stage.journal.rows(), vec![]);
    let repairs = stage.journal.repairs();
    assert_eq!(repairs.len(), 1, "{repairs:?}");
    assert_eq!(
        (repairs[0].node.as_str(), repairs[0].source.as_deref()),
        ("b", Some("a"))
    );
    assert_eq!(stage.usable(&c), [A], "reads go to the other");
    assert_eq!(stage.documents(A, "c"), []);
    assert_eq!(stage.documents(B, "c"), [("x".to_owned(), "w1".to_owned())]);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_by_both_is_the_clients_and_leaves_no_rows() {
    let stage = Stage::new(3).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    let long = json!({"ids": ["y"], "embeddings": [[1, 2, 3]]});
    let answer = stage.write(&c, RecordWrite::Add, long).await;
    assert_eq!(answer.status, 400, "{}", text(&answer));
    stage.assert_converged();
}

/// S4: the collection is lost on one node; its 404 is not the client's answer.
#[tokio::test(start_paused = true)]
async fn a_404_for_a_catalogued_collection_is_covered_by_the_other_node() {
    for lost in [A, B] {
        let stage = Stage::new(4).await;
        let c = stage.create("c").await;
        assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
        stage.nodes[lost].with(|chroma| chroma.lose("c"));
        assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
        let (name, other) = [("a", B), ("b", A)][lost];
        assert_eq!(stage.journal.rows(), rows(&[(name, "w2")]));
        let repairs = stage.journal.repairs();
        assert_eq!(repairs.len(), 1, "{repairs:?}");
        assert_eq!(repairs[0].node, name);
        assert_eq!(stage.usable(&c), [other]);
        assert_eq!(stage.documents(other, "c"), [("x".to_owned(), "w2".to_owned())]);
    }
}

/// S16: a refused add sets the dimension of the node that refused it (chroma-facts.md 18.1).
#[tokio::test(start_paused = true)]
async fn s16_a_refused_add_that_sets_the_dimension_reaches_the_node_that_was_away() {
    let stage = Stage::new(5).await;
    let c = stage.create("c").await;
    stage.down(B);
    let uneven = json!({"ids": ["x"], "embeddings": [[1, 2, 3]], "documents": ["w1", "w2"]});
    let body = Bytes::from(uneven.to_string());
    let ids = vec!["x".to_owned()];
    let entry = RecordEntry {
        op: Op::Add,
        body,
        ids,
        has_embeddings: true,
        filter: None,
        client: None,
    };
    let answer = stage.core.submit(&c, entry).await;
    assert_eq!(answer.status, 400, "{}", text(&answer));
    assert_eq!(stage.contents(A, "c").dimension, Some(3));
    assert!(stage.journal.payloads_of("b")[0].refused);
    stage.up(B).await;
    stage.drained().await;
    assert_eq!(stage.contents(B, "c").dimension, Some(3));
    stage.assert_converged();
    assert_eq!(stage.write(&c, RecordWrite::Add, value("x", 1)).await.status, 400);
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn a_full_lane_answers_429_and_drains() {
    let stage = Stage::with(6, |settings| settings.lanes.writes = 4).await;
    let c = stage.create("c").await;
    let gate = Gate::new();
    for node in &stage.nodes {
        node.fault("\"w1\"", 1, Fault::Held(gate.clone()));
    }
    let first = stage.start_upsert(&c, "x", 1);
    stage
        .eventually("the first is sent", || stage.b().trace().contains(&"w1".to_owned()))
        .await;
    let waiting: Vec<_> = (2..6).map(|n| stage.start_upsert(&c, "x", n)).collect();
    stage.eventually("four wait", || c.lane.waiting() == 4).await;
    let refused = stage.upsert(&c, "x", 6).await;
    assert_eq!(refused.status, 429, "{}", text(&refused));
    assert!(refused.headers.contains_key(http::header::RETRY_AFTER));
    gate.open();
    assert_eq!(first.await.expect("an answer").status, 200);
    for write in waiting {
        assert_eq!(write.await.expect("an answer").status, 200);
    }
    assert_eq!(stage.documents(A, "c"), [("x".to_owned(), "w5".to_owned())]);
    assert_eq!(stage.upsert(&c, "x", 7).await.status, 200);
    stage.assert_converged();
}

/// Takes a collection off both nodes behind the proxy's back.
fn lose_everywhere(stage: &Stage) {
    let path = "/api/v2/tenants/default_tenant/databases/default_database/collections/c";
    for node in &stage.nodes {
        node.with(|chroma| chroma.handle(&http::Method::DELETE, path, b"", false));
    }
}

#[tokio::test(start_paused = true)]
async fn what_nodes_say_of_a_write_that_none_took_has_the_id_that_clients_see() {
    let stage = Stage::new(240).await;
    let c = stage.create("c").await;
    lose_everywhere(&stage);
    let answer = stage.upsert(&c, "x", 1).await;
    assert_eq!(answer.status, 503, "{}", text(&answer));
    let its_own = c.node_id(B).expect("an id").to_string();
    assert!(!text(&answer).contains(&its_own), "{}", text(&answer));
    assert!(text(&answer).contains(&c.client_id.to_string()), "{}", text(&answer));
}

/// I40: that a node lacks a collection which the catalog has is never a client's answer.
#[tokio::test(start_paused = true)]
async fn a_delete_by_filter_that_no_node_can_resolve_is_not_told_that_there_is_no_collection() {
    let stage = Stage::new(241).await;
    let c = stage.create("c").await;
    lose_everywhere(&stage);
    let answer = stage.write(&c, RecordWrite::Delete, json!({"where": {"n": 1}})).await;
    assert_eq!(answer.status, 503, "{}", text(&answer));
}
