"""The images of ``featx demo``, which come with its dependencies, and what raw pixels make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx.errors import StoreError
from featx.evaluation import Shots, SweepResult, shown_gap
from featx.images import photographs, save_png

NEW = ("chelsea", "coffee", "rocket")
"""Of each of these one tile is kept apart, to predict."""

TILE = 80
"""Pixels a side of a tile."""

CELL = 90
"""A photograph is divided into up to ``PER_SIDE`` x ``PER_SIDE`` cells of at least so many pixels a side, and a tile
is cut from the middle of each: no tile touches another, so each is a group of its own."""

PER_SIDE = 4

DIGITS_EACH = 50

SCALE = 4
"""The digits are 8x8; enlarged without smoothing they can be looked at."""


def write_photographs(folder: Path, new: Path) -> int:
    """Cut the photographs into tiles, ``folder/<photograph>/<row>-<column>.png``.

    Parameters
    ----------
    folder : class folders, made if they are not there.
    new : gets the tiles that are kept apart, ``<photograph>.png``.

    Returns
    -------
    How many tiles there are in ``folder``.

    Raises
    ------
    UsageError
        scikit-image is not installed, or this version has other photographs.
    """
    count = 0
    _make_folder(new)
    for name, photograph in photographs("the demo", "demo").items():
        _make_folder(folder / name)
        tiles = cut_tiles(np.asarray(photograph))
        if name in NEW:
            _write(new / f"{name}.png", tiles.pop(max(tiles)))
        for (row, column), tile in tiles.items():
            _write(folder / name / f"{row}-{column}.png", tile)
        count += len(tiles)
    return count


def cut_tiles(pixels: NDArray[np.uint8]) -> dict[tuple[int, int], NDArray[np.uint8]]:
    """Tiles (TILE, TILE, 3) of a photograph (h, w, 3), by row and column of their cell."""
    corners = []
    for length in pixels.shape[:2]:
        cells = min(PER_SIDE, length // CELL)
        corners.append([int((i + 0.5) * length / cells - TILE / 2) for i in range(cells)])
    return {
        (row, column): pixels[top : top + TILE, left : left + TILE]
        for (row, top), (column, left) in product(enumerate(corners[0]), enumerate(corners[1]))
    }


def write_digits(folder: Path) -> int:
    """Write scikit-learn's first 50 of each digit as ``folder/<digit>/<number>.png``; returns how many there are."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    count = 0
    for label in range(10):
        _make_folder(folder / str(label))
        for number in np.flatnonzero(digits.target == label)[:DIGITS_EACH].tolist():
            grey = np.round(255 - digits.images[number] * (255 / 16)).astype(np.uint8)
            _write(folder / str(label) / f"{number:04d}.png", np.kron(grey, np.ones((SCALE, SCALE), np.uint8)))
            count += 1
    return count


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StoreError("a file is in the way of the demo's images", where=folder) from error


def _write(path: Path, pixels: NDArray[np.uint8]) -> None:
    if not path.exists():
        save_png(pixels, path)


@dataclass(frozen=True)
class Job:
    """Accuracy of one head on embeddings and on raw pixels, over the same draws.

    Attributes
    ----------
    name : of the images.
    head : what both were judged with.
    embeddings, pixels : mean accuracy by images per class.
    """

    name: str
    head: str
    embeddings: dict[Shots, float]
    pixels: dict[Shots, float]

    def to_json(self) -> dict[str, Any]:
        """One row for each kind of features and number of images per class."""
        return {
            "head": self.head,
            "results": [
                {"features": features, "n_shots": n_shots, "accuracy": accuracy}
                for features, means in (("embeddings", self.embeddings), ("pixels", self.pixels))
                for n_shots, accuracy in means.items()
            ],
        }


def compare_with_pixels(name: str, result: SweepResult) -> Job:
    """What a sweep says of embeddings and of the pixels baseline, both with the recommended head."""
    head = result.recommended
    embeddings = {each.n_shots: each.accuracy.mean for each in result.results if each.head == head}
    pixels = {n_shots: result.pixels_accuracy(n_shots).mean for n_shots in result.shots}
    return Job(name, head, embeddings, pixels)


def verdict(jobs: Sequence[Job]) -> list[str]:
    """What was seen, in words with the numbers: a line for each job, and what follows."""
    parts = []
    for job in jobs:
        points = round(100 * shown_gap(job.embeddings[5], job.pixels[5], digits=0))
        numbers = f"{100 * job.embeddings[5]:.0f} % right, raw pixels {100 * job.pixels[5]:.0f} %"
        words = (
            f"is worth {points} points" if points > 0 else f"costs {-points} points" if points else "is worth nothing"
        )
        parts.append(f"On {job.name} the frozen network {words} ({numbers}, with 5 images per class).")
    return [*parts, "Only a measurement can tell which of the two your photos are like."]
