"""The store of embeddings: the wall between pixels and arrays.

Format, version 1
-----------------
A store is a folder. MUST, MAY and SHOULD are meant as in RFC 2119.

``manifest.json``
    The list of what is published. One JSON object, spelled exactly as :func:`_spell` spells it (sorted keys, two
    spaces of indent), of at most 64 MiB, with these fields; a reader MUST refuse others missing, and MAY find more:
    ``format`` ("featx-store"), ``format_version`` (int; a reader MUST refuse a greater one), ``provenance`` (object),
    ``fingerprint`` (hex sha256 of the provenance fields of :data:`FINGERPRINTED`), ``shards`` (list of ``{name, rows,
    sha256}``), ``in_flux`` (names of shard files that MAY or may not exist and MUST NOT be read: about to appear, or
    to be deleted), ``class_names``, ``splits``, ``counts``, ``source`` (what the index said when it was last written;
    readers MUST take names and labels from the index), and ``checksum`` (hex sha256 of the canonical JSON of all
    other fields).
``shards/<nnnnn>-<sha8>.h5``
    Immutable. Root datasets ``/embeddings/<layer>`` float32 (n, d), one for each layer of the provenance, finite, and
    ``/digests`` uint8 (n, 32), the sha256 of the image file that the row is of. ``<sha8>`` is the beginning of the
    file's sha256. A digest MUST NOT occur twice in a store. Chunks MUST be whole rows; the only filter is fletcher32.
    A reader MUST compare the file with the manifest's sha256 before it returns rows.
``index.h5``
    What the images are called: ``/ids`` (fixed-length UTF-8, sorted, unique), ``/labels`` int64 (a row of
    ``/class_names``, or -1), ``/split`` ("", train, val, test), ``/digests`` uint8 (n, 32), ``/sizes`` and
    ``/mtimes_ns`` int64 (to recognise unchanged files; -1 where they cannot be relied on), and ``/class_names``. It is
    sealed: a 512-byte HDF5 user block holds the sha256 of the rest. Every digest MUST be in a published shard. A store
    without it has an extraction that did not finish.
``quarantine.jsonl``
    The images that were refused, one canonical JSON object a line: ``id, digest, reason, message, checksum``.
``.lock``
    Held (flock) by the one writer. Names starting with ``.tmp-`` are leftovers of dead writers.

A packed store is one sealed HDF5 file with the same columns (``/embeddings/<layer>``, ``/ids``, ``/labels``,
``/split``, ``/digests``, ``/class_names``), one row an image, and the attributes ``format`` ("featx-packed"),
``format_version``, ``provenance`` (JSON) and ``fingerprint``.

Everything is published by writing a temporary file, fsync, verification, rename and fsync of the folder. Order: the
manifest announces a shard as in flux; the shard appears; the manifest lists it; the index follows at the end. So at
every instant the index speaks of published rows only, and a shard that the manifest does not name is foreign.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx import hdf5
from featx._files import canonical_json, sha256_file
from featx.errors import StoreError, UsageError, did_you_mean
from featx.hdf5 import RESTORE
from featx.manifest import Shard, check_version, damaged, fingerprint, read_manifest

PACKED_FORMAT = "featx-packed"
_RETRIES = 3

SHARD_COLUMNS = {"embeddings/*": "float32 matrix", "digests": "uint8 matrix"}
NAME_COLUMNS = {
    "ids": "text",
    "labels": "int64",
    "split": "text",
    "digests": "uint8 matrix",
    "class_names": "text",
}
INDEX_COLUMNS = {**NAME_COLUMNS, "sizes": "int64", "mtimes_ns": "int64"}
PACKED_COLUMNS = {**NAME_COLUMNS, "embeddings/*": "float32 matrix"}


@dataclass(frozen=True)
class Index:
    """What the images of a store are called: columns of equal length, sorted by id.

    ``labels`` are rows of ``class_names`` or -1; ``digests`` is uint8 (n, 32); ``sizes`` (bytes) and ``mtimes_ns``
    recognise unchanged files.
    """

    ids: Sequence[str]
    labels: NDArray[np.int64]
    split: Sequence[str]
    digests: NDArray[np.uint8]
    class_names: tuple[str, ...]
    sizes: NDArray[np.int64]
    mtimes_ns: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def counts(self, values: Sequence[str]) -> dict[str, int]:
        """How often each value occurs, sorted by value; empty ones are left out."""
        names, counts = np.unique(np.asarray(values, dtype=object).astype(str), return_counts=True)
        return {str(n): int(c) for n, c in zip(names, counts, strict=True) if n}

    @property
    def labels_as_text(self) -> list[str]:
        """The class name of each image, "" where there is none."""
        return [self.class_names[label] if label >= 0 else "" for label in self.labels.tolist()]


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
        found_layers = {name.removeprefix("embeddings/") for name in file.columns if name != "digests"}
        if file.rows != shard.rows or found_layers != set(layers):
            raise StoreError("the shard is not what the manifest says", where=path, hint=RESTORE)
        if file.columns["digests"].shape[1] != 32:
            raise StoreError("digests are not 32 bytes", where=path)
        yield file


def read_index(store: Path) -> Index:
    """Read and check the index of a store; StoreError where the extraction has not finished."""
    path = store / "index.h5"
    if not path.is_file():
        raise StoreError(
            "the store has no index: its extraction has not finished",
            where=store,
            hint="Run the same featx extract command again; what is there is kept.",
        )
    hdf5.check_seal(path)
    with hdf5.open_checked(path, INDEX_COLUMNS) as file:
        return read_names(file, sizes=file.read("sizes"), mtimes_ns=file.read("mtimes_ns"))


def read_names(file: hdf5.CheckedFile, *, sizes: NDArray[np.int64], mtimes_ns: NDArray[np.int64]) -> Index:
    """The columns that name images, of an index or a packed file, checked against each other."""
    class_names = tuple(file.text("class_names"))
    ids, labels, split, digests = file.text("ids"), file.read("labels"), file.text("split"), file.read("digests")
    if len(labels) and not (labels.min() >= -1 and labels.max() < len(class_names)):
        raise StoreError("labels point outside class_names", where=file.path, hint=RESTORE)
    if digests.shape[1:] != (32,) or not set(split) <= {"", "train", "val", "test"}:
        raise StoreError("digests or splits are not what the format allows", where=file.path, hint=RESTORE)
    if len(set(ids)) != len(ids):
        raise StoreError("an id occurs twice", where=file.path, hint=RESTORE)
    return Index(ids, labels, split, digests, class_names, sizes, mtimes_ns)


def index_columns(index: Index) -> list[hdf5.Column]:
    """The columns that name images, as an index and a packed file hold them."""
    return [
        hdf5.Column.of("ids", hdf5.strings(index.ids)),
        hdf5.Column.of("labels", index.labels.astype("<i8")),
        hdf5.Column.of("split", hdf5.strings(index.split)),
        hdf5.Column.of("digests", index.digests),
        hdf5.Column.of("class_names", hdf5.strings(index.class_names)),
    ]


@dataclass(frozen=True)
class Refused:
    """One line of the quarantine. ``digest`` is hex, or "" where the file could not be read."""

    id: str
    digest: str
    reason: str
    message: str


def spell_quarantine(refused: Sequence[Refused]) -> bytes:
    """The quarantine's bytes."""
    lines = []
    for item in refused:
        fields = {"id": item.id, "digest": item.digest, "reason": item.reason, "message": item.message}
        lines.append(canonical_json({**fields, "checksum": hashlib.sha256(canonical_json(fields)).hexdigest()[:16]}))
    return b"".join(line + b"\n" for line in lines)


def read_quarantine(store: Path) -> list[Refused]:
    """The images that the last extraction refused."""
    path = store / "quarantine.jsonl"
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    try:
        rows = [json.loads(line) for line in raw.decode().splitlines()]
        refused = [Refused(row["id"], row["digest"], row["reason"], row["message"]) for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(path, "a line is not what featx wrote") from error
    if spell_quarantine(refused) != raw:
        raise damaged(path, "its checksum does not match")
    return refused


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
        The store has no such layer.
    """
    for _ in range(_RETRIES):
        before = _state(Path(path))
        try:
            return _read_features(FeatureReader(path), layer, splits)
        except StoreError:
            # A prune may have replaced shards between two reads; anything else is what the error says.
            if _state(Path(path)) == before:
                raise
    raise StoreError("changes faster than it can be read", where=path)


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


def _state(store: Path) -> bytes:
    manifest = store / "manifest.json"
    return manifest.read_bytes() if manifest.is_file() else b""


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
        self._verified: set[str] = set()
        if self.path.is_file():
            self._open_packed()
        else:
            self._open_store()

    def _open_packed(self) -> None:
        hdf5.check_seal(self.path)
        with hdf5.open_checked(self.path, PACKED_COLUMNS) as file:
            if file.attribute("format") != PACKED_FORMAT:
                raise damaged(self.path, f"its format is not {PACKED_FORMAT!r}")
            try:
                version, provenance = (
                    json.loads(file.attribute("format_version")),
                    json.loads(file.attribute("provenance")),
                )
            except (ValueError, RecursionError) as error:
                raise damaged(self.path, "its attributes are not JSON") from error
            check_version(self.path, version)
            if not isinstance(provenance, dict) or not isinstance(provenance.get("layers"), list):
                raise damaged(self.path, "it has no provenance")
            if file.attribute("fingerprint") != fingerprint(provenance):
                raise damaged(self.path, "the fingerprint does not belong to the provenance")
            unknown = np.full(file.rows, -1, dtype=np.int64)
            self.index = read_names(file, sizes=unknown, mtimes_ns=unknown)
        self.provenance: Mapping[str, Any] = provenance
        self._shards: tuple[Shard, ...] = ()
        self._shard_of, self._row_of = np.zeros(len(self.index), np.int64), np.arange(len(self.index))

    def _open_store(self) -> None:
        manifest = read_manifest(self.path)
        self.index = read_index(self.path)
        self.provenance, self._shards = manifest.provenance, manifest.shards
        digests, shard_of, row_of = [np.empty((0, 32), np.uint8)], [], []
        for number, shard in enumerate(manifest.shards):
            with self._part(number) as file:
                digests.append(file.read("digests"))
            shard_of.append(np.full(shard.rows, number))
            row_of.append(np.arange(shard.rows))
        keys, wanted = digest_keys(np.concatenate(digests)), digest_keys(self.index.digests)
        order = np.argsort(keys)
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
            with hdf5.open_checked(self.path, PACKED_COLUMNS) as file:
                yield file
            return
        shard = self._shards[number]
        with open_shard(self.path, shard, self.provenance["layers"], hashed=shard.name in self._verified) as file:
            self._verified.add(shard.name)
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
            with self._part(number) as file:
                # One contiguous read, then a gather: HDF5's own fancy indexing is far slower.
                low, high = int(inside.min()), int(inside.max()) + 1
                block = file.read(f"embeddings/{layer}", low, high)
            if out is None:
                out = np.empty((len(rows), block.shape[1]), np.float32)
            out[places] = block[inside - low]
        return np.empty((0, 0), np.float32) if out is None else out


def digest_keys(digests: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """Digests (n, 32) as one sortable value each."""
    return np.ascontiguousarray(digests).view("S32").reshape(-1)
