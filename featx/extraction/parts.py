"""An extraction in parts: whoever has a free machine does a part, and one command puts them together.

The images of a source, sorted by id, are cut into ``n`` consecutive parts of equal length (:class:`Part`); which
images a part has depends on their number only, so every host comes to the same cut. A part is extracted into a store
of its own, the hidden folder ``STORE/.parts/<i>-of-<n>``: parts cannot get into each other's way, and one that died,
was killed or is started twice is what a store always is, whole up to its last shard. The first part to start makes
``STORE`` itself, empty, whose provenance all others have to agree with.

:func:`finish_parts` compares every byte with its checksums, gives the shards a name in ``STORE`` (hard links: nothing
is copied), drops what two parts both had, writes the one index, and deletes the parts. The result says what one
extraction by a single process would have said; :func:`featx.store.tools.content_hash` is equal. Until then readers see
``STORE`` as it was before.

Hosts share the folder of the store through a file system with locks and renames (NFS has both).
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shlex
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featx._files import cannot_write, make_folder, refuse_second_writer, writer_lock
from featx.backbones import Backbone, Engine
from featx.errors import Interrupted, StoreBusy, StoreError, UsageError
from featx.extraction.run import (
    ExtractSummary,
    Progress,
    Start,
    check_refused,
    check_replaced,
    extract_lanes,
    format_notes,
    group_notes,
    index_of,
    make_lanes,
    regrouped,
)
from featx.images import TAKEN, ImageRef, ImageSet, rules_of
from featx.store import (
    PARTS,
    Index,
    Manifest,
    Refused,
    StoreWriter,
    check_backbones,
    digest_bytes,
    digest_keys,
    name_of,
    read_index,
    read_manifest,
    read_quarantine,
)

MAX_PARTS = 100_000

_FOLDER = re.compile(r"([0-9]{1,6})-of-([0-9]{1,6})")
_GONE = "gone-"
_PATIENCE = 60.0
"""Seconds to wait for whoever makes the empty store; that takes milliseconds."""


class PartsMissing(StoreError):
    """There are not all parts that it takes."""


@dataclass(frozen=True, order=True)
class Part:
    """Part ``number`` (from 1) of ``of``: the images number ``(number - 1) * n // of`` up to ``number * n // of`` of n.

    Raises
    ------
    UsageError
        There is no such part.
    """

    of: int
    number: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of <= MAX_PARTS:
            raise UsageError(
                "no such part", where="--part", expected="i/n with i from 1 to n, such as 2/8", found=str(self)
            )

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @classmethod
    def parse(cls, text: str) -> Part:
        """A part from "2/8"."""
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if found is None:
            raise UsageError("no such part", where="--part", expected="i/n, such as 2/8", found=repr(text))
        return cls(number=int(found[1]), of=int(found[2]))

    def cut(self, images: ImageSet) -> ImageSet:
        """The images of this part."""
        n = len(images)
        return replace(images, refs=images.refs[(self.number - 1) * n // self.of : self.number * n // self.of])

    def folder(self, store: Path) -> Path:
        """The store of this part."""
        return store / PARTS / f"{self.number}-of-{self.of}"


def extract_part(
    cut: ImageSet,
    total: int,
    backbone: Backbone | Sequence[Backbone],
    store: str | Path,
    part: Part,
    engine: Engine | Start | None = None,
    **options: Any,
) -> ExtractSummary:
    """Extract one part of ``total`` images; what the store or an earlier run of the part has is not computed again.

    Parameters
    ----------
    cut : the images of the part.
    backbone, engine, options : as for :func:`featx.extraction.run.extract_features`; ``max_bad`` is a share of all
        images, and a part fails only where it alone has more bad ones than the whole may have.
    store : folder of the store that the parts are for.
    part : which part.

    Raises
    ------
    StoreBusy
        Another process is at work on the same part.
    MismatchError
        Another part, or the store, was made with other settings.
    """
    store = Path(store)
    how = {name: options.pop(name) for name in ("views", "decode", "recipe") if name in options}
    folder = part.folder(store)
    # What an earlier run of the part was told to embed with goes on, too.
    lanes = make_lanes(backbone, engine, (store, folder), **how)
    made = [lane.provenance for lane in lanes]
    if not len(cut):
        return ExtractSummary.of(made, images=0, notes=(f"part {part} has no images, as there are only {total}",))
    _agree(store, made)
    make_folder(store / PARTS)
    known = store if read_manifest(store).shards else None
    # The list of a part may change between two runs: what its store had is known in STORE, or computed again.
    options["replace_images"] = True
    return extract_lanes(cut, lanes, folder, total=total, known=known, **options)


def _agree(store: Path, made: Sequence[Mapping[str, Any]]) -> None:
    """Make the empty store if there is none; MismatchError if it is for embeddings of another kind."""
    patience = time.monotonic() + _PATIENCE
    while not (store / "manifest.json").exists():
        try:
            with StoreWriter(store, *made):
                return
        except StoreBusy:  # another part makes it just now, or a whole extraction does, and then it is there soon
            if time.monotonic() > patience:
                raise
            time.sleep(random.uniform(0.01, 0.1))
    check_backbones(read_manifest(store).backbones, made, store)


@dataclass(frozen=True)
class _Done:
    """A part that is finished, and says what its images are called."""

    part: Part
    folder: Path
    manifest: Manifest
    index: Index
    refused: tuple[Refused, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The backbones that have embedded its images."""
        return tuple(map(name_of, self.manifest.backbones))


def parts_of(store: str | Path) -> list[Part]:
    """The parts that were begun in a store, in order."""
    try:
        names = [path.name for path in (Path(store) / PARTS).iterdir()]
    except FileNotFoundError:
        return []
    found = (_FOLDER.fullmatch(name) for name in names)
    return sorted(Part(number=int(each[1]), of=int(each[2])) for each in found if each)


def unfinished(images: ImageSet, store: str | Path, of: int, wanted: Iterable[str] = ()) -> dict[Part, str]:
    """Why each part of ``of`` that is not finished is not, in words; parts without images are finished.

    Parameters
    ----------
    wanted : backbones that every part has to have, beside those that any of them has.
    """
    looks = _look_at_all(images, Path(store), of, wanted)
    return {part: found for part, found in looks if isinstance(found, str)}


def _look_at_all(
    images: ImageSet, store: Path, of: int, wanted: Iterable[str] = ()
) -> list[tuple[Part, _Done | str | None]]:
    """All parts of a cut, as of :func:`_look`; one that lacks a backbone of ``wanted`` or the others is unfinished."""
    looks = [(part, _look(images, store, part)) for part in (Part(number=i, of=of) for i in range(1, of + 1))]
    names = {*wanted, *(name for _, found in looks if isinstance(found, _Done) for name in found.names)}
    return [
        (part, f"was made without {', '.join(sorted(lacking))}")
        if isinstance(found, _Done) and (lacking := names - {*found.names})
        else (part, found)
        for part, found in looks
    ]


def _look(images: ImageSet, store: Path, part: Part) -> _Done | str | None:
    """A finished part, None for one without images, or why it is not finished."""
    refs, folder = part.cut(images).refs, part.folder(store)
    if not refs:
        return None
    if not (folder / "manifest.json").exists():
        return "has not begun"
    manifest = read_manifest(folder)
    if manifest.unfinished:
        return _at_work(folder)
    try:
        index = read_index(folder, manifest)
    except StoreError:
        if (folder / "index.h5").exists():
            raise
        return _at_work(folder)
    refused = tuple(read_quarantine(folder, manifest))
    return _other(refs, index, refused) or _Done(part, folder, manifest, index, refused)


def _other(refs: Sequence[ImageRef], index: Index, refused: Sequence[Refused]) -> str:
    """Why an index and its refused images are not about these images, or ""."""
    if sorted([*index.ids, *(item.id for item in refused)]) != [ref.id for ref in refs]:
        return f"is of another list of images ({len(index) + len(refused)} then, {len(refs)} now)"
    sizes = dict(zip(index.ids, index.sizes.tolist(), strict=True))
    changed = [ref.id for ref in refs if sizes.get(ref.id, ref.size) != ref.size]
    return f"was made before {changed[0]} changed" if changed else ""


def _at_work(folder: Path) -> str:
    try:
        refuse_second_writer(folder)
    except StoreBusy as busy:
        return f"is being written by {busy.found}"
    return "was interrupted"


def finish_parts(
    images: ImageSet,
    store: str | Path,
    *,
    max_bad: float | None = None,
    prune: bool = False,
    replace_images: bool = False,
    progress: Progress | None = None,
) -> ExtractSummary:
    """Put the parts of an extraction together; the store then says what ``images`` says.

    An interrupted call is repeated; one on a finished store, without any parts, finds everything done.

    Parameters
    ----------
    images : all images of the source, as for every part.
    store : folder of the store.
    max_bad, prune, replace_images : as for :func:`featx.extraction.run.extract_features`.
    progress : called as ``progress(done, total)`` with numbers of images.

    Returns
    -------
    The summary; ``images_per_second`` is 0, for how long the parts took is not known here.

    Raises
    ------
    PartsMissing
        Parts have not been run, are interrupted or of another list of images; the message names them.
    StoreError
        A part is damaged.
    MismatchError
        A part was made with other settings than the store; or see :func:`featx.extraction.run.extract_features`.
    TooManyBadImages
        More than ``max_bad`` of all images were refused. The parts are kept.
    """
    started, store = time.perf_counter(), Path(store)
    begun = parts_of(store)
    try:
        done = _complete(images, store, begun)
    except PartsMissing:
        before = _finished_before(images, store, begun)
        if before is None:
            raise
        return replace(before, seconds=time.perf_counter() - started)
    refused = tuple(item for each in done for item in each.refused)
    with StoreWriter(store, *done[0].manifest.backbones) as writer:
        check_refused(refused, len(images), max_bad, writer)
        embedded, through = 0, 0
        try:
            for each in done:
                embedded += _take_over(writer, each, _command(images, store, each.part))
                through += len(each.index) + len(each.refused)
                if progress is not None:
                    progress(through, len(images))
            digests, stamps, taken = _names(done)
            images = regrouped(images, done[0].index)
            dated = images.grouping is not None and images.grouping.dated
            if dated and any(TAKEN not in each.index.metadata for each in done):
                raise UsageError(
                    "the parts did not read when photos were taken", where="--group-by",
                    hint="Give --group-by to every --part, and run them again: nothing is embedded twice.",
                )  # fmt: skip
            index = index_of(images, digests, stamps, taken, writer.index)
            grouped = group_notes(images, index, writer.index)
            if not replace_images:
                check_replaced(index, writer)
            writer.finish(index, refused, source=images.source, rules=rules_of(map(str, index.ids)))
            pruned = writer.prune() if prune else 0
        except KeyboardInterrupt as error:
            raise Interrupted("stopped", where=store, hint="Run the same command again; parts are kept.") from error
        made, lacking = writer.manifest.backbones, writer.manifest.unfinished
    notes = (*_differing(done), *format_notes(refused), *grouped)
    if lacking:
        notes = (*notes, f"not all images have embeddings by {' and '.join(lacking)} yet: featx extract adds them")
    left = _delete_parts(store)
    if left:
        notes = (*notes, f"parts {', '.join(map(str, left))} are being written again just now, and were left there")
    return ExtractSummary.of(
        made,
        images=len(images),
        embedded=embedded,
        reused=len(images) - embedded - len(refused),
        quarantined=len(refused),
        seconds=time.perf_counter() - started,
        pruned=pruned,
        notes=notes,
        refused=refused,
    )


def _complete(images: ImageSet, store: Path, begun: Sequence[Part]) -> list[_Done]:
    """All parts of a cut of which none is missing."""
    missing: dict[int, list[tuple[Part, str]]] = {}
    for of in sorted({part.of for part in begun}):
        looks = _look_at_all(images, store, of)
        missing[of] = [(part, found) for part, found in looks if isinstance(found, str)]
        if not missing[of]:
            return [found for _, found in looks if isinstance(found, _Done)]
    if not missing:
        raise PartsMissing(
            "there are no parts to put together",
            where=store,
            hint=f"Run every part first, such as: {_command(images, store, Part(number=1, of=4))}",
        )
    nearest = missing[min(missing, key=lambda of: len(missing[of]) / of)]
    words = [f"part {part} {why}" for part, why in nearest[:10]]
    if len(nearest) > 10:
        words.append(f"{len(nearest) - 10} more parts are missing")
    others = sorted(set(missing) - {nearest[0][0].of})
    if others:
        words.append(f"there are incomplete parts of {' and of '.join(map(str, others))} too")
    raise PartsMissing(
        "not all parts are finished",
        where=store,
        found="; ".join(words),
        hint=f"Run, with the options of the others: {_command(images, store, nearest[0][0])}",
    )


def _finished_before(images: ImageSet, store: Path, begun: Sequence[Part]) -> ExtractSummary | None:
    """The summary of a store that says what ``images`` says, where no part (a late retry, say) says anything else."""
    if not (store / "index.h5").exists():
        return None
    manifest = read_manifest(store)
    index, refused = read_index(store, manifest), tuple(read_quarantine(store, manifest))
    if _other(images.refs, index, refused):
        return None
    if images.grouping is not None and images.grouping.rule != index.grouping:
        return None
    digests = dict(zip(index.ids, digest_keys(index.digests).tolist(), strict=True))
    for part in begun:
        found = _look(images, store, part)
        if not isinstance(found, _Done) or not {*found.names} <= {*map(name_of, manifest.finished)}:
            return None
        keys = digest_keys(found.index.digests).tolist()
        if any(digests.get(name) != key for name, key in zip(found.index.ids, keys, strict=True)):
            return None
    _delete_parts(store)
    return ExtractSummary.of(
        manifest.backbones, images=len(images), reused=len(index), quarantined=len(refused), refused=refused
    )


def _command(images: ImageSet, store: Path, part: Part) -> str:
    return shlex.join(["featx", "extract", str(images.root), "--out", str(store), "--part", str(part)])


def _take_over(writer: StoreWriter, done: _Done, again: str) -> int:
    try:
        return writer.take_over(done.folder)
    except StoreError as error:
        if error.where is None or not Path(str(error.where)).is_relative_to(done.folder):
            raise
        hint = f"Delete the folder {done.folder}, and run: {again}"
        raise StoreError(error.what, where=error.where, hint=hint) from error


def _names(done: Sequence[_Done]) -> tuple[dict[str, bytes], dict[str, int], dict[bytes, str]]:
    """Digest and stamp of every image, by its id; and when it was taken, by its content, where that was read."""
    digests: dict[str, bytes] = {}
    stamps: dict[str, int] = {}
    taken: dict[bytes, str] = {}
    for each in done:
        contents = digest_bytes(each.index.digests)
        digests |= zip(each.index.ids, contents, strict=True)
        stamps |= zip(each.index.ids, each.index.stamps.tolist(), strict=True)
        taken |= zip(contents, each.index.metadata.get(TAKEN, ()), strict=False)
    return digests, stamps, taken


def _differing(done: Sequence[_Done]) -> tuple[str, ...]:
    """A note where parts were not all computed alike, within what the fingerprint allows."""
    kinds: dict[str, list[str]] = {}
    for each in done:
        kind = f"{each.manifest.provenance.get('engine')} on {each.manifest.provenance.get('device')}"
        kinds.setdefault(kind, []).append(str(each.part))
    if len(kinds) < 2:
        return ()
    return ("parts came from " + " and ".join(f"{kind} ({len(parts)})" for kind, parts in kinds.items()),)


def _delete_parts(store: Path) -> list[Part]:
    """Delete all parts; those that some process is writing stay, and are returned."""
    left = []
    try:
        for part in parts_of(store):
            folder = part.folder(store)
            try:
                with writer_lock(folder / ".lock"):
                    # Under another name first: a late run of the part then begins a new one, and finds all done.
                    folder.rename(folder.with_name(f"{_GONE}{os.getpid()}-{time.monotonic_ns():x}"))
            except StoreBusy:
                left.append(part)
        for path in (store / PARTS).glob(f"{_GONE}*"):
            shutil.rmtree(path)
        with contextlib.suppress(OSError):  # not empty: what is in there is not ours
            (store / PARTS).rmdir()
    except OSError as error:
        raise cannot_write(store / PARTS, error) from error
    return left
