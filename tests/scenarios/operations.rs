//! The commands in `docs/operations.md`, each run in the situation that the guide speaks of, and what it says they print.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::harness::cluster::{Cluster, Side};
use crate::harness::{Stage, eventually, scenarios};

scenarios! {
    the_guide_tells_the_truth: sqlite;
}

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
    let id = cluster.api.collection("docs").await;
    let ids: Vec<String> = (0..20).map(|n| format!("r{n}")).collect();
    let vectors = vec![[1.0, 2.0]; ids.len()];
    let records = json!({"ids": ids, "embeddings": vectors, "documents": ids});
    cluster.api.op(&id, "add", &records).await.expect(201);
    cluster.diptych.wait_drained().await;
    let blocks = blocks();
    assert!(blocks.len() >= 12, "{blocks:?}");
    for (situation, steps) in &blocks {
        println!("=== {situation}");
        enter(&mut cluster, situation, &id).await;
        for step in steps {
            run(&cluster, situation, step);
        }
        leave(&mut cluster).await;
    }
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
            cluster
                .diptych
                .admin()
                .post("/admin/drain/pause", &json!({}))
                .await
                .ok();
            cluster.down(Side::B).await;
            three_writes(cluster, id).await;
            cluster.b.restart().await;
            let healthy = |status: &serde_json::Value| match status["instances"][1]["up"] == true {
                true => Ok(()),
                false => Err("not up yet".to_owned()),
            };
            cluster.diptych.wait_status("the replica is up", healthy).await;
        }
        "wiped" => {
            cluster.down(Side::B).await;
            cluster.b.wipe();
            cluster.b.restart().await;
        }
        "differ" => {
            let on_b = cluster.b.api().by_name("docs").await.ok().id();
            let change = json!({"ids": ["r1"], "documents": ["changed"]});
            cluster.b.api().op(&on_b, "update", &change).await.ok();
        }
        other => panic!("the guide speaks of a situation that nobody makes: {other}"),
    }
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
    cluster.diptych.wait_drained().await;
    // Monitoring speaks of the ports' processes: what it says of them is asked of a system that has settled.
    let admin = cluster.diptych.admin();
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
