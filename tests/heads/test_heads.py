"""The catalogue, member by member, and each head against the scikit-learn estimator that it equals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler
from sklearn.svm import LinearSVC

from featx.errors import UsageError
from featx.heads.catalogue import HEADS, make_head
from featx.heads.normalise import Normalise
from featx.heads.scorer import KINDS, Kind


def blobs(n_classes: int, shots: int, d: int = 40, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Non-negative embeddings with an offset; the centres do not depend on the seed."""
    centres = np.random.default_rng(99).normal(size=(n_classes, d))
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(n_classes), shots)
    return np.maximum(0.7 * centres[labels] + rng.normal(size=(len(labels), d)) + 0.5, 0), labels


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("n_classes", [2, 4])
def test_every_member_keeps_the_promises_of_a_classifier(name: str, n_classes: int) -> None:
    rows, labels = blobs(n_classes, 12)
    names = np.array(["ant", "bee", "cat", "dog"])[labels]
    head = make_head(name)
    assert isinstance(head, Pipeline)
    assert [step for step, _ in head.steps] == ["normalise", "classify"]
    model = clone(head).fit(rows, names)
    assert model.classes_.tolist() == sorted(set(names))
    other, truth = blobs(n_classes, 50, seed=1)
    assert (model.predict(other) == np.array(["ant", "bee", "cat", "dog"])[truth]).mean() > 0.8
    if HEADS[name].probabilistic:
        probabilities = model.predict_proba(other)
        assert probabilities.shape == (len(other), n_classes)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1.0)
        np.testing.assert_array_equal(model.classes_[probabilities.argmax(axis=1)], model.predict(other))
    else:
        assert not hasattr(model, "predict_proba")
    if hasattr(model, "decision_function"):
        scores = model.decision_function(other)
        assert scores.shape == ((len(other),) if n_classes == 2 else (len(other), n_classes))
    again = clone(head).fit(rows, names)
    np.testing.assert_array_equal(model.predict(other), again.predict(other))
    mixed = np.random.default_rng(0).permutation(len(rows))
    np.testing.assert_array_equal(clone(head).fit(rows[mixed], names[mixed]).predict(other), model.predict(other))


@pytest.mark.parametrize("name", HEADS)
def test_every_member_works_at_one_shot_and_with_equal_rows(name: str) -> None:
    rows, labels = blobs(3, 1)
    assert make_head(name).fit(rows, labels).predict(rows).tolist() == [0, 1, 2]
    same = np.ones((4, 8))
    assert set(make_head(name).fit(same, [0, 0, 1, 1]).predict(same)) <= {0, 1}


@pytest.mark.parametrize("name", HEADS)
def test_default_and_grid_of_every_member_can_be_built(name: str) -> None:
    head = HEADS[name]
    assert head.name == name
    assert head.summary
    assert set(head.kinds) == set(KINDS)
    params = head.build(**head.default).get_params()
    fresh = head.build().get_params()
    grid: dict[str, Any] = {"normalise__kind": head.kinds}
    grid |= {f"classify__{head.parameter}": head.values} if head.parameter else {}
    for key, values in grid.items():
        assert params[key] == fresh[key]
        assert fresh[key] in values
    rows, labels = blobs(3, 20)
    small = {key: values[:2] for key, values in grid.items()}
    assert GridSearchCV(head.build(), small, cv=2).fit(rows, labels).best_score_ > 0.6


def test_unknown_names_and_parameters_are_usage_errors() -> None:
    with pytest.raises(UsageError, match=r"no such head: expected one of logreg, .*auto, found logrek\. Did you mean"):
        make_head("logrek")
    with pytest.raises(UsageError, match=r"no such head.*found ridge_pool\. It learns from images without labels: add"):
        make_head("ridge_pool")
    with pytest.raises(UsageError, match=r"head ridge does not take these parameters: expected alpha, kind, scale"):
        make_head("ridge", C=1.0)
    with pytest.raises(TypeError):
        HEADS["mine"] = HEADS["ridge"]  # type: ignore[index]


def test_auto_is_the_recommended_head() -> None:
    assert HEADS["auto"] is HEADS[HEADS.recommended]
    assert "auto" in HEADS
    assert "auto" not in list(HEADS)
    assert repr(make_head()) == repr(make_head(HEADS.recommended))


WITH_ONE = FunctionTransformer(lambda rows: np.hstack([rows, np.ones((len(rows), 1))]))

PLAIN: list[tuple[str, dict[str, Any], Any]] = [
    ("logreg", {"C": 2.0, "scale_free": False}, LogisticRegression(C=2.0, tol=1e-10, max_iter=20_000)),
    ("linear_svm", {"C": 0.5, "scale_free": False}, LinearSVC(C=0.5, tol=1e-10, max_iter=200_000)),
    ("ridge", {"alpha": 3.0, "scale_free": False}, make_pipeline(WITH_ONE, RidgeClassifier(3.0, fit_intercept=False))),
    ("lda", {"shrinkage": 0.4}, LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.4)),
]


@pytest.mark.parametrize(("name", "params", "plain"), PLAIN)
@pytest.mark.parametrize("n_classes", [2, 5])
@pytest.mark.parametrize("d", [20, 90])
def test_heads_equal_plain_scikit_learn(name: str, params: dict[str, Any], plain: Any, n_classes: int, d: int) -> None:
    rows, labels = blobs(n_classes, 8, d)
    other, _ = blobs(n_classes, 30, d, seed=1)
    ours = make_head(name, kind="l2", **params).fit(rows, labels)
    theirs = make_pipeline(Normalizer(), clone(plain)).fit(rows, labels)
    if name == "lda":
        np.testing.assert_allclose(ours.predict_proba(other), theirs.predict_proba(other), atol=1e-6)
    else:
        np.testing.assert_allclose(ours.decision_function(other), theirs.decision_function(other), atol=2e-5)
    np.testing.assert_array_equal(ours.predict(other), theirs.predict(other))


def test_nearest_centroid_names_the_same_classes_as_scikit_learn() -> None:
    rows, labels = blobs(5, 6)
    other, _ = blobs(5, 40, seed=1)
    ours = make_head("nearest_centroid", kind="none").fit(rows, labels)
    np.testing.assert_array_equal(ours.predict(other), NearestCentroid().fit(rows, labels).predict(other))


@pytest.mark.parametrize("name", ["logreg", "ridge"])  # LinearSVC penalises its intercept, which sees the scale
def test_a_scale_free_penalty_does_not_see_the_scale(name: str) -> None:
    rows, labels = blobs(3, 8)
    other, _ = blobs(3, 30, seed=1)
    small = make_head(name, kind="none").fit(rows, labels).decision_function(other)
    large = make_head(name, kind="none").fit(1000 * rows, labels).decision_function(1000 * other)
    np.testing.assert_allclose(small, large, rtol=1e-4, atol=1e-5)


def test_scale_free_c_is_the_constant_by_the_mean_squared_norm() -> None:
    rows, labels = blobs(3, 8)
    unit = Normalizer().fit_transform(rows)
    centred = unit - unit.mean(axis=0)
    c = 316.0 / (centred**2).sum(axis=1).mean()
    assert unit.var(axis=0).sum() == pytest.approx(316.0 / c)
    ours = make_head("logreg").fit(rows, labels).predict_proba(rows)
    plain = LogisticRegression(C=c, tol=1e-10, max_iter=50_000).fit(unit, labels).predict_proba(unit)
    np.testing.assert_allclose(ours, plain, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_normalisers(kind: Kind) -> None:
    rows, _ = blobs(3, 10)
    rows[0] = 0.0
    out = Normalise(kind).fit(rows).transform(rows)
    lengths = np.linalg.norm(out[1:], axis=1)
    if kind == "none":
        np.testing.assert_array_equal(out, rows)
    elif kind == "standardise":
        np.testing.assert_allclose(out, StandardScaler().fit_transform(rows), atol=1e-12)
    else:
        np.testing.assert_allclose(lengths, 1.0)
    assert np.isfinite(out).all()
    if kind == "power_l2":
        signed = Normalise(kind).fit_transform(-rows)
        np.testing.assert_allclose(signed, -out)
        np.testing.assert_allclose(out[1] ** 2, rows[1] / rows[1].sum(), atol=1e-12)


def test_a_mean_from_elsewhere_is_used() -> None:
    rows, _ = blobs(3, 10)
    mean = np.full(rows.shape[1], 0.25)
    out = Normalise("centre_l2", mean=mean).fit(rows).transform(rows)
    np.testing.assert_allclose(out, Normalizer().transform(rows - mean))
    with pytest.raises(ValueError, match=r"mean of Normalise must have shape \(40,\), got \(3,\)"):
        Normalise("centre_l2", mean=np.zeros(3)).fit(rows)
    with pytest.raises(ValueError, match="kind of Normalise must be one of none, l2"):
        Normalise("l3").fit(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "param"), [("logreg", "C"), ("linear_svm", "C"), ("ridge", "alpha"), ("lda", "shrinkage")]
)
def test_penalties_out_of_range_are_refused_in_fit(name: str, param: str) -> None:
    rows, labels = blobs(2, 4)
    with pytest.raises(ValueError, match=rf"{param} of \w+ must .*, got -1"):
        make_head(name, **{param: -1.0}).fit(rows, labels)


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="a head needs rows of at least 2 classes"):
        make_head("ridge").fit(np.eye(3), [1, 1, 1])


def test_stopping_early_is_a_convergence_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featx.heads.solvers.rows._MAX_NEWTON", 1)
    rows, labels = blobs(3, 8)
    with pytest.warns(ConvergenceWarning, match=r"Logistic\(C=316.0\) stopped before the optimum"):
        make_head("logreg").fit(rows, labels)
