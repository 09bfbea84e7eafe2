//! The journal in a SQLite file: one proxy, no server to run.
//!
//! A file has one writer in one process: a lock on `<file>.lock`, held as long as the journal lives, keeps a second
//! process out, and inside the process all commits go through one connection.

use std::fs::{File, TryLockError};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, SecondsFormat, Utc};
use log::LevelFilter;
use sqlx::query::Query;
use sqlx::sqlite::{
    SqliteArguments, SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteRow,
    SqliteSynchronous,
};
use sqlx::{ConnectOptions, Row, Sqlite, SqliteConnection};
use uuid::Uuid;
use uuid::fmt::Hyphenated;

use super::JournalError;
use super::codec::Columns;
use super::sql::{self, Dialect, Side, Statement, Step, Value, both_sides};
use super::store::{Backend, Store, refused};

/// Another program (a shell, a backup) may hold the file that long.
const BUSY: Duration = Duration::from_secs(5);
/// Commits queue for one connection, and each waits for the disk; no server can be dead here.
const ACQUIRE: Duration = Duration::from_secs(10);
/// What the write-ahead file of SQLite is cut back to after a burst.
const WAL_KEEP: &str = "67108864";

/// A [`Journal`](super::Journal) in a SQLite file.
pub type SqliteJournal = Store<SqliteBackend>;

/// The part of [`SqliteJournal`] that is SQLite's own.
pub struct SqliteBackend {
    writer: SqlitePool,
    readers: SqlitePool,
    path: PathBuf,
    /// Held, not used: released when the journal is gone.
    _lock: File,
}

impl SqliteJournal {
    /// Opens or creates the file: `sqlite://relative.db`, `sqlite:///absolute/path.db`. `Refused` when another process
    /// has it open.
    pub async fn open(url: &str, readers: u32) -> Result<Self, JournalError> {
        if url.contains(":memory:") || url.contains("mode=memory") {
            return Err(JournalError::Refused(
                "a journal in memory is none: name a file".to_owned(),
            ));
        }
        let options = SqliteConnectOptions::from_str(url)
            .map_err(refused)?
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY)
            .pragma("journal_size_limit", WAL_KEEP)
            .log_statements(LevelFilter::Trace)
            .log_slow_statements(LevelFilter::Warn, Duration::from_secs(1));
        let path = options.get_filename().to_path_buf();
        let lock = lock(&path)?;
        let pool = |size| {
            SqlitePoolOptions::new()
                .max_connections(size)
                .acquire_timeout(ACQUIRE)
                .idle_timeout(None)
                .max_lifetime(None)
                .test_before_acquire(false)
        };
        let writer = pool(1).connect_with(options.clone()).await.map_err(refused)?;
        let mut migrations = sqlx::migrate!("migrations/sqlite");
        migrations.dangerous_set_table_name("diptych_migrations");
        migrations
            .run(&writer)
            .await
            .map_err(|error| JournalError::Refused(error.to_string()))?;
        let readers = pool(readers.max(1)).connect_lazy_with(options);
        Ok(Store {
            backend: SqliteBackend {
                writer,
                readers,
                path,
                _lock: lock,
            },
        })
    }
}

/// Takes the lock file beside the database.
fn lock(path: &std::path::Path) -> Result<File, JournalError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let name = PathBuf::from(name);
    let failed = |error: &std::io::Error| JournalError::Refused(format!("{}: {error}", name.display()));
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&name)
        .map_err(|error| failed(&error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let message = format!(
                "{} is in use by another Diptych (lock file {})",
                path.display(),
                name.display()
            );
            Err(JournalError::Refused(message))
        }
        Err(TryLockError::Error(error)) => Err(failed(&error)),
    }
}

#[async_trait]
impl Backend for SqliteBackend {
    type Db = Sqlite;
    const DIALECT: Dialect = Dialect::Sqlite;
    /// By the lock file.
    const KEEPS_OTHERS_OUT: bool = true;
    const BEGIN_ALONE: &'static str = "BEGIN IMMEDIATE";
    const BEGIN_WITH_TERM: &'static str = "BEGIN IMMEDIATE; SELECT term, intents FROM diptych_lease";
    const BEGIN_SNAPSHOT: &'static str = "BEGIN";
    const BEGIN_PATIENTLY: &'static str = Self::BEGIN_WITH_TERM;
    const CLOSE_SIDE: [&'static str; 2] = both_sides!("SELECT MAX(lsn) FROM diptych_intents_", "");
    /// A part, because to free many pages takes long, and nobody else writes meanwhile.
    const EMPTY_SIDE: [&'static str; 2] = both_sides!(
        "DELETE FROM diptych_marks_",
        "; DELETE FROM diptych_intents_",
        " WHERE lsn IN (SELECT lsn FROM diptych_intents_",
        " ORDER BY lsn LIMIT 10000); SELECT COUNT(*) FROM (SELECT lsn FROM diptych_intents_",
        " LIMIT 1)"
    );

    fn writers(&self) -> &SqlitePool {
        &self.writer
    }

    fn readers(&self) -> &SqlitePool {
        &self.readers
    }

    fn describe(&self) -> String {
        format!("SQLite file {}", self.path.display())
    }

    async fn raw(connection: &mut SqliteConnection, sql: &'static str) -> sqlx::Result<Vec<SqliteRow>> {
        sqlx::raw_sql(sql).fetch_all(connection).await
    }

    async fn fetch(connection: &mut SqliteConnection, statement: Statement) -> sqlx::Result<Vec<SqliteRow>> {
        bind(statement).fetch_all(connection).await
    }

    async fn run(connection: &mut SqliteConnection, step: Step, side: Side) -> sqlx::Result<()> {
        match step {
            Step::Run(statement) => bind(statement).execute(connection).await.map(drop),
            Step::Payloads(rows) => {
                for row in rows {
                    bind(sql::insert_payload(row)).execute(&mut *connection).await?;
                }
                Ok(())
            }
            Step::Intents(rows) => {
                for row in rows {
                    bind(sql::insert_intent(side, row)).execute(&mut *connection).await?;
                }
                Ok(())
            }
            Step::Mark(mark) => bind(sql::insert_mark(side, mark)).execute(connection).await.map(drop),
        }
    }
}

fn bind(statement: Statement) -> Query<'static, Sqlite, SqliteArguments> {
    let mut query = sqlx::query(statement.sql);
    for value in statement.values {
        query = match value {
            Value::Int(value) => query.bind(value),
            Value::OptInt(value) => query.bind(value),
            Value::Flag(value) => query.bind(value),
            Value::Str(value) => query.bind(value),
            Value::OptStr(value) => query.bind(value),
            Value::Id(value) => query.bind(value.hyphenated()),
            Value::Ids(value) => query.bind(json_ids(&value)),
            Value::Time(value) => query.bind(value.to_rfc3339_opts(SecondsFormat::Micros, true)),
            Value::Bytes(value) => query.bind(value),
            Value::OptBytes(value) => query.bind(value),
        };
    }
    query
}

fn json_ids(ids: &[Uuid]) -> String {
    serde_json::json!(ids).to_string()
}

impl Columns for SqliteRow {
    fn int(&self, column: usize) -> sqlx::Result<i64> {
        self.try_get(column)
    }

    fn opt_int(&self, column: usize) -> sqlx::Result<Option<i64>> {
        self.try_get(column)
    }

    fn flag(&self, column: usize) -> sqlx::Result<bool> {
        self.try_get(column)
    }

    fn str(&self, column: usize) -> sqlx::Result<String> {
        self.try_get(column)
    }

    fn opt_str(&self, column: usize) -> sqlx::Result<Option<String>> {
        self.try_get(column)
    }

    fn id(&self, column: usize) -> sqlx::Result<Uuid> {
        self.try_get::<Hyphenated, _>(column).map(Hyphenated::into_uuid)
    }

    fn time(&self, column: usize) -> sqlx::Result<DateTime<Utc>> {
        let time = self.try_get::<String, _>(column)?;
        DateTime::parse_from_rfc3339(&time)
            .map(|time| time.to_utc())
            .map_err(|error| sqlx::Error::ColumnDecode {
                index: column.to_string(),
                source: error.into(),
            })
    }

    fn bytes(&self, column: usize) -> sqlx::Result<Vec<u8>> {
        self.try_get(column)
    }

    fn opt_bytes(&self, column: usize) -> sqlx::Result<Option<Vec<u8>>> {
        self.try_get(column)
    }
}
