//! Virtual time, and chance from one seed.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diptych::env::{BoxFuture, Env};
use parking_lot::Mutex;
use tokio::time::Instant;
use uuid::Uuid;

/// SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators".
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn uuid(&mut self) -> Uuid {
        uuid::Builder::from_u128(u128::from(self.next()) << 64 | u128::from(self.next()))
            .with_version(uuid::Version::Random)
            .with_variant(uuid::Variant::RFC4122)
            .into_uuid()
    }
}

/// [`Env`] on the paused clock of the test's runtime.
pub struct VirtualEnv {
    start: Instant,
    suspended: Mutex<Duration>,
    rng: Mutex<Rng>,
}

impl VirtualEnv {
    pub fn new(seed: u64) -> Self {
        Self {
            start: Instant::now(),
            suspended: Mutex::default(),
            rng: Mutex::new(Rng::new(seed)),
        }
    }
}

impl VirtualEnv {
    /// The process stands still for so long: no timer of its own runs on.
    pub fn suspend(&self, time: Duration) {
        *self.suspended.lock() += time;
    }
}

impl Env for VirtualEnv {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn boot_now(&self) -> Duration {
        self.now() + *self.suspended.lock()
    }

    fn wall(&self) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000) + self.now()
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<()> {
        Box::pin(tokio::time::sleep(duration))
    }

    fn spawn(&self, task: BoxFuture<()>) {
        tokio::spawn(task);
    }

    fn new_id(&self) -> Uuid {
        self.rng.lock().uuid()
    }

    fn random(&self) -> u64 {
        self.rng.lock().next()
    }
}
