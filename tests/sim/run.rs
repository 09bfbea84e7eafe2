//! One run: phases of trouble, each followed by healing and a look at everything.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use diptych::catalog::Collection;
use diptych::journal::Lsn;
use diptych::lane::Pair;
use diptych::repair::jobs;
use tokio::sync::{oneshot, watch};
use uuid::Uuid;

use crate::client::{Client, Clients};
use crate::executor::WORLD;
use crate::fakes::chroma::{Chroma, Contents, State as NodeState};
use crate::fakes::{DATABASE, Rng, TENANT};
use crate::history::{self, History, Names, Now, State, Who};
use crate::journal::SimJournal;
use crate::node::SimNode;
use crate::plan::{Event, Phase, Plan, Tuning, milliseconds};
use crate::proxy::{Called, Proxy, start};
use crate::watcher::Watcher;
use crate::world::{Life, World};

/// When all is well again, so long after the last fault everything is equal and no row is left.
const HEALED_IN: Duration = Duration::from_secs(3600);
const LOOK: Duration = Duration::from_millis(250);
const NOTICED: Duration = Duration::from_secs(3);
/// Nothing may come to light in this time.
const QUIET: Duration = Duration::from_secs(20);

/// What a run came to.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub failure: Option<String>,
    pub steps: u64,
    pub requests: u64,
    pub commits: u64,
    pub crashes: u64,
    pub virtual_time: Duration,
    pub events: Vec<String>,
    /// Depends on everything that happened: the same for the same seed.
    pub sign: u64,
}

/// Carries a plan out, on a runtime of its own.
pub fn run(plan: &Plan, recording: bool) -> Outcome {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_time().start_paused(true).build().expect("a runtime");
    let plan = plan.clone();
    runtime.block_on(async move {
        let world = World::new(plan.seed, recording);
        let stage = Stage::new(&plan, world.clone());
        world.play(async move { stage.run(&plan).await }).await;
        let count = |number: &std::sync::atomic::AtomicU64| number.load(Ordering::Relaxed);
        let (steps, requests, commits) = (world.steps(), count(&world.requests), count(&world.commits));
        Outcome {
            failure: world.failure(),
            steps,
            requests,
            commits,
            crashes: count(&world.crashes),
            virtual_time: world.now(),
            events: world.events(),
            sign: steps ^ requests << 20 ^ commits << 40 ^ (world.now().as_millis() as u64) << 8 ^ world.tick() << 50,
        }
    })
}

struct Stage {
    world: Arc<World>,
    nodes: [Arc<SimNode>; 2],
    journal: Arc<SimJournal>,
    proxy: watch::Receiver<Option<Arc<Proxy>>>,
    /// How long the proxy stays away when it was killed, in milliseconds.
    away: watch::Sender<u64>,
    /// No client is at work.
    calm: watch::Sender<bool>,
    clients: Arc<Clients>,
    copies: parking_lot::Mutex<Option<Copies>>,
    /// Waits until suspects were compared for the last time, 1000 s after.
    patient: bool,
    /// The node that lost data since all was at rest.
    lost: AtomicUsize,
    /// Copies that an operator is asking for.
    asking: Arc<AtomicUsize>,
}

const NOBODY: usize = usize::MAX;

/// The nodes' folders, and the checkpoints that were remembered then.
type Copies = ([Chroma; 2], BTreeMap<String, Lsn>);

/// What is there after a phase: names, and records by collection and id.
#[derive(Default)]
struct Base {
    names: Names,
    records: BTreeMap<(Uuid, String), State>,
}

impl Stage {
    fn new(plan: &Plan, world: Arc<World>) -> Self {
        let mut rng = Rng::new(plan.seed);
        let nodes = ["a", "b"].map(|name| SimNode::new(name, world.clone(), rng.next()));
        let journal = SimJournal::new(world.clone(), rng.next());
        let (sender, proxy) = watch::channel(None);
        let away = watch::Sender::new(0);
        let clients = Arc::new(Clients {
            world: world.clone(),
            proxy: proxy.clone(),
            history: History::default(),
            known: parking_lot::Mutex::default(),
        });
        let supervised = Supervisor {
            world: world.clone(),
            nodes: nodes.clone(),
            journal: journal.clone(),
            proxy: sender,
            away: away.subscribe(),
            seed: rng.next(),
            tuning: plan.tuning,
        };
        world.executor.spawn(WORLD, Box::pin(supervised.run()));
        Self {
            world,
            nodes,
            journal,
            proxy,
            away,
            calm: watch::Sender::new(true),
            clients,
            copies: parking_lot::Mutex::default(),
            patient: plan.patient,
            lost: AtomicUsize::new(NOBODY),
            asking: Arc::default(),
        }
    }

    async fn run(&self, plan: &Plan) -> Result<(), String> {
        let mut base = Base::default();
        for (number, phase) in plan.phases.iter().enumerate() {
            self.world.say("nemesis", || format!("phase {number}"));
            let watchers = (0..plan.watchers).map(|watcher| {
                let seed = plan.seed ^ (number as u64) << 32 ^ 0x3a7c ^ (watcher as u64) << 48;
                let client = Client::new(self.clients.clone(), plan, plan.clients + watcher, seed);
                Watcher::start(&self.world, client)
            });
            let watchers: Vec<Watcher> = watchers.collect();
            self.trouble(plan, phase, number as u64).await;
            self.heal();
            self.until_at_rest().await?;
            // A node that died a moment ago may not have been missed yet.
            tokio::time::sleep(NOTICED).await;
            self.until_at_rest().await?;
            self.check_same("")?;
            tokio::time::sleep(QUIET).await;
            for watcher in watchers {
                watcher.end().await;
            }
            // What was suspect is compared once more now and then.
            self.until_at_rest().await?;
            base = self.check(&base)?;
            self.keep_copies().await;
            self.lost.store(NOBODY, Ordering::Relaxed);
        }
        Ok(())
    }

    async fn trouble(&self, plan: &Plan, phase: &Phase, number: u64) {
        for (node, weather) in self.nodes.iter().zip(&phase.nodes) {
            node.set_weather(weather.clone());
        }
        self.journal.set_weather(phase.journal.clone());
        let clients: Vec<_> = (0..plan.clients)
            .map(|client| {
                let seed = plan.seed ^ (number << 32) ^ ((client as u64 + 1) << 48);
                let client = Client::new(self.clients.clone(), plan, client, seed);
                self.world.executor.run(client.run(plan.operations))
            })
            .collect();
        let mut pending = vec![];
        self.calm.send_replace(false);
        let begin = self.world.now();
        let mut events = phase.events.clone();
        events.sort_by_key(|(at, _)| *at);
        for (at, event) in events {
            let wait = (begin + milliseconds(at)).saturating_sub(self.world.now());
            tokio::time::sleep(wait).await;
            pending.extend(self.cause(event).await);
        }
        for client in clients {
            let _ = client.await;
        }
        self.calm.send_replace(true);
        for event in pending {
            let _ = event.await;
        }
    }

    /// Of what the nodes hold, and of the checkpoints that are remembered.
    async fn keep_copies(&self) {
        let remembered = self.journal.checkpoints().await;
        let folders = [0, 1].map(|node| self.nodes[node].snapshot());
        *self.copies.lock() = Some((folders, remembered));
    }

    /// Whether the data of this node can be lost: the other one holds everything, alone or together with what it will
    /// take from its log, and nothing is under way that is known to the one alone.
    fn may_lose(&self, node: usize) -> bool {
        let Some(proxy) = self.proxy.borrow().clone() else {
            return false;
        };
        let core = &proxy.core;
        let other = 1 - node;
        if self.lost.load(Ordering::Relaxed) == other {
            return false;
        }
        let may_refuse = self.nodes[other].may_refuse();
        // A collection that the other has just refused to create is nowhere else: a known limit (docs/invariants.md).
        let has_names = !may_refuse || !core.namespace.lane.is_busy();
        let complete = |pair: &Pair| {
            let drains = pair.completes_by_drain() && (pair.pending() == 0 || !may_refuse);
            drains && pair.uncertain() == 0 && !pair.recovering()
        };
        let all = core.catalog.all();
        !proxy.life.is_over()
            && self.asking.load(Ordering::Relaxed) == 0
            && core.recovering() == 0
            && has_names
            && self.journal.tables.repairs().is_empty()
            && complete(&core.namespace.pairs[other])
            && all
                .iter()
                .filter(|one| !one.is_deleted())
                .all(|one| complete(&one.pairs[other]) && one.node_id(other).is_some())
    }

    /// Lets an event happen; what it undoes later is awaited by the caller.
    async fn cause(&self, event: Event) -> Option<oneshot::Receiver<()>> {
        self.world.say("nemesis", || format!("{event:?}"));
        match event {
            Event::Kill { node, down } | Event::Wipe { node, down } | Event::Restore { node, down } => {
                let losing = !matches!(event, Event::Kill { .. });
                if self.nodes[node].is_down() || (losing && !self.may_lose(node)) {
                    return None;
                }
                let copy = match event {
                    Event::Restore { .. } => Some(self.copy_of(node).await?),
                    _ => None,
                };
                let other = self.nodes[node].clone();
                other.kill();
                if losing {
                    self.lost.store(node, Ordering::Relaxed);
                }
                match (event, copy) {
                    (Event::Wipe { .. }, _) => other.wipe(),
                    (_, Some(copy)) => other.restore(copy),
                    _ => {}
                }
                Some(self.world.executor.run(async move {
                    tokio::time::sleep(milliseconds(down)).await;
                    other.start();
                }))
            }
            Event::Stop { node, held } => {
                let node = self.nodes[node].clone();
                node.stop();
                Some(self.world.executor.run(async move {
                    tokio::time::sleep(milliseconds(held)).await;
                    node.go_on();
                }))
            }
            Event::JournalAway { down } => {
                let journal = self.journal.clone();
                journal.set_down(true);
                Some(self.world.executor.run(async move {
                    tokio::time::sleep(milliseconds(down)).await;
                    journal.set_down(false);
                }))
            }
            Event::Crash { steps, down } => {
                self.away.send_replace(down);
                self.world.crash_in(steps);
                None
            }
            Event::CrashAtFault { steps, down } => {
                self.away.send_replace(down);
                self.world.crash_at_fault(steps);
                None
            }
            Event::CrashAtCommit { steps, down } => {
                self.away.send_replace(down);
                self.world.crash_at_commit(steps);
                None
            }
            Event::CrashWithNode { node, steps, down } => {
                self.away.send_replace(1);
                match steps % 2 {
                    0 => self.world.crash_at_fault(steps),
                    _ => self.world.crash_at_commit(steps),
                }
                let (world, node) = (self.world.clone(), self.nodes[node].clone());
                let mut calm = self.calm.subscribe();
                Some(self.world.executor.run(async move {
                    tokio::select! {
                        biased;
                        () = world.until_fall() => {}
                        _ = calm.wait_for(|calm| *calm) => return,
                    }
                    if !node.is_down() {
                        node.kill();
                        tokio::time::sleep(milliseconds(down)).await;
                        node.start();
                    }
                }))
            }
            Event::KillTheOther { after, down } => {
                let (world, nodes) = (self.world.clone(), self.nodes.clone());
                let mut calm = self.calm.subscribe();
                Some(self.world.executor.run(async move {
                    let name = tokio::select! {
                        biased;
                        name = world.until_fault_of_request() => name,
                        _ = calm.wait_for(|calm| *calm) => return,
                    };
                    tokio::time::sleep(milliseconds(after)).await;
                    for node in nodes.iter().filter(|node| node.name != name && !node.is_down()) {
                        node.kill();
                        tokio::time::sleep(milliseconds(down)).await;
                        node.start();
                    }
                }))
            }
            Event::Resync { node } => {
                let proxy = self.proxy.borrow().clone()?;
                // Nobody has a node copied from one that has just lost everything.
                if self.lost.load(Ordering::Relaxed) == 1 - node {
                    return None;
                }
                let living = proxy.core.catalog.all().into_iter().filter(|one| !one.is_deleted());
                let collection = living.max_by_key(|one| one.generation)?;
                let asking = self.asking.clone();
                asking.fetch_add(1, Ordering::Relaxed);
                Some(self.world.executor.run(async move {
                    let core = proxy.core.clone();
                    let resync = async move { jobs::resync(&core, &collection, node, None).await };
                    let _ = proxy.call(resync).await;
                    asking.fetch_sub(1, Ordering::Relaxed);
                }))
            }
            Event::Verify => {
                let proxy = self.proxy.borrow().clone()?;
                Some(self.world.executor.run(async move {
                    let core = proxy.core.clone();
                    let options = jobs::Options {
                        repair: true,
                        ..jobs::Options::default()
                    };
                    let Called::Answered(id) = proxy.call(async move { jobs::verify(&core, None, options) }).await
                    else {
                        return;
                    };
                    let goes_on = || {
                        proxy
                            .core
                            .repairing
                            .report(id)
                            .is_some_and(|report| report.finished_at.is_none())
                    };
                    while goes_on() && !proxy.life.is_over() {
                        tokio::time::sleep(LOOK).await;
                    }
                }))
            }
            Event::KillAtFault { node, after, down } => {
                let (world, node) = (self.world.clone(), self.nodes[node].clone());
                let mut calm = self.calm.subscribe();
                Some(self.world.executor.run(async move {
                    tokio::select! {
                        biased;
                        () = world.until_fault() => {}
                        _ = calm.wait_for(|calm| *calm) => return,
                    }
                    tokio::time::sleep(milliseconds(after)).await;
                    if !node.is_down() {
                        node.kill();
                        tokio::time::sleep(milliseconds(down)).await;
                        node.start();
                    }
                }))
            }
        }
    }

    /// A copy of a node that is older than what is remembered of it: a younger one is not known for what it is when the
    /// proxy dies as well (schedule S38, design.md 9).
    async fn copy_of(&self, node: usize) -> Option<Chroma> {
        let (folders, then) = self.copies.lock().clone()?;
        let now = self.journal.checkpoints().await;
        let name = self.nodes[node].name;
        let older = now.get(name).copied() > then.get(name).copied();
        (older && self.may_lose(node) && !self.nodes[node].is_down()).then(|| folders[node].clone())
    }

    fn heal(&self) {
        self.world.say("nemesis", || "all is well again".to_owned());
        for node in &self.nodes {
            node.set_weather(vec![]);
        }
        self.journal.set_weather(vec![]);
        self.world.crash_no_more();
    }

    async fn until_at_rest(&self) -> Result<(), String> {
        let until = self.world.now() + HEALED_IN;
        while let Some(open) = self.open_matters() {
            if self.world.now() > until {
                return Err(format!("it does not heal: {open}"));
            }
            self.take_up_parked_repairs().await;
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// What a person does when the trouble is over.
    async fn take_up_parked_repairs(&self) {
        let Some(proxy) = self.proxy.borrow().clone() else {
            return;
        };
        let parked: Vec<Uuid> = {
            let repairs = proxy.core.repairs.lock();
            let parked = repairs.iter().filter(|row| row.parked.is_some());
            parked.map(|row| row.id).collect()
        };
        for id in parked {
            let core = proxy.core.clone();
            let _ = proxy.call(async move { jobs::retry(&core, id).await }).await;
        }
    }

    /// What is not at rest yet.
    fn open_matters(&self) -> Option<String> {
        let Some(proxy) = self.proxy.borrow().clone() else {
            return Some("no proxy".to_owned());
        };
        let core = &proxy.core;
        if proxy.life.is_over() {
            return Some("the proxy is dead".to_owned());
        }
        if core.cluster.up().count() < 2 {
            return Some("a node is not up".to_owned());
        }
        let (rows, repairs) = (self.journal.tables.rows(), self.journal.tables.repairs());
        if !rows.is_empty() || !repairs.is_empty() {
            return Some(format!("payload rows {rows:?}, repair rows {repairs:?}"));
        }
        if core.counters.jobs.load(Ordering::SeqCst) > 0 {
            return Some("jobs are under way".to_owned());
        }
        if !core.namespace.pairs.iter().all(Pair::in_sync) {
            return Some(format!("the namespace: {:?}", core.namespace.pairs));
        }
        let all = core.catalog.all();
        let mut living = all.iter().filter(|one| !one.is_deleted());
        let open = |one: &&Arc<Collection>| (0..2).any(|node| !one.in_sync(node) || one.node_id(node).is_none());
        if let Some(one) = living.find(open) {
            return Some(format!("{}: {:?}", one.facts().name, one.pairs));
        }
        if core.recovering() > 0 {
            return Some("the last stop is not recovered from".to_owned());
        }
        if core.unprotected.is_open() {
            return Some("what was written without the log is not verified".to_owned());
        }
        let suspects = core.suspects.lock();
        if self.patient && !suspects.is_empty() {
            return Some(format!("suspects: {suspects:?}"));
        }
        if self.nodes.iter().any(|node| node.has_late()) {
            return Some("a request has still to land".to_owned());
        }
        None
    }

    fn contents(&self, node: usize) -> BTreeMap<String, Contents> {
        let mut state = self.nodes[node].state();
        let key = (TENANT.to_owned(), DATABASE.to_owned());
        state.remove(&key).unwrap_or_default()
    }

    fn check(&self, base: &Base) -> Result<Base, String> {
        self.check_equal()?;
        self.check_mapping()?;
        let records = self.contents(0);
        let proxy = self.proxy.borrow().clone().ok_or("no proxy")?;
        let mut now = Base::default();
        let mut ids = BTreeMap::new();
        for record in self.journal.tables.living() {
            let known = proxy.core.catalog.by_generation(record.generation);
            if known.is_none_or(|known| known.facts().name != record.name) {
                return Err(format!("memory does not know {} as the journal does", record.name));
            }
            ids.insert(record.name.clone(), record.client_id);
            now.names.insert(record.name.clone(), Who::Known(record.client_id));
            let contents = records.get(&record.name).ok_or("a name that no node has")?;
            for one in &contents.records {
                let key = (record.client_id, one.id.clone());
                now.records.insert(key, Some(history::record_of(one)));
            }
        }
        let phase = std::mem::take(&mut *self.clients.history.phase.lock());
        history::check_names(&base.names, &phase.names, &ids)?;
        let turned = self.journal.take_turned();
        let turned: BTreeSet<Uuid> = {
            let living = self.journal.tables.living();
            let turned = living.iter().filter(|record| turned.contains(&record.generation));
            turned.map(|record| record.client_id).collect()
        };
        // What landed after everything that waits for it may have undone what came later.
        let outlasted: BTreeSet<String> = self.nodes.iter().flat_map(|node| node.take_outlasted()).collect();
        let life = self.world.crashes.load(Ordering::Relaxed);
        let (none, empty) = (vec![], None);
        let keys = phase.writes.keys().chain(phase.reads.keys()).chain(base.records.keys());
        for key in keys.chain(now.records.keys()) {
            if outlasted.contains(&key.1) {
                continue;
            }
            let lives = ids.values().any(|id| *id == key.0);
            let reads = phase.reads.get(key).map_or(&[][..], Vec::as_slice);
            let turned = !lives || turned.contains(&key.0);
            let writes = phase.writes.get(key).unwrap_or(&none);
            let before = base.records.get(key).unwrap_or(&empty);
            let after = lives.then(|| Now {
                state: now.records.get(key).unwrap_or(&empty),
                life,
            });
            history::check_record(before, writes, reads, after, turned)
                .map_err(|error| format!("{} of {}: {error}", key.1, key.0))?;
        }
        Ok(now)
    }

    /// Both nodes hold the same, also when what they have not applied yet comes to light.
    fn check_equal(&self) -> Result<(), String> {
        for step in [" later", ", after what was hidden came to light"] {
            self.check_same(step)?;
            self.nodes.iter().for_each(|node| node.with(|chroma| chroma.reveal()));
        }
        Ok(())
    }

    fn check_same(&self, when: &str) -> Result<(), String> {
        let [a, b] = [0, 1].map(|node| in_order(self.nodes[node].state()));
        match a == b {
            true => Ok(()),
            false => Err(format!("the nodes differ{when}\n  a: {a:?}\n  b: {b:?}")),
        }
    }

    /// Every collection is mapped to what each node has, and each node has nothing else.
    fn check_mapping(&self) -> Result<(), String> {
        let living = self.journal.tables.living();
        for node in &self.nodes {
            for record in &living {
                let there = node.with(|chroma| chroma.id_of(&record.name));
                if record.node_ids.get(node.name) != there.as_ref() || there.is_none() {
                    return Err(format!("{record:?} is {there:?} on {}", node.name));
                }
            }
        }
        let names = self.contents(0);
        if names.len() != living.len() {
            return Err(format!("the catalog has {living:?}, the nodes have {:?}", names.keys()));
        }
        Ok(())
    }
}

/// Records by id: a repair may change their order.
fn in_order(mut state: NodeState) -> NodeState {
    let collections = state.values_mut().flat_map(BTreeMap::values_mut);
    collections.for_each(|contents| contents.records.sort_by(|one, other| one.id.cmp(&other.id)));
    state
}

/// Starts the proxy whenever it is not there.
struct Supervisor {
    world: Arc<World>,
    nodes: [Arc<SimNode>; 2],
    journal: Arc<SimJournal>,
    proxy: watch::Sender<Option<Arc<Proxy>>>,
    away: watch::Receiver<u64>,
    seed: u64,
    tuning: Tuning,
}

impl Supervisor {
    async fn run(self) {
        let mut rng = Rng::new(self.seed);
        loop {
            let life = Life::new(self.world.clone(), rng.next());
            if let Some(proxy) = start(&life, &self.nodes, &self.journal, self.tuning).await {
                self.world.say("proxy", || "listens".to_owned());
                self.proxy.send_replace(Some(proxy));
                self.world.came_back();
                life.ended().await;
            }
            self.proxy.send_replace(None);
            let away = *self.away.borrow();
            tokio::time::sleep(milliseconds(away)).await;
        }
    }
}
