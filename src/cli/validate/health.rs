//! System health: proxy, nodes and journal are there, and are what they ought to be: not one server twice.

use std::collections::HashMap;

use serde_json::json;

use super::shelf::{Shelf, chunk};
use super::stage::{Outcome, Stage, ensure, instance};

pub async fn run(stage: &Stage<'_>) -> Outcome {
    let system = stage.system;
    stage.step("versions");
    let mut versions = vec![];
    for server in system.nodes.iter().chain([&system.proxy]) {
        server.heartbeat().await?;
        versions.push((server.name.clone(), json!(server.version().await?)));
    }
    let first = versions[0].1.clone();
    ensure(versions.iter().all(|(_, version)| *version == first), || {
        format!("the servers are of different versions: {versions:?}")
    })?;
    stage.fact("chroma_version", first);

    let status = system.admin.status().await?;
    ensure(status["total_instances"] == system.nodes.len(), || {
        format!(
            "/status counts {} nodes where {} are named here",
            status["total_instances"],
            system.nodes.len()
        )
    })?;
    for node in &system.nodes {
        instance(&status, &node.name)?;
    }

    stage.step("markers");
    let mut markers: HashMap<String, &str> = HashMap::new();
    for node in &system.nodes {
        let marker = node.marker().await?;
        let marker = marker.ok_or_else(|| format!("{} has no marker of Diptych: no node of this system", node.name))?;
        if let Some(other) = markers.insert(marker, &node.name) {
            return Err(format!("{other} and {} are one server: they have the same marker", node.name).into());
        }
    }

    stage.step("journal");
    let log = &status["wal"];
    ensure(log["available"] == true, || format!("the log does not answer: {log}"))?;
    ensure(log["journal"].as_str().is_some_and(|text| !text.is_empty()), || {
        format!("/status does not say what the log is: {log}")
    })?;
    ensure(log["unprotected"] == false, || {
        "there are writes that went without the log and were not compared yet".to_owned()
    })?;
    ensure(status["leader"] == true && status["term"].as_i64() > Some(0), || {
        format!(
            "the proxy does not write the log: leader {}, term {}",
            status["leader"], status["term"]
        )
    })?;
    stage.fact("journal", log["journal"].clone());

    stage
        .until("/health says healthy", async || {
            let reply = system.admin.web.get("/health").await?;
            let health = reply.expect(200)?;
            ensure(health["status"] == "healthy", || reply.to_string())
        })
        .await?;
    stage.in_step().await?;
    system.admin.web.get("/ready").await?.expect(200)?;

    // The nodes that are named here are those that the proxy writes to, and each has an id of its own for it.
    let probe = Shelf::create(stage, "probe").await?;
    probe.add(&[chunk("probe", 0, 0)]).await?;
    probe.is_everywhere().await?;
    let mut ids: HashMap<uuid::Uuid, &str> = HashMap::new();
    for node in &system.nodes {
        let id = node.found(&probe.name()).await?.id;
        if let Some(other) = ids.insert(id, &node.name) {
            return Err(format!(
                "{other} and {} are one server: a new collection has the same id there",
                node.name
            )
            .into());
        }
    }
    Ok(())
}
