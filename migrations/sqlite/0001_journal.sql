-- The journal. The same tables as for Postgres; UUIDs and times (RFC 3339, UTC, microseconds) are text for people.

-- Who may write: one row; a writer that finds another term than its own is refused.
CREATE TABLE diptych_lease (
    only_row BOOLEAN PRIMARY KEY DEFAULT TRUE CHECK (only_row),
    term     BIGINT NOT NULL,
    holder   TEXT NOT NULL,
    taken_at TEXT
);
INSERT INTO diptych_lease (term, holder) VALUES (0, '');

CREATE TABLE diptych_collections (
    generation BIGINT PRIMARY KEY,
    client_id  TEXT NOT NULL UNIQUE,
    tenant     TEXT NOT NULL,
    database   TEXT NOT NULL,
    name       TEXT NOT NULL,
    deleted    BOOLEAN NOT NULL,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
);
CREATE INDEX diptych_collections_deleted ON diptych_collections (generation) WHERE deleted;

CREATE TABLE diptych_collection_nodes (
    generation BIGINT NOT NULL REFERENCES diptych_collections ON DELETE CASCADE,
    node       TEXT NOT NULL,
    node_id    TEXT NOT NULL,
    PRIMARY KEY (generation, node),
    UNIQUE (node, node_id)
);

CREATE TABLE diptych_databases (
    tenant    TEXT NOT NULL,
    name      TEXT NOT NULL,
    client_id TEXT NOT NULL,
    PRIMARY KEY (tenant, name)
);

-- generation: the collection's lane, NULL for the namespace lane. subject: the collection that the entry is about.
-- body is the last column: counting rows does not read its overflow pages.
CREATE TABLE diptych_payload_rows (
    id         TEXT PRIMARY KEY NOT NULL,
    node       TEXT NOT NULL,
    generation BIGINT,
    subject    BIGINT,
    lsn        BIGINT NOT NULL,
    op         TEXT NOT NULL,
    refused    BOOLEAN NOT NULL,
    in_doubt   BOOLEAN NOT NULL,
    attempts   BIGINT NOT NULL,
    parked     TEXT,
    created_at TEXT NOT NULL,
    body_bytes BIGINT NOT NULL,
    body       BLOB NOT NULL,
    UNIQUE (node, lsn)
);
CREATE INDEX diptych_payload_rows_lane ON diptych_payload_rows (node, generation, lsn);
CREATE INDEX diptych_payload_rows_generation ON diptych_payload_rows (generation);
CREATE INDEX diptych_payload_rows_subject ON diptych_payload_rows (subject) WHERE subject IS NOT NULL;
CREATE INDEX diptych_payload_rows_parked ON diptych_payload_rows (created_at) WHERE parked IS NOT NULL;

-- ids: JSON array, NULL for all.
CREATE TABLE diptych_repair_rows (
    id            TEXT PRIMARY KEY NOT NULL,
    node          TEXT NOT NULL,
    generation    BIGINT,
    ids           TEXT,
    source        TEXT,
    source_marker TEXT,
    lsn           BIGINT NOT NULL,
    reason        TEXT NOT NULL,
    created_at    TEXT NOT NULL
);
CREATE INDEX diptych_repair_rows_generation ON diptych_repair_rows (generation, node);
