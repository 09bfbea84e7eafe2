//! One id per collection for clients, whatever the nodes call it; names where Chroma wants an id.

use serde_json::{Value, json};

use crate::harness::cluster::{Cluster, Side};
use crate::harness::{Stage, scenarios};

scenarios! {
    ids_differ_per_node_and_are_translated_in_every_answer: sqlite, postgres;
    every_spelling_and_alias_of_an_id_is_accepted: sqlite;
    names_work_in_place_of_ids: sqlite, postgres;
    lists_are_ordered_by_the_clients_ids: sqlite;
}

const UNKNOWN: &str = "00000000-1111-2222-3333-444444444444";

async fn ids_differ_per_node_and_are_translated_in_every_answer(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let created = api.create_collection("known", json!({"metadata": {"k": 1}})).await.ok();
    let id = created.id();
    let (on_a, on_b) = node_ids(&cluster, "known").await;
    assert_ne!(on_a, on_b);
    assert_eq!(id, on_a, "clients see the id of the node that led");
    api.op(&id, "add", &json!({"ids": ["x"], "embeddings": [[1, 2]]}))
        .await
        .expect(201);
    // Every answer that has an id, from whatever node it comes, also from B alone.
    for side in [None, Some(Side::A)] {
        if let Some(side) = side {
            cluster.node(side).kill9();
        }
        for _ in 0..10 {
            assert_eq!(api.by_name("known").await.ok().id(), id);
            assert_eq!(api.by_id(&id).await.ok().id(), id);
            assert_eq!(api.list("").await.ok().json()[0]["id"], json!(id));
            let again = api
                .create_collection("known", json!({"get_or_create": true}))
                .await
                .ok();
            assert_eq!(again.id(), id);
            assert_eq!(api.count(&id).await.ok().json(), 1);
        }
    }
    // An error that names the collection names it as the client did.
    api.drop_collection("known").await.ok();
    for answer in [
        api.op(&id, "get", &json!({})).await,
        api.op(&id, "add", &json!({"ids": ["x"], "embeddings": [[1, 2]]})).await,
        api.modify(&id, &json!({"new_name": "else"})).await,
        api.by_id(&id).await,
    ] {
        let (error, message) = answer.clone().expect(404).error();
        assert_eq!(error, "NotFoundError", "{answer:?}");
        assert!(message.contains(&id) && !message.contains(&on_b), "{answer:?}");
    }
    cluster.up(Side::A).await;
    cluster.assert_equal().await;
}

async fn every_spelling_and_alias_of_an_id_is_accepted(stage: Stage) {
    let cluster = stage.cluster().await;
    let api = &cluster.api;
    let id = api.collection("known").await;
    let (on_a, on_b) = node_ids(&cluster, "known").await;
    let mut serial = 0;
    for alias in [on_a, on_b] {
        let plain = alias.replace('-', "");
        let spellings = [
            alias.clone(),
            alias.to_uppercase(),
            plain.clone(),
            format!("%7B{alias}%7D"),
            format!("urn:uuid:{alias}"),
            plain.to_uppercase(),
        ];
        for spelling in spellings {
            serial += 1;
            let body = json!({"ids": [format!("x{serial}")], "embeddings": [[serial, 1]]});
            api.op(&spelling, "add", &body).await.expect(201);
            assert_eq!(api.count(&spelling).await.ok().json(), json!(serial), "{spelling}");
            assert_eq!(api.by_id(&spelling).await.ok().id(), id, "{spelling}");
            api.modify(&spelling, &json!({"new_metadata": {"by": spelling}}))
                .await
                .ok();
        }
    }
    // The tenant and the database in the path of record routes are ignored, as Chroma does.
    let elsewhere = api.within("nobody", "nowhere");
    elsewhere
        .op(&id, "add", &json!({"ids": ["else"], "embeddings": [[0, 1]]}))
        .await
        .expect(201);
    // GET and DELETE of a collection take names only: an id is no name there.
    api.by_name(&id).await.expect(404);
    api.drop_collection(&id).await.expect(404);
    api.op(UNKNOWN, "get", &json!({})).await.expect(404);
    assert_eq!(cluster.assert_equal().await, serial + 1);
}

async fn names_work_in_place_of_ids(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let id = api.collection("by.name-1").await;
    // A collection that looks like an id in its own right, which it is not.
    let looks = api.collection(UNKNOWN).await;
    for (n, name) in ["by.name-1", "by%2Ename-1"].into_iter().enumerate() {
        let ids = json!([format!("x{n}"), format!("y{n}")]);
        api.op(name, "add", &json!({"ids": ids, "embeddings": [[1, 2], [3, 4]]}))
            .await
            .expect(201);
        api.op(
            name,
            "upsert",
            &json!({"ids": [ids[0]], "embeddings": [[9, 9]], "documents": ["doc"]}),
        )
        .await
        .ok();
        api.op(name, "update", &json!({"ids": [ids[0]], "metadatas": [{"k": 1}]}))
            .await
            .ok();
        let got = api.op(name, "get", &json!({"ids": [ids[0]]})).await.ok().json();
        assert_eq!(
            (&got["documents"][0], &got["metadatas"][0]),
            (&json!("doc"), &json!({"k": 1}))
        );
        api.op(name, "query", &json!({"query_embeddings": [[9, 9]], "n_results": 1}))
            .await
            .ok();
        let deleted = api.op(name, "delete", &json!({"where": {"k": 1}})).await.ok();
        assert_eq!(deleted.json(), json!({"deleted": 1}));
    }
    assert_eq!(api.count("by.name-1").await.ok().json(), 2);
    assert_eq!(api.count(&id).await.ok().json(), 2);
    // A name that looks like an id is taken as an id.
    api.count(UNKNOWN).await.expect(404);
    assert_eq!(api.count(&looks).await.ok().json(), 0);
    // Names count in the path's database only.
    api.create_database("elsewhere").await.ok();
    let elsewhere = api.within("default_tenant", "elsewhere");
    let refused = elsewhere.count("by.name-1").await.expect(400);
    let direct = cluster.a.api().count("by.name-1").await.expect(400);
    assert_eq!(refused.json(), direct.json(), "Chroma's own words");
    for operation in ["add", "get", "delete", "upsert", "update", "query"] {
        let body = json!({"ids": ["x"], "embeddings": [[1, 2]], "query_embeddings": [[1, 2]]});
        let refused = api.op("no-such-name", operation, &body).await.expect(400);
        let direct = cluster.a.api().op("no-such-name", operation, &body).await.expect(400);
        assert_eq!(refused.json(), direct.json(), "{operation}");
    }
    // A rename through its name, and the old name is gone.
    api.modify("by.name-1", &json!({"new_name": "renamed"})).await.ok();
    api.count("by.name-1").await.expect(400);
    cluster.a.kill9();
    api.op("renamed", "add", &json!({"ids": ["late"], "embeddings": [[5, 5]]}))
        .await
        .expect(201);
    assert_eq!(api.count("renamed").await.ok().json(), 3);
    cluster.up(Side::A).await;
    assert_eq!(cluster.assert_equal().await, 3);
}

async fn lists_are_ordered_by_the_clients_ids(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let api = cluster.api.clone();
    for n in 0..6 {
        api.collection(&format!("led-by-a-{n}")).await;
    }
    cluster.a.kill9();
    for n in 0..6 {
        api.collection(&format!("led-by-b-{n}")).await;
    }
    cluster.up(Side::A).await;
    let full = names_and_ids(&api.list("").await.ok().json());
    assert_eq!(full.len(), 12);
    assert!(full.is_sorted(), "by id: {full:?}");
    for side in [None, Some(Side::B)] {
        if let Some(side) = side {
            cluster.node(side).kill9();
        }
        for _ in 0..8 {
            assert_eq!(names_and_ids(&api.list("").await.ok().json()), full);
            let mut pages = Vec::new();
            for offset in (0..15).step_by(5) {
                let page = api.list(&format!("?limit=5&offset={offset}")).await.ok();
                pages.extend(names_and_ids(&page.json()));
            }
            assert_eq!(pages, full);
            assert_eq!(api.list("?limit=3").await.ok().json().as_array().map(Vec::len), Some(3));
            assert_eq!(names_and_ids(&api.list("?offset=10").await.ok().json()), full[10..]);
            let count = api.get_path(&api.path("/collections_count")).await;
            assert_eq!(count.ok().json(), 12);
        }
    }
}

fn names_and_ids(list: &Value) -> Vec<(String, String)> {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    list.as_array()
        .expect("a list")
        .iter()
        .map(|c| (text(&c["id"]), text(&c["name"])))
        .collect()
}

/// A collection's own id on A and on B.
async fn node_ids(cluster: &Cluster, name: &str) -> (String, String) {
    (
        cluster.a.api().by_name(name).await.ok().id(),
        cluster.b.api().by_name(name).await.ok().id(),
    )
}
