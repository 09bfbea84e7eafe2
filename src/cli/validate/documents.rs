//! Document operations and document delete: the work of a content system, files in chunks that share a `document_id`.

use serde_json::{Value, json};

use super::records::Record;
use super::shelf::{Shelf, chunk};
use super::stage::{Outcome, Stage, ensure};

const CHUNKS: usize = 6;

fn whole(document: &str, version: usize) -> Vec<Record> {
    (0..CHUNKS).map(|part| chunk(document, part, version)).collect()
}

pub async fn operations(stage: &Stage<'_>) -> Outcome {
    let shelf = Shelf::create(stage, "files").await?;
    stage.step("add whole files");
    for file in ["a", "b", "c", "d"] {
        shelf.add(&whole(file, 0)).await?;
    }
    shelf.is_everywhere().await?;

    stage.step("add files chunk by chunk");
    for file in ["e", "f", "g", "h"] {
        for record in whole(file, 0) {
            shelf.add(&[record]).await?;
        }
        shelf.is_readable().await?;
    }
    shelf.is_everywhere().await?;

    stage.step("upsert what is there and what is not");
    for version in 1..=3 {
        for part in 0..CHUNKS {
            shelf.upsert(&[chunk("a", part, version)]).await?;
        }
    }
    for part in 0..CHUNKS {
        shelf.upsert(&[chunk("i", part, 0), chunk("e", part, 5)]).await?;
    }
    shelf.is_readable().await?;
    shelf.is_everywhere().await?;

    stage.step("update");
    for part in 0..CHUNKS {
        let change = json!({"state": "published", "version": 9});
        let change = change.as_object().cloned().unwrap_or_default();
        shelf.update(&format!("b:{part}"), &change).await?;
    }
    shelf.is_everywhere().await?;

    stage.step("delete by id");
    let gone = ["c:1".to_owned(), "c:2".to_owned()];
    shelf
        .delete(&json!({"ids": gone}), |record| gone.contains(&record.id))
        .await?;
    shelf.is_everywhere().await?;

    found_by_filter(stage, &shelf).await?;
    nearest_first(stage, &shelf).await?;
    stage.fact("documents", shelf.records.borrow().len());
    Ok(())
}

/// `get` with filters finds what was written, through the proxy and on every node.
async fn found_by_filter(stage: &Stage<'_>, shelf: &Shelf<'_>) -> Result<(), String> {
    let of = |key: &'static str, value: Value| move |record: &Record| record.metadata.get(key) == Some(&value);
    let (published, file, even) = (
        of("state", json!("published")),
        of("document_id", json!("d")),
        of("even", json!(true)),
    );
    let text = |record: &Record| record.document.as_ref().is_some_and(|text| text.contains("of i,"));
    let records = shelf.records.borrow().clone();
    let ids = |wanted: &dyn Fn(&Record) -> bool| -> Vec<String> {
        let found = records.iter().filter(|record| wanted(record));
        found.map(|record| record.id.clone()).collect()
    };
    let cases = [
        (json!({"where": {"state": "published"}}), ids(&published)),
        (json!({"where": {"document_id": {"$eq": "d"}}}), ids(&file)),
        (
            json!({"where": {"$and": [{"document_id": "d"}, {"even": true}]}}),
            ids(&|record| file(record) && even(record)),
        ),
        (json!({"where_document": {"$contains": "of i,"}}), ids(&text)),
    ];
    let name = shelf.name();
    for (filter, expected) in cases {
        stage.step(&format!("get with {filter}"));
        ensure(!expected.is_empty(), || format!("nothing is expected for {filter}"))?;
        let expected = json!(expected);
        for server in stage.system.nodes.iter().chain([&stage.system.proxy]) {
            let id = server.found(&name).await?.id;
            let found = server.op(id, "get", &filter).await?.expect(200)?;
            ensure(found["ids"] == expected, || {
                format!("{}: {filter} finds {} instead of {expected}", server.name, found["ids"])
            })?;
        }
    }
    Ok(())
}

/// A query for a record's own vector, among the parts of its file, finds that record first.
async fn nearest_first(stage: &Stage<'_>, shelf: &Shelf<'_>) -> Result<(), String> {
    let name = shelf.name();
    let wanted = chunk("g", 3, 0);
    stage.step("query with a filter");
    let query = json!({
        "query_embeddings": [wanted.embedding],
        "n_results": 3,
        "where": {"document_id": "g"},
        "include": ["distances", "metadatas"],
    });
    for server in stage.system.nodes.iter().chain([&stage.system.proxy]) {
        let id = server.found(&name).await?.id;
        let found = server.op(id, "query", &query).await?.expect(200)?;
        let first = &found["ids"][0][0];
        let own = |value: &Value| value["document_id"] == "g";
        let inside = found["metadatas"][0]
            .as_array()
            .is_some_and(|all| all.len() == 3 && all.iter().all(own));
        ensure(*first == wanted.id && found["distances"][0][0] == 0.0 && inside, || {
            format!("{}: a query for the vector of {} finds {found}", server.name, wanted.id)
        })?;
    }
    Ok(())
}

pub async fn delete(stage: &Stage<'_>) -> Outcome {
    let shelf = Shelf::create(stage, "files").await?;
    let files = ["one", "two", "three", "four", "five"];
    stage.step("write five files");
    // Chunk by chunk of all files, so that no file lies in one piece.
    for part in 0..CHUNKS {
        for file in files {
            shelf.add(&[chunk(file, part, 0)]).await?;
        }
    }
    shelf.is_everywhere().await?;

    for file in ["two", "four"] {
        stage.step(&format!("delete the file {file}"));
        let of_file = |record: &Record| record.metadata.get("document_id") == Some(&json!(file));
        shelf.delete(&json!({"where": {"document_id": file}}), of_file).await?;
        group_is_gone(stage, &shelf, file).await?;
        shelf.is_everywhere().await?;
    }
    stage.step("delete it again");
    shelf
        .delete(&json!({"where": {"document_id": "two"}}), |_| false)
        .await?;

    stage.step("delete with two conditions");
    let both = json!({"where": {"$and": [{"document_id": "one"}, {"even": true}]}});
    shelf
        .delete(&both, |record| {
            record.metadata.get("document_id") == Some(&json!("one"))
                && record.metadata.get("even") == Some(&json!(true))
        })
        .await?;
    shelf.is_everywhere().await?;

    stage.step("write a deleted file again");
    shelf.add(&whole("two", 1)).await?;
    shelf.is_everywhere().await?;
    Ok(())
}

/// No record of the file is left: not on a node, not through the proxy.
async fn group_is_gone(stage: &Stage<'_>, shelf: &Shelf<'_>, file: &str) -> Result<(), String> {
    let name = shelf.name();
    let filter = json!({"where": {"document_id": file}, "include": []});
    for server in stage.system.nodes.iter().chain([&stage.system.proxy]) {
        stage
            .until(&format!("{file} is gone from {}", server.name), async || {
                let id = server.found(&name).await?.id;
                let found = server.op(id, "get", &filter).await?.expect(200)?;
                ensure(found["ids"] == json!([]), || {
                    format!("{} still has {} of the file {file}", server.name, found["ids"])
                })
            })
            .await?;
    }
    Ok(())
}
