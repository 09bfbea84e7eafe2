//! What is searched and what has to come out: no violation with all rules, one with any rule off.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::names::{self, NameModel, NameRule};
use crate::records::{self, RecordModel, RecordRule};
use crate::rules::{Rule, Rules};
use crate::search::{Limits, Report, Verdict, search};

/// States one search may visit. The largest configuration has half of that; two searches at once stay below 3 GB.
pub const STATES: usize = 12_000_000;

/// Searches at once.
const THREADS: usize = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    All,
    /// What takes seconds: small configurations, and each rule off where it is known to be missed.
    Fast,
}

/// A configuration and why it is there.
struct Case {
    config: &'static str,
    why: &'static str,
    /// Searched in the fast run, too.
    small: bool,
    /// Rules whose absence shows here, and in none before it: where the fast run looks.
    finds: &'static [RecordRule],
}

const RECORDS: &[Case] = &[
    Case {
        config: "script=u1,v2 kill-a=1 kill-b=1 kill-proxy=1 net=1 hidden=1 journal=1 refuse=1 total=2",
        why: "every single fault and every pair of them, refusals included",
        small: true,
        finds: &[
            RecordRule::RowBeforeAck,
            RecordRule::StragglersAwaited,
            RecordRule::FlushFirst,
            RecordRule::RestartRowBetweenWrites,
            RecordRule::SourceFixedAtRecovery,
            RecordRule::OpenIntentsReconciled,
            RecordRule::RowsWaitForRepair,
            RecordRule::CanaryAtStart,
            RecordRule::LastNodeServes,
        ],
    },
    Case {
        config: "script=u1,v2 kill-a=1 kill-b=1 kill-proxy=1 net=1 hidden=1 journal=1 wipe=1 total=2",
        why: "a node that comes back empty",
        small: true,
        finds: &[],
    },
    Case {
        config: "script=u1,v2 kill-a=1 kill-b=1 snapshot=1 total=2",
        why: "a node that comes back with an old state and the same marker, its peer being there",
        small: true,
        finds: &[RecordRule::RestartedIsCompared],
    },
    Case {
        config: "script=p1,v2,u3 kill-a=1 kill-b=1 kill-proxy=1 net=1 hidden=1 journal=1 total=2",
        why: "an update before the record exists: a second pass over the rows differs from the first",
        small: true,
        finds: &[
            RecordRule::InSyncAfterCommit,
            RecordRule::UncertainHolds,
            RecordRule::CursorPerRequest,
        ],
    },
    Case {
        config: "script=u1,v2,u3 kill-a=1 kill-b=1 kill-proxy=1 net=1 hidden=1 journal=1 dead-a total=2",
        why: "the first node never returns: the other has to serve alone",
        small: true,
        finds: &[RecordRule::LostSourceReversed],
    },
    Case {
        config: "script=a1,d,a2 kill-a=1 kill-b=1 kill-proxy=1 net=1 hidden=1 journal=1 total=2",
        why: "add and delete: they do not merge, and order shows",
        small: true,
        finds: &[],
    },
    Case {
        config: "script=u1,v2y,v3 kill-a=1 kill-b=1 kill-proxy=1 net=1 hidden=1 journal=1 total=2",
        why: "two records: rows of one beside a repair of the other",
        small: true,
        finds: &[],
    },
    Case {
        config: "script=u1,v2 kill-a=1 kill-b=1 kill-proxy=2 net=1 hidden=1 journal=1 wipe=1 total=3",
        why: "the proxy dies again while it recovers",
        small: false,
        finds: &[
            RecordRule::UncertainIsRetried,
            RecordRule::RepairReadsBetweenWrites,
            RecordRule::CanaryEvenIfClean,
            RecordRule::LowWaterNeedsCover,
        ],
    },
    Case {
        config: "script=p1,v2 kill-a=1 kill-b=1 kill-proxy=1 net=1 hidden=1 journal=1 dead-a total=3",
        why: "the source of a repair dies for good when rows and copies are mixed on the target",
        small: false,
        finds: &[RecordRule::DrainBeforeRepair],
    },
    Case {
        config: "script=p1,v2 kill-a=1 kill-b=1 kill-proxy=1 net=1 hidden=1 journal=1 dead-b total=3",
        why: "the same with the second node",
        small: false,
        finds: &[],
    },
    Case {
        config: "script=p1,v2 kill-a=1 kill-b=1 kill-proxy=1 net=1 hidden=1 journal=1 wipe=1 total=3",
        why: "payload rows beside the repair of a wiped node",
        small: false,
        finds: &[RecordRule::RepairRemovesRows],
    },
    Case {
        config: "script=u1,v2 kill-a=1 kill-b=1 kill-proxy=1 net=1 hidden=1 journal=1 wipe=1 refuse=1 total=3",
        why: "a refusal and a wipe: each node could be repaired from the other",
        small: false,
        finds: &[RecordRule::PayloadBesideRepair, RecordRule::SourceIsSound],
    },
    Case {
        config: "script=p1,v2,u3 kill-a=1 kill-b=1 kill-proxy=2 net=2 hidden=1 journal=1 total=3",
        why: "the largest without losses of data: any three faults around three writes",
        small: false,
        finds: &[],
    },
    Case {
        config: "script=u1,v2,u3 kill-a=1 kill-b=1 kill-proxy=1 net=1 hidden=1 journal=1 dead-a total=3",
        why: "any three faults, and the first node never returns",
        small: false,
        finds: &[],
    },
];

const NAMES: &[Case] = &[
    Case {
        config: "script=dcw kill-a=1 kill-b=1 kill-proxy=1 net=1 total=2",
        why: "a name is deleted, created again and filled",
        small: true,
        finds: &[],
    },
    Case {
        config: "script=dcd kill-a=1 kill-b=1 kill-proxy=1 net=1 total=2",
        why: "the second delete must not hit another generation than it means",
        small: true,
        finds: &[],
    },
    Case {
        config: "script=cdc kill-a=1 kill-b=1 kill-proxy=1 net=1 total=2",
        why: "a create of a name that is taken",
        small: true,
        finds: &[],
    },
    Case {
        config: "script=dcdc kill-a=1 kill-b=1 kill-proxy=1 net=2 total=3",
        why: "two generations come and go",
        small: false,
        finds: &[],
    },
    Case {
        config: "script=dccw kill-a=1 kill-b=1 kill-proxy=1 net=1 total=3",
        why: "a create that may have happened, and is asked for again",
        small: false,
        finds: &[],
    },
    Case {
        config: "script=dcwd kill-a=1 kill-b=1 kill-proxy=1 net=1 total=3",
        why: "records of a generation that goes",
        small: false,
        finds: &[],
    },
    Case {
        config: "script=dcww kill-a=1 kill-b=1 kill-proxy=1 net=2 total=3",
        why: "records written to a generation that one node has missed",
        small: false,
        finds: &[],
    },
];

/// What the rules do not promise (docs/invariants.md, "Known limits"): here a violation is right, and a model that
/// finds none has gone blind.
const LIMITS: &[(Kind, Case)] = &[
    (
        Kind::Records,
        Case {
            config: "script=u1,v2 kill-a=1 kill-b=1 kill-proxy=1 net=1 hidden=1 journal=1 read=1 total=2",
            why: "a value that was read before its ack vanishes when a repair row is reversed",
            small: true,
            finds: &[],
        },
    ),
    (
        Kind::Records,
        Case {
            config: "script=u1,v2 kill-a=1 kill-b=1 kill-proxy=1 snapshot=1 total=3",
            why: "the last node up comes back with an old state: checkpoints are not modelled",
            small: true,
            finds: &[],
        },
    ),
    (
        Kind::Names,
        Case {
            config: "script=dcw kill-a=1 kill-b=1 kill-proxy=1 net=1 dead-a total=2",
            why: "the namespace waits for a source that never returns",
            small: true,
            finds: &[],
        },
    ),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Records,
    Names,
}

/// Which rule is off, if any.
#[derive(Debug, Clone, Copy)]
enum Off {
    Nothing,
    Record(RecordRule),
    Name(NameRule),
}

/// Searches that belong together: one after the other until a violation is found.
struct Job {
    off: Off,
    kind: Kind,
    cases: Vec<&'static Case>,
    /// A violation is what has to come out.
    must_fail: bool,
}

/// The last report of a job, and on which case.
struct Done {
    case: &'static Case,
    report: Report,
}

/// Runs the suite and prints what came out; whether it is what has to come out.
pub fn run(extent: Extent) -> bool {
    let jobs = jobs(extent);
    let results = work(&jobs);
    let mut right = true;
    let mut heading = "";
    for (job, done) in jobs.iter().zip(&results) {
        let next = heading_of(job);
        if next != heading {
            heading = next;
            println!("\n{heading}");
        }
        right &= print(job, done);
    }
    let verdict = if right { "as it has to be" } else { "WRONG" };
    println!("\n{} lines, {verdict}", jobs.len());
    right
}

fn jobs(extent: Extent) -> Vec<Job> {
    let chosen = |cases: &'static [Case]| -> Vec<&'static Case> {
        let of_extent = |case: &&Case| extent == Extent::All || case.small;
        cases.iter().filter(of_extent).collect()
    };
    let mut jobs = vec![];
    for (kind, cases) in [(Kind::Records, RECORDS), (Kind::Names, NAMES)] {
        jobs.extend(chosen(cases).into_iter().map(|case| Job {
            off: Off::Nothing,
            kind,
            cases: vec![case],
            must_fail: false,
        }));
    }
    jobs.extend(RecordRule::ALL.iter().map(|&rule| Job {
        off: Off::Record(rule),
        kind: Kind::Records,
        cases: match extent {
            Extent::All => RECORDS.iter().collect(),
            Extent::Fast => RECORDS.iter().filter(|case| case.finds.contains(&rule)).collect(),
        },
        must_fail: true,
    }));
    jobs.extend(NameRule::ALL.iter().map(|&rule| Job {
        off: Off::Name(rule),
        kind: Kind::Names,
        cases: NAMES.iter().collect(),
        must_fail: true,
    }));
    jobs.extend(LIMITS.iter().map(|(kind, case)| Job {
        off: Off::Nothing,
        kind: *kind,
        cases: vec![case],
        must_fail: true,
    }));
    jobs
}

fn heading_of(job: &Job) -> &'static str {
    match (job.off, job.must_fail) {
        (Off::Nothing, false) => "All rules hold: no violation",
        (Off::Nothing, true) => "All rules hold, a known limit: a violation",
        _ => "One rule off: a violation",
    }
}

/// One line; whether it says what has to come out.
fn print(job: &Job, done: &Done) -> bool {
    let Done { case, report } = done;
    let Report {
        verdict,
        states,
        edges,
        quiescent,
        depth,
        path,
    } = report;
    let found = match verdict {
        Verdict::Exhausted => "no violation".into(),
        Verdict::Capped => "NOT ALL STATES SEEN".into(),
        Verdict::Violation(violation) => format!("{} steps to {violation}", path.len()),
    };
    let right = match job.must_fail {
        false => *verdict == Verdict::Exhausted,
        true => matches!(verdict, Verdict::Violation(_)),
    };
    let mark = if right { " " } else { "!" };
    let model = match job.kind {
        Kind::Records => "records",
        Kind::Names => "names",
    };
    match rule_of(job.off) {
        None => {
            println!("{mark} {model:7} {}", case.config);
            println!("      {}", case.why);
            println!("      {found}; {states} states, {edges} edges, {quiescent} quiescent, depth {depth}");
        }
        Some((rule, cites)) => {
            println!("{mark} {rule:27} {cites:9} {found} ({states} states)");
            println!("      {model} {}", case.config);
        }
    }
    right
}

fn rule_of(off: Off) -> Option<(&'static str, &'static str)> {
    match off {
        Off::Nothing => None,
        Off::Record(rule) => Some((rule.name(), rule.cites())),
        Off::Name(rule) => Some((rule.name(), rule.cites())),
    }
}

/// Does all jobs, several at once; results in the order of the jobs.
fn work(jobs: &[Job]) -> Vec<Done> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(index) else { break };
                    let done = until_found(job);
                    results.lock().expect("a search panicked").push((index, done));
                }
            });
        }
    });
    let mut results = results.into_inner().expect("a search panicked");
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, done)| done).collect()
}

fn until_found(job: &Job) -> Done {
    let mut last = None;
    for case in &job.cases {
        let report = search_case(job, case);
        let found = matches!(report.verdict, Verdict::Violation(_));
        last = Some(Done { case, report });
        if found {
            break;
        }
    }
    last.expect("a job has cases")
}

fn search_case(job: &Job, case: &Case) -> Report {
    let limits = Limits {
        states: STATES,
        // Not for names: what becomes of a row that its node refuses is not modelled, it is sent again for ever.
        livelocks: job.kind == Kind::Records && !job.must_fail && case.small,
    };
    match job.kind {
        Kind::Records => {
            let mut config = records::Config::parse(case.config).expect("a configuration of the suite");
            if let Off::Record(rule) = job.off {
                config.rules = Rules::all().without(rule);
            }
            search(&RecordModel::new(config), limits)
        }
        Kind::Names => {
            let mut config = names::Config::parse(case.config).expect("a configuration of the suite");
            if let Off::Name(rule) = job.off {
                config.rules = Rules::all().without(rule);
            }
            search(&NameModel::new(config), limits)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_configuration_can_be_read() {
        for case in RECORDS {
            assert!(records::Config::parse(case.config).is_ok(), "{}", case.config);
        }
        for case in NAMES {
            assert!(names::Config::parse(case.config).is_ok(), "{}", case.config);
        }
    }

    #[test]
    fn every_rule_about_records_is_missed_in_one_place() {
        for rule in RecordRule::ALL {
            let places = RECORDS.iter().filter(|case| case.finds.contains(rule)).count();
            assert_eq!(places, 1, "{rule:?}");
        }
    }

    #[test]
    fn the_verdict_depends_on_what_has_to_come_out() {
        let case = &NAMES[2];
        let job = |must_fail, off| Job {
            off,
            kind: Kind::Names,
            cases: vec![case],
            must_fail,
        };
        let right = |job: Job| print(&job, &until_found(&job));
        assert!(right(job(false, Off::Nothing)));
        assert!(!right(job(true, Off::Nothing)));
        assert!(right(job(true, Off::Name(NameRule::DeletedById))));
        assert!(!right(job(false, Off::Name(NameRule::DeletedById))));
    }
}
