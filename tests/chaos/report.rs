//! What came out, for people and for `grep '^chaos '`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::checker::{Kind, context};
use crate::harness::Stage;
use crate::history::{Key, Op, Outcome};
use crate::nemesis::{CALM, Nemesis};
use crate::verdict::Verdict;
use crate::world::World;

pub fn report(stage: &Stage, world: &World, nemesis: &Nemesis, verdict: &Verdict) -> String {
    let mut text = String::new();
    let mut line = |words: std::fmt::Arguments| {
        let _ = writeln!(text, "chaos {words}");
    };
    let network = world.networks[0].describe();
    line(format_args!(
        "run {} journal={:?} seed={} network={network}",
        stage.name, stage.journal, stage.seed
    ));
    let mut kinds: BTreeMap<&str, [usize; 4]> = BTreeMap::new();
    let mut errors: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for op in verdict.ops.iter().filter(|op| op.what != "final") {
        let at = match op.outcome {
            Outcome::Acked => 0,
            Outcome::Refused => 1,
            Outcome::Indefinite => 2,
            Outcome::Abandoned => 3,
        };
        kinds.entry(op.what).or_default()[at] += 1;
        if let Some(error) = &op.error {
            *errors.entry((error, &op.during)).or_default() += 1;
        }
    }
    let mut total = [0; 4];
    for (what, counts) in &kinds {
        (0..4).for_each(|n| total[n] += counts[n]);
        line(format_args!("operations kind={what} {}", outcomes(counts)));
    }
    line(format_args!(
        "operations kind=total all={} {}",
        total.iter().sum::<usize>(),
        outcomes(&total)
    ));
    let mut faults: BTreeMap<&str, usize> = BTreeMap::new();
    for fault in &nemesis.faults {
        *faults.entry(fault.kind.name()).or_default() += 1;
    }
    for (kind, count) in &faults {
        line(format_args!("faults kind={kind} count={count}"));
    }
    line(format_args!(
        "faults kind=total count={} proxy_ended_by_itself={}",
        nemesis.faults.len(),
        world.proxy_ended
    ));
    for ((error, during), count) in &errors {
        line(format_args!(
            "errors count={count} during=\"{during}\" error=\"{error}\""
        ));
    }
    let unexpected = verdict.ops.iter().filter(|op| is_unexpected(op)).count();
    let corrupt = corrupt(&stage.dir);
    line(format_args!(
        "errors total={} with_one_node_away_and_all_else_well={unexpected}",
        errors.values().sum::<usize>()
    ));
    let found: Vec<_> = Kind::ALL
        .iter()
        .map(|kind| format!("{}={}", kind.name(), verdict.count(*kind)))
        .collect();
    line(format_args!(
        "result seed={} {} differences={} order={} mixed={} unsettled={} corrupt_indexes={corrupt} records={} settle_seconds={:.1} {}",
        stage.seed,
        found.join(" "),
        verdict.differences.len(),
        verdict.order.len(),
        verdict.mixed.len(),
        verdict.unsettled.len(),
        verdict.records,
        verdict.settle_seconds,
        if verdict.is_good() { "GOOD" } else { "BAD" },
    ));
    text
}

fn outcomes([acked, refused, indefinite, abandoned]: &[usize; 4]) -> String {
    format!("acked={acked} refused={refused} indefinite={indefinite} abandoned={abandoned}")
}

/// An error while one node was away and everything else was well. That Chroma answers 4xx is not one.
fn is_unexpected(op: &Op) -> bool {
    op.error.as_ref().is_some_and(|e| !e.starts_with('4')) && op.during.ends_with(CALM)
}

/// Collections whose index a node could not open, as its log tells (Chroma's own weakness after a kill).
fn corrupt(dir: &Path) -> usize {
    let logs = ["chroma-a.log", "chroma-b.log"].map(|log| std::fs::read_to_string(dir.join(log)).unwrap_or_default());
    logs.iter().map(|log| log.matches("hnsw segment writer").count()).sum()
}

/// What went wrong, with everything that happened to the registers concerned.
pub fn evidence(nemesis: &Nemesis, verdict: &Verdict) -> String {
    const SHOWN: usize = 10;
    let mut text = format!("nemesis:\n{}\n", nemesis.log());
    for complaint in verdict.unsettled.iter().take(SHOWN) {
        let _ = writeln!(text, "unsettled: {complaint}");
    }
    for (what, complaints) in [
        ("difference", &verdict.differences),
        ("order", &verdict.order),
        ("mixed", &verdict.mixed),
    ] {
        for complaint in complaints.iter().take(SHOWN) {
            let shown: String = complaint.chars().take(1000).collect();
            let _ = writeln!(text, "{what}: {shown}");
        }
    }
    let mut shown: BTreeSet<&Key> = BTreeSet::new();
    for violation in &verdict.violations {
        if shown.len() >= SHOWN && !shown.contains(&violation.key) {
            continue;
        }
        let key = &violation.key;
        let name = violation.kind.name();
        let _ = writeln!(
            text,
            "violation: {name} {}/{} seen by #{}: {}",
            key.place, key.id, violation.op, violation.text
        );
        shown.insert(key);
    }
    for key in shown {
        let _ = writeln!(text, "all of {}/{}:", key.place, key.id);
        for (n, op) in context(&verdict.ops, key) {
            let only = Op {
                effects: op.effects.iter().filter(|(k, _)| k == key).cloned().collect(),
                ..op.clone()
            };
            let _ = writeln!(text, "  {}", only.line(n));
        }
    }
    for op in verdict.ops.iter().filter(|op| is_unexpected(op)).take(SHOWN) {
        let _ = writeln!(text, "error with all else well: {}", op.line(0));
    }
    text
}

/// Copies logs, data and the whole history of a run to where they outlive it.
pub fn keep(stage: &Stage, report: &str, evidence: &str, ops: &[Op]) -> PathBuf {
    let name = stage.name.replace("::", ".");
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("chaos");
    let kept = kept.join(format!("{name}-{}", stage.seed));
    let _ = std::fs::remove_dir_all(&kept);
    std::fs::create_dir_all(kept.parent().expect("a folder")).expect("the target folder");
    let copied = Command::new("cp").arg("-r").arg(&stage.dir).arg(&kept).status();
    if !copied.is_ok_and(|status| status.success()) {
        let _ = std::fs::create_dir_all(&kept);
    }
    let history: String = ops.iter().enumerate().map(|(n, op)| op.line(n) + "\n").collect();
    for (file, text) in [
        ("report.txt", report),
        ("evidence.txt", evidence),
        ("history.txt", &history),
    ] {
        let _ = std::fs::write(kept.join(file), text);
    }
    kept
}
