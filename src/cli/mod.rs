//! The command line.
//!
//! `run` and `dev` end in the same `server::serve`; the only difference is who started the nodes. Exit codes: 0 it is
//! well, 1 it is not; `status` has its own three. What changes something talks to the admin address of a running Diptych
//! only, and asks for `--yes` where something is lost by it.

mod ask;
mod check;
mod client;
mod dev;
mod health;
mod manual;
mod progress;
mod run;
mod server;
mod shutdown;
mod status;
mod validate;
mod verbs;

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
    Status(status::StatusArgs),
    /// One line for monitoring and containers. Exit code: 0 ok, 1 warning, 2 critical, 3 unknown.
    Health(health::HealthArgs),
    /// What the log keeps for nodes that are away, and what was parked.
    #[command(subcommand)]
    Wal(verbs::Wal),
    /// Repairs that are open.
    #[command(subcommand)]
    Repairs(verbs::Repairs),
    /// Hold or wait for the work that brings nodes back in step.
    #[command(subcommand)]
    Drain(verbs::Drain),
    /// Take a node out of service and back, or decide about it.
    #[command(subcommand)]
    Node(verbs::NodeVerb),
    /// Compare the nodes, record by record. Exit code: 0 equal, 1 not.
    Verify(verbs::VerifyArgs),
    /// Copy a collection to a node from another.
    Resync(verbs::ResyncArgs),
    /// What happened: nodes that went down and came back, what operators did.
    Events(verbs::EventsArgs),
    /// Which UUID a collection has on which node.
    #[command(subcommand)]
    Mapping(verbs::Mapping),
    /// Print what makes a shell complete these commands.
    Completions { shell: clap_complete::Shell },
    /// Print the manual page, or write all of them.
    Man {
        /// Write a page for each command into this folder.
        #[arg(long)]
        dir: Option<PathBuf>,
    },
    /// Prove on a deployed system that it works. Exit code: 0 all passed, 1 something failed, 2 it could not run.
    Validate(Box<validate::ValidateArgs>),
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

/// Which Diptych to ask, and how to print what it answers.
#[derive(Debug, Args)]
struct Where {
    /// Where a Diptych answers: its admin address; for `status`, the address for clients does too.
    #[arg(long, conflicts_with = "config")]
    url: Option<String>,
    /// Its configuration file, to find the address and the token in.
    #[arg(long, short, env = "DIPTYCH_CONFIG")]
    config: Option<PathBuf>,
    /// Print what it answers, as it is.
    #[arg(long)]
    json: bool,
}

/// Parses the command line and carries it out.
pub fn main() -> ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|error| {
        if error.use_stderr() && std::env::args().nth(1).as_deref() == Some("health") {
            let _ = error.print();
            std::process::exit(health::UNKNOWN.into());
        }
        error.exit()
    });
    match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Check { config } => check::check(config.as_deref()),
        Command::Dev(args) => dev::dev(&args),
        Command::Status(args) => status::status(&args),
        Command::Wal(verb) => verbs::wal(&verb),
        Command::Repairs(verb) => verbs::repairs(&verb),
        Command::Drain(verb) => verbs::drain(&verb),
        Command::Node(verb) => verbs::node(&verb),
        Command::Verify(args) => verbs::verify(&args),
        Command::Resync(args) => verbs::resync(&args),
        Command::Health(args) => health::health(&args),
        Command::Completions { shell } => manual::completions(shell),
        Command::Man { dir } => manual::man(dir.as_deref()),
        Command::Events(args) => verbs::events(&args),
        Command::Mapping(verb) => verbs::mapping(&verb),
        Command::Validate(args) => validate::validate(&args),
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
