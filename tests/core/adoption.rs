//! Collections that turn up on a node under the name of a known one: what they hold was never compared.

use diptych::chroma::RecordWrite;
use diptych::journal::RepairKind;
use http::Method;

use crate::fakes::{A, B, DATABASE, Stage, TENANT, value};

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
