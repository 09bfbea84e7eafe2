//! Diptych beside what it is compared with, in one run: `bench/README.md` says what each part and arm is.
#![allow(clippy::disallowed_methods, reason = "measures real servers in real time")]

mod backlog;
mod bare;
mod clients;
mod common;
mod failover;
#[allow(dead_code, unused_imports, unused_macros, reason = "the scenarios use more of it")]
#[path = "../../tests/scenarios/harness/mod.rs"]
mod harness;
mod journal;
mod killed;
mod nginx;
mod plot;
mod reads;
mod refill;
mod report;
mod watch;
mod wire;
mod writers;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use report::Section;

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
    /// What the report calls it.
    #[arg(long, default_value = "other build")]
    other_name: String,
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
    /// Another build of `diptych`, and what it is called.
    pub other: Option<(PathBuf, String)>,
    /// Where pictures go: beside the page.
    pub pictures: PathBuf,
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
const PARTS: [(&str, &str); 12] = [
    ("stub", "Reads of a stub"),
    ("reads", "Reads of real servers"),
    ("writer", "One writer"),
    ("writer-postgres", "One writer, log in Postgres"),
    ("writers", "Writers"),
    ("writers-postgres", "Writers, log in Postgres"),
    ("journal", "Journal"),
    ("drain", "Drain"),
    ("failover", "A node goes away and comes back"),
    ("postgres-killed", "Postgres is killed"),
    ("refill", "A wiped node is filled again"),
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

fn main() -> ExitCode {
    let args = Args::parse();
    if let (Some(port), Some(upstream)) = (args.serve_bare, args.upstream) {
        bare::serve(port, upstream);
    }
    // The proxies run in folders of their own.
    let other = args.other.map(|file| {
        let absolute = file.canonicalize();
        let absolute = absolute.unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        (absolute, args.other_name)
    });
    let plan = Plan {
        rounds: args.rounds,
        seconds: args.seconds,
        other,
        pictures: args.out.with_file_name(""),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let wanted = |part: &str| args.parts.is_empty() || args.parts.iter().any(|wanted| wanted == part);
    let mut faults = 0;
    for (part, title) in PARTS.into_iter().filter(|(part, _)| wanted(part)) {
        let section: Section = runtime.block_on(async {
            match part {
                "stub" => reads::stub(&plan).await.into(),
                "reads" => reads::real(&plan).await.into(),
                "writer" => writers::run_one(&plan, Journal::Sqlite).await.into(),
                "writer-postgres" => writers::run_one(&plan, Journal::Postgres).await.into(),
                "writers" => writers::run(&plan, Journal::Sqlite).await.into(),
                "writers-postgres" => writers::run(&plan, Journal::Postgres).await.into(),
                "journal" => journal::run_all(&plan).await.into(),
                "drain" => backlog::drain(&plan).await.into(),
                "failover" => failover::run(&plan).await,
                "postgres-killed" => killed::run(&plan).await,
                "refill" => refill::run(&plan).await,
                _ => backlog::large(&plan).await.into(),
            }
        });
        let mut text = format!("At {}. {}", report::commit(), section.text);
        for fault in &section.faults {
            text += &format!("\n**Fault:** {fault}\n");
        }
        faults += section.faults.len();
        println!("## {title}\n\n{text}");
        // After each part: what was measured is kept when a later one fails.
        report::publish(&args.out, &PARTS.map(|part| part.1), &BTreeMap::from([(title, text)]));
    }
    match faults {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
