//! `diptych completions` and `diptych man`: made from the command line itself.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use super::Cli;
use super::run::finish;

pub fn completions(shell: Shell) -> ExitCode {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "diptych", &mut text);
    print(&text)
}

pub fn man(dir: Option<&Path>) -> ExitCode {
    let Some(dir) = dir else {
        let mut text = Vec::new();
        return match clap_mangen::Man::new(Cli::command()).render(&mut text) {
            Ok(()) => print(&text),
            Err(error) => finish(Err(error.to_string())),
        };
    };
    let written = std::fs::create_dir_all(dir).and_then(|()| clap_mangen::generate_to(Cli::command(), dir));
    finish(written.map_err(|error| format!("Cannot write to {}: {error}.", dir.display())))
}

/// A reader that has seen enough is no failure.
fn print(text: &[u8]) -> ExitCode {
    let _ = std::io::stdout().write_all(text);
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_and_is_completed() {
        let dir = tempfile::tempdir().unwrap();
        clap_mangen::generate_to(Cli::command(), dir.path()).unwrap();
        let mut expected = vec![];
        let mut completed = Vec::new();
        clap_complete::generate(Shell::Bash, &mut Cli::command(), "diptych", &mut completed);
        let completed = String::from_utf8(completed).unwrap();
        for command in Cli::command().get_subcommands() {
            expected.push(format!("diptych-{}.1", command.get_name()));
            assert!(completed.contains(command.get_name()), "{}", command.get_name());
        }
        for page in expected {
            assert!(dir.path().join(&page).exists(), "{page}");
        }
    }
}
