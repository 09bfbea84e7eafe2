//! How the process ends.
//!
//! Pingora sleeps its whole grace period on SIGTERM, whatever is under way. [`Ending`] looks instead: once no request
//! is being answered and no job of the core runs, the process ends at once. The grace period is what it gives up after.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use pingora::server::{ShutdownSignal, ShutdownSignalWatch, ShutdownWatch};
use pingora::services::background::BackgroundService;
use tokio::signal::unix::{SignalKind, signal};

use crate::metrics::Metrics;
use crate::mirror::Core;

const LOOK: Duration = Duration::from_millis(20);
/// A request that has arrived and was not read yet is not counted anywhere; so quiet has to last.
const QUIET_LOOKS: u32 = 3;

/// What is done once before the process ends.
pub type AtEnd = Box<dyn FnOnce() + Send>;

/// Runs [`AtEnd`] once, whoever comes first.
#[derive(Clone)]
pub struct Once(Arc<Mutex<Option<AtEnd>>>);

impl Once {
    pub fn new(at_end: AtEnd) -> Self {
        Self(Arc::new(Mutex::new(Some(at_end))))
    }

    pub fn run(&self) {
        let at_end = self.0.lock().take();
        if let Some(at_end) = at_end {
            at_end();
        }
    }
}

/// SIGTERM and SIGINT end gracefully, SIGQUIT hands over to a new process, and a second SIGTERM or SIGINT ends at once.
pub struct Signals;

#[async_trait]
impl ShutdownSignalWatch for Signals {
    async fn recv(&self) -> ShutdownSignal {
        let signals = (
            signal(SignalKind::terminate()),
            signal(SignalKind::interrupt()),
            signal(SignalKind::quit()),
        );
        let (Ok(mut terminate), Ok(mut interrupt), Ok(mut quit)) = signals else {
            tracing::error!("Signals cannot be watched; the process ends by SIGKILL only.");
            return std::future::pending().await;
        };
        tokio::select! {
            _ = quit.recv() => return ShutdownSignal::GracefulUpgrade,
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::warn!("A second signal: ending at once.");
            std::process::exit(1);
        });
        ShutdownSignal::GracefulTerminate
    }
}

/// Ends the process as soon as nothing is under way any more after the signal.
pub struct Ending {
    pub core: Arc<Core>,
    pub metrics: Arc<Metrics>,
    pub at_end: Once,
}

#[async_trait]
impl BackgroundService for Ending {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        if shutdown.changed().await.is_err() {
            return;
        }
        // What is left in the log stays there for the next start.
        self.core.drain_paused.store(true, Ordering::SeqCst);
        let mut quiet = 0;
        while quiet < QUIET_LOOKS {
            self.core.env.sleep(LOOK).await;
            let busy = self.metrics.requests_in_flight() > 0 || self.core.counters.jobs.load(Ordering::SeqCst) > 0;
            quiet = if busy { 0 } else { quiet + 1 };
        }
        self.core.log.release().await;
        self.at_end.run();
        tracing::info!("Nothing is under way any more. Good bye.");
        std::process::exit(0);
    }
}
