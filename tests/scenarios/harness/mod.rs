//! The harness: real servers, the real binary, and the stage on which a scenario runs.

pub mod api;
pub mod chroma;
pub mod cluster;
pub mod compare;
pub mod data;
pub mod diptych;
pub mod fault;
mod fault_http;
pub mod load;
pub mod postgres;
pub mod process;
pub mod workload;
pub mod writer;

use std::fmt::Display;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Which journal the proxy of a test uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Journal {
    Sqlite,
    Postgres,
}

/// What a scenario gets: a folder, a seed, a kind of journal.
pub struct Stage {
    pub name: String,
    pub dir: PathBuf,
    pub seed: u64,
    pub journal: Journal,
}

/// Makes `#[test]`s of `async fn(Stage)`s: one for each journal named after the colon, as `<fn>::<journal>`.
macro_rules! scenarios {
    ($($name:ident: $($journal:ident),+;)+) => { $(
        mod $name {
            $( crate::harness::scenarios!(@one $name $journal); )+
        }
    )+ };
    (@one $name:ident sqlite) => {
        #[test]
        fn sqlite() {
            crate::harness::run(module_path!(), crate::harness::Journal::Sqlite, super::$name);
        }
    };
    (@one $name:ident postgres) => {
        #[test]
        fn postgres() {
            crate::harness::run(module_path!(), crate::harness::Journal::Postgres, super::$name);
        }
    };
}
pub(crate) use scenarios;

/// No scenario needs longer than this, on the slowest machine.
const LIMIT: Duration = Duration::from_secs(300);

/// Runs one scenario; when it fails, prints its seed and what the servers logged.
pub fn run<F: Future<Output = ()>>(path: &str, journal: Journal, scenario: impl FnOnce(Stage) -> F) {
    let _turn = Turn::wait();
    let name = format!("{}::{journal:?}", path.trim_start_matches("scenarios::"));
    let seed = std::env::var("DIPTYCH_TEST_SEED").ok().map_or_else(
        || {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(1, |now| now.as_nanos() as u64 % 1_000_000_007)
        },
        |seed| seed.parse().expect("DIPTYCH_TEST_SEED is a number"),
    );
    println!("{name}: DIPTYCH_TEST_SEED={seed}");
    let dir = process::root().join(name.replace("::", "."));
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
            tokio::time::timeout(LIMIT, scenario(stage))
                .await
                .expect("the scenario ends in time")
        })
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

/// Polls `check` until it says `Ok`, and panics with its last complaint when `deadline` has passed.
pub async fn eventually<T, E: Display, F: Future<Output = Result<T, E>>>(
    deadline: Duration,
    what: &str,
    mut check: impl FnMut() -> F,
) -> T {
    let end = Instant::now() + deadline;
    loop {
        match check().await {
            Ok(value) => return value,
            Err(complaint) if Instant::now() > end => panic!("not within {deadline:?}: {what}: {complaint}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(25)).await,
        }
    }
}

/// The end of every log below a test's folder, the proxy's first.
pub fn print_logs(dir: &Path) {
    const TAIL: usize = 16_000;
    let mut logs: Vec<PathBuf> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .collect();
    logs.retain(|path| path.extension().is_some_and(|e| e == "log" || e == "yaml"));
    logs.sort_by_key(|path| (!path.ends_with("diptych.log"), path.clone()));
    for log in logs {
        let text = std::fs::read(&log).unwrap_or_default();
        let tail = &text[text.len().saturating_sub(TAIL)..];
        let text = String::from_utf8_lossy(tail);
        // Chroma logs every request in several lines, and greets with a picture: only what went wrong there.
        let chroma = log
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("chroma-"));
        let wrong = |line: &&str| {
            ["ERROR", "WARN", "panic", "Error"]
                .iter()
                .any(|word| line.contains(word))
        };
        let lines: Vec<&str> = text.lines().filter(|line| !chroma || wrong(line)).collect();
        println!("--- end of {}\n{}", log.display(), lines.join("\n"));
    }
}

/// A turn to run: a few scenarios at once (`DIPTYCH_TEST_PARALLEL`, 3), whatever the number of test threads.
pub struct Turn;

static RUNNING: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

impl Turn {
    pub fn wait() -> Turn {
        let limit = std::env::var("DIPTYCH_TEST_PARALLEL")
            .ok()
            .and_then(|n| n.parse().ok())
            .unwrap_or(3)
            .max(1);
        let running = RUNNING.lock().unwrap_or_else(|e| e.into_inner());
        let mut running = ENDED
            .wait_while(running, |running| *running >= limit)
            .unwrap_or_else(|e| e.into_inner());
        *running += 1;
        Turn
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *RUNNING.lock().unwrap_or_else(|e| e.into_inner()) -= 1;
        ENDED.notify_one();
    }
}
