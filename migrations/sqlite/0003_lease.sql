-- Who holds the lease, and until when (what Postgres needs; here a lock on the file keeps other processes out as well).
-- host and lock_file are for a successor on the same host: where it can get the lock on that file, the holder is dead.
ALTER TABLE diptych_lease ADD COLUMN host TEXT NOT NULL DEFAULT '';
ALTER TABLE diptych_lease ADD COLUMN lock_file TEXT;

-- NULL: nobody holds it.
CREATE TABLE diptych_lease_end (
    only_row   BOOLEAN PRIMARY KEY DEFAULT TRUE CHECK (only_row),
    expires_at TEXT
);
INSERT INTO diptych_lease_end (expires_at) VALUES (NULL);
