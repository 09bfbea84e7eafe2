//! The lease: which process writes, until when, and how the next one comes by it.
//!
//! The holder renews its lease all the time. Whoever wants it waits until it was given back, or was not renewed for its
//! whole time. Only a death that can be seen shortens that: on the same host, the lock on the holder's file is to be
//! had when its process is gone, and not before.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::{Journal, JournalError};
use crate::env::SharedEnv;

/// How long the holder may write after it renewed the lease.
pub const LEASE: Duration = Duration::from_secs(10);
/// How much longer others wait: clocks do not run alike.
pub const SKEW: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(250);
/// How long a starting process waits: a holder that did not renew meanwhile has lost the lease.
const PATIENCE: Duration = Duration::from_secs(LEASE.as_secs() + SKEW.as_secs() + 1);

/// What the lease says of its holder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// For people.
    pub name: String,
    /// The machine, since its last boot; empty: not known.
    pub host: String,
    /// A file that the holder has locked for as long as it lives.
    pub lock_file: Option<String>,
}

impl Holder {
    /// One whose death nobody can see.
    pub fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            host: String::new(),
            lock_file: None,
        }
    }

    /// Whether `other` was a process of this machine and is gone.
    fn sees_dead(&self, other: &Holder) -> bool {
        if self.host.is_empty() || self.host != other.host {
            return false;
        }
        let file = other.lock_file.as_ref().map(File::open);
        // A file that is not there says nothing: it may be hidden from us.
        matches!(file, Some(Ok(file)) if file.try_lock().is_ok())
    }
}

/// A lease that another process holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    pub term: i64,
    pub holder: Holder,
    /// How long it runs, if it is not renewed; zero: it has ended, but clocks may not agree.
    pub left: Duration,
}

impl fmt::Display for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let left = self.left.as_secs_f64();
        write!(f, "held by {}, whose lease runs for {left:.1} s more", self.holder.name)
    }
}

/// This process as a holder, with its lock file.
#[derive(Debug)]
pub struct Presence {
    pub(super) holder: Holder,
    _locked: Option<File>,
}

impl Presence {
    /// With a lock file in `folder`. Without one that works a successor on this host has to wait like any other.
    pub fn here(folder: &Path) -> Self {
        let hostname = read_line("/proc/sys/kernel/hostname");
        let boot = read_line("/proc/sys/kernel/random/boot_id");
        let mut presence = Self::from(Holder {
            name: format!("pid {} on {hostname}", std::process::id()),
            host: if boot.is_empty() {
                String::new()
            } else {
                format!("{boot} {hostname}")
            },
            lock_file: None,
        });
        match lock_file(folder) {
            Ok((name, file)) => {
                presence.holder.lock_file = Some(name);
                presence._locked = Some(file);
            }
            Err(error) => {
                let folder = folder.display();
                tracing::warn!(%folder, %error, "No lock file: after a crash, the next start waits for our lease to end.");
            }
        }
        presence
    }

    /// The lease is given back; nobody will ask for the lock.
    pub(super) fn remove_file(&self) {
        if self._locked.is_some() {
            remove(&self.holder);
        }
    }
}

impl From<Holder> for Presence {
    fn from(holder: Holder) -> Self {
        Self { holder, _locked: None }
    }
}

fn read_line(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// A new file, locked. Its name is nobody else's, so the lock on it is about one process only.
fn lock_file(folder: &Path) -> io::Result<(String, File)> {
    let path = std::path::absolute(folder)?.join(format!("diptych-{}.lock", Uuid::new_v4().simple()));
    let name = path.to_str().ok_or(io::ErrorKind::InvalidFilename)?.to_owned();
    let file = File::options().write(true).create_new(true).mode(0o644).open(&path)?;
    file.try_lock()?;
    Ok((name, file))
}

fn remove(holder: &Holder) {
    if let Some(name) = &holder.lock_file {
        let _ = fs::remove_file(name);
    }
}

/// Takes the term: at once if nobody holds the lease or its holder is dead for all to see, otherwise when it ends.
/// Answers when it was asked for too, on the clock of [`Env::boot_now`](crate::env::Env::boot_now): the lease runs from
/// then at the latest.
///
/// # Errors
/// [`JournalError::Held`] when the holder goes on renewing it; others of the journal at once.
pub(super) async fn acquire(
    journal: &Arc<dyn Journal>,
    env: &SharedEnv,
    holder: &Holder,
) -> Result<(i64, Duration), JournalError> {
    let end = env.boot_now() + PATIENCE;
    let mut dead: Option<Lease> = None;
    let mut told = false;
    loop {
        let asked = env.boot_now();
        let lease = match journal.take_term(holder, dead.as_ref().map(|lease| lease.term)).await {
            Err(JournalError::Held(lease)) => *lease,
            Err(error) => return Err(error),
            Ok(term) => {
                if let Some(dead) = dead {
                    tracing::info!(holder = dead.holder.name, "The log's last writer is dead.");
                    remove(&dead.holder);
                }
                return Ok((term, asked));
            }
        };
        // Of a holder that took it meanwhile, nothing is known.
        dead = None;
        if journal.keeps_others_out() || holder.sees_dead(&lease.holder) {
            dead = Some(lease);
            continue;
        }
        if env.boot_now() >= end {
            return Err(JournalError::Held(Box::new(lease)));
        }
        if !std::mem::replace(&mut told, true) {
            tracing::warn!(
                "The log is {lease}: waiting for that to end, for {} s.",
                PATIENCE.as_secs()
            );
        }
        env.sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lock_that_is_to_be_had_shows_a_death() {
        let folder = tempfile::tempdir().unwrap();
        let us = Presence::here(folder.path());
        let other = Presence::here(folder.path());
        let holder = other.holder.clone();
        assert!(!us.holder.sees_dead(&holder), "it lives");
        let elsewhere = Holder {
            host: "another".to_owned(),
            ..holder.clone()
        };
        drop(other);
        assert!(us.holder.sees_dead(&holder));
        assert!(!us.holder.sees_dead(&elsewhere));
        assert!(!Holder::named("x").sees_dead(&Holder {
            host: String::new(),
            ..holder.clone()
        }));
        remove(&holder);
        assert!(!us.holder.sees_dead(&holder), "the file is not there");
        us.remove_file();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn no_folder_no_lock_file() {
        assert_eq!(Presence::here(Path::new("/not/there")).holder.lock_file, None);
    }
}
