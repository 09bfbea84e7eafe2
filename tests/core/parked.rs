//! What was given up on until someone decides: parked entries, and what an operator can do about them.

use diptych::journal::{Change, Commit, RepairKind};
use http::Method;
use serde_json::json;

use crate::fakes::{A, ALWAYS, B, CommitFault, Fault, Port, Stage, rows, seconds};

const BROKEN: Fault = Fault::Answer(
    500,
    r#"{"error":"InternalError","message":"Error in compaction: it went wrong"}"#,
);

/// B missed an entry of `c`, A lost `c` since: B is the only one that can have everything, and fails on that entry.
async fn parked(times: usize) -> (Stage, Port, String) {
    let stage = Stage::new(71).await;
    let (c, d) = (stage.create("c").await, stage.create("d").await);
    stage.down(B);
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    assert_eq!(stage.upsert(&d, "y", 2).await.status, 200);
    stage.a().with(|chroma| chroma.lose("c"));
    stage.core.report_missing(&c, A);
    stage.eventually("A is out for c", || c.pairs[A].repairs() > 0).await;
    stage.b().forget_requests();
    stage.b().fault("\"w1\"", times, BROKEN);
    stage.up(B).await;
    stage.eventually("parked", || c.pairs[B].parked() == 1).await;
    let port = Port::of(&stage);
    let listed = port.get("/admin/wal/parked").await;
    assert_eq!(listed["total"], json!(1));
    let id = listed["entries"][0]["id"].as_str().expect("an id").to_owned();
    (stage, port, id)
}

#[tokio::test(start_paused = true)]
async fn a_parked_entry_blocks_only_its_collection_on_its_node() {
    let (stage, port, id) = parked(ALWAYS).await;
    let (c, d) = (stage.find("c"), stage.find("d"));
    let sent = || stage.b().trace().iter().filter(|&what| what == "w1").count();
    assert_eq!(sent(), 25, "every retry has an end");
    seconds(600).await;
    assert_eq!(sent(), 25, "it is left alone then");
    assert_eq!(stage.usable(&c), Vec::<usize>::new());
    assert_eq!(
        stage.usable(&d),
        [A, B],
        "other collections of that node are not concerned"
    );
    assert_eq!(stage.upsert(&d, "y", 3).await.status, 200);
    assert_eq!(stage.upsert(&c, "x", 4).await.status, 503);
    let (status, shown) = port.ask(Method::GET, &format!("/admin/wal/entries/{id}")).await;
    assert_eq!(status, 200);
    assert_eq!(shown["body"]["documents"], json!(["w1"]));
    assert_eq!(
        (&shown["node"], &shown["records"], &shown["parked"]),
        (&json!("b"), &json!(1), &json!(true))
    );
    assert!(
        shown["error"]
            .as_str()
            .expect("a reason")
            .contains("Error in compaction"),
        "{shown}"
    );
    let status = port.get("/status").await;
    assert_eq!(status["instances"][1]["parked"], json!(1));
    assert_eq!(port.get("/admin/wal_errors").await["error_count"], json!(1));
}

#[tokio::test(start_paused = true)]
async fn a_parked_entry_can_be_tried_again() {
    let (stage, port, id) = parked(25).await;
    let c = stage.find("c");
    let (status, value) = port.post(&format!("/admin/wal/entries/{id}/retry")).await;
    assert_eq!((status, &value["state"]), (200, &json!("retried")));
    stage.eventually("B is in step", || c.in_sync(B)).await;
    assert_eq!(stage.documents(B, "c"), [("x".to_owned(), "w1".to_owned())]);
    assert_eq!(stage.journal.rows(), rows(&[]));
    let (status, _) = port.post(&format!("/admin/wal/entries/{id}/retry")).await;
    assert_eq!(status, 404, "it is not there any more");
}

#[tokio::test(start_paused = true)]
async fn skipping_the_only_copy_takes_force_and_leaves_repairs() {
    let (stage, port, id) = parked(ALWAYS).await;
    let c = stage.find("c");
    let (status, value) = port.post(&format!("/admin/wal/entries/{id}/skip")).await;
    assert_eq!(status, 409, "{value}");
    assert_eq!(stage.journal.rows(), rows(&[("b", "w1")]), "nothing is done");
    let (status, value) = port.post(&format!("/admin/wal/entries/{id}/skip?force=true")).await;
    assert_eq!((status, &value["state"]), (200, &json!("skipped")));
    assert_eq!(stage.journal.rows(), rows(&[]));
    assert_eq!((c.pairs[B].pending(), c.pairs[B].parked()), (0, 0));
    let of_a: Vec<_> = stage.journal.repairs();
    let records: Vec<_> = of_a.iter().filter(|row| row.kind == RepairKind::Records).collect();
    assert_eq!(records.len(), 1, "{of_a:?}");
    assert_eq!(
        (records[0].node.as_str(), records[0].source.as_deref()),
        ("a", Some("b"))
    );
    assert_eq!(records[0].ids, Some(vec!["x".to_owned()]));
    assert_eq!(stage.usable(&c), [B], "it serves again, without that entry");
}

/// An entry that waits for B, parked though A has everything.
async fn parked_beside_a_whole_node() -> (Stage, Port, String) {
    let stage = Stage::new(72).await;
    let c = stage.create("c").await;
    stage.down(B);
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    assert_eq!(stage.upsert(&c, "z", 2).await.status, 200);
    let id = stage.journal.payloads_of("b")[0].id;
    let park = Change::Park {
        id,
        reason: "the test said so".to_owned(),
    };
    stage.core.log.commit(&vec![park]).await.expect("durable");
    c.pairs[B].add_parked(1);
    stage.up(B).await;
    let port = Port::of(&stage);
    (stage, port, id.to_string())
}

#[tokio::test(start_paused = true)]
async fn a_skipped_entry_leaves_a_repair_of_its_records() {
    let (stage, port, id) = parked_beside_a_whole_node().await;
    let (status, value) = port.post(&format!("/admin/wal/entries/{id}/skip")).await;
    assert_eq!((status, &value["repair_of"]), (200, &json!(["b"])));
    let repairs = stage.journal.repairs();
    assert_eq!(repairs.len(), 1, "{repairs:?}");
    assert_eq!((repairs[0].node.as_str(), repairs[0].kind), ("b", RepairKind::Records));
    assert_eq!(repairs[0].ids, Some(vec!["x".to_owned()]));
    assert_eq!(stage.usable(&stage.find("c")), [A], "it differs until it is repaired");
    stage.drained().await;
    assert_eq!(
        stage.documents(B, "c"),
        [("z".to_owned(), "w2".to_owned())],
        "the rest is drained"
    );
}

#[tokio::test(start_paused = true)]
async fn a_skip_whose_commit_is_uncertain_is_followed_to_its_end() {
    for fault in [
        CommitFault::UncertainWritten,
        CommitFault::UncertainNotWritten,
        CommitFault::Refused,
    ] {
        let (stage, port, id) = parked_beside_a_whole_node().await;
        let c = stage.find("c");
        let is_skip = |commit: &Commit| commit.iter().any(|change| matches!(change, Change::InsertRepair(_)));
        stage.journal.fault(is_skip, vec![fault.clone(); 5]);
        let (status, _) = port.post(&format!("/admin/wal/entries/{id}/skip")).await;
        assert_eq!(status, 503, "{fault:?}");
        assert_ne!(c.pairs[B].uncertain(), 0);
        stage.eventually("it is done", || c.pairs[B].parked() == 0).await;
        assert_eq!(stage.journal.repairs().len(), 1, "{fault:?}");
        stage.drained().await;
        assert_eq!(stage.usable(&c), [A], "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_not_parked_is_left_to_the_drain() {
    let stage = Stage::new(73).await;
    let (c, d) = (stage.create("c").await, stage.create("d").await);
    stage.down(B);
    for n in 1..=3 {
        assert_eq!(stage.upsert(&c, "x", n).await.status, 200);
    }
    assert_eq!(stage.upsert(&d, "y", 4).await.status, 200);
    let port = Port::of(&stage);
    let id = stage.journal.payloads_of("b")[0].id;
    for verb in ["retry", "skip", "skip?force=true"] {
        let (status, value) = port.post(&format!("/admin/wal/entries/{id}/{verb}")).await;
        assert_eq!(status, 409, "{verb}: {value}");
    }
    let listed = port.get("/admin/wal/entries?limit=2&offset=1").await;
    assert_eq!(
        (&listed["total"], listed["entries"].as_array().map(Vec::len)),
        (&json!(4), Some(2))
    );
    let listed = port.get("/admin/wal/entries?node=b&collection=d").await;
    assert_eq!(listed["entries"][0]["collection"]["name"], json!("d"));
    assert!(listed["entries"][0].get("body").is_none());
    assert_eq!(port.ask(Method::GET, "/admin/wal/entries?node=c").await.0, 404);
    assert_eq!(port.ask(Method::GET, "/admin/wal/entries/7").await.0, 400);
    assert_eq!(
        port.ask(Method::GET, &format!("/admin/wal/entries/{}", uuid::Uuid::nil()))
            .await
            .0,
        404
    );

    assert_eq!(port.post("/admin/drain/pause").await.0, 200);
    stage.up(B).await;
    seconds(60).await;
    assert_eq!(stage.journal.rows().len(), 4);
    assert_eq!(port.post("/admin/drain/resume").await.0, 200);
    stage.drained().await;
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn a_parked_repair_is_shown_and_can_be_tried_again() {
    let (stage, port, id) = parked_beside_a_whole_node().await;
    assert_eq!(port.post(&format!("/admin/wal/entries/{id}/skip")).await.0, 200);
    let repair = stage.core.repairs.lock()[0].id;
    let park = vec![Change::ParkRepair {
        id: repair,
        reason: "it failed three times".to_owned(),
    }];
    stage.core.log.commit(&park).await.expect("durable");
    stage.core.repairs.lock()[0].parked = Some("it failed three times".to_owned());
    let listed = port.get("/admin/repairs?parked=true").await;
    assert_eq!(listed["repairs"][0]["parked"], json!("it failed three times"));
    assert_eq!(listed["repairs"][0]["kind"], json!("records"));
    assert_eq!(port.get("/admin/wal_errors").await["error_count"], json!(1));
    let (status, value) = port.post(&format!("/admin/repairs/{repair}/retry")).await;
    assert_eq!((status, &value["state"]), (200, &json!("retried")));
    assert!(stage.journal.repairs().iter().all(|row| row.parked.is_none()));
    assert_eq!(port.get("/admin/repairs?parked=true").await["total"], json!(0));
    assert_eq!(
        port.post(&format!("/admin/repairs/{}/retry", uuid::Uuid::nil()))
            .await
            .0,
        404
    );
}
