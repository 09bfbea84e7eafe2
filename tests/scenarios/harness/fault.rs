//! A programmable hop between Diptych and a real node: it holds, answers, drops or delays chosen requests, and keeps a
//! record of all of them.
//!
//! A request that is held or slow is forwarded in the end even if Diptych has given it up: that is what a network and
//! a slow server do.

use std::io;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::eventually;
use super::fault_http::{Message, read_body, read_head, read_response};
use super::process::free_port;

/// A request that arrived.
#[derive(Clone)]
pub struct Seen {
    pub method: String,
    pub path: String,
    pub body: Vec<u8>,
}

impl Seen {
    /// A write of records: add, upsert, update or delete by POST.
    pub fn is_record_write(&self) -> bool {
        self.method == "POST" && ["add", "upsert", "update", "delete"].iter().any(|op| self.is_op(op))
    }

    /// An operation `../collections/{id}/<op>`.
    pub fn is_op(&self, op: &str) -> bool {
        self.path.split('?').next().unwrap_or("").ends_with(&format!("/{op}")) && self.path.contains("/collections/")
    }

    /// What a node says that carried it out.
    fn success(&self) -> (u16, String) {
        let status = if self.is_op("add") { 201 } else { 200 };
        let deleted = self.json()["ids"].as_array().map_or(0, Vec::len);
        let body = match self.is_op("delete") && self.method == "POST" {
            true => format!("{{\"deleted\":{deleted}}}"),
            false => "{}".to_owned(),
        };
        (status, body)
    }

    /// The collection's path.
    fn collection(&self) -> &str {
        self.path.rsplit_once('/').map_or("", |(collection, _)| collection)
    }

    /// Whether this belongs to Diptych's own tenant (markers, canaries).
    pub fn is_own(&self) -> bool {
        self.path.contains(super::compare::OWN_TENANT)
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }
}

impl std::fmt::Debug for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text: String = String::from_utf8_lossy(&self.body).chars().take(500).collect();
        write!(f, "{} {} {text}", self.method, self.path)
    }
}

#[derive(Clone, Debug)]
enum Fault {
    /// Wait before the node gets the request.
    HoldRequest(watch::Receiver<bool>),
    /// Let the node answer, wait before passing the answer on.
    HoldAnswer(watch::Receiver<bool>),
    /// Answer without asking the node.
    Answer(u16, String),
    /// The node carries it out; the connection is closed without an answer.
    ApplyThenClose,
    /// The node carries it out; this is answered all the same.
    ApplyBut(u16, String),
    /// Close the connection; the node never sees the request.
    CloseUnsent,
    /// The node answers after this time.
    Delay(Duration),
    /// Answer as if the node had done it; it never sees the request.
    Pretend,
    /// Answer as if the node had done it; it gets the request after the next write to the same collection.
    Postpone,
}

type Matcher = Arc<dyn Fn(&Seen) -> bool + Send + Sync>;

struct Rule {
    id: u64,
    matches: Matcher,
    left: usize,
    /// Every so many of the matching requests, the last of them.
    every: usize,
    /// How many matched since.
    matched: usize,
    fault: Fault,
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    rule_serial: u64,
    seen: Vec<Seen>,
    held: Vec<(u64, Seen)>,
    /// Requests that the node gets after the next write to the same collection.
    postponed: Vec<(Seen, Message)>,
}

struct Shared {
    upstream: AtomicU16,
    state: Mutex<State>,
    /// While true, nothing is read, forwarded or answered; connections stay open and new ones are accepted.
    black_hole: watch::Sender<bool>,
}

/// A forwarder to one node. Runs until it is dropped.
pub struct FaultNode {
    pub port: u16,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

/// A rule that holds messages; releases them all when it is released or dropped.
pub struct Gate {
    id: u64,
    open: watch::Sender<bool>,
    shared: Arc<Shared>,
}

impl FaultNode {
    pub async fn start(upstream: u16) -> FaultNode {
        let port = free_port();
        let listener = TcpListener::bind(("127.0.0.1", port)).await.expect("a free port");
        let state = Mutex::new(State::default());
        let shared = Arc::new(Shared {
            upstream: AtomicU16::new(upstream),
            state,
            black_hole: watch::channel(false).0,
        });
        let serving = shared.clone();
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let serving = serving.clone();
                tokio::spawn(async move {
                    // A reset connection is what many of these tests are about.
                    let _ = serving.connection(stream).await;
                });
            }
        });
        FaultNode {
            port,
            shared,
            accepting,
        }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn rule(&self, times: usize, fault: Fault, matches: impl Fn(&Seen) -> bool + Send + Sync + 'static) -> u64 {
        self.rule_for_every(1, times, fault, matches)
    }

    fn rule_for_every(
        &self,
        every: usize,
        times: usize,
        fault: Fault,
        matches: impl Fn(&Seen) -> bool + Send + Sync + 'static,
    ) -> u64 {
        let mut state = self.shared.state();
        state.rule_serial += 1;
        let id = state.rule_serial;
        state.rules.push(Rule {
            id,
            matches: Arc::new(matches),
            left: times,
            every,
            matched: 0,
            fault,
        });
        id
    }

    /// Holds matching requests before the node sees them.
    pub fn hold_requests(&self, matches: impl Fn(&Seen) -> bool + Send + Sync + 'static) -> Gate {
        let (open, wait) = watch::channel(false);
        Gate {
            id: self.rule(usize::MAX, Fault::HoldRequest(wait), matches),
            open,
            shared: self.shared.clone(),
        }
    }

    /// Lets the node carry out matching requests, and holds its answers.
    pub fn hold_answers(&self, matches: impl Fn(&Seen) -> bool + Send + Sync + 'static) -> Gate {
        let (open, wait) = watch::channel(false);
        Gate {
            id: self.rule(usize::MAX, Fault::HoldAnswer(wait), matches),
            open,
            shared: self.shared.clone(),
        }
    }

    /// Answers the next `times` matching requests itself.
    pub fn answer(
        &self,
        times: usize,
        status: u16,
        body: &str,
        matches: impl Fn(&Seen) -> bool + Send + Sync + 'static,
    ) {
        self.rule(times, Fault::Answer(status, body.to_owned()), matches);
    }

    pub fn apply_then_close(&self, times: usize, matches: impl Fn(&Seen) -> bool + Send + Sync + 'static) {
        self.rule(times, Fault::ApplyThenClose, matches);
    }

    /// Lets the node carry out the next `times` matching requests, and answers this.
    pub fn apply_but(
        &self,
        times: usize,
        status: u16,
        body: &str,
        matches: impl Fn(&Seen) -> bool + Send + Sync + 'static,
    ) {
        self.rule(times, Fault::ApplyBut(status, body.to_owned()), matches);
    }

    pub fn close_unsent(&self, times: usize, matches: impl Fn(&Seen) -> bool + Send + Sync + 'static) {
        self.rule(times, Fault::CloseUnsent, matches);
    }

    pub fn delay(&self, times: usize, time: Duration, matches: impl Fn(&Seen) -> bool + Send + Sync + 'static) {
        self.rule(times, Fault::Delay(time), matches);
    }

    /// Answers one in `every` matching writes as if the node had done it, and drops it.
    pub fn lose(&self, every: usize, matches: impl Fn(&Seen) -> bool + Send + Sync + 'static) {
        self.rule_for_every(every, usize::MAX, Fault::Pretend, matches);
    }

    /// Swaps one in `every` matching writes with the next to the same collection; both are answered at once.
    pub fn swap(&self, every: usize, matches: impl Fn(&Seen) -> bool + Send + Sync + 'static) {
        self.rule_for_every(every, usize::MAX, Fault::Postpone, matches);
    }

    /// Leads to another node from now on.
    pub fn redirect(&self, upstream: u16) {
        self.shared.upstream.store(upstream, Ordering::SeqCst);
    }

    /// Removes all rules; what is held stays held until its gate is released.
    pub fn clear(&self) {
        self.shared.state().rules.clear();
    }

    pub fn black_hole(&self, on: bool) {
        self.shared.black_hole.send_replace(on);
    }

    /// The matching requests so far, in order of arrival.
    pub fn seen(&self, matches: impl Fn(&Seen) -> bool) -> Vec<Seen> {
        self.shared
            .state()
            .seen
            .iter()
            .filter(|seen| matches(seen))
            .cloned()
            .collect()
    }

    /// Forgets the requests so far.
    pub fn forget(&self) {
        self.shared.state().seen.clear();
    }
}

impl Drop for FaultNode {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Gate {
    /// The requests that wait here now.
    pub fn held(&self) -> Vec<Seen> {
        self.shared
            .state()
            .held
            .iter()
            .filter(|(id, _)| *id == self.id)
            .map(|(_, seen)| seen.clone())
            .collect()
    }

    /// Waits until at least `count` requests wait here.
    pub async fn wait_held(&self, count: usize) {
        eventually(Duration::from_secs(30), "requests are held", || async {
            let held = self.held().len();
            if held >= count {
                Ok(())
            } else {
                Err(format!("{held} of {count}"))
            }
        })
        .await;
    }

    /// Lets everything pass and removes the rule.
    pub fn release(self) {}
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.shared.state().rules.retain(|rule| rule.id != self.id);
        self.open.send_replace(true);
    }
}

impl Shared {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Records the request and picks the first rule that matches.
    fn arrive(&self, seen: &Seen) -> Option<(u64, Fault)> {
        let mut state = self.state();
        state.seen.push(seen.clone());
        let rule = state
            .rules
            .iter_mut()
            .find(|rule| rule.left > 0 && (rule.matches)(seen))?;
        rule.matched += 1;
        if rule.matched < rule.every {
            return None;
        }
        rule.matched = 0;
        rule.left -= 1;
        Some((rule.id, rule.fault.clone()))
    }

    async fn hold(&self, id: u64, seen: &Seen, mut gate: watch::Receiver<bool>) {
        self.state().held.push((id, seen.clone()));
        let _ = gate.wait_for(|open| *open).await;
        let mut state = self.state();
        if let Some(at) = state.held.iter().position(|(rule, _)| *rule == id) {
            state.held.remove(at);
        }
    }

    async fn light(&self) {
        let _ = self.black_hole.subscribe().wait_for(|on| !*on).await;
    }

    /// Serves one connection from Diptych, one request after the other.
    async fn connection(&self, stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let (from, mut to) = stream.into_split();
        let mut from = BufReader::new(from);
        while let Some(mut request) = read_head(&mut from).await? {
            if request.has_token("expect", "100-continue") {
                to.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
            }
            read_body(&mut from, &mut request, false).await?;
            self.light().await;
            let mut words = request.first_line.split(' ').map(str::to_owned);
            let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let seen = Seen {
                method,
                path,
                body: request.body.clone(),
            };
            let Some(answer) = self.serve(&seen, &request).await? else {
                return Ok(());
            };
            self.light().await;
            to.write_all(&answer.raw).await?;
            if answer.has_token("connection", "close") || request.has_token("connection", "close") {
                return Ok(());
            }
        }
        Ok(())
    }

    /// The answer to one request; `None` closes the connection.
    async fn serve(&self, seen: &Seen, request: &Message) -> io::Result<Option<Message>> {
        match self.arrive(seen) {
            None => {
                let answer = self.forward(seen, request).await?;
                self.forward_postponed(seen).await?;
                Ok(Some(answer))
            }
            Some((id, Fault::HoldRequest(gate))) => {
                self.hold(id, seen, gate).await;
                self.forward(seen, request).await.map(Some)
            }
            Some((id, Fault::HoldAnswer(gate))) => {
                let answer = self.forward(seen, request).await;
                self.hold(id, seen, gate).await;
                answer.map(Some)
            }
            Some((_, Fault::Answer(status, body))) => Ok(Some(canned(&(status, body)))),
            Some((_, Fault::ApplyThenClose)) => self.forward(seen, request).await.map(|_| None),
            Some((_, Fault::ApplyBut(status, body))) => {
                self.forward(seen, request).await?;
                Ok(Some(canned(&(status, body))))
            }
            Some((_, Fault::CloseUnsent)) => Ok(None),
            Some((_, Fault::Pretend)) => Ok(Some(canned(&seen.success()))),
            Some((_, Fault::Postpone)) => {
                self.state().postponed.push((seen.clone(), request.clone()));
                Ok(Some(canned(&seen.success())))
            }
            Some((_, Fault::Delay(time))) => {
                let answer = self.forward(seen, request).await;
                tokio::time::sleep(time).await;
                answer.map(Some)
            }
        }
    }

    /// What was to come after this write.
    async fn forward_postponed(&self, after: &Seen) -> io::Result<()> {
        if !after.is_record_write() {
            return Ok(());
        }
        let due = |(seen, _): &mut (Seen, Message)| seen.collection() == after.collection();
        let due: Vec<_> = self.state().postponed.extract_if(.., due).collect();
        for (seen, request) in due {
            self.forward(&seen, &request).await?;
        }
        Ok(())
    }

    /// Sends the request over a connection of its own and reads the whole answer.
    async fn forward(&self, seen: &Seen, request: &Message) -> io::Result<Message> {
        let mut node = BufReader::new(TcpStream::connect(("127.0.0.1", self.upstream.load(Ordering::SeqCst))).await?);
        node.get_ref().set_nodelay(true)?;
        node.write_all(&request.raw).await?;
        read_response(&mut node, &seen.method).await
    }
}

fn canned((status, body): &(u16, String)) -> Message {
    let head = format!(
        "HTTP/1.1 {status} Canned\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    Message {
        raw: [head.as_bytes(), body.as_bytes()].concat(),
        ..Message::default()
    }
}
