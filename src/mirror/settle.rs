//! Late answers: a straggler's 2xx settles its own row, so that the entry is not applied twice.

use std::sync::Arc;

use super::cover::RowRef;
use super::fan_out::{NodeAnswer, Stragglers};
use super::{Core, Outcome, Scope};
use crate::chroma::Op;
use crate::cluster::NodeIndex;
use crate::journal::Change;

impl Core {
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
                scope.pairs(&core)[node].straggler_ended();
                core.cluster.node(node).straggler_ended();
            }
            core.cluster.announce_change();
        }));
    }

    async fn settle(self: &Arc<Self>, scope: &Scope, node: NodeIndex, answer: &NodeAnswer, row: Option<RowRef>) {
        let _alone = self.exclusive_of(scope).await;
        let pair = &scope.pairs(self)[node];
        tracing::info!(node = self.cluster.node(node).name, outcome = ?answer.outcome, "A late answer arrived.");
        if let (Outcome::Applied, Some(row), 0) = (&answer.outcome, row, pair.uncertain())
            && self
                .log
                .commit(&vec![Change::RemovePayloads(vec![row.id])])
                .await
                .is_ok()
        {
            pair.remove_pending(1, row.bytes, None);
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
