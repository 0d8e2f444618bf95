"""Retrieval metrics: worked by hand, and against scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from featx.errors import UsageError
from featx.retrieval import metrics as retrieval_metrics
from featx.retrieval.metrics import RetrievalResult, evaluate_retrieval


def on_a_circle(*degrees: float) -> NDArray[np.float32]:
    angle = np.deg2rad(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def evaluate(rows: NDArray[np.float32], labels: list[int], **options: Any) -> RetrievalResult:
    names = [f"class {i}" for i in range(max(labels) + 1)]
    return evaluate_retrieval(rows, labels, class_names=names, **options)


def test_an_example_by_hand() -> None:
    # Angles 0 (a), 10 (b), 25 (a), 45 (b), 70 (a). Rankings by angular distance:
    #   0 a: 10 b, 25 a, 45 b, 70 a: hits at ranks 2 and 4: AP (1/2 + 2/4) / 2 = 1/2
    #  10 b:  0 a, 25 a, 45 b, 70 a: hit at rank 3:         AP 1/3
    #  25 a: 10 b, 45 b,  0 a, 70 a: hits at 3 and 4:       AP (1/3 + 2/4) / 2 = 5/12
    #  45 b: 25 a, 70 a, 10 b,  0 a: hit at rank 3:         AP 1/3
    #  70 a: 45 b, 25 a, 10 b,  0 a: hits at 2 and 4:       AP (1/2 + 2/4) / 2 = 1/2
    found = evaluate(on_a_circle(0, 10, 25, 45, 70), [0, 1, 0, 1, 0], ks=(1, 2, 3, 10))
    mean = {k: value.mean for k, value in found.overall.recall_at_k.items()}
    assert mean == {1: 0.0, 2: 0.4, 3: 1.0, 10: 1.0}
    precision = {k: value.mean for k, value in found.overall.precision_at_k.items()}
    assert precision[1] == 0.0
    assert precision[2] == pytest.approx((1 + 0 + 0 + 0 + 1) / 2 / 5)
    assert precision[3] == pytest.approx((1 + 1 + 1 + 1 + 1) / 3 / 5)
    assert precision[10] == pytest.approx((2 + 1 + 2 + 1 + 2) / 4 / 5)  # four others are all there are
    assert found.overall.mean_average_precision.mean == pytest.approx((1 / 2 + 1 / 3 + 5 / 12 + 1 / 3 + 1 / 2) / 5)
    assert found.per_class["class 1"].mean_average_precision.mean == pytest.approx(1 / 3)
    assert found.per_class["class 0"].queries == 3
    said = found.to_json()
    assert set(said) >= {"recall_at_k", "precision_at_k", "map", "queries", "per_class", "intervals", "interval"}
    assert said["recall_at_k"]["2"] == 0.4
    assert said["queries"] == 5


def test_copies_of_the_query_are_left_out_and_counted() -> None:
    # Row 1 repeats row 0. Without care it would be everybody's first hit.
    rows = on_a_circle(0, 0, 30, 10, 80)
    found = evaluate(rows, [0, 0, 0, 1, 1], groups=[7, 7, 1, 2, 3], ks=(1,))
    # 0 and 1: 10 b, 30 a, 80 b: AP 1/2. 30 a: 10 b, 0 a, 0 a, 80 b: (1/2 + 2/3) / 2. 10 b: 0, 0, 30, 80 b: 1/4.
    # 80 b: 30 a, 10 b: 1/2.
    expected = (1 / 2 + 1 / 2 + 7 / 12 + 1 / 4 + 1 / 2) / 5
    assert found.overall.mean_average_precision.mean == pytest.approx(expected)
    assert found.overall.recall_at_k[1].mean == 0.0
    assert (found.exact_duplicates, found.queries_with_copies) == (1, 2)
    without = evaluate(rows, [0, 0, 0, 1, 1], ks=(1,))
    assert without.overall.recall_at_k[1].mean == 0.4
    # A copy with another label is left out too, and is not what the query looks for.
    torn = evaluate(on_a_circle(0, 0, 30, 60), [0, 1, 0, 1], groups=[0, 0, 1, 2], ks=(1,))
    assert torn.overall.recall_at_k[1].mean == pytest.approx(2 / 4)  # 0: 30; 0': 30 (a) no; 30: 0; 60: 30 no


def test_unlabelled_images_take_ranks_and_are_never_right() -> None:
    found = evaluate(on_a_circle(0, 5, 6, 20), [0, -1, -1, 0], ks=(1, 3))
    assert found.overall.queries == 2
    assert found.unlabelled == 2
    assert found.overall.recall_at_k[1].mean == 0.0
    assert found.overall.mean_average_precision.mean == pytest.approx(1 / 3)


def test_images_alone_in_their_class_are_no_queries() -> None:
    found = evaluate(on_a_circle(0, 5, 90, 180, 180), [0, 0, 1, 2, 2], groups=[0, 1, 2, 3, 3], ks=(1,))
    assert (found.overall.queries, found.lonely) == (2, 3)  # the two of class 2 are one image
    assert set(found.per_class) == {"class 0"}
    with pytest.raises(UsageError, match="nothing to evaluate: expected at least one class with two different images"):
        evaluate(on_a_circle(0, 5), [0, 1])


def test_ties_are_broken_by_row() -> None:
    # To the query 0, rows 1 and 2 are equally near; whichever comes first by row decides.
    rows = np.array([[1, 0], [0.6, 0.8], [0.6, -0.8], [-1, 0]], np.float32)
    assert evaluate(rows, [0, 0, 1, 1], ks=(1,)).overall.recall_at_k[1].mean == 0.5  # 0 and 1 find each other
    assert evaluate(rows, [0, 1, 0, 1], ks=(1,)).per_class["class 0"].recall_at_k[1].mean == 0.5  # 0 finds 1 first


@pytest.mark.parametrize("options", [{}, {"center": True}, {"whiten": 6}, {"expand": 3}])
@pytest.mark.parametrize("block", [2**22, 700])
def test_average_precision_is_that_of_scikit_learn(
    options: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval_metrics, "_BLOCK_SCORES", block)
    monkeypatch.setattr(retrieval_metrics, "_ROW_BLOCK", 64)
    random = np.random.default_rng(0)
    labels = random.integers(-1, 5, 200)
    rows = (np.eye(12)[labels % 5] + 0.5 * random.normal(size=(200, 12))).astype(np.float32)
    found = evaluate_retrieval(rows, labels, class_names=list("abcde"), ks=(1, 5), **options)

    from featx.retrieval.postprocess import Postprocess, expand_queries

    unit = Postprocess(center=bool(options.get("center")), whiten=options.get("whiten")).fit(rows).transform(rows)
    precisions, hits, at5 = [], [], []
    for i in np.flatnonzero(labels >= 0):
        others = np.delete(np.arange(200), i)
        query = unit[i]
        if "expand" in options:
            scores = unit[others] @ query
            near = np.argsort(-scores)[: options["expand"]]
            query = expand_queries(query[None], scores[near][None], unit[others][near][None])[0]
        scores = unit[others] @ query
        right = labels[others] == labels[i]
        precisions.append(average_precision_score(right, scores))
        order = np.argsort(-scores)
        hits.append(right[order[0]])
        at5.append(right[order[:5]].mean())
    assert found.overall.queries == len(precisions)
    assert found.overall.mean_average_precision.mean == pytest.approx(np.mean(precisions), abs=1e-9)
    assert found.overall.recall_at_k[1].mean == pytest.approx(np.mean(hits))
    assert found.overall.precision_at_k[5].mean == pytest.approx(np.mean(at5))


def test_the_interval_is_that_of_the_mean_of_the_queries() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 400)
    rows = (np.eye(16)[labels] + 0.45 * random.normal(size=(400, 16))).astype(np.float32)
    found = evaluate_retrieval(rows, labels, class_names=list("abcd")).overall.recall_at_k[1]
    error = np.sqrt(found.mean * (1 - found.mean) / 400)
    assert 0.5 < found.mean < 0.95
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.4 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.4 * error)
    # Every image four times over, as copies: no surer.
    wide = evaluate_retrieval(
        np.repeat(rows, 4, axis=0),
        np.repeat(labels, 4),
        class_names=list("abcd"),
        groups=np.repeat(np.arange(400), 4),
    ).overall.recall_at_k[1]
    assert wide.mean == found.mean
    assert wide.high - wide.low == pytest.approx(found.high - found.low, rel=0.1)


def test_always_right_is_not_surely_always_right() -> None:
    found = evaluate(on_a_circle(0, 1, 90, 91), [0, 0, 1, 1]).overall.recall_at_k[1]
    assert (found.mean, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025 ** (1 / 4))  # Clopper and Pearson, of four queries


def test_queries_are_drawn_where_there_are_too_many() -> None:
    random = np.random.default_rng(0)
    rows, labels = random.normal(size=(300, 8)).astype(np.float32), random.integers(0, 3, 300)
    found = evaluate_retrieval(rows, labels, class_names=list("abc"), max_queries=50)
    assert (found.overall.queries, found.sampled_from) == (50, 300)
    again = evaluate_retrieval(rows, labels, class_names=list("abc"), max_queries=50)
    assert again.to_json() == found.to_json()
    other = evaluate_retrieval(rows, labels, class_names=list("abc"), max_queries=50, random_state=1)
    assert other.overall.mean_average_precision.mean != found.overall.mean_average_precision.mean
    full = evaluate_retrieval(rows, labels, class_names=list("abc"))
    assert full.overall.mean_average_precision.mean == pytest.approx(1 / 3, abs=0.03)  # noise finds nothing


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recall", "plain"), [("hymenoptera", 0.91, 0.78), ("dtd10", 0.81, 0.50)])
def test_real_photos(photos: Path, tmp_path: Path, name: str, recall: float, plain: float) -> None:
    from featx.backbones.backbone import load_backbone
    from featx.extraction.run import extract_features
    from featx.images.source import ImageSet
    from featx.store.reader import read_features

    extract_features(ImageSet.from_folder(photos / name), load_backbone("efficientnet_lite0"), tmp_path / "s.featx")
    features = read_features(tmp_path / "s.featx")
    found = evaluate_retrieval(features.embeddings, features.labels, class_names=features.class_names)
    assert found.overall.recall_at_k[1].mean >= recall
    assert found.overall.mean_average_precision.mean >= plain
    better = evaluate_retrieval(
        features.embeddings, features.labels, class_names=features.class_names, center=True, expand=5
    )
    # What the documentation says of centring with expansion: the mean average precision gains.
    assert better.overall.mean_average_precision.mean >= found.overall.mean_average_precision.mean + 0.02
