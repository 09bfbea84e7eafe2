//! What is under way at a node, and an end to it: in maintenance nothing is sent there (design.md 9).
//!
//! A request counts before it looks whether it may go: whoever closes the gate and then sees that nothing counts knows
//! that nothing comes after.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use async_trait::async_trait;

use super::client::{Held, NodeClient, NodeRequest, NodeResponse, SendError, StreamedResponse};

/// Open or closed, and how much is inside.
#[derive(Debug, Default)]
pub(super) struct Gate {
    closed: AtomicBool,
    inside: AtomicUsize,
}

/// Counts as long as it lives.
pub(super) struct Inside(Arc<Gate>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Gate {
    pub(super) fn close(&self, closed: bool) {
        self.closed.store(closed, Ordering::SeqCst);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    pub(super) fn inside(&self) -> usize {
        self.inside.load(Ordering::SeqCst)
    }

    /// `None`: it is closed.
    pub(super) fn enter(self: &Arc<Self>) -> Option<Inside> {
        self.inside.fetch_add(1, Ordering::SeqCst);
        let inside = Inside(self.clone());
        (!self.is_closed()).then_some(inside)
    }

    fn pass(self: &Arc<Self>) -> Result<Inside, SendError> {
        self.enter()
            .ok_or_else(|| SendError::Local("the node is in maintenance".to_owned()))
    }
}

/// A node's client behind its gate. Connections that are held are not behind it: probes go over them.
pub(super) struct Gated {
    pub client: Arc<dyn NodeClient>,
    pub gate: Arc<Gate>,
}

#[async_trait]
impl NodeClient for Gated {
    async fn hold(&self) -> Result<Arc<dyn Held>, SendError> {
        self.client.hold().await
    }

    fn renew(&self) {
        self.client.renew();
    }

    /// Counts until the head of the answer is there; a read counts for itself until its end.
    async fn open(&self, request: NodeRequest) -> Result<StreamedResponse, SendError> {
        let _inside = self.gate.pass()?;
        self.client.open(request).await
    }

    async fn send(&self, request: NodeRequest) -> Result<NodeResponse, SendError> {
        let _inside = self.gate.pass()?;
        self.client.send(request).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_inside_counts_and_a_closed_gate_lets_nothing_in() {
        let gate = Arc::new(Gate::default());
        let first = gate.enter();
        assert!(first.is_some());
        assert_eq!(gate.inside(), 1);
        gate.close(true);
        assert!(gate.enter().is_none());
        assert_eq!(gate.inside(), 1, "what was refused does not count");
        drop(first);
        assert_eq!(gate.inside(), 0);
        gate.close(false);
        assert!(gate.enter().is_some());
    }
}
