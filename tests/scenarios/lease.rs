//! Two proxies on one journal: one writes.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::cluster::Cluster;
use crate::harness::diptych::{Config, Diptych, HEALTH};
use crate::harness::{Stage, eventually, scenarios};

scenarios! {
    a_second_proxy_refuses_to_start_while_the_first_lives: postgres;
    s02_a_proxy_that_wakes_up_after_its_lease_sends_nothing: postgres;
    a_graceful_end_gives_the_lease_back: postgres;
    an_upgrade_hands_the_lease_over: sqlite, postgres;
}

/// A cluster whose proxy uses `journal`, and a second proxy that is configured by somebody else.
async fn two_proxies(stage: &Stage) -> (Cluster, Diptych) {
    let journal = stage.journal_url();
    let cluster = stage
        .cluster_with(crate::harness::cluster::Options {
            journal: Some(journal.clone()),
            extra: socket(stage, "first"),
            ..Default::default()
        })
        .await;
    let dir = stage.dir.join("second");
    std::fs::create_dir_all(&dir).expect("the test's folder");
    let config = Config {
        journal,
        nodes: vec![
            ("primary".to_owned(), cluster.a.url()),
            ("replica".to_owned(), cluster.b.url()),
        ],
        health: HEALTH.into(),
        extra: socket(stage, "second"),
    };
    (cluster, Diptych::prepare(&dir, &config))
}

fn socket(stage: &Stage, name: &str) -> String {
    let dir = stage.dir.join(format!("{name}-run"));
    std::fs::create_dir_all(&dir).expect("the test's folder");
    format!("upgrade_sock: \"{}\"", dir.join("upgrade.sock").display())
}

fn log_of(diptych: &Diptych) -> String {
    std::fs::read_to_string(diptych.log()).unwrap_or_default()
}

async fn says(diptych: &Diptych, what: &str) {
    eventually(Duration::from_secs(30), what, || async {
        let log = log_of(diptych);
        log.contains(what).then_some(()).ok_or(log)
    })
    .await;
}

fn record(n: u64) -> serde_json::Value {
    json!({"ids": ["x"], "embeddings": [[n, 1]]})
}

async fn a_second_proxy_refuses_to_start_while_the_first_lives(stage: Stage) {
    let (mut cluster, mut second) = two_proxies(&stage).await;
    let holder = cluster.diptych.status().await["holder"].clone();
    let holder = holder.as_str().expect("a name").to_owned();
    let id = cluster.api.collection("documents").await;
    second.spawn();
    let mut n = 0;
    let status = loop {
        n += 1;
        cluster.api.op(&id, "upsert", &record(n)).await.ok();
        if let Some(status) = second.ended() {
            break status;
        }
        assert!(n < 3000, "the second proxy does not give up");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(status.code(), Some(1));
    let log = log_of(&second);
    assert!(log.contains(&format!("held by {holder}")), "{log}");
    assert_eq!(cluster.diptych.status().await["leader"], true);

    second.spawn();
    says(&second, "waiting for that to end").await;
    cluster.diptych.kill9();
    let killed = Instant::now();
    second.wait_ready().await;
    let took = killed.elapsed();
    assert!(took < Duration::from_secs(8), "the lease was waited for: {took:?}");
    let api = second.api();
    api.op(&id, "upsert", &record(n + 1)).await.ok();
    assert_eq!(api.count(&id).await.ok().json(), 1);
    cluster.assert_equal().await;
}

async fn s02_a_proxy_that_wakes_up_after_its_lease_sends_nothing(stage: Stage) {
    let (mut cluster, mut second) = two_proxies(&stage).await;
    let id = cluster.api.collection("documents").await;
    cluster.api.op(&id, "upsert", &record(1)).await.ok();
    cluster.diptych.signal(libc::SIGSTOP);
    let (api, first, body) = (cluster.api.clone(), id.clone(), record(2));
    let late = tokio::spawn(async move { api.op(&first, "upsert", &body).await });
    second.spawn();
    second.wait_ready().await;
    second.api().op(&id, "upsert", &record(3)).await.ok();
    cluster.diptych.signal(libc::SIGCONT);
    assert_eq!(late.await.expect("an answer").status, 503);
    assert_eq!(cluster.api.op(&id, "upsert", &record(4)).await.status, 503);
    cluster
        .diptych
        .wait_status("it knows that it was replaced", |status| {
            let told = status["leader"] == false && status["holder"].is_null();
            told.then_some(()).ok_or_else(|| "it does not".to_owned())
        })
        .await;
    second.wait_drained().await;
    let wanted = json!({"ids": ["x"], "include": ["embeddings"]});
    for node in [&cluster.a, &cluster.b] {
        let found = node.api().by_name("documents").await.ok().id();
        let record = node.api().op(&found, "get", &wanted).await.ok().json();
        assert_eq!(record["embeddings"], json!([[3.0, 1.0]]));
    }
}

async fn a_graceful_end_gives_the_lease_back(stage: Stage) {
    let (mut cluster, mut second) = two_proxies(&stage).await;
    cluster.diptych.sigterm().await;
    let left = std::fs::read_dir(stage.dir.join("first-run")).expect("its folder");
    let left: Vec<_> = left.flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left, ["upgrade.sock.lock"]);
    second.restart().await;
    let log = log_of(&second);
    assert!(!log.contains("waiting for that to end"), "{log}");
    assert!(!log.contains("last writer is dead"), "{log}");
}

async fn an_upgrade_hands_the_lease_over(stage: Stage) {
    let extra = socket(&stage, "first");
    let mut cluster = stage
        .cluster_with(crate::harness::cluster::Options::default().extra(&extra))
        .await;
    let id = cluster.api.collection("documents").await;
    cluster.api.op(&id, "upsert", &record(1)).await.ok();
    let before = cluster.diptych.status().await;
    cluster.diptych.upgrade().await;
    let after = cluster.diptych.status().await;
    assert_eq!(after["term"].as_i64(), before["term"].as_i64().map(|term| term + 1));
    assert_ne!(after["holder"], before["holder"]);
    let log = log_of(&cluster.diptych);
    assert!(!log.contains("waiting for that to end"), "{log}");
    cluster.diptych.api().op(&id, "upsert", &record(2)).await.ok();
    cluster.diptych.wait_drained().await;
    cluster.assert_equal().await;
}
