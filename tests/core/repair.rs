//! Nodes are made equal again.

use std::sync::Arc;

use diptych::catalog::Collection;
use diptych::chroma::RecordWrite;
use diptych::config::Heal;
use diptych::journal::{Change, Commit, RepairKind};
use diptych::mirror::{RepairWanted, Scope};
use diptych::repair::jobs;
use serde_json::{Value, json};

use crate::fakes::{
    A, ALWAYS, B, CommitFault, DATABASE, DISK_FULL, Fault, Gate, REFUSED, Stage, TENANT, rows, seconds, value,
};

fn removes_repairs(commit: &Commit) -> bool {
    commit.iter().any(|change| matches!(change, Change::RemoveRepairs(_)))
}

impl Stage {
    /// Changes one node's copy of a collection behind everybody's back.
    fn tamper(&self, node: usize, name: &str, kind: RecordWrite, body: Value) {
        self.nodes[node].with(|chroma| chroma.tamper(name, kind, body));
    }

    /// Writes a repair row, as something that found a need for it does.
    async fn want(&self, collection: &Arc<Collection>, node: usize, wanted: RepairWanted) {
        let scope = Scope::Collection(collection.clone());
        assert!(jobs::want(&self.core, &scope, node, wanted).await);
    }

    async fn repaired(&self) {
        self.eventually("repaired", || {
            self.journal.repairs().is_empty() && self.core.repairs.lock().is_empty()
        })
        .await;
        self.drained().await;
    }
}

fn records(ids: &[&str]) -> RepairWanted {
    RepairWanted::records(Some(ids.iter().map(|id| (*id).to_owned()).collect()), 1, "a test")
}

#[tokio::test(start_paused = true)]
async fn records_are_made_equal_and_keep_their_places() {
    let stage = Stage::new(1).await;
    let c = stage.create("c").await;
    for n in 0..6 {
        stage.upsert(&c, ["p", "q", "r", "s", "t", "u"][n as usize], n).await;
    }
    let bare = json!({"ids": ["v"], "embeddings": [[7, 7]]});
    stage.write(&c, RecordWrite::Add, bare).await;
    // Stale keys and a stale uri, another value, a lost record, one too many, a document that should not be there.
    stage.tamper(
        B,
        "c",
        RecordWrite::Update,
        json!({"ids": ["q"], "metadatas": [{"stale": true}], "uris": ["old"]}),
    );
    stage.tamper(B, "c", RecordWrite::Upsert, value("r", 99));
    stage.tamper(B, "c", RecordWrite::Delete, json!({"ids": ["s"]}));
    stage.tamper(B, "c", RecordWrite::Add, value("extra", 1));
    stage.tamper(
        B,
        "c",
        RecordWrite::Update,
        json!({"ids": ["v"], "documents": ["stale"]}),
    );
    // Not named, so not touched.
    stage.tamper(B, "c", RecordWrite::Upsert, value("t", 50));
    stage
        .want(&c, B, records(&["q", "r", "s", "extra", "v", "nowhere"]))
        .await;
    assert_eq!(stage.usable(&c), [A]);
    stage.heal();
    stage.repaired().await;
    let (a, b) = (stage.contents(A, "c"), stage.contents(B, "c"));
    let order: Vec<_> = b.records.iter().map(|record| record.id.as_str()).collect();
    assert_eq!(
        order,
        ["p", "q", "r", "t", "u", "s", "v"],
        "only what was made anew moves"
    );
    for record in &a.records {
        let there = b.records.iter().find(|there| there.id == record.id).expect("there");
        assert_eq!(there == record, record.id != "t", "{}", record.id);
    }
    assert_eq!(stage.usable(&c), [A, B]);
}

/// S17: the repair reads x=1; x=2 goes to both; the repair writes x=1.
#[tokio::test(start_paused = true)]
async fn s17_what_is_written_during_a_repair_is_not_undone_by_it() {
    for kind in [RepairKind::Records, RepairKind::Whole] {
        let stage = Stage::new(17).await;
        let c = stage.create("c").await;
        stage.upsert(&c, "x", 1).await;
        stage.tamper(B, "c", RecordWrite::Upsert, value("x", 9));
        let gate = Gate::new();
        stage.b().fault("/upsert", 1, Fault::Held(gate.clone()));
        stage.b().forget_requests();
        stage
            .want(
                &c,
                B,
                RepairWanted {
                    kind,
                    ..records(&["x"])
                },
            )
            .await;
        stage.heal();
        stage
            .eventually("the repair writes", || stage.b().saw("/upsert") > 0)
            .await;
        let write = stage.start_upsert(&c, "x", 2);
        seconds(1).await;
        gate.open();
        assert_eq!(write.await.expect("an answer").status, 200);
        stage.repaired().await;
        assert_eq!(stage.documents(B, "c"), [("x".to_owned(), "w2".to_owned())], "{kind:?}");
        stage.assert_converged();
    }
}

/// S13, S17: an update of a record that is not there, and the add of it, come while a repair of that record is under
/// way: what the repair has taken along of them must not be applied once more.
#[tokio::test(start_paused = true)]
async fn s13_what_comes_during_a_repair_is_applied_once() {
    for whole in [false, true] {
        for held in ["/delete", "/get", "/count"] {
            let stage = Stage::new(13).await;
            let c = stage.create("c").await;
            stage.upsert(&c, "x", 1).await;
            stage.tamper(B, "c", RecordWrite::Upsert, value("x", 9));
            let wanted = match whole {
                true => RepairWanted::whole(1, "a test"),
                false => records(&["x", "new"]),
            };
            stage.want(&c, B, wanted).await;
            let gate = Gate::new();
            stage.b().fault(held, 1, Fault::Held(gate.clone()));
            stage.b().forget_requests();
            stage.heal();
            let (writer, its_c) = (stage.clone(), c.clone());
            let live = tokio::spawn(async move {
                while writer.b().saw(held) == 0 {
                    seconds(1).await;
                }
                let update = json!({"ids": ["new"], "metadatas": [{"stale": true}]});
                writer.write(&its_c, RecordWrite::Update, update).await;
                writer.write(&its_c, RecordWrite::Add, value("new", 3)).await;
            });
            if held == "/count" && !whole {
                live.abort();
            } else {
                stage
                    .eventually("it is in the middle", || stage.b().saw(held) > 0)
                    .await;
                seconds(5).await;
                gate.open();
                live.await.expect("acked");
            }
            stage.repaired().await;
            assert_eq!(sorted(&stage, A), sorted(&stage, B), "{held} {whole}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_collection_is_copied_while_it_is_written_to() {
    let stage = Stage::new(2).await;
    let c = stage.create("c").await;
    for n in 0..300 {
        let body = json!({"ids": [format!("r{n}")], "embeddings": [[n, 1]], "metadatas": [{"n": n}]});
        stage.write(&c, RecordWrite::Add, body).await;
    }
    stage.tamper(B, "c", RecordWrite::Add, value("zombie", 1));
    stage.tamper(
        B,
        "c",
        RecordWrite::Delete,
        json!({"ids": (0..200).map(|n| format!("r{n}")).collect::<Vec<_>>()}),
    );
    let (writer, its_c) = (stage.clone(), c.clone());
    let live = tokio::spawn(async move {
        for n in 0..400u64 {
            let id = format!("r{}", n * 7 % 350);
            let answer = match n % 5 {
                0 => writer.write(&its_c, RecordWrite::Delete, json!({"ids": [id]})).await,
                1 => {
                    let body = json!({"ids": [id], "metadatas": [{"late": n}]});
                    writer.write(&its_c, RecordWrite::Update, body).await
                }
                _ => writer.write(&its_c, RecordWrite::Upsert, value(&id, n)).await,
            };
            assert_eq!(answer.status, 200);
        }
    });
    stage.want(&c, B, RepairWanted::whole(1, "a test")).await;
    stage.heal();
    stage.eventually("the node joins", || stage.usable(&c) == [A, B]).await;
    assert!(!live.is_finished(), "while writes go on");
    live.await.expect("every write is acked");
    stage.repaired().await;
    assert_eq!(sorted(&stage, A), sorted(&stage, B));
    assert_eq!(stage.journal.rows(), vec![]);
}

fn sorted(stage: &Stage, node: usize) -> Vec<String> {
    let mut records: Vec<_> = stage
        .contents(node, "c")
        .records
        .iter()
        .map(|record| format!("{record:?}"))
        .collect();
    records.sort();
    records
}

/// A node that has nothing gets the collection with its order, metadata and dimension.
#[tokio::test(start_paused = true)]
async fn a_lost_collection_is_made_again() {
    let stage = Stage::new(3).await;
    let answer = stage.try_create(json!({"name": "c", "metadata": {"k": 1}})).await;
    assert_eq!(answer.status, 200);
    let c = stage.find("c");
    for n in 0..50 {
        stage.upsert(&c, &format!("r{n}"), n).await;
    }
    let empty = stage.create("empty").await;
    stage.upsert(&empty, "gone", 1).await;
    stage.write(&empty, RecordWrite::Delete, json!({"ids": ["gone"]})).await;
    for (name, collection) in [("c", &c), ("empty", &empty)] {
        stage.b().with(|chroma| chroma.lose(name));
        stage.want(collection, B, RepairWanted::whole(1, "lost")).await;
    }
    stage.heal();
    stage.repaired().await;
    stage.assert_converged();
}

/// S30: a repair removes only rows that were there before it read its source.
#[tokio::test(start_paused = true)]
async fn s30_a_row_that_comes_during_a_repair_outlives_it() {
    for whole in [false, true] {
        let stage = Stage::new(30).await;
        let c = stage.create("c").await;
        stage.upsert(&c, "x", 1).await;
        stage.upsert(&c, "y", 1).await;
        stage.tamper(B, "c", RecordWrite::Upsert, value("x", 8));
        let gate = Gate::new();
        stage.b().fault("/upsert", 1, Fault::Held(gate.clone()));
        stage.b().forget_requests();
        let wanted = match whole {
            true => RepairWanted::whole(1, "a test"),
            false => records(&["x"]),
        };
        stage.want(&c, B, wanted).await;
        stage.heal();
        stage
            .eventually("the repair writes", || stage.b().saw("/upsert") > 0)
            .await;
        // What the second row is about went wrong after the first repair had looked.
        stage.tamper(B, "c", RecordWrite::Upsert, value("y", 9));
        stage.b().fault("/get", 1, Fault::Held(Gate::new()));
        stage.want(&c, B, records(&["y"])).await;
        stage.b().heal();
        gate.open();
        stage.repaired().await;
        stage.assert_converged();
    }
}

/// S33: the rows of what a copy has taken along are not applied on top of it.
#[tokio::test(start_paused = true)]
async fn s33_a_copy_takes_the_rows_of_what_it_copied_with_it() {
    for fault in [None, Some(CommitFault::Refused), Some(CommitFault::UncertainWritten)] {
        let stage = Stage::new(33).await;
        let c = stage.create("c").await;
        stage.upsert(&c, "x", 1).await;
        stage.want(&c, B, RepairWanted::whole(1, "a test")).await;
        let update = json!({"ids": ["new"], "metadatas": [{"stale": true}]});
        stage.write(&c, RecordWrite::Update, update).await;
        stage.upsert(&c, "new", 2).await;
        seconds(60).await;
        assert_eq!(stage.journal.rows().len(), 2, "they wait for the copy");
        stage.journal.fault(removes_repairs, fault);
        stage.b().forget_requests();
        stage.heal();
        stage.repaired().await;
        stage.assert_converged();
        assert!(
            stage.b().record_writes().iter().all(|(kind, _)| *kind != "update"),
            "what waited was not applied"
        );
    }
}

/// S34: the source of a repair dies for good; the node that was to be repaired holds every acked write.
#[tokio::test(start_paused = true)]
async fn s34_a_repair_whose_source_is_gone_is_turned_around() {
    let stage = Stage::new(34).await;
    let c = stage.create("c").await;
    stage.upsert(&c, "x", 1).await;
    stage.upsert(&c, "y", 1).await;
    stage.tamper(A, "c", RecordWrite::Upsert, value("x", 2));
    stage.down(A);
    let wanted = RepairWanted {
        source: Some(A),
        reversible: true,
        ..records(&["x"])
    };
    stage.want(&c, B, wanted).await;
    assert!(stage.usable(&c).is_empty());
    stage.heal();
    stage.eventually("it serves", || stage.usable(&c) == [B]).await;
    let rows = stage.journal.repairs();
    assert_eq!(
        (rows.len(), rows[0].node.as_str(), rows[0].source.as_deref()),
        (1, "a", Some("b"))
    );
    assert_eq!(stage.upsert(&c, "y", 3).await.status, 200);
    stage.up(A).await;
    stage.repaired().await;
    stage.assert_converged();
    assert_eq!(stage.documents(A, "c")[0], ("x".to_owned(), "w1".to_owned()));
}

/// S34: a batch as big as a client may send is repaired record by record, and can be turned around all the while.
#[tokio::test(start_paused = true)]
async fn s34_a_large_batch_is_repaired_in_turns() {
    for source_dies in [false, true] {
        let stage = Stage::new(34).await;
        let c = stage.create("c").await;
        let ids: Vec<String> = (0..5461).map(|n| format!("r{n}")).collect();
        let vectors = vec![[1, 1]; ids.len()];
        let batch = json!({"ids": ids, "embeddings": vectors});
        assert_eq!(stage.write(&c, RecordWrite::Upsert, batch).await.status, 200);
        stage.tamper(B, "c", RecordWrite::Upsert, value("r0", 9));
        stage.tamper(B, "c", RecordWrite::Delete, json!({"ids": ["r5460"]}));
        if source_dies {
            stage.down(A);
        }
        let wanted = RepairWanted {
            source: Some(A),
            reversible: true,
            ..RepairWanted::records(Some(ids), 1, "under way at the last stop")
        };
        stage.want(&c, B, wanted).await;
        let (writer, its_c) = (stage.clone(), c.clone());
        let live = tokio::spawn(async move {
            for n in 0..50 {
                seconds(u64::from(source_dies)).await;
                writer.upsert(&its_c, &format!("r{}", n * 100), n).await;
            }
        });
        stage.heal();
        if source_dies {
            stage.eventually("it serves", || stage.usable(&c) == [B]).await;
            stage.up(A).await;
        }
        stage.eventually("equal", || stage.usable(&c) == [A, B]).await;
        live.await.expect("answers");
        stage.repaired().await;
        assert_eq!(sorted(&stage, A), sorted(&stage, B));
        assert_eq!(stage.contents(A, "c").records.len(), 5461 - usize::from(source_dies));
    }
}

/// S34: a large batch is not repaired in one go: who waits for the lane has it between two turns.
#[tokio::test(start_paused = true)]
async fn s34_writers_have_their_turns_while_a_large_batch_is_repaired() {
    let stage = Stage::new(34).await;
    let c = stage.create("c").await;
    let ids: Vec<String> = (1000..4000).map(|n| format!("r{n}")).collect();
    let vectors = vec![[1, 1]; ids.len()];
    let batch = json!({"ids": ids, "embeddings": vectors});
    assert_eq!(stage.write(&c, RecordWrite::Upsert, batch).await.status, 200);
    let (first, last) = (Gate::new(), Gate::new());
    stage.b().fault("\"r1000\"", 1, Fault::Held(first.clone()));
    stage.b().fault("\"r3999\"", 1, Fault::Held(last.clone()));
    stage.b().forget_requests();
    stage.want(&c, B, RepairWanted::records(Some(ids), 1, "a test")).await;
    stage.heal();
    stage.eventually("it has begun", || stage.b().saw("/get") > 0).await;
    let write = stage.start_upsert(&c, "x", 1);
    seconds(1).await;
    assert!(!write.is_finished(), "the repair has the lane");
    first.open();
    seconds(5).await;
    assert!(write.is_finished(), "it has had a turn of its own");
    assert_eq!(stage.journal.repairs().len(), 1, "in the middle of the repair");
    last.open();
    stage.repaired().await;
    stage.assert_converged();
}

/// S34: what a refusal has caused, and what is about a whole collection, is never turned around.
#[tokio::test(start_paused = true)]
async fn s34_other_repairs_wait_for_their_source() {
    for wanted in [records(&["x"]), RepairWanted::whole(1, "a test")] {
        let stage = Stage::new(34).await;
        let c = stage.create("c").await;
        stage.upsert(&c, "x", 1).await;
        stage.down(A);
        let source = Some(A);
        stage.want(&c, B, RepairWanted { source, ..wanted }).await;
        stage.heal();
        seconds(600).await;
        assert!(stage.usable(&c).is_empty());
        stage.up(A).await;
        stage.repaired().await;
        stage.assert_converged();
    }
}

/// What a node refuses while the one that took it is away stays in its log: that one may come back with nothing (R2, S6).
#[tokio::test(start_paused = true)]
async fn s06_what_is_refused_while_its_only_source_is_away_is_not_given_up() {
    let stage = Stage::new(6).await;
    stage.heal();
    let c = stage.create("c").await;
    stage.upsert(&c, "x", 1).await;
    stage.down(B);
    stage.upsert(&c, "x", 2).await;
    stage.pause_drain(true);
    stage.up(B).await;
    stage.down(A);
    stage.b().fault("\"w2\"", 3, REFUSED);
    stage.pause_drain(false);
    let asked = || stage.b().trace().iter().filter(|&what| what == "w2").count();
    stage.eventually("refused", || asked() > 0).await;
    assert_eq!(stage.journal.repairs(), []);
    assert_eq!(stage.journal.rows(), rows(&[("b", "w2")]));
    stage.a().wipe();
    stage.up(A).await;
    stage.repaired().await;
    assert_eq!(stage.documents(A, "c"), [("x".to_owned(), "w2".to_owned())]);
    stage.assert_converged();
}

/// A node that is down and has rows of its own is no source: its rows are drained first (R2, S7).
#[tokio::test(start_paused = true)]
async fn s07_a_source_that_is_behind_is_drained_first() {
    let stage = Stage::new(7).await;
    let c = stage.create("c").await;
    stage.upsert(&c, "x", 1).await;
    stage.down(A);
    stage.upsert(&c, "x", 2).await;
    // The node that has everything loses it.
    stage.b().with(|chroma| chroma.lose("c"));
    stage.want(&c, B, RepairWanted::whole(1, "lost")).await;
    stage.a().fault("\"w2\"", ALWAYS, DISK_FULL);
    stage.heal();
    stage.up(A).await;
    seconds(60).await;
    assert_eq!(stage.documents(A, "c"), [("x".to_owned(), "w1".to_owned())]);
    assert_eq!(stage.journal.repairs().len(), 1, "nothing is copied from it");
    assert!(stage.usable(&c).is_empty());
    stage.a().heal();
    stage.repaired().await;
    assert_eq!(stage.documents(B, "c"), [("x".to_owned(), "w2".to_owned())]);
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn a_repair_that_is_interrupted_begins_again() {
    for pattern in ["/get", "/upsert", "/delete", "/count"] {
        for node in [A, B] {
            for fault in [Fault::ClosedBefore, Fault::ClosedAfter] {
                for whole in [false, true] {
                    let stage = Stage::new(4).await;
                    let c = stage.create("c").await;
                    stage.upsert(&c, "x", 1).await;
                    stage.upsert(&c, "y", 1).await;
                    stage.tamper(B, "c", RecordWrite::Upsert, value("x", 2));
                    stage.tamper(B, "c", RecordWrite::Delete, json!({"ids": ["y"]}));
                    stage.tamper(B, "c", RecordWrite::Add, value("z", 2));
                    let wanted = match whole {
                        true => RepairWanted::whole(1, "a test"),
                        false => records(&["x", "y", "z"]),
                    };
                    stage.want(&c, B, wanted).await;
                    stage.nodes[node].fault(pattern, 2, fault.clone());
                    stage.heal();
                    stage.repaired().await;
                    stage.assert_converged();
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_dies_during_a_repair_is_repaired_when_it_is_back() {
    let stage = Stage::new(5).await;
    let c = stage.create("c").await;
    stage.upsert(&c, "x", 1).await;
    stage.tamper(B, "c", RecordWrite::Upsert, value("x", 2));
    let gate = Gate::new();
    stage.b().fault("/upsert", 1, Fault::Held(gate.clone()));
    stage.b().forget_requests();
    stage.want(&c, B, records(&["x"])).await;
    stage.heal();
    stage
        .eventually("the repair writes", || stage.b().saw("/upsert") > 0)
        .await;
    stage.down(B);
    assert_eq!(stage.upsert(&c, "y", 1).await.status, 200, "the lane is free");
    gate.open();
    stage.up(B).await;
    stage.repaired().await;
    stage.assert_converged();
}

const BROKEN: Fault = Fault::Answer(
    500,
    r#"{"error":"InternalError","message":"Failed to apply logs to the hnsw segment writer"}"#,
);

/// Some records, then all, then all of it anew.
#[tokio::test(start_paused = true)]
async fn a_repair_that_fails_is_followed_by_a_stronger_one() {
    let stage = Stage::new(6).await;
    let c = stage.create("c").await;
    let other = stage.create("other").await;
    stage.upsert(&c, "x", 1).await;
    stage.upsert(&other, "x", 1).await;
    let broken = stage.b().with(|chroma| chroma.id_of("c")).expect("there");
    for op in ["get", "delete", "upsert", "add", "update"] {
        stage.b().fault(&format!("{broken}/{op}"), ALWAYS, BROKEN);
    }
    stage.want(&c, B, records(&["x"])).await;
    stage.heal();
    stage.repaired().await;
    stage.assert_converged();
    let anew = stage.b().with(|chroma| chroma.id_of("c")).expect("there");
    assert_ne!(anew, broken);
    assert_eq!(stage.usable(&other), [A, B]);
}

/// R2: nothing is deleted to be made anew before the source has given everything.
#[tokio::test(start_paused = true)]
async fn a_rebuild_begins_when_the_source_can_give_everything() {
    let stage = Stage::new(6).await;
    let c = stage.create("c").await;
    stage.upsert(&c, "x", 1).await;
    let kept = stage.b().with(|chroma| chroma.id_of("c"));
    stage.a().fault("embeddings", ALWAYS, BROKEN);
    let wanted = RepairWanted {
        kind: RepairKind::Rebuild,
        ..RepairWanted::whole(1, "a test")
    };
    stage.want(&c, B, wanted).await;
    stage.heal();
    seconds(3600).await;
    assert_eq!(stage.b().with(|chroma| chroma.id_of("c")), kept);
    assert_eq!(stage.journal.repairs().len(), 1);
    stage.a().heal();
    stage.repaired().await;
    stage.assert_converged();
}

#[tokio::test(start_paused = true)]
async fn a_node_that_alone_fails_its_reads_is_rebuilt() {
    for heal in [Heal::Auto, Heal::Manual] {
        let stage = Stage::with(8, |settings| settings.heal = heal).await;
        stage.heal();
        let c = stage.create("c").await;
        stage.upsert(&c, "x", 1).await;
        for _ in 0..2 {
            stage.core.report_read_failure(&c, B);
        }
        stage.core.report_read_success(&c, B);
        for _ in 0..3 {
            // Reads that fail for another reason take nothing off a node that serves ours.
            stage.core.report_read_failure(&c, B);
        }
        seconds(10).await;
        assert_eq!(stage.journal.repairs(), []);
        let broken = stage.b().with(|chroma| chroma.id_of("c")).expect("there");
        stage.b().fault(&format!("{broken}/get"), ALWAYS, BROKEN);
        for _ in 0..3 {
            stage.core.report_read_failure(&c, B);
        }
        stage.eventually("it is out", || stage.usable(&c) == [A]).await;
        if heal == Heal::Manual {
            seconds(600).await;
            assert_eq!(stage.b().with(|chroma| chroma.id_of("c")), Some(broken));
            let row = stage.journal.repairs().remove(0);
            assert!(row.parked.is_some());
            assert!(jobs::retry(&stage.core, row.id).await);
        }
        stage.repaired().await;
        stage.assert_converged();
        // Both fail: none is taken out.
        let whole = stage.b().with(|chroma| chroma.id_of("c")).expect("there");
        stage.nodes.iter().for_each(|node| node.fault("/get", ALWAYS, BROKEN));
        for _ in 0..3 {
            stage.core.report_read_failure(&c, B);
        }
        seconds(60).await;
        assert_eq!(stage.b().with(|chroma| chroma.id_of("c")), Some(whole));
        assert_eq!(stage.journal.repairs(), []);
    }
}

#[tokio::test(start_paused = true)]
async fn a_comparison_names_what_differs_and_repairs_that_alone() {
    let stage = Stage::new(9).await;
    let c = stage.create("c").await;
    for n in 0..500 {
        stage.upsert(&c, &format!("r{n}"), n).await;
    }
    let mut changed: Vec<String> = (0..20).map(|n| format!("r{}", n * 20)).collect();
    for id in &changed {
        stage.tamper(B, "c", RecordWrite::Upsert, value(id, 9999));
    }
    stage.tamper(B, "c", RecordWrite::Add, value("extra", 1));
    changed.push("extra".to_owned());
    changed.sort();
    stage.heal();
    for repair in [false, true] {
        let (writer, its_c) = (stage.clone(), c.clone());
        let live = tokio::spawn(async move {
            for n in 0..100 {
                writer.upsert(&its_c, &format!("live{}", n % 10), n).await;
            }
        });
        let options = jobs::Options {
            repair,
            ..jobs::Options::default()
        };
        let id = jobs::verify(&stage.core, Some(c.clone()), options);
        let finished = || {
            stage
                .core
                .repairing
                .report(id)
                .is_some_and(|report| report.finished_at.is_some())
        };
        stage.eventually("compared", finished).await;
        live.await.expect("writes go on");
        let report = stage.core.repairing.report(id).expect("a report");
        assert_eq!(report.findings[0].ids, changed, "{report:?}");
        assert_eq!(report.findings[0].skipped, None);
    }
    let written: Vec<_> = stage
        .b()
        .record_writes()
        .iter()
        .flat_map(|(_, body)| body["ids"].as_array().cloned().unwrap_or_default())
        .filter(|id| {
            id.as_str()
                .is_some_and(|id| id.starts_with('r') && !id.contains("live"))
        })
        .skip(500)
        .collect();
    assert_eq!(
        written.len(),
        changed.len() - 1,
        "no more than what differed was written"
    );
    stage.repaired().await;
    stage.assert_converged();
    let id = jobs::verify(&stage.core, None, jobs::Options::default());
    stage
        .eventually("compared", || {
            stage
                .core
                .repairing
                .report(id)
                .is_some_and(|report| report.finished_at.is_some())
        })
        .await;
    assert_eq!(stage.core.repairing.report(id).expect("a report").differing, 0);
    assert!(stage.core.repairing.verified_at(c.generation).is_some());
}

#[tokio::test(start_paused = true)]
async fn two_copies_that_were_never_compared_are_and_a_person_decides() {
    for (differs, from) in [(false, A), (true, A), (true, B)] {
        let stage = Stage::new(10).await;
        let c = stage.create("c").await;
        for n in 0..30 {
            stage.upsert(&c, &format!("r{n}"), n).await;
        }
        if differs {
            stage.tamper(B, "c", RecordWrite::Upsert, value("r3", 9999));
        }
        let wanted = RepairWanted {
            kind: RepairKind::Verify,
            source: Some(A),
            ..RepairWanted::whole(1, "found on both nodes")
        };
        stage.want(&c, B, wanted).await;
        assert_eq!(stage.upsert(&c, "r1", 77).await.status, 200);
        stage.heal();
        if differs {
            stage
                .eventually("it is parked", || {
                    stage.journal.repairs().first().is_some_and(|row| row.parked.is_some())
                })
                .await;
            let reason = stage.journal.repairs()[0].parked.clone().expect("parked");
            assert!(reason.contains("1 records differ") && reason.contains("r3"), "{reason}");
            assert_eq!(stage.documents(B, "c")[3].1, "w9999", "nothing is overwritten");
            assert_eq!(stage.usable(&c), [A]);
            let to = if from == A { B } else { A };
            jobs::resync(&stage.core, &c, to, Some(from))
                .await
                .expect("an authority");
        }
        stage.repaired().await;
        stage.assert_converged();
        let expected = if differs && from == B { "w9999" } else { "w3" };
        assert_eq!(stage.documents(A, "c")[3].1, expected);
    }
}

/// A comparison lets the drain work meanwhile, and is not begun a second time because of that.
#[tokio::test(start_paused = true)]
async fn a_comparison_is_under_way_once() {
    let stage = Stage::new(10).await;
    let c = stage.create("c").await;
    stage.upsert(&c, "x", 1).await;
    let wanted = RepairWanted {
        kind: RepairKind::Verify,
        source: Some(A),
        ..RepairWanted::whole(1, "found on both nodes")
    };
    stage.want(&c, B, wanted).await;
    let gate = Gate::new();
    stage.a().fault("/get", ALWAYS, Fault::Held(gate.clone()));
    stage.a().forget_requests();
    stage.heal();
    for n in 0..20 {
        stage.upsert(&c, "x", n).await;
        seconds(1).await;
    }
    assert_eq!(stage.a().saw("/get"), 1);
    stage.a().heal();
    gate.open();
    stage.repaired().await;
    stage.assert_converged();
}

/// R2: an operator cannot take the last node that holds everything out either.
#[tokio::test(start_paused = true)]
async fn a_resync_from_a_node_that_lacks_something_is_refused() {
    let stage = Stage::new(11).await;
    let c = stage.create("c").await;
    stage.upsert(&c, "x", 1).await;
    stage.want(&c, B, records(&["x"])).await;
    assert!(jobs::resync(&stage.core, &c, A, Some(B)).await.is_err());
    assert!(jobs::resync(&stage.core, &c, A, None).await.is_err());
    assert!(jobs::resync(&stage.core, &c, B, Some(B)).await.is_err());
    assert_eq!(stage.journal.repairs().len(), 1);
    jobs::resync(&stage.core, &c, B, Some(A)).await.expect("an authority");
    stage.heal();
    stage.repaired().await;
    stage.assert_converged();
}

/// The only node that it could be copied from may come back without its data: until then nobody gives up what serves.
#[tokio::test(start_paused = true)]
async fn a_resync_is_refused_while_its_source_is_away() {
    let stage = Stage::new(111).await;
    let c = stage.create("c").await;
    stage.upsert(&c, "x", 1).await;
    stage.down(A);
    assert!(jobs::resync(&stage.core, &c, B, None).await.is_err());
    assert!(jobs::resync(&stage.core, &c, B, Some(A)).await.is_err());
    assert_eq!((stage.usable(&c), stage.journal.repairs()), (vec![B], vec![]));
}

/// The catalog, and the first node, say what there is; nothing that nobody knows is deleted.
#[tokio::test(start_paused = true)]
async fn names_are_made_equal() {
    let stage = Stage::new(12).await;
    let (one, two, kept) = (
        stage.create("one").await,
        stage.create("two").await,
        stage.create("kept").await,
    );
    let lost = stage.create("lost").await;
    let gone = stage.create("gone").await;
    for collection in [&one, &two, &kept, &lost, &gone] {
        stage.upsert(collection, "x", collection.generation as u64 % 100).await;
    }
    for (place, body) in [("tenants", "new_tenant"), ("tenants/new_tenant/databases", "full")] {
        let body = json!({ "name": body }).to_string();
        let path = format!("/api/v2/{place}");
        stage
            .a()
            .with(|chroma| chroma.handle(&http::Method::POST, &path, body.as_bytes(), false));
    }
    let put = |node: usize, name: &str, body: Value| {
        let id = stage.nodes[node].with(|chroma| chroma.id_of(name)).expect("there");
        let path = diptych::chroma::node_path::collection(TENANT, DATABASE, id);
        stage.nodes[node].with(|chroma| chroma.handle(&http::Method::PUT, &path, body.to_string().as_bytes(), false));
    };
    // Swapped names, other metadata, a lost collection, one that was deleted, one that nobody knows.
    put(B, "one", json!({"new_name": "aside"}));
    put(B, "two", json!({"new_name": "one"}));
    put(B, "aside", json!({"new_name": "two"}));
    put(B, "kept", json!({"new_metadata": {"stale": 1}}));
    stage.b().with(|chroma| chroma.lose("lost"));
    let deleted = stage.b().with(|chroma| chroma.id_of("gone"));
    stage.a().with(|chroma| chroma.lose("gone"));
    stage.b().with(|chroma| chroma.lose("gone"));
    assert_eq!(stage.delete("gone").await.status, 200);
    stage
        .b()
        .with(|chroma| chroma.bring_back("gone", deleted.expect("there")));
    let path = diptych::chroma::node_path::collections(TENANT, DATABASE);
    let body = br#"{"name":"unknown"}"#;
    stage
        .b()
        .with(|chroma| chroma.handle(&http::Method::POST, &path, body, false));
    stage.tamper(B, "unknown", RecordWrite::Add, value("u", 5));
    jobs::want(&stage.core, &Scope::Namespace, B, RepairWanted::whole(1, "a test")).await;
    stage.core.catalog.put_database(diptych::journal::DatabaseRecord {
        tenant: "new_tenant".to_owned(),
        name: "full".to_owned(),
        client_id: uuid::Uuid::nil(),
    });
    stage.heal();
    stage.repaired().await;
    stage.assert_converged();
    let names: Vec<String> = stage.journal.living().into_iter().map(|record| record.name).collect();
    assert_eq!(names, ["one", "two", "kept", "lost", "unknown"]);
    assert_eq!(stage.documents(A, "unknown"), [("u".to_owned(), "w5".to_owned())]);
}

/// S17: the proxy is killed in the middle of a repair, between a delete and the write that belongs to it for one.
#[tokio::test(start_paused = true)]
async fn s17_a_repair_that_was_cut_off_is_carried_out_again() {
    // The first delete is the flush; the first upsert makes the deleted record anew.
    for (held, before) in [("/delete", 1), ("/upsert", 0), ("/upsert", 1), ("/get", 0)] {
        for kind in [RepairKind::Records, RepairKind::Whole] {
            let stage = Stage::new(17).await;
            let c = stage.create("c").await;
            let bare = json!({"ids": ["v"], "embeddings": [[7, 7]]});
            stage.write(&c, RecordWrite::Add, bare).await;
            stage.upsert(&c, "x", 1).await;
            // The low-water mark passes them: from here on nothing but the repair row speaks of these records.
            seconds(1).await;
            stage.tamper(
                B,
                "c",
                RecordWrite::Update,
                json!({"ids": ["v"], "documents": ["stale"]}),
            );
            stage.tamper(B, "c", RecordWrite::Upsert, value("x", 9));
            stage
                .want(
                    &c,
                    B,
                    RepairWanted {
                        kind,
                        ..records(&["v", "x"])
                    },
                )
                .await;
            let times = if held == "/get" { ALWAYS } else { 1 };
            let gate = Gate::new();
            if before > 0 {
                stage.b().fault(held, before, Fault::None);
            }
            stage.b().fault(held, times, Fault::Held(gate.clone()));
            stage.b().forget_requests();
            stage.heal();
            stage
                .eventually("it is in the middle", || stage.b().saw(held) > before)
                .await;
            let successor = Stage::over(18, stage.nodes.clone(), stage.journal.clone(), |_| {}).await;
            stage.b().heal();
            gate.open();
            for node in [A, B] {
                successor.up(node).await;
            }
            let c = successor.find("c");
            assert_eq!(successor.usable(&c), [A], "{held} {kind:?}");
            assert_eq!(successor.upsert(&c, "x", 2).await.status, 200);
            successor.heal();
            successor.repaired().await;
            // What had to be made anew has moved to the end.
            assert_eq!(sorted(&successor, A), sorted(&successor, B));
            assert_eq!(successor.contents(B, "c").records.len(), 2);
            assert_eq!(successor.usable(&c), [A, B]);
        }
    }
}

/// S17, S34: a record without a document was acked; an upsert with one that nobody acked landed on one node. The repair
/// deletes the record to write it anew, and that never arrives. Then the source dies, and the repair is turned around.
#[tokio::test(start_paused = true)]
async fn s17_what_is_deleted_to_be_added_again_survives_the_death_of_the_source() {
    for restart in [false, true] {
        let stage = Stage::new(17).await;
        let c = stage.create("c").await;
        let bare = json!({"ids": ["x"], "embeddings": [[7, 7]]});
        assert_eq!(stage.write(&c, RecordWrite::Add, bare).await.status, 201);
        stage.tamper(B, "c", RecordWrite::Upsert, value("x", 9));
        let wanted = RepairWanted {
            source: Some(A),
            reversible: true,
            ..records(&["x"])
        };
        stage.want(&c, B, wanted).await;
        let gate = Gate::new();
        stage.b().fault("/upsert", 1, Fault::Held(gate.clone()));
        stage.b().forget_requests();
        stage.heal();
        stage
            .eventually("the repair writes", || stage.b().saw("/upsert") > 0)
            .await;
        assert_eq!(stage.documents(B, "c"), []);
        stage.down(A);
        gate.open_to(Fault::ClosedBefore);
        let stage = if restart {
            let successor = Stage::over(18, stage.nodes.clone(), stage.journal.clone(), |_| {}).await;
            successor.up(B).await;
            successor.heal();
            successor
        } else {
            stage
        };
        let c = stage.find("c");
        stage.eventually("it serves", || stage.usable(&c) == [B]).await;
        assert_eq!(stage.documents(B, "c").len(), 1, "{restart}");
        stage.up(A).await;
        stage.repaired().await;
        stage.assert_converged();
    }
}

/// S36: the source that a repair names has become another server: any other that is in step will do.
#[tokio::test(start_paused = true)]
async fn s36_a_source_that_is_another_server_now_is_not_waited_for() {
    let stage = Stage::new(36).await;
    let c = stage.create("c").await;
    stage.upsert(&c, "x", 1).await;
    stage.tamper(B, "c", RecordWrite::Upsert, value("x", 9));
    let scope = Scope::Collection(c.clone());
    let wanted = RepairWanted {
        source: Some(B),
        ..records(&["x"])
    };
    // Written when the node was another one: its name stands for nobody now.
    stage.core.cluster.node(B).remember("another", 0);
    jobs::want(&stage.core, &scope, B, wanted).await;
    stage.core.cluster.node(B).remember("this one", 0);
    stage.heal();
    stage.repaired().await;
    stage.assert_converged();
}

/// A vector that a node answers as null stops neither the copy nor the repair of the other records; a row names it (P7)
/// until somebody writes it.
#[tokio::test(start_paused = true)]
async fn a_vector_that_cannot_be_read_is_named_and_everything_else_is_copied() {
    let rebuild = RepairWanted {
        kind: RepairKind::Rebuild,
        ..RepairWanted::whole(1, "a test")
    };
    for wanted in [RepairWanted::whole(1, "a test"), records(&["r3", "r7", "r8"]), rebuild] {
        let case = format!("{:?}", wanted.kind);
        let whole = wanted.kind.holds_rows();
        let stage = Stage::new(13).await;
        let c = stage.create("c").await;
        for n in 0..20 {
            stage.upsert(&c, &format!("r{n}"), n).await;
        }
        let unreadable = json!({"ids": ["r3", "r7"], "embeddings": [[null, 1], [1, null]]});
        stage.tamper(A, "c", RecordWrite::Update, unreadable);
        match whole {
            true => stage.b().with(|chroma| chroma.lose("c")),
            false => stage.tamper(B, "c", RecordWrite::Upsert, value("r8", 99)),
        }
        stage.want(&c, B, wanted).await;
        stage.heal();
        let named = |ids: &[&str]| {
            let rows = stage.journal.repairs();
            let found = rows.iter().map(|row| (row.kind, row.ids.clone().unwrap_or_default()));
            found.collect::<Vec<_>>() == [(RepairKind::Records, ids.iter().map(|id| (*id).to_owned()).collect())]
        };
        stage
            .eventually("everything else", || {
                named(&["r3", "r7"]) && stage.journal.rows().is_empty()
            })
            .await;
        let there: Vec<_> = stage.documents(B, "c").into_iter().collect();
        assert_eq!(there.len(), if whole { 18 } else { 20 }, "{case}");
        assert!(there.contains(&("r8".to_owned(), "w8".to_owned())), "{case}");
        assert_eq!(stage.usable(&c), [A]);
        // What is written goes to both, and why the node does not serve is told.
        assert_eq!(stage.upsert(&c, "later", 1).await.status, 200);
        stage.drained().await;
        assert!(stage.documents(B, "c").contains(&("later".to_owned(), "w1".to_owned())));
        let told = stage.core.repairing.failure_of(B, Some(c.generation));
        assert!(told.is_some_and(|failure| failure.last.contains("r3")), "{case}");
        assert_eq!(stage.upsert(&c, "r3", 33).await.status, 200);
        stage.eventually("one is left", || named(&["r7"])).await;
        stage.write(&c, RecordWrite::Delete, json!({"ids": ["r7"]})).await;
        stage.repaired().await;
        assert_eq!(sorted(&stage, A), sorted(&stage, B), "{case}");
        assert_eq!(stage.usable(&c), [A, B], "{case}");
    }
}

/// More differences than are compared at a time are all found and all mended, the collection's metadata with them.
#[tokio::test(start_paused = true)]
async fn a_comparison_mends_everything_that_differs() {
    let stage = Stage::new(14).await;
    let c = stage.create("c").await;
    let batch = |from: u64, to: u64, n: u64| {
        let ids: Vec<String> = (from..to).map(|id| format!("r{id:04}")).collect();
        let (vectors, documents) = (vec![[n, 1]; ids.len()], vec![format!("w{n}"); ids.len()]);
        json!({"ids": ids, "embeddings": vectors, "documents": documents})
    };
    stage.write(&c, RecordWrite::Upsert, batch(0, 1500, 1)).await;
    stage.tamper(B, "c", RecordWrite::Update, batch(100, 800, 2));
    let lost = json!({"ids": (1200..1290).map(|id| format!("r{id}")).collect::<Vec<_>>()});
    stage.tamper(B, "c", RecordWrite::Delete, lost);
    let id = stage.b().with(|chroma| chroma.id_of("c")).expect("there");
    let path = diptych::chroma::node_path::collection(TENANT, DATABASE, id);
    let other = br#"{"new_metadata":{"stale":1}}"#;
    stage
        .b()
        .with(|chroma| chroma.handle(&http::Method::PUT, &path, other, false));
    stage.heal();
    for (repair, differing) in [(false, 790), (true, 790), (true, 0)] {
        let options = jobs::Options {
            repair,
            ..jobs::Options::default()
        };
        let id = jobs::verify(&stage.core, Some(c.clone()), options);
        let report = || stage.core.repairing.report(id).expect("a report");
        stage.eventually("compared", || report().finished_at.is_some()).await;
        let report = report();
        let finding = &report.findings[0];
        assert_eq!((report.differing, finding.skipped.clone()), (differing, None));
        assert_eq!(finding.ids.len(), differing);
        assert_eq!(finding.repairing, repair && differing > 0);
        assert_eq!(finding.properties.is_some(), differing > 0);
        stage.repaired().await;
    }
    assert_eq!(sorted(&stage, A), sorted(&stage, B));
    assert_eq!(stage.contents(A, "c").metadata, stage.contents(B, "c").metadata);
    assert_eq!(stage.usable(&c), [A, B]);
}

/// Two copies of which much seems to differ: writers have their turns while that is looked at, and one turn is enough to
/// know that they do differ.
#[tokio::test(start_paused = true)]
async fn copies_that_seem_to_differ_much_are_compared_in_turns() {
    for differs in [false, true] {
        let stage = Stage::new(14).await;
        let c = stage.create("c").await;
        let wanted = RepairWanted {
            kind: RepairKind::Verify,
            source: Some(A),
            ..RepairWanted::whole(1, "found on both nodes")
        };
        stage.want(&c, B, wanted).await;
        let (listing, looking) = (Gate::new(), Gate::new());
        stage.b().fault("/get", 1, Fault::Held(listing.clone()));
        stage.b().forget_requests();
        stage.heal();
        stage.eventually("it lists", || stage.b().saw("/get") > 0).await;
        // These the source did not have when it was listed, and the node has them when it is.
        let ids: Vec<String> = (0..1000).map(|n| format!("r{n}")).collect();
        let vectors = vec![[1, 1]; ids.len()];
        let batch = json!({"ids": ids, "embeddings": vectors});
        stage.write(&c, RecordWrite::Upsert, batch).await;
        stage.drained().await;
        if differs {
            let ids: Vec<String> = (0..900).map(|n| format!("r{n}")).collect();
            stage.tamper(A, "c", RecordWrite::Delete, json!({ "ids": ids }));
        }
        stage.a().fault("embeddings", 1, Fault::Held(looking.clone()));
        stage.a().forget_requests();
        listing.open();
        stage.eventually("it looks", || stage.a().saw("/get") > 0).await;
        let write = stage.start_upsert(&c, "later", 1);
        seconds(1).await;
        looking.open();
        assert_eq!(write.await.expect("an answer").status, 200);
        let row = stage.journal.repairs().first().cloned().expect("it goes on");
        assert_eq!(row.parked.is_some(), differs, "{row:?}");
        if differs {
            let reason = row.parked.unwrap_or_default();
            assert!(reason.contains("at least 250 records differ"), "{reason}");
            jobs::resync(&stage.core, &c, B, Some(A)).await.expect("an authority");
        }
        stage.repaired().await;
        stage.assert_converged();
    }
}

/// Writers that are faster than a copy are held back, and it ends while they go on.
#[tokio::test(start_paused = true)]
async fn a_copy_ends_however_much_is_written_meanwhile() {
    let stage = Stage::with(15, |settings| {
        settings.repair_touched = 50;
        settings.repair_records = 20;
    })
    .await;
    let c = stage.create("c").await;
    let batch = |from: u64, to: u64| {
        let ids: Vec<String> = (from..to).map(|id| format!("r{id}")).collect();
        let vectors = vec![[from, to]; ids.len()];
        json!({"ids": ids, "embeddings": vectors})
    };
    stage.write(&c, RecordWrite::Upsert, batch(0, 300)).await;
    stage.b().with(|chroma| chroma.lose("c"));
    stage.want(&c, B, RepairWanted::whole(1, "lost")).await;
    let (writer, its_c) = (stage.clone(), c.clone());
    let live = tokio::spawn(async move {
        for n in 0.. {
            let from = n * 10 % 400;
            writer.write(&its_c, RecordWrite::Upsert, batch(from, from + 10)).await;
        }
    });
    stage.heal();
    let joined = async {
        stage.eventually("it joins", || stage.usable(&c) == [A, B]).await;
    };
    let reason = || {
        let row = stage.journal.repairs().first().cloned();
        row.and_then(|row| diptych::repair::waits_for(&stage.core, &row))
    };
    let in_time = tokio::time::timeout(std::time::Duration::from_secs(60), joined).await;
    assert!(in_time.is_ok(), "never: {:?}", reason());
    assert!(!live.is_finished(), "while writes go on");
    live.abort();
    stage.repaired().await;
    assert_eq!(sorted(&stage, A), sorted(&stage, B));
    // Why a repair waits is told.
    stage.down(A);
    stage.want(&c, B, RepairWanted::whole(1, "a test")).await;
    assert_eq!(
        reason().as_deref(),
        Some("no node that it may be copied from is in step")
    );
}

/// S28: pages come from A while B holds the records in another order, and from any node once B is copied anew.
#[tokio::test(start_paused = true)]
async fn s28_a_copy_that_restores_the_order_ends_the_reading_from_one_node() {
    let stage = Stage::new(28).await;
    stage.heal();
    let c = stage.create("c").await;
    for (n, id) in (0..).zip(["x", "y", "z"]) {
        assert_eq!(stage.upsert(&c, id, n).await.status, 200);
    }
    stage.tamper(B, "c", RecordWrite::Delete, json!({"ids": ["x"]}));
    stage.want(&c, B, records(&["x"])).await;
    stage.repaired().await;
    assert_eq!(c.pinned(), Some(A), "x is the last one on B");
    stage.want(&c, B, RepairWanted::whole(1, "a test")).await;
    stage.repaired().await;
    assert_eq!(c.pinned(), Some(A), "the copy is made in place, and changes no order");
    let rebuild = RepairWanted {
        kind: RepairKind::Rebuild,
        ..RepairWanted::whole(1, "a test")
    };
    stage.want(&c, B, rebuild).await;
    stage.repaired().await;
    assert_eq!(c.pinned(), None);
    assert!(stage.journal.pins().is_empty());
}

/// Requests that every node fails are their sender's: he does not keep the lane from the writers.
#[tokio::test(start_paused = true)]
async fn reads_that_fail_by_their_own_fault_are_looked_into_now_and_then() {
    let stage = Stage::new(250).await;
    let c = stage.create("c").await;
    assert_eq!(stage.upsert(&c, "x", 1).await.status, 200);
    stage.nodes.iter().for_each(|node| node.forget_requests());
    for _ in 0..500 {
        for node in [A, B] {
            stage.core.observe_read(&c, node, 500);
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let looks: usize = stage.nodes.iter().map(|node| node.saw("/query")).sum();
    assert!((1..=4).contains(&looks), "{looks} looks in five seconds");
    // One that fails for good is found all the same.
    stage.b().fault(
        "/get ",
        ALWAYS,
        Fault::Answer(500, r#"{"error":"InternalError","message":"corrupt"}"#),
    );
    stage.pause_drain(true);
    for _ in 0..100 {
        stage.core.observe_read(&c, B, 500);
        seconds(1).await;
    }
    assert_eq!(stage.usable(&c), [A]);
}
