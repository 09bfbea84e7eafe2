//! Which of the writes that wait become one upstream batch.
//!
//! Whatever waits in a lane is unacknowledged, hence concurrent: any order of it is right. Clients take turns: first goes
//! the first write of the client that was served longest ago, so that many requests of one client do not hold up the few
//! of another. Others join it past those that cannot, unless they share a record; nothing passes an exclusive entry, or a
//! write of which nobody knows yet what records it is about.

use std::collections::{HashSet, VecDeque};
use std::net::IpAddr;

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
    /// Whose it is.
    fn client(&self) -> Option<IpAddr>;
}

/// The write whose turn it is and those that join it, by position; empty when an exclusive entry is first. `served` says
/// when a client was served for the last time.
pub(super) fn choose<W: Write>(
    entries: &VecDeque<Waiting<W>>,
    limits: BatchLimits,
    served: impl Fn(Option<IpAddr>) -> u64,
) -> Vec<usize> {
    let Some(Waiting::Write { write: first, .. }) = entries.front() else {
        return vec![];
    };
    if first.ids().is_none() {
        return vec![0];
    }
    let before_barrier = entries.iter().take(MOST_ENTRIES).map_while(|entry| match entry {
        Waiting::Write { write, .. } => Some((write, write.ids()?)),
        Waiting::Exclusive(_) => None,
    });
    let writes: Vec<(&W, &[String])> = before_barrier.collect();
    let start = turn(&writes, served);
    let mut chosen = vec![start];
    let (first, ids) = writes[start];
    let Some(kind) = first.kind() else { return chosen };
    let mut taken = (ids.len(), first.bytes());
    let mut seen: HashSet<&str> = ids.iter().map(String::as_str).collect();
    for (position, &(write, ids)) in writes.iter().enumerate().filter(|(position, _)| *position != start) {
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
    chosen.sort_unstable();
    chosen
}

/// The first write of the client that was served longest ago; the first of all, if it is about a record of one before it.
fn turn<W: Write>(writes: &[(&W, &[String])], served: impl Fn(Option<IpAddr>) -> u64) -> usize {
    let mut last = writes[0].0.client();
    let (mut start, mut earliest) = (0, served(last));
    for (position, (write, _)) in writes.iter().enumerate().skip(1) {
        let client = write.client();
        if client == last {
            continue;
        }
        last = client;
        let when = served(client);
        if when < earliest {
            (start, earliest) = (position, when);
        }
    }
    let ids: HashSet<&str> = writes[start].1.iter().map(String::as_str).collect();
    let mut before = writes[..start].iter().flat_map(|(_, ids)| ids.iter());
    match before.by_ref().take(MOST_RECORDS).any(|id| ids.contains(id.as_str())) || before.next().is_some() {
        true => 0,
        false => start,
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    struct One {
        kind: Option<char>,
        ids: Option<Vec<String>>,
        bytes: usize,
        client: Option<IpAddr>,
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

        fn client(&self) -> Option<IpAddr> {
            self.client
        }
    }

    /// `u:a+b` is a write of kind `u` about `a` and `b`, `2/u:a` one of client 2; `!` is exclusive, `?` a write about nobody knows what, and `-`
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
                        client: None,
                    },
                },
                _ => {
                    let (client, word) = word.split_once('/').unwrap_or(("", word));
                    let (kind, ids) = word.split_once(':').expect("a kind");
                    let ids: Vec<String> = ids.split('+').map(str::to_owned).collect();
                    Waiting::Write {
                        ticket: 0,
                        write: One {
                            kind: kind.chars().next().filter(|kind| *kind != '-'),
                            bytes: 10 * ids.len(),
                            ids: Some(ids),
                            client: format!("10.0.0.{client}").parse().ok(),
                        },
                    }
                }
            })
            .collect()
    }

    fn chosen(text: &str, records: usize, bytes: usize) -> Vec<usize> {
        choose(&queue(text), BatchLimits { records, bytes }, |_| 0)
    }

    /// The write whose turn it is; `served`: when clients 0, 1, 2 were served for the last time.
    fn first(text: &str, served: [u64; 3]) -> usize {
        let limits = BatchLimits { records: 1, bytes: 10 };
        let served = |client: Option<IpAddr>| match client {
            Some(IpAddr::V4(address)) => served[usize::from(address.octets()[3])],
            _ => 0,
        };
        choose(&queue(text), limits, served)[0]
    }

    #[test]
    fn clients_take_turns() {
        assert_eq!(first("1/u:a 1/u:b 2/u:c", [0, 0, 0]), 0);
        assert_eq!(first("1/u:a 1/u:b 2/u:c 2/u:d", [0, 5, 4]), 2, "the first of its own");
        assert_eq!(first("1/u:a 2/u:b 0/u:c", [3, 5, 4]), 2);
        assert_eq!(first("1/u:a 2/u:a", [0, 5, 4]), 0, "a record keeps its order");
        assert_eq!(first("1/u:a ! 2/u:b", [0, 5, 4]), 0, "nothing passes it");
        assert_eq!(first("1/u:a ? 2/u:b", [0, 5, 4]), 0);
        assert_eq!(first("? 2/u:b", [0, 5, 4]), 0);
        let queue = queue("1/u:a 1/d:x 2/u:b 1/u:c");
        let limits = BatchLimits { records: 9, bytes: 999 };
        let two_waited = |client: Option<IpAddr>| u64::from(client != "10.0.0.2".parse().ok());
        assert_eq!(
            choose(&queue, limits, two_waited),
            [0, 2, 3],
            "whoever fits comes along"
        );
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
