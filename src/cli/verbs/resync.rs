//! `diptych resync`.

use std::process::ExitCode;

use clap::Args;

use super::{CollectionArgs, Sure, finish, query};
use crate::cli::Where;
use crate::cli::client::Diptych;

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
