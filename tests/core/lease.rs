//! The lease: who waits for it, and what a process does that stood still.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use diptych::config::WhenUnavailable;
use diptych::env::{Env, SharedEnv};
use diptych::journal::{Change, Commit, Hold, Holder, Journal, JournalError, Lease, Log};
use tokio::sync::watch;

use crate::fakes::{CommitFault, FakeJournal, Fault, Gate, Stage, seconds, text};

const LONGER_THAN_THE_LEASE: Duration = Duration::from_secs(20);

fn intends(commit: &Commit) -> bool {
    commit.iter().any(|change| matches!(change, Change::Intend(_)))
}

/// A write whose intent is durable when the process stands still; what happens meanwhile is the test's. Answers the
/// status, and whether the nodes saw the write.
async fn stands_still_before_it_sends(
    when_unavailable: WhenUnavailable,
    still: Duration,
    meanwhile: impl FnOnce(&FakeJournal),
) -> (u16, bool) {
    let stage = Stage::with(50, |settings| settings.when_unavailable = when_unavailable).await;
    let c = stage.create("c").await;
    let written = Arc::new(AtomicBool::new(false));
    let (open, opened) = watch::channel(false);
    let seen = written.clone();
    let matches = move |commit: &Commit| intends(commit) && !seen.swap(true, Ordering::SeqCst);
    stage.journal.fault(matches, [CommitFault::AnswerHeld(opened)]);
    let write = stage.start_upsert(&c, "x", 1);
    stage
        .eventually("the intent is written", || written.load(Ordering::SeqCst))
        .await;
    stage.env.suspend(still);
    meanwhile(&stage.journal);
    open.send_replace(true);
    let answer = write.await.unwrap();
    let sent = stage.nodes.map(|node| !node.record_writes().is_empty());
    assert_eq!(sent[0], sent[1], "{}", text(&answer));
    (answer.status, sent[0])
}

#[tokio::test(start_paused = true)]
async fn s02_a_process_that_stood_still_and_was_replaced_sends_nothing() {
    let outcome = stands_still_before_it_sends(WhenUnavailable::Mirror, LONGER_THAN_THE_LEASE, FakeJournal::steal);
    assert_eq!(outcome.await, (503, false));
}

#[tokio::test(start_paused = true)]
async fn s02_a_process_that_stood_still_and_was_not_replaced_goes_on() {
    let outcome = stands_still_before_it_sends(WhenUnavailable::Mirror, LONGER_THAN_THE_LEASE, |_| {});
    assert_eq!(outcome.await, (200, true));
}

/// Within its lease it cannot have been replaced; so nobody is asked.
#[tokio::test(start_paused = true)]
async fn s02_a_short_pause_costs_no_round_trip() {
    let outcome = stands_still_before_it_sends(WhenUnavailable::Refuse, Duration::from_secs(8), |journal| {
        journal.set_down(true);
    });
    assert_eq!(outcome.await, (200, true));
}

/// With one proxy, writes go on without the journal; with several the configuration says `refuse`.
#[tokio::test(start_paused = true)]
async fn s02_where_the_journal_does_not_answer_the_configuration_decides() {
    for (when_unavailable, outcome) in [
        (WhenUnavailable::Mirror, (200, true)),
        (WhenUnavailable::Refuse, (503, false)),
    ] {
        let found = stands_still_before_it_sends(when_unavailable, LONGER_THAN_THE_LEASE, |journal| {
            journal.set_down(true);
        });
        assert_eq!(found.await, outcome);
    }
}

#[tokio::test(start_paused = true)]
async fn s02_a_process_that_was_replaced_while_the_nodes_wrote_does_not_acknowledge() {
    for replaced in [true, false] {
        let stage = Stage::new(51).await;
        let c = stage.create("c").await;
        let gates = [Gate::new(), Gate::new()];
        for (node, gate) in stage.nodes.iter().zip(&gates) {
            node.fault("\"w1\"", 1, Fault::AnswerHeld(gate.clone()));
        }
        let write = stage.start_upsert(&c, "x", 1);
        stage
            .eventually("the nodes have it", || {
                stage.nodes.iter().all(|node| !node.record_writes().is_empty())
            })
            .await;
        stage.env.suspend(LONGER_THAN_THE_LEASE);
        if replaced {
            stage.journal.steal();
        }
        gates.iter().for_each(Gate::open);
        let answer = write.await.unwrap();
        assert_eq!(answer.status, if replaced { 504 } else { 200 }, "{}", text(&answer));
    }
}

/// A drain that slept is no better than a write that did.
#[tokio::test(start_paused = true)]
async fn s02_a_drain_that_stood_still_and_was_replaced_sends_nothing() {
    let stage = Stage::new(52).await;
    let c = stage.create("c").await;
    stage.down(1);
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.pause_drain(true);
    stage.up(1).await;
    stage.b().forget_requests();
    stage.env.suspend(LONGER_THAN_THE_LEASE);
    stage.journal.steal();
    stage.pause_drain(false);
    seconds(60).await;
    assert!(stage.b().record_writes().is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_check_keeps_the_lease_and_finds_out_who_has_it() {
    let stage = Stage::new(53).await;
    let log = stage.core.log.clone();
    seconds(100).await;
    assert_eq!(log.hold().await, Hold::Ours);
    assert_eq!(log.holder(), Some("test"));
    stage.journal.set_down(true);
    seconds(5).await;
    assert_eq!(log.hold().await, Hold::Ours, "nobody else can have it yet");
    seconds(60).await;
    let before = stage.env.now();
    assert_eq!(log.hold().await, Hold::Unknown);
    assert_eq!(stage.env.now(), before, "known: a write does not ask again");
    stage.journal.set_down(false);
    seconds(2).await;
    assert_eq!(log.hold().await, Hold::Ours);
    stage.env.suspend(LONGER_THAN_THE_LEASE);
    stage.journal.steal();
    assert_eq!(log.hold().await, Hold::Lost);
    assert_eq!(log.holder(), None);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_was_given_back_is_not_renewed() {
    let stage = Stage::new(54).await;
    let log = stage.core.log.clone();
    assert!(!stage.journal.is_released());
    log.release().await;
    assert!(stage.journal.is_released());
    seconds(30).await;
    assert!(stage.journal.is_released());
    assert!(log.commit(&vec![Change::SetLowWater(1)]).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn one_that_was_replaced_leaves_the_lease_to_its_successor() {
    let stage = Stage::new(55).await;
    stage.journal.steal();
    stage.core.log.release().await;
    assert!(!stage.journal.is_released());
}

fn lease_of(name: &str, term: i64) -> Lease {
    Lease {
        term,
        holder: Holder::named(name),
        left: Duration::from_secs(10),
    }
}

async fn take(stage: &Stage) -> (Result<Log, JournalError>, Duration) {
    let env: SharedEnv = stage.env.clone();
    let journal: Arc<dyn Journal> = stage.journal.clone();
    let started = env.now();
    let log = Log::take(journal, env.clone(), Holder::named("second").into()).await;
    (log, env.now() - started)
}

#[tokio::test(start_paused = true)]
async fn a_starter_gives_up_while_the_holder_lives() {
    let stage = Stage::new(56).await;
    let term = stage.core.log.term();
    stage.journal.set_held(Some(lease_of("the first", term)));
    let (log, took) = take(&stage).await;
    let error = log.err().map(|error| error.to_string()).unwrap_or_default();
    assert!(error.contains("held by the first"), "{error}");
    assert!(
        took >= Duration::from_secs(12) && took < Duration::from_secs(15),
        "{took:?}"
    );
    seconds(3).await;
    assert_eq!(stage.core.log.hold().await, Hold::Ours);
}

#[tokio::test(start_paused = true)]
async fn a_starter_takes_over_when_the_lease_ends() {
    let stage = Stage::new(57).await;
    let term = stage.core.log.term();
    stage.journal.set_held(Some(lease_of("the first", term)));
    let journal = stage.journal.clone();
    let ends = async {
        seconds(11).await;
        journal.set_held(None);
    };
    let ((log, took), ()) = tokio::join!(take(&stage), ends);
    let log = log.unwrap();
    assert_eq!(log.term(), term + 1);
    assert!(took < Duration::from_secs(12), "{took:?}");
    assert_eq!(stage.core.log.hold().await, Hold::Ours, "until it asks");
    seconds(3).await;
    assert_eq!(stage.core.log.hold().await, Hold::Lost);
}
