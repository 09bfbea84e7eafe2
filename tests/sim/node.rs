//! A Chroma server that fails as its weather says, can be killed and stopped, and treats requests whose connection ends
//! as Chroma does (chroma-facts.md 3.4): applied, logged and hidden, landing later, or never seen.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use diptych::chroma::{OWN_TENANT, Route, classify};
use diptych::cluster::{Held, NodeClient, NodeRequest, NodeResponse, SendError, StreamedResponse};
use diptych::env::BoxFuture;
use http::{HeaderMap, Method};
use http_body_util::{BodyExt, Full};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::executor::WORLD;
use crate::fakes::Rng;
use crate::fakes::chroma::{Chroma, Reply, State};
use crate::plan::{NodeFault, Weather, milliseconds};
use crate::world::World;

/// The longest that a request of a closed connection takes to land when no canary comes.
const LATEST: u64 = 60_000;
/// The longest that a request takes to land that outlasts canaries.
const OUTLASTS: u64 = 900_000;
/// How long a slow request or answer takes at most: one of these.
const HOLDS: [u64; 3] = [300, 5_000, 30_000];

#[derive(Debug, Clone)]
struct Seen {
    method: Method,
    path: String,
    body: Bytes,
}

impl Seen {
    fn route(&self) -> Route {
        classify(&self.method, self.path.split('?').next().unwrap_or_default())
    }

    fn is_our_own(&self) -> bool {
        let own = OWN_TENANT.as_bytes();
        self.path.contains(OWN_TENANT) || self.body.windows(own.len()).any(|part| part == own)
    }

    fn is_canary(&self) -> bool {
        self.is_our_own() && self.path.contains("/health/") && self.path.ends_with("/upsert")
    }

    fn is_write(&self) -> bool {
        self.method != Method::GET && !matches!(self.route(), Route::RecordRead { .. })
    }

    fn is_record_write(&self) -> bool {
        matches!(self.route(), Route::RecordWrite { .. })
    }

    fn text(&self) -> String {
        let path = self.path.split("/databases/").last().unwrap_or_default();
        let path = path.trim_start_matches("default_database/collections/");
        format!("{} {path} {}", self.method, String::from_utf8_lossy(&self.body))
    }
}

/// A request whose connection is gone and that has still to land.
struct Late {
    seen: Seen,
    hide: bool,
}

struct Inner {
    chroma: Chroma,
    rng: Rng,
    weather: Weather<NodeFault>,
    late: BTreeMap<u64, Late>,
    next_late: u64,
    /// Those of them that no canary waits for, and records that were written by them.
    outlasting: BTreeMap<u64, Late>,
    outlasted: BTreeSet<String>,
    /// What it refuses, it refuses again.
    refuses: Vec<Bytes>,
    /// How often its folder was exchanged.
    folder: u64,
}

pub struct SimNode {
    pub name: &'static str,
    world: Arc<World>,
    inner: Mutex<Inner>,
    down: watch::Sender<bool>,
    stopped: watch::Sender<bool>,
    /// How often it was killed.
    kills: watch::Sender<u64>,
}

impl SimNode {
    pub fn new(name: &'static str, world: Arc<World>, seed: u64) -> Arc<Self> {
        Arc::new(Self {
            name,
            world,
            inner: Mutex::new(Inner {
                chroma: Chroma::new(seed),
                rng: Rng::new(seed ^ 0x5eed),
                weather: vec![],
                late: BTreeMap::new(),
                next_late: 0,
                outlasting: BTreeMap::new(),
                outlasted: BTreeSet::new(),
                refuses: vec![],
                folder: 0,
            }),
            down: watch::Sender::new(false),
            stopped: watch::Sender::new(false),
            kills: watch::Sender::new(0),
        })
    }

    pub fn set_weather(&self, weather: Weather<NodeFault>) {
        let mut inner = self.inner.lock();
        inner.weather = weather;
        inner.refuses.clear();
    }

    /// Records that were written by requests which outlasted a canary.
    pub fn take_outlasted(&self) -> BTreeSet<String> {
        std::mem::take(&mut self.inner.lock().outlasted)
    }

    /// It may refuse what the other node took.
    pub fn may_refuse(&self) -> bool {
        let inner = self.inner.lock();
        inner.weather.iter().any(|(fault, _)| *fault == NodeFault::Refused)
    }

    pub fn state(&self) -> State {
        self.inner.lock().chroma.state()
    }

    pub fn with<T>(&self, change: impl FnOnce(&mut Chroma) -> T) -> T {
        change(&mut self.inner.lock().chroma)
    }

    /// Requests of closed connections that may still land.
    pub fn has_late(&self) -> bool {
        let inner = self.inner.lock();
        !inner.late.is_empty() || !inner.outlasting.is_empty()
    }

    pub fn kills(&self) -> u64 {
        *self.kills.borrow()
    }

    /// kill -9: what has not landed lands now or never; connections break.
    pub fn kill(&self) {
        self.world.say(self.name, || "killed".to_owned());
        self.down.send_replace(true);
        self.kills.send_modify(|kills| *kills += 1);
        let mut inner = self.inner.lock();
        inner.outlasting.clear();
        let late = std::mem::take(&mut inner.late);
        for one in late.into_values() {
            if inner.rng.below(2) == 0 {
                inner
                    .chroma
                    .handle(&one.seen.method, &one.seen.path, &one.seen.body, false);
            }
        }
    }

    /// Starts again: what it had logged is applied.
    pub fn start(&self) {
        self.world.say(self.name, || "started".to_owned());
        self.inner.lock().chroma.reveal();
        self.stopped.send_replace(false);
        self.down.send_replace(false);
        self.world.came_back();
    }

    /// Its folder is empty: while it is down.
    pub fn wipe(&self) {
        self.world.say(self.name, || "wiped".to_owned());
        let mut inner = self.inner.lock();
        inner.folder += 1;
        inner.chroma = Chroma::new(inner.rng.next());
    }

    pub fn snapshot(&self) -> Chroma {
        self.inner.lock().chroma.clone()
    }

    /// A copy of its folder takes the place of it: while it is down.
    pub fn restore(&self, folder: Chroma) {
        self.world.say(self.name, || "restored from a copy".to_owned());
        let mut inner = self.inner.lock();
        inner.folder += 1;
        inner.chroma = folder;
        let seed = inner.rng.next();
        inner.chroma.reseed(seed);
    }

    pub fn is_down(&self) -> bool {
        *self.down.borrow()
    }

    /// SIGSTOP.
    pub fn stop(&self) {
        self.world.say(self.name, || "stopped".to_owned());
        self.stopped.send_replace(true);
    }

    /// SIGCONT.
    pub fn go_on(&self) {
        self.world.say(self.name, || "goes on".to_owned());
        self.stopped.send_replace(false);
        self.world.came_back();
    }

    async fn running(&self) {
        let _ = self.stopped.subscribe().wait_for(|stopped| !*stopped).await;
    }

    fn draw(&self, seen: &Seen) -> Option<NodeFault> {
        let mut inner = self.inner.lock();
        let draw = inner.rng.below(1000);
        if seen.is_our_own() {
            return None;
        }
        if inner.refuses.contains(&seen.body) {
            return Some(NodeFault::Refused);
        }
        let mut upto = 0;
        let found = inner.weather.iter().find(|(_, share)| {
            upto += share;
            draw < upto
        });
        let fault = found.map(|(fault, _)| *fault)?;
        let fits = match fault {
            NodeFault::Hidden | NodeFault::Outlasts => seen.is_record_write(),
            NodeFault::NotSent | NodeFault::SlowRequest | NodeFault::SlowAnswer | NodeFault::ClosedBefore => true,
            _ => seen.is_write(),
        };
        if fits && fault == NodeFault::Refused && seen.is_record_write() && inner.rng.below(2) == 0 {
            inner.refuses.push(seen.body.clone());
        }
        fits.then_some(fault)
    }

    fn below(&self, bound: u64) -> u64 {
        self.inner.lock().rng.below(bound)
    }

    fn handle(&self, seen: &Seen, hide: bool) -> Reply {
        let mut inner = self.inner.lock();
        let reply = inner.chroma.handle(&seen.method, &seen.path, &seen.body, hide);
        if seen.is_write() && !seen.is_our_own() {
            let hidden = if hide { " (hidden)" } else { "" };
            self.world
                .say(self.name, || format!("{} -> {}{hidden}", seen.text(), reply.0));
        }
        reply
    }

    /// The connection is gone; the request lands after a while, or when a canary comes.
    fn land_late(self: &Arc<Self>, seen: Seen, hide: bool) {
        let (number, after) = {
            let mut inner = self.inner.lock();
            inner.next_late += 1;
            let number = inner.next_late;
            self.world.say(self.name, || format!("will land: {}", seen.text()));
            inner.late.insert(number, Late { seen, hide });
            (number, inner.rng.below(LATEST))
        };
        let node = self.clone();
        let landing = async move {
            tokio::time::sleep(milliseconds(after)).await;
            node.running().await;
            let late = node.inner.lock().late.remove(&number);
            if let Some(late) = late {
                node.handle(&late.seen, late.hide);
            }
        };
        self.world.executor.spawn(WORLD, Box::pin(landing));
    }

    /// The connection is gone; the request waits for a lock, for longer than a canary that comes after it.
    fn outlast(self: &Arc<Self>, seen: Seen) {
        let (number, after) = {
            let mut inner = self.inner.lock();
            inner.next_late += 1;
            let number = inner.next_late;
            self.world.say(self.name, || format!("will land late: {}", seen.text()));
            inner.outlasting.insert(number, Late { seen, hide: false });
            (number, inner.rng.below(OUTLASTS))
        };
        let node = self.clone();
        let landing = async move {
            tokio::time::sleep(milliseconds(after)).await;
            node.running().await;
            let late = node.inner.lock().outlasting.remove(&number);
            let Some(late) = late else { return };
            node.handle(&late.seen, false);
            let body: serde_json::Value = serde_json::from_slice(&late.seen.body).unwrap_or_default();
            let ids = body["ids"].as_array().into_iter().flatten();
            let ids = ids.filter_map(|id| id.as_str().map(str::to_owned));
            node.inner.lock().outlasted.extend(ids);
        };
        self.world.executor.spawn(WORLD, Box::pin(landing));
    }

    fn land_all(&self) {
        let late = std::mem::take(&mut self.inner.lock().late);
        for one in late.into_values() {
            self.handle(&one.seen, one.hide);
        }
    }

    /// The connection of a request that was not carried out yet is gone.
    fn abandoned(self: &Arc<Self>, seen: Seen) {
        if !seen.is_write() {
            return;
        }
        let draw = self.below(10);
        if self.is_down() {
            // It dies with the process; what it had logged by then is found at the next start.
            if draw < 5 {
                self.handle(&seen, false);
            }
            return;
        }
        let hide = seen.is_record_write() && draw.is_multiple_of(2);
        match draw {
            0..=3 if !*self.stopped.borrow() => {
                self.handle(&seen, hide);
            }
            0..=6 => self.land_late(seen, hide),
            _ => self.world.say(self.name, || format!("never saw {}", seen.text())),
        }
    }

    async fn exchange(self: &Arc<Self>, flight: &mut Flight, fault: Option<NodeFault>) -> Result<Reply, SendError> {
        let (before, after) = (1 + self.below(3), 1 + self.below(3));
        let longest = HOLDS[usize::try_from(self.below(3)).unwrap_or_default()];
        let hold = milliseconds(1 + self.below(longest));
        tokio::time::sleep(milliseconds(before)).await;
        if fault == Some(NodeFault::SlowRequest) {
            tokio::time::sleep(hold).await;
        }
        self.running().await;
        let Some(seen) = flight.seen.take() else {
            return Err(closed());
        };
        if seen.is_canary() {
            self.land_all();
        }
        let reply = match fault {
            Some(NodeFault::NotSent) => return Err(refused()),
            Some(NodeFault::ClosedBefore) => return Err(closed()),
            Some(NodeFault::ClosedAfter) => {
                self.handle(&seen, false);
                return Err(closed());
            }
            Some(NodeFault::LandsLate) => {
                let hide = seen.is_record_write() && self.below(4) == 0;
                self.land_late(seen, hide);
                return Err(closed());
            }
            Some(NodeFault::Outlasts) => {
                self.outlast(seen);
                return Err(closed());
            }
            Some(NodeFault::Hidden) => self.handle(&seen, true),
            Some(NodeFault::Locked) => error(500, "InternalError", "database is locked"),
            Some(NodeFault::DiskFull) => error(500, "InternalError", "disk is full"),
            Some(NodeFault::AppliedBut) => {
                self.handle(&seen, false);
                error(500, "InternalError", "something went wrong")
            }
            Some(NodeFault::Failed) => error(500, "InternalError", "something went wrong"),
            Some(NodeFault::Refused) => error(400, "InvalidArgumentError", "refused"),
            None | Some(NodeFault::SlowRequest | NodeFault::SlowAnswer) => self.handle(&seen, false),
        };
        tokio::time::sleep(milliseconds(after)).await;
        if fault == Some(NodeFault::SlowAnswer) {
            tokio::time::sleep(hold).await;
        }
        self.running().await;
        Ok(reply)
    }
}

/// A request under way; dropped before it was carried out, its connection is gone.
struct Flight {
    node: Arc<SimNode>,
    seen: Option<Seen>,
    /// Which of the node's folders it was sent to: it is never found in another one.
    folder: u64,
}

impl Drop for Flight {
    fn drop(&mut self) {
        if let Some(seen) = self.seen.take()
            && self.folder == self.node.inner.lock().folder
        {
            self.node.abandoned(seen);
        }
    }
}

fn error(status: u16, name: &str, message: &str) -> Reply {
    (status, format!(r#"{{"error":"{name}","message":"{message}"}}"#))
}

fn closed() -> SendError {
    SendError::Broken("connection closed before message completed".to_owned())
}

fn refused() -> SendError {
    SendError::NotSent("connection refused".to_owned())
}

/// The way to a node.
pub struct Line(pub Arc<SimNode>);

/// A connection to one process of a node.
struct SimHeld {
    node: Arc<SimNode>,
    kills: u64,
}

#[async_trait]
impl Held for SimHeld {
    async fn send(&self, request: NodeRequest) -> Result<NodeResponse, SendError> {
        let line = Line(self.node.clone());
        tokio::select! {
            biased;
            () = self.until_ended() => Err(closed()),
            answer = line.send(request) => answer,
        }
    }

    fn until_ended(&self) -> BoxFuture<()> {
        let (mut kills, mine) = (self.node.kills.subscribe(), self.kills);
        Box::pin(async move {
            let _ = kills.wait_for(|kills| *kills != mine).await.is_ok();
        })
    }
}

#[async_trait]
impl NodeClient for Line {
    async fn hold(&self) -> Result<Arc<dyn Held>, SendError> {
        if self.0.is_down() {
            return Err(refused());
        }
        // The kernel accepts for a stopped process.
        tokio::time::sleep(milliseconds(1)).await;
        Ok(Arc::new(SimHeld {
            node: self.0.clone(),
            kills: self.0.kills(),
        }))
    }

    async fn open(&self, request: NodeRequest) -> Result<StreamedResponse, SendError> {
        let node = &self.0;
        if node.is_down() {
            return Err(refused());
        }
        node.world.requests.fetch_add(1, Ordering::Relaxed);
        let seen = Seen {
            method: request.method,
            path: request.path,
            body: request.body.unwrap_or_default(),
        };
        let fault = node.draw(&seen);
        if let Some(fault) = fault {
            node.world.fault_of_request(node.name);
            node.world.say(node.name, || format!("{fault:?} on {}", seen.text()));
        }
        if fault == Some(NodeFault::NotSent) {
            return Err(refused());
        }
        let mut flight = Flight {
            folder: node.inner.lock().folder,
            node: node.clone(),
            seen: Some(seen),
        };
        let mut kills = node.kills.subscribe();
        kills.mark_unchanged();
        let (status, body) = tokio::select! {
            biased;
            _ = kills.changed() => return Err(closed()),
            reply = node.exchange(&mut flight, fault) => reply?,
        };
        Ok(StreamedResponse {
            status,
            headers: HeaderMap::new(),
            body: Full::new(Bytes::from(body))
                .map_err(|never| match never {})
                .boxed_unsync(),
        })
    }
}

/// How long a heartbeat may take.
pub const PROBE_LIMIT: Duration = Duration::from_secs(1);
