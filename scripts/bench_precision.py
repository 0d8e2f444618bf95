#!/usr/bin/env python3
"""What a precision costs in accuracy and gains in speed, against single precision.

    python scripts/bench_precision.py SET [SET ...] [--backbone NAME]... [--precision int8] [--out data/bench/precision]

Each SET is a folder of class folders. With each network it prints how far the embeddings of these photos are from those
of fp32 (cosine), the difference in accuracy of the ridge head on the same draws (20 by default) at 1, 5 and 20 labels
per class, in points and with 95 % intervals over draws, and images per second of the network alone, in turns. Stores
are kept in the folder --out, and not made again.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from bench_layers import accuracies, interval, some_of
from numpy.typing import NDArray

from featx._files import publish_bytes
from featx.backbones.backbone import Backbone, load_backbone
from featx.backbones.engines.choice import make_engine
from featx.backbones.speed import rate
from featx.evaluation.duplicates import find_duplicates
from featx.extraction.run import extract_features
from featx.heads.catalogue import HEADS
from featx.images.source import ImageSet
from featx.store import FeatureSet, read_features

SHOTS = (1, 5, 20)
ROUNDS = 5


def stored(folder: Path, backbone: Backbone, precision: str, out: Path, each: int) -> FeatureSet:
    """The embeddings of a set."""
    store = out / f"{folder.name}.{backbone.name.replace(':', '-')}.{precision}.featx"
    engine = make_engine(backbone, engine="openvino", precision=precision)
    extract_features(some_of(ImageSet.from_folder(folder), each), backbone, store, engine=engine)
    return read_features(store)


def compare(pair: dict[str, FeatureSet], precision: str, episodes: int, n_jobs: int) -> dict[str, Any]:
    """Cosines and differences in accuracy on one set: points [shots][episode]."""
    exact, other = pair["fp32"], pair[precision]
    groups = find_duplicates(exact.embeddings, exact.copies, by=exact.near_copies).groups
    data = {name: features.embeddings for name, features in pair.items()}
    heads = dict.fromkeys(pair, HEADS["ridge"])
    found = accuracies(data, heads, exact.labels, groups, SHOTS, episodes, n_jobs)
    gap = np.subtract(found[precision], found["fp32"])
    lengths = np.linalg.norm(exact.embeddings, axis=1) * np.linalg.norm(other.embeddings, axis=1)
    cosines = np.einsum("nd,nd->n", exact.embeddings, other.embeddings) / lengths
    return {"gap": gap.tolist(), "cosines": cosines.tolist()}


def speeds(backbone: Backbone, precision: str, seconds: float) -> dict[str, float]:
    """Images per second of the network alone: the median of rounds in which both run in turn."""
    rates: dict[str, list[float]] = {"fp32": [], precision: []}
    engines = {name: make_engine(backbone, engine="openvino", precision=name) for name in rates}
    for _ in range(ROUNDS):
        for name, engine in engines.items():
            shape = (engine.batch_size, *backbone.preprocess.crop, 3)
            rates[name].append(rate(engine, shape, seconds, backbone.name))
    return {name: float(np.median(found)) for name, found in rates.items()}


def words(gap: NDArray[np.float64]) -> str:
    mean, half = interval(gap)
    return f"{mean:+.2f} ± {half:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("sets", nargs="+", type=Path, metavar="SET")
    parser.add_argument("--backbone", action="append", metavar="NAME", help="may be repeated")
    parser.add_argument("--precision", default="int8", choices=("int8", "bf16"))
    parser.add_argument("--episodes", type=int, default=20, help="at least 2, for intervals")
    parser.add_argument("--images", type=int, default=100, help="of each class, at most (or 400 in all)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for which speed is measured, in each round")
    parser.add_argument("--n-jobs", type=int, default=joblib.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("data/bench/precision"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": platform.processor(), "date": date.today().isoformat(), "networks": {}}
    for name in options.backbone or ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"]:
        backbone = load_backbone(name)
        found = {}
        for folder in options.sets:
            pair = {
                precision: stored(folder, backbone, precision, options.out, options.images)
                for precision in ("fp32", options.precision)
            }
            found[folder.name] = compare(pair, options.precision, options.episodes, options.n_jobs)
        cube = np.array([each["gap"] for each in found.values()])  # (sets, shots, episodes)
        cosines = np.concatenate([each["cosines"] for each in found.values()])
        speed = speeds(backbone, options.precision, options.seconds)
        print(f"\n{name}, {options.precision} against fp32")
        median, low = np.quantile(cosines, (0.5, 0.01))
        print(f"  cosine: median {median:.4f}, one in a hundred {low:.4f}, least {cosines.min():.4f}")
        print(f"  accuracy: {words(cube.mean(axis=1))}; worst cell {cube.mean(axis=2).min():+.2f}")
        for number, n_shots in enumerate(SHOTS):
            print(f"    at {n_shots:>2}: {words(cube[:, number])}")
        for number, folder_name in enumerate(found):
            print(f"    {folder_name}: {words(cube[number].mean(axis=0)[None])}")
        fast, slow = speed[options.precision], speed["fp32"]
        print(f"  network alone: {fast:.0f} against {slow:.0f} images/s, {fast / slow:.2f} times")
        result["networks"][name] = {"sets": found, "images_per_second": speed}
        publish_bytes(options.out / f"{options.precision}.json", json.dumps(result).encode())


if __name__ == "__main__":
    main()
