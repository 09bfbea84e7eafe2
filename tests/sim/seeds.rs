//! Which seeds are run, and what is told of them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use crate::plan::{Event, Plan};
use crate::run::{Outcome, run};
use crate::shrink::shrink;

/// Run by `make test`, beside those that failed once.
const FIXED: u64 = 100;
const FRESH: u64 = 100;
/// How many failures are told before the search ends.
const ENOUGH: usize = 3;

/// Seeds that failed once, with what they found.
const KEPT: &str = include_str!("seeds.txt");

#[derive(Default)]
struct Sums {
    seeds: AtomicU64,
    steps: AtomicU64,
    requests: AtomicU64,
    commits: AtomicU64,
    crashes: AtomicU64,
    virtual_seconds: AtomicU64,
}

impl Sums {
    fn add(&self, outcome: &Outcome) {
        for (sum, number) in [
            (&self.seeds, 1),
            (&self.steps, outcome.steps),
            (&self.requests, outcome.requests),
            (&self.commits, outcome.commits),
            (&self.crashes, outcome.crashes),
            (&self.virtual_seconds, outcome.virtual_time.as_secs()),
        ] {
            sum.fetch_add(number, Ordering::Relaxed);
        }
    }

    fn tell(&self, started: Instant, failures: usize) {
        let of = |sum: &AtomicU64| sum.load(Ordering::Relaxed);
        println!(
            "sim: {} seeds, {} steps, {} requests to nodes, {} commits, {} crashes of the proxy, {} h of virtual time, \
             {:.1} s, {failures} failures",
            of(&self.seeds),
            of(&self.steps),
            of(&self.requests),
            of(&self.commits),
            of(&self.crashes),
            of(&self.virtual_seconds) / 3600,
            started.elapsed().as_secs_f64(),
        );
    }
}

/// Runs seeds on all cores until they are done, time is up, or enough have failed; returns those that failed.
fn run_all(seeds: impl Iterator<Item = u64> + Send, limit: Option<Duration>) -> Vec<u64> {
    let started = Instant::now();
    let (sums, seeds, failed) = (Sums::default(), Mutex::new(seeds), Mutex::new(vec![]));
    let enough = AtomicBool::new(false);
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while !enough.load(Ordering::Relaxed) && limit.is_none_or(|limit| started.elapsed() < limit) {
                    let Some(seed) = seeds.lock().next() else { return };
                    let outcome = run(&Plan::of(seed), false);
                    sums.add(&outcome);
                    if let Some(failure) = outcome.failure {
                        let first = failure.lines().next().unwrap_or_default().to_owned();
                        println!("sim: seed {seed} fails: {first}");
                        let mut failed = failed.lock();
                        failed.push(seed);
                        enough.fetch_or(failed.len() >= ENOUGH, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner();
    sums.tell(started, failed.len());
    failed
}

/// What happened in the smallest run that fails as this seed does.
fn explain(plan: &Plan) -> String {
    let small = shrink(plan);
    let outcome = run(&small, true);
    let failure = outcome.failure.unwrap_or_default();
    format!(
        "{}\n\n{failure}\n\nSeed {}, made smaller:\n{small:?}\n",
        outcome.events.join("\n"),
        plan.seed
    )
}

fn fail_on(failed: &[u64]) {
    if let Some(&seed) = failed.first() {
        println!("{}", explain(&Plan::of(seed)));
        panic!("seeds {failed:?} failed; add them to tests/sim/seeds.txt, and see SIM_SEED={seed}");
    }
}

fn kept() -> impl Iterator<Item = u64> {
    let lines = KEPT.lines().map(str::trim);
    let seeds = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    seeds.map(|line| {
        let seed = line.split_whitespace().next().unwrap_or_default();
        seed.parse().expect("tests/sim/seeds.txt: a seed and what it found")
    })
}

/// A number that no run had before.
fn fresh() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos());
    (now as u64 ^ u64::from(std::process::id()) << 40) >> 8
}

#[test]
fn seeds_that_failed_once() {
    fail_on(&run_all(kept(), None));
}

#[test]
fn fixed_seeds() {
    fail_on(&run_all(0..FIXED, None));
}

#[test]
fn fresh_seeds() {
    let first = fresh();
    println!("sim: fresh seeds from {first}");
    fail_on(&run_all(first..first + FRESH, None));
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in 0..10 {
        let plan = Plan::of(seed);
        let (once, again) = (run(&plan, true), run(&plan, true));
        let differs = once.events.iter().zip(&again.events).find(|(one, other)| one != other);
        assert_eq!(differs, None, "seed {seed}");
        assert_eq!(once.sign, again.sign, "seed {seed}");
    }
}

/// `SIM_SEED`: one run and all that happened in it.
#[test]
fn one_seed() {
    let Some(seed) = std::env::var("SIM_SEED").ok().and_then(|seed| seed.parse().ok()) else {
        return;
    };
    let plan = Plan::of(seed);
    let outcome = run(&plan, true);
    if std::env::var("SIM_WHOLE").is_ok() {
        println!("{}\n{plan:#?}", outcome.events.join("\n"));
    } else if outcome.failure.is_some() {
        println!("{}", explain(&plan));
    }
    assert_eq!(outcome.failure, None);
}

/// `SIM_SEEDS`: `5000` for so many fresh seeds, `0..5000` for those; `SIM_SECONDS` ends it earlier.
#[test]
#[ignore = "make sim"]
fn search() {
    let text = std::env::var("SIM_SEEDS").unwrap_or_else(|_| "1000".to_owned());
    let seconds = std::env::var("SIM_SECONDS")
        .ok()
        .and_then(|seconds| seconds.parse().ok());
    let number = |text: &str| text.trim().parse::<u64>().expect("SIM_SEEDS: 5000, or 0..5000");
    let (first, end) = match text.split_once("..") {
        Some((first, end)) => (number(first), number(end)),
        None => {
            let first = fresh();
            (first, first + number(&text))
        }
    };
    println!("sim: seeds {first}..{end}");
    fail_on(&run_all(first..end, seconds.map(Duration::from_secs)));
}

/// A short run again and again, the proxy killed one step later each time.
#[test]
fn a_crash_at_every_step() {
    let mut plan = Plan::of(7);
    plan.phases.truncate(1);
    (plan.clients, plan.operations, plan.namespace, plan.patient) = (2, 4, 300, false);
    plan.phases[0].nodes = [vec![], vec![]];
    plan.phases[0].journal.clear();
    for steps in 1.. {
        plan.phases[0].events = vec![(0, Event::Crash { steps, down: 0 })];
        let outcome = run(&plan, false);
        if outcome.failure.is_some() {
            println!("{}", explain(&plan));
            panic!("a crash at step {steps} fails");
        }
        if outcome.crashes == 0 {
            println!("sim: a crash at each of {steps} steps");
            return;
        }
    }
}
