//! With both nodes up, every write reaches both, and the answers are Chroma's own.

use http::Method;
use serde_json::{Value, json};

use crate::harness::api::{Answer, Api};
use crate::harness::chroma::ChromaNode;
use crate::harness::compare::compare_nodes;
use crate::harness::data::{Batch, Rng};
use crate::harness::workload::{Workload, assert_converged, rounds};
use crate::harness::{Stage, scenarios};

scenarios! {
    every_kind_of_write_reaches_both_nodes: sqlite, postgres;
    odd_records_reach_both_nodes_as_they_are: sqlite;
    answers_are_chromas_own: sqlite;
    two_creates_at_once_make_one_collection: sqlite, postgres;
}

async fn every_kind_of_write_reaches_both_nodes(stage: Stage) {
    let cluster = stage.cluster().await;
    let mut workloads: Vec<_> = (0..3)
        .map(|n| Workload::new(&cluster.api, &format!("client{n}"), stage.seed + n))
        .collect();
    for _ in 0..3 {
        rounds(&mut workloads).await;
    }
    cluster.diptych.wait_drained().await;
    assert!(assert_converged(&cluster, &workloads).await >= 30);
}

async fn odd_records_reach_both_nodes_as_they_are(stage: Stage) {
    let cluster = stage.cluster().await;
    let mut rng = Rng::new(stage.seed);
    for space in ["l2", "ip", "cosine"] {
        let extra = json!({"configuration": {"hnsw": {"space": space}}, "metadata": {"space": space, "pi": 2.75}});
        let id = cluster
            .api
            .create_collection(&format!("space-{space}"), extra)
            .await
            .ok()
            .id();
        let batch = Batch::random(&mut rng, "first", 200, 16);
        cluster.api.op(&id, "add", &batch.json_base64()).await.expect(201);
        cluster
            .api
            .op(&id, "upsert", &Batch::random(&mut rng, "first", 50, 16).json())
            .await
            .expect(200);
        let odd = json!({
            "ids": ["a/b", "ü\u{0}é", "x".repeat(5000), "same", "same"],
            "embeddings": (0..5).map(|_| rng.vector(16)).collect::<Vec<_>>(),
            "documents": ["", null, "line\nline", "\u{1F600}", "second of two"],
            "metadatas": [{"i": i64::MAX, "j": i64::MIN}, {}, {"list": ["a", "b"]}, {"f": 1.0, "b": false}, null],
        });
        cluster.api.op(&id, "upsert", &odd).await.expect(200);
    }
    assert!(cluster.assert_equal().await >= 600);
}

/// Every request is sent to the proxy and to a lone Chroma; status and body must be the same but for ids.
async fn answers_are_chromas_own(stage: Stage) {
    let cluster = stage.cluster().await;
    let alone = ChromaNode::start(&stage.dir, "reference").await;
    let mut sides = Vec::new();
    for api in [cluster.api.clone(), alone.api()] {
        let extra = json!({"metadata": {"k": 1}});
        let created = api.create_collection("known", extra).await.ok();
        let other = api.collection("other").await;
        sides.push((api, created.id(), other, created));
    }
    let created: Vec<_> = sides
        .iter()
        .map(|(_, id, other, answer)| normal(answer, &[id, other]))
        .collect();
    assert_eq!(created[0], created[1], "create");

    for (n, (method, path, body, strict)) in requests().into_iter().enumerate() {
        let mut answers = Vec::new();
        for (api, id, other, _) in &sides {
            let path = path.replace("{id}", id).replace("{c}", &api.path("/collections"));
            let headers = [("content-type", "application/json")];
            let answer = api.try_send(method.clone(), &path, &headers, body.clone().into()).await;
            let answer = answer.unwrap_or_else(|e| panic!("request {n}, {method} {path}: {e}"));
            let normal = normal(&answer, &[id, other]);
            answers.push(if strict {
                normal
            } else {
                (normal.0, normal.1, normal.2["error"].clone())
            });
        }
        assert_eq!(
            answers[0],
            answers[1],
            "request {n}: {method} {path} {}",
            String::from_utf8_lossy(&body)
        );
    }
    cluster.diptych.wait_drained().await;
    cluster.assert_equal().await;
    let mirrored = compare_nodes(&[&cluster.a], &[crate::harness::compare::DEFAULT])
        .await
        .expect("itself");
    let lone = compare_nodes(&[&alone], &[crate::harness::compare::DEFAULT])
        .await
        .expect("itself");
    assert_eq!(mirrored.collection("known").records, lone.collection("known").records);
}

/// Status, whether it is marked with Chroma's trace id, body with this server's ids replaced.
fn normal(answer: &Answer, ids: &[&String]) -> (u16, bool, Value) {
    let mut text = answer.text();
    for (n, id) in ids.iter().enumerate() {
        text = text.replace(id.as_str(), &format!("<id {n}>"));
    }
    let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
    (answer.status, answer.header("chroma-trace-id").is_some(), body)
}

/// Method, path, body, and whether the message of an error counts (it does not where the proxy refuses by itself).
fn requests() -> Vec<(Method, &'static str, Vec<u8>, bool)> {
    let mut all = Vec::new();
    let mut send = |method: Method, path: &'static str, body: Value, strict: bool| {
        all.push((
            method,
            path,
            if body.is_null() {
                Vec::new()
            } else {
                body.to_string().into_bytes()
            },
            strict,
        ));
    };
    let records = json!({"ids": ["r1", "r2", "r3"], "embeddings": [[1, 2], [3, 4], [5, 6.5]],
                         "documents": ["one", "two", null], "metadatas": [{"k": 1}, {"k": 2}, null]});
    let post = Method::POST;
    send(post.clone(), "{c}/{id}/add", records.clone(), true);
    send(post.clone(), "{c}/{id}/add", records.clone(), true);
    send(post.clone(), "{c}/{id}/upsert", records, true);
    send(
        post.clone(),
        "{c}/{id}/update",
        json!({"ids": ["r1", "no"], "metadatas": [{"k": null, "z": 1.5}, null]}),
        true,
    );
    for body in [
        json!({}),
        json!({"ids": ["r2", "r1", "no"], "include": ["embeddings", "documents", "metadatas", "uris"]}),
        json!({"where": {"k": {"$gt": 0}}, "limit": 1, "offset": 0, "include": []}),
        json!({"where_document": {"$contains": "two"}}),
        json!({"where": {"k": {"$nope": 0}}}),
        json!({"where": []}),
        json!({"include": ["nonsense"]}),
    ] {
        send(post.clone(), "{c}/{id}/get", body, true);
    }
    send(
        post.clone(),
        "{c}/{id}/query",
        json!({"query_embeddings": [[1, 2]], "n_results": 1}),
        true,
    );
    send(
        post.clone(),
        "{c}/{id}/query",
        json!({"query_embeddings": [[1, 2, 3]]}),
        true,
    );
    send(
        post.clone(),
        "{c}/{id}/query",
        json!({"query_embeddings": "none"}),
        true,
    );
    send(
        post.clone(),
        "{c}/{id}/query",
        json!({"query_embeddings": [[1, 2]], "ids": ["no"]}),
        true,
    );
    for (body, strict) in [
        (json!({"ids": ["d"], "embeddings": [[1, 2, 3]]}), true),
        (json!({"ids": ["d", "e"], "embeddings": [[1, 2]]}), false),
        (json!({"ids": ["d", "e"], "embeddings": [[1, 2], [1, 2, 3]]}), false),
        (json!({"ids": [""], "embeddings": [[1, 2]]}), false),
        (
            json!({"ids": ["d"], "embeddings": [[1, 2]], "metadatas": [{"#k": 1}]}),
            false,
        ),
        (
            json!({"ids": ["d"], "embeddings": [[1, 2]], "metadatas": [{"k": null}]}),
            false,
        ),
        (json!({"ids": ["d"], "embeddings": [[1, 1e300]]}), false),
        (
            json!({"ids": ["d", "e"], "embeddings": ["AACAPwAAIMA=", [1, 2]]}),
            false,
        ),
        (json!({"ids": ["d"]}), false),
        (json!({"ids": "d"}), false),
        (json!([]), false),
        (json!({"ids": [], "embeddings": []}), true),
    ] {
        send(post.clone(), "{c}/{id}/add", body, strict);
    }
    for body in [
        json!({}),
        json!({"ids": []}),
        json!({"limit": 2}),
        json!({"ids": ["r1"], "limit": 1}),
        json!({"ids": 1}),
    ] {
        send(post.clone(), "{c}/{id}/delete", body, true);
    }
    send(
        post.clone(),
        "{c}/{id}/delete",
        json!({"where": {"k": 2}, "limit": 5}),
        true,
    );
    send(post.clone(), "{c}/{id}/delete", json!({"where": {"k": 2}}), true);
    send(
        post.clone(),
        "{c}/{id}/delete",
        json!({"ids": ["r3", "r3", "no"]}),
        true,
    );
    let unknown = "{c}/00000000-1111-2222-3333-444444444444";
    for op in ["add", "get", "delete"] {
        let path: &'static str = Box::leak(format!("{unknown}/{op}").into_boxed_str());
        send(post.clone(), path, json!({"ids": ["x"], "embeddings": [[1]]}), true);
    }
    send(
        Method::GET,
        "{c}/00000000-1111-2222-3333-444444444444/count",
        Value::Null,
        true,
    );
    send(
        Method::GET,
        "{c}/by-id/00000000-1111-2222-3333-444444444444",
        Value::Null,
        true,
    );
    send(Method::GET, "{c}/by-id/not-an-id", Value::Null, true);
    send(Method::GET, "{c}/by-id/{id}", Value::Null, true);
    send(Method::GET, "{c}/{id}", Value::Null, true);
    send(Method::GET, "{c}/known", Value::Null, true);
    send(Method::GET, "{c}/unknown", Value::Null, true);
    send(Method::DELETE, "{c}/unknown", Value::Null, true);
    send(Method::GET, "{c}/{id}/indexing_status", Value::Null, true);
    send(Method::GET, "{c}/{id}/fork_count", Value::Null, true);
    send(Method::GET, "{c}/{id}/functions/name", Value::Null, true);
    send(post.clone(), "{c}/{id}/fork", json!({"new_name": "forked"}), true);
    send(post.clone(), "{c}/{id}/search", json!({"searches": []}), true);
    for body in [
        json!({"name": "known"}),
        json!({"name": "no"}),
        json!({"name": "bad name"}),
        json!({"name": "fine", "metadata": {}}),
        json!({"nam": "fine"}),
        json!({"name": "fine", "configuration": {"hnsw": {"space": "nonsense"}}}),
    ] {
        send(post.clone(), "{c}", body, true);
    }
    send(
        post.clone(),
        "/api/v2/tenants/default_tenant/databases/nowhere/collections",
        json!({"name": "fine"}),
        true,
    );
    send(Method::PUT, "{c}/{id}", json!({"new_name": "other"}), true);
    send(Method::PUT, "{c}/{id}", json!({"new_metadata": {}}), true);
    send(Method::PUT, "{c}/{id}", json!({"new_name": "x"}), true);
    send(Method::PUT, "{c}/{id}", json!({"new_metadata": {"fresh": true}}), true);
    send(
        Method::PUT,
        "{c}/{id}",
        json!({"new_configuration": {"hnsw": {"ef_search": 77}}}),
        true,
    );
    send(Method::GET, "{c}/known", Value::Null, true);
    send(Method::GET, "{c}?limit=1&offset=5", Value::Null, true);
    send(
        Method::GET,
        "/api/v2/tenants/default_tenant/databases/default_database/collections_count",
        Value::Null,
        true,
    );
    for path in [
        "tenants/default_tenant",
        "tenants/nobody",
        "tenants/nobody/databases",
        "version",
        "healthcheck",
        "pre-flight-checks",
        "auth/identity",
        "tenants/default_tenant/databases/default_database",
        "nothing",
    ] {
        send(
            Method::GET,
            Box::leak(format!("/api/v2/{path}").into_boxed_str()),
            Value::Null,
            true,
        );
    }
    send(Method::GET, "/api/v1/collections", Value::Null, true);
    send(Method::GET, "/nothing", Value::Null, true);
    send(post.clone(), "/api/v2/tenants", json!({"name": "default_tenant"}), true);
    // Its message prints a hash map, in an order of chance.
    send(post.clone(), "/api/v2/tenants", json!({"name": "x"}), false);
    send(
        post.clone(),
        "/api/v2/tenants/default_tenant/databases",
        json!({"name": "default_database"}),
        true,
    );
    send(
        Method::DELETE,
        "/api/v2/tenants/default_tenant/databases/unknown",
        Value::Null,
        true,
    );
    send(
        Method::PATCH,
        "/api/v2/tenants/default_tenant",
        json!({"resource_name": "x"}),
        true,
    );
    send(post.clone(), "/api/v2/reset", Value::Null, true);
    send(Method::PUT, "/api/v2/heartbeat", Value::Null, true);
    all.push((post.clone(), "{c}/{id}/add", b"{not json".to_vec(), false));
    all.push((post, "{c}/{id}/get", b"{not json".to_vec(), true));
    all
}

async fn two_creates_at_once_make_one_collection(stage: Stage) {
    let cluster = stage.cluster().await;
    for round in 0..5 {
        let name = format!("plain-{round}");
        let statuses = at_once(&cluster.api, &name, json!({})).await;
        assert_eq!(
            statuses.iter().filter(|(status, _)| *status == 200).count(),
            1,
            "{statuses:?}"
        );
        assert_eq!(
            statuses.iter().filter(|(status, _)| *status == 409).count(),
            7,
            "{statuses:?}"
        );
        let name = format!("either-{round}");
        let mut answers = at_once(&cluster.api, &name, json!({"get_or_create": true})).await;
        answers.dedup();
        assert_eq!(answers.len(), 1, "one id for all: {answers:?}");
        let id = cluster.api.by_name(&name).await.ok().id();
        cluster
            .api
            .op(&id, "add", &json!({"ids": ["x"], "embeddings": [[round, 1]]}))
            .await
            .expect(201);
    }
    assert_eq!(cluster.assert_equal().await, 5);
}

async fn at_once(api: &Api, name: &str, extra: Value) -> Vec<(u16, Value)> {
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (api, name, extra) = (api.clone(), name.to_owned(), extra.clone());
        tasks.spawn(async move { api.create_collection(&name, extra).await });
    }
    tasks
        .join_all()
        .await
        .into_iter()
        .map(|answer| (answer.status, answer.json()["id"].clone()))
        .collect()
}
