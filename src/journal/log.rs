//! The writer's side of the journal: its term, its positions, and whether the journal answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use super::{Commit, Journal, JournalError, Lsn, first_lsn};
use crate::env::SharedEnv;

/// How often a commit whose outcome is unknown is tried again before the caller is told.
const IMMEDIATE_RETRIES: usize = 3;
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// What this process holds of the journal.
pub struct Log {
    journal: Arc<dyn Journal>,
    env: SharedEnv,
    term: i64,
    next: AtomicI64,
    available: AtomicBool,
    fenced: AtomicBool,
}

impl Log {
    /// Takes the term: from here on this process is the writer.
    ///
    /// # Errors
    /// Those of the journal; nothing is held then.
    pub async fn take(journal: Arc<dyn Journal>, env: SharedEnv, holder: &str) -> Result<Self, JournalError> {
        let term = journal.take_term(holder).await?;
        Ok(Self {
            journal,
            env,
            term,
            next: AtomicI64::new(first_lsn(term)),
            available: AtomicBool::new(true),
            fenced: AtomicBool::new(false),
        })
    }

    pub fn term(&self) -> i64 {
        self.term
    }

    pub fn journal(&self) -> &Arc<dyn Journal> {
        &self.journal
    }

    /// The position of the next entry.
    pub fn next_lsn(&self) -> Lsn {
        self.next.fetch_add(1, Ordering::SeqCst)
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
            let outcome = self.journal.commit(self.term, commit).await;
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

    /// Asks the journal whether it is there and we are still its writer.
    pub async fn check(&self) {
        let answer = self.journal.commit(self.term, &Commit::new()).await;
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
