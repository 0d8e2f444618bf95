"""Sets of labels: as MAPIE makes them, as often right as asked, and empty only for what is unknown."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Featx, class_folders
from modelkit import clusters, make_bundle
from numpy.typing import NDArray

from featx.errors import BundleError, UsageError
from featx.heads.catalogue import make_head
from featx.heads.scorer import softmax
from featx.models.bundle import Bundle, bundle_bytes, parse_bundle
from featx.models.calibrate import weighted_interval
from featx.models.export import Pickled, export_bundle
from featx.models.fit import fit_head
from featx.models.sets import (
    FREE_RANKS,
    PENALTY,
    Conformity,
    among_known,
    cross_sets,
    label_sets,
    measure_sets,
    rank_scores,
    true_scores,
)

Floats = NDArray[np.float64]


def drawn(n: int, c: int, seed: int, sharpness: float = 1.0) -> tuple[Floats, NDArray[np.intp]]:
    """Probabilities (n, c), and labels that are drawn by them."""
    rng = np.random.default_rng(seed)
    shares = softmax(sharpness * rng.normal(size=(n, c)))
    labels = np.array([rng.choice(c, p=p) for p in shares], dtype=np.intp)
    return shares, labels


class One(np.random.RandomState):
    """Random numbers that are all one: what makes MAPIE's randomised sets those of featx."""

    def uniform(self, *args: Any, **options: Any) -> Any:
        return np.ones(options["size"])


@pytest.mark.parametrize("c", [3, 5, 12])
@pytest.mark.parametrize("coverage", [0.6, 0.9, 0.97])
def test_without_a_penalty_they_are_mapies(c: int, coverage: float, monkeypatch: pytest.MonkeyPatch) -> None:
    mapie = pytest.importorskip("mapie.classification")
    scores = pytest.importorskip("mapie.conformity_scores")
    from sklearn.base import BaseEstimator, ClassifierMixin

    monkeypatch.setattr("featx.models.sets.PENALTY", 0.0)
    own, labels = drawn(200, c, c)
    new, _ = drawn(300, c, 99)

    class Given(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
        """Probabilities are its rows."""

        classes_ = np.arange(c)
        fitted_ = True

        def fit(self, X: Any, y: Any) -> Any:
            return self

        def predict_proba(self, X: Any) -> Any:
            return np.asarray(X)

        def predict(self, X: Any) -> Any:
            return np.asarray(X).argmax(axis=1)

    oracle = mapie.SplitConformalClassifier(
        Given(),
        confidence_level=coverage,
        conformity_score=scores.APSConformityScore(),
        prefit=True,
        random_state=One(),
    ).conformalize(own, labels)
    wanted = oracle.predict_set(new, conformity_score_params={"include_last_label": "randomized"})[1][:, :, 0]
    limit = Conformity.of(true_scores(own, labels)).limit(coverage)
    assert np.array_equal(label_sets(new, limit), wanted)
    assert 0 < label_sets(new, limit).mean() < 1


def test_the_scores_are_the_papers() -> None:
    shares, labels = drawn(50, 6, 1)
    found = rank_scores(shares)
    for row, probabilities in enumerate(shares):
        for label in range(6):
            above = [p for p in probabilities if p > probabilities[label]]
            penalty = PENALTY * max(len(above) + 1 - FREE_RANKS, 0)
            assert found[row, label] == pytest.approx(sum(above) + penalty, abs=1e-12)
    assert np.array_equal(true_scores(shares, labels), found[np.arange(50), labels])


@pytest.mark.parametrize(
    ("n", "coverage", "place"), [(9, 0.9, 9), (8, 0.9, None), (10, 0.9, 10), (99, 0.5, 50), (19, 0.1, 2)]
)
def test_the_limit_is_the_score_that_counts_one_more_image(n: int, coverage: float, place: int | None) -> None:
    scores = np.random.default_rng(0).permutation(n) / n
    limit = Conformity.of(scores).limit(coverage)
    assert limit == (math.inf if place is None else np.sort(scores)[place - 1])
    # Weights that are all the same are none.
    assert Conformity.of(scores, np.full(n, 3.0), 3.0).limit(coverage) == limit
    # Weights are numbers of copies, but that the new image may be any of them.
    twice = Conformity.of(scores, np.full(n, 1.0), 2.0).limit(coverage)
    assert twice >= limit


@pytest.mark.parametrize("coverage", [0.8, 0.9])
@pytest.mark.parametrize("n", [30, 200])
def test_new_images_are_covered_as_often_as_asked(coverage: float, n: int) -> None:
    held, sizes = [], []
    for seed in range(60):
        # Probabilities that are far too sure: coverage must not hang on calibration.
        shares, labels = drawn(n + 400, 6, seed)
        wrong = shares**3 / (shares**3).sum(axis=1, keepdims=True)
        limit = Conformity.of(true_scores(wrong[:n], labels[:n])).limit(coverage)
        sets = label_sets(wrong[n:], limit)
        held.append(sets[np.arange(400), labels[n:]].mean())
        sizes.append(sets.sum(axis=1).mean())
    error = np.std(held) / math.sqrt(len(held))
    assert np.mean(held) > coverage - 3 * error
    assert np.mean(held) < coverage + 0.05
    assert 1 < np.mean(sizes) < 6


def test_a_shift_of_the_classes_is_covered_with_weights_and_not_without() -> None:
    plain: list[float] = []
    weighted: list[float] = []
    for seed in range(80):
        rows, labels = clusters(2, 1000, dims=4, seed=3)
        rng = np.random.default_rng(seed)
        few = rng.permutation(np.r_[rng.choice(1000, 190, False), 1000 + rng.choice(1000, 40, False)])
        new = rng.permutation(1000)[:300] + 1000  # the rare class alone makes most of what is new
        # A head that hardly knows the rare class.
        score = softmax(np.column_stack([rows[:, 0] * 0 + 0.8, 0.5 * rows[:, 1]]))
        scores, weights = (
            true_scores(score[few], labels[few]),
            np.where(labels[few] == 1, 0.9 * 230 / 40, 0.1 * 230 / 190),
        )
        for into, conformity in (
            (plain, Conformity.of(scores)),
            (weighted, Conformity.of(scores, weights, float(weights.max()))),
        ):
            sets = label_sets(score, conformity.limit(0.8))
            into.append(float(0.9 * sets[new, 1].mean() + 0.1 * sets[:1000, 0].mean()))
    assert np.mean(plain) < 0.7
    assert np.mean(weighted) > 0.8 - 3 * np.std(weighted) / math.sqrt(80)


def test_of_very_many_scores_a_part_is_kept() -> None:
    scores = np.random.default_rng(1).random(30_000)
    kept = Conformity.of(scores, scores + 1.0, 2.0)
    assert len(kept.scores) == 10_000 and (np.diff(kept.scores) >= 0).all()
    assert kept.weights is not None and np.array_equal(kept.weights, kept.scores + 1.0)
    assert kept.limit(0.5) == pytest.approx(Conformity.of(scores, scores + 1.0, 2.0).limit(0.5))
    assert Conformity.of(scores).limit(0.9) == pytest.approx(0.9, abs=0.02)


# --- at fit -------------------------------------------------------------------------------------------------------


def test_the_fit_reports_what_new_images_will_show() -> None:
    rows, labels = clusters(5, 60, dims=6)
    fresh, truth = (each[300:] for each in clusters(5, 1000, dims=6))
    order = np.random.default_rng(0).permutation(300)
    fitted = fit_head(rows[order], labels[order], class_names=list("abcde"), max_unknown=0, near_duplicates=None)
    assert fitted.conformity is not None and fitted.sharpness is not None
    assert len(fitted.conformity.scores) == 300
    sets = label_sets(softmax(fitted.scorer.scores(fresh), fitted.sharpness), fitted.conformity.limit(0.9))
    told = fitted.metrics["out_of_fold"]["sets"]
    assert told["asked"] == 0.9
    held = sets[np.arange(len(truth)), truth]
    assert told["coverage"]["low"] <= held.mean() <= told["coverage"]["high"]
    assert told["coverage"]["mean"] >= 0.87
    assert told["mean_size"] == pytest.approx(sets.sum(axis=1).mean(), abs=0.25)
    for i, each in enumerate(told["per_class"].values()):
        assert each["images"] == 60
        assert each["low"] - 0.05 <= held[truth == i].mean() <= each["high"] + 0.05


def test_no_image_is_judged_by_a_limit_that_it_set() -> None:
    # Of two folds, one has high scores only: its images are judged by the others, and never held.
    shares = np.array([[0.9, 0.1]] * 40 + [[0.9, 0.1]] * 40)
    labels = np.array([0] * 40 + [1] * 40)
    folds = np.repeat([0, 1], 40)
    sets = cross_sets(shares, labels, folds, 0.9)
    assert sets[:40].all() and not sets[40:, 1].any()
    found = measure_sets(sets, labels, ["a", "b"], coverage=0.9)
    assert found["coverage"]["mean"] == 0.5
    assert [each["mean"] for each in found["per_class"].values()] == [1.0, 0.0]
    assert found["mean_size"] == 1.5


def test_weighted_intervals_are_clopper_and_pearsons_where_weights_are_equal() -> None:
    right = np.arange(40) < 33
    assert weighted_interval(right, np.full(40, 2.5)) == pytest.approx(weighted_interval(right))
    mean, low, high = weighted_interval(right, np.where(right, 1.0, 3.0))
    assert mean == pytest.approx(33 / 54) and low < mean < high
    assert weighted_interval(np.ones(9, bool), np.arange(1.0, 10.0))[2] == 1.0


# --- a kept model -------------------------------------------------------------------------------------------------


def kept(**changes: Any) -> tuple[Bundle, NDArray[np.float32]]:
    rows, labels = clusters(4, 50)
    model = make_head("logreg", kind="l2").fit(rows, labels)
    fitted = fit_head(rows, labels, class_names=[f"class {i}" for i in range(4)])
    fields = {
        "conformity": fitted.conformity, "familiarity": fitted.familiarity, "max_unknown": 0.05,
        "sharpness": fitted.sharpness, "scorer": fitted.scorer,
    }  # fmt: skip
    return make_bundle(model, rows, 4, **{**fields, **changes}), rows


def test_a_model_answers_with_sets_and_only_when_asked() -> None:
    bundle, rows = kept()
    plain, sets = bundle.answer(rows), bundle.answer(rows, 0.9)
    assert all(each.labels is None and "set" not in each.to_json() for each in plain)
    for one, two in zip(plain, sets, strict=True):
        assert two.to_json() == {"set": list(two.labels or ()), **one.to_json()}
        assert two.labels is not None
        if two.reason == "unknown":
            assert two.labels == ()
            continue
        assert two.labels[0] == two.label
        chances = [two.probabilities[name] for name in two.labels]
        assert chances == sorted(chances, reverse=True)
    wide, narrow = (sum(len(each.labels or ()) for each in bundle.answer(rows, asked)) for asked in (0.98, 0.5))
    assert wide > narrow


@pytest.mark.slow
def test_the_promise_is_kept_among_photos_that_are_known() -> None:
    assert among_known(0.9, 0.05) == pytest.approx(0.905)
    assert among_known(0.9, None) == among_known(0.9, 0.0) == pytest.approx(0.9)
    held = []
    for seed in range(40):
        rows, labels = clusters(4, 400, dims=5, seed=7)
        order = np.random.default_rng(seed).permutation(len(rows))
        fitted = fit_head(rows[order[:120]], labels[order[:120]], class_names=list("abcd"), random_state=seed)
        bundle = make_bundle(
            make_head("logreg").fit(rows, labels), rows, 4, class_names=tuple("abcd"), scorer=fitted.scorer,
            sharpness=fitted.sharpness, conformity=fitted.conformity, familiarity=fitted.familiarity, max_unknown=0.05,
        )  # fmt: skip
        answers = bundle.answer(rows[order[120:]], 0.9)
        known = [
            "abcd"[truth] in (each.labels or ())
            for each, truth in zip(answers, labels[order[120:]], strict=True)
            if each.reason != "unknown"
        ]
        assert len(known) > 1200
        held.append(np.mean(known))
    assert np.mean(held) > 0.9 - 3 * np.std(held) / math.sqrt(40)


def test_it_is_kept_and_read_again(tmp_path: Path) -> None:
    weights = np.linspace(0.5, 2.0, 200)
    bundle, rows = kept()
    assert bundle.conformity is not None
    for conformity in (bundle.conformity, replace(bundle.conformity, weights=weights, heaviest=2.5)):
        again = parse_bundle(bundle_bytes(replace(bundle, conformity=conformity)), tmp_path)
        assert again.conformity is not None
        assert again.conformity.limit(0.9) == conformity.limit(0.9)
        assert again.conformity.heaviest == conformity.heaviest
        assert [each.labels for each in again.answer(rows, 0.9)] == [
            each.labels for each in replace(bundle, conformity=conformity).answer(rows, 0.9)
        ]
    for wrong in (
        replace(bundle.conformity, scores=bundle.conformity.scores[::-1]),
        replace(bundle.conformity, scores=bundle.conformity.scores - 1.0),
        replace(bundle.conformity, weights=weights - 1.0),
        replace(bundle.conformity, weights=weights[1:]),
    ):
        with pytest.raises(BundleError, match="conformity"):
            parse_bundle(bundle_bytes(replace(bundle, conformity=wrong)), tmp_path)


def test_what_cannot_be_had_is_said(tmp_path: Path) -> None:
    bundle, rows = kept()
    for asked in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(UsageError, match="--coverage: not a share"):
            bundle.answer(rows, asked)
    with pytest.raises(UsageError, match=r"no sets: it was made before featx 0\.3"):
        replace(bundle, conformity=None).answer(rows, 0.9)
    (note,) = bundle.cautions_of_sets(0.999)
    assert note.startswith("The model's images are too few for a coverage of 0.999: every set is all classes.")
    assert {len(each.labels or ()) for each in bundle.answer(rows, 0.999)} == {0, 4}
    most = float(note.rsplit(" ", 1)[1][:-1])
    assert bundle.cautions_of_sets(most) == [] and bundle.cautions_of_sets(most + 0.002)
    blind = replace(bundle, sharpness=None, threshold=None, conformity=None, familiarity=None)
    assert {len(each.labels or ()) for each in blind.answer(rows, 0.5)} == {4}
    assert "most" not in blind.cautions_of_sets(0.5)[0]
    pickled = Pickled.load(export_bundle(bundle, tmp_path / "a.joblib", "joblib"))
    with pytest.raises(UsageError, match="an exported head gives no sets"):
        pickled.answer(rows, 0.9)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_predict_gives_sets_in_every_form(tmp_path: Path, featx: Featx) -> None:
    class_folders(tmp_path / "photos", each=25)
    assert featx("extract", "photos", "--out", "photos.featx", cwd=tmp_path).code == 0
    done = featx("fit", "photos.featx", "--out", "photos.model", cwd=tmp_path)
    assert "Sets of labels (predict --coverage 0.9): " in done.out
    asked = ("predict", "photos.model", "photos", "--coverage", "0.9")
    found = featx(*asked, "--json", "--csv", "a.csv", cwd=tmp_path).json
    assert found["coverage"] == 0.9
    assert all(set(each["set"]) <= {"ants", "bees"} for each in found["predictions"])
    lines = featx(*asked, cwd=tmp_path).out.splitlines()
    assert [line.split("\t")[-1] for line in lines] == [" | ".join(each["set"]) for each in found["predictions"]]
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["set"] for row in rows] == [" | ".join(each["set"]) for each in found["predictions"]]
    plain = featx("predict", "photos.model", "photos", "--json", cwd=tmp_path).json
    assert set(plain) == {"predictions", "refused"}
    assert plain["predictions"] == [{k: v for k, v in each.items() if k != "set"} for each in found["predictions"]]
    few = featx("predict", "photos.model", "photos", "--coverage", "0.99", cwd=tmp_path)
    assert "Note: The model's images are too few for a coverage of 0.99" in few.err
    assert featx("predict", "photos.model", "photos", "--coverage", "1", cwd=tmp_path).code == 2
