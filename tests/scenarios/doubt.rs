//! Outcomes that nobody knows at first: clients that hang up, answers that are lost, requests that land late.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::harness::api::Answer;
use crate::harness::cluster::{Cluster, Options, Side};
use crate::harness::data::Rng;
use crate::harness::fault::Seen;
use crate::harness::{Stage, scenarios};

scenarios! {
    clients_that_hang_up_leave_nothing_half_done: sqlite, postgres;
    an_answer_that_is_lost_is_not_a_lost_write: sqlite;
    s11_a_straggler_lands_late: sqlite, postgres;
    s20_the_last_node_is_completed_from_the_log_before_it_serves: sqlite, postgres;
    s23_a_retried_read_is_never_stale: sqlite;
    s23_a_node_that_is_being_drained_serves_no_read: sqlite;
    s25_a_stopped_lead_does_not_hold_up_the_lanes: sqlite;
    a_request_that_panics_chroma_blames_no_node: sqlite;
}

/// A short grace, so that a slow node is in doubt soon.
fn faults() -> Options {
    Options::faults().extra("writes: { mirror_grace: 300ms }")
}

fn value(n: i64) -> Value {
    json!({"ids": ["x"], "embeddings": [[n, 1]], "documents": [format!("v{n}")], "metadatas": [{"n": n}]})
}

async fn document(cluster: &Cluster, id: &str) -> Answer {
    cluster
        .api
        .op(id, "get", &json!({"ids": ["x"], "include": ["documents"]}))
        .await
}

/// Writes a request by hand, `sent` bytes of its body only, and closes the connection without reading.
async fn hang_up(cluster: &Cluster, path: &str, body: &[u8], sent: usize) {
    let mut stream = TcpStream::connect(("127.0.0.1", cluster.diptych.port))
        .await
        .expect("the proxy listens");
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.expect("the proxy reads");
    stream.write_all(&body[..sent]).await.expect("the proxy reads");
}

async fn clients_that_hang_up_leave_nothing_half_done(stage: Stage) {
    let cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let id = api.collection("busy").await;
    api.op(&id, "add", &json!({"ids": ["first"], "embeddings": [[0, 0, 0]]}))
        .await
        .expect(201);
    let path = api.records(&id, "upsert");
    let mut rng = Rng::new(stage.seed);
    for round in 0..40 {
        let ids: Vec<_> = (0..20).map(|n| format!("whole-{round}-{n}")).collect();
        let halves: Vec<_> = (0..20).map(|n| format!("half-{round}-{n}")).collect();
        let body = |ids: &[String], rng: &mut Rng| {
            let embeddings: Vec<_> = ids.iter().map(|_| rng.vector(3)).collect();
            json!({"ids": ids, "embeddings": embeddings}).to_string().into_bytes()
        };
        let (whole, half) = (body(&ids, &mut rng), body(&halves, &mut rng));
        let cut = rng.below(half.len());
        let acked = json!({"ids": [format!("acked-{round}")], "embeddings": [rng.vector(3)]});
        let (_, _, answer) = tokio::join!(
            hang_up(&cluster, &path, &whole, whole.len()),
            hang_up(&cluster, &path, &half, cut),
            api.op(&id, "upsert", &acked),
        );
        answer.ok();
        if round % 8 == 0 {
            let create = json!({"name": format!("made-{round}")}).to_string().into_bytes();
            hang_up(&cluster, &api.path("/collections"), &create, create.len()).await;
            hang_up(&cluster, &api.path("/collections"), &create, create.len() / 2).await;
        }
    }
    // What the proxy still has in its lanes is before this in order.
    for n in 0..3 {
        api.op(
            &id,
            "upsert",
            &json!({"ids": [format!("last-{n}")], "embeddings": [[1, 1, n]]}),
        )
        .await
        .ok();
        api.collection(&format!("last-{n}")).await;
    }
    cluster.diptych.wait_drained().await;
    assert!(cluster.assert_equal().await >= 41);
    let got = api.op(&id, "get", &json!({"include": []})).await.ok().json();
    let ids: Vec<&str> = got["ids"]
        .as_array()
        .expect("ids")
        .iter()
        .filter_map(Value::as_str)
        .collect();
    assert!(
        !ids.iter().any(|id| id.starts_with("half-")),
        "a body that was cut was applied"
    );
    for round in 0..40 {
        let whole = ids
            .iter()
            .filter(|id| id.starts_with(&format!("whole-{round}-")))
            .count();
        assert!(whole == 0 || whole == 20, "round {round}: {whole} of 20 records");
        assert!(ids.contains(&format!("acked-{round}").as_str()));
    }
}

/// A node carries out a write and its connection closes: applied everywhere or nowhere, and acknowledged.
async fn an_answer_that_is_lost_is_not_a_lost_write(stage: Stage) {
    let cluster = stage.cluster_with(faults()).await;
    let api = cluster.api.clone();
    let id = api.collection("busy").await;
    api.op(&id, "upsert", &value(0)).await.ok();
    for side in [Side::A, Side::B] {
        for n in 1..=3 {
            cluster.fault(side).apply_then_close(1, Seen::is_record_write);
            api.op(&id, "upsert", &value(n)).await.ok();
            let seen = document(&cluster, &id).await.ok().json();
            assert_eq!(seen["documents"][0], format!("v{n}"));
            cluster.diptych.wait_drained().await;
            cluster.fault(side).close_unsent(1, Seen::is_record_write);
            api.op(&id, "update", &value(n + 10)).await.ok();
            cluster.diptych.wait_drained().await;
            assert_eq!(cluster.assert_equal().await, 1);
            assert_eq!(
                document(&cluster, &id).await.ok().json()["documents"][0],
                format!("v{}", n + 10)
            );
        }
    }
}

/// W1 hangs on its way to B and is acknowledged; W2 follows; W1 lands: nothing may be undone by it.
async fn s11_a_straggler_lands_late(stage: Stage) {
    let cluster = stage.cluster_with(faults()).await;
    let api = cluster.api.clone();
    let id = api.collection("busy").await;
    api.op(&id, "upsert", &value(0)).await.ok();
    let on_b = cluster.b.api().by_name("busy").await.ok().id();
    let gate = cluster
        .fault(Side::B)
        .hold_requests(|seen| seen.is_record_write() && !seen.is_own());
    api.op(&id, "upsert", &value(1)).await.ok();
    gate.wait_held(1).await;
    api.op(&id, "upsert", &value(2)).await.ok();
    api.op(&id, "add", &json!({"ids": ["after"], "embeddings": [[7, 7]]}))
        .await
        .ok();
    assert_eq!(document(&cluster, &id).await.ok().json()["documents"][0], "v2");
    // Nothing else goes to (B, collection) while the straggler is on its way.
    let to_b = cluster
        .fault(Side::B)
        .seen(|seen| seen.is_record_write() && seen.path.contains(&on_b));
    assert_eq!(to_b.len(), 2, "{to_b:?}");
    let status = cluster.diptych.status().await;
    assert_ne!(status["instances"][1]["pending_writes"], 0, "{status:#}");
    gate.release();
    cluster.diptych.wait_drained().await;
    assert_eq!(cluster.assert_equal().await, 2);
    assert_eq!(document(&cluster, &id).await.ok().json()["documents"][0], "v2");
}

/// B is in doubt about W1, which is acknowledged; kill -9 A: B has to be completed from the log, not refused.
async fn s20_the_last_node_is_completed_from_the_log_before_it_serves(stage: Stage) {
    let mut cluster = stage
        .cluster_with(Options {
            fault_a: false,
            ..faults()
        })
        .await;
    let api = cluster.api.clone();
    let id = api.collection("busy").await;
    api.op(&id, "upsert", &value(0)).await.ok();
    let gate = cluster
        .fault(Side::B)
        .hold_requests(|seen| seen.is_record_write() && !seen.is_own());
    api.op(&id, "upsert", &value(1)).await.ok();
    gate.wait_held(1).await;
    cluster.a.kill9();
    let read = tokio::spawn({
        let (api, id) = (api.clone(), id.clone());
        async move {
            api.op(&id, "get", &json!({"ids": ["x"], "include": ["documents"]}))
                .await
        }
    });
    gate.release();
    let answer = tokio::time::timeout(Duration::from_secs(60), read).await;
    let answer = answer
        .expect("the read is never answered")
        .expect("no panic")
        .expect(200);
    assert_eq!(answer.json()["documents"][0], "v1");
    api.op(&id, "upsert", &value(2)).await.ok();
    assert_eq!(document(&cluster, &id).await.ok().json()["documents"][0], "v2");
    cluster.up(Side::A).await;
    assert_eq!(cluster.assert_equal().await, 1);
}

/// A, in sync, fails a read; B is behind: the retry must not answer from B what it had before.
async fn s23_a_retried_read_is_never_stale(stage: Stage) {
    let cluster = stage.cluster_with(faults()).await;
    let api = cluster.api.clone();
    let id = api.collection("busy").await;
    api.op(&id, "upsert", &value(0)).await.ok();
    let gate = cluster
        .fault(Side::B)
        .hold_requests(|seen| seen.is_record_write() && !seen.is_own());
    api.op(&id, "upsert", &value(1)).await.ok();
    gate.wait_held(1).await;
    let mut served = 0;
    for n in 0..30 {
        match n % 3 {
            0 => cluster.fault(Side::A).close_unsent(1, |seen| seen.is_op("get")),
            1 => cluster
                .fault(Side::A)
                .answer(1, 500, r#"{"error":"InternalError","message":"x"}"#, |s| s.is_op("get")),
            _ => {}
        }
        let answer = document(&cluster, &id).await;
        if answer.status == 200 {
            served += 1;
            assert_eq!(answer.json()["documents"][0], "v1", "stale: {answer:?}");
        } else {
            assert!(answer.status >= 500, "{answer:?}");
        }
    }
    assert!(served >= 10, "{served} reads were served");
    cluster.fault(Side::A).clear();
    gate.release();
    cluster.diptych.wait_drained().await;
    assert_eq!(document(&cluster, &id).await.ok().json()["documents"][0], "v1");
    assert_eq!(cluster.assert_equal().await, 1);
}

/// B is back and its drain is under way, held on its first write: no read is served by B.
async fn s23_a_node_that_is_being_drained_serves_no_read(stage: Stage) {
    let mut cluster = stage.cluster_with(faults()).await;
    let api = cluster.api.clone();
    let id = api.collection("busy").await;
    api.op(&id, "upsert", &value(0)).await.ok();
    cluster.down(Side::B).await;
    api.op(&id, "upsert", &value(1)).await.ok();
    let gate = cluster
        .fault(Side::B)
        .hold_requests(|seen| seen.is_record_write() && !seen.is_own());
    cluster.b.restart().await;
    gate.wait_held(1).await;
    for _ in 0..30 {
        assert_eq!(document(&cluster, &id).await.ok().json()["documents"][0], "v1");
    }
    gate.release();
    cluster.diptych.wait_drained().await;
    assert_eq!(cluster.assert_equal().await, 1);
}

/// Every write is acknowledged while the lead is still stopped.
async fn s25_a_stopped_lead_does_not_hold_up_the_lanes(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let mut ids = Vec::new();
    for n in 0..4 {
        let id = api.collection(&format!("lane-{n}")).await;
        api.op(&id, "upsert", &value(0)).await.ok();
        ids.push(id);
    }
    cluster.a.sigstop();
    let mut writes = tokio::task::JoinSet::new();
    for id in &ids {
        let (api, id) = (api.clone(), id.clone());
        writes.spawn(async move {
            for n in 1..=3 {
                api.op(&id, "upsert", &value(n)).await.ok();
                let read = api.op(&id, "get", &json!({"ids": ["x"]})).await.ok().json();
                assert_eq!(read["metadatas"][0]["n"], n);
            }
        });
    }
    // Shorter than the 30 s that a lane must not wait; A stays stopped all the while.
    let all = tokio::time::timeout(Duration::from_secs(20), writes.join_all()).await;
    assert!(all.is_ok(), "writes wait for a lead that is stopped");
    api.collection("created-meanwhile").await;
    cluster.a.sigcont();
    cluster.diptych.wait_drained().await;
    assert_eq!(cluster.assert_equal().await, 4);
}

/// A well-formed resource name makes Chroma close the connection; both nodes are fine all the same.
async fn a_request_that_panics_chroma_blames_no_node(stage: Stage) {
    let cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let id = api.collection("busy").await;
    api.op(&id, "upsert", &value(0)).await.ok();
    for _ in 0..10 {
        // A query for nothing does the same to some collections; to others it is an empty answer.
        api.op(&id, "query", &json!({"query_embeddings": [[1, 1]], "n_results": 0}))
            .await;
        let answer = api.get_path("/api/v2/collections/a:b:c").await;
        assert!((400..600).contains(&answer.status), "{answer:?}");
        document(&cluster, &id).await.ok();
        api.op(&id, "upsert", &value(1)).await.ok();
    }
    cluster.diptych.wait_drained().await;
    assert_eq!(cluster.assert_equal().await, 1);
}
