"""How common a class is in a pile: estimates as by prediction-powered inference, intervals that hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import beta, hypergeom, norm

from featx.evaluation.shares import EXPECTED, _lower_limits, adjusted_shares, checked_share

Bools = NDArray[np.bool_]


def pile(n: int, share: float, recall: float, false: float, seed: int) -> tuple[Bools, Bools]:
    """Which of a pile are of a class, exactly this share, and which a classifier calls so."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(n, bool)
    truth[: round(share * n)] = True
    return truth, np.where(truth, rng.random(n) < recall, rng.random(n) < false)


def ppi(truth: Bools, named: Bools, rows: NDArray[np.intp], level: float = 0.95) -> tuple[float, float, float]:
    """The formulas of PPI++ (Angelopoulos, Duchi and Zrnic 2023) for a mean, as the paper has them, of a large pile."""
    y, f = truth[rows].astype(float), named[rows].astype(float)
    every = named.astype(float)
    n, N = len(y), len(every)
    power = np.cov(y, f)[0, 1] / ((1 + n / N) * every.var(ddof=1))
    mean = power * every.mean() + (y - power * f).mean()
    half = norm.ppf(0.5 + level / 2) * math.sqrt((y - power * f).var(ddof=1) / n + power**2 * every.var(ddof=1) / N)
    return mean, mean - half, mean + half


def test_the_exact_limits_are_those_of_all_numbers_tried() -> None:
    for right, n, total in ((0, 10, 40), (3, 10, 40), (10, 10, 40), (5, 50, 300), (47, 50, 300), (7, 30, 30)):
        for tail in (0.005, 0.025, 0.2):
            tried = [k for k in range(right, total - n + right + 1) if hypergeom.sf(right - 1, total, k, n) > tail]
            assert _lower_limits(right, n, total, np.array([tail]))[0] == tried[0]


def test_of_a_large_pile_without_a_classifier_it_is_clopper_and_pearsons() -> None:
    truth = np.arange(2_000_000) < 600_000
    rows = np.r_[np.arange(31), 600_000 + np.arange(69)]
    found = checked_share(np.zeros(len(truth), bool), rows, truth[rows])
    assert (found.low, found.high) == pytest.approx((beta.ppf(0.025, 31, 70), beta.ppf(0.975, 32, 69)), abs=1e-4)
    assert found.mean == pytest.approx(0.31)


def test_a_pile_that_was_checked_whole_is_known() -> None:
    truth, named = pile(60, 0.3, 0.8, 0.2, 0)
    found = checked_share(named, np.arange(60), truth)
    assert (found.mean, found.low, found.high) == pytest.approx((0.3, 0.3, 0.3))


def test_estimates_are_those_of_prediction_powered_inference() -> None:
    for seed in range(20):
        truth, named = pile(200_000, 0.3, 0.9, 0.08, seed)
        rows = np.random.default_rng(seed).permutation(len(truth))[:2000]
        found, (mean, low, high) = checked_share(named, rows, truth[rows]), ppi(truth, named, rows)
        assert found.mean == pytest.approx(mean, abs=5e-4)
        # Exact always, and so a fifth wider where the normal approximation would do; narrower than no classifier.
        assert 1.05 < (found.high - found.low) / (high - low) < 1.35
        alone = checked_share(np.zeros(len(truth), bool), rows, truth[rows])
        assert (found.high - found.low) < 0.8 * (alone.high - alone.low)


@pytest.mark.slow
@pytest.mark.parametrize("n", [50, 200, 1000])
@pytest.mark.parametrize(("recall", "false"), [(0.95, 0.002), (0.7, 0.02), (1.0, 0.0), (0.3, 0.1)])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.4])
def test_intervals_hold_the_truth_as_often_as_they_say(share: float, recall: float, false: float, n: int) -> None:
    draws, held = 150, 0
    for seed in range(draws):
        truth, named = pile(3000, share, recall, false, seed)
        rows = np.random.default_rng(10_000 + seed).permutation(3000)[:n]
        found = checked_share(named, rows, truth[rows], level=0.9)
        assert 0 <= found.low <= found.mean <= found.high <= 1
        held += found.low <= truth.mean() <= found.high
    assert held / draws >= 0.9 - 3 * math.sqrt(0.09 / draws)


def test_the_normal_interval_would_not_hold_for_a_rare_class() -> None:
    # What the exact interval is for: at 1 %, most of 100 checked photos show none or one.
    normal = exact = 0
    for seed in range(300):
        truth, named = pile(3000, 0.01, 0.7, 0.02, seed)
        rows = np.random.default_rng(seed).permutation(3000)[:100]
        _, low, high = ppi(truth, named, rows)
        normal += low <= 0.01 <= high
        found = checked_share(named, rows, truth[rows])
        exact += found.low <= truth.mean() <= found.high
    assert normal / 300 < 0.9 < 0.94 < exact / 300


def test_a_classifier_that_says_nothing_of_few_is_not_asked() -> None:
    truth, named = pile(1000, 0.02, 1.0, 0.0, 0)
    rows = np.random.default_rng(0).permutation(1000)
    few, many = rows[: EXPECTED * 50 - 1], rows[: EXPECTED * 50]
    alone = checked_share(np.zeros(1000, bool), few, truth[few])
    assert checked_share(named, few, truth[few]) == alone
    assert checked_share(named, many, truth[many]).mean == pytest.approx(0.02)


# --- adjusted counts ----------------------------------------------------------------------------------------------


def test_adjusted_counts_undo_known_errors() -> None:
    errors = np.array([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.05, 0.05, 0.9]])
    shares = np.array([0.7, 0.01, 0.29])
    named = np.repeat(np.arange(3), np.round(1e5 * shares @ errors).astype(int))
    found = adjusted_shares(named, 1e4 * errors, draws=50)
    assert [each.mean for each in found] == pytest.approx(shares.tolist(), abs=2e-3)
    counted = np.bincount(named) / len(named)
    assert abs(counted[1] - 0.01) > 0.05  # as the classifier has it
    # In the inside of the simplex it is the inverse of the errors (Gart and Buck).
    assert [each.mean for each in found] == pytest.approx(np.linalg.solve(errors.T, counted).tolist(), abs=2e-3)


@pytest.mark.slow
def test_their_intervals_hold_where_the_errors_are_the_same(draws: int = 24) -> None:
    errors = np.array([[0.9, 0.1, 0.0], [0.15, 0.8, 0.05], [0.05, 0.05, 0.9]])
    shares, held = np.array([0.6, 0.1, 0.3]), np.zeros(3)
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        confusion = np.stack([rng.multinomial(40, row) for row in errors]).astype(float)
        named = np.repeat(np.arange(3), rng.multinomial(1500, shares @ errors))
        found: list[Any] = adjusted_shares(named, confusion, draws=120, random_state=seed)
        held += [each.low <= share <= each.high for each, share in zip(found, shares, strict=True)]
    assert (held / draws >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / draws)).all()
