"""The gallery of a store: exact, or with an approximate index that is saved beside the store.

``photos.featx`` keeps its search indexes in the folder ``photos.search``; one index is three files there:

``<fingerprint16>-<layer>.json``
    What the index is of and how it is used, with the sha256 of the other two and a checksum of its own.
``<fingerprint16>-<layer>-<sha8>.faiss``
    faiss's file. It is opened only after it was compared with its sha256, and then mapped, not read.
``<fingerprint16>-<layer>-<sha8>.digests``
    The sha256 of the image (32 bytes) behind each row of the index, in its order.

An index of other settings has another name, so a changed store never meets a stale one. New images are added to what
is there; images that went are passed over. It is made anew once the gallery has doubled since its lists were learnt, or
a fifth of it has gone. The folder is only as trustworthy as whoever may write to it: delete it when in doubt, it is
made again.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from featx._files import make_folder, publish, publish_bytes, read_regular, seal, sha256_file, unseal
from featx.errors import StoreError, plural
from featx.retrieval import faiss as ann
from featx.retrieval.neighbours import APPROXIMATE_ABOVE, GalleryIndex, Method, Rows
from featx.store import FeatureSet, digest_keys

FORMAT = "featx-search-index"
FORMAT_VERSION = 1
_MAX_BYTES = 65_536
_REBUILD_GROWTH = 2.0
_REBUILD_GONE = 0.2

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Record:
    """The JSON file of a saved index."""

    fingerprint: str
    layer: str
    rows: int
    trained_rows: int
    probes: int
    depth: int
    recall: float
    faiss: str
    index_sha256: str
    digests_sha256: str


def search_folder(store: Path) -> Path:
    """Where the search indexes of a store are kept."""
    return store.with_name(store.name.removesuffix(".featx").removesuffix(".h5") + ".search")


def open_gallery(
    store: str | Path, features: FeatureSet, *, method: Method = "auto", say: Say | None = None
) -> GalleryIndex:
    """The gallery of all rows of a store, by cosine.

    Parameters
    ----------
    store : where the features were read from.
    features : all its rows, of one layer.
    method : as of :class:`featx.retrieval.neighbours.GalleryIndex`. An approximate index is opened if there is one,
    brought up to
        date or made if not, and saved.
    say : gets a sentence before something slow begins.

    Raises
    ------
    UsageError
        ``method="approximate"`` without faiss, or with too few rows.
    StoreError
        The index cannot be saved.
    """
    many = len(features) > APPROXIMATE_ABOVE and ann.available()
    if method == "exact" or (method == "auto" and not many):
        return GalleryIndex(method="exact").fit(features.embeddings)
    return _Saved(Path(store), features, say if say is not None else lambda sentence: None).open(method)


class _Saved:
    def __init__(self, store: Path, features: FeatureSet, say: Say) -> None:
        self.features, self.say = features, say
        self.folder = search_folder(store)
        self.stem = f"{features.fingerprint[:16]}-{quote(features.layer, safe='')}"
        self.record_path = self.folder / f"{self.stem}.json"

    def open(self, method: Method) -> GalleryIndex:
        """The gallery with the saved index, brought up to date; or with a new one."""
        record = self._read()
        gallery: GalleryIndex | None = None
        while record is not None:
            try:
                gallery = self._reopen(record)
                break
            except StoreError:
                newer = self._read()
                if newer == record:
                    raise
                record = newer  # another process replaced the index between two steps of the reading
        if gallery is not None:
            gallery.method = method
            return gallery
        if len(self.features) >= ann.MIN_ROWS:
            make_folder(self.folder)  # before the work, so that a folder that cannot be written is told now
        self.say(f"making a search index of {plural(len(self.features), 'image')}, once")
        built = GalleryIndex(method=method).fit(self.features.embeddings)
        self._save(built, self.features.digests)
        return built

    def _reopen(self, record: _Record) -> GalleryIndex | None:
        """The gallery with a saved index, which is added to where images are new; None where it has to be made anew."""
        digests = self._read_digests(record)
        rows, new = match_rows(digests, self.features.digests)
        grown = len(self.features) > _REBUILD_GROWTH * record.trained_rows
        if grown or (rows < 0).sum() > _REBUILD_GONE * len(rows):
            return None
        index = self._load(record, writable=bool(len(new)))
        if index is None:
            return None
        gallery = GalleryIndex(method="exact").fit(self.features.embeddings)
        gallery.attach(index, rows)
        if len(new):
            self.say(f"adding {plural(len(new), 'image')} to the search index")
            index.add(gallery.unit_rows, new)
            gallery.attach(index, np.concatenate([rows, new]))
            gallery.calibrate()
            if gallery.approximate_index is None:
                return None  # the lists that were learnt from the old images do not suit the new ones
            self._save(gallery, np.concatenate([digests, self.features.digests[new]]))
        return gallery

    def _load(self, record: _Record, *, writable: bool) -> ann.ApproximateIndex | None:
        """The saved index, or None where the installed faiss is another than its maker: it is made again then."""
        if record.faiss != ann.faiss_version():
            return None
        return ann.ApproximateIndex.open(
            self._file(record.index_sha256, "faiss"),
            record.index_sha256,
            writable=writable,
            probes=record.probes,
            depth=record.depth,
            recall=record.recall,
            trained_rows=record.trained_rows,
        )

    def _save(self, gallery: GalleryIndex, digests: NDArray[np.uint8]) -> None:
        index = gallery.approximate_index
        if index is None:
            return  # the recall asked for is out of reach here: the search is exact
        make_folder(self.folder)
        hashes: dict[str, str] = {}

        def named(suffix: str) -> Callable[[Path], str]:
            def name(temp: Path) -> str:
                hashes[suffix] = sha256_file(temp)
                return self._file(hashes[suffix], suffix).name

            return name

        def write_digests(temp: Path) -> None:
            temp.write_bytes(np.ascontiguousarray(digests).tobytes())

        publish(self.folder / f"{self.stem}.faiss", index.save, named("faiss"))
        publish(self.folder / f"{self.stem}.digests", write_digests, named("digests"))
        record = _Record(
            fingerprint=self.features.fingerprint,
            layer=self.features.layer,
            rows=len(digests),
            trained_rows=index.trained_rows,
            probes=index.probes,
            depth=index.depth,
            recall=index.recall,
            faiss=ann.faiss_version(),
            index_sha256=hashes["faiss"],
            digests_sha256=hashes["digests"],
        )
        publish_bytes(self.record_path, seal({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(record)}))
        kept = {self._file(hashes[suffix], suffix) for suffix in hashes}
        for path in self.folder.glob("*"):
            # Files of earlier versions; whoever has one mapped keeps it until it is closed.
            if path.name.startswith(f"{self.stem}-") and path.suffix in (".faiss", ".digests") and path not in kept:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _file(self, sha256: str, suffix: str) -> Path:
        return self.folder / f"{self.stem}-{sha256[:8]}.{suffix}"

    def _read(self) -> _Record | None:
        """The record, or None where nothing was saved."""
        try:
            raw = read_regular(self.record_path, _MAX_BYTES)
        except FileNotFoundError:
            return None
        try:
            fields = unseal(raw)
            kind, version = fields.pop("format"), fields.pop("format_version")
            record = _Record(**fields)
            if kind != FORMAT or version != FORMAT_VERSION:
                raise ValueError("of another format")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(self.record_path) from error
        if (record.fingerprint, record.layer) != (self.features.fingerprint, self.features.layer):
            raise self._damaged(self.record_path)
        return record

    def _read_digests(self, record: _Record) -> NDArray[np.uint8]:
        path = self._file(record.digests_sha256, "digests")
        try:
            raw = read_regular(path, 32 * record.rows)
        except FileNotFoundError as error:
            raise self._damaged(path) from error
        if hashlib.sha256(raw).hexdigest() != record.digests_sha256 or len(raw) != 32 * record.rows:
            raise self._damaged(path)
        return np.frombuffer(raw, np.uint8).reshape(-1, 32)

    def _damaged(self, path: Path) -> StoreError:
        return StoreError(
            "the search index is missing or was altered",
            where=path,
            hint=f"Delete the folder {self.folder}; it is made again.",
        )


def match_rows(saved: NDArray[np.uint8], current: NDArray[np.uint8]) -> tuple[Rows, Rows]:
    """Which current row each saved one is, by content.

    Parameters
    ----------
    saved, current : uint8 (m, 32) and (n, 32), digests; one that occurs several times is matched in order.

    Returns
    -------
    rows : (m,) the current row of each saved one, -1 where it is gone.
    new : the current rows that were not saved, ascending.
    """
    keys = np.concatenate([digest_keys(saved), digest_keys(current)])
    content = np.unique(keys, return_inverse=True)[1]
    old, now = content[: len(saved)], content[len(saved) :]
    width = max(len(saved), len(current)) + 1
    old, now = old * width + _occurrence(old), now * width + _occurrence(now)
    order = np.argsort(now)
    at = np.searchsorted(now, old, sorter=order)
    rows = np.full(len(old), -1, np.int64)
    found = at < len(now)
    found[found] = now[order[at[found]]] == old[found]
    rows[found] = order[at[found]]
    taken = np.zeros(len(now), bool)
    taken[rows[found]] = True
    return rows, np.flatnonzero(~taken)


def _occurrence(values: NDArray[np.intp]) -> NDArray[np.intp]:
    """How many equal values come before each one."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.searchsorted(ordered, ordered)
    out = np.empty_like(values)
    out[order] = np.arange(len(values)) - first
    return out
