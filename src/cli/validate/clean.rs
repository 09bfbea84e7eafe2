//! Removing what validate made, and nothing else: through the proxy, and then looking whether it is gone from every node,
//! from the catalog and from the log. What the proxy does not know is removed from the node that has it.
//!
//! A collection is ours by its name and by the mark in its metadata. What has one of them only is left alone.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chrono::{DateTime, Utc};
use http::Method;
use serde_json::{Value, json};

use super::names::{MARK, ours};
use super::poll::until;
use super::report::{Cleaned, Kept};
use super::server::Collection;
use super::stage::{System, ensure};

/// Mappings and entries in one answer.
const PAGE: usize = 1000;

/// All mappings of the catalog.
pub async fn mappings(system: &System) -> Result<Vec<Value>, String> {
    let mut rows = vec![];
    loop {
        let path = format!("/admin/collection_mappings?limit={PAGE}&offset={}", rows.len());
        let page = system.admin.web.get(&path).await?.expect(200)?;
        let page = page["collection_mappings"].as_array().ok_or("no mappings")?.clone();
        let last = page.len() < PAGE;
        rows.extend(page);
        if last {
            return Ok(rows);
        }
    }
}

/// Whether a row of a list speaks of the collection, in the database that validate works in.
fn speaks_of(system: &System, collection: &Value, name: &str) -> bool {
    let at = &system.proxy;
    collection["name"] == name && collection["tenant"] == at.tenant && collection["database"] == at.database
}

/// How many entries and repairs are open for collections of these names. What the log keeps for collections that are
/// gone is in no list of one collection, so all lists are gone through, as far as they reach.
async fn open_rows(system: &System, names: &BTreeSet<String>) -> Result<BTreeMap<String, u64>, String> {
    let mut open = BTreeMap::new();
    for (path, key) in [("/admin/wal/entries", "entries"), ("/admin/repairs", "repairs")] {
        let mut seen = 0;
        loop {
            let page = format!("{path}?limit={PAGE}&offset={seen}");
            let page = system.admin.verb(Method::GET, &page).await?;
            let rows = page[key].as_array().ok_or_else(|| format!("no {key} in {page}"))?;
            for name in names {
                let count = rows
                    .iter()
                    .filter(|row| speaks_of(system, &row["collection"], name))
                    .count();
                *open.entry(name.clone()).or_default() += count as u64;
            }
            seen += rows.len();
            // A full log: what lies deeper than a list reaches is somebody's backlog.
            if rows.len() < PAGE || seen >= 10 * PAGE {
                break;
            }
        }
    }
    Ok(open)
}

/// A collection of ours, and where it is.
#[derive(Debug)]
pub struct Leftover {
    pub name: String,
    /// Its id on each server that has it; the proxy's comes last.
    places: Vec<(usize, Collection)>,
    /// One of its copies lacks the mark.
    pub unmarked: bool,
}

/// Collections on any node or at the proxy whose names fit.
pub async fn find(system: &System, fits: impl Fn(&str) -> bool) -> Result<Vec<Leftover>, String> {
    let mut found: BTreeMap<String, Leftover> = BTreeMap::new();
    for (at, server) in system.nodes.iter().chain([&system.proxy]).enumerate() {
        for collection in server.collections().await? {
            if ours(&collection.name).is_none() || !fits(&collection.name) {
                continue;
            }
            let run = ours(&collection.name).map(|ours| ours.run.to_owned());
            let marked = collection.metadata[MARK].as_str().map(str::to_owned) == run;
            let entry = found.entry(collection.name.clone()).or_insert_with(|| Leftover {
                name: collection.name.clone(),
                places: vec![],
                unmarked: false,
            });
            entry.unmarked |= !marked;
            entry.places.push((at, collection));
        }
    }
    Ok(found.into_values().collect())
}

impl Leftover {
    /// How to look at it.
    pub fn kept(&self, system: &System, scenario: &str) -> Kept {
        let server = |at: usize| system.nodes.get(at).unwrap_or(&system.proxy);
        let place = |(at, collection): &(usize, Collection)| {
            let server = server(*at);
            (
                server.name.clone(),
                collection.id.to_string(),
                server.look(collection.id),
            )
        };
        Kept {
            scenario: scenario.to_owned(),
            name: self.name.clone(),
            places: self.places.iter().map(place).collect(),
        }
    }
}

/// Deletes collections through the proxy, and waits until they are gone from everywhere.
///
/// # Errors
/// Something of them is left: what and where.
pub async fn remove(system: &System, leftovers: &[Leftover], cleaned: &mut Cleaned) -> Result<(), String> {
    if let Some(odd) = leftovers.iter().find(|one| one.unmarked) {
        return Err(format!(
            "{} has not the mark of validate on every node, and is left alone",
            odd.name
        ));
    }
    let names: BTreeSet<String> = leftovers.iter().map(|one| one.name.clone()).collect();
    let before = mappings(system).await?;
    let open = open_rows(system, &names).await?;
    let mut wrong = vec![];
    for leftover in leftovers {
        let name = &leftover.name;
        system.notes.step(&format!("remove {name}"));
        match delete(system, leftover).await {
            Ok(documents) => {
                cleaned.documents += documents;
                cleaned.collections += 1;
                let rows = before.iter().filter(|row| mapped(system, row, name)).count();
                cleaned.mappings += rows;
                cleaned.entries += open.get(name).copied().unwrap_or_default();
            }
            Err(reason) => wrong.push(reason),
        }
    }
    if !wrong.is_empty() {
        return Err(wrong.join("\n"));
    }
    until(system.patience, "catalog and log have nothing of it", async || {
        let rows = mappings(system).await?;
        for name in &names {
            let row = rows.iter().find(|row| mapped(system, row, name));
            ensure(row.is_none(), || format!("the catalog still has {name}"))?;
        }
        let open = open_rows(system, &names).await?;
        let row = open.iter().find(|(_, count)| **count > 0);
        ensure(row.is_none(), || format!("the log still keeps rows: {row:?}"))
    })
    .await
}

fn mapped(system: &System, row: &Value, name: &str) -> bool {
    let collection = json!({"name": row["collection_name"], "tenant": row["tenant"], "database": row["database"]});
    speaks_of(system, &collection, name)
}

/// Deletes one, waits until no node has it, and says how many documents it had.
async fn delete(system: &System, leftover: &Leftover) -> Result<u64, String> {
    let (name, proxy) = (&leftover.name, &system.proxy);
    let mut documents = 0;
    for (at, collection) in &leftover.places {
        let server = system.nodes.get(*at).unwrap_or(proxy);
        documents = documents.max(server.counted(collection.id).await?.unwrap_or_default());
    }
    let mut known = proxy.by_name(name).await?.is_some();
    for (_, collection) in &leftover.places {
        // The catalog does not know it, but a node has it: its id makes it known.
        known = known || proxy.by_id(collection.id).await?.is_some();
    }
    let reply = proxy.delete(name).await?;
    ensure(reply.status == 200 || reply.status == 404, || reply.to_string())?;
    if reply.status == 404 {
        // A node kept what it said it had deleted: to the proxy it is gone, and nobody else can remove it there.
        for (at, _) in &leftover.places {
            if let Some(node) = system.nodes.get(*at) {
                let reply = node.delete(name).await?;
                ensure(reply.status == 200 || reply.status == 404, || reply.to_string())?;
            }
        }
    }
    for server in system.nodes.iter().chain([proxy]) {
        until(
            system.patience,
            &format!("{name} is gone from {}", server.name),
            async || {
                let found = server.by_name(name).await?;
                ensure(found.is_none(), || format!("{} still has it", server.name))
            },
        )
        .await?;
    }
    Ok(documents)
}

/// What `--clean` does.
#[derive(Debug, Clone, Copy)]
pub struct Sweep {
    pub older_than: Option<Duration>,
    pub dry: bool,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Swept {
    pub cleaned: Cleaned,
    /// What it found, or in a dry run would have removed.
    pub names: Vec<String>,
    /// What could not be removed, and why.
    pub wrong: Vec<String>,
}

/// Removes leftovers of earlier runs.
pub async fn sweep(system: &System, how: Sweep, now: DateTime<Utc>) -> Result<Swept, String> {
    let old = |name: &str| {
        let Some(age) = how.older_than else { return true };
        let begun = ours(name).map(|ours| ours.begun);
        begun.is_some_and(|begun| (now - begun).to_std().is_ok_and(|passed| passed >= age))
    };
    let mut swept = Swept::default();
    for leftover in find(system, old).await? {
        swept.names.push(leftover.name.clone());
        if leftover.unmarked {
            let name = &leftover.name;
            swept.wrong.push(format!(
                "{name} has not the mark of validate on every node, and is left alone"
            ));
            swept.cleaned.preserved.push(leftover.kept(system, "left alone"));
        } else if !how.dry {
            let one = [leftover];
            if let Err(reason) = remove(system, &one, &mut swept.cleaned).await {
                swept.wrong.push(reason);
                swept.cleaned.preserved.push(one[0].kept(system, "not removed"));
            }
        }
    }
    Ok(swept)
}
