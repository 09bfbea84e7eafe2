-- Who holds the lease, and until when. host and lock_file are for a successor on the same host: where it can get the lock
-- on that file, the holder is dead. expires_at is in a table of its own because it is renewed all the time: with a long
-- transaction elsewhere dead rows pile up, and every commit reads diptych_lease.
ALTER TABLE diptych_lease ADD COLUMN host TEXT NOT NULL DEFAULT '';
ALTER TABLE diptych_lease ADD COLUMN lock_file TEXT;

-- NULL: nobody holds it.
CREATE TABLE diptych_lease_end (
    only_row   BOOLEAN PRIMARY KEY DEFAULT TRUE CHECK (only_row),
    expires_at TIMESTAMPTZ
);
INSERT INTO diptych_lease_end (expires_at) VALUES (NULL);
