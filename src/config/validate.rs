//! What a readable configuration can still get wrong: contradictions between keys, and choices with a price.
//!
//! Everything is found in one go, each under the key to change. An *error* is a configuration that cannot do its job, and
//! the server refuses to start with it; a *warning* runs, and gives up something the operator may be counting on; a
//! *note* only says what will happen. Nothing here looks outside: whether a node answers is asked by `diptych check`.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tracing_subscriber::EnvFilter;
use url::{Host, Url};

use super::{Config, NodeUrl};
use crate::chroma::MOST_RECORDS;

/// Chroma's own limit of a request body, unless it is configured otherwise there.
const NODE_BODY: u64 = 40 << 20;

/// How bad a [`Problem`] is, worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// The server does not start.
    Error,
    /// The server starts, without something that may be counted on.
    Warning,
    /// Worth knowing.
    Note,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// The key to change, as in `nodes[1].url`.
    pub key: String,
    /// What is wrong and what would be right.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Note => "note",
        };
        write!(f, "{severity}: {}: {}", self.key, self.message)
    }
}

#[derive(Default)]
struct Findings(Vec<Problem>);

impl Findings {
    fn add(&mut self, severity: Severity, key: impl Into<String>, message: impl Into<String>) {
        self.0.push(Problem {
            severity,
            key: key.into(),
            message: message.into(),
        });
    }

    fn error(&mut self, key: impl Into<String>, message: impl Into<String>) {
        self.add(Severity::Error, key, message);
    }

    fn warning(&mut self, key: impl Into<String>, message: impl Into<String>) {
        self.add(Severity::Warning, key, message);
    }
}

impl Config {
    /// Every problem of this configuration, errors first, each group in the order of the file.
    pub fn validate(&self) -> Vec<Problem> {
        let mut found = Findings::default();
        self.check_addresses(&mut found);
        self.check_admin(&mut found);
        self.check_nodes(&mut found);
        self.check_wal(&mut found);
        self.check_amounts(&mut found);
        self.check_healing(&mut found);
        self.check_times(&mut found);
        self.check_log(&mut found);
        found.0.sort_by_key(|problem| problem.severity);
        found.0
    }

    fn check_addresses(&self, found: &mut Findings) {
        if self.listen.is_empty() {
            found.error("listen", "no address to listen on; add `- address: 0.0.0.0:8000`");
        }
        for (i, listen) in self.listen.iter().enumerate() {
            let key = format!("listen[{i}].address");
            if let Some(j) = self.listen[..i]
                .iter()
                .position(|other| overlap(other.address, listen.address))
            {
                found.error(&key, format!("{} is taken by listen[{j}]", listen.address));
            }
            if self.admin.address.is_some_and(|admin| overlap(admin, listen.address)) {
                found.error(
                    &key,
                    format!("{} is also the admin address; give each its own port", listen.address),
                );
            }
        }
        let ours = self
            .listen
            .iter()
            .enumerate()
            .map(|(i, listen)| (format!("listen[{i}]"), listen.address));
        let ours: Vec<_> = ours
            .chain(self.admin.address.map(|admin| ("admin".to_owned(), admin)))
            .collect();
        for (i, node) in self.nodes.iter().enumerate() {
            if let Some((owner, address)) = ours.iter().find(|(_, address)| reaches(&node.url, *address)) {
                let message = format!(
                    "{} is our own address ({owner}, {address}), not a Chroma server's",
                    node.url
                );
                found.error(format!("nodes[{i}].url"), message);
            }
        }
    }

    fn check_admin(&self, found: &mut Findings) {
        if let Some(token) = &self.admin.token
            && !token.bytes().all(|byte| byte.is_ascii_graphic())
        {
            found.error(
                "admin.token",
                "has characters that a header cannot carry; use visible ASCII without spaces",
            );
        }
        if let Some(address) = self.admin.address
            && !self.verbs_allowed()
        {
            found.warning(
                "admin.token",
                format!("the verbs under /admin/ are off: {address} is not loopback and there is no token"),
            );
        }
    }

    fn check_nodes(&self, found: &mut Findings) {
        match self.nodes.len() {
            0 => found.error("nodes", "no nodes; name the Chroma servers to mirror"),
            1 => found.warning(
                "nodes",
                "one node only: no redundancy, and while it is away nothing works",
            ),
            _ => {}
        }
        let (mut names, mut servers) = (HashMap::new(), HashMap::new());
        for (i, node) in self.nodes.iter().enumerate() {
            let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'_' | b'-');
            if node.name.is_empty() || node.name.len() > 63 || !node.name.bytes().all(allowed) {
                found.error(
                    format!("nodes[{i}].name"),
                    format!("`{}` is not a name: use a-z, 0-9, _ and -, 1 to 63 of them", node.name),
                );
            }
            if let Some(j) = names.insert(&node.name, i) {
                found.error(
                    format!("nodes[{i}].name"),
                    format!("`{}` is the name of nodes[{j}] too", node.name),
                );
            }
            if let Some(j) = servers.insert(node.url.same_server_key(), i) {
                let message = format!("{} is the same server as nodes[{j}], {}", node.url, self.nodes[j].url);
                found.error(format!("nodes[{i}].url"), message);
            }
            if node.read_weight == 0 {
                found.error(
                    format!("nodes[{i}].read_weight"),
                    "must be at least 1; weights are relative",
                );
            }
        }
    }

    fn check_wal(&self, found: &mut Findings) {
        const FORM: &str = "write postgres://user:password@host/database or sqlite://path";
        let key = "wal.url";
        match self.wal.url.split_once(':').map(|(scheme, _)| scheme) {
            Some("postgres" | "postgresql") => {
                if let Err(error) = Url::parse(&self.wal.url) {
                    found.error(key, format!("not a URL ({error}): {FORM}"));
                }
            }
            Some("sqlite") => self.check_embedded_wal(found),
            // The rest of the text may hold a password, so only the scheme is repeated.
            Some(scheme) => found.error(key, format!("`{scheme}` is not a log we know: {FORM}")),
            None => found.error(key, format!("has no scheme: {FORM}")),
        }
    }

    fn check_embedded_wal(&self, found: &mut Findings) {
        let key = "wal.url";
        let rest = self.wal.url.trim_start_matches("sqlite:");
        let path = rest.trim_start_matches("//").split('?').next().unwrap_or_default();
        if path.is_empty() {
            found.error(
                key,
                "names no file: write sqlite://path, as in `sqlite:///var/lib/diptych/wal.db`",
            );
        } else if path == ":memory:" || rest.contains("mode=memory") {
            found.warning(
                key,
                "the log is in memory: what a node misses is forgotten when this process ends",
            );
        } else if !path.starts_with('/') {
            // A daemon leaves the directory it was started in, and would start a second log elsewhere.
            let severity = if self.server.daemon {
                Severity::Warning
            } else {
                Severity::Note
            };
            let message = format!("`{path}` is relative to the directory the server is started in; prefer a full path");
            found.add(severity, key, message);
        }
    }

    fn check_amounts(&self, found: &mut Findings) {
        for (key, zero) in [
            ("wal.max_connections", self.wal.max_connections == 0),
            ("health.unhealthy_after", self.health.unhealthy_after == 0),
            ("health.healthy_after", self.health.healthy_after == 0),
            ("writes.max_body", self.writes.max_body == 0),
            ("writes.combine_records", self.writes.combine_records == 0),
            ("writes.combine_bytes", self.writes.combine_bytes == 0),
            ("writes.queue", self.writes.queue == 0),
            ("writes.queue_bytes", self.writes.queue_bytes == 0),
            ("writes.bytes_in_flight", self.writes.bytes_in_flight == 0),
            ("drain.batch_records", self.drain.batch_records == 0),
            ("drain.batch_bytes", self.drain.batch_bytes == 0),
            ("drain.concurrency", self.drain.concurrency == 0),
            ("repair.concurrency", self.repair.concurrency == 0),
            ("repair.batch_records", self.repair.batch_records == 0),
            ("threads", self.server.threads == 0),
            ("listener_tasks_per_fd", self.server.listener_tasks_per_fd == 0),
        ] {
            if zero {
                found.error(key, "must be at least 1");
            }
        }
        if self.server.max_retries == 0 {
            found.error(
                "max_retries",
                "must be at least 1: it counts attempts, and with 0 no request is ever sent",
            );
        }
        for (key, records) in [
            ("writes.combine_records", self.writes.combine_records),
            ("drain.batch_records", self.drain.batch_records),
        ] {
            if records > MOST_RECORDS {
                found.error(
                    key,
                    format!("must be at most {MOST_RECORDS}: Chroma asks clients for no more"),
                );
            }
        }
        for (key, size) in [
            ("writes.combine_bytes", self.writes.combine_bytes),
            ("drain.batch_bytes", self.drain.batch_bytes),
        ] {
            if size > NODE_BODY {
                found.error(key, "must be at most 40MiB: Chroma takes no larger body");
            }
        }
        if self.writes.bytes_in_flight < self.writes.max_body {
            found.error(
                "writes.bytes_in_flight",
                "must be at least writes.max_body, or such a body never gets in",
            );
        }
    }

    fn check_healing(&self, found: &mut Findings) {
        if self.wal.max_bytes > 0 && self.wal.max_bytes < self.writes.max_body {
            found.error(
                "wal.max_bytes",
                "must be at least writes.max_body (or 0, no limit), or one write fills the log",
            );
        }
        // A read of more answers 500: too many SQL variables.
        if self.repair.batch_records > 10_000 {
            found.error(
                "repair.batch_records",
                "must be at most 10000: Chroma's reads have a limit",
            );
        }
        if !(1..=100).contains(&self.verify.sample) {
            found.error(
                "verify.sample",
                "is a share in percent: 1 to 100; verify.interval: 0s turns verifying off",
            );
        }
        for (i, tenant) in self.namespace.tenants.iter().enumerate() {
            if tenant.chars().count() < 3 {
                found.error(
                    format!("namespace.tenants[{i}]"),
                    format!("`{tenant}` is no tenant: Chroma's have at least 3 characters"),
                );
            }
        }
    }

    fn check_times(&self, found: &mut Findings) {
        let Self {
            health, reads, writes, ..
        } = self;
        for (key, time) in [
            ("health.interval", health.interval),
            ("health.timeout", health.timeout),
            ("reads.timeout", reads.timeout),
            ("reads.behind_wait", reads.behind_wait),
            ("writes.timeout", writes.timeout),
            ("writes.mirror_grace", writes.mirror_grace),
        ] {
            if time == Duration::ZERO {
                found.error(key, "must be longer than zero");
            }
        }
        if health.timeout > health.interval {
            found.warning(
                "health.timeout",
                "is longer than health.interval: a node that hangs is noticed later than the interval promises",
            );
        }
        if writes.mirror_grace > writes.timeout {
            found.error(
                "writes.mirror_grace",
                "is longer than writes.timeout, so it would never be over",
            );
        }
    }

    fn check_log(&self, found: &mut Findings) {
        let level = &self.log.level;
        // EnvFilter takes any lone word for the name of a target, so a misspelt level would silence the log.
        let word = !level.contains(['=', ',']);
        let known = ["off", "error", "warn", "info", "debug", "trace"];
        if word && !known.contains(&level.to_ascii_lowercase().as_str()) || EnvFilter::try_new(level).is_err() {
            found.error(
                "log.level",
                format!(
                    "`{level}` is not one of {}, nor a filter such as `info,diptych=debug`",
                    known.join(", ")
                ),
            );
        }
    }
}

/// Whether two listeners would want one port of one interface. Port 0 is a fresh port each time.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() == b.port() && a.port() != 0 && (same_ip(a.ip(), b.ip()) || takes_all(a, b) || takes_all(b, a))
}

fn same_ip(a: IpAddr, b: IpAddr) -> bool {
    a.to_canonical() == b.to_canonical()
}

/// `0.0.0.0` takes every IPv4 address, `[::]` every address.
fn takes_all(all: SocketAddr, one: SocketAddr) -> bool {
    all.ip().is_unspecified() && (all.is_ipv6() || one.ip().to_canonical().is_ipv4())
}

/// Whether a request to this node would arrive at our own listener, as far as can be told without resolving names.
fn reaches(url: &NodeUrl, listener: SocketAddr) -> bool {
    let ip = match url.host() {
        Host::Domain(_) => None,
        Host::Ipv4(ip) => Some(IpAddr::V4(ip)),
        Host::Ipv6(ip) => Some(IpAddr::V6(ip)),
    };
    let exactly = ip.is_some_and(|ip| same_ip(ip, listener.ip()));
    let locally = url.is_this_host() && (listener.ip().is_unspecified() || ip.is_none() && listener.ip().is_loopback());
    listener.port() != 0 && url.port() == listener.port() && (exactly || locally)
}

#[cfg(test)]
mod tests;
