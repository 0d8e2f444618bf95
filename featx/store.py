"""The store of embeddings: the wall between pixels and arrays.

Format, version 1
-----------------
A store is a folder. MUST, MAY and SHOULD are meant as in RFC 2119.

``manifest.json``
    The list of what is published. One JSON object, spelled as ``json.dumps(..., indent=2, sort_keys=True)`` spells it
    and a newline (so ASCII), of at most 4 MiB, with these fields; a reader MUST refuse one that lacks any, and MAY find
    more:
    ``format`` ("featx-store"), ``format_version`` (int; a reader MUST refuse a greater one), ``provenance`` (object),
    ``fingerprint`` (hex sha256 of the provenance fields of
    :data:`featx.manifest.FINGERPRINTED`, and of those of ``FINGERPRINTED_IF_THERE`` that a store has), ``shards``
    (list of ``{name, rows, sha256}``), ``in_flux`` (names of shard files that MAY or may not exist and MUST NOT be read: about to appear, or
    to be deleted), ``class_names``, ``splits``, ``counts``, ``source`` (what the index said when it was last written;
    readers MUST take names and labels from the index), and ``checksum`` (hex sha256 of the canonical JSON of all
    other fields). ``quarantine`` MAY be there: hex sha256 sums of which the file's is one, two of them while it is
    being replaced; without any, the file's sum is unknown.
``shards/<nnnnn>-<sha8>.h5``
    Immutable. Root datasets ``/embeddings/<layer>`` float32 (n, d), one for each layer of the provenance, finite, and
    ``/digests`` uint8 (n, 32), the sha256 of the image file that the row is of. ``<sha8>`` is the beginning of the
    file's sha256. A digest MUST NOT occur twice in a store. Chunks MUST be whole rows, and all of
    them written; numbers MUST be little-endian, links hard ones; the only filter MAY be fletcher32. A reader MUST
    compare the file with the manifest's sha256 before it returns rows.
``index.h5``
    What the images are called: ``/ids`` (fixed-length UTF-8, sorted, unique), ``/labels`` int64 (a row of
    ``/class_names``, or -1), ``/split`` ("", train, val, test), ``/digests`` uint8 (n, 32), ``/sizes`` and
    ``/mtimes_ns`` int64 (to recognise unchanged files; -1 where they cannot be relied on), and ``/class_names``. It is
    sealed: a 512-byte HDF5 user block holds the sha256 of the rest. Its attribute ``fingerprint`` MUST be the
    manifest's, texts MUST NOT be longer than 4,096 bytes (a writer SHOULD refuse an id that would widen a large index:
    :func:`featx.index.longest_id`). Every digest MUST be in a published shard. A store
    without it has an extraction that did not finish.
``quarantine.jsonl``
    The images that were refused, one canonical JSON object a line: ``id, digest, reason, message, checksum``. A missing
    file counts as an empty one. A writer MUST put the new sum into the manifest before it replaces the file.
``.lock``
    Held (flock) by the one writer. Names starting with ``.tmp-`` are leftovers of dead writers, which the next one
    deletes. Readers MUST ignore all names that start with a dot.

A packed store is one sealed HDF5 file with the same columns (``/embeddings/<layer>``, ``/ids``, ``/labels``,
``/split``, ``/digests``, ``/class_names``), one row an image, and the attributes ``format`` ("featx-packed"),
``format_version``, ``provenance`` (JSON) and ``fingerprint``.

Everything is published by writing a temporary file, fsync, verification, rename and fsync of the folder. Order: the
manifest announces a shard as in flux; the shard appears; the manifest lists it; at the end the quarantine is announced
and appears, then the index. So at every instant the index speaks of published rows only, and a shard that the manifest
does not name is foreign.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from featx import hdf5
from featx._files import sha256_file
from featx.errors import StoreError, UsageError, did_you_mean
from featx.hdf5 import RESTORE
from featx.index import NAME_COLUMNS, SPLITS, read_index, read_names
from featx.manifest import Shard, check_version, damaged, fingerprint, manifest_bytes, read_manifest

PACKED_FORMAT = "featx-packed"
T = TypeVar("T")

_RETRIES = 20
_WINDOW_BYTES = 2**22
"""What is read at a time: the memory that a reader needs beside the answer."""

SHARD_COLUMNS = {"embeddings/*": "float32 matrix", "digests": "uint8 matrix"}
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


def is_packed(path: Path) -> bool:
    """Whether ``path`` is a file (a packed store) and not a folder."""
    return path.is_file()


def shard_path(store: Path, shard: Shard) -> Path:
    return store / "shards" / shard.name


@contextmanager
def open_shard(store: Path, shard: Shard, layers: Sequence[str], *, hashed: bool = False) -> Iterator[hdf5.CheckedFile]:
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
    with hdf5.open_checked(path, SHARD_COLUMNS) as file:
        if file.rows != shard.rows or set(_layers(file)) != set(layers):
            raise StoreError("the shard is not what the manifest says", where=path, hint=RESTORE)
        if file.columns["digests"].shape[1] != 32:
            raise StoreError("digests are not 32 bytes", where=path)
        yield file


# --- reading ------------------------------------------------------------------------------------------------------


def read_features(path: str | Path, *, layer: str = "penultimate", splits: Sequence[str] | None = None) -> FeatureSet:
    """Read the embeddings of a store (or of a packed store) with their ids, labels and provenance.

    Every shard is compared with its checksum first, so altered numbers are never returned.

    Parameters
    ----------
    layer : which layer's embeddings.
    splits : only the images of these splits.

    Raises
    ------
    StoreError
        No store there, or it is damaged, foreign, unfinished, or of a newer version.
    UsageError
        The store has no such layer, or there is no such split.
    """
    if splits is not None and (isinstance(splits, str) or not set(splits) <= set(SPLITS)):
        raise UsageError("no such split", where="splits", expected="a list of train, val, test", found=splits)
    return steady(Path(path), lambda: _read_features(FeatureReader(path), layer, splits))


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


def _read_features(reader: FeatureReader, layer: str, splits: Sequence[str] | None) -> FeatureSet:
    index = reader.index
    wanted = np.ones(len(index), bool) if splits is None else np.isin(index.split, list(splits))
    rows = np.flatnonzero(wanted)
    return FeatureSet(
        embeddings=reader.read(rows, layer=layer),
        ids=np.array(index.ids, dtype=np.str_)[rows],
        labels=index.labels[rows],
        class_names=index.class_names,
        splits=np.array(index.split, dtype=np.str_)[rows],
        digests=index.digests[rows],
        layer=layer,
        provenance=reader.provenance,
        fingerprint=fingerprint(reader.provenance),
    )


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
        self._verified: dict[Path, tuple[int, ...]] = {}
        if self.path.is_file():
            self._open_packed()
        else:
            steady(self.path, self._open_store)

    def _open_packed(self) -> None:
        self._state = _signature(self.path)
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
            if not isinstance(layers, list) or sorted(map(str, layers)) != sorted(_layers(file)):
                raise damaged(self.path, "its layers are not those of the provenance")
            unknown = np.full(file.rows, -1, dtype=np.int64)
            self.index = read_names(file, sizes=unknown, mtimes_ns=unknown)
        self.provenance: Mapping[str, Any] = provenance
        self._shards: tuple[Shard, ...] = ()
        self._shard_of, self._row_of = np.zeros(len(self.index), np.int64), np.arange(len(self.index))

    def _open_store(self) -> None:
        manifest = read_manifest(self.path)
        self.index = read_index(self.path, manifest)
        self.provenance, self._shards = manifest.provenance, manifest.shards
        digests, shard_of, row_of = [np.empty((0, 32), np.uint8)], [], []
        widths = set()
        for number, shard in enumerate(manifest.shards):
            with self._part(number) as file:
                digests.append(file.read("digests"))
                widths.add(tuple(_dims(file, layer) for layer in manifest.layers))
            if len(widths) > 1:
                raise StoreError("its embeddings have another length", where=shard_path(self.path, shard), hint=RESTORE)
            shard_of.append(np.full(shard.rows, number))
            row_of.append(np.arange(shard.rows))
        keys, wanted = digest_keys(np.concatenate(digests)), digest_keys(self.index.digests)
        order = np.argsort(keys)
        if (keys[order[1:]] == keys[order[:-1]]).any():
            raise StoreError("two shards have an embedding of the same image", where=self.path, hint=RESTORE)
        at = np.searchsorted(keys, wanted, sorter=order)
        found = at < len(keys)
        found[found] = keys[order[at[found]]] == wanted[found]
        if not found.all():
            missing = self.index.ids[int(np.flatnonzero(~found)[0])]
            raise StoreError(
                "the index names an image that no shard has", where=self.path / "index.h5", found=missing, hint=RESTORE
            )
        places = order[at] if len(keys) else np.empty(0, np.int64)
        self._shard_of = np.concatenate([np.empty(0, np.int64), *shard_of])[places]
        self._row_of = np.concatenate([np.empty(0, np.int64), *row_of])[places]

    @contextmanager
    def _part(self, number: int) -> Iterator[hdf5.CheckedFile]:
        if not self._shards:
            if _signature(self.path) != self._state and hdf5.check_seal(self.path) != self._seal:
                raise StoreError("the file was replaced while it was read", where=self.path, hint="Open it again.")
            with hdf5.open_checked(self.path, PACKED_COLUMNS) as file:
                yield file
            return
        shard = self._shards[number]
        path = shard_path(self.path, shard)
        state = _signature(path)
        hashed = bool(state) and self._verified.get(path) == state
        with open_shard(self.path, shard, self.provenance["layers"], hashed=hashed) as file:
            self._verified[path] = state
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
        out: NDArray[np.float32] | None = None
        shards = self._shard_of[rows]
        for number in np.unique(shards).tolist():
            places = np.flatnonzero(shards == number)
            inside = self._row_of[rows[places]]
            order = np.argsort(inside, kind="stable")
            places, inside = places[order], inside[order]
            with self._part(number) as file:
                dims = _dims(file, layer)
                if out is None:
                    out = np.empty((len(rows), dims), np.float32)
                window = max(1, _WINDOW_BYTES // (4 * dims))
                start = 0
                while start < len(inside):
                    # One contiguous read, then a gather: HDF5's own fancy indexing is far slower.
                    low = int(inside[start])
                    stop = int(np.searchsorted(inside, low + window))
                    block = file.read(f"embeddings/{layer}", low, int(inside[stop - 1]) + 1)
                    out[places[start:stop]] = block[inside[start:stop] - low]
                    start = stop
        if out is None:
            out = np.empty((0, self.dims(layer)), np.float32)
        return out

    def dims(self, layer: str) -> int:
        """Length of a layer's embeddings; 0 for a store that has none yet."""
        if self.path.is_dir() and not self._shards:
            return 0
        with self._part(0) as file:
            return _dims(file, layer)


def _dims(file: hdf5.CheckedFile, layer: str) -> int:
    return int(file.columns[f"embeddings/{layer}"].shape[1])


def _layers(file: hdf5.CheckedFile) -> list[str]:
    return [name.removeprefix("embeddings/") for name in file.columns if name.startswith("embeddings/")]


def _signature(path: Path) -> tuple[int, ...]:
    """What changes when a file is written to or replaced; () where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def digest_keys(digests: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """Digests (n, 32) as one sortable value each."""
    return np.ascontiguousarray(digests).view("S32").reshape(-1)
