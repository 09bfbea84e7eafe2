//! Where one node stands in one lane: the in-memory shadow of its rows in the journal.
//!
//! A node serves a lane (a collection, or the namespace) only while nothing is open between them (design.md R1). The
//! counts follow the journal: they go up before the ack that needs it and down after the commit that removed the rows.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

use parking_lot::Mutex;

/// So many records are followed that are written during a copy.
pub const MOST_TOUCHED: usize = 200_000;

/// Records that were written to a lane while one node is being copied to without the lane.
#[derive(Debug, Default)]
pub struct Touched {
    pub ids: BTreeSet<String>,
    /// There were more, or it could not be told which.
    pub overflowed: bool,
    most: usize,
}

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
    /// Of those, the ones that replace the lane on this node: its payload rows wait for them.
    copies: AtomicU64,
    /// What became of some entries is not known since the last start: nobody serves before it is (design.md 6).
    recovering: AtomicBool,
    /// Requests the node has not answered yet, though the client was.
    stragglers: AtomicU64,
    /// Commits that speak of this pair and may or may not have happened (schedule S31).
    uncertain: AtomicU64,
    /// A request of the drain broke: before the next one a canary has to return, whatever the rows say.
    needs_fence: AtomicBool,
    /// Repair rows there ever were: a repair changes a node behind the back of whoever copies from it.
    disturbances: AtomicU64,
    /// The log has no room for more of what the node misses.
    over_limit: AtomicBool,
    /// What the node misses while it is being copied to; absent when it is not.
    touched: Mutex<Option<Touched>>,
}

impl Pair {
    /// In sync: every entry of the lane is applied on the node, and that is a committed fact.
    pub fn in_sync(&self) -> bool {
        self.settled() && !self.recovering()
    }

    /// Nothing is open but what recovery has to find out.
    pub fn settled(&self) -> bool {
        self.settled_but_for(0)
    }

    /// [`Pair::settled`], leaving out so many repair rows.
    pub fn settled_but_for(&self, repairs: u64) -> bool {
        self.pending() == 0 && self.repairs() <= repairs && self.stragglers() == 0 && self.uncertain() == 0
    }

    /// Together with its payload rows the node holds everything: draining is all it takes (design.md 6).
    pub fn completes_by_drain(&self) -> bool {
        self.repairs() == 0 && self.parked() == 0
    }

    /// Nothing that takes long stands between the node and the lane: a drain, some records to compare, or recovery.
    pub fn is_nearly_in_sync(&self) -> bool {
        self.copies() == 0 && self.parked() == 0
    }

    /// The drain may send to the node.
    pub fn drainable(&self) -> bool {
        self.pending() > 0
            && self.copies() == 0
            && self.parked() == 0
            && self.stragglers() == 0
            && self.uncertain() == 0
    }

    /// The log has no room for more of what the node misses.
    pub fn is_over_limit(&self) -> bool {
        self.over_limit.load(Ordering::SeqCst) && self.pending() > 0
    }

    pub fn set_over_limit(&self, over: bool) {
        self.over_limit.store(over, Ordering::SeqCst);
    }

    pub fn recovering(&self) -> bool {
        self.recovering.load(Ordering::SeqCst)
    }

    pub fn set_recovering(&self, recovering: bool) {
        self.recovering.store(recovering, Ordering::SeqCst);
    }

    /// Open repair rows that replace the lane on this node.
    pub fn copies(&self) -> u64 {
        self.copies.load(Ordering::SeqCst)
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
        let before = self.pending.fetch_add(rows, Ordering::SeqCst);
        if before == 0 || self.oldest.load(Ordering::SeqCst) == 0 {
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

    /// Rows were applied and removed, the last of them written at `at`. One goes on counting until [`Pair::drained`]: the
    /// node joins the lane between two writes, not while one is under way that it was not sent.
    pub fn remove_applied(&self, rows: u64, bytes: u64, at: i64) {
        saturating_sub(&self.pending_bytes, bytes);
        let left = |pending: u64| pending.saturating_sub(rows).max(pending.min(1));
        let before = self
            .pending
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |pending| Some(left(pending)));
        let none_left = before.is_ok_and(|before| before <= rows);
        self.oldest.store(if none_left { 0 } else { at }, Ordering::SeqCst);
    }

    /// No payload row is left. Said while the lane is held.
    pub fn drained(&self) {
        self.pending.store(0, Ordering::SeqCst);
        self.pending_bytes.store(0, Ordering::SeqCst);
        self.set_over_limit(false);
    }

    /// The lane's rows are all gone: its collection was deleted.
    pub fn clear_rows(&self) {
        for count in [
            &self.pending,
            &self.pending_bytes,
            &self.repairs,
            &self.copies,
            &self.parked,
        ] {
            count.store(0, Ordering::SeqCst);
        }
        self.set_over_limit(false);
    }

    /// Repair rows there ever were.
    pub fn disturbances(&self) -> u64 {
        self.disturbances.load(Ordering::SeqCst)
    }

    /// From here on it is remembered which records the node misses. Begun while holding the lane.
    pub fn start_tracking(&self, most: usize) {
        *self.touched.lock() = Some(Touched {
            most,
            ..Touched::default()
        });
    }

    pub fn stop_tracking(&self) {
        *self.touched.lock() = None;
    }

    /// The node misses an entry about these records; `None`: it is not known which.
    pub fn touch(&self, ids: Option<&[String]>) {
        if let Some(touched) = self.touched.lock().as_mut().filter(|touched| !touched.overflowed) {
            match ids {
                Some(ids) => touched.ids.extend(ids.iter().cloned()),
                None => touched.overflowed = true,
            }
            if touched.overflowed || touched.ids.len() > touched.most {
                touched.overflowed = true;
                touched.ids.clear();
            }
        }
    }

    /// What was remembered since the last time; goes on remembering.
    pub fn take_touched(&self) -> Touched {
        let mut tracked = self.touched.lock();
        let Some(touched) = tracked.as_mut() else {
            return Touched::default();
        };
        let most = touched.most;
        std::mem::replace(
            touched,
            Touched {
                most,
                ..Touched::default()
            },
        )
    }

    /// How many records are remembered.
    pub fn touched(&self) -> usize {
        self.touched.lock().as_ref().map_or(0, |touched| touched.ids.len())
    }

    /// `copy`: it replaces the lane on this node.
    pub fn add_repair(&self, copy: bool) {
        self.disturbances.fetch_add(1, Ordering::SeqCst);
        self.copies.fetch_add(u64::from(copy), Ordering::SeqCst);
        self.repairs.fetch_add(1, Ordering::SeqCst);
    }

    pub fn remove_repair(&self, copy: bool) {
        saturating_sub(&self.repairs, 1);
        saturating_sub(&self.copies, u64::from(copy));
    }

    pub fn remove_parked(&self, rows: u64) {
        saturating_sub(&self.parked, rows);
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
