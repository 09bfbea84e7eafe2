//! The command line.
//!
//! `run` and `dev` end in the same `server::serve`; the only difference is who started the nodes. Exit codes: 0 it is
//! well, 1 it is not; `status` has its own three.

mod ask;
mod check;
mod dev;
mod run;
mod server;
mod shutdown;
mod status;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// RAID-1 for Chroma: one address, two Chroma servers behind it.
#[derive(Debug, Parser)]
#[command(name = "diptych", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the proxy.
    Run(RunArgs),
    /// Say what a configuration would run, and try to reach its nodes and its log. Changes nothing.
    Check {
        /// Configuration file; without one the defaults apply.
        #[arg(long, short, env = "DIPTYCH_CONFIG")]
        config: Option<PathBuf>,
    },
    /// Start two local Chroma servers, an embedded log and the proxy; stop all of it with Ctrl-C.
    Dev(DevArgs),
    /// Show how the nodes of a running Diptych are. Exit code: 0 healthy, 1 degraded, 2 unavailable or unreachable.
    Status(StatusArgs),
    /// Print the JSON schema of the configuration file.
    Schema,
}

/// The flags are those of every Pingora server.
#[derive(Debug, Args)]
struct RunArgs {
    /// Configuration file; without one the defaults apply.
    #[arg(long, short, env = "DIPTYCH_CONFIG")]
    config: Option<PathBuf>,
    /// Take the listening sockets over from a running Diptych with the same `upgrade_sock`; send it SIGQUIT then.
    #[arg(long, short)]
    upgrade: bool,
    /// Test the configuration and exit.
    #[arg(long, short)]
    test: bool,
    /// Not supported: let systemd or a container runtime keep it in the background.
    #[arg(long, short, hide = true)]
    daemon: bool,
}

#[derive(Debug, Args)]
struct DevArgs {
    /// Where the nodes' data, the log and all output go.
    #[arg(long, default_value = ".diptych-dev")]
    dir: PathBuf,
    /// Port for clients, on this machine only.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// The `chroma` program; by default the one in .venv/bin, else the one on PATH.
    #[arg(long)]
    chroma: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct StatusArgs {
    /// Where a Diptych answers: its admin address, or the address for clients.
    #[arg(long, conflicts_with = "config")]
    url: Option<String>,
    /// Its configuration file, to find the address in.
    #[arg(long, short, env = "DIPTYCH_CONFIG")]
    config: Option<PathBuf>,
    /// Print what it answers, as it is.
    #[arg(long)]
    json: bool,
}

/// Parses the command line and carries it out.
pub fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Check { config } => check::check(config.as_deref()),
        Command::Dev(args) => dev::dev(&args),
        Command::Status(args) => status::status(&args),
        Command::Schema => {
            println!("{:#}", crate::config::json_schema());
            ExitCode::SUCCESS
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        super::Cli::command().debug_assert();
    }
}
