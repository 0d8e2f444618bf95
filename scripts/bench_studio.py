#!/usr/bin/env python
"""How many key presses the studio's order of labelling saves, and how fast its suggestions come.

A person is simulated who presses one key for each photo, in the order that the page shows ("worth labelling next") or
at random, until a model of the labels names 90 % of all photos rightly: those that are labelled and those that are
not. Then: how often ten more labels of the class that is least often recognised, or has the fewest labels, help more
than ten of any other class, after 100 labels (60 with two classes) that are spread unequally.

usage: scripts/bench_studio.py FOLDER... [--draws 5] [--photos 600]

FOLDER has class folders of photos. Prints a table with ratios, and the machine and date.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featx import ImageSet, extract_features, load_backbone, read_features
from featx.heads import InstantRidge, unit_rows
from featx.studio.quality import sample_of
from featx.studio.suggest import suggest

MORE = 10
TARGET = 0.9
STEP = 2
"""Labels between two looks at the accuracy."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--photos", type=int, default=600)
    options = parser.parse_args()
    print(f"{'photos':14} {'n':>5} {'classes':>7} {'at random':>10} {'by the page':>12} {'saved':>7}")
    ratios = []
    for folder in options.folders:
        unit, truth = embedded(folder, options.photos)
        presses = np.array(
            [[count(unit, truth, draw, ordered) for ordered in (False, True)] for draw in range(options.draws)]
        )
        random, page = presses.mean(axis=0)
        ratios.append(page / random)
        saved = 100 * (1 - page / random)
        print(f"{folder.name:14} {len(truth):5} {truth.max() + 1:7} {random:10.1f} {page:12.1f} {saved:6.0f}%")
    print(f"saved on average: {100 * (1 - np.exp(np.mean(np.log(ratios)))):.0f} % of the key presses")
    print(f"\n{'photos':14} {'labels':>6} {'draws':>5} {'by chance':>9} {'least recognised':>16} {'fewest labels':>13}")
    for folder in options.folders:
        unit, truth = embedded(folder, 10**6)
        labels = 100 if truth.max() > 1 else 60
        helped = [found for draw in range(6 * options.draws) if (found := most_helpful(unit, truth, labels, draw))]
        recognised, fewest = np.mean(helped, axis=0)
        chance = 1 / (truth.max() + 1)
        print(f"{folder.name:14} {labels:6} {len(helped):5} {chance:9.0%} {recognised:16.0%} {fewest:13.0%}")
    for labels in (200, 2000):
        rng = np.random.default_rng(0)
        rows = unit_rows(rng.random((labels, 1280)), "l2").astype(np.float32)
        started = time.perf_counter()
        InstantRidge.fit(rows, rng.integers(0, 4, labels), 4)
        print(f"fit of {labels} labels x 1,280 numbers, 4 classes: {1000 * (time.perf_counter() - started):.0f} ms")
    print(date.today())


def embedded(folder: Path, most: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Unit rows and labels of at most so many photos."""
    with tempfile.TemporaryDirectory() as place:
        store = Path(place) / "photos.featx"
        extract_features(ImageSet.from_folder(folder), load_backbone("efficientnet_lite0"), store)
        features = read_features(store, max_images=most)
    return unit_rows(features.embeddings.astype(np.float64), "l2").astype(np.float32), features.labels


def count(unit: NDArray[np.float32], truth: NDArray[np.int64], draw: int, ordered: bool) -> int:
    """Labels that are given until the model is right on so many photos."""
    rng = np.random.default_rng(draw)
    drawn = rng.permutation(len(truth)).tolist()
    photos = np.arange(len(truth))
    codes = np.full(len(truth), -1, dtype=np.intp)
    unlike = np.zeros(len(truth), bool)
    for number in range(len(truth)):
        found = suggest(unit, photos, codes, unlike, drawn, sample_of(codes, drawn))
        if number % STEP == 0 and not found.reason:
            named = np.where(codes >= 0, codes, found.suggested)
            if (named == truth).mean() >= TARGET:
                return number
        row = found.worth[0] if ordered else next(row for row in drawn if codes[row] < 0)
        codes[row] = truth[row]
    return len(truth)


def most_helpful(
    unit: NDArray[np.float32], truth: NDArray[np.int64], labels: int, draw: int
) -> tuple[bool, bool] | None:
    """Whether more labels of the least recognised class help most, and of the one with the fewest; None for too few."""
    rng, classes = np.random.default_rng(draw), int(truth.max() + 1)
    share = rng.dirichlet(np.full(classes, 2.0))
    wanted = np.minimum(np.rint(share * labels), 0.6 * np.bincount(truth)).astype(int)
    own = np.concatenate([rng.choice(np.flatnonzero(truth == c), n, replace=False) for c, n in enumerate(wanted)])
    if wanted.min() < 3:
        return None
    held = InstantRidge.fit(unit[own], truth[own], classes).held_out.argmax(axis=1) == truth[own]
    recall = [held[truth[own] == c].mean() for c in range(classes)]
    rest, right = np.setdiff1d(np.arange(len(truth)), own), np.zeros(classes)
    for _ in range(6):
        more = [
            rng.choice(rest[truth[rest] == c], min(MORE, (truth[rest] == c).sum() // 2), False) for c in range(classes)
        ]
        query = np.setdiff1d(rest, np.concatenate(more))
        for c in range(classes):
            rows = np.concatenate([own, more[c]])
            named = InstantRidge.fit(unit[rows], truth[rows], classes).probabilities(unit[query]).argmax(axis=1)
            right[c] += (named == truth[query]).mean()
    return bool(np.argmin(recall) == right.argmax()), bool(wanted.argmin() == right.argmax())


if __name__ == "__main__":
    main()
