//! Copying a whole collection to a node, while it is written to.
//!
//! The target's payload rows wait meanwhile; what they are about is remembered as *touched*. The ids of the source are
//! listed in the lane, the records compared and copied without it, in the source's order, and the touched ones once
//! more at the end, in the lane again. Then one commit removes the repair rows found at the beginning and every payload
//! row that exists (schedules S30, S33): the node joins.
//!
//! Where more is written than can be followed, the copy begins anew and holds the lane for each of its steps: writers have
//! their turns between them, and it comes to an end.

use std::collections::BTreeSet;
use std::time::Duration;

use super::compare;
use super::read::{self, Object};
use super::records::{Job, MOST_IN_LANE};
use super::{Trouble, props, verify};
use crate::fault;
use crate::journal::{Change, RepairKind, RepairRow};
use crate::lane::Touched;

/// One answer is to be about this big.
const CHUNK_BYTES: usize = 4 << 20;
const FIRST_CHUNK: usize = 100;
/// The touched records are copied without the lane as long as there are more.
const LAST_ROUND: usize = 500;
/// After so many rounds over touched records the writers are faster than we, and the lane is taken.
const ROUNDS: usize = 10;
/// How often, a second apart, a source that is out of step for a moment is waited for before the end.
const SOURCE_PATIENCE: usize = 60;
const PAUSE: Duration = Duration::from_secs(1);
/// How long writers are held back for one of our writes to a node that does not answer.
const HELD_PATIENCE: Duration = Duration::from_secs(60);

/// Forgets what was touched when the copy ends, however it ends.
struct Tracking<'a>(&'a Job);

impl Drop for Tracking<'_> {
    fn drop(&mut self) {
        self.0.collection.pairs[self.0.target].stop_tracking();
    }
}

/// How many records to ask for next, so that answers stay small.
pub(super) fn next_chunk(records: usize, bytes: usize, most: usize) -> usize {
    let fitting = match bytes.checked_div(records.max(1)) {
        None | Some(0) => most,
        Some(each) => CHUNK_BYTES / each,
    };
    fitting
        .clamp(1, records.saturating_mul(2).max(FIRST_CHUNK))
        .min(most.max(1))
}

/// How fast writers may be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Writers {
    Free,
    /// They have their turns between two steps of the copy.
    HeldBack,
}

/// Carries out rows of the kinds `Whole` and `Rebuild`, and with them whatever else is open for the node.
pub(super) async fn run(job: &Job, rows: &[RepairRow]) -> Result<(), Trouble> {
    match attempt(job, rows, Writers::Free).await {
        Err(Trouble::Overtaken) => {
            tracing::warn!(
                node = job.core.cluster.node(job.target).name,
                generation = job.collection.generation,
                "A copy was overtaken by writers: it holds them back."
            );
            let (node, key) = (job.target, Some(job.collection.generation));
            let why = "more was written meanwhile than could be followed: writers are held back";
            job.core.repairing.note(node, key, RepairKind::Whole, why);
            attempt(job, rows, Writers::HeldBack).await
        }
        outcome => outcome,
    }
}

async fn attempt(job: &Job, rows: &[RepairRow], writers: Writers) -> Result<(), Trouble> {
    let core = &job.core;
    let pair = &job.collection.pairs[job.target];
    let key = (job.target, job.collection.generation);
    let rebuild = rows.iter().any(|row| row.kind == RepairKind::Rebuild) && !core.repairing.is_rebuilt(key);
    if rebuild {
        // Nothing is deleted before the source has shown that it can give everything (R2).
        read_through(job, Strict::No).await?;
    }
    {
        let _names = core.exclusive_namespace().await;
        let _alone = core.exclusive(&job.collection).await;
        job.check()?;
        still_wanted(job, rows)?;
        if !core.namespace.pairs[job.target].in_sync() {
            return Err(Trouble::Wait("the node is not in step with the namespace".to_owned()));
        }
        if !core.catalog_can_change() {
            // It may have been deleted: what is made now would be left.
            return Err(Trouble::Wait(
                "the log does not say yet what the catalog holds".to_owned(),
            ));
        }
        props::ensure(job, rebuild).await?;
        if rebuild {
            core.repairing.set_rebuilt(key);
        }
    }
    let (open, source, ids, _tracking, disturbed) = {
        let _alone = core.exclusive(&job.collection).await;
        job.check()?;
        let open = super::still_open(core, rows);
        job.fence().await?;
        job.flush().await?;
        let (source, _) = job.objects().await?;
        pair.start_tracking(core.settings.repair_touched);
        let tracking = Tracking(job);
        let disturbed = job.collection.pairs[job.source].disturbances();
        let ids = read::ids(core, &job.collection, job.from()?).await?;
        (open, source, ids, tracking, disturbed)
    };
    let undisturbed = || match job.collection.pairs[job.source].disturbances() == disturbed {
        true => Ok(()),
        false => Err(Trouble::Wait("the source needs a repair itself".to_owned())),
    };
    let unreadable = copy(job, &source, &ids, writers, &undisturbed).await?;
    drop(ids);
    finish(job, &source, &open, unreadable, writers, &undisturbed).await
}

/// Somebody may have dropped or replaced the rows: then nothing is overwritten for them, and no backlog is dropped.
fn still_wanted(job: &Job, rows: &[RepairRow]) -> Result<(), Trouble> {
    match super::still_open(&job.core, rows)
        .iter()
        .any(|row| row.kind.holds_rows())
    {
        true => Ok(()),
        false => Err(Trouble::Wait("the copy is not wanted any more".to_owned())),
    }
}

/// Whether an embedding that the source cannot show is in the way.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Strict {
    Yes,
    /// What it cannot show, no copy would have; a row will name it.
    No,
}

/// Reads everything that the source has.
pub(super) async fn read_through(job: &Job, strict: Strict) -> Result<(), Trouble> {
    let core = &job.core;
    let most = core.settings.repair_records;
    let ids = read::ids(core, &job.collection, job.from()?).await?;
    let (mut at, mut size) = (0, FIRST_CHUNK.min(most));
    while at < ids.len() {
        let part = &ids[at..ids.len().min(at + size)];
        let (records, bytes) = read::records(core, &job.collection, job.from()?, part).await?;
        let unreadable = records.iter().find(|record| compare::readable(record).is_none());
        if let Some(record) = unreadable.filter(|_| strict == Strict::Yes) {
            let why = format!("it cannot show the embedding of {:?}", record.id);
            return Err(Trouble::Source(why));
        }
        at += part.len();
        size = next_chunk(part.len(), bytes, most);
        pace(job, part.len()).await?;
    }
    Ok(())
}

/// Whether work without the lane may go on, and no faster than it is allowed to.
async fn pace(job: &Job, records: usize) -> Result<(), Trouble> {
    let core = &job.core;
    core.repairing.pace(core, records).await;
    let both_up = core.cluster.node(job.source).is_up() && core.cluster.node(job.target).is_up();
    match both_up && !super::is_paused(core) && !job.collection.is_deleted() {
        true => Ok(()),
        false => Err(Trouble::Wait("interrupted".to_owned())),
    }
}

/// What the source could not show is left out, and named.
async fn copy(
    job: &Job,
    source: &Object,
    ids: &[String],
    writers: Writers,
    undisturbed: &impl Fn() -> Result<(), Trouble>,
) -> Result<BTreeSet<String>, Trouble> {
    let core = &job.core;
    let mut unreadable = BTreeSet::new();
    let wanted: BTreeSet<&str> = ids.iter().map(String::as_str).collect();
    // Nobody but us writes to the target.
    let there = read::ids(core, &job.collection, job.to()?).await?;
    let surplus: Vec<String> = there
        .iter()
        .filter(|id| !wanted.contains(id.as_str()))
        .cloned()
        .collect();
    drop(wanted);
    let kept: Vec<&String> = if surplus.is_empty() {
        there.iter().collect()
    } else {
        vec![]
    };
    let is_beginning = kept.len() == there.len() && kept.iter().zip(ids).all(|(there, id)| *there == id);
    if !is_beginning {
        job.pin().await?;
    }
    drop(kept);
    let there: BTreeSet<String> = there.into_iter().collect();
    core.repairing
        .begin(job.target, Some(job.collection.generation), ids.len(), core.env.wall());
    let most = core.settings.repair_records;
    for part in surplus.chunks(most.max(1)) {
        delete(job, part, source).await?;
    }
    let (mut at, mut size) = (0, FIRST_CHUNK.min(most));
    while at < ids.len() {
        undisturbed()?;
        let part = &ids[at..ids.len().min(at + size)];
        let on_target: Vec<String> = part.iter().filter(|id| there.contains(*id)).cloned().collect();
        let found = match writers {
            Writers::Free => {
                let patience = core.settings.write_timeout;
                job.equalise(part, &on_target, source.space(), patience).await?
            }
            Writers::HeldBack => {
                let _alone = core.exclusive(&job.collection).await;
                let found = job.equalise(part, &on_target, source.space(), HELD_PATIENCE).await?;
                unreadable.extend(catch_up(job, source).await?);
                found
            }
        };
        at += part.len();
        size = next_chunk(part.len(), found.bytes, most);
        unreadable.extend(found.unreadable);
        core.repairing.progress(job.target, Some(job.collection.generation), at);
        fault::point("copy-under-way");
        pace(job, part.len()).await?;
    }
    Ok(unreadable)
}

/// What was touched, before it is too much to remember. The caller holds the lane.
async fn catch_up(job: &Job, source: &Object) -> Result<BTreeSet<String>, Trouble> {
    let pair = &job.collection.pairs[job.target];
    let mut unreadable = BTreeSet::new();
    if pair.touched() <= job.core.settings.repair_touched / 4 {
        return Ok(unreadable);
    }
    let touched: Vec<String> = take_touched(job)?.into_iter().collect();
    job.pin().await?;
    for part in touched.chunks(LAST_ROUND) {
        let found = job.equalise(part, part, source.space(), HELD_PATIENCE).await?;
        unreadable.extend(found.unreadable);
    }
    Ok(unreadable)
}

fn take_touched(job: &Job) -> Result<BTreeSet<String>, Trouble> {
    let Touched { ids, overflowed, .. } = job.collection.pairs[job.target].take_touched();
    match overflowed {
        true => Err(Trouble::Overtaken),
        false => Ok(ids),
    }
}

/// Records that only the target had when the source was listed; one that came since is touched.
async fn delete(job: &Job, surplus: &[String], source: &Object) -> Result<(), Trouble> {
    let patience = job.core.settings.write_timeout;
    job.equalise(surplus, surplus, source.space(), patience).await?;
    pace(job, surplus.len()).await
}

/// What was touched meanwhile, first without the lane; the rest in it, and the commit.
async fn finish(
    job: &Job,
    source: &Object,
    open: &[RepairRow],
    mut unreadable: BTreeSet<String>,
    writers: Writers,
    undisturbed: &impl Fn() -> Result<(), Trouble>,
) -> Result<(), Trouble> {
    let core = &job.core;
    let mut ids: BTreeSet<String> = BTreeSet::new();
    let mut waited = 0;
    let mut rounds = match writers {
        Writers::Free => 0,
        Writers::HeldBack => ROUNDS,
    };
    loop {
        ids.append(&mut take_touched(job)?);
        undisturbed()?;
        if ids.len() > LAST_ROUND && rounds < ROUNDS {
            rounds += 1;
            let round: Vec<String> = std::mem::take(&mut ids).into_iter().collect();
            job.pin().await?;
            for part in round.chunks(LAST_ROUND) {
                let patience = core.settings.write_timeout;
                let found = job.equalise(part, part, source.space(), patience).await?;
                unreadable.extend(found.unreadable);
                pace(job, part.len()).await?;
            }
            continue;
        }
        let alone = core.exclusive(&job.collection).await;
        if !core.usable(&job.collection).contains(&job.source) && waited < SOURCE_PATIENCE {
            drop(alone);
            waited += 1;
            core.env.sleep(PAUSE).await;
            pace(job, 0).await?;
            continue;
        }
        ids.append(&mut take_touched(job)?);
        undisturbed()?;
        job.check()?;
        still_wanted(job, open)?;
        job.flush().await?;
        // Somebody may have written them meanwhile.
        ids.append(&mut unreadable);
        let ids: Vec<String> = ids.into_iter().collect();
        let mended = job.equalise_in_lane(&ids, source.space()).await?;
        if mended.unreadable.len() > MOST_IN_LANE {
            let why = format!("it cannot show the embeddings of {} records", mended.unreadable.len());
            return Err(Trouble::Source(why));
        }
        let (source, target) = job.objects().await?;
        job.equalise_dimension(&source, &target).await?;
        verify::same_count(job, mended.absent).await?;
        let in_order = job.collection.pinned().is_some() && mended.unreadable.is_empty() && same_order(job).await?;
        conclude(job, open, &mended.unreadable, in_order).await;
        return Ok(());
    }
}

/// Whether every node lists the records as the source does: then pages may come from any (schedule S28). Of a node that
/// is behind or away nobody knows. The caller holds the lane.
async fn same_order(job: &Job) -> Result<bool, Trouble> {
    let core = &job.core;
    let usable = core.usable(&job.collection);
    let others = || (0..core.cluster.len()).filter(|&node| node != job.source);
    if others().any(|node| node != job.target && !usable.contains(&node)) {
        return Ok(false);
    }
    let ids = read::ids(core, &job.collection, job.from()?).await?;
    for node in others() {
        if read::ids(core, &job.collection, job.place(node)?).await? != ids {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The node joins, but for what nobody could read. `in_order`: pages need not come from one node any more. The caller
/// holds the lane.
async fn conclude(job: &Job, open: &[RepairRow], unreadable: &BTreeSet<String>, in_order: bool) {
    let core = &job.core;
    let scope = job.scope();
    let mut changes = vec![
        Change::RemoveRepairs(open.iter().map(|row| row.id).collect()),
        Change::RemoveBacklog {
            node: core.cluster.node(job.target).name.clone(),
            generation: scope.generation(),
            upto: core.log.next_lsn(),
        },
    ];
    if !unreadable.is_empty() {
        changes.push(job.left_over(open, unreadable));
    }
    if in_order {
        changes.push(Change::UnpinReads(job.collection.generation));
    }
    fault::point("copy-complete");
    // The rows count until the repair rows are gone, and those go by the same commit.
    let pair = &job.collection.pairs[job.target];
    pair.remove_parked(pair.parked());
    pair.drained();
    core.behind.lock().remove(&(job.target, scope.generation()));
    core.commit_or_retry(&scope, vec![job.target], changes).await;
    fault::point("copy-committed");
    tracing::info!(
        node = core.cluster.node(job.target).name,
        generation = job.collection.generation,
        "The collection was copied."
    );
}
