//! What an operator looks into and does: over the admin address of a running Diptych, like everybody else.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use chrono::Utc;
use clap::{Args, Subcommand};
use http::Method;
use serde_json::{Value, json};
use url::form_urlencoded::Serializer;

use super::status::{DEFAULT, age, reachable, table, text};
use super::{Where, ask, run};
use crate::config::NodeUrl;

/// A verb waits for its turn in the lane: behind a large write that can take a while.
const LIMIT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(500);
/// Differing records that are printed by name.
const NAMED: usize = 20;
const TOKEN: &str = "DIPTYCH_ADMIN_TOKEN";

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

/// `diptych drain`.
#[derive(Debug, Subcommand)]
pub enum Drain {
    /// Hold the drain and all repairs, until `resume` or a restart.
    Pause(Where),
    /// Let them go on.
    Resume(Where),
    /// Wait until every node is in sync. Exit code: 0 they are, 1 not in time.
    Wait {
        /// How long, in seconds.
        #[arg(long, default_value_t = 3600)]
        timeout: u64,
        #[command(flatten)]
        at: Where,
    },
}

/// `diptych node`.
#[derive(Debug, Subcommand)]
pub enum NodeVerb {
    /// Take a node for what it should be, though it is older than it was: what it lacks is lost.
    Accept {
        name: String,
        #[command(flatten)]
        sure: Sure,
        #[command(flatten)]
        at: Where,
    },
}

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

/// `diptych resync`.
#[derive(Debug, Args)]
pub struct ResyncArgs {
    #[command(flatten)]
    collection: CollectionArgs,
    /// The node to copy to.
    #[arg(long)]
    node: String,
    /// The node to copy from; what only the other has is lost. Without it, one that has everything.
    #[arg(long)]
    from: Option<String>,
    #[command(flatten)]
    sure: Sure,
    #[command(flatten)]
    at: Where,
}

/// A collection by name or id.
#[derive(Debug, Args)]
pub struct CollectionArgs {
    /// A collection's name, or any of its UUIDs.
    #[arg(long)]
    collection: Option<String>,
    /// Where the name is looked up.
    #[arg(long, requires = "collection")]
    tenant: Option<String>,
    /// Where the name is looked up.
    #[arg(long, requires = "collection")]
    database: Option<String>,
}

/// A part of a list.
#[derive(Debug, Args)]
pub struct Part {
    /// At most so many.
    #[arg(long, default_value_t = 100)]
    limit: usize,
    /// Without the first so many.
    #[arg(long, default_value_t = 0)]
    offset: usize,
}

/// Consent.
#[derive(Debug, Args)]
pub struct Sure {
    /// Do it without asking.
    #[arg(long)]
    yes: bool,
}

impl Sure {
    /// Asks, unless that was answered on the command line.
    fn check(&self, question: &str) -> Result<(), String> {
        if self.yes {
            return Ok(());
        }
        if !std::io::stdin().is_terminal() {
            return Err(format!("{question} Say --yes if you are sure."));
        }
        eprint!("{question} Type yes: ");
        let mut answer = String::new();
        match std::io::stdin().read_line(&mut answer) {
            Ok(_) if answer.trim() == "yes" => Ok(()),
            _ => Err("Nothing was done.".to_owned()),
        }
    }
}

/// A query string, from what was given.
fn query(of: &[(&str, Option<String>)]) -> String {
    let mut pairs = Serializer::new(String::new());
    for (name, value) in of {
        if let Some(value) = value {
            pairs.append_pair(name, value);
        }
    }
    let text = pairs.finish();
    if text.is_empty() { text } else { format!("?{text}") }
}

impl CollectionArgs {
    fn pairs(&self) -> [(&'static str, Option<String>); 3] {
        [
            ("collection", self.collection.clone()),
            ("tenant", self.tenant.clone()),
            ("database", self.database.clone()),
        ]
    }
}

/// One running Diptych.
struct Diptych {
    authority: String,
    token: Option<String>,
    runtime: tokio::runtime::Runtime,
    json: bool,
}

impl Diptych {
    fn at(place: &Where) -> Result<Self, String> {
        let mut token = std::env::var(TOKEN).ok().filter(|token| !token.is_empty());
        let authority = match (&place.url, &place.config) {
            (Some(url), _) => NodeUrl::parse(url)?.authority(),
            (None, Some(path)) => {
                let config = run::load(Some(path)).map_err(|error| error.to_string())?;
                token = config.admin.token.or(token);
                let address = config
                    .admin
                    .address
                    .ok_or("admin.address is null in this configuration: no verbs.")?;
                reachable(address).to_string()
            }
            (None, None) => NodeUrl::parse(DEFAULT)?.authority(),
        };
        Ok(Self {
            authority,
            token,
            runtime: ask::runtime()?,
            json: place.json,
        })
    }

    fn ask(&self, method: Method, path: &str) -> Result<Value, String> {
        let authority = &self.authority;
        let call = ask::call(authority, method, path, self.token.as_deref(), LIMIT);
        let (status, body) = self
            .runtime
            .block_on(call)
            .map_err(|reason| format!("No Diptych can be reached at {authority}: {reason}"))?;
        let value: Value = serde_json::from_slice(&body).unwrap_or_default();
        match status {
            200..300 => Ok(value),
            401 => Err(format!(
                "{authority} wants the admin token: set {TOKEN}, or name the configuration with --config."
            )),
            _ => Err(match value["message"].as_str() {
                Some(message) => message.to_owned(),
                None => format!("{authority} answered {status}: is it the admin address of a Diptych?"),
            }),
        }
    }

    fn get(&self, path: &str) -> Result<Value, String> {
        self.ask(Method::GET, path)
    }

    fn post(&self, path: &str) -> Result<Value, String> {
        self.ask(Method::POST, path)
    }

    fn print(&self, value: &Value, page: impl FnOnce(&Value) -> String) {
        if self.json {
            println!("{value}");
        } else {
            print!("{}", page(value));
        }
    }
}

fn finish(outcome: Result<(), String>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("{reason}");
            ExitCode::FAILURE
        }
    }
}

fn segment(text: &str) -> String {
    url::form_urlencoded::byte_serialize(text.as_bytes()).collect()
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

pub fn repairs(verb: &Repairs) -> ExitCode {
    finish(match verb {
        Repairs::List { parked, part, at } => list_repairs(*parked, part, at),
        Repairs::Retry { ids, at } => each(ids, at, |id| format!("/admin/repairs/{id}/retry")),
    })
}

pub fn drain(verb: &Drain) -> ExitCode {
    let switch = |at: &Where, path: &str| {
        let diptych = Diptych::at(at)?;
        let done = diptych.post(path)?;
        diptych.print(&done, |done| format!("The drain is {}.\n", text(&done["drain"])));
        Ok(())
    };
    finish(match verb {
        Drain::Pause(at) => switch(at, "/admin/drain/pause"),
        Drain::Resume(at) => switch(at, "/admin/drain/resume"),
        Drain::Wait { timeout, at } => wait(*timeout, at),
    })
}

pub fn node(verb: &NodeVerb) -> ExitCode {
    let NodeVerb::Accept { name, sure, at } = verb;
    let accept = || {
        sure.check(&format!("What {name} has lost is accepted as lost."))?;
        let diptych = Diptych::at(at)?;
        let done = diptych.post(&format!("/admin/nodes/{}/accept", segment(name)))?;
        diptych.print(&done, |_| format!("{name} is accepted as it is.\n"));
        Ok(())
    };
    finish(accept())
}

/// Does the same to several; goes on after one that fails.
fn each(ids: &[String], at: &Where, path: impl Fn(&str) -> String) -> Result<(), String> {
    let diptych = Diptych::at(at)?;
    let mut failed = vec![];
    for id in ids {
        match diptych.post(&path(&segment(id))) {
            Ok(done) => diptych.print(&done, |done| format!("{id}: {}\n", text(&done["state"]))),
            Err(reason) => failed.push(format!("{id}: {reason}")),
        }
    }
    if failed.is_empty() {
        Ok(())
    } else {
        Err(failed.join("\n"))
    }
}

fn what(value: &Value) -> String {
    match value["collection"]["name"].as_str() {
        Some(name) => name.to_owned(),
        None => "(names)".to_owned(),
    }
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

fn wait(seconds: u64, at: &Where) -> Result<(), String> {
    let diptych = Diptych::at(at)?;
    let polls = seconds.saturating_mul(1000) / u64::try_from(POLL.as_millis()).unwrap_or(1);
    for _ in 0..=polls {
        let status = diptych.get("/status")?;
        let nodes = status["instances"].as_array().map_or(&[][..], Vec::as_slice);
        let behind: Vec<String> = nodes
            .iter()
            .filter(|node| node["in_sync"] != true || node["healthy"] != true)
            .map(|node| {
                format!(
                    "{} ({} pending, {} repairs)",
                    text(&node["name"]),
                    text(&node["pending_writes"]),
                    text(&node["repairs"])
                )
            })
            .collect();
        if behind.is_empty() && !nodes.is_empty() {
            diptych.print(&json!({ "in_sync": true }), |_| "Every node is in sync.\n".to_owned());
            return Ok(());
        }
        progress(&format!("not in sync: {}", behind.join(", ")));
        pause();
    }
    Err(format!("Not in sync after {seconds} s."))
}

fn pause() {
    std::thread::sleep(POLL);
}

/// One line that is overwritten by the next, on a terminal; nothing elsewhere.
fn progress(line: &str) {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[2K{line}");
    }
}

fn end_progress() {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[2K");
    }
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
    let report = loop {
        let report = diptych.get(&path)?;
        if !report["finished_at"].is_null() {
            break report;
        }
        progress(&format!(
            "{} of {} collections, {} records compared",
            text(&report["collections_done"]),
            text(&report["collections"]),
            text(&report["records"])
        ));
        pause();
    };
    end_progress();
    diptych.print(&report, report_page);
    Ok(is_equal(&report))
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

pub fn resync(args: &ResyncArgs) -> ExitCode {
    finish(copy(args))
}

fn copy(args: &ResyncArgs) -> Result<(), String> {
    let name = args
        .collection
        .collection
        .as_ref()
        .ok_or("Name the collection with --collection.")?;
    args.sure.check(&match &args.from {
        Some(from) => format!(
            "What {} has of {name} becomes what {from} has; what only {} has is lost.",
            args.node, args.node
        ),
        None => format!(
            "What {} has of {name} is made equal to what another node has.",
            args.node
        ),
    })?;
    let diptych = Diptych::at(&args.at)?;
    let mut pairs = vec![("node", Some(args.node.clone())), ("from", args.from.clone())];
    pairs.extend(args.collection.pairs());
    let begun = diptych.post(&format!("/admin/resync{}", query(&pairs)))?;
    diptych.print(&begun, |_| {
        format!(
            "{name} is being copied to {}. See how far it is with `diptych repairs list`.\n",
            args.node
        )
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_holds_what_was_given() {
        assert_eq!(query(&[("a", None)]), "");
        assert_eq!(
            query(&[("a", Some("x y".to_owned())), ("b", None), ("c", Some("&".to_owned()))]),
            "?a=x+y&c=%26"
        );
    }

    #[test]
    fn without_consent_nothing_is_done() {
        assert!(Sure { yes: true }.check("Sure?").is_ok());
        if !std::io::stdin().is_terminal() {
            assert!(Sure { yes: false }.check("Sure?").unwrap_err().contains("--yes"));
        }
    }

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

    #[test]
    fn lists_show_what_blocks() {
        let entry = json!({"id": "7", "node": "replica", "operation": "add", "collection": {"name": "docs"}, "bytes": 3,
                           "created_at": null, "attempts": 5, "error": "it went wrong"});
        let page = entries_page(&json!({"entries": [entry], "total": 3}));
        assert!(
            page.contains("it went wrong") && page.contains("1 of 3 shown"),
            "{page}"
        );
        let repair = json!({"id": "8", "node": "replica", "kind": "whole", "collection": null, "records": null,
                            "source": null, "since": null, "parked": null, "reason": "wiped",
                            "progress": {"records_done": 5, "records_total": 10}});
        let page = repairs_page(&json!({"repairs": [repair], "total": 1}));
        assert!(page.contains("(names)") && page.contains("5/10"), "{page}");
    }
}
