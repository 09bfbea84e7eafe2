//! An explicit-state model of Diptych's protocol: two nodes, one proxy, a journal that lasts, and a budget of faults.
//!
//! It states the rules of docs/invariants.md in a form that can be run. [`search`](search::search) visits every state
//! that a configuration can reach, breadth first, and checks each; every rule can be switched off, and then a violation
//! has to be found: a model that finds none has gone blind. `suite` holds the configurations and says why each is there.
//! When a rule is to change, it is changed here first.
//!
//! `records` models the writes to one collection, `names` the deletion and creation of one name.

mod cli;
mod names;
mod records;
mod rules;
mod search;
mod set;
mod suite;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run(&std::env::args().skip(1).collect::<Vec<_>>())
}
