//! Breadth-first search through every state of a model, so that a counterexample is a shortest one.
//!
//! A visited state is kept as a 64-bit fingerprint and as the way it was reached (its predecessor and which of that
//! state's steps); whole states live only in the current layer. A path is found again by replaying the steps.

use std::collections::HashMap;
use std::collections::hash_map::{DefaultHasher, Entry};
use std::hash::{BuildHasherDefault, Hash, Hasher};

/// Two nodes, a proxy and a journal, and what can happen to them next.
pub trait Model {
    type State: Clone + Hash;
    /// What checking a state may remember between states.
    type Memory: Default;

    fn initial(&self) -> Self::State;

    /// Everything that can happen next, always in the same order.
    fn steps(&self, state: &Self::State, steps: &mut Steps<Self::State>);

    /// What is wrong with a state. Nothing but faults and client reads can follow a `quiescent` one.
    fn violation(&self, memory: &mut Self::Memory, state: &Self::State, quiescent: bool) -> Option<String>;

    /// One line about a state, for a counterexample.
    fn describe(&self, state: &Self::State) -> String;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepKind {
    /// Work that goes on by itself: a state is quiescent when none is left.
    Progress,
    /// A client reads; it can happen or not.
    Read,
    /// Takes from the budget of faults; it can happen or not.
    Fault,
}

#[derive(Debug)]
pub struct Step<S> {
    pub kind: StepKind,
    /// Empty in the search itself, where nobody reads it.
    pub label: String,
    pub next: S,
}

/// Where a model puts the steps that can follow a state.
#[derive(Debug)]
pub struct Steps<S> {
    list: Vec<Step<S>>,
    labelled: bool,
}

impl<S> Steps<S> {
    fn new(labelled: bool) -> Self {
        Self {
            list: Vec::new(),
            labelled,
        }
    }

    pub fn progress(&mut self, next: S, label: impl FnOnce() -> String) {
        self.push(StepKind::Progress, next, label);
    }

    pub fn read(&mut self, next: S, label: impl FnOnce() -> String) {
        self.push(StepKind::Read, next, label);
    }

    pub fn fault(&mut self, next: S, label: impl FnOnce() -> String) {
        self.push(StepKind::Fault, next, label);
    }

    fn push(&mut self, kind: StepKind, next: S, label: impl FnOnce() -> String) {
        let label = if self.labelled { label() } else { String::new() };
        self.list.push(Step { kind, label, next });
    }
}

/// How far a search goes.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// About 100 bytes of memory each, the current layer aside.
    pub states: usize,
    /// Look for states without a way to a quiescent one, too. Keeps every edge: for small configurations.
    pub livelocks: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Every reachable state was seen and is right.
    Exhausted,
    /// No violation so far, and not all states were seen.
    Capped,
    Violation(String),
}

/// What a search found.
#[derive(Debug, Clone)]
pub struct Report {
    pub verdict: Verdict,
    pub states: usize,
    pub edges: u64,
    pub quiescent: u64,
    pub depth: usize,
    /// A shortest way to the violation: each step and the state after it.
    pub path: Vec<(String, String)>,
}

/// The index of a state in order of discovery.
type Index = u32;
const ROOT: Index = Index::MAX;

/// Where a state was first reached from: its predecessor, and which of that one's steps.
type Origin = (Index, u16);

pub fn search<M: Model>(model: &M, limits: Limits) -> Report {
    let mut memory = M::Memory::default();
    let root = model.initial();
    let mut known: HashMap<u64, Index, BuildHasherDefault<Fingerprinted>> = HashMap::default();
    known.insert(fingerprint(&root), 0);
    let mut origins: Vec<Origin> = vec![(ROOT, 0)];
    let mut quiescent_states: Vec<Index> = vec![];
    let mut progress_edges: Vec<(Index, Index)> = vec![];
    let mut layer = vec![(0, root)];
    let mut edges = 0;
    let mut depth = 0;
    let mut capped = false;
    let mut wrong: Option<(Index, String)> = None;
    let mut steps = Steps::new(false);
    'layers: while !layer.is_empty() {
        let mut next_layer = Vec::new();
        for (index, state) in layer.drain(..) {
            model.steps(&state, &mut steps);
            let quiescent = steps.list.iter().all(|step| step.kind != StepKind::Progress);
            if quiescent {
                quiescent_states.push(index);
            }
            if let Some(violation) = model.violation(&mut memory, &state, quiescent) {
                wrong = Some((index, violation));
                break 'layers;
            }
            for (taken, step) in steps.list.drain(..).enumerate() {
                edges += 1;
                let target = match known.entry(fingerprint(&step.next)) {
                    Entry::Occupied(entry) => *entry.get(),
                    Entry::Vacant(entry) => {
                        let target = origins.len() as Index;
                        entry.insert(target);
                        origins.push((index, taken as u16));
                        next_layer.push((target, step.next));
                        target
                    }
                };
                if limits.livelocks && step.kind != StepKind::Fault {
                    progress_edges.push((target, index));
                }
            }
            if origins.len() > limits.states {
                capped = true;
                break 'layers;
            }
        }
        layer = next_layer;
        depth += 1;
    }
    if limits.livelocks && wrong.is_none() && !capped {
        wrong = first_without_way_out(origins.len(), &quiescent_states, progress_edges)
            .map(|index| (index, "LIVELOCK: no way to a quiescent state without a fault".into()));
    }
    let path = wrong
        .as_ref()
        .map_or(vec![], |(index, _)| replay(model, &origins, *index));
    Report {
        verdict: match wrong {
            Some((_, violation)) => Verdict::Violation(violation),
            None if capped => Verdict::Capped,
            None => Verdict::Exhausted,
        },
        states: origins.len(),
        edges,
        quiescent: quiescent_states.len() as u64,
        depth,
        path,
    }
}

/// The first state from which no quiescent one can be reached. `edges` are (to, from).
fn first_without_way_out(states: usize, quiescent: &[Index], mut edges: Vec<(Index, Index)>) -> Option<Index> {
    edges.sort_unstable();
    let mut leads_out = vec![false; states];
    let mut open = quiescent.to_vec();
    for &index in quiescent {
        leads_out[index as usize] = true;
    }
    while let Some(index) = open.pop() {
        let first = edges.partition_point(|edge| edge.0 < index);
        for &(_, from) in edges[first..].iter().take_while(|edge| edge.0 == index) {
            if !leads_out[from as usize] {
                leads_out[from as usize] = true;
                open.push(from);
            }
        }
    }
    leads_out.iter().position(|&leads| !leads).map(|index| index as Index)
}

/// Takes the steps that led to a state again, with their labels.
fn replay<M: Model>(model: &M, origins: &[Origin], mut index: Index) -> Vec<(String, String)> {
    let mut taken = vec![];
    while origins[index as usize].0 != ROOT {
        taken.push(origins[index as usize].1);
        index = origins[index as usize].0;
    }
    let mut state = model.initial();
    let mut path = vec![];
    for step in taken.into_iter().rev() {
        let mut steps = Steps::new(true);
        model.steps(&state, &mut steps);
        let step = steps.list.swap_remove(step as usize);
        path.push((step.label, model.describe(&step.next)));
        state = step.next;
    }
    path
}

fn fingerprint(state: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    state.hash(&mut hasher);
    hasher.finish()
}

/// Keys that are hashes already.
#[derive(Default, Clone, Copy)]
struct Fingerprinted(u64);

impl Hasher for Fingerprinted {
    fn write(&mut self, _: &[u8]) {
        unreachable!("keys are u64");
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts up to `end`.
    struct Counter {
        end: u8,
        wrong: Option<u8>,
    }

    impl Model for Counter {
        type State = u8;
        type Memory = ();

        fn initial(&self) -> u8 {
            0
        }

        fn steps(&self, state: &u8, steps: &mut Steps<u8>) {
            if *state < self.end {
                steps.progress(state + 1, || "one up".into());
                steps.fault(self.end.min(state + 2), || "two up".into());
            }
        }

        fn violation(&self, (): &mut (), state: &u8, quiescent: bool) -> Option<String> {
            assert_eq!(quiescent, *state == self.end);
            (Some(*state) == self.wrong).then(|| "wrong".into())
        }

        fn describe(&self, state: &u8) -> String {
            state.to_string()
        }
    }

    fn run(end: u8, wrong: Option<u8>, states: usize) -> Report {
        let limits = Limits {
            states,
            livelocks: true,
        };
        search(&Counter { end, wrong }, limits)
    }

    #[test]
    fn exhausts() {
        let report = run(5, None, 100);
        assert_eq!(report.verdict, Verdict::Exhausted);
        assert_eq!((report.states, report.edges, report.quiescent), (6, 10, 1));
    }

    #[test]
    fn says_when_it_saw_only_a_part() {
        assert_eq!(run(50, None, 10).verdict, Verdict::Capped);
    }

    #[test]
    fn finds_a_shortest_path() {
        let report = run(9, Some(4), 100);
        assert_eq!(report.verdict, Verdict::Violation("wrong".into()));
        assert_eq!(
            report.path,
            [("two up".into(), "2".into()), ("two up".into(), "4".into())]
        );
    }

    #[test]
    fn finds_a_livelock() {
        let limits = |livelocks| Limits { states: 10, livelocks };
        assert_eq!(search(&Trap, limits(false)).verdict, Verdict::Exhausted);
        let verdict = search(&Trap, limits(true)).verdict;
        assert!(matches!(verdict, Verdict::Violation(text) if text.starts_with("LIVELOCK")));
    }

    /// 0 goes to 1, the quiescent one, or to 2 and 3, which go round.
    struct Trap;

    impl Model for Trap {
        type State = u8;
        type Memory = ();

        fn initial(&self) -> u8 {
            0
        }

        fn steps(&self, state: &u8, steps: &mut Steps<u8>) {
            let next: &[u8] = match state {
                0 => &[1, 2],
                2 => &[3],
                3 => &[2],
                _ => &[],
            };
            for &next in next {
                steps.progress(next, String::new);
            }
        }

        fn violation(&self, (): &mut (), _: &u8, _: bool) -> Option<String> {
            None
        }

        fn describe(&self, state: &u8) -> String {
            state.to_string()
        }
    }
}
