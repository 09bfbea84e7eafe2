//! The event log: what happened is there, who asked for what is there, and nobody ever waits for it.

use std::time::Duration;

use diptych::admin::keep_watch;
use diptych::events::{Kind, keep_events};
use diptych::journal::{Change, Journal};
use serde_json::{Value, json};

use crate::fakes::{B, CommitFault, Port, Stage, seconds};

fn watch(stage: &Stage) {
    tokio::spawn(keep_events(stage.core.events().clone()));
    tokio::spawn(keep_watch(stage.core.clone()));
}

/// Kind and node of what the journal has, oldest first.
async fn written(stage: &Stage) -> Vec<(String, Option<String>)> {
    let mut events = stage.journal.events(i64::MAX, 10_000).await.expect("the journal");
    events.reverse();
    events.into_iter().map(|event| (event.kind, event.node)).collect()
}

#[tokio::test(start_paused = true)]
async fn an_outage_is_told_from_its_beginning_to_its_end() {
    let stage = Stage::new(100).await;
    watch(&stage);
    let c = stage.create("c").await;
    seconds(10).await;
    stage.down(B);
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    seconds(10).await;
    stage.up(B).await;
    stage.drained().await;
    seconds(10).await;
    let told = written(&stage).await;
    let of_b: Vec<&str> = told
        .iter()
        .filter(|(_, node)| node.as_deref() == Some("b"))
        .map(|(kind, _)| kind.as_str())
        .collect();
    assert_eq!(
        of_b,
        ["node_up", "node_down", "out_of_sync", "node_up", "drained", "in_sync"]
    );
    assert_eq!(told[0].0, "leader");
    // A proxy that starts anew still shows them.
    let after = Stage::over(101, stage.nodes.clone(), stage.journal.clone(), |_| {}).await;
    let status = Port::of(&after).get("/status").await;
    let kinds: Vec<&Value> = status["events"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|event| &event["kind"])
        .collect();
    assert_eq!(kinds[..3], [&json!("leader"), &json!("in_sync"), &json!("drained")]);
}

#[tokio::test(start_paused = true)]
async fn a_copy_is_told_when_it_is_done() {
    let stage = Stage::new(102).await;
    watch(&stage);
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.down(B);
    stage.b().wipe();
    seconds(10).await;
    stage.up(B).await;
    seconds(10).await;
    stage.heal();
    stage.healed().await;
    seconds(10).await;
    let events = stage.journal.events(i64::MAX, 100).await.expect("the journal");
    let copies: Vec<&str> = events
        .iter()
        .filter(|event| event.kind == "resynced")
        .map(|event| event.what.as_str())
        .collect();
    assert!(copies.contains(&"the collection c was copied to it"), "{events:#?}");
}

#[tokio::test(start_paused = true)]
async fn what_an_operator_did_is_there_with_his_name() {
    let stage = Stage::new(103).await;
    watch(&stage);
    let port = Port::of(&stage);
    assert_eq!(port.post("/admin/drain/pause").await.0, 200);
    assert_eq!(port.post("/admin/nodes/c/accept").await.0, 404);
    assert_eq!(port.post("/admin/nodes/b/maint").await.0, 200);
    port.get("/admin/repairs").await;
    seconds(5).await;
    let found = port.get("/admin/events?limit=3").await;
    let told: Vec<(&str, &str, &str)> = found["events"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|event| {
            let text = |name: &str| event[name].as_str().unwrap_or("-");
            (text("kind"), text("who"), text("what"))
        })
        .collect();
    let alice = "alice (127.0.0.1)";
    assert_eq!(told[0], ("maintenance", alice, "it was taken out of service"));
    assert_eq!((told[1].0, told[1].1), ("verb", alice));
    assert!(
        told[1].2.starts_with("node accept c: refused: There is no node c"),
        "{}",
        told[1].2
    );
    assert_eq!(told[2], ("verb", alice, "drain pause: done"));
    // A part of them.
    let last = port.get("/admin/events?kind=verb&limit=1").await;
    let id = last["events"][0]["id"].as_str().expect("an id").to_owned();
    let before = port.get(&format!("/admin/events?kind=verb&before={id}")).await;
    assert_eq!(before["events"][0]["what"], json!("drain pause: done"));
    assert_eq!(
        port.get("/admin/events?node=b&limit=1").await["events"][0]["kind"],
        json!("maintenance")
    );
    for wrong in ["kind=nothing", "before=x", "limit=x"] {
        assert_eq!(
            port.ask(http::Method::GET, &format!("/admin/events?{wrong}")).await.0,
            400,
            "{wrong}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn events_never_hold_up_a_write_and_what_is_lost_is_counted() {
    let stage = Stage::new(104).await;
    watch(&stage);
    let c = stage.create("c").await;
    seconds(5).await;
    // The journal takes everything but events.
    let is_event = |commit: &Vec<Change>| commit.iter().any(|change| matches!(change, Change::InsertEvents(_)));
    stage
        .journal
        .fault(is_event, std::iter::repeat_n(CommitFault::Refused, 30));
    for n in 0..2000 {
        stage.core.events().record(Kind::Verb, None, None, n.to_string());
    }
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    assert!(
        stage.core.log.is_available(),
        "it is only the events that it does not take"
    );
    let dropped = stage.core.events().dropped();
    assert!((900..=1000).contains(&dropped), "{dropped} of 2000 did not fit");
    let status = Port::of(&stage).get("/status").await;
    assert_eq!(status["events_dropped"], json!(dropped));
    assert_eq!(status["events"].as_array().map(Vec::len), Some(20));
    // Those that fit are written when it does.
    tokio::time::sleep(Duration::from_secs(120)).await;
    let events = stage.journal.events(i64::MAX, 10_000).await.expect("the journal");
    let verbs = events.iter().filter(|event| event.kind == "verb").count() as u64;
    assert_eq!(verbs, 2000 - dropped);
}
