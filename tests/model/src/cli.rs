//! The command line: the suite, or one search with its counterexample.

use std::process::ExitCode;

use crate::names::{self, NameModel, NameRule};
use crate::records::{self, RecordModel, RecordRule};
use crate::rules::{Rule, Rules, by_name};
use crate::search::{Limits, Model, Report, Verdict, search};
use crate::suite::{self, STATES};

const USAGE: &str = "usage:
  diptych-model all              every configuration with all rules; each rule off in turn
  diptych-model fast             the small ones
  diptych-model rules            the rules that can be switched off
  diptych-model records WORD...  one search; words: script=u1,v2,p3,a4,d,u1y, the faults kill-a= kill-b= kill-proxy=
                                 net= hidden= journal= refuse= wipe= snapshot= total=, read=, dead-a, dead-b
  diptych-model names WORD...    one search; words: script=dcw, kill-a= kill-b= kill-proxy= net= total=, dead-a, dead-b
  a search takes also: without=RULE (several times), livelocks";

pub fn run(arguments: &[String]) -> ExitCode {
    let outcome = match arguments.split_first() {
        Some((what, [])) if what == "all" => Ok(suite::run(suite::Extent::All)),
        Some((what, [])) if what == "fast" => Ok(suite::run(suite::Extent::Fast)),
        Some((what, [])) if what == "rules" => {
            list::<RecordRule>("records");
            list::<NameRule>("names");
            Ok(true)
        }
        Some((what, words)) if what == "records" => records_once(words),
        Some((what, words)) if what == "names" => names_once(words),
        _ => Err(USAGE.into()),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(complaint) => {
            eprintln!("{complaint}");
            ExitCode::from(2)
        }
    }
}

fn list<R: Rule>(model: &str) {
    for &rule in R::ALL {
        println!("{model:8} {:28} {}", rule.name(), rule.cites());
    }
}

/// The words of a search that are not about its configuration.
struct Words<R> {
    configuration: String,
    rules: Rules<R>,
    livelocks: bool,
}

fn sort<R: Rule>(words: &[String]) -> Result<Words<R>, String> {
    let mut sorted = Words {
        configuration: String::new(),
        rules: Rules::all(),
        livelocks: false,
    };
    for word in words {
        if let Some(name) = word.strip_prefix("without=") {
            let rule = by_name(name).ok_or_else(|| format!("no rule of this model: {name}"))?;
            sorted.rules = sorted.rules.without(rule);
        } else if word == "livelocks" {
            sorted.livelocks = true;
        } else {
            sorted.configuration += word;
            sorted.configuration += " ";
        }
    }
    Ok(sorted)
}

fn records_once(words: &[String]) -> Result<bool, String> {
    let words = sort::<RecordRule>(words)?;
    let mut config = records::Config::parse(&words.configuration)?;
    config.rules = words.rules;
    Ok(once(&RecordModel::new(config), words.livelocks))
}

fn names_once(words: &[String]) -> Result<bool, String> {
    let words = sort::<NameRule>(words)?;
    let mut config = names::Config::parse(&words.configuration)?;
    config.rules = words.rules;
    Ok(once(&NameModel::new(config), words.livelocks))
}

/// Whether every state was seen and is right.
fn once(model: &impl Model, livelocks: bool) -> bool {
    let limits = Limits {
        states: STATES,
        livelocks,
    };
    let report = search(model, limits);
    let Report {
        verdict,
        states,
        edges,
        quiescent,
        depth,
        path,
    } = &report;
    for (number, (label, state)) in path.iter().enumerate() {
        println!("{:3}. {label:75} | {state}", number + 1);
    }
    let said = match verdict {
        Verdict::Exhausted => "no violation, all states seen",
        Verdict::Capped => "no violation, NOT all states seen",
        Verdict::Violation(violation) => violation,
    };
    println!("{said}: {states} states, {edges} edges, {quiescent} quiescent, depth {depth}");
    *verdict == Verdict::Exhausted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(String::from).collect()
    }

    #[test]
    fn a_search_that_finds_nothing_succeeds() {
        assert_eq!(records_once(&words("script=u1 net=1 total=1 livelocks")), Ok(true));
        assert_eq!(names_once(&words("script=dc net=1 total=1")), Ok(true));
    }

    #[test]
    fn a_search_that_finds_a_violation_fails() {
        let text = "script=u1 kill-proxy=1 net=1 total=2 without=row-before-ack";
        assert_eq!(records_once(&words(text)), Ok(false));
    }

    #[test]
    fn unknown_rules_are_refused() {
        assert!(records_once(&words("script=u1 without=deleted-by-id")).is_err());
        assert!(names_once(&words("script=d without=row-before-ack")).is_err());
    }
}
