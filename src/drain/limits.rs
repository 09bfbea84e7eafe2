//! How much the log keeps for a node that is away: `wal.max_bytes` and `wal.max_age` (rule R2).
//!
//! Beyond the limit, the collections that are too old, and then those that weigh most, are left to a copy: one commit, in
//! the lane, puts a repair row of the whole collection in the place of the payload rows. That is only done when another
//! node is in step with the collection and has just shown every record of it, vectors too: otherwise the log may be all
//! there is. Then the rows stay, and new writes to that collection are refused until there is room again.
//!
//! Names are never dropped: their entries are small, and what comes after rests on them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::catalog::Collection;
use crate::chroma::Generation;
use crate::cluster::NodeIndex;
use crate::journal::{Change, RepairKind};
use crate::mirror::{Core, RepairWanted, Scope};
use crate::repair;

const TICK: Duration = Duration::from_secs(1);
/// When a collection could not be read in full, it is tried again after this.
const READ_PAUSE: Duration = Duration::from_secs(30);

/// What one lane keeps for a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kept {
    /// `None`: the namespace.
    generation: Option<Generation>,
    bytes: u64,
    /// Of the oldest row, in Unix microseconds.
    oldest: i64,
}

/// The collections that have to go: what is older than `oldest`, then the largest until the rest fits. 0: no limit.
fn excess(mut lanes: Vec<Kept>, max_bytes: u64, oldest: Option<i64>) -> Vec<Generation> {
    let mut bytes: u64 = lanes.iter().map(|lane| lane.bytes).sum();
    let is_old = |lane: &Kept| oldest.is_some_and(|oldest| lane.oldest < oldest);
    lanes.sort_by_key(|lane| (!is_old(lane), std::cmp::Reverse(lane.bytes), lane.oldest));
    let mut chosen = vec![];
    for lane in lanes {
        let Some(generation) = lane.generation else { continue };
        if is_old(&lane) || max_bytes > 0 && bytes > max_bytes {
            bytes -= lane.bytes;
            chosen.push(generation);
        }
    }
    chosen
}

/// Keeps the log within its limits, for as long as the process lives.
pub async fn keep_limits(core: Arc<Core>) {
    let (max_bytes, max_age) = (core.settings.log_bytes, core.settings.log_age);
    if max_bytes == 0 && max_age.is_zero() {
        return;
    }
    let mut unreadable: BTreeMap<(NodeIndex, Generation), Duration> = BTreeMap::new();
    loop {
        core.env.sleep(TICK).await;
        let oldest = chrono::Duration::from_std(max_age)
            .ok()
            .filter(|age| !age.is_zero())
            .and_then(|age| core.env.wall().checked_sub_signed(age))
            .map(|at| at.timestamp_micros());
        for node in 0..core.cluster.len() {
            let lanes = kept(&core, node);
            let chosen = excess(lanes.clone(), max_bytes, oldest);
            for generation in lanes.into_iter().filter_map(|lane| lane.generation) {
                let Some(collection) = core.catalog.by_generation(generation) else {
                    continue;
                };
                let pair = &collection.pairs[node];
                if !chosen.contains(&generation) {
                    pair.set_over_limit(false);
                    continue;
                }
                let key = (node, generation);
                if unreadable.get(&key).is_some_and(|until| core.env.now() < *until) {
                    continue;
                }
                match leave_to_copy(&core, node, &collection).await {
                    Ok(Left::Dropped) => {
                        unreadable.remove(&key);
                        pair.set_over_limit(false);
                    }
                    Ok(Left::Later) => {}
                    Err(why) => {
                        let name = &core.cluster.node(node).name;
                        tracing::error!(
                            node = name,
                            generation,
                            why,
                            "The log is beyond its limit and cannot be dropped."
                        );
                        unreadable.insert(key, core.env.now() + READ_PAUSE);
                        pair.set_over_limit(true);
                        core.cluster.announce_change();
                    }
                }
            }
        }
    }
}

/// What is kept for a node, by lane. Costs as much as there are lanes behind.
fn kept(core: &Core, node: NodeIndex) -> Vec<Kept> {
    let keys: Vec<_> = core
        .behind
        .lock()
        .range((node, None)..(node + 1, None))
        .map(|(_, key)| *key)
        .collect();
    let name = &core.cluster.node(node).name;
    let now = core.env.wall().timestamp_micros();
    keys.into_iter()
        .filter_map(|generation| {
            let (scope, _) = core.find(generation, name)?;
            let pair = &scope.pairs(core)[node];
            Some(Kept {
                generation,
                bytes: pair.pending_bytes(),
                oldest: pair.oldest().or((pair.pending() > 0).then_some(now))?,
            })
        })
        .collect()
}

/// What became of the rows of a collection.
enum Left {
    Dropped,
    /// Something is under way there, or was just now; nothing was done.
    Later,
}

/// Puts a copy in the place of what the log has of a collection for a node.
///
/// # Errors
/// Why there can be no copy.
async fn leave_to_copy(core: &Arc<Core>, node: NodeIndex, collection: &Arc<Collection>) -> Result<Left, String> {
    let scope = Scope::Collection(collection.clone());
    let pair = &collection.pairs[node];
    let source = |core: &Core| core.usable(collection).into_iter().find(|&other| other != node);
    let shown = source(core).ok_or("no other node is in step with the collection")?;
    repair::read_everything(core, collection, shown).await?;
    // Neither the drain nor a repair is at work there.
    let Some(_claim) = core.repairing.claim_for_drain(core, node, scope.generation()) else {
        return Ok(Left::Later);
    };
    let _alone = core.exclusive(collection).await;
    let unknown = pair.uncertain() > 0 || pair.stragglers() > 0;
    if source(core) != Some(shown) || unknown || collection.is_deleted() || pair.pending() == 0 {
        return Ok(Left::Later);
    }
    let name = core.cluster.node(node).name.clone();
    let copied_anyway = core.repairs.lock().iter().any(|row| {
        row.node == name
            && row.generation == scope.generation()
            && row.kind == RepairKind::Whole
            && row.parked.is_none()
            && row
                .source
                .as_ref()
                .is_none_or(|source| *source == core.cluster.node(shown).name)
    });
    let upto = core.log.next_lsn();
    let mut changes = vec![Change::RemoveBacklog {
        node: name.clone(),
        generation: scope.generation(),
        upto,
    }];
    if !copied_anyway {
        let wanted = RepairWanted::whole(upto, "the log was beyond its limit");
        changes.push(core.repair_row(&scope, node, wanted));
    }
    tracing::warn!(
        node = name,
        generation = scope.generation(),
        rows = pair.pending(),
        "The log is beyond its limit: the collection is left to a copy."
    );
    // The repair row counts already, and goes on counting when these do not.
    pair.remove_parked(pair.parked());
    pair.drained();
    core.behind.lock().remove(&(node, scope.generation()));
    core.commit_or_retry(&scope, vec![node], changes).await;
    Ok(Left::Dropped)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(of: &[(Option<Generation>, u64, i64)]) -> Vec<Kept> {
        let lanes = of.iter();
        lanes
            .map(|&(generation, bytes, oldest)| Kept {
                generation,
                bytes,
                oldest,
            })
            .collect()
    }

    #[test]
    fn within_the_limits_nothing_goes() {
        let lanes = kept(&[(None, 50, 1), (Some(1), 50, 10)]);
        assert_eq!(excess(lanes.clone(), 100, Some(10)), [0; 0]);
        assert_eq!(excess(lanes, 0, None), [0; 0]);
    }

    #[test]
    fn the_largest_go_until_the_rest_fits() {
        let lanes = kept(&[
            (Some(1), 30, 10),
            (Some(2), 60, 10),
            (Some(3), 10, 10),
            (Some(4), 40, 10),
        ]);
        assert_eq!(excess(lanes.clone(), 80, None), [2]);
        assert_eq!(excess(lanes.clone(), 79, None), [2, 4]);
        assert_eq!(excess(lanes, 9, None), [2, 4, 1, 3]);
    }

    #[test]
    fn what_is_too_old_goes_whatever_its_size() {
        let lanes = kept(&[(Some(1), 30, 10), (Some(2), 1, 3), (Some(3), 90, 10)]);
        assert_eq!(excess(lanes.clone(), 0, Some(5)), [2]);
        assert_eq!(excess(lanes, 100, Some(5)), [2, 3], "the rest has to fit too");
    }

    #[test]
    fn names_stay() {
        let lanes = kept(&[(None, 500, 1), (Some(1), 30, 10)]);
        assert_eq!(excess(lanes, 100, Some(5)), [1]);
    }
}
