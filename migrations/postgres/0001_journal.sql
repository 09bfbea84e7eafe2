-- The journal. Every name begins with diptych_, so that it can share a database with other applications.

-- Who may write: one row; a writer that finds another term than its own is refused.
CREATE TABLE diptych_lease (
    only_row BOOLEAN PRIMARY KEY DEFAULT TRUE CHECK (only_row),
    term     BIGINT NOT NULL,
    holder   TEXT NOT NULL,
    taken_at TIMESTAMPTZ
);
INSERT INTO diptych_lease (term, holder) VALUES (0, '');

CREATE TABLE diptych_collections (
    generation BIGINT PRIMARY KEY,
    client_id  UUID NOT NULL UNIQUE,
    tenant     TEXT NOT NULL,
    database   TEXT NOT NULL,
    name       TEXT NOT NULL,
    deleted    BOOLEAN NOT NULL,
    created_at TIMESTAMPTZ NOT NULL,
    updated_at TIMESTAMPTZ NOT NULL
);
CREATE INDEX diptych_collections_deleted ON diptych_collections (generation) WHERE deleted;

CREATE TABLE diptych_collection_nodes (
    generation BIGINT NOT NULL REFERENCES diptych_collections ON DELETE CASCADE,
    node       TEXT NOT NULL,
    node_id    UUID NOT NULL,
    PRIMARY KEY (generation, node),
    UNIQUE (node, node_id)
);

-- Names have no length limit, an index entry has: the digest is unique instead.
CREATE TABLE diptych_databases (
    tenant    TEXT NOT NULL,
    name      TEXT NOT NULL,
    client_id UUID NOT NULL
);
CREATE UNIQUE INDEX diptych_databases_name ON diptych_databases (md5(tenant), md5(name));

-- generation: the collection's lane, NULL for the namespace lane. subject: the collection that the entry is about.
-- body is the last column and kept out of line: counting rows does not read it.
CREATE TABLE diptych_payload_rows (
    id         UUID PRIMARY KEY,
    node       TEXT NOT NULL,
    generation BIGINT,
    subject    BIGINT,
    lsn        BIGINT NOT NULL,
    op         TEXT NOT NULL,
    refused    BOOLEAN NOT NULL,
    in_doubt   BOOLEAN NOT NULL,
    attempts   BIGINT NOT NULL,
    parked     TEXT,
    created_at TIMESTAMPTZ NOT NULL,
    body_bytes BIGINT NOT NULL,
    body       BYTEA NOT NULL,
    UNIQUE (node, lsn)
);
ALTER TABLE diptych_payload_rows ALTER COLUMN body SET STORAGE EXTERNAL;
CREATE INDEX diptych_payload_rows_lane ON diptych_payload_rows (node, generation, lsn);
CREATE INDEX diptych_payload_rows_generation ON diptych_payload_rows (generation);
CREATE INDEX diptych_payload_rows_subject ON diptych_payload_rows (subject) WHERE subject IS NOT NULL;
CREATE INDEX diptych_payload_rows_parked ON diptych_payload_rows (created_at) WHERE parked IS NOT NULL;

-- ids: JSON array, NULL for all.
CREATE TABLE diptych_repair_rows (
    id            UUID PRIMARY KEY,
    node          TEXT NOT NULL,
    generation    BIGINT,
    ids           TEXT,
    source        TEXT,
    source_marker TEXT,
    lsn           BIGINT NOT NULL,
    reason        TEXT NOT NULL,
    created_at    TIMESTAMPTZ NOT NULL
);
CREATE INDEX diptych_repair_rows_generation ON diptych_repair_rows (generation, node);
