//! Children of the tests: they die when the test process dies, and what they leave on disk goes with them.
//!
//! All children are started by one thread that lives as long as the process, because the kernel ties
//! `PR_SET_PDEATHSIG` to the *thread* that forked. Everything on disk lives under one root folder; a small shell that
//! waits for the end of a pipe removes that folder even after a `kill -9` of the tests.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// A running child process in a process group of its own. Dropping it kills the group.
pub struct Process {
    child: Child,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Starts `command` with both output streams appended to `log`; `death` is the signal it gets when the tests die.
    pub fn spawn(mut command: Command, log: &Path, death: i32) -> io::Result<Process> {
        let out = File::options().create(true).append(true).open(log)?;
        command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .process_group(0);
        // SAFETY: prctl is async-signal-safe and touches nothing that the parent owns.
        unsafe {
            command.pre_exec(move || match libc::prctl(libc::PR_SET_PDEATHSIG, death) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
        let (reply, answer) = sync_channel(1);
        spawner()
            .send((command, reply))
            .expect("the spawner thread lives as long as the process");
        let child = answer.recv().expect("the spawner thread answers")?;
        Ok(Process { child, ended: None })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to the whole process group; a process that has ended is left alone.
    pub fn signal(&mut self, signal: i32) {
        if self.exited().is_none() {
            // SAFETY: the child was not reaped yet (`exited`), so its group id cannot have been reused.
            unsafe { libc::kill(-(self.id() as i32), signal) };
        }
    }

    pub fn kill9(&mut self) {
        self.signal(libc::SIGKILL);
        if self.ended.is_none() {
            self.ended = self.child.wait().ok();
        }
    }

    /// The exit status if the process has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().ok().flatten();
        }
        self.ended
    }

    /// Waits for the process to end by itself, for at most `limit`.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let end = Instant::now() + limit;
        while self.exited().is_none() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.ended
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill9();
    }
}

type Order = (Command, SyncSender<io::Result<Child>>);

fn spawner() -> Sender<Order> {
    static SPAWNER: OnceLock<Mutex<Sender<Order>>> = OnceLock::new();
    let sender = SPAWNER.get_or_init(|| {
        let (orders, inbox) = channel::<Order>();
        std::thread::Builder::new()
            .name("spawner".into())
            .spawn(move || {
                for (mut command, reply) in inbox {
                    let _ = reply.send(command.spawn());
                }
            })
            .expect("threads can be started");
        Mutex::new(orders)
    });
    sender.lock().expect("nothing panics with this lock").clone()
}

/// The folder that holds everything the tests of this process write. `DIPTYCH_TEST_KEEP=1` keeps it.
pub fn root() -> &'static Path {
    static ROOT: OnceLock<(PathBuf, Option<Child>)> = OnceLock::new();
    let (root, _janitor) = ROOT.get_or_init(|| {
        let root = tempfile::Builder::new()
            .prefix("diptych-tests-")
            .tempdir()
            .expect("a temp folder")
            .keep();
        open_to_all(&root);
        if keep() {
            println!("keeping {}", root.display());
            return (root, None);
        }
        let janitor = Command::new("sh")
            .arg("-c")
            .arg("cat >/dev/null; for i in 1 2 3 4 5 6 7 8 9; do rm -rf \"$0\" 2>/dev/null && exit; sleep 0.3; done")
            .arg(&root)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("sh");
        // Its standard input ends when this process does.
        (root, Some(janitor))
    });
    root
}

pub fn keep() -> bool {
    std::env::var_os("DIPTYCH_TEST_KEEP").is_some_and(|v| v != "0")
}

/// Lets another user (Postgres does not run as root) reach what is inside `dir`.
pub fn open_to_all(dir: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).expect("own folder");
}

/// A port of 127.0.0.1 that nobody listens on. Taken from below the range that the kernel hands out to outgoing
/// connections, so that a killed server finds its port still free when it is restarted.
pub fn free_port() -> u16 {
    static NEXT: OnceLock<AtomicU16> = OnceLock::new();
    let next = NEXT.get_or_init(|| AtomicU16::new((std::process::id().wrapping_mul(7919) % 20_000) as u16));
    for _ in 0..20_000 {
        let port = 10_500 + next.fetch_add(1, Ordering::Relaxed) % 20_000;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port");
}
