//! The command line.

mod run;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

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
    Run {
        /// Configuration file; without one the defaults apply.
        #[arg(long, short)]
        config: Option<PathBuf>,
    },
}

/// Parses the command line and carries it out.
pub fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run { config } => run::run(config.as_deref()),
    }
}
