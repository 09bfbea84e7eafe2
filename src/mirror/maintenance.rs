//! Maintenance: an operator takes a node out of service and back (design.md 9).
//!
//! While it is out nothing is read from it or sent to it, and what it misses is logged as if it were down. That is
//! durable: a proxy that starts anew leaves it alone. A node is only taken out while another one serves every collection
//! and the names, and while the log answers. Back in service it is admitted like a node whose process may be another one:
//! it may have been restarted, restored or emptied meanwhile.

use std::sync::Arc;
use std::time::Duration;

use super::Core;
use crate::cluster::NodeIndex;
use crate::env::within;
use crate::events::Kind;
use crate::journal::{Change, MaintenanceRecord};

/// How long one request waits for what is under way at the node.
const QUIET_LIMIT: Duration = Duration::from_secs(60);
const QUIET_PAUSE: Duration = Duration::from_millis(10);
/// After which it is tried again to have the journal forget that a node was to be taken out.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Why a node stays in service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StaysIn {
    /// Something could not be served without it; that may pass.
    Needed(String),
    /// The log does not answer.
    NoLog,
}

impl Core {
    /// Takes a node out, and waits a while for what is under way there: `Ok(0)`, it is left alone. Waits up to `patience`
    /// for other nodes to be able to serve everything.
    ///
    /// # Errors
    /// Why it stays in.
    pub async fn take_out(self: &Arc<Self>, node: NodeIndex, who: &str, patience: Duration) -> Result<usize, StaysIn> {
        let member = self.cluster.node(node);
        {
            // Two nodes that are taken out at once must not each rely on the other.
            let _one_at_a_time = self.maintaining.lock().await;
            if !member.is_in_maintenance() {
                let needed = within(&self.env, patience, self.until_dispensable(node)).await;
                self.needed(node).filter(|_| needed.is_none()).map_or(Ok(()), Err)?;
                let record = MaintenanceRecord {
                    node: member.name.clone(),
                    since: self.env.wall(),
                    who: who.to_owned(),
                };
                let changes = vec![Change::PutMaintenance(record.clone())];
                let taken = self.log.commit_until_known(&changes).await;
                let reason = if taken { self.needed(node) } else { Some(StaysIn::NoLog) };
                if let Some(reason) = reason {
                    self.stay_in(node);
                    return Err(reason);
                }
                self.cluster.set_maintenance(node, Some(record));
                let what = "it was taken out of service";
                self.events()
                    .record(Kind::Maintenance, Some(&member.name), Some(who), what);
                tracing::warn!(node = member.name, who, "The node is in maintenance.");
            }
        }
        let quiet = within(&self.env, QUIET_LIMIT, async {
            // An admission under way writes to it; the next one is refused.
            drop(self.admitting.lock().await);
            while member.in_flight() > 0 {
                self.env.sleep(QUIET_PAUSE).await;
            }
        });
        quiet.await;
        Ok(member.in_flight())
    }

    /// The journal may have it that the node is out, and it is not: a proxy that starts anew would leave it alone, and it
    /// may be the last one that serves.
    fn stay_in(self: &Arc<Self>, node: NodeIndex) {
        let core = self.clone();
        self.spawn_job(async move {
            let member = core.cluster.node(node);
            let name = member.name.clone();
            let changes = vec![Change::EndMaintenance { node: name }];
            loop {
                {
                    // It may be taken out again meanwhile: then that counts.
                    let _one_at_a_time = core.maintaining.lock().await;
                    if member.is_in_maintenance() || core.log.is_fenced() || core.log.commit_until_known(&changes).await
                    {
                        return;
                    }
                }
                core.env.sleep(RETRY_PAUSE).await;
            }
        });
    }

    /// Takes a node back into service: it is probed, admitted and drained as if it had been down. Returns whether it was
    /// out.
    ///
    /// # Errors
    /// The log does not answer: the node stays out.
    pub async fn take_back(self: &Arc<Self>, node: NodeIndex, who: &str) -> Result<bool, StaysIn> {
        let _one_at_a_time = self.maintaining.lock().await;
        let member = self.cluster.node(node);
        if !member.is_in_maintenance() {
            return Ok(false);
        }
        let name = member.name.clone();
        let changes = vec![Change::EndMaintenance { node: name }];
        if !self.log.commit_until_known(&changes).await {
            return Err(StaysIn::NoLog);
        }
        self.cluster.set_maintenance(node, None);
        self.events().record(
            Kind::Ready,
            Some(&member.name),
            Some(who),
            "it was taken back into service",
        );
        tracing::warn!(node = member.name, who, "The node is taken back from maintenance.");
        Ok(true)
    }

    async fn until_dispensable(&self, node: NodeIndex) {
        let mut changes = self.cluster.watch_changes();
        loop {
            changes.mark_unchanged();
            if self.needed(node).is_none() {
                return;
            }
            // Not every change is told: the log may answer again.
            let _ = within(&self.env, Duration::from_secs(1), changes.changed()).await;
        }
    }

    /// What could not be served without this node.
    fn needed(&self, node: NodeIndex) -> Option<StaysIn> {
        if !self.log.is_available() {
            return Some(StaysIn::NoLog);
        }
        let others: Vec<NodeIndex> = self.cluster.up().filter(|&other| other != node).collect();
        if others.is_empty() {
            return Some(StaysIn::Needed("no other node is up".to_owned()));
        }
        if !others.iter().any(|&other| self.namespace.pairs[other].in_sync()) {
            return Some(StaysIn::Needed("no other node is in step with the names".to_owned()));
        }
        let all = self.catalog.all();
        let mut missing = all
            .iter()
            .filter(|one| !one.is_deleted() && !others.iter().any(|&other| one.in_sync(other)));
        let first = missing.next()?.facts().name.clone();
        let reason = match missing.count() {
            0 => format!("no other node is in step with the collection {first}"),
            more => format!("no other node is in step with the collection {first}, and so with {more} more"),
        };
        Some(StaysIn::Needed(reason))
    }
}
