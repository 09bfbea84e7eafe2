//! `diptych health`: one line and an exit code, for monitoring and containers.
//!
//! As Nagios has it: 0 ok, 1 warning, 2 critical, 3 unknown. What is asked is `/status`, which needs no token. A Diptych
//! that does not answer is critical; one whose answer cannot be understood is unknown. deploy/wal_health_check.sh says
//! the same, without this program.

use std::process::ExitCode;
use std::time::Duration;

use chrono::{DateTime, Utc};
use clap::Args;
use serde_json::{Value, json};

use super::Where;
use super::status::{answer, instances, text};
use crate::config::parse_duration;

/// `diptych health`.
#[derive(Debug, Args)]
pub struct HealthArgs {
    #[command(flatten)]
    limits: Limits,
    /// Exit with 0 on a warning too: for what restarts a container that is not well. A node that is down is no reason.
    #[arg(long)]
    critical_only: bool,
    #[command(flatten)]
    at: Where,
}

/// From where on it is not well. A limit that is not given does not count.
#[derive(Debug, Clone, Args)]
struct Limits {
    /// Entries that wait for a node, from which on it is a warning.
    #[arg(long, value_name = "ENTRIES", default_value_t = 1000)]
    pending_warning: u64,
    /// ... and critical.
    #[arg(long, value_name = "ENTRIES", default_value_t = 100_000)]
    pending_critical: u64,
    /// Age of the oldest of them, from which on it is a warning.
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = duration)]
    age_warning: Duration,
    /// ... and critical.
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = duration)]
    age_critical: Duration,
    /// Entries and repairs that wait for a decision, from which on it is a warning.
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    parked_warning: u64,
    /// ... and critical.
    #[arg(long, value_name = "COUNT")]
    parked_critical: Option<u64>,
    /// Healthy nodes below which it is a warning; without it, all that there are.
    #[arg(long, value_name = "COUNT")]
    nodes_warning: Option<u64>,
    /// ... and critical.
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    nodes_critical: u64,
    /// Time since everything was compared and found equal, from which on it is a warning.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    verify_warning: Option<Duration>,
    /// ... and critical.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    verify_critical: Option<Duration>,
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text)
}

/// The exit code of a command line that cannot be understood, as monitoring wants it.
pub const UNKNOWN: u8 = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Ok = 0,
    Warning = 1,
    Critical = 2,
    Unknown = 3,
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Critical => "critical",
            Self::Unknown => "unknown",
        }
    }
}

#[derive(Debug)]
struct Verdict {
    level: Level,
    /// What is not well.
    reasons: Vec<String>,
    values: Vec<Measure>,
}

/// A number as monitoring plugins print it: with its limits.
#[derive(Debug)]
struct Measure {
    name: &'static str,
    value: u64,
    unit: &'static str,
    warning: Option<u64>,
    critical: Option<u64>,
    /// Not well below the limits, not from them on.
    is_floor: bool,
}

impl Measure {
    fn level(&self) -> Level {
        let beyond = |limit: Option<u64>| match self.is_floor {
            true => limit.is_some_and(|limit| self.value < limit),
            false => limit.is_some_and(|limit| self.value >= limit),
        };
        match (beyond(self.critical), beyond(self.warning)) {
            (true, _) => Level::Critical,
            (_, true) => Level::Warning,
            _ => Level::Ok,
        }
    }

    /// A range in monitoring's own spelling alerts outside of it.
    fn perfdata(&self) -> String {
        let limit = |limit: Option<u64>| match (limit, self.is_floor) {
            (None, _) => String::new(),
            (Some(limit), true) => format!("{limit}:"),
            (Some(limit), false) => limit.saturating_sub(1).to_string(),
        };
        format!(
            "{}={}{};{};{}",
            self.name,
            self.value,
            self.unit,
            limit(self.warning),
            limit(self.critical)
        )
    }
}

pub fn health(args: &HealthArgs) -> ExitCode {
    let verdict = match answer(&args.at) {
        Err(reason) => Verdict {
            level: Level::Critical,
            reasons: reason.lines().take(1).map(str::to_owned).collect(),
            values: vec![],
        },
        Ok((_, body)) => {
            let status: Value = serde_json::from_slice(&body).unwrap_or_default();
            judge(&status, &args.limits, Utc::now())
        }
    };
    println!(
        "{}",
        if args.at.json {
            shown(&verdict).to_string()
        } else {
            line(&verdict)
        }
    );
    ExitCode::from(code(verdict.level, args.critical_only))
}

fn code(level: Level, critical_only: bool) -> u8 {
    match level {
        Level::Warning if critical_only => Level::Ok as u8,
        _ => level as u8,
    }
}

fn judge(status: &Value, limits: &Limits, now: DateTime<Utc>) -> Verdict {
    let unknown = |what: &str| Verdict {
        level: Level::Unknown,
        reasons: vec![format!("the answer has no {what}: is it a Diptych?")],
        values: vec![],
    };
    let log = &status["wal"];
    let Some(total) = status["total_instances"].as_u64() else {
        return unknown("total_instances");
    };
    let Some(healthy) = status["healthy_instances"].as_u64() else {
        return unknown("healthy_instances");
    };
    let Some(pending) = log["pending_writes"].as_u64() else {
        return unknown("wal.pending_writes");
    };
    let parked = log["parked"].as_u64().unwrap_or(0) + log["parked_repairs"].as_u64().unwrap_or(0);
    let seconds = |limit: Duration| Some(limit.as_secs());
    let mut values = vec![
        Measure {
            name: "pending",
            value: pending,
            unit: "",
            warning: Some(limits.pending_warning),
            critical: Some(limits.pending_critical),
            is_floor: false,
        },
        Measure {
            name: "oldest_age",
            value: age(&log["oldest_pending"], now).unwrap_or(0),
            unit: "s",
            warning: seconds(limits.age_warning),
            critical: seconds(limits.age_critical),
            is_floor: false,
        },
        Measure {
            name: "parked",
            value: parked,
            unit: "",
            warning: Some(limits.parked_warning),
            critical: limits.parked_critical,
            is_floor: false,
        },
        Measure {
            name: "nodes",
            value: healthy,
            unit: "",
            warning: Some(limits.nodes_warning.unwrap_or(total)),
            critical: Some(limits.nodes_critical),
            is_floor: true,
        },
    ];
    let verified = age(&status["verified_at"], now);
    let verify_limits = (limits.verify_warning, limits.verify_critical);
    if let Some(verified) = verified {
        values.push(Measure {
            name: "verify_age",
            value: verified,
            unit: "s",
            warning: verify_limits.0.and_then(seconds),
            critical: verify_limits.1.and_then(seconds),
            is_floor: false,
        });
    }
    let mut level = Level::Ok;
    let mut reasons = vec![];
    let mut not_well = |at: Level, reason: String| {
        level = level.max(at);
        reasons.push(reason);
    };
    for measure in values.iter().filter(|measure| measure.level() > Level::Ok) {
        let reason = match measure.name {
            "pending" => format!("{pending} entries pending"),
            "oldest_age" => format!("the oldest entry is {} s old", measure.value),
            "parked" => format!("{parked} parked: diptych wal list --parked, diptych repairs list --parked"),
            "nodes" => format!("{healthy} of {total} nodes healthy"),
            _ => format!("not compared for {} s", measure.value),
        };
        not_well(measure.level(), reason);
    }
    if verified.is_none() && (verify_limits.0.is_some() || verify_limits.1.is_some()) {
        not_well(Level::Warning, "not everything was compared yet".to_owned());
    }
    if status["leader"] != true {
        not_well(Level::Critical, "another proxy has taken over the log".to_owned());
    }
    if log["available"] != true {
        not_well(Level::Critical, "the log does not answer".to_owned());
    }
    if log["unprotected"] == true {
        not_well(
            Level::Warning,
            "there are writes without the log, not compared yet".to_owned(),
        );
    }
    if log["drain_paused"] == true {
        not_well(Level::Warning, "the drain is paused".to_owned());
    }
    for node in instances(status) {
        let name = text(&node["name"]);
        if node["maintenance"].is_object() {
            not_well(Level::Warning, format!("{name} is in maintenance"));
        } else if node["healthy"] == true && node["in_sync"] != true {
            not_well(Level::Warning, format!("{name} is not in step"));
        }
    }
    Verdict { level, reasons, values }
}

/// Seconds since; `None`: it is not there.
fn age(value: &Value, now: DateTime<Utc>) -> Option<u64> {
    let at = DateTime::parse_from_rfc3339(value.as_str()?).ok()?;
    u64::try_from((now - at.to_utc()).num_seconds().max(0)).ok()
}

fn line(verdict: &Verdict) -> String {
    let said = if verdict.reasons.is_empty() {
        "all nodes healthy and in step".to_owned()
    } else {
        verdict.reasons.join("; ")
    };
    let values: Vec<String> = verdict.values.iter().map(Measure::perfdata).collect();
    let values = if values.is_empty() {
        String::new()
    } else {
        format!(" | {}", values.join(" "))
    };
    format!("DIPTYCH {} - {said}{values}", verdict.level.word().to_uppercase())
}

fn shown(verdict: &Verdict) -> Value {
    let values: serde_json::Map<String, Value> = (verdict.values.iter())
        .map(|measure| (measure.name.to_owned(), json!(measure.value)))
        .collect();
    json!({
        "status": verdict.level.word(),
        "code": verdict.level as u8,
        "reasons": verdict.reasons,
        "values": values,
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        limits: Limits,
    }

    fn limits(words: &[&str]) -> Limits {
        Line::parse_from([&["health"], words].concat()).limits
    }

    fn at(text: &str) -> DateTime<Utc> {
        DateTime::parse_from_rfc3339(text).unwrap().to_utc()
    }

    fn healthy() -> Value {
        let node = |name: &str| json!({"name": name, "healthy": true, "in_sync": true, "maintenance": null});
        json!({"total_instances": 2, "healthy_instances": 2, "leader": true, "verified_at": null,
               "instances": [node("primary"), node("replica")],
               "wal": {"pending_writes": 0, "oldest_pending": null, "parked": 0, "parked_repairs": 0, "available": true,
                       "unprotected": false, "drain_paused": false}})
    }

    fn said(status: &Value, words: &[&str]) -> (Level, String) {
        let verdict = judge(status, &limits(words), at("2030-01-01T01:00:00Z"));
        (verdict.level, line(&verdict))
    }

    #[test]
    fn all_is_well() {
        let (level, line) = said(&healthy(), &[]);
        assert_eq!(level, Level::Ok);
        assert_eq!(
            line,
            "DIPTYCH OK - all nodes healthy and in step | pending=0;999;99999 oldest_age=0s;299;3599 parked=0;0; \
             nodes=2;2:;1:"
        );
    }

    #[test]
    fn every_threshold_counts_from_its_value_on() {
        let set = |path: &str, value: Value| {
            let mut status = healthy();
            *status.pointer_mut(path).unwrap() = value;
            status
        };
        let pending = |count: u64| set("/wal/pending_writes", json!(count));
        let oldest = || set("/wal/oldest_pending", json!("2030-01-01T00:58:00Z"));
        let parked = || set("/wal/parked_repairs", json!(2));
        let nodes = |count: u64| set("/healthy_instances", json!(count));
        let verified = || set("/verified_at", json!("2029-12-31T01:00:00Z"));
        for (status, words, expected) in [
            (pending(999), &[][..], Level::Ok),
            (pending(1000), &[], Level::Warning),
            (pending(5), &["--pending-warning", "5"], Level::Warning),
            (pending(5), &["--pending-critical", "5"], Level::Critical),
            (oldest(), &[], Level::Ok),
            (oldest(), &["--age-warning", "2m"], Level::Warning),
            (oldest(), &["--age-critical", "120s"], Level::Critical),
            (parked(), &[], Level::Warning),
            (parked(), &["--parked-warning", "3"], Level::Ok),
            (parked(), &["--parked-critical", "2"], Level::Critical),
            (nodes(1), &[], Level::Warning),
            (nodes(1), &["--nodes-warning", "1"], Level::Ok),
            (nodes(1), &["--nodes-critical", "2"], Level::Critical),
            (nodes(0), &[], Level::Critical),
            (verified(), &[], Level::Ok),
            (verified(), &["--verify-warning", "1d"], Level::Warning),
            (verified(), &["--verify-critical", "1d"], Level::Critical),
            (verified(), &["--verify-critical", "2d"], Level::Ok),
            (healthy(), &["--verify-warning", "1d"], Level::Warning),
        ] {
            assert_eq!(said(&status, words).0, expected, "{words:?} {}", said(&status, words).1);
        }
    }

    #[test]
    fn what_has_no_threshold_counts_too() {
        for (path, value, expected, part) in [
            ("/leader", json!(false), Level::Critical, "taken over"),
            ("/wal/available", json!(false), Level::Critical, "does not answer"),
            ("/wal/unprotected", json!(true), Level::Warning, "without the log"),
            ("/wal/drain_paused", json!(true), Level::Warning, "paused"),
            (
                "/instances/1/maintenance",
                json!({"who": "x"}),
                Level::Warning,
                "replica is in maintenance",
            ),
            (
                "/instances/0/in_sync",
                json!(false),
                Level::Warning,
                "primary is not in step",
            ),
        ] {
            let mut status = healthy();
            *status.pointer_mut(path).unwrap() = value;
            let (level, line) = said(&status, &[]);
            assert!(level == expected && line.contains(part), "{line}");
        }
    }

    #[test]
    fn a_warning_restarts_no_container() {
        let codes = |critical_only| {
            [Level::Ok, Level::Warning, Level::Critical, Level::Unknown].map(|level| code(level, critical_only))
        };
        assert_eq!(codes(false), [0, 1, 2, 3]);
        assert_eq!(codes(true), [0, 0, 2, 3]);
    }

    #[test]
    fn what_cannot_be_understood_is_unknown() {
        assert_eq!(said(&Value::Null, &[]).0, Level::Unknown);
        assert_eq!(said(&json!({"status": "ok"}), &[]).0, Level::Unknown);
    }
}
