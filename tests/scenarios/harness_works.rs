//! The harness itself, on bare Chroma servers: a comparison that cannot fail would prove nothing.

use std::time::Duration;

use serde_json::json;

use crate::harness::chroma::ChromaNode;
use crate::harness::compare::{DEFAULT, assert_nodes_equal, compare_nodes};
use crate::harness::data::{Batch, Rng, base64_embedding};
use crate::harness::fault::FaultNode;
use crate::harness::load::Load;
use crate::harness::postgres::Postgres;
use crate::harness::{Stage, api::Api, scenarios};

scenarios! {
    the_comparison_sees_every_difference: sqlite;
    nodes_keep_their_data_over_kill_and_stop: sqlite;
    faults_do_what_they_say: sqlite;
    load_notices_lost_writes: sqlite;
    postgres_restarts_with_its_data: sqlite;
}

async fn pair(stage: &Stage) -> (ChromaNode, ChromaNode) {
    tokio::join!(ChromaNode::start(&stage.dir, "a"), ChromaNode::start(&stage.dir, "b"))
}

async fn the_comparison_sees_every_difference(stage: Stage) {
    let (a, b) = pair(&stage).await;
    let mut rng = Rng::new(stage.seed);
    let first = Batch::random(&mut rng, "x", 30, 3);
    let more = json!({"metadata": {"k": 1}, "configuration": {"hnsw": {"space": "cosine"}}});
    let both = async |operation: &'static str, body: &serde_json::Value| {
        for node in [&a, &b] {
            let id = node.api().by_name("col").await.ok().id();
            node.api().op(&id, operation, body).await.ok();
        }
    };
    for node in [&a, &b] {
        let id = node.api().create_collection("col", more.clone()).await.ok().id();
        node.api().op(&id, "add", &first.json()).await.ok();
    }
    assert_eq!(assert_nodes_equal(&[&a, &b], &[DEFAULT]).await, 30);
    let mut ids = Vec::new();
    for node in [&a, &b] {
        let dump = compare_nodes(&[node], &[DEFAULT]).await.expect("a node equals itself");
        assert!(dump.reads >= 4, "{} reads", dump.reads);
        ids.push(dump.collection("col").id.clone());
    }
    assert_ne!(ids[0], ids[1], "each node has its own");

    let api = b.api();
    let id = api.by_name("col").await.ok().id();
    // A uri on a record without metadata changes its metadata from null to {}: not what is meant here.
    both("update", &json!({"ids": ["x-6"], "metadatas": [{"q": 1}]})).await;
    // Each is done on one node, must be seen, and is done on both to be equal again.
    let differences = [
        (
            "upsert",
            json!({"ids": ["x-3"], "embeddings": [[9.0, 1.0, 2.0]]}),
            "embedding",
        ),
        ("update", json!({"ids": ["x-4"], "documents": ["else"]}), "document"),
        ("update", json!({"ids": ["x-5"], "metadatas": [{"z": 1}]}), "metadata"),
        ("update", json!({"ids": ["x-6"], "uris": ["file:///z"]}), "uri"),
        (
            "delete",
            json!({"ids": ["x-7"]}),
            "records: only on the first: 1 ([\"x-7\"])",
        ),
        (
            "add",
            json!({"ids": ["y"], "embeddings": [[1.0, 2.0, 3.0]]}),
            "only on the second: 1 ([\"y\"])",
        ),
    ];
    for (operation, body, seen) in differences {
        api.op(&id, operation, &body).await.ok();
        let difference = compare_nodes(&[&a, &b], &[DEFAULT]).await.expect_err(seen);
        assert!(difference.contains(seen), "{difference} should say {seen}");
        both(operation, &body).await;
        assert_nodes_equal(&[&a, &b], &[DEFAULT]).await;
    }
    // Order: the record moves to the end on one node only.
    api.op(&id, "delete", &json!({"ids": ["x-0"]})).await.ok();
    let again = json!({"ids": ["x-0"], "embeddings": [first.embeddings[0]], "documents": [first.documents[0]],
                       "metadatas": [first.metadatas[0]], "uris": [first.uris[0]]});
    api.op(&id, "add", &again).await.ok();
    let difference = compare_nodes(&[&a, &b], &[DEFAULT]).await.expect_err("order");
    assert!(difference.contains("order of get"), "{difference}");
    api.create_collection("only-here", json!(null)).await.ok();
    let difference = compare_nodes(&[&a, &b], &[DEFAULT]).await.expect_err("names");
    assert!(difference.contains("only-here"), "{difference}");
    assert_eq!(base64_embedding(&[1.0, -2.5]), "AACAPwAAIMA=");
}

async fn nodes_keep_their_data_over_kill_and_stop(stage: Stage) {
    let mut node = ChromaNode::start(&stage.dir, "a").await;
    let id = node.api().collection("c-1").await;
    let batch = Batch::random(&mut Rng::new(stage.seed), "x", 5, 2);
    node.api().op(&id, "add", &batch.json_base64()).await.expect(201);
    node.kill9();
    node.api().try_get("/api/v2/heartbeat").await.expect_err("a dead node");
    node.restart().await;
    assert_eq!(node.api().count(&id).await.ok().json(), 5);
    node.sigstop();
    let (api, path) = (node.api(), node.api().records(&id, "count"));
    let read = tokio::spawn(async move { api.get_path(&path).await });
    assert!(!read.is_finished());
    node.sigcont();
    assert_eq!(read.await.expect("no panic").ok().json(), 5);
    node.kill9();
    node.wipe();
    node.restart().await;
    node.api().by_name("c-1").await.expect(404);
}

async fn faults_do_what_they_say(stage: Stage) {
    let node = ChromaNode::start(&stage.dir, "a").await;
    let hop = FaultNode::start(node.port).await;
    let api = Api::pooled(&hop.url());
    let id = api.collection("col").await;
    let body = |n: i32| json!({"ids": [format!("x{n}")], "embeddings": [[n, 1]]});
    let direct = node.api();
    let count = async || direct.count(&id).await.ok().json();

    api.op(&id, "add", &body(1)).await.expect(201);
    assert_eq!(hop.seen(|s| s.is_op("add"))[0].json()["ids"][0], "x1");
    hop.answer(1, 418, r#"{"error":"E","message":"M"}"#, |s| s.is_op("add"));
    assert_eq!(
        api.op(&id, "add", &body(2)).await.expect(418).error(),
        ("E".into(), "M".into())
    );
    api.op(&id, "add", &body(2)).await.expect(201);
    hop.apply_then_close(1, |s| s.is_op("add"));
    api.try_op(&id, "add", &body(3)).await.expect_err("no answer");
    assert_eq!(count().await, 3);
    hop.close_unsent(1, |s| s.is_op("add"));
    api.try_op(&id, "add", &body(4)).await.expect_err("no answer");
    assert_eq!(count().await, 3);

    let gate = hop.hold_requests(|s| s.is_op("add"));
    let held = tokio::spawn({
        let (api, id, body) = (api.clone(), id.clone(), body(5));
        async move { api.op(&id, "add", &body).await }
    });
    gate.wait_held(1).await;
    assert_eq!(count().await, 3);
    // The client gives up; the node gets the request all the same.
    held.abort();
    gate.release();
    crate::harness::eventually(Duration::from_secs(10), "the straggler lands", || async {
        if count().await == 4 { Ok(()) } else { Err("not yet") }
    })
    .await;
    let gate = hop.hold_answers(|s| s.is_op("count"));
    let held = tokio::spawn({
        let (api, id) = (api.clone(), id.clone());
        async move { api.count(&id).await }
    });
    gate.wait_held(1).await;
    assert!(!held.is_finished());
    gate.release();
    assert_eq!(held.await.expect("no panic").ok().json(), 4);
    hop.delay(1, Duration::from_millis(20), |s| s.is_op("count"));
    assert_eq!(api.count(&id).await.ok().json(), 4);
    hop.black_hole(true);
    let lost = tokio::spawn({
        let (api, id) = (api.clone(), id.clone());
        async move { api.count(&id).await }
    });
    assert_eq!(count().await, 4);
    assert!(!lost.is_finished());
    hop.black_hole(false);
    lost.await.expect("no panic").ok();
}

async fn load_notices_lost_writes(stage: Stage) {
    let node = ChromaNode::start(&stage.dir, "a").await;
    let hop = FaultNode::start(node.port).await;
    let api = Api::pooled(&hop.url());
    let id = api.collection("col").await;
    let load = Load::start(&api, &id, 2, 2, stage.seed);
    load.wait_writes(20).await;
    load.wait_reads(20).await;
    let report = load.stop().await;
    report.assert_clean();
    let dump = compare_nodes(&[&node], &[DEFAULT])
        .await
        .expect("one node equals itself");
    report.assert_present(dump.collection("col"));

    // A server that acknowledges without writing.
    hop.answer(10, 200, "{}", |s| s.is_op("upsert"));
    let load = Load::start(&api, &id, 1, 2, stage.seed + 1);
    load.wait_writes(30).await;
    load.wait_reads(100).await;
    let report = load.stop().await;
    assert!(!report.errors.is_empty(), "stale reads are errors");
}

async fn postgres_restarts_with_its_data(stage: Stage) {
    let (mut postgres, dir) = (None, stage.dir.clone());
    tokio::task::block_in_place(|| {
        let cluster = postgres.insert(Postgres::dedicated(&dir));
        let url = cluster.create_database("Some::name");
        assert!(url.ends_with("_some__name"), "{url}");
        cluster.kill9();
        cluster.start();
        cluster.stop();
        cluster.start();
        cluster.create_database("other");
        crate::harness::postgres::shared_database("shared");
    });
}
