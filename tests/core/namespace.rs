//! Collections, databases, and requests that nobody knows.

use diptych::journal::RepairKind;
use diptych::mirror::{COLLECTION_PLACEHOLDER, NamespaceWrite, RepairWanted, Scope};
use diptych::repair::jobs;
use http::Method;
use serde_json::{Value, json};

use crate::fakes::{A, B, DATABASE, DISK_FULL, Fault, Gate, REFUSED, Stage, TENANT, rows, seconds, text};

#[tokio::test(start_paused = true)]
async fn an_unknown_mutating_route_is_mirrored_with_each_nodes_own_id() {
    let stage = Stage::new(1).await;
    let c = stage.create("c").await;
    let call = |n: u64| {
        let write = NamespaceWrite::Other {
            method: Method::POST,
            path: format!("/api/v2/tenants/{TENANT}/databases/{DATABASE}/collections/{COLLECTION_PLACEHOLDER}/frob"),
            collection: Some(c.clone()),
        };
        stage.namespace(write, json!({"n": n}))
    };
    assert_eq!(call(1).await.status, 200);
    stage.down(B);
    assert_eq!(call(2).await.status, 200);
    assert_eq!(stage.contents(A, "c").calls.len(), 2);
    assert_eq!(stage.contents(B, "c").calls.len(), 1);
    let missed = stage.journal.payloads_of("b");
    assert_eq!((missed.len(), missed[0].generation), (1, None));
    stage.b().forget_requests();
    stage.up(B).await;
    stage.drained().await;
    let id = c.node_id(B).expect("an id");
    let sent = stage.b().mutations();
    assert!(sent.len() == 1 && sent[0].contains(&id.to_string()), "{sent:?}");
    stage.assert_converged();

    seconds(2).await;
    let mut answers = vec![];
    for n in 0..12 {
        answers.push(call(n).await.status);
    }
    let expected = [vec![200; 10], vec![429; 2]].concat();
    assert_eq!(answers, expected, "so many per second");
    seconds(1).await;
    assert_eq!(call(99).await.status, 200);
    assert_eq!(stage.contents(A, "c").calls.len(), 13);
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn a_reset_reaches_the_node_that_was_away() {
    let stage = Stage::new(2).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.down(B);
    assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
    let answer = stage.namespace(NamespaceWrite::Reset, Value::Null).await;
    assert_eq!(answer.status, 200, "{}", text(&answer));
    assert_eq!(
        stage.journal.rows(),
        rows(&[("b", "reset")]),
        "what it missed before is moot"
    );
    let again = stage.create("c").await;
    assert_eq!(stage.upsert(&again, "y", 3).await.status, 200);
    assert_eq!(stage.upsert(&c, "x", 4).await.status, 404);
    stage.up(B).await;
    stage.drained().await;
    stage.assert_converged();
    assert_eq!(stage.documents(B, "c"), [("y".to_owned(), "w3".to_owned())]);
}

#[tokio::test(start_paused = true)]
async fn a_database_deleted_while_a_node_is_away_is_deleted_there() {
    let stage = Stage::new(3).await;
    let database = |name: &str| NamespaceWrite::CreateDatabase {
        tenant: TENANT.to_owned(),
        name: name.to_owned(),
    };
    let collection = |name: &str| NamespaceWrite::CreateCollection {
        tenant: TENANT.to_owned(),
        database: "other".to_owned(),
        name: name.to_owned(),
        get_or_create: false,
    };
    assert_eq!(
        stage
            .namespace(database("other"), json!({"name": "other"}))
            .await
            .status,
        200
    );
    assert_eq!(stage.namespace(collection("c"), json!({"name": "c"})).await.status, 200);
    let c = stage.core.catalog.by_name(TENANT, "other", "c").expect("created");
    stage.down(B);
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    let delete = NamespaceWrite::DeleteDatabase {
        tenant: TENANT.to_owned(),
        name: "other".to_owned(),
    };
    assert_eq!(stage.namespace(delete, Value::Null).await.status, 200);
    assert_eq!(stage.journal.rows(), rows(&[("b", "delete_database")]));
    assert_eq!(stage.journal.living(), vec![]);
    stage.up(B).await;
    stage.drained().await;
    stage.assert_converged();
    assert_eq!(stage.b().state().len(), 1, "only the default database is left");
}

#[tokio::test(start_paused = true)]
async fn a_collection_born_and_gone_while_a_node_is_away_leaves_nothing_on_it() {
    let stage = Stage::new(4).await;
    stage.down(B);
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    assert_eq!(stage.delete("c").await.status, 200);
    stage.b().forget_requests();
    stage.up(B).await;
    stage.drained().await;
    assert_eq!(stage.b().mutations(), Vec::<String>::new());
    stage.assert_converged();
    assert!(stage.b().state().values().all(|names| names.is_empty()));
}

/// S1: a name that is deleted and created again; nothing of the first life touches the second.
#[tokio::test(start_paused = true)]
async fn s1_a_name_that_lived_twice_while_a_node_was_away_is_the_second_there() {
    let stage = Stage::new(5).await;
    let first = stage.create("c").await;
    assert_eq!(stage.upsert(&first, "x", 1).await.status, 200);
    stage.down(B);
    assert_eq!(stage.upsert(&first, "x", 2).await.status, 200);
    assert_eq!(stage.delete("c").await.status, 200);
    let second = stage.create("c").await;
    assert_eq!(stage.upsert(&second, "y", 3).await.status, 200);
    stage.up(B).await;
    stage.drained().await;
    stage.assert_converged();
    assert_eq!(stage.documents(B, "c"), [("y".to_owned(), "w3".to_owned())]);
}

/// S12: blue/green by renames; the names on the way are taken twice.
#[tokio::test(start_paused = true)]
async fn s12_a_swap_of_names_while_a_node_was_away_keeps_records_with_their_collection() {
    let stage = Stage::new(6).await;
    let blue = stage.create("live").await;
    assert_eq!(stage.upsert(&blue, "x", 1).await.status, 200);
    stage.down(B);
    assert_eq!(stage.rename(&blue, "old").await.status, 200);
    let green = stage.create("live").await;
    assert_eq!(stage.upsert(&green, "y", 2).await.status, 200);
    assert_eq!(stage.upsert(&blue, "x", 3).await.status, 200);
    stage.up(B).await;
    stage.drained().await;
    stage.assert_converged();
    assert_eq!(stage.documents(B, "live"), [("y".to_owned(), "w2".to_owned())]);
    assert_eq!(stage.documents(B, "old"), [("x".to_owned(), "w3".to_owned())]);
}

#[tokio::test(start_paused = true)]
async fn a_create_that_nobody_answered_ends_as_one_generation_on_both() {
    let faults = [Fault::ClosedAfter, Fault::ClosedBefore];
    for (on_a, on_b) in faults
        .iter()
        .flat_map(|a| faults.iter().map(move |b| (a.clone(), b.clone())))
    {
        let stage = Stage::new(7).await;
        stage.pause_drain(true);
        stage.a().fault(
            "POST /api/v2/tenants/default_tenant/databases/default_database/collections ",
            1,
            on_a.clone(),
        );
        stage.b().fault(
            "POST /api/v2/tenants/default_tenant/databases/default_database/collections ",
            1,
            on_b.clone(),
        );
        stage.b().fault("/heartbeat", 1, Fault::ClosedBefore);
        let answer = stage.try_create(json!({"name": "c"})).await;
        assert_eq!(answer.status, 504, "{on_a:?} {on_b:?} {}", text(&answer));
        assert_eq!(
            stage.journal.rows(),
            rows(&[("a", "create_collection"), ("b", "create_collection")])
        );
        stage.pause_drain(false);
        stage.drained().await;
        let living = stage.journal.living();
        assert_eq!(living.len(), 1, "{living:?}");
        assert_eq!(living[0].node_ids.len(), 2);
        stage.assert_converged();
        let c = stage.find("c");
        assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
        stage.assert_converged();
    }
}

/// The other node answers a create only after the client was.
#[tokio::test(start_paused = true)]
async fn a_create_that_one_node_answers_late_is_mapped_and_its_records_follow() {
    for late in [Fault::None, Fault::ClosedBefore, Fault::ClosedAfter] {
        let stage = Stage::new(8).await;
        let gate = Gate::new();
        stage.b().fault("{\"name\":\"c\"}", 1, Fault::Held(gate.clone()));
        let c = stage.create("c").await;
        assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
        assert_eq!(stage.usable(&c), [A]);
        seconds(60).await;
        gate.open_to(late);
        stage.drained().await;
        stage.assert_converged();
        assert_eq!(stage.documents(B, "c"), [("x".to_owned(), "w1".to_owned())]);
    }
}

/// A read that found its collection before that was deleted is not served by a node that has it still, and old.
#[tokio::test(start_paused = true)]
async fn a_deleted_collection_is_not_read_where_it_is_left() {
    let stage = Stage::new(30).await;
    let c = stage.create("c").await;
    stage.upsert(&c, "x", 1).await;
    stage.down(A);
    stage.upsert(&c, "x", 2).await;
    stage.pause_drain(true);
    stage.up(A).await;
    stage.a().fault("DELETE", 1, DISK_FULL);
    assert_eq!(stage.delete("c").await.status, 200);
    assert_eq!(stage.documents(A, "c"), [("x".to_owned(), "w1".to_owned())]);
    assert_eq!(stage.usable(&c), [B]);
    stage.pause_drain(false);
    stage.drained().await;
    stage.assert_converged();
}

/// What holds the lane may take as long as a write may: clients that wait behind it are told, as those of records are.
#[tokio::test(start_paused = true)]
async fn a_change_of_names_that_waits_too_long_is_told_so_and_never_begun() {
    let stage = Stage::new(230).await;
    let held = stage.core.exclusive_namespace().await;
    let waiting = {
        let stage = stage.clone();
        tokio::spawn(async move { stage.try_create(json!({"name": "c"})).await })
    };
    seconds(125).await;
    assert!(waiting.is_finished(), "it waits for ever");
    let answer = waiting.await.expect("an answer");
    assert_eq!(answer.status, 503, "{}", text(&answer));
    drop(held);
    seconds(5).await;
    assert_eq!(stage.a().with(|chroma| chroma.id_of("c")), None);
    stage.create("c").await;
    stage.assert_converged();
}

/// A rebuild deleted the collection on a node and made it anew, and the answer to that was lost: the node has it under a
/// UUID that nobody knows, and the one that is known there speaks of nothing.
#[tokio::test(start_paused = true)]
async fn a_collection_that_is_deleted_while_it_is_made_anew_stays_deleted() {
    let stage = Stage::new(4).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    let known = c.node_id(B);
    let rebuild = RepairWanted {
        kind: RepairKind::Rebuild,
        ..RepairWanted::whole(1, "a test")
    };
    assert!(jobs::want(&stage.core, &Scope::Collection(c.clone()), B, rebuild).await);
    stage.b().fault(
        "POST /api/v2/tenants/default_tenant/databases/default_database/collections {",
        1,
        Fault::ClosedAfter,
    );
    stage.heal();
    let there = || stage.b().with(|chroma| chroma.id_of("c"));
    stage
        .eventually("it is made anew", || there().is_some_and(|id| Some(id) != known))
        .await;
    stage.pause_drain(true);
    assert_eq!(c.node_id(B), known, "the answer was lost");
    assert_eq!(stage.delete("c").await.status, 200);
    stage.pause_drain(false);
    stage.drained().await;
    assert_eq!(there(), None);
    assert_eq!(
        stage.try_create(json!({"name": "c"})).await.status,
        200,
        "its name is free"
    );
    stage.healed().await;
    stage.assert_converged();
}

const CREATE: &str = "POST /api/v2/tenants/default_tenant/databases/default_database/collections ";
const WEIRD: Fault = Fault::Answer(
    500,
    r#"{"error":"InternalError","message":"something nobody has seen before"}"#,
);

/// A delete of unknown outcome: a node that never had the collection has nothing to do for it and decides nothing. The other
/// one does, whoever of them is drained first.
#[tokio::test(start_paused = true)]
async fn a_delete_is_not_decided_by_a_node_that_never_had_the_collection() {
    let stage = Stage::new(31).await;
    stage.b().fault(CREATE, 1, REFUSED);
    let c = stage.create("c").await;
    assert_eq!((c.node_id(B), stage.usable(&c)), (None, vec![A]));
    stage.pause_drain(true);
    stage.a().fault("DELETE", 1, Fault::ClosedAfter);
    let answer = stage.delete("c").await;
    assert_eq!(answer.status, 504, "{}", text(&answer));
    stage.down(A);
    stage.pause_drain(false);
    stage
        .eventually("B is drained", || stage.journal.payloads_of("b").is_empty())
        .await;
    stage.up(A).await;
    stage.heal();
    stage.healed().await;
    assert_eq!(stage.journal.living(), vec![]);
    stage.assert_converged();
}

/// A create of unknown outcome that the first node to be drained refuses is not done, whatever the other could do later.
#[tokio::test(start_paused = true)]
async fn a_create_that_nobody_answered_and_one_node_refuses_is_not_done_by_the_other() {
    let stage = Stage::new(32).await;
    stage.down(A);
    stage.b().fault(CREATE, 1, WEIRD);
    stage.b().fault(CREATE, 1, REFUSED);
    assert_eq!(stage.try_create(json!({"name": "c"})).await.status, 504);
    stage
        .eventually("B is drained", || stage.journal.payloads_of("b").is_empty())
        .await;
    stage.up(A).await;
    stage.drained().await;
    assert_eq!(stage.journal.living(), vec![]);
    stage.assert_converged();
}

/// A is away. What becomes of the next such request on B is unknown, and B refuses it when it is drained.
fn refused_by_b(stage: &Stage, request: &str) {
    stage.down(A);
    stage.b().fault(request, 1, WEIRD);
    stage.b().fault(request, 1, REFUSED);
}

/// B is drained and A returns, to this proxy or to one that was started since.
async fn drained_and_healed(stage: Stage, killed: bool) -> Stage {
    stage
        .eventually("B is drained", || stage.journal.payloads_of("b").is_empty())
        .await;
    // Long enough for the low-water mark: all of it is settled.
    seconds(5).await;
    let stage = match killed {
        true => Stage::over(36, stage.nodes.clone(), stage.journal.clone(), |_| {}).await,
        false => stage,
    };
    assert_eq!(stage.core.recovering(), 0, "nothing was under way");
    stage.up(A).await;
    stage.up(B).await;
    stage.heal();
    stage.healed().await;
    stage
}

/// A rename of unknown outcome that the first node to be drained refuses is not done, whatever the other does with it and
/// whichever proxy hears of that.
#[tokio::test(start_paused = true)]
async fn a_rename_that_nobody_answered_and_one_node_refuses_is_taken_back_on_the_other() {
    for killed in [false, true] {
        let stage = Stage::new(35).await;
        let c = stage.create("c").await;
        refused_by_b(&stage, "PUT ");
        assert_eq!(stage.rename(&c, "d").await.status, 504);
        let stage = drained_and_healed(stage, killed).await;
        assert_eq!(stage.documents(A, "c"), [], "the proxy was killed: {killed}");
        stage.assert_converged();
    }
}

/// A delete is done if any node does it. One that had refused it before has the collection, and no row: it goes there, too,
/// and is not taken for a new one later.
#[tokio::test(start_paused = true)]
async fn a_delete_that_nobody_answered_and_one_node_refuses_is_done_there_as_well() {
    for killed in [false, true] {
        let stage = Stage::new(37).await;
        stage.create("c").await;
        refused_by_b(&stage, "DELETE");
        assert_eq!(stage.delete("c").await.status, 504);
        let stage = drained_and_healed(stage, killed).await;
        assert_eq!(stage.journal.living(), vec![], "the proxy was killed: {killed}");
        for node in &stage.nodes {
            assert_eq!(
                node.with(|chroma| chroma.id_of("c")),
                None,
                "the proxy was killed: {killed}"
            );
        }
    }
}

/// Nobody has answered a create of "c"; A has done it and is away, B refuses it when it is drained.
async fn create_that_a_did_and_b_refused(stage: &Stage) {
    stage.pause_drain(true);
    stage.a().fault(CREATE, 1, Fault::ClosedAfter);
    stage.b().fault(CREATE, 1, WEIRD);
    stage.b().fault(CREATE, 1, REFUSED);
    assert_eq!(stage.try_create(json!({"name": "c"})).await.status, 504);
    stage.down(A);
    stage.pause_drain(false);
    stage
        .eventually("B is drained", || stage.journal.payloads_of("b").is_empty())
        .await;
}

/// The same, the other node had done it already, and the name was created once more meanwhile: that one is it on both.
#[tokio::test(start_paused = true)]
async fn a_create_that_nobody_answered_is_not_done_beside_a_later_one_of_that_name() {
    let stage = Stage::new(34).await;
    create_that_a_did_and_b_refused(&stage).await;
    assert_eq!(stage.try_create(json!({"name": "c"})).await.status, 200);
    let c = stage.find("c");
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.up(A).await;
    stage.heal();
    stage.healed().await;
    assert_eq!(stage.journal.living().len(), 1);
    assert_eq!(stage.documents(A, "c"), [("x".to_owned(), "w1".to_owned())]);
    stage.assert_converged();
}

/// The same, and the other node had done it already: then the one that refused it gets a copy.
#[tokio::test(start_paused = true)]
async fn a_create_that_one_node_did_and_the_other_refuses_is_copied_to_it() {
    let stage = Stage::new(33).await;
    create_that_a_did_and_b_refused(&stage).await;
    stage.up(A).await;
    stage.heal();
    stage.healed().await;
    assert_eq!(stage.journal.living().len(), 1);
    stage.assert_converged();
}
