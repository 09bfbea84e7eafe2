//! Which of the writes that wait become one upstream batch.
//!
//! Whatever waits in a lane is unacknowledged, hence concurrent: any order of it is right. The first write always goes
//! first, so nobody starves. A later one joins it past others that cannot, unless they share a record; nothing passes
//! an exclusive entry, or a write of which nobody knows yet what records it is about.

use std::collections::{HashSet, VecDeque};

use super::Waiting;
use crate::chroma::BatchLimits;

/// Entries and records that are looked at for one batch.
const MOST_ENTRIES: usize = 1024;
const MOST_RECORDS: usize = 16_384;

/// What combining has to know of a write.
pub trait Write {
    /// Only writes that have the same can be one.
    type Kind: PartialEq;

    /// `None`: it goes alone.
    fn kind(&self) -> Option<Self::Kind>;
    /// Records it is about; `None` while nobody knows.
    fn ids(&self) -> Option<&[String]>;
    /// What it weighs in memory and in a batch.
    fn bytes(&self) -> usize;
}

/// The first waiting write and those that join it, by position; empty when an exclusive entry is first.
pub(super) fn choose<W: Write>(entries: &VecDeque<Waiting<W>>, limits: BatchLimits) -> Vec<usize> {
    let Some(Waiting::Write { write: first, .. }) = entries.front() else {
        return vec![];
    };
    let mut chosen = vec![0];
    let (Some(kind), Some(ids)) = (first.kind(), first.ids()) else {
        return chosen;
    };
    let mut taken = (ids.len(), first.bytes());
    let mut seen: HashSet<&str> = ids.iter().map(String::as_str).collect();
    for (position, entry) in entries.iter().enumerate().take(MOST_ENTRIES).skip(1) {
        let Waiting::Write { write, .. } = entry else { break };
        let Some(ids) = write.ids() else { break };
        if taken.0 >= limits.records || seen.len() + ids.len() > MOST_RECORDS {
            break;
        }
        let more = (ids.len(), write.bytes());
        let joins = limits.admit(taken, more)
            && ids.iter().all(|id| !seen.contains(id.as_str()))
            && write.kind().is_some_and(|its| its == kind);
        if joins {
            chosen.push(position);
            taken = (taken.0 + more.0, taken.1 + more.1);
        }
        seen.extend(ids.iter().map(String::as_str));
    }
    chosen
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    struct One {
        kind: Option<char>,
        ids: Option<Vec<String>>,
        bytes: usize,
    }

    impl Write for One {
        type Kind = char;

        fn kind(&self) -> Option<char> {
            self.kind
        }

        fn ids(&self) -> Option<&[String]> {
            self.ids.as_deref()
        }

        fn bytes(&self) -> usize {
            self.bytes
        }
    }

    /// `u:a+b` is a write of kind `u` about `a` and `b`; `!` is exclusive, `?` a write about nobody knows what, and `-`
    /// stands for a kind that goes alone.
    fn queue(text: &str) -> VecDeque<Waiting<One>> {
        text.split_whitespace()
            .map(|word| match word {
                "!" => Waiting::Exclusive(oneshot::channel().0),
                "?" => Waiting::Write {
                    ticket: 0,
                    write: One {
                        kind: None,
                        ids: None,
                        bytes: 10,
                    },
                },
                _ => {
                    let (kind, ids) = word.split_once(':').expect("a kind");
                    let ids: Vec<String> = ids.split('+').map(str::to_owned).collect();
                    Waiting::Write {
                        ticket: 0,
                        write: One {
                            kind: kind.chars().next().filter(|kind| *kind != '-'),
                            bytes: 10 * ids.len(),
                            ids: Some(ids),
                        },
                    }
                }
            })
            .collect()
    }

    fn chosen(text: &str, records: usize, bytes: usize) -> Vec<usize> {
        choose(&queue(text), BatchLimits { records, bytes })
    }

    #[test]
    fn writes_of_one_kind_join_the_first_past_others() {
        assert_eq!(chosen("u:a u:b u:c", 99, 999), [0, 1, 2]);
        assert_eq!(chosen("u:a d:b u:c d:d u:e", 99, 999), [0, 2, 4]);
        assert_eq!(chosen("u:a -:b u:c", 99, 999), [0, 2]);
    }

    #[test]
    fn a_record_keeps_the_order_of_its_writes() {
        assert_eq!(chosen("u:a u:a u:b", 99, 999), [0, 2]);
        assert_eq!(chosen("u:a d:b u:b u:c", 99, 999), [0, 3]);
        assert_eq!(chosen("u:a u:a+b u:b u:c", 99, 999), [0, 3], "b was passed already");
    }

    #[test]
    fn nothing_passes_an_exclusive_entry_or_a_delete_of_unknown_records() {
        assert_eq!(chosen("u:a u:b ! u:c", 99, 999), [0, 1]);
        assert_eq!(chosen("u:a ? u:b", 99, 999), [0]);
        assert_eq!(chosen("! u:a u:b", 99, 999), Vec::<usize>::new());
    }

    #[test]
    fn the_first_goes_whatever_it_is() {
        assert_eq!(chosen("? u:a", 99, 999), [0]);
        assert_eq!(chosen("-:a -:b", 99, 999), [0]);
        assert_eq!(chosen("u:a+b+c u:d", 2, 999), [0], "larger than a batch: alone");
        assert_eq!(chosen("u:a u:b", 99, 5), [0]);
    }

    #[test]
    fn a_batch_ends_at_its_limits() {
        assert_eq!(chosen("u:a u:b+c u:d u:e", 3, 999), [0, 1]);
        assert_eq!(
            chosen("u:a u:b+c+d u:e u:f", 3, 999),
            [0, 2, 3],
            "one that is too large is passed"
        );
        assert_eq!(chosen("u:a u:b u:c", 99, 20), [0, 1]);
        assert_eq!(chosen("u:a u:b u:c", 1, 999), [0]);
    }

    #[test]
    fn the_search_has_an_end() {
        let text = format!("u:a {} u:z", (0..2000).map(|n| format!("d:{n} ")).collect::<String>());
        assert_eq!(chosen(&text, 99, 999), [0]);
    }
}
