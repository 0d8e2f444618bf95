"""Foreign photos are called unknown: models of real photos against the photos of the other sets."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featx.backbones.backbone import load_backbone
from featx.extraction.run import extract_features
from featx.images.source import ImageSet
from featx.models.fit import fit_head
from featx.models.novelty import is_unknown
from featx.store import FeatureSet, read_features

pytestmark = pytest.mark.slow

SETS = {"hymenoptera": 40, "cats_dogs": 40, "dtd10": 12, "rsscn7": 14}
"""Sets without a class in common, and how many images of each class are embedded."""

HARD = ("dtd10", "rsscn7")
"""A model of textures takes satellite photos, which are textures, for its own more often than not (benchmarks.md)."""


@pytest.fixture(scope="module")
def sets(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, FeatureSet]:
    folder = tmp_path_factory.mktemp("unknown")
    backbone = load_backbone("efficientnet_lite0")
    out = {}
    for name, each in SETS.items():
        few = folder / name
        images = sorted(path for path in (photos / name).rglob("*") if path.is_file())
        counts: dict[str, int] = {}
        for path in images:
            label = path.parent.name
            counts[label] = counts.get(label, 0) + 1
            if counts[label] <= each:
                (few / label).mkdir(parents=True, exist_ok=True)
                (few / label / path.name).symlink_to(path)
        extract_features(ImageSet.from_folder(few), backbone, folder / f"{name}.featx")
        out[name] = read_features(folder / f"{name}.featx")
    return out


def draw(features: FeatureSet, each: int, seed: int) -> tuple[Any, Any]:
    order = np.random.default_rng(seed).permutation(len(features.labels))
    support = np.concatenate([order[features.labels[order] == c][:each] for c in np.unique(features.labels)])
    return support, np.setdiff1d(order, support)


def test_foreign_photos_are_refused_and_own_ones_are_not(sets: dict[str, FeatureSet]) -> None:
    refused: dict[tuple[str, str], list[float]] = {pair: [] for pair in permutations(SETS, 2)}
    own: list[float] = []
    for name, features in sets.items():
        for seed in range(4):
            support, rest = draw(features, 10, seed)
            kept = fit_head(
                features.embeddings[support], features.labels[support], class_names=features.class_names
            ).familiarity
            assert kept is not None
            own += is_unknown(kept.shares(features.embeddings[rest]), 0.05).tolist()
            for other in set(SETS) - {name}:
                refused[name, other].append(float(is_unknown(kept.shares(sets[other].embeddings), 0.05).mean()))
    shares = {pair: float(np.mean(found)) for pair, found in refused.items()}
    assert np.mean(own) <= 0.08, np.mean(own)
    assert np.mean([share for pair, share in shares.items() if pair != HARD]) >= 0.9, shares
    assert min(share for pair, share in shares.items() if pair != HARD) >= 0.6, shares
    assert shares[HARD] >= 0.15, shares


def test_several_networks_layers_and_every_head(sets: dict[str, FeatureSet]) -> None:
    """Columns of two networks joined, by the weights that the head chose; other heads know the same photos."""
    from featx.heads import Layers

    own, other = sets["cats_dogs"], sets["rsscn7"]
    d = own.embeddings.shape[1]
    noise = np.random.default_rng(0).normal(size=(len(own.labels), 64)).astype(np.float32)
    more = np.random.default_rng(1).normal(size=(len(other.labels), 64)).astype(np.float32)
    layers = Layers({"a": d, "b": 64}, {"a": "one", "b": "two"})
    both = np.hstack([own.embeddings, noise])
    joined = fit_head(both, own.labels, class_names=own.class_names, layers=layers).familiarity
    assert joined is not None
    assert joined.kind.startswith("blocks_l2:1280*")
    assert is_unknown(joined.shares(np.hstack([other.embeddings, more])), 0.05).mean() > 0.6
    plain = [
        fit_head(own.embeddings, own.labels, class_names=own.class_names, heads=(head,)).familiarity
        for head in ("ridge", "knn", "logreg", "lda")
    ]
    for each in plain:
        assert each is not None
        assert is_unknown(each.shares(other.embeddings), 0.05).mean() > 0.9
