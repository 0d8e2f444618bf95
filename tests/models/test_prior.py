"""Classes that are met in other shares than they were labelled in: nearly Bayes' rule, and promises that hold then."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Featx, class_folders
from modelkit import clusters, make_bundle
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from featx.errors import BundleError, UsageError
from featx.evaluation import stats
from featx.heads.catalogue import HEADS, make_head
from featx.heads.scorer import softmax
from featx.models.bundle import bundle_bytes, parse_bundle
from featx.models.calibrate import fit_threshold
from featx.models.export import export_bundle, to_pipeline
from featx.models.fit import fit_head, measure
from featx.models.prior import class_weights, fit_offsets, prior_shares, read_prior, shift

Floats = NDArray[np.float64]


def gaussians(shares: list[float], n: int, seed: int, dims: int = 8) -> tuple[Any, Any, Floats]:
    """Rows of unit Gaussians about the same centres always, labels drawn by shares, and the densities' logs (n, c)."""
    centres = 1.1 * np.random.default_rng(5).normal(size=(len(shares), dims))
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(shares), n, p=shares)
    rows = centres[labels] + rng.normal(size=(n, dims))
    return rows.astype(np.float32), labels, -0.5 * ((rows[:, None] - centres) ** 2).sum(axis=2)


TAUGHT, MET = [0.75, 0.07, 0.18], [0.2, 0.6, 0.2]


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_every_head_comes_near_to_bayes_rule_under_the_new_shares(name: str) -> None:
    rows, labels, _ = gaussians(TAUGHT, 400, 1)
    new, truth, densities = gaussians(MET, 6000, 2)
    bayes = ((densities + np.log(MET)).argmax(axis=1) == truth).mean()
    prior = dict(zip("abc", MET, strict=True))
    asked: dict[str, Any] = {"class_names": list("abc"), "heads": [name], "max_unknown": 0, "near_duplicates": None}
    asked["max_error"] = 0.15
    plain = fit_head(rows, labels, **asked)
    fitted = fit_head(rows, labels, **asked, prior=prior)
    right = {
        "plain": (plain.scorer.scores(new).argmax(axis=1) == truth).mean(),
        "prior": (fitted.scorer.scores(new).argmax(axis=1) == truth).mean(),
    }
    assert right["prior"] > bayes - (0.09 if name == "knn" else 0.04)  # nearest neighbours are coarse
    # Class means know nothing of shares; every other head gains.
    assert right["prior"] > right["plain"] + (-0.03 if name == "nearest_centroid" else 0.005)
    # What the fit says is what is found, under the new shares.
    told = fitted.metrics["out_of_fold"]
    assert told["accuracy"]["low"] - 0.01 <= right["prior"] <= told["accuracy"]["high"] + 0.01
    assert fitted.prior == pytest.approx(prior)
    assert fitted.sharpness is not None and fitted.threshold is not None
    chances = softmax(fitted.scorer.scores(new), fitted.sharpness)
    assert stats.expected_calibration_error(chances.max(axis=1), chances.argmax(axis=1) == truth) < 0.06
    answered = chances.max(axis=1) >= fitted.threshold
    assert answered.mean() > 0.3
    assert (chances.argmax(axis=1) != truth)[answered].mean() < 0.17


@pytest.mark.slow
def test_the_error_under_the_new_shares_is_kept_on_average() -> None:
    rates: list[float] = []
    plain: list[float] = []
    for seed in range(40):
        rows, labels, _ = gaussians([0.8, 0.1, 0.1], 250, seed)
        new, truth, _ = gaussians([0.1, 0.6, 0.3], 3000, 1000 + seed)
        for prior, into in ((dict(zip("abc", [0.1, 0.6, 0.3], strict=True)), rates), (None, plain)):
            fitted = fit_head(
                rows, labels, class_names=list("abc"), heads=["lda"], max_unknown=0, near_duplicates=None, prior=prior,
                max_error=0.1,
            )  # fmt: skip
            chances = softmax(fitted.scorer.scores(new), fitted.sharpness or 1.0)
            answered = chances.max(axis=1) >= (fitted.threshold or 2.0)
            if answered.any():
                into.append(float((chances.argmax(axis=1) != truth)[answered].mean()))
    assert len(rates) > 20
    assert np.mean(rates) < 0.1 < np.mean(plain)


def test_offsets_make_the_mean_probability_the_share() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(3000, 4)) * 2 + np.array([0.0, 1.0, -2.0, 0.5])
    labels = np.array([rng.choice(4, p=p) for p in softmax(truth)])
    # Scores in units of their own, and off by as much in each class as ridge's are.
    sharpness, offsets = fit_offsets(3.0 * truth - np.array([6.0, 0.0, 3.0, -1.0]), labels)
    assert sharpness * 3.0 == pytest.approx(1.0, abs=0.06)
    wanted = sharpness * np.array([6.0, 0.0, 3.0, -1.0])
    assert offsets - offsets[0] == pytest.approx(wanted - wanted[0], abs=0.15)
    chances = softmax(sharpness * (3.0 * truth - np.array([6.0, 0.0, 3.0, -1.0])) + offsets)
    assert chances.mean(axis=0) == pytest.approx(np.bincount(labels) / 3000, abs=1e-4)


def test_two_classes_are_logistic_regression_moved_by_the_odds() -> None:
    rng = np.random.default_rng(3)
    scores = rng.normal(size=4000)
    labels = (rng.random(4000) < 1 / (1 + np.exp(-(1.5 * scores - 2)))).astype(int)
    plain = LogisticRegression(C=1e6).fit(scores[:, None], labels)
    sharpness, added = shift(np.column_stack([np.zeros(4000), scores]), labels, np.array([0.5, 0.5]))
    odds = math.log((1 - labels.mean()) / labels.mean())
    assert sharpness == pytest.approx(plain.coef_[0, 0], rel=0.01)
    assert sharpness * (added[1] - added[0]) == pytest.approx(plain.intercept_[0] + odds, abs=0.02)


def test_always_right_stays_finite_and_shares_stay() -> None:
    labels = np.repeat([0, 1], [38, 2])
    scores = np.where(labels[:, None] == np.arange(2), 1.0, -1.0)
    sharpness, offsets = fit_offsets(scores, labels)
    chances = softmax(sharpness * scores + offsets)
    assert np.isfinite(chances).all()
    assert chances.mean(axis=0) == pytest.approx([0.95, 0.05], abs=1e-3)


def test_measures_under_shares_are_those_of_as_many_copies() -> None:
    rng = np.random.default_rng(4)
    labels, scores = rng.choice(3, 90, p=[0.6, 0.3, 0.1]), rng.normal(size=(90, 3))
    times = np.array([1, 2, 5])
    found = measure(labels, scores, softmax(scores), 0.5, list("abc"), times[labels].astype(float))
    rows = np.repeat(np.arange(90), times[labels])
    copied = measure(labels[rows], scores[rows], softmax(scores[rows]), 0.5, list("abc"))
    for name in ("log_loss", "brier", "ece", "macro_f1", "answered", "error_among_answered", "majority_baseline"):
        assert found[name] == pytest.approx(copied[name]), name
    assert found["accuracy"]["mean"] == pytest.approx(copied["accuracy"]["mean"])
    # But copies are no evidence.
    assert found["accuracy"]["low"] < copied["accuracy"]["low"]
    assert found["recall_per_class"] == measure(labels, scores, softmax(scores), 0.5, list("abc"))["recall_per_class"]


def test_the_threshold_counts_the_heaviest_image_once_more() -> None:
    right = np.ones(30, bool)
    weights = np.where(np.arange(30) < 3, 5.0, 0.5)
    total = weights.sum()
    least = 5.0 / (total + 5.0)
    assert fit_threshold(np.linspace(1, 0.5, 30), right, least + 1e-9, weights, 5.0) is not None
    assert fit_threshold(np.linspace(1, 0.5, 30), right, least - 1e-9, weights, 5.0) is None
    rng = np.random.default_rng(1)
    scores, correct = rng.random(100), rng.random(100) < 0.9
    assert fit_threshold(scores, correct, 0.1, np.full(100, 1.0)) == fit_threshold(scores, correct, 0.1)


def test_class_weights_have_a_mean_of_one_and_the_shares() -> None:
    labels = np.repeat([0, 1, 2], [60, 8, 32])
    weights = class_weights(labels, np.array([0.2, 0.5, 0.3]))[labels]
    assert weights.mean() == pytest.approx(1.0)
    assert np.bincount(labels, weights) / 100 == pytest.approx([0.2, 0.5, 0.3])


# --- what is kept and exported ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in HEADS if name != "knn"])
def test_an_exported_head_has_the_shift(name: str, tmp_path: Path) -> None:
    rows, labels, _ = gaussians(TAUGHT, 200, 3)
    asked: dict[str, Any] = {"class_names": list("abc"), "heads": [name], "max_unknown": 0, "near_duplicates": None}
    fitted = fit_head(rows, labels, **asked, prior="equal")
    bundle = make_bundle(
        make_head(name).fit(rows, labels), rows, class_names=tuple("abc"), scorer=fitted.scorer,
        sharpness=fitted.sharpness, threshold=fitted.threshold, prior=fitted.prior,
    )  # fmt: skip
    if fitted.scorer.kind == "power_l2":
        pytest.skip("this normaliser has no counterpart in scikit-learn")
    chances = to_pipeline(bundle).predict_proba(rows.astype(np.float64))
    assert np.abs(chances - bundle.probabilities(rows)).max() < 1e-6
    plain = fit_head(rows, labels, **asked)
    assert np.abs(softmax(plain.scorer.scores(rows), plain.sharpness or 1.0) - chances).max() > 0.05
    pytest.importorskip("onnx")
    pytest.importorskip("openvino")
    from featx.backbones.engines.graph import import_openvino

    path = export_bundle(bundle, tmp_path / "a.onnx", "onnx")
    compiled = import_openvino().Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert np.abs(compiled({"embedding": rows})["probabilities"] - chances).max() < 1e-4


def test_neighbours_are_shifted_and_kept_but_not_exported(tmp_path: Path) -> None:
    rows, labels = clusters(3, 40)
    fitted = fit_head(rows, labels, class_names=list("abc"), heads=["knn"], prior={"a": 0.8, "b": 0.1, "c": 0.1})
    assert fitted.scorer.intercept is not None
    bundle = make_bundle(
        make_head("knn").fit(rows, labels), rows, class_names=tuple("abc"), scorer=fitted.scorer,
        sharpness=fitted.sharpness, prior=fitted.prior,
    )  # fmt: skip
    again = parse_bundle(bundle_bytes(bundle), tmp_path)
    assert again.prior == bundle.prior and again.describe()["prior"] == bundle.prior
    assert np.array_equal(again.probabilities(rows), bundle.probabilities(rows))
    with pytest.raises(UsageError, match="votes of neighbours cannot be shifted"):
        export_bundle(bundle, tmp_path / "a.joblib", "joblib")


def test_a_forged_prior_is_refused(tmp_path: Path) -> None:
    rows, labels = clusters(3, 10)
    bundle = make_bundle(make_head("logreg").fit(rows, labels), rows, class_names=tuple("abc"))
    for prior in (
        {"a": 0.5, "b": 0.5},
        {"a": 0.5, "b": 0.6, "c": 0.1},
        {"a": 1.0, "b": 0.0, "c": 0.0},
        {"a": 1.0, "x": 0.1},
    ):
        with pytest.raises(BundleError, match="prior"):
            parse_bundle(bundle_bytes(replace(bundle, prior=prior)), tmp_path)


# --- what --prior takes -------------------------------------------------------------------------------------------


def test_what_a_prior_may_be(tmp_path: Path) -> None:
    assert read_prior("as-is") is None and prior_shares(None, "ab") is None
    equal = prior_shares(read_prior("equal"), "abcd")
    assert equal is not None and equal.tolist() == [0.25] * 4
    for name, text in (
        ("a.json", '{"ants": 0.25, "bees": 0.75}'),
        ("a.csv", "class,share\nbees,0.75\nants,0.25\n"),
        ("b.csv", "\ufeffClass, Share\nants, 0.251\nbees, 0.753\n"),  # rounded by people
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        shares = prior_shares(read_prior(str(tmp_path / name)), ["ants", "bees"])
        assert shares is not None
        assert shares == pytest.approx([0.25, 0.75], abs=1e-3) and shares.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[1]", "not a table of shares .no JSON object."),
        ("a.json", "{", "not a table of shares"),
        ("a.json", '{"ants": 0.5, "ants": 0.5}', "a class is named twice: found ants"),
        ("a.json", '{"ants": true, "bees": 0.5}', "the share of 'ants' is not valid"),
        ("a.json", '{"ants": 1.5, "bees": -0.5}', "the share of 'bees' is not valid: expected a number above 0"),
        ("a.json", '{"ants": 1, "bees": 0}', "better left out of the store"),
        ("a.json", '{"ants": 0.5, "bees": NaN}', "the share of 'bees' is not valid"),
        ("a.json", '{"ants": 0.5, "bees": 0.1}', "the shares do not sum to 1: found 0.6"),
        ("a.json", '{"ants": 0.5, "bee": 0.5}', "a class that has no images: expected ants, bees, found bee"),
        ("a.json", '{"ants": 1.0}', "a class without a share: found bees"),
        ("a.csv", "ants,0.5\nbees,0.5\n", "expected the columns class,share"),
        ("a.csv", "class,share\nants,half\nbees,0.5\n", "the share of 'ants' is not valid"),
        ("a.csv", "class,share\nants,0.5\nants,0.5\n", "a class is named twice: found ants"),
        ("a.csv", "class,share\nants,0.5,1\n", "not a class and its share"),
        ("a.csv", b"\xff\xfe\x00", "not a table of shares"),
        (None, None, "no such file: expected as-is, equal or a file"),
    ],
)
def test_what_it_may_not_be(name: str | None, text: str | bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / (name or "missing.csv")
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message):
        prior_shares(read_prior(str(path)), ["ants", "bees"])


def test_a_class_of_one_image_cannot_be_weighed() -> None:
    rows, labels = clusters(2, 10)
    with pytest.raises(UsageError, match=r"a class with a single image cannot be weighed.*found b"):
        fit_head(rows[:11], labels[:11], class_names=["a", "b"], prior="equal")


@pytest.mark.slow
def test_the_command(tmp_path: Path, featx: Featx) -> None:
    class_folders(tmp_path / "photos", each=30)
    for path in sorted((tmp_path / "photos/ants").iterdir())[9:]:
        path.unlink()
    assert featx("extract", "photos", "--out", "photos.featx", cwd=tmp_path).code == 0
    plain = featx("fit", "photos.featx", "--out", "plain.model", "--json", cwd=tmp_path).json
    assert plain["prior"] is None
    (tmp_path / "shares.json").write_text(json.dumps({"ants": 0.9, "bees": 0.1}))
    done = featx("fit", "photos.featx", "--out", "a.model", "--prior", "shares.json", "--json", cwd=tmp_path)
    assert done.json["prior"] == {"ants": pytest.approx(0.9), "bees": pytest.approx(0.1)}
    assert "with other shares of the classes (--prior): ants 90 %, bees 10 %." in done.err
    found = [
        [
            each["probabilities"]["ants"]
            for each in featx("predict", m, "photos", "--json", cwd=tmp_path).json["predictions"]
        ]
        for m in ("plain.model", "a.model")
    ]
    assert np.mean(found[1]) > np.mean(found[0])
    wrong = featx("fit", "photos.featx", "--out", "b.model", "--prior", "evenly", cwd=tmp_path)
    assert (wrong.code, "--prior: no such file: expected as-is, equal or a file" in wrong.err) == (2, True)
