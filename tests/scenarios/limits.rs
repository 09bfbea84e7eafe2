//! Requests that would harm a node or make nodes differ are refused in Chroma's own form.

use bytes::Bytes;
use serde_json::{Value, json};

use crate::harness::api::Answer;
use crate::harness::{Stage, scenarios};

scenarios! {
    a_poison_metadata_key_is_refused_and_both_nodes_still_write: sqlite;
    list_metadata_on_collections_is_refused: sqlite;
    bodies_up_to_40_mib_are_taken_and_no_more: sqlite;
    the_proxys_own_tenant_is_out_of_reach: sqlite;
}

fn refused(answer: Answer) {
    assert!((400..500).contains(&answer.status), "{answer:?}");
    answer.error();
}

async fn a_poison_metadata_key_is_refused_and_both_nodes_still_write(stage: Stage) {
    let cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let id = api.collection("busy").await;
    api.op(&id, "add", &json!({"ids": ["x"], "embeddings": [[1, 2]]}))
        .await
        .expect(201);
    let poisons = [
        json!({"chroma:document": 1}),
        json!({"chroma:document": null}),
        json!({"k": 1, "chroma:any": "x"}),
    ];
    for poison in &poisons {
        for operation in ["add", "upsert", "update"] {
            let body = json!({"ids": ["x", "y"], "embeddings": [[1, 2], [3, 4]], "metadatas": [null, poison]});
            refused(api.op(&id, operation, &body).await);
        }
    }
    // The same key written with an escape, and twice.
    let sly = r#"{"ids":["y"],"embeddings":[[1,2]],"metadatas":[{"\u0063hroma:document":1}]}"#;
    refused(
        api.post_bytes(&api.records(&id, "upsert"), Bytes::from_static(sly.as_bytes()))
            .await,
    );
    for node in [&cluster.a, &cluster.b] {
        let direct = node.api();
        let id = direct.collection("still-writes").await;
        direct
            .op(&id, "add", &json!({"ids": ["x"], "embeddings": [[1, 2]]}))
            .await
            .expect(201);
    }
    api.op(
        &id,
        "upsert",
        &json!({"ids": ["y"], "embeddings": [[5, 6]], "metadatas": [{"chromatic": 1}]}),
    )
    .await
    .ok();
    cluster.diptych.wait_drained().await;
    assert_eq!(cluster.assert_equal().await, 3);
}

async fn list_metadata_on_collections_is_refused(stage: Stage) {
    let cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let id = api.collection("fine").await;
    for bad in [
        json!(["a", "b"]),
        json!([1, 2]),
        json!({"#type": "sparse_vector", "indices": [1], "values": [1.0]}),
    ] {
        refused(api.create_collection("bad", json!({"metadata": {"list": bad}})).await);
        refused(api.modify(&id, &json!({"new_metadata": {"list": bad}})).await);
    }
    api.by_name("bad").await.expect(404);
    assert_eq!(api.by_name("fine").await.ok().json()["metadata"], Value::Null);
    cluster.diptych.wait_drained().await;
    cluster.assert_equal().await;
}

async fn bodies_up_to_40_mib_are_taken_and_no_more(stage: Stage) {
    const LIMIT: usize = 40 << 20;
    let cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let id = api.collection("big").await;
    // Blanks after the JSON are part of the body.
    let padded = |record: &str, size: usize| {
        let mut body = json!({"ids": [record], "embeddings": [[1, 2]]})
            .to_string()
            .into_bytes();
        body.resize(size, b' ');
        Bytes::from(body)
    };
    api.post_bytes(&api.records(&id, "add"), padded("fits", LIMIT))
        .await
        .expect(201);
    for operation in ["add", "upsert", "update"] {
        api.post_bytes(&api.records(&id, operation), padded("too-big", LIMIT + 1))
            .await
            .expect(413);
    }
    let query = |size: usize| {
        let mut body = json!({"query_embeddings": [[1, 2]], "n_results": 1})
            .to_string()
            .into_bytes();
        body.resize(size, b' ');
        Bytes::from(body)
    };
    assert_eq!(
        api.post_bytes(&api.records(&id, "query"), query(LIMIT))
            .await
            .ok()
            .json()["ids"],
        json!([["fits"]])
    );
    api.post_bytes(&api.records(&id, "query"), query(LIMIT + 1))
        .await
        .expect(413);
    cluster.diptych.wait_drained().await;
    assert_eq!(cluster.assert_equal().await, 1);
}

async fn the_proxys_own_tenant_is_out_of_reach(stage: Stage) {
    let cluster = stage.cluster().await;
    let own = cluster
        .api
        .within(crate::harness::compare::OWN_TENANT, "default_database");
    for answer in [
        own.get_tenant(crate::harness::compare::OWN_TENANT).await,
        own.create_database("mine").await,
        own.create_collection("mine", Value::Null).await,
        own.create_tenant(crate::harness::compare::OWN_TENANT).await,
    ] {
        assert!((400..500).contains(&answer.status), "{answer:?}");
    }
    let databases = own.list_databases().await;
    assert!(
        databases.status >= 400 || databases.json() == json!([]),
        "{databases:?}"
    );
}
