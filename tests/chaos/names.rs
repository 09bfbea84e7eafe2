//! A client that creates, renames and deletes collections of its own, and writes into them.
//!
//! A name is a register: its tag, in the collection's metadata, tells the generation. Records belong to the id that
//! clients know a collection by, over renames, and must never show up in another generation of the name.

use http::Method;
use serde_json::{Value, json};

use crate::clients::{Client, Found, body, was_unsent};
use crate::harness::api::{Answer, segment};
use crate::history::{Effect, FOREIGN, Key, NAMES, Outcome, Tag};

const NAMES_EACH: usize = 6;
const IDS: usize = 4;

pub struct Names {
    pub client: Client,
    pub tag: String,
}

/// What a client finds under a name.
enum There {
    Nothing,
    Collection(Tag, String),
}

/// The generation in a collection's metadata.
pub fn generation(metadata: &Value) -> Tag {
    metadata["generation"].as_u64().unwrap_or(FOREIGN)
}

/// All records that a collection of this client can hold.
fn own_keys(place: &str) -> impl Iterator<Item = Key> {
    (0..IDS).map(move |n| Key::new(place, &format!("r{n}")))
}

impl Names {
    pub async fn run(mut self) {
        while !self.client.stopped() {
            let unsent = self.step().await;
            self.client.think(unsent).await;
        }
    }

    fn name(&mut self) -> String {
        format!("{}-{}", self.tag, self.client.rng.below(NAMES_EACH))
    }

    /// True if nobody listens.
    async fn step(&mut self) -> bool {
        let name = self.name();
        let (answer, there) = self.look(&name).await;
        let (tag, id) = match there {
            None => return was_unsent(&answer),
            Some(There::Nothing) => return self.create(&name).await,
            Some(There::Collection(tag, id)) => (tag, id),
        };
        self.client.recorder.generation(tag, &id);
        match self.client.rng.below(10) {
            0 => self.delete(&name).await,
            1..4 => self.rename(&name, &id).await,
            4..8 => self.write(&id).await,
            _ => self.read(&id).await,
        }
    }

    async fn look(&mut self, name: &str) -> (Result<Answer, String>, Option<There>) {
        let call = self.client.begin("get-collection");
        let path = self.client.api.path(&format!("/collections/{}", segment(name)));
        let mut answer = self.client.answer(self.client.api.try_get(&path)).await;
        let there = match &answer {
            Ok(a) if a.status == 200 => Some(There::Collection(generation(&a.json()["metadata"]), a.id())),
            Ok(a) if a.status == 404 => Some(There::Nothing),
            _ => None,
        };
        let tag = match &there {
            Some(There::Collection(tag, _)) => Some(*tag),
            _ => None,
        };
        // "Not found" is what was asked for.
        if let (Ok(a), Some(There::Nothing)) = (&mut answer, &there) {
            a.status = 200;
        }
        self.client
            .read(call, &answer, vec![(Key::new(NAMES, name), Effect::Read(tag))], None);
        (answer, there)
    }

    async fn create(&mut self, name: &str) -> bool {
        let tag = self.client.recorder.tag();
        let call = self.client.begin("create-collection");
        let path = self.client.api.path("/collections");
        let body = json!({"name": name, "metadata": {"generation": tag}});
        let answer = self
            .client
            .answer(self.client.api.try_json(Method::POST, &path, &body))
            .await;
        let outcome = self
            .client
            .wrote(call, &answer, vec![(Key::new(NAMES, name), Effect::Set(tag))]);
        if let (Ok(answer), Outcome::Acked) = (&answer, outcome) {
            self.client.recorder.generation(tag, &answer.id());
        }
        was_unsent(&answer)
    }

    async fn delete(&mut self, name: &str) -> bool {
        let call = self.client.begin("delete-collection");
        let path = self.client.api.path(&format!("/collections/{}", segment(name)));
        let sent = self
            .client
            .api
            .try_send(Method::DELETE, &path, &[], bytes::Bytes::new());
        let answer = self.client.answer(sent).await;
        self.client
            .wrote(call, &answer, vec![(Key::new(NAMES, name), Effect::Delete)]);
        was_unsent(&answer)
    }

    async fn rename(&mut self, old: &str, id: &str) -> bool {
        let new = self.name();
        if new == old {
            return false;
        }
        let (answer, there) = self.look(&new).await;
        if !matches!(there, Some(There::Nothing)) {
            return was_unsent(&answer);
        }
        let tag = self.client.recorder.tag();
        self.client.recorder.generation(tag, id);
        let call = self.client.begin("rename-collection");
        let path = self.client.api.path(&format!("/collections/{id}"));
        let body = json!({"new_name": new, "new_metadata": {"generation": tag}});
        let answer = self
            .client
            .answer(self.client.api.try_json(Method::PUT, &path, &body))
            .await;
        let effects = vec![
            (Key::new(NAMES, old), Effect::Delete),
            (Key::new(NAMES, &new), Effect::Set(tag)),
        ];
        self.client.wrote(call, &answer, effects);
        was_unsent(&answer)
    }

    async fn write(&mut self, id: &str) -> bool {
        let record = (format!("r{}", self.client.rng.below(IDS)), self.client.recorder.tag());
        let call = self.client.begin("upsert");
        let body = body(std::slice::from_ref(&record));
        let answer = self.client.answer(self.client.api.try_op(id, "upsert", &body)).await;
        self.client
            .wrote(call, &answer, vec![(Key::new(id, &record.0), Effect::Set(record.1))]);
        was_unsent(&answer)
    }

    async fn read(&mut self, id: &str) -> bool {
        let call = self.client.begin("get");
        let body = json!({"include": ["metadatas"]});
        let answer = self.client.answer(self.client.api.try_op(id, "get", &body)).await;
        let effects = Found::of(&answer).reads(id, own_keys(id), Effect::Read(None));
        self.client.read(call, &answer, effects, None);
        was_unsent(&answer)
    }
}
