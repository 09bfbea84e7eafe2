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
    /// Somebody reads all the time, also while all is being made well again.
    pub watched: bool,
    /// When the proxy is killed, clients do nothing more in that phase: nothing is written over what they left.
    pub hushed: bool,
    /// Each phase lasts until suspects were compared for the last time.
    pub patient: bool,
    pub phases: Vec<Phase>,
}

impl Plan {
    pub fn of(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x9_1a7e);
        let phases = 1 + rng.below(4);
        let mut phases: Vec<Phase> = (0..phases).map(|_| Phase::draw(&mut rng)).collect();
        let clients = match rng.below(4) {
            // So many that they wait for each other, and their writes are combined.
            0 => 6 + rng.below(5) as usize,
            _ => 2 + rng.below(3) as usize,
        };
        let alert = rng.below(3) == 0;
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
            ids: [1, 2, 4, 12][rng.below(4) as usize],
            names: 1 + rng.below(3) as usize,
            namespace: [0, 40, 120, 300][rng.below(4) as usize],
            pace: if alert { 12 } else { [1, 1, 1, 6][rng.below(4) as usize] },
            alert,
            watched: rng.below(2) == 0,
            hushed: rng.below(2) == 0,
            patient,
            phases,
        }
    }
}

impl Phase {
    fn draw(rng: &mut Rng) -> Self {
        let mut nodes = [vec![], vec![]];
        let faulty = match rng.below(5) {
            0 => vec![],
            1 => vec![0, 1],
            _ => vec![rng.below(2) as usize],
        };
        for node in faulty {
            nodes[node] = draw_weather(rng, &NODE_FAULTS, &[10, 40, 150]);
        }
        let journal = match rng.below(3) {
            0 => draw_weather(rng, &JOURNAL_FAULTS, &[10, 50, 150]),
            _ => vec![],
        };
        let events = (0..rng.below(5)).map(|_| draw_event(rng)).collect();
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

fn draw_event(rng: &mut Rng) -> (u64, Event) {
    let longest = [200, 4000][rng.below(2) as usize];
    let at = rng.below(longest);
    let node = rng.below(2) as usize;
    let longest = [200, 3000, 20_000][rng.below(3) as usize];
    let span = 1 + rng.below(longest);
    let most = [30, 300, 3000][rng.below(3) as usize];
    let steps = 1 + rng.below(most);
    let down = [0, 1, span][rng.below(3) as usize];
    let event = match rng.below(22) {
        0..=2 => Event::Kill { node, down: span },
        3 => Event::Stop { node, held: span },
        4 => Event::JournalAway { down: span },
        5 | 6 => Event::Wipe { node, down: span },
        7 => Event::Restore { node, down: span },
        8 | 9 => Event::KillAtFault {
            node,
            after: rng.below(30),
            down: span,
        },
        10..=13 => Event::CrashAtFault { steps, down },
        14 | 15 => Event::CrashAtCommit { steps, down },
        16 | 17 => Event::CrashWithNode {
            node,
            steps,
            down: span,
        },
        _ => Event::Crash { steps, down },
    };
    (at, event)
}

pub fn milliseconds(count: u64) -> Duration {
    Duration::from_millis(count)
}
