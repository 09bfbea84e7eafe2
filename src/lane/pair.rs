//! Where one node stands in one lane: the in-memory shadow of its rows in the journal.
//!
//! A node serves a lane (a collection, or the namespace) only while nothing is open between them (design.md R1). The
//! counts follow the journal: they go up before the ack that needs it and down after the commit that removed the rows.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

/// The open matters between one node and one lane.
#[derive(Debug, Default)]
pub struct Pair {
    /// Payload rows: entries the node missed.
    pending: AtomicU64,
    pending_bytes: AtomicU64,
    /// When the first of them was written, in Unix microseconds; 0 when there is none.
    oldest: AtomicI64,
    /// Of those, parked.
    parked: AtomicU64,
    /// Open repair rows.
    repairs: AtomicU64,
    /// Requests the node has not answered yet, though the client was.
    stragglers: AtomicU64,
    /// Commits that speak of this pair and may or may not have happened (schedule S31).
    uncertain: AtomicU64,
    /// A request of the drain broke: before the next one a canary has to return, whatever the rows say.
    needs_fence: AtomicBool,
}

impl Pair {
    /// In sync: every entry of the lane is applied on the node, and that is a committed fact.
    pub fn in_sync(&self) -> bool {
        self.pending() == 0 && self.repairs() == 0 && self.stragglers() == 0 && self.uncertain() == 0
    }

    /// Together with its payload rows the node holds everything: draining is all it takes (design.md 6).
    pub fn completes_by_drain(&self) -> bool {
        self.repairs() == 0 && self.parked() == 0
    }

    /// The drain may send to the node.
    pub fn drainable(&self) -> bool {
        self.pending() > 0 && self.completes_by_drain() && self.stragglers() == 0 && self.uncertain() == 0
    }

    pub fn require_fence(&self) {
        self.needs_fence.store(true, Ordering::SeqCst);
    }

    pub fn needs_fence(&self) -> bool {
        self.needs_fence.load(Ordering::SeqCst)
    }

    pub fn fenced(&self) {
        self.needs_fence.store(false, Ordering::SeqCst);
    }

    pub fn pending(&self) -> u64 {
        self.pending.load(Ordering::SeqCst)
    }

    pub fn pending_bytes(&self) -> u64 {
        self.pending_bytes.load(Ordering::SeqCst)
    }

    pub fn repairs(&self) -> u64 {
        self.repairs.load(Ordering::SeqCst)
    }

    pub fn stragglers(&self) -> u64 {
        self.stragglers.load(Ordering::SeqCst)
    }

    pub fn uncertain(&self) -> u64 {
        self.uncertain.load(Ordering::SeqCst)
    }

    pub fn parked(&self) -> u64 {
        self.parked.load(Ordering::SeqCst)
    }

    /// Unix microseconds of the oldest payload row.
    pub fn oldest(&self) -> Option<i64> {
        Some(self.oldest.load(Ordering::SeqCst)).filter(|&at| at != 0 && self.pending() > 0)
    }

    pub fn add_pending(&self, rows: u64, bytes: u64, at: i64) {
        if self.pending.fetch_add(rows, Ordering::SeqCst) == 0 {
            self.oldest.store(at, Ordering::SeqCst);
        }
        self.pending_bytes.fetch_add(bytes, Ordering::SeqCst);
    }

    /// Rows were removed; `oldest` is the time of the first that remains, where it is known.
    pub fn remove_pending(&self, rows: u64, bytes: u64, oldest: Option<i64>) {
        saturating_sub(&self.pending_bytes, bytes);
        saturating_sub(&self.pending, rows);
        if let Some(at) = oldest {
            self.oldest.store(at, Ordering::SeqCst);
        }
    }

    /// No payload row is left.
    pub fn drained(&self) {
        self.pending.store(0, Ordering::SeqCst);
        self.pending_bytes.store(0, Ordering::SeqCst);
    }

    /// The lane's rows are all gone: its collection was deleted.
    pub fn clear_rows(&self) {
        for count in [&self.pending, &self.pending_bytes, &self.repairs, &self.parked] {
            count.store(0, Ordering::SeqCst);
        }
    }

    pub fn add_repair(&self) {
        self.repairs.fetch_add(1, Ordering::SeqCst);
    }

    pub fn add_parked(&self, rows: u64) {
        self.parked.fetch_add(rows, Ordering::SeqCst);
    }

    pub fn straggler_started(&self) {
        self.stragglers.fetch_add(1, Ordering::SeqCst);
    }

    pub fn straggler_ended(&self) {
        saturating_sub(&self.stragglers, 1);
    }

    pub fn uncertain_started(&self) {
        self.uncertain.fetch_add(1, Ordering::SeqCst);
    }

    pub fn uncertain_ended(&self) {
        saturating_sub(&self.uncertain, 1);
    }
}

fn saturating_sub(count: &AtomicU64, by: u64) {
    let _ = count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |value| {
        Some(value.saturating_sub(by))
    });
}
