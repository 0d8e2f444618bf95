"""Every shortcut against the plain scikit-learn estimator that it claims to equal."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge as SkRidge
from sklearn.svm import LinearSVC

from featx.heads.solvers.rows import (
    NewtonPath,
    RowSpace,
    discriminant,
    hinge_duals,
    ridge_held_out,
    ridge_with_held_out,
    temperature,
)

Array = NDArray[np.float64]


def blobs(n_classes: int, shots: int, d: int, seed: int = 0, spread: float = 1.0) -> tuple[Array, NDArray[np.int64]]:
    """Embeddings as a ReLU network makes them: non-negative, with an offset shared by all."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n_classes, d))
    labels = np.repeat(np.arange(n_classes), shots)
    rows = np.maximum(centres[labels] * spread + rng.normal(size=(len(labels), d)) + 0.5, 0)
    return rows, labels


def softmax(scores: Array) -> Array:
    power: Array = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(power / power.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (20, 20)])
def test_row_space_keeps_every_inner_product(shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(1).normal(size=shape) + 3.0
    space, centred = RowSpace(rows), rows - rows.mean(axis=0)
    assert space.coordinates.shape[1] == np.linalg.matrix_rank(centred)
    np.testing.assert_allclose(space.coordinates @ space.coordinates.T, centred @ centred.T, atol=1e-9)
    gram = space.coordinates.T @ space.coordinates
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-8)
    assert (np.diff(np.diag(gram)) <= 1e-9).all()


def test_row_space_of_equal_rows_is_empty() -> None:
    assert RowSpace(np.ones((4, 6))).coordinates.shape == (4, 0)


@pytest.mark.parametrize("n_classes", [2, 3, 7])
@pytest.mark.parametrize("d", [5, 60])
def test_logistic_path_equals_logistic_regression(n_classes: int, d: int) -> None:
    rows, labels = blobs(n_classes, 8, d, spread=0.4)
    other = blobs(n_classes, 20, d, seed=1, spread=0.4)[0]
    space = RowSpace(rows)
    path = NewtonPath(space.coordinates, labels, n_classes, np.ones((1, len(rows))), loss="softmax")
    for c in (1e-3, 0.1, 10.0):
        point = path.solve(np.array([c]))
        plain = LogisticRegression(C=c, tol=1e-10, max_iter=20_000).fit(rows, labels)
        coef, intercept = space.coefficients(point.coef[0], point.intercept[0])
        ours = softmax(other @ coef.T + intercept)
        assert point.converged.all()
        np.testing.assert_allclose(ours, plain.predict_proba(other), atol=2e-5)


def test_folds_as_weights_equal_fits_of_each_fold() -> None:
    rows, labels = blobs(3, 10, 30, spread=0.3)
    folds = np.tile(np.arange(5), 6)
    weights = np.stack([(folds != f).astype(float) for f in range(5)])
    space = RowSpace(rows)
    point = NewtonPath(space.coordinates, labels, 3, weights, loss="softmax").solve(np.full(5, 0.5))
    for f in range(5):
        plain = LogisticRegression(C=0.5, tol=1e-10, max_iter=20_000).fit(rows[folds != f], labels[folds != f])
        ours = softmax(space.coordinates @ point.coef[f] + point.intercept[f])
        np.testing.assert_allclose(ours, plain.predict_proba(rows), atol=2e-5)


@pytest.mark.parametrize("n_classes", [2, 5])
def test_squared_hinge_path_equals_linear_svc(n_classes: int) -> None:
    rows, labels = blobs(n_classes, 9, 40, spread=0.3)
    other = blobs(n_classes, 20, 40, seed=1, spread=0.3)[0]
    space = RowSpace(rows)
    path = NewtonPath(space.lifted, labels, n_classes, np.ones((1, len(rows))), loss="squared_hinge")
    for c in (1e-3, 0.1, 10.0):
        point = path.solve(np.array([c]))
        model = LinearSVC(C=c, tol=1e-10, max_iter=200_000, intercept_scaling=space.constant)
        plain = model.fit(rows, labels).decision_function(other)
        coef, intercept = space.lifted_coefficients(point.coef[0])
        ours = other @ coef.T + intercept
        np.testing.assert_allclose(ours.reshape(plain.shape), plain, atol=1e-5)


@pytest.mark.parametrize("n_classes", [2, 5])
@pytest.mark.parametrize("d", [6, 60])
def test_hinge_by_products_equals_linear_svc_of_each_fold(n_classes: int, d: int) -> None:
    rows, labels = blobs(n_classes, 9, d, spread=0.3)
    space, folds = RowSpace(rows, products=rows @ rows.T), np.tile(np.arange(3), 3 * n_classes)
    products = space.lifted_products
    assert products is not None
    targets = np.where(labels[:, None] == np.arange(n_classes), 1.0, -1.0)[:, -n_classes if n_classes > 2 else 1 :]
    weights = folds != np.arange(3)[:, None]
    start = None
    for c in (1e-3, 0.1, 10.0):
        start, converged = hinge_duals(products, targets, weights, np.full(3, c), start=start, tolerance=1e-10)
        assert converged.all()
        for fold in range(3):
            assert not start[folds == fold, fold].any()
            plain = LinearSVC(C=c, tol=1e-10, max_iter=200_000, intercept_scaling=space.constant)
            plain.fit(rows[folds != fold], labels[folds != fold])
            coef, offset = space.dual_coefficients(start[:, fold])
            np.testing.assert_allclose(coef, plain.coef_, atol=1e-5)
            np.testing.assert_allclose(offset, plain.intercept_, atol=1e-5)


@pytest.mark.parametrize("d", [6, 60])
def test_lifted_space_is_the_rows_and_a_constant(d: int) -> None:
    """With its inner products known or not, and for whatever is linear in it."""
    rows, _ = blobs(3, 6, d)
    design = np.hstack([rows, np.full((len(rows), 1), np.sqrt((rows**2).sum() / len(rows)))])
    for space in (RowSpace(rows), RowSpace(rows, products=rows @ rows.T)):
        np.testing.assert_allclose(space.lifted @ space.lifted.T, design @ design.T, atol=1e-8)
        inner = np.random.default_rng(0).normal(size=(space.lifted.shape[1], 2))
        coef, offset = space.lifted_coefficients(inner)
        np.testing.assert_allclose(rows @ coef.T + offset, space.lifted @ inner, atol=1e-8)


@pytest.mark.parametrize("d", [3, 6, 60])  # folds of six rows: more than there are directions, as many, fewer
@pytest.mark.parametrize("known", ["rows", "products", "coordinates"])
def test_ridge_equals_ridge_and_its_held_out_predictions(d: int, known: str) -> None:
    rows, labels = blobs(3, 6, d)
    targets, folds = np.where(labels[:, None] == np.arange(3), 1.0, -1.0), np.tile(np.arange(3), 6)
    space = RowSpace(rows, products=rows @ rows.T if known == "products" else None)
    if known == "coordinates":
        assert len(space.coordinates) == len(rows)
    constant = np.sqrt((rows**2).sum() / len(rows))
    design = np.hstack([rows, np.full((len(rows), 1), constant)])
    for alpha in (0.1, 10.0):
        plain = SkRidge(alpha=alpha, fit_intercept=False, solver="svd").fit(design, targets)
        coef, offset, held_out = ridge_with_held_out(space, targets, alpha, folds)
        np.testing.assert_allclose(coef, plain.coef_[:, :-1], atol=1e-9)
        np.testing.assert_allclose(offset, plain.coef_[:, -1] * constant, atol=1e-9)
        np.testing.assert_array_equal(held_out, ridge_held_out(space, targets, alpha, folds))
        for fold in range(3):
            held = folds == fold
            left = SkRidge(alpha=alpha, fit_intercept=False, solver="svd").fit(design[~held], targets[~held])
            np.testing.assert_allclose(held_out[held], left.predict(design[held]), atol=1e-8)
        nothing = ridge_held_out(space, targets, alpha, np.zeros_like(folds))  # of no rows at all
        # Two cancellations, each of as many digits as the largest direction has over the penalty.
        rounding = np.finfo(float).eps * (np.linalg.eigvalsh(design @ design.T).max() / alpha) ** 2
        np.testing.assert_allclose(nothing, 0.0, atol=max(1e-8, rounding))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(-3, 4), st.sampled_from(["softmax", "squared_hinge"]))
def test_no_step_from_the_solution_gains(seed: int, exponent: float, loss: str) -> None:
    """The optimum of a convex function: its gradient is zero, checked by differences in random directions."""
    rows, labels = blobs(3, 4, 8, seed=seed, spread=0.5)
    space, c = RowSpace(rows), 10.0**exponent
    weights = np.ones((1, len(rows)))
    point = NewtonPath(space.coordinates, labels, 3, weights, loss=loss).solve(np.array([c]))  # type: ignore[arg-type]
    assert point.converged.all()
    target = labels[:, None] == np.arange(3)

    def objective(coef: Array, intercept: Array) -> float:
        scores = space.coordinates @ coef + intercept
        if loss == "softmax":
            total = -np.log(softmax(scores)[target]).sum()
        else:
            total = (np.maximum(1 - np.where(target, 1, -1) * scores, 0) ** 2).sum()
        return float(total + (coef**2).sum() / (2 * c))

    best = objective(point.coef[0], point.intercept[0])
    rng = np.random.default_rng(seed)
    for _ in range(10):
        step = rng.normal(size=point.coef[0].shape)
        step *= 1e-2 * np.linalg.norm(point.coef[0]) / np.linalg.norm(step)
        assert objective(point.coef[0] + step, point.intercept[0]) >= best - 1e-7
        if loss == "softmax":
            assert objective(point.coef[0], point.intercept[0] + 1e-2 * rng.normal(size=3)) >= best - 1e-7


@pytest.mark.parametrize("d", [6, 50])
def test_discriminants_equal_linear_discriminant_analysis(d: int) -> None:
    rows, labels = blobs(4, 7, d, spread=0.5)
    other = blobs(4, 20, d, seed=1, spread=0.5)[0]
    decomposed = RowSpace(rows)
    assert len(decomposed.coordinates) == len(rows)
    for space in (RowSpace(rows), RowSpace(rows, products=rows @ rows.T), decomposed):
        for shrinkage in (0.1, 0.5, 1.0):
            coef, offset = discriminant(space, labels, 4, shrinkage)
            plain = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(rows, labels)
            np.testing.assert_allclose(softmax(other @ coef.T + offset), plain.predict_proba(other), atol=1e-7)


def test_discriminant_without_spread_is_the_nearest_centroid() -> None:
    rows, _ = blobs(5, 1, 30)
    coef, offset = discriminant(RowSpace(rows), np.arange(5), 5, 0.5)
    other = blobs(5, 30, 30, seed=3)[0]
    nearest = ((other[:, None] - rows[None]) ** 2).sum(axis=2).argmin(axis=1)
    np.testing.assert_array_equal((other @ coef.T + offset).argmax(axis=1), nearest)


def test_reaching_the_limit_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featx.heads.solvers.rows._MAX_NEWTON", 1)
    rows, labels = blobs(3, 8, 20)
    with warnings.catch_warnings():
        path = NewtonPath(rows, labels, 3, np.ones((1, len(rows))), loss="softmax")
        assert not path.solve(np.array([100.0])).converged.any()


def test_temperature_recovers_the_one_that_made_the_labels_and_stays_finite() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40_000, 4))
    truth = softmax(3.0 * scores)
    labels = (rng.random((40_000, 1)) > truth.cumsum(axis=1)).sum(axis=1)
    assert temperature(scores, labels) == pytest.approx(3.0, rel=0.05)
    right = scores.argmax(axis=1)  # never wrong: the likelihood alone asks for infinity
    assert 8.0 < temperature(scores[:10], right[:10]) < 30.0
    assert temperature(scores[:0], right[:0]) == pytest.approx(8.0, rel=1e-3)
