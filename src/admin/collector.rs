//! States as metrics: read when Prometheus asks, so they cannot be stale.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{GaugeVec, IntCounterVec, IntGauge, IntGaugeVec, Opts};

use super::state::{NodeState, gather};
use crate::metrics::Metrics;
use crate::mirror::Core;

const NODE: [&str; 1] = ["node"];

/// The families; filled and read under one lock, since two scrapes may come at once.
struct Families {
    up: IntGaugeVec,
    healthy: IntGaugeVec,
    in_sync: IntGaugeVec,
    ejections: IntCounterVec,
    reads: IntGaugeVec,
    entries: IntGaugeVec,
    bytes: IntGaugeVec,
    oldest: GaugeVec,
    parked: IntGaugeVec,
    in_doubt: IntGaugeVec,
    repairs: IntGaugeVec,
    divergent: IntGaugeVec,
    /// Without labels: a child is there from the start.
    replayed: IntCounterVec,
    failed_replays: IntCounterVec,
    leader: IntGauge,
    term: IntGauge,
    available: IntGauge,
    replaying: IntGauge,
    jobs: IntGauge,
    collections: IntGauge,
    build: IntGaugeVec,
}

/// A Prometheus collector over the core's state.
pub struct StateCollector {
    core: Arc<Core>,
    families: Mutex<Families>,
    descriptions: Vec<Desc>,
}

impl StateCollector {
    /// Makes the families of this file.
    ///
    /// # Errors
    /// When a name is not valid.
    pub fn new(core: Arc<Core>) -> prometheus::Result<Self> {
        let families = Families::new()?;
        let descriptions = families
            .all()
            .into_iter()
            .flat_map(|family| family.desc().into_iter().cloned().collect::<Vec<_>>())
            .collect();
        Ok(Self {
            core,
            families: Mutex::new(families),
            descriptions,
        })
    }
}

impl Collector for StateCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let states = gather(&self.core);
        let families = self.families.lock();
        families.fill(&self.core, &states);
        families.all().into_iter().flat_map(Collector::collect).collect()
    }
}

impl Families {
    fn new() -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str| IntGauge::new(name, help);
        let by_node = |name: &str, help: &str| IntGaugeVec::new(Opts::new(name, help), &NODE);
        let counter = |name: &str, help: &str| IntCounterVec::new(Opts::new(name, help), &[]);
        let families = Self {
            up: by_node("diptych_node_up", "1: the node is given requests.")?,
            healthy: by_node("diptych_node_healthy", "1: the node's probes pass.")?,
            in_sync: by_node(
                "diptych_node_in_sync",
                "1: the node has everything that was acknowledged.",
            )?,
            ejections: IntCounterVec::new(
                Opts::new(
                    "diptych_node_ejections_total",
                    "How often the node went from up to down.",
                ),
                &NODE,
            )?,
            reads: by_node("diptych_node_reads_in_flight", "Reads that the node is serving.")?,
            entries: by_node(
                "diptych_backlog_entries",
                "Entries in the log that the node has yet to get.",
            )?,
            bytes: by_node("diptych_backlog_bytes", "Bytes of their bodies, uncompressed.")?,
            oldest: GaugeVec::new(
                Opts::new(
                    "diptych_backlog_oldest_age_seconds",
                    "Age of the oldest of them; 0: there is none.",
                ),
                &NODE,
            )?,
            parked: by_node(
                "diptych_parked_entries",
                "Entries that block their collection until someone decides.",
            )?,
            in_doubt: by_node(
                "diptych_in_doubt_requests",
                "Requests that the node has not answered though their clients were.",
            )?,
            repairs: by_node("diptych_repairs_open", "Repairs that are needed and not done.")?,
            divergent: by_node(
                "diptych_divergent_collections",
                "Collections, and the namespace, that may differ on the node; it does not serve them.",
            )?,
            replayed: counter(
                "diptych_replayed_entries_total",
                "Entries applied to a node after the fact.",
            )?,
            failed_replays: counter(
                "diptych_failed_replays_total",
                "Replays that a node answered with a failure.",
            )?,
            leader: gauge("diptych_leader", "1: no other proxy has taken over the log.")?,
            term: gauge("diptych_term", "Term of this process as the log's writer.")?,
            available: gauge("diptych_journal_up", "1: the journal answered last time, and is ours.")?,
            replaying: gauge("diptych_replaying", "1: the drain is at work.")?,
            jobs: gauge("diptych_core_jobs", "Jobs that shutdown waits for.")?,
            collections: gauge("diptych_collections", "Collections that are known and not deleted.")?,
            build: IntGaugeVec::new(Opts::new("diptych_build_info", "What runs."), &["version"])?,
        };
        families.build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Ok(families)
    }

    fn all(&self) -> Vec<&dyn Collector> {
        vec![
            &self.up,
            &self.healthy,
            &self.in_sync,
            &self.ejections,
            &self.reads,
            &self.entries,
            &self.bytes,
            &self.oldest,
            &self.parked,
            &self.in_doubt,
            &self.repairs,
            &self.divergent,
            &self.replayed,
            &self.failed_replays,
            &self.leader,
            &self.term,
            &self.available,
            &self.replaying,
            &self.jobs,
            &self.collections,
            &self.build,
        ]
    }

    fn fill(&self, core: &Core, states: &[NodeState]) {
        let now = core.env.wall().timestamp_micros();
        for (node, state) in core.cluster.nodes().iter().zip(states) {
            let name = [node.name.as_str()];
            let set = |family: &IntGaugeVec, value: u64| {
                family
                    .with_label_values(&name)
                    .set(i64::try_from(value).unwrap_or(i64::MAX));
            };
            set(&self.up, node.is_up().into());
            set(&self.healthy, node.is_healthy().into());
            set(&self.in_sync, state.in_sync().into());
            set(&self.reads, node.reads_in_flight() as u64);
            set(&self.entries, state.rows);
            set(&self.bytes, state.bytes);
            set(&self.parked, state.parked);
            set(&self.in_doubt, state.stragglers);
            set(&self.repairs, state.repairs);
            set(&self.divergent, state.divergent() as u64);
            let age = state.oldest.map_or(0, |at| now.saturating_sub(at).max(0));
            self.oldest.with_label_values(&name).set(age as f64 / 1e6);
            catch_up(&self.ejections, &name, node.ejections());
        }
        catch_up(&self.replayed, &[], core.counters.replayed.load(Ordering::Relaxed));
        catch_up(
            &self.failed_replays,
            &[],
            core.counters.failed_replays.load(Ordering::Relaxed),
        );
        self.leader.set((!core.log.is_fenced()).into());
        self.term.set(core.log.term());
        self.available.set(core.log.is_available().into());
        self.replaying.set(super::state::is_replaying(core, states).into());
        let jobs = core.counters.jobs.load(Ordering::SeqCst);
        self.jobs.set(i64::try_from(jobs).unwrap_or(i64::MAX));
        let living = core.catalog.all();
        let living = living.iter().filter(|collection| !collection.is_deleted()).count();
        self.collections.set(living as i64);
    }
}

/// Moves a counter on to `total`.
fn catch_up(family: &IntCounterVec, labels: &[&str], total: u64) {
    let counter = family.with_label_values(labels);
    counter.inc_by(total.saturating_sub(counter.get()));
}

/// Registers everything that this process tells about itself.
///
/// # Errors
/// When a name is taken in `registry`.
pub fn register(registry: &prometheus::Registry, core: &Arc<Core>) -> prometheus::Result<Metrics> {
    registry.register(Box::new(StateCollector::new(core.clone())?))?;
    Metrics::new(registry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_only_move_on() {
        let family = IntCounterVec::new(Opts::new("diptych_test_total", "For this test."), &[]).unwrap();
        catch_up(&family, &[], 3);
        catch_up(&family, &[], 3);
        catch_up(&family, &[], 2);
        catch_up(&family, &[], 5);
        assert_eq!(family.with_label_values::<&str>(&[]).get(), 5);
    }

    #[test]
    fn names_are_valid_and_prefixed() {
        let families = Families::new().unwrap();
        for family in families.all() {
            for description in family.desc() {
                assert!(description.fq_name.starts_with("diptych_"), "{description:?}");
            }
        }
    }
}
