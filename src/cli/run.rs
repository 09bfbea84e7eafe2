//! `diptych run`.

use std::path::Path;
use std::process::ExitCode;

use super::server::{Serving, serve};
use crate::config::{Config, LogFormat, Severity};

/// Runs until a signal ends it.
pub fn run(args: &super::RunArgs) -> ExitCode {
    let config = match load(args.config.as_deref()) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    start_logging(&config);
    if !report(&config) {
        return ExitCode::FAILURE;
    }
    if args.daemon || config.server.daemon {
        // Pingora would fork after our threads were made, and they would be lost.
        tracing::error!(
            key = "daemon",
            "Running in the background isn't supported: leave that to systemd or a container runtime."
        );
        return ExitCode::FAILURE;
    }
    if args.test {
        tracing::info!("The configuration is good.");
        return ExitCode::SUCCESS;
    }
    let serving = Serving {
        upgrade: args.upgrade,
        at_end: Box::new(|| {}),
    };
    finish(serve(config, serving))
}

/// The configuration in a file, or the defaults.
pub fn load(path: Option<&Path>) -> Result<Config, crate::config::ConfigError> {
    path.map_or_else(|| Ok(Config::default()), Config::load)
}

pub fn finish(outcome: Result<(), String>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            tracing::error!("{reason}");
            ExitCode::FAILURE
        }
    }
}

/// Logs what is to be said about a configuration; false: it cannot run.
pub fn report(config: &Config) -> bool {
    let mut good = true;
    for problem in config.validate() {
        match problem.severity {
            Severity::Error => {
                good = false;
                tracing::error!(key = problem.key, "{}", problem.message);
            }
            Severity::Warning => tracing::warn!(key = problem.key, "{}", problem.message),
            Severity::Note => tracing::info!(key = problem.key, "{}", problem.message),
        }
    }
    good
}

pub fn start_logging(config: &Config) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("DIPTYCH_LOG").unwrap_or_else(|_| {
        let level = &config.log.level;
        // Pingora reports every retried connection as an error.
        tracing_subscriber::EnvFilter::new(format!("{level},pingora_core::connectors=off,sqlx=warn"))
    });
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let _ = match config.log.format {
        LogFormat::Text => builder
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}
