//! Faults, one after the other, each begun and ended; which, where and how long is decided by a seed.

use std::fmt::Write;
use std::time::Duration;

use crate::harness::data::Rng;
use crate::network::Weather;
use crate::world::{World, settled, whole};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    KillNode,
    StopNode,
    KillBoth,
    KillProxy,
    KillProxyAndNode,
    KillPostgres,
    KillProxyAndPostgres,
    WipeNode,
    NetLost,
    NetAnswersLost,
    NetSlow,
}

impl Kind {
    pub const ALL: &[Kind] = &[
        Kind::KillNode,
        Kind::StopNode,
        Kind::KillBoth,
        Kind::KillProxy,
        Kind::KillProxyAndNode,
        Kind::KillPostgres,
        Kind::KillProxyAndPostgres,
        Kind::WipeNode,
        Kind::NetLost,
        Kind::NetAnswersLost,
        Kind::NetSlow,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Kind::KillNode => "kill_node",
            Kind::StopNode => "stop_node",
            Kind::KillBoth => "kill_both",
            Kind::KillProxy => "kill_proxy",
            Kind::KillProxyAndNode => "kill_proxy_and_node",
            Kind::KillPostgres => "kill_postgres",
            Kind::KillProxyAndPostgres => "kill_proxy_and_postgres",
            Kind::WipeNode => "wipe_node",
            Kind::NetLost => "net_lost",
            Kind::NetAnswersLost => "net_answers_lost",
            Kind::NetSlow => "net_slow",
        }
    }

    fn weight(self) -> usize {
        match self {
            Kind::KillNode | Kind::KillProxyAndNode => 4,
            Kind::StopNode | Kind::KillProxy | Kind::WipeNode => 3,
            Kind::KillBoth | Kind::KillPostgres | Kind::NetLost | Kind::NetAnswersLost => 2,
            Kind::KillProxyAndPostgres | Kind::NetSlow => 1,
        }
    }

    pub fn needs_postgres(self) -> bool {
        matches!(self, Kind::KillPostgres | Kind::KillProxyAndPostgres)
    }

    /// One node is away and everything else is there: no client is to see an error.
    fn invisible(self) -> bool {
        matches!(self, Kind::KillNode | Kind::StopNode)
    }

    /// Names joined by commas, or `all`.
    pub fn parse(text: &str) -> Vec<Kind> {
        if text == "all" {
            return Kind::ALL.to_vec();
        }
        let kind = |name: &str| {
            let found = Kind::ALL.iter().find(|kind| kind.name() == name);
            *found.unwrap_or_else(|| {
                panic!(
                    "CHAOS_FAULTS: {name} is none of {:?}",
                    Kind::ALL.iter().map(|k| k.name())
                )
            })
        };
        text.split(',').map(|name| kind(name.trim())).collect()
    }
}

/// A fault that was.
pub struct Fault {
    pub kind: Kind,
    /// On the clock of the history.
    pub start: u64,
    pub end: u64,
    pub detail: String,
}

pub struct Nemesis {
    rng: Rng,
    kinds: Vec<Kind>,
    /// No single fault is longer.
    longest: f64,
    pub faults: Vec<Fault>,
}

const NAMES: [&str; 2] = ["primary", "replica"];
/// The label of errors that no client should see.
pub const CALM: &str = ", all else well";
/// How long a fault waits for the consequences of the one before, if it does.
const PATIENCE: Duration = Duration::from_secs(12);
/// A wiped node has to be whole again within this time.
const RECOPY: Duration = Duration::from_secs(120);

impl Nemesis {
    pub fn new(rng: Rng, kinds: Vec<Kind>, seconds: u64) -> Nemesis {
        Nemesis {
            rng,
            kinds,
            longest: (seconds as f64 / 5.0).min(12.0),
            faults: Vec::new(),
        }
    }

    pub fn log(&self) -> String {
        let mut text = String::new();
        for fault in &self.faults {
            let _ = writeln!(
                text,
                "{:.3}..{:.3} {}: {}",
                fault.start as f64 / 1e6,
                fault.end as f64 / 1e6,
                fault.kind.name(),
                fault.detail
            );
        }
        text
    }

    /// A time between `from` and `to` seconds.
    fn time(&mut self, from: f64, to: f64) -> Duration {
        let part = f64::from(self.rng.float() + 1.0) / 2.0;
        Duration::from_secs_f64((from + part * (to - from)).min(self.longest))
    }

    async fn pass(&mut self, from: f64, to: f64) -> f64 {
        let time = self.time(from, to);
        tokio::time::sleep(time).await;
        time.as_secs_f64()
    }

    fn choose(&mut self) -> Kind {
        let total: usize = self.kinds.iter().map(|kind| kind.weight()).sum();
        let mut dice = self.rng.below(total);
        for kind in &self.kinds {
            match dice.checked_sub(kind.weight()) {
                Some(left) => dice = left,
                None => return *kind,
            }
        }
        unreachable!("the weights were summed up")
    }

    /// Faults until the time is over.
    pub async fn run(&mut self, world: &mut World, duration: Duration) {
        let end = world.recorder.now() + duration.as_micros() as u64;
        self.pass(0.5, 1.5).await;
        while world.recorder.now() < end {
            let kind = self.choose();
            self.strike(world, kind).await;
            self.pass(0.2, 3.0).await;
        }
    }

    /// One fault, from its beginning to its end; not until its consequences are over.
    pub async fn strike(&mut self, world: &mut World, kind: Kind) {
        let side = self.rng.below(2);
        let patient = self.rng.below(2) == 0 || kind == Kind::WipeNode;
        let calm = patient && world.wait(PATIENCE, settled).await.is_ok();
        if kind == Kind::WipeNode && !calm {
            return;
        }
        let label = format!("{}{}", kind.name(), if calm && kind.invisible() { CALM } else { "" });
        let start = world.recorder.now();
        world.recorder.during(&label);
        let detail = self.carry_out(world, kind, side).await;
        world.recorder.during(&format!("after {label}"));
        let end = world.recorder.now();
        let detail = format!("{detail}{}", if calm { ", began when all was well" } else { "" });
        self.faults.push(Fault {
            kind,
            start,
            end,
            detail,
        });
    }

    async fn carry_out(&mut self, world: &mut World, kind: Kind, side: usize) -> String {
        let name = NAMES[side];
        match kind {
            Kind::KillNode => {
                world.nodes[side].kill9();
                let time = self.pass(0.2, 8.0).await;
                world.nodes[side].restart().await;
                format!("{name} for {time:.1} s")
            }
            Kind::StopNode => {
                world.nodes[side].sigstop();
                let time = self.pass(0.5, 12.0).await;
                world.nodes[side].sigcont();
                format!("{name} for {time:.1} s")
            }
            Kind::KillBoth => {
                world.nodes[side].kill9();
                let between = if self.rng.below(2) == 0 {
                    0.0
                } else {
                    self.pass(0.0, 2.0).await
                };
                world.nodes[1 - side].kill9();
                let first = self.rng.below(2);
                let time = self.pass(0.2, 4.0).await;
                world.nodes[first].restart().await;
                let later = self.pass(0.0, 4.0).await;
                world.nodes[1 - first].restart().await;
                format!(
                    "{name} and {between:.1} s later the other; {} back after {time:.1} s, the other {later:.1} s later",
                    NAMES[first]
                )
            }
            Kind::KillProxy => {
                world.diptych.kill9();
                let time = self.pass(0.0, 2.0).await;
                world.start_proxy().await;
                format!("for {time:.1} s")
            }
            Kind::KillProxyAndNode => self.kill_proxy_and_node(world, side).await,
            Kind::KillPostgres => {
                let postgres = world.postgres.as_mut().expect("a journal in Postgres");
                tokio::task::block_in_place(|| postgres.kill9());
                let time = self.pass(0.2, 5.0).await;
                let postgres = world.postgres.as_mut().expect("a journal in Postgres");
                tokio::task::block_in_place(|| postgres.start());
                format!("for {time:.1} s")
            }
            Kind::KillProxyAndPostgres => {
                let postgres = world.postgres.as_mut().expect("a journal in Postgres");
                world.diptych.kill9();
                tokio::task::block_in_place(|| postgres.kill9());
                let time = self.pass(0.2, 3.0).await;
                let postgres = world.postgres.as_mut().expect("a journal in Postgres");
                tokio::task::block_in_place(|| postgres.start());
                world.start_proxy().await;
                format!("for {time:.1} s")
            }
            Kind::WipeNode => {
                world.nodes[side].kill9();
                world.nodes[side].wipe();
                let time = self.pass(0.0, 4.0).await;
                world.nodes[side].restart().await;
                // Until it is whole the other node is the only one that has everything.
                let whole_again = world
                    .wait(RECOPY, |status| whole(status, side).and(whole(status, 1 - side)))
                    .await;
                let word = if whole_again.is_ok() {
                    "whole again"
                } else {
                    "NOT whole again"
                };
                format!("{name}, {time:.1} s later back, {word}")
            }
            Kind::NetLost => self.network(world, side, Weather::Lost).await,
            Kind::NetAnswersLost => self.network(world, side, Weather::AnswersLost).await,
            Kind::NetSlow => self.network(world, side, Weather::Slow).await,
        }
    }

    async fn network(&mut self, world: &World, side: usize, weather: Weather) -> String {
        world.networks[side].set(weather);
        let time = self.pass(0.3, 10.0).await;
        world.networks[side].set(Weather::Fine);
        format!("{} for {time:.1} s", NAMES[side])
    }

    async fn kill_proxy_and_node(&mut self, world: &mut World, side: usize) -> String {
        world.diptych.kill9();
        world.nodes[side].kill9();
        let time = self.pass(0.0, 2.0).await;
        let node_first = self.rng.below(2) == 0;
        if node_first {
            world.nodes[side].restart().await;
        }
        world.start_proxy().await;
        if !node_first {
            self.pass(0.0, 3.0).await;
            world.nodes[side].restart().await;
        }
        let order = if node_first { "node" } else { "proxy" };
        format!("proxy and {} for {time:.1} s, the {order} back first", NAMES[side])
    }
}
