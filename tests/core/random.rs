//! Random writes under random faults, on one node at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use diptych::catalog::Collection;
use diptych::chroma::RecordWrite;
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::fakes::{A, CommitFault, DISK_FULL, Fault, Gate, LOCKED, Rng, Stage, text, value};

const SEEDS: u64 = 40;
const CLIENTS: u64 = 3;
const PHASES: u64 = 6;
const PER_PHASE: u64 = 17;
const IDS: [&str; 6] = ["p", "q", "r", "s", "t", "u"];

/// A write to one id, and when it was sent and answered, in steps of one clock.
#[derive(Debug, Clone)]
struct Written {
    kind: RecordWrite,
    /// Its id; `None`: a delete by filter, which may be about any.
    id: Option<&'static str>,
    n: u64,
    sent: u64,
    answered: u64,
    acked: bool,
}

#[derive(Default)]
struct History {
    clock: AtomicU64,
    all: Mutex<Vec<Written>>,
}

impl History {
    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }
}

async fn client(stage: Stage, c: Arc<Collection>, history: Arc<History>, mut rng: Rng) {
    for _ in 0..PER_PHASE {
        let id = IDS[rng.below(IDS.len() as u64) as usize];
        let sent = history.tick();
        let n = sent;
        let (kind, id, body) = match rng.below(10) {
            0..=3 => (RecordWrite::Upsert, Some(id), value(id, n)),
            4..=5 => (RecordWrite::Update, Some(id), value(id, n)),
            6 => (RecordWrite::Add, Some(id), value(id, n)),
            7..=8 => (RecordWrite::Delete, Some(id), json!({"ids": [id]})),
            _ => {
                let some = history.all.lock().last().map_or(0, |written| written.n);
                (RecordWrite::Delete, None, json!({"where": {"n": some}}))
            }
        };
        let answer = stage.write(&c, kind, body).await;
        let written = Written {
            kind,
            id,
            n,
            sent,
            answered: history.tick(),
            acked: answer.status < 300,
        };
        assert!(
            written.acked || [502, 503, 504].contains(&answer.status),
            "{written:?}: {}",
            text(&answer)
        );
        history.all.lock().push(written);
        tokio::time::sleep(Duration::from_micros(rng.below(4000))).await;
    }
}

/// Faults of a node from here on; what they hold is let go after a while, in one way or another.
fn misbehave(stage: &Stage, node: usize, mut rng: Rng) {
    stage.nodes[node].chaos(move |seen| {
        if seen.record_write().is_none() {
            return Fault::None;
        }
        match rng.below(24) {
            0 => Fault::NotSent,
            1 => Fault::ClosedBefore,
            2 => Fault::ClosedAfter,
            8 => Fault::LandsLate(Duration::from_millis(rng.below(3000))),
            3 | 4 => {
                let (gate, after) = (Gate::new(), Duration::from_millis(rng.below(9000)));
                let late = match rng.below(5) {
                    0 => Fault::ClosedBefore,
                    1 => Fault::ClosedAfter,
                    2 => Fault::Hidden,
                    _ => Fault::None,
                };
                let opened = gate.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(after).await;
                    opened.open_to(late);
                });
                match rng.below(3) {
                    0 => Fault::AnswerHeld(gate),
                    _ => Fault::Held(gate),
                }
            }
            5 => Fault::Hidden,
            6 => DISK_FULL,
            7 => LOCKED,
            _ => Fault::None,
        }
    });
}

/// No write was sent after the one that made the last value was answered, acked, and would have changed it.
fn check(history: &[Written], id: &str, last: Option<u64>) {
    let about: Vec<_> = history
        .iter()
        .filter(|written| written.id.is_none_or(|of| of == id))
        .collect();
    let acked = |written: &&&Written| written.acked && written.id.is_some();
    match last {
        Some(n) => {
            let maker = about
                .iter()
                .find(|written| written.n == n && written.kind != RecordWrite::Delete);
            let maker = maker.unwrap_or_else(|| panic!("{id} holds {n}, which nobody wrote"));
            let lost = about.iter().filter(acked).find(|written| {
                let changes = written.kind != RecordWrite::Add;
                changes && written.sent > maker.answered
            });
            assert!(lost.is_none(), "{id} holds {maker:?}, but {lost:?} was acked later");
        }
        None => {
            let deletes = || about.iter().filter(|written| written.kind == RecordWrite::Delete);
            let lost = about.iter().filter(acked).find(|written| {
                let makes = matches!(written.kind, RecordWrite::Add | RecordWrite::Upsert);
                makes && deletes().all(|delete| delete.answered < written.sent)
            });
            assert!(
                lost.is_none(),
                "{id} is absent, but {lost:?} was acked after every delete"
            );
        }
    }
}

/// One commit in so many fails, in one way or another.
fn misbehave_too(stage: &Stage, mut rng: Rng) {
    let faults: Vec<CommitFault> = (0..1000)
        .map(|_| match rng.below(4) {
            0 => CommitFault::Refused,
            1 => CommitFault::UncertainWritten,
            2 => CommitFault::UncertainNotWritten,
            _ => CommitFault::Slow(Duration::from_millis(rng.below(3000))),
        })
        .collect();
    let chance = Mutex::new(rng);
    stage.journal.fault(move |_| chance.lock().below(8) == 0, faults);
}

async fn run(seed: u64, journal_fails: bool) {
    let mut rng = Rng::new(seed);
    let stage = Stage::new(seed).await;
    stage.probe();
    stage.heal();
    let c = stage.create("c").await;
    let history = Arc::new(History::default());
    if journal_fails {
        misbehave_too(&stage, Rng::new(rng.next()));
    }
    for phase in 0..PHASES {
        let faulty = (phase + seed) as usize % 2;
        misbehave(&stage, faulty, Rng::new(rng.next()));
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| tokio::spawn(client(stage.clone(), c.clone(), history.clone(), Rng::new(rng.next()))))
            .collect();
        if rng.below(3) == 0 {
            tokio::time::sleep(Duration::from_millis(rng.below(2000))).await;
            stage.down(faulty);
            tokio::time::sleep(Duration::from_millis(rng.below(5000))).await;
            stage.nodes[faulty].set_down(false);
        }
        for client in clients {
            client.await.expect("the client comes to its end");
        }
        stage.nodes[faulty].heal();
        stage.healed().await;
        stage
            .eventually("both are up", || stage.core.cluster.up().count() == 2)
            .await;
        stage.assert_converged();
    }
    let history = history.all.lock().clone();
    assert_eq!(history.len() as u64, CLIENTS * PHASES * PER_PHASE);
    let records = stage.contents(A, "c").records;
    for id in IDS {
        let record = records.iter().find(|record| record.id == id);
        let last = record.map(|record| record.metadata.get("n").and_then(Value::as_u64).expect("a number"));
        check(&history, id, last);
    }
}

fn run_seeds(journal_fails: bool) {
    let only = std::env::var("DIPTYCH_TEST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seeds: Vec<u64> = only.map_or_else(|| (0..SEEDS).collect(), |seed| vec![seed]);
    for seed in seeds {
        println!("DIPTYCH_TEST_SEED={seed}");
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_time().start_paused(true).build().expect("a runtime");
        runtime.block_on(run(seed, journal_fails));
    }
}

#[test]
fn random_writes_under_random_faults_lose_nothing_and_converge() {
    run_seeds(false);
}

#[test]
fn random_writes_under_random_faults_of_node_and_journal_lose_nothing_and_converge() {
    run_seeds(true);
}
