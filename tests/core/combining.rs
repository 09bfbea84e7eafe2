//! Writes that wait for a collection become one upstream batch, and each client gets its own answer (promise P8).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use diptych::catalog::Collection;
use diptych::chroma::RecordWrite;
use diptych::mirror::Answer;
use http::header::RETRY_AFTER;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::fakes::{A, ALWAYS, B, Fault, Gate, REFUSED, Stage, rows, seconds, text, value};

/// A collection whose lane is held by a write of `first` until the gate opens.
struct Held {
    stage: Stage,
    c: Arc<Collection>,
    gate: Gate,
    first: JoinHandle<Answer>,
}

impl Held {
    async fn of(stage: Stage) -> Self {
        let c = stage.create("c").await;
        assert_eq!(stage.upsert(&c, "seed", 1000).await.status, 200);
        Self::by(stage, c).await
    }

    async fn by(stage: Stage, c: Arc<Collection>) -> Self {
        let gate = Gate::new();
        for node in &stage.nodes {
            node.fault("\"w0\"", 1, Fault::Held(gate.clone()));
        }
        let first = stage.start_upsert(&c, "first", 0);
        let is_sent = || stage.b().trace().contains(&"w0".to_owned());
        stage.eventually("the first is sent", is_sent).await;
        stage.nodes.iter().for_each(|node| node.forget_requests());
        Self { stage, c, gate, first }
    }

    /// A client whose write waits now.
    async fn client(&self, kind: RecordWrite, body: Value) -> JoinHandle<Answer> {
        self.client_at(None, kind, body).await
    }

    /// The same at this address.
    async fn client_at(&self, address: Option<IpAddr>, kind: RecordWrite, body: Value) -> JoinHandle<Answer> {
        let waiting = self.c.lane.waiting();
        let (stage, c) = (self.stage.clone(), self.c.clone());
        let client = tokio::spawn(async move { stage.write_of(address, &c, kind, body).await });
        self.stage
            .eventually("it waits", || self.c.lane.waiting() > waiting)
            .await;
        client
    }

    /// Clients of one record each; record `r{n}` gets the document `w{n}`.
    async fn clients(&self, kind: RecordWrite, numbers: impl IntoIterator<Item = u64>) -> Vec<JoinHandle<Answer>> {
        let mut clients = vec![];
        for n in numbers {
            clients.push(self.client(kind, value(&format!("r{n}"), n)).await);
        }
        clients
    }

    /// What the clients are told once the first write is done.
    async fn release(self, clients: Vec<JoinHandle<Answer>>) -> (Stage, Arc<Collection>, Vec<Answer>) {
        self.gate.open();
        assert_eq!(self.first.await.expect("an answer").status, 200);
        let mut answers = vec![];
        for client in clients {
            answers.push(client.await.expect("an answer"));
        }
        (self.stage, self.c, answers)
    }
}

fn statuses(answers: &[Answer]) -> Vec<u16> {
    answers.iter().map(|answer| answer.status).collect()
}

/// Documents of the records `r..` on both nodes, which have to be equal.
fn documents(stage: &Stage) -> Vec<String> {
    let [a, b] = [A, B].map(|node| stage.documents(node, "c"));
    assert_eq!(a, b);
    let ours = a.into_iter().filter(|(id, _)| id.starts_with('r'));
    ours.map(|(_, document)| document).collect()
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_one_write_goes_to_each_node_as_one_request() {
    let held = Held::of(Stage::new(1).await).await;
    let clients = held.clients(RecordWrite::Add, 1..5).await;
    let (stage, _, answers) = held.release(clients).await;
    for node in &stage.nodes {
        assert_eq!(node.trace(), ["w1+w2+w3+w4"]);
    }
    assert!(answers.iter().all(|answer| text(answer) == "201 {}"), "{answers:?}");
    assert_eq!(documents(&stage), ["w1", "w2", "w3", "w4"]);
    stage.assert_converged();
}

/// Clients that mix kinds and forms of embeddings still combine, past each other; a record keeps its order.
#[tokio::test(start_paused = true)]
async fn kinds_and_forms_combine_past_each_other() {
    let held = Held::of(Stage::new(2).await).await;
    let packed = |id: &str, document: &str| json!({"ids": [id], "embeddings": ["AACAPwAAAEA="], "documents": [document], "metadatas": [{"n": 1}]});
    let clients = vec![
        held.client(RecordWrite::Upsert, value("r1", 1)).await,
        held.client(RecordWrite::Delete, json!({"ids": ["r1"]})).await,
        held.client(RecordWrite::Upsert, packed("r2", "w2")).await,
        held.client(RecordWrite::Upsert, value("r3", 3)).await,
        held.client(RecordWrite::Add, value("r1", 4)).await,
        held.client(RecordWrite::Delete, json!({"ids": ["r5"]})).await,
        held.client(RecordWrite::Upsert, packed("r6", "w6")).await,
    ];
    let (stage, _, answers) = held.release(clients).await;
    assert_eq!(statuses(&answers), [200, 200, 200, 200, 201, 200, 200]);
    for node in &stage.nodes {
        assert_eq!(node.trace(), ["w1+w3", "r1+r5", "w2+w6", "w4"]);
    }
    assert_eq!(documents(&stage), ["w3", "w2", "w6", "w4"]);
    stage.assert_converged();
}

/// What the answers say is about each client's own write, also where Chroma counts or skips.
#[tokio::test(start_paused = true)]
async fn each_client_gets_the_answer_of_its_own_write() {
    let held = Held::of(Stage::new(3).await).await;
    let mut clients = vec![];
    for ids in [json!(["r1", "r2"]), json!(["absent"]), json!(["r3", "r3", "r3"])] {
        clients.push(held.client(RecordWrite::Delete, json!({"ids": ids})).await);
    }
    for id in ["seed", "r7"] {
        clients.push(held.client(RecordWrite::Add, value(id, 7)).await);
    }
    let (stage, _, answers) = held.release(clients).await;
    let answers: Vec<String> = answers.iter().map(text).collect();
    let expected = [
        r#"200 {"deleted":2}"#,
        r#"200 {"deleted":1}"#,
        r#"200 {"deleted":3}"#,
        "201 {}",
        "201 {}",
    ];
    assert_eq!(answers, expected);
    assert_eq!(stage.a().trace(), ["r1+r2+absent", "r3+r3+r3", "w7+w7"]);
    let seed = ("seed".to_owned(), "w1000".to_owned());
    assert!(stage.documents(A, "c").contains(&seed), "an add keeps what is there");
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn a_refused_batch_is_taken_apart_and_only_the_one_at_fault_is_refused() {
    let held = Held::of(Stage::new(4).await).await;
    for node in &held.stage.nodes {
        node.fault("\"w6\"", ALWAYS, REFUSED);
    }
    let clients = held.clients(RecordWrite::Upsert, 1..9).await;
    let (stage, _, answers) = held.release(clients).await;
    assert_eq!(statuses(&answers), [200, 200, 200, 200, 200, 400, 200, 200]);
    assert!(text(&answers[5]).contains("refused"), "{}", text(&answers[5]));
    assert_eq!(documents(&stage), ["w1", "w2", "w3", "w4", "w5", "w7", "w8"]);
    stage.assert_converged();
}

/// The lead's word counts; what the other node did with the batch is repaired, what it did alone is drained.
#[tokio::test(start_paused = true)]
async fn a_batch_that_one_node_alone_refuses_ends_equal() {
    for refusing in [A, B] {
        let held = Held::of(Stage::new(5).await).await;
        held.stage.heal();
        held.stage.nodes[refusing].fault("\"w2\"", ALWAYS, REFUSED);
        let clients = held.clients(RecordWrite::Upsert, 1..5).await;
        let (stage, _, answers) = held.release(clients).await;
        let second = if refusing == A { 400 } else { 200 };
        assert_eq!(statuses(&answers), [200, second, 200, 200]);
        stage.nodes[refusing].heal();
        stage.healed().await;
        let expected: Vec<_> = ["w1", "w2", "w3", "w4"]
            .into_iter()
            .filter(|document| *document != "w2" || refusing == B)
            .collect();
        assert_eq!(documents(&stage), expected);
        stage.assert_converged();
    }
}

#[tokio::test(start_paused = true)]
async fn writes_of_another_dimension_are_refused_without_company() {
    let held = Held::of(Stage::new(6).await).await;
    let mut clients = held.clients(RecordWrite::Upsert, 1..3).await;
    let long = json!({"ids": ["r3"], "embeddings": [[1, 2, 3]], "documents": ["w3"], "metadatas": [null]});
    clients.push(held.client(RecordWrite::Upsert, long).await);
    clients.extend(held.clients(RecordWrite::Upsert, 4..5).await);
    let (stage, _, answers) = held.release(clients).await;
    assert_eq!(statuses(&answers), [200, 200, 400, 200]);
    assert_eq!(stage.a().trace(), ["w1+w2+w4", "w3"]);
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn nothing_is_combined_while_the_dimension_is_not_known() {
    let stage = Stage::new(7).await;
    let c = stage.create("c").await;
    let held = Held::by(stage, c).await;
    let clients = held.clients(RecordWrite::Add, 1..4).await;
    held.gate.open_to(REFUSED);
    assert_eq!(held.first.await.expect("an answer").status, 400);
    for client in clients {
        assert_eq!(client.await.expect("an answer").status, 201);
    }
    for node in &held.stage.nodes {
        assert_eq!(node.trace(), ["w1", "w2+w3"], "the first that is applied sets it");
    }
    held.stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn a_node_that_misses_a_batch_gets_one_row_and_drains_equal() {
    let held = Held::of(Stage::new(8).await).await;
    held.stage.b().fault("\"w2\"", 1, Fault::ClosedBefore);
    held.stage.pause_drain(true);
    let clients = held.clients(RecordWrite::Upsert, 1..4).await;
    let (stage, c, answers) = held.release(clients).await;
    assert_eq!(statuses(&answers), [200; 3]);
    assert_eq!(stage.journal.rows(), rows(&[("b", "w1")]));
    assert!(stage.journal.payloads_of("b")[0].in_doubt);
    stage.down(B);
    assert_eq!(stage.upsert(&c, "r9", 9).await.status, 200);
    assert_eq!(stage.journal.rows(), rows(&[("b", "w1"), ("b", "w9")]));
    stage.b().forget_requests();
    stage.up(B).await;
    stage.pause_drain(false);
    stage.drained().await;
    assert_eq!(documents(&stage), ["w1", "w2", "w3", "w9"]);
    stage.assert_converged();
}

/// Something of it may be there: it is not sent again, neither whole nor in parts, and all its clients are told so.
#[tokio::test(start_paused = true)]
async fn a_batch_of_unknown_outcome_is_not_taken_apart() {
    let stage = Stage::with(9, |settings| settings.write_timeout = Duration::from_secs(5)).await;
    let held = Held::of(stage).await;
    let silent = Gate::new();
    for node in &held.stage.nodes {
        node.fault("\"w2\"", 1, Fault::AnswerHeld(silent.clone()));
    }
    let clients = held.clients(RecordWrite::Upsert, 1..4).await;
    let (stage, _, answers) = held.release(clients).await;
    assert_eq!(statuses(&answers), [504; 3]);
    assert_eq!(stage.a().trace(), ["w1+w2+w3"]);
    assert_eq!(stage.journal.rows(), rows(&[("a", "w1"), ("b", "w1")]));
    silent.open();
    stage.drained().await;
    assert_eq!(documents(&stage), ["w1", "w2", "w3"]);
    stage.assert_converged();
}

/// Nothing was applied for certain, and it was nobody's fault: all are told so.
#[tokio::test(start_paused = true)]
async fn a_batch_that_no_node_can_take_is_503_for_all() {
    let held = Held::of(Stage::new(10).await).await;
    let clients = held.clients(RecordWrite::Upsert, 1..4).await;
    for node in &held.stage.nodes {
        node.fault("\"w2\"", 1, crate::fakes::DISK_FULL);
    }
    let (stage, _, answers) = held.release(clients).await;
    assert_eq!(statuses(&answers), [503; 3]);
    assert!(answers.iter().all(|answer| answer.headers.contains_key(RETRY_AFTER)));
    assert_eq!(documents(&stage), Vec::<String>::new());
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn nothing_passes_whoever_waits_for_the_lane() {
    let held = Held::of(Stage::new(11).await).await;
    let mut clients = held.clients(RecordWrite::Upsert, 1..3).await;
    let (core, c) = (held.stage.core.clone(), held.c.clone());
    let turn = tokio::spawn(async move { core.exclusive(&c).await });
    held.stage.eventually("three wait", || held.c.lane.waiting() == 3).await;
    clients.extend(held.clients(RecordWrite::Upsert, 3..5).await);
    held.gate.open();
    let alone = turn.await.expect("it runs").expect("the lane");
    seconds(60).await;
    assert_eq!(held.stage.a().trace(), ["w1+w2"]);
    drop(alone);
    let (stage, _, answers) = held.release(clients).await;
    assert_eq!(statuses(&answers), [200; 4]);
    assert_eq!(stage.a().trace(), ["w1+w2", "w3+w4"]);
    stage.assert_converged();
}

/// A delete by filter hits what is there at its turn.
#[tokio::test(start_paused = true)]
async fn nothing_passes_a_delete_by_filter() {
    let held = Held::of(Stage::new(12).await).await;
    let mut clients = held.clients(RecordWrite::Upsert, 1..2).await;
    let filter = json!({"where": {"n": 1}});
    clients.push(held.client(RecordWrite::Delete, filter).await);
    clients.extend(held.clients(RecordWrite::Upsert, 3..5).await);
    let (stage, _, answers) = held.release(clients).await;
    assert_eq!(text(&answers[1]), r#"200 {"deleted":1}"#);
    assert_eq!(stage.a().trace(), ["w1", "r1", "w3+w4"]);
    assert_eq!(documents(&stage), ["w3", "w4"]);
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn batches_have_the_configured_size() {
    let stage = Stage::with(13, |settings| settings.lanes.batch.records = 3).await;
    let held = Held::of(stage).await;
    let clients = held.clients(RecordWrite::Upsert, 1..8).await;
    let (stage, _, answers) = held.release(clients).await;
    assert_eq!(statuses(&answers), [200; 7]);
    assert_eq!(stage.a().trace(), ["w1+w2+w3", "w4+w5+w6", "w7"]);
}

#[tokio::test(start_paused = true)]
async fn a_write_that_waits_too_long_is_told_so_and_never_begun() {
    let stage = Stage::with(14, |settings| settings.lanes.time = Duration::from_secs(5)).await;
    let held = Held::of(stage).await;
    let late = held.clients(RecordWrite::Upsert, 1..3).await;
    for client in late {
        // The first is still under way.
        let answer = client.await.expect("an answer");
        assert_eq!(answer.status, 503, "{}", text(&answer));
        assert!(answer.headers.contains_key(RETRY_AFTER));
    }
    let clients = held.clients(RecordWrite::Upsert, 3..4).await;
    let (stage, _, answers) = held.release(clients).await;
    assert_eq!(statuses(&answers), [200]);
    assert_eq!(documents(&stage), ["w3"]);
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn bytes_that_wait_are_bounded_per_lane_and_over_all_lanes() {
    let size = value("r1", 1).to_string().len();
    for (lane, all, status) in [(2 * size, 100 * size, 429), (100 * size, 2 * size, 503)] {
        let stage = Stage::with(15, |settings| {
            settings.lanes.bytes = lane;
            settings.lanes.all_bytes = all;
        });
        let held = Held::of(stage.await).await;
        let clients = held.clients(RecordWrite::Upsert, 1..3).await;
        let refused = held.stage.upsert(&held.c, "r3", 3).await;
        assert_eq!(refused.status, status, "{}", text(&refused));
        assert!(refused.headers.contains_key(RETRY_AFTER));
        let (stage, c, answers) = held.release(clients).await;
        assert_eq!(statuses(&answers), [200; 2]);
        assert_eq!(stage.upsert(&c, "r3", 3).await.status, 200);
        assert_eq!(documents(&stage), ["w1", "w2", "w3"]);
    }
}

/// Clients that write again as soon as they are answered meet in one batch, and do not take turns in two.
#[tokio::test(start_paused = true)]
async fn writers_that_come_back_at_once_meet_in_one_batch() {
    const WRITERS: u64 = 8;
    const ROUNDS: u64 = 20;
    let stage = Stage::new(16).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "seed", 1000).await.status, 200);
    stage.nodes.iter().for_each(|node| node.set_latency(50_000));
    stage.a().forget_requests();
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (stage, c) = (stage.clone(), c.clone());
            tokio::spawn(async move {
                for round in 0..ROUNDS {
                    assert_eq!(stage.upsert(&c, &format!("r{writer}"), round).await.status, 200);
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.expect("it wrote");
    }
    let requests = stage.a().trace().len() as u64;
    assert!(
        requests < ROUNDS + ROUNDS / 2,
        "{requests} requests for {ROUNDS} rounds"
    );
    stage.assert_converged();
}

/// What a write alone would take is not made longer by the hope for company.
#[tokio::test(start_paused = true)]
async fn a_write_that_finds_the_lane_free_is_sent_at_once() {
    let stage = Stage::new(17).await;
    let c = stage.create("c").await;
    for n in 0..20 {
        assert_eq!(stage.upsert(&c, "r", n).await.status, 200);
        stage.eventually("the lane is free", || !c.lane.is_busy()).await;
        stage.a().forget_requests();
        let next = stage.start_upsert(&c, "s", n);
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        assert!(c.lane.waiting() == 0 && c.lane.is_busy());
        assert_eq!(next.await.expect("an answer").status, 200);
    }
}

/// However many requests one client has waiting, another one's write is in the next batch but one at the latest.
#[tokio::test(start_paused = true)]
async fn a_client_that_floods_a_collection_does_not_hold_up_another() {
    let stage = Stage::with(18, |settings| settings.lanes.batch.records = 2).await;
    let held = Held::of(stage).await;
    let [flooding, light] = [1, 2].map(|n| Some(IpAddr::from([10, 0, 0, n])));
    let mut clients = vec![];
    for n in 1..12 {
        let body = value(&format!("r{n}"), n);
        clients.push(held.client_at(flooding, RecordWrite::Upsert, body).await);
    }
    for n in [12, 13] {
        let body = value(&format!("r{n}"), n);
        clients.push(held.client_at(light, RecordWrite::Add, body).await);
    }
    let (stage, _, answers) = held.release(clients).await;
    assert!(answers.iter().all(|answer| answer.status < 300), "{answers:?}");
    let expected = ["w1+w2", "w12+w13", "w3+w4", "w5+w6", "w7+w8", "w9+w10", "w11"];
    for node in &stage.nodes {
        assert_eq!(node.trace(), expected);
    }
    stage.assert_converged();
}

/// One collection's writes take no more of what all may hold than they leave: others find room.
#[tokio::test(start_paused = true)]
async fn a_collection_that_is_flooded_leaves_room_for_others() {
    let size = value("r10", 10).to_string().len();
    let stage = Stage::with(19, |settings| settings.lanes.all_bytes = 10 * size).await;
    let other = stage.create("other").await;
    assert_eq!(stage.upsert(&other, "x", 500).await.status, 200);
    let gate = Gate::new();
    let held = Held::of(stage).await;
    held.stage
        .nodes
        .iter()
        .for_each(|node| node.fault("\"w501\"", 1, Fault::Held(gate.clone())));
    let clients = held.clients(RecordWrite::Upsert, 10..16).await;
    let refused = held.stage.upsert(&held.c, "r16", 16).await;
    assert_eq!(refused.status, 503, "{}", text(&refused));
    let busy = held.stage.start_upsert(&other, "x", 501);
    held.stage
        .eventually("it is sent", || held.stage.a().trace().contains(&"w501".to_owned()))
        .await;
    let waiting = held.stage.start_upsert(&other, "y", 502);
    held.stage.eventually("it waits", || other.lane.waiting() == 1).await;
    gate.open();
    for answer in [busy, waiting] {
        assert_eq!(answer.await.expect("an answer").status, 200);
    }
    let (stage, _, answers) = held.release(clients).await;
    assert_eq!(statuses(&answers), [200; 6]);
    stage.assert_converged();
}
