"""What the tests of the store share: stores made by hand, a light extraction, and a process to kill.

Run as a program it does a whole extraction: real images, real decoding processes, a light engine.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from warm import Started, shared

import featx.extraction.parts
import featx.extraction.run
from featx.backbones.backbone import Backbone, load_backbone
from featx.backbones.engines.base import Engine
from featx.errors import Interrupted
from featx.extraction.parts import Part, finish_parts
from featx.extraction.run import ExtractSummary, extract_features
from featx.images.pixels import Preprocess
from featx.images.source import ImageSet
from featx.store.index import Index, Refused, read_quarantine
from featx.store.manifest import name_of, read_manifest
from featx.store.reader import FeatureReader, read_features
from featx.store.shards import digest_keys, open_shard
from featx.store.writer import StoreWriter

SIDE = 8
DIM = 8
PREPROCESS = Preprocess(resize=SIDE, crop=(SIDE, SIDE), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
SIDES = {"tiny": SIDE, "wide": 12, "third": 5}
"""Light backbones, and the sides of the images that they take."""

THREE = ("tiny", "wide", "pixels")


def provenance(**changes: Any) -> dict[str, Any]:
    """A provenance with every field of the fingerprint."""
    return {
        "backbone": "tiny",
        "weights": "none",
        "weights_sha256": "0" * 64,
        "layers": ["penultimate"],
        "views": "center",
        "preprocess": PREPROCESS.to_json(),
        "decode": {"mode": "full"},
        "precision": "fp32",
        **changes,
    }


def digests_of(names: Iterable[str]) -> list[bytes]:
    """A digest for each name."""
    return [hashlib.sha256(name.encode()).digest() for name in names]


def rows_of(digests: Sequence[bytes], dim: int = DIM) -> NDArray[np.float32]:
    """The embedding that belongs to each digest: a function of it, so that a reader can tell a wrong row."""
    raw = b"".join((digest * (dim // 32 + 1))[:dim] for digest in digests)
    return (np.frombuffer(raw, np.uint8).reshape(-1, dim) / np.float32(16) - 8).astype(np.float32)


def index_of(names: Sequence[str], classes: Sequence[str] = ("ants", "bees")) -> Index:
    """An index with alternating labels and splits."""
    n = len(names)
    return Index(
        ids=list(names),
        labels=np.arange(n, dtype=np.int64) % (len(classes) + 1) - 1,
        split=[("train", "val", "test", "")[i % 4] for i in range(n)],
        digests=np.frombuffer(b"".join(digests_of(names)), np.uint8).reshape(-1, 32),
        class_names=tuple(classes),
        sizes=np.full(n, 10, np.int64),
        stamps=np.full(n, 10, np.int64),
    )


def names_of(count: int, first: int = 0) -> list[str]:
    """Ids in sorted order, not all of them ASCII."""
    return [f"bienen/käfer {i:06d}.png" for i in range(first, first + count)]


def made_up(backbone: str, digests: Sequence[bytes], layer: int = 0) -> NDArray[np.float32]:
    """The embedding by a backbone that belongs to each digest."""
    if backbone == "pixels":
        return (rows_of(digests, 768) + np.float32(8)) / np.float32(16)
    return rows_of(digests, SIDES[backbone] + layer)


def make_store(
    path: Path,
    names: Sequence[str] | None = None,
    *,
    shard_rows: int = 5,
    layers: Sequence[str] = ("penultimate",),
    refused: Sequence[Refused] = (Refused("x/bad.png", "", "empty", "the file is empty"),),
    backbones: Sequence[str] = ("tiny",),
) -> Path:
    """A finished store of made-up rows, written by the real writer; of several backbones, with hashes."""
    names = names_of(12) if names is None else names
    made = [provenance(backbone=name, layers=list(layers if name == "tiny" else layers[:1])) for name in backbones]
    with StoreWriter(path, *made, shard_rows=shard_rows) as writer:
        for start in range(0, len(names), shard_rows):
            digests = [digest for digest in digests_of(names[start : start + shard_rows]) if writer.lacks(digest)]
            if digests:
                writer.add(
                    digests,
                    {
                        each["backbone"]: [made_up(each["backbone"], digests, i) for i in range(len(each["layers"]))]
                        for each in made
                    },
                    None if len(made) == 1 else np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32),
                )
        writer.finish(index_of(names), refused, source="by hand")
    return path


class LightEngine(Engine):
    """Means over a grid of the pixels, times a fixed matrix; each batch that is computed leaves a line in a log."""

    name = "torch"
    device = "cpu"
    precision = "fp32"

    def __init__(
        self, batch_size: int = 4, dim: int = DIM, log: Path | None = None, pause: float = 0.0, side: int = SIDE
    ) -> None:
        self.batch_size, self.log, self.pause = batch_size, log, pause
        self._weights = np.random.default_rng(0).normal(size=(side * side * 3, dim)).astype(np.float32)

    def embed(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[tuple[NDArray[np.float32], ...]]:
        """One row at a time, so that a row does not depend on its batch."""
        for batch in batches:
            time.sleep(self.pause)
            if self.log is not None:
                with self.log.open("ab") as file:
                    file.write(b"%d\n" % len(batch))
            yield (np.stack([row.reshape(-1) / np.float32(255) @ self._weights for row in batch]),)


def light_backbone(**changes: Any) -> Backbone:
    """The record that goes with :class:`LightEngine`."""
    fields: dict[str, Any] = {"name": "tiny", "weights": "none", "weights_sha256": "0" * 64}
    return Backbone(**{**fields, "preprocess": PREPROCESS, "layers": ("penultimate",), **changes})


def light_backbones(*names: str, **changes: Any) -> tuple[Backbone, ...]:
    """Those of :data:`SIDES`, which look at an image each in its own way."""
    looks = {name: replace(PREPROCESS, resize=SIDES[name], crop=(SIDES[name],) * 2) for name in names}
    return tuple(light_backbone(name=name, preprocess=look, **changes) for name, look in looks.items())


def start_light(backbone: Backbone, *, log: Path | None = None, pause: float = 0.0, **how: Any) -> LightEngine:
    """What makes the engine in another process; ``how`` is what it would be told of device and precision.

    The log may be a folder, with a file for each backbone.
    """
    log = log / backbone.name if log is not None and log.is_dir() else log
    side = backbone.preprocess.crop[0]
    return LightEngine(log=log, pause=pause, side=side, dim=side, batch_size=side // 2)


def write_png(path: Path, seed: int) -> None:
    """A PNG of 4x4 random pixels, made without Pillow (thousands of them take a second)."""
    import struct
    import zlib

    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 1)) + chunk(b"IEND", b"")
    )


def png_folders(root: Path, count: int, first: int = 0) -> Path:
    """``count`` different PNGs in the class folders ants and bees, with times of long ago."""
    for name in ("ants", "bees"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        path = root / ("ants", "bees")[number % 2] / f"{number:06d}.png"
        write_png(path, number)
        os.utime(path, ns=(10**18, 10**18))
    return root


def light_like(provenance: Mapping[str, Any], **how: Any) -> Backbone:
    """In the place of :func:`featx.extraction.embedder.network_like`: the light backbone that a store names."""
    name = str(provenance["backbone"])
    return light_backbones(name)[0] if name in SIDES else load_backbone(name)


def extract(
    source: Path,
    store: Path,
    *,
    log: Path | None = None,
    pause: float = 0.0,
    backbones: Sequence[str] = ("tiny",),
    **options: Any,
) -> ExtractSummary:
    """A light extraction with one decoding process."""
    images = ImageSet.from_folder(source)
    options = {"workers": 1, "engine": partial(start_light, log=log, pause=pause), **options}
    return extract_features(images, light_backbones(*backbones), store, **options)


def check_published(store: Path) -> int:
    """Assert that all that a store has published is sound, whatever else was going on; the number of rows."""
    if not (store / "manifest.json").exists():
        return 0
    manifest = read_manifest(store)
    keys: dict[str, list[NDArray[np.bytes_]]] = {name_of(each): [] for each in manifest.backbones}
    for shard in manifest.shards:
        with open_shard(store, shard) as file:
            assert file.rows == shard.rows
            for column in shard.columns():
                assert len(file.read(column)) == shard.rows
            for backbone in shard.blocks:
                keys[backbone].append(digest_keys(file.read("digests")))
    read_quarantine(store, manifest)
    for parts in keys.values():
        rows = sum(map(len, parts))
        assert len(np.unique(np.concatenate([np.empty(0, "S32"), *parts]))) == rows
    rows = sum(map(len, keys[name_of(manifest.provenance)]))
    files = {path.name for path in (store / "shards").iterdir() if not path.name.startswith(".tmp-")}
    assert {shard.name for shard in manifest.shards} <= files
    assert files <= {shard.name for shard in manifest.shards} | set(manifest.in_flux)
    return rows


def assert_rows(store: Path, rows: int = 12) -> None:
    """Each row is the one that belongs to its digest, and each digest to its id; of every backbone."""
    features = read_features(store)
    assert len(features) == rows
    assert [digest.tobytes() for digest in features.digests] == digests_of(features.ids.tolist())
    assert np.array_equal(features.embeddings, rows_of(digests_of(features.ids.tolist())))
    for name in set(FeatureReader(store).backbones) - {"tiny"}:
        digests = [digest.tobytes() for digest in features.digests]
        assert np.array_equal(read_features(store, layer=f"{name}/penultimate").embeddings, made_up(name, digests))
        assert features.hashes is not None and np.array_equal(features.hashes, features.digests)


def refused_of(store: Path) -> list[Refused]:
    """The quarantine of a store."""
    return read_quarantine(store, read_manifest(store))


def peak() -> int:
    """The most memory that this process has had, in kB. (ru_maxrss would count what its parent had at the fork.)"""
    status = Path("/proc/self/status")
    if not status.exists():
        raise OSError("peak memory is read from /proc, which is not there")
    return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])


def begin(**job: object) -> Started:
    """Begin one extraction, in a process that may be killed.

    ``job`` is ``source``, ``store``, ``shard_rows`` and perhaps ``log``, ``pause``, ``backbones``; with ``part``
    ("2/3") it is of that part, with ``finish`` (true) it puts the parts together.
    """
    told = json.dumps({name: str(value) if isinstance(value, Path) else value for name, value in job.items()})
    return shared().begin([told], script=__file__)


def extract_part(
    images: ImageSet, backbone: Backbone | Sequence[Backbone], store: Path, part: Part, **options: Any
) -> ExtractSummary:
    """One part of all the images of a source."""
    cut = part.cut(images)
    return featx.extraction.parts.extract_part(cut, len(images), backbone, store, part, **options)


def _run_job(job: dict[str, Any]) -> int:
    def writer(path: Path, *provenance: dict[str, Any]) -> StoreWriter:
        return StoreWriter(path, *provenance, shard_rows=job["shard_rows"])

    featx.extraction.run.StoreWriter = writer  # type: ignore[attr-defined, assignment]
    featx.extraction.run.network_like = light_like  # type: ignore[attr-defined]
    log = Path(job["log"]) if "log" in job else None
    source, store, pause = Path(job["source"]), Path(job["store"]), job.get("pause", 0.0)
    backbones = job.get("backbones", ("tiny",))
    try:
        if job.get("finish"):
            finish_parts(ImageSet.from_folder(source), store)
        elif "part" in job:
            engine = partial(start_light, log=log, pause=pause)
            images, part = ImageSet.from_folder(source), Part.parse(job["part"])
            extract_part(images, light_backbones(*backbones), store, part, engine=engine, workers=1)
        else:
            extract(source, store, log=log, pause=pause, backbones=backbones)
    except Interrupted as error:
        return error.exit_code
    return 0


if __name__ == "__main__":
    os.fsync = lambda fd: None  # for power cuts; a killed process leaves what it wrote either way
    raise SystemExit(_run_job(json.loads(sys.argv[1])))
