"""Evidence for and against a batch of corrections, on made-up embeddings of which the truth is known."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from featx.evaluation import stats
from featx.heads import catalogue
from featx.models.fit import fit_head, scores_without
from featx.models.refit import Compared, compare, join, stratified_difference
from featx.store import FeatureSet


def made(shots: int, more: int, kind: str, seed: int, n_classes: int = 6, d: int = 24) -> Compared:
    """The evidence of a batch; classes overlap as those of a 5-shot model do."""
    rng = np.random.default_rng(seed)
    centres = 1.1 * rng.normal(size=(n_classes, d))
    true = np.concatenate([np.repeat(np.arange(n_classes), shots), np.repeat(np.arange(n_classes), more)])
    rows = (centres[true] + 1.3 * rng.normal(size=(len(true), d))).astype(np.float32)
    is_new = np.arange(len(true)) >= n_classes * shots
    labels = true.copy()
    if kind == "shuffled":
        labels[is_new] = rng.permutation(labels[is_new])
    names = [str(number) for number in range(n_classes)]
    fitted = fit_head(rows, labels, class_names=names, heads=["ridge"], near_duplicates=None, random_state=seed)
    return compare(fitted.held_out, is_new, "ridge", None, seed)


@pytest.mark.slow
def test_right_labels_are_promoted_and_shuffled_ones_are_not() -> None:
    right = Counter(made(5, 10, "right", seed).outcome for seed in range(12))
    shuffled = Counter(made(5, 10, "shuffled", seed).outcome for seed in range(20))
    assert right["promoted"] >= 11, right
    assert shuffled["promoted"] <= 1, shuffled
    assert shuffled["held"] >= 10, shuffled


def test_heads_without_a_batch_are_those_that_never_saw_it() -> None:
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(3), 20)
    rows = (2 * np.eye(3, 8)[labels] + rng.normal(size=(60, 8))).astype(np.float32)
    is_new = np.arange(60) >= 30
    fitted = fit_head(rows, labels, class_names=list("abc"), heads=["ridge"], near_duplicates=None)
    assert fitted.held_out is not None
    found, converged = scores_without(fitted.held_out, is_new, "ridge", None, 0)
    assert converged
    # Other rows and labels of the batch change nothing, as long as the folds are the same.
    changed = np.where(is_new[:, None], rng.normal(size=rows.shape), rows).astype(np.float32)
    held = fitted.held_out
    other = type(held)(
        type(held.data)(changed, held.data.labels, held.data.rows, held.data.class_names, held.data.duplicates),
        held.folds, held.scores, held.apart,
    )  # fmt: skip
    again, _ = scores_without(other, is_new, "ridge", None, 0)
    np.testing.assert_allclose(found[~is_new], again[~is_new], rtol=0, atol=1e-12)
    assert not np.allclose(found[is_new], again[is_new])


def test_a_fit_that_stops_before_its_optimum_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.tile(np.arange(2), 20)
    rows = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    is_new = np.arange(40) >= 30
    fitted = fit_head(rows, labels, class_names=["a", "b"], heads=["logreg"], near_duplicates=None)
    assert fitted.held_out is not None
    assert scores_without(fitted.held_out, is_new, "logreg", None, 0)[1]
    with monkeypatch.context() as patch:
        patch.setattr(catalogue.Logistic, "fit", stopped(catalogue.Logistic.fit))
        assert not scores_without(fitted.held_out, is_new, "logreg", None, 0)[1]
        assert not compare(fitted.held_out, is_new, "logreg", None, 0).converged


def stopped(fit: Callable[..., Any]) -> Callable[..., Any]:
    """A fit that warns as one that did not reach its optimum."""

    def fitting(*arguments: Any, **options: Any) -> Any:
        warnings.warn("stopped early", ConvergenceWarning, stacklevel=1)
        return fit(*arguments, **options)

    return fitting


def test_accuracy_of_a_batch_that_was_chosen_is_weighted_back() -> None:
    """The truth: the former errs on 10 %; the new one mends half of these errors, and spoils 5 % of the rest."""
    rng = np.random.default_rng(1)
    covered, means = [], []
    true = 0.1 * 0.5 - 0.9 * 0.05
    for _ in range(400):
        was = np.concatenate([rng.random(200) < 0.9, np.zeros(100, bool)])  # the batch: 100 errors, nothing else
        now = np.where(was, rng.random(300) < 0.95, rng.random(300) < 0.5)
        found = stratified_difference(now, was, np.arange(300) < 200, np.arange(300))
        assert found is not None
        means.append(found.interval.mean)
        covered.append(found.interval.low <= true <= found.interval.high)
    assert np.mean(means) == pytest.approx(true, abs=0.004)
    assert 0.91 < np.mean(covered) <= 0.99
    # Counted as they are, the same images would promise a third of all photos.
    plain = stats.mean_difference((now.astype(float) - was).astype(np.float64))
    assert plain.interval.low > 0.05


def outcome(**changes: Any) -> str:
    sound = {"surprise": 0.5, "predictable": 0.001, "disagreeing": 5, "tested": 10}

    def of(mean: float, p: float) -> stats.Difference:
        return stats.Difference(stats.Interval(mean, mean - 0.1, mean + 0.1), p)

    everything, old = of(*changes.pop("all", (0.01, 0.5))), of(*changes.pop("old", (0.0, 1.0)))
    return Compared(everything=everything, old=old, new=None, **{**sound, **changes}).outcome


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "promoted"),
        ({"all": (0.1, 0.001)}, "promoted"),
        ({"all": (-0.01, 0.5)}, "waits"),
        ({"predictable": 0.3}, "waits"),
        ({"predictable": 0.3, "all": (0.1, 0.001)}, "promoted"),
        ({"all": (-0.1, 0.001)}, "refused"),
        ({"old": (-0.1, 0.001), "all": (0.1, 0.001)}, "refused"),
        ({"surprise": 0.001}, "promoted"),  # another camera: the labels can be predicted
        ({"surprise": 0.001, "predictable": 0.3}, "held"),
        ({"surprise": None, "predictable": None}, "waits"),
    ],
)
def test_what_becomes_of_a_batch(changes: dict[str, Any], expected: str) -> None:
    assert outcome(**changes) == expected


def test_where_nothing_can_be_held_out_it_waits() -> None:
    nothing = compare(None, np.ones(3, bool), "ridge", None, 0)
    assert (nothing.verdict, nothing.outcome) == ("cannot tell", "waits")


def features(digests: list[int], labels: list[int], names: tuple[str, ...], splits: list[str] | None = None) -> Any:
    n = len(digests)
    return FeatureSet(
        embeddings=np.arange(n, dtype=np.float32)[:, None] + np.zeros((n, 2), np.float32),
        ids=np.array([f"{digest}.png" for digest in digests]), labels=np.array(labels, np.int64), class_names=names,
        splits=np.array(splits or [""] * n, dtype="<U5"),
        digests=np.array([[digest] * 32 for digest in digests], np.uint8), layer="penultimate",
        provenance={"weights": "none"}, fingerprint="f",
    )  # fmt: skip


def test_old_and_corrected_photos_are_joined_by_content() -> None:
    from featx.models.agreement import Voted

    def voted(digest: int, label: str | None) -> Voted:
        return Voted(bytes([digest] * 32).hex(), "x.png", (), label)

    old = features([1, 2, 3, 4], [0, 1, 0, 1], ("ants", "bees"), ["", "", "", "test"])
    added = features([2, 5, 6, 7, 8, 9], [-1] * 6, ())
    said = [
        voted(2, "ants"), voted(5, "bees"), voted(6, "wasps"), voted(7, "wasps"), voted(8, "flies"), voted(9, None)
    ]  # fmt: skip
    joined, is_new, waiting = join(old, added, said, said[1:])
    assert waiting == ["flies"]
    names = [joined.class_names[label] if label >= 0 else None for label in joined.labels]
    assert names == ["ants", "ants", "ants", "bees", "bees", "wasps", "wasps", None, None]
    assert is_new.tolist() == [False] * 4 + [True] * 3 + [False] * 2
    assert joined.splits.tolist() == ["", "", "", "test", "", "", "", "", ""]
