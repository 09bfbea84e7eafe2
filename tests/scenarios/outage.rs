//! One node down, hanging or both down: clients notice nothing that was not promised, and the nodes converge.

use serde_json::json;

use crate::harness::cluster::{Cluster, Side};
use crate::harness::load::Load;
use crate::harness::workload::{Workload, assert_converged, rounds};
use crate::harness::{Stage, eventually, scenarios};

use std::time::Duration;

scenarios! {
    the_replica_misses_every_kind_of_write_and_catches_up: sqlite, postgres;
    the_primary_misses_every_kind_of_write_and_catches_up: sqlite, postgres;
    outages_alternate: sqlite, postgres;
    the_only_authority_dies_and_the_log_completes_the_other: sqlite, postgres;
    with_both_nodes_down_everything_is_503_and_nothing_is_half_done: sqlite, postgres;
    a_replica_that_hangs_costs_no_errors: sqlite;
    a_primary_that_hangs_costs_no_errors: sqlite;
    kills_under_load_cost_no_errors: sqlite, postgres;
}

fn clients(cluster: &Cluster, seed: u64, count: u64) -> Vec<Workload> {
    (0..count)
        .map(|n| Workload::new(&cluster.api, &format!("client{n}"), seed + n))
        .collect()
}

async fn the_replica_misses_every_kind_of_write_and_catches_up(stage: Stage) {
    node_down(stage, Side::B).await;
}

async fn the_primary_misses_every_kind_of_write_and_catches_up(stage: Stage) {
    node_down(stage, Side::A).await;
}

async fn node_down(stage: Stage, side: Side) {
    let mut cluster = stage.cluster().await;
    let mut workloads = clients(&cluster, stage.seed, 3);
    rounds(&mut workloads).await;
    // Nobody waits for health to notice: clients do not either.
    cluster.node(side).kill9();
    rounds(&mut workloads).await;
    rounds(&mut workloads).await;
    cluster.diptych.wait_unhealthy(side as usize).await;
    cluster
        .diptych
        .wait_status("the backlog is a number", |status| {
            let pending = status["instances"][side as usize]["pending_writes"]
                .as_u64()
                .unwrap_or(0);
            if pending > 0 {
                Ok(())
            } else {
                Err("no pending writes".into())
            }
        })
        .await;
    cluster.up(side).await;
    assert!(assert_converged(&cluster, &workloads).await >= 30);
    // And life goes on, on both.
    rounds(&mut workloads).await;
    cluster.diptych.wait_drained().await;
    assert_converged(&cluster, &workloads).await;
}

async fn outages_alternate(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let mut workloads = clients(&cluster, stage.seed, 2);
    rounds(&mut workloads).await;
    for side in [Side::A, Side::B, Side::A, Side::B] {
        cluster.node(side).kill9();
        rounds(&mut workloads).await;
        cluster.up(side).await;
    }
    assert_converged(&cluster, &workloads).await;
}

/// A down, writes, B down, A back, writes, B back: A lacks nothing that is not in the log.
async fn the_only_authority_dies_and_the_log_completes_the_other(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let mut workloads = clients(&cluster, stage.seed, 2);
    rounds(&mut workloads).await;
    cluster.node(Side::A).kill9();
    rounds(&mut workloads).await;
    cluster.node(Side::B).kill9();
    cluster.node(Side::A).restart().await;
    cluster
        .diptych
        .wait_status("A is complete", |status| {
            let a = &status["instances"][0];
            let good = a["healthy"] == true && a["in_sync"] == true && a["pending_writes"] == 0;
            if good { Ok(()) } else { Err("not yet".into()) }
        })
        .await;
    rounds(&mut workloads).await;
    cluster.up(Side::B).await;
    assert_converged(&cluster, &workloads).await;
}

async fn with_both_nodes_down_everything_is_503_and_nothing_is_half_done(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let mut workloads = clients(&cluster, stage.seed, 1);
    rounds(&mut workloads).await;
    let id = api.collection("witness").await;
    api.op(&id, "add", &json!({"ids": ["x"], "embeddings": [[1, 2]]}))
        .await
        .expect(201);
    cluster.a.kill9();
    cluster.b.kill9();
    eventually(Duration::from_secs(30), "reads are refused", || async {
        let answer = api.count(&id).await;
        if answer.status == 503 {
            Ok(())
        } else {
            Err(format!("{answer:?}"))
        }
    })
    .await;
    let answers = [
        api.op(&id, "add", &json!({"ids": ["y"], "embeddings": [[3, 4]]})).await,
        api.op(&id, "upsert", &json!({"ids": ["x"], "embeddings": [[3, 4]]}))
            .await,
        api.op(&id, "update", &json!({"ids": ["x"], "documents": ["new"]}))
            .await,
        api.op(&id, "delete", &json!({"ids": ["x"]})).await,
        api.op(&id, "delete", &json!({"where": {"k": 1}})).await,
        api.create_collection("half-done", json!(null)).await,
        api.modify(&id, &json!({"new_name": "half-renamed"})).await,
        api.drop_collection("witness").await,
        api.create_database("half-database").await,
        api.create_tenant("half-tenant").await,
        api.op(&id, "get", &json!({})).await,
        api.op(&id, "query", &json!({"query_embeddings": [[1, 2]]})).await,
        api.by_name("witness").await,
        api.list("").await,
    ];
    for answer in answers {
        let answer = answer.expect(503);
        let retry = answer.header("retry-after").and_then(|v| v.parse::<u64>().ok());
        assert!(retry.is_some(), "no Retry-After in {answer:?}");
        answer.error();
    }
    let health = api.get_path("/health").await.expect(503).json();
    assert_eq!(health["status"], "unavailable", "{health}");
    cluster.a.restart().await;
    cluster.b.restart().await;
    cluster.diptych.wait_drained().await;
    let got = api
        .op(&id, "get", &json!({"include": ["embeddings", "documents"]}))
        .await
        .ok()
        .json();
    assert_eq!(
        (&got["ids"], &got["documents"]),
        (&json!(["x"]), &json!([null])),
        "{got}"
    );
    assert_eq!(got["embeddings"], json!([[1.0, 2.0]]));
    assert_eq!(api.by_name("witness").await.ok().id(), id);
    for gone in ["half-done", "half-renamed"] {
        api.by_name(gone).await.expect(404);
        cluster.b.api().by_name(gone).await.expect(404);
    }
    api.get_database("half-database").await.expect(404);
    api.get_tenant("half-tenant").await.expect(404);
    assert_converged(&cluster, &workloads).await;
}

async fn a_replica_that_hangs_costs_no_errors(stage: Stage) {
    hanging(stage, Side::B).await;
}

async fn a_primary_that_hangs_costs_no_errors(stage: Stage) {
    hanging(stage, Side::A).await;
}

async fn hanging(stage: Stage, side: Side) {
    let mut cluster = stage.cluster().await;
    let id = cluster.api.collection("busy").await;
    let load = Load::start(&cluster.api, &id, 3, 3, stage.seed);
    load.wait_writes(20).await;
    cluster.node(side).sigstop();
    cluster.diptych.wait_unhealthy(side as usize).await;
    load.wait_writes(40).await;
    load.wait_reads(40).await;
    cluster.node(side).sigcont();
    load.wait_writes(20).await;
    let report = load.stop().await;
    report.assert_clean();
    cluster.diptych.wait_drained().await;
    assert!(cluster.assert_equal().await > 10);
    let dump = crate::harness::compare::compare_nodes(&[&cluster.b], &[crate::harness::compare::DEFAULT]).await;
    report.assert_present(dump.expect("itself").collection("busy"));
}

async fn kills_under_load_cost_no_errors(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let id = cluster.api.collection("busy").await;
    let other = cluster.api.collection("other").await;
    let load = Load::start(&cluster.api, &id, 4, 4, stage.seed);
    let beside = Load::start(&cluster.api, &other, 1, 1, stage.seed + 1);
    for side in [Side::B, Side::A] {
        load.wait_writes(30).await;
        cluster.node(side).kill9();
        load.wait_writes(60).await;
        load.wait_reads(60).await;
        cluster.node(side).restart().await;
        // It catches up while the load goes on.
        cluster.diptych.wait_drained().await;
    }
    load.wait_writes(30).await;
    let (report, beside) = (load.stop().await, beside.stop().await);
    report.assert_clean();
    beside.assert_clean();
    cluster.diptych.wait_drained().await;
    assert!(cluster.assert_equal().await > 20);
    for node in [&cluster.a, &cluster.b] {
        let dump = crate::harness::compare::compare_nodes(&[node], &[crate::harness::compare::DEFAULT]).await;
        let dump = dump.expect("itself");
        report.assert_present(dump.collection("busy"));
        beside.assert_present(dump.collection("other"));
    }
}
