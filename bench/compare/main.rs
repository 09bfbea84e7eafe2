//! Diptych beside what it is compared with, in one run: `bench/README.md` says what each part and arm is.
#![allow(clippy::disallowed_methods, reason = "measures real servers in real time")]

mod backlog;
mod bare;
#[allow(dead_code, reason = "each of the benches uses a part of it")]
#[path = "../common.rs"]
mod common;
#[allow(dead_code, unused_imports, unused_macros, reason = "the scenarios use more of it")]
#[path = "../../tests/scenarios/harness/mod.rs"]
mod harness;
mod journal;
mod nginx;
mod reads;
mod report;
mod wire;
mod writers;

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Parser;

use harness::{Journal, Stage, process};

/// Compares Diptych with direct Chroma, nginx, a bare Pingora proxy and pgbench.
#[derive(Parser)]
struct Args {
    /// Parts to run; all without.
    #[arg(value_parser = PARTS.map(|part| part.0))]
    parts: Vec<String>,
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Per arm and round.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Another build of `diptych`, measured beside this one where that makes sense.
    #[arg(long)]
    other: Option<PathBuf>,
    /// The page whose sections are replaced.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/bench/RESULTS.md"), hide_default_value = true)]
    out: PathBuf,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
    /// Become the bare proxy on this port.
    #[arg(long, hide = true, requires = "upstream")]
    serve_bare: Option<u16>,
    #[arg(long, hide = true)]
    upstream: Option<u16>,
}

/// How long and how often.
pub struct Plan {
    pub rounds: u32,
    pub seconds: f64,
    /// Another build of `diptych`.
    pub other: Option<PathBuf>,
}

impl Plan {
    /// The order in which a round visits the arms: each begins once, and every other round goes backwards.
    pub fn order(&self, round: u32, arms: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..arms).map(|n| (n + round as usize / 2) % arms).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        order
    }
}

/// Parts by name, with the title of their section, in the order of the page.
const PARTS: [(&str, &str); 7] = [
    ("stub", "Reads of a stub"),
    ("reads", "Reads of real servers"),
    ("writers", "Writers"),
    ("writers-postgres", "Writers, log in Postgres"),
    ("journal", "Journal"),
    ("drain", "Drain"),
    ("backlog", "A million pending entries"),
];

/// A folder for a part.
pub fn stage(name: &str, journal: Journal) -> Stage {
    let dir = process::root().join(name);
    std::fs::create_dir_all(&dir).expect("the temp folder");
    process::open_to_all(&dir);
    Stage {
        name: name.into(),
        dir,
        seed: 1,
        journal,
    }
}

/// What a process has used so far, user and system.
pub fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<f64> = stat
        .rsplit_once(')')
        .into_iter()
        .flat_map(|(_, rest)| rest.split_whitespace())
        .filter_map(|word| word.parse().ok())
        .collect();
    // SAFETY: sysconf has no preconditions.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
    // After the state, which is no number: parent, ... user and system time.
    fields
        .get(10..12)
        .map_or(0.0, |ticks| ticks.iter().sum::<f64>() / per_second)
}

fn main() {
    let args = Args::parse();
    if let (Some(port), Some(upstream)) = (args.serve_bare, args.upstream) {
        bare::serve(port, upstream);
    }
    let plan = Plan {
        rounds: args.rounds,
        seconds: args.seconds,
        other: args.other,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let wanted = |part: &str| args.parts.is_empty() || args.parts.iter().any(|wanted| wanted == part);
    for (part, title) in PARTS.into_iter().filter(|(part, _)| wanted(part)) {
        let text = runtime.block_on(async {
            match part {
                "stub" => reads::stub(&plan).await,
                "reads" => reads::real(&plan).await,
                "writers" => writers::run(&plan, Journal::Sqlite).await,
                "writers-postgres" => writers::run(&plan, Journal::Postgres).await,
                "journal" => journal::run_all(&plan).await,
                "drain" => backlog::drain(&plan).await,
                _ => backlog::large(&plan).await,
            }
        });
        let text = format!("At {}. {text}", report::commit());
        println!("## {title}\n\n{text}");
        // After each part: what was measured is kept when a later one fails.
        report::publish(&args.out, &PARTS.map(|part| part.1), &BTreeMap::from([(title, text)]));
    }
}
