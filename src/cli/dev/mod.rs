//! `diptych dev`: everything on this machine with one command.
//!
//! The nodes are real Chroma servers, children of this process; the rest is what `run` does, with a configuration that
//! is written beside their data, to be looked at and built on.

mod nodes;

use std::fmt::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use self::nodes::{LocalNode, Nodes};
use super::server::{Serving, serve};
use super::{DevArgs, ask, run};
use crate::config::Config;

const ADMIN_PORT: u16 = 8900;
const START_LIMIT: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(100);

/// Starts everything and serves until a signal ends it.
pub fn dev(args: &DevArgs) -> ExitCode {
    match prepare(args) {
        Ok((config, nodes, page)) => {
            run::start_logging(&config);
            let stopped = nodes.stopper();
            announce(&config, page);
            let serving = Serving {
                upgrade: false,
                at_end: Box::new(move || stopped.stop()),
            };
            run::finish(serve(config, serving))
        }
        Err(reason) => {
            eprintln!("diptych dev: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn prepare(args: &DevArgs) -> Result<(Config, Nodes, String), String> {
    let chroma = find_chroma(args.chroma.as_deref(), std::env::var_os("PATH"))?;
    std::fs::create_dir_all(&args.dir).map_err(|error| format!("cannot make {}: {error}", args.dir.display()))?;
    let dir = std::path::absolute(&args.dir).map_err(|error| format!("{}: {error}", args.dir.display()))?;
    if !is_free(args.port) {
        return Err(format!("port {} is taken; choose another one with --port", args.port));
    }
    let mut taken = vec![args.port];
    let admin = next_free(ADMIN_PORT, &mut taken)?;
    let first = args.port.checked_add(1).ok_or("there is no port after --port")?;
    let mut local = Vec::new();
    for name in ["primary", "replica"] {
        local.push(LocalNode {
            name,
            port: next_free(first, &mut taken)?,
            dir: dir.join(name),
            log: dir.join(format!("{name}.log")),
        });
    }
    let file = dir.join("diptych.yaml");
    let text = configuration(&dir, args.port, admin, &local);
    std::fs::write(&file, text).map_err(|error| format!("cannot write {}: {error}", file.display()))?;
    let config = Config::load(&file).map_err(|error| error.to_string())?;
    eprintln!("Starting two Chroma servers with {} ...", chroma.display());
    let nodes = Nodes::start(&chroma, local.clone())?;
    if let Err(reason) = wait_for(&nodes, &local) {
        nodes.stopper().stop();
        return Err(reason);
    }
    let page = page(args.port, admin, &local, &file);
    Ok((config, nodes, page))
}

fn find_chroma(given: Option<&Path>, path: Option<std::ffi::OsString>) -> Result<PathBuf, String> {
    if let Some(given) = given {
        return std::path::absolute(given)
            .ok()
            .filter(|program| program.is_file())
            .ok_or_else(|| format!("there is no program {}", given.display()));
    }
    let mut places = vec![PathBuf::from(".venv/bin")];
    places.extend(std::env::split_paths(&path.unwrap_or_default()));
    places
        .iter()
        .map(|place| place.join("chroma"))
        .find(|program| program.is_file())
        .and_then(|program| std::path::absolute(program).ok())
        .ok_or_else(|| {
            "there is no `chroma` in .venv/bin nor on PATH.\nInstall it with `make setup`, or with \
             `python3 -m venv .venv && .venv/bin/pip install chromadb==1.5.9`, or name it with --chroma."
                .to_owned()
        })
}

fn is_free(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_ok()
}

/// The first free port from `first` on that is not in `taken`; it is added there.
fn next_free(first: u16, taken: &mut Vec<u16>) -> Result<u16, String> {
    let found = (first..=u16::MAX).find(|port| !taken.contains(port) && is_free(*port));
    let port = found.ok_or_else(|| format!("no port from {first} on is free"))?;
    taken.push(port);
    Ok(port)
}

fn configuration(dir: &Path, port: u16, admin: u16, nodes: &[LocalNode]) -> String {
    // A JSON string is a YAML string; a dollar would begin a variable.
    let quoted = |text: String| serde_json::Value::String(text.replace('$', "$$")).to_string();
    let place = |name: &str| quoted(dir.join(name).display().to_string());
    let mut text = "# Written by `diptych dev` at every start.\n".to_owned();
    let _ = writeln!(text, "listen:\n  - address: 127.0.0.1:{port}");
    let _ = writeln!(text, "admin:\n  address: 127.0.0.1:{admin}");
    text.push_str("nodes:\n");
    for node in nodes {
        let _ = writeln!(text, "  - name: {}\n    url: {}", node.name, quoted(node.url()));
    }
    let _ = writeln!(
        text,
        "wal:\n  url: {}",
        quoted(format!("sqlite://{}/wal.db", dir.display()))
    );
    text.push_str("log:\n  level: ${DIPTYCH_LOG:-warn,diptych=info}\n");
    let _ = writeln!(text, "upgrade_sock: {}", place("upgrade.sock"));
    let _ = writeln!(text, "pid_file: {}", place("diptych.pid"));
    text
}

fn wait_for(nodes: &Nodes, local: &[LocalNode]) -> Result<(), String> {
    let runtime = ask::runtime()?;
    for node in local {
        let authority = format!("127.0.0.1:{}", node.port);
        let mut waited = Duration::ZERO;
        loop {
            if let Some(reason) = nodes.given_up() {
                return Err(reason);
            }
            let answer = runtime.block_on(ask::get(&authority, crate::chroma::node_path::HEARTBEAT));
            if answer.is_ok_and(|answer| answer.status == 200) {
                break;
            }
            if waited > START_LIMIT {
                return Err(format!("{} does not answer; see {}", node.name, node.log.display()));
            }
            std::thread::sleep(LOOK);
            waited += LOOK;
        }
    }
    Ok(())
}

/// Prints how to connect once the proxy is ready.
fn announce(config: &Config, page: String) {
    let Some(admin) = config.admin.address else { return };
    std::thread::spawn(move || {
        let Ok(runtime) = ask::runtime() else { return };
        loop {
            let answer = runtime.block_on(ask::get(&admin.to_string(), "/ready"));
            if answer.is_ok_and(|answer| answer.status == 200) {
                println!("{page}");
                return;
            }
            std::thread::sleep(LOOK);
        }
    });
}

fn page(port: u16, admin: u16, nodes: &[LocalNode], file: &Path) -> String {
    let mut page = format!(
        r#"
Diptych is ready: http://127.0.0.1:{port}

  import chromadb
  client = chromadb.HttpClient(host="127.0.0.1", port={port})
  notes = client.get_or_create_collection("notes")
  notes.upsert(ids=["a", "b"], embeddings=[[1.0, 0.0], [0.0, 1.0]], documents=["left", "right"])
  print(notes.query(query_embeddings=[[0.9, 0.1]], n_results=1)["documents"])

"#
    );
    for node in nodes {
        let _ = writeln!(
            page,
            "  {}  {}  data and log in {}*",
            node.name,
            node.url(),
            node.dir.display()
        );
    }
    let flag = if admin == ADMIN_PORT {
        String::new()
    } else {
        format!(" --url http://127.0.0.1:{admin}")
    };
    let _ = writeln!(
        page,
        "  status   http://127.0.0.1:{admin}/status  or: diptych status{flag}\n  metrics  \
         http://127.0.0.1:{admin}/metrics\n  config   {}\n\nCtrl-C stops all of it. Kill one of the nodes and go on \
         writing: it is started again after some seconds and gets what it missed.",
        file.display()
    );
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local() -> Vec<LocalNode> {
        let node = |name: &'static str, port| LocalNode {
            name,
            port,
            dir: PathBuf::from("/tmp").join(name),
            log: PathBuf::from("/tmp/x.log"),
        };
        vec![node("primary", 8001), node("replica", 8002)]
    }

    #[test]
    fn the_configuration_it_writes_is_valid_whatever_the_folder_is_called() {
        let dir = Path::new("/tmp/a \"folder\": with $HOME, #1");
        let text = configuration(dir, 8000, 8900, &local());
        let config = Config::parse(&text, &|_| None).unwrap();
        assert_eq!(config.validate(), []);
        assert_eq!(config.wal.url, format!("sqlite://{}/wal.db", dir.display()));
        assert_eq!(config.listen[0].address.to_string(), "127.0.0.1:8000");
        assert_eq!(config.nodes[1].url.to_string(), "http://127.0.0.1:8002");
    }

    #[test]
    fn the_page_says_where_everything_is() {
        let page = page(8000, 8901, &local(), Path::new("/tmp/diptych.yaml"));
        for part in [
            "port=8000",
            "http://127.0.0.1:8001",
            "http://127.0.0.1:8002",
            "--url http://127.0.0.1:8901",
        ] {
            assert!(page.contains(part), "{part} is not in {page}");
        }
    }

    #[test]
    fn a_missing_chroma_is_explained() {
        let given = find_chroma(Some(Path::new("/not/there/chroma")), None).unwrap_err();
        assert!(given.contains("/not/there/chroma"), "{given}");
    }

    #[test]
    fn taken_ports_are_passed_over() {
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = held.local_addr().unwrap().port();
        let mut taken = vec![];
        assert!(next_free(port, &mut taken).unwrap() > port);
        assert_eq!(taken.len(), 1);
    }
}
