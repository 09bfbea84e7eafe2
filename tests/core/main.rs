//! The core (lane, mirror, journal rows, drain) between fake nodes and a fake journal, on virtual time: for the faults
//! that real servers do not show on demand. Each test looks at what both nodes hold and at the journal's rows.
#![allow(clippy::disallowed_methods, reason = "time is virtual here: the tests own the clock")]

mod adoption;
mod citations;
mod combining;
mod corrupt;
mod crashes;
mod doubt;
mod drain;
mod events;
#[allow(
    dead_code,
    unused_imports,
    reason = "shared with the simulation, which needs other parts of it"
)]
mod fakes;
mod identity;
mod lease;
mod limits;
mod log;
mod lookups;
mod maintenance;
mod names;
mod namespace;
mod parked;
mod refusals;
mod repair;
mod schedules;
mod unprotected;
