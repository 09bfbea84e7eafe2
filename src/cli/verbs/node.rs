//! `diptych node`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use serde_json::Value;

use super::{Sure, finish};
use crate::cli::Where;
use crate::cli::client::{Diptych, Patience, segment};
use crate::cli::progress::Waiting;
use crate::cli::status::{instances, text};

/// So long one request waits for other nodes; it is asked again.
const SLICE: u64 = 20;
/// What is under way at a node ends in so much time: the longest write that is waited for.
const QUIET: Duration = Duration::from_secs(900);

/// `diptych node`.
#[derive(Debug, Subcommand)]
pub enum NodeVerb {
    /// Take a node out of service: nothing is read from it or sent to it, and what it misses is logged, until `ready`.
    ///
    /// Returns when nothing is under way at the node any more: it can be stopped then. Refused unless other nodes can
    /// serve every collection and the names.
    Maint {
        name: String,
        /// Wait until other nodes can serve everything, at most so many seconds.
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "3600")]
        wait: Option<u64>,
        #[command(flatten)]
        at: Where,
    },
    /// Take a node back into service: it is brought in step and serves again.
    Ready {
        name: String,
        /// Wait until it is in step, at most so many seconds.
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "3600")]
        wait: Option<u64>,
        #[command(flatten)]
        at: Where,
    },
    /// Take a node for what it should be, though it is older than it was: what it lacks is lost.
    Accept {
        name: String,
        #[command(flatten)]
        sure: Sure,
        #[command(flatten)]
        at: Where,
    },
}

pub fn node(verb: &NodeVerb) -> ExitCode {
    finish(match verb {
        NodeVerb::Maint { name, wait, at } => maint(name, wait.unwrap_or(0), at),
        NodeVerb::Ready { name, wait, at } => ready(name, *wait, at),
        NodeVerb::Accept { name, sure, at } => accept(name, sure, at),
    })
}

fn maint(name: &str, seconds: u64, at: &Where) -> Result<(), String> {
    let diptych = Diptych::at(at)?;
    let patience = Patience::of(Duration::from_secs(seconds));
    let waiting = Waiting::begin();
    let path = format!("/admin/nodes/{}/maint", segment(name));
    let mut done = loop {
        let slice = patience.left().as_secs().min(SLICE);
        match diptych.try_post(&format!("{path}?wait={slice}")) {
            Err(refused) if refused.status == Some(409) && !patience.is_over() => waiting.say(&refused.message),
            outcome => break outcome?,
        }
    };
    let patience = Patience::of(QUIET);
    while done["in_flight"].as_u64().is_none_or(|left| left > 0) {
        waiting.say(&format!(
            "{} requests are under way at {name}",
            text(&done["in_flight"])
        ));
        if patience.is_over() {
            return Err(format!(
                "{name} is in maintenance, but {} requests are still under way there.",
                text(&done["in_flight"])
            ));
        }
        done = diptych.post(&path)?;
    }
    waiting.end();
    diptych.print(&done, |_| {
        format!(
            "{name} is in maintenance and nothing is under way there. What it misses is logged.\n\
             Take it back with: diptych node ready {name}\n"
        )
    });
    Ok(())
}

fn ready(name: &str, wait: Option<u64>, at: &Where) -> Result<(), String> {
    let diptych = Diptych::at(at)?;
    let done = diptych.post(&format!("/admin/nodes/{}/ready", segment(name)))?;
    let Some(seconds) = wait else {
        diptych.print(&done, |done| match done["was_in_maintenance"].as_bool() {
            Some(false) => format!("{name} was not in maintenance.\n"),
            _ => format!("{name} is taken back and brought in step: diptych drain wait\n"),
        });
        return Ok(());
    };
    let patience = Patience::of(Duration::from_secs(seconds));
    let waiting = Waiting::begin();
    loop {
        let status = diptych.get("/status")?;
        let node = instances(&status).iter().find(|node| node["name"] == name);
        let node = node.unwrap_or(&Value::Null);
        if node["healthy"] == true && node["in_sync"] == true {
            break;
        }
        if patience.is_over() {
            return Err(format!(
                "{name} is not in step after {seconds} s; see `diptych status`."
            ));
        }
        let state = if node["healthy"] == true { "up" } else { "not up yet" };
        waiting.backlog(
            &format!("{name} is {state}, {} repairs open", text(&node["repairs"])),
            node["pending_writes"].as_u64().unwrap_or(0),
        );
        waiting.pause();
    }
    waiting.end();
    diptych.print(&done, |_| format!("{name} is in service and in step.\n"));
    Ok(())
}

fn accept(name: &str, sure: &Sure, at: &Where) -> Result<(), String> {
    sure.check(&format!("What {name} has lost is accepted as lost."))?;
    let diptych = Diptych::at(at)?;
    let done = diptych.post(&format!("/admin/nodes/{}/accept", segment(name)))?;
    diptych.print(&done, |_| format!("{name} is accepted as it is.\n"));
    Ok(())
}
