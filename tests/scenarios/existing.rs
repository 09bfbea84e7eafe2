//! A primary that was full before Diptych came, with an empty replica beside it.

use serde_json::json;

use crate::harness::chroma::ChromaNode;
use crate::harness::cluster::Options;
use crate::harness::compare::{DEFAULT, compare_nodes};
use crate::harness::data::{Batch, Rng};
use crate::harness::{Stage, scenarios};

scenarios! {
    an_existing_primary_keeps_its_ids_and_is_never_silently_different: sqlite, postgres;
}

async fn an_existing_primary_keeps_its_ids_and_is_never_silently_different(stage: Stage) {
    let (a, b) = tokio::join!(ChromaNode::start(&stage.dir, "a"), ChromaNode::start(&stage.dir, "b"));
    let mut rng = Rng::new(stage.seed);
    let mut ids = Vec::new();
    for n in 0..3 {
        let id = a
            .api()
            .create_collection(&format!("old-{n}"), json!({"metadata": {"n": n}}))
            .await
            .ok()
            .id();
        a.api()
            .op(&id, "add", &Batch::random(&mut rng, "x", 25, 4).json())
            .await
            .expect(201);
        ids.push(id);
    }
    let mut cluster = stage.proxy_before(a, b, Options::default()).await;
    let api = cluster.api.clone();
    let check = async |extra: usize| {
        for (n, id) in ids.iter().enumerate() {
            let found = api.by_name(&format!("old-{n}")).await.ok();
            assert_eq!((found.id(), &found.json()["metadata"]["n"]), (id.clone(), &json!(n)));
            assert_eq!(api.by_id(id).await.ok().json()["name"], format!("old-{n}"));
            let got = api.op(id, "get", &json!({})).await.ok().json();
            assert_eq!(got["ids"].as_array().map(Vec::len), Some(25 + extra), "old-{n}");
            let found = api
                .op(
                    id,
                    "query",
                    &json!({"query_embeddings": [[1, 0, 0, 1]], "n_results": 3}),
                )
                .await
                .ok();
            assert_eq!(found.json()["ids"][0].as_array().map(Vec::len), Some(3));
            assert_eq!(api.count(id).await.ok().json(), json!(25 + extra));
        }
        let listed = api.list("").await.ok().json();
        let listed: Vec<_> = listed
            .as_array()
            .expect("a list")
            .iter()
            .map(|c| c["id"].clone())
            .collect();
        assert!(ids.iter().all(|id| listed.contains(&json!(id))), "{listed:?}");
    };
    for _ in 0..10 {
        check(0).await;
    }
    // Writes to the old ids: acknowledged and read back.
    for id in &ids {
        let body = json!({"ids": ["new"], "embeddings": [[9, 9, 9, 9]], "documents": ["late"]});
        api.op(id, "upsert", &body).await.ok();
    }
    for _ in 0..10 {
        check(1).await;
    }
    // New collections are mirrored as ever.
    let fresh = api.collection("fresh").await;
    api.op(&fresh, "add", &json!({"ids": ["f"], "embeddings": [[1, 2]]}))
        .await
        .expect(201);
    assert_eq!(cluster.b.api().count("fresh").await.status, 400);
    let on_b = cluster.b.api().by_name("fresh").await.ok().id();
    assert_eq!(cluster.b.api().count(&on_b).await.ok().json(), 1);

    // Nothing is hidden: either the replica holds everything, or the status says that it does not.
    let status = cluster.diptych.status().await;
    let replica = &status["instances"][1];
    if replica["in_sync"] == true {
        compare_nodes(&[&cluster.a, &cluster.b], &[DEFAULT])
            .await
            .expect("in sync means equal");
    }
    // And without the primary, the replica does not answer for what it lacks.
    cluster.a.kill9();
    for (n, id) in ids.iter().enumerate() {
        let answer = api.count(id).await;
        let right = answer.status >= 500 || (answer.status == 200 && answer.json() == json!(26));
        assert!(right, "old-{n}: {answer:?}; the replica was {replica}");
        let answer = api.op(id, "get", &json!({})).await;
        let right = answer.status >= 500 || answer.json()["ids"].as_array().map(Vec::len) == Some(26);
        assert!(right, "old-{n}: {answer:?}");
    }
}
