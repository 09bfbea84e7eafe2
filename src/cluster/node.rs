//! One Chroma server as the proxy sees it.
//!
//! A node is *up* when its probes pass, no connection to it failed since, and a canary write has returned after the
//! last time it was not up (design.md 4.7: nothing else is sent to a node before that). It is *verified* while the one
//! connection that is held lives over which it was asked who it is (design.md 9). It is up or down as a whole; whether
//! it may serve one collection is a matter of that collection's state.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use tokio::sync::watch;
use uuid::Uuid;

use super::client::{Held, NodeClient};
use super::gate::{Gate, Gated};
use crate::journal::MaintenanceRecord;
use crate::metrics::NodeMetrics;

/// Position of a node in the configuration: 0 is the primary.
pub type NodeIndex = usize;

/// What is known of a node; `health` draws the conclusions.
#[derive(Debug)]
pub(super) struct Observed {
    /// Pingora's verdict, thresholds applied; like Pingora's it starts out true.
    pub healthy: bool,
    /// Probes passed since a request last failed to connect.
    pub passed_since_failure: usize,
    pub failed_passively: bool,
    /// A canary write returned since the node was last not healthy.
    pub canary_passed: bool,
    /// It said who it is, was admitted, and is still the same process.
    pub verified: bool,
    /// Probes in a row that found another marker than is remembered.
    pub strange_markers: usize,
    /// Why it was not admitted.
    pub refusal: Option<String>,
    pub canary_running: bool,
    /// Failures seen so far, and how many there were when the running canary was sent.
    pub failures: u64,
    pub failures_at_canary: u64,
    /// It is known since the start whether this node is healthy.
    pub settled: bool,
    pub last_error: Option<String>,
}

impl Observed {
    pub fn is_healthy(&self) -> bool {
        self.healthy && !self.failed_passively && self.canary_passed && self.verified
    }
}

impl Default for Observed {
    fn default() -> Self {
        Self {
            healthy: true,
            passed_since_failure: 0,
            failed_passively: false,
            canary_passed: false,
            verified: false,
            strange_markers: 0,
            refusal: None,
            canary_running: false,
            failures: 0,
            failures_at_canary: 0,
            settled: false,
            last_error: None,
        }
    }
}

/// A Chroma server.
pub struct Node {
    pub index: NodeIndex,
    pub name: String,
    /// `host:port` as configured.
    pub authority: String,
    pub read_weight: u32,
    pub client: Arc<dyn NodeClient>,
    pub metrics: NodeMetrics,
    pub(super) observed: Mutex<Observed>,
    pub(super) canary_collection: Mutex<Option<Uuid>>,
    pub(super) checkpoint_collection: Mutex<Option<Uuid>>,
    /// The connection by which we would notice that it is another process.
    held: Mutex<Option<Arc<dyn Held>>>,
    incarnation: AtomicU64,
    up: Flag,
    /// It answers: what is under way there goes on, also in maintenance.
    alive: Flag,
    gate: Arc<Gate>,
    maintenance: Mutex<Option<MaintenanceRecord>>,
    address: ArcSwapOption<SocketAddr>,
    reads: AtomicUsize,
    ejections: AtomicU64,
    stragglers: AtomicU64,
    surveyed: AtomicBool,
    /// What the journal remembers of it.
    remembered: Mutex<Option<(String, i64)>>,
    sockets: Mutex<Vec<Socket>>,
    next_ticket: AtomicU64,
}

/// The socket of a read that is under way, so that a health flip can end it. It is not ours, and may be closed and its
/// number given to another one at any time: the address tells.
struct Socket {
    ticket: u64,
    fd: RawFd,
    local: SocketAddr,
}

/// For [`Node::forget_socket`].
#[derive(Debug)]
pub struct Ticket(u64);

/// A fact that every read asks for, and that can be waited for.
#[derive(Debug)]
struct Flag {
    now: AtomicBool,
    changes: watch::Sender<bool>,
}

impl Default for Flag {
    fn default() -> Self {
        Self {
            now: AtomicBool::new(false),
            changes: watch::Sender::new(false),
        }
    }
}

impl Flag {
    fn get(&self) -> bool {
        self.now.load(Ordering::SeqCst)
    }

    /// Returns whether that changed anything. Who waits for it finds it set.
    fn set(&self, value: bool) -> bool {
        self.changes.send_if_modified(|current| {
            self.now.store(value, Ordering::SeqCst);
            std::mem::replace(current, value) != value
        })
    }
}

impl Socket {
    /// Ends the connection, if it is still the one that was meant.
    fn shut_down(&self) {
        // SAFETY: a number that is no descriptor of ours any more is an error or another file, and that is looked at.
        let copy = unsafe { libc::fcntl(self.fd, libc::F_DUPFD_CLOEXEC, 0) };
        if copy < 0 {
            return;
        }
        // SAFETY: it was just made, and nobody else knows it. From here on it stays what it is.
        let stream = TcpStream::from(unsafe { OwnedFd::from_raw_fd(copy) });
        if stream.local_addr().is_ok_and(|local| local == self.local) && stream.peer_addr().is_ok() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Node {
    pub fn new(
        index: NodeIndex,
        name: impl Into<String>,
        authority: impl Into<String>,
        read_weight: u32,
        client: Arc<dyn NodeClient>,
    ) -> Self {
        let name = name.into();
        let gate = Arc::new(Gate::default());
        let client = Arc::new(Gated {
            client,
            gate: gate.clone(),
        });
        Self {
            index,
            metrics: NodeMetrics::new(&name),
            name,
            authority: authority.into(),
            read_weight,
            client,
            observed: Mutex::default(),
            canary_collection: Mutex::default(),
            checkpoint_collection: Mutex::default(),
            held: Mutex::default(),
            incarnation: AtomicU64::new(0),
            up: Flag::default(),
            alive: Flag::default(),
            gate,
            maintenance: Mutex::default(),
            address: ArcSwapOption::empty(),
            reads: AtomicUsize::new(0),
            ejections: AtomicU64::new(0),
            stragglers: AtomicU64::new(0),
            surveyed: AtomicBool::new(false),
            remembered: Mutex::default(),
            sockets: Mutex::default(),
            next_ticket: AtomicU64::new(0),
        }
    }

    pub fn is_up(&self) -> bool {
        self.up.get()
    }

    /// Whether its probes pass; a node whose probes fail can still be up when no other is.
    pub fn is_healthy(&self) -> bool {
        self.observed.lock().is_healthy()
    }

    /// Changes when the node goes up or down.
    pub fn watch_up(&self) -> watch::Receiver<bool> {
        self.up.changes.subscribe()
    }

    /// Ends when the node is down: what waits for it there waits in vain. Maintenance alone does not cut it.
    pub async fn until_down(&self) {
        let mut alive = self.alive.changes.subscribe();
        // The sender lives as long as the node.
        let _ = alive.wait_for(|alive| !alive).await.is_ok();
    }

    /// An operator took it out.
    pub fn maintenance(&self) -> Option<MaintenanceRecord> {
        self.maintenance.lock().clone()
    }

    pub fn is_in_maintenance(&self) -> bool {
        self.maintenance.lock().is_some()
    }

    /// Whether nothing may be sent. Whoever has counted itself as under way before it asks is waited for by those who
    /// take the node out.
    pub fn is_closed(&self) -> bool {
        self.gate.is_closed()
    }

    /// Takes it out or back. The cluster draws the conclusions.
    pub(super) fn set_maintenance(&self, record: Option<MaintenanceRecord>) {
        self.gate.close(record.is_some());
        *self.maintenance.lock() = record;
    }

    /// Requests that are under way there, reads included.
    pub fn in_flight(&self) -> usize {
        self.gate.inside() + self.reads_in_flight()
    }

    /// Counts as under way until it is dropped; `None`: nothing may be sent. For what goes over the connection that is
    /// held.
    pub fn begin(&self) -> Option<impl Send + use<>> {
        self.gate.enter()
    }

    /// How often it went from up to down.
    pub fn ejections(&self) -> u64 {
        self.ejections.load(Ordering::Relaxed)
    }

    /// What it holds was looked at since the start: lists may rest on it.
    pub fn is_surveyed(&self) -> bool {
        self.surveyed.load(Ordering::SeqCst)
    }

    pub fn set_surveyed(&self) {
        self.surveyed.store(true, Ordering::SeqCst);
    }

    /// The id of our own database on it, as the journal remembers it.
    pub fn marker(&self) -> Option<String> {
        self.remembered.lock().as_ref().map(|(marker, _)| marker.clone())
    }

    /// The position up to which it had everything, as the journal remembers it.
    pub fn checkpoint(&self) -> Option<i64> {
        self.remembered.lock().as_ref().map(|(_, checkpoint)| *checkpoint)
    }

    pub fn remember(&self, marker: &str, checkpoint: i64) {
        *self.remembered.lock() = Some((marker.to_owned(), checkpoint));
    }

    /// Requests that it has not answered though their clients were; the sum over its lanes.
    pub fn stragglers(&self) -> u64 {
        self.stragglers.load(Ordering::SeqCst)
    }

    pub fn straggler_started(&self) {
        self.stragglers.fetch_add(1, Ordering::SeqCst);
    }

    pub fn straggler_ended(&self) {
        self.stragglers.fetch_sub(1, Ordering::SeqCst);
    }

    /// The connection that is held to it, if there is one.
    pub fn held(&self) -> Option<Arc<dyn Held>> {
        self.held.lock().clone()
    }

    pub(super) fn set_held(&self, held: Option<Arc<dyn Held>>) {
        *self.held.lock() = held;
    }

    /// It may be another process: connections that are open are used no more.
    pub(super) fn renew(&self) {
        self.incarnation.fetch_add(1, Ordering::SeqCst);
        self.client.renew();
    }

    /// Connections that were opened under another number may lead to another process.
    pub fn incarnation(&self) -> u64 {
        self.incarnation.load(Ordering::SeqCst)
    }

    /// Whether it is the process that was admitted.
    pub fn is_verified(&self) -> bool {
        self.observed.lock().verified
    }

    /// Why the last probe or connection failed, or why the node was not admitted.
    pub fn last_error(&self) -> Option<String> {
        let observed = self.observed.lock();
        observed.last_error.clone().or_else(|| observed.refusal.clone())
    }

    /// The address that reads connect to, once the name was resolved.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address.load().as_deref().copied()
    }

    /// Returns whether it had another one before.
    pub fn set_address(&self, address: SocketAddr) -> bool {
        let before = self.address.swap(Some(Arc::new(address)));
        before.is_some_and(|before| *before != address)
    }

    pub fn reads_in_flight(&self) -> usize {
        self.reads.load(Ordering::SeqCst)
    }

    pub fn read_started(&self) {
        self.reads.fetch_add(1, Ordering::SeqCst);
    }

    pub fn read_ended(&self) {
        self.reads.fetch_sub(1, Ordering::SeqCst);
    }

    /// Sets the outcome of all that is observed; returns whether it changed.
    pub(super) fn set_up(&self, up: bool, alive: bool) -> bool {
        // Whoever finds it up must not find it dead: what is sent to it would be cut at once.
        if alive {
            self.alive.set(true);
        }
        let changed = self.up.set(up);
        let died = !alive && self.alive.set(false);
        if changed && !up && !alive {
            self.ejections.fetch_add(1, Ordering::Relaxed);
        }
        if died {
            self.cut_reads();
        }
        changed
    }

    /// Remembers the socket of a read until [`Node::forget_socket`]; a health flip shuts it down, so that the read is
    /// retried on another node instead of waiting for its timeout. `local` is our end of its connection.
    pub fn remember_socket(&self, fd: RawFd, local: SocketAddr) -> Ticket {
        let ticket = self.next_ticket.fetch_add(1, Ordering::Relaxed);
        self.sockets.lock().push(Socket { ticket, fd, local });
        if !self.alive.get() {
            self.cut_reads();
        }
        Ticket(ticket)
    }

    pub fn forget_socket(&self, ticket: &Ticket) {
        let mut sockets = self.sockets.lock();
        if let Some(position) = sockets.iter().position(|socket| socket.ticket == ticket.0) {
            sockets.swap_remove(position);
        }
    }

    fn cut_reads(&self) {
        for socket in self.sockets.lock().drain(..) {
            socket.shut_down();
        }
    }
}
