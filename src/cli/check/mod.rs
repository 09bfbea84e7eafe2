//! `diptych check`: what a configuration would run, and whether what it needs is there. Changes nothing.

mod journal;
mod nodes;

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use super::{ask, run};
use crate::config::{Config, Consistency, Severity};

/// What was found out by asking.
type Finding = Result<String, String>;

/// Explains, judges and tries to reach everything.
pub fn check(path: Option<&Path>) -> ExitCode {
    let config = match run::load(path) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    match path {
        Some(path) => println!("{}\n", path.display()),
        None => println!("No configuration file: the defaults apply.\n"),
    }
    print!("{}", explain(&config));
    let problems = config.validate();
    if !problems.is_empty() {
        println!("\nJudgement");
    }
    for problem in &problems {
        println!("  {problem}");
    }
    let mut good = !problems.iter().any(|problem| problem.severity == Severity::Error);
    if config.server.daemon {
        good = false;
        println!("  error: daemon: isn't supported: leave that to systemd or a container runtime");
    }
    println!("\nReached");
    let findings = match ask::runtime() {
        Ok(runtime) => runtime.block_on(reach(&config)),
        Err(reason) => vec![("this machine".to_owned(), Err(reason))],
    };
    for (what, finding) in findings {
        match finding {
            Ok(text) => println!("  ok      {what}: {text}"),
            Err(text) => {
                good = false;
                println!("  FAILED  {what}: {text}");
            }
        }
    }
    println!(
        "\n{}",
        if good {
            "Good: this would run."
        } else {
            "Not good: see above."
        }
    );
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn reach(config: &Config) -> Vec<(String, Finding)> {
    let mut findings = nodes::reach(config).await;
    findings.push(("log".to_owned(), journal::reach(&config.wal).await));
    findings
}

fn explain(config: &Config) -> String {
    let mut text = String::new();
    let mut line = |what: &str, that: String| {
        let _ = writeln!(text, "{what:<9} {that}");
    };
    for listen in &config.listen {
        let status = if config.listen_status {
            "; answers /health, /status and the like there too"
        } else {
            ""
        };
        line("clients", format!("http://{}{status}", listen.address));
    }
    line(
        "operators",
        match config.admin.address {
            Some(address) => format!("http://{address}: /status, /health, /ready, /metrics"),
            None => "no admin port: no metrics".to_owned(),
        },
    );
    for (position, node) in config.nodes.iter().enumerate() {
        let role = if position == 0 { "the primary" } else { "a replica" };
        let that = format!(
            "{} at {}: {role}, read weight {}",
            node.name, node.url, node.read_weight
        );
        line("node", that);
    }
    let health = &config.health;
    line(
        "health",
        format!(
            "a probe every {}, waiting {}; out after {} failed, back after {} good and a test write",
            span(health.interval),
            span(health.timeout),
            health.unhealthy_after,
            health.healthy_after
        ),
    );
    line("log", config.wal.shown_url());
    let from = match config.reads.consistency {
        Consistency::Session => "any node that has every acknowledged write of the collection",
        Consistency::Lead => "the first node that has every acknowledged write of the collection",
        Consistency::Any => "any node that is up, also one that is behind",
    };
    line(
        "reads",
        format!(
            "from {from}; {} to the first byte, {} for a drain",
            span(config.reads.timeout),
            span(config.reads.behind_wait)
        ),
    );
    let writes = &config.writes;
    line(
        "writes",
        format!(
            "to every node; answered {} after the first node applied it (or half as long as that took), at the latest \
             after {}; bodies up to {}, {} queued per collection, {} held in all",
            span(writes.mirror_grace),
            span(writes.timeout),
            bytes(writes.max_body),
            writes.queue,
            bytes(writes.bytes_in_flight)
        ),
    );
    let drain = &config.drain;
    line(
        "drain",
        format!(
            "up to {} entries or {} read at a time, {} collections side by side per node",
            drain.batch_records,
            bytes(drain.batch_bytes),
            drain.concurrency
        ),
    );
    let grace = config.server.grace_period_seconds.unwrap_or_default();
    line(
        "process",
        format!(
            "{} threads per service; on SIGTERM it ends when nothing is under way, after {grace} s at the latest for \
             requests and 60 s more for writes",
            config.server.threads
        ),
    );
    text
}

fn span(time: Duration) -> String {
    let millis = time.as_millis();
    match millis {
        0 => "0 s".to_owned(),
        _ if millis.is_multiple_of(60_000) => format!("{} min", millis / 60_000),
        _ if millis.is_multiple_of(1000) => format!("{} s", millis / 1000),
        _ => format!("{millis} ms"),
    }
}

fn bytes(size: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    let unit = UNITS
        .iter()
        .find(|(unit, _)| size >= *unit && size.is_multiple_of(*unit));
    match unit {
        Some((unit, name)) => format!("{} {name}", size / unit),
        None => format!("{size} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_in_words() {
        let text = explain(&Config::default());
        for part in [
            "clients   http://0.0.0.0:8000; answers /health",
            "operators http://127.0.0.1:8900",
            "primary at http://127.0.0.1:8001",
            "replica at http://127.0.0.1:8002",
            "log       sqlite://diptych.db",
            "10 min",
            "40 MiB",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
    }

    #[test]
    fn passwords_are_not_shown() {
        let mut config = Config::default();
        config.wal.url = "postgres://user:secret@host/db?password=secret".to_owned();
        assert!(!explain(&config).contains("secret"));
    }

    #[test]
    fn units_that_people_read() {
        assert_eq!(span(Duration::from_millis(250)), "250 ms");
        assert_eq!(span(Duration::from_secs(90)), "90 s");
        assert_eq!(bytes(1 << 30), "1 GiB");
        assert_eq!(bytes(1000), "1000 bytes");
    }
}
