"""How many images a second a network makes on this machine: measured when asked for, kept in featx's cache folder.

What is timed is the network alone, on random pixels: reading and decoding images comes on top. The values of the
weights do not matter to the speed, so a network whose weights are not here runs with random ones.
"""

from __future__ import annotations

import datetime
import importlib.util
import math
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from featx._files import make_folder, publish_bytes, read_regular, seal, unseal
from featx._system import available_cpus
from featx.backbones.backbone import Backbone, find, load_backbone
from featx.backbones.engines.base import Batch, Engine
from featx.backbones.engines.choice import make_engine
from featx.backbones.hub import Advance, Progress, cache_folder
from featx.errors import StoreError

_LIMIT = 1 << 16
_LEAST = 2
"""Batches that are timed, however long they take."""


@dataclass(frozen=True)
class Speed:
    """What was measured, how and where.

    Parameters
    ----------
    backbone : what stores call the network.
    images_per_second : of the network alone.
    engine, precision, device, batch_size : as extraction would choose them here without options.
    cpus : how many this process could use.
    host : the machine's name.
    date : year-month-day.
    """

    backbone: str
    images_per_second: float
    engine: str
    precision: str
    device: str
    batch_size: int
    cpus: int
    host: str
    date: str


def measure_speed(
    name: str, *, seconds: float = 5.0, progress: Progress | None = None, advance: Advance | None = None
) -> Speed:
    """Run a network for some seconds, and keep its speed for :func:`measured_speeds`.

    Parameters
    ----------
    name : of the catalogue, or ``timm:NAME``.
    seconds : how long to run it; two batches at least.
    progress, advance : told what is done, and how many seconds of how many are over.
    """
    provider = find(name)
    local = getattr(provider, "local", None)
    weights = "default" if local is not None and local() is not None else "none"
    if progress is not None:
        progress(f"building {name}" + (" with random weights: its own are not here" if weights == "none" else ""))
    backbone = load_backbone(name, weights=weights)
    left = _converted(backbone) if weights == "none" else []
    try:
        engine = make_engine(backbone)
        found = rate(engine, (engine.batch_size, *backbone.preprocess.crop, 3), seconds, name, advance)
    finally:
        for file in left:  # a converted copy of random weights is of no use to anybody
            file.unlink(missing_ok=True)
    speed = Speed(
        backbone=backbone.name,
        images_per_second=round(found, 1),
        engine=engine.name,
        precision=engine.precision,
        device=engine.device,
        batch_size=engine.batch_size,
        cpus=available_cpus(),
        host=platform.node(),
        date=datetime.datetime.now().astimezone().date().isoformat(),
    )
    file = _folder() / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', backbone.name)}.json"
    make_folder(file.parent)
    publish_bytes(file, seal(asdict(speed)))
    return speed


def measured_speeds() -> dict[str, Speed]:
    """Speeds that were measured on this machine with as many CPUs, by what stores call the network.

    Files that are damaged or not of this kind count as not there: measuring again replaces them.
    """
    found = {}
    for file in sorted(_folder().glob("*.json")):
        try:
            values = unseal(read_regular(file, _LIMIT))
        except (OSError, ValueError, StoreError):
            continue
        if set(values) != {field.name for field in fields(Speed)}:
            continue
        speed = Speed(**values)
        if (speed.host, speed.cpus) == (platform.node(), available_cpus()):
            found[speed.backbone] = speed
    return found


def _folder() -> Path:
    return cache_folder() / "speeds"


def _converted(backbone: Backbone) -> list[Path]:
    """Where OpenVINO's engine would keep a converted copy of this network, if there is none yet."""
    if importlib.util.find_spec("openvino") is None:
        return []
    from featx.backbones.engines.choice import BATCH_SIZES
    from featx.backbones.engines.graph import cache_file

    files = (cache_file(backbone), cache_file(backbone, BATCH_SIZES["cpu"]))
    return [file for file in files if not file.exists()]


def rate(engine: Engine, shape: tuple[int, ...], seconds: float, name: str, advance: Advance | None = None) -> float:
    """Images per second of an engine that is given one batch of random pixels of this shape again and again."""

    def tell(over: float) -> None:
        if advance is not None:
            advance(min(int(over), whole), whole, f"measuring {name}, seconds")

    whole = math.ceil(seconds)
    batch = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    tell(0)
    for _ in engine.embed([batch]):  # the first batch allocates, and pages in
        pass
    started = time.perf_counter()

    def batches() -> Iterator[Batch]:
        given = 0
        while given < _LEAST or time.perf_counter() - started < seconds:
            given += 1
            yield batch

    done = 0
    for rows in engine.embed(batches()):
        done += len(rows[0])
        tell(time.perf_counter() - started)
    return done / (time.perf_counter() - started)
