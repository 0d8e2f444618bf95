#!/usr/bin/env python3
"""How many foreign photos a model calls unknown, and at what price in own ones: every set against all others.

    python scripts/bench_unknown.py STORE STORE [STORE ...] [--each 5 10 50] [--draws 5] [--out data/bench/unknown.json]

Each STORE holds the features of one image set. A model is made of so many different images of each class (all of a
smaller class), by ``featx fit``'s own code at --max-unknown 0.05, and judged on the other images of its set and on
those of every other set. Classes that two sets share by name (*cats* and *cat*) are foreign to neither. Printed: the
table of all pairs, means over draws; the share of own photos that it had not seen; a class left out in turn; how often
it abstains for either reason; and, beside the score that featx takes (knn), those that it was chosen from, on the same
draws: class-wise and common Mahalanobis with a shrunken covariance, and the residual to the principal subspace. Their
sources are named in ``featx/models/novelty.py``.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from threadpoolctl import threadpool_limits

from featx._files import publish_bytes
from featx.evaluation.duplicates import find_duplicates
from featx.heads import fold_numbers, unit_rows
from featx.models.fit import fit_head
from featx.models.novelty import N_NEAREST, is_unknown, shares_among
from featx.store import FeatureSet, read_features

ASKED = 0.05
MOST = 600
"""Images of each set that are looked at, drawn at random."""

Rows = NDArray[np.float64]
Score = Callable[[Rows, NDArray[np.integer]], Callable[[Rows], NDArray[np.float64]]]
"""From unit rows (n, d) and labels (n,) to what says how strange rows (m, d) are, (m,)."""


def knn(rows: Rows, labels: NDArray[np.integer]) -> Callable[[Rows], NDArray[np.float64]]:
    k = min(N_NEAREST, len(rows) - 1)
    return lambda new: -np.sort(new @ rows.T, axis=1)[:, -k:].mean(axis=1)


def mahalanobis(shrink: float, *, common: bool, most: int | None = None) -> Score:
    """With the covariance ``(1 - shrink) S + shrink tr(S)/d I``, of which at most so many directions are kept."""

    def fit(rows: Rows, labels: NDArray[np.integer]) -> Callable[[Rows], NDArray[np.float64]]:
        groups = np.zeros(len(rows), dtype=np.intp) if common else np.unique(labels, return_inverse=True)[1]
        means = np.stack([rows[groups == g].mean(axis=0) for g in range(groups.max() + 1)])
        _, lengths, axes = np.linalg.svd(rows - means[groups], full_matrices=False)
        variance = lengths**2 / max(len(rows) - len(means), 1)
        base = shrink * variance.sum() / rows.shape[1]
        used = np.flatnonzero(variance > 1e-9 * variance[0])[:most]
        weight = 1 / ((1 - shrink) * variance[used] + base) - 1 / base

        def strange(new: Rows) -> NDArray[np.float64]:
            each = [((new - m) ** 2).sum(axis=1) / base + ((new - m) @ axes[used].T) ** 2 @ weight for m in means]
            return np.asarray(np.min(each, axis=0))

        return strange

    return fit


def residual(rows: Rows, labels: NDArray[np.integer]) -> Callable[[Rows], NDArray[np.float64]]:
    """What the directions that hold seven tenths of the variance leave."""
    mean = rows.mean(axis=0)
    _, lengths, axes = np.linalg.svd(rows - mean, full_matrices=False)
    kept = np.searchsorted(np.cumsum(lengths**2) / np.sum(lengths**2), 0.7) + 1
    axes = axes[: min(kept, max(1, len(rows) // 2))]
    return lambda new: ((new - mean) ** 2).sum(axis=1) - (((new - mean) @ axes.T) ** 2).sum(axis=1)


SCORES: dict[str, Score] = {
    "knn": knn,
    "mahalanobis by class": mahalanobis(0.5, common=False),
    "mahalanobis common": mahalanobis(0.5, common=True, most=64),
    "residual": residual,
}


class Photos:
    """A set: unit rows, and which images a model may be made of."""

    def __init__(self, features: FeatureSet) -> None:
        use = np.flatnonzero(features.labels >= 0)
        use = np.sort(np.random.default_rng(0).permutation(use)[:MOST])
        self.raw = features.embeddings[use].astype(np.float64)
        self.rows = unit_rows(self.raw, "l2")
        self.labels = features.labels[use]
        self.names = tuple(features.class_names)
        self.groups = find_duplicates(self.raw, features.copies[use], by=features.near_copies_of(use)).groups

    def draw(self, each: int, rng: np.random.Generator) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """So many different images of each class, and all images that are no copies of them."""
        order = rng.permutation(len(self.rows))
        order = order[np.sort(np.unique(self.groups[order], return_index=True)[1])]
        taken = [order[self.labels[order] == c][:each] for c in np.unique(self.labels)]
        support = np.sort(np.concatenate(taken))
        return support, np.flatnonzero(~np.isin(self.groups, self.groups[support]))

    def foreign_to(self, other: Photos) -> NDArray[np.bool_]:
        known = {plain(name) for name in other.names}
        return np.array([plain(name) not in known for name in self.names])[self.labels]


def plain(name: str) -> str:
    """A class's name without its number."""
    return name.casefold().rstrip("s")


def auroc(own: NDArray[np.float64], foreign: NDArray[np.float64]) -> float:
    ranks = rankdata(np.concatenate([own, foreign]))[len(own) :]
    return float((ranks.sum() - len(foreign) * (len(foreign) + 1) / 2) / (len(own) * len(foreign)))


def compared(score: Score, photos: Photos, support: NDArray[np.intp], own: NDArray[np.intp], seed: int) -> Any:
    """What a score finds strange: ``judge(rows)`` gives shares (n,), and scores (n,); by ten folds."""
    rows, labels = photos.rows[support], photos.labels[support]
    folds = fold_numbers(np.zeros(len(rows), dtype=np.intp), np.arange(len(rows)), 10, seed)
    held = np.zeros(len(rows))
    for fold in np.unique(folds):
        out = folds == fold
        held[out] = score(rows[~out], labels[~out])(rows[out])
    strange, ranked = score(rows, labels), np.sort(-held)

    def judge(new: Rows) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        found = strange(new)
        return is_unknown(shares_among(ranked, -found), ASKED), found

    return judge


def one(sets: dict[str, Photos], name: str, each: int, seed: int) -> dict[str, Any]:
    """One draw from one set: shares refused, by score and foreign set."""
    photos = sets[name]
    support, own = photos.draw(each, np.random.default_rng(seed))
    foreign = {other: p.foreign_to(photos) for other, p in sets.items() if other != name}
    foreign = {other: which for other, which in foreign.items() if which.any()}
    found: dict[str, Any] = {"scores": {}}
    for label, score in SCORES.items():
        judge = compared(score, photos, support, own, seed)
        refused, strange = judge(photos.rows[own])
        pairs = {}
        for other, which in foreign.items():
            gone, far = judge(sets[other].rows[which])
            pairs[other] = {"refused": float(gone.mean()), "auroc": auroc(strange, far) if len(own) else None}
        found["scores"][label] = {"own": float(refused.mean()) if len(own) else None, "pairs": pairs}
    names = [photos.names[c] for c in np.unique(photos.labels)]
    dense = np.unique(photos.labels[support], return_inverse=True)[1]
    fitted = fit_head(photos.raw[support], dense, class_names=names, max_unknown=ASKED, random_state=seed)
    assert fitted.familiarity is not None

    def abstains(rows: Rows) -> tuple[float, float]:
        unknown = is_unknown(fitted.familiarity.shares(rows), ASKED)  # type: ignore[union-attr]
        scores = fitted.sharpness * fitted.scorer.scores(rows) if fitted.sharpness else np.zeros((len(rows), 2))
        power = np.exp(scores - scores.max(axis=1, keepdims=True))
        unsure = power.max(axis=1) / power.sum(axis=1) < (2 if fitted.threshold is None else fitted.threshold)
        return float(unknown.mean()), float((unknown | unsure).mean())

    found["own"] = abstains(photos.raw[own]) if len(own) else None
    found["pairs"] = {other: abstains(sets[other].raw[which]) for other, which in foreign.items()}
    left = (fitted.metrics["unknown"] or {}).get("class_left_out")
    found["left_out"] = left and left["mean"]
    return found


def mean(values: Any) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def tell(sets: dict[str, Photos], each: int, draws: dict[str, list[dict[str, Any]]]) -> None:
    """The tables of one number of images a class."""
    print(f"\n{each} images of each class, --max-unknown {ASKED:g}: % refused as unknown (abstained for any reason)")
    width = max(map(len, sets)) + 2
    print(" " * width + "".join(f"{name:>18}" for name in sets) + f"{'own, unseen':>18}{'class left out':>18}")
    for name, found in draws.items():
        cells = []
        for other in (*sets, "own"):
            both = [d["own"] if other == "own" else d["pairs"].get(other) for d in found]
            both = [b for b in both if b is not None]
            cells.append(
                f"{100 * mean(b[0] for b in both):.1f} ({100 * mean(b[1] for b in both):.1f})" if both else "-"
            )
        left = mean(d["left_out"] for d in found)
        print(f"{name:{width}}" + "".join(f"{cell:>18}" for cell in cells) + f"{100 * left:>18.1f}")
    shipped = [mean(d["pairs"][other][0] for d in found) for found in draws.values() for other in found[0]["pairs"]]
    price = [mean(d["own"] and d["own"][0] for d in found) for found in draws.values()]
    print(f"\nMean of all pairs {100 * mean(shipped):.1f} %, worst pair {100 * min(shipped):.1f} %, ", end="")
    print(f"own {100 * mean(x for x in price if x == x):.1f} %, worst own {100 * np.nanmax(price):.1f} %.")
    print(f"\n{'score, by ten folds':24}{'mean':>8}{'worst pair':>12}{'AUROC':>8}{'own':>8}{'worst own':>11}")
    for label in SCORES:
        pairs: dict[tuple[str, str], list[dict[str, float]]] = {}
        own = []
        for name, found in draws.items():
            own.append(mean(d["scores"][label]["own"] for d in found))
            for d in found:
                for other, pair in d["scores"][label]["pairs"].items():
                    pairs.setdefault((name, other), []).append(pair)
        refused = {key: mean(p["refused"] for p in each) for key, each in pairs.items()}
        area = mean(mean(p["auroc"] for p in each) for each in pairs.values())
        print(
            f"{label:24}{100 * mean(refused.values()):8.1f}{100 * min(refused.values()):12.1f}{area:8.3f}"
            f"{100 * mean(x for x in own if x == x):8.1f}{100 * np.nanmax(own):11.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="+", type=Path, metavar="STORE")
    parser.add_argument("--each", type=int, nargs="+", default=[5, 10, 50])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("data/bench/unknown.json"))
    asked = parser.parse_args()
    sets = {store.name.removesuffix(".featx"): Photos(read_features(store)) for store in asked.stores}
    told: dict[str, Any] = {"machine": platform.platform(), "date": str(date.today()), "max_unknown": ASKED}
    with threadpool_limits(limits=1):
        for each in asked.each:
            draws = {name: [one(sets, name, each, seed) for seed in range(asked.draws)] for name in sets}
            tell(sets, each, draws)
            told[str(each)] = draws
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    publish_bytes(asked.out, json.dumps(told, indent=1).encode())
    print(f"\n{asked.out}")


if __name__ == "__main__":
    main()
