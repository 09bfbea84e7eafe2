//! What an operator does with the command line, on a running system.

use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::harness::cluster::{Cluster, Side};
use crate::harness::compare::DEFAULT;
use crate::harness::writer::Writer;
use crate::harness::{Stage, scenarios};

scenarios! {
    the_command_line_shows_and_steers_the_log: sqlite;
    a_comparison_names_what_differs_and_mends_it_if_told: sqlite;
    verbs_are_on_the_admin_port_alone: sqlite;
}

/// `diptych` with these words, asking this cluster.
pub fn diptych(cluster: &Cluster, words: &[&str]) -> Output {
    let admin = format!("http://127.0.0.1:{}", cluster.diptych.admin_port);
    let mut command = Command::new(env!("CARGO_BIN_EXE_diptych"));
    command.args(words).args(["--url", &admin]);
    command.env_remove("DIPTYCH_CONFIG").env_remove("DIPTYCH_ADMIN_TOKEN");
    command.stdin(std::process::Stdio::null());
    tokio::task::block_in_place(|| command.output().expect("the diptych binary"))
}

#[track_caller]
pub fn ok(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    text
}

#[track_caller]
pub fn fails(output: &Output, part: &str) {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && errors.contains(part), "{errors}");
}

pub fn value(output: &Output) -> Value {
    serde_json::from_str(&ok(output)).expect("JSON")
}

async fn the_command_line_shows_and_steers_the_log(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let mut writer = Writer::new(&cluster).await;
    writer.acked(5).await;
    cluster.diptych.wait_drained().await;
    ok(&diptych(&cluster, &["drain", "wait"]));
    cluster.down(Side::B).await;
    writer.acked(3).await;
    let page = ok(&diptych(&cluster, &["wal", "list"]));
    assert!(page.contains("upsert") && page.contains("3 of 3 shown"), "{page}");
    let listed = value(&diptych(
        &cluster,
        &["wal", "list", "--collection", "records", "--limit", "1", "--json"],
    ));
    let entry = &listed["entries"][0];
    let id = entry["id"].as_str().expect("an id");
    assert_eq!(
        (&entry["node"], &entry["collection"]["name"]),
        (&json!("replica"), &json!("records"))
    );
    let shown = value(&diptych(&cluster, &["wal", "show", id, "--json"]));
    assert_eq!(shown["body"]["ids"].as_array().map(Vec::len), Some(1), "{shown:#}");
    fails(&diptych(&cluster, &["wal", "retry", id]), "not parked");
    fails(&diptych(&cluster, &["wal", "skip", id]), "--yes");
    fails(&diptych(&cluster, &["wal", "skip", id, "--yes"]), "not parked");
    fails(&diptych(&cluster, &["wal", "show", "7"]), "`7` is not an id");
    fails(
        &diptych(&cluster, &["wal", "list", "--node", "third"]),
        "there are primary, replica",
    );
    fails(
        &diptych(&cluster, &["repairs", "retry", "00000000-0000-0000-0000-000000000000"]),
        "no repair",
    );
    fails(&diptych(&cluster, &["node", "accept", "replica"]), "--yes");
    fails(
        &diptych(&cluster, &["node", "accept", "third", "--yes"]),
        "no node third",
    );
    let nothing = value(&diptych(&cluster, &["wal", "list", "--parked", "--json"]));
    assert_eq!(nothing, json!({"entries": [], "total": 0}));

    ok(&diptych(&cluster, &["drain", "pause"]));
    cluster.b.restart().await;
    fails(
        &diptych(&cluster, &["drain", "wait", "--timeout", "3"]),
        "Not in sync after 3 s",
    );
    assert_eq!(cluster.diptych.status().await["wal"]["pending_writes"], 3);
    let page = tokio::task::block_in_place(|| {
        let admin = format!("http://127.0.0.1:{}", cluster.diptych.admin_port);
        let output = Command::new(env!("CARGO_BIN_EXE_diptych"));
        let mut output = output;
        output
            .args(["status", "--url", &admin])
            .output()
            .expect("the diptych binary")
    });
    assert!(String::from_utf8_lossy(&page.stdout).contains("the drain is paused"));
    ok(&diptych(&cluster, &["drain", "resume"]));
    ok(&diptych(&cluster, &["drain", "wait", "--timeout", "60"]));
    writer.check(&cluster).await;

    cluster.diptych.kill9();
    fails(&diptych(&cluster, &["wal", "list"]), "No Diptych can be reached");
}

async fn a_comparison_names_what_differs_and_mends_it_if_told(stage: Stage) {
    let cluster = stage.cluster().await;
    let mut writer = Writer::new(&cluster).await;
    writer.acked(20).await;
    cluster.diptych.wait_drained().await;
    assert!(ok(&diptych(&cluster, &["verify"])).contains("20 records compared: equal"));

    let on_b = cluster.b.api().by_name("records").await.ok().id();
    let behind = json!({"ids": ["r3", "r7"], "documents": ["changed", "changed"]});
    cluster.b.api().op(&on_b, "update", &behind).await.ok();
    let output = diptych(&cluster, &["verify", "--collection", "records"]);
    let page = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{page}");
    assert!(
        page.contains("records: 2 records of replica differ from primary: r3, r7\n"),
        "{page}"
    );
    let kept = cluster
        .b
        .api()
        .op(&on_b, "get", &json!({"ids": ["r3"]}))
        .await
        .ok()
        .json();
    assert_eq!(
        kept["documents"],
        json!(["changed"]),
        "nothing is overwritten unless asked"
    );

    let output = diptych(&cluster, &["verify", "--repair"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("being repaired"));
    cluster.diptych.wait_drained().await;
    ok(&diptych(&cluster, &["verify"]));
    writer.check(&cluster).await;

    // And all of it from the node that is said to count.
    cluster
        .b
        .api()
        .op(&on_b, "update", &json!({"ids": ["r1"], "documents": ["changed"]}))
        .await
        .ok();
    let words = ["resync", "--collection", "records", "--node", "replica"];
    fails(&diptych(&cluster, &words), "--yes");
    ok(&diptych(
        &cluster,
        &[&words[..], &["--from", "primary", "--yes"]].concat(),
    ));
    cluster.diptych.wait_drained().await;
    writer.check(&cluster).await;
    assert_eq!(cluster.assert_equal_in(&[DEFAULT]).await, 20);
}

async fn verbs_are_on_the_admin_port_alone(stage: Stage) {
    let cluster = stage.cluster().await;
    let (proxy, admin) = (cluster.api.clone(), cluster.diptych.admin());
    assert_eq!(admin.post("/admin/drain/pause", &json!({})).await.status, 200);
    assert_eq!(admin.post("/admin/drain/resume", &json!({})).await.status, 200);
    let paths = [
        "/admin/drain/pause",
        "/admin/verify",
        "/admin/wal/entries/x/skip",
        "/admin/repairs",
    ];
    for path in paths {
        let answer = proxy.post(path, &json!({})).await;
        assert_eq!(answer.status, 404, "{path}: Chroma's own answer");
    }
    assert_eq!(proxy.get_path("/admin/wal/entries").await.status, 404);
    assert_eq!(cluster.diptych.status().await["wal"]["drain_paused"], false);
    assert_eq!(admin.get_path("/admin/drain/pause").await.status, 405);
    let foreign = [("host", "evil.example"), ("origin", "http://evil.example")];
    let answer = admin
        .try_send(http::Method::POST, "/admin/drain/pause", &foreign, bytes::Bytes::new())
        .await
        .expect("an answer");
    assert_eq!(answer.status, 403, "a page of another site");
    assert_eq!(cluster.diptych.status().await["wal"]["drain_paused"], false);
}
