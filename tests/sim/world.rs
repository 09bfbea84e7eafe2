//! What a run consists of beside the code under test: virtual time, chance, a count of steps, a record of events, and
//! lives of the proxy that can end between any two polls of any of its tasks.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use chrono::{DateTime, Utc};
use diptych::env::{BoxFuture, Env};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;
use uuid::Uuid;

use crate::executor::{Executor, Owner, WORLD, Watch};
use crate::fakes::Rng;

/// More polls than any run needs: one that gets there turns in a circle without time passing.
const MOST_STEPS: u64 = 3_000_000;

/// So long after its start the proxy is starting.
const STARTING: Duration = Duration::from_secs(3);

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
    pub executor: Arc<Executor>,
    owners: AtomicU64,
    /// The proxy's present life.
    life: Mutex<Option<Arc<Life>>>,
    over: AtomicBool,
    /// How often something went wrong with a request or a commit.
    faults: watch::Sender<u64>,
    /// Of which node a request went wrong last.
    faulty: watch::Sender<&'static str>,
    /// How the proxy is killed at the next fault: so many steps after it. 0: not.
    crash_at_fault: AtomicU64,
    /// The same, at the next fault of a commit.
    crash_at_commit: AtomicU64,
    /// How often something came back that was away.
    returns: watch::Sender<u64>,
    /// How often the proxy was killed.
    falls: watch::Sender<u64>,
    /// Something went wrong with a request, and no commit has followed yet.
    troubled: AtomicBool,
    /// When the proxy was started last, in milliseconds.
    started: AtomicU64,
}

impl World {
    pub fn new(seed: u64, recording: bool) -> Arc<Self> {
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
            executor: Executor::new(seed),
            owners: AtomicU64::new(WORLD),
            life: Mutex::default(),
            over: AtomicBool::new(false),
            faults: watch::Sender::new(0),
            faulty: watch::Sender::new(""),
            crash_at_fault: AtomicU64::new(0),
            crash_at_commit: AtomicU64::new(0),
            returns: watch::Sender::new(0),
            falls: watch::Sender::new(0),
            troubled: AtomicBool::new(false),
            started: AtomicU64::new(0),
        })
    }

    /// Runs `story` and all that it starts, to its end or the first failure.
    pub async fn play(self: &Arc<Self>, story: impl Future<Output = Result<(), String>> + Send + 'static) {
        let world = self.clone();
        self.executor.spawn(
            WORLD,
            Box::pin(async move {
                if let Err(failure) = story.await {
                    world.fail(failure);
                }
                world.over.store(true, Ordering::Relaxed);
            }),
        );
        // Tokio's own budget would stop a task that polls for all.
        tokio::task::coop::unconstrained(self.executor.drive(&**self)).await;
        *self.life.lock() = None;
        self.executor.clear();
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

    /// The proxy is killed `steps` steps after the next fault.
    pub fn crash_at_fault(&self, steps: u64) {
        self.crash_at_fault.store(steps.max(1), Ordering::Relaxed);
    }

    /// The proxy is killed `steps` steps after the next fault of a commit.
    pub fn crash_at_commit(&self, steps: u64) {
        self.crash_at_commit.store(steps.max(1), Ordering::Relaxed);
    }

    /// What was to kill the proxy does not.
    pub fn crash_no_more(&self) {
        self.crash_at.store(0, Ordering::Relaxed);
        self.crash_at_fault.store(0, Ordering::Relaxed);
        self.crash_at_commit.store(0, Ordering::Relaxed);
    }

    /// Something goes wrong with a request to this node.
    pub fn fault_of_request(&self, node: &'static str) {
        self.troubled.store(true, Ordering::Relaxed);
        self.faulty.send_replace(node);
        self.fault();
    }

    /// Something goes wrong with a commit.
    pub fn fault_of_commit(&self) {
        match self.crash_at_commit.swap(0, Ordering::Relaxed) {
            0 => {}
            steps => self.crash_in(steps),
        }
        self.fault();
    }

    fn fault(&self) {
        self.faults.send_modify(|count| *count += 1);
        match self.crash_at_fault.swap(0, Ordering::Relaxed) {
            0 => {}
            steps => self.crash_in(steps),
        }
    }

    /// Whether something went wrong with a request since this was asked last.
    pub fn was_troubled(&self) -> bool {
        self.troubled.swap(false, Ordering::Relaxed)
    }

    /// Whether the proxy was started a moment ago.
    pub fn is_starting(&self) -> bool {
        let started = Duration::from_millis(self.started.load(Ordering::Relaxed));
        self.crashes.load(Ordering::Relaxed) > 0 && self.now() < started + STARTING
    }

    /// Something is back that was away, or begins: there is much to do now.
    pub fn came_back(&self) {
        self.returns.send_modify(|count| *count += 1);
    }

    /// Waits until something comes back or begins.
    pub async fn until_return(&self) {
        let mut returns = self.returns.subscribe();
        returns.mark_unchanged();
        let _ = returns.changed().await;
    }

    /// Waits until the proxy is killed.
    pub async fn until_fall(&self) {
        let mut falls = self.falls.subscribe();
        falls.mark_unchanged();
        let _ = falls.changed().await;
    }

    /// Waits for the next fault of a request; the node's name.
    pub async fn until_fault_of_request(&self) -> &'static str {
        let mut faulty = self.faulty.subscribe();
        faulty.mark_unchanged();
        let _ = faulty.changed().await;
        *faulty.borrow()
    }

    /// Waits for the next fault.
    pub async fn until_fault(&self) {
        let mut faults = self.faults.subscribe();
        faults.mark_unchanged();
        let _ = faults.changed().await;
    }

    /// One more instant of the clients' clock: invocations and completions are ordered by it.
    pub fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    pub fn say(&self, actor: &str, text: impl FnOnce() -> String) {
        if let Some(events) = &self.events {
            let now = self.now();
            events.lock().push(format!(
                "{:>10.3} {:>7} {actor:<8} {}",
                now.as_secs_f64(),
                self.steps(),
                text()
            ));
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

    pub fn failure(&self) -> Option<String> {
        self.failure.borrow().clone()
    }
}

/// One life of the proxy's process: what runs in it ends with it, at once.
pub struct Life {
    pub world: Arc<World>,
    owner: Owner,
    rng: Mutex<Rng>,
    ended: watch::Sender<bool>,
    dead: AtomicBool,
}

impl Life {
    pub fn new(world: Arc<World>, seed: u64) -> Arc<Self> {
        let life = Arc::new(Self {
            owner: world.owners.fetch_add(1, Ordering::Relaxed) + 1,
            world: world.clone(),
            rng: Mutex::new(Rng::new(seed)),
            ended: watch::Sender::new(false),
            dead: AtomicBool::new(false),
        });
        *world.life.lock() = Some(life.clone());
        world.started.store(world.now().as_millis() as u64, Ordering::Relaxed);
        life
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
        self.world.crash_no_more();
        self.world.crashes.fetch_add(1, Ordering::Relaxed);
        self.world.say("proxy", || "killed".to_owned());
        self.world.executor.drop_all_of(self.owner);
        self.ended.send_replace(true);
        self.world.falls.send_modify(|count| *count += 1);
    }

    pub fn spawn(&self, task: BoxFuture<()>) {
        if !self.is_over() {
            self.world.executor.spawn(self.owner, task);
        }
    }
}

impl Watch for World {
    /// Every poll of a task of the proxy is a step; at one of them it may end.
    fn may_poll(&self, owner: Owner) -> bool {
        if owner == WORLD {
            return true;
        }
        let step = self.steps.fetch_add(1, Ordering::Relaxed) + 1;
        if step > MOST_STEPS {
            self.fail("the proxy turns in a circle: no end of steps");
            return false;
        }
        if step == self.crash_at.load(Ordering::Relaxed) {
            let life = self.life.lock().clone();
            life.inspect(|life| life.kill());
            return false;
        }
        true
    }

    fn panicked(&self, text: &str) {
        self.fail(format!("a task panicked: {text}"));
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed) || self.failure.borrow().is_some()
    }
}

/// [`Env`] of one life.
pub struct SimEnv(pub Arc<Life>);

impl Env for SimEnv {
    fn now(&self) -> Duration {
        self.0.world.now()
    }

    fn boot_now(&self) -> Duration {
        self.now()
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
