//! The Chroma servers of `diptych dev`: children that are looked after by one thread.
//!
//! One thread, because the kernel ties `PR_SET_PDEATHSIG` to the thread that forked: it has to live as long as the
//! process, and then the children go with it even if the process is killed. They are in process groups of their own, so
//! that a Ctrl-C on the terminal ends the proxy first and them afterwards.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use parking_lot::Mutex;

const LOOK: Duration = Duration::from_millis(200);
/// A node that has ended is started again after so many looks: long enough to see the other one serve.
const LOOKS_BEFORE_RESTART: u32 = 25;
/// A node that lived for fewer looks than this has failed to start.
const LOOKS_TO_LIVE: u32 = 10;
/// How long a node may take to end on SIGTERM.
const STOP_LOOKS: u32 = 50;
const STOP_LOOK: Duration = Duration::from_millis(100);

/// What one server is told.
#[derive(Debug, Clone)]
pub struct LocalNode {
    pub name: &'static str,
    pub port: u16,
    pub dir: PathBuf,
    pub log: PathBuf,
}

impl LocalNode {
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

/// Both servers, and the thread that looks after them.
pub struct Nodes {
    stopper: Stopper,
    given_up: Arc<Mutex<Option<String>>>,
}

/// Stops them.
#[derive(Clone)]
pub struct Stopper(SyncSender<SyncSender<()>>);

impl Stopper {
    /// Asks the servers to end, waits for that, and kills what does not.
    pub fn stop(&self) {
        let (done, wait) = sync_channel(1);
        if self.0.send(done).is_ok() {
            let _ = wait.recv();
        }
    }
}

impl Nodes {
    /// Starts them; whether they answer is seen by asking.
    ///
    /// # Errors
    /// The program cannot be started, or a folder cannot be made.
    pub fn start(chroma: &Path, nodes: Vec<LocalNode>) -> Result<Self, String> {
        let (stop, orders) = sync_channel(1);
        let (report, started) = sync_channel(1);
        let given_up: Arc<Mutex<Option<String>>> = Arc::default();
        let (chroma, failure) = (chroma.to_owned(), given_up.clone());
        std::thread::Builder::new()
            .name("nodes".to_owned())
            .spawn(move || {
                let children: Result<Vec<_>, String> =
                    nodes.into_iter().map(|node| Tended::start(&chroma, node)).collect();
                match children {
                    Ok(children) => {
                        let _ = report.send(Ok(()));
                        look_after(children, &chroma, &orders, &failure);
                    }
                    Err(reason) => {
                        let _ = report.send(Err(reason));
                    }
                }
            })
            .map_err(|error| format!("cannot start a thread: {error}"))?;
        started.recv().map_err(|_| "the nodes' thread ended".to_owned())??;
        Ok(Self {
            stopper: Stopper(stop),
            given_up,
        })
    }

    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Why a node is not started any more.
    pub fn given_up(&self) -> Option<String> {
        self.given_up.lock().clone()
    }
}

/// A server and how it fares.
struct Tended {
    node: LocalNode,
    child: Option<Child>,
    /// Looks since it was started, or since it ended.
    looks: u32,
}

impl Tended {
    fn start(chroma: &Path, node: LocalNode) -> Result<Self, String> {
        let child = spawn(chroma, &node).map_err(|error| format!("cannot start {}: {error}", chroma.display()))?;
        Ok(Self {
            node,
            child: Some(child),
            looks: 0,
        })
    }

    /// Returns why it is given up.
    fn look(&mut self, chroma: &Path) -> Option<String> {
        self.looks += 1;
        let node = &self.node;
        match &mut self.child {
            Some(child) => {
                let status = child.try_wait().ok().flatten()?;
                let lived = self.looks;
                (self.child, self.looks) = (None, 0);
                if lived < LOOKS_TO_LIVE {
                    return Some(format!(
                        "{} ended at once ({status}); see {}:\n{}",
                        node.name,
                        node.log.display(),
                        tail(&node.log)
                    ));
                }
                tracing::warn!(
                    node = node.name,
                    %status,
                    "A Chroma server has ended; it is started again in a few seconds."
                );
                None
            }
            None if self.looks < LOOKS_BEFORE_RESTART => None,
            None => {
                self.looks = 0;
                match spawn(chroma, node) {
                    Ok(child) => {
                        tracing::info!(node = node.name, pid = child.id(), "Started the Chroma server again.");
                        self.child = Some(child);
                        None
                    }
                    Err(error) => Some(format!("cannot start {}: {error}", chroma.display())),
                }
            }
        }
    }

    fn signal(&self, signal: i32) {
        if let Some(child) = &self.child
            && let Ok(pid) = i32::try_from(child.id())
        {
            // SAFETY: the child was not waited for since it was last seen alive, so its id is its own.
            unsafe { libc::kill(pid, signal) };
        }
    }

    fn is_gone(&mut self) -> bool {
        match &mut self.child {
            Some(child) => !matches!(child.try_wait(), Ok(None)),
            None => true,
        }
    }
}

fn look_after(
    mut nodes: Vec<Tended>,
    chroma: &Path,
    orders: &Receiver<SyncSender<()>>,
    failure: &Mutex<Option<String>>,
) {
    loop {
        match orders.recv_timeout(LOOK) {
            Err(RecvTimeoutError::Timeout) => {}
            // Nobody is left who could stop them later.
            Err(RecvTimeoutError::Disconnected) => return stop(&mut nodes),
            Ok(done) => {
                stop(&mut nodes);
                let _ = done.send(());
                return;
            }
        }
        nodes.retain_mut(|node| match node.look(chroma) {
            None => true,
            Some(reason) => {
                tracing::error!("{reason}");
                *failure.lock() = Some(reason);
                false
            }
        });
    }
}

fn stop(nodes: &mut [Tended]) {
    let gone = |nodes: &mut [Tended]| nodes.iter_mut().all(Tended::is_gone);
    if gone(nodes) {
        return;
    }
    for (signal, looks) in [(libc::SIGTERM, STOP_LOOKS), (libc::SIGKILL, STOP_LOOKS)] {
        for node in nodes.iter_mut().filter_map(|node| (!node.is_gone()).then_some(node)) {
            node.signal(signal);
        }
        for _ in 0..looks {
            if gone(nodes) {
                return;
            }
            std::thread::sleep(STOP_LOOK);
        }
    }
}

fn spawn(chroma: &Path, node: &LocalNode) -> io::Result<Child> {
    fs::create_dir_all(&node.dir)?;
    let out = File::options().create(true).append(true).open(&node.log)?;
    let mut command = Command::new(chroma);
    command
        .arg("run")
        .arg("--path")
        .arg(&node.dir)
        .args(["--host", "127.0.0.1", "--port", &node.port.to_string()])
        .current_dir(&node.dir)
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out)
        .process_group(0);
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("CHROMA_") {
            command.env_remove(key);
        }
    }
    // SAFETY: prctl is async-signal-safe and touches nothing that the parent owns.
    #[cfg(target_os = "linux")]
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
    command.spawn()
}

fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}
