-- What healing needs: kinds of repair rows, nodes that are known again, suspects, and intents.

ALTER TABLE diptych_repair_rows ADD COLUMN kind TEXT NOT NULL DEFAULT 'whole';
ALTER TABLE diptych_repair_rows ADD COLUMN reversible BOOLEAN NOT NULL DEFAULT FALSE;
ALTER TABLE diptych_repair_rows ADD COLUMN parked TEXT;
UPDATE diptych_repair_rows SET kind = 'records' WHERE ids IS NOT NULL;

CREATE TABLE diptych_nodes (
    node       TEXT PRIMARY KEY NOT NULL,
    marker     TEXT NOT NULL,
    checkpoint BIGINT NOT NULL
);

-- ids: JSON array.
CREATE TABLE diptych_suspects (
    id         TEXT PRIMARY KEY NOT NULL,
    node       TEXT NOT NULL,
    generation BIGINT NOT NULL,
    ids        TEXT NOT NULL,
    step       BIGINT NOT NULL,
    due_at     TEXT NOT NULL
);
CREATE INDEX diptych_suspects_generation ON diptych_suspects (generation);

-- Intents and low-water marks lie on two sides, a and b; inserts go to the side that the lease names, and the other is
-- emptied when nothing on it is needed (what Postgres needs; here it is the same for the sake of being the same). The
-- low-water mark is the highest of all marks and of the one that the lease keeps from marks that are gone.
ALTER TABLE diptych_lease ADD COLUMN intents TEXT NOT NULL DEFAULT 'a' CHECK (intents IN ('a', 'b'));
ALTER TABLE diptych_lease ADD COLUMN low_water BIGINT NOT NULL DEFAULT 0;

-- ids: JSON array, NULL for entries of the namespace. body: with wal.payload always, compressed.
CREATE TABLE diptych_intents_a (
    lsn        INTEGER PRIMARY KEY NOT NULL,
    generation BIGINT,
    op         TEXT NOT NULL,
    ids        TEXT,
    body_bytes BIGINT,
    body       BLOB
);
CREATE TABLE diptych_intents_b (
    lsn        INTEGER PRIMARY KEY NOT NULL,
    generation BIGINT,
    op         TEXT NOT NULL,
    ids        TEXT,
    body_bytes BIGINT,
    body       BLOB
);

CREATE TABLE diptych_marks_a (lsn INTEGER PRIMARY KEY NOT NULL);
CREATE TABLE diptych_marks_b (lsn INTEGER PRIMARY KEY NOT NULL);
