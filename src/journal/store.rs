//! The journal over a SQL database: what both backends have in common.
//!
//! Every call takes a connection for itself, has a deadline, and gives the connection back only after it went well:
//! after an error, a timeout or a dropped future the connection is closed, which is also what rolls back. So there is
//! never a half transaction, and a database that hangs never keeps a connection of the pool.
//!
//! The one moment that counts for [`JournalError::Uncertain`] is the sending of `COMMIT`: what fails before it was
//! never written, what fails from then on may have been.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use chrono::Utc;
use sqlx::pool::PoolConnection;
use sqlx::{Database, Pool};
use tokio::time::timeout;

use super::codec::{Columns, SnapshotRows, StoredPayload};
use super::sql::{self, Dialect, Statement, Step};
use super::{Change, Commit, Journal, JournalError, PayloadRow, Snapshot};
use crate::chroma::Generation;

/// Deadline of a call, from asking for a connection to the answer.
const CALL: Duration = Duration::from_secs(15);
/// Deadline of [`Journal::ping`].
const PING: Duration = Duration::from_secs(3);
/// From this many bytes on, compression leaves the runtime's threads.
const LARGE: usize = 128 << 10;

/// What one kind of database adds to [`Store`]: its connections and how it runs statements on them.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    type Db: Database<Row: Columns>;
    const DIALECT: Dialect;
    /// Begins a transaction that may change the term: it waits for those that hold it and keeps out new ones.
    const BEGIN_ALONE: &'static str;
    /// Begins a transaction that writes, and answers the term, which stays as it is until the transaction ends.
    const BEGIN_WITH_TERM: &'static str;
    /// Begins a transaction that reads one state.
    const BEGIN_SNAPSHOT: &'static str;

    /// Connections for writing.
    fn writers(&self) -> &Pool<Self::Db>;
    /// Connections for reading.
    fn readers(&self) -> &Pool<Self::Db>;
    /// For people, without credentials.
    fn describe(&self) -> String;
    /// Runs fixed SQL without parameters, also several statements, in one round trip.
    async fn raw(connection: &mut Connection<Self>, sql: &'static str) -> sqlx::Result<Vec<Row<Self>>>;
    /// Runs a statement and returns its rows.
    async fn fetch(connection: &mut Connection<Self>, statement: Statement) -> sqlx::Result<Vec<Row<Self>>>;
    /// Runs a step of a commit.
    async fn run(connection: &mut Connection<Self>, step: Step) -> sqlx::Result<()>;
}

type Connection<B> = <<B as Backend>::Db as Database>::Connection;
type Row<B> = <<B as Backend>::Db as Database>::Row;

/// A [`Journal`] over a [`Backend`].
pub struct Store<B> {
    pub(super) backend: B,
}

/// A connection that is closed, not given back, unless its call came to a good end.
struct Session<Db: Database> {
    connection: PoolConnection<Db>,
    good: bool,
}

impl<Db: Database> Session<Db> {
    async fn open(pool: &Pool<Db>) -> Result<Self, JournalError> {
        let connection = pool.acquire().await.map_err(refused)?;
        Ok(Self {
            connection,
            good: false,
        })
    }

    /// Gives the connection back.
    fn done(mut self) {
        self.good = true;
    }
}

impl<Db: Database> Deref for Session<Db> {
    type Target = Db::Connection;

    fn deref(&self) -> &Db::Connection {
        &self.connection
    }
}

impl<Db: Database> DerefMut for Session<Db> {
    fn deref_mut(&mut self) -> &mut Db::Connection {
        &mut self.connection
    }
}

impl<Db: Database> Drop for Session<Db> {
    fn drop(&mut self) {
        if !self.good {
            self.connection.close_on_drop();
        }
    }
}

impl<B: Backend> Store<B> {
    /// `sent` turns true right before COMMIT goes out.
    async fn write(&self, term: i64, steps: Vec<Step>, sent: &AtomicBool) -> Result<(), JournalError> {
        let mut session = Session::open(self.backend.writers()).await?;
        let rows = B::raw(&mut session, B::BEGIN_WITH_TERM).await.map_err(refused)?;
        let found = first_int(&rows)?;
        if found != term {
            return Err(JournalError::Fenced { found, ours: term });
        }
        for step in steps {
            B::run(&mut session, step).await.map_err(refused)?;
        }
        finish::<B>(session, sent).await
    }

    async fn raise_term(&self, holder: &str, sent: &AtomicBool) -> Result<i64, JournalError> {
        let mut session = Session::open(self.backend.writers()).await?;
        B::raw(&mut session, B::BEGIN_ALONE).await.map_err(refused)?;
        let rows = B::fetch(&mut session, sql::take_term(holder, Utc::now()))
            .await
            .map_err(refused)?;
        let term = first_int(&rows)?;
        B::fetch(&mut session, sql::ask(sql::PURGE)).await.map_err(refused)?;
        finish::<B>(session, sent).await?;
        Ok(term)
    }

    async fn snapshot(&self) -> Result<Snapshot, JournalError> {
        let mut session = Session::open(self.backend.readers()).await?;
        B::raw(&mut session, B::BEGIN_SNAPSHOT).await.map_err(refused)?;
        let rows = SnapshotRows {
            collections: B::fetch(&mut session, sql::ask(sql::COLLECTIONS))
                .await
                .map_err(refused)?,
            node_ids: B::fetch(&mut session, sql::ask(sql::NODE_IDS)).await.map_err(refused)?,
            databases: B::fetch(&mut session, sql::ask(sql::DATABASES))
                .await
                .map_err(refused)?,
            repairs: B::fetch(&mut session, sql::ask(sql::REPAIRS)).await.map_err(refused)?,
            backlogs: B::fetch(&mut session, sql::ask(sql::BACKLOGS)).await.map_err(refused)?,
        };
        B::raw(&mut session, "COMMIT").await.map_err(refused)?;
        session.done();
        Ok(rows.unpack()?)
    }

    async fn question(&self, statement: Statement) -> Result<Vec<Row<B>>, JournalError> {
        let mut session = Session::open(self.backend.readers()).await?;
        let rows = B::fetch(&mut session, statement).await.map_err(refused)?;
        session.done();
        Ok(rows)
    }

    async fn payload_rows(&self, statement: Statement) -> Result<Vec<PayloadRow>, JournalError> {
        let rows = within(CALL, self.question(statement)).await?;
        let stored = rows
            .iter()
            .map(StoredPayload::read)
            .collect::<Result<Vec<_>, _>>()
            .map_err(refused)?;
        drop(rows);
        let large = stored
            .iter()
            .map(|row| usize::try_from(row.body_bytes).unwrap_or(LARGE))
            .sum::<usize>()
            >= LARGE;
        let unpack = move || {
            stored
                .into_iter()
                .map(StoredPayload::unpack)
                .collect::<Result<Vec<_>, _>>()
        };
        Ok(compute(large, unpack).await??)
    }
}

/// Sends COMMIT; from here on an error leaves the outcome open.
async fn finish<B: Backend>(mut session: Session<B::Db>, sent: &AtomicBool) -> Result<(), JournalError> {
    sent.store(true, Ordering::Relaxed);
    B::raw(&mut session, "COMMIT")
        .await
        .map_err(|error| JournalError::Uncertain(explain(&error)))?;
    session.done();
    Ok(())
}

#[async_trait]
impl<B: Backend> Journal for Store<B> {
    async fn take_term(&self, holder: &str) -> Result<i64, JournalError> {
        let sent = AtomicBool::new(false);
        write_within(CALL, &sent, self.raise_term(holder, &sent)).await
    }

    async fn load(&self) -> Result<Snapshot, JournalError> {
        within(CALL, self.snapshot()).await
    }

    async fn commit(&self, term: i64, commit: &Commit) -> Result<(), JournalError> {
        let large = commit.iter().map(weight).sum::<usize>() >= LARGE;
        let steps = if large {
            let commit = commit.clone();
            compute(true, move || sql::plan(&commit, B::DIALECT)).await??
        } else {
            sql::plan(commit, B::DIALECT)?
        };
        let sent = AtomicBool::new(false);
        write_within(CALL, &sent, self.write(term, steps, &sent)).await
    }

    async fn payloads(
        &self,
        node: &str,
        generation: Option<Generation>,
        max_rows: usize,
        max_bytes: usize,
    ) -> Result<Vec<PayloadRow>, JournalError> {
        self.payload_rows(sql::payloads(node, generation, max_rows, max_bytes))
            .await
    }

    async fn parked(&self, limit: usize) -> Result<Vec<PayloadRow>, JournalError> {
        self.payload_rows(sql::parked(limit)).await
    }

    async fn ping(&self) -> Result<(), JournalError> {
        within(PING, self.question(sql::ask(sql::TERM))).await.map(drop)
    }

    fn describe(&self) -> String {
        self.backend.describe()
    }
}

async fn within<T>(limit: Duration, call: impl Future<Output = Result<T, JournalError>>) -> Result<T, JournalError> {
    timeout(limit, call)
        .await
        .unwrap_or_else(|_| Err(JournalError::Refused(no_answer(limit))))
}

async fn write_within<T>(
    limit: Duration,
    sent: &AtomicBool,
    call: impl Future<Output = Result<T, JournalError>>,
) -> Result<T, JournalError> {
    timeout(limit, call).await.unwrap_or_else(|_| {
        Err(if sent.load(Ordering::Relaxed) {
            JournalError::Uncertain(no_answer(limit))
        } else {
            JournalError::Refused(no_answer(limit))
        })
    })
}

/// Runs `work` on a blocking thread if it is `large`.
async fn compute<T: Send + 'static>(large: bool, work: impl FnOnce() -> T + Send + 'static) -> Result<T, JournalError> {
    if !large {
        return Ok(work());
    }
    let task = tokio::task::spawn_blocking(work);
    task.await
        .map_err(|_| JournalError::Refused("compression was interrupted".to_owned()))
}

/// About how many bytes there are to encode.
fn weight(change: &Change) -> usize {
    match change {
        Change::InsertPayload(row) => row.body.len(),
        Change::InsertRepair(row) => row.ids.iter().flatten().map(String::len).sum(),
        _ => 0,
    }
}

fn first_int<R: Columns>(rows: &[R]) -> Result<i64, JournalError> {
    match rows.first() {
        Some(row) => row.int(0).map_err(refused),
        None => Err(JournalError::Refused("the lease row is missing".to_owned())),
    }
}

fn no_answer(limit: Duration) -> String {
    format!("no answer within {} s", limit.as_secs())
}

pub(super) fn refused(error: sqlx::Error) -> JournalError {
    let conflict = error.as_database_error().is_some_and(|error| {
        use sqlx::error::ErrorKind::{CheckViolation, ForeignKeyViolation, NotNullViolation, UniqueViolation};
        matches!(
            error.kind(),
            UniqueViolation | ForeignKeyViolation | NotNullViolation | CheckViolation
        )
    });
    if conflict {
        return JournalError::Conflict(explain(&error));
    }
    JournalError::Refused(explain(&error))
}

/// sqlx's words carry neither values nor credentials; only a pool that waits in vain does not say for what.
fn explain(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::PoolTimedOut => "no connection in time".to_owned(),
        error => error.to_string(),
    }
}
