//! Comparing two nodes' copies of a collection. Nothing is overwritten here.
//!
//! The first pass goes chunk by chunk without the lane, so what is written meanwhile can look different; what differed
//! is compared once more in the lane, where nothing moves. Records are compared in pairs and not by sums: in cosine
//! spaces equal means nearly equal.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::compare::{Space, mend_metadata};
use super::read::{self, Object};
use super::records::Job;
use super::whole::next_chunk;
use super::{Claim, LEFT_TO_DRAIN, Trouble};
use crate::journal::{Change, Commit, RepairRow};

const FIRST_CHUNK: usize = 100;
/// Records that are compared in the lane at a time; it is given back in between.
pub(super) const IN_LANE: usize = 250;
/// How often, a second apart, the drain is waited for before the lane is taken.
const DRAIN_PATIENCE: usize = 60;
const PAUSE: Duration = Duration::from_secs(1);

/// What a comparison found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Compared {
    pub records: usize,
    /// Records that seemed to differ.
    pub suspects: BTreeSet<String>,
}

/// How a comparison goes about it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Pass {
    pub sample: Sample,
    /// Records per second, if fewer than all repairs together may read.
    pub rate: Option<u32>,
}

/// Which records are compared; all ids are, whatever this says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sample {
    #[default]
    All,
    /// About so many, spread evenly.
    Records(usize),
    Percent(u32),
}

impl Sample {
    /// Every so-manyth of `all` records.
    fn step(self, all: usize) -> usize {
        let wanted = match self {
            Self::All => return 1,
            Self::Records(wanted) => wanted,
            Self::Percent(percent) => (all as u64 * u64::from(percent) / 100) as usize,
        };
        all.div_ceil(wanted.max(1)).max(1)
    }
}

/// `absent`: so many records of the source the target cannot have.
pub(super) async fn same_count(job: &Job, absent: usize) -> Result<(), Trouble> {
    let source = read::count(&job.core, &job.collection, job.from()?).await?;
    let target = read::count(&job.core, &job.collection, job.to()?).await?;
    match source == target + absent as u64 {
        true => Ok(()),
        false => Err(Trouble::Target(format!("it has {target} records, the source {source}"))),
    }
}

/// Compares everything without the lane.
pub(super) async fn pass(
    job: &Job,
    pass: Pass,
    space: Space,
    mut progress: impl FnMut(usize, usize),
) -> Result<Compared, Trouble> {
    let core = &job.core;
    let source = read::ids(core, &job.collection, job.from()?).await?;
    let target = read::ids(core, &job.collection, job.to()?).await?;
    let (mut a, b): (BTreeSet<&str>, BTreeSet<&str>) = (
        source.iter().map(String::as_str).collect(),
        target.iter().map(String::as_str).collect(),
    );
    let mut compared = Compared {
        records: 0,
        suspects: a.symmetric_difference(&b).map(|id| (*id).to_owned()).collect(),
    };
    a.retain(|id| b.contains(id));
    let mut both: Vec<String> = source.iter().filter(|id| a.contains(id.as_str())).cloned().collect();
    let (step, length) = (pass.sample.step(both.len()), both.len());
    if step > 1 {
        let first = usize::try_from(core.env.random() % step as u64).unwrap_or_default();
        both = (first..length).step_by(step).map(|at| both[at].clone()).collect();
    }
    let (mut at, mut size) = (0, FIRST_CHUNK);
    let most = core.settings.repair_records;
    while at < both.len() {
        let part = &both[at..both.len().min(at + size)];
        let found = job.differing(part, space).await?;
        compared.suspects.extend(found.differing);
        at += part.len();
        compared.records = at;
        size = next_chunk(part.len(), found.bytes, most);
        progress(at, both.len());
        core.repairing.pace(core, part.len()).await;
        if let Some(rate) = pass.rate {
            let pause = part.len() as f64 / f64::from(rate.max(1));
            core.env.sleep(Duration::from_secs_f64(pause)).await;
        }
        if super::is_paused(core) || job.collection.is_deleted() {
            return Err(Trouble::Wait("interrupted".to_owned()));
        }
    }
    Ok(compared)
}

/// What differs about the collection itself.
pub(super) fn differing_object(source: &Object, target: &Object) -> Option<String> {
    let mut parts: BTreeMap<&str, bool> = BTreeMap::new();
    parts.insert("name", source.name != target.name);
    parts.insert("metadata", mend_metadata(&source.metadata, &target.metadata).is_some());
    parts.insert("configuration", source.configuration != target.configuration);
    parts.insert("dimension", source.dimension != target.dimension);
    let differing: Vec<&str> = parts
        .into_iter()
        .filter_map(|(part, differs)| differs.then_some(part))
        .collect();
    (!differing.is_empty()).then(|| differing.join(", "))
}

/// Carries out rows that say that two nodes' copies were never compared: equal, and the node joins; different, and a
/// person decides which of them counts.
pub(super) async fn run(job: &Job, rows: &[RepairRow], claim: &mut Option<Claim>) -> Result<(), Trouble> {
    let core = &job.core;
    if super::still_open(core, rows).is_empty() {
        return Ok(());
    }
    let (source, _) = job.objects().await?;
    let generation = job.collection.generation;
    core.repairing.begin(job.target, Some(generation), 0, core.env.wall());
    // The node is drained meanwhile.
    drop(claim.take());
    let compared = pass(job, Pass::default(), source.space(), |done, total| {
        core.repairing
            .begin(job.target, Some(generation), total, core.env.wall());
        core.repairing.progress(job.target, Some(generation), done);
    })
    .await?;
    for _ in 0..DRAIN_PATIENCE {
        let left = job.collection.pairs[job.target].pending();
        if left <= LEFT_TO_DRAIN {
            *claim = core.repairing.claim(core, job.target, Some(generation));
        }
        if claim.is_some() {
            break;
        }
        core.env.sleep(PAUSE).await;
    }
    if claim.is_none() {
        return Err(Trouble::Wait("what the node missed is not drained".to_owned()));
    }
    let suspects: Vec<String> = compared.suspects.into_iter().collect();
    let disturbed = job.collection.pairs[job.source].disturbances();
    let mut parts: Vec<&[String]> = suspects.chunks(IN_LANE).collect();
    if parts.is_empty() {
        parts.push(&[]);
    }
    // What is written between two turns the node gets by its log: what was found equal stays so.
    for (turn, part) in (1..).zip(&parts) {
        let _alone = job.turn().await?;
        if job.collection.pairs[job.source].disturbances() != disturbed {
            return Err(Trouble::Wait("the source needed a repair itself".to_owned()));
        }
        let open = super::still_open(core, rows);
        if open.is_empty() {
            return Ok(());
        }
        let differing = job.differing(part, source.space()).await?.differing;
        let is_last = turn == parts.len();
        if !is_last && differing.is_empty() {
            continue;
        }
        let mut reasons = vec![];
        if let Some(id) = differing.first() {
            // One is enough to know; the others a comparison names.
            let at_least = if is_last { "" } else { "at least " };
            reasons.push(format!("{at_least}{} records differ, {id:?} for one", differing.len()));
        } else {
            same_count(job, 0).await?;
        }
        let (source, target) = job.objects().await?;
        reasons.extend(differing_object(&source, &target).map(|parts| format!("the collections differ in {parts}")));
        give_verdict(job, &open, &reasons).await;
        return Ok(());
    }
    Ok(())
}

/// The node joins, or a person decides. The caller holds the lane.
async fn give_verdict(job: &Job, open: &[RepairRow], reasons: &[String]) {
    let core = &job.core;
    let generation = job.collection.generation;
    let changes: Commit = match reasons.is_empty() {
        true => vec![Change::RemoveRepairs(open.iter().map(|row| row.id).collect())],
        false => {
            let nodes = [job.source, job.target].map(|node| core.cluster.node(node).name.as_str());
            let reason = format!(
                "{}; nothing was overwritten: `diptych resync --from {}` or `--from {}` decides",
                reasons.join("; "),
                nodes[0],
                nodes[1]
            );
            tracing::error!(node = nodes[1], generation, reason, "The nodes differ.");
            open.iter()
                .map(|row| Change::ParkRepair {
                    id: row.id,
                    reason: reason.clone(),
                })
                .collect()
        }
    };
    let equal = reasons.is_empty();
    if core.commit_or_retry(&job.scope(), vec![job.target], changes).await && equal {
        core.repairing.set_verified(generation, core.env.wall());
        tracing::info!(generation, "The nodes hold the same.");
    }
}
