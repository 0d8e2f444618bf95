"""Rows of a store's shards, found by the content that they are of. The format is in ``featx/guide/store-format.md``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx._files import sha256_file, signature
from featx.errors import StoreError
from featx.images import HASH_BYTES
from featx.store import hdf5
from featx.store.hdf5 import RESTORE
from featx.store.manifest import Block, Manifest, Shard, name_of, read_manifest

WINDOW_BYTES = 2**22
"""What is read at a time: the memory that a reader needs beside the answer."""


def shard_path(store: Path, shard: Shard) -> Path:
    """Where a shard of a store is."""
    return store / "shards" / shard.name


@contextmanager
def open_shard(store: Path, shard: Shard, *, hashed: bool = False) -> Iterator[hdf5.CheckedFile]:
    """Open a published shard after comparing it with the manifest (its bytes too, unless ``hashed`` already)."""
    path = shard_path(store, shard)
    if not path.is_file():
        raise StoreError("the shard is missing", where=path, hint=RESTORE)
    try:
        found = shard.sha256 if hashed else sha256_file(path)
    except OSError as error:
        raise StoreError(f"cannot be read ({error.strerror})", where=path) from error
    if found != shard.sha256:
        raise StoreError("the shard was altered: its sha256 does not match", where=path, hint=RESTORE)
    with hdf5.open_checked(path, shard.columns()) as file:
        if file.rows != shard.rows:
            raise StoreError("the shard is not what the manifest says", where=path, hint=RESTORE)
        for column, width in (("digests", 32), ("phash", HASH_BYTES)):
            if column in file.columns and width_of(file, column) != width:
                raise StoreError(f"{column} are not {width} bytes", where=path)
        yield file


def width_of(file: hdf5.CheckedFile, column: str) -> int:
    """Numbers in a row of a column, such as the length of embeddings."""
    return int(file.columns[column].shape[1])


def digest_keys(digests: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """Digests (n, 32) as one sortable value each."""
    return np.ascontiguousarray(digests).view("S32").reshape(-1)


def digest_bytes(digests: NDArray[np.uint8]) -> list[bytes]:
    """Digests (n, 32) as 32 bytes each; those of :func:`digest_keys` lose the zeros at their ends in a list."""
    flat = digests.tobytes()
    return [flat[start : start + 32] for start in range(0, len(flat), 32)]


def _prefixes(digests: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The first eight bytes of digests (n, 32), as numbers."""
    return np.ascontiguousarray(digests[:, :8]).view(np.uint64).reshape(-1)


def read_rows(file: hdf5.CheckedFile, column: str, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
    """Some rows of one column of a file, in the order asked for, into ``out`` (len(rows), d)."""
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    window = max(1, WINDOW_BYTES // max(out.itemsize * out.shape[1], 1))
    start = 0
    while start < len(rows):
        # One contiguous read, then a gather: HDF5's own fancy indexing is far slower.
        low = int(ascending[start])
        stop = int(np.searchsorted(ascending, low + window))
        block = file.read(column, low, int(ascending[stop - 1]) + 1)
        out[order[start:stop]] = block[ascending[start:stop] - low]
        start = stop


class Contents:
    """A set of digests that grows, in 32 bytes each; asking is thread-safe.

    Sorted blocks, each more than twice as long as the next: adding n in small parts moves every digest about log n
    times, where one sorted array would be written anew each time.
    """

    def __init__(self, digests: NDArray[np.uint8]) -> None:
        self._blocks = [np.sort(digest_keys(digests))]

    def add(self, digests: NDArray[np.uint8]) -> None:
        """Add digests (n, 32)."""
        blocks = [*self._blocks, np.sort(digest_keys(digests))]
        while len(blocks) > 1 and len(blocks[-2]) <= 2 * len(blocks[-1]):
            blocks[-2:] = [np.sort(np.concatenate(blocks[-2:]), kind="stable")]
        self._blocks = blocks  # at once: another thread may be asking

    def has(self, digests: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which of these (n, 32) are in it."""
        keys = digest_keys(digests)
        found = np.zeros(len(keys), bool)
        for block in self._blocks:
            at = np.searchsorted(block, keys)
            inside = np.flatnonzero(at < len(block))
            found[inside] |= block[at[inside]] == keys[inside]
        return found

    def __contains__(self, digest: bytes) -> bool:
        # As an array of one: a numpy scalar would lose the zero bytes that a digest may end in.
        return bool(self.has(np.frombuffer(digest, np.uint8).reshape(1, 32))[0])


class ShardReader:
    """Random access to the published rows of one backbone of a store; by default the store's own.

    Opening it reads the digests, and no embedding: a shard is compared with its sha256 when rows of it are first read,
    so that a few rows of a large store cost no more than the shards that they lie in. No file stays open between
    calls, so a reader may be used after a fork and sent to other processes.

    Raises
    ------
    StoreError
        A shard is missing, damaged or not what the manifest says, or two have a row of the same content.
    """

    def __init__(self, path: Path, manifest: Manifest, backbone: str | None = None) -> None:
        self.path = path
        self.backbone = name_of(manifest.provenance) if backbone is None else backbone
        self._shards = manifest.of(self.backbone)
        layers = next(each["layers"] for each in manifest.backbones if name_of(each) == self.backbone)
        self._verified: dict[Path, tuple[int, ...]] = {}
        self._contents: dict[Path, bytes] = {}
        rows = sum(shard.rows for shard in self._shards)
        digests = np.empty((rows, 32), np.uint8)
        widths, at = set(), 0
        for shard in self._shards:
            place = shard_path(path, shard)
            try:
                with open_shard(path, shard, hashed=True) as file:
                    digests[at : at + shard.rows] = file.read("digests")
                    self._contents[place] = hashlib.sha256(digests[at : at + shard.rows].tobytes()).digest()
                    columns = [shard.column(Block(self.backbone, layer)) for layer in layers]
                    widths.add(tuple(width_of(file, column) for column in columns))
            except StoreError:
                self.check_sums()
                raise
            if len(widths) > 1:
                self.check_sums()
                raise StoreError("its embeddings have another length", where=place, hint=RESTORE)
            at += shard.rows
        # Sorted by the first eight bytes, as numbers: ten times faster than by all 32, as text.
        prefixes = _prefixes(digests)
        self._order = np.argsort(prefixes, kind="stable")
        self._prefixes, self._digests = prefixes[self._order], digests
        tied = bool((self._prefixes[1:] == self._prefixes[:-1]).any())
        if tied and len(np.unique(digest_keys(digests))) < rows:
            self.check_sums()
            raise StoreError("two shards have an embedding of the same image", where=path, hint=RESTORE)
        self._starts = np.cumsum([0, *(shard.rows for shard in self._shards)])
        self._dims = dict(zip(layers, widths.pop() if widths else [0] * len(layers), strict=True))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def find(self, digests: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Rows (n,) of these contents (n, 32), counted over all shards; -1 where there is none."""
        wanted = _prefixes(digests)
        at = np.searchsorted(self._prefixes, wanted)
        rows = np.full(len(wanted), -1, np.int64)
        asked = np.arange(len(wanted))
        while len(asked):  # once, but for contents that share their first eight bytes
            asked = asked[at[asked] < len(self._prefixes)]
            asked = asked[self._prefixes[at[asked]] == wanted[asked]]
            candidates = self._order[at[asked]]
            same = digest_keys(self._digests[candidates]) == digest_keys(digests[asked])
            rows[asked[same]] = candidates[same]
            asked = asked[~same]
            at[asked] += 1
        return rows

    def check_sums(self) -> None:
        """Compare all shards with their sha256: whoever finds them at odds wants to know which one was altered."""
        for shard in self._shards:
            with open_shard(self.path, shard):
                pass

    def forget_contents(self) -> None:
        """Give back the memory that :meth:`find` needs, which nobody will ask any more."""
        del self._prefixes, self._digests, self._order

    def read(self, rows: NDArray[np.int64], *, layer: str) -> NDArray[np.float32]:
        """Embeddings of rows as :meth:`find` counts them, float32 (len(rows), d), in the order asked for."""
        out = np.empty((len(rows), self.dims(layer)), np.float32)
        self._read(rows, out, lambda shard: shard.column(Block(self.backbone, layer)))
        return out

    @property
    def hashed(self) -> bool:
        """Whether there is a perceptual hash of every image."""
        return all(shard.hashed for shard in self._shards)

    def read_hashes(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Perceptual hashes uint8 (len(rows), 32) of rows, likewise; for readers that are ``hashed``."""
        out = np.empty((len(rows), HASH_BYTES), np.uint8)
        self._read(rows, out, lambda shard: "phash")
        return out

    def _read(self, rows: NDArray[np.int64], out: NDArray[Any], column: Callable[[Shard], str]) -> None:
        # Sorted once, for all shards: looking through the rows for each shard anew would be quadratic.
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[order], self._starts)
        for number in np.flatnonzero(bounds[1:] > bounds[:-1]).tolist():
            here = order[bounds[number] : bounds[number + 1]]
            block = np.empty((len(here), out.shape[1]), out.dtype)
            with self._open(self._shards[number]) as file:
                read_rows(file, column(self._shards[number]), rows[here] - self._starts[number], block)
            out[here] = block

    def dims(self, layer: str) -> int:
        """Length of a layer's embeddings; 0 for a store that has none yet."""
        return int(self._dims[layer])

    @contextmanager
    def _open(self, shard: Shard) -> Iterator[hdf5.CheckedFile]:
        path = shard_path(self.path, shard)
        state = signature(path)
        if not state and shard.name not in read_manifest(self.path).names:
            raise StoreError("the shard was taken out while it was read", where=path, hint="Open the store again.")
        hashed = bool(state) and self._verified.get(path) == state
        with open_shard(self.path, shard, hashed=hashed) as file:
            # The file is what was published; was it so when the rows were numbered?
            if not hashed and self._contents[path] != hashlib.sha256(file.read("digests").tobytes()).digest():
                raise StoreError("the shard was replaced while it was read", where=path, hint="Read it again.")
            self._verified[path] = state
            yield file
