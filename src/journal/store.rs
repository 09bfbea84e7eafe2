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
use uuid::Uuid;

use super::codec::{self, Columns, SnapshotRows, StoredPayload};
use super::sql::{self, Dialect, Side, Statement, Step};
use super::{
    Change, Commit, EventRecord, Holder, Intent, Journal, JournalError, Lease, Lsn, Outline, PayloadRow, SKEW, Snapshot,
};
use crate::chroma::Generation;

/// Deadline of a call, from asking for a connection to the answer.
const CALL: Duration = Duration::from_secs(15);
/// Deadline of [`Journal::load`]: where an entry stayed open for minutes, there are very many intents above it.
const LOAD: Duration = Duration::from_secs(60);
/// Intents that are loaded at a time.
const PAGE: usize = 10_000;
/// Deadline of [`Journal::ping`].
const PING: Duration = Duration::from_secs(3);
/// From this many bytes on, compression leaves the runtime's threads.
const LARGE: usize = 128 << 10;

/// What one kind of database adds to [`Store`]: its connections and how it runs statements on them.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    type Db: Database<Row: Columns>;
    const DIALECT: Dialect;
    /// See [`Journal::keeps_others_out`].
    const KEEPS_OTHERS_OUT: bool;
    /// Begins a transaction that may change the term: it waits for those that hold it and keeps out new ones.
    const BEGIN_ALONE: &'static str;
    /// Begins a transaction that writes, and answers the term, which stays as it is until the transaction ends, and the
    /// side for intents.
    const BEGIN_WITH_TERM: &'static str;
    /// Begins a transaction that reads one state.
    const BEGIN_SNAPSHOT: &'static str;
    /// The same as [`Backend::BEGIN_WITH_TERM`], for housekeeping: rather gives up than waits for a lock.
    const BEGIN_PATIENTLY: &'static str;
    /// Keeps everybody out of a side and answers its last intent.
    const CLOSE_SIDE: [&'static str; 2];
    /// Removes what is on a closed side, or a part of it, and answers how much is left.
    const EMPTY_SIDE: [&'static str; 2];

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
    /// Runs a step of a commit; intents go to `side`.
    async fn run(connection: &mut Connection<Self>, step: Step, side: Side) -> sqlx::Result<()>;
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
        let side = checked_side(&rows, term)?;
        for step in steps {
            B::run(&mut session, step, side).await.map_err(refused)?;
        }
        finish::<B>(session, sent).await
    }

    /// Looks first without keeping anybody out: whoever waits for the lease asks often, and must not hold up the
    /// commits of its holder.
    async fn next_term(&self, holder: &Holder, dead: Option<i64>, sent: &AtomicBool) -> Result<i64, JournalError> {
        let rows = self.question(sql::lease(B::DIALECT)).await?;
        check_free(&rows, dead)?;
        let mut session = Session::open(self.backend.writers()).await?;
        B::raw(&mut session, B::BEGIN_ALONE).await.map_err(refused)?;
        let rows = B::fetch(&mut session, sql::lease(B::DIALECT)).await.map_err(refused)?;
        check_free(&rows, dead)?;
        let rows = B::fetch(&mut session, sql::take_term(holder, Utc::now()))
            .await
            .map_err(refused)?;
        let term = first_int(&rows)?;
        B::fetch(&mut session, sql::renew_lease(B::DIALECT))
            .await
            .map_err(refused)?;
        B::fetch(&mut session, sql::ask(sql::PURGE)).await.map_err(refused)?;
        finish::<B>(session, sent).await?;
        Ok(term)
    }

    async fn raised_term(&self, holder: &Holder, term: i64, to: i64, sent: &AtomicBool) -> Result<i64, JournalError> {
        let mut session = Session::open(self.backend.writers()).await?;
        B::raw(&mut session, B::BEGIN_ALONE).await.map_err(refused)?;
        let rows = B::fetch(&mut session, sql::lease(B::DIALECT)).await.map_err(refused)?;
        let found = first_int(&rows)?;
        // Only a lock file's name is of one process alone.
        let ours = holder.lock_file.is_some() && holder_of(&rows[0])? == *holder;
        if !(found == to && to > term && ours) {
            check_term(&rows, term)?;
        }
        let rows = B::fetch(&mut session, sql::raise_term(to)).await.map_err(refused)?;
        let raised = first_int(&rows)?;
        finish::<B>(session, sent).await?;
        Ok(raised)
    }

    /// First empties the side that has not been written to since an earlier call, then, if that worked, moves inserts
    /// there: so what is emptied and what is inserted do not meet. Correct they would be all the same, because a side is
    /// only emptied when, with everybody kept out, nothing on it is needed.
    async fn rotate(&self, term: i64, covered: Lsn) -> Result<(), JournalError> {
        let rows = self.question(sql::ask(sql::SIDES)).await?;
        let current = checked_side(&rows, term)?;
        let row = &rows[0];
        let [now, old] = [current, current.other()].map(|side| Fill::read::<Row<B>>(row, side));
        let (now, old) = (now.map_err(refused)?, old.map_err(refused)?);
        if !old.is_empty() {
            if !old.is_covered(covered) {
                return Ok(());
            }
            loop {
                match self.empty_some(term, current.other(), covered).await? {
                    Emptied::Part => {}
                    Emptied::All => break,
                    Emptied::InUse => return Ok(()),
                }
            }
        }
        if now.is_full() || (now.intents > 0 && now.is_covered(covered)) {
            self.turn(term, current.other()).await?;
        }
        Ok(())
    }

    /// One transaction's worth of emptying a side that takes no inserts.
    async fn empty_some(&self, term: i64, side: Side, covered: Lsn) -> Result<Emptied, JournalError> {
        let mut session = Session::open(self.backend.writers()).await?;
        let rows = B::raw(&mut session, B::BEGIN_PATIENTLY).await.map_err(refused)?;
        let current = checked_side(&rows, term)?;
        let rows = match B::raw(&mut session, side.pick(B::CLOSE_SIDE)).await {
            Err(error) if is_lock_timeout(&error) => return Ok(Emptied::InUse),
            rows => rows.map_err(refused)?,
        };
        let last = rows.first().map(|row| row.opt_int(0)).transpose().map_err(refused)?;
        if current == side || last.flatten().is_some_and(|last| last > covered) {
            return Ok(Emptied::InUse);
        }
        B::fetch(&mut session, sql::ask(sql::KEEP_LOW_WATER))
            .await
            .map_err(refused)?;
        let rows = B::raw(&mut session, side.pick(B::EMPTY_SIDE)).await.map_err(refused)?;
        let left = first_int(&rows)?;
        finish::<B>(session, &AtomicBool::new(false)).await?;
        Ok(if left > 0 { Emptied::Part } else { Emptied::All })
    }

    async fn turn(&self, term: i64, side: Side) -> Result<(), JournalError> {
        let mut session = Session::open(self.backend.writers()).await?;
        let rows = B::raw(&mut session, B::BEGIN_PATIENTLY).await.map_err(refused)?;
        checked_side(&rows, term)?;
        B::fetch(&mut session, sql::turn_to(side)).await.map_err(refused)?;
        finish::<B>(session, &AtomicBool::new(false)).await
    }

    async fn snapshot(&self) -> Result<Snapshot, JournalError> {
        let mut session = Session::open(self.backend.readers()).await?;
        B::raw(&mut session, B::BEGIN_SNAPSHOT).await.map_err(refused)?;
        let rows = B::fetch(&mut session, sql::ask(sql::LOW_WATER))
            .await
            .map_err(refused)?;
        let low_water = first_int(&rows)?;
        let rows = SnapshotRows {
            collections: B::fetch(&mut session, sql::ask(sql::COLLECTIONS))
                .await
                .map_err(refused)?,
            node_ids: B::fetch(&mut session, sql::ask(sql::NODE_IDS)).await.map_err(refused)?,
            databases: B::fetch(&mut session, sql::ask(sql::DATABASES))
                .await
                .map_err(refused)?,
            tenants: B::fetch(&mut session, sql::ask(sql::TENANTS)).await.map_err(refused)?,
            repairs: B::fetch(&mut session, sql::ask(sql::REPAIRS)).await.map_err(refused)?,
            backlogs: B::fetch(&mut session, sql::ask(sql::BACKLOGS)).await.map_err(refused)?,
            nodes: B::fetch(&mut session, sql::ask(sql::NODES)).await.map_err(refused)?,
            maintenance: B::fetch(&mut session, sql::ask(sql::MAINTENANCE))
                .await
                .map_err(refused)?,
            suspects: B::fetch(&mut session, sql::ask(sql::SUSPECTS)).await.map_err(refused)?,
            pins: B::fetch(&mut session, sql::ask(sql::PINS)).await.map_err(refused)?,
            low_water,
            intents: Self::all_intents(&mut session, low_water).await?,
        };
        B::raw(&mut session, "COMMIT").await.map_err(refused)?;
        session.done();
        Ok(rows.unpack()?)
    }

    /// In pages: there can be very many, and a single statement must not take too long.
    async fn all_intents(session: &mut Session<B::Db>, low_water: Lsn) -> Result<Vec<Intent>, JournalError> {
        let mut all: Vec<Intent> = Vec::new();
        loop {
            let above = all.last().map_or(low_water, |intent| intent.lsn);
            let rows = B::fetch(session, sql::intents(above, PAGE)).await.map_err(refused)?;
            let mut page = codec::intents(&rows)?;
            page.truncate(PAGE);
            let last = page.len() < PAGE;
            all.append(&mut page);
            if last {
                return Ok(all);
            }
        }
    }

    async fn question(&self, statement: Statement) -> Result<Vec<Row<B>>, JournalError> {
        let mut session = Session::open(self.backend.readers()).await?;
        let rows = B::fetch(&mut session, statement).await.map_err(refused)?;
        session.done();
        Ok(rows)
    }

    async fn outline_rows(&self, statement: Statement) -> Result<Vec<Outline>, JournalError> {
        let rows = within(CALL, self.question(statement)).await?;
        let unpack = |row| StoredPayload::read_outline(row)?.unpack_outline();
        rows.iter().map(|row| Ok(unpack(row)?)).collect()
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
    async fn take_term(&self, holder: &Holder, dead: Option<i64>) -> Result<i64, JournalError> {
        let sent = AtomicBool::new(false);
        write_within(CALL, &sent, self.next_term(holder, dead, &sent)).await
    }

    fn keeps_others_out(&self) -> bool {
        B::KEEPS_OTHERS_OUT
    }

    async fn load(&self) -> Result<Snapshot, JournalError> {
        within(LOAD, self.snapshot()).await
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

    async fn outlines(
        &self,
        node: &str,
        generation: Option<Generation>,
        offset: usize,
        limit: usize,
    ) -> Result<Vec<Outline>, JournalError> {
        self.outline_rows(sql::outlines(node, generation, offset, limit)).await
    }

    async fn raise_term(&self, holder: &Holder, term: i64, to: i64) -> Result<i64, JournalError> {
        let sent = AtomicBool::new(false);
        write_within(CALL, &sent, self.raised_term(holder, term, to, &sent)).await
    }

    async fn intents(&self, above: Lsn, limit: usize) -> Result<Vec<Intent>, JournalError> {
        let rows = within(CALL, self.question(sql::intents(above, limit))).await?;
        let mut intents = codec::intents(&rows)?;
        intents.truncate(limit);
        Ok(intents)
    }

    async fn rotate_intents(&self, term: i64, covered: Lsn) -> Result<(), JournalError> {
        within(CALL, self.rotate(term, covered)).await
    }

    async fn payload(&self, id: Uuid) -> Result<Option<PayloadRow>, JournalError> {
        Ok(self.payload_rows(sql::payload(id)).await?.pop())
    }

    async fn parked(&self, limit: usize) -> Result<Vec<Outline>, JournalError> {
        self.outline_rows(sql::parked(limit)).await
    }

    async fn events(&self, before: i64, limit: usize) -> Result<Vec<EventRecord>, JournalError> {
        let rows = within(CALL, self.question(sql::events(before, limit))).await?;
        Ok(rows.iter().map(codec::event).collect::<Result<_, _>>()?)
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
        Change::Intend(intent) => intent.weight(),
        _ => 0,
    }
}

/// How much there is on a side.
struct Fill {
    /// As far as [`sql::FULL`].
    intents: i64,
    marks: i64,
    last: Option<Lsn>,
}

impl Fill {
    /// From the row of [`sql::SIDES`].
    fn read<R: Columns>(row: &R, side: Side) -> sqlx::Result<Self> {
        let first = side.pick([2, 5]);
        Ok(Self {
            intents: row.int(first)?,
            marks: row.int(first + 1)?,
            last: row.opt_int(first + 2)?,
        })
    }

    fn is_empty(&self) -> bool {
        self.intents == 0 && self.marks == 0
    }

    fn is_full(&self) -> bool {
        self.intents >= sql::FULL || self.marks >= sql::FULL
    }

    fn is_covered(&self, covered: Lsn) -> bool {
        self.last.is_none_or(|last| last <= covered)
    }
}

/// What became of a side that was to be emptied.
enum Emptied {
    All,
    Part,
    /// Someone reads it, or something came after all.
    InUse,
}

/// Postgres only: a lock was not to be had in time.
fn is_lock_timeout(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.as_deref() == Some("55P03")
}

fn check_term<R: Columns>(rows: &[R], ours: i64) -> Result<(), JournalError> {
    let found = first_int(rows)?;
    if found == ours {
        Ok(())
    } else {
        Err(JournalError::Fenced { found, ours })
    }
}

/// Of the row of [`sql::lease`]: may it be taken?
fn check_free<R: Columns>(rows: &[R], dead: Option<i64>) -> Result<(), JournalError> {
    let term = first_int(rows)?;
    let row = &rows[0];
    let Some(left) = row.opt_int(4).map_err(refused)? else {
        return Ok(());
    };
    let overdue = Duration::from_millis(left.saturating_neg().try_into().unwrap_or_default());
    if overdue > SKEW || dead == Some(term) {
        return Ok(());
    }
    let holder = holder_of(row)?;
    let left = Duration::from_millis(left.try_into().unwrap_or_default());
    Err(JournalError::Held(Box::new(Lease { term, holder, left })))
}

fn holder_of<R: Columns>(row: &R) -> Result<Holder, JournalError> {
    Ok(Holder {
        name: row.str(1).map_err(refused)?,
        host: row.str(2).map_err(refused)?,
        lock_file: row.opt_str(3).map_err(refused)?,
    })
}

/// Of a row that begins with term and side: the side, if the term is ours.
fn checked_side<R: Columns>(rows: &[R], ours: i64) -> Result<Side, JournalError> {
    check_term(rows, ours)?;
    let side = rows.first().map(|row| row.str(1)).transpose().map_err(refused)?;
    Ok(Side::parse(side.as_deref().unwrap_or_default()))
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
