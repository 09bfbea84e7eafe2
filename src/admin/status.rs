//! The state of everything, as JSON.

use std::sync::atomic::Ordering;

use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Value, json};

use super::state::{NodeState, OpenLane, gather, is_replaying, verified_at};
use crate::cluster::{Node, NodeIndex};
use crate::journal::{RepairKind, RepairRow};
use crate::mirror::{Answer, Core};

const SERVICE: &str = "Diptych: ChromaDB Load Balancer with Write-Ahead Log";
/// How many lanes or rows a list in `/status` shows; how many there are is beside it.
const SHOWN: usize = 20;

pub fn time(at: DateTime<Utc>) -> Value {
    Value::String(at.to_rfc3339_opts(SecondsFormat::Millis, true))
}

fn micros(at: Option<i64>) -> Value {
    at.and_then(DateTime::from_timestamp_micros).map_or(Value::Null, time)
}

fn maintenance(node: &Node) -> Value {
    node.maintenance().map_or(
        Value::Null,
        |record| json!({ "since": time(record.since), "who": record.who }),
    )
}

/// It is given requests, and its probes pass.
fn is_healthy(node: &Node) -> bool {
    node.is_healthy() && !node.is_in_maintenance()
}

fn instance(core: &Core, node: NodeIndex, state: &NodeState) -> Value {
    let this = core.cluster.node(node);
    let out = state.lanes.iter().filter(|lane| lane.generation.is_some()).count();
    json!({
        "name": this.name,
        "url": format!("http://{}", this.authority),
        "healthy": is_healthy(this),
        "up": this.is_up(),
        "in_sync": state.in_sync(),
        "pending_writes": state.rows,
        "pending_bytes": state.bytes,
        "oldest_pending": micros(state.oldest),
        "parked": state.parked,
        "repairs": state.repairs,
        "parked_repairs": state.parked_repairs,
        "suspects": state.suspects,
        "stragglers": state.stragglers,
        "collections_not_in_sync": out,
        "namespace_in_sync": core.namespace.pairs[node].in_sync(),
        "maintenance": maintenance(this),
        "in_flight": this.in_flight(),
        "reads_in_flight": this.reads_in_flight(),
        "ejections": this.ejections(),
        "last_error": this.last_error(),
    })
}

fn log(core: &Core, states: &[NodeState]) -> Value {
    json!({
        "pending_writes": states.iter().map(|state| state.rows).sum::<u64>(),
        "pending_bytes": states.iter().map(|state| state.bytes).sum::<u64>(),
        "is_replaying": is_replaying(core, states),
        "total_replayed": core.counters.replayed.load(Ordering::Relaxed),
        "failed_replays": core.counters.failed_replays.load(Ordering::Relaxed),
        "oldest_pending": micros(states.iter().filter_map(|state| state.oldest).min()),
        "parked": states.iter().map(|state| state.parked).sum::<u64>(),
        "parked_repairs": states.iter().map(|state| state.parked_repairs).sum::<u64>(),
        "drain_paused": core.drain_paused.load(Ordering::SeqCst),
        "unprotected": core.unprotected.is_open(),
        "unprotected_seconds": core.unprotected.time(core.env.now()).as_secs(),
        "available": core.log.is_available(),
        "journal": core.log.journal().describe(),
    })
}

/// A collection for people: its name and the id that clients see; the namespace is null.
pub fn collection(core: &Core, generation: Option<i64>) -> Value {
    let Some(collection) = generation.and_then(|generation| core.catalog.by_generation(generation)) else {
        return Value::Null;
    };
    let facts = collection.facts();
    json!({
        "tenant": facts.tenant,
        "database": facts.database,
        "name": facts.name,
        "id": collection.client_id,
        "deleted": facts.deleted,
    })
}

fn lane(core: &Core, node: NodeIndex, lane: &OpenLane) -> Value {
    json!({
        "node": core.cluster.node(node).name,
        "scope": if lane.generation.is_some() { "collection" } else { "namespace" },
        "collection": collection(core, lane.generation),
        "reason": lane.reason(),
        "pending_writes": lane.rows,
        "parked": lane.parked,
        "repairs": lane.repairs,
        "oldest_pending": micros(lane.oldest),
    })
}

pub fn repair(core: &Core, row: &RepairRow) -> Value {
    json!({
        "id": row.id,
        "kind": row.kind.label(),
        "parked": row.parked,
        "node": row.node,
        "scope": if row.generation.is_some() { "collection" } else { "namespace" },
        "collection": collection(core, row.generation),
        "generation": row.generation,
        "reason": row.reason,
        "source": row.source,
        "records": row.ids.as_ref().map(Vec::len),
        "progress": progress(core, row),
        "waits_for": crate::repair::waits_for(core, row),
        "since": time(row.created_at),
    })
}

/// How far a copy has come, and what went wrong with it before.
fn progress(core: &Core, row: &RepairRow) -> Value {
    let Some(node) = core.cluster.index_of(&row.node) else {
        return Value::Null;
    };
    let progress = core.repairing.progress_of(node, row.generation);
    let failure = core.repairing.failure_of(node, row.generation);
    json!({
        "records_done": progress.as_ref().map(|progress| progress.done),
        "records_total": progress.as_ref().map(|progress| progress.total),
        "failures": failure.as_ref().map_or(0, |failure| failure.times),
        "last_failure": failure.map(|failure| failure.last),
    })
}

fn by_kind(core: &Core) -> Value {
    let rows = core.repairs.lock();
    let count = |kind| rows.iter().filter(|row| row.kind == kind).count();
    RepairKind::ALL
        .into_iter()
        .map(|kind| (kind.label().to_owned(), json!(count(kind))))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn healthy(core: &Core) -> usize {
    core.cluster.nodes().iter().filter(|node| is_healthy(node)).count()
}

pub fn status(core: &Core) -> Value {
    let states = gather(core);
    let instances = states.iter().enumerate();
    let instances: Vec<Value> = instances.map(|(node, state)| instance(core, node, state)).collect();
    let open = || {
        let nodes = states.iter().enumerate();
        nodes.flat_map(|(node, state)| state.lanes.iter().map(move |lane| (node, lane)))
    };
    let lanes: Vec<Value> = open().take(SHOWN).map(|(node, open)| lane(core, node, open)).collect();
    let rows: Vec<RepairRow> = core.repairs.lock().iter().take(SHOWN).cloned().collect();
    let repairs: Vec<Value> = rows.iter().map(|row| repair(core, row)).collect();
    let log = log(core, &states);
    json!({
        "service": SERVICE,
        "version": env!("CARGO_PKG_VERSION"),
        "leader": !core.log.is_fenced(),
        "term": core.log.term(),
        "holder": core.log.holder(),
        "healthy_instances": healthy(core),
        "total_instances": core.cluster.len(),
        "instances": instances,
        "write_ahead_log": log,
        "wal": log,
        "not_in_sync": lanes,
        "total_not_in_sync": open().count(),
        "repairs": repairs,
        "repairs_by_kind": by_kind(core),
        "recovering_lanes": core.recovering(),
        "verified_at": verified_at(core).map_or(Value::Null, time),
        "events": super::events::recent(core),
        "events_dropped": core.events().dropped(),
        "total_repairs": states.iter().map(|state| state.repairs).sum::<u64>(),
    })
}

pub fn wal_status(core: &Core) -> Value {
    let states = gather(core);
    let mut system = log(core, &states);
    let nodes = states.iter().enumerate();
    let nodes: Vec<Value> = nodes.map(|(node, state)| instance(core, node, state)).collect();
    system["nodes"] = Value::Array(nodes);
    json!({ "wal_system": system })
}

/// 200 while a node can serve, for load balancers; the word says how well.
pub fn health(core: &Core) -> Answer {
    let total = core.cluster.len();
    let healthy = healthy(core);
    let states = gather(core);
    let whole = healthy == total
        && core.log.is_available()
        && !core.unprotected.is_open()
        && core.recovering() == 0
        && states.iter().all(NodeState::in_sync);
    let body = json!({
        "status": word(healthy, whole),
        "healthy_instances": format!("{healthy}/{total}"),
        "service": SERVICE,
        "pending_writes": states.iter().map(|state| state.rows).sum::<u64>(),
    });
    Answer::json(if healthy == 0 { 503 } else { 200 }, body.to_string())
}

fn word(healthy: usize, whole: bool) -> &'static str {
    match (healthy, whole) {
        (0, _) => "unavailable",
        (_, true) => "healthy",
        (_, false) => "degraded",
    }
}

/// Ready: clients can connect, the log is ours and a node can serve.
pub fn ready(core: &Core, listening: bool) -> Answer {
    let ready = listening && !core.log.is_fenced() && core.cluster.up().next().is_some();
    Answer::json(if ready { 200 } else { 503 }, json!({ "ready": ready }).to_string())
}
