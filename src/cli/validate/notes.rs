//! What a run says while it goes on: a line that is overwritten, on a terminal, and a log in a file, if one is wanted.

use std::cell::RefCell;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::Path;

use chrono::{SecondsFormat, Utc};

/// Where it is said.
#[derive(Default)]
pub struct Notes {
    log: Option<RefCell<File>>,
    /// Overwrite one line on the terminal.
    moving: bool,
}

impl Notes {
    /// `moving`: nothing else is printed there meanwhile.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn new(log: Option<&Path>, moving: bool) -> Result<Self, String> {
        let log = match log {
            Some(path) => {
                let file = File::create(path).map_err(|error| format!("{}: {error}", path.display()))?;
                Some(RefCell::new(file))
            }
            None => None,
        };
        Ok(Self {
            log,
            moving: moving && std::io::stderr().is_terminal(),
        })
    }

    /// A line for the log alone.
    pub fn line(&self, text: &str) {
        if let Some(log) = &self.log {
            let at = Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true);
            // A log that cannot be written is no reason to stop.
            let _ = writeln!(log.borrow_mut(), "{at} {text}");
        }
    }

    /// What is being done now.
    pub fn step(&self, text: &str) {
        self.line(text);
        if self.moving {
            // Without wrapping: of a line that takes two, only one would be taken away again.
            eprint!("\r\x1b[2K\x1b[?7l{text}\x1b[?7h");
        }
    }

    /// Takes the line away.
    pub fn clear(&self) {
        if self.moving {
            eprint!("\r\x1b[2K");
        }
    }
}
