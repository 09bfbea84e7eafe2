//! Status contract: what machines and people read about the system is complete, true, of the right types and in time.

use std::time::Duration;

use bytes::Bytes;
use chrono::DateTime;
use http::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use super::metrics;
use super::poll::timed;
use super::shelf::{Shelf, chunk};
use super::stage::{NO_FAILOVER, Outcome, Stage, Stop, ensure, instance};
use crate::chroma::node_path;

/// Questions whose time is measured.
const QUESTIONS: usize = 100;

pub async fn run(stage: &Stage<'_>) -> Outcome {
    stage.part("structure", structure(stage)).await;
    stage.part("service identity", identity(stage)).await;
    stage.part("health integration", health(stage)).await;
    stage.part("configuration values", configuration(stage)).await;
    stage.part("types of every metric", types(stage)).await;
    stage.part("response time", response_time(stage)).await;
    stage.part("bad requests", bad_requests(stage)).await;
    stage
        .part("writes with a node out", writes_with_a_node_out(stage))
        .await;
    // Whatever became of that: what follows is asked of a whole system.
    stage.bring_back().await?;
    stage.part("consistency", consistency(stage)).await;
    Ok(())
}

/// A kind of value.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Text,
    /// A text, or null.
    Perhaps,
    Flag,
    /// A whole number, 0 or more.
    Count,
    /// A time as of RFC 3339, or null.
    Time,
    List,
}

fn check(of: &str, value: &Value, fields: &[(&str, Kind)]) -> Result<(), String> {
    for (name, kind) in fields {
        let field = &value[*name];
        let fits = match kind {
            Kind::Text => field.as_str().is_some_and(|text| !text.is_empty()),
            Kind::Perhaps => field.is_null() || field.is_string(),
            Kind::Flag => field.is_boolean(),
            Kind::Count => field.is_u64(),
            Kind::Time => {
                field.is_null()
                    || field
                        .as_str()
                        .is_some_and(|text| DateTime::parse_from_rfc3339(text).is_ok())
            }
            Kind::List => field.is_array(),
        };
        let there = value.as_object().is_some_and(|object| object.contains_key(*name));
        ensure(there && fits, || {
            format!("{of}.{name} is {field}, which is no {kind:?}")
        })?;
    }
    Ok(())
}

const LOG: [(&str, Kind); 9] = [
    ("pending_writes", Kind::Count),
    ("pending_bytes", Kind::Count),
    ("is_replaying", Kind::Flag),
    ("total_replayed", Kind::Count),
    ("failed_replays", Kind::Count),
    ("oldest_pending", Kind::Time),
    ("parked", Kind::Count),
    ("available", Kind::Flag),
    ("journal", Kind::Text),
];

const NODE: [(&str, Kind); 11] = [
    ("name", Kind::Text),
    ("url", Kind::Text),
    ("healthy", Kind::Flag),
    ("up", Kind::Flag),
    ("in_sync", Kind::Flag),
    ("pending_writes", Kind::Count),
    ("oldest_pending", Kind::Time),
    ("parked", Kind::Count),
    ("repairs", Kind::Count),
    ("ejections", Kind::Count),
    ("last_error", Kind::Perhaps),
];

async fn structure(stage: &Stage<'_>) -> Outcome {
    let admin = &stage.system.admin;
    let status = admin.status().await?;
    let top = [
        ("service", Kind::Text),
        ("version", Kind::Text),
        ("leader", Kind::Flag),
        ("term", Kind::Count),
        ("healthy_instances", Kind::Count),
        ("total_instances", Kind::Count),
        ("instances", Kind::List),
        ("not_in_sync", Kind::List),
    ];
    check("/status", &status, &top)?;
    for node in status["instances"].as_array().into_iter().flatten() {
        check("/status instances[]", node, &NODE)?;
    }
    check("/status write_ahead_log", &status["write_ahead_log"], &LOG)?;
    ensure(status["wal"] == status["write_ahead_log"], || {
        "wal is not write_ahead_log".to_owned()
    })?;
    let wal = admin.web.get("/wal/status").await?.expect(200)?;
    check("/wal/status wal_system", &wal["wal_system"], &LOG)?;
    let nodes = wal["wal_system"]["nodes"].as_array().ok_or("no nodes in /wal/status")?;
    ensure(nodes.len() == stage.system.nodes.len(), || {
        format!("/wal/status has {} nodes", nodes.len())
    })?;
    for node in nodes {
        check("/wal/status nodes[]", node, &NODE)?;
    }
    Ok(())
}

async fn identity(stage: &Stage<'_>) -> Outcome {
    let system = stage.system;
    let status = system.admin.status().await?;
    let health = system.admin.web.get("/health").await?.expect(200)?;
    let service = status["service"].as_str().unwrap_or_default();
    ensure(service.starts_with("Diptych"), || {
        format!("the service calls itself {service:?}")
    })?;
    ensure(health["service"] == service, || {
        format!("/health calls it {}", health["service"])
    })?;
    stage.fact("version", status["version"].clone());
    // The port for clients belongs to the same process, where it tells.
    let there = system.proxy.web.get("/status").await?;
    match system.listen_status {
        Some(false) => drop(there.expect(404)?),
        None if there.status == 404 => {}
        _ => {
            let there = there.expect(200)?;
            for field in ["service", "version", "term", "holder"] {
                ensure(there[field] == status[field], || {
                    format!(
                        "{field} is {} on the proxy port and {} on the admin port",
                        there[field], status[field]
                    )
                })?;
            }
        }
    }
    Ok(())
}

async fn health(stage: &Stage<'_>) -> Outcome {
    let admin = &stage.system.admin;
    Ok(stage
        .until("/health says what /status says", async || {
            let reply = admin.web.get("/health").await?;
            let (health, status) = (reply.json(), admin.status().await?);
            let counted = format!("{}/{}", status["healthy_instances"], status["total_instances"]);
            ensure(health["healthy_instances"] == counted, || {
                format!("{reply}; /status: {counted}")
            })?;
            let pending = &status["wal"]["pending_writes"];
            ensure(health["pending_writes"] == *pending, || {
                format!("{reply}; /status: {pending} pending")
            })?;
            let whole = status["instances"].as_array().into_iter().flatten();
            let whole = whole.fold(true, |whole, node| {
                whole && node["healthy"] == true && node["in_sync"] == true
            });
            let word = if whole { "healthy" } else { "degraded" };
            ensure(reply.status == 200 && health["status"] == word, || {
                format!("{reply}; it ought to be {word}")
            })?;
            // Nodes that are called healthy answer.
            for node in &stage.system.nodes {
                if instance(&status, &node.name)?["healthy"] == true {
                    node.heartbeat().await?;
                }
            }
            Ok(())
        })
        .await?)
}

async fn configuration(stage: &Stage<'_>) -> Outcome {
    let system = stage.system;
    let status = system.admin.status().await?;
    let names = status["instances"].as_array().into_iter().flatten();
    let names: Vec<&str> = names.filter_map(|node| node["name"].as_str()).collect();
    let expected: Vec<&str> = system.nodes.iter().map(|node| node.name.as_str()).collect();
    ensure(names == expected, || {
        format!("the nodes are {names:?}, and ought to be {expected:?}")
    })?;
    ensure(status["total_instances"] == expected.len(), || {
        format!("total_instances is {}", status["total_instances"])
    })?;
    if let Some(scheme) = &system.scheme {
        for node in &system.nodes {
            let url = &instance(&status, &node.name)?["url"];
            ensure(*url == format!("http://{}", node.web.authority), || {
                format!("the url of {} is {url} and not that of the configuration", node.name)
            })?;
        }
        let journal = status["wal"]["journal"].as_str().unwrap_or_default();
        ensure(journal.to_lowercase().contains(scheme), || {
            format!("the log is {journal:?}, and ought to be {scheme}")
        })?;
    }
    Ok(())
}

async fn types(stage: &Stage<'_>) -> Outcome {
    let families = scrape(stage).await?;
    for (name, family) in &families {
        if let Some(fault) = metrics::fault(name, family) {
            return Err(fault.into());
        }
    }
    let ours = families.keys().filter(|name| name.starts_with("diptych_")).count();
    ensure(ours > 0, || "no metric of Diptych is there".to_owned())?;
    stage.fact("metrics", families.len());
    Ok(())
}

async fn scrape(stage: &Stage<'_>) -> Result<std::collections::BTreeMap<String, metrics::Family>, String> {
    let reply = stage.system.admin.web.get("/metrics").await?;
    reply.expect(200)?;
    metrics::parse(&String::from_utf8_lossy(&reply.body))
}

async fn response_time(stage: &Stage<'_>) -> Outcome {
    let mut times = vec![];
    for _ in 0..QUESTIONS {
        let (status, time) = timed(stage.system.admin.status()).await;
        status?;
        times.push(time);
    }
    times.sort_unstable();
    // The smallest time that so many percent do not exceed.
    let quantile = |percent: usize| times[(times.len() * percent).div_ceil(100) - 1];
    let millis = |time: Duration| time.as_secs_f64() * 1000.0;
    let (p50, p99) = (quantile(50), quantile(99));
    stage.fact("status_p50_ms", (millis(p50) * 100.0).round() / 100.0);
    stage.fact("status_p99_ms", (millis(p99) * 100.0).round() / 100.0);
    let most = stage.system.max_p99;
    Ok(ensure(p99 <= most, || {
        format!(
            "p99 of {QUESTIONS} times /status is {:.1} ms, more than {:.1} ms",
            millis(p99),
            millis(most)
        )
    })?)
}

/// A refusal with this status, the name of an error and a sentence.
fn refused(reply: &super::web::Reply, status: u16) -> Result<(), String> {
    let body = reply.expect(status)?;
    let clear = ["error", "message"]
        .iter()
        .all(|field| body[*field].as_str().is_some_and(|text| !text.is_empty()));
    ensure(clear, || format!("{reply}, which has no error and no message"))
}

async fn bad_requests(stage: &Stage<'_>) -> Outcome {
    let system = stage.system;
    let (admin, proxy) = (&system.admin.web, &system.proxy);
    refused(&admin.get("/admin/collection_mappings?limit=many").await?, 400)?;
    refused(&admin.get("/nothing/here").await?, 404)?;
    refused(&admin.ask(Method::POST, "/status", None).await?, 405)?;
    let unknown = Uuid::new_v4();
    let records = json!({"ids": ["x"], "embeddings": [[1.0]]});
    for op in ["get", "add"] {
        refused(&proxy.op(unknown, op, &records).await?, 404)?;
    }
    let path = node_path::record(&proxy.tenant, &proxy.database, unknown, "get");
    let no_id = path.replace(&unknown.to_string(), "not%20an%20id");
    refused(&proxy.web.post(&no_id, &records).await?, 400)?;
    let shelf = Shelf::create(stage, "refusals").await?;
    shelf.add(&[chunk("kept", 0, 0)]).await?;
    let path = node_path::record(&proxy.tenant, &proxy.database, shelf.id, "add");
    let broken = proxy
        .web
        .send(Method::POST, &path, Some(Bytes::from_static(b"{\"ids\":")))
        .await?;
    refused(&broken, 400)?;
    let short = json!({"ids": ["x"], "embeddings": [[1.0, 2.0]]});
    refused(&proxy.op(shelf.id, "upsert", &short).await?, 400)?;
    let uneven = json!({"ids": ["x", "y"], "embeddings": [[1.0]]});
    refused(&proxy.op(shelf.id, "add", &uneven).await?, 400)?;
    // A verb does nothing on the port for clients.
    let verb = proxy.web.ask(Method::POST, "/admin/drain/pause", None).await?;
    ensure(verb.status == 404, || format!("a verb on the proxy port: {verb}"))?;
    // And what was refused changed nothing.
    Ok(shelf.is_everywhere().await?)
}

async fn writes_with_a_node_out(stage: &Stage<'_>) -> Outcome {
    let system = stage.system;
    let Some(way) = &system.way else {
        return Err(Stop::Skipped(NO_FAILOVER.to_owned()));
    };
    let shelf = Shelf::create(stage, "unseen").await?;
    shelf.is_everywhere().await?;
    let last = system.nodes.len() - 1;
    let name = &system.nodes[last].name;
    stage.take_out(way, last).await?;
    for part in 0..5 {
        shelf.add(&[chunk("unseen", part, 0)]).await?;
    }
    shelf.is_everywhere().await?;
    let status = system.admin.status().await?;
    let node = instance(&status, name)?;
    ensure(
        node["in_sync"] == false && node["pending_writes"].as_u64() > Some(0),
        || format!("{name} missed writes, and /status says {node}"),
    )?;
    ensure(
        node["oldest_pending"].is_string() && status["wal"]["oldest_pending"].is_string(),
        || format!("no age of the oldest entry: {node}"),
    )?;
    let log = &status["wal"]["pending_writes"];
    ensure(log.as_u64() >= node["pending_writes"].as_u64(), || {
        format!("the log as a whole has {log} pending")
    })?;
    let health = system.admin.web.get("/health").await?;
    ensure(health.expect(200)?["status"] == "degraded", || {
        format!("{health}; it ought to be degraded")
    })?;
    let count = system.admin.web.get("/admin/wal_count").await?;
    ensure(count.expect(200)?["pending_writes"].as_u64() > Some(0), || {
        format!("{count}; it ought to count")
    })?;
    stage.bring_back().await?;
    let status = system.admin.status().await?;
    let node = instance(&status, name)?;
    ensure(node["oldest_pending"].is_null(), || {
        format!("nothing is pending, and the oldest is {node}")
    })?;
    Ok(shelf.is_everywhere().await?)
}

async fn consistency(stage: &Stage<'_>) -> Outcome {
    let system = stage.system;
    let shelf = Shelf::create(stage, "consistent").await?;
    shelf.add(&[chunk("consistent", 0, 0)]).await?;
    shelf.is_everywhere().await?;
    let first = system.admin.status().await?;
    for _ in 0..10 {
        let next = system.admin.status().await?;
        for field in ["service", "version", "term", "holder", "leader", "total_instances"] {
            ensure(next[field] == first[field], || {
                format!("{field} was {} and is {}", first[field], next[field])
            })?;
        }
        let replayed = |status: &Value| status["wal"]["total_replayed"].as_u64();
        ensure(replayed(&next) >= replayed(&first), || {
            "total_replayed goes down".to_owned()
        })?;
    }
    // The same in both forms; a value may move between two questions, so until it is seen to agree.
    Ok(stage
        .until("/status and /metrics agree", async || {
            let (status, families) = (system.admin.status().await?, scrape(stage).await?);
            for node in &system.nodes {
                let shown = instance(&status, &node.name)?;
                let number = |value: &Value| value.as_f64().unwrap_or_else(|| f64::from(u8::from(*value == true)));
                for (field, metric) in [
                    ("healthy", "diptych_node_healthy"),
                    ("up", "diptych_node_up"),
                    ("in_sync", "diptych_node_in_sync"),
                    ("pending_writes", "diptych_backlog_entries"),
                    ("pending_bytes", "diptych_backlog_bytes"),
                    ("parked", "diptych_parked_entries"),
                ] {
                    let value = metrics::of_node(&families, metric, &node.name);
                    ensure(value == Some(number(&shown[field])), || {
                        format!(
                            "{field} of {} is {}, and {metric} is {value:?}",
                            node.name, shown[field]
                        )
                    })?;
                }
            }
            Ok(())
        })
        .await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_that_is_missing_or_of_another_type_is_told() {
        let of = |value: Value, kind| check("x", &value, &[("a", kind)]);
        assert!(of(json!({"a": null}), Kind::Time).is_ok() && of(json!({"a": null}), Kind::Perhaps).is_ok());
        assert!(of(json!({"a": "2030-01-01T00:00:00.000Z"}), Kind::Time).is_ok());
        for (value, kind) in [
            (json!({}), Kind::Time),
            (json!({}), Kind::Perhaps),
            (json!({"a": "yesterday"}), Kind::Time),
            (json!({"a": ""}), Kind::Text),
            (json!({"a": "3"}), Kind::Count),
            (json!({"a": -1}), Kind::Count),
            (json!({"a": 1.5}), Kind::Count),
            (json!({"a": 1}), Kind::Flag),
            (json!({"a": {}}), Kind::List),
        ] {
            assert!(of(value.clone(), kind).is_err(), "{value} as {kind:?}");
        }
    }
}
