//! Is it still the node that it was? Wiped, restored and doubled nodes are noticed before they serve or are drained into.

use std::time::Duration;

use http::Method;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::harness::chroma::ChromaNode;
use crate::harness::cluster::{CHECKPOINT, Cluster, Side};
use crate::harness::compare::{DEFAULT, assert_nodes_equal};
use crate::harness::diptych::{Config, Diptych, HEALTH};
use crate::harness::fault::FaultNode;
use crate::harness::{Stage, eventually, scenarios};
use crate::operator::{assert_documented, diptych, fails, value};

scenarios! {
    a_wiped_replica_is_noticed_before_anything_is_drained_into_it: sqlite, postgres;
    a_replica_from_an_older_backup_is_noticed: sqlite, postgres;
    a_restored_primary_can_be_accepted: sqlite;
    a_primary_from_an_older_backup_that_is_alone_waits: sqlite;
    a_route_that_leads_to_another_server_is_noticed: sqlite;
    two_urls_of_one_server_are_refused: sqlite;
    our_own_tenant_is_out_of_reach: sqlite;
    restarts_of_nodes_and_proxy_are_nothing_special: sqlite, postgres;
}

fn record(id: &str, n: u64) -> Value {
    json!({"ids": [id], "embeddings": [[n, 1]], "documents": [format!("w{n}")]})
}

async fn document(cluster: &Cluster, collection: &str, id: &str) -> Value {
    let got = cluster.api.op(collection, "get", &json!({ "ids": [id] })).await.ok();
    got.json()["documents"][0].clone()
}

/// Waits until the proxy has judged a node, and fails if it found another verdict worth an error before.
async fn judged(diptych: &Diptych, verdict: &str) {
    eventually(Duration::from_secs(60), verdict, || async {
        let log = std::fs::read_to_string(diptych.log()).unwrap_or_default();
        let mut verdicts = log.lines().filter(|line| line.contains("A node is not what it was."));
        match verdicts.next_back() {
            Some(line) if line.contains(verdict) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

fn no_verdicts(cluster: &Cluster) {
    let log = std::fs::read_to_string(cluster.diptych.log()).expect("the proxy's log");
    assert!(!log.contains("A node is not what it was."), "{log}");
}

async fn a_wiped_replica_is_noticed_before_anything_is_drained_into_it(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let id = api.collection("docs").await;
    api.op(&id, "add", &record("x", 1)).await.expect(201);
    tokio::time::sleep(CHECKPOINT).await;
    no_verdicts(&cluster);
    cluster.down(Side::B).await;
    api.op(&id, "upsert", &record("x", 2)).await.ok();
    api.collection("later").await;
    cluster.b.wipe();
    cluster.b.restart().await;
    judged(&cluster.diptych, "Changed").await;
    for n in 3..20 {
        api.op(&id, "upsert", &record("x", n)).await.ok();
        assert_eq!(document(&cluster, &id, "x").await, format!("w{n}"));
    }
    cluster.diptych.wait_drained().await;
    assert_eq!(cluster.assert_equal().await, 1);
    assert_eq!(api.list("").await.ok().json().as_array().map(Vec::len), Some(2));
}

async fn a_replica_from_an_older_backup_is_noticed(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let id = api.collection("docs").await;
    api.op(&id, "add", &record("x", 1)).await.expect(201);
    tokio::time::sleep(CHECKPOINT).await;
    cluster.down(Side::B).await;
    let backup = cluster.b.backup();
    cluster.up(Side::B).await;
    api.op(&id, "upsert", &record("x", 2)).await.ok();
    tokio::time::sleep(CHECKPOINT).await;
    no_verdicts(&cluster);
    cluster.down(Side::B).await;
    cluster.b.restore(&backup);
    cluster.b.restart().await;
    judged(&cluster.diptych, "Restored").await;
    for _ in 0..20 {
        assert_eq!(document(&cluster, &id, "x").await, "w2");
    }
    cluster.diptych.wait_drained().await;
    assert_eq!(cluster.assert_equal().await, 1);
}

/// Both nodes and the proxy were gone, and the primary is back alone, from a backup without its last write: it serves
/// nothing, and an operator is told what to do.
async fn a_restored_primary_alone(stage: &Stage) -> (Cluster, String) {
    let mut cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let id = api.collection("docs").await;
    api.op(&id, "add", &record("x", 1)).await.expect(201);
    tokio::time::sleep(CHECKPOINT).await;
    cluster.down(Side::A).await;
    let backup = cluster.a.backup();
    cluster.up(Side::A).await;
    api.op(&id, "upsert", &record("x", 2)).await.ok();
    tokio::time::sleep(CHECKPOINT).await;
    cluster.diptych.kill9();
    cluster.a.kill9();
    cluster.b.kill9();
    cluster.a.restore(&backup);
    cluster.a.restart().await;
    cluster.diptych.spawn();
    judged(&cluster.diptych, "Restored").await;
    cluster
        .diptych
        .wait_status("an operator is told what to do", |status| {
            let error = status["instances"][0]["last_error"].as_str().unwrap_or_default();
            let told = error.contains("restored from a backup") && error.contains("diptych node accept primary");
            let healthy = status["instances"][0]["healthy"] == true;
            if told && !healthy {
                Ok(())
            } else {
                Err(error.to_owned())
            }
        })
        .await;
    api.op(&id, "get", &json!({})).await.expect(503);
    (cluster, id)
}

/// The replica is lost for good: an operator accepts what the primary lacks as lost.
async fn a_restored_primary_can_be_accepted(stage: Stage) {
    let (cluster, id) = a_restored_primary_alone(&stage).await;
    fails(
        &diptych(&cluster, &["node", "accept", "replica", "--yes"]),
        "replica is not accepted: ",
    );
    let accepted = value(&diptych(&cluster, &["node", "accept", "primary", "--yes", "--json"]));
    assert_documented("node accept", &accepted);
    eventually(Duration::from_secs(60), "the primary serves", || async {
        match cluster.api.try_op(&id, "get", &json!({"ids": ["x"]})).await {
            Ok(answer) if answer.json()["documents"][0] == "w1" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    cluster.api.op(&id, "upsert", &record("x", 3)).await.ok();
    assert_eq!(document(&cluster, &id, "x").await, "w3");
}

async fn a_primary_from_an_older_backup_that_is_alone_waits(stage: Stage) {
    let (mut cluster, id) = a_restored_primary_alone(&stage).await;
    cluster.b.restart().await;
    eventually(Duration::from_secs(60), "B serves", || async {
        match cluster.api.try_op(&id, "get", &json!({"ids": ["x"]})).await {
            Ok(answer) if answer.json()["documents"][0] == "w2" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    cluster.diptych.wait_drained().await;
    assert_eq!(cluster.assert_equal().await, 1);
}

/// New connections lead elsewhere, while those that are open live on: a name or a balancer was changed.
async fn a_route_that_leads_to_another_server_is_noticed(stage: Stage) {
    let (a, b) = tokio::join!(ChromaNode::start(&stage.dir, "a"), ChromaNode::start(&stage.dir, "b"));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let route = format!("http://{}", listener.local_addr().expect("an address"));
    let (lead, target) = watch::channel(b.port);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let port = *target.borrow();
            tokio::spawn(async move {
                if let Ok(mut node) = TcpStream::connect(("127.0.0.1", port)).await {
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut node).await;
                }
            });
        }
    });
    let nodes = [("primary", a.url()), ("replica", route)].map(|(name, url)| (name.to_owned(), url));
    let config = Config {
        journal: stage.journal_url(),
        nodes: nodes.to_vec(),
        health: HEALTH.into(),
        extra: String::new(),
    };
    let diptych = Diptych::start(&stage.dir, &config).await;
    let api = diptych.api();
    let id = api.collection("docs").await;
    api.op(&id, "add", &record("x", 1)).await.expect(201);
    diptych.wait_drained().await;
    let c = ChromaNode::start(&stage.dir, "c").await;
    lead.send_replace(c.port);
    judged(&diptych, "Changed").await;
    diptych.wait_drained().await;
    api.op(&id, "upsert", &record("x", 2)).await.ok();
    assert_eq!(assert_nodes_equal(&[&a, &c], &[DEFAULT]).await, 1);
    drop(b);
}

async fn two_urls_of_one_server_are_refused(stage: Stage) {
    let a = ChromaNode::start(&stage.dir, "a").await;
    // The configuration check knows equal URLs; this is one it cannot see through.
    let hop = FaultNode::start(a.port).await;
    let nodes = [("primary", a.url()), ("replica", hop.url())].map(|(name, url)| (name.to_owned(), url));
    let config = Config {
        journal: stage.journal_url(),
        nodes: nodes.to_vec(),
        health: HEALTH.into(),
        extra: String::new(),
    };
    let diptych = Diptych::start(&stage.dir, &config).await;
    let seen = |status: &Value| {
        let [healthy, refused] = [0, 1].map(|node| status["instances"][node]["healthy"] == true);
        (healthy, refused)
    };
    diptych
        .wait_status("one of them is refused", |status| {
            let errors: Vec<_> = [0, 1]
                .iter()
                .filter_map(|&node| status["instances"][node]["last_error"].as_str())
                .filter(|error| error.contains("two URLs lead to one server"))
                .collect();
            let (first, second) = seen(status);
            if errors.len() == 1 && first != second {
                Ok(())
            } else {
                Err(format!("{errors:?}"))
            }
        })
        .await;
    let api = diptych.api();
    let id = api.collection("docs").await;
    api.op(&id, "add", &record("x", 1)).await.expect(201);
    assert_eq!(a.api().list("").await.ok().json().as_array().map(Vec::len), Some(1));
}

async fn our_own_tenant_is_out_of_reach(stage: Stage) {
    let cluster = stage.cluster().await;
    let api = &cluster.api;
    let id = api.collection("docs").await;
    api.op(&id, "add", &record("x", 1)).await.expect(201);
    tokio::time::sleep(CHECKPOINT).await;
    for node in [&cluster.a, &cluster.b] {
        let mut ours = vec![];
        for database in ["health", "marker"] {
            let own = node.api().within("diptych_system", database);
            own.get_database(database).await.ok();
            let found = own.list("").await.ok().json();
            ours.extend(found.as_array().expect("a list").iter().map(|one| one["id"].clone()));
        }
        assert_eq!(ours.len(), 2, "the canary and the checkpoint");
        for id in ours {
            let id = id.as_str().expect("an id");
            for api in [api.clone(), api.within("diptych_system", "marker")] {
                api.by_id(id).await.expect(404);
                api.count(id).await.expect(404);
                for operation in ["get", "add", "upsert", "update", "delete", "query"] {
                    let body = json!({"ids": ["checkpoint"], "embeddings": [[1.0]], "query_embeddings": [[1.0]]});
                    api.op(id, operation, &body).await.expect(404);
                }
                api.modify(id, &json!({"new_name": "stolen"})).await.expect(404);
            }
        }
    }
    for path in [
        "/api/v2/tenants/diptych_system",
        "/api/v2/tenants/diptych_system/databases/marker",
        "/api/v2/tenants/diptych%5Fsystem/databases/marker",
    ] {
        api.get_path(path).await.expect(404);
        let deleted = api.try_send(Method::DELETE, path, &[], bytes::Bytes::new()).await;
        assert!((400..500).contains(&deleted.expect("an answer").status));
    }
    let own = api.within("diptych_system", "marker");
    for name in ["checkpoint", "canary"] {
        own.by_name(name).await.expect(404);
        own.drop_collection(name).await.expect(404);
    }
    cluster.assert_equal().await;
    no_verdicts(&cluster);
}

async fn restarts_of_nodes_and_proxy_are_nothing_special(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let api = cluster.api.clone();
    let id = api.collection("docs").await;
    for n in 0..3 {
        api.op(&id, "upsert", &record("x", n)).await.ok();
        tokio::time::sleep(CHECKPOINT).await;
        for side in [Side::A, Side::B] {
            cluster.down(side).await;
            assert_eq!(document(&cluster, &id, "x").await, format!("w{n}"));
            cluster.up(side).await;
        }
        cluster.diptych.kill9();
        cluster.diptych.restart().await;
        cluster.diptych.wait_drained().await;
    }
    no_verdicts(&cluster);
    cluster.assert_equal().await;
}
