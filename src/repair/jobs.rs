//! What an operator starts: comparing collections, and copying one from the node that counts.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::compare::Space;
use super::records::{Job, MOST_IN_LANE};
pub use super::verify::Sample;
use super::verify::{IN_LANE, Pass, differing_object, pass};
use super::{Trouble, is_paused};
use crate::catalog::Collection;
use crate::cluster::NodeIndex;
use crate::events::Kind;
use crate::journal::{Change, Commit, RepairKind, RepairRow};
use crate::mirror::{Core, RepairWanted, Scope};

/// Why a copy that an operator asked for is made.
pub(crate) const ASKED: &str = "an operator asked for it";

/// Ids that a report names.
const NAMED: usize = 1000;
/// Records that one repair row names.
const IN_ROW: usize = 5000;
/// The continuous comparison looks so often whether a collection is due.
const LOOK: Duration = Duration::from_secs(10);
/// Its speed, in records per second.
const QUIET_RATE: u32 = 2000;

/// How to compare.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    pub sample: Sample,
    /// Make what differs equal to the first node in step.
    pub repair: bool,
    /// Records per second, if fewer than all repairs together may read.
    pub rate: Option<u32>,
}

/// What a comparison of one collection on one node gave.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    pub tenant: String,
    pub database: String,
    pub name: String,
    pub collection_id: Uuid,
    /// The node whose copy counts, and the one that was compared with it.
    pub source: String,
    pub node: String,
    pub records: usize,
    pub differing: usize,
    /// The first of them.
    pub ids: Vec<String>,
    /// What differs about the collection itself.
    pub properties: Option<String>,
    /// Why it was not compared.
    pub skipped: Option<String>,
    /// Repairs of what differs were begun.
    pub repairing: bool,
}

/// The collection that is being compared.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Current {
    pub name: String,
    /// Compared so far, of those to compare.
    pub records: usize,
    pub records_total: usize,
}

/// A comparison, while it goes on and after.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    pub id: Uuid,
    pub started_at: DateTime<Utc>,
    pub finished_at: Option<DateTime<Utc>>,
    pub collections: usize,
    pub collections_done: usize,
    pub records: usize,
    pub differing: usize,
    /// `None` between two collections and at the end.
    pub current: Option<Current>,
    pub findings: Vec<Finding>,
}

/// Compares one collection, or all, in the background; the id of its report.
pub fn verify(core: &Arc<Core>, one: Option<Arc<Collection>>, options: Options) -> Uuid {
    let collections = match one {
        Some(collection) => vec![collection],
        None => living(core),
    };
    let mut report = Report {
        id: core.env.new_id(),
        started_at: core.env.wall(),
        finished_at: None,
        collections: collections.len(),
        collections_done: 0,
        records: 0,
        differing: 0,
        current: None,
        findings: vec![],
    };
    let id = report.id;
    core.repairing.put_report(report.clone());
    let its_core = core.clone();
    core.env.spawn(Box::pin(async move {
        for collection in collections {
            let so_far = report.clone();
            let name = collection.facts().name.clone();
            let tell = |before: usize, records: usize, records_total: usize| {
                let name = name.clone();
                its_core.repairing.put_report(Report {
                    records: so_far.records + before + records,
                    current: Some(Current {
                        name,
                        records,
                        records_total,
                    }),
                    ..so_far.clone()
                });
            };
            for finding in compare(&its_core, &collection, options, &tell).await {
                report.records += finding.records;
                report.differing += finding.differing;
                report.findings.push(finding);
            }
            report.collections_done += 1;
            its_core.repairing.put_report(report.clone());
        }
        report.finished_at = Some(its_core.env.wall());
        let what = format!(
            "{} collections, {} records compared: {} differ",
            report.collections, report.records, report.differing
        );
        its_core.events().record(Kind::Verified, None, None, what);
        its_core.repairing.put_report(report);
    }));
    id
}

fn living(core: &Core) -> Vec<Arc<Collection>> {
    let mut all = core.catalog.all();
    all.retain(|collection| !collection.is_deleted());
    all
}

/// Hears how many records of a collection are compared so far: on nodes before this one, on this one, and of how many.
type Tell<'a> = &'a (dyn Fn(usize, usize, usize) + Send + Sync);

/// Compares every node that is in step with a collection with the first of them.
async fn compare(core: &Arc<Core>, collection: &Arc<Collection>, options: Options, tell: Tell<'_>) -> Vec<Finding> {
    let facts = collection.facts();
    let usable = core.usable(collection);
    let mut findings = vec![];
    let mut all_equal = !usable.is_empty();
    for target in 0..core.cluster.len() {
        let Some(&source) = usable.first() else {
            break;
        };
        if source == target {
            continue;
        }
        let mut finding = Finding {
            tenant: facts.tenant.clone(),
            database: facts.database.clone(),
            name: facts.name.clone(),
            collection_id: collection.client_id,
            source: core.cluster.node(source).name.clone(),
            node: core.cluster.node(target).name.clone(),
            records: 0,
            differing: 0,
            ids: vec![],
            properties: None,
            skipped: None,
            repairing: false,
        };
        let job = Job {
            core: core.clone(),
            collection: collection.clone(),
            source,
            target,
        };
        let outcome = match usable.contains(&target) {
            true => {
                let before: usize = findings.iter().map(|one: &Finding| one.records).sum();
                compare_pair(&job, options, &mut finding, &|done, total| tell(before, done, total)).await
            }
            false => Err(Trouble::Wait("the node is not in step".to_owned())),
        };
        if let Err(trouble) = outcome {
            finding.skipped = Some(trouble.to_string());
        }
        all_equal &= finding.skipped.is_none() && finding.differing == 0 && finding.properties.is_none();
        if finding.differing > 0 || finding.properties.is_some() {
            tracing::error!(
                node = finding.node,
                collection = finding.name,
                records = finding.differing,
                properties = finding.properties,
                "The nodes differ."
            );
        }
        findings.push(finding);
    }
    if all_equal {
        core.repairing.set_verified(collection.generation, core.env.wall());
    }
    findings
}

async fn compare_pair(
    job: &Job,
    options: Options,
    finding: &mut Finding,
    tell: &(dyn Fn(usize, usize) + Send + Sync),
) -> Result<(), Trouble> {
    let (source, _) = job.objects().await?;
    let space = source.space();
    let settings = Pass {
        sample: options.sample,
        rate: options.rate,
    };
    let compared = pass(job, settings, space, tell).await?;
    finding.records = compared.records;
    let suspects: Vec<String> = compared.suspects.into_iter().collect();
    let mut found = BTreeSet::new();
    let outcome = judge(job, &suspects, space, &mut found, finding).await;
    finding.ids = found.iter().take(NAMED).cloned().collect();
    if options.repair && (finding.differing > 0 || finding.properties.is_some()) {
        finding.repairing = mend(job, &found, finding).await;
    }
    outcome
}

/// Compares what seemed to differ once more, in the lane, where nothing moves. What differs is counted in `finding`, and
/// named in `found` as long as records are repaired one by one.
async fn judge(
    job: &Job,
    suspects: &[String],
    space: Space,
    found: &mut BTreeSet<String>,
    finding: &mut Finding,
) -> Result<(), Trouble> {
    // Without suspects the collection itself is compared all the same.
    let mut parts: Vec<&[String]> = suspects.chunks(IN_LANE).collect();
    if parts.is_empty() {
        parts.push(&[]);
    }
    for part in parts {
        let _alone = job.core.exclusive(&job.collection).await;
        job.check()?;
        if !job.collection.in_sync(job.target) {
            return Err(Trouble::Wait("the node is not in step".to_owned()));
        }
        job.flush().await?;
        let differing = job.differing(part, space).await?.differing;
        let (source, target) = job.objects().await?;
        finding.properties = differing_object(&source, &target);
        finding.differing += differing.len();
        if found.len() <= MOST_IN_LANE {
            found.extend(differing);
        }
    }
    Ok(())
}

/// Has exactly these records repaired, and the collection itself; all of it, if they are too many.
async fn mend(job: &Job, ids: &BTreeSet<String>, finding: &Finding) -> bool {
    let core = &job.core;
    let scope = job.scope();
    let _alone = core.exclusive(&job.collection).await;
    if job.collection.is_deleted() || !core.another_has_authority(&scope, job.target) {
        return false;
    }
    let ids: Vec<&String> = ids.iter().collect();
    let mut parts: Vec<Option<Vec<String>>> = match finding.differing > MOST_IN_LANE {
        true => vec![None],
        false => ids
            .chunks(IN_ROW)
            .map(|part| Some(part.iter().copied().cloned().collect()))
            .collect(),
    };
    if finding.properties.is_some() {
        // No ids at all: name, metadata and configuration.
        parts.push(Some(vec![]));
    }
    let row = |ids| {
        let wanted = RepairWanted {
            source: Some(job.source),
            ..RepairWanted::records(ids, core.log.next_lsn(), "a comparison found that the nodes differ")
        };
        core.repair_row(&scope, job.target, wanted)
    };
    let changes = parts.into_iter().map(row).collect();
    core.commit_or_retry(&scope, vec![job.target], changes).await
}

/// Has all of a collection on `node` made equal to `from`, or to whoever has it.
///
/// # Errors
/// Why that cannot be: a copy from a node that does not hold everything would lose what only others hold (R2).
pub async fn resync(
    core: &Arc<Core>,
    collection: &Arc<Collection>,
    node: NodeIndex,
    from: Option<NodeIndex>,
) -> Result<(), String> {
    let scope = Scope::Collection(collection.clone());
    let _alone = core.exclusive(collection).await;
    if collection.is_deleted() {
        return Err("The collection was deleted.".to_owned());
    }
    if from == Some(node) {
        return Err("A node cannot be copied from itself.".to_owned());
    }
    if is_paused(core) {
        return Err("The drain is paused, or the log does not answer.".to_owned());
    }
    let rows = |node: NodeIndex| -> Vec<RepairRow> {
        let name = &core.cluster.node(node).name;
        let open = core.repairs.lock();
        open.iter()
            .filter(|row| row.generation == Some(collection.generation) && row.node == *name)
            .cloned()
            .collect()
    };
    let mut changes: Commit = vec![];
    match from {
        Some(from) if collection.node_id(from).is_none() => {
            return Err("That node does not have the collection.".to_owned());
        }
        Some(from) if !core.cluster.node(from).is_up() => {
            return Err("That node is away.".to_owned());
        }
        Some(from) if collection.pairs[from].parked() > 0 => {
            return Err("Entries are parked for that node: it does not hold everything.".to_owned());
        }
        Some(from) => {
            // Two copies that were never found equal: an operator says which one counts, and takes the loss of the other.
            let declared = rows(from);
            if declared.iter().any(|row| row.kind != RepairKind::Verify) {
                return Err("That node is to be repaired itself: it does not hold everything.".to_owned());
            }
            if !declared.is_empty() {
                changes.push(Change::RemoveRepairs(declared.iter().map(|row| row.id).collect()));
            }
        }
        None if !core.another_has_authority(&scope, node) => {
            return Err("No other node holds everything.".to_owned());
        }
        // What serves now would be out until another one can give it, and lost if that one comes back without it (R2).
        None if !core.usable(collection).iter().any(|&other| other != node) => {
            return Err("No other node can serve it now.".to_owned());
        }
        None => {}
    }
    let replaced = rows(node);
    if !replaced.is_empty() {
        changes.push(Change::RemoveRepairs(replaced.iter().map(|row| row.id).collect()));
    }
    let wanted = RepairWanted {
        source: from,
        ..RepairWanted::whole(core.log.next_lsn(), ASKED)
    };
    let mut affected = vec![node];
    affected.extend(from);
    changes.push(core.repair_row(&scope, node, wanted));
    match core.commit_or_retry(&scope, affected, changes).await {
        true => Ok(()),
        false => Err("The log does not answer; it is tried again.".to_owned()),
    }
}

/// Takes a node out of a lane until it is repaired. True: that is durable.
pub async fn want(core: &Arc<Core>, scope: &Scope, node: NodeIndex, wanted: RepairWanted) -> bool {
    let row = core.repair_row(scope, node, wanted);
    core.commit_or_retry(scope, vec![node], vec![row]).await
}

/// Takes a parked repair up again. True: there was one, and that is durable.
pub async fn retry(core: &Arc<Core>, id: Uuid) -> bool {
    let found = core.repairs.lock().iter().find(|row| row.id == id).cloned();
    let Some(row) = found.filter(|row| row.parked.is_some()) else {
        return false;
    };
    let Some((scope, _)) = core.find(row.generation, &row.node) else {
        return false;
    };
    core.commit_or_retry(&scope, vec![], vec![Change::UnparkRepair(id)])
        .await
}

/// Compares every collection now and then, quietly, one at a time; for as long as the process lives.
pub async fn keep_verifying(core: Arc<Core>) {
    let interval = core.settings.verify_interval;
    if interval.is_zero() {
        return;
    }
    let mut last: std::collections::BTreeMap<i64, Duration> = std::collections::BTreeMap::new();
    let started = core.env.now();
    let options = Options {
        sample: Sample::Percent(core.settings.verify_sample),
        rate: Some(QUIET_RATE),
        repair: false,
    };
    loop {
        core.env.sleep(LOOK.min(interval)).await;
        if is_paused(&core) {
            continue;
        }
        let now = core.env.now();
        let living = living(&core);
        last.retain(|generation, _| living.iter().any(|collection| collection.generation == *generation));
        let due = living
            .into_iter()
            .find(|collection| now.saturating_sub(*last.get(&collection.generation).unwrap_or(&started)) >= interval);
        if let Some(collection) = due {
            last.insert(collection.generation, now);
            compare(&core, &collection, options, &|_, _, _| {}).await;
        }
    }
}
