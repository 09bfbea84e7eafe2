//! What Prometheus is told; see design.md 10.

use std::time::Duration;

use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry};

/// Families that are counted where things happen.
pub struct Metrics {
    requests: IntCounterVec,
    durations: HistogramVec,
}

impl Metrics {
    /// Registers all families.
    ///
    /// # Errors
    /// When a name is taken in `registry`.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let requests = IntCounterVec::new(
            Opts::new(
                "diptych_requests_total",
                "Requests answered, by operation and status class.",
            ),
            &["operation", "status"],
        )?;
        let durations = HistogramVec::new(
            HistogramOpts::new(
                "diptych_request_duration_seconds",
                "Time from a request's head to its answer's end.",
            ),
            &["operation"],
        )?;
        registry.register(Box::new(requests.clone()))?;
        registry.register(Box::new(durations.clone()))?;
        Ok(Self { requests, durations })
    }

    /// A request was answered; 0: not at all, the client was gone.
    pub fn request(&self, operation: &str, status: u16, took: Duration) {
        let class = match status {
            0 => "gone",
            200..300 => "2xx",
            300..400 => "3xx",
            400..500 => "4xx",
            _ => "5xx",
        };
        self.requests.with_label_values(&[operation, class]).inc();
        self.durations
            .with_label_values(&[operation])
            .observe(took.as_secs_f64());
    }
}
