#!/usr/bin/env python3
"""What views and layers add to the best peer's protocol, on several sets of photos of your own.

    python scripts/bench_layers.py SET [SET ...] [--out data/bench/layers.json] [--episodes 10] [--images 100]

Each SET is a folder of class folders. It is extracted twice, into stores beside the result: one centre crop, and the
views; both with the layers that ``featx layers`` suggests. Then, on the same draws:

- peer: L2-normalised, LinearSVC, cost by 3-fold cross-validation (VISSL), on one centre crop and the penultimate layer;
- auto: featx's recommended head on the same;
- views, layers, both: auto on the mean of the views, on the combined layers, and on both.

Differences are paired by draw; intervals (95 %) take data sets as fixed and draws as the unit. A set that was done is
kept in the result and not repeated, so the script can be stopped and run again.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from bench_heads import vissl
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from featx._arrays import COMBINED
from featx._files import publish_bytes
from featx.backbones.backbone import load_backbone
from featx.backbones.frozen import describe_layers
from featx.evaluation.duplicates import find_duplicates
from featx.evaluation.splits import KShotSplit
from featx.extraction.run import extract_features
from featx.heads.catalogue import HEADS, Head
from featx.heads.layers import read_layers
from featx.heads.selection import fit_chosen
from featx.images.source import ImageSet
from featx.images.views import parse_views

SHOTS = (5, 10, 20)
WAYS = ("peer", "auto", "views", "layers", "both")
Rows = NDArray[np.float32]


def suggested_layers(backbone: str) -> tuple[str, ...]:
    """What ``featx layers`` suggests."""
    infos = describe_layers(load_backbone(backbone, weights="none").network())
    return tuple(info.name for info in infos if info.suggested)


def some_of(images: ImageSet, each: int, least: int = 400) -> ImageSet:
    """At most so many images of each class (more of few classes, so that there are ``least``), drawn by chance."""
    each = max(each, least // max(len(images.class_names), 1))
    order = np.random.default_rng(0).permutation(len(images.refs))
    kept: dict[str, list[int]] = {}
    for i in order.tolist():
        label = images.refs[i].label
        if label is not None and len(kept.setdefault(label, [])) < each:
            kept[label].append(i)
    chosen = sorted(i for rows in kept.values() for i in rows)
    return replace(images, refs=tuple(images.refs[i] for i in chosen))


def extract(folder: Path, stores: Path, backbone: Any, views: tuple[str, ...], each: int) -> dict[str, Any]:
    """Both stores of a set; returns their paths and the seconds that each took."""
    images = some_of(ImageSet.from_folder(folder), each)
    out: dict[str, Any] = {"images": len(images)}
    for name, looks in (("center", ("center",)), ("views", views)):
        started = time.perf_counter()
        extract_features(images, backbone, stores / f"{folder.name}.{name}.featx", views=looks)
        out[f"{name}_seconds"] = round(time.perf_counter() - started, 1)
    return out


def one(
    data: dict[str, Rows], heads: dict[str, Head], labels: Any, groups: Any, n_shots: int, episode: int
) -> dict[str, float]:
    """Accuracy of every way on one draw, in points."""
    support, query = KShotSplit(n_shots).episode(labels, groups, episode)
    local = np.unique(groups[support], return_inverse=True)[1]
    out = {}
    with threadpool_limits(1, user_api="blas"):
        for way, head in heads.items():
            rows = head.seen(data[way])
            if way == "peer" and n_shots > 1:  # one image a class leaves its cross-validation nothing to hold out
                with warnings.catch_warnings():
                    # Its own settings stop liblinear short of the optimum: part of the protocol that is compared.
                    warnings.filterwarnings("ignore", "Liblinear failed to converge", ConvergenceWarning)
                    model = vissl(rows[support].astype(np.float64), labels[support])
            else:
                model = fit_chosen(head, rows[support], labels[support], local, random_state=[0, episode])[1]
            out[way] = 100 * float((model.predict(rows[query]) == labels[query]).mean())
    return out


def accuracies(
    data: dict[str, Rows], heads: dict[str, Head], labels: Any, groups: Any, shots: Sequence[int], episodes: int,
    n_jobs: int,
) -> dict[str, list[list[float]]]:  # fmt: skip
    """Accuracies [shots][episode] of each way, in points."""
    tasks = [(n, e) for n in shots for e in range(episodes)]
    done = joblib.Parallel(n_jobs)(joblib.delayed(one)(data, heads, labels, groups, *task) for task in tasks)
    table = dict(zip(tasks, done, strict=True))
    return {way: [[table[n, e][way] for e in range(episodes)] for n in shots] for way in heads}


def measure(folder: Path, stores: Path, episodes: int, n_jobs: int) -> dict[str, list[list[float]]]:
    """Accuracies [shots][episode] of each way on a set."""
    center, layers = read_layers(stores / f"{folder.name}.center.featx")
    views, _ = read_layers(stores / f"{folder.name}.views.featx")
    if not np.array_equal(center.digests, views.digests):
        raise SystemExit(f"{folder.name}: the two stores are not of the same images; delete them")
    plain, combined = layers.on(HEADS["auto"], layers.reference), layers.on(HEADS["auto"], COMBINED)
    data = {way: (views if way in ("views", "both") else center).embeddings for way in WAYS}
    heads = {way: combined if way in ("layers", "both") else plain for way in WAYS}
    groups = find_duplicates(plain.seen(center.embeddings), center.copies).groups
    return accuracies(data, heads, center.labels, groups, SHOTS, episodes, n_jobs)


def report(sets: dict[str, Any], ways: Sequence[str], reference: str, shots: Sequence[int]) -> dict[str, Any]:
    """Print accuracies and differences to one way; the differences as plain numbers."""
    cube = {way: np.array([sets[name]["accuracy"][way] for name in sets]) for way in ways}  # (sets, shots, episodes)
    print(f"\n{'accuracy %':<10}" + "".join(f"{n:>8}" for n in shots) + f"{'mean':>8}   by data set")
    for way in ways:
        each = ", ".join(f"{name} {row.mean():.2f}" for name, row in zip(sets, cube[way], strict=True))
        means = "".join(f"{mean:8.2f}" for mean in cube[way].mean(axis=(0, 2)))
        print(f"{way:<10}{means}{cube[way].mean():8.2f}   {each}")
    out: dict[str, Any] = {}
    print(f"\n{'minus ' + reference:<10}" + "".join(f"{n:>15}" for n in shots) + f"{'all':>15}   by data set")
    for way in ways:
        if way == reference:
            continue
        gap = cube[way] - cube[reference]
        by_shots = [interval(gap[:, i]) for i in range(len(shots))]
        by_set = {name: interval(gap[i].mean(axis=0)[None]) for i, name in enumerate(sets)}
        whole = interval(gap.mean(axis=1))
        cells = "".join(f"{f'{mean:+.2f} ± {half:.2f}':>15}" for mean, half in (*by_shots, whole))
        print(f"{way:<10}{cells}   " + ", ".join(f"{n} {mean:+.2f} ± {half:.2f}" for n, (mean, half) in by_set.items()))
        out[way] = {"by_shots": by_shots, "by_set": by_set, "all": whole}
    return out


def interval(gap: NDArray[np.float64]) -> tuple[float, float]:
    """Mean of differences (sets, episodes), and half of its 95 % interval: that of a stratified mean."""
    error = np.sqrt((gap.var(axis=1, ddof=1) / gap.shape[1]).sum()) / len(gap)
    return round(float(gap.mean()), 3), round(float(1.96 * error), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("sets", nargs="+", type=Path, metavar="SET")
    parser.add_argument("--out", type=Path, default=Path("data/bench/layers.json"))
    parser.add_argument("--episodes", type=int, default=10, help="at least 2, for intervals")
    parser.add_argument("--images", type=int, default=100, help="of each class, at most (or 400 in all)")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--views", default="center,flip,full,full-flip,zoom")
    parser.add_argument("--layer", action="append", help="instead of the suggested ones; may be repeated")
    parser.add_argument("--n-jobs", type=int, default=joblib.cpu_count())
    options = parser.parse_args()
    if options.episodes < 2:
        parser.error("--episodes: at least 2, for intervals")
    views = parse_views(options.views)
    layers = tuple(options.layer or suggested_layers(options.backbone))
    plan = {
        "backbone": options.backbone, "views": list(views), "layers": list(layers), "episodes": options.episodes,
        "images_a_class": options.images, "shots": list(SHOTS),
    }  # fmt: skip
    stores = options.out.parent / "layers"
    stores.mkdir(parents=True, exist_ok=True)
    kept = json.loads(options.out.read_text()) if options.out.is_file() else {}
    sets = kept["sets"] if kept.get("plan") == plan else {}
    backbone = load_backbone(options.backbone, layers=layers)
    for folder in options.sets:
        if folder.name in sets:
            continue
        told = extract(folder, stores, backbone, views, options.images)
        print(f"{folder.name}: {told}", flush=True)
        sets[folder.name] = {**told, "accuracy": measure(folder, stores, options.episodes, options.n_jobs)}
        publish_bytes(options.out, json.dumps({"plan": plan, "sets": sets}, indent=1).encode() + b"\n")
    found = report({folder.name: sets[folder.name] for folder in options.sets}, WAYS, "peer", SHOTS)
    publish_bytes(options.out, json.dumps({"plan": plan, "sets": sets, "minus_peer": found}, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
