//! Reads are spread, survive the node that they were sent to, and pass bodies of any size.

use serde_json::{Value, json};

use crate::harness::cluster::{Cluster, Options, Side};
use crate::harness::data::{Batch, Rng};
use crate::harness::fault::Seen;
use crate::harness::{Stage, scenarios};

scenarios! {
    reads_are_spread_over_both_nodes: sqlite;
    a_read_that_fails_on_one_node_is_answered_by_the_other: sqlite;
    big_query_bodies_are_served_with_and_without_a_node: sqlite;
    pages_of_records_fit_together: sqlite;
    with_lead_consistency_every_read_goes_to_the_first_node: sqlite;
    with_any_consistency_a_node_that_is_behind_serves_too: sqlite;
}

const DIMENSION: usize = 128;

async fn filled(cluster: &Cluster, seed: u64, count: usize) -> String {
    let id = cluster.api.collection("full").await;
    let batch = Batch::random(&mut Rng::new(seed), "x", count, DIMENSION);
    cluster.api.op(&id, "add", &batch.json_base64()).await.expect(201);
    id
}

fn reads(cluster: &Cluster, side: Side) -> usize {
    let read = |seen: &Seen| !seen.is_own() && (seen.is_op("get") || seen.is_op("query") || seen.is_op("count"));
    cluster.fault(side).seen(read).len()
}

async fn reads_are_spread_over_both_nodes(stage: Stage) {
    let cluster = stage.cluster_with(Options::faults()).await;
    let id = filled(&cluster, stage.seed, 50).await;
    for side in [Side::A, Side::B] {
        cluster.fault(side).forget();
    }
    let mut clients = tokio::task::JoinSet::new();
    for n in 0..6 {
        let (api, id, mut rng) = (cluster.api.clone(), id.clone(), Rng::new(stage.seed + n));
        clients.spawn(async move {
            for _ in 0..20 {
                api.op(&id, "get", &json!({"ids": ["x-1"]})).await.ok();
                api.op(&id, "query", &json!({"query_embeddings": [rng.vector(DIMENSION)]}))
                    .await
                    .ok();
                assert_eq!(api.count(&id).await.ok().json(), 50);
            }
        });
    }
    clients.join_all().await;
    let (a, b) = (reads(&cluster, Side::A), reads(&cluster, Side::B));
    assert_eq!(a + b, 360, "each read is sent once");
    assert!(a > 60 && b > 60, "A served {a} reads, B {b}");
}

async fn a_read_that_fails_on_one_node_is_answered_by_the_other(stage: Stage) {
    let cluster = stage.cluster_with(Options::faults()).await;
    let api = cluster.api.clone();
    let id = filled(&cluster, stage.seed, 20).await;
    for n in 0..40 {
        let fault = cluster.fault(if n % 2 == 0 { Side::A } else { Side::B });
        let read = |seen: &Seen| !seen.is_own() && (seen.is_op("get") || seen.is_op("query") || seen.is_op("count"));
        match n / 2 % 3 {
            0 => fault.close_unsent(1, read),
            1 => fault.apply_then_close(1, read),
            _ => fault.answer(1, 500, r#"{"error":"InternalError","message":"disk I/O error"}"#, read),
        }
        api.op(&id, "get", &json!({"limit": 3})).await.ok();
        api.op(&id, "query", &json!({"query_embeddings": [vec![0.5; DIMENSION]]}))
            .await
            .ok();
        assert_eq!(api.count(&id).await.ok().json(), 20);
        fault.clear();
    }
    cluster.diptych.wait_drained().await;
    cluster.assert_equal().await;
}

async fn big_query_bodies_are_served_with_and_without_a_node(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let id = filled(&cluster, stage.seed, 20).await;
    let mut rng = Rng::new(stage.seed);
    let mut bodies = Vec::new();
    for size in [100 << 10, 2 << 20] {
        let (mut vectors, mut bytes) = (Vec::new(), 0);
        while bytes < size {
            let vector = json!(rng.vector(DIMENSION));
            bytes += vector.to_string().len() + 1;
            vectors.push(vector);
        }
        bodies.push((
            vectors.len(),
            json!({"query_embeddings": vectors, "n_results": 1, "include": []}),
        ));
    }
    let ask = async || {
        for (vectors, body) in &bodies {
            let found = api.op(&id, "query", body).await.ok().json();
            assert_eq!(found["ids"].as_array().map(Vec::len), Some(*vectors));
            assert!(
                found["ids"]
                    .as_array()
                    .expect("lists")
                    .iter()
                    .all(|ids| ids.as_array().map(Vec::len) == Some(1))
            );
        }
    };
    for _ in 0..4 {
        ask().await;
    }
    for side in [Side::A, Side::B] {
        cluster.node(side).kill9();
        for _ in 0..4 {
            ask().await;
        }
        cluster.up(side).await;
    }
}

async fn pages_of_records_fit_together(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let id = filled(&cluster, stage.seed, 60).await;
    api.op(&id, "delete", &json!({"ids": ["x-3", "x-50"]})).await.ok();
    cluster.b.kill9();
    let again = Batch::random(&mut Rng::new(stage.seed), "x", 5, DIMENSION);
    api.op(&id, "upsert", &again.json()).await.ok();
    api.op(
        &id,
        "add",
        &Batch::random(&mut Rng::new(stage.seed), "y", 10, DIMENSION).json(),
    )
    .await
    .ok();
    cluster.up(Side::B).await;
    let ids = |answer: Value| answer["ids"].as_array().cloned().expect("ids");
    let full = ids(api.op(&id, "get", &json!({"include": []})).await.ok().json());
    assert_eq!(full.len(), 69);
    for _ in 0..5 {
        let mut pages = Vec::new();
        for offset in (0..70).step_by(10) {
            let body = json!({"limit": 10, "offset": offset, "include": []});
            pages.extend(ids(api.op(&id, "get", &body).await.ok().json()));
        }
        assert_eq!(pages, full);
    }
    assert_eq!(cluster.assert_equal().await, 69);
}

async fn with_lead_consistency_every_read_goes_to_the_first_node(stage: Stage) {
    let options = Options::faults().extra("reads: { consistency: lead }\n");
    let mut cluster = stage.cluster_with(options).await;
    let id = filled(&cluster, stage.seed, 10).await;
    for side in [Side::A, Side::B] {
        cluster.fault(side).forget();
    }
    for _ in 0..20 {
        cluster.api.op(&id, "get", &json!({"ids": ["x-1"]})).await.ok();
    }
    assert_eq!((reads(&cluster, Side::A), reads(&cluster, Side::B)), (20, 0));
    cluster.down(Side::A).await;
    for _ in 0..5 {
        cluster.api.op(&id, "get", &json!({"ids": ["x-1"]})).await.ok();
    }
    assert_eq!(reads(&cluster, Side::B), 5);
}

async fn with_any_consistency_a_node_that_is_behind_serves_too(stage: Stage) {
    let options = Options::faults().extra("reads: { consistency: any }\n");
    let mut cluster = stage.cluster_with(options).await;
    let api = cluster.api.clone();
    let id = filled(&cluster, stage.seed, 10).await;
    cluster.down(Side::B).await;
    api.op(&id, "delete", &json!({"ids": ["x-1"]})).await.ok();
    let gate = cluster
        .fault(Side::B)
        .hold_requests(|seen| seen.is_record_write() && !seen.is_own());
    cluster.b.restart().await;
    gate.wait_held(1).await;
    cluster.a.kill9();
    for _ in 0..10 {
        let got = api.op(&id, "get", &json!({"ids": ["x-1"]})).await.ok().json();
        assert_eq!(got["ids"], json!(["x-1"]), "what B has, though it was deleted");
    }
    cluster.a.restart().await;
    gate.release();
    cluster.diptych.wait_drained().await;
    assert_eq!(cluster.assert_equal().await, 9);
}
