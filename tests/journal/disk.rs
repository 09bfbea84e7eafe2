//! SQLite on a disk that is full. A limit on the size of files stands for it, in a process of its own, because the
//! limit is the process's.

use std::process::Command;

use bytes::Bytes;
use diptych::journal::{Change, Commit, JournalError, Lsn, PayloadRow, first_lsn};
use uuid::Uuid;

use super::{ALL, payload, sqlite, start};

#[test]
fn a_full_disk_is_told_and_survived() {
    // Below and above what SQLite writes before it moves its write-ahead file into the database.
    for room in [600_000, 6_000_000] {
        let (_folder, url) = sqlite();
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["disk::writes_to_a_full_disk", "--exact", "--ignored", "--nocapture"])
            .env("JOURNAL_TEST_URL", &url)
            .env("JOURNAL_TEST_ROOM", room.to_string())
            .status()
            .unwrap();
        assert!(status.success());
    }
}

fn limit_files(bytes: Option<u64>) {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: plain system calls on a struct of our own; instead of the signal, a write that is too much fails.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit), 0);
        limit.rlim_cur = bytes.map_or(limit.rlim_max, Into::into);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
    }
}

/// A row that does not compress, of so many times 16 bytes.
fn row(lsn: Lsn, size: usize) -> PayloadRow {
    let noise: Vec<u8> = (0..size).flat_map(|_| Uuid::new_v4().into_bytes()).collect();
    PayloadRow {
        body: Bytes::from(noise),
        ..payload("a", Some(1), lsn)
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the victim of a_full_disk_is_told_and_survived"]
async fn writes_to_a_full_disk() {
    let Ok(url) = std::env::var("JOURNAL_TEST_URL") else {
        return;
    };
    let room = std::env::var("JOURNAL_TEST_ROOM").unwrap().parse().unwrap();
    let (journal, term) = start(&url).await;
    let (mut written, mut refused, mut uncertain) = (vec![], vec![], Commit::new());
    limit_files(Some(room));
    for lsn in (first_lsn(term)..).take(3000) {
        let change = Change::InsertPayload(row(lsn, 1000));
        match journal.commit(term, &vec![change.clone()]).await {
            Ok(()) => written.push(lsn),
            Err(JournalError::Refused(_)) => refused.push(lsn),
            Err(JournalError::Uncertain(_)) => uncertain.push(change),
            Err(other) => panic!("{other}"),
        }
        if refused.len() + uncertain.len() >= 10 {
            break;
        }
    }
    // More than SQLite keeps in memory until COMMIT: nothing is in doubt.
    let large = first_lsn(term) - 1;
    let error = journal
        .commit(term, &vec![Change::InsertPayload(row(large, 1_000_000))])
        .await;
    assert!(matches!(error, Err(JournalError::Refused(_))), "{error:?}");
    refused.push(large);
    assert!(written.len() > 5, "there was room at first");
    assert!(refused.len() + uncertain.len() >= 10, "the disk was full");
    let found = async || {
        let rows = journal.payloads("a", Some(1), ALL, ALL).await.unwrap();
        rows.iter().map(|row| row.lsn).collect::<Vec<_>>()
    };
    let while_full = found().await;
    assert!(written.iter().all(|lsn| while_full.contains(lsn)));

    limit_files(None);
    journal.commit(term, &uncertain).await.unwrap();
    let found = found().await;
    assert_eq!(found.len(), written.len() + uncertain.len());
    assert!(written.iter().all(|lsn| found.contains(lsn)));
    assert!(!refused.iter().any(|lsn| found.contains(lsn)));
    println!(
        "\n{} written, {} refused, {} uncertain",
        written.len(),
        refused.len(),
        uncertain.len()
    );
}
