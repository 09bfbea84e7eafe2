//! Suspects: records whose outcome on a node was unknown.
//!
//! A request that timed out or was cut may still land, at the latest when SQLite on the node stops waiting for its lock
//! (1000 s, chroma-facts.md 0). The drain waits for a canary before it goes on, and after that the records are compared
//! with another node three times more (design.md 4.7, schedule S11).

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::cover::{EntryInfo, RepairWanted};
use super::{Core, Outcome, Scope};
use crate::catalog::Collection;
use crate::chroma::Generation;
use crate::cluster::NodeIndex;
use crate::journal::{Change, Commit, SuspectRow};

/// When records are compared, each counted from the time before.
const AFTER: [Duration; 3] = [
    Duration::from_secs(10),
    Duration::from_secs(50),
    Duration::from_secs(940),
];
const TICK: Duration = Duration::from_secs(2);
/// How many suspects one repair row takes.
const TOGETHER: usize = 200;

impl Core {
    /// Rows for the nodes whose outcome is unknown.
    pub(super) fn suspects_of(
        &self,
        collection: &Collection,
        outcomes: &[Outcome],
        entry: &EntryInfo,
    ) -> Vec<SuspectRow> {
        let unknown = outcomes
            .iter()
            .enumerate()
            .filter(|(_, outcome)| matches!(outcome, Outcome::Unknown(_)));
        let Some(ids) = &entry.ids else { return vec![] };
        unknown
            .map(|(node, _)| self.suspect(node, collection.generation, ids.clone()))
            .collect()
    }

    /// A row for records that a request may still reach on a node. It is one of its own, whatever else is known of them:
    /// the late answer to that request takes it away.
    fn suspect(&self, node: NodeIndex, generation: Generation, ids: Vec<String>) -> SuspectRow {
        SuspectRow {
            id: self.env.new_id(),
            node: self.cluster.node(node).name.clone(),
            generation,
            ids,
            step: 0,
            due_at: self.env.wall() + AFTER[0],
        }
    }

    /// Remembers records of a node that a request of ours may still reach, for one, with what else is to be committed: a
    /// row that says the same already begins anew. What does not become durable is known as long as the process lives.
    pub(crate) async fn put_suspects(
        &self,
        node: NodeIndex,
        generation: Generation,
        mut ids: Vec<String>,
        mut changes: Commit,
    ) {
        ids.sort_unstable();
        ids.dedup();
        let is_same = |one: &SuspectRow, other: &SuspectRow| {
            one.step == 0 && one.node == other.node && one.generation == other.generation && one.ids == other.ids
        };
        if !ids.is_empty() {
            let mut row = self.suspect(node, generation, ids);
            if let Some(known) = self.suspects.lock().values().find(|known| is_same(known, &row)) {
                row.id = known.id;
            }
            changes.push(Change::PutSuspect(row));
        }
        let _ = self.log.commit(&changes).await;
        self.apply(&changes);
    }

    /// Suspects whose time has come, by node and collection; none of a node that cannot be compared now.
    fn due_suspects(&self) -> Vec<(Scope, NodeIndex, Vec<SuspectRow>)> {
        let now = self.env.wall();
        let mut due: std::collections::BTreeMap<(String, i64), Vec<SuspectRow>> = std::collections::BTreeMap::new();
        for row in self.suspects.lock().values().filter(|row| row.due_at <= now) {
            let rows = due.entry((row.node.clone(), row.generation)).or_default();
            if rows.len() < TOGETHER {
                rows.push(row.clone());
            }
        }
        due.into_iter()
            .filter_map(|((node, generation), rows)| {
                let (scope, node) = self.find(Some(generation), &node)?;
                Some((scope, node, rows))
            })
            .collect()
    }

    /// Forgets those of collections that are gone: they were written down after the commit that took away all that there was.
    async fn forget_moot_suspects(&self) {
        let now = self.env.wall();
        let is_gone = |row: &SuspectRow| {
            let found = self.catalog.by_generation(row.generation);
            found.is_none_or(|collection| collection.is_deleted())
        };
        let moot: Vec<Uuid> = {
            let suspects = self.suspects.lock();
            let due = suspects.values().filter(|row| row.due_at <= now);
            due.filter(|row| is_gone(row)).map(|row| row.id).collect()
        };
        if !moot.is_empty() {
            let changes = vec![Change::RemoveSuspects(moot)];
            // What fails is tried again at the next turn.
            if self.log.commit(&changes).await.is_ok() {
                self.apply(&changes);
            }
        }
    }

    /// Has the records compared: a repair row, in the same commit that puts off their next time.
    async fn compare_suspects(self: &Arc<Self>, scope: &Scope, node: NodeIndex, rows: Vec<SuspectRow>) {
        let Scope::Collection(collection) = scope else { return };
        let _alone = self.exclusive(collection).await;
        let source = self.usable(collection).into_iter().find(|&other| other != node);
        // Only a node in step is compared: one that is behind is left alone until it is.
        let (Some(source), true) = (source, collection.in_sync(node) && !collection.is_deleted()) else {
            return;
        };
        let mut ids: Vec<String> = rows.iter().flat_map(|row| row.ids.clone()).collect();
        ids.sort_unstable();
        ids.dedup();
        let wanted = RepairWanted {
            source: Some(source),
            reversible: true,
            ..RepairWanted::records(Some(ids), self.log.next_lsn(), "the outcome of a write was unknown")
        };
        let mut changes: Commit = vec![self.repair_row(scope, node, wanted)];
        for mut row in rows {
            row.step += 1;
            match usize::try_from(row.step).ok().and_then(|step| AFTER.get(step)) {
                Some(pause) => {
                    row.due_at = self.env.wall() + *pause;
                    changes.push(Change::PutSuspect(row));
                }
                None => changes.push(Change::RemoveSuspects(vec![row.id])),
            }
        }
        self.commit_or_retry(scope, vec![node], changes).await;
    }
}

/// Compares suspects when their time comes, for as long as the process lives.
pub async fn keep_suspects(core: Arc<Core>) {
    loop {
        core.env.sleep(TICK).await;
        if core.log.is_available() {
            core.forget_moot_suspects().await;
            for (scope, node, rows) in core.due_suspects() {
                core.compare_suspects(&scope, node, rows).await;
            }
        }
    }
}
