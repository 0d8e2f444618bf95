#!/usr/bin/env python3
"""The mean that ships with featx for its default backbone (see featx/centre.py), from stores.

    python scripts/make_mean.py STORE [STORE ...] --out featx/means/efficientnet_lite0.npy

Every store counts the same, whatever its size, and copies within a store count once. The mean is deterministic: float32
of a float64 mean. What ships was made from five public image sets, embedded by ``featx extract`` with its defaults:
CIFAR-10 (2,000 images, 200 a class), ants and bees (397), cats and dogs (400), ten classes of the Describable Textures
Dataset (600) and RSSCN7, satellite images (700). Whoever evaluates on one of these sets should leave it out of the
mean, as scripts/bench_heads.py does. It prints the sha256 that :data:`featx.centre.MEANS` must name.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx.store import FeatureSet, read_features

_SAME = ("backbone", "weights_sha256", "preprocess", "views")


def store_mean(features: FeatureSet) -> NDArray[np.float64]:
    """Mean (d,) of a store's different images."""
    first = np.unique(features.digests, axis=0, return_index=True)[1]
    mean: NDArray[np.float64] = features.embeddings[np.sort(first)].astype(np.float64).mean(axis=0)
    return mean


def mean_of(stores: Sequence[FeatureSet]) -> NDArray[np.float64]:
    """Mean (d,) in which every store counts the same."""
    mean: NDArray[np.float64] = np.mean([store_mean(each) for each in stores], axis=0)
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("stores", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    stores = [read_features(path) for path in sorted(options.stores, key=lambda path: path.name)]
    made: list[dict[str, Any]] = [{name: each.provenance[name] for name in _SAME} for each in stores]
    if any(each != made[0] for each in made):
        parser.error("the stores were not made in the same way")
    out = io.BytesIO()
    np.save(out, mean_of(stores).astype(np.float32))
    options.out.write_bytes(out.getvalue())
    print(f"{options.out}: {sum(len(each.ids) for each in stores)} images, {made[0]}")
    print("sha256", hashlib.sha256(out.getvalue()).hexdigest())


if __name__ == "__main__":
    main()
