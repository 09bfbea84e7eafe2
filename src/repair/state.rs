//! What the repair services, the drain and people know of each other's work. In memory only: the rows are the truth.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use chrono::{DateTime, Utc};
use parking_lot::Mutex;
use uuid::Uuid;

use super::Keys;
use super::jobs::Report;
use crate::chroma::Generation;
use crate::cluster::NodeIndex;
use crate::journal::RepairKind;
use crate::mirror::Core;

/// A lane: a collection's, or the namespace's.
pub type Key = Option<Generation>;

/// Reports of comparisons that are kept.
const REPORTS: usize = 20;

/// How far a copy has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    pub started_at: DateTime<Utc>,
    pub done: usize,
    pub total: usize,
}

/// What went wrong with a lane's repair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub kind: RepairKind,
    pub times: u32,
    pub last: String,
}

/// See the module.
#[derive(Default)]
pub struct Repairing {
    /// Lanes on nodes that the drain or a repair works on.
    busy: Mutex<BTreeSet<(NodeIndex, Key)>>,
    /// Lanes that a repair waits for: the drain does not begin anew there.
    turns: Mutex<BTreeSet<(NodeIndex, Key)>>,
    /// Collections that a rebuild has made anew: a second try does not begin by deleting.
    rebuilt: Mutex<BTreeSet<(NodeIndex, Generation)>>,
    progress: Mutex<BTreeMap<(NodeIndex, Key), Progress>>,
    failures: Mutex<BTreeMap<(NodeIndex, Key), Failure>>,
    /// Reads in a row that a node alone failed.
    pub(super) broken_reads: Mutex<BTreeMap<(Generation, NodeIndex), u32>>,
    /// Until when collections on nodes that were looked into are not looked into again.
    pub(super) examined: Mutex<BTreeMap<(Generation, NodeIndex), Duration>>,
    /// There may be some; so that a healthy read costs no lock.
    pub(super) any_broken: AtomicBool,
    reports: Mutex<BTreeMap<Uuid, Report>>,
    /// Until when all that may be read has been read.
    paced_until: Mutex<Duration>,
    verified: Mutex<BTreeMap<Generation, DateTime<Utc>>>,
}

/// The right to send a node what it lacks in one lane.
pub struct Claim {
    core: Arc<Core>,
    at: (NodeIndex, Key),
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.core.repairing.busy.lock().remove(&self.at);
        self.core.cluster.announce_change();
    }
}

impl Repairing {
    fn take(&self, core: &Arc<Core>, at: (NodeIndex, Key)) -> Option<Claim> {
        let core = core.clone();
        self.busy.lock().insert(at).then(|| Claim { core, at })
    }

    /// For the drain, which lets a repair that waits go first.
    pub(crate) fn claim_for_drain(&self, core: &Arc<Core>, node: NodeIndex, key: Key) -> Option<Claim> {
        match self.turns.lock().contains(&(node, key)) {
            true => None,
            false => self.take(core, (node, key)),
        }
    }

    pub(super) fn claim(&self, core: &Arc<Core>, node: NodeIndex, key: Key) -> Option<Claim> {
        let claim = self.take(core, (node, key));
        let mut turns = self.turns.lock();
        match claim {
            Some(_) => turns.remove(&(node, key)),
            None => turns.insert((node, key)),
        };
        claim
    }

    /// Forgets who waits for lanes that are not to be repaired any more.
    pub(super) fn keep_turns(&self, node: NodeIndex, wanted: &Keys) {
        self.turns
            .lock()
            .retain(|(of, key)| *of != node || wanted.contains(key));
    }

    /// Waits as `repair.rate` wants it after so many records; one rate for all repairs together.
    pub(super) async fn pace(&self, core: &Core, records: usize) {
        let rate = core.settings.repair_rate;
        if rate == 0 {
            return;
        }
        let now = core.env.now();
        let wait = {
            let mut until = self.paced_until.lock();
            *until = (*until).max(now) + Duration::from_secs_f64(records as f64 / f64::from(rate));
            *until - now
        };
        core.env.sleep(wait).await;
    }

    pub(super) fn is_rebuilt(&self, at: (NodeIndex, Generation)) -> bool {
        self.rebuilt.lock().contains(&at)
    }

    pub(super) fn set_rebuilt(&self, at: (NodeIndex, Generation)) {
        self.rebuilt.lock().insert(at);
    }

    pub(super) fn begin(&self, node: NodeIndex, key: Key, total: usize, started_at: DateTime<Utc>) {
        let progress = Progress {
            started_at,
            done: 0,
            total,
        };
        self.progress.lock().insert((node, key), progress);
    }

    pub(super) fn progress(&self, node: NodeIndex, key: Key, done: usize) {
        if let Some(progress) = self.progress.lock().get_mut(&(node, key)) {
            progress.done = done;
        }
    }

    pub(super) fn end(&self, node: NodeIndex, key: Key) {
        self.progress.lock().remove(&(node, key));
    }

    /// How far the copy of a lane to a node has come, if one is under way.
    pub fn progress_of(&self, node: NodeIndex, key: Key) -> Option<Progress> {
        self.progress.lock().get(&(node, key)).cloned()
    }

    /// What went wrong with a lane's repair since it last succeeded.
    pub fn failure_of(&self, node: NodeIndex, key: Key) -> Option<Failure> {
        self.failures.lock().get(&(node, key)).cloned()
    }

    /// Remembers what went wrong without counting it.
    pub(super) fn note(&self, node: NodeIndex, key: Key, kind: RepairKind, why: &str) {
        let mut failures = self.failures.lock();
        let failure = failures.entry((node, key)).or_insert(Failure {
            kind,
            times: 0,
            last: String::new(),
        });
        why.clone_into(&mut failure.last);
    }

    /// Counts a failure; how many there were of this kind.
    pub(super) fn failed(&self, node: NodeIndex, key: Key, kind: RepairKind, why: &str) -> u32 {
        self.note(node, key, kind, why);
        let mut failures = self.failures.lock();
        let Some(failure) = failures.get_mut(&(node, key)) else {
            return 0;
        };
        if failure.kind != kind {
            failure.kind = kind;
            failure.times = 0;
        }
        failure.times += 1;
        failure.times
    }

    /// The lane was repaired, or has another repair now.
    pub(super) fn succeeded(&self, node: NodeIndex, key: Key) {
        self.failures.lock().remove(&(node, key));
        if let Some(generation) = key {
            self.rebuilt.lock().remove(&(node, generation));
        }
    }

    pub(super) fn put_report(&self, report: Report) {
        let mut reports = self.reports.lock();
        reports.insert(report.id, report);
        while reports.len() > REPORTS {
            let oldest = reports
                .values()
                .filter(|report| report.finished_at.is_some())
                .min_by_key(|report| report.started_at)
                .map(|report| report.id);
            match oldest {
                Some(id) => reports.remove(&id),
                None => return,
            };
        }
    }

    pub fn report(&self, id: Uuid) -> Option<Report> {
        self.reports.lock().get(&id).cloned()
    }

    /// Newest first.
    pub fn reports(&self) -> Vec<Report> {
        let mut reports: Vec<Report> = self.reports.lock().values().cloned().collect();
        reports.sort_by_key(|report| std::cmp::Reverse(report.started_at));
        reports
    }

    pub(super) fn set_verified(&self, generation: Generation, at: DateTime<Utc>) {
        self.verified.lock().insert(generation, at);
    }

    /// When a collection was last found equal on all nodes, since the start.
    pub fn verified_at(&self, generation: Generation) -> Option<DateTime<Utc>> {
        self.verified.lock().get(&generation).copied()
    }
}
