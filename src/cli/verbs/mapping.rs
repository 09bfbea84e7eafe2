//! `diptych mapping`: which UUID a collection has on which node.

use std::process::ExitCode;

use clap::Subcommand;
use serde_json::Value;

use super::{Part, finish, query};
use crate::cli::Where;
use crate::cli::client::{Diptych, segment};
use crate::cli::status::{table, text};

/// `diptych mapping`.
#[derive(Debug, Subcommand)]
pub enum Mapping {
    /// Which UUID each collection has on each node, newest first.
    List {
        #[command(flatten)]
        part: Part,
        #[command(flatten)]
        at: Where,
    },
    /// One collection.
    Show {
        /// Its name, or any of its UUIDs.
        collection: String,
        /// Where the name is looked up.
        #[arg(long)]
        tenant: Option<String>,
        /// Where the name is looked up.
        #[arg(long)]
        database: Option<String>,
        #[command(flatten)]
        at: Where,
    },
}

pub fn mapping(verb: &Mapping) -> ExitCode {
    finish(match verb {
        Mapping::List { part, at } => list(part, at),
        Mapping::Show {
            collection,
            tenant,
            database,
            at,
        } => show(collection, tenant.as_ref(), database.as_ref(), at),
    })
}

fn list(part: &Part, at: &Where) -> Result<(), String> {
    let diptych = Diptych::at(at)?;
    let query = query(&[
        ("limit", Some(part.limit.to_string())),
        ("offset", Some(part.offset.to_string())),
    ]);
    let found = diptych.get(&format!("/admin/mappings{query}"))?;
    diptych.print(&found, list_page);
    Ok(())
}

fn list_page(found: &Value) -> String {
    let mappings = found["mappings"].as_array().map_or(&[][..], Vec::as_slice);
    let head = ["COLLECTION", "DATABASE", "ID", "STATUS", "MISSING ON"];
    let mut rows = vec![head.map(str::to_owned)];
    rows.extend(mappings.iter().map(|mapping| {
        let nodes = mapping["nodes"].as_array().map_or(&[][..], Vec::as_slice);
        let missing: Vec<String> = nodes
            .iter()
            .filter(|node| node["id"].is_null())
            .map(|node| text(&node["name"]))
            .collect();
        [
            text(&mapping["name"]),
            format!("{}/{}", text(&mapping["tenant"]), text(&mapping["database"])),
            text(&mapping["id"]),
            text(&mapping["status"]),
            if missing.is_empty() {
                "-".to_owned()
            } else {
                missing.join(", ")
            },
        ]
    }));
    format!(
        "{}{} of {} shown\n",
        table(&rows),
        mappings.len(),
        text(&found["total"])
    )
}

fn show(name: &str, tenant: Option<&String>, database: Option<&String>, at: &Where) -> Result<(), String> {
    let diptych = Diptych::at(at)?;
    let query = query(&[("tenant", tenant.cloned()), ("database", database.cloned())]);
    let found = diptych.get(&format!("/admin/mappings/{}{query}", segment(name)))?;
    diptych.print(&found, show_page);
    Ok(())
}

fn show_page(mapping: &Value) -> String {
    let mut page = format!(
        "{} in {}/{}\nid for clients: {}\nmade {}, changed {}\n\n",
        text(&mapping["name"]),
        text(&mapping["tenant"]),
        text(&mapping["database"]),
        text(&mapping["id"]),
        text(&mapping["created_at"]),
        text(&mapping["updated_at"]),
    );
    let mut rows = vec![["NODE", "ID THERE", "IN SYNC", "PENDING", "REPAIRS"].map(str::to_owned)];
    let nodes = mapping["nodes"].as_array().map_or(&[][..], Vec::as_slice);
    rows.extend(nodes.iter().map(|node| {
        [
            text(&node["name"]),
            text(&node["id"]),
            if node["in_sync"] == true { "yes" } else { "no" }.to_owned(),
            text(&node["pending_writes"]),
            text(&node["repairs"]),
        ]
    }));
    page.push_str(&table(&rows));
    page
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_mapping_says_where_it_is_missing() {
        let node = |name: &str, id: Option<&str>| json!({"name": name, "id": id, "in_sync": id.is_some(), "pending_writes": 0, "repairs": 0});
        let mapping = json!({"name": "docs", "tenant": "t", "database": "d", "id": "1", "status": "partial",
                             "created_at": "then", "updated_at": "now",
                             "nodes": [node("primary", Some("1")), node("replica", None)]});
        let page = list_page(&json!({"mappings": [mapping], "total": 1}));
        assert!(
            page.contains("partial  replica\n") && page.contains("1 of 1 shown"),
            "{page}"
        );
        let page = show_page(&mapping);
        assert!(page.contains("replica  -         no"), "{page}");
    }
}
