//! What a request body may do to a node, known before a node sees it.
//!
//! Every mutating body is sorted into one of three. *Ours*: it parses, carries nothing that harms a node or makes two
//! nodes differ, and we know what it addresses. *Refused*: a node would take it, or is changed by refusing it, so we
//! answer it ourselves. *Malformed*: Chroma certainly refuses it while reading it, before anything happens; it goes to
//! one node as it is, for Chroma's own wording.
//!
//! The invariant behind this: **nothing that Chroma would take is ever malformed**. Malformed is therefore only what
//! fails in the same reader (serde_json, with Chroma's own field types), and what Chroma reads more loosely than one
//! would think is refused here: an array in place of the outermost object (serde takes structs as sequences, Chroma
//! accepts them), and invalid UTF-8 (taken in fields that it ignores). The other direction is harmless: what we take
//! and Chroma does not, every node refuses alike.
//!
//! Bodies are parsed once. Embeddings, most of the bytes, are skipped over and counted, never read as numbers.

mod delete;
mod metadata;
mod namespace;
mod record;
mod splice;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use delete::{DeleteBody, parse_delete};
pub use namespace::{CreateBody, ModifyBody, parse_create, parse_modify, parse_name};
pub use record::{RecordBody, parse_record};
pub use splice::{BatchLimits, MOST_RECORDS, Piece, Shape, splice};

/// An answer of ours in Chroma's form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status.
    pub status: u16,
    /// Chroma's name for the class of error, see chroma-facts.md 1.2.
    pub error: &'static str,
    /// What is wrong, naming the record or key.
    pub message: String,
}

impl Refusal {
    /// 400, as Chroma answers what it validates.
    pub fn invalid(message: impl Into<String>) -> Refusal {
        Refusal {
            status: 400,
            error: "InvalidArgumentError",
            message: message.into(),
        }
    }

    /// 501, as Chroma answers what a single node cannot do.
    pub fn unimplemented(message: impl Into<String>) -> Refusal {
        Refusal {
            status: 501,
            error: "ChromaError",
            message: message.into(),
        }
    }

    /// `{"error":..,"message":..}`.
    pub fn body(&self) -> Bytes {
        #[derive(Serialize)]
        struct Body<'a> {
            error: &'a str,
            message: &'a str,
        }
        let body = Body {
            error: self.error,
            message: &self.message,
        };
        serde_json::to_vec(&body).expect("strings serialise").into()
    }
}

/// Why a body is not a write that can be mirrored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParseProblem {
    /// Chroma refuses it while reading it (400 or 422): ask one node, nothing can have been applied.
    Malformed,
    /// No node may see it: this is the answer.
    Refused(Refusal),
}

impl From<Refusal> for ParseProblem {
    fn from(refusal: Refusal) -> Self {
        ParseProblem::Refused(refusal)
    }
}

/// Reads a body whose outermost value has to be an object.
fn read<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, ParseProblem> {
    let text = std::str::from_utf8(body).map_err(|_| Refusal::invalid("The request body is not valid UTF-8"))?;
    if text.trim_start_matches([' ', '\t', '\r', '\n']).starts_with('[') {
        let message = "Failed to deserialize the JSON body into the target type: an object is expected, not an array";
        return Err(Refusal {
            status: 422,
            error: "ChromaError",
            message: message.to_owned(),
        }
        .into());
    }
    serde_json::from_str(text).map_err(|_| ParseProblem::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_reads_like_chroma() {
        let refusal = Refusal::invalid("key \"a\"");
        assert_eq!(
            refusal.body(),
            r#"{"error":"InvalidArgumentError","message":"key \"a\""}"#
        );
        assert_eq!((refusal.status, Refusal::unimplemented("").status), (400, 501));
    }

    #[test]
    fn an_outermost_array_is_refused_because_chroma_takes_it() {
        for body in [r#"["name"]"#, " \n[", "[]"] {
            assert!(
                matches!(parse_name(body.as_bytes()), Err(ParseProblem::Refused(_))),
                "{body}"
            );
        }
    }
}
