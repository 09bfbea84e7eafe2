//! The journal fails.

use std::sync::Arc;
use std::time::Duration;

use diptych::chroma::Op;
use diptych::journal::{Change, Commit, Intent, Lsn};
use diptych::mirror::NamespaceWrite;
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::watch;

use crate::fakes::{A, B, CommitFault, DATABASE, DISK_FULL, Stage, TENANT, rows, seconds, text};

fn inserts(commit: &Commit, document: &str) -> bool {
    commit.iter().any(|change| match change {
        Change::InsertPayload(row) => String::from_utf8_lossy(&row.body).contains(document),
        _ => false,
    })
}

/// S9, S31: what is drained before an uncertain row is known would be undone by it.
async fn an_uncertain_row(first: CommitFault, written: bool) {
    let stage = Stage::new(31).await;
    let c = stage.create("c").await;
    stage.b().forget_requests();
    stage.b().fault("\"w1\"", 1, DISK_FULL);
    let (open, opened) = watch::channel(false);
    let faults = [
        first,
        CommitFault::Refused,
        CommitFault::Refused,
        CommitFault::Refused,
        CommitFault::Held(opened),
    ];
    stage.journal.fault(|commit| inserts(commit, "\"w1\""), faults);
    let answer = stage.upsert(&c, "x", 1).await;
    assert_eq!(answer.status, 503, "{}", text(&answer));
    assert_eq!(
        stage.journal.rows(),
        if written { rows(&[("b", "w1")]) } else { vec![] }
    );
    assert_eq!(stage.usable(&c), [A]);

    stage
        .eventually("the journal answers again", || stage.core.log.is_available())
        .await;
    assert_eq!(stage.upsert(&c, "x", 2).await.status, 200);
    assert_eq!(stage.upsert(&c, "x", 3).await.status, 200);
    seconds(60).await;
    assert_eq!(stage.b().trace(), ["w1"], "nothing is sent there until it is known");
    let missed: &[_] = if written {
        &[("b", "w1"), ("b", "w2"), ("b", "w3")]
    } else {
        &[("b", "w2"), ("b", "w3")]
    };
    assert_eq!(stage.journal.rows(), rows(missed));
    assert_eq!(stage.usable(&c), [A]);

    open.send_replace(true);
    stage.drained().await;
    assert_eq!(stage.b().trace(), ["w1", "w1", "w2", "w3"]);
    assert_eq!(stage.documents(B, "c"), [("x".to_owned(), "w3".to_owned())]);
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn s31_nothing_passes_a_row_whose_commit_is_uncertain_but_written() {
    an_uncertain_row(CommitFault::UncertainWritten, true).await;
}

#[tokio::test(start_paused = true)]
async fn s31_nothing_passes_a_row_whose_commit_is_uncertain_and_not_written() {
    an_uncertain_row(CommitFault::UncertainNotWritten, false).await;
}

#[tokio::test(start_paused = true)]
async fn a_commit_that_is_uncertain_once_is_settled_before_the_answer() {
    for fault in [CommitFault::UncertainWritten, CommitFault::UncertainNotWritten] {
        let stage = Stage::new(32).await;
        let c = stage.create("c").await;
        stage.down(B);
        stage.journal.fault(|commit| inserts(commit, "\"w1\""), [fault]);
        assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
        assert_eq!(stage.journal.rows(), rows(&[("b", "w1")]), "once");
        stage.up(B).await;
        stage.drained().await;
        stage.assert_converged();
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_journal_delays_the_ack_that_needs_it_and_loses_nothing() {
    let stage = Stage::new(33).await;
    let c = stage.create("c").await;
    stage.down(B);
    let pause = std::time::Duration::from_secs(7);
    stage
        .journal
        .fault(|commit| inserts(commit, "\"w1\""), [CommitFault::Slow(pause)]);
    let before = stage.core.env.now();
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    assert!(stage.core.env.now() - before >= pause, "acked before it was covered");
    assert_eq!(stage.journal.rows(), rows(&[("b", "w1")]));
    stage.up(B).await;
    stage.drained().await;
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn while_the_journal_is_away_only_what_needs_no_row_is_taken() {
    let stage = Stage::new(34).await;
    let c = stage.create("c").await;
    stage.journal.set_down(true);
    seconds(3).await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200, "both nodes are usable");
    assert_eq!(stage.documents(B, "c"), [("x".to_owned(), "w1".to_owned())]);

    let known = stage.try_create(json!({"name": "c", "get_or_create": true})).await;
    assert_eq!(known.status, 200, "{}", text(&known));
    assert!(text(&known).contains(&c.client_id.to_string()));

    for away in [false, true] {
        if away {
            stage.down(B);
        }
        stage.nodes.iter().for_each(|node| node.forget_requests());
        assert_eq!(stage.try_create(json!({"name": "new"})).await.status, 503);
        assert_eq!(
            stage
                .try_create(json!({"name": "new", "get_or_create": true}))
                .await
                .status,
            503
        );
        assert_eq!(stage.rename(&c, "renamed").await.status, 503);
        assert_eq!(stage.delete("c").await.status, 503);
        let database = NamespaceWrite::DeleteDatabase {
            tenant: TENANT.to_owned(),
            name: DATABASE.to_owned(),
        };
        assert_eq!(stage.namespace(database, serde_json::Value::Null).await.status, 503);
        if away {
            let answer = stage.upsert(&c, "x", 2).await;
            assert_eq!(answer.status, 503, "{}", text(&answer));
        }
        for node in &stage.nodes {
            assert_eq!(
                node.mutations(),
                Vec::<String>::new(),
                "refused before any node sees it"
            );
        }
    }
    assert_eq!(stage.documents(A, "c"), [("x".to_owned(), "w1".to_owned())]);

    stage.journal.set_down(false);
    stage.up(B).await;
    seconds(3).await;
    stage.assert_converged();
    assert_eq!(stage.upsert(&c, "x", 3).await.status, 200);
    assert_eq!(stage.rename(&c, "renamed").await.status, 200);
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn a_proxy_whose_journal_was_taken_over_never_acks_what_needs_a_row() {
    let stage = Stage::new(35).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.down(B);
    stage.journal.steal();
    let answer = stage.upsert(&c, "x", 2).await;
    assert_eq!(answer.status, 503, "{}", text(&answer));
    stage.a().forget_requests();
    seconds(60).await;
    assert_eq!(stage.upsert(&c, "x", 3).await.status, 503);
    assert_eq!(stage.try_create(json!({"name": "new"})).await.status, 503);
    assert_eq!(stage.delete("c").await.status, 503);
    assert_eq!(
        stage.a().mutations(),
        Vec::<String>::new(),
        "known by now: refused before any node sees it"
    );
    assert_eq!(stage.journal.rows(), vec![]);
    stage.up(B).await;
    seconds(60).await;
    for node in [A, B] {
        assert_eq!(
            stage.documents(node, "c"),
            [("x".to_owned(), "w1".to_owned())],
            "no intent, no write"
        );
    }
}

/// S3: another proxy writes by now, in an order of its own.
#[tokio::test(start_paused = true)]
async fn a_proxy_that_knows_that_it_was_replaced_writes_nothing_more() {
    let stage = Stage::new(36).await;
    let (c, d) = (stage.create("c").await, stage.create("d").await);
    stage.journal.steal();
    stage.b().fault("\"w1\"", 1, DISK_FULL);
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 503, "this tells it");
    assert_eq!(stage.usable(&d), [A, B]);
    stage.nodes.iter().for_each(|node| node.forget_requests());
    let answer = stage.upsert(&d, "x", 2).await;
    assert_eq!(answer.status, 503, "{}", text(&answer));
    for node in &stage.nodes {
        assert_eq!(node.mutations(), Vec::<String>::new());
        assert!(node.record_writes().is_empty());
    }
}

fn intent(lsn: Lsn, ids: Vec<String>) -> Intent {
    Intent {
        lsn,
        generation: Some(1),
        op: Op::Upsert,
        ids: Some(ids),
        body: None,
    }
}

fn intends(commit: &Commit) -> bool {
    commit.iter().any(|change| matches!(change, Change::Intend(_)))
}

#[tokio::test(start_paused = true)]
async fn a_journal_that_hangs_holds_a_writer_for_one_deadline_only() {
    let stage = Stage::new(37).await;
    let log = stage.core.log.clone();
    let (open, opened) = watch::channel(false);
    stage.journal.fault(intends, [CommitFault::Held(opened)]);
    let writers = (0..3).map(|number: u64| {
        let (log, env) = (log.clone(), stage.core.env.clone());
        async move {
            seconds(5 * number).await;
            let started = env.now();
            assert!(!log.intend(intent(log.begin(), vec![])).await, "it may not be sent");
            assert_eq!(env.now() - started, Duration::from_secs(15));
        }
    });
    futures(writers).await;
    open.send_replace(true);
    seconds(3).await;
    assert!(log.is_available());
    assert!(log.intend(intent(log.begin(), vec![])).await);
}

#[tokio::test(start_paused = true)]
async fn an_intent_whose_commit_stays_uncertain_is_not_there() {
    let stage = Stage::new(38).await;
    let log = stage.core.log.clone();
    stage.journal.fault(
        intends,
        [
            CommitFault::UncertainWritten,
            CommitFault::Refused,
            CommitFault::Refused,
            CommitFault::Refused,
        ],
    );
    assert!(!log.intend(intent(log.begin(), vec![])).await);
    stage.journal.fault(intends, [CommitFault::UncertainNotWritten]);
    assert!(log.intend(intent(log.begin(), vec![])).await, "tried again at once");
}

#[tokio::test(start_paused = true)]
async fn intents_that_wait_go_together_and_within_limits() {
    let stage = Stage::new(39).await;
    let log = stage.core.log.clone();
    let groups = Arc::new(Mutex::new(vec![]));
    let seen = groups.clone();
    let count = move |commit: &Commit| {
        if intends(commit) {
            seen.lock().push(commit.len());
        }
        false
    };
    stage.journal.fault(count, [CommitFault::Refused]);
    let small = (0..1500).map(|_| vec![]);
    let large = (0..5).map(|_| vec!["x".repeat(3 << 20)]);
    let huge = [vec!["x".repeat(5 << 20)]];
    let all: Vec<_> = small
        .chain(large)
        .chain(huge)
        .map(|ids| intent(log.begin(), ids))
        .collect();
    let writers = all.into_iter().map(|intent| {
        let log = log.clone();
        async move { assert!(log.intend(intent).await) }
    });
    futures(writers).await;
    assert_eq!(*groups.lock(), [1000, 501, 1, 1, 1, 1, 1]);
}

/// The journal was restored from a backup while commits are under way.
#[tokio::test(start_paused = true)]
async fn to_move_the_own_term_on_is_not_to_be_replaced() {
    let stage = Stage::new(40).await;
    let log = stage.core.log.clone();
    let term = log.term();
    let commit = Commit::new();
    let (written, raised) = tokio::join!(log.commit(&commit), log.advance_past(log.next_lsn() + (5 << 40)));
    written.unwrap();
    raised.unwrap();
    assert_eq!(log.term(), term + 6);
    assert!(log.begin() >> 40 == term + 6);
    log.commit(&commit).await.unwrap();
    assert!(!log.is_fenced());
}

/// The answer to that was lost, and the journal away for longer than anybody waits.
#[tokio::test(start_paused = true)]
async fn an_own_term_whose_answer_was_lost_does_not_fence_us() {
    let stage = Stage::new(41).await;
    let log = stage.core.log.clone();
    let term = log.term();
    stage.journal.lose_raise();
    let its_log = log.clone();
    let raising = tokio::spawn(async move { its_log.advance_past(its_log.next_lsn() + (5 << 40)).await });
    seconds(100).await;
    assert!(
        raising.is_finished(),
        "whoever asked for it is told that it is not known"
    );
    stage.journal.set_down(false);
    seconds(3).await;
    assert!(!log.is_fenced(), "we were replaced by ourselves");
    assert!(log.is_available());
    assert_eq!(log.term(), term + 6);
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.assert_converged();
}

/// The answer was lost, and the journal away for a moment: until it is known, nobody may make the same rows anew.
#[tokio::test(start_paused = true)]
async fn what_has_to_be_known_is_asked_for_until_it_is() {
    let stage = Stage::new(42).await;
    let pins = |commit: &Commit| commit.iter().any(|change| matches!(change, Change::PutTenant(_)));
    let refused = vec![CommitFault::Refused; 20];
    stage
        .journal
        .fault(pins, [vec![CommitFault::UncertainWritten], refused].concat());
    assert!(
        stage
            .core
            .log
            .commit_until_known(&vec![Change::PutTenant("t".to_owned())])
            .await
    );
    // What never reached it is known at once.
    stage.journal.set_down(true);
    let before = stage.core.env.now();
    assert!(
        !stage
            .core
            .log
            .commit_until_known(&vec![Change::PutTenant("u".to_owned())])
            .await
    );
    assert!(stage.core.env.now() - before < Duration::from_millis(100));
}

async fn futures<F: Future<Output = ()> + Send + 'static>(all: impl Iterator<Item = F>) {
    all.collect::<tokio::task::JoinSet<_>>().join_all().await;
}

/// Whoever makes its rows anew after a commit that was not written has to know that it was not: rows that are there under
/// ids that nobody remembers are carried out by nobody.
#[tokio::test(start_paused = true)]
async fn a_refusal_says_nothing_of_the_tries_before_it() {
    let stage = Stage::new(32).await;
    let puts = |commit: &Commit| commit.iter().any(|change| matches!(change, Change::PutTenant(_)));
    let commit = vec![Change::PutTenant("t".to_owned())];
    let refused = || std::iter::repeat_n(CommitFault::Refused, 6);
    stage
        .journal
        .fault(puts, std::iter::once(CommitFault::UncertainWritten).chain(refused()));
    assert!(stage.core.log.commit_until_known(&commit).await, "it was written");

    stage.journal.fault(puts, refused().take(1));
    assert!(!stage.core.log.commit_until_known(&commit).await, "it was not");
}
