//! What a node's answer to a write says about the node's state.
//!
//! A status alone says little: a 500 may mean "refused", "not applied", "try again" or "durably logged, and applied
//! whenever the next write comes" (chroma-facts.md 3.3 and 13). This is the table that tells them apart. What is not in
//! it is unknown: to take an unknown outcome for a known one loses writes, the other way round costs a repair.

use memchr::memmem;

use super::Op;

/// What is certain after an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Applied, durable and visible.
    Applied,
    /// The request is at fault; nothing was applied.
    Refused,
    /// The node is at fault; nothing was applied.
    NotApplied,
    /// Nothing was applied, SQLite was busy: worth a retry on the same node.
    Locked,
    /// The node does not know the UUID: its marker tells whether the collection or the node is gone.
    Missing,
    /// It may have been applied, or may be applied later.
    Unknown,
}

/// Judges an answer. 409 to a create is `Refused`: whether it means "already" depends on whose the object is.
pub fn verdict(op: &Op, status: u16, body: &[u8]) -> Verdict {
    let says = |text: &str| memmem::find(body, text.as_bytes()).is_some();
    // Logged before it failed, whatever the status and whatever else the message quotes from SQLite.
    let is_logged = says("Error in compaction") || says("Error sending message to compactor");
    match status {
        200..=299 => Verdict::Applied,
        _ if is_logged => Verdict::Unknown,
        408 | 412 => Verdict::Unknown,
        429 => Verdict::NotApplied,
        404 if is_by_uuid(op) => Verdict::Missing,
        400..=499 | 501 => Verdict::Refused,
        500 if says("UNIQUE constraint failed") => Verdict::Refused,
        500 if says("database is locked") => Verdict::Locked,
        500 if says("disk is full") || says("readonly database") => Verdict::NotApplied,
        _ => Verdict::Unknown,
    }
}

/// Whether Chroma finds the collection by the UUID in the path.
fn is_by_uuid(op: &Op) -> bool {
    match op {
        Op::ModifyCollection { .. } => true,
        Op::Other { generation, .. } => generation.is_some(),
        op => op.is_record(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(message: &str) -> Vec<u8> {
        format!(r#"{{"error":"InternalError","message":"{message}"}}"#).into_bytes()
    }

    #[test]
    fn every_known_answer_has_its_verdict() {
        use Verdict::*;
        let modify = Op::ModifyCollection {
            generation: 1,
            new_name: None,
        };
        let delete = Op::DeleteCollection {
            tenant: "t".into(),
            database: "d".into(),
            name: "c".into(),
            generation: 1,
        };
        let other = |generation| Op::Other {
            method: "POST".into(),
            path: "/x".into(),
            generation,
        };
        let missing = "Collection [45bc6510-e6f3-4641-9b2a-e56088985426] does not exist.";
        let full = "Query error: error returned from database: (code 13) database or disk is full";
        let readonly = "Query error: (code 1032) attempt to write a readonly database";
        let compaction = "Error in compaction: Error getting collection with segments: not found";
        let table = [
            (&Op::Add, 201, "", Applied),
            (&Op::Upsert, 200, "", Applied),
            (&Op::Add, 400, "Inconsistent dimensions in provided embeddings", Refused),
            (&Op::Add, 413, "Payload too large", Refused),
            (&Op::Add, 415, "", Refused),
            (&Op::Add, 422, "Failed to deserialize", Refused),
            (
                &Op::Add,
                501,
                "Sparse vector is not supported for local chroma",
                Refused,
            ),
            (&Op::Add, 404, missing, Missing),
            (&Op::Delete, 404, missing, Missing),
            (&modify, 404, missing, Missing),
            (&other(Some(1)), 404, missing, Missing),
            (&other(None), 404, "", Refused),
            (&delete, 404, "Collection [c] does not exist", Refused),
            (
                &Op::DeleteDatabase {
                    tenant: "t".into(),
                    name: "d".into(),
                },
                404,
                "Database [d] not found",
                Refused,
            ),
            (
                &Op::CreateTenant { name: "t".into() },
                409,
                "Tenant [t] already exists",
                Refused,
            ),
            (&Op::Reset, 403, "Reset is disabled by config", Refused),
            (&Op::Add, 404, compaction, Unknown),
            (&Op::Add, 412, compaction, Unknown),
            (&Op::Add, 412, "", Unknown),
            (&Op::Add, 408, "", Unknown),
            (&Op::Add, 429, "You have been rate limited.", NotApplied),
            (&Op::Add, 500, full, NotApplied),
            (&Op::Add, 500, readonly, NotApplied),
            (&Op::Add, 500, "Error sending message to compactor", Unknown),
            (
                &Op::Add,
                500,
                "Error in compaction: (code 13) database or disk is full",
                Unknown,
            ),
            (
                &Op::Add,
                500,
                "Error in compaction: (code 5) database is locked",
                Unknown,
            ),
            (&modify, 500, "(code 5) database is locked", Locked),
            (&delete, 500, "(code 5) database is locked", Locked),
            (
                &modify,
                500,
                "(code 2067) UNIQUE constraint failed: collections.name, collections.database_id",
                Refused,
            ),
            (&Op::Add, 500, "", Unknown),
            (&Op::Add, 500, "something new", Unknown),
            (&Op::Add, 502, full, Unknown), // not Chroma's: something in between
            (&Op::Add, 503, "", Unknown),
            (&Op::Add, 504, "", Unknown),
            (&Op::Add, 302, "", Unknown),
            (&Op::Add, 101, "", Unknown),
        ];
        for (op, status, message, expected) in table {
            assert_eq!(
                verdict(op, status, &body(message)),
                expected,
                "{} {status} {message}",
                op.label()
            );
        }
    }
}
