//! The fake journal under weather: its tables outlive the proxy, and a commit that is under way when the proxy is killed
//! is written or not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use diptych::chroma::Generation;
use diptych::journal::{
    Change, Commit, EventRecord, Holder, Intent, Journal, JournalError, Lsn, Outline, PayloadRow, Snapshot,
};
use parking_lot::Mutex;
use uuid::Uuid;

use crate::fakes::{FakeJournal, Rng};
use crate::plan::{JournalFault, Weather, milliseconds};
use crate::world::World;

/// Of how many draws a fault's share is, for the first commit after something went wrong with a request.
const TROUBLED: u64 = 200;
/// How long nobody learns the outcome of a stubborn commit at most, in milliseconds.
const STUBBORN: u64 = 8000;

pub struct SimJournal {
    world: Arc<World>,
    pub tables: FakeJournal,
    state: Mutex<(Rng, Weather<JournalFault>)>,
    /// Commits that nobody learns the outcome of until then.
    stubborn: Mutex<Vec<(Commit, Duration)>>,
    /// Collections some record of which was made equal the other way round than it was meant to be (schedule S34).
    turned: Mutex<BTreeSet<Generation>>,
}

impl SimJournal {
    pub fn new(world: Arc<World>, seed: u64) -> Arc<Self> {
        Arc::new(Self {
            world,
            tables: FakeJournal::default(),
            state: Mutex::new((Rng::new(seed), vec![])),
            stubborn: Mutex::default(),
            turned: Mutex::default(),
        })
    }

    pub fn set_weather(&self, weather: Weather<JournalFault>) {
        self.state.lock().1 = weather;
        self.stubborn.lock().clear();
    }

    /// Collections whose repairs were turned around since this was asked last.
    pub fn take_turned(&self) -> BTreeSet<Generation> {
        std::mem::take(&mut *self.turned.lock())
    }

    /// Whether this commit is one of those that nobody learns the outcome of.
    fn is_stubborn(&self, commit: &Commit) -> bool {
        let mut stubborn = self.stubborn.lock();
        let now = self.world.now();
        stubborn.retain(|(_, until)| *until > now);
        let same = |other: &Commit| rows_of(other).any(|id| rows_of(commit).any(|its| its == id));
        stubborn.iter().any(|(other, _)| same(other))
    }

    pub fn set_down(&self, down: bool) {
        let word = if down { "away" } else { "back" };
        self.world.say("journal", || word.to_owned());
        self.tables.set_down(down);
    }

    /// As they are remembered, by node.
    pub async fn checkpoints(&self) -> BTreeMap<String, Lsn> {
        let tables = self.tables.load().await.unwrap_or_default();
        let nodes = tables.nodes.into_iter();
        nodes.map(|record| (record.node, record.checkpoint)).collect()
    }

    fn below(&self, bound: u64) -> u64 {
        self.state.lock().0.below(bound)
    }

    /// Trouble comes together: right after something went wrong with a request, or the proxy was started, it is more likely.
    fn draw(&self) -> Option<JournalFault> {
        let likely = self.world.was_troubled() || self.world.is_starting();
        let range = if likely { TROUBLED } else { 1000 };
        let mut state = self.state.lock();
        let draw = state.0.below(range);
        let mut upto = 0;
        let found = state.1.iter().find(|(_, share)| {
            upto += share;
            draw < upto
        });
        found.map(|(fault, _)| *fault)
    }

    fn write(&self, term: i64, commit: &Commit) -> Result<(), JournalError> {
        let outcome = self.tables.write(term, commit);
        let turned = commit.iter().filter_map(|change| match change {
            Change::InsertRepair(row) if row.reason.starts_with("turned around") => row.generation,
            _ => None,
        });
        self.turned.lock().extend(turned);
        if commit.iter().any(|change| matches!(change, Change::InsertRepair(_))) {
            self.world.came_back();
        }
        if !commit.is_empty() && !matches!(commit.as_slice(), [Change::SetLowWater(_) | Change::RenewLease]) {
            self.world.say("journal", || {
                let changes: Vec<String> = commit.iter().map(describe).collect();
                let outcome = outcome.as_ref().map_or_else(ToString::to_string, |()| "ok".to_owned());
                format!("{} -> {outcome}", changes.join(", "))
            });
        }
        outcome
    }

    /// A round trip.
    async fn asked(&self) {
        tokio::time::sleep(milliseconds(self.below(3))).await;
    }
}

/// Rows that a commit writes.
fn rows_of(commit: &Commit) -> impl Iterator<Item = Uuid> {
    commit.iter().filter_map(|change| match change {
        Change::InsertPayload(row) => Some(row.id),
        Change::InsertRepair(row) => Some(row.id),
        _ => None,
    })
}

fn describe(change: &Change) -> String {
    match change {
        Change::InsertPayload(row) => {
            let body = String::from_utf8_lossy(&row.body);
            let doubt = if row.in_doubt { " in doubt" } else { "" };
            format!(
                "payload {} {}{doubt} {} {body}",
                row.node,
                short(row.lsn),
                row.op.label()
            )
        }
        Change::InsertRepair(row) => format!(
            "repair {} {} {} {:?} from {:?}: {}",
            row.node,
            short(row.lsn),
            row.kind.label(),
            row.ids,
            row.source,
            row.reason
        ),
        Change::Intend(intent) => format!("intent {} {} {:?}", short(intent.lsn), intent.op.label(), intent.ids),
        other => format!("{other:?}"),
    }
}

/// An LSN as people read it: term and count.
fn short(lsn: Lsn) -> String {
    format!("{}.{}", lsn >> 40, lsn & ((1 << 40) - 1))
}

/// A commit under way; dropped, it was written or not.
struct Flight<'a> {
    journal: &'a SimJournal,
    term: i64,
    commit: Option<&'a Commit>,
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        if let Some(commit) = self.commit
            && self.journal.below(2) == 0
        {
            let _ = self.journal.write(self.term, commit);
        }
    }
}

#[async_trait]
impl Journal for SimJournal {
    async fn take_term(&self, holder: &Holder, dead: Option<i64>) -> Result<i64, JournalError> {
        self.asked().await;
        self.tables.take_term(holder, dead).await
    }

    fn keeps_others_out(&self) -> bool {
        self.tables.keeps_others_out()
    }

    async fn raise_term(&self, holder: &Holder, term: i64, to: i64) -> Result<i64, JournalError> {
        self.asked().await;
        self.tables.raise_term(holder, term, to).await
    }

    async fn load(&self) -> Result<Snapshot, JournalError> {
        self.asked().await;
        self.tables.load().await
    }

    async fn commit(&self, term: i64, commit: &Commit) -> Result<(), JournalError> {
        let uncertain = || JournalError::Uncertain("the connection broke at COMMIT".to_owned());
        self.world.commits.fetch_add(1, Ordering::Relaxed);
        let mut flight = Flight {
            journal: self,
            term,
            commit: Some(commit),
        };
        let fault = self.draw();
        if let Some(fault) = fault {
            self.world.fault_of_commit();
            self.world.say("journal", || {
                let changes: Vec<String> = commit.iter().map(describe).collect();
                format!("{fault:?} on {}", changes.join(", "))
            });
        }
        let pause = match fault {
            Some(JournalFault::Slow) => self.below(4000),
            _ => self.below(3),
        };
        tokio::time::sleep(milliseconds(pause)).await;
        flight.commit = None;
        if self.is_stubborn(commit) {
            return Err(uncertain());
        }
        if let Some(JournalFault::StubbornWritten | JournalFault::StubbornNotWritten) = fault {
            let until = self.world.now() + milliseconds(self.below(STUBBORN));
            self.stubborn.lock().push((commit.clone(), until));
        }
        match fault {
            Some(JournalFault::Refused) => return Err(JournalError::Refused("out of order".to_owned())),
            Some(JournalFault::UncertainWritten | JournalFault::StubbornWritten) => {
                self.write(term, commit)?;
                return Err(uncertain());
            }
            Some(JournalFault::UncertainNotWritten | JournalFault::StubbornNotWritten) => return Err(uncertain()),
            Some(JournalFault::Slow) | None => {}
        }
        let outcome = self.write(term, commit);
        tokio::time::sleep(milliseconds(self.below(2))).await;
        outcome
    }

    async fn payloads(
        &self,
        node: &str,
        generation: Option<Generation>,
        max_rows: usize,
        max_bytes: usize,
    ) -> Result<Vec<PayloadRow>, JournalError> {
        self.asked().await;
        let rows = self.tables.payloads(node, generation, max_rows, max_bytes).await;
        self.asked().await;
        rows
    }

    async fn outlines(
        &self,
        node: &str,
        generation: Option<Generation>,
        offset: usize,
        limit: usize,
    ) -> Result<Vec<Outline>, JournalError> {
        self.tables.outlines(node, generation, offset, limit).await
    }

    async fn intents(&self, above: Lsn, limit: usize) -> Result<Vec<Intent>, JournalError> {
        self.asked().await;
        self.tables.intents(above, limit).await
    }

    async fn rotate_intents(&self, term: i64, covered: Lsn) -> Result<(), JournalError> {
        self.asked().await;
        self.tables.rotate_intents(term, covered).await
    }

    async fn payload(&self, id: Uuid) -> Result<Option<PayloadRow>, JournalError> {
        self.asked().await;
        self.tables.payload(id).await
    }

    async fn parked(&self, limit: usize) -> Result<Vec<Outline>, JournalError> {
        self.tables.parked(limit).await
    }

    async fn events(&self, before: i64, limit: usize) -> Result<Vec<EventRecord>, JournalError> {
        self.tables.events(before, limit).await
    }

    async fn ping(&self) -> Result<(), JournalError> {
        self.asked().await;
        self.tables.ping().await
    }

    fn describe(&self) -> String {
        "memory, in weather".to_owned()
    }
}
