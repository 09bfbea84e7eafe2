//! The journal in Postgres: for production, and for several proxies, of which one writes.
//!
//! A commit holds a shared lock on the lease table while it writes, and a successor that moves the term on takes an
//! exclusive one: it waits for the commits before it, and those after it find the new term. Table locks and not
//! `SELECT ... FOR SHARE`, because they queue (a stream of commits cannot keep a successor waiting) and write nothing.

use std::str::FromStr;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use log::LevelFilter;
use sqlx::postgres::{PgArguments, PgConnectOptions, PgPool, PgPoolOptions, PgRow};
use sqlx::query::Query;
use sqlx::{ConnectOptions, Connection, PgConnection, Postgres, Row};
use tokio::time::timeout;
use uuid::Uuid;

use super::JournalError;
use super::codec::{Columns, StoredIntent, StoredPayload};
use super::sql::{self, Dialect, Side, Statement, Step, Value, both_sides};
use super::store::{Backend, Store, refused};

/// A server that is away is noticed within this time.
const ACQUIRE: Duration = Duration::from_secs(2);
/// All of connecting at the start, migrations included.
const START: Duration = Duration::from_secs(15);

/// Settings of every session. The last five free what a proxy held whose host vanished without a word: until then its
/// lock on the lease would keep a successor waiting.
const SETTINGS: [(&str, &str); 8] = [
    ("synchronous_commit", "on"),
    ("statement_timeout", "10s"),
    ("lock_timeout", "5s"),
    ("idle_in_transaction_session_timeout", "15s"),
    ("tcp_keepalives_idle", "5"),
    ("tcp_keepalives_interval", "2"),
    ("tcp_keepalives_count", "4"),
    ("tcp_user_timeout", "15s"),
];

/// A [`Journal`](super::Journal) in a Postgres database.
pub type PostgresJournal = Store<PostgresBackend>;

/// The part of [`PostgresJournal`] that is Postgres' own.
pub struct PostgresBackend {
    pool: PgPool,
    place: String,
}

impl PostgresJournal {
    /// Connects, and creates what is missing: `postgres://user:password@host:port/database`. `Refused` when the server
    /// is away; trying again is the caller's.
    pub async fn connect(url: &str, max_connections: u32) -> Result<Self, JournalError> {
        let options = PgConnectOptions::from_str(url)
            .map_err(refused)?
            .application_name("diptych")
            .options(SETTINGS)
            .log_statements(LevelFilter::Trace)
            .log_slow_statements(LevelFilter::Warn, Duration::from_secs(1));
        let place = format!(
            "Postgres {}:{}/{}",
            options.get_host(),
            options.get_port(),
            options.get_database().unwrap_or(options.get_username())
        );
        match timeout(START, migrate(&options)).await {
            Ok(result) => result?,
            Err(_) => return Err(JournalError::Refused(format!("{place} did not answer"))),
        }
        let pool = PgPoolOptions::new()
            .max_connections(max_connections.max(1))
            .acquire_timeout(ACQUIRE)
            .connect_lazy_with(options);
        Ok(Store {
            backend: PostgresBackend { pool, place },
        })
    }
}

/// On a connection of its own: its lock against other migrations goes with it, however it ends.
async fn migrate(options: &PgConnectOptions) -> Result<(), JournalError> {
    let connecting = timeout(ACQUIRE, options.connect()).await;
    let mut connection = connecting.unwrap_or(Err(sqlx::Error::PoolTimedOut)).map_err(refused)?;
    let mut migrations = sqlx::migrate!("migrations/postgres");
    migrations.dangerous_set_table_name("diptych_migrations");
    migrations
        .run_direct(None, &mut connection, false)
        .await
        .map_err(|error| JournalError::Refused(error.to_string()))?;
    connection.close().await.map_err(refused)
}

#[async_trait]
impl Backend for PostgresBackend {
    type Db = Postgres;
    const DIALECT: Dialect = Dialect::Postgres;
    const KEEPS_OTHERS_OUT: bool = false;
    const BEGIN_ALONE: &'static str =
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; LOCK TABLE diptych_lease IN EXCLUSIVE MODE";
    const BEGIN_WITH_TERM: &'static str = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; \
         LOCK TABLE diptych_lease IN ROW SHARE MODE; SELECT term, intents FROM diptych_lease";
    const BEGIN_SNAPSHOT: &'static str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
    const BEGIN_PATIENTLY: &'static str = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; \
         SET LOCAL lock_timeout = '100ms'; LOCK TABLE diptych_lease IN ROW SHARE MODE; \
         SELECT term, intents FROM diptych_lease";
    const CLOSE_SIDE: [&'static str; 2] = both_sides!(
        "LOCK TABLE diptych_intents_",
        ", diptych_marks_",
        " IN ACCESS EXCLUSIVE MODE; SELECT MAX(lsn) FROM diptych_intents_",
        ""
    );
    const EMPTY_SIDE: [&'static str; 2] =
        both_sides!("TRUNCATE diptych_intents_", ", diptych_marks_", "; SELECT 0::bigint");

    fn writers(&self) -> &PgPool {
        &self.pool
    }

    fn readers(&self) -> &PgPool {
        &self.pool
    }

    fn describe(&self) -> String {
        self.place.clone()
    }

    async fn raw(connection: &mut PgConnection, sql: &'static str) -> sqlx::Result<Vec<PgRow>> {
        sqlx::raw_sql(sql).fetch_all(connection).await
    }

    async fn fetch(connection: &mut PgConnection, statement: Statement) -> sqlx::Result<Vec<PgRow>> {
        bind(statement).fetch_all(connection).await
    }

    async fn run(connection: &mut PgConnection, step: Step, side: Side) -> sqlx::Result<()> {
        let query = match step {
            Step::Run(statement) => bind(statement),
            Step::Payloads(rows) => insert(rows),
            Step::Intents(rows) => insert_intents(side, rows),
            Step::Mark(mark) => bind(sql::insert_mark(side, mark)),
        };
        query.execute(connection).await.map(drop)
    }
}

fn bind(statement: Statement) -> Query<'static, Postgres, PgArguments> {
    let mut query = sqlx::query(statement.sql);
    for value in statement.values {
        query = match value {
            Value::Int(value) => query.bind(value),
            Value::OptInt(value) => query.bind(value),
            Value::Flag(value) => query.bind(value),
            Value::Str(value) => query.bind(value),
            Value::OptStr(value) => query.bind(value),
            Value::Id(value) => query.bind(value),
            Value::Ids(value) => query.bind(value),
            Value::Time(value) => query.bind(value),
            Value::Bytes(value) => query.bind(value),
            Value::OptBytes(value) => query.bind(value),
        };
    }
    query
}

/// One row as it is, several as columns.
fn insert(mut rows: Vec<StoredPayload>) -> Query<'static, Postgres, PgArguments> {
    if rows.len() == 1 {
        return bind(sql::insert_payload(rows.remove(0)));
    }
    let bodies: Vec<Vec<u8>> = rows.iter_mut().map(|row| std::mem::take(&mut row.body)).collect();
    sqlx::query(sql::INSERT_PAYLOADS)
        .bind(rows.iter().map(|row| row.id).collect::<Vec<Uuid>>())
        .bind(rows.iter().map(|row| row.node.clone()).collect::<Vec<String>>())
        .bind(rows.iter().map(|row| row.generation).collect::<Vec<Option<i64>>>())
        .bind(rows.iter().map(|row| row.subject).collect::<Vec<Option<i64>>>())
        .bind(rows.iter().map(|row| row.lsn).collect::<Vec<i64>>())
        .bind(rows.iter().map(|row| row.op.clone()).collect::<Vec<String>>())
        .bind(rows.iter().map(|row| row.refused).collect::<Vec<bool>>())
        .bind(rows.iter().map(|row| row.in_doubt).collect::<Vec<bool>>())
        .bind(rows.iter().map(|row| row.attempts).collect::<Vec<i64>>())
        .bind(
            rows.iter()
                .map(|row| row.parked.clone())
                .collect::<Vec<Option<String>>>(),
        )
        .bind(rows.iter().map(|row| row.created_at).collect::<Vec<DateTime<Utc>>>())
        .bind(rows.iter().map(|row| row.body_bytes).collect::<Vec<i64>>())
        .bind(bodies)
}

fn insert_intents(side: Side, mut rows: Vec<StoredIntent>) -> Query<'static, Postgres, PgArguments> {
    if rows.len() == 1 {
        return bind(sql::insert_intent(side, rows.remove(0)));
    }
    let bodies: Vec<Option<Vec<u8>>> = rows.iter_mut().map(|row| row.body.take()).collect();
    sqlx::query(side.pick(sql::INSERT_INTENTS))
        .bind(rows.iter().map(|row| row.lsn).collect::<Vec<i64>>())
        .bind(rows.iter().map(|row| row.generation).collect::<Vec<Option<i64>>>())
        .bind(rows.iter().map(|row| row.op.clone()).collect::<Vec<String>>())
        .bind(rows.iter().map(|row| row.ids.clone()).collect::<Vec<Option<String>>>())
        .bind(rows.iter().map(|row| row.body_bytes).collect::<Vec<Option<i64>>>())
        .bind(bodies)
}

impl Columns for PgRow {
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
        self.try_get(column)
    }

    fn time(&self, column: usize) -> sqlx::Result<DateTime<Utc>> {
        self.try_get(column)
    }

    fn bytes(&self, column: usize) -> sqlx::Result<Vec<u8>> {
        self.try_get(column)
    }

    fn opt_bytes(&self, column: usize) -> sqlx::Result<Option<Vec<u8>>> {
        self.try_get(column)
    }
}
