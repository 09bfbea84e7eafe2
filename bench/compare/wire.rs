//! The load generator: requests written to sockets, answers counted.
//!
//! Bytes of HTTP/1.1 over connections that stay open, on one thread of its own; an answer is read to its end by its
//! `content-length` and otherwise not looked at. That costs a few microseconds a request, where a client library takes
//! ten times as much from the cores that the servers need.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A connection that carries one request at a time.
pub struct Connection {
    address: SocketAddr,
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// The bytes of a request with a JSON body.
pub fn post(path: &str, body: &[u8]) -> Bytes {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut request = head.into_bytes();
    request.extend_from_slice(body);
    request.into()
}

impl Connection {
    pub async fn open(address: SocketAddr) -> io::Result<Connection> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Connection {
            address,
            stream,
            buffer: Vec::with_capacity(64 << 10),
        })
    }

    /// Sends a request and reads its answer to the end; an answer that is no success is an error with its body.
    pub async fn send(&mut self, request: &[u8]) -> io::Result<()> {
        let address = self.address;
        match self.ask(request).await? {
            (200..300, _) => Ok(()),
            (status, body) => {
                let body = String::from_utf8_lossy(body);
                Err(io::Error::other(format!("{status} from {address}: {body}")))
            }
        }
    }

    /// The same, and gives the answer's status and body, whatever they are.
    pub async fn ask(&mut self, request: &[u8]) -> io::Result<(u16, &[u8])> {
        self.stream.write_all(request).await?;
        self.buffer.clear();
        let (status, start, length) = loop {
            self.more().await?;
            if let Some(head) = parse_head(&self.buffer)? {
                break head;
            }
        };
        while self.buffer.len() < start + length {
            self.more().await?;
        }
        Ok((status, &self.buffer[start..start + length]))
    }

    async fn more(&mut self) -> io::Result<()> {
        match self.stream.read_buf(&mut self.buffer).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

/// Status, where the body begins, and how long it is; `None` while the head is not there yet.
fn parse_head(bytes: &[u8]) -> io::Result<Option<(u16, usize, usize)>> {
    let Some(end) = memchr::memmem::find(bytes, b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = &bytes[..end];
    let status = head
        .get(9..12)
        .and_then(|code| std::str::from_utf8(code).ok()?.parse().ok());
    let length = head.split(|byte| *byte == b'\n').find_map(|line| {
        let (name, value) = (line.get(..15)?, line.get(15..)?);
        let length = name.eq_ignore_ascii_case(b"content-length:").then_some(value)?;
        std::str::from_utf8(length).ok()?.trim().parse().ok()
    });
    match (status, length) {
        (Some(status), Some(length)) => Ok(Some((status, end + 4, length))),
        _ => Err(io::Error::other("an answer without a length")),
    }
}

/// Where a client sends its requests to: a server and a collection.
#[derive(Clone)]
pub struct Target {
    pub address: SocketAddr,
    /// The collection's path; the operation follows.
    pub collection: String,
}

impl Target {
    pub fn new(port: u16, collection: &str) -> Target {
        Target {
            address: SocketAddr::from(([127, 0, 0, 1], port)),
            collection: crate::common::path(collection, "").trim_end_matches('/').to_owned(),
        }
    }
}

/// One request of a load.
pub struct Job {
    pub operation: &'static str,
    pub body: Bytes,
    /// How many records it writes; 0: it reads.
    pub records: usize,
}

/// What a client sends next, by its number and the number of the request.
pub type Source = Arc<dyn Fn(usize, u64) -> Job + Send + Sync>;

/// What a load came to.
#[derive(Clone, Default)]
pub struct Sample {
    pub seconds: f64,
    pub records: usize,
    /// Latencies in milliseconds.
    pub reads: Vec<f64>,
    pub writes: Vec<f64>,
    /// When each of the writes was answered.
    pub answered: Vec<Instant>,
}

impl Sample {
    /// Latencies of the writes that were under way at some moment of a time.
    pub fn writes_within(&self, from: Instant, to: Instant) -> Vec<f64> {
        let timed = self.writes.iter().zip(&self.answered);
        let sent = |took: f64, answered: Instant| answered.checked_sub(Duration::from_secs_f64(took / 1000.0));
        timed
            .filter(|(took, answered)| **answered > from && sent(**took, **answered).is_some_and(|sent| sent < to))
            .map(|(took, _)| *took)
            .collect()
    }

    pub fn all(&self) -> Vec<f64> {
        [self.reads.as_slice(), &self.writes].concat()
    }
}

/// One client and what it saw.
struct Client {
    number: usize,
    /// Each request goes to all of them at once.
    targets: Vec<(Target, Connection)>,
    pace: Option<Duration>,
}

/// A load: clients that each send a request when the one before is answered, or at a fixed pace.
pub struct Load {
    pub clients: Vec<Vec<Target>>,
    pub source: Source,
    /// A client begins a request so long after the one before at the earliest.
    pub pace: Option<Duration>,
    /// Requests that come first and do not count.
    pub warmup: Duration,
    pub length: Duration,
    stopped: Arc<AtomicBool>,
}

impl Load {
    pub fn new(clients: Vec<Vec<Target>>, source: Source, seconds: f64) -> Load {
        Load {
            clients,
            source,
            pace: None,
            warmup: Duration::from_millis(300),
            length: Duration::from_secs_f64(seconds),
            stopped: Arc::default(),
        }
    }

    /// Runs on a thread of its own; `begun` is called when the warm-up is over.
    pub async fn run(self, begun: impl FnOnce() + Send + 'static) -> Sample {
        let task = tokio::task::spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(self.drive(begun))
        });
        task.await.expect("the load ends")
    }

    /// The same until it is told to stop, if that comes first: what was answered by then counts.
    pub async fn run_until(self, stop: tokio::sync::oneshot::Receiver<()>) -> Sample {
        let stopped = self.stopped.clone();
        let stopping = async {
            let _ = stop.await;
            stopped.store(true, Ordering::Relaxed);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            sample = self.run(|| ()) => sample,
            () = stopping => unreachable!("it waits for ever"),
        }
    }

    async fn drive(self, begun: impl FnOnce() + Send + 'static) -> Sample {
        let counted = Instant::now() + self.warmup;
        let end = counted + self.length;
        let mut tasks = tokio::task::JoinSet::new();
        for (number, targets) in self.clients.into_iter().enumerate() {
            let mut client = Client {
                number,
                targets: Vec::new(),
                pace: self.pace,
            };
            for target in targets {
                let connection = Connection::open(target.address).await.expect("a connection");
                client.targets.push((target, connection));
            }
            tasks.spawn(client.run(self.source.clone(), counted, end, self.stopped.clone()));
        }
        tokio::time::sleep_until(counted.into()).await;
        begun();
        let mut sum = Sample::default();
        for part in tasks.join_all().await {
            sum.records += part.records;
            sum.reads.extend(part.reads);
            sum.writes.extend(part.writes);
            sum.answered.extend(part.answered);
        }
        sum.seconds = self.length.as_secs_f64();
        sum
    }
}

impl Client {
    async fn run(mut self, source: Source, counted: Instant, end: Instant, stopped: Arc<AtomicBool>) -> Sample {
        let mut sample = Sample::default();
        for serial in 0.. {
            let job = source(self.number, serial);
            let start = Instant::now();
            if start >= end || stopped.load(Ordering::Relaxed) {
                break;
            }
            let sends = self.targets.iter_mut().map(|(target, connection)| {
                let request = post(&format!("{}/{}", target.collection, job.operation), &job.body);
                async move { connection.send(&request).await }
            });
            for outcome in join(sends.collect()).await {
                outcome.unwrap_or_else(|error| panic!("a request of the load failed: {error}"));
            }
            // What ends in time counts: requests that take long would otherwise be missing at the beginning.
            let now = Instant::now();
            if now >= counted && now < end {
                let took = (now - start).as_secs_f64() * 1000.0;
                if job.records > 0 {
                    sample.writes.push(took);
                    sample.answered.push(now);
                } else {
                    sample.reads.push(took);
                }
                sample.records += job.records;
            }
            if let Some(pace) = self.pace {
                tokio::time::sleep_until((start + pace).into()).await;
            }
        }
        sample
    }
}

/// Both of two at once, or the only one.
async fn join<F: Future>(mut futures: Vec<F>) -> Vec<F::Output> {
    match (futures.pop(), futures.pop()) {
        (Some(second), Some(first)) => {
            let (first, second) = tokio::join!(first, second);
            vec![first, second]
        }
        (Some(only), None) => vec![only.await],
        _ => Vec::new(),
    }
}
