//! `diptych verify`.

use std::process::ExitCode;

use clap::Args;
use indicatif::HumanCount;
use serde_json::Value;

use super::{CollectionArgs, query};
use crate::cli::Where;
use crate::cli::client::Diptych;
use crate::cli::progress::Waiting;
use crate::cli::status::text;

/// Differing records that are printed by name.
const NAMED: usize = 20;

/// `diptych verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    #[command(flatten)]
    collection: CollectionArgs,
    /// Share of the records to compare, in percent; all ids are compared in any case.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100))]
    sample: u32,
    /// Records per second, at most; 0: as fast as it goes.
    #[arg(long, default_value_t = 0)]
    rate: u32,
    /// Make what differs equal to the first node in step.
    #[arg(long)]
    repair: bool,
    /// Do not wait for the result.
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    at: Where,
}

pub fn verify(args: &VerifyArgs) -> ExitCode {
    match compare(args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(reason) => {
            eprintln!("{reason}");
            ExitCode::FAILURE
        }
    }
}

/// True: what was compared is equal.
fn compare(args: &VerifyArgs) -> Result<bool, String> {
    let diptych = Diptych::at(&args.at)?;
    let mut pairs = vec![
        ("sample", Some(args.sample.to_string())),
        ("rate", Some(args.rate.to_string())),
        ("repair", args.repair.then(|| "true".to_owned())),
    ];
    pairs.extend(args.collection.pairs());
    let begun = diptych.post(&format!("/admin/verify{}", query(&pairs)))?;
    if args.no_wait {
        diptych.print(&begun, |begun| {
            format!("Comparison {} has begun.\n", text(&begun["id"]))
        });
        return Ok(true);
    }
    let path = format!("/admin/verify/{}", text(&begun["id"]));
    let waiting = Waiting::begin();
    let report = loop {
        let report = diptych.get(&path)?;
        if !report["finished_at"].is_null() {
            break report;
        }
        tell(&waiting, &report);
        waiting.pause();
    };
    waiting.end();
    diptych.print(&report, report_page);
    Ok(is_equal(&report))
}

/// Parts of a collection that the bar shows.
const PARTS: u64 = 1000;

/// How far it is: collections count alike, and the one under way by its records.
fn tell(waiting: &Waiting, report: &Value) {
    let count = |of: &Value| of.as_u64().unwrap_or(0);
    let current = &report["current"];
    let (all, done) = (count(&report["collections"]), count(&report["collections_done"]));
    let of_current = (count(&current["records"]) * PARTS)
        .checked_div(count(&current["records_total"]))
        .unwrap_or(0);
    let records = HumanCount(count(&report["records"]));
    let mut said = format!("{done} of {all} collections, {records} records");
    if let Some(name) = current["name"].as_str() {
        said.push_str(&format!("; at {name}"));
    }
    waiting.part(&said, done * PARTS + of_current.min(PARTS), all * PARTS);
}

fn findings(report: &Value) -> &[Value] {
    report["findings"].as_array().map_or(&[], Vec::as_slice)
}

fn is_clean(finding: &Value) -> bool {
    finding["differing"] == 0 && finding["properties"].is_null() && finding["skipped"].is_null()
}

/// Everything was compared, and is equal.
fn is_equal(report: &Value) -> bool {
    let any = report["collections"] == 0 || !findings(report).is_empty();
    any && findings(report).iter().all(is_clean)
}

fn report_page(report: &Value) -> String {
    let mut page = String::new();
    for finding in findings(report).iter().filter(|finding| !is_clean(finding)) {
        let name = text(&finding["name"]);
        let (node, source) = (text(&finding["node"]), text(&finding["source"]));
        if let Some(why) = finding["skipped"].as_str() {
            page.push_str(&format!("{name}: {node} was not compared: {why}\n"));
        }
        if let Some(what) = finding["properties"].as_str() {
            page.push_str(&format!("{name}: {node} differs from {source}: {what}\n"));
        }
        if let Some(count @ 1..) = finding["differing"].as_u64() {
            let ids = finding["ids"].as_array().map_or(&[][..], Vec::as_slice);
            let named: Vec<String> = ids.iter().take(NAMED).map(text).collect();
            let more = if count > named.len() as u64 { ", ..." } else { "" };
            let repair = if finding["repairing"] == true {
                "; being repaired"
            } else {
                ""
            };
            let named = named.join(", ");
            page.push_str(&format!(
                "{name}: {count} records of {node} differ from {source}: {named}{more}{repair}\n"
            ));
        }
    }
    let verdict = if is_equal(report) { "equal" } else { "NOT EQUAL" };
    page.push_str(&format!(
        "{} collections, {} records compared: {verdict}\n",
        text(&report["collections"]),
        text(&report["records"])
    ));
    page
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_report_is_equal_only_if_everything_was_compared() {
        let finding = json!({"name": "docs", "node": "replica", "source": "primary", "differing": 0, "ids": [],
                             "properties": null, "skipped": null, "repairing": false});
        let report = |finding: &Value| json!({"collections": 1, "records": 9, "findings": [finding]});
        assert!(is_equal(&report(&finding)));
        assert!(report_page(&report(&finding)).contains("9 records compared: equal"));
        let mut differs = finding.clone();
        differs["differing"] = json!(2);
        differs["ids"] = json!(["x", "y"]);
        assert!(!is_equal(&report(&differs)));
        let page = report_page(&report(&differs));
        assert!(
            page.contains("docs: 2 records of replica differ from primary: x, y\n"),
            "{page}"
        );
        let mut skipped = finding;
        skipped["skipped"] = json!("the node is not in step");
        assert!(!is_equal(&report(&skipped)));
        assert!(
            !is_equal(&json!({"collections": 1, "records": 0, "findings": []})),
            "nobody could be compared"
        );
    }
}
