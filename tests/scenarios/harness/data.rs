//! Deterministic test data: a tiny generator of random numbers, and batches of records made from it.

use serde_json::{Value, json};

/// splitmix64: small, seedable, good enough to choose operations and make vectors.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    pub fn u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which must not be 0.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.u64() % bound as u64) as usize
    }

    /// A float of [-1, 1).
    pub fn float(&mut self) -> f32 {
        (self.u64() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn vector(&mut self, dimension: usize) -> Vec<f32> {
        (0..dimension).map(|_| self.float()).collect()
    }

    /// An independent generator, for a task of its own.
    pub fn fork(&mut self) -> Rng {
        Rng(self.u64())
    }
}

/// The body of an add, upsert or update.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub ids: Vec<String>,
    pub embeddings: Vec<Vec<f32>>,
    pub documents: Vec<Option<String>>,
    pub metadatas: Vec<Value>,
    pub uris: Vec<Option<String>>,
}

impl Batch {
    /// `count` records `<prefix>-<n>` with every kind of field, some of them absent.
    pub fn random(rng: &mut Rng, prefix: &str, count: usize, dimension: usize) -> Batch {
        let mut batch = Batch::default();
        for n in 0..count {
            batch.ids.push(format!("{prefix}-{n}"));
            batch.embeddings.push(rng.vector(dimension));
            batch
                .documents
                .push((rng.below(5) != 0).then(|| format!("document {n} of {prefix}: ünïcode {}", rng.below(1000))));
            batch.metadatas.push(match rng.below(6) {
                0 => Value::Null,
                k => json!({"n": n, "bucket": k, "weight": rng.float(), "flag": k % 2 == 0, "tag": format!("t{k}")}),
            });
            batch
                .uris
                .push((rng.below(3) == 0).then(|| format!("file:///{prefix}/{n}")));
        }
        batch
    }

    pub fn json(&self) -> Value {
        json!({"ids": self.ids, "embeddings": self.embeddings, "documents": self.documents,
               "metadatas": self.metadatas, "uris": self.uris})
    }

    /// The same with embeddings as the Python client sends them.
    pub fn json_base64(&self) -> Value {
        let mut body = self.json();
        body["embeddings"] = self
            .embeddings
            .iter()
            .map(|e| Value::String(base64_embedding(e)))
            .collect();
        body
    }
}

/// A vector as base64 of little-endian float32.
pub fn base64_embedding(vector: &[f32]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = vector.iter().flat_map(|f| f.to_le_bytes()).collect();
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk
            .iter()
            .chain([0, 0].iter())
            .take(3)
            .fold(0u32, |word, byte| word << 8 | u32::from(*byte));
        for place in 0..4 {
            let letter = ALPHABET[(word >> (18 - 6 * place) & 63) as usize] as char;
            text.push(if place <= chunk.len() { letter } else { '=' });
        }
    }
    text
}
