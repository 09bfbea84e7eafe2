//! Reads of names: what they wait for, what they cost, and whose ids they show.

use diptych::catalog::Collection;
use diptych::chroma::classify;
use diptych::mirror::{Answer, NamespaceWrite};
use diptych::proxy::look_up;
use http::Method;
use serde_json::{Value, json};
use std::time::Duration;
use uuid::Uuid;

use crate::fakes::{A, ALWAYS, B, DATABASE, Fault, Gate, Stage, TENANT, seconds, text};

const PLACE: &str = "/api/v2/tenants/default_tenant/databases/default_database/collections";

async fn get(stage: &Stage, path: &str) -> Answer {
    look_up(&stage.core, classify(&Method::GET, path), path).await
}

/// How long the longest wait for one thing takes, and a little more.
const ONE_WAIT: Duration = Duration::from_secs(35);

/// B is up and has not got what it missed, A is gone: nobody can show names for now.
#[tokio::test(start_paused = true)]
async fn a_name_that_nobody_can_show_is_waited_for_once() {
    let stage = Stage::new(200).await;
    stage.down(B);
    stage.create("c").await;
    stage.pause_drain(true);
    stage.up(B).await;
    stage.down(A);
    let before = stage.core.env.now();
    let answer = get(&stage, &format!("{PLACE}/c")).await;
    assert_eq!(answer.status, 503, "{}", text(&answer));
    let took = stage.core.env.now() - before;
    assert!(took < ONE_WAIT, "waited for {took:?}");
}

/// The only node that is up takes connections and does not answer; health keeps the last one.
#[tokio::test(start_paused = true)]
async fn a_node_that_does_not_answer_is_asked_for_a_name_once() {
    let stage = Stage::new(201).await;
    stage.create("c").await;
    stage.down(B);
    stage.a().fault("GET ", ALWAYS, Fault::Held(Gate::new()));
    let before = stage.core.env.now();
    let answer = get(&stage, &format!("{PLACE}/c")).await;
    assert_eq!(answer.status, 503, "{}", text(&answer));
    let took = stage.core.env.now() - before;
    assert!(took < ONE_WAIT, "waited for {took:?}");
}

/// Creates `c` while a GET of that name is under way that began before there was one: B's answer to it comes late.
async fn created_meanwhile(seed: u64) -> (Stage, Answer) {
    let stage = Stage::new(seed).await;
    let gate = Gate::new();
    stage.b().fault("/collections/c ", 1, Fault::Held(gate.clone()));
    let (its_stage, path) = (stage.clone(), format!("{PLACE}/c"));
    let looking = tokio::spawn(async move { get(&its_stage, &path).await });
    seconds(1).await;
    stage.create("c").await;
    gate.open_to(Fault::Answer(
        404,
        r#"{"error":"NotFoundError","message":"Collection [c] does not exist"}"#,
    ));
    let answer = looking.await.expect("an answer");
    (stage, answer)
}

#[tokio::test(start_paused = true)]
async fn a_collection_that_is_created_while_it_is_looked_for_has_the_id_that_clients_see() {
    for seed in 202..218 {
        let (stage, answer) = created_meanwhile(seed).await;
        let body: Value = serde_json::from_slice(&answer.body).expect("JSON");
        if answer.status == 200 {
            assert_eq!(body["id"], json!(stage.find("c").client_id), "seed {seed}");
        } else {
            assert_eq!(answer.status, 404, "{}", text(&answer));
        }
    }
}

async fn make_databases(stage: &Stage, count: usize) {
    for n in 0..count {
        let name = format!("other-{n}");
        let write = NamespaceWrite::CreateDatabase {
            tenant: TENANT.to_owned(),
            name: name.clone(),
        };
        assert_eq!(stage.namespace(write, json!({ "name": name })).await.status, 200);
    }
}

/// A stale id in a client's configuration, or a stranger's: each request with it is looked up anew.
#[tokio::test(start_paused = true)]
async fn an_unknown_id_costs_each_node_one_look() {
    let stage = Stage::new(220).await;
    make_databases(&stage, 20).await;
    stage.nodes.iter().for_each(|node| node.forget_requests());
    let found = stage.core.find_by_id(TENANT, DATABASE, Uuid::from_u128(7)).await;
    assert!(matches!(found, Ok(None)));
    let looks: Vec<usize> = stage.nodes.iter().map(|node| node.requests()).collect();
    assert_eq!(looks, [1, 1]);
}

/// One that a node has, in a database that is not the one of the path, and one whose index nobody can read.
#[tokio::test(start_paused = true)]
async fn an_id_that_a_node_has_is_found_wherever_it_is() {
    let stage = Stage::new(221).await;
    make_databases(&stage, 3).await;
    let path = format!("/api/v2/tenants/{TENANT}/databases/other-1/collections");
    let id = stage.b().with(|chroma| {
        let (_, body) = chroma.handle(&Method::POST, &path, br#"{"name":"found"}"#, false);
        let body: Value = serde_json::from_str(&body).expect("JSON");
        body["id"]
            .as_str()
            .and_then(|id| id.parse::<Uuid>().ok())
            .expect("an id")
    });
    stage.b().fault(
        "/count",
        ALWAYS,
        Fault::Answer(500, r#"{"error":"InternalError","message":"broken"}"#),
    );
    let found = stage.core.find_by_id(TENANT, "other-1", id).await;
    let name = |found: &Collection| found.facts().name.clone();
    assert_eq!(found.ok().flatten().map(|found| name(&found)), Some("found".to_owned()));
}

/// One that is up and cannot be asked for long: what can be looked at was looked at.
#[tokio::test(start_paused = true)]
async fn nodes_are_not_surveyed_again_and_again_for_one_that_is_out_of_step() {
    let stage = Stage::new(222).await;
    make_databases(&stage, 5).await;
    stage.pause_drain(true);
    stage.down(B);
    stage.create("c").await;
    stage.up(B).await;
    tokio::spawn(diptych::mirror::keep_surveyed(stage.core.clone()));
    seconds(10).await;
    stage.a().forget_requests();
    seconds(60).await;
    assert_eq!(stage.a().saw("/collections?limit=1000&offset=0"), 0);
    assert!(!stage.core.cluster.node(B).is_surveyed());
    stage.pause_drain(false);
    stage.drained().await;
    stage
        .eventually("surveyed", || stage.core.cluster.node(B).is_surveyed())
        .await;
}
