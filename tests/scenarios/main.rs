//! End-to-end scenarios: the real binary before real Chroma servers, one `#[test]` for each promise.
//!
//! How to run and steer them: `tests/README.md`.
#![allow(clippy::disallowed_methods, reason = "tests poll real servers in real time")]

mod combining;
mod doubt;
mod existing;
mod fault_points;
mod harness;
mod harness_works;
mod health_checks;
mod identity;
mod identity_of_nodes;
mod journal_away;
mod lease;
mod limits;
mod maintenance;
mod mirror;
mod namespace;
mod operations;
mod operator;
mod outage;
mod reads;
mod repair;
mod restart;
mod surfaces;
mod validate;
