#!/usr/bin/env python3
"""What unequal classes cost, how large sets of labels are, and whether counts of a pile hold.

    python scripts/bench_unequal.py STORE [STORE ...] [--draws 10] [--out data/bench/unequal.json]

Each STORE holds the features of one image set. Printed:

1. Shares: every head on 40 images of each second class and 8 of the others, judged where all are equally common, as it
   is fitted by default and with ``--prior equal``: balanced accuracy, and what the fit itself had said.
2. Sets: a model of 10 and of 50 images of each class, its sets at a coverage of 90 % on all other images: how many
   hold the truth, how large they are, and what the fit had said; beside those without the penalty on ranks.
3. Counts: piles of 20,000 simulated photos, of which some are checked: how often the interval at 95 % holds the true
   share of a class and how wide it is, beside the normal interval of prediction-powered inference and the exact one of
   the checked photos alone. This needs no store.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

import featx.models.sets as sets_of_labels
from featx._files import publish_bytes
from featx.evaluation import checked_share
from featx.evaluation.stats import balanced_accuracy
from featx.heads import HEADS, softmax
from featx.models.fit import fit_head
from featx.models.prior import Prior
from featx.models.sets import label_sets
from featx.store import FeatureSet, read_features

COVERAGE = 0.9


def drawn(features: FeatureSet, sizes: dict[int, int], seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows to learn from, so many of each class, and all other rows; copies are on neither side twice."""
    one = np.unique(features.copies, return_index=True)[1]
    order = np.random.default_rng(seed).permutation(one[features.labels[one] >= 0])
    learn = np.concatenate([order[features.labels[order] == c][:n] for c, n in sizes.items()])
    return np.random.default_rng(seed).permutation(learn), np.setdiff1d(order, learn)


def shares(features: FeatureSet, draws: int) -> Iterator[dict[str, Any]]:
    """The first table, a row a head."""
    classes = range(len(features.class_names))
    for head in HEADS:
        rows: dict[str, list[float]] = {name: [] for name in ("as_is", "equal", "told")}
        for seed in range(draws):
            learn, judge = drawn(features, {c: 8 if c % 2 else 40 for c in classes}, seed)
            priors: tuple[tuple[Prior, str], ...] = ((None, "as_is"), ("equal", "equal"))
            for prior, name in priors:
                fitted = fit_head(
                    features.embeddings[learn], features.labels[learn], class_names=features.class_names, heads=[head],
                    max_unknown=0, prior=prior,
                )  # fmt: skip
                named = fitted.scorer.scores(features.embeddings[judge]).argmax(axis=1)
                rows[name].append(balanced_accuracy(features.labels[judge], named))
            rows["told"].append(fitted.metrics["out_of_fold"]["accuracy"]["mean"])
        yield {"head": head, **{name: float(np.mean(values)) for name, values in rows.items()}}


def sets(features: FeatureSet, draws: int) -> Iterator[dict[str, Any]]:
    """The second table, a row a number of images."""
    for each in (10, 50):
        rows: dict[str, list[float]] = {
            name: [] for name in ("held", "size", "told", "told_size", "plain_size", "right")
        }
        for seed in range(draws):
            learn, judge = drawn(features, dict.fromkeys(range(len(features.class_names)), each), seed)
            if len(judge) < 50:
                continue
            labels = features.labels[learn]
            fitted = fit_head(features.embeddings[learn], labels, class_names=features.class_names, max_unknown=0)
            assert fitted.conformity is not None and fitted.sharpness is not None
            chances = softmax(fitted.scorer.scores(features.embeddings[judge]), fitted.sharpness)
            truth = features.labels[judge]
            found = label_sets(chances, fitted.conformity.limit(COVERAGE))
            rows["held"].append(float(found[np.arange(len(truth)), truth].mean()))
            rows["size"].append(float(found.sum(axis=1).mean()))
            rows["right"].append(float((chances.argmax(axis=1) == truth).mean()))
            told = fitted.metrics["out_of_fold"]["sets"]
            rows["told"].append(told["coverage"]["mean"])
            rows["told_size"].append(told["mean_size"])
            rows["plain_size"].append(_without_penalty(features, learn, chances, seed))
        if rows["held"]:
            yield {"each": each, **{name: float(np.mean(values)) for name, values in rows.items()}}


def _without_penalty(features: FeatureSet, learn: NDArray[np.intp], chances: NDArray[np.float64], seed: int) -> float:
    """Size of the sets of plain APS, by a fit of its own."""
    kept, sets_of_labels.PENALTY = sets_of_labels.PENALTY, 0.0
    try:
        fitted = fit_head(
            features.embeddings[learn], features.labels[learn], class_names=features.class_names, max_unknown=0
        )
        assert fitted.conformity is not None
        return float(label_sets(chances, fitted.conformity.limit(COVERAGE)).sum(axis=1).mean())
    finally:
        sets_of_labels.PENALTY = kept


def counts(piles: int) -> Iterator[dict[str, Any]]:
    """The third table, a row a kind of pile."""
    size, nobody = 20_000, np.zeros(20_000, dtype=bool)
    for share in (0.01, 0.1, 0.4):
        for recall, false in ((0.95, 0.005), (0.7, 0.02)):
            for n in (100, 400):
                held, width = np.zeros(3), np.zeros(3)
                for seed in range(piles):
                    rng = np.random.default_rng(seed)
                    truth = np.arange(size) < share * size
                    named = np.where(truth, rng.random(size) < recall, rng.random(size) < false)
                    rows = rng.permutation(size)[:n]
                    mine, alone = (checked_share(each, rows, truth[rows]) for each in (named, nobody))
                    for i, (low, high) in enumerate(
                        ((mine.low, mine.high), normal(truth[rows], named, rows), (alone.low, alone.high))
                    ):
                        held[i] += low <= share <= high
                        width[i] += high - low
                names = ("featx", "normal", "alone")
                yield {
                    "share": share, "recall": recall, "false": false, "checked": n,
                    **{f"held_{name}": value / piles for name, value in zip(names, held.tolist(), strict=True)},
                    **{f"width_{name}": value / piles for name, value in zip(names, width.tolist(), strict=True)},
                }  # fmt: skip


def normal(truth: NDArray[np.bool_], named: NDArray[np.bool_], rows: NDArray[np.intp]) -> tuple[float, float]:
    """The interval of PPI++ with tuned power."""
    y, f, n, size = truth.astype(float), named[rows].astype(float), len(rows), len(named)
    spread = float(named.var())
    power = float(np.cov(y, f)[0, 1] / ((1 + n / size) * spread)) if spread else 0.0
    mean = power * float(named.mean()) + float((y - power * f).mean())
    half = float(norm.ppf(0.975)) * math.sqrt((y - power * f).var(ddof=1) / n + power**2 * spread / size)
    return mean - half, mean + half


def table(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    if not rows:
        return
    print("  ".join(rows[0]))
    for row in rows:
        print(
            "  ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()), flush=True
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="*", type=Path)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--piles", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"draws": options.draws, "piles": options.piles, "sets": {}, "shares": {}}
    for store in options.stores:
        features, name = read_features(store), store.name.removesuffix(".featx")
        print(f"\n{name}: shares")
        found["shares"][name] = list(shares(features, options.draws))
        table(found["shares"][name])
        print(f"\n{name}: sets")
        found["sets"][name] = list(sets(features, options.draws))
        table(found["sets"][name])
    if options.piles:
        print("\ncounts")
        found["counts"] = list(counts(options.piles))
        table(found["counts"])
    if options.out:
        publish_bytes(options.out, json.dumps(found, indent=2).encode())


if __name__ == "__main__":
    main()
