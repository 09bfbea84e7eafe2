//! The writer's side of the journal: its term, its positions, and whether the journal answers.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{RwLock, oneshot};

use super::lease::{LEASE, Presence, acquire};
use super::{Change, Commit, Intent, Journal, JournalError, Lsn, first_lsn};
use crate::env::{SharedEnv, within};

/// How often a commit whose outcome is unknown is tried again before the caller is told.
const IMMEDIATE_RETRIES: usize = 3;
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// For how long, where it has to be known.
const KNOWN_FOR: Duration = Duration::from_secs(60);

/// How many intents one commit takes, and about how many bytes of them.
const GROUP: usize = 1000;
const GROUP_BYTES: usize = 4 << 20;

/// How long a writer waits for its intent, with those before it.
const INTEND: Duration = Duration::from_secs(15);

/// A journal that did not answer is known to be away for so long. Longer than one check and the pause after it, so that
/// only a process that stood still meanwhile forgets.
const AWAY: Duration = Duration::from_secs(20);
/// How often a lease that has run out is renewed before it is given up; more than once is a process that keeps standing
/// still.
const RENEWALS: usize = 3;
/// How long giving back the lease may hold up the end of the process.
const RELEASE: Duration = Duration::from_secs(3);

/// Whether this process may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    Ours,
    Lost,
    /// The lease has run out and the journal does not answer: nobody knows.
    Unknown,
}

/// What this process holds of the journal.
pub struct Log {
    journal: Arc<dyn Journal>,
    env: SharedEnv,
    term: AtomicI64,
    /// Held by commits, and alone by whoever moves our own term on: that is not another proxy.
    steady: RwLock<()>,
    /// Our own next term, which the journal may have already or not.
    raising: Mutex<Option<i64>>,
    positions: Mutex<Positions>,
    group: Mutex<Group>,
    /// The low-water mark that the journal has.
    stored_low_water: AtomicI64,
    available: AtomicBool,
    fenced: AtomicBool,
    presence: Presence,
    /// We gave the lease back, and commit nothing more.
    released: AtomicBool,
    /// On the clock of [`crate::env::Env::boot_now`], in nanoseconds: until when the lease runs at least, and until when
    /// the journal is known to be away.
    lease_end: AtomicU64,
    away_end: AtomicU64,
    /// Held by the one that checks a lease which has run out; the others wait for its answer.
    checking: tokio::sync::Mutex<()>,
}

/// Positions given out, and which of them are of entries that may still be somewhere (rule R3).
struct Positions {
    next: Lsn,
    open: BTreeSet<Lsn>,
}

/// Intents that wait for the commit under way.
#[derive(Default)]
struct Group {
    waiting: Vec<(Intent, oneshot::Sender<bool>)>,
    committing: bool,
}

impl Group {
    /// How many of those that wait the next commit takes: at least one.
    fn next_count(&self) -> usize {
        let mut bytes = 0;
        let fits = |(intent, _): &&(Intent, _)| {
            bytes += intent.weight();
            bytes <= GROUP_BYTES
        };
        self.waiting.iter().take(GROUP).take_while(fits).count().max(1)
    }
}

impl Log {
    /// Takes the term: from here on this process is the writer.
    ///
    /// # Errors
    /// Those of the journal; nothing is held then. [`JournalError::Held`]: the holder is alive.
    pub async fn take(journal: Arc<dyn Journal>, env: SharedEnv, presence: Presence) -> Result<Self, JournalError> {
        let taken = acquire(&journal, &env, &presence.holder).await;
        if matches!(taken, Err(JournalError::Held(_) | JournalError::Refused(_))) {
            presence.remove_file();
        }
        let (term, asked) = taken?;
        Ok(Self {
            presence,
            released: AtomicBool::new(false),
            lease_end: AtomicU64::new(nanos(asked + LEASE)),
            away_end: AtomicU64::new(0),
            checking: tokio::sync::Mutex::default(),
            journal,
            env,
            term: AtomicI64::new(term),
            steady: RwLock::default(),
            raising: Mutex::default(),
            positions: Mutex::new(Positions {
                next: first_lsn(term),
                open: BTreeSet::new(),
            }),
            group: Mutex::default(),
            stored_low_water: AtomicI64::new(0),
            available: AtomicBool::new(true),
            fenced: AtomicBool::new(false),
        })
    }

    pub fn term(&self) -> i64 {
        self.term.load(Ordering::SeqCst)
    }

    /// The holder of the lease, for people; `None`: another proxy.
    pub fn holder(&self) -> Option<&str> {
        (!self.is_fenced()).then_some(self.presence.holder.name.as_str())
    }

    pub fn journal(&self) -> &Arc<dyn Journal> {
        &self.journal
    }

    /// A position that no entry is at: a generation, or the place of a repair row.
    pub fn next_lsn(&self) -> Lsn {
        self.take_position(false)
    }

    /// The position of a new entry. The low-water mark stays below it until [`Log::settle`].
    pub fn begin(&self) -> Lsn {
        self.take_position(true)
    }

    fn take_position(&self, open: bool) -> Lsn {
        let mut positions = self.positions.lock();
        let lsn = positions.next;
        positions.next += 1;
        if open {
            positions.open.insert(lsn);
        }
        lsn
    }

    /// Keeps the low-water mark below an entry of a predecessor whose outcome is not known yet.
    pub fn reopen(&self, lsn: Lsn) {
        self.positions.lock().open.insert(lsn);
    }

    /// Every node has applied this entry, or will: what it missed is durable (rule R3).
    pub fn settle(&self, lsn: Lsn) {
        self.positions.lock().open.remove(&lsn);
    }

    /// Every entry up to here is applied or covered, on every node.
    pub fn low_water(&self) -> Lsn {
        let positions = self.positions.lock();
        positions.open.first().map_or(positions.next, |first| *first) - 1
    }

    /// The low-water mark that is known to be durable.
    pub fn stored_low_water(&self) -> Lsn {
        self.stored_low_water.load(Ordering::SeqCst)
    }

    /// The journal was found with this mark.
    pub(crate) fn found_low_water(&self, mark: Lsn) {
        self.stored_low_water.fetch_max(mark, Ordering::SeqCst);
    }

    /// Writes the low-water mark down if it has moved on.
    pub async fn store_low_water(&self) {
        let mark = self.low_water();
        if self.is_available()
            && mark > self.stored_low_water.load(Ordering::SeqCst)
            && self.commit(&vec![Change::SetLowWater(mark)]).await.is_ok()
        {
            self.stored_low_water.fetch_max(mark, Ordering::SeqCst);
        }
    }

    /// The nodes have seen positions up to `seen`, which this journal did not give out: it was restored from a backup.
    /// Goes on above them.
    ///
    /// # Errors
    /// Those of the journal; positions have moved on all the same.
    pub async fn advance_past(&self, seen: Lsn) -> Result<(), JournalError> {
        let term = (seen >> 40) + 1;
        {
            let mut positions = self.positions.lock();
            positions.next = positions.next.max(first_lsn(term));
        }
        let _alone = self.steady.write().await;
        self.finish_raising().await?;
        // Unknown means that the old term may be gone: commits wait here for a while until it is known. After that the
        // next commit finds out before anything else, or it would find itself fenced by us.
        let until = self.env.now() + KNOWN_FOR;
        loop {
            match self.raise(term).await {
                Err(JournalError::Uncertain(_) | JournalError::Refused(_))
                    if self.raising.lock().is_some() && self.env.now() < until =>
                {
                    self.env.sleep(RETRY_PAUSE).await;
                }
                outcome => return outcome,
            }
        }
    }

    /// Moves our own term on. The caller keeps commits out.
    async fn raise(&self, term: i64) -> Result<(), JournalError> {
        let outcome = self.journal.raise_term(&self.presence.holder, self.term(), term).await;
        match outcome {
            Ok(raised) => {
                self.term.store(raised, Ordering::SeqCst);
                *self.raising.lock() = None;
                Ok(())
            }
            Err(error) => {
                if matches!(error, JournalError::Uncertain(_)) {
                    *self.raising.lock() = Some(term);
                }
                Err(error)
            }
        }
    }

    /// Finds out whether the journal has our own next term, if that is not known. The caller keeps commits out.
    async fn finish_raising(&self) -> Result<(), JournalError> {
        let pending = *self.raising.lock();
        match pending {
            None => Ok(()),
            Some(term) => self.raise(term).await,
        }
    }

    /// Logs an intent, together with what other lanes log at that moment. False: it may not be there, and the entry
    /// must not be sent. An answer comes in time, whatever the journal does.
    pub async fn intend(self: &Arc<Self>, intent: Intent) -> bool {
        let (done, outcome) = oneshot::channel();
        let start = {
            let mut group = self.group.lock();
            group.waiting.push((intent, done));
            !std::mem::replace(&mut group.committing, true)
        };
        if start {
            let log = self.clone();
            self.env.spawn(Box::pin(async move { log.commit_groups().await }));
        }
        let answer = within(&self.env, INTEND, outcome).await;
        if answer.is_none() {
            self.available.store(false, Ordering::SeqCst);
            tracing::error!("The journal does not answer.");
        }
        answer.and_then(Result::ok).unwrap_or(false)
    }

    async fn commit_groups(&self) {
        loop {
            let (intents, clients): (Vec<_>, Vec<_>) = {
                let mut group = self.group.lock();
                group.waiting.retain(|(_, client)| !client.is_closed());
                if group.waiting.is_empty() {
                    group.committing = false;
                    return;
                }
                let count = group.next_count();
                group.waiting.drain(..count).unzip()
            };
            let commit = intents.into_iter().map(Change::Intend).collect();
            let durable = self.commit(&commit).await.is_ok();
            for client in clients {
                let _ = client.send(durable);
            }
        }
    }

    /// The journal answered last time, and we are its writer: what needs a row may be started.
    pub fn is_available(&self) -> bool {
        self.available.load(Ordering::SeqCst) && !self.is_fenced()
    }

    /// Another process has become the writer.
    pub fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::SeqCst)
    }

    /// Commits; an unknown outcome is tried again a few times, which is safe because every row has its own id.
    ///
    /// # Errors
    /// [`JournalError::Uncertain`]: it may have been written, and whoever called has to go on trying.
    pub async fn commit(&self, commit: &Commit) -> Result<(), JournalError> {
        let mut left = IMMEDIATE_RETRIES;
        let mut uncertain = false;
        loop {
            let started = self.env.now();
            let outcome = self.attempt(commit).await;
            crate::metrics::journal_append(outcome.is_ok(), self.env.now().saturating_sub(started));
            match outcome {
                Ok(()) => {
                    self.available.store(true, Ordering::SeqCst);
                    return Ok(());
                }
                Err(JournalError::Fenced { found, ours }) => {
                    self.fenced.store(true, Ordering::SeqCst);
                    tracing::error!(found, ours, "Another proxy has taken over the journal.");
                    return Err(JournalError::Fenced { found, ours });
                }
                Err(JournalError::Conflict(reason)) => {
                    tracing::error!(reason, "The journal refused a commit that contradicts it.");
                    return Err(JournalError::Conflict(reason));
                }
                Err(error) => {
                    self.available.store(false, Ordering::SeqCst);
                    uncertain |= matches!(error, JournalError::Uncertain(_));
                    if !uncertain || left == 0 {
                        tracing::error!(%error, "The journal did not take a commit.");
                        return Err(match error {
                            JournalError::Refused(reason) if uncertain => JournalError::Uncertain(reason),
                            error => error,
                        });
                    }
                    left -= 1;
                    self.env.sleep(RETRY_PAUSE).await;
                }
            }
        }
    }

    /// One attempt at something that nothing rests on: how it ends says nothing about whether the journal is there.
    ///
    /// # Errors
    /// Those of the journal.
    pub async fn commit_aside(&self, commit: &Commit) -> Result<(), JournalError> {
        self.attempt(commit).await
    }

    async fn attempt(&self, commit: &Commit) -> Result<(), JournalError> {
        let _steady = loop {
            let steady = self.steady.read().await;
            if self.raising.lock().is_none() {
                break steady;
            }
            drop(steady);
            let _alone = self.steady.write().await;
            self.finish_raising().await.map_err(|error| match error {
                // The commit itself was not sent.
                JournalError::Uncertain(reason) => JournalError::Refused(reason),
                error => error,
            })?;
        };
        if self.released.load(Ordering::SeqCst) {
            return Err(JournalError::Refused("the lease was given back".to_owned()));
        }
        self.journal.commit(self.term(), commit).await
    }

    /// Commits, and goes on until it is known whether it was written. True: it was. Whoever would otherwise make the same
    /// rows anew, with other ids, waits here: those that were written after all would never be carried out by name.
    pub async fn commit_until_known(&self, commit: &Commit) -> bool {
        let until = self.env.now() + KNOWN_FOR;
        let mut uncertain = false;
        loop {
            match self.commit(commit).await {
                Ok(()) => return true,
                Err(JournalError::Uncertain(_)) => uncertain = true,
                // What an earlier one did is not known by that.
                Err(JournalError::Refused(_)) if uncertain => {}
                Err(_) => return false,
            }
            if self.env.now() >= until {
                return false;
            }
            self.env.sleep(RETRY_PAUSE).await;
        }
    }

    /// Asked right before a write is sent and right before it is acknowledged (schedule S2). A process that stood still
    /// for longer than its lease may have been replaced: it asks the journal before it does anything.
    ///
    /// What remains is the time between this answer and what is done with it; Chroma cannot fence.
    pub async fn hold(&self) -> Hold {
        if let Some(hold) = self.hold_without_asking() {
            return hold;
        }
        let _one_asks = self.checking.lock().await;
        for _ in 0..RENEWALS {
            if let Some(hold) = self.hold_without_asking() {
                return hold;
            }
            self.check().await;
        }
        self.hold_without_asking().unwrap_or(Hold::Lost)
    }

    fn hold_without_asking(&self) -> Option<Hold> {
        if self.is_fenced() {
            return Some(Hold::Lost);
        }
        let now = nanos(self.env.boot_now());
        if now < self.lease_end.load(Ordering::SeqCst) {
            return Some(Hold::Ours);
        }
        let away = !self.available.load(Ordering::SeqCst) && now < self.away_end.load(Ordering::SeqCst);
        away.then_some(Hold::Unknown)
    }

    /// Gives the lease back at the end of the process: the next one need not wait. Nothing is committed from here on.
    pub async fn release(&self) {
        let released = within(&self.env, RELEASE, async {
            let _alone = self.steady.write().await;
            if self.released.swap(true, Ordering::SeqCst) || self.is_fenced() {
                return true;
            }
            let commit = vec![Change::ReleaseLease];
            self.journal.commit(self.term(), &commit).await.is_ok()
        });
        // As long as the lease speaks of our file, a successor has to find it.
        match released.await {
            Some(true) => self.presence.remove_file(),
            _ => tracing::warn!("The lease could not be given back: it ends by itself."),
        }
    }

    /// Asks the journal whether it is there and we are still its writer, and renews the lease. Only this does: the lease
    /// runs as long as the journal says, and other commits do not tell it.
    pub async fn check(&self) {
        let asked = self.env.boot_now();
        let answer = self.attempt(&vec![Change::RenewLease]).await;
        match &answer {
            Ok(()) => {
                self.lease_end.fetch_max(nanos(asked + LEASE), Ordering::SeqCst);
            }
            Err(_) => {
                let end = nanos(self.env.boot_now() + AWAY);
                self.away_end.store(end, Ordering::SeqCst);
            }
        }
        if let Err(JournalError::Fenced { found, ours }) = &answer
            && !self.fenced.swap(true, Ordering::SeqCst)
        {
            tracing::error!(found, ours, "Another proxy has taken over the journal.");
        }
        let available = answer.is_ok();
        if self.available.swap(available, Ordering::SeqCst) != available {
            match answer {
                Ok(()) => tracing::info!("The journal answers again."),
                Err(error) => tracing::error!(%error, "The journal does not answer."),
            }
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
