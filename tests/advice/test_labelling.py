"""Which images to label next: margins, diversity, and a simulation whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from featx.advice.labelling import choose_next, plan_simulation, rank_unlabelled, simulate
from featx.errors import UsageError
from featx.evaluation.splits import KShotSplit
from featx.heads.catalogue import HEADS
from featx.heads.scorer import margins


def test_margins_by_hand() -> None:
    rows = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [1 / 3, 1 / 3, 1 / 3]])
    assert margins(rows) == pytest.approx([0.2, 0.7, 0.0])


def test_chosen_images_are_uncertain_and_unlike_each_other() -> None:
    rng = np.random.default_rng(0)
    places = np.repeat(np.eye(8), 30, axis=0) + 0.02 * rng.normal(size=(240, 8))
    margin = np.where(np.arange(240) < 150, 0.05, 0.95) + 0.01 * rng.random(240)  # the first five places are uncertain
    picked = choose_next(places, margin, 5, random_state=0)
    assert len(set(picked.tolist())) == 5
    assert {int(row) // 30 for row in picked} == {0, 1, 2, 3, 4}  # one of each; sure ones are left alone
    assert np.array_equal(picked, choose_next(places, margin, 5, random_state=0))


def test_the_pick_of_a_cluster_is_the_nearest_to_its_weighted_mean() -> None:
    rng = np.random.default_rng(1)
    rows = np.concatenate([[[1.0, 0.0, 0.0]] * 6, [[0.0, 1.0, 0.0]] * 6]) + 0.1 * rng.normal(size=(12, 3))
    margin = rng.random(12)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = []
    for own in (np.arange(6), np.arange(6, 12)):
        centre = np.average(unit[own], axis=0, weights=1 - margin[own])
        expected.append(int(own[((unit[own] - centre) ** 2).sum(axis=1).argmin()]))
    first = int((1 - margin[6:]).sum() > (1 - margin[:6]).sum())  # the heavier cluster comes first
    assert choose_next(rows, margin, 2).tolist() == [expected[first], expected[1 - first]]


def test_equal_images_fill_up_and_too_many_are_refused() -> None:
    rows = np.ones((6, 3))
    assert sorted(choose_next(rows, np.zeros(6), 4).tolist()) != []
    assert len(set(choose_next(rows, np.zeros(6), 4).tolist())) == 4
    with pytest.raises(UsageError, match="cannot choose so many images: expected 1 to 6, found 7"):
        choose_next(rows, np.zeros(6), 7)


def unbalanced(seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Two easy large groups and four small ones that random labelling finds late."""
    rng = np.random.default_rng(seed)
    sizes = np.array([150, 150, 15, 15, 15, 15])
    labels = np.repeat([0, 1, 2, 2, 3, 3], sizes)
    parts = np.repeat(np.arange(6), sizes)
    return 3.0 * np.eye(6, 16)[parts] + 0.25 * rng.normal(size=(len(labels), 16)), labels


def test_choosing_wins_where_rare_groups_have_to_be_found() -> None:
    rows, labels = unbalanced()
    found = simulate(rows, labels, np.arange(len(labels)), start=1, batch=8, episodes=10)
    assert found.verdict == "better"
    assert found.gain.interval.mean == pytest.approx(found.chosen - found.at_random)
    assert found.chosen > found.before
    assert found.episodes == 10


def test_choosing_among_equals_gains_nothing() -> None:
    rng = np.random.default_rng(4)
    labels = np.repeat([0, 1], 60)
    rows = rng.normal(size=(120, 16))  # embeddings that know nothing of the labels
    found = simulate(rows, labels, np.arange(120), start=5, batch=10, episodes=8)
    assert found.verdict == "cannot tell"


def test_a_simulation_ends_when_it_is_told_to() -> None:
    rows, labels = unbalanced()
    groups = np.arange(len(labels))
    assert simulate(rows, labels, groups, start=1, batch=5, episodes=9, keep_on=lambda done: done < 3).episodes == 3
    with pytest.raises(UsageError, match="not simulated often enough"):
        simulate(rows, labels, groups, start=1, batch=5, keep_on=lambda done: done < 1)


def test_the_start_leaves_a_choice() -> None:
    labels = np.repeat([0, 1], 50)
    assert plan_simulation(labels, np.arange(100), 10) == 20  # 80 are not held out, 40 are left to choose from
    assert plan_simulation(labels, np.arange(100), 15) == 10
    with pytest.raises(UsageError, match="too few labelled images to try labelling on"):
        plan_simulation(labels, np.arange(100), 30)
    copies = np.repeat(np.arange(20), 5)  # ten different images per class
    assert plan_simulation(labels, copies, 2) == 2


def test_ranking_a_pool_is_choosing_by_the_heads_own_margins() -> None:
    rows, labels = unbalanced()
    support, pool = KShotSplit(3).episode(labels, np.arange(len(labels)), 0)
    picked, margin, named = rank_unlabelled(rows[support], labels[support], np.arange(len(support)), rows[pool], 6)
    plain = HEADS["auto"].build().fit(rows[support], labels[support])  # at three shots the defaults are near enough
    sure = margins(plain.predict_proba(rows[pool]))
    assert len(set(picked.tolist())) == 6
    assert np.mean(sure[picked]) < np.mean(sure)
    assert margin.shape == named.shape == (6,)
    few, _, _ = rank_unlabelled(rows[support], labels[support], np.arange(len(support)), rows[pool][:4], 6)
    assert sorted(few.tolist()) == [0, 1, 2, 3]
