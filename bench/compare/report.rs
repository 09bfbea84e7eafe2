//! `bench/RESULTS.md`: one section for each part, written anew when that part runs and kept otherwise.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use crate::common::{cores, percentile};

/// Numbers of several rounds as `median (least..most)`.
pub fn spread(numbers: &[f64], digits: usize) -> String {
    match [50.0, 0.0, 100.0].map(|p| percentile(numbers, p)) {
        [median, ..] if median.is_nan() => "-".into(),
        [median, low, high] => format!("{median:.digits$} ({low:.digits$}..{high:.digits$})"),
    }
}

/// Round by round, one over the other.
pub fn ratios(over: &[f64], under: &[f64]) -> Vec<f64> {
    over.iter().zip(under).map(|(over, under)| over / under).collect()
}

/// A Markdown table.
pub struct Table(String);

impl Table {
    pub fn new(columns: &[&str]) -> Table {
        Table(format!(
            "| {} |\n|{}\n",
            columns.join(" | "),
            "---|".repeat(columns.len())
        ))
    }

    pub fn row(&mut self, cells: &[String]) {
        let _ = writeln!(self.0, "| {} |", cells.join(" | "));
    }

    pub fn end(self) -> String {
        self.0 + "\n"
    }
}

/// One part of the page, and what a run must not show.
pub struct Section {
    pub text: String,
    pub faults: Vec<String>,
}

impl From<String> for Section {
    fn from(text: String) -> Section {
        Section { text, faults: vec![] }
    }
}

/// A table of columns that all have the same rows, each with its name.
pub fn columns_of(titles: &[&str], columns: Vec<Vec<(&'static str, String)>>) -> Table {
    let mut table = Table::new(&[&[""], titles].concat());
    for row in 0..columns.first().map_or(0, Vec::len) {
        let name = columns[0][row].0.to_owned();
        let values = columns.iter().map(|column| column[row].1.clone());
        table.row(&std::iter::once(name).chain(values).collect::<Vec<_>>());
    }
    table
}

/// The first line of what a program prints.
fn says(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let text = output.map(|o| [o.stdout, o.stderr].concat()).unwrap_or_default();
    String::from_utf8_lossy(&text).lines().next().unwrap_or("-").to_owned()
}

fn locked_version(name: &str) -> String {
    let lock = include_str!("../../Cargo.lock");
    let after = lock.split_once(&format!("name = \"{name}\"\nversion = \""));
    after
        .and_then(|(_, rest)| rest.split('"').next())
        .unwrap_or("-")
        .to_owned()
}

fn field(file: &str, name: &str) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_once(':'))
        .map_or("-", |(_, value)| value.trim())
        .to_owned()
}

fn chroma_version() -> String {
    let stamp = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/.chroma-version");
    std::fs::read_to_string(stamp).map_or("-".into(), |text| text.trim().to_owned())
}

pub fn commit() -> String {
    says("git", &["describe", "--always", "--dirty", "--abbrev=9"])
}

const HOW: &str = "\
Written by `make bench`; `make bench PARTS='stub writers'` measures some parts anew and leaves the rest of this page as it
is, `ROUNDS=` and `SECONDS=` (per arm and round) make it shorter or longer. What each arm is: [README.md](README.md).

Numbers are medians of rounds with the least and the most of them in parentheses. A round visits all arms, in changing
order; ratios are taken within a round. Servers, proxy, journal and load share the cores of one machine, so a ratio says
more than a number, and `other programs` says what a run is worth: how many cores were kept busy by programs that have
nothing to do with it.
";

fn head() -> String {
    let memory: f64 = field("/proc/meminfo", "MemTotal")
        .trim_end_matches(" kB")
        .parse()
        .unwrap_or(0.0);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!(
        "# Results\n\n{HOW}\nMachine: {} cores of {}, {:.0} GB of memory, Linux {}. Diptych {}, {}, Pingora {}, Chroma {}, {}, {}.\n",
        cores(),
        field("/proc/cpuinfo", "model name"),
        memory / 1e6,
        kernel.split('-').next().unwrap_or_default().trim(),
        env!("CARGO_PKG_VERSION"),
        says("rustc", &["--version"]).split(" (").next().unwrap_or_default(),
        locked_version("pingora"),
        chroma_version(),
        says("pgbench", &["--version"])
            .split(" (")
            .next()
            .unwrap_or_default()
            .replace("pgbench (PostgreSQL)", "Postgres"),
        says("nginx", &["-v"])
            .trim_start_matches("nginx version: ")
            .replace("nginx/", "nginx "),
    )
}

/// Puts sections into the page, in the order of `order`; those that are not given stay.
pub fn publish(file: &Path, order: &[&str], sections: &BTreeMap<&'static str, String>) {
    let before = std::fs::read_to_string(file).unwrap_or_default();
    let mut kept: BTreeMap<String, String> = BTreeMap::new();
    for part in before.split("\n## ").skip(1) {
        let (title, text) = part.split_once('\n').unwrap_or((part, ""));
        kept.insert(title.trim().to_owned(), text.trim().to_owned());
    }
    for (title, text) in sections {
        kept.insert((*title).to_owned(), text.trim().to_owned());
    }
    let mut page = head();
    for title in order {
        if let Some(text) = kept.get(*title) {
            let _ = write!(page, "\n## {title}\n\n{text}\n");
        }
    }
    std::fs::write(file, page).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
}
