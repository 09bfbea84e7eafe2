//! What `/status` says over time.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::task::JoinHandle;

use crate::harness::api::Api;
use crate::harness::cluster::Side;

/// How often it is asked.
pub const EVERY: Duration = Duration::from_millis(50);

/// `/status` at one moment.
pub struct Sample {
    pub at: Instant,
    status: Value,
}

impl Sample {
    pub fn node(&self, side: Side) -> &Value {
        &self.status["instances"][side as usize]
    }

    pub fn pending(&self) -> u64 {
        self.status["write_ahead_log"]["pending_writes"].as_u64().unwrap_or(0)
    }

    /// All entries are covered by the log again.
    pub fn covered(&self) -> bool {
        self.status["wal"]["available"] == true && self.status["wal"]["unprotected"] == false
    }

    /// Nothing is pending and every node is in sync.
    pub fn drained(&self) -> bool {
        let nodes = self.status["instances"].as_array();
        let good = |node: &Value| node["healthy"] == true && node["in_sync"] == true && node["pending_writes"] == 0;
        nodes.is_some_and(|nodes| !nodes.is_empty() && nodes.iter().all(good)) && self.pending() == 0
    }
}

/// Reads `/status` of the admin port until it is stopped.
pub struct Watch {
    samples: Arc<Mutex<Vec<Sample>>>,
    task: JoinHandle<()>,
}

impl Watch {
    pub fn start(admin: Api) -> Watch {
        let samples = Arc::new(Mutex::new(Vec::new()));
        let kept = samples.clone();
        let task = tokio::spawn(async move {
            loop {
                if let Ok(answer) = admin.try_get("/status").await {
                    let (at, status) = (Instant::now(), answer.json());
                    kept.lock().expect("no panics inside").push(Sample { at, status });
                }
                tokio::time::sleep(EVERY).await;
            }
        });
        Watch { samples, task }
    }

    /// Waits for a state later than `since` that is good; else says what the last one was.
    pub async fn wait(
        &self,
        since: Instant,
        limit: Duration,
        good: impl Fn(&Sample) -> bool,
    ) -> Result<Instant, String> {
        let end = Instant::now() + limit;
        let mut looked = 0;
        loop {
            {
                let samples = self.samples.lock().expect("no panics inside");
                if let Some(found) = samples[looked..].iter().find(|s| s.at > since && good(s)) {
                    return Ok(found.at);
                }
                looked = samples.len();
                if Instant::now() > end {
                    return Err(samples.last().map_or("no answer".into(), |s| format!("{:#}", s.status)));
                }
            }
            tokio::time::sleep(EVERY).await;
        }
    }

    pub fn stop(self) -> Vec<Sample> {
        self.task.abort();
        std::mem::take(&mut *self.samples.lock().expect("no panics inside"))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}
