//! States as metrics: read when Prometheus asks, so they cannot be stale.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{CounterVec, Gauge, GaugeVec, IntCounterVec, IntGauge, IntGaugeVec, Opts};

use super::state::{NodeState, gather};
use crate::journal::RepairKind;
use crate::metrics::Metrics;
use crate::mirror::Core;

const NODE: [&str; 1] = ["node"];

/// The families; filled and read under one lock, since two scrapes may come at once.
struct Families {
    up: IntGaugeVec,
    healthy: IntGaugeVec,
    maintenance: IntGaugeVec,
    in_sync: IntGaugeVec,
    ejections: IntCounterVec,
    reads: IntGaugeVec,
    entries: IntGaugeVec,
    bytes: IntGaugeVec,
    oldest: GaugeVec,
    parked: IntGaugeVec,
    in_doubt: IntGaugeVec,
    repairs: IntGaugeVec,
    parked_repairs: IntGaugeVec,
    suspects: IntGaugeVec,
    divergent: IntGaugeVec,
    /// Without labels: a child is there from the start.
    replayed: IntCounterVec,
    failed_replays: IntCounterVec,
    events_dropped: IntCounterVec,
    leader: IntGauge,
    term: IntGauge,
    available: IntGauge,
    replaying: IntGauge,
    recovering: IntGauge,
    unprotected: IntGauge,
    unprotected_time: CounterVec,
    verified: Gauge,
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
            maintenance: by_node(
                "diptych_node_maintenance",
                "1: an operator took the node out of service.",
            )?,
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
            repairs: IntGaugeVec::new(
                Opts::new("diptych_repairs_open", "Repairs that are needed and not done."),
                &["node", "kind"],
            )?,
            parked_repairs: by_node(
                "diptych_parked_repairs",
                "Of those, the ones that failed and wait for someone to decide.",
            )?,
            suspects: by_node(
                "diptych_suspects",
                "Writes of unknown outcome that are still to be compared.",
            )?,
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
            events_dropped: counter(
                "diptych_events_dropped_total",
                "Events that could not be written down; nothing rests on them.",
            )?,
            leader: gauge("diptych_leader", "1: no other proxy has taken over the log.")?,
            term: gauge("diptych_term", "Term of this process as the log's writer.")?,
            available: gauge("diptych_journal_up", "1: the journal answered last time, and is ours.")?,
            replaying: gauge("diptych_replaying", "1: the drain is at work.")?,
            recovering: gauge(
                "diptych_recovering_lanes",
                "Collections, and the namespace, that nobody serves before it is known what the last stop left.",
            )?,
            unprotected: gauge(
                "diptych_unprotected",
                "1: there are writes that were sent while the log was away and are not compared yet.",
            )?,
            unprotected_time: CounterVec::new(
                Opts::new("diptych_unprotected_seconds_total", "For how long that was so."),
                &[],
            )?,
            verified: Gauge::new(
                "diptych_verified_timestamp_seconds",
                "Since then every collection was found equal on all nodes at least once; 0: not all were yet.",
            )?,
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
            &self.maintenance,
            &self.in_sync,
            &self.ejections,
            &self.reads,
            &self.entries,
            &self.bytes,
            &self.oldest,
            &self.parked,
            &self.in_doubt,
            &self.repairs,
            &self.parked_repairs,
            &self.suspects,
            &self.divergent,
            &self.replayed,
            &self.failed_replays,
            &self.events_dropped,
            &self.leader,
            &self.term,
            &self.available,
            &self.replaying,
            &self.recovering,
            &self.unprotected,
            &self.unprotected_time,
            &self.verified,
            &self.jobs,
            &self.collections,
            &self.build,
        ]
    }

    fn fill(&self, core: &Core, states: &[NodeState]) {
        let now = core.env.wall().timestamp_micros();
        let rows = core.repairs.lock().clone();
        let mut repairs: BTreeMap<(&str, RepairKind), i64> = BTreeMap::new();
        for row in &rows {
            *repairs.entry((row.node.as_str(), row.kind)).or_default() += 1;
        }
        for (node, state) in core.cluster.nodes().iter().zip(states) {
            let name = [node.name.as_str()];
            let set = |family: &IntGaugeVec, value: u64| {
                family
                    .with_label_values(&name)
                    .set(i64::try_from(value).unwrap_or(i64::MAX));
            };
            set(&self.up, node.is_up().into());
            set(&self.healthy, node.is_healthy().into());
            set(&self.maintenance, node.is_in_maintenance().into());
            set(&self.in_sync, state.in_sync().into());
            set(&self.reads, node.reads_in_flight() as u64);
            set(&self.entries, state.rows);
            set(&self.bytes, state.bytes);
            set(&self.parked, state.parked);
            set(&self.in_doubt, state.stragglers);
            for kind in RepairKind::ALL {
                let open = repairs.get(&(node.name.as_str(), kind)).copied().unwrap_or_default();
                self.repairs
                    .with_label_values(&[node.name.as_str(), kind.label()])
                    .set(open);
            }
            set(&self.parked_repairs, state.parked_repairs);
            set(&self.suspects, state.suspects);
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
        catch_up(&self.events_dropped, &[], core.events().dropped());
        self.leader.set((!core.log.is_fenced()).into());
        self.term.set(core.log.term());
        self.available.set(core.log.is_available().into());
        self.recovering
            .set(i64::try_from(core.recovering()).unwrap_or(i64::MAX));
        self.unprotected.set(core.unprotected.is_open().into());
        let unprotected = core.unprotected.time(core.env.now()).as_secs_f64();
        let counter = self.unprotected_time.with_label_values::<&str>(&[]);
        counter.inc_by((unprotected - counter.get()).max(0.0));
        self.verified
            .set(super::state::verified_at(core).map_or(0.0, |at| at.timestamp_micros() as f64 / 1e6));
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

    #[test]
    fn the_readme_has_every_metric_and_no_other() {
        let quoted = |text: &str, quote: char| -> std::collections::BTreeSet<String> {
            let name =
                |part: &&str| part.starts_with("diptych_") && part.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
            text.split(quote).filter(name).map(str::to_owned).collect()
        };
        let (code, tests) = include_str!("collector.rs").split_once("#[cfg(test)]").unwrap();
        assert!(tests.contains("diptych_test_total"), "which is none of ours");
        let mut ours = quoted(code, '"');
        ours.extend(quoted(include_str!("../metrics.rs"), '"'));
        assert!(ours.len() > 30, "{ours:?}");
        let (_, section) = include_str!("../../README.md").split_once("### Metrics").unwrap();
        let (table, _) = section.split_once("Worth an alert").unwrap();
        assert_eq!(quoted(table, '`'), ours);
    }
}
