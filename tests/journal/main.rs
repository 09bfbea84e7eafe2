//! The promises of the journal, the same list for SQLite and for Postgres, and what only Postgres can go through:
//! being stopped, frozen and killed.

mod disk;
mod healing;
mod lease;
mod postgres;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, SubsecRound, Utc};
use diptych::chroma::{Generation, Op};
use diptych::journal::{
    Backlog, Change, CollectionRecord, DatabaseRecord, Holder, Journal, JournalError, Lsn, Outline, PayloadRow,
    RepairKind, RepairRow, first_lsn, open,
};
use tempfile::TempDir;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use uuid::Uuid;

use healing::{
    a_journal_of_the_first_version_is_taken_over, a_row_is_told_that_another_node_refused_its_entry,
    a_term_that_was_raised_is_raised_when_its_answer_was_lost, events_are_kept_in_order_and_bounded,
    full_tables_are_left_before_they_are_covered, intents_come_back_as_they_were, maintenance_lasts_until_it_is_ended,
    nodes_are_remembered_and_their_ids_forgotten, parked_rows_are_taken_up_or_dropped,
    repairs_keep_their_kind_and_are_parked, rotation_drops_what_is_covered_and_nothing_else,
    rotation_during_commits_loses_nothing, suspects_come_and_go, the_low_water_mark_never_moves_back,
    the_own_term_is_raised,
};
use lease::{
    a_lease_ends_some_time_after_its_last_renewal, a_lease_that_is_held_is_refused,
    a_lease_that_was_given_back_is_free, a_log_is_taken_from_the_dead_and_from_those_that_gave_it_back,
    of_two_that_want_a_lease_one_gets_it, the_lease_of_a_dead_holder_is_taken_at_once,
    who_cannot_see_the_holder_does_not_call_it_dead,
};
use postgres::{Cluster, PASSWORD};

const ALL: usize = 1 << 40;
/// What Postgres' text would not take, and what could be mistaken for its replacement.
const ODD: &str = "t\0\\0\\é\u{1F600}\u{7f}'\"";

/// One test per line and database. A test gets a URL where nothing is yet.
macro_rules! promises {
    ($($name:ident)*) => {
        mod on_sqlite {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                let (_folder, url) = super::sqlite();
                super::$name(&url).await;
            })*
        }
        mod on_postgres {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                if let Some(cluster) = super::Cluster::shared() {
                    super::$name(&cluster.database().await).await;
                }
            })*
        }
    };
}

promises! {
    every_op_and_every_field_comes_back
    bodies_come_back_whatever_they_hold
    payloads_are_in_order_and_within_limits
    payload_changes_do_what_they_say
    repairs_come_and_go
    maintenance_lasts_until_it_is_ended
    events_are_kept_in_order_and_bounded
    the_catalog_comes_back
    deleted_collections_stay_while_rows_speak_of_them
    remove_everything_leaves_nothing
    the_same_commit_twice_is_once
    a_commit_that_fails_at_its_end_writes_nothing
    a_dropped_commit_is_all_or_nothing
    an_older_term_is_refused
    a_new_term_is_the_end_of_the_older
    large_commits_work
    commits_side_by_side_all_arrive
    it_opens_again_with_all_that_was_there
    repairs_keep_their_kind_and_are_parked
    parked_rows_are_taken_up_or_dropped
    nodes_are_remembered_and_their_ids_forgotten
    a_row_is_told_that_another_node_refused_its_entry
    suspects_come_and_go
    intents_come_back_as_they_were
    the_low_water_mark_never_moves_back
    rotation_drops_what_is_covered_and_nothing_else
    full_tables_are_left_before_they_are_covered
    rotation_during_commits_loses_nothing
    the_own_term_is_raised
    a_term_that_was_raised_is_raised_when_its_answer_was_lost
    a_journal_of_the_first_version_is_taken_over
    a_lease_that_is_held_is_refused
    a_lease_ends_some_time_after_its_last_renewal
    the_lease_of_a_dead_holder_is_taken_at_once
    a_lease_that_was_given_back_is_free
    of_two_that_want_a_lease_one_gets_it
    a_log_is_taken_from_the_dead_and_from_those_that_gave_it_back
    who_cannot_see_the_holder_does_not_call_it_dead
}

fn sqlite() -> (TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}", folder.path().join("journal.db").display());
    (folder, url)
}

async fn start(url: &str) -> (Arc<dyn Journal>, i64) {
    let journal = open(url, 4).await.unwrap();
    let term = take(&journal, "test").await;
    (journal, term)
}

/// From whoever holds it.
async fn take(journal: &Arc<dyn Journal>, name: &str) -> i64 {
    let mut dead = None;
    loop {
        match journal.take_term(&Holder::named(name), dead).await {
            Err(JournalError::Held(lease)) => dead = Some(lease.term),
            term => return term.unwrap(),
        }
    }
}

fn now() -> DateTime<Utc> {
    Utc::now().trunc_subsecs(6)
}

fn payload(node: &str, generation: Option<Generation>, lsn: Lsn) -> PayloadRow {
    PayloadRow {
        id: Uuid::new_v4(),
        node: node.to_owned(),
        generation,
        lsn,
        op: Op::Upsert,
        body: Bytes::from(format!("{{\"ids\":[\"{lsn}\"]}}")),
        refused: false,
        in_doubt: false,
        attempts: 0,
        parked: None,
        created_at: now(),
    }
}

fn repair(node: &str, generation: Option<Generation>, lsn: Lsn) -> RepairRow {
    RepairRow {
        id: Uuid::new_v4(),
        node: node.to_owned(),
        generation,
        kind: RepairKind::Whole,
        ids: None,
        source: None,
        source_marker: None,
        reversible: false,
        lsn,
        reason: "test".to_owned(),
        parked: None,
        created_at: now(),
    }
}

fn collection(generation: Generation) -> CollectionRecord {
    CollectionRecord {
        generation,
        client_id: Uuid::new_v4(),
        tenant: "default_tenant".to_owned(),
        database: "default_database".to_owned(),
        name: format!("c{generation}"),
        deleted: false,
        node_ids: BTreeMap::new(),
        created_at: now(),
        updated_at: now(),
    }
}

fn every_op() -> Vec<Op> {
    let (tenant, database, name) = (ODD.to_owned(), "d\0".to_owned(), "\\".to_owned());
    vec![
        Op::Add,
        Op::Upsert,
        Op::Update,
        Op::Delete,
        Op::CreateCollection {
            tenant: tenant.clone(),
            database: database.clone(),
            name: name.clone(),
            generation: 1,
        },
        Op::ModifyCollection {
            generation: 2,
            new_name: None,
        },
        Op::ModifyCollection {
            generation: 2,
            new_name: Some(ODD.to_owned()),
        },
        Op::DeleteCollection {
            tenant: tenant.clone(),
            database,
            name: name.clone(),
            generation: i64::MAX,
        },
        Op::CreateDatabase {
            tenant: tenant.clone(),
            name: name.clone(),
        },
        Op::DeleteDatabase {
            tenant: tenant.clone(),
            name,
        },
        Op::CreateTenant { name: tenant.clone() },
        Op::ModifyTenant { name: tenant },
        Op::Reset,
        Op::Other {
            method: "PATCH".to_owned(),
            path: "/api/v2/\0{collection}".to_owned(),
            generation: Some(3),
        },
        Op::Other {
            method: "POST".to_owned(),
            path: String::new(),
            generation: None,
        },
    ]
}

async fn every_op_and_every_field_comes_back(url: &str) {
    let (journal, term) = start(url).await;
    let rows: Vec<PayloadRow> = every_op()
        .into_iter()
        .zip(first_lsn(term)..)
        .map(|(op, lsn)| {
            let even = lsn % 2 == 0;
            PayloadRow {
                generation: op.is_record().then_some(9),
                op,
                refused: even,
                in_doubt: !even,
                attempts: if even { i32::MAX } else { 0 },
                parked: even.then(|| ODD.to_owned()),
                ..payload(ODD, None, lsn)
            }
        })
        .collect();
    for row in &rows {
        journal
            .commit(term, &vec![Change::InsertPayload(row.clone())])
            .await
            .unwrap();
    }
    let (records, namespace): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| row.generation.is_some());
    assert_eq!(journal.payloads(ODD, Some(9), 100, ALL).await.unwrap(), records);
    assert_eq!(journal.payloads(ODD, None, 100, ALL).await.unwrap(), namespace);
    assert!(!journal.describe().contains(PASSWORD));
    journal.ping().await.unwrap();
}

async fn bodies_come_back_whatever_they_hold(url: &str) {
    let (journal, term) = start(url).await;
    let mut seed = 1_u64;
    let noise = |_| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 56) as u8
    };
    let bodies: Vec<Bytes> = vec![
        Bytes::new(),
        Bytes::from_static(b"\0"),
        Bytes::from_static(b"{\"a\":\"\0\xff\xfe\\u0000\"}"),
        Bytes::from((0..20 << 20).map(noise).collect::<Vec<u8>>()),
        Bytes::from(vec![b'['; 20 << 20]),
    ];
    let rows: Vec<PayloadRow> = bodies
        .into_iter()
        .zip(1..)
        .map(|(body, lsn)| PayloadRow {
            body,
            ..payload("a", Some(1), lsn)
        })
        .collect();
    journal
        .commit(term, &rows.iter().cloned().map(Change::InsertPayload).collect())
        .await
        .unwrap();
    assert!(journal.payloads("a", Some(1), 100, ALL).await.unwrap() == rows);
}

async fn payloads_are_in_order_and_within_limits(url: &str) {
    let (journal, term) = start(url).await;
    let row = |lsn, size| PayloadRow {
        body: Bytes::from(vec![b'x'; size]),
        ..payload("a", Some(1), lsn)
    };
    let mut commit: Vec<Change> = [50, 10, 40, 30, 20]
        .map(|lsn| Change::InsertPayload(row(lsn, 1000)))
        .into();
    commit.push(Change::InsertPayload(payload("a", Some(2), 11)));
    commit.push(Change::InsertPayload(payload("a", None, 12)));
    commit.push(Change::InsertPayload(payload("b", Some(1), 10)));
    journal.commit(term, &commit).await.unwrap();
    let lsns = async |generation, rows, bytes| {
        let rows = journal.payloads("a", generation, rows, bytes).await.unwrap();
        rows.iter().map(|row| row.lsn).collect::<Vec<_>>()
    };
    assert_eq!(lsns(Some(1), 100, ALL).await, [10, 20, 30, 40, 50]);
    assert_eq!(lsns(Some(1), 2, ALL).await, [10, 20]);
    assert_eq!(lsns(Some(1), 100, 3000).await, [10, 20, 30]);
    assert_eq!(lsns(Some(1), 100, 2999).await, [10, 20]);
    assert_eq!(lsns(Some(1), 100, 1).await, [10], "at least one");
    assert_eq!(lsns(Some(1), 0, 0).await, [10], "at least one");
    assert_eq!(lsns(Some(1), usize::MAX, usize::MAX).await, [10, 20, 30, 40, 50]);
    assert_eq!(lsns(Some(2), 100, ALL).await, [11]);
    assert_eq!(lsns(None, 100, ALL).await, [12]);
    assert!(lsns(Some(3), 100, ALL).await.is_empty());
    let all = journal.payloads("a", Some(1), 100, ALL).await.unwrap();
    let outlines: Vec<_> = all.iter().map(Outline::of).collect();
    assert_eq!(outlines[0].bytes, 1000);
    for (offset, limit) in [(0, 100), (0, 2), (2, 2), (4, 100), (5, 100), (0, 0)] {
        let found = journal.outlines("a", Some(1), offset, limit).await.unwrap();
        let expected: Vec<_> = outlines.iter().skip(offset).take(limit).cloned().collect();
        assert_eq!(found, expected, "{offset}, {limit}");
    }
    assert_eq!(journal.outlines("a", None, 0, 100).await.unwrap()[0].row.lsn, 12);
}

async fn payload_changes_do_what_they_say(url: &str) {
    let (journal, term) = start(url).await;
    let rows: Vec<PayloadRow> = (1..=6).map(|lsn| payload("a", Some(lsn % 2), lsn)).collect();
    let id = |lsn: usize| rows[lsn - 1].id;
    journal
        .commit(term, &rows.iter().cloned().map(Change::InsertPayload).collect())
        .await
        .unwrap();
    let changes = vec![
        Change::CountAttempt(id(1)),
        Change::CountAttempt(id(1)),
        Change::CountAttempt(Uuid::new_v4()),
        Change::Park {
            id: id(3),
            reason: ODD.to_owned(),
        },
        Change::Park {
            id: id(1),
            reason: "first".to_owned(),
        },
        Change::MarkInDoubt(id(3)),
        Change::MarkInDoubt(Uuid::new_v4()),
        Change::RemovePayloads(vec![id(5), Uuid::new_v4()]),
        Change::RemovePayloads(Vec::new()),
        Change::RemovePayloadsOf(0),
    ];
    journal.commit(term, &changes).await.unwrap();
    let left = journal.payloads("a", Some(1), 10, ALL).await.unwrap();
    let first = PayloadRow {
        attempts: 2,
        parked: Some("first".to_owned()),
        ..rows[0].clone()
    };
    assert!(!rows[2].in_doubt, "the mark changes something");
    let third = PayloadRow {
        in_doubt: true,
        parked: Some(ODD.to_owned()),
        ..rows[2].clone()
    };
    assert_eq!(left, [first.clone(), third.clone()]);
    assert_eq!(journal.payloads("a", Some(0), 10, ALL).await.unwrap(), []);
    assert_eq!(journal.parked(10).await.unwrap(), [&third, &first].map(Outline::of));
    assert_eq!(journal.parked(1).await.unwrap(), [Outline::of(&third)]);
    let bytes = left.iter().map(|row| row.body.len() as u64).sum();
    let backlog = Backlog {
        node: "a".to_owned(),
        generation: Some(1),
        rows: 2,
        bytes,
        parked: 2,
        oldest: rows[0].created_at.min(rows[2].created_at),
    };
    assert_eq!(journal.load().await.unwrap().backlogs, [backlog]);
}

async fn repairs_come_and_go(url: &str) {
    let (journal, term) = start(url).await;
    let ids = vec![ODD.to_owned(), String::new(), "a".to_owned()];
    let full = RepairRow {
        ids: Some(ids),
        source: Some("b".to_owned()),
        source_marker: Some(ODD.to_owned()),
        reason: ODD.to_owned(),
        ..repair("a", Some(4), 1)
    };
    let none = RepairRow {
        ids: Some(Vec::new()),
        ..repair("a", Some(4), 2)
    };
    let (all, gone, namespace) = (repair("b", Some(5), 3), repair("b", Some(6), 4), repair("b", None, 5));
    let rows = [&full, &none, &all, &gone, &namespace];
    journal
        .commit(term, &rows.map(|row| Change::InsertRepair(row.clone())).into())
        .await
        .unwrap();
    assert_eq!(journal.load().await.unwrap().repairs, rows.map(Clone::clone));
    let changes = vec![
        Change::RemoveRepairs(vec![none.id, namespace.id, Uuid::new_v4()]),
        Change::RemoveRepairsOf(6),
    ];
    journal.commit(term, &changes).await.unwrap();
    assert_eq!(journal.load().await.unwrap().repairs, [full, all]);
}

async fn the_catalog_comes_back(url: &str) {
    let (journal, term) = start(url).await;
    let mut one = CollectionRecord {
        tenant: ODD.to_owned(),
        name: "n".to_owned(),
        ..collection(1)
    };
    let mut two = collection(2);
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    let long = DatabaseRecord {
        tenant: ODD.repeat(2000),
        name: "x".repeat(9000),
        client_id: Uuid::new_v4(),
    };
    let plain = DatabaseRecord {
        tenant: "t".to_owned(),
        name: "d".to_owned(),
        client_id: Uuid::new_v4(),
    };
    let other = DatabaseRecord {
        tenant: "t".to_owned(),
        name: "e".to_owned(),
        client_id: Uuid::new_v4(),
    };
    let changes = vec![
        Change::PutCollection(one.clone()),
        Change::PutNodeId {
            generation: 1,
            node: "a".to_owned(),
            id: Uuid::new_v4(),
        },
        Change::PutNodeId {
            generation: 1,
            node: "a".to_owned(),
            id: a,
        },
        Change::PutNodeId {
            generation: 1,
            node: ODD.to_owned(),
            id: b,
        },
        Change::PutCollection(two.clone()),
        Change::PutDatabase(long.clone()),
        Change::PutDatabase(DatabaseRecord {
            client_id: Uuid::new_v4(),
            ..plain.clone()
        }),
        Change::PutDatabase(plain.clone()),
        Change::PutDatabase(other.clone()),
        Change::RemoveDatabase {
            tenant: "t".to_owned(),
            name: "e".to_owned(),
        },
        Change::RemoveDatabase {
            tenant: "t".to_owned(),
            name: "never".to_owned(),
        },
        Change::PutTenant(ODD.to_owned()),
        Change::PutTenant("t".to_owned()),
        Change::PutTenant("t".to_owned()),
    ];
    journal.commit(term, &changes).await.unwrap();
    one.name = "renamed".to_owned();
    one.updated_at = now();
    two.node_ids = BTreeMap::from([("ignored".to_owned(), Uuid::new_v4())]);
    journal
        .commit(
            term,
            &vec![Change::PutCollection(one.clone()), Change::PutCollection(two.clone())],
        )
        .await
        .unwrap();
    one.node_ids = BTreeMap::from([("a".to_owned(), a), (ODD.to_owned(), b)]);
    two.node_ids.clear();
    let snapshot = journal.load().await.unwrap();
    assert_eq!(snapshot.collections, [one, two]);
    assert_eq!(snapshot.databases.len(), 2);
    assert!(snapshot.databases.contains(&long) && snapshot.databases.contains(&plain));
    assert_eq!(
        BTreeSet::from_iter(snapshot.tenants),
        BTreeSet::from([ODD.to_owned(), "t".to_owned()])
    );
}

async fn deleted_collections_stay_while_rows_speak_of_them(url: &str) {
    let (journal, term) = start(url).await;
    let mut changes = Vec::new();
    for generation in 1..=5 {
        changes.push(Change::PutCollection(CollectionRecord {
            deleted: generation != 1,
            ..collection(generation)
        }));
        changes.push(Change::PutNodeId {
            generation,
            node: "a".to_owned(),
            id: Uuid::new_v4(),
        });
    }
    let in_lane = payload("a", Some(2), 1);
    let op = Op::ModifyCollection {
        generation: 3,
        new_name: None,
    };
    let about = PayloadRow {
        op,
        ..payload("a", None, 2)
    };
    let repair = repair("a", Some(4), 3);
    let database = Op::DeleteDatabase {
        tenant: "t".to_owned(),
        name: "d".to_owned(),
    };
    let any = PayloadRow {
        op: database,
        ..payload("a", None, 4)
    };
    changes.push(Change::InsertPayload(in_lane.clone()));
    changes.push(Change::InsertPayload(about.clone()));
    changes.push(Change::InsertRepair(repair.clone()));
    journal.commit(term, &changes).await.unwrap();
    let generations = async || {
        let collections = journal.load().await.unwrap().collections;
        assert!(collections.iter().all(|collection| collection.node_ids.len() == 1));
        collections
            .iter()
            .map(|collection| collection.generation)
            .collect::<Vec<_>>()
    };
    assert_eq!(generations().await, [1, 2, 3, 4]);
    journal
        .commit(term, &vec![Change::InsertPayload(any.clone())])
        .await
        .unwrap();
    assert_eq!(
        generations().await,
        [1, 2, 3, 4, 5],
        "a deleted database may have held any of them"
    );
    let removal = vec![Change::RemovePayloads(vec![any.id, in_lane.id])];
    journal.commit(term, &removal).await.unwrap();
    assert_eq!(generations().await, [1, 3, 4]);
    let term = take(&journal, "purges").await;
    assert_eq!(generations().await, [1, 3, 4]);
    let removal = vec![
        Change::RemovePayloads(vec![about.id]),
        Change::RemoveRepairs(vec![repair.id]),
    ];
    journal.commit(term, &removal).await.unwrap();
    assert_eq!(generations().await, [1]);
}

async fn remove_everything_leaves_nothing(url: &str) {
    let (journal, term) = start(url).await;
    let kept = collection(2);
    let changes = vec![
        Change::PutCollection(collection(1)),
        Change::PutNodeId {
            generation: 1,
            node: "a".to_owned(),
            id: Uuid::new_v4(),
        },
        Change::PutDatabase(DatabaseRecord {
            tenant: "t".to_owned(),
            name: "d".to_owned(),
            client_id: Uuid::new_v4(),
        }),
        Change::PutTenant("t".to_owned()),
        Change::InsertPayload(payload("a", Some(1), 1)),
        Change::InsertPayload(payload("a", None, 2)),
        Change::InsertRepair(repair("a", Some(1), 3)),
        Change::RemoveEverything,
        Change::PutCollection(kept.clone()),
    ];
    journal.commit(term, &changes).await.unwrap();
    let snapshot = journal.load().await.unwrap();
    assert_eq!(snapshot.collections, [kept]);
    assert!(snapshot.databases.is_empty() && snapshot.tenants.is_empty());
    assert!(snapshot.repairs.is_empty() && snapshot.backlogs.is_empty());
}

async fn the_same_commit_twice_is_once(url: &str) {
    let (journal, term) = start(url).await;
    let rows: Vec<PayloadRow> = (1..=3).map(|lsn| payload("a", Some(1), lsn)).collect();
    let repair = repair("a", Some(1), 4);
    let mut commit: Vec<Change> = rows.iter().cloned().map(Change::InsertPayload).collect();
    commit.push(Change::InsertRepair(repair.clone()));
    commit.push(Change::PutCollection(collection(1)));
    commit.push(Change::PutNodeId {
        generation: 1,
        node: "a".to_owned(),
        id: Uuid::new_v4(),
    });
    commit.push(Change::RemovePayloads(vec![Uuid::new_v4()]));
    for _ in 0..3 {
        journal.commit(term, &commit).await.unwrap();
    }
    journal.commit(term, &commit[..1].to_vec()).await.unwrap();
    assert_eq!(journal.payloads("a", Some(1), 10, ALL).await.unwrap(), rows);
    let snapshot = journal.load().await.unwrap();
    assert_eq!(snapshot.repairs, [repair]);
    assert_eq!(snapshot.collections.len(), 1);
}

async fn a_commit_that_fails_at_its_end_writes_nothing(url: &str) {
    let (journal, term) = start(url).await;
    let first = payload("a", Some(1), 1);
    journal
        .commit(term, &vec![Change::InsertPayload(first.clone())])
        .await
        .unwrap();
    let taken = Change::InsertPayload(payload("a", Some(2), 2));
    let homeless = Change::PutNodeId {
        generation: 99,
        node: "a".to_owned(),
        id: Uuid::new_v4(),
    };
    for last in [taken, homeless] {
        let commit = vec![
            Change::InsertPayload(payload("a", Some(1), 2)),
            Change::InsertRepair(repair("a", Some(1), 3)),
            Change::PutCollection(collection(1)),
            Change::RemovePayloads(vec![first.id]),
            last,
        ];
        let error = journal.commit(term, &commit).await.unwrap_err();
        assert!(matches!(error, JournalError::Conflict(_)), "{error}");
        assert_eq!(
            journal.payloads("a", Some(1), 10, ALL).await.unwrap(),
            std::slice::from_ref(&first)
        );
        let snapshot = journal.load().await.unwrap();
        assert!(snapshot.repairs.is_empty() && snapshot.collections.is_empty());
    }
    journal
        .commit(term, &vec![Change::InsertPayload(payload("a", Some(1), 2))])
        .await
        .unwrap();
}

async fn a_dropped_commit_is_all_or_nothing(url: &str) {
    let (journal, mut term) = start(url).await;
    for round in 0..40 {
        let lsn = round * 1000;
        let mut commit: Vec<Change> = (lsn..lsn + 50)
            .map(|lsn| Change::InsertPayload(payload("a", Some(round), lsn)))
            .collect();
        commit.extend((0..20).map(|_| Change::CountAttempt(Uuid::new_v4())));
        commit.push(Change::InsertRepair(repair("a", Some(round), lsn)));
        let patience = Duration::from_micros(100 * u64::try_from(round * round).unwrap() / 4);
        let answer = tokio::time::timeout(patience, journal.commit(term, &commit)).await;
        // A new term waits for whatever the dropped commit still does.
        term = take(&journal, "test").await;
        let rows = journal.payloads("a", Some(round), 100, ALL).await.unwrap().len();
        let snapshot = journal.load().await.unwrap();
        let repairs = snapshot
            .repairs
            .iter()
            .filter(|row| row.generation == Some(round))
            .count();
        match answer {
            Ok(answer) => {
                answer.unwrap();
                assert_eq!((rows, repairs), (50, 1));
            }
            Err(_) => assert!(
                (rows, repairs) == (0, 0) || (rows, repairs) == (50, 1),
                "{rows} rows, {repairs} repairs"
            ),
        }
    }
}

async fn an_older_term_is_refused(url: &str) {
    let (first, old) = start(url).await;
    // A SQLite file has one process, and so one journal.
    let second = if url.starts_with("postgres") {
        open(url, 2).await.unwrap()
    } else {
        Arc::clone(&first)
    };
    let row = |lsn| vec![Change::InsertPayload(payload("a", None, lsn))];
    first.commit(old, &row(1)).await.unwrap();
    let new = take(&second, "second").await;
    assert!(new > old);
    for _ in 0..3 {
        let error = first.commit(old, &row(2)).await.unwrap_err();
        assert!(
            matches!(error, JournalError::Fenced { found, ours } if (found, ours) == (new, old)),
            "{error}"
        );
    }
    assert!(matches!(
        first.commit(old, &vec![]).await,
        Err(JournalError::Fenced { .. })
    ));
    assert!(matches!(
        first.commit(new + 1, &row(2)).await,
        Err(JournalError::Fenced { .. })
    ));
    second.commit(new, &row(3)).await.unwrap();
    let lsns: Vec<Lsn> = second
        .payloads("a", None, 10, ALL)
        .await
        .unwrap()
        .iter()
        .map(|row| row.lsn)
        .collect();
    assert_eq!(lsns, [1, 3]);
    assert!(first_lsn(new) > first_lsn(old));
}

async fn a_new_term_is_the_end_of_the_older(url: &str) {
    let (journal, old) = start(url).await;
    let (lsn, enough) = (Arc::new(AtomicI64::new(0)), Arc::new(Notify::new()));
    let mut writers = JoinSet::new();
    for _ in 0..4 {
        let (journal, lsn, enough) = (Arc::clone(&journal), Arc::clone(&lsn), Arc::clone(&enough));
        writers.spawn(async move {
            loop {
                let next = lsn.fetch_add(1, Ordering::Relaxed);
                if next == 50 {
                    enough.notify_one();
                }
                match journal
                    .commit(old, &vec![Change::InsertPayload(payload("a", Some(1), next))])
                    .await
                {
                    Ok(()) => (),
                    Err(JournalError::Fenced { .. }) => return,
                    Err(error) => panic!("{error}"),
                }
            }
        });
    }
    enough.notified().await;
    take(&journal, "successor").await;
    let taken_over = journal.payloads("a", Some(1), ALL, ALL).await.unwrap();
    writers.join_all().await;
    assert!(taken_over.len() >= 40);
    assert!(journal.payloads("a", Some(1), ALL, ALL).await.unwrap() == taken_over);
}

async fn large_commits_work(url: &str) {
    let (journal, term) = start(url).await;
    let rows: Vec<PayloadRow> = (1..=5000).map(|lsn| payload("a", Some(1), lsn)).collect();
    journal
        .commit(term, &rows.iter().cloned().map(Change::InsertPayload).collect())
        .await
        .unwrap();
    assert!(journal.payloads("a", Some(1), 10_000, ALL).await.unwrap() == rows);
    let ids = (0..200_000).map(|id| format!("record-{id}")).collect();
    let repair = RepairRow {
        ids: Some(ids),
        ..repair("a", Some(1), 1)
    };
    let removed = rows.iter().map(|row| row.id).collect();
    let commit = vec![Change::RemovePayloads(removed), Change::InsertRepair(repair.clone())];
    journal.commit(term, &commit).await.unwrap();
    let snapshot = journal.load().await.unwrap();
    assert!(snapshot.repairs == [repair]);
    assert!(snapshot.backlogs.is_empty());
}

async fn commits_side_by_side_all_arrive(url: &str) {
    let (journal, term) = start(url).await;
    let mut tasks = JoinSet::new();
    for lane in 0..16 {
        let journal = Arc::clone(&journal);
        tasks.spawn(async move {
            for lsn in 0..20 {
                let row = payload("a", Some(lane), lane * 1000 + lsn);
                journal.commit(term, &vec![Change::InsertPayload(row)]).await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    let backlogs = journal.load().await.unwrap().backlogs;
    assert_eq!(backlogs.len(), 16);
    assert!(backlogs.iter().all(|backlog| backlog.rows == 20));
}

async fn it_opens_again_with_all_that_was_there(url: &str) {
    let (journal, term) = start(url).await;
    let row = payload("a", Some(1), 1);
    let collection = collection(1);
    let commit = vec![
        Change::PutCollection(collection.clone()),
        Change::InsertPayload(row.clone()),
    ];
    journal.commit(term, &commit).await.unwrap();
    drop(journal);
    let (journal, next) = start(url).await;
    assert_eq!(next, term + 1);
    assert_eq!(journal.load().await.unwrap().collections, [collection]);
    assert_eq!(journal.payloads("a", Some(1), 10, ALL).await.unwrap(), [row]);
}

#[tokio::test]
async fn a_sqlite_file_has_one_journal() {
    let (_folder, url) = sqlite();
    let (journal, _) = start(&url).await;
    let error = open(&url, 1).await.err().unwrap().to_string();
    assert!(error.contains("in use by another Diptych"), "{error}");
    drop(journal);
    open(&url, 1).await.unwrap();
}

#[tokio::test]
async fn unknown_urls_are_refused_without_repeating_them() {
    for url in [
        "mysql://u:do-not-tell@h/d",
        "do-not-tell",
        "",
        "sqlite::memory:",
        "postgres://u:do-not-tell@h:port/d",
    ] {
        let error = open(url, 1).await.err().unwrap();
        assert!(matches!(error, JournalError::Refused(_)));
        assert!(!format!("{error} {error:?}").contains(PASSWORD), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sqlite_journal_survives_kill_9_of_its_process() {
    let (_folder, url) = sqlite();
    for round in 0..3 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["writes_until_it_is_killed", "--exact", "--ignored", "--nocapture"])
            .env("JOURNAL_TEST_URL", &url)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let acknowledged = |line: Result<String, _>| line.ok()?.strip_prefix("written ")?.parse::<Lsn>().ok();
        let mut lines = BufReader::new(child.stdout.take().unwrap())
            .lines()
            .filter_map(acknowledged);
        let mut written: Vec<Lsn> = lines.by_ref().take(30).collect();
        child.kill().unwrap();
        written.extend(lines);
        child.wait().unwrap();
        assert!(written.len() >= 30);
        let (journal, _) = start(&url).await;
        let found: Vec<Lsn> = journal
            .payloads("a", Some(1), ALL, ALL)
            .await
            .unwrap()
            .iter()
            .map(|row| row.lsn)
            .collect();
        assert!(written.iter().all(|lsn| found.contains(lsn)), "round {round}");
    }
}

#[tokio::test]
#[ignore = "the victim of a_sqlite_journal_survives_kill_9_of_its_process"]
async fn writes_until_it_is_killed() {
    let Ok(url) = std::env::var("JOURNAL_TEST_URL") else {
        return;
    };
    let (journal, term) = start(&url).await;
    for lsn in first_lsn(term).. {
        journal
            .commit(term, &vec![Change::InsertPayload(payload("a", Some(1), lsn))])
            .await
            .unwrap();
        println!("\nwritten {lsn}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_comes_back_without_help() {
    let Some(cluster) = Cluster::create() else { return };
    let url = cluster.database().await;
    let (journal, term) = start(&url).await;
    let row = |lsn| vec![Change::InsertPayload(payload("a", None, lsn))];
    journal.commit(term, &row(1)).await.unwrap();

    cluster.stop();
    let errors = [
        journal.ping().await.unwrap_err(),
        journal.commit(term, &row(2)).await.unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, JournalError::Refused(_)), "{error}");
        assert!(!error.to_string().contains(PASSWORD));
    }
    assert!(matches!(open(&url, 1).await, Err(JournalError::Refused(_))));
    cluster.start();
    journal.commit(term, &row(3)).await.unwrap();
    journal.ping().await.unwrap();

    cluster.freeze();
    let error = journal.commit(term, &row(4)).await.unwrap_err();
    assert!(matches!(error, JournalError::Refused(_)), "{error}");
    cluster.thaw();
    journal.commit(term, &row(5)).await.unwrap();
    let lsns: Vec<Lsn> = journal
        .payloads("a", None, 10, ALL)
        .await
        .unwrap()
        .iter()
        .map(|row| row.lsn)
        .collect();
    assert_eq!(lsns, [1, 3, 5]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_database_may_have_other_migrations() {
    let Some(cluster) = Cluster::shared() else { return };
    let url = cluster.database().await;
    let pool = sqlx::PgPool::connect(&url).await.unwrap();
    sqlx::raw_sql("CREATE TABLE _sqlx_migrations (other TEXT); CREATE TABLE lease (other TEXT)")
        .execute(&pool)
        .await
        .unwrap();
    start(&url).await;
    start(&url).await;
}

/// What the writers of one round saw, by commit.
#[derive(Default)]
struct Seen {
    written: Vec<Change>,
    refused: Vec<Change>,
    uncertain: Vec<Change>,
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_killed_during_commits_keeps_its_word() {
    let Some(cluster) = Cluster::create() else { return };
    let (journal, term) = start(&cluster.database().await).await;
    let lsn = Arc::new(AtomicI64::new(first_lsn(term)));
    for round in 0..4 {
        let (count, enough) = (Arc::new(AtomicU32::new(0)), Arc::new(Notify::new()));
        let mut writers = JoinSet::new();
        for _ in 0..8 {
            let (journal, lsn) = (Arc::clone(&journal), Arc::clone(&lsn));
            let (count, enough) = (Arc::clone(&count), Arc::clone(&enough));
            writers.spawn(async move {
                let mut seen = Seen::default();
                while seen.refused.is_empty() && seen.uncertain.is_empty() {
                    let change = Change::InsertPayload(payload("a", Some(1), lsn.fetch_add(1, Ordering::Relaxed)));
                    match journal.commit(term, &vec![change.clone()]).await {
                        Ok(()) => seen.written.push(change),
                        Err(JournalError::Refused(_)) => seen.refused.push(change),
                        Err(JournalError::Uncertain(_)) => seen.uncertain.push(change),
                        Err(fenced) => panic!("{fenced}"),
                    }
                    if count.fetch_add(1, Ordering::Relaxed) == 40 * (round + 1) {
                        enough.notify_one();
                    }
                }
                seen
            });
        }
        enough.notified().await;
        cluster.kill();
        let round = writers.join_all().await;
        cluster.start();
        let present = async || {
            let rows = journal.payloads("a", Some(1), ALL, ALL).await.unwrap();
            rows.into_iter().map(Change::InsertPayload).collect::<Vec<_>>()
        };
        let found = present().await;
        assert!(
            round
                .iter()
                .flat_map(|seen| &seen.written)
                .all(|change| found.contains(change))
        );
        assert!(
            !round
                .iter()
                .flat_map(|seen| &seen.refused)
                .any(|change| found.contains(change))
        );
        let uncertain: Vec<Change> = round.into_iter().flat_map(|seen| seen.uncertain).collect();
        journal.commit(term, &uncertain).await.unwrap();
        let found = present().await;
        assert!(
            uncertain
                .iter()
                .all(|change| found.iter().filter(|other| *other == change).count() == 1)
        );
    }
}
