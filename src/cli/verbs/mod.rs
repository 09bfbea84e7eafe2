//! What an operator looks into and does: over the admin address of a running Diptych, like everybody else.

mod drain;
mod events;
mod mapping;
mod node;
mod repairs;
mod resync;
mod verify;
mod wal;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Args;
use serde_json::Value;
use url::form_urlencoded::Serializer;

pub use drain::{Drain, drain};
pub use events::{EventsArgs, events, line};
pub use mapping::{Mapping, mapping};
pub use node::{NodeVerb, node};
pub use repairs::{Repairs, repairs};
pub use resync::{ResyncArgs, resync};
pub use verify::{VerifyArgs, verify};
pub use wal::{Wal, wal};

use super::Where;
use super::client::{Diptych, Refused, segment};
use super::status::text;

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

fn finish(outcome: Result<(), String>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("{reason}");
            ExitCode::FAILURE
        }
    }
}

/// Does the same to several; goes on after one that fails.
fn each(ids: &[String], at: &Where, path: impl Fn(&str) -> String) -> Result<(), String> {
    let diptych = Diptych::at(at)?;
    let mut failed = vec![];
    for id in ids {
        match diptych.try_post(&path(&segment(id))) {
            Ok(done) => diptych.print(&done, |done| format!("{id}: {}\n", text(&done["state"]))),
            Err(Refused {
                status: None | Some(401),
                message,
            }) => {
                // It is not about this one.
                failed.push(message);
                break;
            }
            Err(Refused { message, .. }) if message.contains(id) => failed.push(message),
            Err(Refused { message, .. }) => failed.push(format!("{id}: {message}")),
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
}
