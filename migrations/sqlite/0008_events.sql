-- What happened, for people: bounded, and nothing rests on it. The id grows with the term and within it.
CREATE TABLE diptych_events (
    id   BIGINT PRIMARY KEY,
    at   TEXT NOT NULL,
    kind TEXT NOT NULL,
    node TEXT,
    who  TEXT,
    what TEXT NOT NULL
);
