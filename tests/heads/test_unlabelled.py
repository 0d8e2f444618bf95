"""A mean from elsewhere, and images without labels: where they come from, what they change, and that it is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Featx, class_folders
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.linear_model import Ridge as PlainRidge
from sklearn.preprocessing import Normalizer

from featx.errors import UsageError
from featx.evaluation.splits import KShotSplit
from featx.evaluation.stats import expected_calibration_error
from featx.evaluation.sweep import sweep_heads
from featx.heads.catalogue import HEADS
from featx.heads.scorer import Scorer, softmax
from featx.heads.unlabelled import MAX_POOL, Centre, PoolRidge, heads_for, soft_labels, unlabelled_centre
from featx.models.bundle import read_bundle
from featx.models.fit import fit_head
from featx.store.reader import read_features
from featx.store.shards import digest_keys

Rows = NDArray[np.float64]


def groups(n: int, seed: int = 0, d: int = 60, n_classes: int = 5) -> tuple[Rows, NDArray[np.int64]]:
    """Rows about class centres, all with one large offset in common, as pooled features have."""
    centres = np.random.default_rng(7).normal(size=(n_classes, d))
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    return 4.0 + 0.75 * centres[labels] + rng.normal(size=(n, d)), labels


def test_centred_heads_use_the_mean_and_say_so() -> None:
    rows, labels = groups(40)
    mean = np.full(60, 4.0)
    catalogue = heads_for(Centre(mean, "From elsewhere."))
    assert list(catalogue) == list(HEADS)
    for name, head in catalogue.items():
        assert head.kinds[0] == "centre_l2"
        assert sorted(head.kinds) == sorted(HEADS[name].kinds)
        step = head.build().fit(rows, labels).named_steps["normalise"]
        np.testing.assert_array_equal(step.mean_, mean)
        other = head.build(kind="standardise").fit(rows, labels).named_steps["normalise"]
        np.testing.assert_allclose(other.mean_, rows.mean(axis=0))
    result = sweep_heads(
        rows, labels, class_names="abcde", heads=["auto"], shots=[2], episodes=2, n_jobs=1,
        centre=Centre(mean, "From elsewhere."),
    )  # fmt: skip
    assert "From elsewhere." in result.notes
    support, query = next(KShotSplit(2).split(rows, labels))
    auto = catalogue["auto"].build().fit(rows[support], labels[support])
    np.testing.assert_array_equal(result.of("ridge", 2)[0].predictions, auto.predict(rows[query]))


@pytest.mark.parametrize("m", [30, 200])  # fewer rows than dimensions, and more
@pytest.mark.parametrize("n_classes", [2, 4])
def test_ridge_pool_is_weighted_least_squares_on_both(m: int, n_classes: int) -> None:
    rows, labels = groups(2 * n_classes, n_classes=n_classes)
    pool = Normalizer().fit_transform(groups(m, seed=1, n_classes=n_classes)[0] - 4.0)
    unit = Normalizer().fit_transform(rows - 4.0)
    ours = PoolRidge(pool).fit(unit, labels)
    soft = soft_labels(unit, np.eye(n_classes)[labels], pool, sharpness=10.0, weight=2.0)
    np.testing.assert_allclose(soft.sum(axis=1), 1.0)
    weights = np.repeat([1.0, min(1.0, 2.0 * len(unit) / m)], [len(unit), m])
    both = np.vstack([unit, pool])
    spread = np.average((both - np.average(both, axis=0, weights=weights)) ** 2, axis=0, weights=weights).sum()
    targets = 2.0 * np.vstack([np.eye(n_classes)[labels], soft]) - 1.0
    plain = PlainRidge(alpha=spread).fit(both, targets, sample_weight=weights)
    expected = plain.coef_[1:] if n_classes == 2 else plain.coef_
    np.testing.assert_allclose(ours.coef_, expected, atol=1e-8)
    np.testing.assert_allclose(ours.intercept_, plain.intercept_[-len(expected) :], atol=1e-8)
    np.testing.assert_allclose(ours.predict_proba(unit).sum(axis=1), 1.0)


def test_a_pool_helps_most_where_labels_are_few_and_can_be_kept() -> None:
    rows, labels = groups(500)
    pool, _ = groups(400, seed=3)
    centre = unlabelled_centre(pool)
    result = sweep_heads(
        rows, labels, class_names="abcde", heads=["ridge", "auto"], shots=[1, 5], episodes=6, n_jobs=1,
        centre=centre, pool=pool,
    )  # fmt: skip
    assert result.heads == ("ridge", "ridge_pool")
    gain = {
        n: np.mean([t.accuracy for t in result.of("ridge_pool", n)])
        - np.mean([t.accuracy for t in result.of("ridge", n)])
        for n in (1, 5)
    }
    assert gain[1] > 0.05
    assert gain[5] > -0.01
    assert "400 unlabelled images" in " ".join(result.notes)
    model = clone(heads_for(centre, pool)["auto"].build()).fit(rows[:50], labels[:50])
    scorer = Scorer.of(model)
    np.testing.assert_array_equal(scorer.scores(rows).argmax(axis=1), model.predict(rows))


def test_a_large_pool_is_thinned_evenly_and_an_empty_or_broken_one_refused() -> None:
    pool, _ = groups(3 * MAX_POOL)
    head = heads_for(unlabelled_centre(pool), pool)["ridge_pool"]
    assert f"{3 * MAX_POOL} unlabelled" in head.summary
    assert head.build().named_steps["classify"].pool.shape == (MAX_POOL, 60)
    with pytest.raises(UsageError, match="no images without a label"):
        unlabelled_centre(pool[:0])
    pool[3, 3] = np.nan
    with pytest.raises(UsageError, match="embeddings must be finite"):
        unlabelled_centre(pool)
    with pytest.raises(ValueError, match=r"pool of PoolRidge must have shape \(m, 60\), got \(5, 3\)"):
        PoolRidge(np.zeros((5, 3))).fit(*groups(10))


def test_a_fitted_head_keeps_what_the_pool_taught_it() -> None:
    rows, labels = groups(60)
    pool, _ = groups(300, seed=3)
    fitted = fit_head(rows, labels, class_names="abcde", pool=pool)
    assert fitted.head == "ridge_pool"
    assert fitted.metrics["unlabelled_images"] == 300
    assert "Uses 300 unlabelled images" in fitted.notes[0]
    centre = unlabelled_centre(pool)
    plain = heads_for(centre, pool)["auto"].build().fit(rows, labels)
    fresh, truth = groups(2000, seed=4)
    scores = fitted.scorer.scores(fresh)
    np.testing.assert_allclose(scores, plain.decision_function(fresh), atol=1e-9)
    np.testing.assert_array_equal(fitted.scorer.mean, centre.mean)
    right = scores.argmax(axis=1) == truth
    told = fitted.metrics["out_of_fold"]["accuracy"]
    assert told["low"] <= right.mean() <= told["high"]
    assert fitted.sharpness is not None
    confidence = softmax(scores, fitted.sharpness).max(axis=1)
    assert expected_calibration_error(confidence, right) < 0.08
    best = fit_head(rows, labels, class_names="abcde", heads=["knn", "ridge_pool"], pool=pool, n_jobs=1)
    assert "of knn, ridge_pool over 10 draws" in " ".join(best.notes)
    with pytest.raises(UsageError, match="no such head"):
        fit_head(rows, labels, class_names="abcde", heads=["ridge_pool"])


@pytest.mark.slow
def test_the_command_learns_from_another_store_and_says_so(tmp_path: Path, featx: Featx) -> None:
    class_folders(tmp_path / "photos", each=8)
    class_folders(tmp_path / "more", names=("unsorted",), each=10, first=10)  # six of them are copies
    photos, more = tmp_path / "photos.featx", tmp_path / "more.featx"
    assert featx("extract", tmp_path / "photos", "--out", photos).code == 0
    assert featx("extract", tmp_path / "more" / "unsorted", "--out", more).code == 0
    arguments = ("sweep", photos, "--shots", "1", "--heads", "ridge,ridge_pool", "--episodes", "2")
    found = featx(*arguments, "--unlabelled-from", more, "--json")
    assert found.code == 0
    assert found.json["unlabelled"] == 4
    assert found.json["heads"] == ["ridge", "ridge_pool"]
    assert any("Uses 4 unlabelled images" in note for note in found.json["notes"])
    assert "Uses 4 unlabelled images" in (tmp_path / "photos.report" / "report.html").read_text()
    assert "Uses 4" in json.loads((tmp_path / "photos.report" / "summary.json").read_text())["notes"][-1]
    for pool in (("--unlabelled",), ("--unlabelled-from", photos)):  # none, and none but copies
        refused = featx(*arguments, *pool)
        assert refused.code == 2
        assert "no images without a label" in refused.err
    plain = featx("sweep", photos, "--shots", "1", "--heads", "auto", "--episodes", "2", "--json")
    assert plain.json["unlabelled"] == 0
    assert featx(*arguments).code == 2  # without a pool there is no such head
    model = tmp_path / "photos.model"
    fitted = featx("fit", photos, "--out", model, "--unlabelled-from", more, "--json")
    assert fitted.code == 0, fitted.err
    assert (fitted.json["head"], fitted.json["metrics"]["unlabelled_images"]) == ("ridge_pool", 4)
    assert any("Uses 4 unlabelled images" in note for note in fitted.json["notes"])
    kept, features, pool_store = read_bundle(model), read_features(photos), read_features(more)
    copies = np.isin(digest_keys(pool_store.digests), digest_keys(features.digests))
    centre = pool_store.embeddings[~copies].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(kept.scorer.mean, centre, rtol=1e-6)
    predicted = featx("predict", model, tmp_path / "photos" / "ants", "--json")
    assert predicted.code == 0
    expected = kept.answer(features.embeddings[:8])
    for found_one, answer in zip(predicted.json["predictions"], expected, strict=True):
        assert found_one["label"] == answer.label
        assert found_one["score"] == pytest.approx(answer.score, abs=1e-6)
    refused = featx("fit", photos, "--out", model, "--unlabelled")
    assert refused.code == 2
    assert "no images without a label" in refused.err
