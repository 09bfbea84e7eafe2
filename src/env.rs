//! What the core takes from the outside world besides nodes and journal: time, tasks, chance and row ids.
//!
//! Lane, mirror and drain never ask the operating system for these. They get an [`Env`], so that a test can run the
//! whole core on virtual time, from one seed, and see the same run again.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use uuid::Uuid;

/// A future that owns what it needs and can move between threads.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send + 'static>>;

/// Time, tasks, chance and row ids, as parameters of the core.
pub trait Env: Send + Sync + 'static {
    /// Monotonic time since some fixed moment of this process.
    fn now(&self) -> Duration;
    /// Monotonic time that goes on while the machine is suspended, since some fixed moment: what a lease is measured by.
    fn boot_now(&self) -> Duration;
    /// Wall clock, for what people read; no decision rests on it.
    fn wall(&self) -> DateTime<Utc>;
    /// Ends after `duration`.
    fn sleep(&self, duration: Duration) -> BoxFuture<()>;
    /// Runs `task` to its end, whatever happens to the caller. Where it panics, the process must not go on.
    fn spawn(&self, task: BoxFuture<()>);
    /// A new random UUID: the id of a row, known before the row is sent.
    fn new_id(&self) -> Uuid;
    /// A random number.
    fn random(&self) -> u64;
}

/// Shared [`Env`].
pub type SharedEnv = Arc<dyn Env>;

/// The real world: a tokio runtime and the system clock.
pub struct TokioEnv {
    handle: tokio::runtime::Handle,
    start: std::time::Instant,
}

impl TokioEnv {
    /// Tasks are spawned on `handle`, which has to be the runtime that shutdown waits for.
    pub fn new(handle: tokio::runtime::Handle) -> Self {
        #[allow(clippy::disallowed_methods)] // the one place where time comes from
        let start = std::time::Instant::now();
        Self { handle, start }
    }
}

/// A task that panics leaves a lane half-way: nobody knows what it had sent, and nothing goes on there. So the process
/// ends, as if it were killed, and recovery finds out what became of it (invariant I24).
struct EndsOnPanic;

impl Drop for EndsOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("A task panicked: the process ends, the next one recovers.");
            std::process::abort();
        }
    }
}

impl Env for TokioEnv {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn boot_now(&self) -> Duration {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the call only writes `time`, which lives here. It cannot fail: the clock exists on every Linux.
        unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut time) };
        let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
        Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or_default())
    }

    fn wall(&self) -> DateTime<Utc> {
        Utc::now()
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<()> {
        let handle = self.handle.clone();
        Box::pin(async move {
            #[allow(clippy::disallowed_methods)] // the one place where sleeping happens
            let sleep = {
                let _runtime = handle.enter();
                tokio::time::sleep(duration)
            };
            sleep.await;
        })
    }

    fn spawn(&self, task: BoxFuture<()>) {
        self.handle.spawn(async move {
            let _guard = EndsOnPanic;
            task.await;
        });
    }

    fn new_id(&self) -> Uuid {
        Uuid::new_v4()
    }

    fn random(&self) -> u64 {
        thread_local! {
            static STATE: Cell<u64> = Cell::new(Uuid::new_v4().as_u64_pair().0);
        }
        // splitmix64. Every read asks, and nothing secret hangs on it: the kernel is asked once for each thread.
        let state = STATE.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        STATE.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// Waits for `future` at most `limit`; `None` when the limit came first.
pub async fn within<T>(env: &SharedEnv, limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    tokio::pin!(future);
    tokio::select! {
        biased;
        value = &mut future => Some(value),
        () = env.sleep(limit) => None,
    }
}
