//! One step after another: rows become a request, and go when it is answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::combine::Page;
use super::{End, Step, goes_on, namespace, record};
use crate::chroma::BatchLimits;
use crate::cluster::NodeIndex;
use crate::fault;
use crate::journal::{Change, PayloadRow};
use crate::mirror::{Core, Scope};

/// What one request may hold now, and whether it is small because clients write.
pub(super) fn limits(core: &Core) -> (BatchLimits, bool) {
    let settings = &core.settings;
    let allowed = core.foreground.allows(core.env.now(), settings.drain_rows);
    let limits = BatchLimits {
        records: allowed.records,
        bytes: settings.drain_bytes,
    };
    (limits, allowed.is_watched)
}

/// Whether there are pauses between steps.
#[derive(Debug)]
pub(super) enum Pace {
    Braked,
    /// The lane is held, and its writers wait: there are none, until the lane is given back. Then it is over after the
    /// step that is under way.
    Held(Arc<AtomicBool>),
}

impl Pace {
    /// A step with so many records is over.
    async fn stepped(&self, core: &Core, records: usize, took: Duration) {
        let now = core.env.now();
        core.foreground.applied(now, records, took);
        if matches!(self, Self::Braked) {
            let pause = core.foreground.pause(now, took);
            if !pause.is_zero() {
                core.env.sleep(pause).await;
            }
        }
    }
}

pub(super) async fn apply_page(core: &Arc<Core>, node: NodeIndex, scope: &Scope, page: &Page, pace: Pace) -> Step {
    if let Some(parked) = page.rows().iter().find(|row| row.parked.is_some()) {
        tracing::debug!(id = %parked.id, "A parked entry blocks this lane.");
        let pair = &scope.pairs(core)[node];
        if pair.parked() == 0 {
            // The answer to the commit that parked it was lost.
            pair.add_parked(1);
        }
        return Step::Stop(End::Done);
    }
    match scope {
        Scope::Namespace => {
            for row in page.rows() {
                if let stop @ Step::Stop(_) = namespace::apply(core, node, row).await {
                    return stop;
                }
            }
        }
        Scope::Collection(collection) => {
            let mut done = 0;
            while let Some(step) = page.batch(done, limits(core).0) {
                let rows = &page.rows()[step.rows.clone()];
                let (records, begun) = (step.records, core.env.now());
                if let stop @ Step::Stop(_) = record::apply(core, node, collection, rows, step).await {
                    return stop;
                }
                let took = core.env.now().saturating_sub(begun);
                tracing::debug!(
                    node = core.cluster.node(node).name,
                    generation = collection.generation,
                    records,
                    ?took,
                    ?pace,
                    "A step of the drain was applied."
                );
                done += rows.len();
                pace.stepped(core, records, took).await;
                match &pace {
                    Pace::Braked if !goes_on(core, node) => return Step::Stop(End::Pause),
                    // What is left is read again.
                    Pace::Held(is_over) if is_over.load(Ordering::SeqCst) => return Step::Applied,
                    _ => {}
                }
            }
        }
    }
    Step::Applied
}

/// Removes rows that are done, with what else has to be durable at the same moment.
pub(super) async fn finish(
    core: &Arc<Core>,
    node: NodeIndex,
    scope: &Scope,
    rows: &[PayloadRow],
    mut changes: Vec<Change>,
) -> Step {
    fault::point("drain-answered");
    changes.push(Change::RemovePayloads(rows.iter().map(|row| row.id).collect()));
    if !core.commit_or_retry(scope, vec![node], changes).await {
        return Step::Stop(End::Pause);
    }
    fault::point("drain-committed");
    let bytes = rows.iter().map(|row| row.body.len() as u64).sum();
    // About the oldest that is left: most before it are gone, and of those behind it some may be.
    let first = rows.first().map_or(0, |row| row.created_at.timestamp_micros());
    scope.pairs(core)[node].remove_applied(rows.len() as u64, bytes, first);
    core.counters.replayed.fetch_add(rows.len() as u64, Ordering::Relaxed);
    Step::Applied
}
