//! `diptych repairs`.

use std::process::ExitCode;

use chrono::Utc;
use clap::Subcommand;
use serde_json::Value;

use super::{Part, each, finish, query, what};
use crate::cli::Where;
use crate::cli::client::Diptych;
use crate::cli::status::{age, table, text};

/// `diptych repairs`.
#[derive(Debug, Subcommand)]
pub enum Repairs {
    /// Repairs that are open.
    List {
        /// Only those that failed and wait for a decision.
        #[arg(long)]
        parked: bool,
        #[command(flatten)]
        part: Part,
        #[command(flatten)]
        at: Where,
    },
    /// Try parked repairs again, or begin those that `heal: manual` left to you.
    Retry {
        #[arg(required = true)]
        ids: Vec<String>,
        #[command(flatten)]
        at: Where,
    },
}

pub fn repairs(verb: &Repairs) -> ExitCode {
    finish(match verb {
        Repairs::List { parked, part, at } => list_repairs(*parked, part, at),
        Repairs::Retry { ids, at } => each(ids, at, |id| format!("/admin/repairs/{id}/retry")),
    })
}

fn list_repairs(parked: bool, part: &Part, at: &Where) -> Result<(), String> {
    let diptych = Diptych::at(at)?;
    let query = query(&[
        ("parked", parked.then(|| "true".to_owned())),
        ("limit", Some(part.limit.to_string())),
        ("offset", Some(part.offset.to_string())),
    ]);
    let found = diptych.get(&format!("/admin/repairs{query}"))?;
    diptych.print(&found, repairs_page);
    Ok(())
}

fn repairs_page(found: &Value) -> String {
    let repairs = found["repairs"].as_array().map_or(&[][..], Vec::as_slice);
    let head = [
        "ID",
        "NODE",
        "KIND",
        "COLLECTION",
        "RECORDS",
        "FROM",
        "AGE",
        "DONE",
        "PARKED",
        "REASON",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    let now = Utc::now();
    rows.extend(repairs.iter().map(|repair| {
        let progress = &repair["progress"];
        let done = match progress["records_total"].as_u64() {
            Some(total) => format!("{}/{total}", text(&progress["records_done"])),
            None => "-".to_owned(),
        };
        [
            text(&repair["id"]),
            text(&repair["node"]),
            text(&repair["kind"]),
            what(repair),
            text(&repair["records"]),
            text(&repair["source"]),
            age(&repair["since"], now),
            done,
            text(&repair["parked"]),
            text(&repair["reason"]),
        ]
    }));
    format!("{}{} of {} shown\n", table(&rows), repairs.len(), text(&found["total"]))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_repair_shows_how_far_it_is() {
        let repair = json!({"id": "8", "node": "replica", "kind": "whole", "collection": null, "records": null,
                            "source": null, "since": null, "parked": null, "reason": "wiped",
                            "progress": {"records_done": 5, "records_total": 10}});
        let page = repairs_page(&json!({"repairs": [repair], "total": 1}));
        assert!(page.contains("(names)") && page.contains("5/10"), "{page}");
    }
}
