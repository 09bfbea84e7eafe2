//! Writes while the journal is away (design.md 5, `wal.when_unavailable: mirror`).
//!
//! As long as every node takes a write, both have it and nothing has to be kept for anyone. What cannot be covered is a
//! crash in between: a write that one node has and the other missed, known to nobody (schedule S19). So before the
//! first write that is sent without an intent, a flag is set durably on every node. The records written since are
//! remembered here. Once the journal is back they are compared, and when that is done, the flag is cleared. A flag that
//! is found at a start means that nobody knows which records: everything is compared.
//!
//! Each of these orders is one that a crash must not be able to turn around:
//! - flag on all nodes, then records remembered, then the write is sent;
//! - repair rows durable, then the records forgotten; rows carried out, then the flag cleared.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::cover::RepairWanted;
use super::{Answer, Core};
use crate::catalog::Collection;
use crate::chroma::{Generation, Op};
use crate::cluster::NodeIndex;
use crate::config::WhenUnavailable;
use crate::env::within;
use crate::fault;
use crate::journal::{Change, Commit, Hold, Intent};

/// How long a node may take to write, read or clear the flag.
const FLAG_LIMIT: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_secs(1);
/// Of one collection, this many records are remembered; beyond it, all of it is compared.
const MOST_IDS: usize = 10_000;
/// Of all collections together.
const MOST_IN_ALL: usize = 200_000;

const REASON: &str = "it was written while the log was away";

/// What was written to a collection without cover.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Written {
    Records(BTreeSet<String>),
    /// Too many to remember, or nobody knows which.
    All,
}

#[derive(Debug, Default)]
struct State {
    /// Every node carries the flag: writes may be sent.
    flagged: bool,
    /// Some node may carry it: it is to be cleared when nothing is left to compare.
    to_clear: bool,
    /// Not compared yet, and not in a repair row.
    written: BTreeMap<Generation, Written>,
    remembered: usize,
    /// Repair rows are durable; when none of these is left, all is compared.
    comparing: BTreeSet<Generation>,
    /// Nodes that carried no flag from before our start, or whose flag is taken note of.
    looked: BTreeSet<NodeIndex>,
    /// When the time without protection began, and how long it was before.
    since: Option<Duration>,
    total: Duration,
}

impl State {
    fn note(&mut self, generation: Generation, ids: &[String]) {
        let room = MOST_IN_ALL.saturating_sub(self.remembered);
        let written = self
            .written
            .entry(generation)
            .or_insert_with(|| Written::Records(BTreeSet::new()));
        let Written::Records(known) = written else { return };
        let before = known.len();
        known.extend(ids.iter().cloned());
        let after = known.len();
        if after > MOST_IDS || after - before > room {
            self.remembered -= before;
            *written = Written::All;
        } else {
            self.remembered += after - before;
        }
    }

    fn forget(&mut self, generation: Generation) {
        if let Some(Written::Records(ids)) = self.written.remove(&generation) {
            self.remembered -= ids.len();
        }
    }

    fn begin(&mut self, now: Duration) {
        self.to_clear = true;
        self.since.get_or_insert(now);
    }

    fn end(&mut self, now: Duration) {
        if let Some(since) = self.since.take() {
            self.total += now.saturating_sub(since);
        }
    }
}

/// What was sent without cover, and how far it is compared.
#[derive(Debug, Default)]
pub struct Unprotected {
    state: Mutex<State>,
    /// Held while flags are set or cleared.
    flagging: tokio::sync::Mutex<()>,
}

impl Unprotected {
    /// Notes records that are about to be written. False: the flag is not on every node.
    fn note(&self, generation: Generation, ids: &[String]) -> bool {
        let mut state = self.state.lock();
        if state.flagged {
            state.note(generation, ids);
        }
        state.flagged
    }

    /// Time since the process started in which writes that nobody had logged were not compared yet.
    pub fn time(&self, now: Duration) -> Duration {
        let state = self.state.lock();
        let open = state.since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
        state.total + open
    }

    /// Whether such writes may be there now.
    pub fn is_open(&self) -> bool {
        self.state.lock().since.is_some()
    }
}

impl Core {
    /// What a write is answered that may not be sent while the log is away.
    pub(super) fn refused_without_log(&self) -> Option<Answer> {
        let refused = !self.log.is_available() && self.settings.when_unavailable == WhenUnavailable::Refuse;
        let reason = "The log does not answer, and writes are refused then (wal.when_unavailable).";
        refused.then(|| Answer::unavailable(reason))
    }

    /// Right before a write is sent, and right before it is acknowledged: whether this proxy is still the one that writes.
    /// With the log away for longer than the lease nobody knows; then writes of records go on if the configuration says
    /// so, because there is one proxy then (design.md 5).
    pub(crate) async fn may_write(&self, op: &Op) -> bool {
        let records = matches!(op, Op::Add | Op::Upsert | Op::Update | Op::Delete);
        match self.log.hold().await {
            Hold::Ours => true,
            Hold::Lost => false,
            Hold::Unknown => records && self.settings.when_unavailable == WhenUnavailable::Mirror,
        }
    }

    /// Before a write that is sent without an intent, in its lane: every node carries the flag, and the records are
    /// remembered.
    pub(super) async fn unprotected_begin(
        self: &Arc<Self>,
        collection: &Collection,
        ids: &[String],
    ) -> Result<(), Answer> {
        if let Some(refused) = self.refused_without_log() {
            return Err(refused);
        }
        if self.unprotected.note(collection.generation, ids) {
            return Ok(());
        }
        if self.log.is_fenced() {
            return Err(Answer::replaced());
        }
        let _one_at_a_time = self.unprotected.flagging.lock().await;
        if self.unprotected.note(collection.generation, ids) {
            return Ok(());
        }
        self.unprotected.state.lock().begin(self.env.now());
        for node in 0..self.cluster.len() {
            if let Err(reason) = self.flag(node).await {
                let name = &self.cluster.node(node).name;
                tracing::warn!(node = name, reason, "The node could not be told that the log is away.");
                return Err(Answer::unavailable(
                    "The log does not answer, and a node could not be told so: the write was not begun.",
                ));
            }
        }
        tracing::warn!("The log is away: writes go on without cover while all nodes take them.");
        let mut state = self.unprotected.state.lock();
        state.flagged = true;
        state.note(collection.generation, ids);
        Ok(())
    }

    /// Sets the flag on a node, which was looked at before: ours would hide one from before our start.
    async fn flag(&self, node: NodeIndex) -> Result<(), String> {
        self.look(node).await?;
        let set = within(&self.env, FLAG_LIMIT, self.cluster.node(node).set_flag()).await;
        set.unwrap_or_else(|| Err("no answer in time".to_owned()))?;
        fault::point("flag-set");
        Ok(())
    }

    /// Whether a node carries a flag from before our start; asked once. The caller holds `flagging`.
    async fn look(&self, node: NodeIndex) -> Result<(), String> {
        if self.unprotected.state.lock().looked.contains(&node) {
            return Ok(());
        }
        let member = self.cluster.node(node);
        let found = within(&self.env, FLAG_LIMIT, member.has_flag()).await;
        if found.unwrap_or_else(|| Err("no answer in time".to_owned()))? {
            tracing::warn!(
                node = member.name,
                "It was written to without the log: all is compared."
            );
            self.compare_all();
        }
        self.unprotected.state.lock().looked.insert(node);
        Ok(())
    }

    async fn look_for_flags(self: &Arc<Self>) {
        for node in self.cluster.up().collect::<Vec<_>>() {
            let _one_at_a_time = self.unprotected.flagging.lock().await;
            if let Err(reason) = self.look(node).await {
                let name = &self.cluster.node(node).name;
                tracing::warn!(node = name, reason, "Could not look for the flag.");
            }
        }
    }

    fn compare_all(&self) {
        let mut state = self.unprotected.state.lock();
        state.begin(self.env.now());
        let living = self.catalog.all().into_iter().filter(|one| !one.is_deleted());
        for collection in living {
            state.forget(collection.generation);
            state.written.insert(collection.generation, Written::All);
        }
    }

    /// Writes the repair rows for one collection, in its lane. The first usable node is the source: every acknowledged
    /// write is on all nodes, so any of them would do.
    async fn compare_unprotected(self: &Arc<Self>, generation: Generation) {
        let collection = self.catalog.by_generation(generation).filter(|one| !one.is_deleted());
        let Some(collection) = collection else {
            self.unprotected.state.lock().forget(generation);
            return;
        };
        if self.usable(&collection).is_empty() {
            return;
        }
        let _alone = self.exclusive(&collection).await;
        if collection.is_deleted() {
            return;
        }
        let written = self.unprotected.state.lock().written.get(&generation).cloned();
        let (Some(written), Some(&source)) = (written, self.usable(&collection).first()) else {
            return;
        };
        let ids = match written {
            Written::Records(ids) => Some(ids.into_iter().collect::<Vec<_>>()),
            Written::All => None,
        };
        let lsn = self.log.begin();
        let others = (0..self.cluster.len()).filter(|&node| node != source);
        let mut changes: Commit = others
            .map(|node| {
                let wanted = RepairWanted {
                    source: Some(source),
                    reversible: ids.is_some(),
                    ..RepairWanted::records(ids.clone(), lsn, REASON)
                };
                Change::InsertRepair(self.new_repair(node, Some(generation), wanted))
            })
            .collect();
        // A node that is found to be older than it was is compared by intents (schedule S5): these had none.
        changes.push(Change::Intend(Intent {
            lsn,
            generation: Some(generation),
            op: Op::Upsert,
            ids,
            body: None,
        }));
        let durable = self.log.commit_until_known(&changes).await;
        self.log.settle(lsn);
        if !durable {
            // Tried again with other rows: if these are there all the same, they are one comparison too many.
            return;
        }
        fault::point("unprotected-covered");
        self.apply(&changes);
        let mut state = self.unprotected.state.lock();
        state.forget(generation);
        state.comparing.insert(generation);
    }

    /// Whether everything that was written without cover is compared by now.
    fn is_compared(&self, generation: Generation) -> bool {
        let Some(collection) = self.catalog.by_generation(generation).filter(|one| !one.is_deleted()) else {
            return true;
        };
        let open = self.repairs.lock().iter().any(|row| row.generation == Some(generation));
        !open && collection.pairs.iter().all(|pair| pair.uncertain() == 0)
    }

    /// Clears the flag when nothing is left that it stands for.
    async fn clear_flags(self: &Arc<Self>) {
        let _one_at_a_time = self.unprotected.flagging.lock().await;
        let compared: Vec<_> = {
            let state = self.unprotected.state.lock();
            if !state.to_clear || !state.written.is_empty() || !self.log.is_available() {
                return;
            }
            state.comparing.iter().copied().collect()
        };
        if !compared.into_iter().all(|generation| self.is_compared(generation)) {
            return;
        }
        {
            let mut state = self.unprotected.state.lock();
            if !state.written.is_empty() {
                return;
            }
            // From here on a write without cover sets it anew, and waits for us to be done.
            state.flagged = false;
            state.comparing.clear();
            state.end(self.env.now());
        }
        fault::point("flag-clearing");
        for node in self.cluster.nodes() {
            match within(&self.env, FLAG_LIMIT, node.clear_flag()).await {
                Some(Ok(())) => {}
                _ => return,
            }
        }
        self.unprotected.state.lock().to_clear = false;
        tracing::info!("What was written without the log is compared: all is covered again.");
    }
}

/// Has what was written without cover compared once the journal is back, for as long as the process lives.
pub async fn keep_unprotected(core: Arc<Core>) {
    let mut changes = core.cluster.watch_changes();
    loop {
        changes.mark_unchanged();
        core.look_for_flags().await;
        if core.log.is_available() {
            let written: Vec<_> = core.unprotected.state.lock().written.keys().copied().collect();
            for generation in written {
                core.compare_unprotected(generation).await;
            }
            core.clear_flags().await;
        }
        tokio::select! {
            biased;
            _ = changes.changed() => {}
            () = core.env.sleep(TICK) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(range: std::ops::Range<usize>) -> Vec<String> {
        range.map(|n| n.to_string()).collect()
    }

    #[test]
    fn nothing_is_noted_before_every_node_is_flagged() {
        let unprotected = Unprotected::default();
        assert!(!unprotected.note(1, &ids(0..1)));
        assert!(unprotected.state.lock().written.is_empty());
        unprotected.state.lock().flagged = true;
        assert!(unprotected.note(1, &ids(0..2)));
        assert_eq!(
            unprotected.state.lock().written[&1],
            Written::Records(ids(0..2).into_iter().collect())
        );
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut state = State::default();
        state.note(1, &ids(0..MOST_IDS));
        state.note(1, &ids(5..9));
        assert_eq!(state.remembered, MOST_IDS, "twice the same is once");
        state.note(1, &ids(MOST_IDS..MOST_IDS + 1));
        assert_eq!((&state.written[&1], state.remembered), (&Written::All, 0));
        for generation in 2..40 {
            state.note(generation, &ids(0..MOST_IDS));
        }
        assert_eq!(state.remembered, MOST_IN_ALL);
        assert_eq!(state.written[&39], Written::All);
        state.note(39, &ids(0..1));
        state.forget(2);
        assert_eq!(state.remembered, MOST_IN_ALL - MOST_IDS);
    }

    #[test]
    fn unprotected_time_adds_up() {
        let unprotected = Unprotected::default();
        let at = Duration::from_secs;
        unprotected.state.lock().begin(at(10));
        unprotected.state.lock().begin(at(12));
        assert_eq!(unprotected.time(at(15)), at(5));
        unprotected.state.lock().end(at(20));
        assert_eq!(unprotected.time(at(30)), at(10));
        unprotected.state.lock().begin(at(40));
        assert!(unprotected.is_open());
        assert_eq!(unprotected.time(at(41)), at(11));
    }
}
