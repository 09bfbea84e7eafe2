//! `diptych status`: how the nodes of a running Diptych are.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use chrono::{DateTime, Utc};
use clap::Args;
use http::Method;
use serde_json::Value;

use super::client::unreachable;
use super::verbs::line;
use super::{Where, ask, run};
use crate::config::NodeUrl;

/// So long the answer is waited for.
const LIMIT: Duration = Duration::from_secs(5);
/// Events that the page shows.
const EVENTS: usize = 5;

pub const DEFAULT: &str = "http://127.0.0.1:8900";

/// How well it is, as exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Health {
    Healthy = 0,
    Degraded = 1,
    Unavailable = 2,
}

/// `diptych status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Show it anew every so many seconds, until Ctrl-C.
    #[arg(long, short, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2",
          value_parser = clap::value_parser!(u64).range(1..))]
    watch: Option<u64>,
    #[command(flatten)]
    at: Where,
}

/// Asks and prints.
pub fn status(args: &StatusArgs) -> ExitCode {
    match args.watch {
        None => once(&args.at),
        Some(seconds) => watch(&args.at, Duration::from_secs(seconds)),
    }
}

/// A page in the place of the one before, on a terminal; elsewhere, and as JSON, one after the other.
fn watch(args: &Where, pause: Duration) -> ExitCode {
    let in_place = std::io::stdout().is_terminal() && !args.json;
    loop {
        if in_place {
            let page = match look(args) {
                Ok((page, _)) => page,
                Err(reason) => reason,
            };
            let at = Utc::now().format("%H:%M:%S");
            let again = format!("\nAs of {at} UTC, again every {} s; Ctrl-C ends it.", pause.as_secs());
            print!("{}", over(&format!("{page}{again}")));
        } else {
            let _ = once(args);
        }
        let _ = std::io::stdout().flush();
        std::thread::sleep(pause);
    }
}

/// What makes a terminal show a page where another one is: written over it line by line, since a screen that is cleared
/// first flickers, and without wrapping, which would tear the table apart.
fn over(page: &str) -> String {
    let mut text = "\x1b[?7l\x1b[H".to_owned();
    for line in page.lines() {
        let _ = write!(text, "{line}\x1b[K\r\n");
    }
    // Wrapping is back whenever it is left.
    text.push_str("\x1b[J\x1b[?7h");
    text
}

fn once(args: &Where) -> ExitCode {
    match look(args) {
        Ok((page, health)) => {
            print!("{page}");
            ExitCode::from(health as u8)
        }
        Err(reason) => {
            eprintln!("{reason}");
            ExitCode::from(Health::Unavailable as u8)
        }
    }
}

/// What is printed, and how well it is.
fn look(args: &Where) -> Result<(String, Health), String> {
    let (authority, text) = answer(args)?;
    let status: Value = serde_json::from_slice(&text).unwrap_or_default();
    let page = if args.json {
        format!("{}\n", String::from_utf8_lossy(&text))
    } else {
        page(&authority, &status, Utc::now())
    };
    Ok((page, health(&status)))
}

pub fn answer(args: &Where) -> Result<(String, bytes::Bytes), String> {
    let authority = authority(args)?;
    let asking = ask::Asking {
        token: None,
        operator: String::new(),
        limit: LIMIT,
    };
    let (status, body) = ask::runtime()?
        .block_on(ask::call(&authority, Method::GET, "/status", asking))
        .map_err(|reason| unreachable(&authority, &reason))?;
    if status != 200 {
        return Err(format!(
            "{authority} answered {status} to GET /status: is it a Diptych?"
        ));
    }
    Ok((authority, body))
}

fn authority(args: &Where) -> Result<String, String> {
    match (&args.url, &args.config) {
        (Some(url), _) => Ok(NodeUrl::parse(url)?.authority()),
        (None, Some(path)) => {
            let config = run::load(Some(path)).map_err(|error| error.to_string())?;
            let address = config
                .admin
                .address
                .or(config.listen.first().map(|first| first.address));
            Ok(reachable(address.ok_or("The configuration names no address.")?).to_string())
        }
        (None, None) => Ok(NodeUrl::parse(DEFAULT)?.authority()),
    }
}

/// The address itself, or loopback where it stands for all.
pub fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip([127, 0, 0, 1].into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(std::net::Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}

pub fn instances(status: &Value) -> &[Value] {
    status["instances"].as_array().map_or(&[], Vec::as_slice)
}

fn health(status: &Value) -> Health {
    let nodes = instances(status);
    let healthy = |node: &&Value| node["healthy"] == true;
    if !nodes.iter().any(|node| healthy(&node)) {
        return Health::Unavailable;
    }
    let whole = nodes.iter().all(|node| healthy(&node) && node["in_sync"] == true)
        && status["leader"] == true
        && status["wal"]["available"] == true;
    if whole { Health::Healthy } else { Health::Degraded }
}

fn page(authority: &str, status: &Value, now: DateTime<Utc>) -> String {
    let mut page = String::new();
    let word = match health(status) {
        Health::Healthy => "healthy",
        Health::Degraded => "degraded",
        Health::Unavailable => "unavailable",
    };
    let role = match status["leader"].as_bool() {
        Some(true) => format!("written by {}", text(&status["holder"])),
        _ => "ANOTHER PROXY HAS TAKEN IT OVER".to_owned(),
    };
    let _ = writeln!(
        page,
        "Diptych {} at {authority}: {word}, {} of {} nodes healthy\n",
        text(&status["version"]),
        text(&status["healthy_instances"]),
        text(&status["total_instances"]),
    );
    let head = ["NODE", "URL", "STATE", "IN SYNC", "PENDING", "OLDEST"];
    let mut rows = vec![head.map(str::to_owned)];
    rows.extend(instances(status).iter().map(|node| {
        let state = match (node["healthy"].as_bool(), node["up"].as_bool()) {
            _ if node["maintenance"].is_object() => "maintenance",
            (Some(true), _) => "up",
            (_, Some(true)) => "failing",
            _ => "down",
        };
        [
            text(&node["name"]),
            text(&node["url"]),
            state.to_owned(),
            if node["in_sync"] == true { "yes" } else { "no" }.to_owned(),
            text(&node["pending_writes"]),
            age(&node["oldest_pending"], now),
        ]
    }));
    page.push_str(&table(&rows));
    for node in instances(status) {
        if let Some(error) = node["last_error"].as_str() {
            // In a line of its own: it is long, and its end says the most.
            let _ = writeln!(page, "last error of {}:\n  {error}", text(&node["name"]));
        }
    }
    for node in instances(status) {
        let maintenance = &node["maintenance"];
        if maintenance.is_object() {
            let _ = writeln!(
                page,
                "\n{} is in maintenance since {} by {}, {} requests under way there: diptych node ready {}",
                text(&node["name"]),
                age(&maintenance["since"], now),
                text(&maintenance["who"]),
                text(&node["in_flight"]),
                text(&node["name"]),
            );
        }
    }
    let log = &status["wal"];
    let _ = writeln!(
        page,
        "\nlog: {}, {}\n     {role}, term {}\n     {} pending, {} replayed, {} failed replays, {} parked{}",
        text(&log["journal"]),
        if log["available"] == true {
            "answers"
        } else {
            "DOES NOT ANSWER"
        },
        text(&status["term"]),
        text(&log["pending_writes"]),
        text(&log["total_replayed"]),
        text(&log["failed_replays"]),
        text(&log["parked"]),
        if log["is_replaying"] == true {
            "; replaying now"
        } else {
            ""
        },
    );
    if log["drain_paused"] == true {
        let _ = writeln!(page, "the drain is paused: diptych drain resume");
    }
    if log["unprotected"] == true {
        let seconds = text(&log["unprotected_seconds"]);
        let _ = writeln!(
            page,
            "written without the log and not compared yet ({seconds} s so far)"
        );
    }
    if let Some(lanes @ 1..) = status["recovering_lanes"].as_u64() {
        let _ = writeln!(page, "{lanes} collections wait to learn what the last stop left");
    }
    if let Some(parked @ 1..) = log["parked_repairs"].as_u64() {
        let _ = writeln!(
            page,
            "{parked} repairs wait for a decision: diptych repairs list --parked"
        );
    }
    let open = status["not_in_sync"].as_array().map_or(&[][..], Vec::as_slice);
    for lane in open {
        let what = match lane["collection"]["name"].as_str() {
            Some(name) => format!("collection {name}"),
            None => "the namespace".to_owned(),
        };
        let _ = writeln!(
            page,
            "not in sync: {what} on {}: {}, {} pending, {} repairs open",
            text(&lane["node"]),
            text(&lane["reason"]),
            text(&lane["pending_writes"]),
            text(&lane["repairs"]),
        );
    }
    let events = status["events"].as_array().map_or(&[][..], Vec::as_slice);
    let total = status["total_not_in_sync"].as_u64().unwrap_or_default();
    if total > open.len() as u64 {
        let _ = writeln!(page, "... {total} in all");
    }
    if !events.is_empty() {
        page.push_str("\nlast events, and how long ago:\n");
        for event in events.iter().take(EVENTS).rev() {
            page.push_str(&line(event, &format!("{:>7}", age(&event["at"], now))));
        }
    }
    page
}

pub fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// How long ago, in the largest unit that fits.
pub fn age(value: &Value, now: DateTime<Utc>) -> String {
    let Some(at) = value.as_str().and_then(|text| DateTime::parse_from_rfc3339(text).ok()) else {
        return "-".to_owned();
    };
    let seconds = (now - at.to_utc()).num_seconds().max(0);
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

pub fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sample() -> Value {
        let node = |name: &str, port: u16| {
            json!({"name": name, "url": format!("http://127.0.0.1:{port}"), "healthy": true, "up": true,
                   "in_sync": true, "pending_writes": 0, "oldest_pending": null, "last_error": null})
        };
        json!({"version": "0.1.0", "leader": true, "term": 3, "holder": "pid 7 on alpha", "healthy_instances": 2, "total_instances": 2,
               "instances": [node("primary", 8001), node("replica", 8002)],
               "wal": {"journal": "SQLite file x", "available": true, "pending_writes": 0, "total_replayed": 5,
                       "failed_replays": 0, "parked": 0, "is_replaying": false},
               "not_in_sync": [], "total_not_in_sync": 0})
    }

    #[test]
    fn health_is_judged_by_nodes_and_log() {
        let mut status = sample();
        assert_eq!(health(&status), Health::Healthy);
        status["wal"]["available"] = json!(false);
        assert_eq!(health(&status), Health::Degraded);
        status = sample();
        status["instances"][1]["in_sync"] = json!(false);
        assert_eq!(health(&status), Health::Degraded);
        status["instances"][1]["healthy"] = json!(false);
        assert_eq!(health(&status), Health::Degraded);
        status["instances"][0]["healthy"] = json!(false);
        assert_eq!(health(&status), Health::Unavailable);
        assert_eq!(health(&Value::Null), Health::Unavailable);
    }

    #[test]
    fn the_page_shows_what_is_behind() {
        let mut status = sample();
        let now = DateTime::parse_from_rfc3339("2030-01-01T00:10:00Z").unwrap().to_utc();
        let node = &mut status["instances"][1];
        node["pending_writes"] = json!(7);
        node["oldest_pending"] = json!("2030-01-01T00:00:00.000Z");
        node["up"] = json!(false);
        node["healthy"] = json!(false);
        status["not_in_sync"] = json!([{"node": "replica", "collection": {"name": "docs"}, "reason": "backlog",
                                        "pending_writes": 7, "repairs": 0}]);
        status["total_not_in_sync"] = json!(1);
        let page = page("127.0.0.1:8900", &status, now);
        assert!(page.contains("degraded"), "{page}");
        assert!(page.contains("down   yes"), "{page}");
        assert!(page.contains("10 min"), "{page}");
        assert!(page.lines().all(|line| line.chars().count() <= 80), "{page}");
        assert!(
            page.contains("not in sync: collection docs on replica: backlog, 7 pending"),
            "{page}"
        );
    }

    #[test]
    fn a_page_takes_the_place_of_another() {
        assert_eq!(over("a\nb\n"), "\x1b[?7l\x1b[Ha\x1b[K\r\nb\x1b[K\r\n\x1b[J\x1b[?7h");
    }

    #[test]
    fn an_address_for_all_is_asked_on_this_host() {
        let address = |text: &str| reachable(text.parse().unwrap()).to_string();
        assert_eq!(address("0.0.0.0:8900"), "127.0.0.1:8900");
        assert_eq!(address("[::]:8900"), "[::1]:8900");
        assert_eq!(address("10.0.0.7:8900"), "10.0.0.7:8900");
    }
}
