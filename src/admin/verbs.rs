//! What an operator can look into and do: parked entries and repairs, comparing and copying, accepting a node, pausing
//! the drain.
//!
//! A verb that changes rows takes their lane first and does it in one commit, like everybody else (design.md R1, R5).
//! Skipping an entry leaves a repair row for its records, so that no difference goes unseen.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use http::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use super::status::{collection, time};
use super::tools::Part;
use crate::catalog::Collection;
use crate::chroma::{Generation, Refusal};
use crate::cluster::NodeIndex;
use crate::config::nearest;
use crate::drain::records_of;
use crate::env::BoxFuture;
use crate::events::{KEPT, Kind};
use crate::journal::{Change, Commit, JournalError, Outline, PayloadRow};
use crate::mirror::{Answer, Core, RepairWanted, Scope, StaysIn};
use crate::repair::jobs::{self, Options, Sample};

/// Entries that a list shows unless told otherwise, and at most.
const SHOWN: usize = 100;
const MOST_SHOWN: usize = 1000;
/// How far into a lane a list reaches: rows, and bytes of their bodies, which are read to be counted.
const MOST_READ: usize = 10_000;
/// How much of an entry's body is shown.
const BODY_SHOWN: usize = 64 << 10;

type Outcome = Result<Value, Refusal>;

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verb {
    ParkedEntries,
    Entries,
    Entry(String),
    RetryEntry(String),
    SkipEntry(String),
    Repairs,
    RetryRepair(String),
    PauseDrain(bool),
    AcceptNode(String),
    TakeOut(String),
    TakeBack(String),
    Verify,
    Comparisons,
    Comparison(String),
    Resync,
    Events,
    Mappings,
    Mapping(String),
}

impl Verb {
    /// It does something, and is worth an event: in the words of the command line.
    fn deed(&self) -> Option<String> {
        Some(match self {
            Self::RetryEntry(id) => format!("wal retry {id}"),
            Self::SkipEntry(id) => format!("wal skip {id}"),
            Self::RetryRepair(id) => format!("repairs retry {id}"),
            Self::PauseDrain(true) => "drain pause".to_owned(),
            Self::PauseDrain(false) => "drain resume".to_owned(),
            Self::AcceptNode(name) => format!("node accept {name}"),
            Self::TakeOut(name) => format!("node maint {name}"),
            Self::TakeBack(name) => format!("node ready {name}"),
            Self::Verify => "verify".to_owned(),
            Self::Resync => "resync".to_owned(),
            Self::ParkedEntries
            | Self::Entries
            | Self::Entry(_)
            | Self::Repairs
            | Self::Comparisons
            | Self::Comparison(_)
            | Self::Events
            | Self::Mappings
            | Self::Mapping(_) => return None,
        })
    }
}

/// What a path under `/admin/` stands for. `None`: nothing here. `Err`: not with this method, but with these.
pub fn find(method: &Method, path: &str) -> Option<Result<Verb, &'static str>> {
    let id = |id: &str| id.to_owned();
    let segments: Vec<&str> = path.strip_prefix("/admin/")?.split('/').collect();
    let (verb, reads) = match segments.as_slice() {
        ["wal", "parked"] => (Verb::ParkedEntries, true),
        ["wal", "entries"] => (Verb::Entries, true),
        ["wal", "entries", entry] => (Verb::Entry(id(entry)), true),
        ["wal", "entries", entry, "retry"] => (Verb::RetryEntry(id(entry)), false),
        ["wal", "entries", entry, "skip"] => (Verb::SkipEntry(id(entry)), false),
        ["repairs"] => (Verb::Repairs, true),
        ["repairs", row, "retry"] => (Verb::RetryRepair(id(row)), false),
        ["nodes", name, "accept"] => (Verb::AcceptNode(id(name)), false),
        ["nodes", name, "maint"] => (Verb::TakeOut(id(name)), false),
        ["nodes", name, "ready"] => (Verb::TakeBack(id(name)), false),
        ["verify"] if *method == Method::POST => (Verb::Verify, false),
        ["verify"] => (Verb::Comparisons, true),
        ["verify", report] => (Verb::Comparison(id(report)), true),
        ["resync"] => (Verb::Resync, false),
        ["events"] => (Verb::Events, true),
        ["mappings"] => (Verb::Mappings, true),
        ["mappings", name] => (Verb::Mapping(id(name)), true),
        ["drain", "pause"] => (Verb::PauseDrain(true), false),
        ["drain", "resume"] => (Verb::PauseDrain(false), false),
        _ => return None,
    };
    let fits = if reads {
        super::is_read(method)
    } else {
        *method == Method::POST
    };
    Some(match (fits, reads) {
        (true, _) => Ok(verb),
        (false, true) => Err("GET, HEAD"),
        (false, false) => Err("POST"),
    })
}

/// Carries a verb out on the core's runtime: the journal's connections live there, and whoever asked may hang up. What
/// it does is an event, with who asked for it and what became of it.
pub async fn carry_out(core: &Arc<Core>, verb: Verb, query: Option<&str>, who: &str) -> Answer {
    let (done, outcome) = tokio::sync::oneshot::channel();
    let (job, query, who) = (core.clone(), query.map(str::to_owned), who.to_owned());
    let deed = verb.deed();
    let is_told = matches!(verb, Verb::TakeOut(_) | Verb::TakeBack(_));
    if deed.is_some() {
        tracing::info!(?verb, query, who, "An operator asked for something.");
    }
    core.spawn_job(async move {
        let outcome = dispatch(&job, verb, query.as_deref(), who.clone()).await;
        // That a node was taken out or back is an event already.
        if let Some(mut deed) = deed.filter(|_| outcome.is_err() || !is_told) {
            // As it was asked for, in words that can be read.
            for (key, value) in url::form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
                deed.push_str(&format!(" {key}={value}"));
            }
            match &outcome {
                Ok(_) => deed.push_str(": done"),
                Err(refusal) => deed.push_str(&format!(": refused: {}", refusal.message)),
            }
            job.events().record(Kind::Verb, None, Some(&who), deed);
        }
        let _ = done.send(outcome);
    });
    match outcome.await {
        Ok(Ok(value)) => Answer::json(200, value.to_string()),
        Ok(Err(refusal)) => refusal.into(),
        Err(_) => Answer::error(500, "InternalError", "It was dropped."),
    }
}

fn dispatch(core: &Arc<Core>, verb: Verb, query: Option<&str>, who: String) -> BoxFuture<Outcome> {
    let core = core.clone();
    let query = query.unwrap_or_default().to_owned();
    Box::pin(async move {
        let (core, query) = (&core, Some(query.as_str()));
        match verb {
            Verb::ParkedEntries => parked_entries(core, query).await,
            Verb::Entries => entries(core, query).await,
            Verb::Entry(id) => Ok(shown_whole(core, &row(core, &id).await?)),
            Verb::RetryEntry(id) => retry_entry(core, &id).await,
            Verb::SkipEntry(id) => skip_entry(core, &id, is_set(query, "force")).await,
            Verb::Repairs => repairs(core, query),
            Verb::RetryRepair(id) => retry_repair(core, &id).await,
            Verb::AcceptNode(name) => {
                let node = node_named(core, &name)?;
                let done = core.accept(node).await;
                done.map_err(|why| conflict(format!("{name} is not accepted: {why}.")))?;
                Ok(json!({ "node": name, "state": "accepted" }))
            }
            Verb::TakeOut(name) => take_out(core, &name, query, &who).await,
            Verb::TakeBack(name) => take_back(core, &name, &who).await,
            Verb::Verify => verify(core, query),
            Verb::Comparisons => Ok(json!({ "comparisons": core.repairing.reports() })),
            Verb::Comparison(id) => comparison(core, &id),
            Verb::Resync => resync(core, query).await,
            Verb::Events => events(core, query).await,
            Verb::Mappings => mappings(core, query),
            Verb::Mapping(name) => Ok(mapping(core, &*collection_named(core, query, &decoded(&name))?)),
            Verb::PauseDrain(paused) => {
                core.drain_paused.store(paused, Ordering::SeqCst);
                core.cluster.announce_change();
                Ok(json!({ "drain": if paused { "paused" } else { "running" } }))
            }
        }
    })
}

fn parameter(query: Option<&str>, name: &str) -> Option<String> {
    url::form_urlencoded::parse(query.unwrap_or_default().as_bytes())
        .find(|(key, value)| key == name && !value.is_empty())
        .map(|(_, value)| value.into_owned())
}

fn is_set(query: Option<&str>, name: &str) -> bool {
    parameter(query, name).is_some_and(|value| value != "false" && value != "0")
}

fn refusal(status: u16, error: &'static str, message: impl Into<String>) -> Refusal {
    Refusal {
        status,
        error,
        message: message.into(),
    }
}

fn invalid(message: impl Into<String>) -> Refusal {
    refusal(400, "InvalidArgumentError", message)
}

fn not_found(message: impl Into<String>) -> Refusal {
    refusal(404, "NotFoundError", message)
}

fn conflict(message: impl Into<String>) -> Refusal {
    refusal(409, "ConflictError", message)
}

fn unavailable(message: &'static str) -> Refusal {
    refusal(503, "ServiceUnavailable", message)
}

fn no_log(_: JournalError) -> Refusal {
    unavailable("The log does not answer.")
}

fn part(query: Option<&str>) -> Result<Part, Refusal> {
    let mut part = Part::of(query).map_err(invalid)?;
    if part.limit == usize::MAX {
        part.limit = SHOWN;
    }
    part.limit = part.limit.min(MOST_SHOWN);
    Ok(part)
}

fn parse_id(id: &str) -> Result<Uuid, Refusal> {
    Uuid::parse_str(id).map_err(|_| invalid(format!("`{id}` is not an id")))
}

async fn row(core: &Arc<Core>, id: &str) -> Result<PayloadRow, Refusal> {
    let found = core.log.journal().payload(parse_id(id)?).await.map_err(no_log)?;
    found.ok_or_else(|| not_found(format!("There is no entry {id} in the log (any more).")))
}

/// An entry without its body.
pub fn shown(core: &Core, outline: &Outline) -> Value {
    let Outline { row, bytes } = outline;
    json!({
        "id": row.id,
        "node": row.node,
        "lsn": row.lsn,
        "operation": row.op.label(),
        "scope": scope_word(row.generation),
        "collection": collection(core, row.generation),
        "error": row.parked,
        "parked": row.parked.is_some(),
        "attempts": row.attempts,
        "in_doubt": row.in_doubt,
        "refused_before": row.refused,
        "bytes": bytes,
        "created_at": time(row.created_at),
    })
}

fn scope_word(generation: Option<Generation>) -> &'static str {
    if generation.is_some() {
        "collection"
    } else {
        "namespace"
    }
}

fn shown_whole(core: &Core, row: &PayloadRow) -> Value {
    let mut value = shown(core, &Outline::of(row));
    value["records"] = json!(records_of(row).map(|ids| ids.len()));
    value["truncated"] = json!(row.body.len() > BODY_SHOWN);
    value["body"] = match serde_json::from_slice(&row.body) {
        Ok(body) if row.body.len() <= BODY_SHOWN => body,
        _ => json!(String::from_utf8_lossy(&row.body[..row.body.len().min(BODY_SHOWN)])),
    };
    value
}

async fn parked_entries(core: &Arc<Core>, query: Option<&str>) -> Outcome {
    let part = part(query)?;
    let reach = part.offset.saturating_add(part.limit).min(MOST_READ);
    let rows = core.log.journal().parked(reach).await.map_err(no_log)?;
    let total: u64 = super::state::gather(core).iter().map(|state| state.parked).sum();
    let entries: Vec<Value> = rows.iter().skip(part.offset).map(|row| shown(core, row)).collect();
    Ok(json!({ "entries": entries, "total": total }))
}

/// The lanes that a list of entries is about: nodes, and for each the lanes that have rows.
fn lanes(core: &Core, query: Option<&str>) -> Result<Vec<(NodeIndex, Option<Generation>)>, Refusal> {
    let node = match parameter(query, "node") {
        Some(name) => Some(node_named(core, &name)?),
        None => None,
    };
    let lane = match (parameter(query, "collection"), parameter(query, "scope").as_deref()) {
        (Some(text), _) => Some(Some(collection_named(core, query, &text)?.generation)),
        (None, Some("namespace")) => Some(None),
        (None, None) => None,
        (None, Some(other)) => return Err(invalid(format!("scope: `{other}` is not `namespace`"))),
    };
    let behind = core.behind.lock();
    let wanted = |key: &&(NodeIndex, Option<Generation>)| {
        node.is_none_or(|node| node == key.0) && lane.is_none_or(|lane| lane == key.1)
    };
    Ok(behind.iter().filter(wanted).copied().collect())
}

fn node_named(core: &Core, name: &str) -> Result<NodeIndex, Refusal> {
    core.cluster.index_of(name).ok_or_else(|| {
        let names: Vec<&str> = core.cluster.nodes().iter().map(|node| node.name.as_str()).collect();
        let meant = nearest(name, &names).map_or(String::new(), |meant| format!(" Did you mean {meant}?"));
        not_found(format!(
            "There is no node {name}; there are {}.{meant}",
            names.join(", ")
        ))
    })
}

/// By any of its UUIDs, or by name in `tenant` and `database`.
fn collection_named(core: &Core, query: Option<&str>, text: &str) -> Result<Arc<Collection>, Refusal> {
    let by_id = Uuid::parse_str(text).ok().and_then(|id| core.catalog.by_id(id));
    let tenant = parameter(query, "tenant").unwrap_or_else(|| "default_tenant".to_owned());
    let database = parameter(query, "database").unwrap_or_else(|| "default_database".to_owned());
    by_id
        .or_else(|| core.catalog.by_name(&tenant, &database, text))
        .ok_or_else(|| {
            let living = core.catalog.all();
            let facts: Vec<_> = living
                .iter()
                .filter(|one| !one.is_deleted())
                .map(|one| one.facts())
                .collect();
            let here = facts
                .iter()
                .filter(|facts| facts.tenant == tenant && facts.database == database);
            let names: Vec<&str> = here.map(|facts| facts.name.as_str()).collect();
            let meant = nearest(text, &names).map_or(String::new(), |meant| format!(" Did you mean {meant}?"));
            not_found(format!("There is no collection {text} in {tenant}/{database}.{meant}"))
        })
}

async fn entries(core: &Arc<Core>, query: Option<&str>) -> Outcome {
    let Part { mut offset, limit } = part(query)?;
    let mut found = vec![];
    let mut total = 0;
    for (node, generation) in lanes(core, query)? {
        let name = &core.cluster.node(node).name;
        let Some((scope, _)) = core.find(generation, name) else {
            continue;
        };
        let pending = scope.pairs(core)[node].pending();
        total += pending;
        let pending = usize::try_from(pending).unwrap_or(usize::MAX);
        if offset >= pending || found.len() >= limit {
            offset = offset.saturating_sub(pending);
            continue;
        }
        let reach = offset + (limit - found.len());
        if reach > MOST_READ {
            return Err(invalid(format!(
                "A list reaches {MOST_READ} entries into a lane; narrow it with node, collection or scope."
            )));
        }
        let rows = core.log.journal().outlines(name, generation, offset, reach - offset);
        let rows = rows.await.map_err(no_log)?;
        found.extend(rows.iter().map(|row| shown(core, row)));
        offset = 0;
    }
    Ok(json!({ "entries": found, "total": total }))
}

/// An entry that blocks its lane on its node, with the lane.
struct Blocking {
    row: PayloadRow,
    scope: Scope,
    node: NodeIndex,
}

impl Blocking {
    async fn find(core: &Arc<Core>, id: &str) -> Result<Self, Refusal> {
        let row = row(core, id).await?;
        let (scope, node) = core
            .find(row.generation, &row.node)
            .ok_or_else(|| conflict("Its node is not configured, or its collection is gone."))?;
        Ok(Self { row, scope, node })
    }

    /// Looks again, now that the lane is held.
    async fn check(&self, core: &Arc<Core>) -> Result<(), Refusal> {
        let pair = &self.scope.pairs(core)[self.node];
        if pair.uncertain() > 0 {
            return Err(unavailable("A commit about this lane is not known to be done yet."));
        }
        let row = row(core, &self.row.id.to_string()).await?;
        if row.parked.is_none() && pair.parked() == 0 {
            return Err(conflict("The entry is not parked: the drain sees to it."));
        }
        Ok(())
    }

    /// Commits, and lets memory follow once that is known to be durable.
    async fn commit(
        self,
        core: &Arc<Core>,
        changes: Commit,
        follow: impl FnOnce(&Core, &Self) + Send + 'static,
    ) -> Result<(), Refusal> {
        let durable = core.commit_or_retry(&self.scope, vec![self.node], changes).await;
        let done = move |core: &Core, this: &Self| {
            follow(core, this);
            this.scope.pairs(core)[this.node].remove_parked(1);
            core.behind.lock().insert((this.node, this.scope.generation()));
            core.cluster.announce_change();
        };
        if durable {
            done(core, &self);
            return Ok(());
        }
        let core = core.clone();
        core.env.clone().spawn(Box::pin(async move {
            let mut changes = core.cluster.watch_changes();
            loop {
                changes.mark_unchanged();
                if self.scope.pairs(&core)[self.node].uncertain() == 0 {
                    return done(&core, &self);
                }
                if changes.changed().await.is_err() {
                    return;
                }
            }
        }));
        Err(unavailable(
            "The log does not answer. It is tried until it does; look again then.",
        ))
    }
}

fn no_lane() -> Refusal {
    unavailable("The process is ending.")
}

/// The drain takes the entry up again.
async fn retry_entry(core: &Arc<Core>, id: &str) -> Outcome {
    let entry = Blocking::find(core, id).await?;
    let _alone = core.exclusive_of(&entry.scope).await.ok_or_else(no_lane)?;
    entry.check(core).await?;
    let id = entry.row.id;
    entry.commit(core, vec![Change::Unpark(id)], |_, _| {}).await?;
    Ok(json!({ "id": id, "state": "retried" }))
}

/// Gives the entry up on its node. Its records are made equal by a repair: to another node that has everything, or, by
/// force, on the others to this one.
async fn skip_entry(core: &Arc<Core>, id: &str, force: bool) -> Outcome {
    let entry = Blocking::find(core, id).await?;
    let _alone = core.exclusive_of(&entry.scope).await.ok_or_else(no_lane)?;
    entry.check(core).await?;
    let id = entry.row.id;
    let reason = format!("entry {} was skipped by an operator", entry.row.lsn);
    let wanted = RepairWanted::records(records_of(&entry.row), core.log.next_lsn(), reason);
    let targets: Vec<NodeIndex> = if core.another_has_authority(&entry.scope, entry.node) {
        vec![entry.node]
    } else if force {
        (0..core.cluster.len()).filter(|&other| other != entry.node).collect()
    } else {
        return Err(conflict(format!(
            "No other node has everything, so what this entry wrote would be lost. With force, {} goes without it, and \
             its records are made equal to that on the other nodes.",
            entry.row.node
        )));
    };
    let source = (!targets.contains(&entry.node)).then_some(entry.node);
    let repairs: Vec<_> = targets
        .iter()
        .map(|&target| {
            let wanted = RepairWanted {
                source,
                ..wanted.clone()
            };
            core.repair_row(&entry.scope, target, wanted)
        })
        .collect();
    let mut changes = vec![Change::RemovePayloads(vec![id])];
    changes.extend(repairs);
    let follow = |core: &Core, this: &Blocking| {
        this.scope.pairs(core)[this.node].remove_pending(1, this.row.body.len() as u64, None);
    };
    let repaired: Vec<&str> = targets
        .iter()
        .map(|&node| core.cluster.node(node).name.as_str())
        .collect();
    entry.commit(core, changes, follow).await?;
    Ok(json!({ "id": id, "state": "skipped", "repair_of": repaired }))
}

fn repairs(core: &Arc<Core>, query: Option<&str>) -> Outcome {
    let part = part(query)?;
    let parked_only = is_set(query, "parked");
    let mut rows = core.repairs.lock().clone();
    rows.retain(|row| !parked_only || row.parked.is_some());
    let shown: Vec<Value> = (rows.iter().skip(part.offset).take(part.limit))
        .map(|row| super::status::repair(core, row))
        .collect();
    Ok(json!({ "repairs": shown, "total": rows.len() }))
}

/// The repair is tried again.
async fn retry_repair(core: &Arc<Core>, id: &str) -> Outcome {
    let id = parse_id(id)?;
    let found = core.repairs.lock().iter().find(|row| row.id == id).cloned();
    let row = found.ok_or_else(|| not_found(format!("There is no repair {id} (any more).")))?;
    if row.parked.is_none() {
        return Ok(json!({ "id": id, "state": "open" }));
    }
    if jobs::retry(core, id).await {
        Ok(json!({ "id": id, "state": "retried" }))
    } else {
        Err(unavailable(
            "The log does not answer. It is tried until it does; look again then.",
        ))
    }
}

fn number(query: Option<&str>, name: &str) -> Result<Option<u32>, Refusal> {
    let Some(text) = parameter(query, name) else {
        return Ok(None);
    };
    let parsed = text.parse();
    parsed
        .map(Some)
        .map_err(|_| invalid(format!("{name}: `{text}` is not a whole number")))
}

/// At most so long a request waits for other nodes to be in step; who wants to wait longer asks again.
const MOST_PATIENCE: u32 = 60;

async fn take_out(core: &Arc<Core>, name: &str, query: Option<&str>, who: &str) -> Outcome {
    let node = node_named(core, name)?;
    let patience = number(query, "wait")?.unwrap_or(0).min(MOST_PATIENCE);
    let left = core.take_out(node, who, Duration::from_secs(patience.into())).await;
    let left = left.map_err(|why| stays_in(name, why))?;
    Ok(json!({ "node": name, "state": "maintenance", "in_flight": left }))
}

async fn take_back(core: &Arc<Core>, name: &str, who: &str) -> Outcome {
    let node = node_named(core, name)?;
    let was_out = core.take_back(node, who).await;
    let was_out = was_out.map_err(|why| stays_in(name, why))?;
    Ok(json!({ "node": name, "state": "ready", "was_in_maintenance": was_out }))
}

fn stays_in(name: &str, why: StaysIn) -> Refusal {
    match why {
        StaysIn::Needed(reason) => conflict(format!("{name} stays in service: {reason}.")),
        StaysIn::NoLog => unavailable("The log does not answer."),
    }
}

/// Starts to compare one collection, or all.
fn verify(core: &Arc<Core>, query: Option<&str>) -> Outcome {
    let one = match parameter(query, "collection") {
        Some(text) => Some(collection_named(core, query, &text)?),
        None => None,
    };
    let sample = match number(query, "sample")? {
        None | Some(100) => Sample::All,
        Some(percent @ 1..100) => Sample::Percent(percent),
        Some(_) => return Err(invalid("sample: a share in percent, 1 to 100")),
    };
    let options = Options {
        sample,
        repair: is_set(query, "repair"),
        rate: number(query, "rate")?.filter(|&rate| rate > 0),
    };
    Ok(json!({ "id": jobs::verify(core, one, options) }))
}

fn comparison(core: &Core, id: &str) -> Outcome {
    let found = core.repairing.report(parse_id(id)?);
    let report = found.ok_or_else(|| not_found(format!("There is no comparison {id} (any more).")))?;
    Ok(json!(report))
}

/// A segment of a path, as the command line writes it.
fn decoded(segment: &str) -> String {
    let spaced = segment.replace('+', " ");
    percent_encoding::percent_decode_str(&spaced)
        .decode_utf8_lossy()
        .into_owned()
}

/// Which UUID each collection has on each node, newest first.
fn mappings(core: &Arc<Core>, query: Option<&str>) -> Outcome {
    let part = part(query)?;
    let mut living = core.catalog.all();
    living.retain(|collection| !collection.is_deleted());
    let shown: Vec<Value> = (living.iter().rev().skip(part.offset).take(part.limit))
        .map(|collection| mapping(core, collection))
        .collect();
    Ok(json!({ "mappings": shown, "total": living.len() }))
}

fn mapping(core: &Core, collection: &Collection) -> Value {
    let facts = collection.facts();
    let nodes: Vec<Value> = (core.cluster.nodes().iter())
        .map(|node| {
            let pair = &collection.pairs[node.index];
            json!({
                "name": node.name,
                "id": collection.node_id(node.index),
                "in_sync": collection.in_sync(node.index),
                "pending_writes": pair.pending(),
                "repairs": pair.repairs(),
            })
        })
        .collect();
    let complete = facts.node_ids.iter().all(Option::is_some);
    json!({
        "name": facts.name,
        "tenant": facts.tenant,
        "database": facts.database,
        "id": collection.client_id,
        "status": if complete { "complete" } else { "partial" },
        "created_at": time(collection.created_at),
        "updated_at": time(facts.updated_at),
        "nodes": nodes,
    })
}

/// Events, newest first: `before` an id, of one `node`, of one `kind`.
async fn events(core: &Arc<Core>, query: Option<&str>) -> Outcome {
    let before = match parameter(query, "before") {
        None => i64::MAX,
        Some(text) => (text.parse()).map_err(|_| invalid(format!("before: `{text}` is not the id of an event")))?,
    };
    let limit = part(query)?.limit;
    let node = match parameter(query, "node") {
        Some(name) => Some(core.cluster.node(node_named(core, &name)?).name.clone()),
        None => None,
    };
    let kind = parameter(query, "kind");
    if let Some(kind) = &kind
        && !Kind::ALL.iter().any(|known| known.label() == kind)
    {
        let known: Vec<&str> = Kind::ALL.iter().map(|kind| kind.label()).collect();
        let meant = nearest(kind, &known).map_or(String::new(), |meant| format!(". Did you mean {meant}?"));
        let known = known.join(", ");
        return Err(invalid(format!("kind: `{kind}` is none of {known}{meant}")));
    }
    let reach = if node.is_some() || kind.is_some() { KEPT } else { limit };
    let found = core.log.journal().events(before, reach).await.map_err(no_log)?;
    let wanted = found
        .iter()
        .filter(|event| node.is_none() || event.node == node)
        .filter(|event| kind.as_ref().is_none_or(|kind| event.kind == *kind));
    let shown: Vec<Value> = wanted.take(limit).map(super::events::shown).collect();
    Ok(json!({ "events": shown, "dropped": core.events().dropped() }))
}

/// Has one collection on a node copied from another.
async fn resync(core: &Arc<Core>, query: Option<&str>) -> Outcome {
    let needed = |name: &str| parameter(query, name).ok_or_else(|| invalid(format!("{name}: it has to be named")));
    let collection = collection_named(core, query, &needed("collection")?)?;
    let node = needed("node")?;
    let index = node_named(core, &node)?;
    let from = match parameter(query, "from") {
        Some(name) => Some(node_named(core, &name)?),
        None => None,
    };
    jobs::resync(core, &collection, index, from).await.map_err(conflict)?;
    Ok(json!({ "collection": collection.facts().name, "node": node, "state": "begun" }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_and_a_method_make_a_verb() {
        let of = |method: Method, path: &str| find(&method, path);
        assert_eq!(of(Method::GET, "/admin/wal/parked"), Some(Ok(Verb::ParkedEntries)));
        assert_eq!(of(Method::HEAD, "/admin/wal/entries"), Some(Ok(Verb::Entries)));
        assert_eq!(
            of(Method::POST, "/admin/wal/entries/7/skip"),
            Some(Ok(Verb::SkipEntry("7".to_owned())))
        );
        assert_eq!(of(Method::POST, "/admin/drain/pause"), Some(Ok(Verb::PauseDrain(true))));
        assert_eq!(of(Method::GET, "/admin/drain/pause"), Some(Err("POST")));
        assert_eq!(of(Method::POST, "/admin/verify"), Some(Ok(Verb::Verify)));
        assert_eq!(of(Method::GET, "/admin/verify"), Some(Ok(Verb::Comparisons)));
        assert_eq!(of(Method::GET, "/admin/resync"), Some(Err("POST")));
        assert_eq!(of(Method::POST, "/admin/repairs"), Some(Err("GET, HEAD")));
        for path in [
            "/admin/",
            "/admin/wal_count",
            "/admin/wal/entries/7/keep",
            "/status",
            "/admin/drain",
        ] {
            assert_eq!(of(Method::POST, path), None, "{path}");
        }
    }

    #[test]
    fn a_parameter_without_a_value_is_none() {
        assert_eq!(parameter(Some("node=&collection=a%20b"), "node"), None);
        assert_eq!(
            parameter(Some("node=&collection=a%20b"), "collection"),
            Some("a b".to_owned())
        );
        assert!(is_set(Some("force=true"), "force") && is_set(Some("force=1"), "force"));
        assert!(!is_set(Some("force=false"), "force") && !is_set(None, "force"));
    }
}
