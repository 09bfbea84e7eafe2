//! Private Postgres clusters: one shared by the whole process with a database per test, or one for a single test.

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::process::{Process, free_port, keep, root};

/// A Postgres cluster below the tests' root folder.
pub struct Postgres {
    dir: PathBuf,
    log: PathBuf,
    port: u16,
    process: Option<Process>,
}

/// A new, empty database in the cluster that all tests of this process share.
pub fn shared_database(name: &str) -> String {
    static SHARED: OnceLock<Mutex<Postgres>> = OnceLock::new();
    let shared = SHARED.get_or_init(|| Mutex::new(Postgres::cluster(root(), "postgres-shared")));
    shared.lock().unwrap_or_else(|e| e.into_inner()).create_database(name)
}

impl Postgres {
    /// A cluster for one test, which may stop and kill it.
    pub fn dedicated(dir: &Path) -> Postgres {
        Postgres::cluster(dir, "postgres")
    }

    fn cluster(parent: &Path, name: &str) -> Postgres {
        let dir = parent.join(name);
        std::fs::create_dir_all(&dir).expect("a folder for Postgres");
        if let Some((uid, gid)) = other_user() {
            std::os::unix::fs::chown(&dir, Some(uid), Some(gid)).expect("root may give folders away");
        }
        let log = parent.join(format!("{name}.log"));
        let mut postgres = Postgres {
            dir,
            log,
            port: free_port(),
            process: None,
        };
        let data = postgres.data();
        let mut initdb = postgres.command("initdb");
        initdb
            .args([
                "--auth=trust",
                "--username=postgres",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
                "-D",
            ])
            .arg(data);
        run(&mut initdb);
        postgres.start();
        postgres
    }

    /// Starts the cluster (again) and waits until it accepts connections.
    pub fn start(&mut self) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            // Again when a start ended early: children of a killed postmaster hold its memory for a moment.
            if self.process.as_mut().is_none_or(|process| process.exited().is_some()) {
                self.process = Some(self.spawn());
            }
            let mut ping = tool("pg_isready");
            ping.args([
                "-q",
                "-t",
                "2",
                "-h",
                "127.0.0.1",
                "-U",
                "postgres",
                "-p",
                &self.port.to_string(),
            ]);
            let accepts = ping.status().expect("pg_isready").success();
            if accepts && self.process.as_mut().is_some_and(|process| process.exited().is_none()) {
                return;
            }
            assert!(
                Instant::now() < end,
                "Postgres does not start; see {}",
                self.log.display()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn spawn(&self) -> Process {
        let mut command = self.command("postgres");
        command.arg("-D").arg(self.data()).args(["-p", &self.port.to_string()]);
        for setting in [
            "listen_addresses=127.0.0.1",
            "fsync=on",
            "max_connections=200",
            "shared_buffers=32MB",
        ] {
            command.args(["-c", setting]);
        }
        // None: their paths have a limit, and everything goes over 127.0.0.1.
        command.args(["-c", "unix_socket_directories="]);
        // SIGQUIT is Postgres' immediate shutdown: it also releases its shared memory.
        Process::spawn(command, &self.log, libc::SIGQUIT).expect("postgres")
    }

    /// A clean, fast shutdown.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.signal(libc::SIGINT);
            assert!(
                process.wait(Duration::from_secs(60)).is_some(),
                "Postgres stops on SIGINT"
            );
        }
    }

    /// Stops or continues every process of the cluster: connections stay, and nothing answers.
    pub fn freeze(&mut self, frozen: bool) {
        let Some(process) = &self.process else { return };
        let signal = if frozen { libc::SIGSTOP } else { libc::SIGCONT };
        let postmaster = process.id();
        let children = std::fs::read_to_string(format!("/proc/{postmaster}/task/{postmaster}/children"));
        let children = children.unwrap_or_default();
        let pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
        for pid in std::iter::once(postmaster as i32).chain(pids) {
            // SAFETY: the postmaster is our child and not reaped; its children are its own while it does not run.
            unsafe { libc::kill(pid, signal) };
        }
    }

    pub fn kill9(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill9();
        }
    }

    /// Creates a database and returns its URL.
    pub fn create_database(&self, name: &str) -> String {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let name = name.to_lowercase().replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        let name = format!(
            "t{}_{}",
            SERIAL.fetch_add(1, Ordering::Relaxed),
            &name[..name.len().min(40)]
        );
        let mut createdb = tool("createdb");
        createdb.args(["-h", "127.0.0.1", "-U", "postgres", "-p", &self.port.to_string(), &name]);
        run(&mut createdb);
        format!("postgres://postgres@127.0.0.1:{}/{name}", self.port)
    }

    fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// A program of Postgres, as a user that it is willing to run as.
    fn command(&self, program: &str) -> Command {
        use std::os::unix::process::CommandExt;
        let mut command = tool(program);
        if let Some((uid, gid)) = other_user() {
            command.uid(uid).gid(gid);
        }
        command.current_dir(&self.dir);
        command
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.signal(libc::SIGQUIT);
            process.wait(Duration::from_secs(10));
        }
        if !keep() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// A client or server program: `DIPTYCH_TEST_PG_BIN`, else the newest Debian package, else `PATH`.
pub fn tool(name: &str) -> Command {
    static BIN: OnceLock<Option<PathBuf>> = OnceLock::new();
    let bin = BIN.get_or_init(|| {
        if let Some(dir) = std::env::var_os("DIPTYCH_TEST_PG_BIN") {
            return Some(PathBuf::from(dir));
        }
        let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?;
        let mut bins: Vec<PathBuf> = versions.flatten().map(|v| v.path().join("bin")).collect();
        bins.retain(|bin| bin.join("initdb").exists());
        bins.sort();
        bins.pop()
    });
    match bin {
        Some(bin) => Command::new(bin.join(name)),
        None => Command::new(name),
    }
}

fn run(command: &mut Command) {
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(
        out.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
}

/// Postgres refuses to run as root: then it runs as `postgres` or `nobody`.
fn other_user() -> Option<(u32, u32)> {
    // SAFETY: geteuid has no preconditions; getpwnam's answer is read at once, and its callers hold one lock at a time
    // only in the sense that a race yields the same two constant entries.
    unsafe {
        if libc::geteuid() != 0 {
            return None;
        }
        static USER: OnceLock<(u32, u32)> = OnceLock::new();
        Some(*USER.get_or_init(|| {
            for name in ["postgres", "nobody"] {
                let name = CString::new(name).expect("no NUL");
                let entry = libc::getpwnam(name.as_ptr());
                if !entry.is_null() {
                    return ((*entry).pw_uid, (*entry).pw_gid);
                }
            }
            panic!("root needs a user `postgres` or `nobody` to run Postgres as");
        }))
    }
}
