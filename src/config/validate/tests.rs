//! One contradiction each, and what is close to it and fine.

use super::*;

fn problems(text: &str) -> Vec<String> {
    let config = Config::parse(text, &|_| None).unwrap_or_else(|e| panic!("{text}: {e}"));
    config.validate().iter().map(ToString::to_string).collect()
}

/// Without the note that the default log has a relative path.
fn found(text: &str) -> Vec<String> {
    problems(text)
        .into_iter()
        .filter(|problem| !problem.starts_with("note: wal.url"))
        .collect()
}

fn one(text: &str, key: &str, part: &str) {
    let all = found(text);
    assert_eq!(all.len(), 1, "{text}: {all:?}");
    assert!(
        all[0].contains(&format!("{key}: ")) && all[0].contains(part),
        "{text}: {all:?}"
    );
}

#[test]
fn the_defaults_have_one_note() {
    let all = Config::default().validate();
    assert_eq!(all.len(), 1, "{all:?}");
    assert_eq!((all[0].severity, all[0].key.as_str()), (Severity::Note, "wal.url"));
}

#[test]
fn listeners_need_addresses_of_their_own() {
    one("listen: []", "error: listen", "no address");
    one(
        "listen: [{address: '127.0.0.1:8900'}]",
        "error: listen[0].address",
        "also the admin address",
    );
    one(
        "listen: [{address: '0.0.0.0:8900'}]",
        "error: listen[0].address",
        "also the admin address",
    );
    one(
        "listen: [{address: '[::]:8900'}]",
        "error: listen[0].address",
        "also the admin address",
    );
    one(
        "listen: [{address: '1.2.3.4:1'}, {address: '0.0.0.0:1'}]",
        "error: listen[1].address",
        "by listen[0]",
    );
    assert_eq!(
        found("listen: [{address: '127.0.0.1:0'}, {address: '127.0.0.1:0'}]"),
        [""; 0]
    );
    assert_eq!(
        found("listen: [{address: '127.0.0.2:8900'}, {address: '127.0.0.3:8900'}]"),
        [""; 0]
    );
    assert_eq!(
        found("listen: [{address: '0.0.0.0:8900'}]\nadmin: {address: '[::1]:8900'}"),
        [""; 0]
    );
}

#[test]
fn a_node_is_not_ourselves() {
    for node in [
        "127.0.0.1:8000",
        "localhost:8000",
        "0.0.0.0:8000",
        "[::1]:8000",
        "127.0.0.2:8000",
    ] {
        let text = format!("nodes: [{{name: a, url: 'http://{node}'}}, {{name: b, url: 'http://b:8000'}}]");
        one(&text, "error: nodes[0].url", "our own address (listen[0]");
    }
    let admin = "nodes: [{name: a, url: 'http://localhost:8900'}, {name: b, url: 'http://10.0.0.1:8000'}]";
    one(admin, "error: nodes[0].url", "our own address (admin");
    let apart = "listen: [{address: '127.0.0.1:8000'}]\nnodes: [{name: a, url: 'http://127.0.0.2:8000'}, {name: b, url: 'http://b:8000'}]";
    assert_eq!(found(apart), [""; 0]);
}

#[test]
fn verbs_need_loopback_or_a_token() {
    let config = |text: &str| Config::parse(text, &|_| None).unwrap();
    let public = "admin: {address: '0.0.0.0:8900'}";
    one(public, "warning: admin.token", "verbs under /admin/ are off");
    assert!(!config(public).verbs_allowed());
    let guarded = "admin: {address: '0.0.0.0:8900', token: secret}";
    assert_eq!(found(guarded), [""; 0]);
    assert!(config(guarded).verbs_allowed());
    assert!(Config::default().verbs_allowed());
    let off = "admin: {address: null}";
    assert_eq!(found(off), [""; 0]);
    assert!(!config(off).verbs_allowed());
    one("admin: {token: 'with space'}", "error: admin.token", "visible ASCII");
}

#[test]
fn nodes_are_several_and_distinct() {
    one("nodes: []", "error: nodes", "no nodes");
    one(
        "nodes: [{name: a, url: 'http://a:8000'}]",
        "warning: nodes",
        "no redundancy",
    );
    for (a, b) in [
        ("http://a:1", "http://A:1/"),
        ("http://localhost:1", "http://127.0.0.1:1"),
        ("http://a:1", "http://a.:1"),
    ] {
        let text = format!("nodes: [{{name: a, url: '{a}'}}, {{name: b, url: '{b}'}}]");
        one(&text, "error: nodes[1].url", "same server as nodes[0]");
    }
    one(
        "nodes: [{name: a, url: 'http://a:1'}, {name: a, url: 'http://b:1'}]",
        "error: nodes[1].name",
        "nodes[0] too",
    );
    let long = "n".repeat(64);
    for name in ["", "A", "a b", "ä", "a.b", &long] {
        let text = format!("nodes: [{{name: '{name}', url: 'http://a:1'}}, {{name: b, url: 'http://b:1'}}]");
        one(&text, "error: nodes[0].name", "is not a name");
    }
    let text = format!(
        "nodes: [{{name: '{}', url: 'http://a:1'}}, {{name: b-_0, url: 'http://b:1'}}]",
        &long[1..]
    );
    assert_eq!(found(&text), [""; 0]);
    let weightless = "nodes: [{name: a, url: 'http://a:1', read_weight: 0}, {name: b, url: 'http://b:1'}]";
    one(weightless, "error: nodes[0].read_weight", "at least 1");
}

#[test]
fn the_log_is_postgres_or_sqlite() {
    for url in [
        "postgres://u:p@h/d",
        "postgresql://h/d",
        "sqlite:///var/x.db",
        "sqlite:/x.db?mode=rwc",
    ] {
        assert_eq!(problems(&format!("wal: {{url: '{url}'}}")), [""; 0], "{url}");
    }
    one(
        "wal: {url: 'mysql://root:hunter2@h/d'}",
        "error: wal.url",
        "`mysql` is not a log we know",
    );
    one("wal: {url: 'diptych.db'}", "error: wal.url", "no scheme");
    one("wal: {url: ''}", "error: wal.url", "no scheme");
    one("wal: {url: 'postgres://h:port/d'}", "error: wal.url", "not a URL");
    one("wal: {url: 'sqlite://'}", "error: wal.url", "names no file");
    one("wal: {url: 'sqlite::memory:'}", "warning: wal.url", "in memory");
    one("daemon: true", "warning: wal.url", "relative");
    assert!(!problems("wal: {url: 'mysql://root:hunter2@h/d'}")[0].contains("hunter2"));
}

#[test]
fn amounts_are_not_zero() {
    for (section, key) in [
        ("wal", "max_connections"),
        ("health", "unhealthy_after"),
        ("health", "healthy_after"),
        ("writes", "queue"),
        ("writes", "queue_bytes"),
        ("writes", "combine_records"),
        ("writes", "combine_bytes"),
        ("drain", "batch_records"),
        ("drain", "batch_bytes"),
        ("drain", "concurrency"),
    ] {
        one(
            &format!("{section}: {{{key}: 0}}"),
            &format!("error: {section}.{key}"),
            "at least 1",
        );
    }
    one("writes: {max_body: 0}", "error: writes.max_body", "at least 1");
    one(
        "writes: {bytes_in_flight: 1MiB}",
        "error: writes.bytes_in_flight",
        "at least writes.max_body",
    );
    one("threads: 0", "error: threads", "at least 1");
    one("max_retries: 0", "error: max_retries", "no request is ever sent");
    one("listener_tasks_per_fd: 0", "error: listener_tasks_per_fd", "at least 1");
}

#[test]
fn no_batch_is_larger_than_chroma_takes() {
    for section in ["writes: {combine", "drain: {batch"] {
        let key = section.replace(": {", ".");
        one(
            &format!("{section}_records: 5462}}"),
            &format!("error: {key}_records"),
            "5461",
        );
        one(
            &format!("{section}_bytes: 41MiB}}"),
            &format!("error: {key}_bytes"),
            "40MiB",
        );
    }
}

#[test]
fn limits_and_shares_can_be_kept() {
    one(
        "wal: {max_bytes: 1MiB}",
        "error: wal.max_bytes",
        "at least writes.max_body",
    );
    one("repair: {batch_records: 10001}", "error: repair.batch_records", "10000");
    one("repair: {concurrency: 0}", "error: repair.concurrency", "at least 1");
    one("verify: {sample: 0}", "error: verify.sample", "percent");
    one("verify: {sample: 101}", "error: verify.sample", "percent");
    one(
        "namespace: {tenants: [ab]}",
        "error: namespace.tenants[0]",
        "3 characters",
    );
    for fine in [
        "wal: {max_bytes: 0, max_age: 0s}",
        "repair: {rate: 0, batch_records: 10000}",
        "verify: {interval: 0s, sample: 1}",
        "namespace: {tenants: [äöü], databases: [a/b/docs]}",
    ] {
        assert_eq!(found(fine), [""; 0], "{fine}");
    }
}

#[test]
fn times_are_not_zero_and_fit_each_other() {
    for (section, key) in [
        ("health", "timeout"),
        ("reads", "timeout"),
        ("reads", "behind_wait"),
        ("writes", "mirror_grace"),
    ] {
        one(
            &format!("{section}: {{{key}: 0s}}"),
            &format!("error: {section}.{key}"),
            "longer than zero",
        );
    }
    assert_eq!(found("health: {interval: 0s, timeout: 0s}").len(), 2);
    assert_eq!(
        found("writes: {timeout: 0s}").len(),
        2,
        "the timeout, and a grace that is longer"
    );
    one(
        "health: {timeout: 2s}",
        "warning: health.timeout",
        "longer than health.interval",
    );
    one(
        "writes: {mirror_grace: 11m}",
        "error: writes.mirror_grace",
        "longer than writes.timeout",
    );
    assert_eq!(found("writes: {mirror_grace: 10m}"), [""; 0]);
}

#[test]
fn the_log_level_is_one() {
    for level in ["info", "WARN", "off", "info,diptych::drain=debug", "diptych=trace"] {
        assert_eq!(found(&format!("log: {{level: '{level}'}}")), [""; 0], "{level}");
    }
    for level in ["", "inof", "verbose", "diptych=loud"] {
        one(
            &format!("log: {{level: '{level}'}}"),
            "error: log.level",
            "is not one of off, error",
        );
    }
}

#[test]
fn everything_is_found_at_once_errors_first() {
    let all = problems("nodes: []\nthreads: 0\nhealth: {timeout: 2s}\nadmin: {address: '0.0.0.0:1'}");
    let severities: Vec<_> = all.iter().map(|problem| problem.split(':').next().unwrap()).collect();
    assert_eq!(severities, ["error", "error", "warning", "warning", "note"], "{all:?}");
}
