//! What the proxy does to every request before anything is sent: classify the path, look through the body, translate.

use std::hint::black_box;

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use diptych::chroma::bodies::parse_record;
use diptych::chroma::ids::replace_uuid;
use diptych::chroma::{RecordWrite, classify};
use http::Method;
use uuid::Uuid;

const ID: Uuid = Uuid::from_u128(0x45bc_6510_e6f3_4641_9b2a_e560_8898_5426);

fn routes(c: &mut Criterion) {
    let base = "/api/v2/tenants/default_tenant/databases/default_database";
    for (name, method, path) in [
        ("heartbeat", Method::GET, "/api/v2/heartbeat".to_owned()),
        ("query", Method::POST, format!("{base}/collections/{ID}/query")),
        ("upsert", Method::POST, format!("{base}/collections/{ID}/upsert")),
        ("count", Method::GET, format!("{base}/collections/{ID}/count")),
        ("by_name", Method::GET, format!("{base}/collections/documents")),
        ("list", Method::GET, format!("{base}/collections")),
    ] {
        c.bench_function(&format!("classify/{name}"), |b| {
            b.iter(|| classify(&method, black_box(&path)))
        });
    }
}

fn bodies(c: &mut Criterion) {
    let base64 = "AACAPwAA".repeat(256); // 384 float32
    let single = format!(
        r#"{{"ids":["record-1"],"embeddings":["{base64}"],"documents":["A document."],"metadatas":[{{"k":1}}],"uris":null}}"#
    );
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
    for (name, body) in [("single_base64_384", single), ("batch_100_floats_384", batch)] {
        assert!(parse_record(RecordWrite::Upsert, body.as_bytes()).is_ok());
        group.throughput(Throughput::Bytes(body.len() as u64));
        group.bench_function(name, |b| {
            b.iter(|| parse_record(RecordWrite::Upsert, black_box(body.as_bytes())))
        });
    }
}

fn ids(c: &mut Criterion) {
    let body = Bytes::from(format!(
        r#"{{"error":"NotFoundError","message":"Collection [{ID}] does not exist."}}"#
    ));
    c.bench_function("replace_uuid", |b| {
        b.iter(|| replace_uuid(black_box(body.clone()), ID, Uuid::nil()))
    });
}

criterion_group!(benches, routes, bodies, ids);
criterion_main!(benches);
