//! `diptych health` and `deploy/wal_health_check.sh` judge alike, whatever `/status` says.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

/// Answers every request with this body, on a port of its own.
fn serve(body: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("its address").port();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.expect("a client");
            let _ = client.read(&mut [0; 4096]);
            let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length:";
            let _ = write!(client, "{head} {}\r\n\r\n{body}", body.len());
        }
    });
    format!("http://127.0.0.1:{port}")
}

fn ago(seconds: i64) -> Value {
    json!(
        (chrono::Utc::now() - chrono::Duration::seconds(seconds)).to_rfc3339_opts(chrono::SecondsFormat::Millis, true)
    )
}

fn well() -> Value {
    let node = |name: &str| json!({"name": name, "healthy": true, "in_sync": true, "maintenance": null, "pending_writes": 0, "repairs": 0});
    json!({"total_instances": 2, "healthy_instances": 2, "leader": true, "verified_at": ago(7200),
           "instances": [node("primary"), node("replica")],
           "wal": {"pending_writes": 0, "oldest_pending": null, "parked": 0, "parked_repairs": 0, "available": true,
                   "unprotected": false, "drain_paused": false}})
}

/// Exit code and text of both.
fn asked(url: &str, limits: &[(&str, &str)]) -> [(i32, String); 2] {
    let mut health = Command::new(env!("CARGO_BIN_EXE_diptych"));
    health.args(["health", "--url", url]).env_remove("DIPTYCH_CONFIG");
    let mut script = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/wal_health_check.sh"));
    script.arg(url);
    for (name, value) in limits {
        health.args([
            format!("--{}", name.to_lowercase().replace('_', "-")),
            (*value).to_owned(),
        ]);
        script.env(name, value.trim_end_matches('s'));
    }
    [health, script].map(|mut command| {
        let output = command.stdin(Stdio::null()).output().expect("it runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code().expect("an exit code"), text)
    })
}

/// A status, thresholds, the exit code that both have, and a part of what both say.
type Case = (Value, &'static [(&'static str, &'static str)], i32, &'static str);

#[test]
fn both_health_checks_judge_alike() {
    let set = |path: &str, value: Value| {
        let mut status = well();
        *status.pointer_mut(path).expect("it is there") = value;
        status
    };
    let pending = |count: u64| set("/wal/pending_writes", json!(count));
    let oldest = |seconds: i64| set("/wal/oldest_pending", ago(seconds));
    let cases: Vec<Case> = vec![
        (well(), &[], 0, ""),
        (pending(999), &[], 0, ""),
        (pending(1000), &[], 1, "1000 entries"),
        (pending(100_000), &[], 2, "100000 entries"),
        (pending(5), &[("PENDING_WARNING", "5")], 1, "5 entries"),
        (pending(5), &[("PENDING_CRITICAL", "5")], 2, "5 entries"),
        (oldest(60), &[], 0, ""),
        (oldest(400), &[], 1, "oldest entry"),
        (oldest(4000), &[], 2, "oldest entry"),
        (oldest(60), &[("AGE_CRITICAL", "30s")], 2, "oldest entry"),
        (set("/wal/parked", json!(1)), &[], 1, "parked"),
        (
            set("/wal/parked_repairs", json!(2)),
            &[("PARKED_CRITICAL", "2")],
            2,
            "parked",
        ),
        (set("/wal/parked", json!(1)), &[("PARKED_WARNING", "2")], 0, ""),
        (set("/healthy_instances", json!(1)), &[], 1, "1 of 2 nodes"),
        (
            set("/healthy_instances", json!(1)),
            &[("NODES_CRITICAL", "2")],
            2,
            "1 of 2 nodes",
        ),
        (set("/healthy_instances", json!(1)), &[("NODES_WARNING", "1")], 0, ""),
        (set("/healthy_instances", json!(0)), &[], 2, "0 of 2 nodes"),
        (well(), &[("VERIFY_WARNING", "3600s")], 1, "ot compared for"),
        (well(), &[("VERIFY_CRITICAL", "3600s")], 2, "ot compared for"),
        (
            set("/verified_at", Value::Null),
            &[("VERIFY_CRITICAL", "3600s")],
            1,
            "ot everything was compared",
        ),
        (
            set("/leader", json!(false)),
            &[],
            2,
            "nother proxy has taken over the log",
        ),
        (set("/wal/available", json!(false)), &[], 2, "he log does not answer"),
        (set("/wal/unprotected", json!(true)), &[], 1, "writes without the log"),
        (set("/wal/drain_paused", json!(true)), &[], 1, "he drain is paused"),
        (
            set("/instances/1/maintenance", json!({"who": "x"})),
            &[],
            1,
            "replica is in maintenance",
        ),
        (
            set("/instances/0/in_sync", json!(false)),
            &[],
            1,
            "primary is not in step",
        ),
        (json!({"status": "ok"}), &[], 3, "is it a Diptych?"),
        (json!({"wal": {}, "total_instances": 2}), &[], 3, "is it a Diptych?"),
    ];
    for (status, limits, code, words) in cases {
        let said = asked(&serve(status.to_string()), limits);
        for (found, text) in &said {
            assert!(
                *found == code && text.contains(words),
                "{code} and `{words}` for {limits:?}: {said:?}"
            );
        }
        // Whatever is not well comes with something to do.
        let advice = said[1].1.matches("  -> ").count();
        assert_eq!(advice > 0, (1..=2).contains(&code), "{said:?}");
    }
    let nowhere = asked("http://127.0.0.1:1", &[]);
    assert!(
        nowhere
            .iter()
            .all(|(code, text)| *code == 2 && text.contains("can be reached")),
        "{nowhere:?}"
    );
}
