//! The top level, where our sections and Pingora's own server keys stand side by side.
//!
//! Pingora ignores keys it does not know, so that others can share its file; we refuse them, because a misspelt
//! `grace_period_second` that does nothing is found out at the worst moment. The keys allowed are our sections and what a
//! default `ServerConf` serialises to, so a newer Pingora brings its new keys along. One pass over the map serves both:
//! our keys are taken out of the stream as they come by, and `ServerConf` reads the rest from the same reader, with its
//! types and its places.

use std::collections::HashSet;
use std::fmt;
use std::sync::OnceLock;

use pingora::server::configuration::ServerConf;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, Visitor};

use super::Config;

/// Our keys at the top level, in the order of the shipped file.
pub(super) const SECTIONS: [&str; 14] = [
    "listen",
    "admin",
    "nodes",
    "wal",
    "health",
    "reads",
    "writes",
    "drain",
    "heal",
    "repair",
    "verify",
    "namespace",
    "listen_status",
    "log",
];

/// Every key allowed at the top level.
pub(super) fn keys() -> &'static [&'static str] {
    static KEYS: OnceLock<Vec<&'static str>> = OnceLock::new();
    KEYS.get_or_init(|| {
        let pingora = pingora_keys().keys().map(String::as_str);
        SECTIONS.into_iter().chain(pingora).collect()
    })
}

/// Pingora's keys, with our defaults for them.
pub(super) fn pingora_keys() -> &'static serde_json::Map<String, serde_json::Value> {
    static KEYS: OnceLock<serde_json::Map<String, serde_json::Value>> = OnceLock::new();
    KEYS.get_or_init(|| match serde_json::to_value(server_defaults()) {
        Ok(serde_json::Value::Object(keys)) => keys,
        _ => serde_json::Map::new(),
    })
}

/// Pingora's defaults but for five: a process of its own has files of its own name; one thread would leave a second core
/// idle; and Pingora's 300 s of grace, always slept in full, would outlast every supervisor's patience.
pub(super) fn server_defaults() -> ServerConf {
    ServerConf {
        threads: 2,
        grace_period_seconds: Some(30),
        graceful_shutdown_timeout_seconds: Some(5),
        pid_file: "/tmp/diptych.pid".to_owned(),
        upgrade_sock: "/tmp/diptych_upgrade.sock".to_owned(),
        ..ServerConf::default()
    }
}

/// Reads the whole file.
pub(super) fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Config, D::Error> {
    deserializer.deserialize_struct("configuration", keys(), TopLevel)
}

struct TopLevel;

impl<'de> Visitor<'de> for TopLevel {
    type Value = Config;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the keys of a Diptych configuration")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Config, A::Error> {
        let mut rest = PingorasRest {
            map,
            config: Config::default(),
            seen: HashSet::new(),
        };
        let server = ServerConf::deserialize(MapAccessDeserializer::new(&mut rest))?;
        let PingorasRest { mut config, seen, .. } = rest;
        config.server = with_our_defaults(server, &seen);
        Ok(config)
    }
}

fn with_our_defaults(mut server: ServerConf, seen: &HashSet<String>) -> ServerConf {
    let ours = server_defaults();
    macro_rules! unless_given {
        ($($key:ident)*) => { $(if !seen.contains(stringify!($key)) { server.$key = ours.$key; })* };
    }
    unless_given!(threads grace_period_seconds graceful_shutdown_timeout_seconds pid_file upgrade_sock);
    // `user: ${RUN_AS:-}` means nobody in particular, not the user without a name.
    for text in [
        &mut server.error_log,
        &mut server.user,
        &mut server.group,
        &mut server.ca_file,
    ] {
        text.take_if(|text| text.is_empty());
    }
    server
}

/// The map as `ServerConf` sees it: without our keys, which are read on the way.
struct PingorasRest<A> {
    map: A,
    config: Config,
    seen: HashSet<String>,
}

impl<'de, A: MapAccess<'de>> PingorasRest<A> {
    fn take_ours(&mut self, key: &str) -> Result<bool, A::Error> {
        let Self { map, config, .. } = self;
        match key {
            "listen" => config.listen = map.next_value()?,
            "admin" => config.admin = map.next_value()?,
            "nodes" => config.nodes = map.next_value()?,
            "wal" => config.wal = map.next_value()?,
            "health" => config.health = map.next_value()?,
            "reads" => config.reads = map.next_value()?,
            "writes" => config.writes = map.next_value()?,
            "drain" => config.drain = map.next_value()?,
            "heal" => config.heal = map.next_value()?,
            "repair" => config.repair = map.next_value()?,
            "verify" => config.verify = map.next_value()?,
            "namespace" => config.namespace = map.next_value()?,
            "listen_status" => config.listen_status = map.next_value()?,
            "log" => config.log = map.next_value()?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for &mut PingorasRest<A> {
    type Error = A::Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        while let Some(key) = self.map.next_key::<String>()? {
            if !self.take_ours(&key)? {
                self.seen.insert(key.clone());
                return seed.deserialize(key.into_deserializer()).map(Some);
            }
        }
        Ok(None)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        self.map.next_value_seed(seed)
    }
}
