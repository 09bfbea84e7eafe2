//! The commands in `docs/operations.md`, each run in the situation that the guide speaks of, and what it says they print.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::harness::cluster::{Cluster, Options, Side};
use crate::harness::postgres::Postgres;
use crate::harness::{Stage, eventually, scenarios};
use crate::repair::break_indices;

scenarios! {
    the_guide_tells_the_truth: sqlite;
    the_guide_tells_the_truth_of_a_log_that_is_away: postgres;
}

/// The situation that needs a database of its own.
const LOG_DOWN: &str = "log-down";

const GUIDE: &str = include_str!("../../docs/operations.md");

/// A command of the guide, what it prints, and its exit code.
#[derive(Debug, Default)]
struct Step {
    command: String,
    prints: Vec<String>,
    code: i32,
}

/// Blocks that are marked, with their situations.
fn blocks() -> Vec<(&'static str, Vec<Step>)> {
    let mut blocks = vec![];
    let mut lines = GUIDE.lines();
    while let Some(line) = lines.next() {
        let Some(situation) = line.strip_prefix("```console at=") else {
            continue;
        };
        let mut steps: Vec<Step> = vec![];
        for line in lines.by_ref().take_while(|line| !line.starts_with("```")) {
            if let Some(command) = line.strip_prefix("$ ") {
                steps.push(Step {
                    command: command.to_owned(),
                    ..Step::default()
                });
                continue;
            }
            let step = steps.last_mut().expect("a block begins with a command");
            match line.strip_prefix("(exit code ") {
                Some(code) => step.code = code.trim_end_matches(')').parse().expect("a number"),
                None => step.prints.push(line.to_owned()),
            }
        }
        blocks.push((situation, steps));
    }
    blocks
}

/// Whether a line is as the guide has it; `...` stands for anything.
fn fits(line: &str, pattern: &str) -> bool {
    let parts: Vec<&str> = pattern.split("...").map(str::trim).collect();
    let (first, last) = (parts[0], parts[parts.len() - 1]);
    if parts.len() == 1 {
        return line.trim_end() == pattern;
    }
    let mut rest = line;
    line.starts_with(first)
        && line.trim_end().ends_with(last)
        && parts.iter().all(|part| match rest.find(part) {
            Some(at) => {
                rest = &rest[at + part.len()..];
                true
            }
            None => false,
        })
}

async fn the_guide_tells_the_truth(stage: Stage) {
    assert!(fits("a b c", "a ... c") && fits("a b c", "... b ...") && !fits("a b c", "a ... d") && !fits("ab", "a"));
    let mut cluster = stage.cluster().await;
    let id = write_docs(&cluster).await;
    let mut blocks = blocks();
    blocks.retain(|(situation, _)| *situation != LOG_DOWN);
    assert!(blocks.len() >= 11, "{blocks:?}");
    for (situation, steps) in &blocks {
        println!("=== {situation}");
        enter(&mut cluster, situation, &id).await;
        for step in steps {
            run(&cluster, situation, step);
        }
        leave(&mut cluster).await;
    }
}

async fn the_guide_tells_the_truth_of_a_log_that_is_away(stage: Stage) {
    let dir = stage.dir.clone();
    let mut postgres = tokio::task::block_in_place(|| Postgres::dedicated(&dir));
    let journal = Some(tokio::task::block_in_place(|| postgres.create_database("journal")));
    let options = Options {
        journal,
        ..Options::default()
    };
    let mut cluster = stage.cluster_with(options).await;
    let id = write_docs(&cluster).await;
    let mut blocks = blocks();
    blocks.retain(|(situation, _)| *situation == LOG_DOWN);
    assert!(!blocks.is_empty());
    for (situation, steps) in &blocks {
        tokio::task::block_in_place(|| postgres.kill9());
        three_writes(&cluster, &id).await;
        let away = |status: &Value| match (&status["wal"]["available"], &status["wal"]["unprotected"]) {
            (Value::Bool(false), Value::Bool(true)) => Ok(()),
            other => Err(format!("{other:?}")),
        };
        cluster.diptych.wait_status("the log is away", away).await;
        for step in steps {
            run(&cluster, situation, step);
        }
        tokio::task::block_in_place(|| postgres.start());
        let covered = |status: &Value| match status["wal"]["unprotected"] == false {
            true => Ok(()),
            false => Err("not compared yet".to_owned()),
        };
        cluster.diptych.wait_status("all is compared", covered).await;
        leave(&mut cluster).await;
        assert_eq!(cluster.assert_equal().await, 20);
    }
}

/// A collection of 20 records, whose index the nodes have stored; its id.
async fn write_docs(cluster: &Cluster) -> String {
    let extra = json!({"configuration": {"hnsw": {"sync_threshold": 10, "batch_size": 5}}});
    let id = cluster.api.create_collection("docs", extra).await.ok().id();
    let ids: Vec<String> = (0..20).map(|n| format!("r{n}")).collect();
    for part in ids.chunks(5) {
        let records = json!({"ids": part, "embeddings": vec![[1.0, 2.0]; part.len()], "documents": part});
        cluster.api.op(&id, "add", &records).await.expect(201);
    }
    cluster.diptych.wait_drained().await;
    id
}

async fn enter(cluster: &mut Cluster, situation: &str, id: &str) {
    match situation {
        "well" => {}
        "replica-down" => {
            cluster.down(Side::B).await;
            three_writes(cluster, id).await;
        }
        "primary-down" => {
            cluster.down(Side::A).await;
            three_writes(cluster, id).await;
        }
        "both-down" => {
            cluster.down(Side::A).await;
            cluster.down(Side::B).await;
        }
        "backlog" => {
            pause(cluster).await;
            cluster.down(Side::B).await;
            three_writes(cluster, id).await;
            back(cluster).await;
        }
        // Repairs are held, so that the test can look at what would be over in a moment.
        "wiped" => {
            pause(cluster).await;
            cluster.down(Side::B).await;
            cluster.b.wipe();
            back(cluster).await;
        }
        "unreadable" => {
            pause(cluster).await;
            cluster.down(Side::B).await;
            assert!(break_indices(cluster.b.dir()) > 0, "an index was stored");
            back(cluster).await;
            let (api, diptych) = (&cluster.api, &cluster.diptych);
            let query = json!({"query_embeddings": [[1.0, 2.0]], "n_results": 1});
            eventually(std::time::Duration::from_secs(60), "it is noticed", || async {
                api.op(id, "query", &query).await.ok();
                match diptych.status().await["instances"][1]["repairs"] == 1 {
                    true => Ok(()),
                    false => Err("no repair"),
                }
            })
            .await;
        }
        "differ" => {
            let on_b = cluster.b.api().by_name("docs").await.ok().id();
            let change = json!({"ids": ["r1"], "documents": ["changed"]});
            cluster.b.api().op(&on_b, "update", &change).await.ok();
        }
        other => panic!("the guide speaks of a situation that nobody makes: {other}"),
    }
}

/// Holds drain and repairs.
async fn pause(cluster: &Cluster) {
    let admin = cluster.diptych.admin();
    admin.post("/admin/drain/pause", &json!({})).await.ok();
}

/// The replica runs again, and is known again.
async fn back(cluster: &mut Cluster) {
    cluster.b.restart().await;
    let up = |status: &Value| match status["instances"][1]["up"] == true {
        true => Ok(()),
        false => Err("not up yet".to_owned()),
    };
    cluster.diptych.wait_status("the replica is up", up).await;
}

async fn three_writes(cluster: &Cluster, id: &str) {
    for n in 0..3 {
        let record = json!({"ids": [format!("r{n}")], "documents": ["again"], "embeddings": [[3.0, 4.0]]});
        cluster.api.op(id, "upsert", &record).await.ok();
    }
}

/// All is well again.
async fn leave(cluster: &mut Cluster) {
    for side in [Side::A, Side::B] {
        if cluster.node(side).api().try_get("/api/v2/heartbeat").await.is_err() {
            cluster.node(side).restart().await;
        }
    }
    let admin = cluster.diptych.admin();
    admin.post("/admin/drain/resume", &json!({})).await.ok();
    cluster.diptych.wait_drained().await;
    // Monitoring speaks of the ports' processes: what it says of them is asked of a system that has settled.
    eventually(std::time::Duration::from_secs(60), "healthy", || async {
        let health = admin.try_get("/health").await?.json();
        match health["status"] == "healthy" {
            true => Ok(()),
            false => Err(health.to_string()),
        }
    })
    .await;
}

fn run(cluster: &Cluster, situation: &str, step: &Step) {
    let binary = Path::new(env!("CARGO_BIN_EXE_diptych"));
    let folder = binary.parent().expect("a folder").display();
    let path = format!("{folder}:{}", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new("sh");
    command
        .args(["-c", &step.command])
        .stdin(Stdio::null())
        .env("PATH", path);
    command.env("DIPTYCH_CONFIG", cluster.diptych.file());
    command.env_remove("DIPTYCH_ADMIN_TOKEN");
    let output = tokio::task::block_in_place(|| command.output().expect("sh"));
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    println!("$ {}\n{text}", step.command);
    let at = format!("{} (at {situation}):\n{text}", step.command);
    assert_eq!(output.status.code(), Some(step.code), "{at}");
    let mut lines = text.lines();
    for pattern in step.prints.iter().filter(|pattern| *pattern != "...") {
        assert!(
            lines.any(|line| fits(line, pattern)),
            "no line like `{pattern}` (in its turn) in {at}"
        );
    }
}
