//! Collections that turn up on a node under the name of a known one: what they hold was never compared.

use diptych::chroma::RecordWrite;
use diptych::journal::RepairKind;
use diptych::mirror::{NamespaceWrite, RepairWanted, Scope, keep_checkpoints};
use diptych::repair::jobs;
use http::Method;
use serde_json::json;

use crate::fakes::{A, B, DATABASE, Fault, Gate, Stage, TENANT, seconds, value};

/// Makes a collection on one node behind the proxy's back.
fn plant(stage: &Stage, node: usize, name: &str) {
    let path = format!("/api/v2/tenants/{TENANT}/databases/{DATABASE}/collections");
    let body = format!(r#"{{"name":"{name}"}}"#);
    stage.nodes[node].with(|chroma| chroma.handle(&Method::POST, &path, body.as_bytes(), false));
}

/// The log was lost while B held acked writes that A had missed, and B does not answer when the collection is found.
#[tokio::test(start_paused = true)]
async fn s08_a_node_that_was_not_asked_and_holds_data_is_compared_and_not_copied_over() {
    let stage = Stage::new(80).await;
    for node in [A, B] {
        plant(&stage, node, "c");
    }
    stage
        .a()
        .with(|chroma| chroma.tamper("c", RecordWrite::Add, value("old", 1)));
    stage
        .b()
        .with(|chroma| chroma.tamper("c", RecordWrite::Add, value("acked", 2)));
    stage.down(B);
    let c = stage.core.find_by_name(TENANT, DATABASE, "c").await.ok().flatten();
    let c = c.expect("A has it");
    assert_eq!(stage.journal.repairs()[0].kind, RepairKind::Whole);
    stage.heal();
    stage.up(B).await;
    stage
        .eventually("compared", || {
            stage.journal.repairs().iter().any(|row| row.parked.is_some())
        })
        .await;
    let rows = stage.journal.repairs();
    let kinds: Vec<_> = rows.iter().map(|row| (row.node.as_str(), row.kind)).collect();
    assert_eq!(kinds, [("b", RepairKind::Verify)]);
    assert_eq!(stage.documents(B, "c"), [("acked".to_owned(), "w2".to_owned())]);
    assert_eq!(stage.documents(A, "c"), [("old".to_owned(), "w1".to_owned())]);
    assert_eq!(stage.usable(&c), [A]);
}

#[tokio::test(start_paused = true)]
async fn s08_an_empty_collection_of_that_name_is_filled() {
    let stage = Stage::new(81).await;
    for node in [A, B] {
        plant(&stage, node, "c");
    }
    stage
        .a()
        .with(|chroma| chroma.tamper("c", RecordWrite::Add, value("x", 1)));
    stage.down(B);
    assert!(stage.core.find_by_name(TENANT, DATABASE, "c").await.is_ok());
    stage.heal();
    stage.up(B).await;
    stage.eventually("filled", || stage.journal.repairs().is_empty()).await;
    assert_eq!(stage.documents(B, "c"), [("x".to_owned(), "w1".to_owned())]);
    stage.assert_converged();
}

/// What B missed creates a collection that somebody made there, with data.
#[tokio::test(start_paused = true)]
async fn s08_a_drained_create_that_finds_data_is_compared() {
    let stage = Stage::new(82).await;
    stage.down(B);
    let c = stage.create("c").await;
    plant(&stage, B, "c");
    stage
        .b()
        .with(|chroma| chroma.tamper("c", RecordWrite::Add, value("acked", 2)));
    stage.heal();
    stage.up(B).await;
    stage
        .eventually("compared", || {
            stage.journal.repairs().iter().any(|row| row.parked.is_some())
        })
        .await;
    assert_eq!(stage.documents(B, "c"), [("acked".to_owned(), "w2".to_owned())]);
    assert_eq!(stage.usable(&c), [A]);
}

fn database(name: &str) -> String {
    format!("/api/v2/tenants/{TENANT}/databases/{name}")
}

fn has(stage: &Stage, node: usize, path: &str) -> bool {
    stage.nodes[node].with(|chroma| chroma.handle(&Method::GET, path, b"", false).0 == 200)
}

async fn make_database(stage: &Stage, tenant: &str, name: &str) {
    let write = NamespaceWrite::CreateDatabase {
        tenant: tenant.to_owned(),
        name: name.to_owned(),
    };
    assert_eq!(stage.namespace(write, json!({ "name": name })).await.status, 200);
}

async fn want_names(stage: &Stage, wanted: RepairWanted) {
    assert!(jobs::want(&stage.core, &Scope::Namespace, B, wanted).await);
}

async fn healed(stage: &Stage) {
    stage.heal();
    stage.eventually("healed", || stage.journal.repairs().is_empty()).await;
}

/// B was never asked for the collection that was born and died while it was away: this one is somebody else's.
#[tokio::test(start_paused = true)]
async fn what_a_node_was_never_asked_to_create_is_not_deleted_for_its_name() {
    let stage = Stage::new(83).await;
    stage.down(B);
    stage.create("c").await;
    assert_eq!(stage.delete("c").await.status, 200);
    plant(&stage, B, "c");
    stage
        .b()
        .with(|chroma| chroma.tamper("c", RecordWrite::Add, value("theirs", 1)));
    want_names(&stage, RepairWanted::whole(1, "a test")).await;
    stage.up(B).await;
    healed(&stage).await;
    for node in [A, B] {
        assert_eq!(stage.documents(node, "c"), [("theirs".to_owned(), "w1".to_owned())]);
    }
}

#[tokio::test(start_paused = true)]
async fn s05_an_acked_empty_database_is_made_again_where_it_was_lost() {
    let records = RepairWanted {
        source: Some(A),
        reversible: true,
        ..RepairWanted::records(Some(vec![]), 1, "turned around")
    };
    for (seed, wanted) in [(84, records), (85, RepairWanted::whole(1, "a test"))] {
        let stage = Stage::new(seed).await;
        make_database(&stage, TENANT, "empty").await;
        let path = database("empty");
        stage
            .a()
            .with(|chroma| chroma.handle(&Method::DELETE, &path, b"", false));
        want_names(&stage, wanted).await;
        healed(&stage).await;
        assert!(has(&stage, A, &path) && has(&stage, B, &path), "{seed}");
    }
}

/// Nobody was told of it: a node that was only away keeps it, a copy removes it.
#[tokio::test(start_paused = true)]
async fn only_a_copy_removes_an_empty_database() {
    let stage = Stage::new(86).await;
    let path = format!("/api/v2/tenants/{TENANT}/databases");
    let body = br#"{"name":"stray"}"#;
    stage
        .b()
        .with(|chroma| chroma.handle(&Method::POST, &path, body, false));
    want_names(&stage, RepairWanted::whole(1, "a test")).await;
    healed(&stage).await;
    assert!(!has(&stage, B, &database("stray")));
}

#[tokio::test(start_paused = true)]
async fn a_wiped_node_gets_empty_databases_of_unlisted_tenants_back() {
    let stage = Stage::new(87).await;
    let tenant = NamespaceWrite::CreateTenant { name: "t".to_owned() };
    assert_eq!(stage.namespace(tenant, json!({"name": "t"})).await.status, 200);
    make_database(&stage, "t", "empty").await;
    assert_eq!(
        stage.core.catalog.database_id("t", "empty"),
        None,
        "nobody has seen its id"
    );
    stage.down(B);
    stage.b().wipe();
    stage.up(B).await;
    healed(&stage).await;
    assert!(has(&stage, B, "/api/v2/tenants/t/databases/empty"));
}

#[tokio::test(start_paused = true)]
async fn a_node_that_another_repairs_is_not_accepted() {
    let stage = Stage::new(88).await;
    let c = stage.create("c").await;
    let scope = Scope::Collection(c.clone());
    assert!(jobs::want(&stage.core, &scope, B, RepairWanted::whole(1, "a test")).await);
    let reason = stage.core.accept(B).await.expect_err("half a copy");
    assert!(reason.contains("collection c"), "{reason}");
    assert_eq!(stage.journal.repairs().len(), 1);
    assert_eq!(stage.usable(&c), [A]);
    // With nobody to copy from, what it has is all there is.
    stage.down(A);
    stage.core.accept(B).await.expect("accepted");
    assert_eq!(stage.usable(&c), [B]);
}

#[tokio::test(start_paused = true)]
async fn nodes_that_wait_for_a_decision_go_on_with_their_checkpoints() {
    let stage = Stage::new(89).await;
    let c = stage.create("c").await;
    stage
        .b()
        .with(|chroma| chroma.tamper("c", RecordWrite::Add, value("theirs", 1)));
    let wanted = RepairWanted {
        kind: RepairKind::Verify,
        source: Some(A),
        ..RepairWanted::whole(1, "a test")
    };
    assert!(jobs::want(&stage.core, &Scope::Collection(c.clone()), B, wanted).await);
    stage.heal();
    stage
        .eventually("compared", || {
            stage.journal.repairs().iter().any(|row| row.parked.is_some())
        })
        .await;
    let other = stage.create("other").await;
    assert_eq!(stage.upsert(&other, "x", 1).await.status, 200);
    tokio::spawn(keep_checkpoints(stage.core.clone(), B));
    let checkpoint = || stage.journal.node("b").expect("remembered").checkpoint;
    stage
        .eventually("a checkpoint", || checkpoint() >= other.generation)
        .await;
}

/// A connection that is closed would stop it half-way.
#[tokio::test(start_paused = true)]
async fn a_change_of_names_that_is_not_answered_is_waited_for() {
    let stage = Stage::new(90).await;
    make_database(&stage, TENANT, "empty").await;
    stage
        .b()
        .with(|chroma| chroma.handle(&Method::DELETE, &database("empty"), b"", false));
    let gate = Gate::new();
    stage.b().fault("{\"name\":\"empty\"}", 1, Fault::Held(gate.clone()));
    want_names(&stage, RepairWanted::whole(1, "a test")).await;
    stage.heal();
    let stragglers = || stage.core.namespace.pairs[B].stragglers();
    stage.eventually("given up", || stragglers() == 1).await;
    seconds(60).await;
    assert_eq!(stragglers(), 1, "nothing else is sent meanwhile");
    gate.open();
    stage.eventually("healed", || stage.journal.repairs().is_empty()).await;
    assert!(has(&stage, B, &database("empty")));
    assert_eq!(stragglers(), 0);
}

/// S5: no node can list its tenants, and one without a database stands in no other list.
#[tokio::test(start_paused = true)]
async fn s05_a_tenant_without_a_database_is_given_back_to_a_wiped_node() {
    for node in [A, B] {
        let stage = Stage::new(88).await;
        let tenant = NamespaceWrite::CreateTenant {
            name: "lonely".to_owned(),
        };
        assert_eq!(stage.namespace(tenant, json!({"name": "lonely"})).await.status, 200);
        // The proxy that knows of it starts anew.
        let stage = Stage::over(89, stage.nodes.clone(), stage.journal.clone(), |_| {}).await;
        stage.nodes[node].wipe();
        stage.nodes[node].restart();
        for node in [A, B] {
            stage.up(node).await;
        }
        healed(&stage).await;
        for node in [A, B] {
            assert!(has(&stage, node, "/api/v2/tenants/lonely"), "{node}");
        }
    }
}
