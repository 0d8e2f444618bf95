"""The ridge that is fitted after every label, against the head it stands for and against refits by scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from featx.heads import InstantRidge, make_head
from featx.heads.scorer import softmax


def rows_of(n: int, d: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    rows = np.abs(rng.normal(size=(n, d)))
    rows[np.arange(n), labels * 3] += 2.0
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


@pytest.mark.parametrize(("n", "d", "classes"), [(3, 40, 2), (12, 40, 3), (30, 40, 4), (90, 40, 2), (200, 40, 5)])
def test_it_is_the_head_ridge_with_its_first_parameters(n: int, d: int, classes: int) -> None:
    rows, labels = rows_of(n, d, classes)
    fitted = InstantRidge.fit(rows, labels, classes)
    wanted = make_head("ridge").fit(rows, labels)
    assert np.array_equal(fitted.probabilities(rows).argmax(axis=1), wanted.predict(rows))
    # Its temperature is from held-out rows one at a time, that of the head from up to ten folds.
    scores = wanted.decision_function(rows).reshape(n, -1)
    both = np.hstack([-scores, scores]) if classes == 2 else scores
    np.testing.assert_allclose(fitted.probabilities(rows), softmax(both, fitted.temperature), atol=1e-9)
    assert fitted.temperature == pytest.approx(wanted[-1].temperature_, rel=0.25)


@pytest.mark.parametrize(("n", "d", "classes"), [(12, 40, 3), (90, 40, 2)])
def test_what_it_says_of_its_rows_is_what_a_fit_without_each_says(n: int, d: int, classes: int) -> None:
    rows, labels = rows_of(n, d, classes)
    fitted = InstantRidge.fit(rows, labels, classes)
    x = np.hstack([rows, np.ones((n, 1))])
    alpha = np.square(rows - rows.mean(axis=0)).sum() / n
    targets = np.where(labels[:, None] == np.arange(classes), 1.0, -1.0)
    without = [
        Ridge(alpha, fit_intercept=False).fit(np.delete(x, i, 0), np.delete(targets, i, 0)).predict(x[i : i + 1])[0]
        for i in range(n)
    ]
    np.testing.assert_allclose(fitted.held_out, softmax(np.array(without), fitted.temperature), atol=1e-9)


def test_a_class_with_one_row_keeps_the_prior_of_the_temperature() -> None:
    rows, labels = rows_of(5, 10, 3)
    labels = np.array([0, 0, 1, 1, 2])
    assert InstantRidge.fit(rows, labels, 3).temperature == 8.0


def test_rows_that_are_all_the_same_are_no_error() -> None:
    rows = np.tile(np.eye(1, 6), (4, 1))
    found = InstantRidge.fit(rows, np.array([0, 1, 0, 1]), 2)
    np.testing.assert_allclose(found.probabilities(rows), 0.5)
