-- What healing needs: kinds of repair rows, nodes that are known again, suspects, and intents.

ALTER TABLE diptych_repair_rows ADD COLUMN kind TEXT NOT NULL DEFAULT 'whole';
ALTER TABLE diptych_repair_rows ADD COLUMN reversible BOOLEAN NOT NULL DEFAULT FALSE;
ALTER TABLE diptych_repair_rows ADD COLUMN parked TEXT;
UPDATE diptych_repair_rows SET kind = 'records' WHERE ids IS NOT NULL;

CREATE TABLE diptych_nodes (
    node       TEXT PRIMARY KEY,
    marker     TEXT NOT NULL,
    checkpoint BIGINT NOT NULL
);

-- ids: JSON array.
CREATE TABLE diptych_suspects (
    id         UUID PRIMARY KEY,
    node       TEXT NOT NULL,
    generation BIGINT NOT NULL,
    ids        TEXT NOT NULL,
    step       BIGINT NOT NULL,
    due_at     TIMESTAMPTZ NOT NULL
);
CREATE INDEX diptych_suspects_generation ON diptych_suspects (generation);

-- Intents and low-water marks are written all the time, so they are inserted and never updated or deleted: with a long
-- transaction elsewhere, dead rows would pile up. They lie on two sides, a and b; inserts go to the side that the lease
-- names, and the other is emptied by TRUNCATE when nothing on it is needed. The low-water mark is the highest of all
-- marks and of the one that the lease keeps from marks that are gone.
ALTER TABLE diptych_lease ADD COLUMN intents TEXT NOT NULL DEFAULT 'a' CHECK (intents IN ('a', 'b'));
ALTER TABLE diptych_lease ADD COLUMN low_water BIGINT NOT NULL DEFAULT 0;

-- ids: JSON array, NULL for entries of the namespace. body: with wal.payload always, compressed. Neither is compressed by
-- Postgres: thousands of random ids would take tens of milliseconds of every write.
CREATE TABLE diptych_intents_a (
    lsn        BIGINT PRIMARY KEY,
    generation BIGINT,
    op         TEXT NOT NULL,
    ids        TEXT,
    body_bytes BIGINT,
    body       BYTEA
);
ALTER TABLE diptych_intents_a ALTER COLUMN ids SET STORAGE EXTERNAL, ALTER COLUMN body SET STORAGE EXTERNAL;
CREATE TABLE diptych_intents_b (LIKE diptych_intents_a INCLUDING ALL);

CREATE TABLE diptych_marks_a (lsn BIGINT PRIMARY KEY);
CREATE TABLE diptych_marks_b (lsn BIGINT PRIMARY KEY);
