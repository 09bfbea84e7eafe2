//! Checkpoints: every node says itself, and the journal remembers, up to where it has everything.
//!
//! A node that comes back with an older one was restored from a backup, and what it may have lost in a power failure is
//! found among the intents above its checkpoint (design.md 9). Intents that every node's checkpoint covers are dropped.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::{Core, Scope};
use crate::chroma::Generation;
use crate::cluster::NodeIndex;
use crate::env::within;
use crate::fault;
use crate::journal::{Change, Lsn, NodeRecord, RepairKind};

const PAUSE: Duration = Duration::from_secs(1);
const WRITE_LIMIT: Duration = Duration::from_secs(60);
/// A side of the intents that is done with is emptied one call after it was left.
const ROTATE_PAUSE: Duration = Duration::from_secs(20);

impl Core {
    /// Nothing is open between the node and any lane, but comparisons that wait for a person: what the node has there
    /// does not change before he decides, which can take weeks, and the rows outlive them. The cost is that of the lanes that are open (see `admin::state`).
    fn has_everything(&self, node: NodeIndex) -> bool {
        let name = &self.cluster.node(node).name;
        let mut repaired = true;
        let mut undecided: BTreeMap<Option<Generation>, u64> = BTreeMap::new();
        for row in self.repairs.lock().iter().filter(|row| row.node == *name) {
            match row.kind == RepairKind::Verify && row.parked.is_some() {
                true => *undecided.entry(row.generation).or_default() += 1,
                false => repaired = false,
            }
        }
        let open = |scope: Scope| {
            let waiting = undecided.get(&scope.generation()).copied().unwrap_or(0);
            !scope.pairs(self)[node].settled_but_for(waiting)
        };
        let behind: Vec<_> = self
            .behind
            .lock()
            .range((node, None)..(node + 1, None))
            .map(|(_, key)| *key)
            .collect();
        repaired
            && self.cluster.node(node).stragglers() == 0
            && !behind
                .into_iter()
                .filter_map(|key| match key {
                    None => Some(Scope::Namespace),
                    Some(generation) => self.catalog.by_generation(generation).map(Scope::Collection),
                })
                .any(open)
    }

    /// Writes one checkpoint, if there is something new to say and it is true.
    ///
    /// The order matters. The connection that is held is taken first: it is the process that is asked to write. Then
    /// the mark: what is at or below it is applied on every node, or covered by a row that was counted before the mark
    /// got there (rule R3). Then it is looked whether rows are left: if none is, the node has all of it. It is written
    /// on the node before the journal remembers it, so that what is remembered is never ahead of the node.
    async fn checkpoint(self: &Arc<Self>, node: NodeIndex) -> Result<(), String> {
        let member = self.cluster.node(node);
        let Some(held) = member.held().filter(|_| member.is_up() && member.is_verified()) else {
            return Ok(());
        };
        let mark = self.log.stored_low_water();
        let Some(marker) = member.marker() else { return Ok(()) };
        if member.checkpoint().is_some_and(|last| last >= mark)
            || !self.has_everything(node)
            || !self.log.is_available()
        {
            return Ok(());
        }
        let Some(_under_way) = member.begin() else {
            return Ok(());
        };
        let written = within(&self.env, WRITE_LIMIT, member.write_checkpoint_over(&*held, mark));
        written
            .await
            .unwrap_or_else(|| Err("the checkpoint was not written in time".to_owned()))?;
        fault::point("checkpoint-written");
        self.remember_checkpoint(node, marker, mark).await;
        Ok(())
    }

    /// A checkpoint that was overtaken by a new marker is not remembered.
    async fn remember_checkpoint(self: &Arc<Self>, node: NodeIndex, marker: String, mark: Lsn) {
        let _one_at_a_time = self.remembering.lock().await;
        let member = self.cluster.node(node);
        if member.marker().as_ref() != Some(&marker) || member.checkpoint().is_some_and(|last| last >= mark) {
            return;
        }
        let changes = vec![Change::PutNode(NodeRecord {
            node: member.name.clone(),
            marker,
            checkpoint: mark,
        })];
        if self.log.commit(&changes).await.is_ok() {
            self.apply(&changes);
        }
    }
}

/// Keeps a node's checkpoint close behind what is written, for as long as the process lives.
pub async fn keep_checkpoints(core: Arc<Core>, node: NodeIndex) {
    loop {
        core.env.sleep(PAUSE).await;
        if let Err(reason) = core.checkpoint(node).await {
            tracing::warn!(node = core.cluster.node(node).name, reason, "No checkpoint.");
            // A `reset` takes it away and writes it again before it lets go of the namespace.
            let _alone = core.exclusive_namespace().await;
            core.marker_is_unchanged(node).await;
        }
    }
}

/// Drops intents that no node will ever be compared by, for as long as the process lives.
pub async fn keep_intents(core: Arc<Core>) {
    loop {
        core.env.sleep(ROTATE_PAUSE).await;
        let covered = core.cluster.nodes().iter().map(|node| node.checkpoint().unwrap_or(0));
        // Checkpoints may be beyond a journal that was restored; what it has not recovered stays.
        let covered = covered.min().unwrap_or(0).min(core.log.stored_low_water());
        if core.log.is_available()
            && let Err(error) = core.log.journal().rotate_intents(core.log.term(), covered).await
        {
            tracing::warn!(%error, "Intents could not be dropped.");
        }
    }
}
