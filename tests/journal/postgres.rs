//! A Postgres of our own: a fresh cluster in a temporary folder, on a free port, that a test may stop, freeze and kill.
//!
//! Needs the server's programs: in `PG_BIN`, or where Debian's packages put them. Without them the tests that need
//! Postgres say so and pass, unless `DIPTYCH_REQUIRE_POSTGRES` is set. `initdb` refuses root, so root runs all of it as
//! the user `postgres` or `nobody`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};

use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use tempfile::TempDir;

/// In every URL, so that a test can look for it where it must not be.
pub const PASSWORD: &str = "do-not-tell";

static SHARED: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());

pub struct Cluster {
    programs: PathBuf,
    folder: TempDir,
    user: Option<(u32, u32)>,
    port: u16,
    databases: AtomicU32,
    server: Mutex<Option<Child>>,
}

impl Cluster {
    /// One that tests share and leave alone; it ends with the last of them.
    pub fn shared() -> Option<Arc<Self>> {
        let mut shared = SHARED.lock().unwrap();
        if let Some(cluster) = shared.upgrade() {
            return Some(cluster);
        }
        let cluster = Arc::new(Self::create()?);
        *shared = Arc::downgrade(&cluster);
        Some(cluster)
    }

    /// One that a test has for itself.
    pub fn create() -> Option<Self> {
        let Some(programs) = programs() else {
            assert!(
                std::env::var_os("DIPTYCH_REQUIRE_POSTGRES").is_none(),
                "no Postgres programs found"
            );
            eprintln!("no Postgres programs found (PG_BIN): this test checks nothing");
            return None;
        };
        let folder = tempfile::Builder::new().prefix("diptych-postgres").tempdir().unwrap();
        let user = (folder.path().metadata().unwrap().uid() == 0).then(unprivileged);
        if let Some((uid, gid)) = user {
            chown(folder.path(), Some(uid), Some(gid)).unwrap();
        }
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let cluster = Self {
            programs,
            folder,
            user,
            port,
            databases: AtomicU32::new(0),
            server: Mutex::new(None),
        };
        let made = cluster
            .command("initdb")
            .args([
                "--username=diptych",
                "--auth=trust",
                "--encoding=UTF8",
                "--no-locale",
                "--no-sync",
                "-D",
            ])
            .arg(cluster.data())
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        cluster.start();
        Some(cluster)
    }

    /// A new database; its URL.
    pub async fn database(&self) -> String {
        let name = format!("journal_{}", self.databases.fetch_add(1, Ordering::Relaxed));
        let mut connection = PgConnection::connect(&self.url("postgres")).await.unwrap();
        connection
            .execute(AssertSqlSafe(format!("CREATE DATABASE {name}")))
            .await
            .unwrap();
        connection.close().await.unwrap();
        self.url(&name)
    }

    fn url(&self, database: &str) -> String {
        format!("postgres://diptych:{PASSWORD}@127.0.0.1:{}/{database}", self.port)
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// Starts the server and waits until it says that it is ready. After a kill the first tries can fail: processes
    /// of the old server may not have ended.
    pub fn start(&self) {
        let mut log = String::new();
        for _ in 0..200 {
            let mut child = self
                .command("postgres")
                .arg("-D")
                .arg(self.data())
                .arg("-k")
                .arg(self.folder.path())
                .args(["-h", "127.0.0.1", "-p", &self.port.to_string(), "-c", "fsync=on"])
                .args(["-c", "log_min_messages=warning"])
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
            for line in lines.by_ref().map_while(Result::ok) {
                if line.contains("ready to accept connections") {
                    std::thread::spawn(move || lines.for_each(drop));
                    *self.server.lock().unwrap() = Some(child);
                    return;
                }
                log.push_str(&line);
                log.push('\n');
            }
            child.wait().unwrap();
        }
        panic!("Postgres does not start:\n{log}");
    }

    /// Fast shutdown, as an administrator does it.
    pub fn stop(&self) {
        let mut child = self.server.lock().unwrap().take().unwrap();
        signal(child.id(), libc::SIGINT);
        child.wait().unwrap();
    }

    /// `kill -9` of the server and all its processes.
    pub fn kill(&self) {
        if let Some(mut child) = self.server.lock().unwrap().take() {
            let family = family(child.id());
            child.kill().unwrap();
            family.into_iter().for_each(|process| signal(process, libc::SIGKILL));
            child.wait().unwrap();
        }
    }

    /// Every process stands still, every connection stays.
    pub fn freeze(&self) {
        self.signal_all(libc::SIGSTOP);
    }

    pub fn thaw(&self) {
        self.signal_all(libc::SIGCONT);
    }

    fn signal_all(&self, number: i32) {
        let server = self.server.lock().unwrap();
        let server = server.as_ref().unwrap().id();
        signal(server, number);
        family(server).into_iter().for_each(|process| signal(process, number));
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.join(program));
        command
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command.env_remove("PGOPTIONS").env("LC_ALL", "C");
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
        command
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.kill();
    }
}

fn programs() -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os("PG_BIN") {
        return Some(folder.into());
    }
    let mut folders: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .ok()?
        .filter_map(|version| Some(version.ok()?.path().join("bin")))
        .filter(|folder| folder.join("initdb").exists() && folder.join("postgres").exists())
        .collect();
    folders.sort();
    folders.pop()
}

/// User and group of `postgres`, else of `nobody`.
fn unprivileged() -> (u32, u32) {
    let users = fs::read_to_string("/etc/passwd").unwrap();
    let find = |name: &str| {
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2).map(|field| field.parse().ok());
        Some((fields.next()??, fields.next()??))
    };
    find("postgres")
        .or_else(|| find("nobody"))
        .expect("a user to run Postgres as")
}

/// The processes that `process` started.
fn family(process: u32) -> Vec<u32> {
    let list = Path::new("/proc")
        .join(process.to_string())
        .join("task")
        .join(process.to_string())
        .join("children");
    let list = fs::read_to_string(list).unwrap_or_default();
    list.split_whitespace().filter_map(|child| child.parse().ok()).collect()
}

fn signal(process: u32, number: i32) {
    // SAFETY: plain system call.
    unsafe { libc::kill(process.try_into().unwrap(), number) };
}
