//! Names change hands while a node is down: the node that returns ends up with the right records under each name.

use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::cluster::{CHECKPOINT, Cluster, Options, Side};
use crate::harness::fault::Seen;
use crate::harness::{Stage, scenarios};

scenarios! {
    a_name_is_deleted_and_recreated_while_the_replica_is_down: sqlite, postgres;
    a_name_is_deleted_and_recreated_while_the_primary_is_down: sqlite, postgres;
    two_names_are_swapped_while_the_replica_is_down: sqlite, postgres;
    two_names_are_swapped_while_the_primary_is_down: sqlite, postgres;
    s12_blue_green_with_a_node_down: sqlite, postgres;
    s12_a_database_is_dropped_and_recreated_with_a_node_down: sqlite;
    s16_a_refused_add_sets_the_same_dimension_everywhere: sqlite;
}

/// Adds records whose documents say which collection they were written to.
async fn fill(cluster: &Cluster, id: &str, label: &str, count: usize) {
    let ids: Vec<_> = (0..count).map(|n| format!("{label}-{n}")).collect();
    let body = json!({"ids": ids, "embeddings": ids.iter().map(|_| [1, 2]).collect::<Vec<_>>(), "documents": ids});
    cluster.api.op(id, "upsert", &body).await.ok();
}

/// The records' ids under a name, through the proxy and on both nodes.
async fn ids_under(cluster: &Cluster, name: &str) -> Value {
    let mut all = Vec::new();
    for api in [cluster.api.clone(), cluster.a.api(), cluster.b.api()] {
        let id = api.by_name(name).await.ok().id();
        all.push(api.op(&id, "get", &json!({})).await.ok().json()["ids"].clone());
    }
    assert!(all.iter().all(|ids| *ids == all[0]), "{name}: {all:?}");
    all.remove(0)
}

async fn a_name_is_deleted_and_recreated_while_the_replica_is_down(stage: Stage) {
    recreated(stage, Side::B).await;
}

async fn a_name_is_deleted_and_recreated_while_the_primary_is_down(stage: Stage) {
    recreated(stage, Side::A).await;
}

async fn recreated(stage: Stage, side: Side) {
    let mut cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let first = api.collection("name").await;
    fill(&cluster, &first, "first", 5).await;
    cluster.node(side).kill9();
    fill(&cluster, &first, "lost", 2).await;
    api.drop_collection("name").await.ok();
    let second = api
        .create_collection("name", json!({"metadata": {"generation": 2}}))
        .await
        .ok()
        .id();
    assert_ne!(first, second);
    fill(&cluster, &second, "second", 3).await;
    api.drop_collection("name").await.ok();
    let third = api
        .create_collection("name", json!({"metadata": {"generation": 3}}))
        .await
        .ok()
        .id();
    fill(&cluster, &third, "third", 2).await;
    for gone in [&first, &second] {
        api.count(gone).await.expect(404);
        let body = json!({"ids": ["x"], "embeddings": [[1, 2]]});
        api.op(gone, "add", &body).await.expect(404);
    }
    cluster.up(side).await;
    assert_eq!(api.by_name("name").await.ok().id(), third);
    assert_eq!(ids_under(&cluster, "name").await, json!(["third-0", "third-1"]));
    for gone in [&first, &second] {
        api.count(gone).await.expect(404);
    }
    assert_eq!(cluster.assert_equal().await, 2);
}

async fn two_names_are_swapped_while_the_replica_is_down(stage: Stage) {
    swapped(stage, Side::B).await;
}

async fn two_names_are_swapped_while_the_primary_is_down(stage: Stage) {
    swapped(stage, Side::A).await;
}

async fn swapped(stage: Stage, side: Side) {
    let mut cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let (one, two) = (api.collection("aaa").await, api.collection("bbb").await);
    fill(&cluster, &one, "one", 3).await;
    fill(&cluster, &two, "two", 4).await;
    cluster.node(side).kill9();
    for (id, name) in [(&one, "ttt"), (&two, "aaa"), (&one, "bbb")] {
        api.modify(id, &json!({"new_name": name})).await.ok();
        fill(&cluster, id, &format!("while-{name}"), 1).await;
    }
    cluster.up(side).await;
    assert_eq!(api.by_name("aaa").await.ok().id(), two);
    assert_eq!(api.by_name("bbb").await.ok().id(), one);
    api.by_name("ttt").await.expect(404);
    assert_eq!(
        ids_under(&cluster, "aaa").await,
        json!(["two-0", "two-1", "two-2", "two-3", "while-aaa-0"])
    );
    assert_eq!(
        ids_under(&cluster, "bbb").await,
        json!(["one-0", "one-1", "one-2", "while-ttt-0", "while-bbb-0"])
    );
    assert_eq!(cluster.assert_equal().await, 10);
}

/// What a node missed was applied in its order. Out of order it does not come out wrong on these servers: the journal
/// refuses two collections with one UUID on one node, and the node is copied.
#[track_caller]
fn assert_nothing_was_repaired(cluster: &Cluster) {
    let log = std::fs::read_to_string(cluster.diptych.log()).expect("a log");
    let repairs: Vec<_> = log.lines().filter(|line| line.contains("A repair is needed")).collect();
    assert!(repairs.is_empty(), "the log alone was not enough: {repairs:?}");
}

/// `rename U1 a->b`, `create U2 a`, `add U2`, once and again and again, with a node down.
async fn s12_blue_green_with_a_node_down(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let mut live = api.collection("live").await;
    fill(&cluster, &live, "v0", 3).await;
    let mut version = 0;
    // After several flips the last one can hide what became of the first.
    for flips in [1, 4] {
        let mut previous = None;
        tokio::time::sleep(CHECKPOINT).await;
        cluster.b.kill9();
        for _ in 0..flips {
            version += 1;
            if version > 1 {
                api.drop_collection("old").await.ok();
            }
            api.modify(&live, &json!({"new_name": "old"})).await.ok();
            previous = Some(std::mem::replace(&mut live, api.collection("live").await));
            fill(&cluster, &live, &format!("v{version}"), 3).await;
        }
        cluster.up(Side::B).await;
        assert_nothing_was_repaired(&cluster);
        assert_eq!(cluster.assert_equal().await, 6);
        assert_eq!(api.by_name("live").await.ok().id(), live);
        assert_eq!(Some(api.by_name("old").await.ok().id()), previous);
        let records = |version: u32| (0..3).map(|n| format!("v{version}-{n}")).collect::<Vec<_>>();
        assert_eq!(ids_under(&cluster, "live").await, json!(records(version)));
        assert_eq!(ids_under(&cluster, "old").await, json!(records(version - 1)));
    }
}

async fn s12_a_database_is_dropped_and_recreated_with_a_node_down(stage: Stage) {
    let options = Options {
        fault_b: true,
        ..Options::default()
    };
    let mut cluster = stage.cluster_with(options).await;
    let inside = cluster.api.within("default_tenant", "project");
    inside.create_database("project").await.ok();
    let first = inside.collection("notes").await;
    fill(&cluster, &first, "first", 3).await;
    tokio::time::sleep(CHECKPOINT).await;
    cluster.b.kill9();
    inside.drop_database("project").await.ok();
    inside.create_database("project").await.ok();
    inside.by_name("notes").await.expect(404);
    let second = inside.collection("notes").await;
    fill(&cluster, &second, "second", 2).await;
    // What comes after it has the time to overtake it. It must not: it would go with the old database.
    let gate = cluster
        .fault(Side::B)
        .hold_requests(|seen| seen.method == "DELETE" && seen.path.contains("/databases/"));
    cluster.b.restart().await;
    gate.wait_held(1).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    gate.release();
    cluster.diptych.wait_drained().await;
    assert_nothing_was_repaired(&cluster);
    // Before a read finds that something is missing, and has it copied.
    assert_eq!(cluster.assert_equal_in(&[("default_tenant", "project")]).await, 2);
    inside.count(&first).await.expect(404);
    assert_eq!(
        inside.op(&second, "get", &json!({})).await.ok().json()["ids"],
        json!(["second-0", "second-1"])
    );
    assert_eq!(cluster.assert_equal_in(&[("default_tenant", "project")]).await, 2);
}

async fn s16_a_refused_add_sets_the_same_dimension_everywhere(stage: Stage) {
    let options = Options {
        fault_a: true,
        ..Options::default()
    };
    let mut cluster = stage.cluster_with(options).await;
    let api = cluster.api.clone();
    // Each was seen to be refused by Chroma after, or before, it set the dimension.
    let refused = [
        json!({"ids": ["x", "y"], "embeddings": [[1, 2, 3]]}),
        json!({"ids": ["x"], "embeddings": [[1, 2, 3]], "documents": ["one", "two"]}),
        json!({"ids": ["x"], "embeddings": [[1, 2, 3]],
               "metadatas": [{"s": {"#type": "sparse_vector", "indices": [1], "values": [1.0]}}]}),
        json!({"ids": ["x"], "embeddings": [[1, 2, 3]], "metadatas": [{"#reserved": 1}]}),
        json!({"ids": ["x", "y"], "embeddings": [[1, 2, 3], [1, 2]]}),
    ];
    let mut ids = Vec::new();
    for n in 0..refused.len() * 2 {
        ids.push(api.collection(&format!("empty-{n}")).await);
    }
    for (n, id) in ids.iter().enumerate() {
        // The first half with both nodes up, the second with B down.
        if n == refused.len() {
            cluster.b.kill9();
        }
        let answer = api.op(id, "add", &refused[n % refused.len()]).await;
        assert!(
            (400..500).contains(&answer.status) || answer.status == 501,
            "{answer:?}"
        );
    }
    // The proxy refuses all of these by itself. One that it lets through, and that the node refuses as late: an update of
    // a record that does not exist sets the dimension and nothing else.
    let late = api.collection("late").await;
    // What comes after the first entry that B misses is no reason to compare it when it returns.
    api.op(&late, "delete", &json!({"ids": ["nobody"]})).await.ok();
    let body = r#"{"error":"InvalidArgumentError","message":"refused"}"#;
    let is_update = |seen: &Seen| seen.is_op("update") && !seen.is_own();
    cluster.fault(Side::A).apply_but(1, 400, body, is_update);
    let update = json!({"ids": ["nobody"], "embeddings": [[1, 2, 3]]});
    api.op(&late, "update", &update).await.expect(400);
    let on_a = cluster.a.api().by_name("late").await.ok();
    assert_eq!(on_a.json()["dimension"], 3, "it is set: {on_a:?}");
    cluster.up(Side::B).await;
    cluster.assert_equal().await;
    for id in &ids {
        let two = api
            .op(id, "add", &json!({"ids": ["two"], "embeddings": [[1, 2]]}))
            .await
            .status;
        let three = api
            .op(id, "add", &json!({"ids": ["three"], "embeddings": [[1, 2, 3]]}))
            .await
            .status;
        assert!(matches!((two, three), (201, 400) | (400, 201)), "{two}, {three}");
    }
    cluster.diptych.wait_drained().await;
    assert_eq!(cluster.assert_equal().await, ids.len());
}
