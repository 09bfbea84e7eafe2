//! `diptych wal`.

use std::process::ExitCode;

use chrono::Utc;
use clap::Subcommand;
use serde_json::Value;

use super::{CollectionArgs, Part, Sure, each, finish, query, what};
use crate::cli::Where;
use crate::cli::client::{Diptych, segment};
use crate::cli::status::{age, table, text};

/// `diptych wal`.
#[derive(Debug, Subcommand)]
pub enum Wal {
    /// Entries that wait for a node, oldest first.
    List {
        /// Only those for this node.
        #[arg(long)]
        node: Option<String>,
        #[command(flatten)]
        collection: CollectionArgs,
        /// Only those that were given up on.
        #[arg(long, conflicts_with_all = ["node", "collection"])]
        parked: bool,
        #[command(flatten)]
        part: Part,
        #[command(flatten)]
        at: Where,
    },
    /// One entry with its body.
    Show {
        id: String,
        #[command(flatten)]
        at: Where,
    },
    /// Try parked entries again.
    Retry {
        #[arg(required = true)]
        ids: Vec<String>,
        #[command(flatten)]
        at: Where,
    },
    /// Go on without parked entries; what they wrote is repaired from a node that has it.
    Skip {
        #[arg(required = true)]
        ids: Vec<String>,
        /// Even if no other node has everything: what the entry wrote is lost then.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        sure: Sure,
        #[command(flatten)]
        at: Where,
    },
}

pub fn wal(verb: &Wal) -> ExitCode {
    finish(match verb {
        Wal::List {
            node,
            collection,
            parked,
            part,
            at,
        } => list_entries(node.clone(), collection, *parked, part, at),
        Wal::Show { id, at } => show_entry(id, at),
        Wal::Retry { ids, at } => each(ids, at, |id| format!("/admin/wal/entries/{id}/retry")),
        Wal::Skip { ids, force, sure, at } => {
            let question = if *force {
                "What these entries wrote is lost where no other node has it."
            } else {
                "The node goes on without these entries, and their records are copied to it."
            };
            let force = if *force { "?force=true" } else { "" };
            sure.check(question)
                .and_then(|()| each(ids, at, |id| format!("/admin/wal/entries/{id}/skip{force}")))
        }
    })
}

fn list_entries(
    node: Option<String>,
    collection: &CollectionArgs,
    parked: bool,
    part: &Part,
    at: &Where,
) -> Result<(), String> {
    let diptych = Diptych::at(at)?;
    let mut pairs = vec![
        ("node", node),
        ("limit", Some(part.limit.to_string())),
        ("offset", Some(part.offset.to_string())),
    ];
    pairs.extend(collection.pairs());
    let path = if parked {
        "/admin/wal/parked"
    } else {
        "/admin/wal/entries"
    };
    let found = diptych.get(&format!("{path}{}", query(&pairs)))?;
    diptych.print(&found, entries_page);
    Ok(())
}

fn entries_page(found: &Value) -> String {
    let entries = found["entries"].as_array().map_or(&[][..], Vec::as_slice);
    let head = [
        "ID",
        "NODE",
        "OPERATION",
        "COLLECTION",
        "BYTES",
        "AGE",
        "ATTEMPTS",
        "PARKED",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    let now = Utc::now();
    rows.extend(entries.iter().map(|entry| {
        [
            text(&entry["id"]),
            text(&entry["node"]),
            text(&entry["operation"]),
            what(entry),
            text(&entry["bytes"]),
            age(&entry["created_at"], now),
            text(&entry["attempts"]),
            text(&entry["error"]),
        ]
    }));
    format!("{}{} of {} shown\n", table(&rows), entries.len(), text(&found["total"]))
}

fn show_entry(id: &str, at: &Where) -> Result<(), String> {
    let diptych = Diptych::at(at)?;
    let entry = diptych.get(&format!("/admin/wal/entries/{}", segment(id)))?;
    diptych.print(&entry, |entry| format!("{entry:#}\n"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lists_show_what_blocks() {
        let entry = json!({"id": "7", "node": "replica", "operation": "add", "collection": {"name": "docs"}, "bytes": 3,
                           "created_at": null, "attempts": 5, "error": "it went wrong"});
        let page = entries_page(&json!({"entries": [entry], "total": 3}));
        assert!(
            page.contains("it went wrong") && page.contains("1 of 3 shown"),
            "{page}"
        );
    }
}
