//! `diptych validate`, and those who judge, judged: a good mirror passes and keeps nothing; a broken one fails, keeps the
//! evidence, and nobody's data is touched.

use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::harness::chroma::ChromaNode;
use crate::harness::cluster::{Cluster, Options, Side};
use crate::harness::compare::{DEFAULT, Dump, Record};
use crate::harness::fault::Seen;
use crate::harness::{Stage, scenarios};
use crate::operator::assert_documented;

scenarios! {
    a_good_mirror_passes_and_nothing_is_left: sqlite, postgres;
    without_leave_no_node_is_taken_out: sqlite;
    nodes_are_stopped_by_commands: sqlite;
    lost_writes_are_found: sqlite;
    swapped_writes_are_found: sqlite;
    ignored_deletes_are_found: sqlite;
    one_server_that_is_served_twice_is_found: sqlite;
    leftovers_are_removed_by_their_name_and_mark_alone: sqlite;
    what_cannot_run_says_so: sqlite;
}

/// Names that come close to those of validate.
const CLOSE: [&str; 6] = [
    "diptych-validate",
    "diptych-validate-mine",
    "diptych-validate-20200131T235959Z-0123abcd",
    "diptych-validate-20200131T235959Z-0123abcg-health-x",
    "Diptych-validate-20200131T235959Z-0123abcd-health-x",
    "x-diptych-validate-20200131T235959Z-0123abcd-health-x",
];

/// A collection: name, id, metadata, records.
type Held = (String, String, Value, Vec<Record>);

/// Somebody's data, as each node has it.
struct Users {
    names: Vec<String>,
    held: Vec<Vec<Held>>,
}

impl Users {
    async fn write(cluster: &Cluster) -> Users {
        let names: Vec<String> = CLOSE.iter().map(|name| (*name).to_owned()).collect();
        for name in &names {
            let id = cluster.api.collection(name).await;
            let records =
                json!({"ids": ["a", "b"], "embeddings": [[1.0, 2.0], [3.0, 4.0]], "documents": ["one", "two"]});
            cluster.api.op(&id, "add", &records).await.expect(201);
        }
        cluster.diptych.wait_drained().await;
        let held = Users::read(cluster, &names).await;
        Users { names, held }
    }

    async fn read(cluster: &Cluster, names: &[String]) -> Vec<Vec<Held>> {
        let mut held = vec![];
        for node in [&cluster.a, &cluster.b] {
            let dump = Dump::read(node, &[DEFAULT]).await.expect("the node answers");
            let of = |name: &String| {
                let found = dump.collection(name);
                (
                    name.clone(),
                    found.id.clone(),
                    found.metadata.clone(),
                    found.records.clone(),
                )
            };
            held.push(names.iter().map(of).collect());
        }
        held
    }

    /// They are as they were, on each node.
    async fn check(&self, cluster: &Cluster) {
        assert_eq!(Users::read(cluster, &self.names).await, self.held);
    }

    /// They are as they were, and there is nothing else: on the nodes, in the catalog, in the log.
    async fn are_alone(&self, cluster: &Cluster) {
        self.check(cluster).await;
        for node in [&cluster.a, &cluster.b] {
            assert_eq!(
                names_on(node).await.len(),
                self.names.len(),
                "{:?}",
                names_on(node).await
            );
        }
        let admin = cluster.diptych.admin();
        let mappings = admin.get_path("/admin/collection_mappings").await.ok().json();
        assert_eq!(mappings["total_mappings"], self.names.len(), "{mappings:#}");
        for path in ["/admin/wal/entries", "/admin/repairs"] {
            let rows = admin.get_path(path).await.ok().json();
            assert_eq!(rows["total"], 0, "{path}: {rows:#}");
        }
    }
}

async fn names_on(node: &ChromaNode) -> Vec<String> {
    let list = node.api().list("").await.ok().json();
    let list = list.as_array().expect("a list").iter();
    list.map(|one| one["name"].as_str().unwrap_or_default().to_owned())
        .collect()
}

/// `diptych validate` with these words: the exit code and what it printed.
fn run(words: &[&str]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_diptych"));
    command.arg("validate").args(words).stdin(Stdio::null());
    command.env_remove("DIPTYCH_CONFIG").env_remove("DIPTYCH_ADMIN_TOKEN");
    let output = tokio::task::block_in_place(|| command.output().expect("the diptych binary"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    println!(
        "diptych validate {}: {}\n{text}{errors}",
        words.join(" "),
        output.status
    );
    let text = if text.is_empty() { errors.into_owned() } else { text };
    (output.status.code().expect("an exit code"), text)
}

/// The same for this cluster, by its configuration; the report.
fn report(cluster: &Cluster, words: &[&str]) -> (i32, Value) {
    let file = cluster.diptych.file().to_str().expect("a path").to_owned();
    // Slow machines: the answer's time is told, and not judged.
    let words = [&["--config", &file, "--json", "--max-p99", "60s"][..], words].concat();
    let (code, text) = run(&words);
    (code, serde_json::from_str(&text).expect("a report"))
}

#[track_caller]
fn outcome<'r>(report: &'r Value, key: &str) -> (&'r str, &'r str) {
    let all = report["scenarios"].as_array().expect("scenarios");
    let one = all.iter().find(|one| one["key"] == key);
    let one = one.unwrap_or_else(|| panic!("no scenario {key} in {report:#}"));
    (
        one["outcome"].as_str().expect("a word"),
        one["reason"].as_str().unwrap_or_default(),
    )
}

#[track_caller]
fn failed<'r>(report: &'r Value, key: &str) -> &'r str {
    let (word, reason) = outcome(report, key);
    assert_eq!(word, "failed", "{key}: {report:#}");
    assert!(!reason.is_empty(), "{key} fails without a reason");
    reason
}

/// Each failed scenario's data is listed, is there, and can be looked at as it is told.
async fn evidence_is_kept(report: &Value) {
    let kept = report["preserved"].as_array().expect("a list");
    assert!(!kept.is_empty(), "{report:#}");
    for one in kept {
        let places = one["places"].as_array().expect("places");
        assert!(!places.is_empty(), "{one:#}");
        for place in places {
            let look = place["look"].as_str().expect("a command");
            let output = tokio::task::block_in_place(|| Command::new("sh").args(["-c", look]).output().expect("sh"));
            let shown: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
            assert!(shown["ids"].is_array(), "{look}: {shown}");
        }
    }
}

async fn a_good_mirror_passes_and_nothing_is_left(stage: Stage) {
    let cluster = stage.cluster().await;
    let users = Users::write(&cluster).await;
    let (junit, log) = (stage.dir.join("junit.xml"), stage.dir.join("validate.txt"));
    let (junit, log) = (junit.to_str().expect("a path"), log.to_str().expect("a path"));
    let (code, report) = report(&cluster, &["--failover", "--junit", junit, "--log", log]);
    assert_eq!((code, &report["verdict"]), (0, &json!("passed")), "{report:#}");
    assert_eq!(
        (&report["passed"], &report["skipped"], &report["failed"]),
        (&json!(7), &json!(0), &json!(0))
    );
    for one in report["scenarios"].as_array().expect("scenarios") {
        assert!(one["direct_reads"].as_u64() > Some(0), "{one:#}");
    }
    // Of scenarios, one with parts: the shape of a part is compared too.
    let mut shown = report.clone();
    let status = shown["scenarios"].as_array_mut().expect("scenarios");
    status.retain(|one| one["key"] == "status");
    assert_documented("validate", &shown);
    let cleaned = &report["clean_up"];
    assert_eq!(
        (&cleaned["scenarios_cleaned"], &cleaned["collections_preserved"]),
        (&json!(7), &json!(0))
    );
    assert!(
        cleaned["documents"].as_u64() > Some(50) && cleaned["mappings"] == cleaned["collections"],
        "{cleaned}"
    );
    let cases = std::fs::read_to_string(junit).expect("a test report");
    assert!(
        cases.contains("failures=\"0\" skipped=\"0\"") && cases.matches("<testcase").count() == 16,
        "{cases}"
    );
    let steps = std::fs::read_to_string(log).expect("a log");
    assert!(steps.contains("take replica out") && steps.contains("/admin/nodes/replica/maint: 200"));
    users.are_alone(&cluster).await;
}

async fn without_leave_no_node_is_taken_out(stage: Stage) {
    let cluster = stage.cluster().await;
    let users = Users::write(&cluster).await;
    let (proxy, admin) = (
        cluster.diptych.url(),
        format!("http://127.0.0.1:{}", cluster.diptych.admin_port),
    );
    let nodes = [
        format!("primary={}", cluster.a.url()),
        format!("replica={}", cluster.b.url()),
    ];
    let words = [
        "--proxy",
        &proxy,
        "--admin",
        &admin,
        "--node",
        &nodes[0],
        "--node",
        &nodes[1],
        "--max-p99",
        "60s",
    ];
    let (code, page) = run(&words);
    assert_eq!(code, 0, "{page}");
    assert!(
        page.contains("Passed with 2 skipped, and 1 parts of others in"),
        "{page}"
    );
    assert!(
        page.contains("SKIPPED  Failover") && page.contains("SKIPPED  Log sync"),
        "{page}"
    );
    assert!(
        page.contains("Cleaned: 5 scenarios;") && page.contains("Preserved: nothing."),
        "{page}"
    );
    let status = cluster.diptych.status().await;
    for node in status["instances"].as_array().expect("instances") {
        assert_eq!(node["ejections"], 0, "nobody was taken out: {node:#}");
    }
    users.are_alone(&cluster).await;

    // Nothing but skipped is no proof of anything.
    let (code, report) = report(&cluster, &["--only", "failover,log-sync"]);
    assert_eq!((code, &report["outcome"]), (2, &json!("could_not_run")), "{report:#}");
}

async fn nodes_are_stopped_by_commands(stage: Stage) {
    let cluster = stage.cluster().await;
    let users = Users::write(&cluster).await;
    for (name, node) in [("primary", &cluster.a), ("replica", &cluster.b)] {
        std::fs::write(stage.dir.join(format!("{name}.pid")), node.pid().to_string()).expect("a file");
    }
    let command = |signal: &str| format!("kill -{signal} $(cat {}/{{}}.pid)", stage.dir.display());
    let (stop, start) = (command("STOP"), command("CONT"));
    let words = ["--stop-node", &stop, "--start-node", &start, "--only", "failover"];
    let (code, good) = report(&cluster, &words);
    assert_eq!(code, 0, "{good:#}");
    assert_eq!(outcome(&good, "failover").0, "passed");
    users.are_alone(&cluster).await;

    // A command that does not stop anything proves nothing, and leaves nothing stopped.
    let words = [
        "--stop-node",
        "true",
        "--start-node",
        "true",
        "--only",
        "log-sync",
        "--timeout",
        "3s",
    ];
    let (code, bad) = report(&cluster, &words);
    assert_eq!(code, 1, "{bad:#}");
    assert!(failed(&bad, "log-sync").contains("is given nothing"), "{bad:#}");
    users.check(&cluster).await;
}

/// Writes of records by anybody but Diptych itself.
fn records(seen: &Seen) -> bool {
    seen.is_record_write() && !seen.is_own()
}

async fn broken(stage: &Stage) -> (Cluster, Users) {
    let options = Options {
        fault_b: true,
        ..Options::default()
    };
    let cluster = stage.cluster_with(options).await;
    let users = Users::write(&cluster).await;
    (cluster, users)
}

async fn lost_writes_are_found(stage: Stage) {
    let (cluster, users) = broken(&stage).await;
    cluster.fault(Side::B).lose(20, records);
    let words = ["--only", "health,documents,document-delete", "--timeout", "4s"];
    let (code, report) = report(&cluster, &words);
    assert_eq!(code, 1);
    // Whether a node or the proxy is seen first to lack it is left to where the proxy reads.
    let lacks = |reason: &str| reason.contains("missing") || reason.contains("count says");
    for key in ["documents", "document-delete"] {
        assert!(lacks(failed(&report, key)), "{report:#}");
    }
    evidence_is_kept(&report).await;
    users.check(&cluster).await;
}

async fn swapped_writes_are_found(stage: Stage) {
    let (cluster, users) = broken(&stage).await;
    cluster.fault(Side::B).swap(7, records);
    let (code, report) = report(&cluster, &["--only", "document-delete,documents", "--timeout", "4s"]);
    assert_eq!(code, 1);
    failed(&report, "documents");
    evidence_is_kept(&report).await;
    users.check(&cluster).await;

    // No swap among its first 30 writes lacks its second write when the nodes are read.
    cluster.fault(Side::B).clear();
    cluster.fault(Side::B).swap(7, records);
    let (code, report) = self::report(&cluster, &["--only", "document-delete", "--timeout", "4s"]);
    assert_eq!(code, 1);
    let reason = failed(&report, "document-delete");
    assert!(
        reason.contains("replica") && reason.contains("the order differs"),
        "{reason}"
    );
    evidence_is_kept(&report).await;
    users.check(&cluster).await;
}

async fn ignored_deletes_are_found(stage: Stage) {
    let (cluster, users) = broken(&stage).await;
    let fault = cluster.fault(Side::B);
    fault.lose(1, |seen| records(seen) && seen.is_op("delete"));
    let words = ["--only", "health,documents,document-delete", "--timeout", "4s"];
    let (code, first) = report(&cluster, &words);
    assert_eq!(code, 1);
    assert!(failed(&first, "documents").contains("ought not to be"), "{first:#}");
    assert!(failed(&first, "document-delete").contains("still has"), "{first:#}");
    assert_eq!(outcome(&first, "health").0, "passed", "it deletes no records");
    evidence_is_kept(&first).await;

    // Of collections: then nobody's data can be removed, and who passed says so.
    fault.clear();
    fault.lose(1, |seen| seen.method == "DELETE" && !seen.is_own());
    let (code, second) = report(&cluster, &["--only", "health,creation", "--timeout", "4s"]);
    assert_eq!(code, 1);
    assert!(failed(&second, "health").contains("cannot be removed"), "{second:#}");
    assert!(failed(&second, "creation").contains("gone from replica"), "{second:#}");
    evidence_is_kept(&second).await;
    users.check(&cluster).await;

    // The node is mended, and the evidence goes.
    fault.clear();
    let (code, swept) = report(&cluster, &["--clean", "--timeout", "4s"]);
    assert_eq!(code, 0, "{swept:#}");
    users.are_alone(&cluster).await;
}

async fn one_server_that_is_served_twice_is_found(stage: Stage) {
    let (cluster, users) = broken(&stage).await;
    cluster.fault(Side::B).redirect(cluster.a.port);
    let (code, report) = report(&cluster, &["--only", "health,documents", "--timeout", "4s"]);
    assert_eq!(code, 1);
    assert!(
        failed(&report, "health").contains("primary and replica are one server"),
        "{report:#}"
    );
    let reason = failed(&report, "documents");
    assert!(reason.contains("primary and replica are one server"), "{reason}");
    evidence_is_kept(&report).await;
    users.check(&cluster).await;
}

async fn leftovers_are_removed_by_their_name_and_mark_alone(stage: Stage) {
    let cluster = stage.cluster().await;
    let users = Users::write(&cluster).await;
    let mark = |run: &str| json!({"metadata": {"diptych_validate": run}});
    let (old, new) = ("20200131T235959Z-0123abcd", "21200131T235959Z-0123abcd");
    // The very same names and marks in another database and in another tenant are not those of the run that is cleaned.
    let elsewhere = [("default_tenant", "other"), ("tenant", "default_database")];
    cluster.api.create_tenant("tenant").await.ok();
    for (tenant, database) in elsewhere {
        cluster
            .api
            .within(tenant, database)
            .create_database(database)
            .await
            .ok();
    }
    for run in [old, new] {
        let name = format!("diptych-validate-{run}-health-x");
        let mut apis = vec![cluster.api.clone()];
        apis.extend(elsewhere.map(|(tenant, database)| cluster.api.within(tenant, database)));
        for api in apis {
            let id = api.create_collection(&name, mark(run)).await.ok().id();
            let records = json!({"ids": ["a"], "embeddings": [[1.0]]});
            api.op(&id, "add", &records).await.expect(201);
        }
    }
    cluster.diptych.wait_drained().await;
    let (code, told) = report(&cluster, &["--clean", "--older-than", "1d", "--dry-run"]);
    let found = json!(["diptych-validate-20200131T235959Z-0123abcd-health-x"]);
    assert_eq!(
        (code, &told["found"], &told["collections"]),
        (0, &found, &json!(0)),
        "{told:#}"
    );
    assert_eq!(names_on(&cluster.b).await.len(), CLOSE.len() + 2, "nothing is removed");
    let (code, told) = report(&cluster, &["--clean", "--older-than", "1d"]);
    assert_documented("validate --clean", &told);
    assert_eq!(
        (code, &told["found"], &told["documents"]),
        (0, &found, &json!(1)),
        "{told:#}"
    );
    let (code, told) = report(&cluster, &["--clean"]);
    assert_eq!(
        (code, &told["collections"], &told["mappings"]),
        (0, &json!(1), &json!(1)),
        "{told:#}"
    );
    let others: Vec<(&str, &str)> = elsewhere.to_vec();
    assert_eq!(
        cluster.assert_equal_in(&others).await,
        4,
        "each has its record, on both nodes"
    );
    for (tenant, database) in elsewhere {
        let api = cluster.api.within(tenant, database);
        for run in [old, new] {
            api.drop_collection(&format!("diptych-validate-{run}-health-x"))
                .await
                .ok();
        }
    }
    users.are_alone(&cluster).await;

    // The name alone does not make it ours, nor does another run's mark.
    let name = format!("diptych-validate-{old}-health-y");
    let id = cluster.api.create_collection(&name, mark(new)).await.ok().id();
    let (code, told) = report(&cluster, &["--clean"]);
    assert_eq!(code, 1, "{told:#}");
    assert!(
        told["not_removed"][0]
            .as_str()
            .is_some_and(|text| text.contains("left alone")),
        "{told:#}"
    );
    cluster.api.by_id(&id).await.ok();
    users.check(&cluster).await;
}

async fn what_cannot_run_says_so(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let (proxy, node) = (cluster.diptych.url(), cluster.a.url());
    let nodes = [format!("primary={node}"), format!("replica={}", cluster.b.url())];
    let at = |admin: &str, more: &[&str]| {
        let words = ["--proxy", &proxy, "--admin", admin, "--node", &nodes[0]];
        run(&[&words[..], more].concat())
    };
    let says = |(code, text): (i32, String), part: &str| {
        assert!(code == 2 && text.contains(part), "{code}: {text}");
    };
    says(run(&[]), "--config FILE");
    says(at(&node, &["--node", &nodes[1]]), "GET http://");
    let admin = format!("http://127.0.0.1:{}", cluster.diptych.admin_port);
    says(at(&admin, &[]), "two nodes at least");
    says(at(&admin, &["--node", "replica"]), "NAME=URL");
    says(at(&admin, &["--node", &nodes[1], "--older-than", "1d"]), "--clean");
    says(at(&admin, &["--node", &nodes[1], "--stop-node", "x"]), "--start-node");
    cluster.diptych.kill9();
    says(at(&admin, &["--node", &nodes[1]]), "Could not run");
}
