//! The real binary: configuration file, start, stop, and what it says about itself.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use serde_json::Value;

use super::api::Api;
use super::eventually;
use super::process::{Process, free_port};

/// What differs between tests in the configuration.
pub struct Config {
    /// `wal.url`
    pub journal: String,
    /// (name, URL), in order of preference
    pub nodes: Vec<(String, String)>,
    /// The value of `health`.
    pub health: String,
    /// More top-level YAML.
    pub extra: String,
}

/// A running `diptych run`. Ports and configuration stay the same over restarts.
pub struct Diptych {
    pub port: u16,
    pub admin_port: u16,
    file: PathBuf,
    log: PathBuf,
    process: Option<Process>,
    /// The fault point at which the next process dies.
    fault: Option<String>,
    /// Another binary than the one of this build.
    pub binary: Option<PathBuf>,
}

pub const HEALTH: &str = "{ interval: 200ms, timeout: 500ms, unhealthy_after: 2, healthy_after: 2 }";

impl Diptych {
    /// Writes the configuration below `dir`, starts the binary and waits until it is ready.
    pub async fn start(dir: &Path, config: &Config) -> Diptych {
        let diptych = Diptych::prepare(dir, config);
        let mut diptych = diptych;
        diptych.restart().await;
        diptych
    }

    /// Writes the configuration without starting anything.
    pub fn prepare(dir: &Path, config: &Config) -> Diptych {
        let (port, admin_port) = (free_port(), free_port());
        let mut nodes = String::new();
        for (name, url) in &config.nodes {
            nodes += &format!("  - {{ name: {name}, url: \"{url}\" }}\n");
        }
        // Beside it lies a file that outlives a kill.
        let socket = match config.extra.contains("upgrade_sock:") {
            true => String::new(),
            false => format!("upgrade_sock: \"{}\"\n", dir.join(format!("{port}.sock")).display()),
        };
        let text = format!(
            "{socket}threads: 2\ngrace_period_seconds: 1\ngraceful_shutdown_timeout_seconds: 1\n\
             listen:\n  - address: 127.0.0.1:{port}\nadmin:\n  address: 127.0.0.1:{admin_port}\n\
             nodes:\n{nodes}wal:\n  url: \"{}\"\nhealth: {}\n{}\n",
            config.journal, config.health, config.extra
        );
        let file = dir.join("diptych.yaml");
        std::fs::write(&file, text).expect("the test's folder");
        Diptych {
            port,
            admin_port,
            file,
            log: dir.join("diptych.log"),
            process: None,
            fault: None,
            binary: None,
        }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    #[allow(dead_code, reason = "the benchmarks read what it has used")]
    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("a running proxy").id()
    }

    /// Its configuration file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// What the process logged, over all its starts.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// A client of the proxy port with a pool of connections.
    pub fn api(&self) -> Api {
        Api::pooled(&self.url())
    }

    /// A client of the admin port.
    pub fn admin(&self) -> Api {
        Api::direct(&format!("http://127.0.0.1:{}", self.admin_port))
    }

    /// Starts the process (again) and waits for `GET /ready`.
    pub async fn restart(&mut self) {
        self.spawn();
        self.wait_ready().await;
    }

    /// Waits for `GET /ready`.
    pub async fn wait_ready(&mut self) {
        let admin = self.admin();
        eventually(Duration::from_secs(60), "diptych is ready", || {
            let ended = self.ended();
            assert!(ended.is_none(), "diptych ended with {ended:?} instead of getting ready");
            let admin = &admin;
            async move {
                match admin.try_get("/ready").await {
                    Ok(answer) if answer.status == 200 => Ok(()),
                    other => Err(format!("{other:?}")),
                }
            }
        })
        .await;
    }

    /// The next process that is started dies at this fault point (`diptych::fault`).
    pub fn arm(&mut self, fault: &str) {
        self.fault = Some(fault.to_owned());
    }

    /// Starts the process without waiting for anything.
    pub fn spawn(&mut self) {
        self.kill9();
        self.process = Some(self.start_process(&[]));
    }

    /// Starts a new process that takes the sockets over, and waits until the old one has ended and the new one serves.
    pub async fn upgrade(&mut self) {
        let new = self.start_process(&["--upgrade"]);
        let mut old = self.process.replace(new).expect("a running proxy");
        old.signal(libc::SIGQUIT);
        let ended = tokio::task::block_in_place(|| old.wait(Duration::from_secs(60)));
        assert!(ended.is_some(), "the old diptych does not end");
        self.wait_ready().await;
    }

    fn start_process(&mut self, more: &[&str]) -> Process {
        let other = self
            .binary
            .clone()
            .map(PathBuf::into_os_string)
            .or_else(|| std::env::var_os("DIPTYCH_TEST_BIN"));
        let binary = other.unwrap_or_else(|| env!("CARGO_BIN_EXE_diptych").into());
        let mut command = Command::new(binary);
        command.arg("run").arg("--config").arg(&self.file).args(more);
        command.current_dir(self.file.parent().expect("a folder"));
        match self.fault.take() {
            Some(fault) => command.env("DIPTYCH_FAULT", fault),
            None => command.env_remove("DIPTYCH_FAULT"),
        };
        Process::spawn(command, &self.log, libc::SIGKILL).expect("the diptych binary")
    }

    /// The exit status if the process ended by itself.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process.as_mut().and_then(Process::exited)
    }

    pub fn kill9(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill9();
        }
    }

    pub fn signal(&mut self, signal: i32) {
        self.process.as_mut().expect("a running proxy").signal(signal);
    }

    /// Asks the process to end, and waits until it did.
    pub async fn sigterm(&mut self) {
        let mut process = self.process.take().expect("a running proxy");
        process.signal(libc::SIGTERM);
        let ended = tokio::task::block_in_place(|| process.wait(Duration::from_secs(60)));
        assert!(ended.is_some(), "diptych does not end on SIGTERM");
    }

    /// `GET /status` of the admin port.
    pub async fn status(&self) -> Value {
        self.admin().get_path("/status").await.expect(200).json()
    }

    /// Waits until every node is healthy, in sync and without pending writes.
    pub async fn wait_drained(&self) {
        self.wait_status("everything is drained", |status| {
            let instances = status["instances"]
                .as_array()
                .filter(|i| !i.is_empty())
                .ok_or("no instances")?;
            for node in instances {
                let drained = node["healthy"] == true && node["in_sync"] == true && node["pending_writes"] == 0;
                if !drained {
                    return Err(format!("{} is not there yet", node["name"]));
                }
            }
            match status["write_ahead_log"]["pending_writes"].as_u64() {
                Some(0) => Ok(()),
                other => Err(format!("write_ahead_log.pending_writes: {other:?}")),
            }
        })
        .await;
    }

    /// Waits until `/status` says that this node is unhealthy.
    pub async fn wait_unhealthy(&self, node: usize) {
        self.wait_status("the node is seen as unhealthy", |status| {
            if status["instances"][node]["healthy"] == false {
                Ok(())
            } else {
                Err("still healthy".into())
            }
        })
        .await;
    }

    /// Polls `/status` for 60 s and prints its last state when that was not enough.
    pub async fn wait_status(&self, what: &str, good: impl Fn(&Value) -> Result<(), String>) {
        let admin = self.admin();
        let (admin, good) = (&admin, &good);
        eventually(Duration::from_secs(60), what, || async move {
            let status = admin.try_get("/status").await?.json();
            good(&status).map_err(|e| format!("{e}; /status: {status:#}"))
        })
        .await;
    }
}
