//! Late answers: a straggler's 2xx settles its own row, so that the entry is not applied twice.

use std::sync::Arc;

use super::cover::RowRef;
use super::fan_out::{NodeAnswer, Stragglers};
use super::{Agreement, Core, Outcome, Scope};
use crate::chroma::Op;
use crate::cluster::NodeIndex;
use crate::fault;
use crate::journal::Change;

/// A request that nobody waits for any more: nothing else goes to its node in its lane while this lives.
pub(crate) struct Straggler {
    core: Arc<Core>,
    scope: Scope,
    node: NodeIndex,
}

impl Drop for Straggler {
    fn drop(&mut self) {
        self.scope.pairs(&self.core)[self.node].straggler_ended();
        self.core.cluster.node(self.node).straggler_ended();
        self.core.cluster.announce_change();
    }
}

impl Core {
    /// Counts a straggler from now on.
    pub(crate) fn straggler(self: &Arc<Self>, scope: &Scope, node: NodeIndex) -> Straggler {
        scope.pairs(self)[node].straggler_started();
        self.cluster.node(node).straggler_started();
        Straggler {
            core: self.clone(),
            scope: scope.clone(),
            node,
        }
    }

    /// Waits for the nodes that have not answered an entry, for as long as their connections live. Until then nothing
    /// else is sent to them for this lane; what they miss meanwhile is in the log.
    pub(super) fn await_stragglers(self: &Arc<Self>, scope: &Scope, mut stragglers: Stragglers, rows: Vec<RowRef>) {
        let (core, scope) = (self.clone(), scope.clone());
        self.env.spawn(Box::pin(async move {
            while let Some((node, answer)) = stragglers.answers.recv().await {
                if let Some(position) = stragglers.nodes.iter().position(|&silent| silent == node) {
                    stragglers.nodes.remove(position);
                    let row = rows.iter().find(|row| row.node == node).copied();
                    core.settle(&scope, node, &answer, row).await;
                }
            }
            // A job that ended without an answer: its connection is gone; the drain begins with a canary.
            for node in stragglers.nodes {
                scope.pairs(&core)[node].require_fence();
                scope.pairs(&core)[node].straggler_ended();
                core.cluster.node(node).straggler_ended();
            }
            core.cluster.announce_change();
        }));
    }

    async fn settle(self: &Arc<Self>, scope: &Scope, node: NodeIndex, answer: &NodeAnswer, row: Option<RowRef>) {
        let _alone = self.exclusive_of(scope).await;
        let pair = &scope.pairs(self)[node];
        tracing::debug!(node = self.cluster.node(node).name, outcome = ?answer.outcome, "A late answer arrived.");
        if let (Outcome::Applied, Some(row), 0) = (&answer.outcome, row, pair.uncertain())
            // A reset or a delete may have taken the row meanwhile. What another node has refused is for the drain to
            // compare: it applies it once more.
            && let Ok(Some(stored)) = self.log.journal().payload(row.id).await
            && !stored.refused
            && self.agreement(row.lsn, true) != Agreement::Disagrees
        {
            fault::point("late-answer");
            self.compare_outcome(row.lsn, true);
            let mut changes = vec![Change::RemovePayloads(vec![row.id])];
            changes.extend(row.suspect.map(|id| Change::RemoveSuspects(vec![id])));
            if self.log.commit(&changes).await.is_ok() {
                self.apply(&changes);
                pair.remove_pending(1, row.bytes, None);
            }
        }
        if matches!(answer.outcome, Outcome::Unknown(_)) {
            pair.require_fence();
        }
        pair.straggler_ended();
        self.cluster.node(node).straggler_ended();
        self.cluster.announce_change();
    }
}

/// Kinds whose late success needs more than forgetting the row, so that the drain looks at them instead.
pub(super) fn settles_by_itself(op: &Op) -> bool {
    !matches!(op, Op::CreateCollection { .. } | Op::Reset | Op::Other { .. })
}
