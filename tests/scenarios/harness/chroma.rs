//! One real Chroma server with a folder and a port of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::api::Api;
use super::eventually;
use super::process::{Process, free_port};

/// A Chroma server. The port and the folder stay the same over restarts.
pub struct ChromaNode {
    pub name: String,
    pub port: u16,
    host: String,
    /// What stands before its command line, to run it somewhere else than here.
    enter: Vec<String>,
    dir: PathBuf,
    log: PathBuf,
    process: Option<Process>,
}

impl ChromaNode {
    /// Starts a server below `dir` and waits until it answers.
    pub async fn start(dir: &Path, name: &str) -> ChromaNode {
        ChromaNode::start_at(dir, name, "127.0.0.1", Vec::new()).await
    }

    /// The same with another address to listen on, and words before its command line.
    pub async fn start_at(dir: &Path, name: &str, host: &str, enter: Vec<String>) -> ChromaNode {
        let mut node = ChromaNode {
            name: name.to_owned(),
            port: free_port(),
            host: host.to_owned(),
            enter,
            dir: dir.join(format!("chroma-{name}")),
            log: dir.join(format!("chroma-{name}.log")),
            process: None,
        };
        node.restart().await;
        node
    }

    pub fn url(&self) -> String {
        format!("http://{}:{}", self.host, self.port)
    }

    /// A client of this node itself, which opens a connection for each request.
    pub fn api(&self) -> Api {
        Api::direct(&self.url())
    }

    /// Starts the server again on the same port and folder, and waits for its heartbeat.
    pub async fn restart(&mut self) {
        for attempt in 1..=5 {
            self.kill9();
            std::fs::create_dir_all(&self.dir).expect("a folder for the node");
            let mut process = Process::spawn(self.command(), &self.log, libc::SIGKILL).expect("chroma");
            // Chroma ends with code 0 when its port is taken; a peer that is closing can hold it for a moment.
            if self.answers(&mut process).await {
                self.process = Some(process);
                return;
            }
            println!("{}: start {attempt} on port {} ended early", self.name, self.port);
        }
        panic!("chroma {} does not start; see {}", self.name, self.log.display());
    }

    async fn answers(&self, process: &mut Process) -> bool {
        let api = self.api();
        eventually(Duration::from_secs(60), "chroma answers its heartbeat", || {
            let ended = process.exited().is_some();
            let api = &api;
            async move {
                if ended {
                    return Ok(false);
                }
                match api.try_get("/api/v2/heartbeat").await {
                    Ok(answer) if answer.status == 200 => Ok(true),
                    other => Err(format!("{other:?}")),
                }
            }
        })
        .await
    }

    /// Where the node keeps its data.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The id of the running server.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("a running node").id()
    }

    pub fn kill9(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill9();
        }
    }

    pub fn sigstop(&mut self) {
        self.process.as_mut().expect("a running node").signal(libc::SIGSTOP);
    }

    pub fn sigcont(&mut self) {
        self.process.as_mut().expect("a running node").signal(libc::SIGCONT);
    }

    /// A copy of everything the node stored. The node must be down.
    pub fn backup(&self) -> PathBuf {
        assert!(self.process.is_none(), "copy a node that is down");
        let copy = self.dir.with_extension("backup");
        copy_folder(&self.dir, &copy);
        copy
    }

    /// Puts such a copy in the place of what the node stored. The node must be down.
    pub fn restore(&mut self, backup: &Path) {
        self.wipe();
        copy_folder(backup, &self.dir);
    }

    /// Removes everything the node stored. The node must be down.
    pub fn wipe(&mut self) {
        assert!(self.process.is_none(), "wipe a node that is down");
        std::fs::remove_dir_all(&self.dir).expect("the node's folder");
    }

    fn command(&self) -> Command {
        let server = server();
        let Some((program, words)) = self.enter.split_first() else {
            return self.arguments(server);
        };
        let mut command = Command::new(program);
        command.args(words).arg(server.get_program()).args(server.get_args());
        self.arguments(command)
    }

    fn arguments(&self, mut command: Command) -> Command {
        for (key, _) in std::env::vars_os() {
            if key.to_string_lossy().to_uppercase().starts_with("CHROMA_") {
                command.env_remove(key);
            }
        }
        command.arg("run").arg("--path").arg(&self.dir);
        command.args(["--host", &self.host, "--port", &self.port.to_string()]);
        command.current_dir(&self.dir);
        command
    }
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder").flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("a file");
        }
    }
}

/// `chroma`. The launcher of the Python package imports for a second before it calls the server, so the server is called
/// directly where that package is what we have.
fn server() -> Command {
    let launcher = std::env::var_os("DIPTYCH_TEST_CHROMA").map(PathBuf::from);
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin");
    match launcher {
        Some(binary) => Command::new(binary),
        None => {
            let mut python = Command::new(venv.join("python3"));
            python
                .arg("-c")
                .arg("import sys, chromadb_rust_bindings as b; b.cli(['chroma'] + sys.argv[1:])");
            python
        }
    }
}
