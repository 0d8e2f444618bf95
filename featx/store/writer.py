"""Writing a store: one writer at a time, shards that appear whole, an index that follows them.

The format, and the order that makes it safe, is in ``featx/guide/store-format.md``.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx._arrays import PIXELS
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
from featx.errors import StoreError, UsageError
from featx.images import count_names
from featx.store import hdf5
from featx.store.index import (
    Index,
    Refused,
    check_index,
    quarantine_bytes,
    read_index,
    read_quarantine,
    spell_quarantine,
    write_index,
)
from featx.store.manifest import (
    Block,
    Manifest,
    Shard,
    check_backbones,
    fingerprint,
    name_of,
    read_manifest,
    spell_manifest,
    write_manifest,
)
from featx.store.reader import steady
from featx.store.shards import Contents, digest_bytes, digest_keys, open_shard, shard_path

SHARD_ROWS = 4096
SHARD_SECONDS = 30.0
"""A shard is published when it has this many rows, or this long after the one before: a crash costs no more."""


class StoreWriter:
    """The one writer of a store; use it as a context manager.

    Parameters
    ----------
    path : folder of the store, made if there is none.
    backbones : the provenance of one backbone or several. Those that the store does not have yet are added to it; one
        that it has otherwise is refused, naming the field.
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
        *backbones: Mapping[str, Any],
        shard_rows: int = SHARD_ROWS,
        shard_seconds: float = SHARD_SECONDS,
    ) -> None:
        self.path, self.backbones = Path(path), backbones
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
            check_backbones(self.manifest.backbones, self.backbones, self.path)
        else:
            self.manifest = Manifest(self.backbones, unfinished=tuple(map(name_of, self.backbones)))
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
        known = {name_of(each) for each in self.manifest.backbones}
        new = tuple(each for each in self.backbones if name_of(each) not in known)
        if new:
            self.manifest = replace(
                self.manifest, backbones=(*self.manifest.backbones, *new),
                unfinished=(*self.manifest.unfinished, *map(name_of, new)),
            )  # fmt: skip
        if new or self.manifest.in_flux or not self.manifest.shards:
            self._write_manifest(in_flux=())
        digests = {name_of(each): [np.empty((0, 32), np.uint8)] for each in self.manifest.backbones}
        for shard in self.manifest.shards:
            with open_shard(self.path, shard) as file:
                for backbone in shard.blocks:
                    digests[backbone].append(file.read("digests"))
        self._published = {backbone: Contents(np.concatenate(parts)) for backbone, parts in digests.items()}
        self._fresh: dict[str, set[bytes]] = {backbone: set() for backbone in digests}
        self._pending: dict[tuple[tuple[str, ...], bool], list[_Rows]] = {}
        self._since = time.monotonic()

    def _write_manifest(self, **changes: Any) -> None:
        manifest = replace(self.manifest, **changes)
        write_manifest(self.path, manifest)
        self.manifest = manifest

    @property
    def names(self) -> tuple[str, ...]:
        """The backbones of the store, its own first."""
        return tuple(self._published)

    def has_all(self, digests: Sequence[bytes]) -> list[bool]:
        """Whether the store has published every embedding of each content; b"" is none."""
        given = np.frombuffer(b"".join(digest or bytes(32) for digest in digests), np.uint8).reshape(-1, 32)
        there = np.array([bool(digest) for digest in digests], np.bool_)
        for published in self._published.values():
            there &= published.has(given)
        return list(map(bool, there.tolist()))

    def lacks(self, digest: bytes) -> tuple[str, ...]:
        """The backbones whose embedding of this content the store neither has nor is about to publish. Thread-safe."""
        return tuple(
            backbone for backbone, published in self._published.items()
            if digest not in self._fresh[backbone] and digest not in published
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """Number of embeddings that are published; of several backbones, of the store's own."""
        return sum(shard.rows for shard in self.manifest.of(self.names[0]))

    def add(
        self,
        digests: Sequence[bytes],
        embeddings: Mapping[str, Sequence[NDArray[np.float32]]],
        hashes: NDArray[np.uint8] | None = None,
    ) -> None:
        """Take new rows, and publish a shard when it is time.

        Parameters
        ----------
        digests : n digests of 32 bytes.
        embeddings : of one or more backbones that do not have them yet: a float32 (n, d) array for each layer.
        hashes : the perceptual hashes of the images, uint8 (n, 32).
        """
        given = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
        fresh = set(digests)
        for backbone, blocks in embeddings.items():
            known = self._fresh[backbone]
            if len(fresh) < len(digests) or not fresh.isdisjoint(known) or self._published[backbone].has(given).any():
                raise ValueError(f"an embedding of this content by {backbone} is in the store already")
            for layer, block in zip(self._layers(backbone), blocks, strict=True):
                if not np.isfinite(block).all():
                    raise StoreError(
                        f"layer {layer} of {backbone} came out as NaN or infinity; nothing of this batch was kept",
                        where=self.path,
                        hint="Try --precision fp32, and check the weights.",
                    )
        # Digests and rows in one step each, so that an interrupt finds them together.
        self._pending.setdefault((tuple(embeddings), hashes is not None), []).append(_Rows(given, embeddings, hashes))
        for backbone in embeddings:
            self._fresh[backbone].update(digests)
        waiting = max(map(len, self._fresh.values()))
        if waiting >= self.shard_rows or time.monotonic() - self._since >= self.shard_seconds:
            self.flush()

    def _layers(self, backbone: str) -> tuple[str, ...]:
        return next(tuple(each["layers"]) for each in self.manifest.backbones if name_of(each) == backbone)

    def flush(self) -> None:
        """Publish what was added since the last shard. Signals wait until that is done."""
        with uninterrupted():
            for backbones, hashed in list(self._pending):
                parts = self._pending[backbones, hashed]
                rows = _Rows.joined(parts)
                self._publish_shard(rows)
                # In this order: another thread may ask lacks() between two lines.
                for backbone in backbones:
                    self._published[backbone].add(rows.digests)
                del self._pending[backbones, hashed]
                for backbone in backbones:
                    self._fresh[backbone].difference_update(digest_bytes(rows.digests))
            self._since = time.monotonic()

    def _next_number(self) -> int:
        return max((int(shard.name.split("-")[0]) for shard in self.manifest.shards), default=-1) + 1

    def take_over(self, other: Path) -> int:
        """Let this store have what another one has of its backbones, and remember what the other calls its images.

        Every byte is compared with the other's checksums. Shards get a second name here (a hard link, or a copy where
        there are none) and a number of their own; of one with rows that are here already, the rest is written anew.

        Returns
        -------
        How many images got an embedding that they did not have; the pixels baseline does not count beside networks.

        Raises
        ------
        StoreError
            The other store is damaged.
        MismatchError
            It was made with other settings.
        """
        self.flush()
        rows = steady(other, lambda: self._take_shards(other))
        if self.index is None and (other / "index.h5").exists():
            self.index = steady(other, lambda: read_index(other, read_manifest(other)))
        return rows

    def _take_shards(self, other: Path) -> int:
        theirs = read_manifest(other)
        check_backbones(self.manifest.backbones, theirs.backbones, self.path, whose=f"{other}'s")
        here = {shard.sha256: set(shard.blocks) for shard in self.manifest.shards}
        embedded = [np.empty(0, "S32")]
        for shard in theirs.shards:
            if set(shard.blocks) <= here.get(shard.sha256, set()):
                continue
            with open_shard(other, shard) as file:
                digests = file.read("digests")
                mine = [backbone for backbone in shard.blocks if backbone in self._published]
                new = {backbone: ~self._published[backbone].has(digests) for backbone in mine}
                for backbone, rows in new.items():
                    if backbone != PIXELS or len(self.names) == 1:
                        embedded.append(digest_keys(digests[rows]))
                # A shard of version 1 does not say whose it is: of the store's own backbone.
                named = shard.version > 1 or self.names[0] in shard.blocks
                every = len(mine) == len(shard.blocks) and all(map(np.all, new.values()))
                linked = named and not shard.dropped and every
                if not linked:
                    for backbone, rows in new.items():
                        if rows.any():
                            taken = _Rows.read(file, shard, [backbone]).some(rows)
                            self.add(digest_bytes(taken.digests), taken.embeddings, taken.hashes)
                    self.flush()
            if linked:
                with uninterrupted():
                    self._link_shard(shard_path(other, shard), shard)
                    for backbone in shard.blocks:
                        self._published[backbone].add(digests)
        return len(np.unique(np.concatenate(embedded)))

    def _link_shard(self, path: Path, shard: Shard) -> None:
        mine = replace(shard, name=f"{self._next_number():05d}-{shard.sha256[:8]}.h5")

        def verify(temp: Path) -> None:
            if not temp.samefile(path) and sha256_file(temp) != shard.sha256:
                raise StoreError("the disk did not keep what was written", where=temp)

        self._write_manifest(in_flux=(*self.manifest.in_flux, mine.name))
        publish(shard_path(self.path, mine), lambda temp: link_or_copy(path, temp), verify)
        shards = (*self.manifest.shards, mine)
        self._write_manifest(shards=shards, in_flux=self._in_flux(shards))

    def _publish_shard(self, rows: _Rows, *, replaces: Shard | None = None) -> None:
        number = self._next_number()
        blocks = {backbone: self._layers(backbone) for backbone in rows.embeddings}
        new = Shard("", len(rows.digests), "", blocks, hashed=rows.hashes is not None)
        columns = [hdf5.Column.of("digests", rows.digests)]
        if rows.hashes is not None:
            columns.append(hdf5.Column.of("phash", rows.hashes))
        for backbone, layers in blocks.items():
            for layer, block in zip(layers, rows.embeddings[backbone], strict=True):
                name = new.column(Block(backbone, layer))
                columns.append(hdf5.Column.of(name, block.astype("<f4", copy=False)))
        shards = list(self.manifest.shards)

        def verify(temp: Path) -> str:
            """Read back what was written, then announce the name that it will have."""
            with hdf5.open_checked(temp, new.columns()) as file:
                for column in columns:
                    if not np.array_equal(file.read(column.name), next(iter(column.blocks))):
                        raise StoreError("the disk did not keep what was written", where=temp)
            sha256 = sha256_file(temp)
            shard = replace(new, name=f"{number:05d}-{sha256[:8]}.h5", sha256=sha256)
            shards.append(shard)
            self._write_manifest(in_flux=(*self.manifest.in_flux, shard.name))
            return shard.name

        about = {"fingerprint": self.manifest.fingerprint}
        publish(self.path / "shards" / "shard.h5", lambda temp: hdf5.write(temp, columns, about), verify)
        if replaces is None:
            self._write_manifest(shards=tuple(shards), in_flux=self._in_flux(shards))
        else:
            self._unlink([replaces], [shard for shard in shards if shard != replaces])

    def _unlink(self, gone: Sequence[Shard], rest: Sequence[Shard], **changes: Any) -> None:
        """Take shards out: off the list (with other ``changes``), off the disk, forgotten, in this order."""
        names = (*self._in_flux(rest), *(shard.name for shard in gone))
        self._write_manifest(shards=tuple(rest), in_flux=names, **changes)
        with _changing(self.path):
            for shard in gone:
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

    def finish(
        self, index: Index, refused: Sequence[Refused], *, source: str, rules: Mapping[str, str] | None = None
    ) -> None:
        """Publish the rest, the quarantine and the index; from here on the store says what ``index`` says.

        ``rules`` of how its images were read, beside what all images share, are added to the provenances; fields of
        the fingerprint are none of them.
        """
        self.flush()
        changes: dict[str, Any] = {
            "backbones": tuple({**each, **(rules or {})} for each in self.manifest.backbones),
            "class_names": index.class_names,
            "splits": count_names(index.split),
            "counts": {"images": len(index), "embeddings": self.rows, "quarantined": len(refused)},
            "source": source,
            "unfinished": tuple(name for name, has in self._published.items() if not has.has(index.digests).all()),
        }
        spell_manifest(self.path, replace(self.manifest, **changes))  # it may be too long: before anything is changed
        with uninterrupted():
            self._publish_quarantine(refused)
            self._publish_index(index, self.manifest.fingerprint)
            self.index = index
            self._write_manifest(**changes, quarantine=self.manifest.quarantine[-1:])

    def _publish_index(self, index: Index, fingerprint: str) -> None:
        publish(
            self.path / "index.h5",
            lambda temp: write_index(temp, index, fingerprint),
            lambda temp: check_index(temp, index, self.manifest),
        )

    def relabel(self, labels: Mapping[str, str | None]) -> None:
        """Publish the index with the labels that ``labels`` has for ids, where that changes anything."""
        assert self.index is not None
        index = self.index.relabelled(labels)
        if index.class_names != self.index.class_names or not np.array_equal(index.labels, self.index.labels):
            self.finish(index, read_quarantine(self.path, self.manifest), source=self.manifest.source)

    def prune(self) -> int:
        """Drop the embeddings that the index does not refer to; returns of how many images. Other shards stay."""
        if self.index is None:
            raise StoreError("nothing to compare with: the extraction has not finished", where=self.path)
        used = digest_keys(self.index.digests)
        before = self.rows
        for shard in self.manifest.shards:
            with open_shard(self.path, shard) as file:
                keep = np.isin(digest_keys(file.read("digests")), used)
                if keep.all() and not shard.dropped:
                    continue
                rows = _Rows.read(file, shard, list(shard.blocks)).some(keep)
            with uninterrupted():
                if keep.any():
                    self._publish_shard(rows, replaces=shard)
                else:
                    self._unlink([shard], [other for other in self.manifest.shards if other != shard])
        dropped = before - self.rows
        if dropped:
            self._write_manifest(counts={**(self.manifest.counts or {}), "embeddings": self.rows})
        return dropped

    def drop(self, backbone: str) -> None:
        """Take a backbone out of the store. Files that hold others too keep its embeddings until :meth:`prune`.

        Raises
        ------
        UsageError
            The store has no such backbone, or no other one that is finished.
        """
        rest = tuple(each for each in self.manifest.backbones if name_of(each) != backbone)
        # Of a store that can be read, a network has to be left that can be read.
        lacking = self.manifest.unfinished if self.index is not None else ()
        left = [name for name in map(name_of, rest) if name != PIXELS and name not in lacking]
        if len(rest) == len(self.manifest.backbones) or not left:
            raise UsageError(
                f"{backbone} cannot be taken out of the store", where=self.path,
                expected="one of several backbones, of which another is finished", found=", ".join(self.names),
            )  # fmt: skip
        self.flush()
        with uninterrupted():
            if self.index is not None:
                # First: the index must be one of the store at every moment.
                self._publish_index(self.index, fingerprint(rest[0]))
            kept, gone = [], []
            for shard in self.manifest.shards:
                blocks = {name: layers for name, layers in shard.blocks.items() if name != backbone}
                if backbone not in shard.blocks:
                    kept.append(shard)
                elif blocks:
                    kept.append(
                        replace(shard, blocks=blocks, dropped={**shard.dropped, backbone: shard.blocks[backbone]})
                    )
                else:
                    gone.append(shard)
            unfinished = tuple(name for name in self.manifest.unfinished if name != backbone)
            self._unlink(gone, kept, backbones=rest, unfinished=unfinished)
            del self._published[backbone], self._fresh[backbone]


@dataclass(frozen=True)
class _Rows:
    """Rows of some backbones that become one shard."""

    digests: NDArray[np.uint8]
    embeddings: Mapping[str, Sequence[NDArray[np.float32]]]
    hashes: NDArray[np.uint8] | None

    @classmethod
    def joined(cls, parts: Sequence[_Rows]) -> _Rows:
        """One after another; all are of the same backbones, with hashes or without."""
        hashes = [part.hashes for part in parts if part.hashes is not None]
        return cls(
            np.concatenate([part.digests for part in parts]),
            {
                backbone: [
                    np.concatenate(blocks) for blocks in zip(*(p.embeddings[backbone] for p in parts), strict=True)
                ]
                for backbone in parts[0].embeddings
            },
            np.concatenate(hashes) if hashes else None,
        )

    @classmethod
    def read(cls, file: hdf5.CheckedFile, shard: Shard, backbones: Sequence[str]) -> _Rows:
        """What a shard has of some backbones."""
        return cls(
            file.read("digests"),
            {
                backbone: [file.read(shard.column(Block(backbone, layer))) for layer in shard.blocks[backbone]]
                for backbone in backbones
            },
            file.read("phash") if shard.hashed else None,
        )

    def some(self, rows: NDArray[np.bool_]) -> _Rows:
        """Only these rows."""
        return _Rows(
            self.digests[rows],
            {backbone: [block[rows] for block in blocks] for backbone, blocks in self.embeddings.items()},
            None if self.hashes is None else self.hashes[rows],
        )


@contextlib.contextmanager
def _changing(store: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(store / "shards", error) from error


def _foreign(folder: Path) -> bool:
    """Whether a folder without a manifest holds anything that an interrupted first run would not have left."""
    return any(path.name != "shards" and not path.name.startswith(".") for path in folder.iterdir())
