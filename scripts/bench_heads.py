#!/usr/bin/env python3
"""The recommended head against what other tools do, on the same embeddings and the same draws.

    python scripts/bench_heads.py STORE [STORE ...] [--episodes 20] [--n-jobs 2] [--max-query 1000] [--unlabelled]

Peers are written as their projects have them. Differences are paired: featx minus the peer on the same
support and query, with 95 % intervals over data sets and draws.

With ``--unlabelled`` half of each store's images, drawn by chance, lose their labels and are the pool of a second head;
supports and queries, of all heads, are from the other half.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.svm import SVC, LinearSVC
from threadpoolctl import threadpool_limits

from featx import stats
from featx.centre import unlabelled_centre
from featx.choose import choose
from featx.heads import HEADS, Catalogue
from featx.splits import KShotSplit, find_duplicates
from featx.store import read_features
from featx.unlabelled import heads_for

SHOTS = (1, 2, 5, 10, 20)
Rows = NDArray[np.float64]
Fit = Callable[[Rows, Any], Any]


def mteb(rows: Rows, labels: Any) -> Any:
    """MTEB, MIEB: logistic regression on raw embeddings as it comes."""
    return LogisticRegression(C=1.0, max_iter=100).fit(rows, labels)


def clip(rows: Rows, labels: Any) -> Any:
    """CLIP's README."""
    return LogisticRegression(C=0.316, max_iter=1000).fit(rows, labels)


def autogluon(rows: Rows, labels: Any) -> Any:
    """AutoGluon's few-shot SVM."""
    return make_pipeline(StandardScaler(), SVC(gamma="auto")).fit(rows, labels)


def vissl(rows: Rows, labels: Any) -> Any:
    """VISSL: costs by 3-fold cross-validation; below three shots that has no folds, and the cost is 1."""
    model = make_pipeline(Normalizer(), LinearSVC(loss="squared_hinge"))
    if np.bincount(labels).min() < 3:
        return model.fit(rows, labels)
    return GridSearchCV(model, {"linearsvc__C": [0.01, 0.1, 1.0, 10.0, 100.0, 1000.0]}, cv=3).fit(rows, labels)


def dinov2(rows: Rows, labels: Any) -> Any:
    """DINOv2, Kornblith: 45 penalties on a stratified hold-out, then a refit; one shot has no hold-out: C=1."""
    model, n_classes = LogisticRegression(max_iter=1000), int(labels.max()) + 1
    if np.bincount(labels).min() < 2:
        return model.fit(rows, labels)
    held = max(n_classes, round(0.2 * len(labels)))
    ((train, test),) = StratifiedShuffleSplit(1, test_size=held, random_state=0).split(rows, labels)
    grid = 10 ** np.linspace(-6, 5, 45)
    scores = [
        clone(model).set_params(C=c).fit(rows[train], labels[train]).score(rows[test], labels[test]) for c in grid
    ]
    return clone(model).set_params(C=grid[int(np.argmax(scores))]).fit(rows, labels)


def simpleshot(rows: Rows, labels: Any) -> Any:
    """SimpleShot: centred by the support, unit length, nearest centroid."""
    return make_pipeline(StandardScaler(with_std=False), Normalizer(), NearestCentroid()).fit(rows, labels)


PEERS: dict[str, Fit] = {
    "MTEB": mteb, "CLIP": clip, "AutoGluon": autogluon, "VISSL": vissl, "DINOv2": dinov2, "SimpleShot": simpleshot,
}  # fmt: skip


def auto(catalogue: Catalogue, rows: Rows, labels: Any) -> Any:
    """What ``featx sweep --heads auto`` does."""
    head = catalogue["auto"]
    choice = choose(head, rows, labels, np.arange(len(labels)))
    return head.build(**choice.params).fit(rows, labels)


def one(
    data: tuple[Rows, Any, Any],
    ours: dict[str, Catalogue],
    n_shots: int,
    episode: int,
    max_query: int,
    peers: list[str],
) -> dict[str, tuple[float, float]]:
    """Accuracy and calibration error of every head on one draw, in points."""
    rows, labels, groups = data
    out = {}
    with threadpool_limits(1, user_api="blas"), warnings.catch_warnings():
        support, query = KShotSplit(n_shots).episode(labels, groups, episode)
        query = np.random.default_rng(episode).permutation(query)[:max_query]
        fits: dict[str, Fit] = {name: partial(auto, catalogue) for name, catalogue in ours.items()}
        for name, fit in {**fits, **{peer: PEERS[peer] for peer in peers}}.items():
            # The peers' own settings stop short of the optimum: part of what is measured. Ours may not.
            warnings.simplefilter("ignore" if name in peers else "default")
            model = fit(rows[support], labels[support])
            right = model.predict(rows[query]) == labels[query]
            has = hasattr(model, "predict_proba") and name != "SimpleShot"
            ece = (
                stats.expected_calibration_error(model.predict_proba(rows[query]).max(axis=1), right) if has else np.nan
            )
            out[name] = (100 * float(right.mean()), 100 * ece)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("stores", nargs="+", type=Path)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--n-jobs", type=int, default=joblib.cpu_count())
    parser.add_argument("--max-query", type=int, default=1000, help="query images of a draw, at most")
    parser.add_argument("--shots", nargs="+", type=int, choices=SHOTS, default=SHOTS)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    parser.add_argument("--unlabelled", action="store_true", help="a second head, with half of the images as its pool")
    options = parser.parse_args()
    scores, ece = {}, {}
    shots = [n for n in SHOTS if n in options.shots]
    for path in options.stores:
        features = read_features(path)
        known = features.labels >= 0
        rows, labels = features.embeddings[known].astype(np.float64), features.labels[known]
        digests = np.unique(features.digests[known], axis=0, return_inverse=True)[1].reshape(-1)
        groups = find_duplicates(rows, digests).groups
        ours: dict[str, Catalogue] = {"featx": HEADS}
        if options.unlabelled:
            pooled = (np.random.default_rng(0).random(groups.max() + 1) < 0.5)[groups]
            ours["featx+pool"] = heads_for(unlabelled_centre(rows[pooled]), rows[pooled])
            rows, labels, groups = rows[~pooled], labels[~pooled], np.unique(groups[~pooled], return_inverse=True)[1]
        data = (rows, labels, groups)
        tasks = [(n, e) for n in shots for e in range(options.episodes)]
        done = joblib.Parallel(options.n_jobs)(
            joblib.delayed(one)(data, ours, n, e, options.max_query, options.peers) for n, e in tasks
        )
        for task, found in zip(tasks, done, strict=True):
            for name, (right, gap) in found.items():
                scores[path.name, name, *task], ece[path.name, name, *task] = right, gap
        print(f"done: {path.name}", flush=True)
    for name in ours:
        report(scores, ece, [path.name for path in options.stores], name, options.peers, shots, options.episodes)


def report(
    scores: dict[Any, float],
    ece: dict[Any, float],
    stores: list[str],
    ours: str,
    peers: list[str],
    shots: list[int],
    episodes: int,
) -> None:
    """Accuracy and calibration of a head of featx and of the peers; its calibration by store; it minus each peer."""
    names = [ours, *peers]

    def cube(values: dict[Any, float], name: str) -> NDArray[np.float64]:
        return np.array([[[values[s, name, n, e] for e in range(episodes)] for n in shots] for s in stores])

    print(f"\n{'accuracy %':<12}" + "".join(f"{n:>8}" for n in shots) + f"{'mean':>8}   ECE by shots")
    for name in names:
        means = cube(scores, name).mean(axis=(0, 2))
        gaps = cube(ece, name).mean(axis=(0, 2))
        shown = "none" if np.isnan(gaps).all() else " ".join(f"{gap:5.1f}" for gap in gaps)
        print(f"{name:<12}" + "".join(f"{m:8.2f}" for m in means) + f"{means.mean():8.2f}   {shown}")
    print(f"\n{'ECE of ' + ours:<20}" + "".join(f"{n:>8}" for n in shots))
    for store, row in zip(stores, cube(ece, ours).mean(axis=2), strict=True):
        print(f"{store:<20}" + "".join(f"{gap:8.1f}" for gap in row))
    print(f"\n{ours + ' minus':<17}" + "".join(f"{n:>15}" for n in shots) + f"{'all':>15}   by data set")
    for name in peers:
        gap = cube(scores, ours) - cube(scores, name)
        # Draws are the unit, data sets are fixed: the mean over data sets has the variance of a stratified mean.
        error = np.sqrt(gap.var(axis=2, ddof=1).sum(axis=0) / episodes) / len(stores)
        cells = [f"{m:+7.2f} ± {1.96 * s:4.2f}" for m, s in zip(gap.mean(axis=(0, 2)), error, strict=True)]
        # Draws are nested in shots, so their mean over shots is the unit for all of them together.
        whole = np.sqrt((gap.mean(axis=1).var(axis=1, ddof=1) / episodes).sum()) / len(stores)
        cells.append(f"{gap.mean():+7.2f} ± {1.96 * whole:4.2f}")
        by_store = gap.mean(axis=(1, 2))
        each = ", ".join(f"{store} {mean:+.2f}" for store, mean in zip(stores, by_store, strict=True))
        print(f"{name:<17}" + "".join(f"{cell:>15}" for cell in cells) + f"   {each}")


if __name__ == "__main__":
    main()
