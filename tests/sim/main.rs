//! The whole core between two fake nodes and a fake journal on virtual time, where nodes, journal and the proxy itself
//! fail, stall, crash and come back at moments that the seed chooses: one seed is one run, and the same run each time.
//!
//! - `cargo test --test sim`: seeds that failed once (`seeds.txt`), fixed ones, fresh ones, a crash at every step.
//! - `make sim SEEDS=5000`: that many fresh seeds; `SEEDS=0..5000` those; `SIM_SECONDS=600` ends it earlier.
//! - `SIM_SEED=42 cargo test --test sim one_seed -- --nocapture`: one run with all that happened in it.
//! - `make mutants SECONDS=600`: breaks one rule at a time (`mutants/`) and tells whether the search finds it.
#![allow(clippy::disallowed_methods, reason = "time is virtual here: the tests own the clock")]

mod client;
mod executor;
#[path = "../core/fakes/mod.rs"]
#[allow(
    dead_code,
    unused_imports,
    reason = "shared with the core tests, which use more of it"
)]
mod fakes;
mod history;
mod journal;
mod node;
mod plan;
mod proxy;
mod run;
mod seeds;
mod shrink;
mod watcher;
mod world;
