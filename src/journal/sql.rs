//! What each [`Change`] and each question is in SQL.
//!
//! Pure: a commit becomes a list of [`Step`]s, which a backend binds and runs in order. Both databases understand
//! `$1`, `ON CONFLICT` and `RETURNING`, so nearly every statement is written once; where they differ, [`Dialect`]
//! decides.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::codec::{CodecError, StoredIntent, StoredPayload, text};
use super::{
    Change, CollectionRecord, Commit, DatabaseRecord, EventRecord, Holder, LEASE, Lsn, MaintenanceRecord, NodeRecord,
    RepairRow, SuspectRow,
};
use crate::chroma::Generation;

/// Bounds of one multi-row insert: rows, and bytes of bodies and lists of ids.
const BATCH_ROWS: usize = 1000;
const BATCH_BYTES: usize = 16 << 20;

/// Which SQL a statement is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    Postgres,
    Sqlite,
}

/// A bound parameter.
#[derive(Debug)]
pub enum Value {
    Int(i64),
    OptInt(Option<i64>),
    Flag(bool),
    Str(String),
    OptStr(Option<String>),
    Id(Uuid),
    Ids(Vec<Uuid>),
    Time(DateTime<Utc>),
    Bytes(Vec<u8>),
    OptBytes(Option<Vec<u8>>),
}

/// One statement with its parameters `$1`, `$2`, ...
#[derive(Debug)]
pub struct Statement {
    pub sql: &'static str,
    pub values: Vec<Value>,
}

impl Statement {
    fn new(sql: &'static str, values: Vec<Value>) -> Self {
        Self { sql, values }
    }
}

/// What a backend runs in one go.
#[derive(Debug)]
pub enum Step {
    /// Rows to insert in as few round trips as the backend can.
    Payloads(Vec<StoredPayload>),
    /// The same with intents; they go to the [`Side`] that the transaction found.
    Intents(Vec<StoredIntent>),
    /// A low-water mark; it goes to that side too.
    Mark(Lsn),
    Run(Statement),
}

/// Intents and low-water marks lie in two sets of tables. One takes what comes, as the lease says; the other is
/// emptied as a whole when nothing in it is needed, and takes over then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    A,
    B,
}

impl Side {
    /// As the lease spells it.
    pub fn parse(label: &str) -> Self {
        if label == "b" { Self::B } else { Self::A }
    }

    pub fn label(self) -> &'static str {
        self.pick(["a", "b"])
    }

    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// Of what is there for each side, the one for this side.
    pub fn pick<T: Copy>(self, [a, b]: [T; 2]) -> T {
        match self {
            Self::A => a,
            Self::B => b,
        }
    }
}

/// The same SQL for each side: `@` stands where its letter goes in.
macro_rules! both_sides {
    ($($part:expr),+ $(,)?) => {
        [both_sides!(@ "a"; $($part),+), both_sides!(@ "b"; $($part),+)]
    };
    (@ $side:literal; $first:expr $(, $part:expr)*) => {
        concat!($first $(, $side, $part)*)
    };
}
pub(super) use both_sides;

/// In the order of [`StoredPayload::read`].
macro_rules! outline_columns {
    () => {
        "id, node, generation, subject, lsn, op, refused, in_doubt, attempts, parked, created_at, body_bytes"
    };
}

macro_rules! payload_columns {
    () => {
        concat!(outline_columns!(), ", body")
    };
}

/// True for a collection `c` that some row still speaks of. A row of the namespace lane that names no collection
/// (a deleted database, a reset) may be about any.
macro_rules! spoken_of {
    () => {
        "(EXISTS (SELECT 1 FROM diptych_payload_rows p WHERE p.generation = c.generation) \
          OR EXISTS (SELECT 1 FROM diptych_payload_rows p WHERE p.subject = c.generation) \
          OR EXISTS (SELECT 1 FROM diptych_payload_rows p WHERE p.generation IS NULL AND p.subject IS NULL) \
          OR EXISTS (SELECT 1 FROM diptych_repair_rows r WHERE r.generation = c.generation) \
          OR EXISTS (SELECT 1 FROM diptych_repair_rows r WHERE r.generation IS NULL))"
    };
}

/// The first rows of a lane: by rows, then by the running sum of their bodies, which is taken before a body is read.
macro_rules! lane {
    ($generation:literal) => {
        concat!(
            "SELECT ",
            payload_columns!(),
            " FROM diptych_payload_rows WHERE node = $1 AND ",
            $generation,
            " AND lsn <= (SELECT MAX(lsn) FROM (SELECT lsn, body_bytes, SUM(body_bytes) OVER (ORDER BY lsn) AS upto \
             FROM (SELECT lsn, body_bytes FROM diptych_payload_rows WHERE node = $1 AND ",
            $generation,
            " ORDER BY lsn LIMIT $2) AS first_rows) AS sums WHERE upto <= $3 OR upto = body_bytes) ORDER BY lsn"
        )
    };
}

macro_rules! outlines {
    ($generation:literal) => {
        concat!(
            "SELECT ",
            outline_columns!(),
            " FROM diptych_payload_rows WHERE node = $1 AND ",
            $generation,
            " ORDER BY lsn LIMIT $2 OFFSET $3"
        )
    };
}

/// In the order of [`StoredIntent`].
macro_rules! intent_columns {
    () => {
        "lsn, generation, op, ids, body_bytes, body"
    };
}

macro_rules! low_water {
    () => {
        "SELECT MAX(mark) FROM (SELECT low_water AS mark FROM diptych_lease \
         UNION ALL SELECT MAX(lsn) FROM diptych_marks_a UNION ALL SELECT MAX(lsn) FROM diptych_marks_b) AS marks"
    };
}

/// A single row; [`INSERT_PAYLOADS`] is the same for many.
const INSERT_PAYLOAD: &str = concat!(
    "INSERT INTO diptych_payload_rows (",
    payload_columns!(),
    ") VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13) ON CONFLICT (id) DO NOTHING"
);

/// Postgres only: each parameter is a column of all rows.
pub const INSERT_PAYLOADS: &str = concat!(
    "INSERT INTO diptych_payload_rows (",
    payload_columns!(),
    ") SELECT * FROM UNNEST($1::uuid[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::text[], \
     $7::boolean[], $8::boolean[], $9::bigint[], $10::text[], $11::timestamptz[], $12::bigint[], $13::bytea[]) \
     ON CONFLICT (id) DO NOTHING"
);

/// A single intent; [`INSERT_INTENTS`] is the same for many.
const INSERT_INTENT: [&str; 2] = both_sides!(
    "INSERT INTO diptych_intents_",
    concat!(
        " (",
        intent_columns!(),
        ") VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (lsn) DO NOTHING"
    )
);

/// Postgres only: each parameter is a column of all rows.
pub const INSERT_INTENTS: [&str; 2] = both_sides!(
    "INSERT INTO diptych_intents_",
    concat!(
        " (",
        intent_columns!(),
        ") SELECT * FROM UNNEST($1::bigint[], $2::bigint[], $3::text[], $4::text[], $5::bigint[], $6::bytea[]) \
         ON CONFLICT (lsn) DO NOTHING"
    )
);

const INSERT_MARK: [&str; 2] = both_sides!(
    "INSERT INTO diptych_marks_",
    " (lsn) VALUES ($1) ON CONFLICT (lsn) DO NOTHING"
);

/// The current term, without changing it.
pub const TERM: &str = "SELECT term FROM diptych_lease";

pub const COLLECTIONS: &str = concat!(
    "SELECT generation, client_id, tenant, database, name, deleted, created_at, updated_at \
     FROM diptych_collections c WHERE NOT deleted OR ",
    spoken_of!(),
    " ORDER BY generation"
);
pub const NODE_IDS: &str = "SELECT generation, node, node_id FROM diptych_collection_nodes";
pub const DATABASES: &str = "SELECT tenant, name, client_id FROM diptych_databases ORDER BY tenant, name";
pub const TENANTS: &str = "SELECT name FROM diptych_tenants ORDER BY name";
pub const REPAIRS: &str = "SELECT id, node, generation, ids, source, source_marker, lsn, reason, created_at, \
     kind, reversible, parked FROM diptych_repair_rows ORDER BY lsn, id";
pub const BACKLOGS: &str = "SELECT node, generation, COUNT(*), CAST(SUM(body_bytes) AS BIGINT), COUNT(parked), \
     MIN(created_at) FROM diptych_payload_rows GROUP BY node, generation ORDER BY node, generation";

pub const NODES: &str = "SELECT node, marker, checkpoint FROM diptych_nodes ORDER BY node";
pub const MAINTENANCE: &str = "SELECT node, since, who FROM diptych_maintenance ORDER BY node";
pub const PINS: &str = "SELECT generation, node FROM diptych_read_pins";
pub const SUSPECTS: &str = "SELECT id, node, generation, ids, step, due_at FROM diptych_suspects ORDER BY due_at, id";
pub const LOW_WATER: &str = low_water!();

/// Keeps the low-water mark when the marks of a side go.
pub const KEEP_LOW_WATER: &str = concat!("UPDATE diptych_lease SET low_water = (", low_water!(), ")");

/// From this many rows on, intents move to the other side.
pub const FULL: i64 = 10_000;

/// Of each side: number of intents and of marks, both as far as [`FULL`], and the last intent.
pub const SIDES: &str = "SELECT term, intents, \
     (SELECT COUNT(*) FROM (SELECT lsn FROM diptych_intents_a LIMIT 10000) AS i), \
     (SELECT COUNT(*) FROM (SELECT lsn FROM diptych_marks_a LIMIT 10000) AS m), \
     (SELECT MAX(lsn) FROM diptych_intents_a), \
     (SELECT COUNT(*) FROM (SELECT lsn FROM diptych_intents_b LIMIT 10000) AS i), \
     (SELECT COUNT(*) FROM (SELECT lsn FROM diptych_marks_b LIMIT 10000) AS m), \
     (SELECT MAX(lsn) FROM diptych_intents_b) FROM diptych_lease";

/// Deleted collections that nothing speaks of any more.
pub const PURGE: &str = concat!(
    "DELETE FROM diptych_collections AS c WHERE deleted AND NOT ",
    spoken_of!()
);

/// A question without parameters.
pub fn ask(sql: &'static str) -> Statement {
    Statement::new(sql, Vec::new())
}

/// Moves the term on and returns it.
pub fn take_term(holder: &Holder, now: DateTime<Utc>) -> Statement {
    Statement::new(
        "UPDATE diptych_lease SET term = term + 1, holder = $1, taken_at = $2, host = $3, lock_file = $4 RETURNING term",
        vec![
            string(&holder.name),
            Value::Time(now),
            string(&holder.host),
            opt_string(holder.lock_file.as_deref()),
        ],
    )
}

/// The lease: term, holder, host, lock file, and the milliseconds that it runs, by the database's clock; NULL when
/// nobody holds it.
pub fn lease(dialect: Dialect) -> Statement {
    ask(match dialect {
        Dialect::Postgres => {
            "SELECT term, holder, host, lock_file, \
             CAST(EXTRACT(EPOCH FROM expires_at - clock_timestamp()) * 1000 AS BIGINT) \
             FROM diptych_lease CROSS JOIN diptych_lease_end"
        }
        Dialect::Sqlite => {
            "SELECT term, holder, host, lock_file, \
             CAST((julianday(expires_at) - julianday('now')) * 86400000 AS INTEGER) \
             FROM diptych_lease CROSS JOIN diptych_lease_end"
        }
    })
}

/// From now on the lease runs for its whole time.
pub fn renew_lease(dialect: Dialect) -> Statement {
    let sql = match dialect {
        Dialect::Postgres => "UPDATE diptych_lease_end SET expires_at = clock_timestamp() + $1 * INTERVAL '1 second'",
        Dialect::Sqlite => {
            "UPDATE diptych_lease_end SET expires_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', $1 || ' seconds')"
        }
    };
    Statement::new(sql, vec![Value::Int(LEASE.as_secs().cast_signed())])
}

/// Moves the term on to at least `to` and returns it.
pub fn raise_term(to: i64) -> Statement {
    Statement::new(
        "UPDATE diptych_lease SET term = CASE WHEN term < $1 THEN $1 ELSE term END RETURNING term",
        vec![Value::Int(to)],
    )
}

/// From now on inserts go to `side`.
pub fn turn_to(side: Side) -> Statement {
    Statement::new("UPDATE diptych_lease SET intents = $1", vec![string(side.label())])
}

/// Intents above `above`, by LSN: at least the first `limit`, if there are so many.
pub fn intents(above: Lsn, limit: usize) -> Statement {
    let sql = concat!(
        "SELECT * FROM (SELECT ",
        intent_columns!(),
        " FROM diptych_intents_a WHERE lsn > $1 ORDER BY lsn LIMIT $2) AS a UNION ALL SELECT * FROM (SELECT ",
        intent_columns!(),
        " FROM diptych_intents_b WHERE lsn > $1 ORDER BY lsn LIMIT $2) AS b ORDER BY lsn"
    );
    Statement::new(sql, vec![Value::Int(above), size(limit)])
}

/// See [`super::Journal::payload`].
pub fn payload(id: Uuid) -> Statement {
    let sql = concat!(
        "SELECT ",
        payload_columns!(),
        " FROM diptych_payload_rows WHERE id = $1"
    );
    Statement::new(sql, vec![Value::Id(id)])
}

/// See [`super::Journal::payloads`].
pub fn payloads(node: &str, generation: Option<Generation>, max_rows: usize, max_bytes: usize) -> Statement {
    let mut values = vec![string(node), size(max_rows.max(1)), size(max_bytes)];
    values.extend(generation.map(Value::Int));
    let sql = match generation {
        Some(_) => lane!("generation = $4"),
        None => lane!("generation IS NULL"),
    };
    Statement::new(sql, values)
}

/// See [`super::Journal::outlines`].
pub fn outlines(node: &str, generation: Option<Generation>, offset: usize, limit: usize) -> Statement {
    let mut values = vec![string(node), size(limit), size(offset)];
    values.extend(generation.map(Value::Int));
    let sql = match generation {
        Some(_) => outlines!("generation = $4"),
        None => outlines!("generation IS NULL"),
    };
    Statement::new(sql, values)
}

/// See [`super::Journal::parked`].
pub fn parked(limit: usize) -> Statement {
    let sql = concat!(
        "SELECT ",
        outline_columns!(),
        " FROM diptych_payload_rows WHERE parked IS NOT NULL ORDER BY created_at DESC, lsn DESC LIMIT $1"
    );
    Statement::new(sql, vec![size(limit)])
}

/// See [`super::Journal::events`].
pub fn events(before: i64, limit: usize) -> Statement {
    Statement::new(
        "SELECT id, at, kind, node, who, what FROM diptych_events WHERE id < $1 ORDER BY id DESC LIMIT $2",
        vec![Value::Int(before), size(limit)],
    )
}

/// The insert of one payload row.
pub fn insert_payload(row: StoredPayload) -> Statement {
    Statement::new(
        INSERT_PAYLOAD,
        vec![
            Value::Id(row.id),
            Value::Str(row.node),
            Value::OptInt(row.generation),
            Value::OptInt(row.subject),
            Value::Int(row.lsn),
            Value::Str(row.op),
            Value::Flag(row.refused),
            Value::Flag(row.in_doubt),
            Value::Int(row.attempts),
            Value::OptStr(row.parked),
            Value::Time(row.created_at),
            Value::Int(row.body_bytes),
            Value::Bytes(row.body),
        ],
    )
}

/// The insert of one intent.
pub fn insert_intent(side: Side, intent: StoredIntent) -> Statement {
    Statement::new(
        side.pick(INSERT_INTENT),
        vec![
            Value::Int(intent.lsn),
            Value::OptInt(intent.generation),
            Value::Str(intent.op),
            Value::OptStr(intent.ids),
            Value::OptInt(intent.body_bytes),
            Value::OptBytes(intent.body),
        ],
    )
}

/// The insert of a low-water mark.
pub fn insert_mark(side: Side, mark: Lsn) -> Statement {
    Statement::new(side.pick(INSERT_MARK), vec![Value::Int(mark)])
}

/// The steps of a commit; neighbouring payload rows become one step, and so do neighbouring intents.
pub fn plan(commit: &Commit, dialect: Dialect) -> Result<Vec<Step>, CodecError> {
    let mut steps = Vec::with_capacity(commit.len());
    // In the last step.
    let mut bytes = 0;
    for change in commit {
        match change {
            Change::InsertPayload(row) => {
                let row = StoredPayload::pack(row)?;
                let size = row.body.len();
                match steps.last_mut() {
                    Some(Step::Payloads(rows)) if has_room(rows.len(), bytes + size) => {
                        rows.push(row);
                        bytes += size;
                    }
                    _ => {
                        steps.push(Step::Payloads(vec![row]));
                        bytes = size;
                    }
                }
            }
            Change::Intend(intent) => {
                let row = StoredIntent::pack(intent)?;
                let size = row.size();
                match steps.last_mut() {
                    Some(Step::Intents(rows)) if has_room(rows.len(), bytes + size) => {
                        rows.push(row);
                        bytes += size;
                    }
                    _ => {
                        steps.push(Step::Intents(vec![row]));
                        bytes = size;
                    }
                }
            }
            other => statements(other, dialect, &mut steps)?,
        }
    }
    Ok(steps)
}

fn has_room(rows: usize, bytes: usize) -> bool {
    rows < BATCH_ROWS && bytes <= BATCH_BYTES
}

/// The steps of one change that is not inserted together with its neighbours.
fn statements(change: &Change, dialect: Dialect, steps: &mut Vec<Step>) -> Result<(), CodecError> {
    let mut run = |sql, values| steps.push(Step::Run(Statement::new(sql, values)));
    match change {
        Change::InsertPayload(row) => steps.push(Step::Payloads(vec![StoredPayload::pack(row)?])),
        Change::Intend(intent) => steps.push(Step::Intents(vec![StoredIntent::pack(intent)?])),
        Change::RemovePayloads(ids) => {
            let sql = match dialect {
                Dialect::Postgres => "DELETE FROM diptych_payload_rows WHERE id = ANY($1)",
                Dialect::Sqlite => "DELETE FROM diptych_payload_rows WHERE id IN (SELECT value FROM json_each($1))",
            };
            run(sql, vec![Value::Ids(ids.clone())]);
        }
        Change::RemovePayloadsOf(generation) => {
            run(
                "DELETE FROM diptych_payload_rows WHERE generation = $1",
                vec![Value::Int(*generation)],
            );
        }
        Change::CountAttempt(id) => {
            run(
                "UPDATE diptych_payload_rows SET attempts = attempts + 1 WHERE id = $1",
                vec![Value::Id(*id)],
            );
        }
        Change::MarkInDoubt(id) => {
            run(
                "UPDATE diptych_payload_rows SET in_doubt = $2 WHERE id = $1",
                vec![Value::Id(*id), Value::Flag(true)],
            );
        }
        Change::MarkRefused { node, lsn } => {
            run(
                "UPDATE diptych_payload_rows SET refused = $3 WHERE node = $1 AND lsn = $2",
                vec![string(node), Value::Int(*lsn), Value::Flag(true)],
            );
        }
        Change::Park { id, reason } => {
            run(
                "UPDATE diptych_payload_rows SET parked = $2 WHERE id = $1",
                vec![Value::Id(*id), string(reason)],
            );
        }
        Change::InsertRepair(row) => run(INSERT_REPAIR, repair_values(row)?),
        Change::RemoveRepairs(ids) => {
            let sql = match dialect {
                Dialect::Postgres => "DELETE FROM diptych_repair_rows WHERE id = ANY($1)",
                Dialect::Sqlite => "DELETE FROM diptych_repair_rows WHERE id IN (SELECT value FROM json_each($1))",
            };
            run(sql, vec![Value::Ids(ids.clone())]);
        }
        Change::PinReads { generation, node } => run(PIN_READS, vec![Value::Int(*generation), string(node)]),
        Change::UnpinReads(generation) => run(UNPIN_READS, vec![Value::Int(*generation)]),
        Change::RemoveRepairsOf(generation) => {
            run(
                "DELETE FROM diptych_repair_rows WHERE generation = $1",
                vec![Value::Int(*generation)],
            );
            run(
                "DELETE FROM diptych_suspects WHERE generation = $1",
                vec![Value::Int(*generation)],
            );
            run(UNPIN_READS, vec![Value::Int(*generation)]);
        }
        Change::PutCollection(collection) => run(PUT_COLLECTION, collection_values(collection)),
        Change::PutNodeId { generation, node, id } => {
            run(PUT_NODE_ID, vec![Value::Int(*generation), string(node), Value::Id(*id)]);
        }
        Change::PutDatabase(DatabaseRecord {
            tenant,
            name,
            client_id,
        }) => {
            run(REMOVE_DATABASE, vec![string(tenant), string(name)]);
            run(PUT_DATABASE, vec![string(tenant), string(name), Value::Id(*client_id)]);
        }
        Change::RemoveDatabase { tenant, name } => run(REMOVE_DATABASE, vec![string(tenant), string(name)]),
        Change::PutTenant(name) => run(PUT_TENANT, vec![string(name)]),
        Change::RemoveEverything => {
            run("DELETE FROM diptych_payload_rows", Vec::new());
            run("DELETE FROM diptych_repair_rows", Vec::new());
            run("DELETE FROM diptych_suspects", Vec::new());
            run("DELETE FROM diptych_read_pins", Vec::new());
            run("DELETE FROM diptych_databases", Vec::new());
            run("DELETE FROM diptych_tenants", Vec::new());
            run("DELETE FROM diptych_collections", Vec::new());
        }
        Change::Unpark(id) => {
            run(
                "UPDATE diptych_payload_rows SET parked = NULL, attempts = 0 WHERE id = $1",
                vec![Value::Id(*id)],
            );
        }
        Change::RemoveBacklog { node, generation, upto } => {
            let mut values = vec![string(node), Value::Int(*upto)];
            values.extend(generation.map(Value::Int));
            let sql = match generation {
                Some(_) => "DELETE FROM diptych_payload_rows WHERE node = $1 AND lsn <= $2 AND generation = $3",
                None => "DELETE FROM diptych_payload_rows WHERE node = $1 AND lsn <= $2 AND generation IS NULL",
            };
            run(sql, values);
        }
        Change::ParkRepair { id, reason } => run(PARK_REPAIR, vec![Value::Id(*id), string(reason)]),
        Change::UnparkRepair(id) => run(PARK_REPAIR, vec![Value::Id(*id), Value::OptStr(None)]),
        Change::SetLowWater(mark) => steps.push(Step::Mark(*mark)),
        Change::RenewLease => steps.push(Step::Run(renew_lease(dialect))),
        Change::ReleaseLease => run("UPDATE diptych_lease_end SET expires_at = NULL", vec![]),
        Change::PutNode(NodeRecord {
            node,
            marker,
            checkpoint,
        }) => run(PUT_NODE, vec![string(node), string(marker), Value::Int(*checkpoint)]),
        Change::PutMaintenance(MaintenanceRecord { node, since, who }) => {
            run(PUT_MAINTENANCE, vec![string(node), Value::Time(*since), string(who)]);
        }
        Change::EndMaintenance { node } => {
            run("DELETE FROM diptych_maintenance WHERE node = $1", vec![string(node)]);
        }
        Change::InsertEvents(events) => {
            for event in events {
                run(INSERT_EVENT, event_values(event));
            }
        }
        Change::TrimEvents { keep } => run(
            "DELETE FROM diptych_events WHERE id <= (SELECT id FROM diptych_events ORDER BY id DESC LIMIT 1 OFFSET $1)",
            vec![size(*keep)],
        ),
        Change::ForgetNodeIds { node } => {
            run(
                "DELETE FROM diptych_collection_nodes WHERE node = $1",
                vec![string(node)],
            );
        }
        Change::PutSuspect(row) => run(PUT_SUSPECT, suspect_values(row)?),
        Change::RemoveSuspects(ids) => {
            let sql = match dialect {
                Dialect::Postgres => "DELETE FROM diptych_suspects WHERE id = ANY($1)",
                Dialect::Sqlite => "DELETE FROM diptych_suspects WHERE id IN (SELECT value FROM json_each($1))",
            };
            run(sql, vec![Value::Ids(ids.clone())]);
        }
    }
    Ok(())
}

const INSERT_REPAIR: &str = "INSERT INTO diptych_repair_rows \
     (id, node, generation, ids, source, source_marker, lsn, reason, created_at, kind, reversible, parked) \
     VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) ON CONFLICT (id) DO NOTHING";

const PUT_COLLECTION: &str = "INSERT INTO diptych_collections \
     (generation, client_id, tenant, database, name, deleted, created_at, updated_at) \
     VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (generation) DO UPDATE SET \
     client_id = excluded.client_id, tenant = excluded.tenant, database = excluded.database, name = excluded.name, \
     deleted = excluded.deleted, created_at = excluded.created_at, updated_at = excluded.updated_at";

const PUT_NODE_ID: &str = "INSERT INTO diptych_collection_nodes (generation, node, node_id) VALUES ($1, $2, $3) \
     ON CONFLICT (generation, node) DO UPDATE SET node_id = excluded.node_id";

const PARK_REPAIR: &str = "UPDATE diptych_repair_rows SET parked = $2 WHERE id = $1";

const PUT_NODE: &str = "INSERT INTO diptych_nodes (node, marker, checkpoint) VALUES ($1, $2, $3) \
     ON CONFLICT (node) DO UPDATE SET marker = excluded.marker, checkpoint = excluded.checkpoint";

const PUT_MAINTENANCE: &str = "INSERT INTO diptych_maintenance (node, since, who) VALUES ($1, $2, $3) \
     ON CONFLICT (node) DO UPDATE SET since = excluded.since, who = excluded.who";

const INSERT_EVENT: &str = "INSERT INTO diptych_events (id, at, kind, node, who, what) \
     VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (id) DO NOTHING";

const PIN_READS: &str = "INSERT INTO diptych_read_pins (generation, node) VALUES ($1, $2) \
     ON CONFLICT (generation) DO UPDATE SET node = excluded.node";

const UNPIN_READS: &str = "DELETE FROM diptych_read_pins WHERE generation = $1";

const PUT_SUSPECT: &str = "INSERT INTO diptych_suspects (id, node, generation, ids, step, due_at) \
     VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (id) DO UPDATE SET node = excluded.node, \
     generation = excluded.generation, ids = excluded.ids, step = excluded.step, due_at = excluded.due_at";

const REMOVE_DATABASE: &str = "DELETE FROM diptych_databases WHERE tenant = $1 AND name = $2";
const PUT_TENANT: &str = "INSERT INTO diptych_tenants (name) VALUES ($1) ON CONFLICT (name) DO NOTHING";
const PUT_DATABASE: &str = "INSERT INTO diptych_databases (tenant, name, client_id) VALUES ($1, $2, $3)";

fn repair_values(row: &RepairRow) -> Result<Vec<Value>, CodecError> {
    let ids = row.ids.as_ref().map(serde_json::to_string).transpose()?;
    Ok(vec![
        Value::Id(row.id),
        string(&row.node),
        Value::OptInt(row.generation),
        Value::OptStr(ids),
        opt_string(row.source.as_deref()),
        opt_string(row.source_marker.as_deref()),
        Value::Int(row.lsn),
        string(&row.reason),
        Value::Time(row.created_at),
        string(row.kind.label()),
        Value::Flag(row.reversible),
        opt_string(row.parked.as_deref()),
    ])
}

fn event_values(event: &EventRecord) -> Vec<Value> {
    vec![
        Value::Int(event.id),
        Value::Time(event.at),
        string(&event.kind),
        opt_string(event.node.as_deref()),
        opt_string(event.who.as_deref()),
        string(&event.what),
    ]
}

fn suspect_values(row: &SuspectRow) -> Result<Vec<Value>, CodecError> {
    Ok(vec![
        Value::Id(row.id),
        string(&row.node),
        Value::Int(row.generation),
        Value::Str(serde_json::to_string(&row.ids)?),
        Value::Int(i64::from(row.step)),
        Value::Time(row.due_at),
    ])
}

fn collection_values(collection: &CollectionRecord) -> Vec<Value> {
    vec![
        Value::Int(collection.generation),
        Value::Id(collection.client_id),
        string(&collection.tenant),
        string(&collection.database),
        string(&collection.name),
        Value::Flag(collection.deleted),
        Value::Time(collection.created_at),
        Value::Time(collection.updated_at),
    ]
}

fn string(value: &str) -> Value {
    Value::Str(text(value).into_owned())
}

fn opt_string(value: Option<&str>) -> Value {
    Value::OptStr(value.map(|value| text(value).into_owned()))
}

fn size(value: usize) -> Value {
    Value::Int(i64::try_from(value).unwrap_or(i64::MAX))
}
