//! `diptych validate`: proves on a deployed system that it does what it promises, and leaves nothing behind.
//!
//! Every scenario writes through the proxy and reads the nodes themselves: by name first, since a node's UUID means
//! nothing to another node, and until what is asserted holds on each of them or time is up. Whoever did not read a node
//! has proved nothing, and fails (`report::judge`).
//!
//! What it makes carries one prefix with the run's id, and a mark (`names`); what passed is removed again and looked for
//! everywhere (`clean`), what failed is kept for a look at it. Exit codes: 0 all passed, 1 something failed, 2 it could
//! not run.

mod clean;
mod contract;
mod creation;
mod documents;
mod failover;
mod health;
mod metrics;
mod names;
mod notes;
mod outage;
mod poll;
mod records;
mod report;
mod server;
mod shelf;
mod stage;
mod web;

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use chrono::Utc;
use clap::{Args, ValueEnum};
use serde_json::json;

use self::clean::{Sweep, Swept};
use self::names::RunId;
use self::notes::Notes;
use self::outage::{Out, Way, bring_back};
use self::poll::timed;
use self::report::{Cleaned, End, Judged, Report, Verdict, judge};
use self::server::Server;
use self::stage::{Outcome, Stage, System};
use self::web::{Admin, Web};
use super::client::TOKEN;
use super::status::reachable;
use super::{ask, run};
use crate::config::{NodeUrl, units};

/// `diptych validate`.
#[derive(Debug, Args)]
pub struct ValidateArgs {
    /// The configuration of the running Diptych; its nodes have to be reachable from here.
    #[arg(long, short, env = "DIPTYCH_CONFIG")]
    config: Option<PathBuf>,
    /// Instead of a configuration: the address for clients.
    #[arg(long, conflicts_with = "config", requires_all = ["admin", "nodes"])]
    proxy: Option<String>,
    /// The admin address; its token is taken from DIPTYCH_ADMIN_TOKEN.
    #[arg(long, requires = "proxy")]
    admin: Option<String>,
    /// A node, in the order of the configuration: NAME=URL, for each.
    #[arg(long = "node", requires = "proxy", value_name = "NAME=URL")]
    nodes: Vec<String>,
    /// Take each node out in turn, by `maint`.
    #[arg(long)]
    failover: bool,
    /// Take nodes out with this command instead; `{}` in it is the node's name.
    #[arg(long, value_name = "CMD", requires = "start_node")]
    stop_node: Option<String>,
    /// What starts a node again.
    #[arg(long, value_name = "CMD", requires = "stop_node")]
    start_node: Option<String>,
    /// Only these scenarios.
    #[arg(long, value_name = "SCENARIO", value_delimiter = ',')]
    only: Vec<Scenario>,
    /// How long to wait for one thing to come true.
    #[arg(long, default_value = "60s", value_parser = units::parse_duration)]
    timeout: Duration,
    /// The slowest of 100 answers of /status may take so long.
    #[arg(long, default_value = "1s", value_parser = units::parse_duration)]
    max_p99: Duration,
    /// The tenant to work in.
    #[arg(long, default_value = "default_tenant")]
    tenant: String,
    /// The database to work in; it has to exist.
    #[arg(long, default_value = "default_database")]
    database: String,
    /// Remove what earlier runs have left, and do nothing else.
    #[arg(long)]
    clean: bool,
    /// Only what is older.
    #[arg(long, requires = "clean", value_parser = units::parse_duration)]
    older_than: Option<Duration>,
    /// Only say what would be removed.
    #[arg(long, requires = "clean")]
    dry_run: bool,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
    /// Write the report for CI systems.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Write every step and every request to a file.
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
}

/// What is shown, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scenario {
    Health,
    Creation,
    Failover,
    LogSync,
    Documents,
    DocumentDelete,
    Status,
}

impl Scenario {
    fn title(self) -> &'static str {
        match self {
            Self::Health => "System health",
            Self::Creation => "Collection creation and mapping",
            Self::Failover => "Failover",
            Self::LogSync => "Log sync",
            Self::Documents => "Document operations",
            Self::DocumentDelete => "Document delete",
            Self::Status => "Status contract",
        }
    }

    /// In names and reports.
    fn key(self) -> &'static str {
        match self {
            Self::Health => "health",
            Self::Creation => "creation",
            Self::Failover => "failover",
            Self::LogSync => "log-sync",
            Self::Documents => "documents",
            Self::DocumentDelete => "document-delete",
            Self::Status => "status",
        }
    }

    async fn play(self, stage: &Stage<'_>) -> Outcome {
        match self {
            Self::Health => health::run(stage).await,
            Self::Creation => creation::run(stage).await,
            Self::Failover => failover::failover(stage).await,
            Self::LogSync => failover::log_sync(stage).await,
            Self::Documents => documents::operations(stage).await,
            Self::DocumentDelete => documents::delete(stage).await,
            Self::Status => contract::run(stage).await,
        }
    }
}

/// Runs it all and says what came of it.
pub fn validate(args: &ValidateArgs) -> ExitCode {
    let outcome = ask::runtime().and_then(|runtime| runtime.block_on(begin(args)));
    match outcome {
        Ok(end) => ExitCode::from(end as u8),
        Err(reason) => {
            eprintln!("Could not run: {reason}");
            ExitCode::from(End::CouldNotRun as u8)
        }
    }
}

async fn begin(args: &ValidateArgs) -> Result<End, String> {
    let notes = Rc::new(Notes::new(args.log.as_deref(), true)?);
    let system = system(args, &notes)?;
    // A report that cannot be written is told before the work, not after it.
    if let Some(path) = &args.junit {
        write(path, "")?;
    }
    is_there(&system).await?;
    if args.clean {
        let how = Sweep {
            older_than: args.older_than,
            dry: args.dry_run,
        };
        let swept = clean::sweep(&system, how, Utc::now()).await?;
        notes.clear();
        return Ok(tell_swept(args, &swept));
    }
    let run = RunId::new(Utc::now());
    if !args.json {
        let nodes: Vec<String> = system
            .nodes
            .iter()
            .map(|node| format!("{} ({})", node.name, node.web.authority))
            .collect();
        println!(
            "Diptych at {}, nodes {}; run {}\n",
            system.proxy.web.authority,
            nodes.join(", "),
            run.as_str()
        );
    }
    let (report, time) = timed(play(args, &system, &run)).await;
    let report = Report { time, ..report };
    notes.line(&report.json().to_string());
    if let Some(path) = &args.junit {
        write(path, &report.junit())?;
    }
    if args.json {
        println!("{}", report.json());
    } else {
        print!("{}", report.summary());
    }
    Ok(report.end())
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

/// The system that the command line speaks of.
fn system(args: &ValidateArgs, notes: &Rc<Notes>) -> Result<System, String> {
    let mut token = std::env::var(TOKEN).ok().filter(|token| !token.is_empty());
    let (proxy, admin, nodes, scheme, listen_status);
    match (&args.config, &args.proxy, &args.admin) {
        (None, Some(proxy_url), Some(admin_url)) => {
            proxy = NodeUrl::parse(proxy_url)?.authority();
            admin = NodeUrl::parse(admin_url)?.authority();
            let parse = |text: &String| {
                let (name, url) = text
                    .split_once('=')
                    .ok_or_else(|| format!("`{text}` is not NAME=URL"))?;
                Ok((name.to_owned(), NodeUrl::parse(url)?.authority()))
            };
            nodes = args.nodes.iter().map(parse).collect::<Result<Vec<_>, String>>()?;
            (scheme, listen_status) = (None, None);
        }
        (Some(path), ..) => {
            let config = run::load(Some(path)).map_err(|error| error.to_string())?;
            token = config.admin.token.or(token);
            let address = config
                .listen
                .first()
                .ok_or("the configuration has no address for clients")?
                .address;
            proxy = reachable(address).to_string();
            let address = config
                .admin
                .address
                .ok_or("admin.address is null: nobody can look into this Diptych")?;
            admin = reachable(address).to_string();
            nodes = config
                .nodes
                .iter()
                .map(|node| (node.name.clone(), node.url.authority()))
                .collect();
            let word = if config.wal.url.starts_with("sqlite") {
                "sqlite"
            } else {
                "postgres"
            };
            (scheme, listen_status) = (Some(word.to_owned()), Some(config.listen_status));
        }
        _ => {
            return Err(
                "say what to validate: --config FILE, or --proxy URL --admin URL --node NAME=URL ...".to_owned(),
            );
        }
    }
    if nodes.len() < 2 {
        return Err(format!("a mirror has two nodes at least; {} named here", nodes.len()));
    }
    let way = match (&args.stop_node, &args.start_node) {
        (Some(stop), Some(start)) => Some(Way::Commands {
            stop: stop.clone(),
            start: start.clone(),
        }),
        _ => args.failover.then_some(Way::Maint),
    };
    let reads = Rc::new(Cell::new(0));
    let server = |name: &str, authority: &str, reads: &Rc<Cell<u64>>| Server {
        name: name.to_owned(),
        web: Web::new(authority, notes.clone()),
        tenant: args.tenant.clone(),
        database: args.database.clone(),
        reads: reads.clone(),
    };
    Ok(System {
        proxy: server("the proxy", &proxy, &Rc::default()),
        nodes: nodes
            .iter()
            .map(|(name, authority)| server(name, authority, &reads))
            .collect(),
        admin: Admin {
            web: Web::new(&admin, notes.clone()),
            token,
        },
        reads,
        notes: notes.clone(),
        patience: args.timeout,
        max_p99: args.max_p99,
        way,
        out: Out::default(),
        scheme,
        listen_status,
    })
}

/// Whether there is a Diptych at all, which lets us look into it.
async fn is_there(system: &System) -> Result<(), String> {
    let status = system.admin.status().await;
    let status =
        status.map_err(|reason| format!("{reason}\nIs it the admin address of a Diptych, and is that running?"))?;
    if !status["instances"].is_array() {
        return Err(format!(
            "{} is not the admin address of a Diptych",
            system.admin.web.authority
        ));
    }
    system.admin.verb(http::Method::GET, "/admin/repairs?limit=1").await?;
    system.proxy.heartbeat().await
}

async fn play(args: &ValidateArgs, system: &System, run: &RunId) -> Report {
    let mut report = Report {
        run: run.as_str().to_owned(),
        proxy: system.proxy.web.authority.clone(),
        admin: system.admin.web.authority.clone(),
        nodes: system
            .nodes
            .iter()
            .map(|node| (node.name.clone(), node.web.authority.clone()))
            .collect(),
        time: Duration::ZERO,
        judged: vec![],
        cleaned: Cleaned::default(),
        broken_off: None,
    };
    let wanted = |scenario: &Scenario| args.only.is_empty() || args.only.contains(scenario);
    for scenario in Scenario::value_variants().iter().filter(|scenario| wanted(scenario)) {
        let stage = Stage::new(system, run, scenario.key());
        let before = system.reads.get();
        let (outcome, time) = timed(async {
            tokio::select! {
                outcome = scenario.play(&stage) => Some(outcome),
                _ = tokio::signal::ctrl_c() => None,
            }
        })
        .await;
        if outcome.is_none() {
            report.broken_off = Some(format!("interrupted in {}", scenario.title()));
        }
        let mut verdict = match outcome {
            Some(outcome) => judge(outcome, &stage.parts.borrow(), system.reads.get() - before),
            None => Verdict::Skipped("interrupted".to_owned()),
        };
        // What is counted is what the scenario read, not what cleaning up reads.
        let reads = system.reads.get() - before;
        if let Err(reason) = bring_back(system).await {
            let told = format!("a node was taken out and could not be brought back, do it yourself: {reason}");
            verdict = Verdict::Failed(told);
        }
        let verdict = clear(system, &stage, scenario, verdict, &mut report.cleaned).await;
        let judged = Judged {
            title: scenario.title(),
            key: scenario.key(),
            verdict,
            time,
            reads,
            parts: stage.parts.take(),
            facts: stage.facts.take(),
        };
        system.notes.clear();
        system.notes.line(&format!("{}: {:?}", judged.title, judged.verdict));
        if !args.json {
            print!("{}", report::line(&judged));
        }
        report.judged.push(judged);
        if report.broken_off.is_some() {
            break;
        }
    }
    report
}

/// Removes what a scenario made if it passed, and lists it if it did not. What cannot be removed is a failure.
async fn clear(
    system: &System,
    stage: &Stage<'_>,
    scenario: &Scenario,
    verdict: Verdict,
    cleaned: &mut Cleaned,
) -> Verdict {
    let prefix = stage.run.prefix(stage.key);
    let made = clean::find(system, |name| name.starts_with(&prefix)).await;
    let outcome = match (&verdict, &made) {
        (Verdict::Passed, Ok(made)) => clean::remove(system, made, cleaned).await,
        (Verdict::Passed, Err(reason)) => Err(reason.clone()),
        _ => Ok(()),
    };
    let verdict = match outcome {
        Ok(()) => verdict,
        Err(reason) => Verdict::Failed(format!("what it made cannot be removed: {reason}")),
    };
    if verdict == Verdict::Passed {
        cleaned.scenarios += 1;
        return verdict;
    }
    // What is still there now: a part of it may be gone.
    match clean::find(system, |name| name.starts_with(&prefix)).await {
        Ok(left) => cleaned
            .preserved
            .extend(left.iter().map(|one| one.kept(system, scenario.title()))),
        Err(reason) => cleaned.preserved.push(report::Kept {
            scenario: scenario.title().to_owned(),
            name: format!("{prefix}* (not all servers could be asked: {reason})"),
            places: vec![],
        }),
    }
    verdict
}

fn tell_swept(args: &ValidateArgs, swept: &Swept) -> End {
    if args.json {
        let cleaned = &swept.cleaned;
        println!(
            "{}",
            json!({"dry_run": args.dry_run, "found": swept.names, "not_removed": swept.wrong, "documents": cleaned.documents,
                   "collections": cleaned.collections, "mappings": cleaned.mappings, "log_entries": cleaned.entries})
        );
    } else {
        let word = if args.dry_run { "would be removed" } else { "found" };
        for name in &swept.names {
            println!("{word}: {name}");
        }
        for reason in &swept.wrong {
            println!("not removed: {reason}");
        }
        println!(
            "{} leftovers; {} collections, {} documents, {} mappings, {} log entries removed.",
            swept.names.len(),
            swept.cleaned.collections,
            swept.cleaned.documents,
            swept.cleaned.mappings,
            swept.cleaned.entries
        );
    }
    if swept.wrong.is_empty() {
        End::Passed
    } else {
        End::Failed
    }
}
