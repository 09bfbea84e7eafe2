//! What lies between the proxy and a node: a network that can lose and delay packets.
//!
//! As root, where the kernel lets us: a network namespace for the node, joined to ours by a pair of virtual devices whose
//! queues drop or slow down real packets. It lives as long as a process that does nothing else, so that nothing is left
//! when the tests die. Elsewhere: a forwarder of bytes that holds them back, which is what TCP makes of lost packets.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering::SeqCst};
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::harness::chroma::ChromaNode;
use crate::harness::process::{Process, free_port};

/// What a network does to packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    Fine,
    /// Nothing arrives, in neither direction.
    Lost,
    /// Requests arrive, answers do not.
    AnswersLost,
    /// Some packets are lost, all are late.
    Slow,
}

pub enum Network {
    Namespace(Namespace),
    Wire(Wire),
}

impl Network {
    /// The network, and the node behind it.
    pub async fn with_node(dir: &Path, name: &str) -> (Network, ChromaNode) {
        if wanted() {
            match tokio::task::block_in_place(|| Namespace::new(dir)) {
                Ok(namespace) => {
                    let node = ChromaNode::start_at(dir, name, &namespace.address, namespace.enter()).await;
                    return (Network::Namespace(namespace), node);
                }
                Err(e) => println!("chaos: no network namespace: {e}"),
            }
        }
        let node = ChromaNode::start(dir, name).await;
        (Network::Wire(Wire::start(node.port).await), node)
    }

    pub fn describe(&self) -> &'static str {
        match self {
            Network::Namespace(_) => "namespace",
            Network::Wire(_) => "forwarder",
        }
    }

    /// Where the proxy finds the node.
    pub fn url(&self, node: &ChromaNode) -> String {
        match self {
            Network::Namespace(_) => node.url(),
            Network::Wire(wire) => format!("http://127.0.0.1:{}", wire.port),
        }
    }

    pub fn set(&self, weather: Weather) {
        match self {
            Network::Namespace(namespace) => tokio::task::block_in_place(|| namespace.set(weather)),
            Network::Wire(wire) => {
                wire.weather.send_replace(weather);
            }
        }
    }
}

/// `CHAOS_NETWORK=forwarder` does without namespaces.
fn wanted() -> bool {
    // SAFETY: geteuid has no preconditions.
    let root = unsafe { libc::geteuid() } == 0;
    root && std::env::var("CHAOS_NETWORK").as_deref() != Ok("forwarder")
}

/// A network namespace and the way there.
pub struct Namespace {
    holder: Process,
    here: String,
    there: String,
    /// The node's.
    address: String,
}

impl Namespace {
    fn new(dir: &Path) -> Result<Namespace, String> {
        static SERIAL: AtomicU16 = AtomicU16::new(0);
        let serial = SERIAL.fetch_add(1, SeqCst) % 60;
        let pid = std::process::id();
        let mut command = Command::new("unshare");
        command.args(["--net", "sleep", "infinity"]);
        let holder = Process::spawn(command, &dir.join("namespace.log"), libc::SIGKILL).map_err(|e| e.to_string())?;
        // Addresses for tests of networks (RFC 2544): nobody's, and not routed.
        let address = |last: u16| format!("198.18.{}.{}", pid % 250, serial * 4 + last);
        let mut namespace = Namespace {
            holder,
            here: format!("dc{}x{serial}", pid % 1_000_000),
            there: format!("dn{}x{serial}", pid % 1_000_000),
            address: address(2),
        };
        namespace.wait()?;
        let id = namespace.holder.id().to_string();
        let (here, there) = (namespace.here.as_str(), namespace.there.as_str());
        run(&["ip", "link", "add", here, "type", "veth", "peer", "name", there])?;
        run(&["ip", "link", "set", there, "netns", &id])?;
        run(&["ip", "addr", "add", &format!("{}/30", address(1)), "dev", here])?;
        run(&["ip", "link", "set", here, "up"])?;
        namespace.inside(&["ip", "addr", "add", &format!("{}/30", address(2)), "dev", there])?;
        namespace.inside(&["ip", "link", "set", "lo", "up"])?;
        namespace.inside(&["ip", "link", "set", there, "up"])?;
        for weather in [Weather::Lost, Weather::Slow, Weather::Fine] {
            namespace.try_set(weather)?;
        }
        Ok(namespace)
    }

    /// Waits until the holder has left our namespace.
    fn wait(&mut self) -> Result<(), String> {
        let link = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net")).ok();
        let end = Instant::now() + Duration::from_secs(10);
        let id = self.holder.id().to_string();
        while link(&id).is_none() || link(&id) == link("self") {
            if self.holder.exited().is_some() || Instant::now() > end {
                return Err("unshare --net".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn enter(&self) -> Vec<String> {
        vec![
            "nsenter".into(),
            format!("--net=/proc/{}/ns/net", self.holder.id()),
            "--".into(),
        ]
    }

    fn inside(&self, words: &[&str]) -> Result<(), String> {
        let enter = self.enter();
        let all: Vec<&str> = enter.iter().map(String::as_str).chain(words.iter().copied()).collect();
        run(&all)
    }

    fn set(&self, weather: Weather) {
        self.try_set(weather).unwrap_or_else(|e| panic!("{weather:?}: {e}"));
    }

    fn try_set(&self, weather: Weather) -> Result<(), String> {
        // A bucket smaller than any packet passes none; a short queue at a low rate loses some and delays the others.
        const NONE: Option<[&str; 3]> = Some(["8bit", "8b", "8b"]);
        const FEW: Option<[&str; 3]> = Some(["400kbit", "2kb", "3kb"]);
        let (requests, answers) = match weather {
            Weather::Fine => (None, None),
            Weather::Lost => (NONE, NONE),
            Weather::AnswersLost => (None, NONE),
            Weather::Slow => (FEW, FEW),
        };
        self.queue(&self.here, requests, run)?;
        self.queue(&self.there, answers, |words| self.inside(words))
    }

    fn queue(
        &self,
        device: &str,
        limit: Option<[&str; 3]>,
        run: impl Fn(&[&str]) -> Result<(), String>,
    ) -> Result<(), String> {
        match limit {
            // There may be nothing to remove.
            None => {
                let _ = run(&["tc", "qdisc", "del", "dev", device, "root"]);
                Ok(())
            }
            Some([rate, burst, limit]) => run(&[
                "tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate", rate, "burst", burst, "limit", limit,
            ]),
        }
    }
}

fn run(words: &[&str]) -> Result<(), String> {
    let out = Command::new(words[0])
        .args(&words[1..])
        .output()
        .map_err(|e| format!("{}: {e}", words[0]))?;
    match out.status.success() {
        true => Ok(()),
        false => Err(format!(
            "{}: {}",
            words.join(" "),
            String::from_utf8_lossy(&out.stderr).trim()
        )),
    }
}

/// A forwarder of bytes.
pub struct Wire {
    port: u16,
    weather: watch::Sender<Weather>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Wire {
    async fn start(upstream: u16) -> Wire {
        let port = free_port();
        let listener = TcpListener::bind(("127.0.0.1", port)).await.expect("a free port");
        let weather = watch::channel(Weather::Fine).0;
        let watched = weather.subscribe();
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(forward(stream, upstream, watched.clone()));
            }
        });
        Wire {
            port,
            weather,
            accepting,
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn forward(client: TcpStream, upstream: u16, weather: watch::Receiver<Weather>) {
    let mut ready = weather.clone();
    let _ = ready.wait_for(|w| *w != Weather::Lost).await;
    let Ok(node) = TcpStream::connect(("127.0.0.1", upstream)).await else {
        return;
    };
    let _ = (client.set_nodelay(true), node.set_nodelay(true));
    let (client, node) = (Arc::new(client), Arc::new(node));
    let up = pump(client.clone(), node.clone(), weather.clone(), |w| w == Weather::Lost);
    let down = pump(node, client, weather, |w| {
        matches!(w, Weather::Lost | Weather::AnswersLost)
    });
    // When one direction ends the connection does, as far as HTTP is concerned.
    tokio::select! {
        () = up => {}
        () = down => {}
    }
}

async fn pump(
    from: Arc<TcpStream>,
    to: Arc<TcpStream>,
    mut weather: watch::Receiver<Weather>,
    held: fn(Weather) -> bool,
) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let Ok(n @ 1..) = read(&from, &mut buffer).await else {
            let _ = weather.wait_for(|w| !held(*w)).await;
            return;
        };
        if *weather.borrow() == Weather::Slow {
            tokio::time::sleep(Duration::from_millis(80)).await;
        }
        let _ = weather.wait_for(|w| !held(*w)).await;
        if write(&to, &buffer[..n]).await.is_err() {
            return;
        }
    }
}

async fn read(stream: &TcpStream, buffer: &mut [u8]) -> std::io::Result<usize> {
    loop {
        stream.readable().await?;
        match stream.try_read(buffer) {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            other => return other,
        }
    }
}

async fn write(stream: &TcpStream, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
