-- Collections whose records may lie in different orders on the nodes: pages are read from this one.
CREATE TABLE diptych_read_pins (
    generation BIGINT PRIMARY KEY,
    node       TEXT NOT NULL
);
