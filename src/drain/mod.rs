//! The drain: brings a node that missed entries back in step.
//!
//! One service per node. Rows are applied within a lane in an order that is as good as theirs (`combine.rs`); lanes side by
//! side. A step's rows are removed by a commit before the next step is sent (schedule S32), so a crash repeats at most one
//! step, and a step is one upstream request of one kind, which is idempotent on its own (chroma-facts.md 3.1). The last
//! rows are applied while holding the lane, so that the node joins it exactly between two writes (design.md R1).
//!
//! Record rows of a collection wait until the node has the collection, which the namespace's own rows see to; they are
//! addressed by the node's UUID, so a rename does not concern them and a delete makes them moot. Beyond that the
//! namespace needs no barrier here.
//!
//! A connection error ends the work on that node without blame: it goes on when the node is up again. An answer that a
//! node had failed counts an attempt; after some, the lane gets a repair row.

mod brake;
mod combine;
mod limits;
mod namespace;
mod record;
mod step;
mod trouble;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::chroma::{Generation, Op};
use crate::cluster::NodeIndex;
use crate::fault;
use crate::journal::PayloadRow;
use crate::mirror::{Core, Scope};
use combine::Page;
use step::{Pace, apply_page, limits};

pub use brake::Foreground;
pub use limits::keep_limits;

/// After so many answers that the node failed, an entry is left to repair.
const ATTEMPTS: i32 = 5;
/// The last node that could hold everything is asked this often, with growing pauses: that takes about ten minutes.
/// Then the entry is parked.
const LAST_ATTEMPTS: i32 = 25;
/// A lane is handed over to live writes when what is left takes at most so many requests: its writers wait meanwhile. While
/// clients write, they wait for none: the lane is taken when nothing is left; or, if its own writers bring something again and
/// again and no other lane of the node is drained, with one request left after so many rounds.
const HANDOVER_STEPS: usize = 8;
const WATCHED_HANDOVER_STEPS: usize = 1;
const WATCHED_HANDOVER_ROUNDS: u32 = 3;
/// After so long it is looked whether the backlog shrinks. If its writers add more than half of what the drain takes away,
/// and as much as is left was applied since, the lane is taken; also if it does not shrink at all.
const LOOK: Duration = Duration::from_secs(3);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
const FENCE_LIMIT: Duration = Duration::from_secs(60);
const TICK: Duration = Duration::from_secs(1);

/// How work on a lane ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The node is in step with the lane, or nothing more can be done for it here.
    Done,
    /// Something failed that may pass.
    Pause,
}

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Applied,
    Stop(End),
}

type Key = Option<Generation>;

/// Drains one node for as long as the process lives.
pub async fn drain_node(core: Arc<Core>, node: NodeIndex) {
    let active: Arc<Mutex<BTreeSet<Key>>> = Arc::default();
    let pauses: Arc<Mutex<BTreeMap<Key, (Duration, Duration)>>> = Arc::default();
    let mut changes = core.cluster.watch_changes();
    let mut was_up = false;
    let mut last = None;
    loop {
        changes.mark_unchanged();
        let up = core.cluster.node(node).is_up();
        if up && !was_up {
            pauses.lock().clear();
        }
        was_up = up;
        if up && !core.drain_paused.load(Ordering::SeqCst) && !core.log.is_fenced() {
            for (key, scope) in in_turn(work(&core, node), last) {
                if active.lock().len() >= core.settings.drain_concurrency {
                    break;
                }
                let now = core.env.now();
                let waits = pauses.lock().get(&key).is_some_and(|(until, _)| now < *until);
                if waits || active.lock().contains(&key) {
                    continue;
                }
                // One at a time: a repair of this lane on this node applies rows as well.
                let Some(claim) = core.repairing.claim_for_drain(&core, node, key) else {
                    continue;
                };
                active.lock().insert(key);
                last = key.or(last);
                let (core, active, pauses) = (core.clone(), active.clone(), pauses.clone());
                core.env.clone().spawn(Box::pin(async move {
                    let _claim = claim;
                    let end = drain_lane(&core, node, &scope).await;
                    match end {
                        End::Done => pauses.lock().remove(&key),
                        End::Pause => {
                            let mut pauses = pauses.lock();
                            let pause = pauses
                                .get(&key)
                                .map_or(FIRST_PAUSE, |(_, last)| (*last * 2).min(LONGEST_PAUSE));
                            pauses.insert(key, (core.env.now() + pause, pause))
                        }
                    };
                    active.lock().remove(&key);
                    core.cluster.announce_change();
                }));
            }
        }
        tokio::select! {
            biased;
            _ = changes.changed() => {}
            () = core.env.sleep(TICK) => {}
        }
    }
}

/// The namespace first, then the collections behind the one that was begun last, so that each has its turn: there may be
/// more that come back for more than are drained side by side.
fn in_turn<T>(mut work: Vec<(Key, T)>, last: Key) -> Vec<(Key, T)> {
    let names = work.iter().take_while(|(key, _)| key.is_none()).count();
    let collections = &mut work[names..];
    let next = collections.iter().position(|(key, _)| *key > last).unwrap_or(0);
    collections.rotate_left(next);
    work
}

/// Lanes of this node that can be drained now, the namespace first.
fn work(core: &Core, node: NodeIndex) -> Vec<(Key, Scope)> {
    let keys: Vec<_> = core
        .behind
        .lock()
        .range((node, None)..(node + 1, None))
        .map(|(_, key)| *key)
        .collect();
    let mut found = Vec::new();
    for key in keys {
        let scope = match key {
            None => Scope::Namespace,
            Some(generation) => match core.catalog.by_generation(generation) {
                Some(collection) => Scope::Collection(collection),
                None => continue,
            },
        };
        let pair = &scope.pairs(core)[node];
        {
            // Whoever adds a row counts it first and names the lane here then.
            let mut behind = core.behind.lock();
            if pair.pending() == 0 {
                behind.remove(&(node, key));
                continue;
            }
        }
        let reachable = match &scope {
            Scope::Namespace => true,
            Scope::Collection(collection) => collection.node_id(node).is_some(),
        };
        if pair.drainable() && reachable {
            found.push((key, scope));
        }
    }
    found
}

fn goes_on(core: &Core, node: NodeIndex) -> bool {
    core.cluster.node(node).is_up() && !core.drain_paused.load(Ordering::SeqCst)
}

/// A lane's backlog at one moment.
#[derive(Debug, Clone, Copy)]
struct Look {
    at: Duration,
    pending: u64,
    /// Rows that were applied since.
    applied: u64,
}

impl Look {
    fn new(at: Duration, pending: u64) -> Self {
        Self {
            at,
            pending,
            applied: 0,
        }
    }

    /// Its writers keep up with the drain, and holding the lane would end it, as far as that can be told; or it does not
    /// shrink at all.
    fn is_losing(self, now: Self) -> bool {
        let shrunk = self.pending.saturating_sub(now.pending);
        shrunk == 0 || (shrunk < self.applied / 2 && now.pending <= self.applied)
    }
}

/// Applies a lane's rows to the node until it is in step or something stops it.
async fn drain_lane(core: &Arc<Core>, node: NodeIndex, scope: &Scope) -> End {
    let mut fenced = false;
    let (mut short_rounds, mut attempts) = (0, 0);
    let look = || Look::new(core.env.now(), scope.pairs(core)[node].pending());
    let mut last_look = look();
    let _draining = core.foreground.drain(core.env.now(), node);
    while goes_on(core, node) {
        let pair = &scope.pairs(core)[node];
        if !pair.drainable() {
            return End::Done;
        }
        let Ok(page) = read(core, node, scope).await else {
            return End::Pause;
        };
        if pair.needs_fence() || (!fenced && page.rows().iter().any(|row| row.in_doubt)) {
            // What may still be on its way has landed when a canary sent after it has returned.
            if !core.fence(pair, node, FENCE_LIMIT).await {
                return End::Pause;
            }
            fenced = true;
        }
        // The last row that was removed is still counted.
        let is_rest = page.rows().len() as u64 + 1 >= pair.pending();
        let (limits, is_watched) = limits(core);
        let is_watched = is_watched && scope.generation().is_some();
        let is_short = match is_watched {
            true => page.batches(limits) <= WATCHED_HANDOVER_STEPS,
            false => page.batches(limits) <= HANDOVER_STEPS,
        };
        short_rounds += u32::from(is_rest && is_short);
        let is_busy = core.foreground.others_are_drained(core.env.now(), node);
        let insists = short_rounds > WATCHED_HANDOVER_ROUNDS && !is_busy;
        let is_time = !is_watched || insists;
        let losing = match look() {
            now if now.at.saturating_sub(last_look.at) >= LOOK => std::mem::replace(&mut last_look, now).is_losing(now),
            _ => false,
        };
        // What is counted may be more than there is.
        if page.rows().is_empty() || (is_rest && is_short && is_time) || losing {
            let limit = handover_limit(core, node, scope, attempts);
            attempts += 1;
            match hand_over(core, node, scope, limit).await {
                Some(end) => return end,
                None => {
                    last_look = look();
                    continue;
                }
            }
        }
        if let Step::Stop(end) = apply_page(core, node, scope, &page, Pace::Braked).await {
            return end;
        }
        last_look.applied += page.rows().len() as u64;
    }
    End::Pause
}

/// How long a lane is held for what is left. While clients write, no longer than a write of theirs may wait for this node,
/// at first: a batch of another lane may be under way there. With each attempt twice as long, so that it ends.
fn handover_limit(core: &Core, node: NodeIndex, scope: &Scope, attempts: u32) -> Duration {
    let most = core.settings.mirror_grace;
    let patience = match scope {
        Scope::Collection(_) => core.foreground.patience(core.env.now(), std::iter::once(node)),
        Scope::Namespace => None,
    };
    patience.map_or(most, |patience| {
        patience.saturating_mul(2_u32.saturating_pow(attempts)).min(most)
    })
}

/// Applies what is left while nothing is added, and lets the node join.
///
/// Live writes wait meanwhile, so the lane is given back (`None`: not the end yet) when the limit is over or the node goes
/// down; a request that is under way then becomes a straggler like any other.
async fn hand_over(core: &Arc<Core>, node: NodeIndex, scope: &Scope, limit: Duration) -> Option<End> {
    let Some(alone) = core.exclusive_of(scope).await else {
        return Some(End::Pause);
    };
    let held_since = core.env.now();
    let limit = core.env.sleep(limit);
    tokio::pin!(limit);
    loop {
        let pair = &scope.pairs(core)[node];
        if pair.pending() > 0 && !pair.drainable() {
            return Some(End::Done);
        }
        let Ok(page) = read(core, node, scope).await else {
            return Some(End::Pause);
        };
        if page.rows().is_empty() {
            if !nothing_left(core, node, scope) {
                return Some(End::Pause);
            }
            tracing::info!(
                node = core.cluster.node(node).name,
                generation = scope.generation(),
                held = ?core.env.now().saturating_sub(held_since),
                "The node is in step with the lane."
            );
            core.cluster.announce_change();
            return Some(End::Done);
        }
        match apply_in_time(core, node, scope, page, &mut limit).await {
            Ok(Some(Step::Applied)) => {}
            Ok(Some(Step::Stop(end))) => return Some(end),
            Ok(None) => return Some(End::Pause),
            Err(late) => {
                let straggler = core.straggler(scope, node);
                drop(alone);
                let step = late.await;
                drop(straggler);
                return match step {
                    Ok(Step::Applied) => None,
                    Ok(Step::Stop(end)) => Some(end),
                    Err(_) => Some(End::Pause),
                };
            }
        }
    }
}

/// Nothing is added while the lane is held: that there are no rows is the truth, whatever was counted. False: a commit of
/// unknown outcome may have taken them away, with the collection that they were about, and the node does not join.
fn nothing_left(core: &Core, node: NodeIndex, scope: &Scope) -> bool {
    let pair = &scope.pairs(core)[node];
    if pair.pending() > 0 && !core.catalog_can_change() {
        return false;
    }
    fault::point("drain-joining");
    pair.drained();
    core.behind.lock().remove(&(node, scope.generation()));
    true
}

/// Applies rows by a job that ends what it sends just then when the limit is over or the node goes down: then this gives
/// its receiver.
async fn apply_in_time(
    core: &Arc<Core>,
    node: NodeIndex,
    scope: &Scope,
    page: Page,
    limit: &mut (impl Future<Output = ()> + Unpin),
) -> Result<Option<Step>, oneshot::Receiver<Step>> {
    let (done, mut applied) = oneshot::channel();
    let is_over = Arc::new(AtomicBool::new(false));
    let (job, its_scope, pace) = (core.clone(), scope.clone(), Pace::Held(is_over.clone()));
    core.spawn_job(async move {
        let _ = done.send(apply_page(&job, node, &its_scope, &page, pace).await);
    });
    tokio::select! {
        biased;
        step = &mut applied => return Ok(step.ok()),
        () = core.cluster.node(node).until_down() => {}
        () = limit => {}
    }
    is_over.store(true, Ordering::SeqCst);
    Err(applied)
}

/// Applies everything that is left, for a repair that holds the lane and has claimed it from the drain. True: the node
/// misses nothing but what the repair is about.
pub(crate) async fn drain_rest(core: &Arc<Core>, node: NodeIndex, scope: &Scope) -> bool {
    let pair = &scope.pairs(core)[node];
    let mut limit = core.env.sleep(core.settings.mirror_grace);
    loop {
        let Ok(page) = read(core, node, scope).await else {
            return false;
        };
        if page.rows().is_empty() {
            return nothing_left(core, node, scope);
        }
        if !pair.drainable() {
            return false;
        }
        match apply_in_time(core, node, scope, page, &mut limit).await {
            Ok(Some(Step::Applied)) => {}
            Ok(_) => return false,
            Err(late) => {
                let straggler = core.straggler(scope, node);
                core.env.spawn(Box::pin(async move {
                    let _ = late.await;
                    drop(straggler);
                }));
                return false;
            }
        }
    }
}

async fn read(core: &Core, node: NodeIndex, scope: &Scope) -> Result<Page, crate::journal::JournalError> {
    let name = &core.cluster.node(node).name;
    let settings = &core.settings;
    let rows = core
        .log
        .journal()
        .payloads(name, scope.generation(), settings.drain_rows, settings.drain_bytes)
        .await?;
    Ok(Page::new(rows))
}

/// Records that a row speaks of; `None`: not records, or it cannot be told.
pub(crate) fn records_of(row: &PayloadRow) -> Option<Vec<String>> {
    record::ids_of(row)
}

/// Records that a request speaks of.
pub(crate) fn records_in(op: &Op, body: &Bytes) -> Option<Vec<String>> {
    record::ids_in(op, body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_collection_has_its_turn_and_names_go_first() {
        let keys = |last: Key, work: &[Key]| {
            let work = work.iter().map(|key| (*key, ())).collect();
            in_turn(work, last).into_iter().map(|(key, ())| key).collect::<Vec<_>>()
        };
        let [one, two, three] = [1, 2, 3].map(Some);
        assert_eq!(keys(None, &[None, one, two, three]), [None, one, two, three]);
        assert_eq!(keys(one, &[None, one, two, three]), [None, two, three, one]);
        assert_eq!(keys(two, &[one, three]), [three, one]);
        assert_eq!(keys(three, &[one, two, three]), [one, two, three]);
        assert_eq!(keys(one, &[]), []);
    }

    #[test]
    fn a_lane_is_losing_when_its_writers_keep_up_and_holding_it_would_end_it() {
        let is_losing = |pending, applied, left| {
            let before = Look {
                applied,
                ..Look::new(Duration::ZERO, pending)
            };
            before.is_losing(Look::new(LOOK, left))
        };
        assert!(is_losing(250, 300, 240), "much is applied, little is gone");
        assert!(!is_losing(250, 300, 90), "more than half of it is gone");
        assert!(!is_losing(1_000_000, 300, 999_900), "a hold would not end it");
        assert!(is_losing(1_000_000, 300, 1_000_100), "it grows");
        assert!(is_losing(2, 0, 2), "more is counted than there is");
    }
}
