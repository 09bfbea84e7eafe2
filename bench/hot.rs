//! What is done for every request or every write, in this process and between two waits: the path, the body, the choice
//! of a node, the decision, the counting. Few samples of short runs: it is to show what changed by half.

use std::hint::black_box;
use std::time::Duration;

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use diptych::chroma::{Piece, RecordWrite, classify, parse_record, replace_uuid, splice, translate};
use diptych::cluster::{Cluster, HttpNodeClient, Node};
use diptych::metrics::{Metrics, NodeMetrics};
use diptych::mirror::{Circumstances, Doubt, Outcome, decide};
use http::Method;
use uuid::Uuid;

const ID: Uuid = Uuid::from_u128(0x45bc_6510_e6f3_4641_9b2a_e560_8898_5426);
const BASE: &str = "/api/v2/tenants/default_tenant/databases/default_database";

fn routes(c: &mut Criterion) {
    for (name, method, path) in [
        ("heartbeat", Method::GET, "/api/v2/heartbeat".to_owned()),
        ("query", Method::POST, format!("{BASE}/collections/{ID}/query")),
        ("upsert", Method::POST, format!("{BASE}/collections/{ID}/upsert")),
        ("count", Method::GET, format!("{BASE}/collections/{ID}/count")),
        ("by_name", Method::GET, format!("{BASE}/collections/documents")),
        ("list", Method::GET, format!("{BASE}/collections")),
    ] {
        c.bench_function(&format!("classify/{name}"), |b| {
            b.iter(|| classify(&method, black_box(&path)))
        });
    }
}

fn ids(c: &mut Criterion) {
    let path = format!("{BASE}/collections/{ID}/query");
    let route = classify(&Method::POST, &path);
    let span = route.target().expect("a read of records").span.clone();
    c.bench_function("translate", |b| {
        b.iter(|| translate(black_box(&path), span.clone(), Uuid::nil()))
    });
    let body = Bytes::from(format!(
        r#"{{"error":"NotFoundError","message":"Collection [{ID}] does not exist."}}"#
    ));
    c.bench_function("replace_uuid", |b| {
        b.iter(|| replace_uuid(black_box(body.clone()), ID, Uuid::nil()))
    });
}

/// A write of one record with 384 numbers, as the Python client sends it.
fn single(id: usize) -> String {
    let base64 = "AACAPwAA".repeat(256);
    format!(
        r#"{{"ids":["record-{id}"],"embeddings":["{base64}"],"documents":["A document."],"metadatas":[{{"k":1}}],"uris":null}}"#
    )
}

fn bodies(c: &mut Criterion) {
    let floats = format!("[{}]", vec!["0.012345678"; 384].join(","));
    let ids: Vec<String> = (0..100).map(|n| format!("\"record-{n}\"")).collect();
    let batch = format!(
        r#"{{"ids":[{}],"embeddings":[{}],"documents":[{}],"metadatas":[{}]}}"#,
        ids.join(","),
        vec![floats; 100].join(","),
        vec![r#""A document.""#; 100].join(","),
        vec![r#"{"k":1,"source":"bench"}"#; 100].join(",")
    );
    let mut group = c.benchmark_group("parse_record");
    for (name, body) in [("single_base64_384", single(1)), ("batch_100_floats_384", batch)] {
        assert!(parse_record(RecordWrite::Upsert, body.as_bytes()).is_ok());
        group.throughput(Throughput::Bytes(body.len() as u64));
        group.bench_function(name, |b| {
            b.iter(|| parse_record(RecordWrite::Upsert, black_box(body.as_bytes())))
        });
    }
}

/// What one write of a combined batch costs, and the batch itself.
fn combining(c: &mut Criterion) {
    let bodies: Vec<String> = (0..64).map(single).collect();
    let pieces: Vec<Piece> = bodies
        .iter()
        .map(|body| Piece::of(body.as_bytes()).expect("it can be spliced"))
        .collect();
    let members: Vec<(&Piece, &[u8])> = pieces
        .iter()
        .zip(&bodies)
        .map(|(piece, body)| (piece, body.as_bytes()))
        .collect();
    let mut group = c.benchmark_group("combine");
    group.throughput(Throughput::Bytes(bodies[0].len() as u64));
    group.bench_function("take_apart", |b| b.iter(|| Piece::of(black_box(bodies[0].as_bytes()))));
    group.throughput(Throughput::Bytes(bodies.iter().map(|body| body.len() as u64).sum()));
    group.bench_function("splice_64", |b| b.iter(|| splice(black_box(&members))));
}

fn deciding(c: &mut Criterion) {
    let circumstances = Circumstances {
        refusal_has_effects: false,
        closed_nodes_are_alive: true,
    };
    for (name, outcomes) in [
        ("both_applied", [Outcome::Applied, Outcome::Applied]),
        ("one_missed", [Outcome::Applied, Outcome::Failed]),
        ("one_unknown", [Outcome::Unknown(Doubt::Silent), Outcome::Applied]),
    ] {
        c.bench_function(&format!("decide/{name}"), |b| {
            b.iter(|| decide(black_box(&outcomes), circumstances))
        });
    }
}

fn choosing(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    let node = |(index, name): (usize, &str)| {
        let authority = format!("127.0.0.1:{}", 8000 + index);
        let client = HttpNodeClient::new(&authority, runtime.handle().clone());
        Node::new(index, name, authority, 1, std::sync::Arc::new(client))
    };
    let nodes = ["primary", "replica"].into_iter().enumerate().map(node);
    let cluster = Cluster::new(nodes.collect());
    let mut random = 1_u64;
    c.bench_function("choose_node", |b| {
        b.iter(|| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let node = cluster.choose(black_box(&[0, 1]), random).expect("there are two");
            cluster.node(node).read_started();
            cluster.node(node).read_ended();
            node
        })
    });
}

fn counting(c: &mut Criterion) {
    let metrics = Metrics::new(&prometheus::Registry::new()).expect("the names are free");
    let node = NodeMetrics::new("bench");
    let took = Duration::from_micros(1500);
    c.bench_function("count_request", |b| {
        b.iter(|| {
            let in_flight = metrics.in_flight();
            node.upstream(black_box("query"), took);
            metrics.request(black_box("query"), 200, took);
            in_flight
        })
    });
}

/// The whole file takes a few seconds.
fn short() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(50))
        .measurement_time(Duration::from_millis(200))
        .sample_size(20)
        .nresamples(2000)
        .without_plots()
}

criterion_group! {
    name = benches;
    config = short();
    targets = routes, ids, bodies, combining, deciding, choosing, counting
}
criterion_main!(benches);
