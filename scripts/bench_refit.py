#!/usr/bin/env python
"""How often batches of corrections are promoted: right ones, ones with shuffled labels, and ones that are all errors.

A 5-shot model of each store gets 10 corrections a class, by default 20 times with other images each. "right" are images
drawn at random with their labels; "shuffled" the same with the labels permuted; "errors" those that the model gets
wrong, with their labels, and "errors, shuffled" those permuted; "one class" are images of all classes called the first
one. Beside it: accuracy on all other images before, after, and with as many shots drawn at once.

    python scripts/bench_refit.py hymenoptera.featx dtd10.featx

``--time PHOTOS`` instead takes the time of ``featx refit``, from its start to its end: a model of the store, with the
photos of a folder of class folders as corrections. ``--before PYTHON`` does the same in turns with the featx of another
virtual environment.

    python scripts/bench_refit.py joined.featx --time new_photos
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from featx._arrays import Index
from featx.models.corrections import Corrections
from featx.models.fit import FittedHead, fit_features
from featx.models.refit import Compared, compare
from featx.store import FeatureSet, read_features

KINDS = ("right", "shuffled", "errors", "errors, shuffled", "one class")


def some(features: FeatureSet, rows: Index, labels: Index) -> FeatureSet:
    """Images of a store, as if nobody had split them, with these labels."""
    splits = np.full(len(rows), "", features.splits.dtype)
    return replace(features.some(rows), labels=labels, splits=splits, groups=np.empty(0, str), metadata={})


def accuracy(fitted: FittedHead, features: FeatureSet, rows: Index) -> float:
    """Share of images that a head names right."""
    names = np.array(fitted.class_names)[fitted.scorer.scores(features.embeddings[rows]).argmax(axis=1)]
    return float((names == np.array(features.class_names)[features.labels[rows]]).mean())


def trial(features: FeatureSet, kind: str, seed: int, shots: int, more: int) -> tuple[Compared, list[float]]:
    """The evidence of one batch, and the three accuracies."""
    rng = np.random.default_rng([seed, 7])
    rows = np.flatnonzero(features.labels >= 0)
    rows = rng.permutation(rows)
    place = np.empty(len(rows), int)
    for label in np.unique(features.labels[rows]):
        own = np.flatnonzero(features.labels[rows] == label)
        place[own] = np.arange(len(own))
    old, pool = rows[place < shots], rows[place >= shots]
    first = fit_features(some(features, old, features.labels[old]), random_state=seed)
    if kind.startswith("errors"):
        names = np.array(first.class_names)[first.scorer.scores(features.embeddings[pool]).argmax(axis=1)]
        pool = pool[names != np.array(features.class_names)[features.labels[pool]]]
    n_classes = len(np.unique(features.labels[rows]))
    new = pool[: more * n_classes] if kind.startswith("errors") else rows[(place >= shots) & (place < shots + more)]
    labels = features.labels[new]
    if kind.endswith("shuffled"):
        labels = rng.permutation(labels)
    if kind == "one class":
        labels = np.full(len(new), labels.min())
    both = np.concatenate([old, new])
    joined = some(features, both, np.concatenate([features.labels[old], labels]))
    fitted = fit_features(joined, random_state=seed)
    is_new = np.arange(len(both)) >= len(old)
    compared = compare(fitted.held_out, is_new, fitted.head, None, seed)
    rest = np.setdiff1d(rows, both)
    at_once = rows[place < shots + more]
    whole = fit_features(some(features, at_once, features.labels[at_once]), random_state=seed)
    return compared, [accuracy(each, features, rest) for each in (first, fitted, whole)]


def take_time(store: Path, photos: Path, pythons: dict[str, Path], rounds: int) -> None:
    """Wall and CPU seconds of whole commands, in turns; the least counts, as other work only adds."""
    command = ["-c", "from featx.cli.main import main; main()"]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in pythons}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, first = folder / "photos.model", folder / "feedback"
        subprocess.run([sys.executable, *command, "fit", store, "--out", model], check=True, capture_output=True)
        corrections = Corrections(first)
        corrections.open()
        for path in sorted(each for each in photos.rglob("*") if each.is_file()):
            corrections.add(path.read_bytes(), path.parent.name)
        corrections.close()
        for turn in range(rounds):
            for who, python in pythons.items():
                feedback = shutil.copytree(first, folder / f"{who}{turn}")
                refit: list[str | Path] = [python, *command, "refit", model, "--feedback", feedback, "--store", store]
                wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run(refit, check=True, capture_output=True, cwd=folder)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                found[who].append((time.perf_counter() - wall, cpu))
    for who, times in found.items():
        wall, cpu = (min(each) for each in zip(*times, strict=True))
        load = os.getloadavg()[0]
        print(f"{who:7} {len(corrections)} new photos: {wall:.1f} s, {cpu:.1f} s of processors, load {load:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="+", type=Path)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--more", type=int, default=10, help="corrections a class")
    parser.add_argument("--kind", action="append", choices=KINDS, help="may be repeated; by default all")
    parser.add_argument("--time", type=Path, metavar="PHOTOS", help="take the time of a refit with these photos")
    parser.add_argument("--before", type=Path, metavar="PYTHON", help="and that of another featx, in turns")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for store in args.stores:
        if args.time:
            pythons = {"featx": Path(sys.executable), **({"before": args.before} if args.before else {})}
            take_time(store.absolute(), args.time, pythons, args.rounds)
            continue
        features = read_features(store)
        for kind in args.kind or KINDS:
            done = [trial(features, kind, seed, args.shots, args.more) for seed in range(args.trials)]
            outcomes = Counter(compared.outcome for compared, _ in done)
            before, after, at_once = np.mean([shares for _, shares in done], axis=0)
            told = ", ".join(f"{name} {count}" for name, count in outcomes.most_common())
            print(f"{store.stem:12} {kind:17} {told:40} accuracy {before:.3f} {after:.3f} {at_once:.3f}", flush=True)


if __name__ == "__main__":
    main()
