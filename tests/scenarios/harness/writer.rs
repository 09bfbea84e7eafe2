//! A client that writes through crashes and knows what was acknowledged.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::json;

use super::api::Api;
use super::cluster::Cluster;
use super::compare::{DEFAULT, compare_nodes};

pub const PATIENCE: Duration = Duration::from_secs(60);
/// Records that are written over and over.
const RECORDS: u64 = 20;

/// Writes records one after the other and knows what was acknowledged.
pub struct Writer {
    pub api: Api,
    pub id: String,
    /// The value of the last write.
    pub next: u64,
    /// The last value sent, and the last acknowledged, of each record.
    sent: BTreeMap<String, u64>,
    pub acked: BTreeMap<String, u64>,
}

impl Writer {
    pub async fn new(cluster: &Cluster) -> Writer {
        Writer {
            api: Api::direct(&cluster.diptych.url()),
            id: cluster.api.collection("records").await,
            next: 0,
            sent: BTreeMap::new(),
            acked: BTreeMap::new(),
        }
    }

    /// Writes once. `Err`: there is nobody there.
    pub async fn write(&mut self) -> Result<u16, String> {
        let record = format!("r{}", (self.next + 1) % RECORDS);
        self.put(record).await
    }

    /// Writes a record that nothing speaks of yet: no comparison of others finds it by the way.
    pub async fn write_new(&mut self) -> Result<u16, String> {
        let record = format!("new-{}", self.next + 1);
        self.put(record).await
    }

    async fn put(&mut self, record: String) -> Result<u16, String> {
        self.next += 1;
        let n = self.next;
        self.sent.insert(record.clone(), n);
        let body =
            json!({"ids": [record], "embeddings": [[n, 1]], "documents": [n.to_string()], "metadatas": [{"n": n}]});
        let answer = self.api.try_op(&self.id, "upsert", &body).await?;
        if answer.status == 200 {
            self.acked.insert(record, n);
        }
        Ok(answer.status)
    }

    /// Writes until so many were acknowledged.
    pub async fn acked(&mut self, count: usize) {
        let end = tokio::time::Instant::now() + PATIENCE;
        let mut acked = 0;
        let mut outcome = Ok(0);
        while acked < count {
            let Ok(written) = tokio::time::timeout_at(end, self.write()).await else {
                panic!("only {acked} of {count} writes were acknowledged, the next got no answer; {outcome:?}");
            };
            outcome = written;
            acked += usize::from(outcome == Ok(200));
            assert!(
                tokio::time::Instant::now() < end,
                "only {acked} of {count} writes were acknowledged; {outcome:?}"
            );
        }
    }

    /// A record of this name that must not be written twice: the update finds nothing to change, the first time.
    pub async fn acked_once_only(&mut self, record: &str) {
        self.next += 1;
        let n = self.next;
        self.sent.insert(record.to_owned(), n);
        let update = json!({"ids": [record], "embeddings": [[n, 1]], "metadatas": [{"applied_twice": true}]});
        self.api.op(&self.id, "update", &update).await.expect(200);
        let upsert =
            json!({"ids": [record], "embeddings": [[n, 1]], "documents": [n.to_string()], "metadatas": [{"n": n}]});
        self.api.op(&self.id, "upsert", &upsert).await.expect(200);
        self.acked.insert(record.to_owned(), n);
    }

    /// So many records more, which are not written again.
    pub async fn fill(&mut self, count: usize) {
        let ids: Vec<_> = (0..count).map(|n| format!("still-{n}")).collect();
        let each = |value: serde_json::Value| vec![value; count];
        let body = json!({"ids": ids, "embeddings": each(json!([0, 1])), "documents": ids, "metadatas": each(json!({"n": 0}))});
        self.api.op(&self.id, "upsert", &body).await.expect(200);
        for id in ids {
            self.sent.insert(id.clone(), 0);
            self.acked.insert(id, 0);
        }
    }

    /// Every record has a value that was sent last, or acknowledged, or something in between.
    pub async fn check(&self, cluster: &Cluster) {
        let dump = compare_nodes(&[&cluster.a, &cluster.b], &[DEFAULT]).await;
        let dump = dump.unwrap_or_else(|difference| panic!("the nodes differ: {difference}"));
        let there: BTreeMap<&str, u64> = dump
            .collection("records")
            .records
            .iter()
            .map(|record| (record.id.as_str(), record.metadata["n"].as_u64().expect("a number")))
            .collect();
        for (record, acked) in &self.acked {
            let Some(&value) = there.get(record.as_str()) else {
                panic!("{record} is gone");
            };
            let range = *acked..=self.sent[record];
            assert!(
                range.contains(&value),
                "{record} is {value}, and {range:?} would be right"
            );
        }
    }
}
