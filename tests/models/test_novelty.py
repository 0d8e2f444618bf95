"""Familiarity: valid whatever the embeddings are, monotone, exact against a plain loop, and small enough to serve."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from modelkit import clusters
from scipy.stats import kstest

from featx.errors import UsageError
from featx.models.fit import fit_head
from featx.models.novelty import Familiarity, is_unknown, shares_among
from featx.models.unknown import Measured, learn, metrics_of


def alone(n: int) -> Any:
    return np.arange(n)


def learned(rows: Any, labels: Any, **changes: Any) -> tuple[Familiarity, Measured]:
    found = learn(rows, labels, **{"groups": alone(len(rows)), "kind": "l2", "max_unknown": 0.05, **changes})
    assert found[0] is not None
    assert found[1] is not None
    return found[0], found[1]


def slow_similarity(row: Any, others: Any) -> float:
    """The definition, in the plainest words."""
    unit = [each / np.linalg.norm(each) for each in others.astype(np.float64)]
    cosines = sorted(float(row @ each / np.linalg.norm(row)) for each in unit)
    return float(np.mean(cosines[-5:]))


def test_the_score_is_the_mean_cosine_to_the_five_nearest_others() -> None:
    rows, labels = clusters(each=12)
    kept, _ = learned(rows, labels)
    expected = sorted(slow_similarity(row, np.delete(rows, i, axis=0)) for i, row in enumerate(rows))
    assert np.abs(kept.own - expected).max() < 1e-3  # rows are kept in half precision
    strange = np.random.default_rng(1).normal(size=(20, rows.shape[1]))
    expected = [slow_similarity(row, rows) for row in strange]
    assert np.abs(kept.similarity(strange) - expected).max() < 1e-3
    assert np.array_equal(kept.similarity(strange), kept.similarity(7 * strange))  # directions, not lengths


@pytest.mark.slow
def test_familiarity_of_new_own_images_is_uniform() -> None:
    """Over many draws from one source, p-values of new images are uniform: their promise holds for every share."""
    rng = np.random.default_rng(0)
    found = []
    for draw in range(120):
        centres = rng.normal(size=(3, 16))
        labels = np.arange(60) % 3
        rows = centres[labels] + rng.normal(size=(60, 16))
        new = centres[np.arange(30) % 3] + rng.normal(size=(30, 16))
        kept, _ = learned(rows, labels, random_state=draw)
        found.append(kept.shares(new))
    shares = np.concatenate(found)
    assert kstest(shares, "uniform").statistic < 0.05
    for asked in (0.05, 0.1, 0.25, 0.5):
        assert abs(is_unknown(shares, asked).mean() - asked) < 0.02


@given(
    own=st.lists(st.floats(-1, 1), min_size=1, max_size=40),
    asked=st.lists(st.floats(-1, 1), min_size=2, max_size=20),
)
def test_shares_are_monotone_and_count(own: list[float], asked: list[float]) -> None:
    ranked, similar = np.sort(np.array(own)), np.sort(np.array(asked))
    shares = shares_among(ranked, similar)
    assert all(a <= b for a, b in pairwise(shares))
    assert shares.min() >= 1 / (len(own) + 1)
    assert shares.max() <= 1
    for value, share in zip(similar, shares, strict=True):
        assert share == pytest.approx((1 + sum(each <= value for each in own)) / (len(own) + 1))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 60), share=st.sampled_from([0.01, 0.05, 0.1, 0.2]), seed=st.integers(0, 9))
def test_of_own_images_no_more_are_refused_than_asked_for(n: int, share: float, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(n, 8))
    kept, measured = learned(rows, np.arange(n) % 2, max_unknown=share)
    # Exactly, of the images that it was learned from: the promise is of ranks, not of a distribution.
    refused = is_unknown(shares_among(kept.own, kept.own), share)
    assert refused.sum() <= share * (n + 1) + 1e-9
    assert measured.images == n
    smallest = metrics_of(measured, ("a", "b"))["smallest_max_unknown"]
    far = is_unknown(shares_among(kept.own, np.array([-2.0])), smallest)
    assert far.all()  # the share that is named as possible is possible


def test_copies_are_one_image() -> None:
    rows, labels = clusters(each=12)
    many = np.repeat(rows, 4, axis=0)
    groups = np.repeat(alone(len(rows)), 4)
    once, _ = learned(rows, labels)
    again, measured = learned(many, np.repeat(labels, 4), groups=groups)
    assert measured.images == len(rows)
    assert np.allclose(once.own, again.own, atol=1e-6)


def test_several_layers_are_weighted_as_the_head_weights_them() -> None:
    rows, labels = clusters(each=12)
    both = np.hstack([rows, 50 * np.random.default_rng(0).normal(size=rows.shape)])
    kind = "blocks_l2:12*1.0000,12*0.0000"
    assert np.allclose(learned(both, labels, kind=kind)[0].own, learned(rows, labels)[0].own, atol=1e-6)


def test_classes_left_out_in_turn() -> None:
    centres = 10 * np.eye(5, 20)
    labels = np.repeat(np.arange(5), 20)
    rows = centres[labels] + np.random.default_rng(0).normal(size=(100, 20))
    told = metrics_of(learned(rows, labels)[1], tuple("abcde"))
    left = told["class_left_out"]
    assert left["classes"] == 5
    assert left["per_class"] == dict.fromkeys("abcde", 1.0)
    assert left["low"] > 0.9
    rows = np.random.default_rng(0).normal(size=(100, 20))  # classes that are none: refused as own ones are
    left = metrics_of(learned(rows, labels)[1], tuple("abcde"))["class_left_out"]
    assert left["low"] <= 0.05 <= left["high"]
    assert learned(rows, labels % 2)[1].left_out is None


@pytest.mark.parametrize("each", [5, 10])
def test_few_images_say_what_they_cannot_promise(each: int) -> None:
    rows, labels = clusters(n_classes=2, each=each)
    fitted = fit_head(rows, labels, class_names=["a", "b"])
    found = fitted.metrics["unknown"]
    warned = [note for note in fitted.notes if "Nothing is called unknown" in note]
    assert len(warned) == (each == 5)
    assert fitted.familiarity is not None
    if each == 5:
        assert found["smallest_max_unknown"] == 0.091
        assert "takes at least 19 different images, found 10" in warned[0]
        assert "--max-unknown 0.091" in warned[0]
        again = fit_head(rows, labels, class_names=["a", "b"], max_unknown=0.091)
        assert not [note for note in again.notes if "Nothing is called unknown" in note]
    assert not is_unknown(fitted.familiarity.shares(rows), 0.05).any()
    assert is_unknown(fitted.familiarity.shares(-rows), 0.05).all() == (each == 10)


def test_zero_switches_it_off_and_nonsense_is_refused() -> None:
    rows, labels = clusters()
    off = fit_head(rows, labels, class_names=list("abc"), max_unknown=0)
    assert off.familiarity is None
    assert off.metrics["unknown"] is None
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(UsageError, match="--max-unknown is a share of the photos"):
            fit_head(rows, labels, class_names=list("abc"), max_unknown=share)


def test_what_ten_thousand_images_cost() -> None:
    """Memory below 20 MB, and one photo in a millisecond or two, whatever the number of images."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(10_000, 1280)).astype(np.float32)
    started = time.perf_counter()
    kept, _ = learned(rows, np.arange(10_000) % 4)
    assert time.perf_counter() - started < 60
    assert kept.rows.nbytes + kept.own.nbytes < 20e6
    assert np.array_equal(kept.rows, kept.rows.astype(np.float16).astype(np.float32))
    times = []
    for _ in range(30):
        started = time.perf_counter()
        kept.shares(rows[:1])
        times.append(time.perf_counter() - started)
    assert min(times) < 5e-3
    rare = np.zeros(10_000, dtype=np.intp)
    rare[:40] = 1
    kept, _ = learned(rows, rare)
    found = kept.similarity(rows[:40])
    assert (found > 0.2).all()  # each finds itself: a rare class keeps all its images
