//! `diptych events`.

use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::{finish, query};
use crate::cli::Where;
use crate::cli::client::Diptych;
use crate::cli::progress::pause;
use crate::cli::status::text;

/// `diptych events`.
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// The last so many.
    #[arg(long, default_value_t = 50)]
    limit: usize,
    /// Only those of this node.
    #[arg(long)]
    node: Option<String>,
    /// Only those of this kind: `node_down`, `verb`, ...
    #[arg(long)]
    kind: Option<String>,
    /// Go on and print what happens, until Ctrl-C.
    #[arg(long, short)]
    follow: bool,
    #[command(flatten)]
    at: Where,
}

pub fn events(args: &EventsArgs) -> ExitCode {
    finish(show(args))
}

fn show(args: &EventsArgs) -> Result<(), String> {
    let diptych = Diptych::at(&args.at)?;
    let ask = |limit: usize| {
        let path = query(&[
            ("limit", Some(limit.to_string())),
            ("node", args.node.clone()),
            ("kind", args.kind.clone()),
        ]);
        diptych.get(&format!("/admin/events{path}"))
    };
    let found = ask(args.limit)?;
    if !args.follow {
        diptych.print(&found, page);
        return Ok(());
    }
    let mut last = 0;
    let mut found = found;
    loop {
        for event in list(&found).iter().rev().filter(|event| id(event) > last) {
            diptych.print(event, dated);
        }
        last = list(&found).first().map_or(last, id).max(last);
        pause();
        found = ask(100)?;
    }
}

fn list(found: &Value) -> &[Value] {
    found["events"].as_array().map_or(&[], Vec::as_slice)
}

fn id(event: &Value) -> i64 {
    event["id"].as_str().and_then(|id| id.parse().ok()).unwrap_or(0)
}

/// The oldest first: the last line is the last thing that happened.
fn page(found: &Value) -> String {
    list(found).iter().rev().map(dated).collect()
}

fn dated(event: &Value) -> String {
    // To the second: nobody reads the rest.
    let at = text(&event["at"]);
    let second = at.split('.').next().unwrap_or_default();
    line(event, &format!("{}Z", second.trim_end_matches('Z')))
}

/// An event, with when it was.
pub fn line(event: &Value, when: &str) -> String {
    let mut line = format!("{when}  {:13}", text(&event["kind"]));
    for (name, before, after) in [("node", "  ", ":"), ("what", " ", ""), ("who", " (by ", ")")] {
        if let Some(value) = event[name].as_str() {
            let lead = if name == "what" && event["node"].is_null() {
                "  "
            } else {
                before
            };
            line.push_str(&format!("{lead}{value}{after}"));
        }
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn events_are_lines_the_last_one_below() {
        let event = |id: &str, node: Option<&str>, who: Option<&str>, what: &str| json!({"id": id, "at": "2030-01-01T00:00:00.000Z", "kind": "verb", "node": node, "who": who, "what": what});
        let found = json!({"events": [event("2", None, Some("alice"), "drain pause: done"),
                                      event("1", Some("replica"), None, "it went down")]});
        assert_eq!(
            page(&found),
            "2030-01-01T00:00:00Z  verb           replica: it went down\n\
             2030-01-01T00:00:00Z  verb           drain pause: done (by alice)\n"
        );
    }
}
