//! Collection creation and mapping: one collection for clients, one UUID per node behind it.

use serde_json::{Value, json};
use uuid::Uuid;

use super::shelf::{Shelf, chunk};
use super::stage::{Outcome, Stage, ensure};

pub async fn run(stage: &Stage<'_>) -> Outcome {
    let (proxy, nodes) = (&stage.system.proxy, &stage.system.nodes);
    let metadata = json!({"purpose": "validation", "weight": 1.5, "count": 3, "keep": true});
    let configuration = json!({"hnsw": {"space": "ip", "ef_construction": 120, "max_neighbors": 24}});
    let shelf = Shelf::create_with(stage, "mapped", metadata.clone(), configuration).await?;
    let name = shelf.name();
    same_on_all(stage, &shelf).await?;
    mapping_is_complete(stage, &shelf).await?;

    stage.step("ids");
    let by_id = proxy
        .by_id(shelf.id)
        .await?
        .ok_or("the proxy does not find it by its id")?;
    ensure(by_id.name == name, || format!("its id leads to {}", by_id.name))?;
    let listed = proxy.collections().await?;
    let listed: Vec<Uuid> = listed.iter().filter(|one| one.name == name).map(|one| one.id).collect();
    ensure(listed == [shelf.id], || format!("a list shows {name} as {listed:?}"))?;
    let again = proxy.create(&json!({"name": name})).await?;
    again.expect(409)?;
    let again = json!({"name": name, "get_or_create": true});
    let found = proxy.create(&again).await?.expect(200)?;
    ensure(found["id"] == shelf.id.to_string(), || {
        format!("get_or_create gives the id {} instead of {}", found["id"], shelf.id)
    })?;

    // A node's own id is an alias for it.
    for node in nodes {
        let own = node.found(&name).await?.id;
        let shown = proxy.by_id(own).await?;
        ensure(shown.is_some_and(|shown| shown.id == shelf.id), || {
            format!(
                "the id that {} has for it, {own}, leads nowhere through the proxy",
                node.name
            )
        })?;
    }

    stage.step("dimension");
    shelf.add(&[chunk("first", 0, 0), chunk("first", 1, 0)]).await?;
    shelf.is_everywhere().await?;
    same_on_all(stage, &shelf).await?;

    stage.step("rename");
    shelf
        .rename("renamed", json!({"purpose": "renamed", "count": 4}))
        .await?;
    shelf.is_everywhere().await?;
    shelf.is_gone(&name).await?;
    same_on_all(stage, &shelf).await?;
    mapping_is_complete(stage, &shelf).await?;

    stage.step("delete and create again");
    shelf.drop_it().await?;
    let old = [shelf.id];
    let second = Shelf::create(stage, "renamed").await?;
    ensure(!old.contains(&second.id), || {
        "a new collection has the id of the old one".to_owned()
    })?;
    second.add(&[chunk("second", 0, 0)]).await?;
    second.is_everywhere().await?;
    mapping_is_complete(stage, &second).await?;
    Ok(())
}

/// Name, metadata, configuration and dimension are the same on all nodes, under different ids.
async fn same_on_all(stage: &Stage<'_>, shelf: &Shelf<'_>) -> Result<(), String> {
    let name = shelf.name();
    stage
        .until(&format!("{name} is the same on every node"), async || {
            let mut seen: Option<(String, [Value; 3])> = None;
            for node in &stage.system.nodes {
                let found = node.found(&name).await?;
                let facts = [found.metadata, found.configuration, found.dimension];
                match &seen {
                    Some((first, expected)) => {
                        for ((what, a), b) in ["metadata", "configuration", "dimension"]
                            .iter()
                            .zip(expected)
                            .zip(&facts)
                        {
                            ensure(a == b, || {
                                format!("its {what} is {a} on {first} and {b} on {}", node.name)
                            })?;
                        }
                    }
                    None => {
                        ensure(facts[0] == *shelf.metadata.borrow(), || {
                            format!("its metadata on {} is {}", node.name, facts[0])
                        })?;
                        seen = Some((node.name.clone(), facts));
                    }
                }
            }
            Ok(())
        })
        .await
}

/// The catalog has the id of each node: exactly those that the nodes themselves tell.
async fn mapping_is_complete(stage: &Stage<'_>, shelf: &Shelf<'_>) -> Result<(), String> {
    let name = shelf.name();
    stage
        .until(&format!("the mapping of {name} is complete"), async || {
            let rows = super::clean::mappings(stage.system).await?;
            let rows: Vec<&Value> = rows.iter().filter(|row| row["collection_name"] == *name).collect();
            let [row] = rows[..] else {
                return Err(format!("{} mappings instead of one", rows.len()));
            };
            ensure(row["status"] == "complete", || format!("it is not complete: {row}"))?;
            ensure(row["collection_id"] == shelf.id.to_string(), || {
                format!("it has another id: {row}")
            })?;
            for (node, key) in stage
                .system
                .nodes
                .iter()
                .zip(["primary_collection_id", "replica_collection_id"])
            {
                let id = node.found(&name).await?.id;
                ensure(row[key] == id.to_string(), || {
                    format!("it says {} for {}, which has it as {id}", row[key], node.name)
                })?;
            }
            Ok(())
        })
        .await
}
