"""How good it is: against the truth about photos without a label, on real photos."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featx import ImageSet, extract_features, load_backbone, read_features
from featx.heads import InstantRidge, Layers, unit_rows
from featx.store import FeatureSet
from featx.studio import quality
from featx.studio.journal import NOTHING
from featx.studio.quality import Labelled, OutOfDate, measure, sample_of, too_early
from featx.studio.suggest import suggest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def features(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    store = tmp_path_factory.mktemp("quality") / "ants.featx"
    extract_features(ImageSet.from_folder(photos / "hymenoptera"), load_backbone("efficientnet_lite0"), store)
    return read_features(store)


def labelled(features: FeatureSet, codes: np.ndarray, order: list[int]) -> Labelled:
    return Labelled(
        replace(features, labels=codes.astype(np.int64)), np.arange(len(features)), codes, order,
        Layers({"penultimate": features.embeddings.shape[1]}),
    )  # fmt: skip


def by_the_page(features: FeatureSet, count: int, order: list[int]) -> np.ndarray:
    """Labels of the photos that the page puts first, one after the other."""
    unit = unit_rows(features.embeddings.astype(np.float64), "l2").astype(np.float32)
    codes = np.full(len(features), NOTHING)
    for _ in range(count):
        rows = np.arange(len(features))
        found = suggest(unit, rows, codes, np.zeros(len(rows), bool), order, sample_of(codes, order))
        codes[found.worth[0]] = features.labels[found.worth[0]]
    return codes


@pytest.mark.parametrize("seed", [0, 1])
def test_accuracy_is_that_of_the_folder_although_the_hard_photos_were_labelled(features: FeatureSet, seed: int) -> None:
    order = [int(row) for row in np.random.default_rng(seed).permutation(len(features))]
    codes = by_the_page(features, 90, order)
    found = measure(labelled(features, codes, order), lambda: False)
    rest = codes == NOTHING
    unit = unit_rows(features.embeddings.astype(np.float64), "l2").astype(np.float32)
    named = suggest(unit, np.arange(len(rest)), codes, ~rest, order, sample_of(codes, order)).suggested
    share = found["accuracy"]
    # The folder's: what is not labelled, and what is, each named by a fit without it.
    held = InstantRidge.fit(unit[~rest], codes[~rest], 2).held_out.argmax(axis=1)
    truth = np.concatenate([named[rest] == features.labels[rest], held == codes[~rest]]).mean()
    assert share["low"] <= truth <= share["high"], (truth, share)
    assert abs(share["mean"] - truth) < 0.08, (truth, share)
    assert "drawn at random" in share["on"]
    assert share["on"].startswith(str(len(sample_of(codes, order))))
    # What a plain count over all labelled photos would have said is far from it.
    counts = np.array(found["confusion"]["counts"])
    assert counts.trace() / counts.sum() < truth - 0.05
    assert any("look worse than the folder" in note for note in found["notes"])
    assert found["pixels"]["mean"] < found["curve"][-1]["mean"]
    cells = found["confusion"]["cells"]
    assert sum(map(len, cells.values())) == counts.sum() == found["n"] == 90
    for cell, rows in cells.items():
        assert set(codes[rows].tolist()) == {int(cell.split(",")[0])}


def test_wrong_labels_are_doubted_and_all_photos_are_counted_where_all_are_labelled(features: FeatureSet) -> None:
    order = list(range(len(features)))
    codes = features.labels.astype(np.intp).copy()
    wrong = [5, 60, 100, 150, 250, 300, 350, 390]
    codes[wrong] = 1 - codes[wrong]
    found = measure(labelled(features, codes, order), lambda: False)
    assert len(set(wrong) & {each["row"] for each in found["doubtful"]}) >= 4
    assert found["accuracy"]["on"] == f"all {len(features)} photos"
    assert found["notes"] == []


def test_it_says_when_it_is_too_early_and_stops_when_it_is_out_of_date(features: FeatureSet) -> None:
    codes = np.full(len(features), NOTHING)
    assert "each of two classes" in too_early(codes)
    codes[:3] = 0
    codes[200:203] = 1
    assert too_early(codes) == f"Cannot tell yet: label {quality.LEAST - 6} more."
    codes[:20] = 0
    codes[200:220] = 1
    assert too_early(codes) == ""
    with pytest.raises(OutOfDate):
        measure(labelled(features, codes, list(range(len(features)))), lambda: True)
