//! What is counted for Prometheus while requests run (design.md 10). What is a state, and not an event, is read at
//! scrape time instead: see `admin::collector`.
//!
//! Names begin with `diptych_`, units are base units, and labels come from closed sets: configured node names and the
//! words in this file. No label ever holds a collection, a tenant or an id. A child of a family is resolved once and
//! kept, so that counting is an atomic addition.

use std::array;
use std::sync::{LazyLock, OnceLock};
use std::time::Duration;

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry, default_registry,
};

use crate::mirror::Outcome;

/// Every value of the label `operation`: what routes and entries are called. The last stands for all others.
const OPERATIONS: [&str; 26] = [
    "add",
    "upsert",
    "update",
    "delete",
    "get",
    "query",
    "count",
    "search",
    "get_collection",
    "list_collections",
    "count_collections",
    "create_collection",
    "modify_collection",
    "delete_collection",
    "get_database",
    "list_databases",
    "create_database",
    "delete_database",
    "get_tenant",
    "create_tenant",
    "modify_tenant",
    "server",
    "status",
    "reset",
    "outside",
    "other",
];

const CLASSES: [&str; 5] = ["gone", "2xx", "3xx", "4xx", "5xx"];

const OUTCOMES: [&str; 6] = ["applied", "refused", "failed", "missing", "unknown", "skipped"];

const SECONDS: [f64; 16] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];

const ENTRIES: [f64; 11] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

/// One value per operation, made when it is first needed.
struct PerOperation<T>([OnceLock<T>; OPERATIONS.len()]);

impl<T> PerOperation<T> {
    fn new() -> Self {
        Self(array::from_fn(|_| OnceLock::new()))
    }

    fn get(&self, operation: &str, make: impl FnOnce(&'static str) -> T) -> &T {
        let index = operation_index(operation);
        self.0[index].get_or_init(|| make(OPERATIONS[index]))
    }
}

fn operation_index(operation: &str) -> usize {
    let found = OPERATIONS.iter().position(|known| *known == operation);
    found.unwrap_or(OPERATIONS.len() - 1)
}

struct PerRequest {
    by_class: [IntCounter; CLASSES.len()],
    duration: Histogram,
}

/// Counts what clients ask.
pub struct Metrics {
    requests: IntCounterVec,
    durations: HistogramVec,
    in_flight: IntGauge,
    children: PerOperation<PerRequest>,
}

impl Metrics {
    /// Registers the families of requests.
    ///
    /// # Errors
    /// When a name is taken in `registry`.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let requests = IntCounterVec::new(
            Opts::new(
                "diptych_requests_total",
                "Requests of clients, by operation and class of the status; gone: the client left first.",
            ),
            &["operation", "status"],
        )?;
        let durations = HistogramVec::new(
            HistogramOpts::new(
                "diptych_request_duration_seconds",
                "Time from a request's head to its answer's end.",
            )
            .buckets(SECONDS.to_vec()),
            &["operation"],
        )?;
        let in_flight = IntGauge::new("diptych_requests_in_flight", "Requests that are being answered now.")?;
        registry.register(Box::new(requests.clone()))?;
        registry.register(Box::new(durations.clone()))?;
        registry.register(Box::new(in_flight.clone()))?;
        Ok(Self {
            requests,
            durations,
            in_flight,
            children: PerOperation::new(),
        })
    }

    /// A request was answered; 0: not at all, the client was gone.
    pub fn request(&self, operation: &str, status: u16, took: Duration) {
        let children = self.children.get(operation, |operation| PerRequest {
            by_class: CLASSES.map(|class| self.requests.with_label_values(&[operation, class])),
            duration: self.durations.with_label_values(&[operation]),
        });
        let class = match status {
            0 => 0,
            200..300 => 1,
            300..400 => 2,
            400..500 => 3,
            _ => 4,
        };
        children.by_class[class].inc();
        children.duration.observe(took.as_secs_f64());
    }

    /// Counts a request as being answered for as long as the guard lives.
    pub fn in_flight(&self) -> InFlight {
        self.in_flight.inc();
        InFlight(self.in_flight.clone())
    }

    /// Requests that are being answered now; shutdown waits for them.
    pub fn requests_in_flight(&self) -> i64 {
        self.in_flight.get()
    }
}

/// A request that is being answered.
pub struct InFlight(IntGauge);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

static UPSTREAM: LazyLock<HistogramVec> = LazyLock::new(|| {
    histograms(
        "diptych_upstream_duration_seconds",
        "Time from sending a request to a node until its answer's end, or until it failed.",
        &["node", "operation"],
        &SECONDS,
    )
});

static WRITES: LazyLock<IntCounterVec> = LazyLock::new(|| {
    let family = IntCounterVec::new(
        Opts::new(
            "diptych_mirrored_writes_total",
            "What a node made of each write; skipped: not asked, because it was down or behind.",
        ),
        &["node", "outcome"],
    );
    registered(family)
});

static APPENDS: LazyLock<[Histogram; 2]> = LazyLock::new(|| {
    let family = histograms(
        "diptych_journal_append_duration_seconds",
        "Time of one commit to the journal.",
        &["outcome"],
        &SECONDS,
    );
    ["failed", "ok"].map(|outcome| family.with_label_values(&[outcome]))
});

static BATCHES: LazyLock<[Histogram; 2]> = LazyLock::new(|| {
    let family = histograms(
        "diptych_combined_batch_entries",
        "Writes that were combined into one request to a node; live: of clients, drain: those a node had missed.",
        &["path"],
        &ENTRIES,
    );
    ["live", "drain"].map(|path| family.with_label_values(&[path]))
});

/// Counts what one node is asked.
pub struct NodeMetrics {
    node: String,
    upstream: PerOperation<Histogram>,
    writes: [IntCounter; OUTCOMES.len()],
}

impl NodeMetrics {
    pub fn new(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            upstream: PerOperation::new(),
            writes: OUTCOMES.map(|outcome| WRITES.with_label_values(&[node, outcome])),
        }
    }

    /// A request to the node ended, with or without an answer.
    pub fn upstream(&self, operation: &str, took: Duration) {
        self.upstream
            .get(operation, |operation| {
                UPSTREAM.with_label_values(&[&self.node, operation])
            })
            .observe(took.as_secs_f64());
    }

    /// What the node made of a write; `None`: it was not asked.
    pub fn mirrored(&self, outcome: Option<&Outcome>) {
        let index = match outcome {
            Some(Outcome::Applied) => 0,
            Some(Outcome::Refused { .. }) => 1,
            Some(Outcome::Failed) => 2,
            Some(Outcome::Missing) => 3,
            Some(Outcome::Unknown(_)) => 4,
            None => 5,
        };
        self.writes[index].inc();
    }
}

/// One commit to the journal was tried.
pub fn journal_append(ok: bool, took: Duration) {
    APPENDS[usize::from(ok)].observe(took.as_secs_f64());
}

/// Entries that a node had missed were applied to it with one request.
pub fn drained_batch(entries: usize) {
    BATCHES[1].observe(entries as f64);
}

/// So many writes of clients were sent to the nodes as one.
pub fn mirrored_batch(writes: usize) {
    BATCHES[0].observe(writes as f64);
}

fn histograms(name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> HistogramVec {
    registered(HistogramVec::new(
        HistogramOpts::new(name, help).buckets(buckets.to_vec()),
        labels,
    ))
}

fn registered<T: prometheus::core::Collector + Clone + 'static>(family: prometheus::Result<T>) -> T {
    let family = family.expect("the names in this file are valid");
    let registered = default_registry().register(Box::new(family.clone()));
    registered.expect("each name is registered once");
    family
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_operation_is_other() {
        assert_eq!(OPERATIONS[operation_index("query")], "query");
        assert_eq!(OPERATIONS[operation_index("7c0e-a-collection")], "other");
    }

    #[test]
    fn requests_are_counted_by_class_and_in_flight_while_they_live() {
        let registry = Registry::new();
        let metrics = Metrics::new(&registry).unwrap();
        let running = metrics.in_flight();
        assert_eq!(metrics.requests_in_flight(), 1);
        metrics.request("add", 201, Duration::from_millis(3));
        metrics.request("add", 0, Duration::from_millis(3));
        metrics.request("unheard of", 503, Duration::from_millis(3));
        drop(running);
        assert_eq!(metrics.requests_in_flight(), 0);
        let count = |operation, class| metrics.requests.with_label_values(&[operation, class]).get();
        assert_eq!(
            (count("add", "2xx"), count("add", "gone"), count("other", "5xx")),
            (1, 1, 1)
        );
    }
}
