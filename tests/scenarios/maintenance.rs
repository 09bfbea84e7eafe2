//! A node is taken out, restarted or copied, and taken back, while clients work: they notice nothing.

use serde_json::json;

use crate::harness::cluster::{Cluster, Side};
use crate::harness::compare::{DEFAULT, compare_nodes};
use crate::harness::load::Load;
use crate::harness::writer::Writer;
use crate::harness::{Stage, scenarios};
use crate::operator::{diptych, fails, ok};

scenarios! {
    both_nodes_are_restarted_and_copied_under_load: sqlite, postgres;
    maintenance_survives_the_proxy: sqlite, postgres;
}

const NAMES: [&str; 2] = ["primary", "replica"];

/// What the guide for restarts and cold backups says: out, stop, do it, start, back.
async fn rolling(cluster: &mut Cluster, load: &Load, side: Side, work: impl FnOnce(&mut Cluster)) {
    let name = NAMES[side as usize];
    load.wait_writes(20).await;
    ok(&diptych(cluster, &["node", "maint", name, "--wait", "60"]));
    // Nothing is under way there, so that it does not matter how it is stopped.
    cluster.node(side).kill9();
    load.wait_writes(20).await;
    load.wait_reads(20).await;
    work(cluster);
    cluster.node(side).restart().await;
    ok(&diptych(cluster, &["node", "ready", name, "--wait", "120"]));
}

async fn both_nodes_are_restarted_and_copied_under_load(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let id = cluster.api.collection("busy").await;
    let load = Load::start(&cluster.api, &id, 4, 4, stage.seed);
    for side in [Side::B, Side::A] {
        rolling(&mut cluster, &load, side, |_| {}).await;
    }
    for side in [Side::B, Side::A] {
        rolling(&mut cluster, &load, side, |cluster| {
            cluster.node(side).backup();
        })
        .await;
    }
    load.wait_writes(20).await;
    let report = load.stop().await;
    report.assert_clean();
    ok(&diptych(&cluster, &["drain", "wait", "--timeout", "60"]));
    assert!(cluster.assert_equal().await > 20);
    for node in [&cluster.a, &cluster.b] {
        let dump = compare_nodes(&[node], &[DEFAULT]).await.expect("itself");
        report.assert_present(dump.collection("busy"));
    }
    let status = cluster.diptych.status().await;
    for node in status["instances"].as_array().expect("nodes") {
        assert_eq!(node["ejections"], 0, "it never failed: {node:#}");
    }
}

async fn maintenance_survives_the_proxy(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let mut writer = Writer::new(&cluster).await;
    writer.acked(5).await;
    ok(&diptych(&cluster, &["node", "maint", "primary"]));
    fails(
        &diptych(&cluster, &["node", "maint", "replica"]),
        "replica stays in service: no other node is up",
    );
    writer.acked(5).await;
    cluster.diptych.kill9();
    cluster.diptych.restart().await;
    writer.acked(5).await;
    let status = cluster.diptych.status().await;
    let node = &status["instances"][0];
    assert!(node["maintenance"].is_object(), "{node:#}");
    assert_eq!((&node["up"], &node["in_flight"]), (&json!(false), &json!(0)));
    assert_eq!(status["instances"][0]["pending_writes"], 10);
    ok(&diptych(&cluster, &["node", "ready", "primary", "--wait", "60"]));
    writer.acked(5).await;
    ok(&diptych(&cluster, &["drain", "wait", "--timeout", "60"]));
    writer.check(&cluster).await;
    cluster.assert_equal().await;
}
