"""Suggestions, the order of labelling and the random sample: on clouds of points whose classes are known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from featx._arrays import Index
from featx.studio.journal import LEFT_OUT, NONE_OF_THESE, NOTHING, UNSURE
from featx.studio.quality import sample_of
from featx.studio.suggest import Suggestions, suggest, unlike_labelled

N = 300


@pytest.fixture(scope="module")
def unit() -> NDArray[np.float32]:
    """Three clouds of a hundred photos, and the last ten far from all of them."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 64))
    kind = np.arange(N) % 3
    kind[-10:] = 3
    rows = centres[kind] + 1.1 * rng.normal(size=(N, 64))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


TRUTH = np.arange(N) % 3


def drawn(seed: int = 1) -> list[int]:
    return [int(row) for row in np.random.default_rng(seed).permutation(N)]


def asked(unit: NDArray[np.float32], codes: Index, order: list[int]) -> Suggestions:
    return suggest(unit, np.arange(N), codes, np.zeros(N, bool), order, sample_of(codes, order))


def test_before_two_classes_the_order_is_the_random_one(unit: NDArray[np.float32]) -> None:
    codes = np.full(N, NOTHING)
    codes[drawn()[0]] = 0
    found = asked(unit, codes, drawn())
    assert found.reason
    assert list(found.worth) == drawn()[1:]
    assert (found.suggested == -1).all()


def test_one_label_in_three_is_of_the_random_sample_whoever_labels_what_comes_first(unit: NDArray[np.float32]) -> None:
    codes, order = np.full(N, NOTHING), drawn()
    for number in range(60):
        found = asked(unit, codes, order)
        assert sorted(found.worth) == np.flatnonzero(codes == NOTHING).tolist()
        row = found.worth[0]
        codes[row] = TRUTH[row]
        if number > 5:
            assert (number + 1) / 3 - 1 <= len(sample_of(codes, order)), number
    right = found.suggested[codes == NOTHING] == TRUTH[codes == NOTHING]
    assert right.mean() > 0.9
    # The others are labelled for their doubt: they are suggested less surely than the sample.
    others = np.setdiff1d(np.flatnonzero(codes >= 0), sample_of(codes, order))
    untaught = asked(unit, np.where(np.isin(np.arange(N), order[:30]), TRUTH, NOTHING), order)
    assert untaught.probability[others].mean() < untaught.probability[codes == NOTHING].mean()


def test_the_sample_is_the_beginning_of_the_order_without_a_gap() -> None:
    order = drawn()
    codes = np.full(N, NOTHING)
    codes[order[:6]] = [0, 1, UNSURE, NONE_OF_THESE, LEFT_OUT, 2]
    codes[order[7:50]] = 1
    assert sample_of(codes, order).tolist() == [order[0], order[1], order[3], order[5]]
    codes[order[6]] = 0
    assert len(sample_of(codes, order)) == 48
    assert len(sample_of(np.zeros(N, np.intp), order)) == N


def test_batches_are_sure_of_one_class_and_say_how_often_such_are_wrong(unit: NDArray[np.float32]) -> None:
    order = drawn()
    codes = np.where(np.isin(np.arange(N), order[:150]), TRUTH, NOTHING)
    unlike = np.zeros(N, bool)
    unlike[order[150:200]] = True
    found = suggest(unit, np.arange(N), codes, unlike, order, sample_of(codes, order))
    assert {batch.code for batch in found.batches} == {0, 1, 2}
    for batch in found.batches:
        rows = np.array(batch.rows)
        assert (found.probability[rows] >= 0.95).all()
        assert (found.suggested[rows] == batch.code).all()
        assert (np.diff(found.probability[rows]) <= 0).all()
        assert not unlike[rows].any()
        assert (codes[rows] == NOTHING).all()
        assert (TRUTH[rows] == batch.code).mean() >= 0.95
        told = batch.to_json()["error"]
        assert isinstance(told, dict)
        assert batch.drawn
        assert told["low"] <= batch.wrong / batch.of <= told["high"]


def test_photos_unlike_the_labelled_ones_are_named_and_about_five_in_a_hundred_of_the_others(
    unit: NDArray[np.float32],
) -> None:
    shares, far = [], []
    for seed in range(5):
        order = [row for row in drawn(seed) if row < N - 10]
        codes = np.full(N, NOTHING)
        codes[order[:60]] = TRUTH[order[:60]]
        found = unlike_labelled(unit, np.arange(N), codes, sample_of(codes, [*order, *range(N - 10, N)]))
        far.append(found[-10:].mean())
        shares.append(found[order[60:]].mean())
        assert not found[order[:60]].any()
    assert np.mean(far) > 0.9
    assert 0.0 < np.mean(shares) < 0.12
    assert not unlike_labelled(unit, np.arange(N), codes, sample_of(codes, order)[:10]).any()


def test_none_of_these_is_suggested_for_what_looks_like_it(unit: NDArray[np.float32]) -> None:
    order = drawn()
    codes = np.where(np.isin(np.arange(N), order[:100]), np.where(TRUTH == 2, NONE_OF_THESE, TRUTH), NOTHING)
    found = asked(unit, codes, order)
    rest = (codes == NOTHING) & (np.arange(N) < N - 10)
    wanted = np.where(TRUTH == 2, NONE_OF_THESE, TRUTH)
    assert (found.suggested[rest] == wanted[rest]).mean() > 0.9
    assert {batch.code for batch in found.batches} == {0, 1, NONE_OF_THESE}
    alone = asked(unit, np.where(codes == 1, NONE_OF_THESE, codes), order)
    assert alone.reason  # a single class has nothing to be told from


def test_photos_without_an_embedding_are_left_alone(unit: NDArray[np.float32]) -> None:
    photos = np.arange(0, N, 2)
    codes = np.full(N, NOTHING)
    codes[photos[:30]] = TRUTH[photos[:30]]
    found = suggest(unit[photos], photos, codes, np.zeros(N, bool), drawn(), sample_of(codes, drawn()))
    assert (found.suggested[1::2] == -1).all()
    assert set(found.worth) == set(photos[30:].tolist())
