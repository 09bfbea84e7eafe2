//! What operators and existing tools read: `/health`, `/status`, `/wal/status`, `/metrics`, `/admin/...`.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::harness::api::Api;
use crate::harness::cluster::Side;
use crate::harness::{Stage, scenarios};

scenarios! {
    health_and_status_tell_the_truth: sqlite, postgres;
    names_stand_where_ids_are_wanted: sqlite;
    existing_tools_find_their_routes: sqlite;
    metrics_are_prefixed_and_bounded: sqlite;
    the_python_client_works_unmodified: sqlite, postgres;
}

async fn health_and_status_tell_the_truth(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let id = cluster.api.collection("busy").await;
    cluster
        .api
        .op(&id, "add", &json!({"ids": ["x"], "embeddings": [[1, 2]]}))
        .await
        .expect(201);
    cluster.diptych.wait_drained().await;
    let doors = [cluster.api.clone(), cluster.diptych.admin()];
    for door in &doors {
        let health = door.get_path("/health").await.expect(200).json();
        assert_eq!(health["status"], "healthy", "{health}");
        assert_eq!(health["healthy_instances"], "2/2");
        assert_eq!(health["pending_writes"], 0);
        assert!(health["service"].is_string());
        let status = door.get_path("/status").await.expect(200).json();
        assert_eq!(
            status["service"],
            "Diptych: ChromaDB Load Balancer with Write-Ahead Log"
        );
        assert!(
            status["version"].is_string() && status["leader"].is_boolean() && status["term"].is_u64(),
            "{status:#}"
        );
        assert_eq!(
            (&status["healthy_instances"], &status["total_instances"]),
            (&json!(2), &json!(2))
        );
        let urls = [cluster.a.url(), cluster.b.url()];
        for (n, name) in ["primary", "replica"].into_iter().enumerate() {
            let node = &status["instances"][n];
            assert_eq!(node["name"], name);
            assert_eq!(
                node["url"].as_str().map(|u| u.trim_end_matches('/')),
                Some(urls[n].as_str())
            );
            assert_eq!((&node["healthy"], &node["in_sync"]), (&json!(true), &json!(true)));
            assert_eq!(
                (&node["pending_writes"], &node["oldest_pending"]),
                (&json!(0), &Value::Null)
            );
        }
        log_fields(&status["write_ahead_log"], 0);
        assert_eq!(status["wal"], status["write_ahead_log"]);
        let wal = door.get_path("/wal/status").await.expect(200).json();
        log_fields(&wal["wal_system"], 0);
    }
    cluster.down(Side::B).await;
    for n in 0..3 {
        let body = json!({"ids": [format!("y{n}")], "embeddings": [[1, n]]});
        cluster.api.op(&id, "add", &body).await.expect(201);
    }
    for door in &doors {
        let health = door.get_path("/health").await.expect(200).json();
        assert_eq!(
            (&health["status"], &health["healthy_instances"]),
            (&json!("degraded"), &json!("1/2")),
            "{health}"
        );
        let status = door.get_path("/status").await.expect(200).json();
        let node = &status["instances"][1];
        assert_eq!(
            (&node["healthy"], &node["in_sync"]),
            (&json!(false), &json!(false)),
            "{status:#}"
        );
        assert_eq!(
            (&status["healthy_instances"], &node["pending_writes"]),
            (&json!(1), &json!(3)),
            "{status:#}"
        );
        let oldest = node["oldest_pending"].as_str().unwrap_or_else(|| panic!("{status:#}"));
        chrono::DateTime::parse_from_rfc3339(oldest).expect("RFC 3339");
        log_fields(&status["write_ahead_log"], 3);
    }
    cluster.up(Side::B).await;
    let status = cluster.diptych.status().await;
    assert!(
        status["write_ahead_log"]["total_replayed"].as_u64() >= Some(1),
        "{status:#}"
    );
    let health = cluster.api.get_path("/health").await.expect(200).json();
    assert_eq!(health["status"], "healthy");
}

fn log_fields(log: &Value, pending: u64) {
    assert_eq!(log["pending_writes"].as_u64(), Some(pending), "{log}");
    assert!(log["is_replaying"].is_boolean(), "{log}");
    assert!(
        log["total_replayed"].is_u64() && log["failed_replays"].is_u64(),
        "{log}"
    );
    assert!(
        log.get("oldest_pending").is_some_and(|v| v.is_null() || v.is_string()),
        "{log}"
    );
}

async fn existing_tools_find_their_routes(stage: Stage) {
    let mut cluster = stage.cluster().await;
    for n in 0..3 {
        cluster.api.collection(&format!("mapped-{n}")).await;
    }
    cluster.b.kill9();
    let id = cluster.api.collection("half-mapped").await;
    let doors: [Api; 2] = [cluster.api.clone(), cluster.diptych.admin()];
    for path in ["/admin/collection_mappings", "/collection/mappings"] {
        for door in &doors {
            let answer = door.get_path(path).await.expect(200);
            assert_eq!(
                (answer.header("content-length"), answer.header("content-type")),
                (None, Some("application/json")),
                "it is streamed: {:?}",
                answer.headers
            );
            let body = answer.json();
            assert_eq!(body["total_mappings"], 4, "{body:#}");
            let mappings = body["collection_mappings"].as_array().expect("a list");
            assert_eq!(mappings.len(), 4);
            let newest = &mappings[0];
            assert_eq!(
                (&newest["collection_name"], &newest["status"]),
                (&json!("half-mapped"), &json!("partial"))
            );
            assert_eq!(
                (&newest["primary_collection_id"], &newest["replica_collection_id"]),
                (&json!(id), &Value::Null)
            );
            for mapping in &mappings[1..] {
                let name = mapping["collection_name"].as_str().expect("a name");
                assert_eq!(mapping["status"], "complete");
                assert_eq!(mapping["primary_uuid"], mapping["primary_collection_id"]);
                assert_eq!(mapping["replica_uuid"], mapping["replica_collection_id"]);
                assert_eq!(
                    mapping["primary_uuid"],
                    json!(cluster.a.api().by_name(name).await.ok().id())
                );
                assert!(mapping["created_at"].is_string() && mapping["updated_at"].is_string());
            }
            let page = door
                .get_path(&format!("{path}?limit=2&offset=1"))
                .await
                .expect(200)
                .json();
            assert_eq!(
                page["collection_mappings"].as_array().map(|m| m.to_vec()),
                Some(mappings[1..3].to_vec())
            );
            let past = door.get_path(&format!("{path}?offset=9")).await.expect(200).json();
            assert_eq!(past, json!({"collection_mappings": [], "total_mappings": 4}));
            door.get_path(&format!("{path}?limit=many")).await.expect(400);
            let head = door
                .try_send(http::Method::HEAD, path, &[], bytes::Bytes::new())
                .await
                .expect("an answer")
                .expect(200);
            assert_eq!(head.text(), "");
        }
    }
    for door in &doors {
        let count = door.get_path("/admin/wal_count").await.expect(200).json();
        assert!(count["pending_writes"].as_u64() >= Some(1), "{count}");
        assert_eq!(count["wal_system_ready"], true);
        let errors = door.get_path("/admin/wal_errors").await.expect(200).json();
        assert_eq!(errors, json!({"recent_errors": [], "error_count": 0}));
    }
    cluster.up(Side::B).await;
    let body = cluster
        .diptych
        .admin()
        .get_path("/admin/collection_mappings")
        .await
        .expect(200)
        .json();
    assert_eq!(body["collection_mappings"][0]["status"], "complete", "{body:#}");
    let on_b = cluster.b.api().by_name("half-mapped").await.ok().id();
    assert_eq!(body["collection_mappings"][0]["replica_uuid"], json!(on_b));
}

/// Clients of the system that Diptych replaces put names where Chroma wants ids.
async fn names_stand_where_ids_are_wanted(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let id = api.collection("by-name").await;
    let body = json!({"ids": ["a", "b", "c"], "embeddings": [[1, 2], [3, 4], [5, 6]], "documents": ["one", "two", "three"],
                      "metadatas": [{"document_id": "x"}, {"document_id": "x"}, {"document_id": "y"}]});
    api.op("by-name", "add", &body).await.expect(201);
    for down in [None, Some(Side::B), Some(Side::A)] {
        if let Some(side) = down {
            cluster.down(side).await;
        }
        let upsert = json!({"ids": ["d"], "embeddings": [[7, 8]], "metadatas": [{"document_id": "z"}]});
        api.op("by-name", "upsert", &upsert).await.ok();
        api.op(
            "by-name",
            "update",
            &json!({"ids": ["a"], "documents": [format!("{down:?}")]}),
        )
        .await
        .ok();
        let got = api.op("by-name", "get", &json!({"ids": ["a"]})).await.ok().json();
        assert_eq!(got["documents"], json!([format!("{down:?}")]), "{got}");
        assert_eq!(api.count("by-name").await.ok().json(), json!(4));
        let query = json!({"query_embeddings": [[5, 6]], "n_results": 1});
        let found = api.op("by-name", "query", &query).await.ok().json();
        assert_eq!(found["ids"], json!([["c"]]), "{found}");
        let delete = json!({"where": {"document_id": "z"}});
        let deleted = api.op("by-name", "delete", &delete).await.ok().json();
        assert_eq!(deleted["deleted"], json!(1), "{deleted}");
        assert_eq!(api.count("by-name").await.ok().json(), api.count(&id).await.ok().json());
        if let Some(side) = down {
            cluster.up(side).await;
        }
    }
    // One that a node has and nobody has asked for yet, and one that nobody has: Chroma's own 400.
    let direct = cluster.a.api().collection("made-behind-our-back").await;
    let add = json!({"ids": ["x"], "embeddings": [[1, 2]]});
    api.op("made-behind-our-back", "add", &add).await.expect(201);
    assert_eq!(api.count(&direct).await.ok().json(), json!(1));
    let nobody = api.op("nobody", "get", &json!({})).await.expect(400);
    let chroma = cluster.a.api().op("nobody", "get", &json!({})).await.expect(400);
    assert_eq!(nobody.json(), chroma.json());
    // By id alone: `by-id` takes no names.
    let by_id = api.get_path(&api.path("/collections/by-id/by-name")).await;
    assert!((400..500).contains(&by_id.status), "{by_id:?}");
    cluster.diptych.wait_drained().await;
    cluster.assert_equal().await;
}

async fn metrics_are_prefixed_and_bounded(stage: Stage) {
    let cluster = stage.cluster().await;
    let mut ids = Vec::new();
    for n in 0..20 {
        let id = cluster.api.collection(&format!("measured-{n}")).await;
        cluster
            .api
            .op(&id, "add", &json!({"ids": ["x"], "embeddings": [[1, 2]]}))
            .await
            .expect(201);
        cluster.api.op(&id, "get", &json!({})).await.ok();
        ids.push(id);
    }
    let answer = cluster.diptych.admin().get_path("/metrics").await.expect(200);
    assert!(
        answer
            .header("content-type")
            .is_some_and(|v| v.starts_with("text/plain")),
        "{:?}",
        answer.headers
    );
    let text = answer.text();
    let names: BTreeSet<&str> = text
        .lines()
        .filter(|l| !l.starts_with('#'))
        .filter_map(|l| l.split(['{', ' ']).next())
        .collect();
    let ours: Vec<_> = names.iter().filter(|name| name.starts_with("diptych_")).collect();
    assert!(ours.len() >= 10, "{names:?}");
    for word in ["request", "up", "backlog", "leader", "build_info"] {
        assert!(
            ours.iter().any(|name| name.contains(word)),
            "no metric about {word}: {ours:?}"
        );
    }
    assert!(!ids.iter().any(|id| text.contains(id)), "a collection id is no label");
    assert!(!text.contains("measured-"), "a collection name is no label");
    // Only there.
    let outside = cluster.api.get_path("/metrics").await;
    assert!(!outside.text().contains("diptych_"), "{outside:?}");
}

async fn the_python_client_works_unmodified(stage: Stage) {
    let cluster = stage.cluster().await;
    let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = std::env::var_os("DIPTYCH_TEST_PYTHON").map_or_else(|| here.join(".venv/bin/python3"), Into::into);
    let mut command = tokio::process::Command::new(python);
    command
        .arg(here.join("tests/python_client.py"))
        .arg(cluster.diptych.port.to_string());
    command.kill_on_drop(true);
    let out = command.output().await.expect("python");
    let text = [out.stdout, out.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(out.status.success(), "{}\n{}", text[0], text[1]);
    assert!(text[0].contains("all good"), "{text:?}");
    cluster.diptych.wait_drained().await;
    assert!(
        cluster
            .assert_equal_in(&[("default_tenant", "default_database"), ("py-tenant", "py-database")])
            .await
            > 50
    );
}
