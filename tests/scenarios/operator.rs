//! What an operator does with the command line, on a running system.

use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::harness::cluster::{Cluster, Side};
use crate::harness::compare::DEFAULT;
use crate::harness::writer::Writer;
use crate::harness::{Stage, scenarios};

scenarios! {
    the_command_line_shows_and_steers_the_log: sqlite;
    a_comparison_names_what_differs_and_mends_it_if_told: sqlite;
    verbs_are_on_the_admin_port_alone: sqlite;
    what_is_printed_has_the_documented_shape: sqlite;
    what_was_given_up_on_is_decided_by_verbs: sqlite;
    errors_say_what_to_do: sqlite;
    the_health_check_speaks_to_machines: sqlite;
}

/// `diptych` with these words, asking this cluster.
pub fn diptych(cluster: &Cluster, words: &[&str]) -> Output {
    let admin = format!("http://127.0.0.1:{}", cluster.diptych.admin_port);
    let mut command = Command::new(env!("CARGO_BIN_EXE_diptych"));
    command.args(words).args(["--url", &admin]);
    command.env_remove("DIPTYCH_CONFIG").env_remove("DIPTYCH_ADMIN_TOKEN");
    command.stdin(std::process::Stdio::null());
    tokio::task::block_in_place(|| command.output().expect("the diptych binary"))
}

#[track_caller]
pub fn ok(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    text
}

#[track_caller]
pub fn fails(output: &Output, part: &str) {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && errors.contains(part), "{errors}");
}

pub fn value(output: &Output) -> Value {
    serde_json::from_str(&ok(output)).expect("JSON")
}

async fn the_command_line_shows_and_steers_the_log(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let mut writer = Writer::new(&cluster).await;
    writer.acked(5).await;
    cluster.diptych.wait_drained().await;
    ok(&diptych(&cluster, &["drain", "wait"]));
    cluster.down(Side::B).await;
    writer.acked(3).await;
    let page = ok(&diptych(&cluster, &["wal", "list"]));
    assert!(page.contains("upsert") && page.contains("3 of 3 shown"), "{page}");
    let listed = value(&diptych(
        &cluster,
        &["wal", "list", "--collection", "records", "--limit", "1", "--json"],
    ));
    let entry = &listed["entries"][0];
    let id = entry["id"].as_str().expect("an id");
    assert_eq!(
        (&entry["node"], &entry["collection"]["name"]),
        (&json!("replica"), &json!("records"))
    );
    let shown = value(&diptych(&cluster, &["wal", "show", id, "--json"]));
    assert_eq!(shown["body"]["ids"].as_array().map(Vec::len), Some(1), "{shown:#}");
    fails(&diptych(&cluster, &["wal", "retry", id]), "not parked");
    fails(&diptych(&cluster, &["wal", "skip", id]), "--yes");
    fails(&diptych(&cluster, &["wal", "skip", id, "--yes"]), "not parked");
    fails(&diptych(&cluster, &["wal", "show", "7"]), "`7` is not an id");
    fails(
        &diptych(&cluster, &["wal", "list", "--node", "third"]),
        "there are primary, replica",
    );
    fails(
        &diptych(&cluster, &["repairs", "retry", "00000000-0000-0000-0000-000000000000"]),
        "no repair",
    );
    fails(&diptych(&cluster, &["node", "accept", "replica"]), "--yes");
    fails(
        &diptych(&cluster, &["node", "accept", "third", "--yes"]),
        "no node third",
    );
    let nothing = value(&diptych(&cluster, &["wal", "list", "--parked", "--json"]));
    assert_eq!(nothing, json!({"entries": [], "total": 0}));

    ok(&diptych(&cluster, &["drain", "pause"]));
    cluster.b.restart().await;
    fails(
        &diptych(&cluster, &["drain", "wait", "--timeout", "3"]),
        "Not in sync after 3 s",
    );
    assert_eq!(cluster.diptych.status().await["wal"]["pending_writes"], 3);
    let page = tokio::task::block_in_place(|| {
        let admin = format!("http://127.0.0.1:{}", cluster.diptych.admin_port);
        let output = Command::new(env!("CARGO_BIN_EXE_diptych"));
        let mut output = output;
        output
            .args(["status", "--url", &admin])
            .output()
            .expect("the diptych binary")
    });
    assert!(String::from_utf8_lossy(&page.stdout).contains("the drain is paused"));
    ok(&diptych(&cluster, &["drain", "resume"]));
    ok(&diptych(&cluster, &["drain", "wait", "--timeout", "60"]));
    writer.check(&cluster).await;

    cluster.diptych.kill9();
    fails(&diptych(&cluster, &["wal", "list"]), "No Diptych can be reached");
}

async fn a_comparison_names_what_differs_and_mends_it_if_told(stage: Stage) {
    let cluster = stage.cluster().await;
    let mut writer = Writer::new(&cluster).await;
    writer.acked(20).await;
    cluster.diptych.wait_drained().await;
    assert!(ok(&diptych(&cluster, &["verify"])).contains("20 records compared: equal"));

    let on_b = cluster.b.api().by_name("records").await.ok().id();
    let behind = json!({"ids": ["r3", "r7"], "documents": ["changed", "changed"]});
    cluster.b.api().op(&on_b, "update", &behind).await.ok();
    let output = diptych(&cluster, &["verify", "--collection", "records"]);
    let page = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{page}");
    assert!(
        page.contains("records: 2 records of replica differ from primary: r3, r7\n"),
        "{page}"
    );
    let kept = cluster
        .b
        .api()
        .op(&on_b, "get", &json!({"ids": ["r3"]}))
        .await
        .ok()
        .json();
    assert_eq!(
        kept["documents"],
        json!(["changed"]),
        "nothing is overwritten unless asked"
    );

    let output = diptych(&cluster, &["verify", "--repair"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("being repaired"));
    cluster.diptych.wait_drained().await;
    ok(&diptych(&cluster, &["verify"]));
    writer.check(&cluster).await;

    // And all of it from the node that is said to count.
    cluster
        .b
        .api()
        .op(&on_b, "update", &json!({"ids": ["r1"], "documents": ["changed"]}))
        .await
        .ok();
    let words = ["resync", "--collection", "records", "--node", "replica"];
    fails(&diptych(&cluster, &words), "--yes");
    ok(&diptych(
        &cluster,
        &[&words[..], &["--from", "primary", "--yes"]].concat(),
    ));
    cluster.diptych.wait_drained().await;
    writer.check(&cluster).await;
    assert_eq!(cluster.assert_equal_in(&[DEFAULT]).await, 20);
}

async fn verbs_are_on_the_admin_port_alone(stage: Stage) {
    let cluster = stage.cluster().await;
    let (proxy, admin) = (cluster.api.clone(), cluster.diptych.admin());
    assert_eq!(admin.post("/admin/drain/pause", &json!({})).await.status, 200);
    assert_eq!(admin.post("/admin/drain/resume", &json!({})).await.status, 200);
    let paths = [
        "/admin/drain/pause",
        "/admin/verify",
        "/admin/wal/entries/x/skip",
        "/admin/repairs",
    ];
    for path in paths {
        let answer = proxy.post(path, &json!({})).await;
        assert_eq!(answer.status, 404, "{path}: Chroma's own answer");
    }
    assert_eq!(proxy.get_path("/admin/wal/entries").await.status, 404);
    assert_eq!(cluster.diptych.status().await["wal"]["drain_paused"], false);
    assert_eq!(admin.get_path("/admin/drain/pause").await.status, 405);
    let foreign = [("host", "evil.example"), ("origin", "http://evil.example")];
    let answer = admin
        .try_send(http::Method::POST, "/admin/drain/pause", &foreign, bytes::Bytes::new())
        .await
        .expect("an answer");
    assert_eq!(answer.status, 403, "a page of another site");
    assert_eq!(cluster.diptych.status().await["wal"]["drain_paused"], false);
}

/// Verbs whose shapes are compared where there is something to show: below, in `identity_of_nodes` and in `validate`.
const ELSEWHERE: [&str; 5] = ["wal retry", "wal skip", "node accept", "validate", "validate --clean"];

/// What a verb prints has the shape that docs/cli.md promises.
#[track_caller]
pub fn assert_documented(verb: &str, printed: &Value) {
    let shapes = documented();
    let shape = shapes.iter().find(|(name, _)| name == verb);
    let (_, shape) = shape.unwrap_or_else(|| panic!("{verb} is not documented"));
    assert_shape(verb, shape, printed);
}

/// The shapes of docs/cli.md, by verb.
fn documented() -> Vec<(String, Value)> {
    let page = include_str!("../../docs/cli.md");
    let sections = page.split("\n## `").skip(1);
    let shapes = sections.map(|section| {
        let (verb, rest) = section.split_once('`').expect("the verb");
        let (_, json) = rest.split_once("```json\n").expect("a shape");
        let (json, _) = json.split_once("```").expect("its end");
        let value = serde_json::from_str(json).unwrap_or_else(|error| panic!("{verb}: {error}"));
        (verb.to_owned(), value)
    });
    shapes.collect()
}

/// The same fields with the same types; `null` stands for what is not known.
fn assert_shape(at: &str, documented: &Value, printed: &Value) {
    match (documented, printed) {
        (Value::Null, _) | (_, Value::Null) => {}
        (Value::Object(documented), Value::Object(printed)) => {
            let keys =
                |of: &serde_json::Map<String, Value>| of.keys().cloned().collect::<std::collections::BTreeSet<_>>();
            assert_eq!(keys(documented), keys(printed), "{at}");
            for (key, value) in documented {
                assert_shape(&format!("{at}.{key}"), value, &printed[key]);
            }
        }
        (Value::Array(documented), Value::Array(printed)) => {
            if let Some(first) = documented.first() {
                assert!(!printed.is_empty(), "{at} shows nothing to compare");
                for value in printed {
                    assert_shape(at, first, value);
                }
            }
        }
        (Value::String(_), Value::String(_))
        | (Value::Number(_), Value::Number(_))
        | (Value::Bool(_), Value::Bool(_)) => {}
        _ => panic!("{at}: {documented} is documented, {printed} is printed"),
    }
}

async fn what_is_printed_has_the_documented_shape(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let mut writer = Writer::new(&cluster).await;
    writer.acked(5).await;
    cluster.diptych.wait_drained().await;
    cluster.down(Side::B).await;
    writer.acked(3).await;
    let listed = value(&diptych(&cluster, &["wal", "list", "--json"]));
    let entry = listed["entries"][0]["id"].as_str().expect("an id").to_owned();
    let mut shapes = documented();
    assert!(shapes.len() >= 20, "{shapes:?}");
    shapes.retain(|(verb, _)| !ELSEWHERE.contains(&verb.as_str()));
    let mut check = |cluster: &Cluster, verb: &str, words: &[&str]| {
        let position = shapes.iter().position(|(name, _)| name == verb);
        let (_, shape) = shapes.remove(position.unwrap_or_else(|| panic!("{verb} is not documented")));
        let verb: Vec<&str> = verb.split(' ').collect();
        let output = diptych(cluster, &[&verb, words, &["--json"]].concat());
        let printed = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{verb:?}: {error}: {}", String::from_utf8_lossy(&output.stderr)));
        assert_shape(&verb.join(" "), &shape, &printed);
    };
    check(&cluster, "status", &[]);
    check(&cluster, "health", &[]);
    check(&cluster, "wal list", &[]);
    check(&cluster, "wal show", &[&entry]);
    check(&cluster, "mapping list", &[]);
    check(&cluster, "mapping show", &["records"]);
    check(&cluster, "events", &[]);
    cluster.b.restart().await;
    check(&cluster, "drain wait", &["--timeout", "60"]);
    check(&cluster, "drain pause", &[]);
    check(&cluster, "drain resume", &[]);
    check(&cluster, "node maint", &["replica", "--wait", "60"]);
    // A repair that cannot be done yet.
    let copy = [
        "resync",
        "--collection",
        "records",
        "--node",
        "replica",
        "--yes",
        "--no-wait",
    ];
    ok(&diptych(&cluster, &copy));
    check(&cluster, "repairs list", &[]);
    let open = value(&diptych(&cluster, &["repairs", "list", "--json"]));
    let repair = open["repairs"][0]["id"].as_str().expect("an id").to_owned();
    check(&cluster, "repairs retry", &[&repair]);
    check(&cluster, "node ready", &["replica", "--wait", "60"]);
    check(&cluster, "verify", &[]);
    let words = [
        "--collection",
        "records",
        "--node",
        "replica",
        "--from",
        "primary",
        "--yes",
    ];
    check(&cluster, "resync", &words);
    assert!(shapes.is_empty(), "not looked at: {shapes:?}");
    writer.check(&cluster).await;
}

/// Entries are parked after hours only; here by hand, in the log's own file.
async fn park(journal: &str) {
    use sqlx::Connection;
    let mut log = sqlx::SqliteConnection::connect(journal).await.expect("the log");
    let parked = "UPDATE diptych_payload_rows SET parked = 'the disk is full'";
    sqlx::query(parked).execute(&mut log).await.expect("rows");
    log.close().await.expect("closed");
}

async fn what_was_given_up_on_is_decided_by_verbs(stage: Stage) {
    let journal = stage.journal_url();
    let options = crate::harness::cluster::Options {
        journal: Some(journal.clone()),
        ..Default::default()
    };
    let mut cluster = stage.cluster_with(options).await;
    let mut writer = Writer::new(&cluster).await;
    writer.acked(5).await;
    cluster.diptych.wait_drained().await;
    cluster.down(Side::B).await;
    writer.acked(3).await;
    cluster.diptych.kill9();
    park(&journal).await;
    cluster.diptych.restart().await;

    let health = diptych(&cluster, &["health"]);
    let line = String::from_utf8_lossy(&health.stdout);
    assert!(line.contains("3 parked: diptych wal list --parked"), "{line}");
    let page = ok(&diptych(&cluster, &["wal", "list", "--parked"]));
    assert!(
        page.contains("the disk is full") && page.contains("3 of 3 shown"),
        "{page}"
    );
    let listed = value(&diptych(&cluster, &["wal", "list", "--parked", "--json"]));
    assert_documented("wal list", &listed);
    let id = |n: usize| listed["entries"][n]["id"].as_str().expect("an id").to_owned();
    cluster.b.restart().await;
    let up = |status: &Value| match status["instances"][1]["up"] == true {
        true => Ok(()),
        false => Err("not up yet".to_owned()),
    };
    cluster.diptych.wait_status("the replica is up", up).await;
    fails(
        &diptych(&cluster, &["drain", "wait", "--timeout", "1"]),
        "replica (3 pending",
    );

    let skipped = value(&diptych(&cluster, &["wal", "skip", &id(0), "--yes", "--json"]));
    assert_documented("wal skip", &skipped);
    assert_eq!(skipped["repair_of"], json!(["replica"]));
    let retried = value(&diptych(&cluster, &["wal", "retry", &id(1), "--json"]));
    assert_documented("wal retry", &retried);
    // One that is not there any more does not keep the others from being done.
    let both = diptych(&cluster, &["wal", "retry", &id(0), &id(2)]);
    fails(&both, &format!("There is no entry {}", id(0)));
    assert!(String::from_utf8_lossy(&both.stdout).contains(&format!("{}: retried", id(2))));
    ok(&diptych(&cluster, &["drain", "wait", "--timeout", "60"]));
    writer.check(&cluster).await;
    cluster.assert_equal().await;
}

async fn errors_say_what_to_do(stage: Stage) {
    use crate::harness::cluster::Options;
    let cluster = stage
        .cluster_with(Options::default().extra("listen_status: true\n"))
        .await;
    cluster.api.collection("records").await;
    let replcia = diptych(&cluster, &["node", "maint", "replcia"]);
    fails(
        &replcia,
        "There is no node replcia; there are primary, replica. Did you mean replica?",
    );
    fails(
        &diptych(&cluster, &["mapping", "show", "recrods"]),
        "There is no collection recrods in default_tenant/default_database. Did you mean records?",
    );
    let nowhere = Command::new(env!("CARGO_BIN_EXE_diptych"))
        .args(["events", "--url", "http://127.0.0.1:1"])
        .output()
        .expect("the diptych binary");
    fails(&nowhere, "Is it running? Another one is named by --url");
    let chroma = Command::new(env!("CARGO_BIN_EXE_diptych"))
        .args(["drain", "pause", "--url", &cluster.a.url()])
        .output()
        .expect("the diptych binary");
    fails(&chroma, "is it the admin address of a Diptych?");
    let (port, _server) = refusing_server();
    for (token, part) in [
        ("", "wants the admin token: set"),
        ("wrong", "does not take this admin token"),
    ] {
        let asked = Command::new(env!("CARGO_BIN_EXE_diptych"))
            .args(["events", "--url", &format!("http://127.0.0.1:{port}")])
            .env("DIPTYCH_ADMIN_TOKEN", token)
            .output()
            .expect("the diptych binary");
        fails(&asked, part);
    }
}

/// Answers twice what an admin port with a token says to whoever does not show it.
fn refusing_server() -> (u16, std::thread::JoinHandle<()>) {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("its address").port();
    let server = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut client, _) = listener.accept().expect("a client");
            let _ = client.read(&mut [0; 4096]);
            let _ = client.write_all(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}");
        }
    });
    (port, server)
}

async fn the_health_check_speaks_to_machines(stage: Stage) {
    let mut cluster = stage.cluster().await;
    let mut writer = Writer::new(&cluster).await;
    writer.acked(3).await;
    cluster.diptych.wait_drained().await;
    let script = |cluster: &Cluster| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/wal_health_check.sh");
        let admin = format!("http://127.0.0.1:{}", cluster.diptych.admin_port);
        let output = tokio::task::block_in_place(|| Command::new(script).arg(admin).output().expect("sh"));
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    };
    let health = |cluster: &Cluster, words: &[&str]| {
        let output = diptych(cluster, &[&["health"], words].concat());
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    };
    let (code, line) = health(&cluster, &[]);
    assert!(code == Some(0) && line.starts_with("DIPTYCH OK"), "{line}");
    let (code, said) = script(&cluster);
    assert!(code == Some(0) && said.starts_with("OK"), "{said}");
    cluster.down(Side::B).await;
    writer.acked(3).await;
    let (code, line) = health(&cluster, &[]);
    assert!(code == Some(1) && line.contains("1 of 2 nodes healthy"), "{line}");
    assert_eq!(health(&cluster, &["--pending-critical", "3"]).0, Some(2));
    assert_eq!(health(&cluster, &["--no-such-flag"]).0, Some(3));
    let (code, said) = script(&cluster);
    assert!(
        code == Some(1) && said.contains("Start the node that is down"),
        "{said}"
    );
    cluster.diptych.kill9();
    assert_eq!(health(&cluster, &[]).0, Some(2));
    assert_eq!(script(&cluster).0, Some(2));
}
