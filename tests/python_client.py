"""The unmodified Python client against the proxy: every call that an application makes. Usage: python_client.py PORT"""

import sys

import chromadb
from chromadb.config import Settings


def main(port: int) -> None:
    settings = Settings(anonymized_telemetry=False)
    client = chromadb.HttpClient(host="127.0.0.1", port=port, settings=settings)
    assert client.heartbeat() > 0
    assert client.get_version()
    assert client.get_max_batch_size() == 5461

    col = client.create_collection("py-one", metadata={"owner": "python"}, embedding_function=None)
    ids = [f"id{n}" for n in range(100)]
    vectors = [[n, 1.0, n / 2] for n in range(100)]
    col.add(
        ids=ids,
        embeddings=vectors,
        documents=[f"document {n}" for n in range(100)],
        metadatas=[{"n": n, "even": n % 2 == 0} for n in range(100)],
    )
    assert col.count() == 100
    assert col.peek(5)["ids"] == ids[:5]

    col.upsert(ids=["id0", "extra"], embeddings=[[7, 7, 7], [8, 8, 8]], documents=["new 0", "extra"])
    col.update(ids=["id1"], metadatas=[{"n": 1001}], documents=["changed"], embeddings=[[1, 1, 0.5]])
    got = col.get(ids=["id0", "id1", "extra"], include=["embeddings", "documents", "metadatas"])
    assert got["ids"] == ["id0", "id1", "extra"], got
    assert got["documents"] == ["new 0", "changed", "extra"], got
    assert got["metadatas"][1] == {"n": 1001, "even": False}, got
    assert got["embeddings"][0].tolist() == [7, 7, 7], got

    found = col.query(query_embeddings=[[50, 1, 25]], n_results=3, where={"even": True})
    assert found["ids"][0][0] == "id50", found
    assert col.get(where={"n": {"$gte": 98}}, limit=5)["ids"] == ["id1", "id98", "id99"]
    assert col.get(where_document={"$contains": "changed"})["ids"] == ["id1"]

    col.delete(ids=["id2", "id3"])
    col.delete(where={"n": {"$lt": 10}})
    assert col.count() == 92, col.count()

    col.modify(name="py-renamed", metadata={"owner": "still python"})
    assert client.get_collection("py-renamed", embedding_function=None).id == col.id
    assert client.get_collection("py-renamed", embedding_function=None).metadata == {"owner": "still python"}
    again = client.get_or_create_collection("py-renamed", embedding_function=None)
    assert again.id == col.id and again.count() == 92
    other = client.get_or_create_collection(
        "py-cosine", embedding_function=None, configuration={"hnsw": {"space": "cosine"}}
    )
    other.add(ids=["a", "b"], embeddings=[[1, 0], [0, 1]])
    assert other.query(query_embeddings=[[0.9, 0.1]], n_results=1)["ids"] == [["a"]]
    assert [c.name for c in sorted(client.list_collections(), key=lambda c: c.name)] == ["py-cosine", "py-renamed"]
    assert client.count_collections() == 2
    client.create_collection("py-doomed", embedding_function=None)
    client.delete_collection("py-doomed")
    for wrong in (lambda: client.get_collection("py-doomed"), lambda: client.delete_collection("py-doomed")):
        try:
            wrong()
        except chromadb.errors.NotFoundError:
            continue
        raise AssertionError("a deleted collection is found")
    try:
        client.create_collection("py-renamed", embedding_function=None)
    except chromadb.errors.ChromaError:
        pass
    else:
        raise AssertionError("the same name twice")

    admin = chromadb.AdminClient(
        Settings(
            chroma_api_impl="chromadb.api.fastapi.FastAPI",
            chroma_server_host="127.0.0.1",
            chroma_server_http_port=port,
            anonymized_telemetry=False,
        )
    )
    admin.create_tenant("py-tenant")
    admin.create_database("py-database", tenant="py-tenant")
    assert admin.get_database("py-database", tenant="py-tenant")["name"] == "py-database"
    inside = chromadb.HttpClient(
        host="127.0.0.1", port=port, settings=settings, tenant="py-tenant", database="py-database"
    )
    inside.create_collection("py-inside", embedding_function=None).add(ids=["x"], embeddings=[[1, 2]])
    assert [c.name for c in inside.list_collections()] == ["py-inside"]
    print("all good")


main(int(sys.argv[1]))
