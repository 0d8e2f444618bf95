#!/usr/bin/env python3
"""What recipes add to one network, on several sets of photos of your own.

    python scripts/bench_features.py SET [SET ...] [--out data/bench/features.json] [--episodes 10] [--images 40]

Each SET is a folder of class folders. It is extracted twice, by the three networks of the recipes, into stores beside
the result: one centre crop, and the views of the recipe "best"; both with the layers of that. Then, on the same draws:

- peer: L2-normalised, LinearSVC, cost by 3-fold cross-validation (VISSL), on efficientnet_lite0, one centre crop;
- pixels: featx's recommended head on thumbnails of 16 x 16 pixels, without a network;
- fast, balanced, best: the recommended head on these recipes; of "best" also what its views and its layers do alone.

Differences are paired by draw; intervals (95 %) take data sets as fixed and draws as the unit. A set that was done is
kept in the result and not repeated, so the script can be stopped and run again.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from bench_layers import accuracies, report, some_of

from featx._files import publish_bytes
from featx.backbones.backbone import load_backbone
from featx.backbones.recipes import RECIPES
from featx.evaluation.duplicates import find_duplicates
from featx.extraction.run import extract_features
from featx.heads.catalogue import HEADS
from featx.heads.layers import read_layers
from featx.images.source import ImageSet

SHOTS = (1, 5, 20)
WAYS = ("peer", "pixels", "fast", "balanced", "views", "layers", "best")
FAST = next(iter(RECIPES["fast"].backbones))


def extract(folder: Path, stores: Path, each: int) -> dict[str, Any]:
    """Both stores of a set; how many images they have, and the seconds that each took."""
    images = some_of(ImageSet.from_folder(folder), each)
    recipe = RECIPES["best"]
    networks = [load_backbone(name, layers=layers) for name, layers in recipe.backbones.items()]
    out: dict[str, Any] = {"images": len(images)}
    for name, views in (("center", ("center",)), ("views", recipe.views)):
        started = time.perf_counter()
        extract_features(images, networks, stores / f"{folder.name}.{name}.featx", views=views)
        out[f"{name}_seconds"] = round(time.perf_counter() - started, 1)
    return out


def measure(folder: Path, stores: Path, episodes: int, n_jobs: int) -> dict[str, list[list[float]]]:
    """Accuracies [shots][episode] of each way on a set."""
    auto, data, heads = HEADS["auto"], {}, {}
    last = list(RECIPES["balanced"].backbones)
    for way, store, names in (
        ("fast", "center", [FAST]), ("balanced", "center", last), ("views", "views", last),
        ("layers", "center", None), ("best", "views", None),
    ):  # fmt: skip
        features, layers = read_layers(stores / f"{folder.name}.{store}.featx", names)
        data[way], heads[way] = features.embeddings, layers.on(auto, layers.whole if way != "fast" else FAST)
        if way == "fast":
            center = features
        elif not np.array_equal(center.digests, features.digests):
            raise SystemExit(f"{folder.name}: the two stores are not of the same images; delete them")
    assert center.pixels is not None
    data |= {"peer": data["fast"], "pixels": center.pixels.astype(np.float32) / np.float32(255)}
    heads |= {"peer": heads["fast"], "pixels": auto}
    groups = find_duplicates(center.embeddings, center.copies, by=center.near_copies).groups
    return accuracies(data, heads, center.labels, groups, SHOTS, episodes, n_jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("sets", nargs="+", type=Path, metavar="SET")
    parser.add_argument("--out", type=Path, default=Path("data/bench/features.json"))
    parser.add_argument("--episodes", type=int, default=10, help="at least 2, for intervals")
    parser.add_argument("--images", type=int, default=40, help="of each class, at most (or 400 in all)")
    parser.add_argument("--n-jobs", type=int, default=joblib.cpu_count())
    arguments = parser.parse_args()
    stores = arguments.out.parent / "stores"
    stores.mkdir(parents=True, exist_ok=True)
    kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"sets": {}}
    for folder in arguments.sets:
        if folder.name in kept["sets"]:
            continue
        facts = extract(folder, stores, arguments.images)
        facts["accuracy"] = measure(folder, stores, arguments.episodes, arguments.n_jobs)
        kept["sets"][folder.name] = facts
        publish_bytes(arguments.out, (json.dumps(kept, indent=1) + "\n").encode())
        print(f"{folder.name}: {facts['images']} images, {facts['center_seconds']} s and {facts['views_seconds']} s")
    kept |= {"machine": platform.processor() or platform.machine(), "date": date.today().isoformat()}
    kept["minus_fast"] = report(kept["sets"], WAYS, "fast", SHOTS)
    publish_bytes(arguments.out, (json.dumps(kept, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
