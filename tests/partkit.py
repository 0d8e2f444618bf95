"""What the tests of extractions in parts share: jobs for several processes, and whether two stores are the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from storekit import LightEngine, extract, light_backbones, png_folders, start_light

from featx.backbones.backbone import Backbone
from featx.extraction.runners.local import Job
from featx.images.source import ImageSet
from featx.store.index import Index, read_index
from featx.store.manifest import read_manifest
from featx.store.tools import content_hash, verify

TWO = ("cpu", "cpu")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return png_folders(tmp_path / "photos", 40)


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> Path:
    """What a single process makes of the images."""
    extract(source, tmp_path / "whole.featx")
    return tmp_path / "whole.featx"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "photos.featx"


def job_for(
    source: Path, store: Path, start: Callable[..., Any] = start_light, backbones: Sequence[str] = ("tiny",), **how: Any
) -> tuple[ImageSet, Job]:
    """The images of a folder, and the job of extracting them with engines that ``start`` makes."""
    images, load = ImageSet.from_folder(source), partial(light_backbones, *backbones)
    return images, Job(store, len(images), load, partial(start, **how), options={"workers": 1})


def computed(log: Path) -> int:
    """How many images the engines that wrote to this log have embedded."""
    return sum(map(int, log.read_text().split()))


def computed_by(logs: Path) -> dict[str, int]:
    """The same for each backbone, of a folder of logs that is emptied."""
    counts = {path.name: computed(path) for path in logs.iterdir()}
    for path in logs.iterdir():
        path.unlink()
    return counts


def fail_once(backbone: Backbone, *, flag: Path, **how: Any) -> LightEngine:
    """An engine of the second process that asks; the first has no luck."""
    try:
        flag.touch(exist_ok=False)
    except FileExistsError:
        return LightEngine()
    raise RuntimeError("the device is out of memory")


def assert_same(store: Path, whole: Path) -> None:
    """All that two stores say is the same, and none has anything left over."""
    assert content_hash(store) == content_hash(whole)
    assert verify(store) == []
    assert (store / "quarantine.jsonl").read_bytes() == (whole / "quarantine.jsonl").read_bytes()
    one, other = (read_index(each, read_manifest(each)) for each in (store, whole))
    for column in fields(Index):
        a, b = (np.asarray(getattr(index, column.name)) for index in (one, other))
        if column.name == "stamps":  # -1 is of a file that was read within two seconds of its making
            a, b = a[(a >= 0) & (b >= 0)], b[(a >= 0) & (b >= 0)]
        assert np.array_equal(a, b)
    mine, theirs = (json.loads((each / "manifest.json").read_text()) for each in (store, whole))
    for field in ("shards", "checksum"):
        del mine[field], theirs[field]
    assert mine == theirs
    rest = [path.name for path in store.rglob("*") if path.name.startswith(".") and path.name != ".lock"]
    assert rest == []
