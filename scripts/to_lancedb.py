"""Put a store's embeddings into LanceDB, an embedded vector database, and ask it what looks alike.

    pip install lancedb 'featx[parquet]'
    python scripts/to_lancedb.py photos.featx photos.lancedb --like ants/000.png

LanceDB takes a stream of Arrow record batches, so the store may be larger than memory. The same works with any database
that reads Arrow or Parquet (``featx export-features photos.featx --out photos.parquet``). The query is an image of the
store here; ``featx.extraction.embedder.Embedder.like(provenance, where=store)`` embeds new ones alike.
"""

from __future__ import annotations

import argparse
from typing import Any

import lancedb

from featx.store.tables import record_batches


def main() -> None:
    """Make the table ``images``, and print the nearest of one image: id, label and cosine, one a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a store, or a file made by featx pack")
    parser.add_argument("database", help="folder of the database; a table of the same name is replaced")
    parser.add_argument("--like", metavar="ID", help="id of an image in the store")
    parser.add_argument("-k", type=int, default=5, help="how many to find")
    arguments = parser.parse_args()

    database: Any = lancedb.connect(arguments.database)
    table = database.create_table("images", record_batches(arguments.store), mode="overwrite")
    print(f"{table.count_rows()} images are in {arguments.database}")
    if arguments.like:
        name = arguments.like.replace("'", "''")
        (query,) = table.search().where(f"id = '{name}'").limit(1).to_list()
        found = table.search(query["embedding"]).distance_type("cosine").where(f"id != '{name}'").limit(arguments.k)
        for match in found.to_list():
            print(f"{match['id']}\t{match['label'] or ''}\t{1 - match['_distance']:.4f}")


if __name__ == "__main__":
    main()
