"""Images through engines into a store: every content once, whatever it is called.

What is slow overlaps: child processes read, hash and decode ahead (:mod:`featx.images.pool`), the engine of each
backbone computes (:mod:`featx.extraction.lanes`), the writer publishes. An image is decoded once for all backbones.
What is remembered is not repeated: an unchanged file is recognised by size, times and inode, a renamed or copied one
by its digest.
"""

from __future__ import annotations

import contextlib
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx._arrays import PIXELS
from featx._system import available_cpus
from featx.backbones import Backbone, Engine, load_backbone, make_engine
from featx.errors import FeatxError, ImageError, Interrupted, MismatchError, TooManyBadImages, UsageError, plural
from featx.extraction.embedder import network_like
from featx.extraction.lanes import Embedded, Lane, Lanes
from featx.images import CENTER, TAKEN, THUMBNAIL, TIMEOUT, DecoderPool, ImageRef, ImageSet, parse_views, rules_of
from featx.store import (
    MAX_STRING,
    PARTS,
    Index,
    Refused,
    StoreWriter,
    digest_bytes,
    digest_keys,
    fingerprint,
    longest_id,
    name_of,
    stored_backbones,
)

MAX_BAD = 0.01
MAX_BAD_IMAGES = 10
"""Without an explicit ``max_bad``: a share of the images, but never fewer than this many."""

_NAMED = 3
"""Skipped files that a note names."""

_SETTLED_NS = 2_000_000_000
"""A file changed this shortly before it was read may change again within the clock's resolution."""

STAGES = ("read", "hash", "decode", "resize", "wait for pixels", "network", "write")
"""Where the time of an extraction goes, in seconds: the first four are summed over the decoding processes, which work
beside the rest; the last three add up to the time that passes."""

UNREAD = "unsupported_format"
"""The reason of an image that is sound for all that is known."""

Progress = Callable[[int, int], None]

Start = Callable[[Backbone], Engine]
"""Makes the engine that runs a backbone."""

SmallPicture = Callable[[ImageRef, NDArray[np.uint8]], None]
"""Takes an image, and its thumbnail as RGB pixels (h, w, 3)."""


@dataclass(frozen=True)
class ExtractSummary:
    """What an extraction did.

    ``images = embedded + reused + quarantined``: ``reused`` images had their content in the store already, or share
    it with another image of the run. Of these ``copies`` share it with an image that was embedded in this run. Of
    several backbones, fingerprint, engine, precision and device are those of the first.
    """

    images: int
    embedded: int
    reused: int
    quarantined: int
    seconds: float
    images_per_second: float
    fingerprint: str
    backbone: str
    engine: str
    precision: str
    device: str
    views: tuple[str, ...] = CENTER
    copies: int = 0
    pruned: int = 0
    stages: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    refused: tuple[Refused, ...] = field(default=(), repr=False)
    backbones: tuple[str, ...] = ()

    @classmethod
    def of(cls, made: Sequence[Mapping[str, Any]], *, images: int, **numbers: Any) -> ExtractSummary:
        """What was done with backbones of these provenances; ``numbers`` are further fields, which are 0 otherwise."""
        own = made[0]
        nothing = dict.fromkeys(("embedded", "reused", "quarantined"), 0)
        return cls(
            images=images,
            fingerprint=fingerprint(own),
            backbone=name_of(own),
            backbones=tuple(map(name_of, made)),
            engine=str(own["engine"]),
            precision=str(own["precision"]),
            device=str(own["device"]),
            views=parse_views(str(own.get("views", "center"))),
            **{"seconds": 0.0, "images_per_second": 0.0, **nothing, **numbers},
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; the refused images stay in the store's quarantine."""
        said = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "refused"}
        said |= {name: list(said[name]) for name in ("backbones", "views", "notes")}
        return {
            **said,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.images_per_second, 2),
            "stages": {name: round(seconds, 4) for name, seconds in self.stages.items()},
        }


def extract_features(
    images: ImageSet,
    backbone: Backbone | Sequence[Backbone],
    store: str | Path,
    *,
    engine: Engine | Start | None = None,
    workers: int | None = None,
    max_bad: float | None = None,
    prune: bool = False,
    replace_images: bool = False,
    decode: str = "full",
    views: Sequence[str] | None = CENTER,
    recipe: str = "",
    decode_timeout: float = TIMEOUT,
    progress: Progress | None = None,
    total: int | None = None,
    known: Path | None = None,
    rehash: bool = False,
    small: SmallPicture | None = None,
) -> ExtractSummary:
    """Embed every image whose content the store does not have, and let the index say what ``images`` says.

    Parameters
    ----------
    images : what to embed.
    backbone : the frozen network, or several. Backbones that the store has besides go on as they were recorded, and
        the pixels baseline is always one of them.
    store : folder of the store; made, continued or updated.
    engine : how the network is run, or what makes the engine of each; by default the fastest there is.
    workers : number of decoding processes; by default one a core.
    max_bad : share of images (0..1) that may be refused; by default 1 %, but at least ten images.
    prune : drop embeddings that no image refers to any more.
    replace_images : let ``images`` take the place of others; see :class:`MismatchError` below.
    decode : "full", or "scaled": of a large JPEG only as much as the resize needs. Part of the fingerprint.
    views : names of :data:`featx.images.views.VIEWS`, over which an image's embeddings by the given backbones are
        averaged; each costs the network's time once more. Part of the fingerprint. None takes those of the store, or
        the centre.
    recipe : of :data:`featx.backbones.recipes.RECIPES`, from which the given backbones are; their provenance says so.
    decode_timeout : seconds after which a decoder counts as hanging.
    progress : called as ``progress(done, total)``.
    total : number of images of the whole extraction that ``images`` are a part of; ``max_bad`` is a share of it.
    known : another store, whose embeddings are taken over before anything is computed.
    rehash : read every image, those too that look unchanged; only new content is embedded all the same.
    small : given each image that is embedded, and its thumbnail; nothing where ``decode`` is "scaled".

    Raises
    ------
    TooManyBadImages
        More than ``max_bad`` were refused. What was embedded is kept, the index stays as it was.
    MismatchError
        More than half of the labelled images of the store are not among ``images``, or have no label there. What was
        embedded is kept, the index stays as it was.
    MismatchError, StoreError
        See :class:`featx.store.writer.StoreWriter`.
    Interrupted
        KeyboardInterrupt came; what was computed is published, and the same call goes on from there.
    """
    recorded = known if known is not None and not stored_backbones(Path(store)) else Path(store)
    lanes = make_lanes(backbone, engine, (recorded,), views=views, decode=decode, recipe=recipe)
    return extract_lanes(
        images, lanes, store, workers=workers, max_bad=max_bad, prune=prune, replace_images=replace_images,
        decode_timeout=decode_timeout, progress=progress, total=total, known=known, rehash=rehash, small=small,
    )  # fmt: skip


def make_lanes(
    backbone: Backbone | Sequence[Backbone],
    engine: Engine | Start | None,
    stores: Sequence[Path],
    *,
    views: Sequence[str] | None = CENTER,
    decode: str = "full",
    recipe: str = "",
) -> tuple[Lane, ...]:
    """What embeds images for a store: the given backbones, those that the store has already, and the pixels baseline.

    Parameters
    ----------
    backbone, engine, decode, recipe : as of :func:`extract_features`; where the store has backbones, none may be given.
    views : likewise; None takes those that are recorded.
    stores : whose backbones are recorded; of one that several of them have, the first says how it was made.

    Raises
    ------
    UsageError
        A backbone was given twice, or one engine for several.
    WeightsError, UsageError
        What a recorded backbone needs is not here.
    """
    given = (backbone,) if isinstance(backbone, Backbone) else tuple(backbone)
    where = {name: store for store in reversed(stores) for name in stored_backbones(store)}
    recorded = {name: made for store in stores for name, made in stored_backbones(store).items()}
    recorded = {name: stored_backbones(where[name])[name] for name in recorded}
    networks = {each.name: each for each in given}
    if len(networks) < len(given) or not (given or recorded):
        found = ", ".join(each.name for each in given) or "none"
        raise UsageError("name one backbone or more, each once", where="backbone", found=found)
    if engine is not None and not callable(engine) and len(given) > 1:
        raise UsageError("one engine runs one backbone", where="engine", expected="what makes an engine for each")
    for name, made in recorded.items():
        if name not in networks:
            hint = f"Name the file with --backbone {name} --weights {name}=FILE."
            networks[name] = network_like(made, where=where[name], hint=hint)
    # Behind the networks: the first backbone of a new store is the one that stands for it.
    networks[PIXELS] = networks.pop(PIXELS) if PIXELS in networks else load_backbone(PIXELS)
    lanes = []
    for name in dict.fromkeys([*recorded, *networks]):
        network, made = networks[name], recorded.get(name, {})
        if name == PIXELS:
            runs = make_engine(network)
        elif callable(engine):
            runs = engine(network)
        elif engine is not None and network in given:
            runs = engine
        else:
            runs = make_engine(network, precision=recorded_precision(network, made))
        looks: Sequence[str] = str(made.get("views", "center")).split(",")
        if views is not None and (network in given or not given):  # a backbone that is not named goes on as it was made
            looks = views
        lane = Lane.of(network, runs, CENTER if name == PIXELS else looks, decode)
        lanes.append(
            replace(lane, provenance={**lane.provenance, "recipe": recipe}) if recipe and network in given else lane
        )
    return tuple(lanes)


def recorded_precision(network: Backbone, made: Mapping[str, Any]) -> str:
    """The precision that a store has for this very network, of which it says how it was ``made``; else "auto".

    Another network of that name will be refused, and need not be quantised before.
    """
    same = (network.weights_sha256, list(network.layers)) == (made.get("weights_sha256"), made.get("layers"))
    return str(made["precision"]) if same else "auto"


def extract_lanes(
    images: ImageSet,
    lanes: Sequence[Lane],
    store: str | Path,
    *,
    workers: int | None = None,
    max_bad: float | None = None,
    prune: bool = False,
    replace_images: bool = False,
    decode_timeout: float = TIMEOUT,
    progress: Progress | None = None,
    total: int | None = None,
    known: Path | None = None,
    rehash: bool = False,
    small: SmallPicture | None = None,
) -> ExtractSummary:
    """:func:`extract_features` with what embeds the images; its own backbone first.

    Parameters
    ----------
    total : number of images of the whole extraction that ``images`` are a part of (:mod:`featx.extraction.parts`); it
        decides how many may be refused, and how long an id may be. By default ``images`` are the whole.
    known : another store, whose embeddings are taken over before anything is computed.
    """
    started = time.perf_counter()
    run: _Run | None = None
    with StoreWriter(store, *(lane.provenance for lane in lanes)) as writer:
        try:
            if known is not None:
                writer.take_over(known)
            images = regrouped(images, writer.index)
            run = _Run(images, writer, lanes, small)
            run.embed(workers or available_cpus(), decode_timeout, progress, total or len(images), rehash=rehash)
            refused = tuple(run.refused)
            check_refused(refused, total or len(images), max_bad, writer)
            index = run.index()
            notes = (*_notes(images, writer), *format_notes(refused), *group_notes(images, index, writer.index))
            if not replace_images:
                check_replaced(index, writer)
            writer.finish(index, refused, source=images.source, rules=rules_of(map(str, index.ids)))
            pruned = writer.prune() if prune else 0
        except KeyboardInterrupt as error:
            writer.flush()
            done = run.done if run is not None else 0
            raise Interrupted(
                f"stopped after {done} of {plural(len(images), 'image')}; {plural(writer.rows, 'embedding')} kept",
                where=store,
                hint="Run the same command again to go on.",
            ) from error
        except Exception:  # of whatever kind: it goes on as it came, once what was complete is published
            with contextlib.suppress(FeatxError, OSError):  # of a full disk, say, which is why all this ends
                writer.flush()
            raise
    return ExtractSummary.of(
        [lane.provenance for lane in lanes],
        images=len(images),
        embedded=run.embedded,
        reused=len(images) - run.embedded - len(refused),
        copies=run.copies,
        quarantined=len(refused),
        seconds=time.perf_counter() - started,
        images_per_second=run.embedded / run.seconds if run.embedded else 0.0,
        pruned=pruned,
        stages=run.stages,
        notes=notes,
        refused=refused,
    )


def _notes(images: ImageSet, writer: StoreWriter) -> tuple[str, ...]:
    notes, earlier_source = list(images.notes), writer.manifest.source
    if images.ignored:
        kind = "that is not an image" if len(images.ignored) == 1 else "that are not images"
        named = ", ".join([*images.ignored[:_NAMED], *(["..."] if len(images.ignored) > _NAMED else [])])
        notes.append(f"skipped {plural(len(images.ignored), 'file')} {kind} ({named})")
    notes += [
        f"{name!r} is taken for a class; if nobody has labelled its images, run this again with --unlabelled {name}"
        for name in images.doubtful_classes
    ]
    notes += [
        f"the classes {' and '.join(map(repr, twins))} differ only in letter case, or in how an accent is spelt; if "
        "they are one, give their folders or labels one name and run this again"
        for twins in _twins(images.class_names)
    ]
    if earlier_source and earlier_source != images.source:
        notes.append(
            f"the store described {earlier_source} before and describes {images.source} now; "
            "embeddings of both are kept until --prune"
        )
    if writer.index is not None:
        gone = [name for name in writer.index.class_names if name not in images.class_names]
        if gone and earlier_source == images.source:
            notes.append(f"not there any more: {'class' if len(gone) == 1 else 'classes'} {', '.join(gone[:10])}")
    if (writer.path / PARTS).is_dir():
        notes.append("parts of an extraction are waiting in this store; --finish takes over what they have")
    return tuple(notes)


def _twins(names: Sequence[str]) -> list[list[str]]:
    """Names that people take for one: they differ in letter case, or in how an accent is spelt."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    return [twins for twins in found.values() if len(twins) > 1]


def check_refused(refused: tuple[Refused, ...], total: int, max_bad: float | None, writer: StoreWriter) -> None:
    """TooManyBadImages, with the list of them published, if of ``total`` images too many were refused.

    Images in a format that is not read are refused too, but say nothing about the others: they do not count.
    """
    allowed = max(MAX_BAD_IMAGES, MAX_BAD * total) if max_bad is None else max_bad * total
    bad = tuple(item for item in refused if item.reason != UNREAD)
    if len(bad) > allowed or len(refused) == total:
        writer.flush()
        writer.write_quarantine(refused)
        raise _too_many(bad or refused, total, allowed, writer.path, none_left=len(refused) == total)


def format_notes(refused: tuple[Refused, ...]) -> tuple[str, ...]:
    """A note on the images whose format is not read, or none."""
    unread = [item for item in refused if item.reason == UNREAD]
    if not unread:
        return ()
    count = plural(len(unread), "image")
    return (f"{count} left out for the format, such as {unread[0].id}: {unread[0].message}",)


def check_replaced(index: Index, writer: StoreWriter) -> None:
    """MismatchError if more than half of the store's labelled images are not in ``index``, or have no label there."""
    before = writer.index
    if before is None:
        return
    had = np.unique(digest_keys(before.digests[before.labels >= 0]))
    gone = np.setdiff1d(had, digest_keys(index.digests[index.labels >= 0]))
    if 2 * len(gone) > len(had):
        writer.flush()
        raise MismatchError(
            "this would replace other labelled images",
            where=writer.path,
            expected=f"the images of {writer.manifest.source or 'the store'}, for the most part",
            found=f"{len(gone)} of {plural(len(had), 'labelled image')} missing, or without a label",
            hint="Give another --out, or run it again with --replace; what was embedded is kept.",
        )


def _too_many(
    refused: tuple[Refused, ...], total: int, allowed: float, store: Path, *, none_left: bool
) -> TooManyBadImages:
    first, found = refused[0], f"{len(refused)} refused"
    return TooManyBadImages(
        "too many images were refused",
        where=store / "quarantine.jsonl",
        expected="at least one good image" if none_left else f"at most {int(allowed)} of {total}",
        found=f"{'none; ' if none_left else ''}{found}, such as {first.id} ({first.reason}: {first.message})",
        hint="Good images are kept; repair or remove the bad ones, or allow more with --max-bad, and run it again.",
    )


class _Run:
    """The state of one extraction."""

    def __init__(
        self, images: ImageSet, writer: StoreWriter, lanes: Sequence[Lane], small: SmallPicture | None
    ) -> None:
        self.images, self.writer, self.lanes = images, writer, lanes
        # A thumbnail may need more of an image than the networks, whose pixels must not depend on whether one is made.
        self.small = small if lanes[0].decode == "full" else None
        self.stages = dict.fromkeys(STAGES, 0.0)
        self.refused: list[Refused] = []
        self.done = self.embedded = self.copies = 0
        self.seconds = 0.0
        self._digests: dict[str, bytes] = {}
        self._taken: dict[bytes, str] = {}
        self._read_at: dict[str, int] = {}

    def embed(self, workers: int, timeout: float, progress: Progress | None, of: int, *, rehash: bool) -> None:
        """Find the digest of every image, and publish the embedding of every new content; ``of`` as ``total``."""
        total = len(self.images)
        dated = self.images.grouping is not None and self.images.grouping.dated
        pending = self._to_read(longest_id(of), {} if rehash else self._remembered(), dated=dated)
        self.done = total - len(pending)
        if progress is not None:
            progress(self.done, total)
        if not pending:
            return
        started = time.perf_counter()
        self._writing = 0.0
        size = max(lane.engine.batch_size for lane in self.lanes)
        place = {lane.backbone.name: number for number, lane in enumerate(self.lanes)}
        first, *others = (lane.looks for lane in self.lanes)
        if self.small is not None:
            others.append(THUMBNAIL)

        def wanted(digest: bytes) -> list[int]:
            lacking = [place[name] for name in self.writer.lacks(digest)]
            return [*lacking, len(self.lanes)] if lacking and self.small is not None else lacking

        with (
            DecoderPool(
                first.preprocess,
                workers=min(workers, len(pending)),
                timeout=timeout,
                mode=self.lanes[0].decode,
                views=first.views,
                others=others,
                wanted=wanted,
                hashed=True,
                dated=dated,
            ) as pool,
            Lanes(self.lanes, self._write) as running,
        ):
            stream = pool.run((ref.path for ref in pending), lambda digest: False, ahead=2 * size + 2 * pool.workers)
            claimed: set[bytes] = set()
            for ref in pending:
                before = time.perf_counter()
                decoded = next(stream)
                self.stages["wait for pixels"] += time.perf_counter() - before
                for stage, seconds in zip(STAGES, decoded.seconds, strict=False):
                    self.stages[stage] += seconds
                self.done += 1
                if progress is not None:
                    progress(self.done, total)
                if decoded.refusal is not None:
                    self._refuse(ref, decoded.digest, decoded.refusal)
                    continue
                assert decoded.digest is not None
                self._digests[ref.id] = decoded.digest
                self._taken[decoded.digest] = decoded.taken
                self._read_at[ref.id] = time.time_ns()
                pixels = (decoded.pixels, *decoded.others)  # of what is known nothing is decoded
                if self.small is not None and len(pixels) > len(self.lanes) and pixels[-1] is not None:
                    self.small(ref, pixels[-1])
                if decoded.digest in claimed:
                    self.copies += 1
                    continue
                if decoded.phash:
                    claimed.add(decoded.digest)
                    running.add(decoded.digest, decoded.phash, pixels[: len(self.lanes)])
            running.finish()
        before = time.perf_counter()
        self.writer.flush()
        done = time.perf_counter()
        self.seconds = done - started
        self.stages["write"] = self._writing + done - before
        # This thread decodes nothing: when it neither waits for pixels nor writes, it waits for the engines.
        self.stages["network"] = self.seconds - self.stages["wait for pixels"] - self.stages["write"]

    def _to_read(
        self, longest: int, remembered: Mapping[tuple[str, int, int], bytes], *, dated: bool
    ) -> list[ImageRef]:
        """The images whose content is not known, or is new; those whose name cannot be kept are refused."""
        index = self.writer.index
        if dated and index is not None:
            self._taken = dict(zip(digest_bytes(index.digests), index.metadata.get(TAKEN, ()), strict=False))
        named, digests = [], []
        for ref in self.images.refs:
            problem = _name_problem(ref, longest)
            if problem:
                self._refuse(ref, None, ImageError("bad_name", problem))
                continue
            # Nothing is remembered of an image whose source has no times, or that may have changed while it was read.
            named.append(ref)
            digests.append(remembered.get((ref.id, ref.size, ref.stamp), b""))
        there = self.writer.has_all(digests)
        if dated:  # an unchanged file is read once more where its date is not known
            there = [known and digest in self._taken for known, digest in zip(there, digests, strict=True)]
        self._digests |= {ref.id: digest for ref, digest, known in zip(named, digests, there, strict=True) if known}
        return [ref for ref, known in zip(named, there, strict=True) if not known]

    def _write(self, ready: Embedded) -> None:
        before = time.perf_counter()
        self.writer.add(ready.digests, ready.embeddings, ready.hashes)
        # The baseline alone, for images that had their embeddings already, is no embedding worth counting.
        if set(ready.embeddings) != {PIXELS} or len(self.lanes) == 1:
            self.embedded += len(ready.digests)
        self._writing += time.perf_counter() - before

    def _remembered(self) -> dict[tuple[str, int, int], bytes]:
        index = self.writer.index
        if index is None:
            return {}
        keys = zip(index.ids, index.sizes.tolist(), index.stamps.tolist(), strict=True)
        return {key: digest for key, digest in zip(keys, digest_bytes(index.digests), strict=True) if key[2] >= 0}

    def _refuse(self, ref: ImageRef, digest: bytes | None, refusal: ImageError) -> None:
        self.refused.append(Refused(ref.id, digest.hex() if digest else "", refusal.reason, refusal.what))

    def index(self) -> Index:
        """What the images are called, refused ones left out."""
        # A file that changed while, or just before, it was read is hashed again the next time.
        stamps = {
            ref.id: ref.stamp if ref.changed_ns + _SETTLED_NS <= self._read_at.get(ref.id, 2**63) else -1
            for ref in self.images.refs
        }
        return index_of(self.images, self._digests, stamps, self._taken, self.writer.index)


def regrouped(images: ImageSet, index: Index | None) -> ImageSet:
    """The images, grouped by the rule that the store had, unless they come with one of their own.

    Groups from a column that the source does not have are carried over later (:func:`index_of`), by content.
    """
    if images.grouping is not None or index is None or not index.grouping:
        return images
    rule, name = index.grouping, index.group_name
    if rule.startswith("column:") and not images.has_column(rule.removeprefix("column:")):
        return images
    return images.grouped(rule, name, some=False)  # a part of the images may well have none


def index_of(
    images: ImageSet,
    digests: Mapping[str, bytes],
    stamps: Mapping[str, int],
    taken: Mapping[bytes, str],
    before: Index | None,
) -> Index:
    """What the images with a digest are called.

    Parameters
    ----------
    stamps : -1 for files to be read again the next time.
    taken : when photos were taken, by content, where they are grouped by that.
    before : the index that this one is in the place of.
    """
    refs = [ref for ref in images.refs if ref.id in digests]
    grouping, groups = images.grouping, [ref.group for ref in refs]
    told = [dict(ref.metadata) for ref in refs]
    metadata = {name: [each.get(name, "") for each in told] for name in images.columns}
    rule, group_name = ("", "") if grouping is None else (grouping.rule, grouping.name)
    if grouping is not None and grouping.dated:
        metadata[TAKEN] = [taken.get(digests[ref.id], "") for ref in refs]
        groups = grouping.of_dates(metadata[TAKEN])
    elif grouping is None and before is not None and before.grouping:
        rule, group_name = before.grouping, before.group_name
        had = dict(zip(digest_bytes(before.digests), before.groups, strict=False))
        groups = [had.get(digests[ref.id], "") for ref in refs]
    names = tuple(name for name in images.class_names if not _text_problem(name))
    number = {name: i for i, name in enumerate(names)}
    return Index(
        ids=[ref.id for ref in refs],
        labels=np.array([-1 if ref.label is None else number[ref.label] for ref in refs], np.int64),
        split=[ref.split for ref in refs],
        digests=np.frombuffer(b"".join(digests[ref.id] for ref in refs), np.uint8).reshape(-1, 32),
        class_names=names,
        sizes=np.array([ref.size for ref in refs], np.int64),
        stamps=np.array([stamps[ref.id] for ref in refs], np.int64),
        groups=groups if any(groups) else (),
        grouping=rule,
        group_name=group_name,
        metadata=metadata,
    )


def group_notes(images: ImageSet, index: Index, before: Index | None) -> tuple[str, ...]:
    """A note on the groups of the new index, where there is anything to say of them."""
    if images.grouping is not None:
        return () if images.grouping.kind == "none" else (images.grouping.note(index.groups or [""] * len(index)),)
    if before is not None and before.groups:
        new = sum(not group for group in index.groups) if index.groups else len(index)
        rest = f"; {plural(new, 'image')} without one" if new else ""
        return (f"groups by {before.grouping}, which this source does not have, were kept by content{rest}",)
    return ()


def _name_problem(ref: ImageRef, longest: int) -> str:
    """Why a path or a label cannot be kept, or "" if it can."""
    if problem := _text_problem(ref.id, longest):
        return f"the path {problem}"
    if problem := _text_problem(ref.label or ""):
        return f"the label {problem}"
    return ""


def _text_problem(text: str, longest: int = MAX_STRING) -> str:
    if "\0" in text:
        return "has a zero byte"
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "is not Unicode text; rename it"
    return f"has {size:,} bytes; at most {longest:,} can be kept in a store of this size" if size > longest else ""
