//! The state of everything, as JSON.

use std::sync::atomic::Ordering;

use chrono::{DateTime, SecondsFormat};
use serde_json::{Value, json};

use crate::cluster::NodeIndex;
use crate::mirror::{Answer, Core, Scope};

const SERVICE: &str = "Diptych: ChromaDB Load Balancer with Write-Ahead Log";

/// What waits for one node.
#[derive(Debug, Default, Clone, Copy)]
pub struct Waiting {
    pub rows: u64,
    pub bytes: u64,
    pub parked: u64,
    pub lanes: u64,
    pub oldest: Option<i64>,
}

/// Sums over the lanes where the node is behind.
pub fn waiting(core: &Core, node: NodeIndex) -> Waiting {
    let keys: Vec<_> = core
        .behind
        .lock()
        .range((node, None)..(node + 1, None))
        .map(|(_, key)| *key)
        .collect();
    let mut sum = Waiting::default();
    for key in keys {
        let scope = match key {
            None => Scope::Namespace,
            Some(generation) => match core.catalog.by_generation(generation) {
                Some(collection) => Scope::Collection(collection),
                None => continue,
            },
        };
        let pair = &scope.pairs(core)[node];
        if pair.pending() == 0 {
            continue;
        }
        sum.rows += pair.pending();
        sum.bytes += pair.pending_bytes();
        sum.parked += pair.parked();
        sum.lanes += 1;
        sum.oldest = match (sum.oldest, pair.oldest()) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
    }
    sum
}

/// Requests that the node has not answered though their clients were.
fn stragglers(core: &Core, node: NodeIndex) -> u64 {
    let collections: u64 = core
        .catalog
        .all()
        .iter()
        .map(|collection| collection.pairs[node].stragglers())
        .sum();
    collections + core.namespace.pairs[node].stragglers()
}

fn time(micros: Option<i64>) -> Value {
    micros
        .and_then(DateTime::from_timestamp_micros)
        .map_or(Value::Null, |at| {
            Value::String(at.to_rfc3339_opts(SecondsFormat::Millis, true))
        })
}

fn instance(core: &Core, node: NodeIndex) -> Value {
    let waiting = waiting(core, node);
    let this = core.cluster.node(node);
    let repairs = core.repairs.lock().iter().filter(|row| row.node == this.name).count();
    let stragglers = stragglers(core, node);
    json!({
        "name": this.name,
        "url": format!("http://{}", this.authority),
        "healthy": this.is_healthy(),
        "up": this.is_up(),
        "in_sync": waiting.rows == 0 && repairs == 0 && stragglers == 0,
        "pending_writes": waiting.rows,
        "pending_bytes": waiting.bytes,
        "oldest_pending": time(waiting.oldest),
        "parked": waiting.parked,
        "repairs": repairs,
        "stragglers": stragglers,
        "reads_in_flight": this.reads_in_flight(),
        "ejections": this.ejections(),
        "last_error": this.last_error(),
    })
}

fn log(core: &Core) -> Value {
    let all: Vec<Waiting> = (0..core.cluster.len()).map(|node| waiting(core, node)).collect();
    let pending: u64 = all.iter().map(|waiting| waiting.rows).sum();
    let replaying = (0..core.cluster.len()).any(|node| all[node].rows > 0 && core.cluster.node(node).is_up());
    json!({
        "pending_writes": pending,
        "pending_bytes": all.iter().map(|waiting| waiting.bytes).sum::<u64>(),
        "is_replaying": replaying,
        "total_replayed": core.counters.replayed.load(Ordering::Relaxed),
        "failed_replays": core.counters.failed_replays.load(Ordering::Relaxed),
        "oldest_pending": time(all.iter().filter_map(|waiting| waiting.oldest).min()),
        "parked": all.iter().map(|waiting| waiting.parked).sum::<u64>(),
        "available": core.log.is_available(),
        "journal": core.log.journal().describe(),
    })
}

pub fn status(core: &Core) -> Value {
    let instances: Vec<Value> = (0..core.cluster.len()).map(|node| instance(core, node)).collect();
    let healthy = core.cluster.nodes().iter().filter(|node| node.is_healthy()).count();
    let repairs: Vec<Value> = core.repairs.lock().iter().take(20).map(|row| {
        json!({"node": row.node, "generation": row.generation, "reason": row.reason, "source": row.source,
               "records": row.ids.as_ref().map(Vec::len), "since": row.created_at.to_rfc3339_opts(SecondsFormat::Millis, true)})
    }).collect();
    let log = log(core);
    json!({
        "service": SERVICE,
        "version": env!("CARGO_PKG_VERSION"),
        "leader": !core.log.is_fenced(),
        "term": core.log.term(),
        "healthy_instances": healthy,
        "total_instances": core.cluster.len(),
        "instances": instances,
        "write_ahead_log": log,
        "wal": log,
        "repairs": repairs,
    })
}

pub fn wal_status(core: &Core) -> Value {
    let mut system = log(core);
    let nodes: Vec<Value> = (0..core.cluster.len()).map(|node| instance(core, node)).collect();
    system["nodes"] = Value::Array(nodes);
    json!({ "wal_system": system })
}

pub fn health(core: &Core) -> Answer {
    let total = core.cluster.len();
    let healthy = core.cluster.nodes().iter().filter(|node| node.is_healthy()).count();
    let in_sync = (0..total).all(|node| instance(core, node)["in_sync"] == Value::Bool(true));
    let pending: u64 = (0..total).map(|node| waiting(core, node).rows).sum();
    let status = match healthy {
        0 => "unavailable",
        count if count == total && in_sync => "healthy",
        _ => "degraded",
    };
    let body = json!({
        "status": status,
        "healthy_instances": format!("{healthy}/{total}"),
        "service": SERVICE,
        "pending_writes": pending,
    });
    Answer::json(if healthy == 0 { 503 } else { 200 }, body.to_string())
}

/// Ready: the log is ours and a node can serve.
pub fn ready(core: &Core) -> Answer {
    let ready = !core.log.is_fenced() && core.serving.load(Ordering::SeqCst) && core.cluster.up().next().is_some();
    Answer::json(if ready { 200 } else { 503 }, json!({ "ready": ready }).to_string())
}
