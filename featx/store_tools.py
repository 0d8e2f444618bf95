"""What one does with a finished store: look at it, verify it, pack it into one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx import hdf5
from featx._files import canonical_json, publish
from featx.errors import StoreError
from featx.manifest import FORMAT_VERSION, fingerprint, read_manifest
from featx.store import (
    PACKED_COLUMNS,
    PACKED_FORMAT,
    FeatureReader,
    digest_keys,
    index_columns,
    open_shard,
    read_index,
    read_quarantine,
)

_BLOCK_ROWS = 4096


def info(path: str | Path) -> dict[str, Any]:
    """What a store (or packed store) holds, as plain JSON types. Embeddings are not read."""
    path = Path(path)
    if path.is_file():
        reader = FeatureReader(path)
        index, provenance, shards, quarantined = reader.index, reader.provenance, 1, 0
        with hdf5.open_checked(path, PACKED_COLUMNS) as file:
            dims = _dims(file)
    else:
        manifest, index = read_manifest(path), read_index(path)
        provenance, shards, quarantined = manifest.provenance, len(manifest.shards), len(read_quarantine(path))
        dims = {}
        if manifest.shards:
            with open_shard(path, manifest.shards[0], manifest.layers, hashed=True) as file:
                dims = _dims(file)
    return {
        "rows": len(index),
        "images": len(index),
        "embedding_dim": dims.get(provenance["layers"][0], 0),
        "layers": dims,
        "backbone": provenance.get("backbone", ""),
        "fingerprint": fingerprint(provenance),
        "classes": index.counts(index.labels_as_text),
        "unlabelled": int((index.labels < 0).sum()),
        "splits": index.counts(index.split),
        "shards": shards,
        "quarantined": quarantined,
        "provenance": dict(provenance),
    }


def _dims(file: hdf5.CheckedFile) -> dict[str, int]:
    return {
        name.removeprefix("embeddings/"): int(column.shape[1])
        for name, column in file.columns.items()
        if name.startswith("embeddings/")
    }


def verify(path: str | Path) -> list[str]:
    """Check every byte of a store against its checksums, and its parts against each other.

    Returns
    -------
    One sentence for each problem, naming the file; an empty list for a sound store.
    """
    path = Path(path)
    problems: list[str] = []
    if path.is_file():
        try:
            reader = FeatureReader(path)
            for start in range(0, len(reader.index), _BLOCK_ROWS):
                for layer in reader.provenance["layers"]:
                    reader.read(np.arange(start, min(start + _BLOCK_ROWS, len(reader.index))), layer=layer)
        except StoreError as error:
            problems.append(str(error))
        return problems
    try:
        manifest = read_manifest(path)
    except StoreError as error:
        return [str(error)]
    seen: list[NDArray[np.bytes_]] = [np.empty(0, "S32")]
    for shard in manifest.shards:
        try:
            with open_shard(path, shard, manifest.layers) as file:
                seen.append(digest_keys(file.read("digests")))
                for layer in manifest.layers:
                    file.read(f"embeddings/{layer}")
        except StoreError as error:
            problems.append(str(error))
    known = np.concatenate(seen)
    if len(np.unique(known)) != len(known):
        problems.append(f"{path}: a digest is in two shards.")
    problems += _foreign_files(path, {shard.name for shard in manifest.shards} | set(manifest.in_flux))
    try:
        index = read_index(path)
        lost = ~np.isin(digest_keys(index.digests), known)
        if lost.any() and not problems:
            problems.append(f"{path / 'index.h5'}: {int(lost.sum())} images have no embedding in any shard.")
    except StoreError as error:
        problems.append(str(error))
    try:
        read_quarantine(path)
    except StoreError as error:
        problems.append(str(error))
    return problems


def _foreign_files(path: Path, shards: set[str]) -> list[str]:
    expected = {"manifest.json", "index.h5", "quarantine.jsonl", ".lock", "shards"}
    names = [(path / "shards" / item.name, item.name in shards) for item in (path / "shards").iterdir()]
    names += [(item, item.name in expected) for item in path.iterdir()]
    return [
        f"{item}: not a file that the manifest names. Move it away."
        for item, good in sorted(names)
        # Leftovers of a dead writer are no part of the store, and the next writer deletes them.
        if not good and not item.name.startswith(".tmp-")
    ]


def content_hash(path: str | Path) -> str:
    """Hash of what a store says, however its shards are cut: equal for two runs that came to the same.

    Taken over the fingerprint, the index (ids, labels, splits, digests), and every embedding that it refers to.
    """
    reader = FeatureReader(path)
    index = reader.index
    total = hashlib.sha256(fingerprint(reader.provenance).encode())
    order = np.argsort(np.array(index.ids, dtype=object))
    labels = index.labels_as_text
    for row in order.tolist():
        total.update(
            canonical_json([index.ids[row], labels[row], index.split[row], index.digests[row].tobytes().hex()])
        )
    for layer in reader.provenance["layers"]:
        for start in range(0, len(order), _BLOCK_ROWS):
            total.update(reader.read(order[start : start + _BLOCK_ROWS], layer=layer).tobytes())
    return total.hexdigest()


def pack(store: str | Path, out: str | Path) -> Path:
    """Make one plain HDF5 file of a store, one row an image, that h5py alone can read.

    Raises
    ------
    StoreError
        The store is damaged, or ``out`` exists.
    """
    out = Path(out)
    if out.exists():
        raise StoreError("there is a file of this name already", where=out, hint="Delete it, or choose another name.")
    if not out.parent.is_dir():
        raise StoreError("no such folder", where=out.parent)
    reader = FeatureReader(store)
    rows = len(reader.index)

    def blocks(layer: str) -> Iterator[NDArray[np.float32]]:
        for start in range(0, rows, _BLOCK_ROWS):
            yield reader.read(np.arange(start, min(start + _BLOCK_ROWS, rows)), layer=layer)

    columns = index_columns(reader.index)
    for layer in reader.provenance["layers"]:
        dim = reader.read(np.arange(min(rows, 1)), layer=layer).shape[1]
        columns.append(hdf5.Column(f"embeddings/{layer}", np.dtype("<f4"), (dim,), rows, blocks(layer)))
    attributes = {
        "format": PACKED_FORMAT,
        "format_version": json.dumps(FORMAT_VERSION),
        "provenance": json.dumps(dict(reader.provenance), sort_keys=True),
        "fingerprint": fingerprint(reader.provenance),
    }

    def write(temp: Path) -> None:
        hdf5.write(temp, columns, attributes, seal=True)

    return publish(out, write)
