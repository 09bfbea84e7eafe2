-- Tenants that somebody was told of: a node cannot list its tenants, and one that was wiped gets them back.
CREATE TABLE diptych_tenants (
    name TEXT PRIMARY KEY
);
