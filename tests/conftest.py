"""What several tests need: real photos if there are any, images made on the spot, and the real command."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from warm import Warm, end_shared, let_children_be_counted, shared

from featx.backbones.backbone import Backbone
from featx.backbones.engines.base import Engine
from featx.images.pixels import Preprocess

TESTS = Path(__file__).parent
ROOT = TESTS.parent

TINY = Preprocess(resize=24, crop=(24, 24), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)


def pytest_configure() -> None:
    """A shell that starts the suite in the background has SIGINT ignored, and so would the commands under test."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    let_children_be_counted()


def pytest_collection_finish() -> None:
    """What all tests have imported stays: to look through it again and again took a tenth of their time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Nothing that tests have started goes on, and libraries find at the end what they have made."""
    end_shared()
    gc.unfreeze()


LONG = ("test_readme.py", "test_cli.py")
"""Files that would keep one of two workers busy long after the other has ended, were they not begun first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, all others in their order."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def photos() -> Path:
    """The folder of real photos: class folders of five image sets."""
    folder = os.environ.get("FEATX_PHOTOS")
    if not folder:
        pytest.skip("FEATX_PHOTOS does not name a folder of real photos")
    return Path(folder)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks and tensors as small as those of tests lose more by waiting for a second thread than they gain."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of this run's own, so that nothing converted earlier hides a mistake; its workers share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "featx-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATX_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def no_workers_unless_asked_for() -> Iterator[None]:
    """Sweeps run in one process, as with one core: to start joblib's workers took most of the time of small ones.

    Tests of workers say how many.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOKY_MAX_CPU_COUNT", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """In this process fsync returns at once: it is for power cuts, and took most of the time of small stores.

    Real commands have it, and so has the writer whose system calls are traced.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@dataclass
class Ran:
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


Featx = Callable[..., Ran]


@pytest.fixture(scope="session")
def warm() -> Warm:
    """The process that commands are forked from."""
    return shared()


@pytest.fixture(scope="session")
def featx(warm: Warm) -> Featx:
    """Run the real ``featx`` in a process of its own, with warnings as errors."""

    def run(*arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None, first: str = "") -> Ran:
        whole = {**os.environ, "COLUMNS": "120", **(env or {})}
        ran = Ran(*warm.run([*map(str, arguments)], cwd, whole, timeout=240, first=first))
        assert "Traceback" not in ran.err, ran.err
        return ran

    return run


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth random RGB image, different for every seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def without(library: str, folder: Path) -> dict[str, str]:
    """The environment of a command whose decoding processes do not find a library, by a file in ``folder``."""
    site = folder / f"no-{library}"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(f"import sys\nsys.modules[{library!r}] = None\n")
    return {"PYTHONPATH": str(site)}


def class_folders(root: Path, names: Iterable[str] = ("ants", "bees"), each: int = 4, first: int = 0) -> Path:
    """Class folders of PNG pictures, all different."""
    number = first
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for _ in range(each):
            picture(number).save(root / name / f"{number:03d}.png")
            number += 1
    return root


def bad_images(folder: Path) -> dict[str, str]:
    """Eight awkward files; returns the reason for each that has to be refused."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.jpg").write_text("this is not a picture")
    out = io.BytesIO()
    picture(1, (300, 200)).save(out, format="JPEG")
    (folder / "truncated.jpg").write_bytes(out.getvalue()[: len(out.getvalue()) // 2])
    Image.fromarray(np.linspace(0, 65535, 1024, dtype=np.uint16).reshape(32, 32)).save(folder / "sixteen.png")
    picture(2).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)).save(folder / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(3).save(folder / "rotated.jpg", exif=exif)
    frames = [picture(4), picture(5)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    picture(6, (1, 1)).save(folder / "pixel.png")
    return {"text.jpg": "not_an_image", "truncated.jpg": "truncated", "pixel.png": "too_small"}


class TinyEngine(Engine):
    """A real engine of the smallest kind: a fixed random projection of the pixels."""

    name = "torch"
    device = "cpu"
    precision = "fp32"

    def __init__(self, batch_size: int = 3, dim: int = 8) -> None:
        self.batch_size = batch_size
        self.batches: list[int] = []
        height, width = TINY.crop
        self._weights = np.random.default_rng(0).normal(size=(height * width * 3, dim)).astype(np.float32)

    def embed(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[tuple[NDArray[np.float32], ...]]:
        """One row at a time, so that a row does not depend on its batch."""
        for batch in batches:
            self.batches.append(len(batch))
            yield (np.stack([row.reshape(-1) / np.float32(255) @ self._weights for row in batch]),)


def tiny_backbone(**changes: Any) -> Backbone:
    """The record that goes with :class:`TinyEngine`."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "weights": "none",
        "weights_sha256": "0" * 64,
        "preprocess": TINY,
        "layers": ("penultimate",),
    }
    return Backbone(**{**fields, **changes})
