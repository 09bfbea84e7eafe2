//! Promises about what healing needs: nodes, suspects, repair rows that change, intents and their rotation.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use chrono::TimeDelta;
use diptych::journal::{
    Change, CollectionRecord, Commit, EventRecord, Holder, Intent, Journal, JournalError, Lsn, MaintenanceRecord,
    NodeRecord, PayloadRow, RepairKind, RepairRow, Snapshot, SuspectRow, open,
};
use sqlx::migrate::Migrator;
use sqlx::{Connection, Executor, PgConnection, SqliteConnection};
use uuid::Uuid;

use super::{ALL, Cluster, ODD, collection, every_op, now, payload, repair, start, take};

fn intent(lsn: Lsn) -> Intent {
    Intent {
        lsn,
        generation: Some(1),
        op: diptych::chroma::Op::Upsert,
        ids: Some(vec![format!("record-{lsn}")]),
        body: None,
    }
}

fn intend(lsns: impl IntoIterator<Item = Lsn>) -> Commit {
    lsns.into_iter().map(|lsn| Change::Intend(intent(lsn))).collect()
}

fn suspect(generation: i64, number: i64) -> SuspectRow {
    SuspectRow {
        id: Uuid::new_v4(),
        node: ODD.to_owned(),
        generation,
        ids: vec![ODD.to_owned(), String::new()],
        step: 0,
        due_at: now() + TimeDelta::seconds(number),
    }
}

async fn lsns(journal: &Arc<dyn Journal>) -> Vec<Lsn> {
    let intents = journal.intents(0, usize::MAX).await.unwrap();
    intents.iter().map(|intent| intent.lsn).collect()
}

async fn loaded(journal: &Arc<dyn Journal>) -> (Lsn, Vec<Lsn>) {
    let Snapshot { low_water, intents, .. } = journal.load().await.unwrap();
    (low_water, intents.iter().map(|intent| intent.lsn).collect())
}

pub async fn repairs_keep_their_kind_and_are_parked(url: &str) {
    let (journal, term) = start(url).await;
    let rows: Vec<RepairRow> = RepairKind::ALL
        .into_iter()
        .zip(1..)
        .map(|(kind, lsn)| RepairRow {
            kind,
            reversible: lsn % 2 == 0,
            parked: (lsn == 3).then(|| ODD.to_owned()),
            ..repair("a", Some(1), lsn)
        })
        .collect();
    let commit = rows.iter().cloned().map(Change::InsertRepair).collect();
    journal.commit(term, &commit).await.unwrap();
    assert_eq!(journal.load().await.unwrap().repairs, rows);
    let changes = vec![
        Change::ParkRepair {
            id: rows[0].id,
            reason: ODD.to_owned(),
        },
        Change::ParkRepair {
            id: Uuid::new_v4(),
            reason: "nobody".to_owned(),
        },
        Change::UnparkRepair(rows[2].id),
        Change::UnparkRepair(Uuid::new_v4()),
    ];
    for _ in 0..2 {
        journal.commit(term, &changes).await.unwrap();
        let found = journal.load().await.unwrap().repairs;
        let parked: Vec<_> = found.iter().map(|row| row.parked.as_deref()).collect();
        assert_eq!(parked, [Some(ODD), None, None, None]);
    }
}

pub async fn maintenance_lasts_until_it_is_ended(url: &str) {
    let (journal, term) = start(url).await;
    let record = |node: &str, who: &str| MaintenanceRecord {
        node: node.to_owned(),
        since: now(),
        who: who.to_owned(),
    };
    let (first, second) = (record(ODD, "alice"), record(ODD, ODD));
    let put = |record: &MaintenanceRecord| vec![Change::PutMaintenance(record.clone())];
    journal.commit(term, &put(&first)).await.unwrap();
    assert_eq!(journal.load().await.unwrap().maintenance, [first]);
    journal.commit(term, &put(&second)).await.unwrap();
    journal.commit(term, &vec![Change::RemoveEverything]).await.unwrap();
    assert_eq!(journal.load().await.unwrap().maintenance, [second]);
    let end = |node: &str| vec![Change::EndMaintenance { node: node.to_owned() }];
    journal.commit(term, &end("a")).await.unwrap();
    assert_eq!(journal.load().await.unwrap().maintenance.len(), 1, "another node");
    journal.commit(term, &end(ODD)).await.unwrap();
    assert_eq!(journal.load().await.unwrap().maintenance, []);
}

pub async fn events_are_kept_in_order_and_bounded(url: &str) {
    let (journal, term) = start(url).await;
    let event = |id: i64| EventRecord {
        id,
        at: now(),
        kind: "verb".to_owned(),
        node: (id % 2 == 0).then(|| ODD.to_owned()),
        who: (id % 3 == 0).then(|| ODD.to_owned()),
        what: ODD.to_owned(),
    };
    let all: Vec<EventRecord> = (1..=9).map(event).collect();
    let ids = |events: &[EventRecord]| events.iter().map(|event| event.id).collect::<Vec<_>>();
    let insert = vec![Change::InsertEvents(all.clone())];
    for _ in 0..2 {
        journal.commit(term, &insert).await.unwrap();
    }
    let mut newest = all.clone();
    newest.reverse();
    assert_eq!(journal.events(i64::MAX, 100).await.unwrap(), newest);
    assert_eq!(ids(&journal.events(5, 2).await.unwrap()), [4, 3]);
    for (keep, left) in [(20, 9), (9, 9), (4, 4)] {
        journal.commit(term, &vec![Change::TrimEvents { keep }]).await.unwrap();
        assert_eq!(ids(&journal.events(i64::MAX, 100).await.unwrap()), ids(&newest[..left]));
    }
}

pub async fn parked_rows_are_taken_up_or_dropped(url: &str) {
    let (journal, term) = start(url).await;
    let rows: Vec<PayloadRow> = (1..=4)
        .map(|lsn| PayloadRow {
            attempts: 3,
            parked: Some("test".to_owned()),
            ..payload("a", Some(1), lsn)
        })
        .collect();
    let namespace = payload("a", None, 2);
    let namespace = PayloadRow { lsn: 5, ..namespace };
    let later = payload("a", None, 9);
    let others = [
        payload("a", Some(2), 6),
        payload("b", Some(1), 1),
        payload("b", None, 2),
    ];
    let all = rows.iter().chain([&namespace, &later]).chain(&others);
    let commit = all.clone().cloned().map(Change::InsertPayload).collect();
    journal.commit(term, &commit).await.unwrap();
    for row in all {
        assert_eq!(journal.payload(row.id).await.unwrap().as_ref(), Some(row));
    }
    assert_eq!(journal.payload(Uuid::new_v4()).await.unwrap(), None);

    let drop = |generation, upto| Change::RemoveBacklog {
        node: "a".to_owned(),
        generation,
        upto,
    };
    let changes = vec![
        Change::Unpark(rows[2].id),
        drop(Some(1), 2),
        drop(None, 5),
        Change::Unpark(Uuid::new_v4()),
    ];
    for _ in 0..2 {
        journal.commit(term, &changes).await.unwrap();
        let free = PayloadRow {
            attempts: 0,
            parked: None,
            ..rows[2].clone()
        };
        let left = journal.payloads("a", Some(1), 10, ALL).await.unwrap();
        assert_eq!(left, [free, rows[3].clone()]);
        assert_eq!(
            journal.payloads("a", None, 10, ALL).await.unwrap(),
            std::slice::from_ref(&later)
        );
        let backlogs = journal.load().await.unwrap().backlogs;
        assert_eq!(backlogs.iter().map(|backlog| backlog.rows).sum::<u64>(), 6);
    }
}

pub async fn a_row_is_told_that_another_node_refused_its_entry(url: &str) {
    let (journal, term) = start(url).await;
    let rows = [
        payload(ODD, Some(1), 1),
        payload(ODD, Some(1), 2),
        payload(ODD, None, 3),
        payload(ODD, None, 4),
        payload("b", Some(1), 1),
    ];
    let insert = rows.iter().cloned().map(Change::InsertPayload).collect();
    journal.commit(term, &insert).await.unwrap();
    let refused = |lsn| Change::MarkRefused {
        node: ODD.to_owned(),
        lsn,
    };
    let marks = [1, 4, 9].map(refused).to_vec();
    for _ in 0..2 {
        journal.commit(term, &marks).await.unwrap();
        let mut found = vec![];
        for row in &rows {
            found.push(journal.payload(row.id).await.unwrap().unwrap().refused);
        }
        assert_eq!(found, [true, false, false, true, false]);
    }
}

pub async fn nodes_are_remembered_and_their_ids_forgotten(url: &str) {
    let (journal, term) = start(url).await;
    let node = |node: &str, marker: &str, checkpoint| NodeRecord {
        node: node.to_owned(),
        marker: marker.to_owned(),
        checkpoint,
    };
    let mut changes = vec![
        Change::PutNode(node("b", "first", i64::MAX)),
        Change::PutNode(node(ODD, ODD, 7)),
        Change::PutNode(node("b", "second", 3)),
    ];
    for generation in 1..=2 {
        changes.push(Change::PutCollection(collection(generation)));
        changes.extend(["b", ODD].map(|node| Change::PutNodeId {
            generation,
            node: node.to_owned(),
            id: Uuid::new_v4(),
        }));
    }
    changes.push(Change::ForgetNodeIds { node: ODD.to_owned() });
    journal.commit(term, &changes).await.unwrap();
    let snapshot = journal.load().await.unwrap();
    assert_eq!(snapshot.nodes, [node("b", "second", 3), node(ODD, ODD, 7)]);
    let has_b = |one: &CollectionRecord| one.node_ids.keys().eq(["b"]);
    assert_eq!(snapshot.collections.len(), 2);
    assert!(snapshot.collections.iter().all(has_b));

    journal.commit(term, &vec![Change::RemoveEverything]).await.unwrap();
    assert_eq!(
        journal.load().await.unwrap().nodes,
        snapshot.nodes,
        "they are what they were"
    );
}

pub async fn suspects_come_and_go(url: &str) {
    let (journal, term) = start(url).await;
    let mut rows: Vec<SuspectRow> = (1..=4).map(|number| suspect(number, number)).collect();
    let put = |rows: &[SuspectRow]| rows.iter().cloned().map(Change::PutSuspect).collect::<Commit>();
    journal.commit(term, &put(&rows)).await.unwrap();
    assert_eq!(journal.load().await.unwrap().suspects, rows);
    rows[3].step = i32::MAX;
    rows[3].ids = vec![];
    journal.commit(term, &put(&rows)).await.unwrap();
    assert_eq!(journal.load().await.unwrap().suspects, rows);
    let changes = vec![
        Change::RemoveSuspects(vec![rows[0].id, Uuid::new_v4()]),
        Change::RemoveSuspects(vec![]),
        Change::RemoveRepairsOf(2),
    ];
    journal.commit(term, &changes).await.unwrap();
    assert_eq!(journal.load().await.unwrap().suspects, rows[2..]);
    journal.commit(term, &vec![Change::RemoveEverything]).await.unwrap();
    assert_eq!(journal.load().await.unwrap().suspects, []);
}

pub async fn intents_come_back_as_they_were(url: &str) {
    let (journal, term) = start(url).await;
    let mut intents: Vec<Intent> = every_op()
        .into_iter()
        .zip(1..)
        .map(|(op, lsn)| Intent {
            lsn,
            generation: op.is_record().then_some(i64::MAX),
            ids: op.is_record().then(|| vec![ODD.to_owned(), String::new()]),
            body: (lsn % 3 == 0).then(|| Bytes::from(vec![b'\0'; usize::try_from(lsn).unwrap() << 10])),
            op,
        })
        .collect();
    intents.push(Intent {
        ids: Some((0..5000).map(|id| format!("record-{id}")).collect()),
        body: Some(Bytes::new()),
        ..intent(100)
    });
    let alone = intents.len() / 2;
    let commit = |intents: &[Intent]| intents.iter().cloned().map(Change::Intend).collect::<Commit>();
    for part in [&intents[alone..=alone], &intents[..], &intents[..3]] {
        journal.commit(term, &commit(part)).await.unwrap();
    }
    let different = Intent {
        body: None,
        ..intents[2].clone()
    };
    journal.commit(term, &vec![Change::Intend(different)]).await.unwrap();
    assert_eq!(journal.intents(0, usize::MAX).await.unwrap(), intents);
    assert_eq!(journal.intents(3, 4).await.unwrap(), intents[3..7]);
    assert_eq!(journal.intents(100, 4).await.unwrap(), []);
    journal.commit(term, &vec![Change::SetLowWater(5)]).await.unwrap();
    assert_eq!(journal.load().await.unwrap().intents, intents[5..]);
    journal.commit(term, &vec![Change::RemoveEverything]).await.unwrap();
    assert_eq!(journal.load().await.unwrap().intents, intents[5..]);
}

pub async fn the_low_water_mark_never_moves_back(url: &str) {
    let (journal, term) = start(url).await;
    assert_eq!(loaded(&journal).await, (0, vec![]));
    journal.commit(term, &intend(1..=5)).await.unwrap();
    for (mark, expected) in [(3, 3), (2, 3), (3, 3), (4, 4)] {
        journal.commit(term, &vec![Change::SetLowWater(mark)]).await.unwrap();
        assert_eq!(loaded(&journal).await, (expected, (expected + 1..=5).collect()));
    }
    // Nor does it when the tables go that its marks lie in, or marks come that are older than those.
    for covered in [4, 5, 5, 5] {
        journal.rotate_intents(term, covered).await.unwrap();
        assert_eq!(loaded(&journal).await.0, 4);
    }
    assert_eq!(lsns(&journal).await, Vec::<Lsn>::new());
    journal.commit(term, &vec![Change::SetLowWater(2)]).await.unwrap();
    journal.rotate_intents(term, 5).await.unwrap();
    assert_eq!(loaded(&journal).await.0, 4);
    drop(journal);
    let (journal, _) = start(url).await;
    assert_eq!(loaded(&journal).await.0, 4);
}

pub async fn rotation_drops_what_is_covered_and_nothing_else(url: &str) {
    let (journal, term) = start(url).await;
    let rotate = async |covered| journal.rotate_intents(term, covered).await.unwrap();
    rotate(0).await;
    journal.commit(term, &intend(1..=30)).await.unwrap();
    rotate(29).await;
    rotate(29).await;
    assert_eq!(lsns(&journal).await, (1..=30).collect::<Vec<_>>());
    rotate(30).await;
    // They are on both sides now, some of them twice.
    journal.commit(term, &intend(25..=40)).await.unwrap();
    assert_eq!(lsns(&journal).await, (1..=40).collect::<Vec<_>>());
    let some = journal.intents(23, 5).await.unwrap();
    assert_eq!(some, (24..=28).map(intent).collect::<Vec<_>>());
    rotate(29).await;
    assert_eq!(lsns(&journal).await, (1..=40).collect::<Vec<_>>());
    rotate(30).await;
    assert_eq!(lsns(&journal).await, (25..=40).collect::<Vec<_>>());
    rotate(40).await;
    journal.commit(term, &intend(41..=42)).await.unwrap();
    rotate(41).await;
    assert_eq!(lsns(&journal).await, [41, 42]);
    let error = journal.rotate_intents(term - 1, 42).await.unwrap_err();
    assert!(matches!(error, JournalError::Fenced { .. }), "{error}");
    assert_eq!(lsns(&journal).await, [41, 42]);
}

/// While a node is away nothing is covered; what comes then must not keep what came before.
pub async fn full_tables_are_left_before_they_are_covered(url: &str) {
    let (journal, term) = start(url).await;
    let first: Vec<Lsn> = (1..=21_000).collect();
    journal.commit(term, &intend(first.clone())).await.unwrap();
    journal.rotate_intents(term, 0).await.unwrap();
    journal.commit(term, &intend(21_001..=21_002)).await.unwrap();
    journal.rotate_intents(term, 20_999).await.unwrap();
    assert_eq!(lsns(&journal).await.len(), 21_002);
    journal.rotate_intents(term, 21_000).await.unwrap();
    assert_eq!(lsns(&journal).await, [21_001, 21_002]);
}

pub async fn rotation_during_commits_loses_nothing(url: &str) {
    const LAG: Lsn = 40;
    let (journal, term) = start(url).await;
    let done = Arc::new(AtomicI64::new(0));
    let writer = {
        let (journal, done) = (Arc::clone(&journal), Arc::clone(&done));
        tokio::spawn(async move {
            for lsn in 1..=300 {
                let mut commit = intend([lsn]);
                commit.push(Change::SetLowWater(lsn - LAG));
                journal.commit(term, &commit).await.unwrap();
                done.store(lsn, Ordering::SeqCst);
            }
        })
    };
    while !writer.is_finished() {
        let before = done.load(Ordering::SeqCst);
        let covered = before - LAG;
        journal.rotate_intents(term, covered).await.unwrap();
        let (low_water, found) = loaded(&journal).await;
        assert!(low_water >= covered);
        assert!(found.is_sorted());
        assert!(
            (low_water + 1..=before).all(|lsn| found.contains(&lsn)),
            "{covered} {before} {found:?}"
        );
    }
    writer.await.unwrap();
    journal.rotate_intents(term, 300).await.unwrap();
    journal.rotate_intents(term, 300).await.unwrap();
    journal.rotate_intents(term, 300).await.unwrap();
    assert_eq!(lsns(&journal).await, Vec::<Lsn>::new());
    assert_eq!(loaded(&journal).await.0, 300 - LAG);
}

pub async fn the_own_term_is_raised(url: &str) {
    let (journal, term) = start(url).await;
    let nobody = Holder::named("test");
    assert_eq!(journal.raise_term(&nobody, term, term + 7).await.unwrap(), term + 7);
    let term = term + 7;
    assert_eq!(
        journal.raise_term(&nobody, term, term - 3).await.unwrap(),
        term,
        "never back"
    );
    journal.commit(term, &intend([1])).await.unwrap();
    for ours in [term - 7, term + 1] {
        let error = journal.raise_term(&nobody, ours, term + 9).await.unwrap_err();
        assert!(
            matches!(error, JournalError::Fenced { found, ours: o } if (found, o) == (term, ours)),
            "{error}"
        );
    }
    let error = journal.commit(term - 7, &intend([2])).await.unwrap_err();
    assert!(matches!(error, JournalError::Fenced { .. }), "{error}");
    assert_eq!(lsns(&journal).await, [1]);
    assert_eq!(take(&journal, "next").await, term + 1);
}

pub async fn a_journal_of_the_first_version_is_taken_over(url: &str) {
    let id = Uuid::new_v4();
    let sql = |generation: i64, id: &str, ids: &str, time: &str| {
        format!(
            "UPDATE diptych_lease SET term = 5; \
             INSERT INTO diptych_collections VALUES ({generation}, '{id}', 't', 'd', 'n', FALSE, '{time}', '{time}'); \
             INSERT INTO diptych_repair_rows (id, node, generation, ids, source, lsn, reason, created_at) \
             VALUES ('{id}', 'a', {generation}, {ids}, 'b', 2, 'r', '{time}')"
        )
    };
    let time = now();
    let text = time.to_rfc3339_opts(chrono::SecondsFormat::Micros, true);
    let other = Uuid::new_v4();
    let script = [
        sql(1, &id.to_string(), "NULL", &text),
        sql(2, &other.to_string(), "'[\"x\"]'", &text),
    ]
    .join(";");
    let script = sqlx::AssertSqlSafe(script);
    if url.starts_with("postgres") {
        let mut connection = PgConnection::connect(url).await.unwrap();
        let first = first_version(sqlx::migrate!("migrations/postgres"));
        first.run_direct(None, &mut connection, false).await.unwrap();
        connection.execute(sqlx::raw_sql(script)).await.unwrap();
    } else {
        let mut connection = SqliteConnection::connect(&format!("{url}?mode=rwc")).await.unwrap();
        let first = first_version(sqlx::migrate!("migrations/sqlite"));
        first.run_direct(None, &mut connection, false).await.unwrap();
        connection.execute(sqlx::raw_sql(script)).await.unwrap();
        connection.close().await.unwrap();
    }
    let (journal, term) = start(url).await;
    assert_eq!(term, 6);
    let snapshot = journal.load().await.unwrap();
    let row = |id, generation, kind, ids| RepairRow {
        id,
        kind,
        ids,
        source: Some("b".to_owned()),
        reason: "r".to_owned(),
        created_at: time,
        ..repair("a", Some(generation), 2)
    };
    let mut expected = vec![
        row(id, 1, RepairKind::Whole, None),
        row(other, 2, RepairKind::Records, Some(vec!["x".to_owned()])),
    ];
    expected.sort_by_key(|row| row.id);
    assert_eq!(snapshot.repairs, expected);
    assert_eq!(snapshot.collections.len(), 2);
    assert_eq!(snapshot.collections[0].node_ids, BTreeMap::new());
    assert_eq!(
        (snapshot.low_water, snapshot.intents.len(), snapshot.nodes.len()),
        (0, 0, 0)
    );
    journal.commit(term, &intend([1])).await.unwrap();
    drop(journal);
    open(url, 1).await.unwrap();
}

fn first_version(mut migrations: Migrator) -> Migrator {
    migrations.dangerous_set_table_name("diptych_migrations");
    migrations.migrations.to_mut().truncate(1);
    migrations
}

/// `pg_dump` and long transactions read every table for hours: nothing may queue behind a lock that they keep us from.
#[tokio::test(flavor = "multi_thread")]
async fn s26_a_dump_that_takes_hours_blocks_no_write() {
    let Some(cluster) = Cluster::shared() else { return };
    let url = cluster.database().await;
    let (journal, term) = start(&url).await;
    journal.commit(term, &intend(1..=50)).await.unwrap();
    journal.commit(term, &vec![Change::SetLowWater(50)]).await.unwrap();
    journal
        .commit(term, &vec![Change::InsertPayload(payload("a", Some(1), 1))])
        .await
        .unwrap();

    let mut dump = PgConnection::connect(&url).await.unwrap();
    dump.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        .await
        .unwrap();
    let tables: Vec<String> =
        sqlx::query_scalar("SELECT tablename FROM pg_tables WHERE tablename LIKE 'diptych%' ORDER BY 1")
            .fetch_all(&mut dump)
            .await
            .unwrap();
    assert!(tables.len() >= 10);
    for table in tables {
        let lock = format!("LOCK TABLE {table} IN ACCESS SHARE MODE");
        dump.execute(sqlx::AssertSqlSafe(lock)).await.unwrap();
    }

    journal.rotate_intents(term, 50).await.unwrap();
    let rotations = tokio::spawn({
        let journal = Arc::clone(&journal);
        async move {
            // Inserts have moved on, and each call tries to drop what they left.
            for _ in 0..10 {
                let call = tokio::time::timeout(Duration::from_secs(2), journal.rotate_intents(term, 50));
                call.await.expect("it does not wait for long").unwrap();
            }
        }
    });
    let mut written = vec![];
    while !rotations.is_finished() {
        let lsn = 51 + i64::try_from(written.len()).unwrap();
        let mut commit = intend([lsn]);
        commit.push(Change::SetLowWater(lsn));
        let call = tokio::time::timeout(Duration::from_secs(2), journal.commit(term, &commit));
        call.await.expect("it does not queue").unwrap();
        written.push(lsn);
    }
    rotations.await.unwrap();
    assert!(written.len() > 10, "{}", written.len());
    assert!(lsns(&journal).await.into_iter().eq((1..=50).chain(written)));

    let held: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM diptych_intents_a")
        .fetch_one(&mut dump)
        .await
        .unwrap();
    assert_eq!(held, 50, "the dump sees what it saw");
    dump.execute("ROLLBACK").await.unwrap();
    journal.rotate_intents(term, 50).await.unwrap();
    assert_eq!(lsns(&journal).await[0], 51);
}

pub async fn a_term_that_was_raised_is_raised_when_its_answer_was_lost(url: &str) {
    let journal = open(url, 4).await.unwrap();
    let with_file = |file: &str| Holder {
        lock_file: Some(file.to_owned()),
        ..Holder::named("test")
    };
    let ours = with_file("/ours.lock");
    let term = journal.take_term(&ours, None).await.unwrap();
    for _ in 0..2 {
        assert_eq!(journal.raise_term(&ours, term, term + 7).await.unwrap(), term + 7);
    }
    // Another process, or one of which nobody can tell, and another position are not ours.
    for (holder, to) in [(with_file("/other.lock"), 7), (Holder::named("test"), 7), (ours, 8)] {
        let error = journal.raise_term(&holder, term, term + to).await.unwrap_err();
        assert!(matches!(error, JournalError::Fenced { .. }), "{error}");
    }
}
