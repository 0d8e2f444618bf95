"""The store of embeddings: the wall between pixels and arrays.

The format is written down, with MUST and MAY, in ``featx/guide/store-format.md`` (``featx guide store-format``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from featx._arrays import NEAR, SPLITS
from featx._files import signature
from featx.errors import StoreError, UsageError, did_you_mean, plural
from featx.store import frames, hdf5
from featx.store.hdf5 import RESTORE
from featx.store.index import NAME_COLUMNS, read_index, read_names
from featx.store.manifest import check_version, damaged, fingerprint, manifest_bytes, read_manifest
from featx.store.shards import (
    SHARD_COLUMNS as SHARD_COLUMNS,
    ShardReader,
    digest_keys as digest_keys,
    dims_of,
    layers_of,
    open_shard as open_shard,
    read_rows,
    shard_path as shard_path,
)

if TYPE_CHECKING:
    import anndata
    import pandas

PACKED_FORMAT = "featx-packed"
T = TypeVar("T")

_RETRIES = 20
PACKED_COLUMNS = {**NAME_COLUMNS, "embeddings/*": "float32 matrix"}


@dataclass(frozen=True)
class FeatureSet:
    """Embeddings with all that they are worth knowing by, one row an image, sorted by id.

    Parameters
    ----------
    embeddings : float32 (n, embedding_dim).
    ids : str (n,).
    labels : int64 (n,), rows of ``class_names``; -1 is unlabelled.
    class_names : the names of the classes.
    splits : str (n,): "train", "val", "test" or "".
    digests : uint8 (n, 32), sha256 of the image files.
    layer : the layer that the embeddings are of.
    provenance : how they were made.
    fingerprint : hash of what of the provenance changes the numbers.
    """

    embeddings: NDArray[np.float32]
    ids: NDArray[np.str_]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    splits: NDArray[np.str_]
    digests: NDArray[np.uint8]
    layer: str
    provenance: Mapping[str, Any]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        counted = f"{plural(len(self), 'image')} x {self.embeddings.shape[1]}"
        return f"FeatureSet({counted}, {plural(len(self.class_names), 'class')}, layer {self.layer!r})"

    @property
    def copies(self) -> NDArray[np.intp]:
        """Dense numbers (n,): equal for equal bytes."""
        return np.unique(self.digests, axis=0, return_inverse=True)[1].reshape(-1)

    @property
    def near_copies(self) -> float | None:
        """Cosine from which on two images count as copies; None where it tells nothing, as all look alike.

        Random weights find every image like every other.
        """
        return None if self.provenance.get("weights") == "none" else NEAR

    def to_numpy(self) -> dict[str, NDArray[Any]]:
        """Plain arrays by name: embeddings, ids, labels, class_names, splits, digests."""
        return frames.to_numpy(self)

    def to_pandas(self) -> pandas.DataFrame:
        """A frame with the ids as its index: label, split, digest, and ``e0``, ``e1``, ... of the embedding.

        Raises
        ------
        UsageError
            pandas is not installed (the extra ``frames``).
        """
        return frames.to_pandas(self)

    def to_anndata(self) -> anndata.AnnData:
        """An AnnData with the embeddings as ``X`` and label, split and digest in ``obs``.

        Raises
        ------
        UsageError
            anndata is not installed (the extra ``frames``).
        """
        return frames.to_anndata(self)


def is_packed(path: Path) -> bool:
    """Whether ``path`` is a file (a packed store) and not a folder."""
    return path.is_file()


# --- reading ------------------------------------------------------------------------------------------------------


def read_features(
    path: str | Path,
    *,
    layer: str = "penultimate",
    splits: Sequence[str] | None = None,
    max_images: int | None = None,
    random_state: int = 0,
) -> FeatureSet:
    """Read the embeddings of a store (or of a packed store) with their ids, labels and provenance.

    Every shard is compared with its checksum first, so altered numbers are never returned.

    Parameters
    ----------
    layer : which layer's embeddings.
    splits : only the images of these splits.
    max_images : at most so many, drawn by ``random_state`` with the shares that classes and splits have; a class has
        one at least. Only the shards that they lie in are read.

    Raises
    ------
    StoreError
        No store there, or it is damaged, foreign, unfinished, or of a newer version.
    UsageError
        The store has no such layer, or there is no such split.
    """
    if splits is not None and (isinstance(splits, str) or not set(splits) <= set(SPLITS)):
        raise UsageError("no such split", where="splits", expected="a list of train, val, test", found=splits)
    return steady(Path(path), lambda: _read_features(FeatureReader(path), layer, splits, max_images, random_state))


def steady(store: Path, read: Callable[[], T]) -> T:
    """Read again where a writer published, or a prune replaced shards, between two steps of the reading."""
    for _ in range(_RETRIES):
        before = _state(store)
        try:
            return read()
        except StoreError:
            if _state(store) == before:
                raise  # nothing moved: it is what the error says
    raise StoreError("changes faster than it can be read", where=store, hint="Read it when the writer is done.")


def source_of(path: Path) -> str:
    """The folder or manifest that a store was made from; "" for a packed store, which does not keep it."""
    return "" if path.is_file() else read_manifest(path).source


def _state(store: Path) -> bytes:
    return b"" if store.is_file() else manifest_bytes(store)


def _read_features(
    reader: FeatureReader, layer: str, splits: Sequence[str] | None, max_images: int | None, random_state: int
) -> FeatureSet:
    index = reader.index
    wanted = np.ones(len(index), bool) if splits is None else np.isin(index.split, list(splits))
    rows = np.flatnonzero(wanted)
    if max_images is not None and max_images < len(rows):
        rows = rows[
            draw_rows(index.labels[rows], [index.split[row] for row in rows.tolist()], max_images, random_state)
        ]
    return FeatureSet(
        embeddings=reader.read(rows, layer=layer),
        ids=np.array([index.ids[row] for row in rows.tolist()], dtype=np.str_),
        labels=index.labels[rows],
        class_names=index.class_names,
        splits=np.array([index.split[row] for row in rows.tolist()], dtype=np.str_),
        digests=index.digests[rows],
        layer=layer,
        provenance=reader.provenance,
        fingerprint=fingerprint(reader.provenance),
    )


def draw_rows(labels: NDArray[np.int64], splits: Sequence[str], n: int, random_state: int) -> NDArray[np.int64]:
    """About ``n`` rows, ascending, drawn at random from every class in every split in proportion, one at least."""
    if n < 1:
        raise UsageError("must be 1 or more", where="max_images", found=n)
    codes = {name: code for code, name in enumerate(("", *SPLITS))}
    key = labels * len(codes) + np.fromiter((codes[name] for name in splits), np.int64, len(splits))
    groups = np.unique(key, return_inverse=True)[1].reshape(-1)
    # By a random order in which each row stands at its quantile in its group: the first n are in proportion.
    order = np.random.default_rng(random_state).permutation(len(groups))
    order = order[np.argsort(groups[order], kind="stable")]
    sizes = np.bincount(groups)
    place = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    quantile = np.where(place == 0, 0.0, (place + 0.5) / np.repeat(sizes, sizes))
    kept = np.argsort(quantile, kind="stable")[: max(n, len(sizes))]
    return np.sort(order[kept])


def stored_precision(path: Path) -> str | None:
    """The precision that a store was made with, or None where there is no store yet."""
    if not (path / "manifest.json").is_file():
        return None
    precision = read_manifest(path).provenance.get("precision")
    return precision if isinstance(precision, str) else None


def iter_features(
    path: str | Path, *, layer: str = "penultimate", block_rows: int = 4096
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Stream embeddings in the order of the index, for stores larger than memory.

    Yields
    ------
    The slice of index rows, and their embeddings, float32 (at most ``block_rows``, d).
    """
    reader = FeatureReader(path)
    for start in range(0, len(reader.index), block_rows):
        stop = min(start + block_rows, len(reader.index))
        yield slice(start, stop), reader.read(np.arange(start, stop), layer=layer)


class FeatureReader:
    """Random access to the rows of a store or a packed store, by their place in the index.

    No file stays open between calls, so a reader may be used after a fork and sent to other processes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._shards: ShardReader | None = None
        if self.path.is_file():
            self._open_packed()
        else:
            steady(self.path, self._open_store)

    def _open_packed(self) -> None:
        self._state = signature(self.path)
        self._seal = hdf5.check_seal(self.path)
        said = hdf5.read_attributes(self.path, ("format", "format_version", "provenance", "fingerprint"))
        if said["format"] != PACKED_FORMAT:
            raise damaged(self.path, f"its format is not {PACKED_FORMAT!r}")
        try:
            version, provenance = json.loads(said["format_version"]), json.loads(said["provenance"])
            check_version(self.path, version)
            if not isinstance(provenance, dict) or said["fingerprint"] != fingerprint(provenance):
                raise damaged(self.path, "the fingerprint does not belong to the provenance")
        except (ValueError, RecursionError) as error:
            raise damaged(self.path, "its attributes are not JSON") from error
        with hdf5.open_checked(self.path, PACKED_COLUMNS) as file:
            layers = provenance.get("layers")
            if not isinstance(layers, list) or sorted(map(str, layers)) != sorted(layers_of(file)):
                raise damaged(self.path, "its layers are not those of the provenance")
            unknown = np.full(file.rows, -1, dtype=np.int64)
            self.index = read_names(file, sizes=unknown, stamps=unknown)
        self.provenance: Mapping[str, Any] = provenance

    def _open_store(self) -> None:
        manifest = read_manifest(self.path)
        self.index = read_index(self.path, manifest)
        self.provenance = manifest.provenance
        self._shards = ShardReader(self.path, manifest)
        self._rows = self._shards.find(self.index.digests)
        self._shards.forget_contents()
        lost = np.flatnonzero(self._rows < 0)
        if len(lost):
            self._shards.check_sums()
            missing = self.index.ids[int(lost[0])]
            raise StoreError(
                "the index names an image that no shard has", where=self.path / "index.h5", found=missing, hint=RESTORE
            )

    @contextmanager
    def _packed(self) -> Iterator[hdf5.CheckedFile]:
        if signature(self.path) != self._state and hdf5.check_seal(self.path) != self._seal:
            raise StoreError("the file was replaced while it was read", where=self.path, hint="Open it again.")
        with hdf5.open_checked(self.path, PACKED_COLUMNS) as file:
            yield file

    def read(self, rows: NDArray[np.integer[Any]], *, layer: str = "penultimate") -> NDArray[np.float32]:
        """Embeddings of index rows, float32 (len(rows), d), in the order asked for."""
        layers = self.provenance["layers"]
        if layer not in layers:
            raise UsageError(
                f"no layer {layer!r} in this store",
                where=self.path,
                found=", ".join(layers),
                hint=did_you_mean(layer, layers),
            )
        if self._shards is not None:
            return self._shards.read(self._rows[rows], layer=layer)
        with self._packed() as file:
            out = np.empty((len(rows), dims_of(file, layer)), np.float32)
            read_rows(file, layer, np.asarray(rows, np.int64), out)
        return out

    def dims(self, layer: str) -> int:
        """Length of a layer's embeddings; 0 for a store that has none yet."""
        if self._shards is not None:
            return self._shards.dims(layer)
        with self._packed() as file:
            return dims_of(file, layer)
