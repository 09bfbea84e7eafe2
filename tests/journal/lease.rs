//! Promises about the lease: who gets it when, on either database.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use diptych::env::{SharedEnv, TokioEnv};
use diptych::journal::{Change, Holder, Journal, JournalError, LEASE, Lease, Log, Presence, SKEW, open};
use sqlx::{Connection, Executor, PgConnection, SqliteConnection};

use super::{start, take};

async fn attempt(journal: &Arc<dyn Journal>, dead: Option<i64>) -> Result<i64, Lease> {
    match journal.take_term(&Holder::named("second"), dead).await {
        Err(JournalError::Held(lease)) => Err(*lease),
        term => Ok(term.unwrap()),
    }
}

/// As if the lease had been renewed so much earlier: the clock is the database's.
async fn age(url: &str, by: Duration) {
    let seconds = by.as_secs();
    if url.starts_with("postgres") {
        let sql = format!("UPDATE diptych_lease_end SET expires_at = expires_at - INTERVAL '{seconds} seconds'");
        let mut connection = PgConnection::connect(url).await.unwrap();
        connection.execute(sqlx::AssertSqlSafe(sql)).await.unwrap();
        connection.close().await.unwrap();
    } else {
        let sql = format!(
            "UPDATE diptych_lease_end \
             SET expires_at = strftime('%Y-%m-%dT%H:%M:%fZ', julianday(expires_at) - {seconds} / 86400.0)"
        );
        let mut connection = SqliteConnection::connect(url).await.unwrap();
        connection.execute(sqlx::AssertSqlSafe(sql)).await.unwrap();
        connection.close().await.unwrap();
    }
}

pub async fn a_lease_that_is_held_is_refused(url: &str) {
    let (journal, term) = start(url).await;
    let lease = attempt(&journal, None).await.unwrap_err();
    assert_eq!((lease.term, &lease.holder), (term, &Holder::named("test")));
    assert!(
        lease.left > LEASE - Duration::from_secs(8) && lease.left <= LEASE,
        "{lease}"
    );
    assert!(lease.to_string().contains("held by test"), "{lease}");
    // To know that an earlier holder is dead says nothing of this one.
    assert_eq!(attempt(&journal, Some(term - 1)).await.unwrap_err().term, term);
    journal.commit(term, &vec![Change::SetLowWater(1)]).await.unwrap();
}

pub async fn a_lease_ends_some_time_after_its_last_renewal(url: &str) {
    let (journal, term) = start(url).await;
    age(url, LEASE).await;
    let lease = attempt(&journal, None).await.unwrap_err();
    assert_eq!(lease.left, Duration::ZERO, "clocks do not run alike");
    journal.commit(term, &vec![Change::RenewLease]).await.unwrap();
    age(url, SKEW + Duration::from_secs(1)).await;
    let lease = attempt(&journal, None).await.unwrap_err();
    assert!(lease.left > Duration::ZERO, "renewed");
    age(url, LEASE).await;
    assert_eq!(attempt(&journal, None).await.unwrap(), term + 1);
    let error = journal.commit(term, &vec![Change::RenewLease]).await.unwrap_err();
    assert!(matches!(error, JournalError::Fenced { .. }), "{error}");
    assert!(
        attempt(&journal, None).await.unwrap_err().left > Duration::ZERO,
        "with the term comes the lease"
    );
}

pub async fn the_lease_of_a_dead_holder_is_taken_at_once(url: &str) {
    let (journal, term) = start(url).await;
    assert_eq!(attempt(&journal, Some(term)).await.unwrap(), term + 1);
    assert_eq!(attempt(&journal, Some(term)).await.unwrap_err().term, term + 1);
}

pub async fn a_lease_that_was_given_back_is_free(url: &str) {
    let (journal, term) = start(url).await;
    journal.commit(term, &vec![Change::ReleaseLease]).await.unwrap();
    assert_eq!(attempt(&journal, None).await.unwrap(), term + 1);
    let error = journal.commit(term, &vec![Change::ReleaseLease]).await.unwrap_err();
    assert!(matches!(error, JournalError::Fenced { .. }), "{error}");
    attempt(&journal, None).await.unwrap_err();
}

pub async fn of_two_that_want_a_lease_one_gets_it(url: &str) {
    let (journal, term) = start(url).await;
    for round in 0..10 {
        let now = term + round;
        journal.commit(now, &vec![Change::ReleaseLease]).await.unwrap();
        let (one, other) = tokio::join!(attempt(&journal, None), attempt(&journal, None));
        let (got, refused) = if one.is_ok() { (one, other) } else { (other, one) };
        assert_eq!(got.unwrap(), now + 1);
        assert_eq!(refused.unwrap_err().term, now + 1);
    }
}

/// What the process does with all that. A SQLite file has one process: whoever could open it takes it.
pub async fn a_log_is_taken_from_the_dead_and_from_those_that_gave_it_back(url: &str) {
    let env: SharedEnv = Arc::new(TokioEnv::new(tokio::runtime::Handle::current()));
    let folder = tempfile::tempdir().unwrap();
    let journal = open(url, 4).await.unwrap();
    let next = async || {
        let started = env.now();
        let log = Log::take(journal.clone(), env.clone(), Presence::here(folder.path())).await;
        (log, env.now() - started)
    };
    let quick = Duration::from_secs(5);
    let files = || std::fs::read_dir(folder.path()).unwrap().count();
    let (first, took) = next().await;
    let first = first.unwrap();
    assert!(took < quick);
    assert!(first.holder().unwrap().contains(&std::process::id().to_string()));
    // Killed: its lock goes, its file stays.
    let term = first.term();
    drop(first);
    assert_eq!(files(), 1);
    let (second, took) = next().await;
    let second = Arc::new(second.unwrap());
    assert_eq!(second.term(), term + 1);
    assert!(took < quick, "{took:?}");
    assert_eq!(files(), 1, "only its own");
    if !journal.keeps_others_out() {
        let (renewed, clock) = (second.clone(), env.clone());
        let renewing = tokio::spawn(async move {
            loop {
                renewed.check().await;
                clock.sleep(Duration::from_secs(1)).await;
            }
        });
        let (third, took) = next().await;
        renewing.abort();
        assert!(matches!(third, Err(JournalError::Held(lease)) if lease.term == term + 1));
        assert!(took > LEASE, "it might have ended: {took:?}");
        assert_eq!(files(), 1, "it leaves nothing behind");
    }
    second.release().await;
    assert_eq!(files(), 0);
    second.check().await;
    let (fourth, took) = next().await;
    assert_eq!(fourth.unwrap().term(), term + 2);
    assert!(took < quick);
}

/// A file that cannot be found, or is on another machine, shows nothing.
pub async fn who_cannot_see_the_holder_does_not_call_it_dead(url: &str) {
    let journal = open(url, 4).await.unwrap();
    if journal.keeps_others_out() {
        return;
    }
    let env: SharedEnv = Arc::new(TokioEnv::new(tokio::runtime::Handle::current()));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("lock");
    File::create(&file).unwrap();
    let holder = Holder {
        name: "elsewhere".to_owned(),
        host: "another machine".to_owned(),
        lock_file: Some(file.to_str().unwrap().to_owned()),
    };
    let term = journal.take_term(&holder, None).await.unwrap();
    let log = Log::take(journal.clone(), env, Presence::here(folder.path()));
    let patience = tokio::time::timeout(Duration::from_secs(2), log);
    assert!(patience.await.is_err(), "it waits for the lease to end");
    assert!(file.exists());
    assert_eq!(take(&journal, "x").await, term + 1);
}
