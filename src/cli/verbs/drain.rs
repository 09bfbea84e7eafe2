//! `diptych drain`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use serde_json::json;

use super::finish;
use crate::cli::Where;
use crate::cli::client::{Diptych, Patience};
use crate::cli::progress::Waiting;
use crate::cli::status::{instances, text};

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

fn wait(seconds: u64, at: &Where) -> Result<(), String> {
    let diptych = Diptych::at(at)?;
    let patience = Patience::of(Duration::from_secs(seconds));
    let waiting = Waiting::begin();
    loop {
        let status = diptych.get("/status")?;
        let nodes = instances(&status);
        let behind: Vec<String> = nodes
            .iter()
            .filter(|node| node["in_sync"] != true || node["healthy"] != true)
            .map(|node| {
                let name = text(&node["name"]);
                if node["maintenance"].is_object() {
                    return format!("{name} (in maintenance: diptych node ready {name})");
                }
                format!(
                    "{name} ({} pending, {} repairs)",
                    text(&node["pending_writes"]),
                    text(&node["repairs"])
                )
            })
            .collect();
        if behind.is_empty() && !nodes.is_empty() {
            waiting.end();
            diptych.print(&json!({ "in_sync": true }), |_| "Every node is in sync.\n".to_owned());
            return Ok(());
        }
        if patience.is_over() {
            return Err(format!("Not in sync after {seconds} s: {}", behind.join(", ")));
        }
        let pending = status["wal"]["pending_writes"].as_u64().unwrap_or(0);
        waiting.backlog(&format!("not in sync: {}", behind.join(", ")), pending);
        waiting.pause();
    }
}
