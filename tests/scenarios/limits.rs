//! Requests that would harm a node or make nodes differ are refused in Chroma's own form.

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::api::Answer;
use crate::harness::{Stage, scenarios};

scenarios! {
    a_poison_metadata_key_is_refused_and_both_nodes_still_write: sqlite;
    list_metadata_on_collections_is_refused: sqlite;
    bodies_up_to_40_mib_are_taken_and_no_more: sqlite;
    the_proxys_own_tenant_is_out_of_reach: sqlite;
    a_target_in_absolute_form_is_like_any_other: sqlite;
    a_request_too_long_for_a_path_blames_no_node: sqlite;
    a_client_that_waits_for_100_continue_is_answered: sqlite;
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

/// Sends a request as it stands and reads until the proxy closes.
async fn by_hand(port: u16, request: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port))
        .await
        .expect("the proxy listens");
    stream.write_all(request.as_bytes()).await.expect("the proxy reads");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("the proxy answers");
    String::from_utf8_lossy(&answer).into_owned()
}

/// `POST http://host/path` is what clients send to an HTTP proxy; Chroma takes it, so it must be mirrored like the path.
async fn a_target_in_absolute_form_is_like_any_other(stage: Stage) {
    let cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let id = api.collection("busy").await;
    let port = cluster.diptych.port;
    let body = r#"{"ids":["x"],"embeddings":[[1,2]]}"#;
    let path = api.records(&id, "upsert");
    let head = format!(
        "host: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}",
        body.len()
    );
    let answer = by_hand(port, &format!("POST http://x{path} HTTP/1.1\r\n{head}\r\n\r\n{body}")).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let own = format!("/api/v2/tenants/{}", crate::harness::compare::OWN_TENANT);
    let answer = by_hand(
        port,
        &format!("GET http://x{own} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"),
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    assert_eq!(cluster.assert_equal().await, 1);
}

async fn a_request_too_long_for_a_path_blames_no_node(stage: Stage) {
    let cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let id = api.collection("busy").await;
    refused(api.create_collection(&"a".repeat(70_000), Value::Null).await);
    let answer = api
        .get_path(&api.path(&format!("/collections/{}", "!".repeat(25_000))))
        .await;
    assert!((400..500).contains(&answer.status), "{}", answer.status);
    let status = cluster.diptych.status().await;
    for instance in status["instances"].as_array().expect("instances") {
        assert_eq!(instance["ejections"], 0, "{status:#}");
    }
    api.op(&id, "upsert", &json!({"ids": ["x"], "embeddings": [[1, 2]]}))
        .await
        .ok();
    assert_eq!(cluster.assert_equal().await, 1);
}

async fn a_client_that_waits_for_100_continue_is_answered(stage: Stage) {
    let cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let id = api.collection("busy").await;
    let port = cluster.diptych.port;
    let path = api.records(&id, "upsert");
    let head = |length: usize| {
        format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nexpect: 100-continue\r\n\
             content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        )
    };
    // Too large: refused on the announcement alone.
    let answer = by_hand(port, &head(41_943_041)).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");

    let body = r#"{"ids":["x"],"embeddings":[[1,2]]}"#;
    let mut stream = TcpStream::connect(("127.0.0.1", port))
        .await
        .expect("the proxy listens");
    stream
        .write_all(head(body.len()).as_bytes())
        .await
        .expect("the proxy reads");
    let mut word = [0; 25];
    stream.read_exact(&mut word).await.expect("a word before the body");
    assert_eq!(&word, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(body.as_bytes()).await.expect("the proxy reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("the proxy answers");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(cluster.assert_equal().await, 1);
}
