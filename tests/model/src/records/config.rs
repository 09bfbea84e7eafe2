//! One configuration: the script, the faults that may happen, the rules that hold.

use super::rules::RecordRule;
use super::script::{self, Kind, Record, Write};
use super::state::{Budget, Command, NODES, Node};
use crate::rules::Rules;
use crate::set::Set;

#[derive(Debug, Clone)]
pub struct Config {
    pub script: Vec<Write>,
    pub budget: Budget,
    /// Nodes that never come back once they are down.
    pub dead: [bool; NODES],
    pub rules: Rules<RecordRule>,
}

impl Config {
    /// Reads `script=u1,v2 kill-a=1 net=1 total=2 ...`; what is not named does not happen. A bare name counts once.
    ///
    /// # Errors
    /// A sentence about the first word that is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut config = Self {
            script: vec![],
            budget: Budget::default(),
            dead: [false; NODES],
            rules: Rules::all(),
        };
        for word in text.split_whitespace() {
            let (key, value) = word.split_once('=').unwrap_or((word, "1"));
            if key == "script" {
                config.script = script::parse(value)?;
                continue;
            }
            let count: u8 = value.parse().map_err(|_| format!("not a number: {word:?}"))?;
            let budget = &mut config.budget;
            match key {
                "kill-a" => budget.node_kills[0] = count,
                "kill-b" => budget.node_kills[1] = count,
                "kill-proxy" => budget.proxy_kills = count,
                "net" => budget.network = count,
                "hidden" => budget.hidden = count,
                "journal" => budget.journal = count,
                "wipe" => budget.wipes = count,
                "snapshot" => budget.snapshots = count,
                "refuse" => budget.refusals = count,
                "read" => budget.reads = count,
                "total" => budget.total = count,
                "dead-a" => config.dead[0] = count > 0,
                "dead-b" => config.dead[1] = count > 0,
                _ => return Err(format!("unknown: {word:?}")),
            }
        }
        if config.script.is_empty() {
            return Err("a configuration needs script=...".into());
        }
        Ok(config)
    }

    /// The records that the script writes.
    pub fn ids(&self) -> Set {
        self.ids_of(Set::below(self.script.len()))
    }

    /// The records that these writes name.
    pub fn ids_of(&self, writes: Set) -> Set {
        let named = writes.iter().map(|write| Set::one(self.script[write].id));
        named.fold(Set::EMPTY, |all, id| all | id)
    }

    /// Those of `writes` that name one of `ids`.
    pub fn writes_on(&self, writes: Set, ids: Set) -> Set {
        let named = writes.iter().filter(|&write| ids.has(self.script[write].id));
        named.fold(Set::EMPTY, |all, write| all | Set::one(write))
    }

    pub fn kind(&self, write: usize) -> Kind {
        self.script[write].kind
    }

    /// Carries out a command on a node; what was hidden there becomes visible first.
    pub fn execute(&self, node: &mut Node, command: Command) {
        self.reveal(node);
        self.apply(&mut node.records, command);
    }

    /// A flush: what is committed becomes visible.
    pub fn reveal(&self, node: &mut Node) {
        for command in std::mem::take(&mut node.hidden) {
            self.apply(&mut node.records, command);
        }
    }

    fn apply(&self, records: &mut [Record], command: Command) {
        match command {
            Command::Write(write) => {
                let Write { id, kind } = self.script[write];
                records[id] = kind.apply(records[id]);
            }
            Command::Copy(id, record) => records[id] = record,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_a_configuration() {
        let config = Config::parse("script=u1,v2y kill-a=1 kill-proxy=2 net dead-b total=3").unwrap();
        assert_eq!(config.script.len(), 2);
        assert_eq!(config.budget.node_kills, [1, 0]);
        assert_eq!((config.budget.proxy_kills, config.budget.network), (2, 1));
        assert_eq!(config.dead, [false, true]);
        assert_eq!(config.ids(), Set::below(2));
        assert_eq!(config.ids_of(Set::one(1)), Set::one(1));
        assert_eq!(config.writes_on(Set::below(2), Set::one(0)), Set::one(0));
    }

    #[test]
    fn refuses_what_is_no_configuration() {
        for text in ["", "total=2", "script=u1 tot=2", "script=u1 net=x", "script=w1"] {
            assert!(Config::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_hidden_write_shows_with_the_next_one() {
        let config = Config::parse("script=u1,v2").unwrap();
        let mut node = super::super::state::State::initial(Budget::default()).nodes[0].clone();
        node.hidden.push(Command::Write(0));
        assert_eq!(node.records[0], None);
        config.execute(&mut node, Command::Write(1));
        let both = script::Fields { first: 1, second: 2 };
        assert_eq!(node.records[0], Some(both));
        config.execute(&mut node, Command::Copy(0, None));
        assert_eq!(node.records[0], None);
    }
}
