//! The decision table of design.md 4.6: from what the nodes did with one entry to what is logged and answered.
//!
//! Pure, over any number of nodes. The *lead* is the first node, in configured order, that gave an answer: applied or
//! refused. Its answer is the client's. Every other node is compared with it:
//!
//! | lead | other applied | other refused | other failed for certain | other unknown | collection missing on other |
//! |---|---|---|---|---|---|
//! | applied | - | payload + repair | payload | payload, in doubt | payload + repair |
//! | refused | repair | repair if the refusals differ | payload if a refusal has effects | repair | repair |
//!
//! Without a lead: everything failed for certain is 503 and nothing anywhere; anything unknown is payload rows for all
//! and 504, unless every node said the same, which makes it the request's fault.

use bytes::Bytes;

/// What one node did with an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Applied,
    /// Refused, nothing applied. `sign` is the answer with UUIDs normalised: two nodes that agree give the same.
    Refused {
        sign: Bytes,
    },
    /// Certain: not applied. The node was down, behind, or said that it could not.
    Failed,
    /// Certain: not applied, because the node does not have a collection that it should have.
    Missing,
    Unknown(Doubt),
}

/// Why an outcome is unknown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Doubt {
    /// It answered with an error that may have been applied.
    Answered { sign: Bytes },
    /// It closed the connection without an answer.
    Closed,
    /// It had not answered when waiting ended.
    Silent,
}

/// What has to be durable for one node before the client is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cover {
    pub payload: Option<Payload>,
    pub repair: bool,
}

/// How a payload row is marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Payload {
    pub in_doubt: bool,
    /// The lead refused it: the node is expected to refuse it too.
    pub refused: bool,
}

/// What the client is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// What this node answered.
    Of(usize),
    /// No node took it and none has it: 503.
    Unavailable,
    /// It may or may not be applied; the log sees to it that all nodes agree: 504.
    Indefinite,
    /// Every node closed the connection on this request: 502.
    Closed,
}

/// The decision on one entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// By node.
    pub covers: Vec<Cover>,
    pub reply: Reply,
    /// The node that the others are repaired from.
    pub source: Option<usize>,
    /// No refusal is behind the repairs: should the source be lost, another node will do (schedule S34).
    pub reversible: bool,
}

/// What else the decision depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Circumstances {
    /// A refusal can change a node: the collection's dimension is not known to be set.
    pub refusal_has_effects: bool,
    /// Every node that closed its connection passed a probe afterwards.
    pub closed_nodes_are_alive: bool,
}

/// Decides on the outcomes of one entry, one per node in configured order.
pub fn decide(outcomes: &[Outcome], circumstances: Circumstances) -> Decision {
    let lead = outcomes
        .iter()
        .position(|outcome| matches!(outcome, Outcome::Applied | Outcome::Refused { .. }));
    match lead {
        Some(lead) => {
            let covers = outcomes
                .iter()
                .enumerate()
                .map(|(node, outcome)| match node == lead {
                    true => Cover::default(),
                    false => against_lead(&outcomes[lead], outcome, circumstances),
                })
                .collect();
            Decision {
                covers,
                reply: Reply::Of(lead),
                source: Some(lead),
                reversible: false,
            }
        }
        None => without_lead(outcomes, circumstances),
    }
}

const MISSED: Option<Payload> = Some(Payload {
    in_doubt: false,
    refused: false,
});
const IN_DOUBT: Option<Payload> = Some(Payload {
    in_doubt: true,
    refused: false,
});
const EXPECTED_REFUSAL: Option<Payload> = Some(Payload {
    in_doubt: false,
    refused: true,
});

fn against_lead(lead: &Outcome, other: &Outcome, circumstances: Circumstances) -> Cover {
    let cover = |payload, repair| Cover { payload, repair };
    match lead {
        Outcome::Refused { sign } => match other {
            Outcome::Refused { sign: theirs } => cover(None, sign != theirs),
            Outcome::Failed => cover(EXPECTED_REFUSAL.filter(|_| circumstances.refusal_has_effects), false),
            Outcome::Applied | Outcome::Unknown(_) | Outcome::Missing => cover(None, true),
        },
        _ => match other {
            Outcome::Applied => cover(None, false),
            Outcome::Refused { .. } | Outcome::Missing => cover(MISSED, true),
            Outcome::Failed => cover(MISSED, false),
            Outcome::Unknown(_) => cover(IN_DOUBT, false),
        },
    }
}

fn without_lead(outcomes: &[Outcome], circumstances: Circumstances) -> Decision {
    let none = Cover::default();
    let repair_missing = |outcome: &Outcome| {
        // A node that lost the collection is known to differ, whatever becomes of this entry; but the last one that may
        // still hold it is never given up.
        let others_hold_it = outcomes.iter().any(|other| !matches!(other, Outcome::Missing));
        Cover {
            payload: None,
            repair: *outcome == Outcome::Missing && others_hold_it,
        }
    };
    if !outcomes.iter().any(|outcome| matches!(outcome, Outcome::Unknown(_))) {
        let covers = outcomes.iter().map(repair_missing).collect();
        return Decision {
            covers,
            reply: Reply::Unavailable,
            source: None,
            reversible: false,
        };
    }
    let all_same = outcomes.len() > 1 && outcomes.windows(2).all(|pair| pair[0] == pair[1]);
    let fault_of_request = match &outcomes[0] {
        Outcome::Unknown(Doubt::Answered { .. }) => all_same.then_some(Reply::Of(0)),
        Outcome::Unknown(Doubt::Closed) => (all_same && circumstances.closed_nodes_are_alive).then_some(Reply::Closed),
        _ => None,
    };
    if let Some(reply) = fault_of_request {
        // Replaying would fail for ever; whatever each node made of it is made equal to the first.
        let covers = (0..outcomes.len())
            .map(|node| Cover {
                payload: None,
                repair: node > 0,
            })
            .collect();
        return Decision {
            covers,
            reply,
            source: Some(0),
            reversible: true,
        };
    }
    let covers = outcomes
        .iter()
        .map(|outcome| match outcome {
            Outcome::Unknown(_) => Cover {
                payload: IN_DOUBT,
                ..none
            },
            Outcome::Missing => Cover {
                payload: MISSED,
                ..repair_missing(outcome)
            },
            _ => Cover {
                payload: MISSED,
                ..none
            },
        })
        .collect();
    Decision {
        covers,
        reply: Reply::Indefinite,
        source: None,
        reversible: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Circumstances = Circumstances {
        refusal_has_effects: false,
        closed_nodes_are_alive: true,
    };

    fn refused(text: &'static str) -> Outcome {
        Outcome::Refused {
            sign: Bytes::from_static(text.as_bytes()),
        }
    }

    fn answered(text: &'static str) -> Outcome {
        Outcome::Unknown(Doubt::Answered {
            sign: Bytes::from_static(text.as_bytes()),
        })
    }

    fn all_outcomes() -> Vec<Outcome> {
        vec![
            Outcome::Applied,
            refused("a"),
            refused("b"),
            Outcome::Failed,
            Outcome::Missing,
            answered("a"),
            answered("b"),
            Outcome::Unknown(Doubt::Closed),
            Outcome::Unknown(Doubt::Silent),
        ]
    }

    /// What the table of design.md 4.6 says, cell by cell, written independently of the code: first, other, reply.
    fn table(lead: &Outcome, other: &Outcome, with: Circumstances) -> (&'static str, &'static str, Reply) {
        use Outcome::*;
        let dimension_row = if with.refusal_has_effects {
            "refused-payload"
        } else {
            "-"
        };
        match (lead, other) {
            (Applied, Applied) => ("-", "-", Reply::Of(0)),
            (Applied, Refused { .. } | Missing) => ("-", "payload+repair", Reply::Of(0)),
            (Applied, Failed) => ("-", "payload", Reply::Of(0)),
            (Applied, Unknown(_)) => ("-", "doubt", Reply::Of(0)),
            (Refused { .. }, Applied | Unknown(_) | Missing) => ("-", "repair", Reply::Of(0)),
            (Refused { sign: a }, Refused { sign: b }) => ("-", if a == b { "-" } else { "repair" }, Reply::Of(0)),
            (Refused { .. }, Failed) => ("-", dimension_row, Reply::Of(0)),
            (Failed, Applied) => ("payload", "-", Reply::Of(1)),
            (Failed, Refused { .. }) => (dimension_row, "-", Reply::Of(1)),
            (Failed, Failed) => ("-", "-", Reply::Unavailable),
            (Failed, Unknown(_)) => ("payload", "doubt", Reply::Indefinite),
            (Failed, Missing) => ("-", "repair", Reply::Unavailable),
            (Missing, Applied) => ("payload+repair", "-", Reply::Of(1)),
            (Missing, Refused { .. }) => ("repair", "-", Reply::Of(1)),
            (Missing, Failed) => ("repair", "-", Reply::Unavailable),
            (Missing, Missing) => ("-", "-", Reply::Unavailable),
            (Missing, Unknown(_)) => ("payload+repair", "doubt", Reply::Indefinite),
            (Unknown(_), Applied) => ("doubt", "-", Reply::Of(1)),
            (Unknown(_), Refused { .. }) => ("repair", "-", Reply::Of(1)),
            (Unknown(_), Failed) => ("doubt", "payload", Reply::Indefinite),
            (Unknown(_), Missing) => ("doubt", "payload+repair", Reply::Indefinite),
            (Unknown(Doubt::Answered { sign: a }), Unknown(Doubt::Answered { sign: b })) if a == b => {
                ("-", "repair", Reply::Of(0))
            }
            (Unknown(Doubt::Closed), Unknown(Doubt::Closed)) if with.closed_nodes_are_alive => {
                ("-", "repair", Reply::Closed)
            }
            (Unknown(_), Unknown(_)) => ("doubt", "doubt", Reply::Indefinite),
        }
    }

    fn show(cover: Cover) -> &'static str {
        match (cover.payload, cover.repair) {
            (None, false) => "-",
            (None, true) => "repair",
            (MISSED, false) => "payload",
            (MISSED, true) => "payload+repair",
            (IN_DOUBT, false) => "doubt",
            (EXPECTED_REFUSAL, false) => "refused-payload",
            other => panic!("no cell says {other:?}"),
        }
    }

    #[test]
    fn every_cell_of_the_table_for_two_nodes() {
        for refusal_has_effects in [false, true] {
            for closed_nodes_are_alive in [false, true] {
                let with = Circumstances {
                    refusal_has_effects,
                    closed_nodes_are_alive,
                };
                for first in all_outcomes() {
                    for second in all_outcomes() {
                        let decision = decide(&[first.clone(), second.clone()], with);
                        let seen = (show(decision.covers[0]), show(decision.covers[1]), decision.reply);
                        assert_eq!(seen, table(&first, &second, with), "{first:?} / {second:?} / {with:?}");
                    }
                }
            }
        }
    }

    /// P1 and R3, for two and three nodes: an acknowledged entry is applied somewhere, and every other node has it or a
    /// row; and R2: never does every node get a repair row.
    #[test]
    fn an_acknowledged_entry_is_covered_on_every_node() {
        let all = all_outcomes();
        let mut cases: Vec<Vec<Outcome>> = vec![];
        for a in &all {
            cases.push(vec![a.clone()]);
            for b in &all {
                cases.push(vec![a.clone(), b.clone()]);
                for c in &all {
                    cases.push(vec![a.clone(), b.clone(), c.clone()]);
                }
            }
        }
        for outcomes in cases {
            let decision = decide(&outcomes, PLAIN);
            assert_eq!(decision.covers.len(), outcomes.len());
            assert!(
                decision.covers.iter().any(|cover| !cover.repair),
                "no authority is left: {outcomes:?}"
            );
            let acked = matches!(decision.reply, Reply::Of(node) if outcomes[node] == Outcome::Applied);
            for (outcome, cover) in outcomes.iter().zip(&decision.covers) {
                if acked {
                    assert!(*outcome == Outcome::Applied || cover.payload.is_some(), "{outcomes:?}");
                }
                if *outcome == Outcome::Applied {
                    assert_eq!(cover.payload, None, "applied once is enough: {outcomes:?}");
                }
                if decision.reply == Reply::Unavailable {
                    assert_eq!(cover.payload, None, "503 leaves nothing behind: {outcomes:?}");
                }
            }
        }
    }
}
