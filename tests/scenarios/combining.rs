//! Many clients on one collection: their writes are combined, and each gets the answer of its own.

use serde_json::{Value, json};

use crate::harness::api::Api;
use crate::harness::data::base64_embedding;
use crate::harness::{Stage, scenarios};

scenarios! {
    clients_that_mix_kinds_and_forms_are_combined_and_each_gets_its_own_answer: sqlite, postgres;
}

const CLIENTS: usize = 64;
const ROUNDS: usize = 4;

/// What a client is told: `{}` but for deletes, and the words of the refusal.
const REFUSED: &str = "refused";

struct Client {
    api: Api,
    collection: String,
    number: usize,
}

impl Client {
    fn body(&self, ids: &[String], round: usize) -> Value {
        let vector = [self.number as f32 + 0.1, round as f32, -1.5, 1e-20];
        let embedding = match self.number % 2 {
            0 => json!(vector),
            _ => json!(base64_embedding(&vector)),
        };
        let document = format!("{} {round}", self.number);
        json!({
            "ids": ids,
            "embeddings": vec![embedding; ids.len()],
            "documents": vec![document; ids.len()],
            "metadatas": vec![json!({"client": self.number, "round": round}); ids.len()],
        })
    }

    async fn told(&self, operation: &str, body: &Value, expected: (u16, Value)) {
        let answer = self.api.op(&self.collection, operation, body).await;
        let told = match answer.status {
            200 | 201 => answer.json(),
            _ => json!(REFUSED),
        };
        let (number, text) = (self.number, answer.text());
        assert_eq!((answer.status, told), expected, "client {number}, {operation}: {text}");
    }

    /// What is left of it: its record `kept` of the last round, `added` of the first.
    async fn run(self) {
        let id = |name: &str| format!("{name}-{}", self.number);
        self.told("add", &self.body(&[id("added")], 0), (201, json!({}))).await;
        for round in 0..ROUNDS {
            let gone: Vec<String> = (0..=self.number % 3).map(|n| id(&format!("gone{n}"))).collect();
            self.told("upsert", &self.body(&gone, round), (200, json!({}))).await;
            self.told("upsert", &self.body(&[id("kept")], round), (200, json!({})))
                .await;
            // It exists: kept as it is.
            self.told("add", &self.body(&[id("added")], round), (201, json!({})))
                .await;
            if self.number.is_multiple_of(8) {
                let mut bad = self.body(&[id("bad")], round);
                bad["metadatas"] = json!([{"#reserved": 1, "k": 1}]);
                self.told("upsert", &bad, (400, json!(REFUSED))).await;
            }
            let update = json!({"ids": [id("absent")], "documents": ["nobody has it"]});
            self.told("update", &update, (200, json!({}))).await;
            let deleted = json!({"deleted": gone.len()});
            self.told("delete", &json!({"ids": gone}), (200, deleted)).await;
        }
    }
}

async fn clients_that_mix_kinds_and_forms_are_combined_and_each_gets_its_own_answer(stage: Stage) {
    let cluster = stage.cluster().await;
    let collection = cluster.api.collection("crowd").await;
    let first = json!({"ids": ["first"], "embeddings": [[1, 2, 3, 4]]});
    cluster.api.op(&collection, "add", &first).await.expect(201);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let client = Client {
                api: cluster.api.clone(),
                collection: collection.clone(),
                number,
            };
            tokio::spawn(client.run())
        })
        .collect();
    for client in clients {
        client.await.expect("every client got what it expects");
    }
    let all = json!({"include": ["documents", "metadatas", "embeddings"]});
    let found = cluster.api.op(&collection, "get", &all).await.ok().json();
    let column = |name: &str| found[name].as_array().cloned().unwrap_or_default();
    let (ids, documents, embeddings) = (column("ids"), column("documents"), column("embeddings"));
    let mut seen: Vec<(String, Value, Value)> = ids
        .iter()
        .zip(documents.into_iter().zip(embeddings))
        .map(|(id, (document, embedding))| (id.as_str().unwrap_or_default().to_owned(), document, embedding))
        .filter(|(id, ..)| id != "first")
        .collect();
    seen.sort_by(|one, other| one.0.cmp(&other.0));
    let mut expected: Vec<(String, Value, Value)> = (0..CLIENTS)
        .flat_map(|number| [("added", 0), ("kept", ROUNDS - 1)].map(|(name, round)| (number, name, round)))
        .map(|(number, name, round)| {
            let vector = [number as f32 + 0.1, round as f32, -1.5, 1e-20];
            (
                format!("{name}-{number}"),
                json!(format!("{number} {round}")),
                json!(vector),
            )
        })
        .collect();
    expected.sort_by(|one, other| one.0.cmp(&other.0));
    let parsed = |rows: Vec<(String, Value, Value)>| -> Vec<(String, Value, Vec<f32>)> {
        rows.into_iter()
            .map(|(id, document, vector)| (id, document, serde_json::from_value(vector).expect("numbers")))
            .collect()
    };
    assert_eq!(parsed(seen), parsed(expected));
    cluster.diptych.wait_drained().await;
    assert_eq!(cluster.assert_equal().await, 2 * CLIENTS + 1);

    let metrics = cluster.diptych.admin().get_path("/metrics").await.ok().text();
    let of = |what: &str| -> f64 {
        let name = format!("diptych_combined_batch_entries_{what}{{path=\"live\"}} ");
        let line = metrics.lines().find_map(|line| line.strip_prefix(&name));
        line.and_then(|value| value.parse().ok())
            .expect("the histogram is there")
    };
    let (writes, requests) = (of("sum"), of("count"));
    assert!(writes > 2.0 * requests, "{writes} writes in {requests} requests");
}
