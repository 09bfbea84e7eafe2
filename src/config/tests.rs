//! The file as a whole: what is read, what is refused and where.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

const SHIPPED: &str = include_str!("../../conf/diptych.yaml");

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, &|_| None)
}

fn with(text: &str, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let variables: HashMap<_, _> = variables.iter().copied().collect();
    Config::parse(text, &|name| variables.get(name).map(|value| (*value).to_owned()))
}

#[track_caller]
fn fails(text: &str, (line, column): (usize, usize), part: &str) {
    let error = parse(text).expect_err(text);
    assert!(error.message.contains(part), "{text}: {error}");
    assert_eq!(
        (error.line, error.column),
        (Some(line), Some(column)),
        "{text}: {error}"
    );
    assert!(!error.message.contains(" at line "), "the place is said once: {error}");
}

// ---- Defaults ----

#[test]
fn the_defaults_are_the_shipped_file() {
    assert_eq!(parse(SHIPPED).unwrap(), Config::default());
}

#[test]
fn the_shipped_file_names_every_key() {
    let shipped: serde_yaml::Mapping = serde_yaml::from_str(SHIPPED).unwrap();
    let mut shipped: Vec<_> = shipped.keys().map(|key| key.as_str().unwrap()).collect();
    let mut keys = top::keys().to_vec();
    shipped.sort_unstable();
    keys.sort_unstable();
    assert_eq!(shipped, keys);
    for section in [
        serde_json::to_value(Health::default()),
        serde_json::to_value(Reads::default()),
        serde_json::to_value(Writes::default()),
        serde_json::to_value(Drain::default()),
        serde_json::to_value(Wal::default()),
        serde_json::to_value(Repair::default()),
        serde_json::to_value(Verify::default()),
        serde_json::to_value(Namespace::default()),
        serde_json::to_value(Log::default()),
    ] {
        for key in section.unwrap().as_object().unwrap().keys() {
            assert!(SHIPPED.contains(&format!("\n  {key}: ")), "{key}");
        }
    }
}

#[test]
fn nothing_said_is_the_defaults() {
    for text in [
        "",
        "# only a comment\n",
        "---\n",
        "{}",
        "reads:\nwrites:\n  # timeout: 1s\n",
    ] {
        assert_eq!(parse(text).as_ref(), Ok(&Config::default()), "{text:?}");
    }
}

#[test]
fn every_section_is_read() {
    let config = parse(
        "
listen:
  - address: 127.0.0.1:9000
  - address: '[::1]:9001'
admin: {address: null, token: 12345}
nodes:
  - {name: a, url: 'http://a:1', read_weight: 3}
  - {name: b, url: 'http://b:1'}
wal: {url: 'postgres://u:p@h/d', max_connections: 3, payload: always, when_unavailable: refuse, max_bytes: 1GiB,
      max_age: 1d}
heal: manual
repair: {concurrency: 3, batch_records: 7, rate: 500}
verify: {interval: 0s, sample: 5}
namespace: {tenants: [acme], databases: [a/b/docs]}
health: {interval: 250ms, timeout: 200ms, unhealthy_after: 3, healthy_after: 4}
reads: {consistency: lead, timeout: 5s, behind_wait: 1m}
writes: {timeout: 1h, mirror_grace: 1s, max_body: 10MB, combine_records: 8, combine_bytes: 1MiB, queue: 5,
         queue_bytes: 2MiB, queue_timeout: 7s, bytes_in_flight: 1GiB}
drain: {batch_records: 10, batch_bytes: 512KiB, concurrency: 1, foreground_factor: 0}
listen_status: false
log: {level: debug, format: json}
threads: 4
user: 1000
grace_period_seconds: null
",
    )
    .unwrap();
    assert_eq!(config.listen[1].address.to_string(), "[::1]:9001");
    assert_eq!(
        (config.admin.address, config.admin.token.as_deref()),
        (None, Some("12345"))
    );
    assert_eq!((config.nodes[0].read_weight, config.nodes[1].read_weight), (3, 1));
    let expected = Wal {
        url: "postgres://u:p@h/d".to_owned(),
        max_connections: 3,
        payload: LogPayload::Always,
        when_unavailable: WhenUnavailable::Refuse,
        max_bytes: 1 << 30,
        max_age: Duration::from_secs(86_400),
    };
    assert_eq!(config.wal, expected);
    let repair = Repair {
        concurrency: 3,
        batch_records: 7,
        rate: 500,
    };
    assert_eq!((config.heal, config.repair), (Heal::Manual, repair));
    assert_eq!((config.verify.interval, config.verify.sample), (Duration::ZERO, 5));
    assert_eq!(config.namespace.tenants, ["acme"]);
    let database = &config.namespace.databases[0];
    assert_eq!((database.tenant.as_str(), database.database.as_str()), ("a/b", "docs"));
    assert_eq!(
        (config.health.interval, config.health.timeout),
        (Duration::from_millis(250), Duration::from_millis(200))
    );
    assert_eq!((config.health.unhealthy_after, config.health.healthy_after), (3, 4));
    assert_eq!(
        (config.reads.consistency, config.reads.behind_wait),
        (Consistency::Lead, Duration::from_secs(60))
    );
    assert_eq!(
        (config.writes.timeout, config.writes.max_body),
        (Duration::from_secs(3600), 10_000_000)
    );
    assert_eq!(
        (config.writes.combine_records, config.writes.combine_bytes),
        (8, 1 << 20)
    );
    assert_eq!(
        (
            config.writes.queue,
            config.writes.queue_bytes,
            config.writes.queue_timeout
        ),
        (5, 2 << 20, Duration::from_secs(7))
    );
    assert_eq!(config.writes.bytes_in_flight, 1 << 30);
    assert_eq!(
        (
            config.drain.batch_records,
            config.drain.batch_bytes,
            config.drain.concurrency,
            config.drain.foreground_factor
        ),
        (10, 512 << 10, 1, 0)
    );
    assert!(!config.listen_status);
    assert_eq!(
        (config.log.level.as_str(), config.log.format),
        ("debug", LogFormat::Json)
    );
    assert_eq!(
        (config.server.threads, config.server.user.as_deref()),
        (4, Some("1000"))
    );
    assert_eq!(
        config.server.grace_period_seconds, None,
        "null is Pingora's own default, not ours"
    );
    assert_eq!(config.server.pid_file, "/tmp/diptych.pid");
}

// ---- Refused, with its place ----

#[test]
fn unknown_keys_are_refused_where_they_stand() {
    fails(
        "threads: 1\nlissten: []\n",
        (2, 1),
        "unknown key `lissten`; did you mean `listen`?",
    );
    fails(
        "grace_period_second: 3\n",
        (1, 1),
        "did you mean `grace_period_seconds`?",
    );
    fails(
        "reads:\n  timeout: 1s\n  timeuot: 1s\n",
        (3, 3),
        "reads: unknown key `timeuot`; did you mean `timeout`?",
    );
    fails(
        "health: {interval: 1s, healthyAfter: 2}\n",
        (1, 24),
        "did you mean `healthy_after`?",
    );
    fails(
        "listen:\n  - address: 0.0.0.0:1\n    tls: {}\n",
        (3, 5),
        "unknown key `tls`",
    );
    fails(
        "nodes:\n  - name: a\n    uri: http://a:1\n",
        (3, 5),
        "nodes[0]: unknown key `uri`; did you mean `url`?",
    );
    fails("reads: {<<: {timeout: 1s}}\n", (1, 9), "unknown key `<<`");
    fails("zzz: 1\n", (1, 1), "unknown key `zzz`");
}

#[test]
fn repeated_keys_are_refused() {
    fails("threads: 1\nthreads: 2\n", (2, 1), "`threads` is given twice");
    fails(
        "listen_status: true\nlog: {}\nlisten_status: true\n",
        (3, 1),
        "`listen_status` is given twice",
    );
    fails("writes:\n  queue: 1\n  queue: 2\n", (3, 3), "`queue` is given twice");
}

#[test]
fn values_of_the_wrong_kind_are_refused_where_they_stand() {
    fails("threads: many\n", (1, 10), "threads: invalid type: string \"many\"");
    fails(
        "daemon: 1\n",
        (1, 9),
        "daemon: invalid type: integer `1`, expected a boolean",
    );
    fails(
        "wal:\n  max_connections: -1\n",
        (2, 20),
        "wal.max_connections: invalid value",
    );
    fails("wal:\n  max_connections: '8'\n", (2, 20), "invalid type: string \"8\"");
    fails(
        "health: {healthy_after: 99999999999}\n",
        (1, 25),
        "health.healthy_after",
    );
    fails("listen_status: yes\n", (1, 16), "expected a boolean");
    fails("reads: 5\n", (1, 8), "expected keys and values");
    fails("reads: soon\n", (1, 8), "keys and values");
    fails("reads: [1]\n", (1, 8), "keys and values");
    fails("nodes: {a: b}\n", (1, 8), "sequence");
    fails("nodes:\n  - name: a\n", (2, 5), "missing field `url`");
    fails(
        "reads:\n  consistency: sesion\n",
        (2, 16),
        "`sesion` is not one of `session`, `lead`, `any`; did you mean",
    );
    fails("log: !yaml {format: text}\n", (1, 6), "tags");
    fails("- listen\n", (1, 1), "keys and values");
    fails(
        "runtime_metrics_poll_time_histogram_scale: round\n",
        (1, 44),
        "is not one of",
    );
}

#[test]
fn bad_durations_sizes_and_addresses_are_refused_with_an_example() {
    fails(
        "reads:\n  timeout: 30\n",
        (2, 12),
        "reads.timeout: `30` has no unit: a duration is",
    );
    fails("health: {interval: 1 fortnight}\n", (1, 20), "as in `250ms`");
    fails("reads: {timeout: [1s]}\n", (1, 18), "expected a single value");
    fails("writes: {max_body: 40M}\n", (1, 20), "as in `40MiB`");
    fails(
        "drain:\n  batch_bytes: -1\n",
        (2, 16),
        "drain.batch_bytes: `-1` is not a size",
    );
    fails(
        "namespace:\n  databases: [docs]\n",
        (2, 15),
        "namespace.databases[0]: `docs` is not a tenant and a database, as in `acme/docs`",
    );
    fails("wal: {payload: allways}\n", (1, 16), "did you mean");
    fails("heal: yes\n", (1, 7), "is not one of `auto`, `manual`");
    fails(
        "listen: [{address: localhost}]\n",
        (1, 20),
        "listen[0].address: `localhost` is not an address",
    );
    fails(
        "admin:\n  address: '8900'\n",
        (2, 12),
        "admin.address: `8900` is not an address",
    );
    fails(
        "nodes:\n- {name: a, url: 'https://a:1'}\n",
        (2, 18),
        "nodes[0].url: TLS to nodes isn't supported",
    );
}

#[test]
fn broken_yaml_is_refused_where_it_breaks() {
    let error = parse("listen:\n  - address: [\n").unwrap_err();
    assert!(error.line.is_some() && error.column.is_some(), "{error}");
    assert!(parse("threads: 1\n---\nthreads: 2\n").is_err());
    assert!(parse("threads: *nowhere\n").is_err());
}

#[test]
fn pingoras_own_checks_are_made() {
    let error = parse("max_blocking_threads: 0").unwrap_err();
    assert_eq!(error.to_string(), "max_blocking_threads must be greater than zero");
}

// ---- Variables ----

#[test]
fn variables_reach_every_kind_of_value() {
    let text = "
listen: [{address: \"${LISTEN}\"}]
threads: ${THREADS:-3}
daemon: ${DAEMON}
user: ${RUN_AS:-}
listen_status: \"${STATUS:-false}\"
wal: {url: '${SCHEME}://h/${DB}', max_connections: \"${CONNECTIONS}\"}
reads:
  timeout: ${SECONDS}s
  consistency: ${CONSISTENCY:-any}
writes: {max_body: \"${BODY:-1KiB}\"}
nodes:
  - name: ${NAME:-a}
    url: http://${HOST}:8000
    read_weight: ${WEIGHT:- 7 }
";
    let variables = [
        ("LISTEN", "127.0.0.1:1"),
        ("DAEMON", "true"),
        ("SCHEME", "postgres"),
        ("DB", "d"),
        ("CONNECTIONS", "5"),
        ("SECONDS", "9"),
        ("HOST", "chroma"),
    ];
    let config = with(text, &variables).unwrap();
    assert_eq!(config.listen[0].address.to_string(), "127.0.0.1:1");
    assert_eq!(
        (config.server.threads, config.server.daemon, config.server.user),
        (3, true, None)
    );
    assert!(!config.listen_status);
    assert_eq!(
        (config.wal.url.as_str(), config.wal.max_connections),
        ("postgres://h/d", 5)
    );
    assert_eq!(
        (config.reads.timeout, config.reads.consistency),
        (Duration::from_secs(9), Consistency::Any)
    );
    assert_eq!((config.writes.max_body, config.nodes[0].read_weight), (1024, 7));
    assert_eq!(config.nodes[0].url.to_string(), "http://chroma:8000");
}

#[test]
fn a_missing_variable_is_named_with_its_place() {
    fails(
        "threads: 1\nwal:\n  url: ${DATABASE}\n",
        (3, 8),
        "wal.url: the environment variable `DATABASE` is not set",
    );
    fails(
        "threads: ${THREADS}\n",
        (1, 10),
        "threads: the environment variable `THREADS` is not set",
    );
    fails("reads: {consistency: \"${C}\"}\n", (1, 22), "`C` is not set");
    fails("wal: {url: \"${\"}\n", (1, 12), "without its `}`");
}

#[test]
fn comments_and_keys_are_not_expanded() {
    assert_eq!(
        parse("# ${NOWHERE}\nthreads: 2 # ${NOWHERE}\n").as_ref(),
        Ok(&Config::default())
    );
    fails("${KEY:-threads}: 2\n", (1, 1), "unknown key `${KEY:-threads}`");
}

#[test]
fn a_variable_of_the_wrong_kind_is_named_and_not_shown() {
    for (text, place) in [
        ("threads: ${V}\n", (1, 10)),
        ("daemon: ${V}\n", (1, 9)),
        ("reads: {consistency: \"${V}\"}\n", (1, 22)),
    ] {
        let error = with(text, &[("V", "hunter2")]).unwrap_err();
        assert!(error.message.contains("`${V}` does not expand to"), "{error}");
        assert!(!error.message.contains("hunter2"), "{error}");
        assert_eq!((error.line, error.column), (Some(place.0), Some(place.1)), "{error}");
    }
}

#[test]
fn a_variable_that_cannot_be_read_is_not_shown_either() {
    for text in [
        "reads:\n  timeout: ${V}\n",
        "reads:\n  timeout: x${V}\n",
        "drain:\n  batch_bytes: ${V:-1}\n",
        "admin:\n  address: ${V}\n",
        "wal:\n  max_connections: ${V}\n",
    ] {
        let error = with(text, &[("V", "hunter2")]).unwrap_err();
        assert!(error.message.contains("${V"), "{error}");
        assert!(!error.message.contains("hunter2"), "{error}");
        assert_eq!(error.line, Some(2), "{error}");
    }
    let example = with("reads: {timeout: \"${V}\"}", &[("V", "30")]).unwrap_err().message;
    assert!(
        example.starts_with("reads.timeout: `${V}` has no unit") && example.ends_with("as in `30s`"),
        "{example}"
    );
    assert!(
        with("reads: {timeout: \"${V}\"}", &[("V", "")])
            .unwrap_err()
            .message
            .contains("not a duration")
    );
}

#[test]
fn dollars_can_be_written() {
    let config = parse("admin: {token: 'pa$word$${X}'}").unwrap();
    assert_eq!(config.admin.token.as_deref(), Some("pa$word${X}"));
}

#[test]
fn an_empty_variable_is_no_token_and_no_admin_port() {
    let text = "admin: {token: \"${T}\", address: \"${A}\"}";
    assert_eq!(
        with(text, &[("T", ""), ("A", "")]).unwrap().admin,
        Admin {
            address: None,
            token: None
        }
    );
}

proptest! {
    #[test]
    fn a_value_never_becomes_structure(
        value in prop_oneof![
            ".+",
            "[\\[\\]{}:,#&*!|>'\"%@`\n\r\t $a-]+",
            Just("x\nthreads: 7".to_owned()),
            Just("x, address: 0.0.0.0:1".to_owned()),
            Just("null".to_owned()),
        ],
        text in prop_oneof![
            Just("admin:\n  token: ${V}\n"),
            Just("admin: {token: \"${V}\"}\n"),
            Just("admin:\n  token: '${V:-x}'\n"),
            Just("admin:\n  token: |-\n    ${V}\n"),
        ],
    ) {
        let config = Config::parse(text, &|_| Some(value.clone())).unwrap();
        let expected = Config { admin: Admin { token: Some(value), ..Admin::default() }, ..Config::default() };
        prop_assert_eq!(config, expected);
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in "[a-z:\n \\[\\]{}$,'\"#0-9-]{0,60}") {
        let _ = parse(&text);
    }
}

// ---- Secrets ----

#[test]
fn secrets_are_not_shown() {
    let config = parse("admin: {token: hunter2}\nwal: {url: 'postgres://u:hunter2@h/d?password=hunter2'}").unwrap();
    let shown = format!("{config:?} {config:#?} {:?}", config.validate());
    assert!(!shown.contains("hunter2"), "{shown}");
    assert!(shown.contains("postgres://u:hidden@h/d"), "{shown}");
    assert!(!serde_json::to_string(&config.admin).unwrap().contains("hunter2"));
}

#[test]
fn a_log_url_that_cannot_be_read_is_not_shown() {
    for url in ["hunter2", "postgres:hunter2", "postgres://u:hunter2@h:port/d"] {
        let config = parse(&format!("wal: {{url: '{url}'}}")).unwrap();
        assert!(
            !format!("{:?}{:?}", config.wal, config.validate()).contains("hunter2"),
            "{url}"
        );
    }
}

// ---- Files ----

#[test]
fn a_file_is_loaded_and_named_in_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.yaml");
    std::fs::write(&path, "threads: 5\n").unwrap();
    assert_eq!(Config::load(&path).unwrap().server.threads, 5);
    std::fs::write(&path, "threads: 5\nraeds: {}\n").unwrap();
    let error = Config::load(&path).unwrap_err();
    assert_eq!(error.file.as_deref(), Some(path.as_path()));
    let expected = format!("{}:2:1: unknown key `raeds`; did you mean `reads`?", path.display());
    assert_eq!(error.to_string(), expected);
    let missing = Config::load(folder.path().join("none.yaml")).unwrap_err();
    assert!(missing.to_string().contains("none.yaml: cannot be read: "), "{missing}");
}

#[test]
fn the_shipped_file_loads_from_disk_with_the_default_environment() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("conf/diptych.yaml");
    assert_eq!(
        Config::parse(&std::fs::read_to_string(path).unwrap(), &|_| None).unwrap(),
        Config::default()
    );
}
