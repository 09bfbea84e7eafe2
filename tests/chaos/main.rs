//! Chaos: real processes are killed, stopped, wiped and cut off at random while clients read and write the same records.
//!
//! Every operation is recorded with the times of its invocation and completion and what its client was told. When all is
//! over, both nodes must be equal, no acknowledged write lost, no read stale, and what was deleted must be gone.
//!
//! How to run and steer it: `tests/README.md`.
#![allow(clippy::disallowed_methods, reason = "tests poll real servers in real time")]

mod checker;
mod clients;
#[allow(dead_code, unused_imports, unused_macros, reason = "the scenarios use more of it")]
#[path = "../scenarios/harness/mod.rs"]
mod harness;
mod history;
mod names;
mod nemesis;
mod network;
mod report;
mod verdict;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;

use harness::data::Rng;
use harness::{Journal, Stage, Turn, eventually, print_logs, process};
use nemesis::{Kind, Nemesis};
use verdict::{Verdict, judge};
use world::{World, settled};

/// The kinds of faults of a run that does not choose them.
const BY_DEFAULT: &[Kind] = Kind::ALL;

const SECONDS: u64 = 15;
const KILLS: u64 = 3;
/// For everything but the faults.
const LIMIT: Duration = Duration::from_secs(600);

fn variable<T: std::str::FromStr>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// Runs one test on a stage of its own, unless `CHAOS_JOURNAL` wants the other journal.
fn run<F: Future<Output = ()>>(name: &str, journal: Journal, limit: Duration, test: impl FnOnce(Stage) -> F) {
    let wanted = std::env::var("CHAOS_JOURNAL").unwrap_or_default().to_lowercase();
    assert!(
        ["", "both", "sqlite", "postgres"].contains(&wanted.as_str()),
        "CHAOS_JOURNAL={wanted}"
    );
    let journal_name = format!("{journal:?}").to_lowercase();
    if wanted != "both" && !wanted.is_empty() && wanted != journal_name {
        println!("chaos skipped: CHAOS_JOURNAL={wanted}");
        return;
    }
    let _turn = Turn::wait();
    let seed = variable("CHAOS_SEED").unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        now.map_or(1, |now| now.as_nanos() as u64 % 1_000_000_007)
    });
    let name = format!("{name}.{journal_name}");
    println!("{name}: CHAOS_SEED={seed}");
    let dir = process::root().join(&name);
    std::fs::create_dir_all(&dir).expect("the tests' folder");
    process::open_to_all(&dir);
    let stage = Stage {
        name,
        dir: dir.clone(),
        seed,
        journal,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("tokio");
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        runtime.block_on(async {
            tokio::time::timeout(limit, test(stage))
                .await
                .expect("the test ends in time");
        });
    }));
    runtime.shutdown_background();
    if let Err(panic) = outcome {
        print_logs(&dir);
        resume_unwind(panic);
    }
    if !process::keep() {
        let _ = std::fs::remove_dir_all(&dir);
    }
}

fn conclude(stage: &Stage, world: &World, nemesis: &Nemesis, verdict: &Verdict) {
    let report = report::report(stage, world, nemesis, verdict);
    println!("{report}");
    if verdict.is_good() {
        return;
    }
    let evidence = report::evidence(nemesis, verdict);
    let kept = report::keep(stage, &report, &evidence, &verdict.ops);
    panic!(
        "{evidence}\n{report}\nseed {}; logs, data and history are in {}",
        stage.seed,
        kept.display()
    );
}

fn kinds(journal: Journal) -> Vec<Kind> {
    let wanted = std::env::var("CHAOS_FAULTS").ok().filter(|text| !text.is_empty());
    let mut kinds = wanted.map_or_else(|| BY_DEFAULT.to_vec(), |text| Kind::parse(&text));
    kinds.retain(|kind| journal == Journal::Postgres || !kind.needs_postgres());
    kinds
}

fn random_faults(journal: Journal) {
    let kinds = kinds(journal);
    if kinds.is_empty() {
        println!("chaos skipped: no fault of CHAOS_FAULTS can befall {journal:?}");
        return;
    }
    let seconds = variable("CHAOS_SECONDS").unwrap_or(SECONDS);
    run(
        "random_faults",
        journal,
        LIMIT + Duration::from_secs(2 * seconds),
        |stage| async move {
            let mut rng = Rng::new(stage.seed);
            let mut world = World::start(&stage).await;
            let mut nemesis = Nemesis::new(rng.fork(), kinds, seconds);
            let clients = world.clients(&mut rng).await;
            nemesis.run(&mut world, Duration::from_secs(seconds)).await;
            clients.stop().await;
            let verdict = judge(&world).await;
            conclude(&stage, &world, &nemesis, &verdict);
        },
    );
}

#[test]
fn random_faults_sqlite() {
    random_faults(Journal::Sqlite);
}

#[test]
fn random_faults_postgres() {
    random_faults(Journal::Postgres);
}

fn killed_at_once(journal: Journal) {
    let kills = variable("CHAOS_KILLS");
    if kills.is_none() && !BY_DEFAULT.contains(&Kind::KillProxyAndNode) {
        println!("chaos skipped: without CHAOS_KILLS");
        return;
    }
    let kills = kills.unwrap_or(KILLS);
    run(
        "killed_at_once",
        journal,
        LIMIT + Duration::from_secs(60 * kills),
        |stage| async move {
            let mut rng = Rng::new(stage.seed);
            let mut world = World::start(&stage).await;
            let mut nemesis = Nemesis::new(rng.fork(), vec![Kind::KillProxyAndNode], 3);
            let clients = world.clients(&mut rng).await;
            for _ in 0..kills {
                let goal = world.recorder.acked() + 60;
                let recorder = &world.recorder;
                eventually(Duration::from_secs(60), "writes are acknowledged", || async move {
                    let acked = recorder.acked();
                    if acked >= goal {
                        Ok(())
                    } else {
                        Err(format!("{acked} of {goal}"))
                    }
                })
                .await;
                nemesis.strike(&mut world, Kind::KillProxyAndNode).await;
            }
            clients.stop().await;
            let verdict = judge(&world).await;
            conclude(&stage, &world, &nemesis, &verdict);
        },
    );
}

#[test]
fn proxy_and_one_node_killed_at_once_20_times_under_load_sqlite() {
    killed_at_once(Journal::Sqlite);
}

#[test]
fn proxy_and_one_node_killed_at_once_20_times_under_load_postgres() {
    killed_at_once(Journal::Postgres);
}

/// The test is worth something only if it fails when it should.
#[test]
fn damage_behind_the_proxy_is_found() {
    run("damage", Journal::Sqlite, LIMIT, |stage| async move {
        let mut rng = Rng::new(stage.seed);
        let world = World::start(&stage).await;
        let clients = world.clients(&mut rng).await;
        let recorder = &world.recorder;
        eventually(Duration::from_secs(60), "writes are acknowledged", || async move {
            if recorder.acked() >= 150 {
                Ok(())
            } else {
                Err("not yet")
            }
        })
        .await;
        clients.stop().await;
        world
            .wait(Duration::from_secs(60), settled)
            .await
            .expect("nothing was done to it");
        let verdict = judge(&world).await;
        assert!(
            verdict.is_good(),
            "{}",
            report::report(&stage, &world, &Nemesis::new(rng, vec![], 1), &verdict)
        );
        // One record vanishes from one node, another holds what nobody wrote on both.
        let api = world.diptych.api();
        let id = api.by_name(clients::COLLECTIONS[0]).await.ok().id();
        let recorded = |what, effect| history::Op {
            client: "the test".into(),
            what,
            effects: vec![effect],
            count: None,
            start: recorder.now(),
            end: recorder.now() + 1,
            outcome: history::Outcome::Acked,
            error: None,
            during: "".into(),
        };
        let (lost, strange) = (recorder.tag(), recorder.tag());
        let key = |id: &str| history::Key::new(clients::COLLECTIONS[0], id);
        api.op(&id, "upsert", &clients::body(&[("k0".into(), lost)])).await.ok();
        recorder.push(recorded("upsert", (key("k0"), history::Effect::Set(lost))));
        api.op(&id, "delete", &json!({"ids": ["k1"]})).await.ok();
        recorder.push(recorded("delete", (key("k1"), history::Effect::Delete)));
        for (n, node) in world.nodes.iter().enumerate() {
            let id = node.api().by_name(clients::COLLECTIONS[0]).await.ok().id();
            node.api()
                .op(&id, "upsert", &clients::body(&[("k1".into(), strange)]))
                .await
                .ok();
            if n == 1 {
                node.api().op(&id, "delete", &json!({"ids": ["k0"]})).await.ok();
            }
        }
        let verdict = judge(&world).await;
        assert!(verdict.count(checker::Kind::Lost) > 0, "{:?}", verdict.violations);
        assert!(verdict.count(checker::Kind::Phantom) > 0, "{:?}", verdict.violations);
        assert!(!verdict.differences.is_empty());
    });
}
