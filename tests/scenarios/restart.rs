//! Proxy and Postgres restart while a node has a backlog: the backlog is still there, and is drained.

use std::time::Duration;

use serde_json::json;

use crate::harness::cluster::{Options, Side};
use crate::harness::postgres::Postgres;
use crate::harness::workload::{Workload, assert_converged, rounds};
use crate::harness::{Stage, eventually, scenarios};

scenarios! {
    the_proxy_restarts_with_a_backlog: sqlite, postgres;
    the_proxy_restarts_without_a_backlog: sqlite, postgres;
    postgres_restarts_with_a_backlog: postgres;
    s24_a_created_collection_survives_the_proxy_and_its_first_node: sqlite, postgres;
}

async fn the_proxy_restarts_with_a_backlog(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let mut workloads: Vec<_> = (0..2)
        .map(|n| Workload::new(&cluster.api, &format!("client{n}"), stage.seed + n))
        .collect();
    rounds(&mut workloads).await;
    cluster.b.kill9();
    rounds(&mut workloads).await;
    cluster.diptych.sigterm().await;
    cluster.diptych.restart().await;
    rounds(&mut workloads).await;
    cluster.diptych.kill9();
    cluster.diptych.restart().await;
    for workload in &workloads {
        workload.read_all().await;
    }
    rounds(&mut workloads).await;
    // Once more, and the node returns while the proxy is away.
    cluster.diptych.sigterm().await;
    cluster.b.restart().await;
    cluster.diptych.restart().await;
    cluster.diptych.wait_drained().await;
    assert_converged(&cluster, &workloads).await;
}

async fn the_proxy_restarts_without_a_backlog(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let mut workloads = vec![Workload::new(&cluster.api, "client", stage.seed)];
    rounds(&mut workloads).await;
    for hard in [false, true] {
        if hard {
            cluster.diptych.kill9();
        } else {
            cluster.diptych.sigterm().await;
        }
        cluster.diptych.restart().await;
        // Ids given out before are valid after, on either node.
        for side in [Side::B, Side::A] {
            cluster.node(side).kill9();
            workloads[0].read_all().await;
            rounds(&mut workloads).await;
            cluster.up(side).await;
        }
    }
    assert_converged(&cluster, &workloads).await;
}

async fn postgres_restarts_with_a_backlog(stage: Stage) {
    let dir = stage.dir.clone();
    let mut postgres = tokio::task::block_in_place(|| Postgres::dedicated(&dir));
    let journal = Some(tokio::task::block_in_place(|| postgres.create_database("journal")));
    let mut cluster = stage
        .cluster_with(Options {
            journal,
            ..Options::default()
        })
        .await;
    let mut workloads = vec![Workload::new(&cluster.api, "client", stage.seed)];
    rounds(&mut workloads).await;
    cluster.b.kill9();
    rounds(&mut workloads).await;
    for hard in [false, true] {
        tokio::task::block_in_place(|| {
            if hard {
                postgres.kill9();
            } else {
                postgres.stop();
            }
            postgres.start();
        });
        let admin = cluster.diptych.admin();
        eventually(Duration::from_secs(60), "the journal is back", || async {
            let answer = admin.try_get("/admin/wal_count").await?;
            let back = answer.status == 200 && answer.json()["wal_system_ready"] == true;
            if back { Ok(()) } else { Err(format!("{answer:?}")) }
        })
        .await;
        rounds(&mut workloads).await;
    }
    cluster.up(Side::B).await;
    assert_converged(&cluster, &workloads).await;
}

/// Create acknowledged with A's id; kill -9 proxy and A; the client writes to that id.
async fn s24_a_created_collection_survives_the_proxy_and_its_first_node(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let api = cluster.api.clone();
    for round in 0..3 {
        let id = api.collection(&format!("fresh-{round}")).await;
        cluster.diptych.kill9();
        cluster.a.kill9();
        cluster.diptych.restart().await;
        let body = json!({"ids": ["x", "y"], "embeddings": [[round, 1], [round, 2]]});
        api.op(&id, "add", &body).await.expect(201);
        assert_eq!(api.count(&id).await.ok().json(), 2);
        assert_eq!(api.by_name(&format!("fresh-{round}")).await.ok().id(), id);
        cluster.up(Side::A).await;
        assert_eq!(cluster.a.api().by_name(&format!("fresh-{round}")).await.ok().id(), id);
    }
    assert_eq!(cluster.assert_equal().await, 6);
}
