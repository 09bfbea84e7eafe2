//! One configuration: the operations on one name, the faults that may happen, the rules that hold.

use super::rules::NameRule;
use super::state::NODES;
use crate::rules::Rules;

/// Operations a script can have.
pub const MAX_OPS: usize = 4;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Delete the collection that the name stands for.
    Delete,
    /// Create a collection of that name: the next generation.
    Create,
    /// Add a record to the collection.
    Add,
}

/// Faults that may still happen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Budget {
    pub node_kills: [u8; NODES],
    pub proxy_kills: u8,
    pub network: u8,
    pub total: u8,
}

#[derive(Debug, Clone)]
pub struct Config {
    pub script: Vec<Op>,
    pub budget: Budget,
    /// Nodes that never come back once they are down.
    pub dead: [bool; NODES],
    pub rules: Rules<NameRule>,
}

impl Config {
    /// Reads `script=dcw kill-a=1 net=1 total=2 ...`: `d` delete, `c` create, `w` add a record.
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
                config.script = parse_script(value)?;
                continue;
            }
            let count: u8 = value.parse().map_err(|_| format!("not a number: {word:?}"))?;
            match key {
                "kill-a" => config.budget.node_kills[0] = count,
                "kill-b" => config.budget.node_kills[1] = count,
                "kill-proxy" => config.budget.proxy_kills = count,
                "net" => config.budget.network = count,
                "total" => config.budget.total = count,
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

    /// The generation that an operation is about: a create makes it, the others mean the newest there is.
    pub fn generation(&self, op: usize) -> usize {
        self.script[..=op].iter().filter(|&&op| op == Op::Create).count()
    }
}

fn parse_script(text: &str) -> Result<Vec<Op>, String> {
    let op = |letter| match letter {
        'd' => Ok(Op::Delete),
        'c' => Ok(Op::Create),
        'w' => Ok(Op::Add),
        _ => Err(format!("no operation: {letter:?} (one of d, c, w)")),
    };
    let script = text.chars().map(op).collect::<Result<Vec<_>, _>>()?;
    match script.len() {
        ..=MAX_OPS => Ok(script),
        many => Err(format!("a script has at most {MAX_OPS} operations, not {many}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_a_configuration() {
        let config = Config::parse("script=dcw kill-a=2 net total=3 dead-a").unwrap();
        assert_eq!(config.script, [Op::Delete, Op::Create, Op::Add]);
        assert_eq!(config.budget.node_kills, [2, 0]);
        assert_eq!((config.budget.network, config.budget.total), (1, 3));
        assert_eq!(config.dead, [true, false]);
        assert_eq!([0, 1, 2].map(|op| config.generation(op)), [0, 1, 1]);
    }

    #[test]
    fn refuses_what_is_no_configuration() {
        for text in [
            "",
            "total=2",
            "script=x",
            "script=dcdcd",
            "script=d wipe=1",
            "script=d net=y",
        ] {
            assert!(Config::parse(text).is_err(), "{text:?}");
        }
    }
}
