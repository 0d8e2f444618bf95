"""What is kept says what holds for groups never seen: folds, threshold, familiarity, and the test set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from featx.errors import UsageError
from featx.evaluation import stats
from featx.evaluation.testset import judge
from featx.heads import HEADS, softmax
from featx.models.fit import fit_head
from featx.models.novelty import is_unknown
from featx.store.reader import FeatureSet

Rows = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.str_]]


def bursts(n: int, seed: int, noise: float = 0.15, per: int = 8, dims: int = 40) -> Rows:
    """Bursts of nearly the same row, in no order, with one label each, of which a share is wrong."""
    rng = np.random.default_rng(seed)
    means = 0.45 * np.random.default_rng(99).normal(size=(3, dims))
    truth = rng.integers(0, 3, n)
    rows = np.repeat(means[truth] + rng.normal(size=(n, dims)), per, axis=0) + 0.05 * rng.normal(size=(n * per, dims))
    wrong = (truth + rng.integers(1, 3, n)) % 3
    labels = np.repeat(np.where(rng.random(n) < noise, wrong, truth), per)
    order = rng.permutation(n * per)
    return rows[order].astype(np.float32), labels[order], np.repeat([f"{i:04d}" for i in range(n)], per)[order]


@pytest.mark.slow
def test_a_fit_promises_what_holds_on_fresh_bursts() -> None:
    options: dict[str, Any] = {"class_names": "abc", "near_duplicates": None, "max_error": 0.2}
    gaps, errors = [], []
    for seed in range(4):
        rows, labels, groups = bursts(100, seed)
        fresh = bursts(400, 100 + seed)
        whole = fit_head(rows, labels, sites=groups, **options)
        torn = fit_head(rows, labels, **options)
        truth = float((whole.scorer.scores(fresh[0]).argmax(axis=1) == fresh[1]).mean())
        told = whole.metrics["out_of_fold"]["accuracy"]
        gaps.append(told["mean"] - truth)
        assert whole.metrics["groups"] == 100
        assert "groups" not in torn.metrics
        # Over bursts, not over photos.
        assert told["high"] - told["low"] > 2 * 2 * 1.96 * np.sqrt(truth * (1 - truth) / 800)
        assert torn.metrics["out_of_fold"]["accuracy"]["mean"] > truth + 0.1
        both = []
        for fitted in (whole, torn):
            assert fitted.sharpness is not None
            assert fitted.threshold is not None
            found = softmax(fitted.scorer.scores(fresh[0]), fitted.sharpness)
            answered = found.max(axis=1) >= fitted.threshold
            both.append(float((found.argmax(axis=1) != fresh[1])[answered].mean()))
        errors.append(both)
    assert abs(np.mean(gaps)) < 0.05
    # The threshold keeps its promise on fresh bursts, and that of a fit that tore them does not.
    kept, broken = np.mean(errors, axis=0)
    assert kept < 0.22
    assert broken > 0.27


def test_fresh_bursts_are_not_called_unknown_for_being_fresh() -> None:
    rows, labels, groups = bursts(150, 3)
    fresh = bursts(300, 4)
    options: dict[str, Any] = {"class_names": "abc", "near_duplicates": None, "max_unknown": 0.1}
    refused = {}
    for name, sites in (("whole", groups), ("torn", None)):
        fitted = fit_head(rows, labels, sites=sites, **options)
        assert fitted.familiarity is not None
        refused[name] = float(is_unknown(fitted.familiarity.shares(fresh[0]), 0.1).mean())
        refused[f"{name}, told"] = fitted.metrics["unknown"]["own_refused"]["mean"]
    assert refused["whole"] < 0.2
    assert abs(refused["whole, told"] - refused["whole"]) < 0.08
    assert refused["torn"] > 0.6


def test_where_a_class_has_one_group_that_is_said_and_copies_count() -> None:
    rows, labels, _ = bursts(30, 5)
    fitted = fit_head(rows, labels, sites=np.array([f"g{label}" for label in labels]), class_names="abc")
    assert any(note.startswith("A class has photos of one group only") for note in fitted.notes)
    assert "groups" not in fitted.metrics


def test_sites_that_are_rows_change_nothing() -> None:
    rows, labels, _ = bursts(30, 6, per=1)
    options: dict[str, Any] = {"class_names": "abc", "near_duplicates": None}
    alone = fit_head(rows, labels, sites=np.arange(len(rows)), **options)
    plain = fit_head(rows, labels, **options)
    assert np.allclose(alone.scorer.scores(rows), plain.scorer.scores(rows), atol=0.2)


def features(rows: Rows, test: NDArray[np.bool_]) -> FeatureSet:
    n = len(rows[0])
    return FeatureSet(
        embeddings=rows[0], ids=np.array([f"{i:05d}" for i in range(n)]), labels=rows[1], class_names=("a", "b", "c"),
        splits=np.where(test, "test", "train"),
        digests=np.random.default_rng(0).integers(0, 256, (n, 32)).astype(np.uint8),
        layer="penultimate", provenance={"weights": "none"}, fingerprint="f", groups=rows[2], group_name="burst",
    )  # fmt: skip


def test_test_images_of_groups_that_were_learnt_from_are_left_out(tmp_path: Path) -> None:
    rows = bursts(80, 7)
    of_bursts = rows[2] >= "0060"
    torn = of_bursts.copy()
    torn[np.flatnonzero(~of_bursts)[:40]] = True
    clean = judge(features(rows, of_bursts), "test", HEADS["ridge"], tmp_path / "a.jsonl")
    mixed = judge(features(rows, torn), "test", HEADS["ridge"], tmp_path / "b.jsonl")
    assert (clean.images, clean.shared) == (160, 0)
    assert (mixed.images, mixed.shared) == (160, 40)
    assert "40 images of it left out, as their groups were learnt from" in mixed.sentence
    assert clean.to_json().keys() | {"shared"} == mixed.to_json().keys()
    assert (
        clean.accuracy.high - clean.accuracy.low > 0.15
    )  # over 20 bursts; over 160 photos it would be 0.15 at the most
    with pytest.raises(UsageError, match="is of a group that training images are of"):
        every_other = np.arange(len(rows[0])) % 2 == 0
        judge(features(rows, every_other), "test", HEADS["ridge"], tmp_path / "c.jsonl")


def test_the_interval_over_sites_is_students_of_their_means() -> None:
    rng = np.random.default_rng(0)
    sites = np.repeat(np.arange(9), 7)
    hits = (rng.random(63) < 0.7).astype(float)
    means = hits.reshape(9, 7).mean(axis=1)
    from scipy.stats import t

    margin = t.ppf(0.975, 8) * means.std(ddof=1) / 3
    found = stats.mean_over_sites(hits, sites)
    assert (found.mean, found.low, found.high) == pytest.approx(
        (means.mean(), means.mean() - margin, means.mean() + margin)
    )
    alone = stats.mean_over_sites(hits, np.zeros(63, np.intp))
    assert (alone.low, alone.high) == (0.0, 1.0)
