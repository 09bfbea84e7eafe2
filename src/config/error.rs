//! Why a configuration could not be read, and where.
//!
//! There is one kind of error here, because there is one thing to do about it: open the file at that place. What a
//! configuration *says* is judged afterwards, by [`validate`](super::Config::validate), which finds everything at once
//! instead of stopping at the first.

use std::fmt;
use std::path::{Path, PathBuf};

/// A configuration that could not be read: `file:line:column: message`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{message}", Place(.file.as_deref(), .line, .column))]
pub struct ConfigError {
    /// The file, when the text came from one.
    pub file: Option<PathBuf>,
    /// Line of the offending key or value, from 1.
    pub line: Option<usize>,
    /// Column of the offending key or value, from 1.
    pub column: Option<usize>,
    /// What is wrong and what would be right. References to variables are quoted, not the text they hold.
    pub message: String,
}

impl ConfigError {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self {
            file: None,
            line: None,
            column: None,
            message: message.into(),
        }
    }

    pub(super) fn in_file(mut self, file: &Path) -> Self {
        self.file = Some(file.to_path_buf());
        self
    }
}

impl From<serde_yaml::Error> for ConfigError {
    fn from(error: serde_yaml::Error) -> Self {
        let mut message = error.to_string();
        let Some(location) = error.location() else {
            return Self::new(message);
        };
        let (line, column) = (location.line(), location.column());
        // The place has fields of its own; said twice it would only be noise.
        message = message.replacen(&format!(" at line {line} column {column}"), "", 1);
        Self {
            line: Some(line),
            column: Some(column),
            ..Self::new(message)
        }
    }
}

struct Place<'a>(Option<&'a Path>, &'a Option<usize>, &'a Option<usize>);

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0, self.1, self.2) {
            (Some(file), Some(line), Some(column)) => write!(f, "{}:{line}:{column}: ", file.display()),
            (None, Some(line), Some(column)) => write!(f, "line {line}, column {column}: "),
            (Some(file), ..) => write!(f, "{}: ", file.display()),
            (None, ..) => Ok(()),
        }
    }
}
