//! Nodes are made equal again: an empty one, a wiped one, one with a broken index, one that was tampered with.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::api::Api;
use crate::harness::chroma::ChromaNode;
use crate::harness::cluster::{Options, Side};
use crate::harness::compare::{DEFAULT, compare_nodes};
use crate::harness::data::{Batch, Rng};
use crate::harness::load::Load;
use crate::harness::{Stage, eventually, scenarios};

scenarios! {
    an_empty_replica_fills_itself_beside_a_full_primary: sqlite;
    a_wiped_node_is_filled_again_under_load: sqlite;
    a_comparison_names_what_was_changed_behind_our_back_and_repairs_that_alone: sqlite;
    a_copy_after_updates_of_absent_records_keeps_the_embeddings_of_the_copy: sqlite;
    s28_pages_come_from_one_node_while_the_nodes_order_records_differently: sqlite;
    a_broken_index_takes_one_collection_off_one_node_until_it_is_rebuilt: sqlite;
}

/// Records with everything that a copy could lose (chroma-facts.md 12).
fn odd_records(dimension: usize) -> Value {
    let long = "x".repeat(5000);
    let odd: Vec<(&str, Value, Value, Value)> = vec![
        ("plain", json!({"k": "v"}), json!("text"), json!("file:///x")),
        ("nothing", Value::Null, Value::Null, Value::Null),
        ("empty-strings", json!({"k": ""}), json!(""), json!("")),
        ("uri-only", Value::Null, Value::Null, json!("u")),
        ("document-only", Value::Null, json!("d"), Value::Null),
        (
            "ünïcode-🦀",
            json!({"schlüssel": "wért 🦀"}),
            json!("日本語 \u{202e}"),
            Value::Null,
        ),
        ("with/slash?and#more%41", json!({"a/b": 1}), Value::Null, Value::Null),
        ("quotes\"\\", json!({"q\"": "\"\\"}), json!("\"\\\n\t"), Value::Null),
        ("nul\u{0}inside", json!({"n": "a\u{0}b"}), json!("a\u{0}b"), Value::Null),
        (&long, json!({"long": long.clone()}), Value::Null, Value::Null),
        ("i64-min", json!({"n": i64::MIN}), Value::Null, Value::Null),
        ("i64-max", json!({"n": i64::MAX}), Value::Null, Value::Null),
        ("u64-max", json!({"n": u64::MAX}), Value::Null, Value::Null),
        ("float-one", json!({"n": 1.0}), Value::Null, Value::Null),
        ("int-one", json!({"n": 1}), Value::Null, Value::Null),
        ("negative-zero", json!({"n": -0.0}), Value::Null, Value::Null),
        ("tiny", json!({"n": 5e-324}), Value::Null, Value::Null),
        (
            "huge",
            json!({"n": 1.797_693_134_862_315_7e308}),
            Value::Null,
            Value::Null,
        ),
        ("third", json!({"n": 1.0 / 3.0}), Value::Null, Value::Null),
        ("bools", json!({"t": true, "f": false}), Value::Null, Value::Null),
        ("strings", json!({"l": ["a", "b", ""]}), Value::Null, Value::Null),
        ("ints", json!({"l": [1, 2, i64::MAX]}), Value::Null, Value::Null),
        ("floats", json!({"l": [1.0, 2.5]}), Value::Null, Value::Null),
        ("mixed", json!({"l": [1, 2.5]}), Value::Null, Value::Null),
        ("flags", json!({"l": [true, false]}), Value::Null, Value::Null),
        (
            "many-keys",
            json!({"a": 1, "b": 2.5, "c": "d", "e": true, "z": 0}),
            json!("x"),
            json!("y"),
        ),
    ];
    let mut rng = Rng::new(26);
    let vectors: Vec<Vec<f32>> = (0..odd.len())
        .map(|n| match n {
            0 => vec![0.1; dimension],
            1 => (0..dimension)
                .map(|at| if at == 0 { 1.0 } else { f32::MIN_POSITIVE / 4.0 })
                .collect(),
            2 => (0..dimension)
                .map(|at| if at == 0 { 3.0e18 } else { 1.0e-20 })
                .collect(),
            3 => (0..dimension).map(|at| if at == 0 { -1.0 } else { -0.0 }).collect(),
            _ => rng.vector(dimension),
        })
        .collect();
    json!({
        "ids": odd.iter().map(|row| row.0).collect::<Vec<_>>(),
        "embeddings": vectors,
        "metadatas": odd.iter().map(|row| row.1.clone()).collect::<Vec<_>>(),
        "documents": odd.iter().map(|row| row.2.clone()).collect::<Vec<_>>(),
        "uris": odd.iter().map(|row| row.3.clone()).collect::<Vec<_>>(),
    })
}

async fn an_empty_replica_fills_itself_beside_a_full_primary(stage: Stage) {
    let (a, b) = tokio::join!(ChromaNode::start(&stage.dir, "a"), ChromaNode::start(&stage.dir, "b"));
    let direct = a.api();
    let spaces = [
        (
            "of-l2",
            json!({"configuration": {"hnsw": {"space": "l2", "ef_search": 55, "sync_threshold": 500}}}),
        ),
        (
            "of-ip",
            json!({"metadata": {"k": 1, "f": 2.5}, "configuration": {"hnsw": {"space": "ip"}}}),
        ),
        ("of-cosine", json!({"configuration": {"hnsw": {"space": "cosine"}}})),
        (
            "legacy",
            json!({"metadata": {"hnsw:space": "cosine", "hnsw:M": 24, "own": "x"}}),
        ),
    ];
    for (name, extra) in spaces {
        let id = direct.create_collection(name, extra).await.ok().id();
        direct.op(&id, "add", &odd_records(8)).await.expect(201);
    }
    let mut rng = Rng::new(stage.seed);
    let big = direct.collection("big").await;
    for part in 0..4 {
        let batch = Batch::random(&mut rng, &format!("part{part}"), 700, 16);
        direct.op(&big, "add", &batch.json()).await.expect(201);
    }
    // A dimension without a record, and a database without a collection.
    let bare = direct.collection("bare").await;
    direct
        .op(&bare, "add", &json!({"ids": ["x"], "embeddings": [[1, 2, 3]]}))
        .await
        .expect(201);
    direct.op(&bare, "delete", &json!({"ids": ["x"]})).await.ok();
    direct.collection("untouched").await;
    direct.create_database("second").await.ok();
    let second = direct.within("default_tenant", "second");
    let there = second.collection("there").await;
    second.op(&there, "add", &odd_records(3)).await.expect(201);
    direct.create_database("vacant").await.ok();

    let cluster = stage.proxy_before(a, b, Options::default()).await;
    let api = cluster.api.clone();
    // It is written to meanwhile.
    for n in 0..60 {
        let body =
            json!({"ids": [format!("part{}-{n}", n % 4)], "embeddings": [vec![n; 16]], "metadatas": [{"late": n}]});
        api.op(&big, "upsert", &body).await.ok();
        api.op(&big, "delete", &json!({"ids": [format!("part1-{}", 600 + n)]}))
            .await
            .ok();
    }
    let id = api.by_name("of-l2").await.ok().id();
    api.op(&id, "upsert", &json!({"ids": ["late"], "embeddings": [vec![1; 8]]}))
        .await
        .ok();
    cluster.diptych.wait_drained().await;
    let scopes = [DEFAULT, ("default_tenant", "second"), ("default_tenant", "vacant")];
    let compared = cluster.assert_equal_in(&scopes).await;
    assert!(compared > 2800, "{compared}");
    cluster.b.api().get_database("vacant").await.ok();
}

async fn a_wiped_node_is_filled_again_under_load(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let id = cluster.api.collection("busy").await;
    let mut rng = Rng::new(stage.seed);
    let quiet = cluster.api.collection("quiet").await;
    let batch = Batch::random(&mut rng, "x", 500, 8);
    cluster.api.op(&quiet, "add", &batch.json()).await.expect(201);
    for side in [Side::B, Side::A] {
        let load = Load::start(&cluster.api, &id, 2, 2, stage.seed);
        load.wait_writes(20).await;
        cluster.node(side).kill9();
        load.wait_writes(20).await;
        cluster.node(side).wipe();
        cluster.node(side).restart().await;
        cluster.diptych.wait_drained().await;
        load.wait_writes(20).await;
        let report = load.stop().await;
        report.assert_clean();
        cluster.diptych.wait_drained().await;
        assert!(same_records(&cluster.a, &cluster.b).await > 500);
    }
}

/// Asserts that both nodes hold the same; a copy of what was written to meanwhile can have another order.
async fn same_records(a: &ChromaNode, b: &ChromaNode) -> usize {
    let mut dumps = vec![];
    for node in [a, b] {
        let dump = compare_nodes(&[node], &[DEFAULT]).await.expect("itself");
        let mut all: Vec<String> = vec![];
        for (name, collection) in dump.databases.values().flatten() {
            all.extend(collection.records.iter().map(|record| format!("{name}: {record:?}")));
            all.push(format!("{name}: {} {}", collection.metadata, collection.dimension));
        }
        all.sort();
        dumps.push(all);
    }
    let (a, b): (BTreeSet<_>, BTreeSet<_>) = (dumps[0].iter().collect(), dumps[1].iter().collect());
    let differing: Vec<_> = a.symmetric_difference(&b).take(10).collect();
    assert!(differing.is_empty(), "{differing:#?}");
    a.len()
}

/// Overwrites what a node has stored of its vector indices; how many files that were.
pub fn break_indices(dir: &Path) -> usize {
    let mut broken = 0;
    for folder in std::fs::read_dir(dir).expect("the node's folder").flatten() {
        for name in ["header.bin", "data_level0.bin", "length.bin", "link_lists.bin"] {
            let file = folder.path().join(name);
            if let Ok(old) = std::fs::metadata(&file) {
                let garbage = vec![0xee_u8; usize::try_from(old.len()).expect("a size").max(16)];
                std::fs::write(&file, garbage).expect("an index file");
                broken += 1;
            }
        }
    }
    broken
}

async fn a_broken_index_takes_one_collection_off_one_node_until_it_is_rebuilt(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let mut rng = Rng::new(stage.seed);
    let extra = json!({"configuration": {"hnsw": {"sync_threshold": 50, "batch_size": 20}}});
    let broken = api.create_collection("broken", extra).await.ok().id();
    let whole = api.collection("whole").await;
    for part in 0..6 {
        let batch = Batch::random(&mut rng, &format!("p{part}"), 60, 8);
        api.op(&broken, "add", &batch.json()).await.expect(201);
    }
    let batch = Batch::random(&mut rng, "w", 20, 8);
    api.op(&whole, "add", &batch.json()).await.expect(201);
    cluster.diptych.wait_drained().await;
    let on_b = |cluster: &crate::harness::cluster::Cluster| {
        let api = cluster.b.api();
        async move {
            (
                api.by_name("broken").await.ok().id(),
                api.by_name("whole").await.ok().id(),
            )
        }
    };
    let before = on_b(&cluster).await;
    cluster.down(Side::B).await;
    assert!(break_indices(cluster.b.dir()) > 0, "an index was stored");
    cluster.b.restart().await;
    let alone = cluster.b.api();
    let query = json!({"query_embeddings": [[1, 0, 0, 0, 0, 0, 0, 1]], "n_results": 3});
    let answer = alone.op(&before.0, "query", &query).await;
    assert!(answer.status >= 500, "the node cannot serve it: {answer:?}");
    // Served throughout, by the other node, until it is rebuilt.
    eventually(Duration::from_secs(60), "it is rebuilt", || async {
        ask(&api, &broken, &query).await;
        ask(&api, &whole, &query).await;
        match alone.by_name("broken").await {
            answer if answer.status == 200 && answer.id() != before.0 => Ok(()),
            answer => Err(format!("{answer:?}")),
        }
    })
    .await;
    cluster.diptych.wait_drained().await;
    assert_eq!(same_records(&cluster.a, &cluster.b).await, 6 * 60 + 20 + 2);
    assert_eq!(on_b(&cluster).await.1, before.1, "the other collection is left alone");
    alone.op(&on_b(&cluster).await.0, "query", &query).await.ok();
}

async fn ask(api: &Api, id: &str, query: &Value) {
    let found = api.op(id, "query", query).await.ok().json();
    assert_eq!(found["ids"][0].as_array().map(Vec::len), Some(3));
}

/// Runs a comparison to its end.
async fn compare(admin: &Api, query: &str) -> Value {
    let path = format!("/admin/verify?{query}");
    let id = admin.post(&path, &json!({})).await.ok().json()["id"].clone();
    let path = format!("/admin/verify/{}", id.as_str().expect("an id"));
    eventually(Duration::from_secs(60), "compared", || async {
        let report = admin.get_path(&path).await.ok().json();
        match report["finished_at"].is_string() {
            true => Ok(report),
            false => Err(format!("{report:#}")),
        }
    })
    .await
}

async fn a_comparison_names_what_was_changed_behind_our_back_and_repairs_that_alone(stage: Stage) {
    let cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let extra = json!({"configuration": {"hnsw": {"space": "cosine"}}});
    let id = api.create_collection("many", extra).await.ok().id();
    let mut rng = Rng::new(stage.seed);
    let mut batch = Batch::default();
    for _ in 0..3 {
        batch = Batch::random(&mut rng, "x", 1000, 8);
        api.op(&id, "upsert", &batch.json()).await.ok();
    }
    let admin = cluster.diptych.admin();
    let report = compare(&admin, "").await;
    assert_eq!(report["differing"], 0, "{report:#}");
    let behind = cluster.b.api();
    let there = behind.by_name("many").await.ok().id();
    let changed: BTreeSet<String> = (0..100).map(|n| format!("x-{}", n * 10)).collect();
    let some: Vec<&String> = changed.iter().collect();
    let documents = json!({"ids": some[..50], "documents": vec!["tampered"; 50]});
    behind.op(&there, "update", &documents).await.ok();
    let vectors = json!({"ids": some[50..90], "embeddings": vec![vec![1, 0, 0, 0, 0, 0, 0, 1]; 40]});
    behind.op(&there, "update", &vectors).await.ok();
    behind.op(&there, "delete", &json!({"ids": some[90..]})).await.ok();
    for query in ["", "repair=true"] {
        let report = compare(&admin, query).await;
        let named = report["findings"][0]["ids"].as_array().cloned().unwrap_or_default();
        let named: BTreeSet<String> = named.iter().filter_map(Value::as_str).map(str::to_owned).collect();
        assert_eq!(named, changed, "{report:#}");
    }
    cluster.diptych.wait_drained().await;
    assert_eq!(same_ids(&cluster.a, &cluster.b, &id, &there).await, batch.ids.len());
    let report = compare(&admin, "").await;
    assert_eq!(report["differing"], 0, "{report:#}");
}

/// A record that is added after an update of its absent id can end with the update's embedding: readers that race make
/// Chroma's index read its log once more, and now there is something to update (chroma-facts.md 18.2). So nothing is
/// repaired by adding.
async fn a_copy_after_updates_of_absent_records_keeps_the_embeddings_of_the_copy(stage: Stage) {
    let cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let id = api.collection("late").await;
    let ids: Vec<String> = (0..20).map(|n| format!("x-{n}")).collect();
    let of = |value: i32, document: &str| json!({"ids": ids, "embeddings": vec![[value, value]; ids.len()], "documents": vec![document; ids.len()]});
    api.op(&id, "update", &of(1, "absent")).await.ok();
    let on = async |node: &ChromaNode| (node.api(), node.api().by_name("late").await.ok().id());
    let (first, source) = on(&cluster.a).await;
    first.op(&source, "upsert", &of(2, "present")).await.ok();
    let path = "/admin/resync?collection=late&node=replica&from=primary";
    cluster.diptych.admin().post(path, &json!({})).await.ok();
    cluster.diptych.wait_drained().await;

    let there = cluster.b.api().by_name("late").await.ok().id();
    let behind = Api::pooled(&cluster.b.url());
    let query = json!({"query_embeddings": [[9, 9]], "n_results": 1});
    let reader = async || {
        for _ in 0..150 {
            behind.op(&there, "query", &query).await.ok();
        }
    };
    let writer = async |who: usize| {
        for n in 0..60 {
            let body = json!({"ids": [format!("other-{who}-{n}")], "embeddings": [[9, n]]});
            behind.op(&there, "upsert", &body).await.ok();
            first.op(&source, "upsert", &body).await.ok();
        }
    };
    tokio::join!(reader(), reader(), reader(), writer(0), writer(1), writer(2), writer(3));
    for node in [&cluster.a, &cluster.b] {
        let (api, there) = on(node).await;
        let query = json!({"ids": ids, "include": ["embeddings", "documents"]});
        let found = api.op(&there, "get", &query).await.ok().json();
        assert_eq!(found["documents"], json!(vec!["present"; ids.len()]), "{}", node.name);
        assert_eq!(found["embeddings"], json!(vec![[2.0, 2.0]; ids.len()]), "{}", node.name);
    }
}

async fn s28_pages_come_from_one_node_while_the_nodes_order_records_differently(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let id = api.create_collection("paged", json!({})).await.ok().id();
    let mut rng = Rng::new(stage.seed);
    let batch = Batch::random(&mut rng, "x", 40, 4);
    api.op(&id, "add", &batch.json()).await.expect(201);
    let behind = cluster.b.api();
    let there = behind.by_name("paged").await.ok().id();
    // Repaired, these are the last ones there.
    behind.op(&there, "delete", &json!({"ids": batch.ids[..10]})).await.ok();
    let report = compare(&cluster.diptych.admin(), "repair=true").await;
    assert_eq!(report["differing"], 10, "{report:#}");
    cluster.diptych.wait_drained().await;
    let everything: BTreeSet<String> = batch.ids.iter().cloned().collect();
    for restarted in [false, true] {
        if restarted {
            cluster.diptych.restart().await;
        }
        for _ in 0..20 {
            let mut paged = BTreeSet::new();
            for offset in (0..batch.ids.len()).step_by(4) {
                let page = api
                    .op(&id, "get", &json!({"limit": 4, "offset": offset}))
                    .await
                    .ok()
                    .json();
                let ids = page["ids"].as_array().cloned().unwrap_or_default();
                paged.extend(ids.iter().filter_map(Value::as_str).map(str::to_owned));
            }
            assert_eq!(paged, everything, "a record was missed between two pages");
        }
    }
}

/// Compares two collections by what they hold, in any order.
async fn same_ids(a: &ChromaNode, b: &ChromaNode, on_a: &str, on_b: &str) -> usize {
    let include = json!({"include": ["embeddings", "documents", "metadatas", "uris"]});
    let mut sides = vec![];
    for (node, id) in [(a, on_a), (b, on_b)] {
        let answer = node.api().op(id, "get", &include).await.ok().json();
        let mut records = crate::harness::compare::records_of(&answer).expect("records");
        records.sort_by(|x, y| x.id.cmp(&y.id));
        sides.push(records);
    }
    assert_eq!(sides[0].len(), sides[1].len());
    for (a, b) in sides[0].iter().zip(&sides[1]) {
        assert_eq!(a.id, b.id);
        a.same_as(b, true).unwrap_or_else(|why| panic!("{}: {why}", a.id));
    }
    sides[0].len()
}
