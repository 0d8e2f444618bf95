"""What one does with a finished store: look at it, verify it, pack it into one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx._arrays import PIXELS
from featx._files import canonical_json, publish
from featx.errors import StoreError, UsageError, plural
from featx.images import HASH_BYTES, count_names
from featx.store import hdf5
from featx.store.hdf5 import RESTORE
from featx.store.index import Further, Index, name_columns, read_index, read_quarantine
from featx.store.manifest import (
    FORMAT_VERSION,
    Block,
    Manifest,
    Shard,
    blocks_of,
    column_of,
    fingerprint,
    manifest_bytes,
    name_of,
    read_manifest,
)
from featx.store.reader import PACKED_FORMAT, FeatureReader, steady
from featx.store.shards import digest_keys, open_shard, width_of

_BLOCK_ROWS = 1024
_RETRIES = 20


def info(path: str | Path) -> dict[str, Any]:
    """What a store (or packed store) holds, as plain JSON types. Embeddings are not read."""
    path = Path(path)
    if path.is_file():
        reader = FeatureReader(path)
        index, backbones, shards, quarantined = reader.index, list(reader.backbones.values()), 1, 0
        dims = {layer: reader.dims(layer) for layer in reader.blocks}
        unfinished: Sequence[str] = ()
    else:
        manifest, index, dims, quarantined = steady(path, lambda: _facts(path))
        backbones, shards, unfinished = list(manifest.backbones), len(manifest.shards), manifest.unfinished
    provenance = backbones[0]
    return {
        "rows": len(index),
        "images": len(index),
        "embedding_dim": next(iter(dims.values()), 0),
        "layers": {name: size for name, size in dims.items() if name != PIXELS or len(dims) == 1},
        "views": provenance.get("views", ""),
        "backbone": provenance.get("backbone", ""),
        "backbones": {name_of(each): _backbone(each, unfinished) for each in backbones},
        "fingerprint": fingerprint(provenance),
        "classes": count_names(index.labels_as_text),
        "unlabelled": int((index.labels < 0).sum()),
        "splits": count_names(index.split),
        **_groups(index),
        "shards": shards,
        "quarantined": quarantined,
        "provenance": dict(provenance),
    }


_NAMED_GROUPS = 100
"""Groups that are counted by name at most: the largest."""


def _groups(index: Index) -> dict[str, Any]:
    """What there is to say of groups and metadata; no groups, and nothing else, in stores that have none."""
    out: dict[str, Any] = {"groups": {}}
    if index.groups or index.grouping:
        counts = count_names(index.groups)
        largest = sorted(counts, key=lambda name: -counts[name])[:_NAMED_GROUPS]
        out = {
            "groups": {name: counts[name] for name in largest}, "group_count": len(counts),
            "group_name": index.group_name, "group_by": index.grouping,
        }  # fmt: skip
    return {**out, **({"metadata": list(index.metadata)} if index.metadata else {})}


def _backbone(provenance: Mapping[str, Any], unfinished: Sequence[str]) -> dict[str, Any]:
    about = {name: provenance.get(name, "") for name in ("weights", "layers", "views", "precision")}
    return {**about, "fingerprint": fingerprint(provenance), "finished": name_of(provenance) not in unfinished}


def _facts(path: Path) -> tuple[Manifest, Index, dict[str, int], int]:
    """Manifest, index, length of each block's embeddings, and how many images were refused."""
    manifest = read_manifest(path)
    index, refused = read_index(path, manifest), read_quarantine(path, manifest)
    blocks = blocks_of(manifest.finished or manifest.backbones)
    dims = dict.fromkeys(blocks, 0)
    for backbone in dict.fromkeys(block.backbone for block in blocks.values()):
        for shard in manifest.of(backbone)[:1]:
            with open_shard(path, shard, hashed=True) as file:
                own = {name: block for name, block in blocks.items() if block.backbone == backbone}
                dims |= {name: width_of(file, shard.column(block)) for name, block in own.items()}
    return manifest, index, dims, len(refused)


def verify(
    path: str | Path,
    *,
    sample: int | None = None,
    random_state: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Check every byte of a store against its checksums, and its parts against each other.

    Parameters
    ----------
    sample : look into so many shards only, drawn by ``random_state``; manifest, index, quarantine and the names of
        files are always checked. Whether each image has its embedding is then not.
    progress : called as ``progress(shards done, shards to look into)``.

    Returns
    -------
    One sentence for each problem, naming the file; an empty list for a sound store.

    Raises
    ------
    StoreError
        There is nothing of this name.
    """
    path = Path(path)
    if not path.exists():
        read_manifest(path)  # says that there is no store
    if sample is not None and sample < 1:
        raise UsageError("must be 1 or more", where="sample", found=sample)
    if path.is_file():
        if sample is not None:
            raise UsageError("a packed store is checked whole", where=path, hint="Leave --sample out.")
        return _problems(lambda: _verify_packed(path))
    for _ in range(_RETRIES):
        try:
            before = manifest_bytes(path)
            manifest = read_manifest(path)
            drawn = _drawn(manifest, sample, random_state)
            problems = _verify_store(path, manifest, drawn, progress)
            if not problems or manifest_bytes(path) == before:
                break  # else a writer was at work, and what looked wrong may have been its doing
        except StoreError as error:
            return [str(error)]
    return problems


def _problems(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except StoreError as error:
        return [str(error)]
    return []


def _verify_packed(path: Path) -> None:
    reader = FeatureReader(path)
    for layer in reader.blocks:
        for _ in reader.stream(layer, _BLOCK_ROWS):
            pass
    for _ in _hashes(reader):
        pass


def _drawn(manifest: Manifest, sample: int | None, random_state: int) -> tuple[Shard, ...]:
    if sample is None or sample >= len(manifest.shards):
        return manifest.shards
    drawn = np.random.default_rng(random_state).choice(len(manifest.shards), sample, replace=False)
    return tuple(manifest.shards[number] for number in np.sort(drawn).tolist())


def _verify_store(
    path: Path, manifest: Manifest, shards: Sequence[Shard], progress: Callable[[int, int], None] | None
) -> list[str]:
    problems: list[str] = []
    seen: dict[str, list[tuple[NDArray[np.bytes_], tuple[int, ...]]]] = {
        name_of(each): [] for each in manifest.backbones
    }
    sound = 0
    for done, shard in enumerate(shards, 1):
        try:
            keys, widths = _verify_shard(path, shard)
        except StoreError as error:
            problems.append(str(error))
        else:
            sound += 1
            for backbone in shard.blocks:
                seen[backbone].append((keys, widths[backbone]))
        if progress is not None:
            progress(done, len(shards))
    complete = sound == len(manifest.shards)
    known = {name: np.concatenate([np.empty(0, "S32"), *(keys for keys, _ in each)]) for name, each in seen.items()}
    for backbone, keys in known.items():
        if len(np.unique(keys)) != len(keys):
            problems.append(f"{path / 'manifest.json'}: it lists two shards with embeddings of the same image.")
        if len({widths for _, widths in seen[backbone]}) > 1:
            problems.append(f"{path / 'shards'}: embeddings of different length.")
    problems += _foreign_files(path, manifest)
    finished = {name_of(each): known[name_of(each)] for each in manifest.finished}
    problems += _problems(lambda: _verify_index(path, manifest, finished if complete else {}))
    return problems + _problems(lambda: read_quarantine(path, manifest))


def _verify_shard(path: Path, shard: Shard) -> tuple[NDArray[np.bytes_], dict[str, tuple[int, ...]]]:
    """Digests of a shard's rows, and the lengths of the embeddings of each backbone, after reading all of it."""
    with open_shard(path, shard) as file:
        for column in shard.columns():
            file.read(column)
        widths = {
            name: tuple(width_of(file, shard.column(Block(name, layer))) for layer in layers)
            for name, layers in shard.blocks.items()
        }
        return digest_keys(file.read("digests")), widths


def _verify_index(path: Path, manifest: Manifest, known: Mapping[str, NDArray[np.bytes_]]) -> None:
    index = read_index(path, manifest)
    for backbone, keys in known.items():
        lost = int((~np.isin(digest_keys(index.digests), keys)).sum())
        if lost:
            raise StoreError(
                f"{plural(lost, 'image')} without an embedding", where=path / "index.h5", found=backbone, hint=RESTORE
            )


def _foreign_files(path: Path, manifest: Manifest) -> list[str]:
    """Files that do not belong; hidden ones are no part of a store (a lock, leftovers, what file managers leave)."""
    expected = {"manifest.json", "index.h5", "quarantine.jsonl", "shards"}
    if not (path / "shards").is_dir():
        return [f"{path / 'shards'}: the folder is missing. {RESTORE}"] if manifest.shards else []
    strange = [item for item in (path / "shards").iterdir() if _is_unnamed(path, item, manifest)]
    strange += [item for item in path.iterdir() if item.name not in expected]
    return [
        f"{item}: not a file that the manifest names. Move it away."
        for item in sorted(strange)
        if not item.name.startswith(".")
    ]


def _is_unnamed(path: Path, item: Path, manifest: Manifest) -> bool:
    """Whether a file is there that the manifest of that moment does not name.

    A writer names a shard before it appears and until it is gone, but the manifest that was read a while ago may be
    older than that: what looks strange is looked at again between two equal readings of the manifest.
    """
    while item.name not in manifest.names:
        exists, now = item.exists(), read_manifest(path)
        if now == manifest:
            return exists
        manifest = now
    return False


def content_hash(path: str | Path) -> str:
    """Hash of what a store says, however its shards are cut: equal for two runs that came to the same.

    Taken over the fingerprints, the index (ids, labels, splits, digests, groups, metadata), and every embedding that
    it refers to.
    """
    reader = FeatureReader(path)
    index = reader.index
    total = hashlib.sha256(fingerprint(reader.provenance).encode())
    order = np.argsort(np.array(index.ids, dtype=object))
    labels = index.labels_as_text
    for row in order.tolist():
        said = [index.ids[row], labels[row], index.split[row], index.digests[row].tobytes().hex()]
        further = [values[row] for values in (*([index.groups] if index.groups else []), *index.metadata.values())]
        total.update(canonical_json([*said, *further]))
    for each in list(reader.backbones.values())[1:]:
        total.update(fingerprint(each).encode())
    for layer in reader.blocks:
        for start in range(0, len(order), _BLOCK_ROWS):
            total.update(reader.read(order[start : start + _BLOCK_ROWS], layer=layer).tobytes())
    return total.hexdigest()


def check_new(out: Path, store: Path) -> None:
    """StoreError unless a file of this name can be made from a store."""
    if out.exists():
        raise StoreError("there is a file of this name already", where=out, hint="Delete it, or choose another name.")
    if not out.parent.is_dir():
        raise StoreError("no such folder", where=out.parent)
    if out.resolve().is_relative_to(store.resolve()):
        raise StoreError("the file would lie inside the store", where=out, hint="Choose a place beside it, not in it.")


def pack(store: str | Path, out: str | Path) -> Path:
    """Make one plain HDF5 file of a store, one row an image, that h5py alone can read.

    Raises
    ------
    StoreError
        The store is damaged, or ``out`` exists.
    """
    out = Path(out)
    check_new(out, Path(store))
    reader = FeatureReader(store)
    rows = len(reader.index)
    columns = name_columns(reader.index)
    for layer, block in reader.blocks.items():
        embeddings = (some for _, some in reader.stream(layer, _BLOCK_ROWS))
        columns.append(hdf5.Column(column_of(block), np.dtype("<f4"), (reader.dims(layer),), rows, embeddings))
    hashed = reader.read_hashes(np.arange(0)) is not None
    if hashed:
        columns.append(hdf5.Column("phash", np.dtype("u1"), (HASH_BYTES,), rows, _hashes(reader)))
    more = [{"provenance": dict(each), "fingerprint": fingerprint(each)} for each in reader.backbones.values()][1:]
    attributes = {
        "format": PACKED_FORMAT,
        "format_version": json.dumps(FORMAT_VERSION),
        "provenance": json.dumps(dict(reader.provenance), sort_keys=True),
        "fingerprint": fingerprint(reader.provenance),
        "more": json.dumps(more, sort_keys=True),
        "phash": json.dumps(hashed),
        **Further.of(reader.index).attributes,
    }

    def verify(temp: Path) -> None:
        FeatureReader(temp)

    return publish(out, lambda temp: hdf5.write(temp, columns, attributes, seal=True), verify)


def _hashes(reader: FeatureReader) -> Iterator[NDArray[np.uint8]]:
    """The perceptual hashes of all rows, some at a time; nothing where there are none."""
    for start in range(0, len(reader.index), _BLOCK_ROWS):
        found = reader.read_hashes(np.arange(start, min(start + _BLOCK_ROWS, len(reader.index))))
        if found is not None:
            yield found
