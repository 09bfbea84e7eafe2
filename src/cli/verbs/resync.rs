//! `diptych resync`.

use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

use super::{CollectionArgs, Sure, finish, query};
use crate::cli::Where;
use crate::cli::client::{Diptych, segment};
use crate::cli::progress::Waiting;

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
    /// Do not wait until it is done.
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    sure: Sure,
    #[command(flatten)]
    at: Where,
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
    if args.no_wait {
        diptych.print(&begun, |_| {
            format!(
                "{name} is being copied to {}. See how far it is with `diptych repairs list`.\n",
                args.node
            )
        });
        return Ok(());
    }
    await_copy(&diptych, args, name)?;
    let done = json!({ "collection": begun["collection"], "node": args.node, "state": "done" });
    diptych.print(&done, |_| format!("{name} is copied to {}.\n", args.node));
    Ok(())
}

/// Until no repair of the collection is open on the node.
fn await_copy(diptych: &Diptych, args: &ResyncArgs, name: &str) -> Result<(), String> {
    let mut pairs = vec![];
    pairs.extend(args.collection.pairs().into_iter().skip(1));
    let mapping = format!("/admin/mappings/{}{}", segment(name), query(&pairs));
    let waiting = Waiting::begin();
    loop {
        let found = diptych.get(&mapping)?;
        let nodes = found["nodes"].as_array().map_or(&[][..], Vec::as_slice);
        let open = nodes
            .iter()
            .find(|node| node["name"] == *args.node)
            .map_or(&Value::Null, |node| &node["repairs"]);
        if *open == 0 {
            return Ok(());
        }
        let status = diptych.get("/admin/repairs?limit=1000")?;
        let rows = status["repairs"].as_array().map_or(&[][..], Vec::as_slice);
        let row = rows
            .iter()
            .find(|row| row["node"] == *args.node && row["collection"]["id"] == found["id"]);
        let row = row.unwrap_or(&Value::Null);
        if let Some(why) = row["parked"].as_str() {
            return Err(format!(
                "The copy failed and waits for a decision: {why}\nSee `diptych repairs list --parked`."
            ));
        }
        let progress = |name: &str| row["progress"][name].as_u64().unwrap_or(0);
        match progress("records_total") {
            0 => waiting.say("the copy has not begun yet"),
            total => waiting.share("records copied", progress("records_done"), total),
        }
        waiting.pause();
    }
}
