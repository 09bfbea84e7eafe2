//! Taking a node out, and bringing it back whatever happens.

use std::cell::Cell;
use std::process::Stdio;

use http::Method;
use tokio::process::Command;

use super::poll::until;
use super::stage::{Stage, System, ensure, instance};

/// How a node is taken out.
#[derive(Debug, Clone)]
pub enum Way {
    /// By `maint`: it runs, and is given nothing.
    Maint,
    /// By commands; `{}` in them is the node's name.
    Commands { stop: String, start: String },
}

/// The node that is out now.
#[derive(Debug, Default)]
pub struct Out(Cell<Option<usize>>);

impl Out {
    pub fn node(&self) -> Option<usize> {
        self.0.get()
    }
}

impl Stage<'_> {
    /// Takes a node out, once all is well, and waits until it is seen to be.
    pub async fn take_out(&self, way: &Way, node: usize) -> Result<(), String> {
        let system = self.system;
        self.in_step().await?;
        let name = &system.nodes[node].name;
        self.step(&format!("take {name} out"));
        // Marked before it is tried: what failed half-way has to be brought back too.
        system.out.0.set(Some(node));
        match way {
            Way::Maint => {
                let path = format!("/admin/nodes/{name}/maint");
                system.admin.verb(Method::POST, &path).await?;
            }
            Way::Commands { stop, .. } => shell(stop, name).await?,
        }
        self.until(&format!("{name} is given nothing"), async || {
            let status = system.admin.status().await?;
            ensure(instance(&status, name)?["up"] == false, || {
                format!("/status says that {name} is up")
            })
        })
        .await
    }

    /// Brings back what is out, and waits until all nodes are in step again.
    pub async fn bring_back(&self) -> Result<(), String> {
        bring_back(self.system).await?;
        self.in_step().await
    }
}

/// Brings back what is out, if anything is.
pub async fn bring_back(system: &System) -> Result<(), String> {
    let (Some(node), Some(way)) = (system.out.node(), &system.way) else {
        return Ok(());
    };
    let node_name = &system.nodes[node].name;
    system.notes.step(&format!("bring {node_name} back"));
    match way {
        Way::Maint => {
            let path = format!("/admin/nodes/{node_name}/ready");
            system.admin.verb(Method::POST, &path).await?;
        }
        Way::Commands { start, .. } => {
            shell(start, node_name).await?;
            let what = format!("{node_name} answers");
            until(system.patience, &what, async || system.nodes[node].heartbeat().await).await?;
        }
    }
    system.out.0.set(None);
    Ok(())
}

/// Runs an operator's command, with the node's name in place of `{}` and in `DIPTYCH_NODE`.
async fn shell(command: &str, node: &str) -> Result<(), String> {
    let command = command.replace("{}", node);
    // Its output goes nowhere: what it starts may live on and would hold a pipe open.
    let ended = Command::new("sh")
        .args(["-c", &command])
        .env("DIPTYCH_NODE", node)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .await
        .map_err(|error| format!("`{command}` cannot be run: {error}"))?;
    ensure(ended.success(), || format!("`{command}` ended with {ended}"))
}
