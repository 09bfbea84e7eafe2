//! Failover and log sync: each node is out once, work goes on, and what it missed is in its log until it is back.

use serde_json::{Value, json};
use uuid::Uuid;

use super::outage::Way;
use super::shelf::{Shelf, chunk};
use super::stage::{NO_FAILOVER, Outcome, Stage, Stop, System, ensure, instance};

/// Records that are overwritten in a backlog, and how often.
const OVERWRITTEN: usize = 12;
const ROUNDS: usize = 4;

fn way<'a>(stage: &Stage<'a>) -> Result<&'a Way, Stop> {
    stage
        .system
        .way
        .as_ref()
        .ok_or_else(|| Stop::Skipped(NO_FAILOVER.to_owned()))
}

pub async fn failover(stage: &Stage<'_>) -> Outcome {
    let way = way(stage)?;
    stage.fact("by", if matches!(way, Way::Maint) { "maint" } else { "commands" });
    let kept = Shelf::create(stage, "kept").await?;
    kept.add(&[chunk("before", 0, 0), chunk("before", 1, 0), chunk("before", 2, 0)])
        .await?;
    kept.is_everywhere().await?;
    for (n, node) in stage.system.nodes.iter().enumerate() {
        let renamed = Shelf::create(stage, &format!("renamed-{n}")).await?;
        let doomed = Shelf::create(stage, &format!("doomed-{n}")).await?;
        for shelf in [&renamed, &doomed] {
            shelf.add(&[chunk("before", 0, 0)]).await?;
            shelf.is_everywhere().await?;
        }
        stage.take_out(way, n).await?;
        stage.step(&format!("work without {}", node.name));
        let file = format!("without-{}", node.name);
        kept.add(&[chunk(&file, 0, 0), chunk(&file, 1, 0)]).await?;
        kept.is_readable().await?;
        kept.upsert(&[chunk("before", 0, n + 1), chunk(&file, 2, 0)]).await?;
        let gone = format!("{file}:1");
        kept.delete(&json!({"ids": [gone]}), |record| record.id == gone).await?;
        kept.is_everywhere().await?;
        let made = Shelf::create(stage, &format!("made-{n}")).await?;
        made.add(&[chunk("made", 0, 0), chunk("made", 1, 0)]).await?;
        made.is_everywhere().await?;
        let old = renamed.name();
        renamed
            .rename(&format!("after-{n}"), json!({"purpose": "renamed"}))
            .await?;
        renamed.is_everywhere().await?;
        renamed.is_gone(&old).await?;
        let lost = doomed.name();
        doomed.drop_it().await?;
        if matches!(way, Way::Maint) {
            missed_it(stage, &made.name(), n).await?;
        }
        pending(stage, &node.name).await?;

        stage.bring_back().await?;
        for shelf in [&kept, &made, &renamed] {
            shelf.is_everywhere().await?;
        }
        renamed.is_gone(&old).await?;
        doomed.is_gone(&lost).await?;
        nothing_parked(stage, &node.name).await?;
    }
    Ok(())
}

/// A node that is out has not got what was written meanwhile: it was really out.
async fn missed_it(stage: &Stage<'_>, name: &str, node: usize) -> Result<(), String> {
    let node = &stage.system.nodes[node];
    let found = node.by_name(name).await?;
    ensure(found.is_none(), || {
        format!("{} is out, and has {name} all the same", node.name)
    })
}

/// The log keeps something for the node; how many entries.
async fn pending(stage: &Stage<'_>, node: &str) -> Result<u64, String> {
    let status = stage.system.admin.status().await?;
    let pending = instance(&status, node)?["pending_writes"].as_u64().unwrap_or_default();
    ensure(pending > 0, || {
        format!("{node} missed writes, and /status says that none is pending")
    })?;
    Ok(pending)
}

async fn nothing_parked(stage: &Stage<'_>, node: &str) -> Result<(), String> {
    let status = stage.system.admin.status().await?;
    let node_status = instance(&status, node)?;
    for field in ["parked", "parked_repairs", "pending_writes", "repairs"] {
        ensure(node_status[field] == 0, || {
            format!("{node} is back, and its {field} is {}", node_status[field])
        })?;
    }
    Ok(())
}

/// Entries that the log keeps for a collection.
async fn entries(system: &System, id: Uuid) -> Result<Value, String> {
    let path = format!("/admin/wal/entries?collection={id}&limit=1000");
    system.admin.verb(http::Method::GET, &path).await
}

pub async fn log_sync(stage: &Stage<'_>) -> Outcome {
    let way = way(stage)?;
    let system = stage.system;
    for (n, node) in system.nodes.iter().enumerate() {
        let shelf = Shelf::create(stage, &format!("backlog-{n}")).await?;
        let parts: Vec<_> = (0..OVERWRITTEN).map(|part| chunk("old", part, 0)).collect();
        shelf.add(&parts).await?;
        shelf.is_everywhere().await?;
        stage.take_out(way, n).await?;
        stage.step(&format!("make a backlog for {}", node.name));
        for round in 1..=ROUNDS {
            for part in 0..OVERWRITTEN {
                // New records between overwrites: their order tells the order of the entries.
                let new = chunk(&format!("new-{round}"), part, round);
                shelf.upsert(&[chunk("old", part, round), new]).await?;
            }
        }
        let gone = ["old:0".to_owned(), "new-1:1".to_owned()];
        shelf
            .delete(&json!({"ids": gone}), |record| gone.contains(&record.id))
            .await?;
        shelf.add(&[chunk("old", 0, ROUNDS + 1)]).await?;
        shelf.is_everywhere().await?;

        let listed = entries(system, shelf.id).await?;
        let count = listed["total"].as_u64().unwrap_or_default();
        ensure(count > 0, || {
            format!("the log keeps nothing of {} for {}", shelf.name(), node.name)
        })?;
        let list = listed["entries"].as_array().map_or(&[][..], Vec::as_slice);
        let places: Vec<i64> = list.iter().filter_map(|entry| entry["lsn"].as_i64()).collect();
        ensure(places.is_sorted() && !places.is_empty(), || {
            format!("the entries are not in order: {places:?}")
        })?;
        let other = list.iter().find(|entry| entry["node"] != *node.name);
        ensure(other.is_none(), || {
            format!("the log keeps an entry for a node that is there: {other:?}")
        })?;
        stage.fact(&format!("backlog_{}", node.name), pending(stage, &node.name).await?);

        stage.bring_back().await?;
        shelf.is_everywhere().await?;
        nothing_parked(stage, &node.name).await?;
        let left = entries(system, shelf.id).await?;
        ensure(left["total"] == 0, || {
            format!("the log still keeps {} entries", left["total"])
        })?;
    }
    Ok(())
}
