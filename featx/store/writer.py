"""Writing a store: one writer at a time, shards that appear whole, an index that follows them.

The format, and the order that makes it safe, is in ``featx/guide/store-format.md``.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx._files import (
    cannot_write,
    fsync_path,
    link_or_copy,
    make_folder,
    publish,
    publish_bytes,
    remove_leftovers,
    sha256_file,
    uninterrupted,
    writer_lock,
)
from featx.errors import StoreError
from featx.store import hdf5
from featx.store.index import Index, Refused, check_index, quarantine_bytes, read_index, spell_quarantine, write_index
from featx.store.manifest import Manifest, Shard, check_same, read_manifest, spell_manifest, write_manifest
from featx.store.reader import steady
from featx.store.shards import SHARD_COLUMNS, Contents, digest_keys, open_shard, shard_path

SHARD_ROWS = 4096
SHARD_SECONDS = 30.0
"""A shard is published when it has this many rows, or this long after the one before: a crash costs no more."""


class StoreWriter:
    """The one writer of a store; use it as a context manager.

    Parameters
    ----------
    path : folder of the store, made if there is none.
    provenance : how the embeddings are made; a store made otherwise is refused, naming the field.
    shard_rows, shard_seconds : when a shard is published.

    Raises
    ------
    StoreError
        Another writer is at work (named by host and pid), or the store is damaged.
    MismatchError
        The store was made with other settings.
    """

    def __init__(
        self,
        path: str | Path,
        provenance: Mapping[str, Any],
        *,
        shard_rows: int = SHARD_ROWS,
        shard_seconds: float = SHARD_SECONDS,
    ) -> None:
        self.path, self.provenance = Path(path), provenance
        self.shard_rows, self.shard_seconds = shard_rows, shard_seconds
        self._stack = ExitStack()

    def __enter__(self) -> StoreWriter:
        if self.path.is_file():
            raise StoreError("a file is in the way of the store", where=self.path, hint="Choose another --out.")
        # The manifest last: what another writer has just put there, it put there after its manifest, or with it.
        if self.path.is_dir() and _foreign(self.path) and not (self.path / "manifest.json").exists():
            raise StoreError(
                "a folder with other things in it", where=self.path, hint="Choose a new or empty folder for --out."
            )
        make_folder(self.path / "shards")
        self._stack.enter_context(writer_lock(self.path / ".lock"))
        try:
            self._begin()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _begin(self) -> None:
        remove_leftovers(self.path)
        remove_leftovers(self.path / "shards")
        if (self.path / "manifest.json").exists():
            self.manifest = read_manifest(self.path)
            check_same(self.manifest.provenance, self.provenance, self.path)
        else:
            self.manifest = Manifest(self.provenance)
        has_index = (self.path / "index.h5").exists()
        self.index = read_index(self.path, self.manifest) if has_index else None
        listed = {shard.name for shard in self.manifest.shards}
        with _changing(self.path):
            for path in sorted((self.path / "shards").iterdir()):
                if path.name in listed or path.name.startswith("."):
                    continue
                if path.name not in self.manifest.in_flux:
                    raise StoreError("a shard that the manifest does not name", where=path, hint="Move it away.")
                path.unlink()
            # Forgotten only when it is gone for good: after a power cut it would come back without a name.
            fsync_path(self.path / "shards")
        if self.manifest.in_flux or not self.manifest.shards:
            self._write_manifest(in_flux=())
        digests = [np.empty((0, 32), np.uint8)]
        for shard in self.manifest.shards:
            with open_shard(self.path, shard, self.manifest.layers) as file:
                digests.append(file.read("digests"))
        self._published = Contents(np.concatenate(digests))
        self._fresh: set[bytes] = set()
        self._pending: list[tuple[Sequence[bytes], Sequence[NDArray[np.float32]]]] = []
        self._since = time.monotonic()

    def _write_manifest(self, **changes: Any) -> None:
        manifest = replace(self.manifest, **changes)
        write_manifest(self.path, manifest)
        self.manifest = manifest

    def has(self, digest: bytes) -> bool:
        """Whether the store has (or is about to publish) the embedding of this content. Thread-safe."""
        if digest in self._fresh:
            return True
        return digest in self._published

    @property
    def rows(self) -> int:
        """Number of embeddings that are published."""
        return sum(shard.rows for shard in self.manifest.shards)

    def add(self, digests: Sequence[bytes], embeddings: Sequence[NDArray[np.float32]]) -> None:
        """Take new rows, and publish a shard when it is time.

        Parameters
        ----------
        digests : n digests of 32 bytes that the store does not have.
        embeddings : one float32 (n, d) array for each layer of the provenance.
        """
        given = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
        fresh = set(digests)
        if len(fresh) < len(digests) or not fresh.isdisjoint(self._fresh) or self._published.has(given).any():
            raise ValueError("an embedding of this content is in the store already")
        for layer, block in zip(self.manifest.layers, embeddings, strict=True):
            if not np.isfinite(block).all():
                raise StoreError(
                    f"layer {layer} came out as NaN or infinity; nothing of this batch was kept",
                    where=self.path,
                    hint="Try --precision fp32, and check the weights.",
                )
        # One step, so that an interrupt finds digests and rows together.
        self._pending.append((digests, embeddings))
        self._fresh.update(digests)
        if len(self._fresh) >= self.shard_rows or time.monotonic() - self._since >= self.shard_seconds:
            self.flush()

    def flush(self) -> None:
        """Publish what was added since the last shard. Signals wait until that is done."""
        with uninterrupted():
            if self._pending:
                digests = np.frombuffer(b"".join(d for part, _ in self._pending for d in part), np.uint8).reshape(
                    -1, 32
                )
                blocks = [np.concatenate(parts) for parts in zip(*(rows for _, rows in self._pending), strict=True)]
                self._publish_shard(digests, blocks)
                # In this order: another thread may ask has() between two lines.
                self._published.add(digests)
                self._pending, self._fresh = [], set()
            self._since = time.monotonic()

    def _next_number(self) -> int:
        return max((int(shard.name.split("-")[0]) for shard in self.manifest.shards), default=-1) + 1

    def take_over(self, other: Path) -> int:
        """Let this store have what another one has, and remember what the other calls its images.

        Every byte is compared with the other's checksums. Shards get a second name here (a hard link, or a copy where
        there are none) and a number of their own; of one with rows that are here already, the rest is written anew.

        Returns
        -------
        How many rows were new.

        Raises
        ------
        StoreError
            The other store is damaged.
        MismatchError
            It was made with other settings.
        """
        rows = steady(other, lambda: self._take_shards(other))
        if self.index is None and (other / "index.h5").exists():
            self.index = steady(other, lambda: read_index(other, read_manifest(other)))
        return rows

    def _take_shards(self, other: Path) -> int:
        theirs = read_manifest(other)
        check_same(self.manifest.provenance, theirs.provenance, self.path, whose=f"{other}'s")
        here = {shard.sha256 for shard in self.manifest.shards}
        before = self.rows
        for shard in theirs.shards:
            if shard.sha256 in here:
                continue
            with open_shard(other, shard, self.manifest.layers) as file:
                digests = file.read("digests")
                new = ~self._published.has(digests)
                if not new.all():
                    if new.any():
                        blocks = [file.read(f"embeddings/{layer}")[new] for layer in self.manifest.layers]
                        self.add([row.tobytes() for row in digests[new]], blocks)
                        self.flush()
                    continue
            with uninterrupted():
                self._link_shard(shard_path(other, shard), shard)
                self._published.add(digests)
        return self.rows - before

    def _link_shard(self, path: Path, shard: Shard) -> None:
        mine = replace(shard, name=f"{self._next_number():05d}-{shard.sha256[:8]}.h5")

        def write(temp: Path) -> None:
            link_or_copy(path, temp)

        def verify(temp: Path) -> None:
            if not temp.samefile(path) and sha256_file(temp) != shard.sha256:
                raise StoreError("the disk did not keep what was written", where=temp)

        self._write_manifest(in_flux=(*self.manifest.in_flux, mine.name))
        publish(shard_path(self.path, mine), write, verify)
        shards = (*self.manifest.shards, mine)
        self._write_manifest(shards=shards, in_flux=self._in_flux(shards))

    def _publish_shard(
        self, digests: NDArray[np.uint8], blocks: Sequence[NDArray[np.float32]], *, replaces: Shard | None = None
    ) -> None:
        number = self._next_number()
        columns = [hdf5.Column.of("digests", digests)]
        for layer, block in zip(self.manifest.layers, blocks, strict=True):
            columns.append(hdf5.Column.of(f"embeddings/{layer}", block.astype("<f4", copy=False)))
        shards = list(self.manifest.shards)

        def write(temp: Path) -> None:
            hdf5.write(temp, columns, {"fingerprint": self.manifest.fingerprint})

        def verify(temp: Path) -> str:
            """Read back what was written, then announce the name that it will have."""
            with hdf5.open_checked(temp, SHARD_COLUMNS) as file:
                for column in columns:
                    if not np.array_equal(file.read(column.name), next(iter(column.blocks))):
                        raise StoreError("the disk did not keep what was written", where=temp)
            sha256 = sha256_file(temp)
            shard = Shard(f"{number:05d}-{sha256[:8]}.h5", len(digests), sha256)
            shards.append(shard)
            self._write_manifest(in_flux=(*self.manifest.in_flux, shard.name))
            return shard.name

        publish(self.path / "shards" / "shard.h5", write, verify)
        if replaces is None:
            self._write_manifest(shards=tuple(shards), in_flux=self._in_flux(shards))
        else:
            self._drop(replaces, tuple(shard for shard in shards if shard != replaces))

    def _drop(self, shard: Shard, rest: tuple[Shard, ...]) -> None:
        """Take one shard out: off the list, off the disk, forgotten, in this order."""
        self._write_manifest(shards=rest, in_flux=(*self._in_flux(rest), shard.name))
        with _changing(self.path):
            shard_path(self.path, shard).unlink(missing_ok=True)
            fsync_path(self.path / "shards")
        self._write_manifest(in_flux=self._in_flux(rest))

    def _in_flux(self, listed: Sequence[Shard]) -> tuple[str, ...]:
        """What a failed write may have left stays named, until the next run deletes it."""
        names = set(self.manifest.in_flux) - {shard.name for shard in listed}
        return tuple(sorted(name for name in names if (self.path / "shards" / name).exists()))

    def write_quarantine(self, refused: Sequence[Refused]) -> None:
        """Publish the list of refused images."""
        self._publish_quarantine(refused)
        self._write_manifest(quarantine=self.manifest.quarantine[-1:])

    def _publish_quarantine(self, refused: Sequence[Refused]) -> None:
        """Replace the list; the manifest has the sums of the old one and the new one, in this order."""
        raw = spell_quarantine(refused)
        sums = [hashlib.sha256(data).hexdigest() for data in (quarantine_bytes(self.path), raw)]
        self._write_manifest(quarantine=tuple(dict.fromkeys(sums)))
        publish_bytes(self.path / "quarantine.jsonl", raw)

    def finish(self, index: Index, refused: Sequence[Refused], *, source: str) -> None:
        """Publish the rest, the quarantine and the index; from here on the store says what ``index`` says."""
        self.flush()

        def write(temp: Path) -> None:
            write_index(temp, index, self.manifest.fingerprint)

        def verify(temp: Path) -> None:
            check_index(temp, index, self.manifest)

        changes: dict[str, Any] = {
            "class_names": index.class_names,
            "splits": index.counts(index.split),
            "counts": {"images": len(index), "embeddings": self.rows, "quarantined": len(refused)},
            "source": source,
        }
        spell_manifest(self.path, replace(self.manifest, **changes))  # it may be too long: before anything is changed
        with uninterrupted():
            self._publish_quarantine(refused)
            publish(self.path / "index.h5", write, verify)
            self.index = index
            self._write_manifest(**changes, quarantine=self.manifest.quarantine[-1:])

    def prune(self) -> int:
        """Drop the embeddings that the index does not refer to; returns how many. Other shards are not touched."""
        if self.index is None:
            raise StoreError("nothing to compare with: the extraction has not finished", where=self.path)
        used = digest_keys(self.index.digests)
        dropped = 0
        for shard in self.manifest.shards:
            with open_shard(self.path, shard, self.manifest.layers) as file:
                digests = file.read("digests")
                keep = np.isin(digest_keys(digests), used)
                if keep.all():
                    continue
                blocks = [file.read(f"embeddings/{layer}")[keep] for layer in self.manifest.layers]
            dropped += int((~keep).sum())
            with uninterrupted():
                if keep.any():
                    self._publish_shard(digests[keep], blocks, replaces=shard)
                else:
                    self._drop(shard, tuple(other for other in self.manifest.shards if other != shard))
        if dropped:
            self._write_manifest(counts={**(self.manifest.counts or {}), "embeddings": self.rows})
        return dropped


@contextlib.contextmanager
def _changing(store: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(store / "shards", error) from error


def _foreign(folder: Path) -> bool:
    """Whether a folder without a manifest holds anything that an interrupted first run would not have left."""
    return any(path.name != "shards" and not path.name.startswith(".") for path in folder.iterdir())
