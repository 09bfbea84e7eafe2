//! What the client writes: a script of up to four writes to up to two records, and what each does to a record.

use std::fmt;

/// Writes a script can have.
pub const MAX_WRITES: usize = 4;
/// Records there are.
pub const RECORDS: usize = 2;

/// A record as a node holds it. Two fields suffice to see a merge that kept what it should not have.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fields {
    pub first: u8,
    pub second: u8,
}

/// `None`: the record is absent.
pub type Record = Option<Fields>;

pub fn show(record: Record) -> String {
    record.map_or("-".into(), |fields| format!("{fields:?}"))
}

impl fmt::Debug for Fields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({},{})", self.first, self.second)
    }
}

/// What Chroma does with a record: upsert merges, update of an absent record and add of a present one do nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// Upsert that sets the first field.
    UpsertFirst(u8),
    /// Upsert that sets the second field.
    UpsertSecond(u8),
    /// Update of the first field.
    Update(u8),
    Add(u8),
    Delete,
}

impl Kind {
    pub fn apply(self, record: Record) -> Record {
        let merged = record.unwrap_or(Fields { first: 0, second: 0 });
        match self {
            Kind::UpsertFirst(first) => Some(Fields { first, ..merged }),
            Kind::UpsertSecond(second) => Some(Fields { second, ..merged }),
            Kind::Update(first) => record.map(|fields| Fields { first, ..fields }),
            Kind::Add(first) => record.or(Some(Fields { first, second: 0 })),
            Kind::Delete => None,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Write {
    pub id: usize,
    pub kind: Kind,
}

/// Reads `u1,v2,p3,a1,d,u1y`: upsert of the first field, of the second, update, add, delete; `y` means the second
/// record.
///
/// # Errors
/// A sentence about the first word that is no write, or about the number of writes.
pub fn parse(text: &str) -> Result<Vec<Write>, String> {
    let writes = text.split(',').map(parse_write).collect::<Result<Vec<_>, _>>()?;
    if writes.len() > MAX_WRITES {
        return Err(format!(
            "a script has at most {MAX_WRITES} writes, not {}",
            writes.len()
        ));
    }
    Ok(writes)
}

fn parse_write(word: &str) -> Result<Write, String> {
    let wrong = || format!("no write: {word:?} (one of u1, v1, p1, a1, d; y behind it for the second record)");
    let (what, id) = match word.strip_suffix('y') {
        Some(what) => (what, 1),
        None => (word, 0),
    };
    let mut rest = what.chars();
    let letter = rest.next().ok_or_else(wrong)?;
    let value = || rest.as_str().parse().map_err(|_| wrong());
    let kind = match letter {
        'u' => Kind::UpsertFirst(value()?),
        'v' => Kind::UpsertSecond(value()?),
        'p' => Kind::Update(value()?),
        'a' => Kind::Add(value()?),
        'd' if rest.as_str().is_empty() => Kind::Delete,
        _ => return Err(wrong()),
    };
    Ok(Write { id, kind })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(first: u8, second: u8) -> Record {
        Some(Fields { first, second })
    }

    #[test]
    fn an_upsert_merges() {
        assert_eq!(Kind::UpsertFirst(3).apply(None), fields(3, 0));
        assert_eq!(Kind::UpsertFirst(3).apply(fields(1, 2)), fields(3, 2));
        assert_eq!(Kind::UpsertSecond(3).apply(fields(1, 2)), fields(1, 3));
    }

    #[test]
    fn an_update_needs_the_record() {
        assert_eq!(Kind::Update(3).apply(None), None);
        assert_eq!(Kind::Update(3).apply(fields(1, 2)), fields(3, 2));
    }

    #[test]
    fn an_add_leaves_what_is_there() {
        assert_eq!(Kind::Add(3).apply(None), fields(3, 0));
        assert_eq!(Kind::Add(3).apply(fields(1, 2)), fields(1, 2));
    }

    #[test]
    fn a_delete_removes() {
        assert_eq!(Kind::Delete.apply(fields(1, 2)), None);
        assert_eq!(Kind::Delete.apply(None), None);
    }

    /// Why a drain that crashed must not repeat more than one request (I27, schedule S32).
    #[test]
    fn a_second_pass_can_differ_from_the_first() {
        let pass = |record| Kind::UpsertSecond(2).apply(Kind::Update(1).apply(record));
        assert_ne!(pass(pass(None)), pass(None));
    }

    #[test]
    fn parses_a_script() {
        let script = parse("u1,v2,p3,a4y").unwrap();
        let of = |id, kind| Write { id, kind };
        assert_eq!(
            script,
            [
                of(0, Kind::UpsertFirst(1)),
                of(0, Kind::UpsertSecond(2)),
                of(0, Kind::Update(3)),
                of(1, Kind::Add(4)),
            ]
        );
        assert_eq!(parse("d,dy").unwrap(), [of(0, Kind::Delete), of(1, Kind::Delete)]);
    }

    #[test]
    fn refuses_what_is_no_script() {
        for text in ["", "x1", "u", "uy", "d1", "u1,,v2", "u1 v2", "u300", "u1,u1,u1,u1,u1"] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }
}
