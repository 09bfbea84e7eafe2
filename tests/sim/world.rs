//! What a run consists of beside the code under test: virtual time, chance, a count of steps, a record of events, and
//! lives of the proxy that can end between any two polls of any of its tasks.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use chrono::{DateTime, Utc};
use diptych::env::{BoxFuture, Env};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use uuid::Uuid;

use crate::fakes::Rng;

/// More polls than any run needs: one that gets there turns in a circle without time passing.
const MOST_STEPS: u64 = 3_000_000;

pub struct World {
    start: Instant,
    /// Polls of the proxy's tasks so far: every await point of the code under test is one.
    steps: AtomicU64,
    /// The step at which the proxy is killed; 0: none.
    crash_at: AtomicU64,
    clock: AtomicU64,
    events: Option<Mutex<Vec<String>>>,
    failure: watch::Sender<Option<String>>,
    pub requests: AtomicU64,
    pub commits: AtomicU64,
    pub crashes: AtomicU64,
}

impl World {
    pub fn new(recording: bool) -> Arc<Self> {
        Arc::new(Self {
            start: Instant::now(),
            steps: AtomicU64::new(0),
            crash_at: AtomicU64::new(0),
            clock: AtomicU64::new(0),
            events: recording.then(Mutex::default),
            failure: watch::Sender::new(None),
            requests: AtomicU64::new(0),
            commits: AtomicU64::new(0),
            crashes: AtomicU64::new(0),
        })
    }

    pub fn now(&self) -> Duration {
        self.start.elapsed()
    }

    pub fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    /// The proxy is killed `steps` steps from here.
    pub fn crash_in(&self, steps: u64) {
        self.crash_at.store(self.steps() + steps.max(1), Ordering::Relaxed);
    }

    /// What was to kill the proxy does not.
    pub fn crash_no_more(&self) {
        self.crash_at.store(0, Ordering::Relaxed);
    }

    /// One more instant of the clients' clock: invocations and completions are ordered by it.
    pub fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    pub fn say(&self, actor: &str, text: impl FnOnce() -> String) {
        if let Some(events) = &self.events {
            let now = self.now();
            events
                .lock()
                .push(format!("{:>10.3} {actor:<8} {}", now.as_secs_f64(), text()));
        }
    }

    pub fn events(&self) -> Vec<String> {
        self.events
            .as_ref()
            .map(|events| events.lock().clone())
            .unwrap_or_default()
    }

    /// The first failure counts.
    pub fn fail(&self, what: impl Into<String>) {
        let what = what.into();
        self.say("check", || what.clone());
        self.failure.send_if_modified(|failure| {
            let first = failure.is_none();
            if first {
                *failure = Some(what);
            }
            first
        });
    }

    pub async fn failed(&self) -> String {
        let mut failure = self.failure.subscribe();
        let found = failure.wait_for(Option::is_some).await.expect("the sender is ours");
        found.clone().expect("some")
    }

    pub fn failure(&self) -> Option<String> {
        self.failure.borrow().clone()
    }
}

/// One life of the proxy's process: what runs in it ends with it, at once.
pub struct Life {
    pub world: Arc<World>,
    rng: Mutex<Rng>,
    tasks: Mutex<Vec<AbortHandle>>,
    ended: watch::Sender<bool>,
    dead: AtomicBool,
    /// One poll in so many is put off, so that tasks that are ready take turns in another order; 0: none.
    shuffle: u64,
}

impl Life {
    pub fn new(world: Arc<World>, seed: u64, shuffle: u64) -> Arc<Self> {
        Arc::new(Self {
            world,
            rng: Mutex::new(Rng::new(seed)),
            tasks: Mutex::default(),
            ended: watch::Sender::new(false),
            dead: AtomicBool::new(false),
            shuffle,
        })
    }

    pub fn is_over(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }

    pub async fn ended(&self) {
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    /// kill -9: none of its tasks is polled again.
    pub fn kill(&self) {
        if self.dead.swap(true, Ordering::Relaxed) {
            return;
        }
        self.world.crash_at.store(0, Ordering::Relaxed);
        self.world.crashes.fetch_add(1, Ordering::Relaxed);
        self.world
            .say("proxy", || format!("killed at step {}", self.world.steps()));
        for task in std::mem::take(&mut *self.tasks.lock()) {
            task.abort();
        }
        self.ended.send_replace(true);
    }

    pub fn spawn(self: &Arc<Self>, task: BoxFuture<()>) {
        if self.is_over() {
            return;
        }
        let watched = Watched {
            life: self.clone(),
            task: Some(task),
        };
        let handle = tokio::spawn(watched).abort_handle();
        let mut tasks = self.tasks.lock();
        if tasks.len() >= 256 && tasks.len().is_power_of_two() {
            tasks.retain(|task| !task.is_finished());
        }
        tasks.push(handle);
    }
}

/// A task of the proxy: counts its polls, puts some of them off, and ends the life where it is told to.
struct Watched {
    life: Arc<Life>,
    task: Option<BoxFuture<()>>,
}

impl Future for Watched {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let life = self.life.clone();
        if life.is_over() {
            return Poll::Pending;
        }
        let world = &life.world;
        let step = world.steps.fetch_add(1, Ordering::Relaxed) + 1;
        if step == world.crash_at.load(Ordering::Relaxed) {
            life.kill();
            return Poll::Pending;
        }
        if step > MOST_STEPS {
            world.fail("the proxy turns in a circle: no end of steps");
            life.kill();
            return Poll::Pending;
        }
        if life.shuffle > 0 && life.rng.lock().below(life.shuffle) == 0 {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let Some(task) = &mut self.task else {
            return Poll::Ready(());
        };
        match std::panic::catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(context))) {
            Ok(poll) => poll,
            Err(panic) => {
                self.task = None;
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("?");
                world.fail(format!("a task panicked: {text}"));
                Poll::Ready(())
            }
        }
    }
}

/// [`Env`] of one life.
pub struct SimEnv(pub Arc<Life>);

impl Env for SimEnv {
    fn now(&self) -> Duration {
        self.0.world.now()
    }

    fn wall(&self) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000) + self.now()
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<()> {
        Box::pin(tokio::time::sleep(duration))
    }

    fn spawn(&self, task: BoxFuture<()>) {
        self.0.spawn(task);
    }

    fn new_id(&self) -> Uuid {
        self.0.rng.lock().uuid()
    }

    fn random(&self) -> u64 {
        self.0.rng.lock().next()
    }
}
