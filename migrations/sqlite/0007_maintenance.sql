-- Nodes that an operator took out of service.
CREATE TABLE diptych_maintenance (
    node  TEXT PRIMARY KEY,
    since TEXT NOT NULL,
    who   TEXT NOT NULL
);
