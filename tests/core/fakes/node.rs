//! A node that fails as it is told to.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use diptych::chroma::{OWN_TENANT, RecordWrite, Route, classify};
use diptych::cluster::{Held, NodeClient, NodeRequest, NodeResponse, SendError, StreamedResponse};
use diptych::env::BoxFuture;
use http::{HeaderMap, Method};
use http_body_util::{BodyExt, Full};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::watch;

use super::chroma::{Chroma, Reply, State};
use super::env::Rng;

/// What happens to a request.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Nothing: it is carried out and answered.
    None,
    NotSent,
    ClosedBefore,
    ClosedAfter,
    /// It arrives when the gate opens; then what the gate says.
    Held(Gate),
    /// It takes so long; then what is said here.
    Slow(Duration, Box<Fault>),
    /// Closed at once; it lands after a while, or when a canary comes, whatever is first.
    LandsLate(Duration),
    /// It is carried out at once, its answer waits for the gate.
    AnswerHeld(Gate),
    /// This answer, and nothing is carried out.
    Answer(u16, &'static str),
    /// It is carried out and answered with this all the same.
    AppliedBut(u16, &'static str),
    /// `Error in compaction`: a record write is logged, and applied by the next one.
    Hidden,
}

pub const LOCKED: Fault = Fault::Answer(500, r#"{"error":"InternalError","message":"database is locked"}"#);
pub const DISK_FULL: Fault = Fault::Answer(500, r#"{"error":"InternalError","message":"disk is full"}"#);
pub const REFUSED: Fault = Fault::Answer(400, r#"{"error":"InvalidArgumentError","message":"refused"}"#);

/// Holds what waits at it until it is opened.
#[derive(Debug, Clone)]
pub struct Gate(Arc<watch::Sender<Option<Box<Fault>>>>);

impl Gate {
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }

    pub fn open(&self) {
        self.open_to(Fault::None);
    }

    pub fn open_to(&self, fault: Fault) {
        self.0.send_replace(Some(Box::new(fault)));
    }

    async fn wait(&self) -> Fault {
        let mut opened = self.0.subscribe();
        let fault = opened.wait_for(Option::is_some).await.expect("the gate is ours");
        fault.as_deref().expect("opened").clone()
    }
}

/// A request that reached the node.
#[derive(Debug, Clone)]
pub struct Seen {
    pub method: Method,
    pub path: String,
    pub body: Bytes,
}

impl Seen {
    fn route(&self) -> Route {
        classify(&self.method, self.path.split('?').next().unwrap_or_default())
    }

    fn is_our_own(&self) -> bool {
        self.path.contains(OWN_TENANT)
            || self
                .body
                .windows(OWN_TENANT.len())
                .any(|part| part == OWN_TENANT.as_bytes())
    }

    pub fn record_write(&self) -> Option<(RecordWrite, Value)> {
        match self.route() {
            Route::RecordWrite { write, .. } if !self.is_our_own() => {
                Some((write, serde_json::from_slice(&self.body).unwrap_or(Value::Null)))
            }
            _ => None,
        }
    }

    fn is_canary(&self) -> bool {
        self.is_our_own() && self.path.contains("/health/") && self.path.ends_with("/upsert")
    }

    fn text(&self) -> String {
        format!("{} {} {}", self.method, self.path, String::from_utf8_lossy(&self.body))
    }
}

struct Rule {
    pattern: String,
    times: usize,
    fault: Fault,
}

type Chaos = Box<dyn FnMut(&Seen) -> Fault + Send>;

struct Inner {
    chroma: Chroma,
    seen: Vec<Seen>,
    rules: Vec<Rule>,
    chaos: Option<Chaos>,
    rng: Rng,
    /// Requests take up to so many microseconds.
    latency: u64,
    /// What lands late, by number.
    late: BTreeMap<u64, Seen>,
}

impl Inner {
    fn land(&mut self, seen: &Seen) {
        self.chroma.handle(&seen.method, &seen.path, &seen.body, false);
    }
}

#[derive(Clone)]
pub struct FakeNode {
    inner: Arc<Mutex<Inner>>,
    down: Arc<watch::Sender<bool>>,
    /// Counts processes: a connection ends with the one that accepted it.
    process: Arc<watch::Sender<u64>>,
}

impl FakeNode {
    pub fn new(seed: u64) -> Self {
        Self {
            inner: Arc::new(Mutex::new(Inner {
                chroma: Chroma::new(seed),
                seen: vec![],
                rules: vec![],
                chaos: None,
                rng: Rng::new(seed ^ 0x5eed),
                latency: 2000,
                late: BTreeMap::new(),
            })),
            down: Arc::new(watch::Sender::new(false)),
            process: Arc::new(watch::Sender::new(0)),
        }
    }

    /// Takes effect on the next `times` requests whose "METHOD path body" has `pattern` in it; never on our own tenant.
    pub fn fault(&self, pattern: &str, times: usize, fault: Fault) {
        self.inner.lock().rules.push(Rule {
            pattern: pattern.to_owned(),
            times,
            fault,
        });
    }

    /// Asked about each request that no rule is about.
    pub fn chaos(&self, chaos: impl FnMut(&Seen) -> Fault + Send + 'static) {
        self.inner.lock().chaos = Some(Box::new(chaos));
    }

    /// Requests take up to so many microseconds.
    pub fn set_latency(&self, latency: u64) {
        self.inner.lock().latency = latency;
    }

    pub fn heal(&self) {
        let mut inner = self.inner.lock();
        inner.rules.clear();
        inner.chaos = None;
    }

    /// Refuses connections and breaks those that are open.
    pub fn set_down(&self, down: bool) {
        if down {
            self.process.send_modify(|process| *process += 1);
        }
        self.down.send_replace(down);
    }

    /// Another process takes its place, before anybody could fail to connect.
    pub fn restart(&self) {
        self.set_down(true);
        self.set_down(false);
    }

    /// Everything that the node has stored is gone.
    pub fn wipe(&self) {
        let mut inner = self.inner.lock();
        let seed = inner.rng.next();
        inner.chroma = Chroma::new(seed);
    }

    /// The id of our own database.
    pub fn marker(&self) -> Option<String> {
        let path = format!("/api/v2/tenants/{OWN_TENANT}/databases/marker");
        let (_, body) = self.inner.lock().chroma.handle(&Method::GET, &path, b"", false);
        let body: Value = serde_json::from_str(&body).unwrap_or_default();
        body["id"].as_str().map(str::to_owned)
    }

    /// Requests that reached the node, our own too.
    pub fn requests(&self) -> usize {
        self.inner.lock().seen.len()
    }

    /// A copy of its folder.
    pub fn snapshot(&self) -> Chroma {
        self.inner.lock().chroma.clone()
    }

    /// Puts a copy of a folder in its place.
    pub fn restore(&self, folder: Chroma) {
        self.inner.lock().chroma = folder;
    }

    pub fn is_down(&self) -> bool {
        *self.down.borrow()
    }

    pub fn state(&self) -> State {
        self.inner.lock().chroma.state()
    }

    pub fn with<T>(&self, change: impl FnOnce(&mut Chroma) -> T) -> T {
        change(&mut self.inner.lock().chroma)
    }

    pub fn forget_requests(&self) {
        self.inner.lock().seen.clear();
    }

    /// Requests of clients to paths that end so.
    pub fn saw(&self, end: &str) -> usize {
        let inner = self.inner.lock();
        let seen = inner.seen.iter().filter(|seen| !seen.is_our_own());
        seen.filter(|seen| seen.path.ends_with(end)).count()
    }

    /// The record writes of clients that reached the node: operation and body.
    pub fn record_writes(&self) -> Vec<(&'static str, Value)> {
        let inner = self.inner.lock();
        let writes = inner.seen.iter().filter_map(Seen::record_write);
        writes.map(|(write, body)| (write.label(), body)).collect()
    }

    /// What clients' record writes and canaries reached the node: the first document or id of each, or `canary`.
    pub fn trace(&self) -> Vec<String> {
        let inner = self.inner.lock();
        let mut trace = vec![];
        for seen in &inner.seen {
            if seen.is_canary() {
                trace.push("canary".to_owned());
            } else if let Some((_, body)) = seen.record_write() {
                let value = if body["documents"].is_array() {
                    &body["documents"]
                } else {
                    &body["ids"]
                };
                let values: Vec<&str> = value
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(Value::as_str)
                    .collect();
                trace.push(values.join("+"));
            }
        }
        trace
    }

    /// Requests of clients that can change something and reached the node: method and path.
    pub fn mutations(&self) -> Vec<String> {
        let inner = self.inner.lock();
        let mutating = inner.seen.iter().filter(|seen| {
            let read = matches!(seen.route(), Route::RecordRead { .. });
            !read && seen.method != Method::GET && !seen.is_our_own()
        });
        mutating.map(|seen| format!("{} {}", seen.method, seen.path)).collect()
    }

    fn take_fault(&self, seen: &Seen) -> Fault {
        let mut inner = self.inner.lock();
        if seen.is_our_own() {
            if seen.is_canary() {
                let late = std::mem::take(&mut inner.late);
                late.values().for_each(|seen| inner.land(seen));
            }
            return Fault::None;
        }
        let text = seen.text();
        let rule = inner
            .rules
            .iter_mut()
            .find(|rule| rule.times > 0 && text.contains(&rule.pattern));
        if let Some(rule) = rule {
            rule.times -= 1;
            return rule.fault.clone();
        }
        inner.chaos.as_mut().map_or(Fault::None, |chaos| chaos(seen))
    }

    fn handle(&self, seen: &Seen, hide: bool) -> Reply {
        self.inner
            .lock()
            .chroma
            .handle(&seen.method, &seen.path, &seen.body, hide)
    }

    async fn carry_out(&self, seen: &Seen, fault: Fault) -> Result<Reply, SendError> {
        match fault {
            Fault::None => Ok(self.handle(seen, false)),
            Fault::NotSent => Err(SendError::NotSent("connection refused".to_owned())),
            Fault::ClosedBefore => Err(closed()),
            Fault::ClosedAfter => {
                self.handle(seen, false);
                Err(closed())
            }
            Fault::Held(gate) => match gate.wait().await {
                Fault::Held(_) | Fault::AnswerHeld(_) | Fault::NotSent => unreachable!("a gate behind a gate"),
                fault => Box::pin(self.carry_out(seen, fault)).await,
            },
            Fault::Slow(time, then) => {
                tokio::time::sleep(time).await;
                Box::pin(self.carry_out(seen, *then)).await
            }
            Fault::LandsLate(after) => {
                let number = {
                    let mut inner = self.inner.lock();
                    let number = inner.rng.next();
                    inner.late.insert(number, seen.clone());
                    number
                };
                let inner = self.inner.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(after).await;
                    let mut inner = inner.lock();
                    if let Some(seen) = inner.late.remove(&number) {
                        inner.land(&seen);
                    }
                });
                Err(closed())
            }
            Fault::AnswerHeld(gate) => {
                let reply = self.handle(seen, false);
                match gate.wait().await {
                    Fault::None => Ok(reply),
                    Fault::Answer(status, body) => Ok((status, body.to_owned())),
                    _ => Err(closed()),
                }
            }
            Fault::Answer(status, body) => Ok((status, body.to_owned())),
            Fault::AppliedBut(status, body) => {
                self.handle(seen, false);
                Ok((status, body.to_owned()))
            }
            Fault::Hidden => Ok(self.handle(seen, true)),
        }
    }
}

fn closed() -> SendError {
    SendError::Broken("connection closed before message completed".to_owned())
}

/// A connection to one process.
struct FakeHeld {
    node: FakeNode,
    process: u64,
}

#[async_trait]
impl Held for FakeHeld {
    async fn send(&self, request: NodeRequest) -> Result<NodeResponse, SendError> {
        tokio::select! {
            biased;
            () = self.until_ended() => Err(closed()),
            answer = self.node.send(request) => answer,
        }
    }

    fn until_ended(&self) -> BoxFuture<()> {
        let (mut process, mine) = (self.node.process.subscribe(), self.process);
        Box::pin(async move {
            let _ = process.wait_for(|process| *process != mine).await.is_ok();
        })
    }
}

#[async_trait]
impl NodeClient for FakeNode {
    async fn hold(&self) -> Result<Arc<dyn Held>, SendError> {
        if self.is_down() {
            return Err(SendError::NotSent("connection refused".to_owned()));
        }
        Ok(Arc::new(FakeHeld {
            node: self.clone(),
            process: *self.process.borrow(),
        }))
    }

    async fn open(&self, request: NodeRequest) -> Result<StreamedResponse, SendError> {
        if self.is_down() {
            return Err(SendError::NotSent("connection refused".to_owned()));
        }
        let seen = Seen {
            method: request.method,
            path: request.path,
            body: request.body.unwrap_or_default(),
        };
        let fault = self.take_fault(&seen);
        if matches!(fault, Fault::NotSent) {
            return Err(SendError::NotSent("connection refused".to_owned()));
        }
        let latency = {
            let mut inner = self.inner.lock();
            inner.seen.push(seen.clone());
            let most = inner.latency;
            inner.rng.below(most)
        };
        let mut process = self.process.subscribe();
        let mine = *process.borrow();
        let answer = async {
            tokio::time::sleep(Duration::from_micros(latency)).await;
            self.carry_out(&seen, fault).await
        };
        let (status, body) = tokio::select! {
            biased;
            _ = process.wait_for(|process| *process != mine) => return Err(closed()),
            answer = answer => answer?,
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
