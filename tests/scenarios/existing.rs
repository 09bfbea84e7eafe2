//! A primary that was full before Diptych came, with an empty replica beside it.

use serde_json::json;

use crate::harness::chroma::ChromaNode;
use crate::harness::cluster::Options;
use crate::harness::compare::{DEFAULT, compare_nodes};
use crate::harness::data::{Batch, Rng};
use crate::harness::{Stage, scenarios};

scenarios! {
    an_existing_primary_keeps_its_ids_and_is_never_silently_different: sqlite, postgres;
    a_name_on_both_nodes_is_served_by_the_first_alone: sqlite;
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

/// Two servers that both hold a collection of one name are never assumed to be equal.
async fn a_name_on_both_nodes_is_served_by_the_first_alone(stage: Stage) {
    let (a, b) = tokio::join!(ChromaNode::start(&stage.dir, "a"), ChromaNode::start(&stage.dir, "b"));
    let mut ids = Vec::new();
    for (node, whose) in [(&a, "primary"), (&b, "replica")] {
        let extra = json!({"metadata": {"of": whose}});
        let id = node.api().create_collection("both", extra).await.ok().id();
        let body = json!({"ids": ["x"], "embeddings": [[1, 2]], "documents": [whose]});
        node.api().op(&id, "add", &body).await.expect(201);
        ids.push(id);
    }
    let cluster = stage.proxy_before(a, b, Options::default()).await;
    let api = cluster.api.clone();
    for _ in 0..10 {
        // Either node's UUID means the collection, and clients see the first node's.
        for id in &ids {
            let got = api.op(id, "get", &json!({})).await.ok().json();
            assert_eq!(got["documents"], json!(["primary"]));
            assert_eq!(api.by_id(id).await.ok().id(), ids[0]);
        }
        let shown = api.by_name("both").await.ok();
        assert_eq!(
            (shown.id(), &shown.json()["metadata"]["of"]),
            (ids[0].clone(), &json!("primary"))
        );
        let listed = api.list("").await.ok().json();
        assert_eq!(
            (&listed[0]["id"], &listed[0]["metadata"]["of"]),
            (&json!(ids[0]), &json!("primary"))
        );
    }
    let status = cluster.diptych.status().await;
    assert_eq!(status["instances"][0]["in_sync"], true, "{status:#}");
    assert_eq!(status["instances"][1]["in_sync"], false, "{status:#}");
    assert_eq!(status["instances"][1]["repairs"], 1, "{status:#}");
    // They are compared, and nothing is overwritten: a person decides.
    let parked = |status: &serde_json::Value| match status["repairs"][0]["parked"].as_str() {
        Some(reason) if reason.contains("1 records differ") => Ok(()),
        other => Err(format!("parked: {other:?}")),
    };
    cluster.diptych.wait_status("the difference is parked", parked).await;
    // What is written now reaches both all the same.
    let body = json!({"ids": ["y"], "embeddings": [[3, 4]]});
    api.op(&ids[1], "add", &body).await.expect(201);
    assert_eq!(api.count(&ids[0]).await.ok().json(), 2);
    let drained = |status: &serde_json::Value| match status["instances"][1]["pending_writes"].as_u64() {
        Some(0) => Ok(()),
        other => Err(format!("pending: {other:?}")),
    };
    cluster.diptych.wait_status("what was missed is drained", drained).await;
    let got = cluster.b.api().op(&ids[1], "get", &json!({})).await.ok().json();
    assert_eq!(got["documents"], json!(["replica", null]));
    let status = cluster.diptych.status().await;
    assert_eq!(status["instances"][1]["in_sync"], false, "{status:#}");
}
