#!/usr/bin/env python3
"""What heads take from borders and corners of photos, with and without a shortcut that was planted there.

    python scripts/bench_shortcuts.py FOLDER [FOLDER ...] [--draws 20]

Each FOLDER has class folders. Measured is what ``featx advise --source`` measures, on at most 200 photos of a set; and
the same on smooth noise of two classes, with a coloured square in a corner that says which, and without one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx import ImageSet, load_backbone
from featx.advice.shortcuts import MOST, REGIONS, find_shortcuts, sample
from featx.backbones import make_engine
from featx.extraction import Embedder
from featx.images import save_png

SIDE, EACH = 256, 30
COLOURS = ((230, 40, 40), (40, 60, 230))


def planted(folder: Path, *, square: bool) -> tuple[list[Any], NDArray[np.int64]]:
    """Pictures of noise of two classes, in random order."""
    rng = np.random.default_rng(5)
    labels = rng.permutation(np.repeat([0, 1], EACH))
    files = []
    for number, label in enumerate(labels):
        corners = rng.integers(90, 170, (5, 5, 3)).astype(float)
        at = np.linspace(0, 4, SIDE)
        mix = np.clip(1 - np.abs(at[:, None] - np.arange(5)), 0, None)
        pixels = np.einsum("yi,xj,ijc->yxc", mix, mix, corners).astype(np.uint8)
        if square:  # inside the crop of 224 pixels
            pixels[196:238, 18:60] = COLOURS[label]
        files.append(folder / f"{square}-{number:03d}.png")
        save_png(pixels, files[-1])
    return files, labels.astype(np.int64)


def photos(folder: Path) -> tuple[list[Any], NDArray[np.int64]]:
    """At most so many photos of a folder with class folders."""
    refs = [ref for ref in ImageSet.from_folder(folder).refs if ref.label is not None]
    _, labels = np.unique([ref.label for ref in refs], return_inverse=True)
    rows = sample(labels, np.arange(len(labels)), MOST, 0)
    return [refs[row].path for row in rows], labels[rows].astype(np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--draws", type=int, default=20)
    options = parser.parse_args()
    backbone = load_backbone()
    embedder = Embedder(backbone, make_engine(backbone))
    both = ("without it", "without as much of the middle", "alone", "as much of the middle alone")
    columns = ["photos", "whole", *(f"{region}: {what}" for region in REGIONS for what in both)]
    columns += ["found", "evidence in the middle", "s"]
    print(f"| {' | '.join(columns)} |", "|" + len(columns) * "---|", sep="\n")
    with tempfile.TemporaryDirectory() as place:
        sets = {str(folder): photos(folder) for folder in options.folders}
        sets |= {f"noise, {what}": planted(Path(place), square=what != "as it is") for what in ("as it is", "a square")}
        for name, (origins, labels) in sets.items():
            began = time.monotonic()
            found = find_shortcuts(
                embedder, 0, origins, labels, episodes=options.draws, random_state=0, tick=lambda what: None
            )
            cells = [found.whole.mean]
            for region in found.regions:
                pair = [region.without, region.without_middle, region.alone, region.alone_middle]
                cells += [each.mean for each in pair]
            odd = [f"{each.name} {each.verdict}" for each in found.regions if each.used or each.gives_away]
            used = ", ".join(odd) or "-"
            middle = "-" if found.middle is None else f"{100 * found.middle.mean:.0f} %"
            shares = " | ".join(f"{100 * cell:.1f} %" for cell in cells)
            print(f"| {name} | {shares} | {used} | {middle} | {time.monotonic() - began:.1f} |")


if __name__ == "__main__":
    main()
