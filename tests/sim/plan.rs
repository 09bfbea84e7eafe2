//! What happens in a run, drawn from its seed; as data, so that a failing run can be made smaller.

use std::time::Duration;

use crate::fakes::Rng;

/// Writes in one phase.
pub const MOST_WRITES: usize = 128;

/// What can go wrong with one request to a node that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeFault {
    NotSent,
    ClosedBefore,
    ClosedAfter,
    /// Closed at once; it lands later, or when a canary comes.
    LandsLate,
    /// It arrives late, on a connection that lives.
    SlowRequest,
    /// It is carried out at once, the answer takes its time.
    SlowAnswer,
    /// Logged and not applied, and said so.
    Hidden,
    Locked,
    DiskFull,
    /// An error that nobody knows, and it was applied.
    AppliedBut,
    /// An error that nobody knows, and it was not applied.
    Failed,
    /// A refusal that the other node does not give.
    Refused,
    /// Closed at once; it waits for a lock of the node's database, and lands after the canaries that come meanwhile.
    Outlasts,
}

/// What can go wrong with one commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JournalFault {
    Refused,
    UncertainWritten,
    UncertainNotWritten,
    Slow,
    /// Its outcome is unknown however often it is tried, for some seconds; other commits get through.
    StubbornWritten,
    StubbornNotWritten,
}

/// Faults, and of how many requests in a thousand.
pub type Weather<F> = Vec<(F, u64)>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// kill -9 of a node, and its start after so many milliseconds.
    Kill { node: usize, down: u64 },
    /// The same, and its folder is empty then. Not while the other node does not hold everything: that would be a loss.
    Wipe { node: usize, down: u64 },
    /// The same, and its folder is as it was when the last phase ended.
    Restore { node: usize, down: u64 },
    /// SIGSTOP and SIGCONT.
    Stop { node: usize, held: u64 },
    /// The journal answers nothing for so long.
    JournalAway { down: u64 },
    /// kill -9 of the proxy, so many steps from here; another one starts so much later.
    Crash { steps: u64, down: u64 },
    /// The same, so many steps after the next time that something goes wrong with a request or a commit.
    CrashAtFault { steps: u64, down: u64 },
    /// The same, so many steps after the next commit that something goes wrong with.
    CrashAtCommit { steps: u64, down: u64 },
    /// The same, and kill -9 of a node at once; the node starts again after so many milliseconds.
    CrashWithNode { node: usize, steps: u64, down: u64 },
    /// kill -9 of a node, so many milliseconds after the next time that something goes wrong, and its start.
    KillAtFault { node: usize, after: u64, down: u64 },
    /// The same, of the node that did nothing wrong with that request: what it alone has is away then.
    KillTheOther { after: u64, down: u64 },
    /// An operator has everything of some collection copied to a node.
    Resync { node: usize },
    /// An operator has everything compared, and what differs repaired.
    Verify,
}

impl Event {
    fn kills_the_proxy(self) -> bool {
        matches!(
            self,
            Self::Crash { .. } | Self::CrashAtFault { .. } | Self::CrashAtCommit { .. } | Self::CrashWithNode { .. }
        )
    }
}

#[derive(Debug, Clone)]
pub struct Phase {
    pub nodes: [Weather<NodeFault>; 2],
    pub journal: Weather<JournalFault>,
    /// When, in milliseconds from the phase's beginning, and what.
    pub events: Vec<(u64, Event)>,
}

#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub clients: usize,
    /// Operations of each client in each phase.
    pub operations: usize,
    pub ids: usize,
    pub names: usize,
    /// Of a thousand operations, how many are about collections.
    pub namespace: u64,
    /// Clients pause so much longer.
    pub pace: u64,
    /// Their pauses end when something comes back: there is much to do then.
    pub alert: bool,
    /// So many read all the time, also while all is being made well again.
    pub watchers: usize,
    /// When the proxy is killed, clients do nothing more in that phase: nothing is written over what they left.
    pub hushed: bool,
    /// Each phase lasts until suspects were compared for the last time.
    pub patient: bool,
    pub tuning: Tuning,
    pub phases: Vec<Phase>,
}

/// Settings of the proxy: small ones make many steps of what is one otherwise, and time for something to come between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    pub drain_rows: usize,
    pub repair_records: usize,
    /// Records per second; 0: as many as can be.
    pub repair_rate: u32,
    pub repair_touched: usize,
    pub repair_concurrency: usize,
    pub mirror_grace: u64,
}

impl Tuning {
    pub const USUAL: Self = Self {
        drain_rows: 8,
        repair_records: 1000,
        repair_rate: 0,
        repair_touched: 200_000,
        repair_concurrency: 2,
        mirror_grace: 2000,
    };

    fn draw(rng: &mut Rng) -> Self {
        Self {
            drain_rows: pick(rng, &[1, 3, 8]),
            repair_records: pick(rng, &[1, 3, 1000]),
            repair_rate: pick(rng, &[0, 0, 4, 40]),
            repair_touched: pick(rng, &[2, 200_000, 200_000, 200_000]),
            repair_concurrency: pick(rng, &[1, 2]),
            mirror_grace: pick(rng, &[200, 2000]),
        }
    }
}

/// What a run is mostly about. Where everything may happen, what needs several things of one kind hardly ever does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Theme {
    Anything,
    /// Some things often and others never, which ones is drawn.
    Swarm,
    /// The proxy is killed and started, the journal is in trouble, and somebody reads at once.
    Restarts,
    /// Collections are copied, slowly, while they are written to.
    Copies,
    /// One node refuses what the other takes, and the other dies.
    Refusals,
}

const THEMES: [Theme; 9] = [
    Theme::Anything,
    Theme::Anything,
    Theme::Anything,
    Theme::Swarm,
    Theme::Swarm,
    Theme::Restarts,
    Theme::Copies,
    Theme::Refusals,
    Theme::Refusals,
];

impl Theme {
    /// How likely each kind of event is.
    fn odds(self, rng: &mut Rng) -> Odds {
        match self {
            Self::Anything => USUAL_ODDS,
            Self::Swarm => USUAL_ODDS.map(|(kind, odds)| (kind, odds * pick(rng, &[0, 1, 1, 6]))),
            Self::Restarts => USUAL_ODDS.map(|(kind, odds)| match kind {
                Kind::Crash | Kind::CrashAtFault | Kind::CrashAtCommit => (kind, 4 * odds),
                _ => (kind, odds),
            }),
            Self::Copies => USUAL_ODDS.map(|(kind, odds)| match kind {
                Kind::Wipe => (kind, 4 * odds),
                Kind::Resync => (kind, 12 * odds),
                _ => (kind, odds),
            }),
            Self::Refusals => USUAL_ODDS.map(|(kind, odds)| match kind {
                Kind::KillTheOther => (kind, 16 * odds),
                _ => (kind, odds),
            }),
        }
    }
}

fn pick<T: Copy>(rng: &mut Rng, from: &[T]) -> T {
    from[rng.below(from.len() as u64) as usize]
}

impl Plan {
    pub fn of(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x9_1a7e);
        let theme = pick(&mut rng, &THEMES);
        let odds = theme.odds(&mut rng);
        let phases = 1 + rng.below(4);
        let mut phases: Vec<Phase> = (0..phases).map(|_| Phase::draw(&mut rng, theme, &odds)).collect();
        let clients = match rng.below(4) {
            // So many that they wait for each other, and their writes are combined.
            0 => 6 + rng.below(5) as usize,
            _ => 2 + rng.below(3) as usize,
        };
        let alert = rng.below(3) == 0 || theme == Theme::Copies;
        // Requests may land after canaries: what they wrote is compared for the last time after 1000 s.
        let outlasted = rng.below(20) == 0;
        let patient = outlasted || rng.below(30) == 0;
        if patient {
            // Most of what these take is waiting.
            phases.truncate(1);
        }
        if outlasted {
            let share = 20 + rng.below(100);
            phases[0].nodes[rng.below(2) as usize].insert(0, (NodeFault::Outlasts, share));
            // After a kill nobody knows that something may still land: the recovery remembers no suspects.
            phases[0].events.retain(|(_, event)| !event.kills_the_proxy());
        }
        Self {
            seed,
            clients,
            // The checker follows so many writes of one phase.
            operations: (6 + rng.below(20) as usize).min(MOST_WRITES / clients),
            ids: match theme {
                Theme::Copies | Theme::Refusals => pick(&mut rng, &[4, 12]),
                _ => pick(&mut rng, &[1, 2, 4, 12]),
            },
            names: match theme {
                Theme::Copies | Theme::Refusals => 1,
                _ => 1 + rng.below(3) as usize,
            },
            namespace: match theme {
                Theme::Copies | Theme::Restarts | Theme::Refusals => pick(&mut rng, &[0, 0, 40]),
                _ => pick(&mut rng, &[0, 40, 120, 300]),
            },
            pace: if alert { 12 } else { [1, 1, 1, 6][rng.below(4) as usize] },
            alert,
            watchers: match theme {
                Theme::Restarts => 3,
                _ => pick(&mut rng, &[0, 0, 1, 3]),
            },
            hushed: rng.below(2) == 0,
            patient,
            tuning: match theme {
                Theme::Anything => Tuning::USUAL,
                _ => Tuning::draw(&mut rng),
            },
            phases,
        }
    }
}

impl Phase {
    fn draw(rng: &mut Rng, theme: Theme, odds: &Odds) -> Self {
        let mut nodes = [vec![], vec![]];
        let faulty = match rng.below(5) {
            0 => vec![],
            1 => vec![0, 1],
            _ => vec![rng.below(2) as usize],
        };
        for node in faulty {
            nodes[node] = draw_weather(rng, &NODE_FAULTS, &[10, 40, 150]);
        }
        let mut journal = match rng.below(3) {
            0 => draw_weather(rng, &JOURNAL_FAULTS, &[10, 50, 150]),
            _ => vec![],
        };
        match theme {
            Theme::Restarts => journal.push((JournalFault::Slow, 20 + rng.below(80))),
            Theme::Refusals => {
                let node = rng.below(2) as usize;
                nodes[node].insert(0, (NodeFault::Refused, 30 + rng.below(300)));
                nodes[1 - node].clear();
            }
            Theme::Anything | Theme::Swarm | Theme::Copies => {}
        }
        let most = match theme {
            Theme::Anything => 5,
            _ => 8,
        };
        let events = (0..rng.below(most)).map(|_| draw_event(rng, odds)).collect();
        Self { nodes, journal, events }
    }
}

const NODE_FAULTS: [NodeFault; 12] = [
    NodeFault::NotSent,
    NodeFault::ClosedBefore,
    NodeFault::ClosedAfter,
    NodeFault::LandsLate,
    NodeFault::SlowRequest,
    NodeFault::SlowAnswer,
    NodeFault::Hidden,
    NodeFault::Locked,
    NodeFault::DiskFull,
    NodeFault::AppliedBut,
    NodeFault::Failed,
    NodeFault::Refused,
];

const JOURNAL_FAULTS: [JournalFault; 6] = [
    JournalFault::Refused,
    JournalFault::UncertainWritten,
    JournalFault::UncertainNotWritten,
    JournalFault::Slow,
    JournalFault::StubbornWritten,
    JournalFault::StubbornNotWritten,
];

fn draw_weather<F: Copy>(rng: &mut Rng, all: &[F], strengths: &[u64]) -> Weather<F> {
    let strength = strengths[rng.below(strengths.len() as u64) as usize];
    if rng.below(3) == 0 {
        // The same again and again: what follows from one fault meets another one of its kind.
        let often = 1 + 2 * strength;
        let mut one = || (all[rng.below(all.len() as u64) as usize], 1 + rng.below(often));
        return vec![one(), one()];
    }
    all.iter()
        .filter_map(|fault| {
            let there = rng.below(3) > 0;
            let share = 1 + rng.below(strength);
            there.then_some((*fault, share / 2 + 1))
        })
        .collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Kill,
    Wipe,
    Restore,
    Stop,
    JournalAway,
    Crash,
    CrashAtFault,
    CrashAtCommit,
    CrashWithNode,
    KillAtFault,
    KillTheOther,
    Resync,
    Verify,
}

type Odds = [(Kind, u64); 13];

const USUAL_ODDS: Odds = [
    (Kind::Kill, 3),
    (Kind::Wipe, 2),
    (Kind::Restore, 1),
    (Kind::Stop, 1),
    (Kind::JournalAway, 1),
    (Kind::Crash, 4),
    (Kind::CrashAtFault, 4),
    (Kind::CrashAtCommit, 2),
    (Kind::CrashWithNode, 2),
    (Kind::KillAtFault, 2),
    (Kind::KillTheOther, 1),
    (Kind::Resync, 1),
    (Kind::Verify, 1),
];

fn draw_kind(rng: &mut Rng, odds: &Odds) -> Kind {
    let sum: u64 = odds.iter().map(|(_, odds)| odds).sum();
    let mut draw = rng.below(sum.max(1));
    let drawn = odds.iter().find(|(_, odds)| {
        let found = draw < *odds;
        draw = draw.saturating_sub(*odds);
        found
    });
    drawn.map_or(Kind::Kill, |(kind, _)| *kind)
}

fn draw_event(rng: &mut Rng, odds: &Odds) -> (u64, Event) {
    let longest = pick(rng, &[200, 4000]);
    let at = rng.below(longest);
    let node = rng.below(2) as usize;
    let longest = pick(rng, &[200, 3000, 20_000]);
    let span = 1 + rng.below(longest);
    let most = pick(rng, &[30, 300, 3000]);
    let steps = 1 + rng.below(most);
    let down = pick(rng, &[0, 1, span]);
    let after = rng.below(30);
    let event = match draw_kind(rng, odds) {
        Kind::Kill => Event::Kill { node, down: span },
        Kind::Wipe => Event::Wipe { node, down: span },
        Kind::Restore => Event::Restore { node, down: span },
        Kind::Stop => Event::Stop { node, held: span },
        Kind::JournalAway => Event::JournalAway { down: span },
        Kind::Crash => Event::Crash { steps, down },
        Kind::CrashAtFault => Event::CrashAtFault { steps, down },
        Kind::CrashAtCommit => Event::CrashAtCommit { steps, down },
        Kind::CrashWithNode => Event::CrashWithNode {
            node,
            steps,
            down: span,
        },
        Kind::KillAtFault => Event::KillAtFault {
            node,
            after,
            down: span,
        },
        Kind::KillTheOther => Event::KillTheOther { after, down: span },
        Kind::Resync => Event::Resync { node },
        Kind::Verify => Event::Verify,
    };
    (at, event)
}

pub fn milliseconds(count: u64) -> Duration {
    Duration::from_millis(count)
}
